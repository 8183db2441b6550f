"""muon_direction at every level: against float64 and against singular vectors, and what it promises
of scales, zeros, NaN, strides, threads, errors, buffers and compilers.
"""

from __future__ import annotations

import itertools
import sys

import numpy as np
import pytest
import reference_muon as rm
import torch
from harness import LEVELS, as_numpy, native, row_param
from nibblock import ops
from reference_muon import BLOCKS, allowed, conditioned, direction, errors, gaussian, stretched
from test_guard_pages import Guarded, walk_in_child
from test_masked_update import same_bits
from torch._subclasses.fake_tensor import FakeTensorMode

ROWS = native.masked_update_kernels("muon_direction")
HERE = [row["isa"] for row in ROWS if row["available"]]
LEVEL = pytest.mark.parametrize("level", [row_param({**row, "id": row["isa"]}) for row in ROWS])
BLOCK = pytest.mark.parametrize("block", BLOCKS)
DTYPE = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
COUNTS = (3, 0, 2)  # blocks of each tensor of a list


def grads_of(rng, block, dtype=torch.float32, counts=COUNTS, make=gaussian):
    return [torch.from_numpy(make(rng, z, block)).to(dtype) for z in counts]


def like(rng, grads):
    return [torch.from_numpy(gaussian(rng, len(g), g.shape[-1])) for g in grads]


def copies(tensors):
    return [t.clone() for t in tensors]


def same_lists(a, b):
    return len(a) == len(b) and all(map(same_bits, a, b))


def one(block, **more):
    """The direction of a single [Z, B, B] array without momentum, as a tensor."""
    return ops.muon_direction([torch.from_numpy(block)], [], **more)[0]


# --- values -------------------------------------------------------------------------------------


RULES = (
    {},
    {"momentum": 0.8, "nesterov": False},
    {"momentum": 0.0, "nesterov": False, "steps": 1},
    {"steps": 9, "maximize": True},
)


@DTYPE
@BLOCK
def test_formula(dtype, block):
    rng = np.random.default_rng(1)
    counts, rules = ((2, 0, 1), RULES[:1]) if block == 128 else (COUNTS, RULES)
    for rule, how in itertools.product(rules, ("no", "own", "one")):
        grads = grads_of(rng, block, dtype, counts)
        before, kept = like(rng, grads) if how != "no" else [], copies(grads)
        multiplier = 0.3 if "steps" in rule else 1.0
        given = {"multiplier": torch.tensor([multiplier])} if multiplier != 1 else {}
        found = []
        for level in HERE:
            native.set_cpu_isa(level)
            momenta = [torch.cat(before)] if how == "one" else copies(before)
            got = ops.muon_direction(grads, momenta, **rule, **given)
            assert (type(got), len(got)) == (list, len(grads))
            assert same_lists(grads, kept)
            found.append((level, got, momenta[0].split(counts) if how == "one" else momenta))
        for i, grad in enumerate(grads):
            g = as_numpy(grad).astype(np.float64) * (-1 if rule.get("maximize") else 1)
            old = before[i].double().numpy() if before else None
            momentum, nesterov = rule.get("momentum", 0.95), rule.get("nesterov", True)
            u, m = rm.momentum_step(g, old, momentum, nesterov, multiplier)
            steps = rule.get("steps", 5)
            want, bound = direction(u, steps), allowed(u, steps)
            for level, got, held in found:
                what, out = f"{level} {rule} {how} {i}", got[i]
                assert (out.dtype, out.shape) == (dtype, grad.shape), what
                assert out.is_contiguous(), what
                if m is not None:
                    # g, momentum and the product are rounded, then the sum.
                    size = abs(momentum * old) + abs(g * multiplier)
                    error = np.abs(held[i].double().numpy() - m)
                    assert (error <= 4 * rm.HALF_ULP32 * size).all(), what
                if dtype == torch.float32:
                    assert (errors(out.numpy(), want) <= bound).all(), what
                    continue
                error, room = np.abs(as_numpy(out) - want), bound[:, None, None]
                assert (error <= rm.HALF_ULP16 * (np.abs(want) + room) + room).all(), what


@LEVEL
@BLOCK
def test_singular_vectors_stay_and_values_come_near_1(level, block):
    native.set_cpu_isa(level)
    u = conditioned(np.random.default_rng(2), 2, block)
    x = one(u).double().numpy()
    left, values, right = np.linalg.svd(u.astype(np.float64))
    inner = left.transpose(0, 2, 1) @ x @ right.transpose(0, 2, 1)
    want = stretched(values / np.sqrt((values**2).sum(1, keepdims=True)))
    assert (errors(inner, want[:, :, None] * np.eye(block)) <= 2e-5 * np.sqrt(block)).all()
    got = np.linalg.svd(x, compute_uv=False)
    assert 0.6 < got.min() < got.max() < 1.3
    assert values.max() / values.min() > 3  # there was something to do
    wild = np.linalg.svd(one(gaussian(np.random.default_rng(3), 2, block)).double().numpy())[1]
    assert wild.max() < 1.3


def test_the_oracles_agree():
    for block, steps in itertools.product(BLOCKS, (1, 5, 20)):
        u = gaussian(np.random.default_rng(4), 2, block).astype(np.float64)
        left, values, right = np.linalg.svd(u / np.linalg.norm(u, axis=(1, 2), keepdims=True))
        want = left * stretched(values, steps)[:, None] @ right
        # A singular value of 1e-6 grows by 3.4 a step, and its rounding of 1e-16 with it.
        assert np.abs(direction(u, steps) - want).max() < 1e-6
        # In float32 a well-conditioned block keeps the accuracy that the op promises.
        if steps == 5:
            bound = allowed(conditioned(np.random.default_rng(5), 8, block).astype(np.float64))
            assert bound.max() < 2e-5 * np.sqrt(block)


@LEVEL
@BLOCK
def test_one_entry_follows_the_scalar_iteration(level, block):
    native.set_cpu_isa(level)
    for steps, value in itertools.product((1, 5, 20), (1.0, -3e-30, 7e29)):
        u = np.zeros((1, block, block), np.float32)
        u[0, 3, block - 2] = value
        x = one(u, steps=steps).numpy()
        want = np.sign(value) * stretched(1.0, steps)
        assert abs(x[0, 3, block - 2] - want) < 1e-5
        assert np.count_nonzero(x) == 1


# --- scales, zeros, NaN -------------------------------------------------------------------------


@LEVEL
@BLOCK
def test_powers_of_two_change_no_bit(level, block):
    native.set_cpu_isa(level)
    rng = np.random.default_rng(6)
    grads, momenta = grads_of(rng, block, counts=(3,)), [torch.from_numpy(gaussian(rng, 3, block))]
    made = copies(momenta)
    want = ops.muon_direction(grads, made)[0]
    for exponents in ([-100, 0, 100], [99, -63, 64], [-20, 31, -99]):
        scale = torch.tensor([2.0**e for e in exponents]).view(3, 1, 1)
        moved = [momenta[0] * scale]
        assert same_bits(ops.muon_direction([grads[0] * scale], moved)[0], want), exponents
        assert same_bits(moved[0] / scale, made[0]), exponents
    # Beyond the powers of two: a size of 1e30 or 1e-30 costs no accuracy.
    plain = one(grads[0].numpy()).double().numpy()
    for size in (1e-30, 1e30):
        again = one(grads[0].numpy() * np.float32(size)).numpy()
        assert (errors(again, plain) <= 2 * allowed(grads[0].double().numpy())).all(), size


@LEVEL
def test_blocks_of_zeros(level):
    native.set_cpu_isa(level)
    for block, dtype in itertools.product(BLOCKS, (torch.float32, torch.bfloat16)):
        grad = grads_of(np.random.default_rng(7), block, dtype, (3,))[0]
        alone = ops.muon_direction([grad], [])[0]
        grad[1] = 0
        for momenta in ([], [torch.zeros(3, block, block)]):
            x = ops.muon_direction([grad], momenta, nesterov=False)[0]
            assert not x[1].any()
            assert same_bits(x[::2].contiguous(), alone[::2].contiguous())


@LEVEL
def test_denormals_count_as_zero(level):
    native.set_cpu_isa(level)
    tiny = torch.full((2, 16, 16), 1e-40)
    momenta = [tiny.clone()]
    assert not ops.muon_direction([tiny], momenta)[0].any()
    assert not momenta[0].any()
    # The others are so small that these would count beside them.
    grad = gaussian(np.random.default_rng(8), 2, 16) * np.float32(1e-37)
    denormal = np.abs(grad) < np.finfo(np.float32).tiny
    assert 20 < denormal.sum() < 300
    assert same_bits(one(grad), one(np.where(denormal, np.float32(0), grad)))
    assert (torch.full((4,), 1e-40) * 0.5).any(), "the caller's own arithmetic still has denormals"


@LEVEL
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_nan_and_inf_stay_in_their_block(level, bad):
    native.set_cpu_isa(level)
    rng = np.random.default_rng(9)
    for block, dtype, where in itertools.product(
        (16, 64), (torch.float32, torch.bfloat16), ("grad", "momentum")
    ):
        grads, rest = grads_of(rng, block, dtype, (4, 2)), [0, 1, 3]
        momenta = like(rng, grads)
        clean = copies(momenta)
        want = ops.muon_direction(grads, clean)
        (grads if where == "grad" else momenta)[0][2, 5, block - 1] = bad
        got = ops.muon_direction(grads, momenta)
        assert got[0][2].isnan().all()
        assert same_bits(got[0][rest], want[0][rest])
        assert same_bits(got[1], want[1])
        assert not momenta[0][2, 5, block - 1].isfinite()
        momenta[0][2, 5, block - 1] = clean[0][2, 5, block - 1]
        assert same_lists(momenta, clean)


@LEVEL
@DTYPE
@pytest.mark.parametrize("bad", [1.0, float("nan"), float("inf")])
def test_found_inf_changes_nothing(level, dtype, bad):
    native.set_cpu_isa(level)
    rng = np.random.default_rng(10)
    grads = grads_of(rng, 32, dtype)
    for momenta in ([], like(rng, grads), [torch.cat(like(rng, grads))]):
        before = copies(momenta)
        grads[0][0, 0, 0] = float("inf")
        got = ops.muon_direction(grads, momenta, found_inf=torch.tensor([bad]))
        assert [(x.dtype, x.shape) for x in got] == [(g.dtype, g.shape) for g in grads]
        assert not any(x.any() for x in got)
        assert same_lists(momenta, before)
        grads[0][0, 0, 0] = 1.0
        got = ops.muon_direction(grads, copies(before), found_inf=torch.zeros(()))
        assert same_lists(got, ops.muon_direction(grads, copies(before)))


# --- the same bits ------------------------------------------------------------------------------


@DTYPE
@BLOCK
def test_same_bits_at_every_level_and_thread_count(dtype, block):
    rng = np.random.default_rng(11)
    counts = (37, 0, 12) if block == 16 else (5, 0, 2)
    grads = grads_of(rng, block, dtype, counts)
    momenta, found = like(rng, grads), []
    top = LEVELS.index(native.cpu_isa_max())
    for level in LEVELS[: top + 1]:
        native.set_cpu_isa(level)
        for threads in (1, 2, 3) if level != "scalar" else (2,):
            torch.set_num_threads(threads)
            made = copies(momenta)
            found.append([*ops.muon_direction(grads, made, steps=5), *made])
    assert len(found) > 3 or not top
    assert all(same_lists(found[0], other) for other in found[1:])


@LEVEL
@DTYPE
def test_strides_lists_and_signs_change_no_bit(level, dtype):
    native.set_cpu_isa(level)
    rng = np.random.default_rng(12)
    grads = grads_of(rng, 32, dtype)
    momenta = like(rng, grads)
    mine = copies(momenta)
    want = ops.muon_direction(grads, mine)
    strided = {
        "transposed": [g.mT.contiguous().mT for g in grads],
        "gap": [torch.cat([g, g], 2)[:, :, :32] for g in grads],
        "every other": [torch.stack([g, g], 3)[..., 1] for g in grads],
        "blocks last": [g.permute(1, 2, 0).contiguous().permute(2, 0, 1) for g in grads],
        "offset": [torch.cat([g.new_ones(3), g.reshape(-1)])[3:].view(g.shape) for g in grads],
    }
    for what, views in strided.items():
        made = copies(momenta)
        got = ops.muon_direction(views, made)
        assert same_lists([*got, *made], [*want, *mine]), what
        assert all(x.is_contiguous() for x in got), what
    spread = grads[0][:1, :1].expand(2, 32, 32)
    got, held = ops.muon_direction([spread], []), ops.muon_direction([spread.contiguous()], [])
    assert same_bits(got[0], held[0])
    whole = [torch.cat(momenta)]
    got = ops.muon_direction(grads, whole)
    assert same_lists(got, want)
    assert same_bits(whole[0], torch.cat(mine))
    for i, grad in enumerate(grads):  # a list is as good as its parts, a tensor as its blocks
        made = [momenta[i].clone()]
        assert same_bits(ops.muon_direction([grad], made)[0], want[i])
        assert same_bits(made[0], mine[i])
    up, down = copies(momenta), copies(momenta)
    got = ops.muon_direction(grads, up, maximize=True)
    want = ops.muon_direction([-g for g in grads], down)
    assert same_lists([*got, *up], [*want, *down])
    big = [g * 1024 for g in grads]
    made, multiplier = copies(momenta), torch.tensor(1 / 1024)
    got = ops.muon_direction(big, made, multiplier=multiplier, found_inf=torch.zeros(1))
    want = ops.muon_direction(grads, copies(momenta))
    assert same_lists([*got, *made], [*want, *mine])


def test_empty_lists():
    assert ops.muon_direction([], []) == []
    nothing = torch.empty(0, 64, 64, dtype=torch.bfloat16)
    for momenta in ([], [torch.empty(0, 64, 64)]):
        (got,) = ops.muon_direction([nothing], momenta)
        assert (got.shape, got.dtype) == (nothing.shape, nothing.dtype)


def test_versions_and_derivatives():
    rng = np.random.default_rng(13)
    grads = grads_of(rng, 16)
    for momenta in (like(rng, grads), [torch.cat(like(rng, grads))]):
        before = [t._version for t in momenta]
        ops.muon_direction(grads, momenta)
        assert all(t._version > v for t, v in zip(momenta, before) if t.numel())
    assert all(g._version == 0 for g in grads)
    leaf = torch.ones(1, 16, 16, requires_grad=True)
    held = torch.ones(1, 16, 16)
    y = (leaf * held).sum()
    ops.muon_direction([grads[0][:1]], [held])
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()
    assert not ops.muon_direction([leaf], [])[0].requires_grad


# --- inside torch -------------------------------------------------------------------------------


def arguments(dtype=torch.float32, momenta="own"):
    """The op's arguments by name, in the order of its schema."""
    rng = np.random.default_rng(14)
    grads = grads_of(rng, 16, dtype, (2, 1))
    made = {"no": [], "own": like(rng, grads), "one": [torch.cat(like(rng, grads))]}[momenta]
    return {
        "grads": grads, "momenta": made, "momentum": 0.9, "nesterov": True, "steps": 5,
        "maximize": False, "multiplier": torch.tensor([0.5]), "found_inf": torch.zeros(1),
    }  # fmt: skip


def direct(given):
    """The arguments of torch's op, which writes into tensors that it is given."""
    return [torch.zeros_like(g) for g in given["grads"]], *given.values()


@DTYPE
@pytest.mark.parametrize("momenta", ["no", "own", "one"])
def test_opcheck(dtype, momenta):
    op = torch.ops.nibblock.muon_direction_.default
    given = arguments(dtype, momenta)
    torch.library.opcheck(op, direct(given))
    given.update(multiplier=None, found_inf=None, maximize=True, nesterov=False, steps=1)
    torch.library.opcheck(op, direct(given))


def test_meta_and_fake_tensors():
    for dtype, momenta in itertools.product((torch.float32, torch.bfloat16), ("no", "own", "one")):
        given = arguments(dtype, momenta)
        meta = {
            name: [t.to("meta") for t in a] if isinstance(a, list)
            else a.to("meta") if isinstance(a, torch.Tensor) else a
            for name, a in given.items()
        }  # fmt: skip
        found = [ops.muon_direction(**meta)]
        with FakeTensorMode(allow_non_fake_inputs=True):
            found.append(ops.muon_direction(**given))
        for got in found:
            assert [(x.shape, x.dtype) for x in got] == [(g.shape, dtype) for g in given["grads"]]
        assert all(x.is_meta for x in found[0])
        with pytest.raises(ValueError, match="muon_direction: .*steps"):
            ops.muon_direction(**{**meta, "steps": 0})


def test_compiled_equals_eager():
    def step(grads, momenta):
        made = ops.muon_direction([g * 2 for g in grads], momenta, momentum=0.9)
        return [x + m for x, m in zip(made, momenta)]

    ours, theirs = arguments(), arguments()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        got, want = (f(a["grads"], a["momenta"]) for f, a in ((compiled, ours), (step, theirs)))
        assert same_lists(got, want)
        assert same_lists(ours["momenta"], theirs["momenta"])


# --- errors -------------------------------------------------------------------------------------


def last(change):
    """Changes the last tensor of a list: nothing may have happened to the first by then."""
    return lambda tensors: [*tensors[:-1], change(tensors[-1])]


def to(value):
    return lambda _: value


TYPES = (
    ("grads", last(torch.Tensor.half)),
    *(("momenta", last(change)) for change in (torch.Tensor.bfloat16, torch.Tensor.double)),
    ("multiplier", torch.Tensor.double),
    ("found_inf", torch.Tensor.bool),
)
VALUES = (
    ("grads", last(lambda t: t[0])),
    ("grads", last(lambda t: t[:, :, :8])),
    ("grads", last(lambda t: torch.ones(1, 32, 32))),
    ("grads", lambda a: [t[:, :8, :8].contiguous() for t in a]),
    ("momenta", last(lambda t: t[:, :8])),
    ("momenta", last(lambda t: t.mT)),
    ("momenta", lambda a: [*a, a[0]]),
    ("momenta", lambda a: a[:1]),  # two blocks cannot be those of all three
    ("momenta", to([torch.ones(4, 16, 16)])),
    *(("momentum", to(value)) for value in (-0.1, 1.0, float("nan"))),
    *(("steps", to(value)) for value in (0, 21, -3)),
    ("multiplier", lambda t: t.expand(2)),
    ("found_inf", lambda t: t[:0]),
)
NOT_TENSORS = (
    *(("grads", change) for change in (lambda a: a[0], to([1.0]), to(None))),
    *(("momenta", change) for change in (lambda a: a[0], lambda a: [a[0], None], to(None))),
    *((name, to(0.5)) for name in ("multiplier", "found_inf")),
)
ERRORS = [(TypeError, *case) for case in TYPES + NOT_TENSORS]


@pytest.mark.parametrize(
    "error, argument, change", [*ERRORS, *((ValueError, *case) for case in VALUES)]
)
def test_errors_change_nothing(error, argument, change):
    given = arguments()
    given[argument] = change(given[argument])
    lists = [a for a in given.values() if isinstance(a, list)]
    tensors = [t for a in lists for t in a if isinstance(t, torch.Tensor)]
    before, versions = copies(tensors), [t._version for t in tensors]
    with pytest.raises(error, match=rf"^muon_direction: .*\b{argument}\b") as caught:
        ops.muon_direction(**given)
    assert "\n" not in str(caught.value)
    if (argument, change) not in NOT_TENSORS:  # torch itself refuses those
        with pytest.raises(RuntimeError, match=rf"muon_direction: .*\b{argument}\b"):
            torch.ops.nibblock.muon_direction_(*direct(given))
    assert all(map(torch.equal, tensors, before))
    assert versions == [t._version for t in tensors]


# --- kernels by name, and buffers that end at a forbidden page ----------------------------------


def test_rows_are_ordered():
    for top in ("avx512", "scalar"):
        native.set_cpu_isa(min(top, native.cpu_isa_max(), key=LEVELS.index))
        table = native.masked_update_kernels("muon_direction")
        assert [row["isa"] for row in table] == ["avx512", "avx2", "scalar"]
        for row in table:
            assert row["id"].startswith(f"muon_direction.cpu.{row['isa']}")
            can = LEVELS.index(row["isa"]) <= LEVELS.index(native.cpu_isa())
            assert row["available"] == can
            assert can or row["reason"].startswith(f"needs {row['isa']}")


def walk(level: str) -> int:
    """Runs calls with every buffer at the end, then at the start, of its pages."""
    native.set_cpu_isa(level)
    torch.set_num_threads(1)
    rng = np.random.default_rng(15)
    guards = {name: Guarded(1 << 19) for name in ("out", "grads", "momenta")}
    calls = 0

    def placed(name, tensor, at_end):
        if at_end is None or not tensor.numel():
            return tensor.clone()
        raw = tensor.view(torch.uint8).reshape(-1).numpy()
        there = torch.from_numpy(guards[name].place(raw, at_end))
        return there.view(tensor.dtype).view(tensor.shape)

    for block, dtype, z in itertools.product(BLOCKS, (torch.float32, torch.bfloat16), (1, 2, 3)):
        grad = grads_of(rng, block, dtype, (z,))[0]
        momentum, expected = like(rng, [grad])[0], None
        for at_end, with_momenta in itertools.product((None, True, False), (True, False)):
            print(block, dtype, z, at_end, with_momenta, file=sys.stderr, flush=True)
            held = [placed("momenta", momentum, at_end)] if with_momenta else []
            out, there = (placed(name, grad, at_end) for name in ("out", "grads"))
            torch.ops.nibblock.muon_direction_(
                [out], [there], held, 0.9, True, 2, False, None, None
            )
            calls += 1
            if with_momenta:
                found = out.clone(), held[0].clone()
                expected = expected or found
                assert same_lists(found, expected)
    return calls


@LEVEL
def test_calls_stay_inside_their_buffers(level):
    assert walk_in_child(__file__, level) == 144


if __name__ == "__main__":
    print(walk(sys.argv[1]))
