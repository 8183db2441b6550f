"""The operators inside torch's machinery: opcheck, compile, export, functional calls, vmap."""

from __future__ import annotations

import nibblock as nb
import numpy as np
import pytest
import reference as ref
import torch
from harness import TORCH, dx_arguments, op_arguments, torch_packed
from nibblock.ops._checks import format_code

RNG = np.random.default_rng(50)
WEIGHTS = {
    "symmetric": ref.random_weight(RNG, 24, 80, 32, 4, False, "float16"),
    "affine": ref.random_weight(RNG, 24, 80, -1, 4, True, "float32"),
    "8 bits": ref.random_weight(RNG, 24, 80, 32, 8, False, "float16"),
}


def x_of(*shape, dtype=torch.float32):
    return torch.from_numpy(np.random.default_rng(51).normal(0, 1, shape)).to(dtype)


def op_inputs(weight):
    """op name -> list of positional arguments."""
    packed, a, d = torch_packed(weight), op_arguments(weight), dx_arguments(weight)
    tail = [a["group_size"], a["bits"], a["affine"], a["scale_dtype"]]
    calls = {"int4_linear": [], "_int4_linear_forward": [], "int4_linear_dx": []}
    for dtype in TORCH.values():
        for lead in ((3,), (2, 5), (0,), ()):
            for bias in (None, x_of(24, dtype=dtype)):
                calls["_int4_linear_forward"].append(
                    (x_of(*lead, 80, dtype=dtype), packed, bias, format_code(*a.values()))
                )
                if bias is not None:
                    bias = bias.clone().requires_grad_()
                x = x_of(*lead, 80, dtype=dtype).requires_grad_()
                calls["int4_linear"].append((x, packed, bias, *a.values()))
            calls["int4_linear_dx"].append((x_of(*lead, 24, dtype=dtype), packed, *d.values()))
    # Strides that rows of memory can describe, others that they cannot; a strided blob and bias.
    blob = torch.stack([packed, packed], 1)[:, 0]
    for x in (
        x_of(3, 99)[:, 7:87],
        x_of(80, 3).t(),
        x_of(3, 160)[:, ::2],
        x_of(1, 80).expand(3, 80),
    ):
        calls["int4_linear"].append((x.detach().requires_grad_(), blob, x_of(48)[::2], *a.values()))
        calls["_int4_linear_forward"].append((x, blob, x_of(48)[::2], format_code(*a.values())))
    calls["int4_linear_dx"].append((x_of(24, 5).t(), blob, *d.values()))
    calls["int4_dequantize"] = [(packed, 24, 80, *tail, dtype) for dtype in TORCH.values()]
    calls["int4_embedding"] = [
        (torch.randint(0, 24, shape), packed, 24, 80, *tail, torch.float32)
        for shape in ((4,), (2, 3), (0,), ())
    ]
    return calls


@pytest.mark.parametrize("weight", list(WEIGHTS))
@pytest.mark.parametrize(
    "op",
    ["int4_linear", "_int4_linear_forward", "int4_linear_dx", "int4_dequantize", "int4_embedding"],
)
def test_opcheck(op, weight):
    """All of opcheck: schema, autograd registration, fake tensors, ahead-of-time dispatch."""
    calls = op_inputs(WEIGHTS[weight])[op]
    # Every kind of call through the quick checks, a few through all of them.
    quick = ("test_schema", "test_autograd_registration", "test_faketensor")
    overload = getattr(torch.ops.nibblock, op).default
    for i, arguments in enumerate(calls):
        if i % 5 == 0:
            torch.library.opcheck(overload, arguments)
        else:
            torch.library.opcheck(overload, arguments, test_utils=quick)


class Net(torch.nn.Module):
    """Two int4 products with arithmetic around them that a compiler wants to fuse."""

    def __init__(self, weight):
        super().__init__()
        self.format = op_arguments(weight)
        self.packed = torch.nn.Parameter(torch_packed(weight), requires_grad=False)
        self.bias = torch.nn.Parameter(x_of(weight.out_features))

    def forward(self, x):
        y = nb.ops.int4_linear(torch.tanh(x) * 2, self.packed, self.bias, **self.format)
        z = nb.ops.int4_linear(x.relu(), self.packed, None, **self.format)
        return (y + z).sin()


@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
def test_compiled_equals_eager(backend):
    """fullgraph, any number of rows without recompiling for each, gradients included."""
    torch._dynamo.reset()
    net = Net(WEIGHTS["affine"])
    compiled = torch.compile(net, fullgraph=True, backend=backend, dynamic=True)
    for m in (7, 2, 33):
        x = x_of(m, 80).requires_grad_()
        y, expected = compiled(x), net(x)
        # inductor has its own tanh and sin; activations rounded to 16 bits widen their last bit
        torch.testing.assert_close(y, expected, rtol=1e-3, atol=1e-3)
        inputs = (x, net.bias)
        ours = torch.autograd.grad(y.square().sum(), inputs)
        theirs = torch.autograd.grad(expected.square().sum(), inputs)
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=2e-2)
    with torch.no_grad():
        x = x_of(5, 80)
        torch.testing.assert_close(compiled(x), net(x), rtol=1e-3, atol=1e-3)


def test_rows_do_not_recompile():
    torch._dynamo.reset()
    count = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    net = Net(WEIGHTS["symmetric"])
    compiled = torch.compile(net, fullgraph=True, backend=count)
    with torch.no_grad():
        for m in (4, 5, 6, 17, 64):
            compiled(x_of(m, 80))
    assert count.frame_count <= 2, "one graph for the first shape, one with a symbolic M"


@pytest.mark.parametrize("op", ["int4_dequantize", "int4_embedding"])
def test_companions_compile(op):
    torch._dynamo.reset()
    overload = getattr(torch.ops.nibblock, op)
    for arguments in op_inputs(WEIGHTS["8 bits"])[op][:2]:
        compiled = torch.compile(lambda *a: overload(*a) * 2, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(*arguments), overload(*arguments) * 2)


def test_export_with_any_number_of_rows():
    net = Net(WEIGHTS["affine"]).eval()
    rows = torch.export.Dim("rows", min=1, max=4096)
    program = torch.export.export(net, (x_of(3, 80),), dynamic_shapes=({0: rows},))
    targets = [node.target for node in program.graph.nodes if node.op == "call_function"]
    assert targets.count(torch.ops.nibblock.int4_linear.default) == 2
    for m in (1, 3, 40):
        torch.testing.assert_close(program.module()(x_of(m, 80)), net(x_of(m, 80)))


def test_saved_export_runs_again(tmp_path):
    net = Net(WEIGHTS["symmetric"]).eval()
    program = torch.export.export(net, (x_of(3, 80),))
    torch.export.save(program, tmp_path / "net.pt2")
    again = torch.export.load(tmp_path / "net.pt2").module()
    torch.testing.assert_close(again(x_of(3, 80)), net(x_of(3, 80)))


def test_inference_mode():
    net = Net(WEIGHTS["affine"])
    with torch.inference_mode():
        y = net(x_of(3, 80))
        assert y.is_inference()
        again = nb.ops.int4_linear(y.new_ones(2, 80), net.packed, **net.format)
    assert torch.equal(y.clone(), net(x_of(3, 80)).detach())
    assert torch.equal(
        again.clone(),
        nb.ops.int4_linear(torch.ones(2, 80), net.packed, **net.format),
    )


def test_functional_call_and_module():
    net = Net(WEIGHTS["affine"])
    zero = torch.zeros_like(net.bias)
    y = torch.func.functional_call(net, {"bias": zero}, (x_of(3, 80),))
    with torch.no_grad():
        net.bias.zero_()
    assert torch.equal(y, net(x_of(3, 80)))


def test_vmap_is_refused():
    """One sentence that says what to do instead, not a slow loop over the batch."""
    net = Net(WEIGHTS["affine"])

    def call(x):
        return nb.ops.int4_linear(x, net.packed, None, **net.format)

    with pytest.raises(RuntimeError, match="int4_linear: x must not be batched by vmap, got"):
        torch.func.vmap(call)(x_of(3, 80))


def test_vmap_over_something_else_is_not_concerned():
    net = Net(WEIGHTS["affine"])
    x = x_of(3, 80)
    y = nb.ops.int4_linear(x, net.packed, **net.format)
    scaled = torch.func.vmap(lambda s: s * y)(torch.arange(4.0))
    assert torch.equal(scaled[2], 2 * y)


def test_flops_are_a_dense_products():
    from torch.utils.flop_counter import FlopCounterMode

    weight = WEIGHTS["affine"]
    packed = torch_packed(weight)
    with FlopCounterMode(display=False) as counter:
        nb.ops.int4_linear(x_of(6, 80), packed, **op_arguments(weight))
    assert counter.get_total_flops() == 2 * 6 * 80 * 24
    with FlopCounterMode(display=False) as counter:
        x = x_of(6, 80).requires_grad_()
        nb.ops.int4_linear(x, packed, **op_arguments(weight)).sum().backward()
    assert counter.get_total_flops() == 2 * (2 * 6 * 80 * 24)


def test_compiled_under_autocast():
    torch._dynamo.reset()
    net = Net(WEIGHTS["affine"])
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        y, expected = compiled(x_of(4, 80)), net(x_of(4, 80))
    assert y.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(y, expected)
