"""8-bit codes of at most 16 values in 4 bits and a table: every kernel, op and module."""

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
    GROUPS,
    aligned,
    codes_of,
    dx_arguments,
    isa,
    level_params,
    load,
    native,
    op_arguments,
    packed_of,
    random_x,
    refusal,
    row_params,
    run,
    store,
)
from nibblock._report_cli import describe
from nibblock.nn._expert_weight import ExpertWeight, pack_experts
from nibblock.nn.fused import fuse_linears
from nibblock.ops import _checks
from safetensors import safe_open
from safetensors.torch import save_file

E2M1 = 128 + np.array([-12, -8, -6, -4, -3, -2, -1, 0, 1, 2, 3, 4, 6, 8, 12])
IQ4 = 128 + np.array([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113])
ENDS = np.array([0, 255])
LEVELS = (E2M1, IQ4, ENDS, np.array([7]))


def weight_of(rng, n, k, group, affine=False, scale_dtype="float32", levels=IQ4):
    """The same weight as 8-bit codes; `few` stores it with a palette."""
    weight = ref.random_weight(rng, n, k, group, 8, affine, scale_dtype)
    codes = levels[rng.integers(0, len(levels), (n, k))].astype(np.uint8)
    codes.reshape(-1)[: len(levels)] = levels[: codes.size]  # each of them occurs
    return dataclasses.replace(weight, qweight=codes)


def few(weight):
    return dataclasses.replace(weight, palette=True)


# --- the layout -----------------------------------------------------------------------------------


@pytest.mark.parametrize("scale_dtype", ["float16", "float32", "int8"])
@pytest.mark.parametrize("affine", [False, True])
def test_layout_against_a_second_author(affine, scale_dtype):
    rng = np.random.default_rng(1)
    ks = (256, 768) if scale_dtype == "int8" else (1, 31, 64, 65, 300)
    for n, k, group in itertools.product((1, 16, 17, 40), ks, GROUPS[8]):
        if scale_dtype == "int8" and group not in (16, 32):
            continue
        w = weight_of(rng, n, k, group, affine, scale_dtype, LEVELS[(n + k) % 4])
        stored = scale_dtype if scale_dtype == "int8" else None
        packed = native.pack(
            w.qweight, w.scales, w.offsets, k, group, 8, stored, palette=True, threads=2
        )
        form = (n, k, group, 8, affine, getattr(torch, scale_dtype))
        assert packed.size == native.packed_bytes(**w.format, palette=True)
        assert packed.size == nb.ops.packed_bytes(*form, palette=True), form
        assert packed.size < nb.ops.packed_bytes(*form), form
        assert packed.tobytes() == ref.pack(few(w)).tobytes(), form
        theirs = native.unpack(packed, **w.format)
        assert theirs[0].tobytes() == w.qweight.tobytes()
        np.testing.assert_array_equal(theirs[1], w.scales)
        dense = native.dequantize(packed, **w.format)
        assert dense.tobytes() == native.dequantize(packed_of(w), **w.format).tobytes()


def test_more_than_sixteen_values_are_refused():
    codes = np.arange(17, dtype=np.uint8).repeat(4)[None].repeat(3, 0)
    assert not native.palette_fits(codes)
    assert native.palette_fits(np.minimum(codes, 15))
    q, s = torch.from_numpy(codes), torch.ones(3, 3)
    form = dict(in_features=68, group_size=32, palette=True)
    with pytest.raises(ValueError) as error:
        nb.ops.int4_pack(q, s, bits=8, **form)
    assert str(error.value) == (
        "int4_pack: qweight must hold at most 16 different codes for a palette, got more"
    )
    with pytest.raises(ValueError, match="int4_pack: palette must be False for bits=4, got True"):
        nb.ops.int4_pack(q[:, :34].contiguous(), s, bits=4, **form)


def test_the_size_tells_the_form():
    """Of one module: how scales are stored, and whether there is a palette."""
    for k, group, affine in itertools.product((1, 64, 100, 256, 1024), (16, 32, 64, -1), (0, 1)):
        int8 = _checks.has_int8_scales(group, k)
        dtypes = _checks.SCALE_DTYPES[: 3 if int8 else 2]
        form = (40, k, group, 8, bool(affine))
        without = {_checks.packed_bytes(*form, dtype) for dtype in dtypes}
        with_one = {_checks.packed_bytes(*form, dtype, True) for dtype in dtypes}
        assert not without & with_one, (k, group, affine)
        assert not int8 or len(with_one) == 3, (k, group, affine)


# --- kernels --------------------------------------------------------------------------------------


@pytest.mark.parametrize("which, kernel_id", row_params())
def test_row_gives_the_bits_of_the_codes(which, kernel_id):
    rng = np.random.default_rng(2)
    served = 0
    shapes = ((1, 3), (17, 100), (48, 257), (70, 512))
    cases = itertools.product((1, 2, 3, 5, 9, 16, 35), shapes, GROUPS[8], (False, True))
    for i, (m, (n, k), group, affine) in enumerate(cases):
        if i % 3 and kernel_id.endswith("reference"):
            continue  # (the slow one)
        scale_dtype = ("float16", "float32", "int8")[i % 3]
        if scale_dtype == "int8" and not _checks.has_int8_scales(group, k):
            scale_dtype = "float32"
        weight = weight_of(rng, n, k, group, affine, scale_dtype, LEVELS[i % 4])
        packed, small = packed_of(weight), packed_of(few(weight))
        for compute in ("bf16", "int8"):
            x_dtype = ("bfloat16", "float32", "float16")[i % 3]
            if refusal(which, kernel_id, m, weight, x_dtype, compute):
                continue
            served += 1
            x = rng.normal(0, 1, (m, k if which == "forward" else n)).astype(np.float32)
            x = store(x, x_dtype)
            want = run(which, kernel_id, x, weight, packed, None, compute, x_dtype)
            got = run(which, kernel_id, x, weight, small, None, compute, x_dtype)
            what = f"{kernel_id} m={m} n={n} k={k} {group} {affine} {scale_dtype} {x_dtype}"
            if kernel_id.endswith("amx.bf16_panel"):  # the same weights, in another order of k
                ref.check_linear(
                    load(got, x_dtype), load(x, x_dtype), weight, dtype=x_dtype,
                    transposed=which == "dx", what=what,
                )  # fmt: skip
            else:
                assert got.tobytes() == want.tobytes(), what
    assert served >= 30 or kernel_id.endswith("avx2.int8"), served


def test_not_finite_rows():
    rng = np.random.default_rng(3)
    weight = weight_of(rng, 20, 100, 32, True)
    x = rng.normal(0, 1, (6, 100)).astype(np.float32)
    x[1, 7], x[2, 5], x[3, 99] = np.nan, np.inf, -np.inf
    want = run("forward", None, x, weight, packed_of(weight))
    got = run("forward", None, x, weight, packed_of(few(weight)))
    assert got.tobytes() == want.tobytes()


@pytest.mark.parametrize("level", level_params())
@pytest.mark.parametrize("which", ["fused", "fused_dx"])
def test_base_under_an_adapter(level, which):
    rng = np.random.default_rng(4)
    n, k, block = 64, 200, 32
    values = rng.normal(0, 0.1, (2, block, block)).astype(np.float32)
    index = torch.tensor([[0, 3], [1, 0]])
    layout = nb.ops.block_layout(index, n, k, block=block).numpy()
    weight = weight_of(rng, n, k, 32)
    with isa(level):
        for m in (1, 4, 21):
            x = rng.normal(0, 1, (m, n if which == "fused_dx" else k)).astype(np.float32)
            y = [
                native.int4_block_sparse_run(
                    which, None, x, aligned(ref.pack(w)), None, values=values, layout=layout,
                    block=block, lora_a=None, lora_c=None, compute="bf16", **w.format,
                ).tobytes()
                for w in (weight, few(weight))
            ]  # fmt: skip
            assert y[0] == y[1], m


# --- ops and modules ------------------------------------------------------------------------------


def test_ops():
    rng = np.random.default_rng(5)
    weight = weight_of(rng, 40, 300, 32, True)
    form = op_arguments(weight)
    pack = dict(in_features=300, group_size=32, bits=8)
    plain = nb.ops.int4_pack(*codes_of(weight), **pack)
    small = nb.ops.int4_pack(*codes_of(weight), palette=True, **pack)
    assert small.numel() < 0.7 * plain.numel()
    for x_dtype in ("float32", "bfloat16"):
        x = random_x(rng, (2, 3, 300), x_dtype).requires_grad_()
        y = nb.ops.int4_linear(x, small, **form)
        assert torch.equal(y, nb.ops.int4_linear(x, plain, **form))
        grad = random_x(rng, (2, 3, 40), x_dtype)
        y.backward(grad)
        assert torch.equal(x.grad, nb.ops.int4_linear_dx(grad, plain, **dx_arguments(weight)))
    tail = [40, 32, 8, True, torch.float32, "bf16"]
    x = random_x(rng, (3, 300), "float32")
    torch.library.opcheck(torch.ops.nibblock.int4_linear.default, (x, small, None, *tail))
    stored = {k: v for k, v in form.items() if k != "compute"}
    back = nb.ops.int4_unpack(small, in_features=300, **stored)
    assert torch.equal(back[0], torch.from_numpy(weight.qweight))
    with pytest.raises(ValueError, match="packed must be a contiguous"):
        nb.ops.int4_linear(x, small[:-64], **form)
    with pytest.raises(RuntimeError, match="packed must be a contiguous"):
        torch.ops.nibblock.int4_linear(x, small[:-64], None, *tail)


@pytest.mark.parametrize("scale_dtype", ["float16", "float32", "int8"])
def test_linear_and_embedding(scale_dtype, tmp_path):
    rng = np.random.default_rng(6)
    weight = weight_of(rng, 48, 256, 32, False, scale_dtype)
    form = dict(group_size=32, bits=8)
    layer = nb.Int4Linear.from_codes(*codes_of(weight), in_features=256, **form)
    assert layer.palette
    assert "palette=True" in repr(layer)
    plain = nb.Int4Linear.from_codes(*codes_of(weight), in_features=256, palette=False, **form)
    assert not plain.palette
    assert layer.packed.numel() < 0.65 * plain.packed.numel()
    x = torch.randn(3, 256)
    y = plain(x)
    assert torch.equal(layer(x), y)
    assert torch.equal(layer.weight, plain.weight)
    state = layer.state_dict()
    assert torch.equal(state["qweight"], torch.from_numpy(weight.qweight))
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert not other.load_state_dict(state).missing_keys
        assert other.palette
        assert torch.equal(other(x), y)
    # A module keeps the form that it has; codes of more values do not fit a palette.
    plain.load_state_dict(state)
    assert not plain.palette
    state["qweight"] = torch.arange(256, dtype=torch.uint8).expand(48, 256).contiguous()
    for assign in (False, True):
        copied = copy.deepcopy(layer)
        copied.load_state_dict(dict(state), assign=assign)
        assert not copied.palette
        assert torch.equal(copied.state_dict()["qweight"], state["qweight"])
        plain.load_state_dict(state)
        assert torch.equal(copied(x), plain(x))
    with torch.device("meta"):
        empty = nb.Int4Linear(256, 48, False, symmetric=True, **form)
    empty.load_state_dict(layer.state_dict(), assign=True)
    assert torch.equal(empty(x), y)
    table = nb.Int4Embedding.from_codes(*codes_of(weight), embedding_dim=256, **form)
    assert table.palette
    assert torch.equal(table(torch.tensor([7])), layer.weight[7:8])
    head = table.linear()
    assert torch.equal(head(x), y)
    # Another module that shares the weight has loaded what does not fit.
    table.load_state_dict(state)
    assert not table.palette
    assert torch.equal(head(x), plain(x))


def test_siblings_of_both_forms_do_not_share_a_call():
    rng = np.random.default_rng(7)

    class Block(torch.nn.Module):
        def __init__(self, few_of):
            super().__init__()
            for name, palette in zip(("q_proj", "k_proj", "v_proj"), few_of):
                weight = weight_of(rng, 32, 64, 32)
                layer = nb.Int4Linear.from_codes(
                    *codes_of(weight), in_features=64, group_size=32, bits=8, palette=palette
                )
                self.add_module(name, layer)

        def forward(self, x):
            return torch.cat([self.q_proj(x), self.k_proj(x), self.v_proj(x)], -1)

    for few_of in ((True,) * 3, (True, False, True)):
        block, x = Block(few_of), torch.randn(2, 64)
        want = block(x)
        fuse_linears(block)
        assert torch.equal(block(x), want)
        assert [getattr(block, n).palette for n in ("q_proj", "k_proj", "v_proj")] == list(few_of)


def test_experts_and_files(tmp_path):
    rng = np.random.default_rng(8)
    weights = [weight_of(rng, 32, 96, 32, False, "float16", E2M1) for _ in range(3)]
    stacked = [torch.stack(parts) for parts in zip(*(codes_of(w)[:2] for w in weights))]
    experts = ExpertWeight(
        3, 32, 96, transposed=False, group_size=32, bits=8, affine=False,
        scale_dtype=torch.float16, compute="bf16",
        packed=pack_experts(*stacked, None, 96, 32, 8, torch.float16, palette=True),
    )  # fmt: skip
    assert experts.palette
    for index, weight in enumerate(weights):
        dense = experts.dequantize()[index].numpy()
        np.testing.assert_allclose(dense, weight.dense(), rtol=1e-6, atol=1e-7)
    assert torch.equal(experts.canonical()["qweight"], stacked[0])
    model = torch.nn.Sequential(torch.nn.Linear(96, 32, bias=False))
    model[0] = nb.Int4Linear.from_codes(
        *codes_of(weights[0]), in_features=96, group_size=32, bits=8
    )
    path = tmp_path / "m.safetensors"
    nb.save(model, path)
    fresh = nb.load(path, torch.nn.Sequential(torch.nn.Linear(96, 32, bias=False)))
    assert fresh[0].palette
    assert torch.equal(fresh[0].packed, model[0].packed)
    with safe_open(path, "pt") as file:
        assert file.get_tensor("0.qweight").shape == (32, 48)
        assert file.get_tensor("0.palette").tolist() == E2M1.tolist()
        metadata, tensors = file.metadata(), {k: file.get_tensor(k) for k in file.keys()}
    assert describe(path).rows[0].kind == "int8"

    def refused(text, **changed):
        save_file({**tensors, **changed}, path, metadata)
        with pytest.raises(ValueError, match=text):
            nb.load(path, torch.nn.Sequential(torch.nn.Linear(96, 32, bias=False)))

    refused("0.palette must hold 1 to 16 codes, got .17.", **{"0.palette": torch.arange(17).byte()})
    refused("places below 3, the length of 0.palette", **{"0.palette": torch.arange(3).byte()})
    refused(
        "0.qweight must be .32, 48. uint8, got .32, 96.",
        **{"0.qweight": fresh[0].canonical()["qweight"]},
    )
    del tensors["0.palette"]
    refused("m.safetensors must hold 0.palette, got a file without it")


FOUR_BITS = ("IQ4_NL", "IQ4_XS", "MXFP4", "NVFP4", "IQ3_S", "IQ3_XXS", "IQ2_S", "IQ2_XS", "IQ2_XXS",
             "IQ1_S", "IQ1_M")  # fmt: skip


@pytest.mark.parametrize("kind", FOUR_BITS)
def test_gguf(tmp_path, kind):
    pytest.importorskip("transformers")
    from gguf_samples import Model

    model = nb.load_gguf(Model(types=kind).write(tmp_path / "m.gguf"))
    layers = [m for m in model.modules() if isinstance(m, nb.Int4Linear)]
    assert len(layers) == 15
    assert all(layer.palette for layer in layers)
    assert model.get_input_embeddings().palette
