"""Scales stored as int8 multiples of a float16 for 256 columns: every kernel, op and module."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import pickle

import nibblock as nb
import numpy as np
import pytest
import reference as ref
import torch
from harness import (
    aligned,
    check_op,
    codes_of,
    dx_arguments,
    isa,
    level_params,
    load,
    loss_of_single_weights,
    native,
    op_arguments,
    packed_of,
    random_x,
    refusal,
    row_params,
    run,
    store,
    torch_packed,
)
from nibblock.nn._expert_weight import ExpertWeight, pack_experts
from nibblock.ops import _checks
from safetensors import safe_open
from safetensors.torch import save_file

FORMS = [(group, bits) for bits in (4, 8) for group in (16, 32)]
FORMATS = [(*form, affine) for form, affine in itertools.product(FORMS, (False, True))]


def weight_of(rng, n, k, group, bits, affine):
    return ref.random_weight(rng, n, k, group, bits, affine, "int8")


def twin(weight):
    """The same weight with its scales as float32; None where there is no such format."""
    if weight.bits == 4 and weight.group_size == 16:
        return None
    return dataclasses.replace(weight, int8=False)


# --- the layout -----------------------------------------------------------------------------------


@pytest.mark.parametrize("group, bits, affine", FORMATS)
def test_layout_against_a_second_author(group, bits, affine):
    rng = np.random.default_rng(1)
    for n, k in itertools.product((0, 1, 16, 17, 40), (0, 256, 512, 1792)):
        w = weight_of(rng, n, k, group, bits, affine)
        packed = native.pack(w.qweight, w.scales, w.offsets, k, group, bits, "int8", threads=2)
        assert packed.size == native.packed_bytes(**w.format)
        form = (n, k, group, bits, affine)
        assert packed.size == nb.ops.packed_bytes(*form, torch.int8), form
        assert packed.tobytes() == ref.pack(w).tobytes(), form
        mine, theirs = ref.unpack(packed, **w.format), native.unpack(packed, **w.format)
        assert theirs[0].tobytes() == w.qweight.tobytes()
        assert theirs[1].dtype == np.float32
        np.testing.assert_array_equal(mine.scales, w.scales)
        np.testing.assert_array_equal(theirs[1], w.scales)
        assert (theirs[2] is None) == (not affine)
        if affine:
            np.testing.assert_array_equal(mine.offsets, w.offsets)
            np.testing.assert_array_equal(theirs[2], w.offsets)


@pytest.mark.parametrize("group", [16, 32])
def test_any_multiples_of_a_float16_are_found(group):
    """Every largest multiple, units of any size and sign, and runs of zeros."""
    rng = np.random.default_rng(2)
    each = 256 // group
    tops = [*range(-128, 128)]
    bits = rng.integers(0, 0x7C00, (len(tops), 3)) | (rng.integers(0, 2, (len(tops), 3)) << 15)
    units = bits.astype(np.uint16).view(np.float16)
    units[:40, 0] = np.arange(1, 41) * np.float16(2.0**-24)  # subnormal
    units[40, 1] = np.float16(65504)
    multiples = np.empty((len(tops), 3, each))
    for row, top in enumerate(tops):
        low, high = (-128, 127) if top == -128 else (-abs(top), abs(top))
        multiples[row] = rng.integers(low, high + 1, (3, each))
        multiples[row, :, rng.integers(each)] = top
    scales = (units.astype(np.float32)[..., None] * multiples.astype(np.float32)).reshape(
        len(tops), -1
    )
    k = 768
    assert native.int8_scales_fit(scales, k, group, threads=2)
    q = np.zeros((len(tops), k), np.uint8)
    packed = native.pack(q, scales, -scales, k, group, 8, "int8", threads=2)
    _, s, o = native.unpack(packed, len(tops), k, group, 8, True, "int8")
    np.testing.assert_array_equal(s, scales)
    np.testing.assert_array_equal(o, -scales)


def test_scales_that_do_not_fit_are_refused():
    rng = np.random.default_rng(3)
    w = weight_of(rng, 40, 1024, 32, 4, True)
    good = torch.from_numpy(w.scales)
    form = dict(in_features=1024, group_size=32, scale_dtype=torch.int8)
    q, o = torch.from_numpy(w.qweight), torch.from_numpy(w.offsets)
    for value in (np.nextafter(w.scales[21, 19], 9, dtype=np.float32), np.nan, np.inf, 1e30):
        bad = good.clone()
        bad[21, 19] = float(value)
        assert not native.int8_scales_fit(bad.numpy(), 1024, 32)
        for parts, name in (((q, bad, o), "scales"), ((q, good, bad), "offsets")):
            text = (
                f"int4_pack: {name} must be int8 multiples of one float16 in every 256 columns for "
                "scale_dtype int8, got others in row 21, columns from 512; use float32 scales"
            )
            with pytest.raises(ValueError) as error:
                nb.ops.int4_pack(*parts, **form)
            assert str(error.value) == text
    with pytest.raises(TypeError, match="int4_pack: scales must be float32, got torch.float16|flo"):
        nb.ops.int4_pack(q, good.half(), o.half(), **form)
    need = "the weight must have group_size 16 or 32 and in_features a multiple of 256 for int8"
    for k, group in ((1024, 64), (960, 32)):
        groups = -(-k // group)
        args = torch.zeros(4, k // 2, dtype=torch.uint8), torch.zeros(4, groups)
        with pytest.raises(ValueError, match=f"int4_pack: {need} scales, got group_size={group}"):
            nb.ops.int4_pack(*args, in_features=k, group_size=group, scale_dtype=torch.int8)
        x, blob = torch.zeros(2, k), torch.zeros(64, dtype=torch.uint8)
        with pytest.raises(ValueError, match=f"int4_linear: {need}"):
            nb.ops.int4_linear(
                x, blob, out_features=4, group_size=group, affine=False, scale_dtype=torch.int8
            )
        with pytest.raises(RuntimeError, match=f"int4_linear: {need}"):
            torch.ops.nibblock.int4_linear(x, blob, None, 4, group, 4, False, torch.int8, "bf16")
        with pytest.raises(ValueError, match=f"Int4Linear: {need}"):
            nb.Int4Linear(k, 8, group_size=group, scale_dtype=torch.int8)
    with pytest.raises(ValueError, match="group_size must be 32, 64"):
        nb.Int4Linear(256, 8, group_size=16, scale_dtype=torch.float32)


def test_the_size_tells_how_scales_are_stored():
    """Modules that share one packed weight learn from it what another has loaded."""
    for k, (group, bits), affine in itertools.product(range(256, 8193, 256), FORMS, (False, True)):
        sizes = {
            _checks.packed_bytes(16, k, group, bits, affine, dtype)
            for dtype in _checks.SCALE_DTYPES
        }
        assert len(sizes) == 3, (k, group, bits, affine)


# --- kernels --------------------------------------------------------------------------------------


@pytest.mark.parametrize("which, kernel_id", row_params())
def test_row(which, kernel_id):
    """Right, and bit for bit what float32 scales of the same values give."""
    rng = np.random.default_rng(4)
    served = 0
    cases = itertools.product((1, 2, 3, 5, 9, 16, 35), ((17, 256), (48, 768), (70, 512)), FORMATS)
    for i, (m, (n, k), (group, bits, affine)) in enumerate(cases):
        weight = weight_of(rng, n, k, group, bits, affine)
        same = twin(weight)
        for compute in ("bf16", "int8"):
            for x_dtype in ("float32", "bfloat16") if i % 2 else ("bfloat16", "float16"):
                if refusal(which, kernel_id, m, weight, x_dtype, compute):
                    continue
                served += 1
                x = rng.normal(0, 1, (m, k if which == "forward" else n)).astype(np.float32)
                x = store(x, x_dtype)
                y = run(which, kernel_id, x, weight, packed_of(weight), None, compute, x_dtype)
                what = f"{kernel_id} m={m} n={n} k={k} {group} {bits} {affine} {x_dtype} {compute}"
                ref.check_linear(
                    load(y, x_dtype), load(x, x_dtype), weight, dtype=x_dtype, compute=compute,
                    transposed=which == "dx", what=what,
                )  # fmt: skip
                if same is not None:
                    other = run(which, kernel_id, x, same, packed_of(same), None, compute, x_dtype)
                    assert y.tobytes() == other.tobytes(), what
    assert served >= 40, served


@pytest.mark.parametrize("which, kernel_id", row_params())
def test_row_reads_every_code_at_its_place(which, kernel_id):
    """One-hot rows of x give back single weights, of 4-bit groups of 16 above all."""
    rng = np.random.default_rng(5)
    served = 0
    for (group, bits, affine), m in itertools.product(FORMATS, (1, 3, 8, 23)):
        weight = weight_of(rng, 37, 512, group, bits, affine)
        w = weight.dense() if which == "dx" else weight.dense().T
        bound = (ref.HALF_ULP["bfloat16"] + 8 * ref.EPS32) * weight.magnitude()
        bound = bound + 4 * ref.EPS32 * weight.parts()  # scale * code and offset may cancel
        bound = bound + loss_of_single_weights(which, kernel_id, weight)
        bound = bound if which == "dx" else bound.T
        for x_dtype, compute in itertools.product(("float32", "bfloat16"), ("bf16", "int8")):
            if refusal(which, kernel_id, m, weight, x_dtype, compute):
                continue
            served += 1
            hot = store(np.eye(len(w), dtype=np.float32), x_dtype)
            packed = packed_of(weight)
            for at in range(0, len(w) - m + 1, m):
                y = run(which, kernel_id, hot[at : at + m], weight, packed, None, compute, x_dtype)
                slack = bound[at : at + m] + (
                    ref.HALF_ULP[x_dtype] * np.abs(w[at : at + m]) if x_dtype != "float32" else 0
                )
                assert (np.abs(load(y, x_dtype) - w[at : at + m]) <= slack).all(), (m, at, x_dtype)
    assert served >= 10, served


@pytest.mark.parametrize("level", level_params())
@pytest.mark.parametrize("which", ["fused", "fused_dx"])
def test_base_under_an_adapter(level, which):
    """int4 base, blocks and pair in one op: the bits that float32 scales give."""
    rng = np.random.default_rng(6)
    n, k, block = 64, 512, 32
    index = np.array([[0, 3], [1, 0], [1, 9]], np.int64)
    values = rng.normal(0, 0.1, (3, block, block)).astype(np.float32)
    blocks = torch.from_numpy(index)
    layout = nb.ops.block_layout(blocks, n, k, block=block).numpy()
    a = rng.normal(0, 0.1, (4, k)).astype(np.float32)
    c = rng.normal(0, 0.1, (n, 4)).astype(np.float32)
    with isa(level):
        for m, affine in itertools.product((1, 4, 21), (False, True)):
            x = rng.normal(0, 1, (m, n if which == "fused_dx" else k)).astype(np.float32)
            y = {}
            weight = weight_of(rng, n, k, 32, 4, affine)
            for w in (weight, twin(weight)):
                y[w.int8] = native.int4_block_sparse_run(
                    which, None, x, aligned(ref.pack(w)), None, values=values, layout=layout,
                    block=block, lora_a=a, lora_c=c, compute="bf16", **w.format,
                )  # fmt: skip
            assert y[True].tobytes() == y[False].tobytes(), (m, affine)
            assert np.isfinite(y[True]).all()


# --- ops ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("group, bits, affine", FORMATS)
def test_ops(group, bits, affine):
    rng = np.random.default_rng(7)
    weight = weight_of(rng, 40, 512, group, bits, affine)
    packed, form = torch_packed(weight), op_arguments(weight)
    for x_dtype in ("float32", "bfloat16"):
        x = random_x(rng, (2, 3, 512), x_dtype).requires_grad_()
        y = nb.ops.int4_linear(x, packed, **form)
        check_op(y, x, weight)
        grad = random_x(rng, (2, 3, 40), x_dtype)
        y.backward(grad)
        check_op(x.grad, grad, weight, transposed=True)
        assert torch.equal(x.grad, nb.ops.int4_linear_dx(grad, packed, **dx_arguments(weight)))
    tail = [40, group, bits, affine, torch.int8, "bf16"]
    torch.library.opcheck(
        torch.ops.nibblock.int4_linear.default,
        (random_x(rng, (3, 512), "float32"), packed, None, *tail),
    )
    canonical = {k: v for k, v in form.items() if k != "compute"}
    dense = nb.ops.int4_dequantize(packed, in_features=512, dtype=torch.float32, **canonical)
    np.testing.assert_allclose(dense.numpy(), weight.dense(), rtol=1e-6, atol=1e-6)
    table = {k: v for k, v in canonical.items() if k != "out_features"}
    rows = nb.ops.int4_embedding(
        torch.tensor([3, 39, 3]), packed, num_embeddings=40, embedding_dim=512,
        dtype=torch.float32, **table,
    )  # fmt: skip
    assert torch.equal(rows, dense[[3, 39, 3]])
    code = _checks.format_code(*tail)
    assert _checks.decode_format(code) == tuple(tail)
    x = random_x(rng, (3, 512), "float32")
    lean = torch.ops.nibblock._int4_linear_forward(x, packed, None, code)
    assert torch.equal(lean, nb.ops.int4_linear(x, packed, **form))


@pytest.mark.parametrize("method", ["rtn", "mse"])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("group, bits", FORMS)
def test_quantize_rounds_the_scales_and_takes_the_nearest_codes(group, bits, symmetric, method):
    torch.manual_seed(8)
    weight = torch.randn(48, 1024) * torch.rand(48, 1024).mul(3).exp()
    form = dict(group_size=group, bits=bits, symmetric=symmetric, method=method)
    q, s, o = nb.ops.int4_quantize(weight, scale_dtype=torch.int8, **form)
    packed = nb.ops.int4_pack(
        q, s, o, in_features=1024, group_size=group, bits=bits, scale_dtype=torch.int8
    )
    layout = dict(
        out_features=48, in_features=1024, group_size=group, bits=bits, affine=not symmetric
    )
    back = nb.ops.int4_unpack(packed, scale_dtype=torch.int8, **layout)
    assert torch.equal(back[0], q)
    assert torch.equal(back[1], s)
    dense = nb.ops.int4_dequantize(packed, scale_dtype=torch.int8, dtype=torch.float32, **layout)
    mine = (dense - weight).pow(2).mean()
    # No other code of a group is nearer.
    top = 2**bits - 1
    step = s.repeat_interleave(group, 1)
    codes = (q if bits == 8 else torch.stack((q & 15, q >> 4), -1).flatten(1)).float()
    for move in (-1, 1):
        there = (codes + move).clamp(0, top) - codes
        assert bool(((dense + there * step - weight).abs() >= (dense - weight).abs() - 1e-5).all())
    if (group, bits) != (16, 4):
        wide = nb.ops.int4_dequantize(
            nb.ops.int4_pack(
                *(f := nb.ops.int4_quantize(weight, **form)),
                in_features=1024, group_size=group, bits=bits,
            ),
            scale_dtype=f[1].dtype, dtype=torch.float32, **layout,
        )  # fmt: skip
        # 8-bit scales cost 4-bit codes a few per cent of their error, 8-bit codes more.
        assert mine <= (wide - weight).pow(2).mean() * (1.1 if bits == 4 else 3)


def test_quantize_tiny_and_constant_weights():
    for fill in (0.0, 1e-8, -3.0, 60000.0):
        weight = torch.full((16, 256), fill)
        q, s, o = nb.ops.int4_quantize(weight, group_size=32, scale_dtype=torch.int8)
        packed = nb.ops.int4_pack(q, s, o, in_features=256, group_size=32, scale_dtype=torch.int8)
        dense = nb.ops.int4_dequantize(
            packed, out_features=16, in_features=256, group_size=32, affine=True,
            scale_dtype=torch.int8, dtype=torch.float32,
        )  # fmt: skip
        assert (dense - weight).abs().max() <= max(abs(fill) / 200, 1e-7), fill
    with pytest.raises(ValueError, match="finite in int8, .* use scale_dtype=torch.float32"):
        nb.ops.int4_quantize(torch.full((16, 256), 3e8), group_size=32, scale_dtype=torch.int8)


# --- modules --------------------------------------------------------------------------------------


@pytest.mark.parametrize("group, bits, affine", FORMATS)
def test_linear_and_embedding(group, bits, affine, tmp_path):
    rng = np.random.default_rng(9)
    weight = weight_of(rng, 48, 512, group, bits, affine)
    form = dict(group_size=group, bits=bits)
    layer = nb.Int4Linear.from_codes(*codes_of(weight), in_features=512, **form)
    assert layer.scale_dtype == torch.int8
    assert "scale_dtype=int8" in repr(layer)
    np.testing.assert_allclose(layer.weight.numpy(), weight.dense(), rtol=1e-6, atol=1e-6)
    x = torch.randn(3, 512)
    y = layer(x)
    check_op(y, x, weight)
    state = layer.state_dict()
    assert state["scales"].dtype == torch.float32
    np.testing.assert_array_equal(state["scales"].numpy(), weight.scales)
    for other in (
        copy.deepcopy(layer),
        pickle.loads(pickle.dumps(layer)),
        nb.Int4Linear(512, 48, False, symmetric=not affine, scale_dtype=torch.int8, **form),
    ):
        assert not other.load_state_dict(state).missing_keys
        assert torch.equal(other.packed, layer.packed)
        assert other.scale_dtype == torch.int8
        assert torch.equal(other(x), y)
    if twin(weight) is not None:
        # Who was built with float32 scales keeps them, and explicit ones are taken at their word.
        wide = nb.Int4Linear(512, 48, False, symmetric=not affine, **form)
        wide.load_state_dict(state)
        assert wide.scale_dtype == torch.float32
        assert torch.equal(wide(x), y)
        wide = nb.Int4Linear.from_codes(
            *codes_of(weight), in_features=512, scale_dtype=torch.float32, **form
        )
        assert wide.packed.numel() > layer.packed.numel()
        assert torch.equal(wide(x), y)
        # Other scales do not fit: the module follows the file.
        moved = {k: v * 1.0001 if k != "qweight" else v for k, v in state.items()}
        copied = copy.deepcopy(layer)
        copied.load_state_dict(moved)
        assert copied.scale_dtype == torch.float32
        assert torch.equal(copied.state_dict()["scales"], moved["scales"])
    else:  # a group of 16 in 4 bits has no other form
        moved = {k: v * 1.0001 if k != "qweight" else v for k, v in state.items()}
        with pytest.raises(RuntimeError, match="scales must be int8 multiples of one float16"):
            layer.load_state_dict(moved)
        assert torch.equal(layer(x), y)
    table = nb.Int4Embedding.from_codes(*codes_of(weight), embedding_dim=512, **form)
    assert table.scale_dtype == torch.int8
    assert torch.equal(table(torch.tensor([7])), layer.weight[7:8])
    head = table.linear()
    assert head.packed is table.packed
    assert torch.equal(head(x), y)


def test_a_dense_weight_is_loaded_into_the_format():
    dense = torch.nn.Linear(512, 40)
    layer = nb.Int4Linear.from_linear(dense, group_size=32, scale_dtype=torch.int8)
    assert layer.scale_dtype == torch.int8
    other = nb.Int4Linear(512, 40, group_size=32, scale_dtype=torch.int8)
    other.load_state_dict(dense.state_dict())
    assert torch.equal(other.packed, layer.packed)
    assert (layer.weight - dense.weight).abs().max() < 0.01
    # A quarter less than float32 scales of groups of 32, and what float16 ones of 56 would take.
    assert layer.packed.numel() * 8 / (48 * 512) < 4.8


def test_a_module_that_shares_the_weight_follows():
    rng = np.random.default_rng(10)
    weight = weight_of(rng, 48, 512, 32, 8, False)
    table = nb.Int4Embedding.from_codes(*codes_of(weight), embedding_dim=512, group_size=32, bits=8)
    head = table.linear()
    x, before = torch.randn(3, 512), table.weight
    moved = {k: v * 1.0001 if k == "scales" else v for k, v in table.state_dict().items()}
    table.load_state_dict(moved)
    assert table.scale_dtype == torch.float32
    assert torch.equal(head(x), nb.Int4Linear.from_codes(
        moved["qweight"], moved["scales"], in_features=512, group_size=32, bits=8
    )(x))  # fmt: skip
    assert head.scale_dtype == torch.float32
    assert not torch.equal(head.weight, before)


def test_saved_models_and_adapters(tmp_path):
    torch.manual_seed(11)
    model = torch.nn.Sequential(torch.nn.Linear(256, 512), torch.nn.GELU(), torch.nn.Linear(512, 8))
    for index in (0, 2):
        model[index] = nb.Int4Linear.from_linear(
            model[index], group_size=32, scale_dtype=torch.int8
        )
    nb.save(model, tmp_path / "m.safetensors")
    fresh = torch.nn.Sequential(torch.nn.Linear(256, 512), torch.nn.GELU(), torch.nn.Linear(512, 8))
    nb.load(tmp_path / "m.safetensors", fresh)
    x = torch.randn(5, 256)
    assert fresh[0].scale_dtype == torch.int8
    assert torch.equal(fresh[2].packed, model[2].packed)
    assert torch.equal(fresh(x), model(x))
    with safe_open(tmp_path / "m.safetensors", "pt") as file:
        tensors, metadata = {k: file.get_tensor(k) for k in file.keys()}, file.metadata()
    assert tensors["0.scales"].dtype == torch.int8
    assert tensors["2.offsets_units"].shape == (8, 2)
    for key, value, text in (
        ("0.scales", torch.zeros(512, 8), "0.scales must be .512, 8. int8, got .512, 8. float32"),
        ("2.offsets_units", torch.zeros(8, 1).half(), "2.offsets_units must be .8, 2. float16"),
        ("2.scales_units", None, "m.safetensors must hold 2.scales_units, got a file without it"),
    ):
        changed = {k: v for k, v in {**tensors, key: value}.items() if v is not None}
        save_file(changed, tmp_path / "m.safetensors", metadata)
        with pytest.raises(ValueError, match=text):
            nb.load(tmp_path / "m.safetensors", fresh)


def test_experts():
    rng = np.random.default_rng(12)
    weights = [weight_of(rng, 32, 256, 16, 4, True) for _ in range(3)]
    stacked = [torch.stack(parts) for parts in zip(*(codes_of(w) for w in weights))]
    experts = ExpertWeight(
        3, 32, 256, transposed=False, group_size=16, bits=4, affine=True, scale_dtype=torch.int8,
        compute="bf16", packed=pack_experts(*stacked, 256, 16, 4, torch.int8),
    )  # fmt: skip
    for index, weight in enumerate(weights):
        np.testing.assert_allclose(
            experts.dequantize()[index].numpy(), weight.dense(), rtol=1e-6, atol=1e-6
        )
    canonical = experts.canonical()
    assert torch.equal(canonical["scales"], stacked[1])
    assert canonical["scales"].dtype == torch.float32


# Bits of a code here and in memory, group, and bits of scales and offsets for each weight: an int8
# for each group and a float16 for 256 columns, once or (with offsets) twice.
GGUF = {
    "Q2_K": (4, 4, 16, 1.125), "Q3_K": (4, 4, 16, 0.5625), "Q4_K": (4, 4, 32, 0.625),
    "Q5_K": (8, 8, 32, 0.625), "Q6_K": (8, 8, 16, 0.5625), "IQ4_XS": (8, 4, 32, 0.3125),
}  # fmt: skip


@pytest.mark.parametrize("kind", GGUF)
def test_gguf_takes_the_bits_of_a_weight(tmp_path, kind):
    pytest.importorskip("transformers")
    from gguf_samples import Model

    bits, stored, group, rest = GGUF[kind]
    model = nb.load_gguf(Model(types=kind).write(tmp_path / "m.gguf"))
    layers = [m for m in model.modules() if isinstance(m, nb.Int4Linear)]
    assert len(layers) == 15
    for layer in layers:
        assert (layer.bits, layer.group_size, layer.scale_dtype) == (bits, group, torch.int8)
        assert layer.palette == (stored < bits)
        panels = -(-layer.out_features // 16)
        exact = panels * 16 * layer.in_features * (stored + rest) / 8
        assert exact <= layer.packed.numel() <= exact + panels * 4 * 64
