"""No call leaves memory behind: what malloc has given out is the same after a thousand calls."""

from __future__ import annotations

import ctypes
import gc

import nibblock as nb
import pytest
import reference as ref
import torch
from harness import dx_arguments, op_arguments, torch_packed
from nibblock import ops
from test_decoder_products import end_layers, heads, layer, lists
from torch import nn

raw = torch.ops.nibblock

CALLS = 1000


class _Mallinfo2(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_size_t)
        for name in (
            *("arena", "ordblks", "smblks", "hblks", "hblkhd"),
            *("usmblks", "fsmblks", "uordblks", "fordblks", "keepcost"),
        )
    ]


try:
    _mallinfo2 = ctypes.CDLL(None).mallinfo2
    _mallinfo2.restype = _Mallinfo2
except (AttributeError, OSError, TypeError):  # another libc, or glibc before 2.33
    _mallinfo2 = None


def cases() -> dict:
    torch.manual_seed(0)
    n = k = 64
    weight = ref.random_weight(ref.np.random.default_rng(0), n, k, 32, 4, True)
    packed = torch_packed(weight)
    x, grad = torch.randn(6, k), torch.randn(6, n)
    blocks = torch.tensor([[0, 0], [1, 1]], dtype=torch.int32)
    layout = ops.block_layout(blocks, n, k, 32)
    values = torch.randn(2, 32, 32)
    forward, backward = op_arguments(weight), dx_arguments(weight)
    adapted = nn.Sequential(nb.Int4Linear.from_linear(nn.Linear(k, n), 32))
    nb.add_adapters(adapted, nb.AdapterConfig(block=32), blocks={"0": blocks})
    masked = nb.MaskedLinear.from_linear(nn.Linear(k, n), blocks=blocks, block=32)
    leaf = x.clone().requires_grad_()

    def optimiser(kind):
        layer = nb.MaskedLinear.from_linear(nn.Linear(k, n), blocks=blocks, block=32)
        layer(x)
        layer.values.grad = torch.randn_like(layer.values)
        return kind([layer.values], lr=1e-6).step, layer

    scores, indices = torch.zeros(2, 2), torch.arange(0, 64, 3, dtype=torch.int32)
    flat = [torch.zeros(64)], [torch.ones(64)], [indices]
    states = [[torch.zeros(22)], [torch.zeros(22)], [torch.zeros(1, dtype=torch.int32)]]
    siblings, tables = [layer(32, 64, True), layer(64, 64, True)], torch.randn(2, 1, 16)
    mlp = [layer(32, 64, True), layer(32, 64, True), layer(64, 32, True)]
    one_token = (*heads(torch.float32), 0.25, torch.randn(3, 1, 48), torch.randn(48), 1e-5)
    end = lists(end_layers(True))
    adamw, muon = optimiser(nb.optim.MaskedAdamW), optimiser(nb.optim.MaskedMuon)
    out = {
        "int4_linear": lambda: ops.int4_linear(x, packed, **forward),
        "int4_linear_dx": lambda: ops.int4_linear_dx(grad, packed, **backward),
        "int4_block_sparse_linear": lambda: ops.int4_block_sparse_linear(
            x, packed, values, layout, block=32, **forward
        ),
        "block_sparse_linear": lambda: ops.block_sparse_linear(
            x, values, layout, out_features=n, block=32
        ),
        "block_weight_grad": lambda: ops.block_weight_grad(grad, x, layout, block=32),
        "adapter, backward": lambda: torch.autograd.grad(
            adapted(leaf), [leaf, *(p for p in adapted.parameters() if p.requires_grad)], grad
        ),
        "masked, backward": lambda: torch.autograd.grad(masked(leaf), [leaf, masked.values], grad),
        "block_scores_": lambda: ops.block_scores_(scores, None, grad, x, block=32),
        "masked_adamw_flat_": lambda: ops.masked_adamw_flat_(*flat, *states, lr=1e-6),
        "masked_grad_block_": lambda: ops.masked_grad_block_(
            [torch.ones(n, k)], [blocks], block=32
        ),
        "_int4_siblings": lambda: raw._int4_siblings(
            x, torch.ones(64), 1e-5, *lists(siblings), *tables, 2
        ),
        "_int4_mlp": lambda: raw._int4_mlp(x, *lists(mlp)),
        "_int4_layer_end": lambda: raw._int4_layer_end(*one_token, *end),
        "MaskedAdamW": lambda keep=adamw[1]: adamw[0](),
        "MaskedMuon": lambda keep=muon[1]: muon[0](),
    }
    return out


@pytest.mark.skipif(_mallinfo2 is None, reason="needs glibc 2.33 or newer, for mallinfo2")
@pytest.mark.parametrize("name", cases())
def test_a_call_leaves_nothing(name):
    """A str argument cost 32 bytes a call for good, which pinned the heap: a backward's result was
    never put where the last one had been."""
    call = cases()[name]
    for _ in range(100):
        call()
    gc.collect()
    before = _mallinfo2().uordblks
    for _ in range(CALLS):
        call()
    gc.collect()
    assert _mallinfo2().uordblks - before < 16 * CALLS
