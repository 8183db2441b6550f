"""The masked updates inside torch: opcheck, compilation, errors that leave everything unchanged,
and buffers that end at a forbidden page.
"""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch
from harness import level_params, native
from nibblock import ops
from test_guard_pages import Guarded, walk_in_child

HYPER = {
    "adamw": dict(lr=0.01, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.1),
    "sgd": dict(lr=0.01, momentum=0.9, dampening=0.0, weight_decay=0.1, nesterov=False),
}
STATES = {"adamw": ("exp_avgs", "exp_avg_sqs"), "sgd": ("momenta",)}
KINDS = ("block", "flat", "bool")
STEPS = [(rule, kind) for rule in HYPER for kind in KINDS]


def arguments(rule, kind, dtype=torch.float32):
    """The op's arguments by name, in the order of its schema."""
    torch.manual_seed(0)
    step = [torch.zeros(1, dtype=torch.int32)]
    if kind == "block":
        z = 3
        given = dict(
            values=[torch.randn(z, 16, 16).to(dtype), torch.randn(0, 16, 16).to(dtype)],
            grads=[torch.randn(z, 16, 16).to(dtype), torch.randn(0, 16, 16).to(dtype)],
        )
        given.update(
            {name: [torch.zeros(z, 16, 16), torch.zeros(0, 16, 16)] for name in STATES[rule]}
        )
        given.update(
            ages=[torch.zeros(z, dtype=torch.int32), torch.zeros(0, dtype=torch.int32)],
            weights=[torch.randn(40, 30).to(dtype), torch.randn(4, 4).to(dtype)],
            blocks=[
                torch.tensor([[0, 1], [1, 0], [2, 1]], dtype=torch.int32),
                torch.zeros(0, 2, dtype=torch.int32),
            ],
            block=16,
        )
    else:
        numel, mask = 90, torch.arange(90) % 3 == 0
        index = mask.nonzero().squeeze(1)
        given = dict(params=[torch.randn(9, 10).to(dtype)], grads=[torch.randn(9, 10).to(dtype)])
        if kind == "flat":
            given.update(indices=[index])
        else:
            given.update(masks=[mask.view(9, 10)], offsets=[ops.mask_offsets(mask)])
        given.update({name: [torch.zeros(numel // 3)] for name in STATES[rule]})
        given.update(steps=step)
    return {
        **given, **HYPER[rule], "maximize": False, "multiplier": torch.tensor([0.5]),
        "found_inf": torch.zeros(1),
    }  # fmt: skip


def name_of(rule, kind):
    return f"masked_{rule}_{kind}_"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rule, kind", STEPS)
def test_opcheck_steps(rule, kind, dtype):
    given = tuple(arguments(rule, kind, dtype).values())
    torch.library.opcheck(getattr(torch.ops.nibblock, name_of(rule, kind)).default, given)
    if rule == "sgd":
        given = arguments(rule, kind, dtype)
        given.update(momenta=[], momentum=0.0, multiplier=None, found_inf=None)
        op = getattr(torch.ops.nibblock, name_of(rule, kind)).default
        torch.library.opcheck(op, tuple(given.values()))


def test_opcheck_gradients():
    o = torch.ops.nibblock
    for dtype in (torch.float32, torch.bfloat16):
        g = [torch.randn(40, 30).to(dtype), torch.randn(5).to(dtype)]
        masks = [torch.rand(40, 30) < 0.5, torch.zeros(0, dtype=torch.bool)]
        index = torch.tensor([[0, 1], [2, 0]], dtype=torch.int32)
        multiplier = torch.tensor(0.5)
        torch.library.opcheck(o.masked_grad_bool_.default, (g, masks, multiplier, 1.0))
        torch.library.opcheck(o.masked_grad_bool_.default, (g, masks, None, 0.0))
        torch.library.opcheck(o.masked_grad_block_.default, (g[:1], [index], 16, multiplier, 1.0))
        torch.library.opcheck(o.grad_norm.default, (g, multiplier))
        values, limits = [torch.randn(3, 16, 16).to(dtype)], [torch.tensor([0.0, 5.0, 99.0])]
        torch.library.opcheck(o.prox_blocks_.default, (values, [], limits))
        origins = [torch.randn(3, 16, 16).to(dtype)]
        torch.library.opcheck(o.prox_blocks_.default, (values, origins, limits))


def test_compiled_step_equals_eager():
    def step(p, g, m, v, t):
        none = torch.zeros(0, dtype=torch.bool)
        ops.masked_adamw_bool_([p], [g * 2], [none], [none.long()], [m], [v], [t], lr=1e-2)
        return p + 1

    def fresh():
        torch.manual_seed(0)
        t = torch.zeros(1, dtype=torch.int32)
        return torch.randn(50), torch.randn(50), torch.zeros(50), torch.zeros(50), t

    ours, theirs = fresh(), fresh()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*ours), step(*theirs))
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs))


# --- errors -------------------------------------------------------------------------------------


def first(change):
    """Changes the first tensor of a list."""
    return lambda tensors: [change(tensors[0]), *tensors[1:]]


def at(row, column, value):
    def change(t):
        t = t.clone()
        t[row, column] = value
        return t

    return first(change)


half, short = first(torch.Tensor.half), first(lambda t: t[:-1])
SHARED = [
    ("grads", half, TypeError, r"grads\[0\] must be float32 as (values|params)\[0\], got float16"),
    ("grads", lambda _: [], ValueError, "grads must hold . tensors as (values|params), got 0"),
    ("lr", lambda _: -0.1, ValueError, "lr must be finite and at least 0, got -0.1"),
    ("weight_decay", lambda _: float("inf"), ValueError, "weight_decay must be finite"),
    ("multiplier", torch.Tensor.double, TypeError, "multiplier must be float32, got float64"),
    (
        "found_inf",
        lambda _: torch.zeros(2),
        ValueError,
        r"found_inf must hold 1 element, got \[2\]",
    ),
]
OF_RULE = {
    "adamw": [
        ("beta1", lambda _: 1.0, ValueError, r"beta1 must be in \[0, 1\), got 1"),
        ("beta2", lambda _: -0.5, ValueError, r"beta2 must be in \[0, 1\), got -0.5"),
        ("eps", lambda _: -1.0, ValueError, "eps must be finite and at least 0, got -1"),
        ("exp_avgs", half, TypeError, r"exp_avgs\[0\] must be float32, got float16"),
        ("exp_avg_sqs", short, ValueError, r"exp_avg_sqs\[0\] must hold .* elements, got"),
    ],
    "sgd": [
        ("momenta", half, TypeError, r"momenta\[0\] must be float32, got float16"),
        ("momenta", lambda _: [], ValueError, "momenta must hold . tensors as"),
        (
            "momentum",
            lambda _: 0.0,
            ValueError,
            "momenta must be an empty list where momentum is 0",
        ),
        ("dampening", lambda _: float("nan"), ValueError, "dampening must be finite, got nan"),
    ],
}
OF_KIND = {
    "block": [
        ("values", half, TypeError, r"values\[0\] must be float32 or bfloat16, got float16"),
        (
            "values",
            first(lambda t: t.transpose(1, 2)),
            ValueError,
            r"values\[0\] must be contiguous",
        ),
        ("block", lambda _: 24, ValueError, "block must be 16, 32, 64 or 128, got 24"),
        (
            "block",
            lambda _: 32,
            ValueError,
            r"values\[0\] must be \[Z, 32, 32\], got \[3, 16, 16\]",
        ),
        ("ages", first(torch.Tensor.long), TypeError, r"ages\[0\] must be int32, got int64"),
        ("ages", first(lambda t: t - 1), ValueError, r"ages\[0\] must be at least 0, got -1"),
        ("blocks", first(torch.Tensor.long), TypeError, r"blocks\[0\] must be int32, got int64"),
        ("blocks", short, ValueError, r"blocks\[0\] must be \[3, 2\]"),
        (
            "blocks",
            at(2, 0, 3),
            ValueError,
            r"blocks\[0\] must be sorted, distinct and in the 3 x 2",
        ),
        ("blocks", at(0, 1, -1), ValueError, r"blocks\[0\] must be sorted, distinct and in"),
        ("blocks", first(lambda t: t.flip(0)), ValueError, r"blocks\[0\] must be sorted"),
        ("blocks", first(lambda t: t[[0, 0, 1]]), ValueError, r"blocks\[0\] must be sorted"),
        ("weights", half, TypeError, r"weights\[0\] must be float32 or bfloat16, got float16"),
        ("weights", first(lambda t: t.t()), ValueError, r"weights\[0\] must have contiguous rows"),
        ("weights", first(lambda t: t[0]), ValueError, r"weights\[0\] must be \[N, K\], got"),
        (
            "weights",
            lambda w: w[:1],
            ValueError,
            "weights must hold 2 tensors as values, or none, got 1",
        ),
    ],
    "flat": [
        ("indices", half, TypeError, r"indices\[0\] must be int32 or int64, got float16"),
        (
            "indices",
            first(lambda t: t + 3),
            ValueError,
            r"indices\[0\] must be sorted, .* \[0, 90\)",
        ),
        ("indices", first(lambda t: t - 1), ValueError, r"indices\[0\] must be sorted"),
        ("indices", first(lambda t: t.flip(0)), ValueError, r"indices\[0\] must be sorted"),
        ("indices", first(lambda t: t // 4), ValueError, r"indices\[0\] must be sorted"),
        ("grads", short, ValueError, r"grads\[0\] must be \[30\] or \[9, 10\] as params\[0\], got"),
        ("steps", first(torch.Tensor.float), TypeError, r"steps\[0\] must be int32, got float32"),
    ],
    "bool": [
        ("masks", first(torch.Tensor.byte), TypeError, r"masks\[0\] must be bool, got uint8"),
        ("masks", short, ValueError, r"masks\[0\] must be \[9, 10\] as params\[0\], got \[8, 10\]"),
        ("offsets", first(torch.Tensor.int), TypeError, r"offsets\[0\] must be int64, got int32"),
        ("offsets", short, ValueError, r"offsets\[0\] must hold 2 elements, got \[1\]"),
        ("offsets", first(lambda t: t + 1), ValueError, r"offsets\[0\] must count the mask"),
        ("offsets", first(lambda t: t * 4), ValueError, r"offsets\[0\] must count the mask"),
        ("offsets", first(lambda t: t - 1), ValueError, r"offsets\[0\] must count the mask"),
        ("offsets", first(lambda t: t * 2), ValueError, r"exp_avgs\[0\] must hold 60|momenta"),
        ("steps", short, ValueError, r"steps\[0\] must hold 1 elements, got \[0\]"),
    ],
}


@pytest.mark.parametrize("rule, kind", STEPS)
def test_errors_change_nothing(rule, kind):
    name = name_of(rule, kind)
    for argument, change, error, text in SHARED + OF_RULE[rule] + OF_KIND[kind]:
        given = arguments(rule, kind)
        given[argument] = change(given[argument])
        tensors = [t for a in given.values() if isinstance(a, list) for t in a]
        before = [t.clone() for t in tensors]
        with pytest.raises(RuntimeError, match=f"{name}: ({text})"):
            getattr(torch.ops.nibblock, name)(*given.values())
        with pytest.raises(error, match=f"{name}: ({text})"):
            getattr(ops, name)(**given)
        for old, new in zip(before, tensors):
            assert torch.equal(old, new), (argument, text)


@pytest.mark.parametrize("rule, kind", STEPS)
def test_the_last_of_a_list_is_checked_before_the_first_moves(rule, kind):
    good, bad = arguments(rule, kind), arguments(rule, kind)
    given = {
        k: [a[0], *(t.half() if k == "grads" else t for t in bad[k][:1])]
        if isinstance(a, list) else a
        for k, a in good.items()
    }  # fmt: skip
    before = next(iter(given.values()))[0].clone()
    with pytest.raises(TypeError, match=r"grads\[1\] must be float32 as"):
        getattr(ops, name_of(rule, kind))(**given)
    assert torch.equal(before, next(iter(given.values()))[0])


def test_blocks_of_an_empty_weight_are_out_of_range():
    given = arguments("adamw", "block")
    given["weights"] = [torch.zeros(0, 30), given["weights"][1]]
    before = given["values"][0].clone()
    with pytest.raises(ValueError, match=r"blocks\[0\] must be sorted, distinct and in the 0 x 2"):
        ops.masked_adamw_block_(**given)
    assert torch.equal(before, given["values"][0])


def test_nesterov_needs_momentum():
    given = arguments("sgd", "flat")
    given.update(nesterov=True, dampening=0.5)
    with pytest.raises(
        ValueError, match="nesterov must come with momentum above 0 and dampening 0"
    ):
        ops.masked_sgd_flat_(**given)


def test_lists_must_be_lists_of_tensors():
    given = arguments("adamw", "flat")
    given["grads"] = [1.0]
    with pytest.raises((TypeError, RuntimeError)):
        ops.masked_adamw_flat_(**given)


def test_errors_of_the_gradient_passes():
    g, index = [torch.randn(40, 30)], [torch.tensor([[0, 1], [2, 0]], dtype=torch.int32)]
    cases = [
        (ops.masked_grad_bool_, ([g[0].half()], [torch.ones(40, 30).bool()]), {}, TypeError,
         r"masked_grad_bool_: grads\[0\] must be float32 or bfloat16, got float16"),
        (ops.masked_grad_bool_, (g, [torch.ones(40, 30)]), {}, TypeError,
         r"masked_grad_bool_: masks\[0\] must be bool, got float32"),
        (ops.masked_grad_bool_, (g, []), {}, ValueError, "masks must hold 1 tensors as grads"),
        (ops.masked_grad_bool_, (g, [torch.ones(3).bool()]), {}, ValueError, r"masks\[0\] must be"),
        (ops.masked_grad_bool_, (g, [torch.ones(40, 30).bool()]), {"max_norm": float("nan")},
         ValueError, "max_norm must be a number, got nan"),
        (ops.masked_grad_block_, (g, index), {"block": 8}, ValueError, "block must be 16"),
        (ops.masked_grad_block_, (g, index), {"block": 32}, ValueError, r"blocks\[0\] must be"),
        (ops.masked_grad_block_, ([g[0][0]], index), {"block": 16}, ValueError,
         r"grads\[0\] must be \[N, K\], got \[30\]"),
        (ops.grad_norm, ([g[0].double()],), {}, TypeError, r"grad_norm: grads\[0\] must be"),
        (ops.prox_blocks_, (g, [], [torch.ones(1)]), {}, ValueError, r"values\[0\] must be \[Z, B"),
        (ops.prox_blocks_, ([torch.ones(2, 4, 4)], [], [torch.ones(1)]), {}, ValueError,
         r"thresholds\[0\] must be \[2\], got \[1\]"),
        (ops.prox_blocks_, ([torch.ones(1, 4, 4)], [], [torch.tensor([-1.0])]), {}, ValueError,
         r"thresholds\[0\] must be at least 0, got -1"),
        (ops.prox_blocks_, ([torch.ones(1, 4, 4)], [torch.ones(1, 4, 4).bfloat16()],
         [torch.ones(1)]), {}, TypeError, r"origins\[0\] must be float32 as values\[0\]"),
    ]  # fmt: skip
    for call, given, more, error, text in cases:
        before = [t.clone() for tensors in given for t in tensors]
        with pytest.raises(error, match=text):
            call(*given, **more)
        after = [t for tensors in given for t in tensors]
        assert all(torch.equal(a, b) for a, b in zip(before, after))


# --- buffers that end at a forbidden page -------------------------------------------------------


def walk(level: str) -> int:
    """Runs every kind of step with every buffer at the end, then at the start, of its pages."""
    native.set_cpu_isa(level)
    calls, guards = 0, {}

    def placed(key, tensor, at_end):
        if tensor.numel() == 0:
            return tensor
        guard = guards.setdefault(key, Guarded(1 << 17))
        raw = tensor.contiguous().view(torch.uint8).reshape(-1).numpy()
        there = torch.from_numpy(guard.place(raw, at_end))
        return there.view(tensor.dtype).view(tensor.shape)

    rng = np.random.default_rng(5)
    for (rule, kind), dtype, turn in [
        (s, d, t) for s in STEPS for d in (torch.float32, torch.bfloat16) for t in range(8)
    ]:
        expected = None
        for at_end in (None, True, False):
            given = arguments(rule, kind, dtype)
            if kind != "block":
                torch.manual_seed(turn)
                numel = (1, 7, 15, 17, 1023, 1025, 2100, 3000)[turn]
                mask = torch.rand(numel) < (0.9, 0.5, 0.1)[turn % 3]
                mask[: numel // 3] = True
                index = mask.nonzero().squeeze(1)
                given.update(params=[torch.randn(numel).to(dtype)],
                             grads=[torch.randn(numel).to(dtype)])  # fmt: skip
                given.update({n: [torch.zeros(len(index))] for n in STATES[rule]})
                if kind == "flat":
                    given.update(indices=[index.to((torch.int32, torch.int64)[turn % 2])])
                else:
                    given.update(masks=[mask], offsets=[ops.mask_offsets(mask)])
            if at_end is not None:
                for key, a in given.items():
                    if isinstance(a, list):
                        given[key] = [placed((key, i), t, at_end) for i, t in enumerate(a)]
            print(f"{rule} {kind} {dtype} turn {turn} at_end={at_end}", file=sys.stderr, flush=True)
            getattr(ops, name_of(rule, kind))(**given)
            result = next(iter(given.values()))[0].clone()
            if expected is None:
                expected = result
            assert torch.equal(result, expected)
            calls += 1
    del rng
    for at_end in (True, False):
        g = placed("grads", torch.randn(37, 45), at_end)
        mask = placed("masks", torch.rand(37, 45) < 0.5, at_end)
        index = placed("blocks", torch.tensor([[0, 2], [2, 1]], dtype=torch.int32), at_end)
        ops.grad_norm([g])
        ops.masked_grad_bool_([g], [mask], max_norm=0.5)
        ops.masked_grad_block_([g], [index], block=16)
        values = placed("values", torch.randn(2, 5, 5), at_end)
        ops.prox_blocks_([values], [], [placed("limit", torch.ones(2), at_end)])
        calls += 4
    return calls


@pytest.mark.parametrize("level", level_params())
def test_steps_stay_inside_their_buffers(level):
    assert walk_in_child(__file__, level) >= 200


if __name__ == "__main__":
    print(walk(sys.argv[1]))
