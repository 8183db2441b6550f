"""What the figures were measured on: the environment, and the machine's own ceilings."""

from __future__ import annotations

import importlib.metadata
import math
import os
import platform
import statistics
from datetime import datetime, timezone
from typing import Any

import torch

from .timing import Contender, cold_bytes, last_level_cache, wait_until_idle

_FORCING = ("NIBBLOCK_ISA", "ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS")
_PACKAGES = ("nibblock", "numpy", "onnxruntime", "bitsandbytes", "transformers", "llama_cpp_python")


def native():
    """The compiled module, imported late: it is only needed where something of ours runs."""
    from nibblock import _native

    return _native


def cpu_model() -> str:
    if os.path.isfile("/proc/cpuinfo"):
        with open("/proc/cpuinfo") as f:
            for line in f:
                if line.startswith("model name"):
                    return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def environment() -> dict[str, Any]:
    versions = {}
    for name in _PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    return {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "cpu": cpu_model(),
        "cpus": os.cpu_count(),
        "last_level_cache_bytes": last_level_cache(),
        "features": sorted(k for k, v in native().cpu_features().items() if v),
        "isa": native().cpu_isa(),
        "isa_max": native().cpu_isa_max(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torch_capability": torch.backends.cpu.get_cpu_capability(),
        "packages": versions,
        "forced": {k: os.environ[k] for k in _FORCING if k in os.environ},
        "mkldnn": torch.backends.mkldnn.is_available(),
    }


class OtherLoad:
    """How much of the CPUs other processes took between its making and `share()`: above a few
    percent, absolute times of that run mean little and even ratios are noisy."""

    def __init__(self) -> None:
        self.busy, self.total = _cpu_ticks()
        self.own = _own_seconds()

    def share(self) -> float:
        """0 .. 1 of all CPU time; NaN where the system does not tell."""
        busy, total = _cpu_ticks()
        if total <= self.total:
            return math.nan
        tick = os.sysconf("SC_CLK_TCK")
        own = (_own_seconds() - self.own) * tick
        return max(0.0, (busy - self.busy - own) / (total - self.total))


def _own_seconds() -> float:
    t = os.times()  # children too: the forced ISA levels run in some
    return t.user + t.system + t.children_user + t.children_system


def _cpu_ticks() -> tuple[int, int]:
    if not os.path.isfile("/proc/stat"):
        return 0, 0
    with open("/proc/stat") as f:
        fields = [int(v) for v in f.readline().split()[1:9]]
    return sum(fields) - fields[3] - fields[4], sum(fields)  # all but idle and iowait


class Ceilings:
    """Measures the ceilings; holds the buffer that memory is measured with."""

    def __init__(self, threads: int):
        self.threads = threads
        self.buffer = native().Bandwidth(max(1 << 26, cold_bytes()))

    def all(self, repeats: int = 5) -> dict[str, Any]:
        """Every ceiling at 1 and at all threads: {name: {unit, "1": {...}, "2": {...}}}; None where
        the CPU lacks the unit. Memory in GB/s; `copy` counts what is read and what is written."""
        wait_until_idle()
        out: dict[str, Any] = {}
        counts = sorted({1, self.threads})
        for name, fn in (("read", self.buffer.read), ("copy", self.buffer.copy)):
            out[name] = {"unit": "GB/s"}
            for t in counts:
                out[name][str(t)] = _spread([fn(t, 1 << 28) for _ in range(repeats)])
        for row in native().list_ceilings():
            out[row["name"]] = {"unit": row["unit"]}
            for t in counts:
                values = [
                    native().measure_ceiling(row["name"], t, 0.03)
                    for _ in range(repeats if row["available"] else 0)
                ]
                out[row["name"]][str(t)] = _spread(values)
        return out

    def read_contender(self) -> Contender:
        """GB/s, measured inside the rounds of a comparison, for about 5 ms each time."""
        return Contender(
            "ceiling read",
            lambda _: self.buffer.read(self.threads, 1 << 27),
            pool="native",
            measure=True,
        )

    def peak_contender(self, compute: str) -> Contender | None:
        unit = peak_unit(compute)
        if unit is None:
            return None
        return Contender(
            f"ceiling {unit}",
            lambda _: native().measure_ceiling(unit, self.threads, 0.01),
            pool="native",
            measure=True,
        )


def peak_unit(compute: str) -> str | None:
    """The arithmetic unit that our kernels for this `compute` live on at the level in force."""
    by_level = {
        "amx": ("amx_bf16", "amx_int8"),
        "avx512_vnni": ("vnni_int16", "vnni_int8"),
        "avx512": ("fma_avx512", "fma_avx512"),
        "avx2": ("fma_avx2", "fma_avx2"),
    }
    pair = by_level.get(native().cpu_isa())
    return pair[compute == "int8"] if pair else None


def _spread(values: list[float]) -> dict[str, float] | None:
    if not values:
        return None
    return {"median": statistics.median(values), "max": max(values), "min": min(values)}
