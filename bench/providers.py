"""Everything that can compute x W^T in these benchmarks: dense torch, other int4 libraries, ours.

Each provider gets its weights converted and prepacked outside the timer, in the layout its own
library asks for, and states the weight it really multiplies by, so that its result can be checked
against float64. A provider that cannot run here raises `Unavailable`, which the report prints.
"""

from __future__ import annotations

import importlib.util
import os
from dataclasses import dataclass
from typing import Callable

import torch
import torch.nn.functional as F

from .shapes import Shape
from .timing import Contender


class Unavailable(Exception):
    """This provider cannot run here; the message says why."""


class Problem:
    """One layer's weight: int4 codes with a scale and an offset per group, and the matrix they
    stand for.

    w[n, k] = scale[n, k // group] * code[n, k] + offset[n, k // group]

    Args:
        shape: the layer.
        group: values along K that share a scale; a shorter last group is allowed.
        symmetric: offset = -8 * scale instead of the group's minimum.
        seed: of the random weights.
    """

    def __init__(self, shape: Shape, group: int = 128, symmetric: bool = False, seed: int = 0):
        self.shape, self.group, self.symmetric = shape, group, symmetric
        n, k = shape.out_features, shape.in_features
        gen = torch.Generator().manual_seed(seed)
        self.groups = -(-k // group)
        pad = self.groups * group - k
        w = torch.randn(n, k, generator=gen) * k**-0.5
        blocks = F.pad(w, (0, pad)).view(n, self.groups, group)
        # Rounded to float16, so that the figures of float16 and float32 scales share one reference.
        if symmetric:
            scale = (blocks.abs().amax(-1) / 7).half().float()
            offset = -8 * scale
        else:
            low, high = blocks.amin(-1), blocks.amax(-1)
            scale = ((high - low) / 15).half().float()
            offset = low.half().float()
        codes = ((blocks - offset[..., None]) / scale[..., None]).round_().clamp_(0, 15)
        self.codes = codes.view(n, -1)[:, :k].to(torch.uint8).contiguous()
        self.scale, self.offset = scale, offset
        self.dense = self.expand(scale, offset)

    def expand(self, scale: torch.Tensor, offset: torch.Tensor) -> torch.Tensor:
        """The float32 matrix [N, K] that the codes stand for with these scales and offsets."""
        k = self.shape.in_features
        wide = [t.repeat_interleave(self.group, 1)[:, :k] for t in (scale, offset)]
        return torch.addcmul(wide[1], self.codes.float(), wide[0])

    def qweight(self) -> torch.Tensor:
        """The canonical layout [N, ceil(K/2)] uint8, low nibble = even k."""
        codes = F.pad(self.codes, (0, self.codes.shape[1] % 2))
        return (codes[:, 0::2] | (codes[:, 1::2] << 4)).contiguous()


@dataclass
class Candidate:
    """A provider bound to one problem and one M.

    run: copy index -> y [M, N]. x: the activations it runs on. weight_bytes: bytes of weights one
    call reads. reference: the float weight it multiplies by. pool: see timing.Contender.
    """

    name: str
    run: Callable[[int], torch.Tensor]
    x: torch.Tensor
    weight_bytes: int
    reference: torch.Tensor
    copies: int = 1
    pool: str = "torch"

    def contender(self, name: str | None = None) -> Contender:
        return Contender(name or self.name, self.run, self.copies, self.pool)


# --- dense torch ----------------------------------------------------------------------------------


def dense_eager(p: Problem, m: int, copies: int, dtype: torch.dtype) -> Candidate:
    w = p.dense.to(dtype).contiguous()
    ws = [w] + [w.clone() for _ in range(copies - 1)]
    x = activations(p, m, dtype)
    return Candidate("", lambda i: F.linear(x, ws[i]), x, _nbytes(w), p.dense, copies)


def onednn_weight(w: torch.Tensor, m: int) -> torch.Tensor:
    """The weight of a linear in oneDNN's order for m rows.

    Raises:
        Unavailable: oneDNN has no kernels of this dtype for this CPU; torch itself then multiplies
            bfloat16 without it.
    """
    if w.dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        raise Unavailable("oneDNN multiplies bfloat16 only with AVX-512 or AVX-NE-CONVERT")
    return torch.ops.mkldnn._reorder_linear_weight(w, m)


def dense_onednn(p: Problem, m: int, copies: int, dtype: torch.dtype) -> Candidate:
    """oneDNN with the weight reordered for this M beforehand: what torch.compile freezes."""
    w = p.dense.to(dtype).contiguous()
    ws = [onednn_weight(w, m) for _ in range(copies)]
    x = activations(p, m, dtype)
    op = torch.ops.mkldnn._linear_pointwise.default
    return Candidate(
        "", lambda i: op(x, ws[i], None, "none", [], ""), x, _nbytes(w), p.dense, copies
    )


def dense_mkl(p: Problem, m: int, copies: int, dtype: torch.dtype) -> Candidate:
    if dtype != torch.float32 or not torch.backends.mkl.is_available():
        raise Unavailable("MKL prepacks float32 only, and only where torch was built with MKL")
    w = p.dense
    reorder = torch.ops.mkl._mkl_reorder_linear_weight
    ws = [reorder(w, m) for _ in range(copies)]
    x = activations(p, m, dtype)
    op = torch.ops.mkl._mkl_linear.default
    return Candidate("", lambda i: op(x, ws[i], w, None, m), x, _nbytes(w), p.dense, copies)


# --- other int4 libraries -------------------------------------------------------------------------


def torch_int4(p: Problem, m: int, copies: int, dtype: torch.dtype) -> Candidate:
    n, k = p.shape.out_features, p.shape.in_features
    if k % p.group or p.group not in (32, 64, 128, 256):
        raise Unavailable(f"torch's int4 op needs K in whole groups, got K={k}, group={p.group}")
    if n % 16:
        raise Unavailable(f"torch's int4 op needs N to be a multiple of 16, got N={n}")
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(p.codes.to(torch.int32), 2)
    # The op computes (code - 8) * scale + zero, both in x's dtype.
    scale, zero = p.scale.to(dtype), (p.offset + 8 * p.scale).to(dtype)
    pairs = torch.stack([scale.t(), zero.t()], -1).contiguous()
    reference = p.expand(scale.float(), zero.float() - 8 * scale.float())
    ws = [(packed, pairs)] + [(packed.clone(), pairs.clone()) for _ in range(copies - 1)]
    x = activations(p, m, dtype)
    op = torch.ops.aten._weight_int4pack_mm_for_cpu.default
    group = p.group
    return Candidate(
        "",
        lambda i: op(x, ws[i][0], group, ws[i][1]),
        x,
        _nbytes(packed) + _nbytes(pairs),
        reference,
        copies,
    )


def onnxruntime_int4(p: Problem, m: int, level: int) -> Candidate:
    """MatMulNBits, symmetric, float32 activations (its fastest), one session, no spinning
    threads."""
    for package in ("onnx", "onnxruntime"):
        if importlib.util.find_spec(package) is None:
            raise Unavailable(f"{package} is not installed (pip install 'nibblock[bench]')")
    import onnx.helper as oh
    import onnx.numpy_helper as on
    import onnxruntime as ort

    n, k = p.shape.out_features, p.shape.in_features
    if k % p.group:
        raise Unavailable(f"this benchmark gives MatMulNBits whole groups only, got K={k}")
    if not p.symmetric:
        raise ValueError("onnxruntime_int4: the problem must be symmetric, got an affine one")
    blob = p.qweight().view(n, p.groups, p.group // 2).numpy()
    tensors = [on.from_array(blob, "B"), on.from_array(p.scale.reshape(-1).numpy(), "scales")]
    node = oh.make_node(
        "MatMulNBits",
        ["x", "B", "scales"],
        ["y"],
        domain="com.microsoft",
        K=k,
        N=n,
        bits=4,
        block_size=p.group,
        accuracy_level=level,
    )
    ends = [oh.make_tensor_value_info(a, 1, ["M", b]) for a, b in (("x", k), ("y", n))]
    graph = oh.make_graph([node], "linear", ends[:1], ends[1:], tensors)
    opsets = [oh.make_opsetid("", 21), oh.make_opsetid("com.microsoft", 1)]
    model = oh.make_model(graph, opset_imports=opsets, ir_version=10)
    options = ort.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    # A spinning pool would take the cores away from whoever runs next.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session = ort.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    x = activations(p, m, torch.float32)
    feed = {"x": x.numpy()}
    return Candidate(
        "",
        lambda i: torch.from_numpy(session.run(None, feed)[0]),
        x,
        blob.nbytes + 4 * p.scale.numel(),
        p.dense,
        pool=f"onnxruntime-{level}",
    )


def bitsandbytes_nf4(p: Problem, m: int) -> Candidate:
    if importlib.util.find_spec("bitsandbytes") is None:
        raise Unavailable("bitsandbytes is not installed")
    # bitsandbytes may ask a model hub for a kernel while it is imported.
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import logging

    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    import bitsandbytes as bnb

    n, k = p.shape.out_features, p.shape.in_features
    if n % 32 or k % 64:
        raise Unavailable(f"bitsandbytes' CPU kernel needs N % 32 == K % 64 == 0, got {n}x{k}")
    layer = bnb.nn.Linear4bit(
        k, n, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4", device="cpu"
    )
    layer.weight = bnb.nn.Params4bit(
        p.dense.clone(), requires_grad=False, quant_type="nf4", compress_statistics=False
    )
    layer = layer.to("cpu").eval()
    state = layer.weight.quant_state
    reference = bnb.functional.dequantize_4bit(layer.weight.data, state).float()
    nbytes = n * k // 2 + 2 * state.absmax.numel()
    x = activations(p, m, torch.bfloat16)

    def run(_: int) -> torch.Tensor:
        with torch.no_grad():
            return layer(x)

    return Candidate("", run, x, nbytes, reference, pool="bitsandbytes")


# --- ours -----------------------------------------------------------------------------------------


SCALES = torch.float16  # of our op, as Int4Linear.from_linear stores them


def nibblock_int4(
    p: Problem, m: int, copies: int, dtype: torch.dtype, compute: str = "bf16"
) -> Candidate:
    """Our op, with the scales as `Int4Linear.from_linear` stores them: float16."""
    from nibblock.ops import int4_pack
    from nibblock.ops._checks import format_code

    scale, offset = p.scale.to(SCALES), None if p.symmetric else p.offset.to(SCALES)
    n, k, group, affine = *p.shape[2:], p.group, not p.symmetric
    blobs = [
        int4_pack(p.qweight(), scale, offset, in_features=k, group_size=group, bits=4)
        for _ in range(copies)
    ]
    x = activations(p, m, dtype)
    op = torch.ops.nibblock._int4_linear_forward.default
    code = format_code(n, group, 4, affine, SCALES, compute)
    return Candidate(
        "",
        lambda i: op(x, blobs[i], None, code),
        x,
        _nbytes(blobs[0]),
        p.dense,
        copies,
    )


# --- shared ---------------------------------------------------------------------------------------

_MAKERS: dict[str, Callable[..., Candidate]] = {
    "dense fp32 eager": lambda p, m, c: dense_eager(p, m, c, torch.float32),
    "dense fp32 oneDNN": lambda p, m, c: dense_onednn(p, m, c, torch.float32),
    "dense fp32 MKL": lambda p, m, c: dense_mkl(p, m, c, torch.float32),
    "dense bf16 eager": lambda p, m, c: dense_eager(p, m, c, torch.bfloat16),
    "dense bf16 oneDNN": lambda p, m, c: dense_onednn(p, m, c, torch.bfloat16),
    "torch int4": lambda p, m, c: torch_int4(p, m, c, torch.bfloat16),
    "ORT level 0": lambda p, m, c: onnxruntime_int4(p, m, 0),
    "ORT level 4": lambda p, m, c: onnxruntime_int4(p, m, 4),
    "bitsandbytes NF4": lambda p, m, c: bitsandbytes_nf4(p, m),
    "nibblock bf16": lambda p, m, c: nibblock_int4(p, m, c, torch.bfloat16),
    "nibblock int8": lambda p, m, c: nibblock_int4(p, m, c, torch.bfloat16, "int8"),
    "nibblock bf16 x32": lambda p, m, c: nibblock_int4(p, m, c, torch.float32),
    "nibblock int8 x32": lambda p, m, c: nibblock_int4(p, m, c, torch.float32, "int8"),
}
DENSE_BF16 = ("dense bf16 eager", "dense bf16 oneDNN")

# Largest accepted sum of squares of the error over that of the float64 result, as a root. bf16
# outputs alone round by 2^-9; level 4 and compute="int8" quantise the activations to 8 bits.
_TOLERANCE = {"fp32": 1e-5, "bf16": 6e-3, "int8": 2e-2}


def weight_bytes(name: str, p: Problem) -> int:
    """Bytes of weights a provider will read in one call, before it is built."""
    n, k = p.shape.out_features, p.shape.in_features
    if name.startswith("dense"):
        return n * k * (2 if "bf16" in name else 4)
    return n * k // 2 + n * p.groups * 4


def make(name: str, problem: Problem, m: int, copies: int = 1) -> Candidate:
    """Builds one provider by name.

    Raises:
        Unavailable: it cannot run here, or not on this problem.
        ValueError: there is no provider of that name.
    """
    if name not in _MAKERS:
        raise ValueError(f"bench: provider must be one of {', '.join(_MAKERS)}, got {name!r}")
    candidate = _MAKERS[name](problem, m, copies)
    candidate.name = name
    return candidate


def error(candidate: Candidate, rows: int = 4) -> float:
    """Root of sum of squared errors over sum of squares, against float64, over a few rows of x."""
    y = candidate.run(0)
    m = candidate.x.shape[0]
    pick = torch.linspace(0, m - 1, min(rows, m)).long()
    exact = candidate.x[pick].double() @ candidate.reference.double().t()
    return float((y[pick].double() - exact).norm() / exact.norm())


def tolerance(name: str) -> float:
    if name.startswith("dense fp32") or name == "ORT level 0":
        return _TOLERANCE["fp32"]
    return _TOLERANCE["int8" if "int8" in name or name == "ORT level 4" else "bf16"]


def check(candidate: Candidate) -> float:
    """The provider's error; raises AssertionError when it computes something else than x W^T."""
    value = error(candidate)
    limit = tolerance(candidate.name)
    if not value <= limit:
        raise AssertionError(
            f"{candidate.name}: relative error against float64 must be at most {limit:.0e}, "
            f"got {value:.2e}"
        )
    return value


def activations(p: Problem, m: int, dtype: torch.dtype) -> torch.Tensor:
    gen = torch.Generator().manual_seed(1000 + m)
    # Exact in bfloat16, so that providers of different activation types see the same x.
    return torch.randn(m, p.shape.in_features, generator=gen).bfloat16().to(dtype)


def _nbytes(t: torch.Tensor) -> int:
    return t.numel() * t.element_size()


def names() -> list[str]:
    return list(_MAKERS)
