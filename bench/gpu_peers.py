"""What else multiplies by an int4 or a block-sparse weight on an NVIDIA GPU, where it is installed.

A peer that is missing, fails, computes something else, or takes too long to get ready is left out
by name with the reason, never the run. The interfaces are those of torch, and of the packages'
own documents and benchmarks: gemlite (github.com/dropbox/gemlite, gemlite/core.py),
humming-kernels (github.com/inclusionAI/humming, benchmarks/bench_humming.py), bitsandbytes
(functional.quantize_4bit, matmul_4bit).
"""

from __future__ import annotations

import importlib.util
import json
import os
import time
from typing import Any, Callable

import torch

from .gpu_timing import Call, Calls, Int4, copies, measure, off

BUDGET = 30.0  # seconds that one peer may take in a run, its own tuning and compiling included
Bound = Callable[[torch.Tensor, int], torch.Tensor]  # (x, copy's number) -> y


class Peers:
    """The peers of one run: what is left of each one's time, and why one was left out."""

    def __init__(self, budget: float = BUDGET, now: Callable[[], float] = time.monotonic) -> None:
        self.left_out: dict[str, str] = {}
        self._spent: dict[str, float] = {}
        self._budget, self._now = budget, now

    def attempt(self, name: str, where: str, action: Callable[[], Any]) -> Any:
        """action(), or None where this peer is out of the run or leaves it now."""
        if name in self.left_out:
            return None
        start = self._now()
        try:
            result = action()
        except Exception as error:  # noqa: BLE001  (foreign code: whatever it raises is the reason)
            text = str(error).splitlines()
            self.left_out[name] = f"{where}: {type(error).__name__}: {text[0] if text else ''}"
            print(f"{name} left out from {self.left_out[name]}", flush=True)
            return None
        self._spent[name] = self._spent.get(name, 0.0) + self._now() - start
        if self._spent[name] > self._budget:
            self.left_out[name] = f"{where}: took {self._spent[name]:.0f} s until here"
            print(f"{name} left out from {self.left_out[name]}", flush=True)
        return result

    def times(
        self, name: str, where: str, calls: Calls, want: torch.Tensor | None = None
    ) -> dict[str, dict[str, float]]:
        """Both clocks of one peer, {} where it is left out.

        Args:
            want: what it must come close to; None where its weights are random codes of its own.
        """

        def run() -> dict[str, dict[str, float]]:
            (call, _), *_ = calls.values()
            got = call(0)
            if want is not None and not off(got, want) < 0.1:  # NF4 rounds where int4 is exact
                raise AssertionError(f"off by {off(got, want):.3g} of the largest value")
            return measure(calls)

        return self.attempt(name, where, run) or {}


def _needs(name: str) -> None:
    if importlib.util.find_spec(name) is None:
        raise ImportError(f"{name} is not installed")


# --- int4: each takes a layer, and returns (bound call, number of copies, whether it is comparable)


def torch_int4(layer: Int4) -> tuple[Bound, int, bool]:
    """torch's own op, on random codes of the same size."""
    codes = torch.randint(0, 256, (layer.n, layer.k // 2), dtype=torch.uint8, device="cuda")
    several = copies(torch.ops.aten._convert_weight_to_int4pack(codes, 8))
    grid = torch.rand(layer.k // 128, layer.n, 2, device="cuda").bfloat16()
    op = torch.ops.aten._weight_int4pack_mm
    return lambda x, i: op(x, several[i], 128, grid), len(several), False


def gemlite(layer: Int4) -> tuple[Bound, int, bool]:
    _needs("gemlite")
    from gemlite.core import DType, GemLiteLinear

    codes = torch.stack([layer.codes & 15, layer.codes >> 4], -1).view(layer.n, layer.k).cuda()
    count = len(layer.packed)
    several = []
    for _ in range(count):
        made = GemLiteLinear(
            4, group_size=128, in_features=layer.k, out_features=layer.n, bias=False,
            input_dtype=DType.BF16, output_dtype=DType.BF16,
        )  # fmt: skip
        made.pack(codes, layer.scales.cuda().bfloat16(), 8, None)
        several.append(made)
    return lambda x, i: several[i](x), count, True


def humming(layer: Int4) -> tuple[Bound, int, bool]:
    """humming-kernels on random codes, as its own benchmark fills them."""
    _needs("humming")
    from humming.layer import HummingLayer
    from humming.tune import get_heuristics_config
    from humming.utils.test import random_fill_tensor

    count = len(layer.packed)
    several = []
    for _ in range(count):
        made = HummingLayer(
            shape_n=layer.n, shape_k=layer.k, torch_dtype=torch.bfloat16,
            weight_config={"dtype": "uint4", "group_size": 128, "scale_dtype": "bfloat16"},
            input_config={"dtype": "bfloat16", "group_size": 0},
        ).to("cuda")  # fmt: skip
        for tensor in made.parameters():
            random_fill_tensor(tensor)
        made.transform()
        several.append(made)
    tuning = get_heuristics_config(meta=several[0].humming_metas[""], use_f16_accum=False)
    how = json.dumps({"use_f16_accum": False, "gemm_type": "dense"})
    return (
        lambda x, i: several[i](inputs=x, compute_config=how, tuning_config=tuning), count, False
    )  # fmt: skip


def bitsandbytes(layer: Int4) -> tuple[Bound, int, bool]:
    """NF4 in blocks of 64: another format, of the same number of bits."""
    _needs("bitsandbytes")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # it may ask a model hub for a kernel
    import bitsandbytes as bnb

    codes, state = bnb.functional.quantize_4bit(
        layer.dense32.bfloat16(), blocksize=64, quant_type="nf4"
    )
    several = copies(codes)
    return (
        lambda x, i: bnb.matmul_4bit(x, several[i].t(), quant_state=state), len(several), True
    )  # fmt: skip


INT4: dict[str, Callable[[Int4], tuple[Bound, int, bool]]] = {
    "torch int4": torch_int4,
    "humming": humming,
    "gemlite": gemlite,
    "bitsandbytes NF4": bitsandbytes,
}


class Int4Peers:
    """Every int4 peer bound to one layer."""

    def __init__(self, peers: Peers, layer: Int4) -> None:
        self.peers, self.where = peers, f"{layer.n}x{layer.k}"
        self.made: dict[str, tuple[Bound, int, bool]] = {}
        for name, make in INT4.items():
            found = peers.attempt(name, self.where, lambda make=make: make(layer))
            if found is not None:
                self.made[name] = found

    def measure(self, x: torch.Tensor, want: torch.Tensor) -> dict[str, dict[str, float]]:
        """{name: times} of all that are still in the run."""
        out = {}
        for name, (bound, count, comparable) in self.made.items():
            calls = {name: (lambda i, b=bound: b(x, i), count)}
            given = want if comparable else None
            out.update(self.peers.times(name, f"{self.where} m={x.shape[0]}", calls, given))
        return out


def torch_bsr(dense: torch.Tensor, block: int, x: torch.Tensor) -> tuple[Call, int]:
    """torch's product with a BSR weight."""
    several = copies(dense.bfloat16())
    weights = [w.to_sparse_bsr((block, block)) for w in several]
    return lambda i: torch.nn.functional.linear(x, weights[i]), len(weights)
