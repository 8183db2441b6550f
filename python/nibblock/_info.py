"""`nb.info()` and `python -m nibblock info`: what is installed, what this CPU allows, does it work.

The self-test runs every kernel that may run here once, on one small layer, against float64.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
from typing import Any

import numpy as np
import torch

from nibblock import _cuda, _library, _native
from nibblock._errors import BackendUnavailable
from nibblock.ops import _triton

__all__ = ["info", "self_test"]

_OPTIONAL = (
    "transformers", "gguf", "tokenizers", "safetensors", "sentencepiece", "matplotlib", "tqdm",
    "onnxruntime", "bitsandbytes", "triton",
)  # fmt: skip
# Features a level asks for beyond the one below it (csrc/common/cpu_features.cpp).
_LEVELS = {
    "scalar": (),
    "avx2": ("avx2", "fma", "f16c"),
    "avx512": ("avx512f", "avx512bw", "avx512dq", "avx512vl"),
    "avx512_vnni": ("avx512_vnni",),
    "amx": ("avx512_bf16", "amx_tile", "amx_int8", "amx_bf16"),
}
# Ops of the masked updates -> their tables.
_MASKED = {
    **{
        f"masked_{rule}_{kind}_": f"{rule}_{kind}"
        for rule in ("adamw", "sgd")
        for kind in ("block", "flat", "bool")
    },
    "masked_grad_bool_": "grad_bool",
    "masked_grad_block_": "grad_block",
    "grad_norm": "grad_norm",
    "prox_blocks_": "prox_blocks",
    "muon_direction": "muon_direction",
}
# Bounds of the self-test on max |y - y64| / max |y64|: bfloat16 keeps 8 bits, int8 activations 7.
_BOUNDS = {"bf16": 1e-2, "int8": 3e-2}


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu_model() -> str:
    try:
        with open("/proc/cpuinfo") as lines:
            for line in lines:
                if line.startswith("model name"):
                    return line.split(":", 1)[1].strip()
    except OSError:
        pass  # not Linux, or no /proc here: the machine type still says something
    return platform.machine()


def _why(level: str, highest: str, features: dict[str, bool]) -> str:
    if level != highest:
        asked = os.environ.get("NIBBLOCK_ISA")
        by = f"NIBBLOCK_ISA={asked}" if asked == level else "set_cpu_isa"
        return f"lowered by {by}; this CPU allows {highest}"
    names = list(_LEVELS)
    above = names[names.index(level) + 1 :]
    if not above:
        return "the highest there is"
    missing = [name for name in _LEVELS[above[0]] if not features[name]]
    return f"{above[0]} needs {', '.join(missing)}"


def info(self_test: bool = False) -> dict[str, Any]:
    """Facts of this installation, ready for `json.dumps`.

    Args:
        self_test: also run `self_test()`; takes well under a second.
    Returns:
        A dict with `versions`, `cpu` (model, features, isa, isa_max, why, threads), `kernels` (per
        table: id, isa, serves, available, reason), `build` (build_info.json and the module's own
        facts), `gpu_kernels` (as `kernels`, of Triton and CUDA C++ rows, with their `state`),
        `optional` (package -> version or None) and, if asked for, `self_test`.
    """
    features = dict(_native.cpu_features())
    level, highest = _native.cpu_isa(), _native.cpu_isa_max()
    facts: dict[str, Any] = {
        "versions": {
            "nibblock": _version("nibblock"),
            "torch": torch.__version__,
            "numpy": np.__version__,
            "python": platform.python_version(),
        },
        "cpu": {
            "model": _cpu_model(),
            "cores": os.cpu_count(),
            "torch_threads": torch.get_num_threads(),
            "isa": level,
            "isa_max": highest,
            "why": _why(level, highest, features),
            "features": features,
        },
        "kernels": {
            "int4_linear": _native.int4_linear_kernels("forward"),
            "int4_linear_dx": _native.int4_linear_kernels("dx"),
            "block_sparse_linear": _native.block_sparse_kernels("forward"),
            "block_sparse_linear_dx": _native.block_sparse_kernels("dx"),
            "block_weight_grad": _native.block_sparse_kernels("weight_grad"),
            "block_scores": _native.block_scores_kernels(),
            "block_gain": _native.block_gain_kernels(),
            "int4_block_sparse_linear": _native.block_sparse_kernels("fused"),
            "int4_block_sparse_linear_dx": _native.block_sparse_kernels("fused_dx"),
            **{name: _native.masked_update_kernels(which) for name, which in _MASKED.items()},
        },
        "gpu_kernels": {op: _triton.rows(op) + _cuda.rows(op) for op in _triton.OPS},
        "build": {**_library.build_info(), "native": _native.build_info()},
        "optional": {name: _version(name) for name in _OPTIONAL},
    }
    if self_test:
        facts["self_test"] = globals()["self_test"]()
    return facts


def _problem() -> dict[str, Any]:
    """One layer with a short last group, a short last panel and rows for every kind of kernel."""
    rng = np.random.default_rng(7)
    n, k, m = 40, 200, 7
    weight = rng.standard_normal((n, k), dtype=np.float32)
    codes, scales, offsets = _native.quantize(weight, 64, 4, False)
    layer = {
        "out_features": n, "in_features": k, "group_size": 64, "bits": 4, "affine": True,
        "scale_dtype": "float32",
    }  # fmt: skip
    packed = _native.pack(codes, scales, offsets, k, 64, 4)

    def rows_of(width: int) -> np.ndarray:
        """float32 rows that bfloat16 holds too."""
        bits = rng.standard_normal((m, width), dtype=np.float32).view(np.uint32)
        return (bits & np.uint32(0xFFFF0000)).view(np.float32)

    return {
        "layer": layer,
        "packed": packed,
        "dense": _native.dequantize(packed, **layer).astype(np.float64),
        "forward": rows_of(k),
        "dx": rows_of(n),
    }


def _run(problem: dict[str, Any], which: str, kernel: str) -> tuple[str, np.ndarray]:
    """The row's float32 result on the problem, in the first arithmetic and dtype that it serves."""
    x = problem[which]
    in_bf16 = (x.view(np.uint32) >> 16).astype(np.uint16)
    for compute, x_dtype in (("bf16", "float32"), ("bf16", "bfloat16"), ("int8", "float32")):
        try:
            y = _native.int4_linear_run(
                which, kernel, x if x_dtype == "float32" else in_bf16, problem["packed"], None,
                **problem["layer"], compute=compute, x_dtype=x_dtype,
            )  # fmt: skip
        except BackendUnavailable as error:
            refusal = error
            continue
        return compute, y if x_dtype == "float32" else (y.astype(np.uint32) << 16).view(np.float32)
    raise refusal


def self_test() -> list[dict[str, Any]]:
    """Runs every available kernel row, and the torch operator, once against float64.

    Returns:
        One dict a row: id, compute, error (max |y - y64| / max |y64|), bound, ok.
    """
    problem = _problem()
    rows = []
    for which in ("forward", "dx"):
        weight = problem["dense"].T if which == "forward" else problem["dense"]
        exact = problem[which].astype(np.float64) @ weight
        results = [
            (kernel["id"], *_run(problem, which, kernel["id"]))
            for kernel in _native.int4_linear_kernels(which)
            if kernel["available"]
        ]
        if which == "forward":
            layer = problem["layer"]
            y = torch.ops.nibblock.int4_linear(
                torch.from_numpy(problem["forward"]), torch.from_numpy(problem["packed"]), None,
                layer["out_features"], layer["group_size"], layer["bits"], layer["affine"],
                torch.float32, "bf16",
            )  # fmt: skip
            results.append(("torch.ops.nibblock.int4_linear", "bf16", y.numpy()))
        for name, compute, y in results:
            error = float(np.abs(y - exact).max() / np.abs(exact).max())
            bound = _BOUNDS[compute]
            rows.append(dict(id=name, compute=compute, error=error, bound=bound, ok=error <= bound))
    return rows


def _cuda_text(build: dict[str, Any]) -> str:
    cuda = build.get("cuda")
    if not cuda:
        return f"C++ kernels not built: {build.get('cuda_left_out') or 'no build facts'}"
    return (
        f"C++ kernels by nvcc {cuda['nvcc']} for {', '.join(cuda['code'])}; {_cuda.UNPROVEN}, "
        "taken only by name"
    )


def _text(facts: dict[str, Any]) -> str:
    cpu, build = facts["cpu"], facts["build"]
    lines = ["  ".join(f"{name} {version}" for name, version in facts["versions"].items()), ""]
    features = " ".join(name for name, there in cpu["features"].items() if there)
    threads = f"{cpu['cores']} cores, torch uses {cpu['torch_threads']} threads"
    lines += [
        f"CPU       {cpu['model']}, {threads}",
        f"features  {features or 'none'}",
        f"level     {cpu['isa']} ({cpu['why']})",
        f"built     against torch {build.get('torch_built_against')}, {build.get('compiler')}",
        f"libraries {' '.join(build.get('libraries', []))}",
        f"CUDA      {_cuda_text(build)}",
    ]
    there = [f"{name} {version}" for name, version in facts["optional"].items() if version]
    absent = [name for name, version in facts["optional"].items() if not version]
    lines += [f"optional  {', '.join(there) or 'none'}"]
    if absent:
        lines += [f"absent    {', '.join(absent)}"]
    rows = [row for rows in facts["gpu_kernels"].values() for row in rows]
    if rows[0]["available"]:
        lines += ["", "kernels on the GPU"]
        width = max(len(row["id"]) for row in rows)
        for row in rows:
            lines += [
                f"  {row['id']:<{width}}  serves {row['serves']:<20}  {row['state']}".rstrip()
            ]
    else:
        lines += ["", f"GPU       {len(rows)} kernels, none available: {rows[0]['reason']}"]
    for table, rows in facts["kernels"].items():
        width = max(len(row["id"]) for row in rows)
        lines += ["", f"kernels of {table}, in the order they are tried"]
        for row in rows:
            state = "available" if row["available"] else f"no: {row['reason']}"
            lines += [f"  {row['id']:<{width}}  serves {row['serves']:<20}  {state}"]
    if "self_test" in facts:
        width = max(len(row["id"]) for row in facts["self_test"])
        lines += ["", "self-test against float64"]
        for row in facts["self_test"]:
            state = "ok" if row["ok"] else "FAILED"
            lines += [
                f"  {row['id']:<{width}}  {row['compute']}  error {row['error']:.1e}"
                f" (bound {row['bound']:.0e})  {state}"
            ]
    return "\n".join(lines)


def main(argv: list[str]) -> int:
    """`python -m nibblock info`; exit code 1 if the self-test failed."""
    parser = argparse.ArgumentParser(prog="python -m nibblock info", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print the facts as JSON")
    parser.add_argument("--no-self-test", action="store_true", help="do not run the kernels")
    options = parser.parse_args(argv)
    _library.load()
    facts = info(self_test=not options.no_self_test)
    print(json.dumps(facts, indent=1) if options.json else _text(facts))
    return 0 if all(row["ok"] for row in facts.get("self_test", [])) else 1
