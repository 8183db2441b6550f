"""Every row of the block-sparse tables, on NumPy storage, against float64.

The oracle and the layout array come from `reference_blocks`; nothing of the Python package lies
between the test and the kernel.
"""

from __future__ import annotations

import itertools
import sys

import numpy as np
import pytest
import reference as ref
from harness import X_DTYPES, aligned, isa, load, native, own_dtype, row_param, store
from reference_blocks import Blocks, check_product, layout, random_blocks
from test_guard_pages import Guarded, guarded_rows, walk_in_child

BLOCKS = (16, 32, 64, 128)
TABLES = ("forward", "dx", "weight_grad", "fused", "fused_dx")
SIZES = ((1, 1), (17, 118), (118, 17), (32, 64), (130, 300), (257, 129))
ROWS = (1, 2, 3, 4, 5, 7, 8, 13, 17, 50)
VALUES = ("float32", "bfloat16")
FORMAT = dict(group_size=32, bits=4, affine=False, scale_dtype="float32")


def params(*tables):
    """pytest parameters (table, kernel id)."""
    return [
        row_param(row, which)
        for which in tables or TABLES
        for row in native.block_sparse_kernels(which)
    ]


def serves(which, kernel_id, m, x_dtype, compute="bf16"):
    row = next(r for r in native.block_sparse_kernels(which) if r["id"] == kernel_id)
    limits = {
        "any call": True,
        "m <= 4": m <= 4,
        "m >= 5": m >= 5,
        "bfloat16 x": x_dtype == "bfloat16",
        "compute bf16": compute == "bf16",
    }
    return all(limits[need] for need in row["serves"].split(", "))


def operand(kernel_id):
    """What a kernel may round the factors of its products to."""
    return own_dtype(kernel_id)


def case(rng, i, n, k, block, kernel_id):
    """A block list of one of several densities, values with rubbish outside [N, K], dtypes."""
    density = (0.0, 0.25, 1.0, 0.5)[i % 4]
    blocks = random_blocks(rng, n, k, block, density)
    if n % block and len(blocks.index):
        blocks.values[blocks.index[:, 0] == blocks.grid[0] - 1, n % block :] = np.nan
    if k % block and len(blocks.index):
        blocks.values[blocks.index[:, 1] == blocks.grid[1] - 1, :, k % block :] = np.inf
    return blocks, own_dtype(kernel_id, X_DTYPES[i % 3]), VALUES[i // 3 % 2]


def plain(blocks: Blocks, dtype) -> Blocks:
    """The blocks with their values as the kernel sees them."""
    stored = load(store(blocks.values, dtype), dtype)
    return Blocks(blocks.index, stored, blocks.out_features, blocks.in_features)


def sizes(blocks):
    return dict(
        out_features=blocks.out_features, in_features=blocks.in_features, block=blocks.block
    )


def random_rows(rng, m, width, dtype, gap=3):
    """[m, width] in storage, rows `gap` elements apart."""
    return store(rng.normal(0, 1, (m, width + gap)).astype(np.float32), dtype)[:, :width]


@pytest.mark.parametrize("which, kernel_id", params("forward", "dx"))
def test_products(which, kernel_id):
    rng = np.random.default_rng(1)
    for i, ((n, k), block, m) in enumerate(itertools.product(SIZES, BLOCKS, ROWS)):
        blocks, x_dtype, v_dtype = case(rng, i, n, k, block, kernel_id)
        if not serves(which, kernel_id, m, x_dtype):
            continue
        dense = plain(blocks, v_dtype).dense()
        width, out = (k, n) if which == "forward" else (n, k)
        x = random_rows(rng, m, width, x_dtype)
        bias = y0 = None
        extra = []
        if which == "forward" and i % 2:
            bias = store(rng.normal(0, 1, n).astype(np.float32), X_DTYPES[i % 3])
            extra.append(ref.bf16_bits_to_f32(bias) if bias.dtype == np.uint16 else bias)
        if which == "forward" and i % 5 < 2:
            y0 = random_rows(rng, m, n, x_dtype)
            extra.append(load(y0, x_dtype))
        what = f"{kernel_id} m={m} n={n} k={k} block={block} x={x_dtype} values={v_dtype}"
        y = native.block_sparse_run(
            which, kernel_id, x, store(blocks.values, v_dtype), layout(blocks), bias=bias, y0=y0,
            threads=1 + i % 3, **sizes(blocks),
        )  # fmt: skip
        w = dense if which == "forward" else dense.T
        check_product(
            load(y, x_dtype).reshape(m, out), load(x, x_dtype), w, extra, dtype=x_dtype,
            operand=operand(kernel_id), what=what,
        )  # fmt: skip


@pytest.mark.parametrize("which, kernel_id", params("forward"))
def test_y0_may_be_y(which, kernel_id):
    rng = np.random.default_rng(2)
    blocks = random_blocks(rng, 70, 90, 16, 0.3)
    for m in (2, 20):
        x_dtype = own_dtype(kernel_id)
        if not serves(which, kernel_id, m, x_dtype):
            continue
        x = random_rows(rng, m, 90, x_dtype)
        y = store(rng.normal(0, 1, (m, 70)).astype(np.float32), x_dtype)
        want = native.block_sparse_run(
            which, kernel_id, x, blocks.values, layout(blocks), y0=y, **sizes(blocks)
        )
        native.block_sparse_run(
            which, kernel_id, x, blocks.values, layout(blocks), y0=y, y=y, **sizes(blocks)
        )
        assert np.array_equal(y, want)


@pytest.mark.parametrize("which, kernel_id", params("weight_grad"))
def test_weight_grad(which, kernel_id):
    rng = np.random.default_rng(3)
    rows = (0, 1, 2, 17, 50, 300, 1100)
    for i, ((n, k), block, m) in enumerate(itertools.product(SIZES, BLOCKS, rows)):
        blocks, dtype, out_dtype = case(rng, i, n, k, block, kernel_id)
        if not serves(which, kernel_id, m, dtype) or (m > 300 and (n > 200 or block > 32)):
            continue
        g, x = random_rows(rng, m, n, dtype), random_rows(rng, m, k, dtype)
        what = f"{kernel_id} m={m} n={n} k={k} block={block} x={dtype} out={out_dtype}"
        got = native.block_weight_grad_run(
            kernel_id, g, x, layout(blocks), dtype=out_dtype, threads=1 + i % 3, **sizes(blocks)
        )
        got = load(got, out_dtype)
        whole = load(g, dtype).astype(np.float64).T @ load(x, dtype).astype(np.float64)
        zeros = blocks.gather(np.ones((n, k))) == 0
        assert (got[zeros] == 0).all(), what
        scattered = np.full((n, k), np.nan)
        stored = Blocks(blocks.index, got, n, k).dense()
        mask = Blocks(blocks.index, np.ones_like(got), n, k).dense() > 0
        scattered[mask] = stored[mask]
        scattered[~mask] = whole[~mask]
        check_product(
            scattered, load(g, dtype).T, load(x, dtype).T, dtype=out_dtype,
            operand=operand(kernel_id), what=what,
        )  # fmt: skip


def base_level(kernel_id):
    """The level whose int4 kernels a fused row runs on: AVX-512's take the CPU's best."""
    level = kernel_id.split(".")[2]
    return isa(level if level in ("scalar", "avx2") else native.cpu_isa())


def fused_arguments(rng, n, k, block, i, rank, kernel_id):
    weight = ref.random_weight(rng, n, k, **FORMAT)
    blocks, x_dtype, v_dtype = case(rng, i, n, k, block, kernel_id)
    a = rng.normal(0, 0.5, (rank, k)).astype(np.float32) if rank else None
    c = rng.normal(0, 0.5, (n, rank)).astype(np.float32) if rank else None
    return weight, blocks, x_dtype, v_dtype, a, c


@pytest.mark.parametrize("which, kernel_id", params("fused", "fused_dx"))
@pytest.mark.parametrize("compute", ["bf16", "int8"])
def test_fused_is_base_plus_adapter(which, kernel_id, compute):
    """Against the int4 kernel's own result: the adapter's share is what is tested here.

    Where the base meets bfloat16 tiles, which give no float32 result, it is the product of the
    weights as they stand in the tiles.
    """
    rng = np.random.default_rng(4)
    cases = itertools.product(((17, 118), (130, 300), (257, 129)), BLOCKS, (1, 3, 4, 5, 16, 33))
    served = 0
    for i, ((n, k), block, m) in enumerate(cases):
        rank = (0, 3, 16, 40)[i % 4]
        arguments = fused_arguments(rng, n, k, block, i, rank, kernel_id)
        weight, blocks, x_dtype, v_dtype, a, c = arguments
        if not serves(which, kernel_id, m, x_dtype, compute):
            continue
        served += 1
        dx = which == "fused_dx"
        x = random_rows(rng, m, n if dx else k, x_dtype)
        bias = None if dx else rng.normal(0, 1, n).astype(np.float32)
        packed = aligned(ref.pack(weight))
        y = native.int4_block_sparse_run(
            which, kernel_id, x, packed, bias, values=store(blocks.values, v_dtype),
            layout=layout(blocks), block=block, lora_a=a, lora_c=c, compute=compute,
            threads=1 + i % 2, **weight.format,
        )  # fmt: skip
        xf = load(x, x_dtype).astype(np.float64)
        adapter = plain(blocks, v_dtype).dense()
        if rank:
            adapter = adapter + c.astype(np.float64) @ a.astype(np.float64)
        w = adapter.T if dx else adapter
        # The base in float32, by a kernel of the same level: what is left is one float32 sum.
        with base_level(kernel_id):
            table = "dx" if dx else "forward"
            call = dict(compute=compute, **weight.format)
            chosen = native.int4_linear_select(table, m=m, x_dtype=x_dtype, **call)["kernel"]
            base = native.int4_linear_run(table, None, load(x, x_dtype), packed, bias, **call)
        extra = [base]
        if own_dtype(chosen) == "bfloat16":
            in_tiles = ref.round_to(weight.dense(), "bfloat16").astype(np.float64)
            xf, w = np.hstack([xf, xf]), np.hstack([in_tiles.T if dx else in_tiles, w])
            extra = [] if bias is None else [bias]
        what = f"{kernel_id} m={m} n={n} k={k} block={block} rank={rank} x={x_dtype} {compute}"
        check_product(
            load(y, x_dtype), xf, w, extra, dtype=x_dtype,
            operand=operand(kernel_id), factor=4 + rank, what=what,
        )  # fmt: skip
    assert served >= 30 or (".amx." in kernel_id and compute == "int8"), served


@pytest.mark.parametrize("which, kernel_id", params("fused", "fused_dx"))
def test_fused_without_blocks_is_the_base(which, kernel_id):
    """No stored block, or stored zeros: the bits of the int4 linear."""
    rng = np.random.default_rng(5)
    x_dtype = own_dtype(kernel_id)
    for m, (n, k), block in itertools.product((1, 4, 9), ((64, 96), (70, 45)), (16, 64)):
        if not serves(which, kernel_id, m, x_dtype):
            continue
        weight = ref.random_weight(rng, n, k, **FORMAT)
        packed = aligned(ref.pack(weight))
        dx = which == "fused_dx"
        x = random_rows(rng, m, n if dx else k, x_dtype)
        with base_level(kernel_id):
            base = native.int4_linear_run(
                "dx" if dx else "forward", None, x, packed, None, compute="bf16",
                x_dtype=x_dtype, **weight.format,
            )  # fmt: skip
        for density in (0.0, 0.5):
            blocks = random_blocks(rng, n, k, block, density)
            y = native.int4_block_sparse_run(
                which, kernel_id, x, packed, None, values=0 * blocks.values, layout=layout(blocks),
                block=block, compute="bf16", **weight.format,
            )  # fmt: skip
            assert np.array_equal(y, base), (kernel_id, m, n, k, block, density)


@pytest.mark.parametrize("which, kernel_id", params())
def test_same_bits_at_any_thread_count_and_in_any_company(which, kernel_id):
    rng = np.random.default_rng(6)
    n, k, block, m = 150, 210, 32, 100
    blocks = random_blocks(rng, n, k, block, 0.4)
    weight = ref.random_weight(rng, n, k, **FORMAT)
    packed = aligned(ref.pack(weight))
    x, g = (random_rows(rng, m, width, own_dtype(kernel_id)) for width in (k, n))

    def call(rows, threads):
        if which == "weight_grad":
            return native.block_weight_grad_run(
                kernel_id, g[rows], x[rows], layout(blocks), threads=threads, **sizes(blocks)
            )
        of = g if which in ("dx", "fused_dx") else x
        if which in ("forward", "dx"):
            return native.block_sparse_run(
                which, kernel_id, of[rows], blocks.values, layout(blocks), threads=threads,
                **sizes(blocks),
            )  # fmt: skip
        return native.int4_block_sparse_run(
            which, kernel_id, of[rows], packed, None, values=blocks.values, layout=layout(blocks),
            block=block, compute="bf16", threads=threads, **weight.format,
        )  # fmt: skip

    everything = slice(0, 4 if kernel_id.endswith(".small") else m)
    first = call(everything, 1)
    for threads in (2, 3, 7):
        assert np.array_equal(call(everything, threads), first), threads
    if which in ("forward", "dx") and not kernel_id.endswith(".small"):
        assert np.array_equal(call(slice(31, 57), 2), first[31:57])


@pytest.mark.parametrize("which, kernel_id", params("forward", "dx"))
def test_nan_and_infinity_touch_only_what_they_meet(which, kernel_id):
    rng = np.random.default_rng(7)
    n, k, block = 64, 96, 32
    index = np.array([[0, 0], [0, 2], [1, 1]])
    blocks = Blocks(index, rng.normal(0, 1, (3, block, block)).astype(np.float32), n, k)
    width, out = (k, n) if which == "forward" else (n, k)
    for m in (4, 20):
        x_dtype = own_dtype(kernel_id)
        if not serves(which, kernel_id, m, x_dtype):
            continue
        clean = rng.normal(0, 1, (m, width)).astype(np.float32)
        x = clean.copy()
        x[1, 40], x[2, 3] = np.nan, np.inf
        run = [
            load(
                native.block_sparse_run(
                    which, kernel_id, store(v, x_dtype), blocks.values, layout(blocks),
                    **sizes(blocks),
                ),
                x_dtype,
            )
            for v in (x, clean)
        ]  # fmt: skip
        w = blocks.dense() if which == "forward" else blocks.dense().T
        hit = (w != 0) @ (x != clean).T
        assert np.array_equal(run[0][hit.T == 0], run[1][hit.T == 0])
        assert not np.isfinite(run[0][hit.T > 0]).any()
        assert run[0].shape == (m, out)


def walk(which: str, kernel_id: str) -> int:
    """Runs one row over many shapes behind guard pages; returns how many calls it served."""
    rng = np.random.default_rng(8)
    guards = {name: Guarded(1 << 19) for name in ("x", "g", "v", "l", "b", "0", "y", "p", "a", "c")}
    served = 0
    cases = itertools.product(((1, 1), (17, 65), (33, 127), (50, 63), (130, 70)), BLOCKS, ROWS)
    for i, ((n, k), block, m) in enumerate(cases):
        blocks, x_dtype, v_dtype = case(rng, i, n, k, block, kernel_id)
        if not serves(which, kernel_id, m, x_dtype):
            continue
        served += 1
        width, out = (n, k) if which in ("dx", "fused_dx") else (k, n)
        x = store(rng.normal(0, 1, (m, width)).astype(np.float32), x_dtype)
        g = store(rng.normal(0, 1, (m, n)).astype(np.float32), x_dtype)
        bias = store(np.ones(n, np.float32), X_DTYPES[i % 3]) if i % 2 else None
        weight = ref.random_weight(rng, n, k, **FORMAT)
        rank = (0, 5, 20)[i % 3]
        expected = None
        for at_end, gap in ((True, 0), (False, 0), (True, 5)):
            print(
                f"{kernel_id} m={m} n={n} k={k} block={block} x={x_dtype} values={v_dtype} "
                f"{'ends' if at_end else 'starts'} at a guard page, row gap {gap}",
                file=sys.stderr,
                flush=True,
            )
            values = guards["v"].place(store(blocks.values, v_dtype), at_end)
            lay = guards["l"].place(layout(blocks), at_end)
            xs = guarded_rows(guards["x"], x, gap, at_end)
            b = None if bias is None else guards["b"].place(bias, at_end)
            y = guarded_rows(guards["y"], np.zeros((m, out), x.dtype), gap, at_end)
            if which == "weight_grad":
                y = guards["y"].place(0 * store(blocks.values * 0, v_dtype), at_end)
                gs = guarded_rows(guards["g"], g, gap, at_end)
                native.block_weight_grad_run(
                    kernel_id, gs, xs, lay, dtype=v_dtype, out=y, **sizes(blocks)
                )
            elif which in ("forward", "dx"):
                forward = which == "forward"
                y0 = guarded_rows(guards["0"], g, gap, at_end) if forward and i % 4 > 1 else None
                native.block_sparse_run(
                    which, kernel_id, xs, values, lay, bias=b if forward else None, y0=y0, y=y,
                    **sizes(blocks),
                )  # fmt: skip
            else:
                lora = [None, None]
                if rank:
                    lora = [
                        guards["a"].place(np.ones((rank, k), np.float32), at_end),
                        guards["c"].place(np.ones((n, rank), np.float32), at_end),
                    ]
                native.int4_block_sparse_run(
                    which, kernel_id, xs, guards["p"].place(ref.pack(weight), at_end),
                    b if which == "fused" else None, values=values, layout=lay, block=block,
                    lora_a=lora[0], lora_c=lora[1], compute="bf16", y=y, **weight.format,
                )  # fmt: skip
            if expected is None:
                expected = y.copy()
            if y.tobytes() != expected.tobytes():
                raise AssertionError(f"{kernel_id}: other bits than at other addresses")
    return served


@pytest.mark.parametrize("which, kernel_id", params())
def test_row_stays_inside_its_buffers(which, kernel_id):
    assert walk_in_child(__file__, which, kernel_id, timeout=240) >= 50


def test_a_layout_that_leaves_the_matrix_is_refused():
    blocks = Blocks(np.array([[0, 0]]), np.zeros((1, 16, 16), np.float32), 16, 16)
    good = layout(blocks)
    for at in range(len(good)):
        for bad in (-1, 2**31 - 1):
            broken = good.copy()
            broken[at] = bad
            with pytest.raises(ValueError, match="layout must"):
                native.block_sparse_run(
                    "forward", None, np.zeros((1, 16), np.float32), blocks.values, broken,
                    **sizes(blocks),
                )  # fmt: skip


if __name__ == "__main__":
    print(walk(*sys.argv[1:3]))
