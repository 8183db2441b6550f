"""The CUDA masked optimiser step without a GPU: its very body over a software model.

The model (csrc/common/cuda_emulation.h) runs every thread and checks every address. Results are
compared bit by bit with the CPU's kernels, which promise the same operations in the same order, and
with the formulas in float64.
"""

from __future__ import annotations

import ctypes
import itertools
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from nibblock import ops
from reference_masked import RULES, AdamW

ROOT = Path(__file__).resolve().parents[1]
FLAGS = [
    *("-std=c++17", "-O1", "-fPIC", "-shared", "-fvisibility=hidden", "-ffp-contract=off"),
    *("-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"),
]
TYPES = {torch.float32: 0, torch.bfloat16: 1}
DTYPES = tuple(TYPES)
BLOCKS = (16, 32, 64, 128)

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed")


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    out = tmp_path_factory.mktemp("cuda") / "libcuda_masked.so"
    source = ROOT / "tests/cpp/cuda_masked.cpp"
    built = subprocess.run(
        ["g++", *FLAGS, str(source), "-o", str(out)], capture_output=True, text=True
    )
    assert built.returncode == 0, built.stderr[-4000:]
    return ctypes.CDLL(str(out))


def at(tensor):
    return None if tensor is None else ctypes.c_void_p(tensor.data_ptr())


def aligned(like, shift=0):
    """A copy whose first element lies `shift` elements behind a multiple of 64 bytes."""
    raw = torch.empty(like.numel() + 64 + shift, dtype=like.dtype)
    skip = -raw.data_ptr() % 64 // like.element_size() + shift
    out = raw[skip : skip + like.numel()].view(like.shape)
    return out.copy_(like)


class Item:
    """One tensor of a list: blocks of an N x K weight with their states."""

    def __init__(self, generator, block, n, k, count, dtype, weight, fresh=False, pad=0, shift=0):
        grid = -(-n // block), -(-k // block)
        chosen = torch.randperm(grid[0] * grid[1], generator=generator)[:count].sort().values
        self.block, self.shape = block, (n, k)
        self.blocks = torch.stack([chosen // grid[1], chosen % grid[1]], 1).int()
        size = (count, block, block)

        def normal(kind):
            return aligned(torch.randn(size, generator=generator).to(kind), shift)

        self.values, self.grad = normal(dtype), normal(dtype)
        self.first, self.second = normal(torch.float32), normal(torch.float32).abs_()
        self.age = torch.randint(0, 9, (count,), generator=generator).int()
        if fresh:
            for state in (self.first, self.second, self.age):
                state.zero_()
        # NaN between the rows, and what nothing may touch.
        self.weight = None
        if weight is not None:
            whole = torch.full((n, k + pad), float("nan"), dtype=weight)
            self.weight = aligned(whole)[:, :k]
            self.weight.copy_(torch.randn(n, k, generator=generator))

    def copy(self):
        twin = object.__new__(Item)
        twin.__dict__.update(self.__dict__)
        for name in ("values", "first", "second", "age"):
            setattr(twin, name, getattr(self, name).clone())
        if self.weight is not None:
            stride = self.weight.stride(0)
            twin.weight = torch.as_strided(self.weight, (self.shape[0], stride), (stride, 1))
            twin.weight = twin.weight.clone()[:, : self.shape[1]]
        return twin

    def same(self, other):
        for name in ("values", "first", "second", "age", "weight"):
            got, want = getattr(self, name), getattr(other, name)
            if got is None:
                continue
            kind = {2: torch.int16, 4: torch.int32}[got.element_size()]
            differs = got.contiguous().view(kind) != want.contiguous().view(kind)
            if got.is_floating_point():  # a NaN's pattern is the machine's own
                differs &= ~(got.isnan() & want.isnan())
            assert not differs.any(), (name, int(differs.sum()))


def model_step(lib, items, rule, maximize=False, multiplier=None, found_inf=None, backwards=False):
    lib.cuda_masked_clear()
    for item in items:
        n, k = item.shape
        weight = item.weight
        lib.cuda_masked_add(
            at(item.values), at(item.grad), TYPES[item.values.dtype],
            at(item.first if rule.states else None), at(item.second if rule.states == 2 else None),
            at(item.age), ctypes.c_int64(len(item.age)), at(item.blocks), at(weight),
            *map(ctypes.c_int64, (0 if weight is None else weight.stride(0), n, k)),
            0 if weight is None else TYPES[weight.dtype],
        )  # fmt: skip
    names = "lr weight_decay beta1 beta2 eps momentum dampening nesterov".split()
    numbers = np.array([float(getattr(rule, name, 0.0)) for name in names])
    return lib.cuda_masked_step(
        0 if isinstance(rule, AdamW) else 1, ctypes.c_int64(items[0].block),
        ctypes.c_void_p(numbers.ctypes.data), int(maximize), at(multiplier), at(found_inf),
        int(backwards),
    )  # fmt: skip


def cpu_step(items, rule, **more):
    """The same step by the CPU's kernels."""
    values, grads = [i.values for i in items], [i.grad for i in items]
    ages, blocks = [i.age for i in items], [i.blocks for i in items]
    weights = [i.weight for i in items] if items[0].weight is not None else []
    common = dict(block=items[0].block, lr=rule.lr, weight_decay=rule.weight_decay, **more)
    if isinstance(rule, AdamW):
        states = [i.first for i in items], [i.second for i in items]
        more = dict(beta1=rule.beta1, beta2=rule.beta2, eps=rule.eps)
        ops.masked_adamw_block_(values, grads, *states, ages, weights, blocks, **common, **more)
    else:
        momenta = [i.first for i in items] if rule.states else []
        more = dict(momentum=rule.momentum, dampening=rule.dampening, nesterov=rule.nesterov)
        ops.masked_sgd_block_(values, grads, momenta, ages, weights, blocks, **common, **more)


def both(lib, items, rule, steps=1, **more):
    twins = [item.copy() for item in items]
    for _ in range(steps):
        assert model_step(lib, items, rule, **more) > 0
        more.pop("backwards", None)
        cpu_step(twins, rule, **more)
    for got, want in zip(items, twins):
        got.same(want)


# --- maps ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("shift", [4, 5, 6, 7])
def test_every_entry_is_taken_once(library, shift):
    seen = np.zeros(1 << 15, np.int32)
    count = library.cuda_masked_spots(shift, ctypes.c_void_p(seen.ctypes.data))
    size = count << (2 * shift)
    assert (seen[:size] == 1).all()
    assert (seen[size:] == 0).all()


def test_tasks_find_their_tensor(library):
    rng = np.random.default_rng(0)
    for length in (1, 2, 3, 44):
        counts = rng.integers(1, 9, length)
        first = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
        pointer = ctypes.c_void_p(first.ctypes.data)
        for task in range(first[-1]):
            owner = library.cuda_masked_tensor(length, pointer, task)
            assert first[owner] <= task < first[owner + 1]
    assert [library.cuda_masked_tasks(4, ctypes.c_int64(z)) for z in (1, 4, 5)] == [1, 1, 2]
    assert [library.cuda_masked_tasks(7, ctypes.c_int64(z)) for z in (1, 4, 5)] == [1, 4, 5]
    assert library.cuda_masked_params_bytes() <= 4096


# --- steps ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bits_of_the_cpu(library, block, dtype):
    """Every rule with every kind of weight, ragged in both directions, blocks of several ages."""
    generator = torch.Generator().manual_seed(block)
    weights = itertools.cycle([None, torch.float32, torch.bfloat16])
    for rule, weight in zip(RULES, weights):
        n, k = 2 * block + 5, 3 * block - 3
        item = Item(generator, block, n, k, 5, dtype, weight, pad=3)
        both(library, [item], rule, steps=2)


@pytest.mark.parametrize("dtype, weight", list(itertools.product(DTYPES, DTYPES)), ids=str)
def test_weights_wide_and_narrow(library, dtype, weight):
    """Rows that 16-byte stores may take (K and stride whole) and rows that they may not."""
    generator = torch.Generator().manual_seed(1)
    for n, k, pad in [(64, 128, 0), (64, 128, 8), (33, 100, 0), (64, 97, 1), (40, 33, 2)]:
        item = Item(generator, 32, n, k, 4, dtype, weight, pad=pad)
        both(library, [item], RULES[1])


@pytest.mark.parametrize("shift", [1, 2, 4])
def test_views_that_begin_anywhere(library, shift):
    generator = torch.Generator().manual_seed(shift)
    for dtype, rule in itertools.product(DTYPES, (RULES[0], RULES[7])):
        both(library, [Item(generator, 16, 60, 50, 7, dtype, dtype, shift=shift)], rule)


def test_first_update_and_decay_against_float64(library):
    generator = torch.Generator().manual_seed(2)
    for rule, fresh in itertools.product(RULES, (True, False)):
        item = Item(generator, 32, 64, 64, 2, torch.float32, torch.float32, fresh=fresh)
        item.age.fill_(0 if fresh else 6)
        old = item.copy()
        model_step(library, [item], rule)
        states = tuple(s.numpy() for s in (old.first, old.second)[: rule.states])
        t = int(old.age[0]) + 1
        want, bound = rule.step64(old.values.numpy(), old.grad.numpy(), states, t)
        assert (np.abs(item.values.numpy() - want) <= bound).all(), rule
        assert (item.age == t).all()
        for (row, column), value in zip(item.blocks.tolist(), item.values):
            at_rows, at_columns = (
                slice(32 * row, 32 * row + 32),
                slice(32 * column, 32 * column + 32),
            )
            assert torch.equal(item.weight[at_rows, at_columns], value)


def test_lists_take_as_few_launches_as_they_can(library):
    """Mixed types and more tensors than one launch's parameters hold; none of them empty-handed."""
    generator = torch.Generator().manual_seed(3)
    most = library.cuda_masked_list()
    for lengths, launches in [((1, 0), 1), ((2, 1), 2), ((most, 0), 1), ((most + 1, 1), 3)]:
        items = [
            Item(generator, 16, 40, 40, 1 + i % 6, dtype, torch.float32)
            for dtype, length in zip(DTYPES, lengths)
            for i in range(length)
        ]
        items = [items[i] for i in torch.randperm(len(items), generator=generator)]
        twins = [item.copy() for item in items]
        assert model_step(library, items, RULES[1]) == launches
        cpu_step(twins, RULES[1])
        for got, want in zip(items, twins):
            got.same(want)


def test_a_list_with_nothing_in_it(library):
    generator = torch.Generator().manual_seed(4)
    items = [Item(generator, 32, 64, 64, count, torch.float32, None) for count in (0, 2, 0)]
    assert model_step(library, items, RULES[0]) == 1
    assert model_step(library, items[:1], RULES[0]) == 0


def test_multiplier_and_maximize(library):
    generator = torch.Generator().manual_seed(5)
    for factor, maximize, rule in itertools.product((0.25, 3.0), (False, True), RULES[:6:5]):
        item = Item(generator, 32, 50, 70, 3, torch.float32, torch.bfloat16)
        both(library, [item], rule, multiplier=torch.tensor(factor), maximize=maximize)


@pytest.mark.parametrize("found", [1.0, float("inf"), float("nan")])
def test_found_inf_moves_nothing(library, found):
    generator = torch.Generator().manual_seed(6)
    for rule, block in itertools.product((RULES[0], RULES[6]), (16, 128)):
        item = Item(generator, block, 2 * block, 2 * block, 3, torch.bfloat16, torch.bfloat16)
        old = item.copy()
        model_step(library, [item], rule, found_inf=torch.tensor(found))
        item.same(old)
        assert torch.equal(item.age, old.age)
        both(library, [item], rule, found_inf=torch.tensor(0.0))


def test_order_of_blocks_changes_nothing(library):
    generator = torch.Generator().manual_seed(7)
    items = [Item(generator, 16, 100, 100, 9, torch.float32, torch.float32) for _ in range(3)]
    both(library, items, RULES[3], backwards=True)


def test_nan_infinity_and_denormals(library):
    """Denormals count as zero on both; NaN stays in its entry; states in their entries."""
    generator = torch.Generator().manual_seed(8)
    for rule in (RULES[0], RULES[1], RULES[7]):
        for dtype in DTYPES:
            item = Item(generator, 32, 64, 64, 2, dtype, torch.float32)
            item.grad[0, 0, :4] = torch.tensor([float("nan"), float("inf"), -0.0, 1e-40])
            item.values[0, 1, :3] = torch.tensor([float("nan"), 1e-39, -float("inf")])
            item.first[1, :2] = 1e-38
            item.first[1, 2] = 1e-39
            item.second[1, :3] = 1.3e-38
            item.grad[1, :3] = 0.0
            both(library, [item], rule, steps=3)


def test_blocks_elsewhere_write_nothing(library):
    """No list can lead the kernel outside the weight, where the model would stop."""
    generator = torch.Generator().manual_seed(9)
    item = Item(generator, 32, 64, 64, 3, torch.float32, torch.float32)
    item.blocks = torch.tensor([[-1, 0], [0, 5], [1 << 25, 0]], dtype=torch.int32)
    old = item.copy()
    assert model_step(library, [item], RULES[0]) == 1
    assert torch.equal(item.weight, old.weight)
    assert torch.equal(item.values, old.values)
