"""MXFP4 tensors of GGUF files, and gpt-oss in them: every weight exactly, in its place."""

from __future__ import annotations

import mxfp4_samples
import nibblock as nb
import numpy as np
import pytest
import torch
from gguf_architectures import Sample
from gguf_samples import Model, gguf, type_id
from mxfp4_samples import GptOss
from nibblock.formats._ggml_types import decode
from nibblock.formats._gguf_file import GGUFFile
from nibblock.formats.gguf import load_gguf_dense
from test_gguf import assert_same_function, logits, tokens


def test_ggml_blocks_equal_gguf_bit_for_bit():
    nibbles, exponents = mxfp4_samples.every_block()
    raw = mxfp4_samples.ggml_blocks(nibbles, exponents)
    with np.errstate(all="ignore"):
        theirs = gguf.quants.dequantize(raw, type_id("MXFP4"))
        ours = decode("MXFP4", raw).dequantize()
        assert np.array_equal(ours[:255].view(np.uint32), theirs[:255].view(np.uint32))
        wanted = mxfp4_samples.dense(nibbles, exponents).astype(np.float32)  # beyond it: infinity
    assert np.array_equal(ours[:255], wanted[:255])
    assert np.isnan(ours[255]).all()
    codes = decode("MXFP4", raw)
    assert (codes.bits, codes.group, codes.offsets) == (8, 32, None)
    assert np.array_equal(codes.qweight, 128 + 2 * mxfp4_samples.ELEMENTS[nibbles])


@pytest.mark.parametrize(
    ("exponent", "elements", "good"),
    [
        (0, 0xFF, True),
        (1, 0x77, True),
        (252, 0xF7, True),  # 6 * 2^125
        (254, 0x29, True),  # 1 and -0.5 times 2^127
        (253, 0x66, False),  # 4 * 2^126
        (254, 0x47, False),
        (255, 0x00, False),  # NaN, whatever the elements
    ],
)
def test_extreme_exponents_in_gguf(tmp_path, exponent, elements, good):
    path = Model(types="MXFP4", layers=1).write(tmp_path / "m.gguf")
    name = "blk.0.ffn_up.weight"
    data = bytearray(path.read_bytes())
    at = GGUFFile(path).tensors[name].offset
    data[at : at + 17] = bytes([exponent] + [elements] * 16)
    path.write_bytes(data)
    for load in (nb.load_gguf, load_gguf_dense):
        if good:
            weight = load(path).model.layers[0].mlp.up_proj.weight[0, :32].double()
            pair = mxfp4_samples.ELEMENTS[[elements & 15, elements >> 4]] * 2.0 ** (exponent - 127)
            assert weight.tolist() == [pair[0]] * 16 + [pair[1]] * 16
        else:
            with pytest.raises(ValueError, match=f"'m.gguf' must hold finite scales in .* {name}"):
                load(path)


@pytest.mark.parametrize("kind", ["MXFP4", "F16"])
def test_gpt_oss_experts_in_gguf(tmp_path, kind):
    types = {"": "Q8_0", "_exps": "MXFP4", "blk.1.ffn_down_exps": kind}
    sample = Sample("gpt-oss", types)
    path = sample.write(tmp_path / "m.gguf")
    model, dense = nb.load_gguf(path), load_gguf_dense(path)
    assert [i for i, layer in enumerate(model.model.layers)
            if isinstance(layer.mlp.experts, nb.Int4Experts)] == ([0, 1, 2] if kind == "MXFP4"
                                                                 else [0, 2])  # fmt: skip
    for i, layer in enumerate(model.model.layers):
        other = dense.model.layers[i].mlp.experts
        found = layer.mlp.experts
        values = found.dequantize() if isinstance(found, nb.Int4Experts) else dict(
            found.named_parameters())  # fmt: skip
        for name in ("gate_up_proj", "down_proj"):
            assert torch.equal(values[name], other.get_parameter(name)), (i, name)
            assert torch.equal(
                found.get_parameter(f"{name}_bias"), other.get_parameter(f"{name}_bias")
            )
    assert_same_function(model, dense)
    row = next(row for row in model.nibblock_report if row.name == "model.layers.0.mlp.experts")
    assert (row.action, row.reason, row.shape) == ("int8", "MXFP4: exact", (4, 64, 192))
    if kind == "MXFP4":
        half = nb.load_gguf(path, dtype=torch.bfloat16).model.layers[0]
        assert half.mlp.experts.down_proj_bias.dtype == half.self_attn.sinks.dtype == torch.bfloat16


def test_experts_beyond_float32_with_another_type(tmp_path):
    """An offset of -128 * 2^125 is what Q4_1 beside it would need: refused, not made infinite."""
    types = {"": "Q8_0", "ffn_gate_exps": "MXFP4", "ffn_up_exps": "Q4_1", "ffn_down_exps": "Q4_0"}
    path = Sample("qwen3moe", types).write(tmp_path / "m.gguf")
    data = bytearray(path.read_bytes())
    at = GGUFFile(path).tensors["blk.1.ffn_gate_exps.weight"].offset
    data[at : at + 17] = bytes([253] + [0x11] * 16)
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"can multiply in tensor blk\.1\.ffn_gate_exps\.weight"):
        nb.load_gguf(path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"replace": {"blk.1.attn_sinks.weight": None}}, "hold tensor blk.1.attn_sinks.weight"),
        ({"replace": {"blk.1.attn_sinks.weight": (3,)}}, r"attn_sinks.weight with shape \[4\]"),
        ({"replace": {"blk.0.ffn_gate_inp.bias": None}}, "hold tensor blk.0.ffn_gate_inp.bias"),
        ({"replace": {"blk.2.ffn_up_exps.bias": None}}, "hold tensor blk.2.ffn_up_exps.bias"),
        (
            {"replace": {"blk.2.ffn_down_exps.bias": (4, 96)}},
            r"blk.2.ffn_down_exps.bias with shape \[4, 64\], got \[4, 96\]",
        ),
        ({"replace": {"blk.0.attn_output.bias": None}}, "hold tensor blk.0.attn_output.bias"),
        ({"replace": {"blk.0.ffn_norm.weight": (64,)}}, "only tensors .* a gpt-oss model"),
        ({"keys": {"attention.sliding_window": None}}, "gpt-oss.attention.sliding_window .* noth"),
    ],
)
def test_bad_gpt_oss_files(tmp_path, options, message):
    path = Sample("gpt-oss", **options).write(tmp_path / "bad.gguf")
    with pytest.raises(ValueError, match=message) as caught:
        nb.load_gguf(path)
    assert "\n" not in str(caught.value)


def test_gpt_oss_patterns_and_positions(tmp_path):
    """No scaling of positions, and a pattern of windows of the file's own."""
    keys = {
        "attention.sliding_window": 8,
        "attention.sliding_window_pattern": [False, True, True],
        "rope.scaling.type": None,
        "rope.scaling.factor": None,
    }
    model = nb.load_gguf(Sample("gpt-oss", keys=keys).write(tmp_path / "m.gguf"))
    config = model.config
    assert config.layer_types == ["full_attention", "sliding_attention", "sliding_attention"]
    assert (config.sliding_window, config.rope_parameters["rope_type"]) == (8, "default")
    yarn = nb.load_gguf(Sample("gpt-oss").write(tmp_path / "y.gguf")).config.rope_parameters
    assert (yarn["rope_type"], yarn["factor"], yarn["truncate"]) == ("yarn", 32.0, False)


def test_a_folder_and_a_gguf_of_the_same_model(tmp_path):
    """As llama.cpp's converter stores gpt-oss: gate and up apart, nibbles in halves of a block."""
    sample = GptOss(num_hidden_layers=3)
    keys = {"attention.sliding_window": 4, "rope.freq_base": 150000.0, "rope.dimension_count": None,
            "rope.scaling.type": "yarn", "rope.scaling.factor": 32.0,
            "rope.scaling.original_context_length": 4096, "vocab_size": 72}  # fmt: skip
    meta = Sample("gpt-oss", keys=keys, vocab=72).metadata()
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "gpt-oss")
    for key, value in meta.items():
        add = {str: writer.add_string, float: writer.add_float32}.get(
            type(value), writer.add_uint32
        )
        add(key, value)
    names = {
        "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
        "input_layernorm": "attn_norm", "post_attention_layernorm": "post_attention_norm",
        "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output", "mlp.router": "ffn_gate_inp",
    }  # fmt: skip
    for name, tensor in sample.tensors.items():
        value = tensor.float().numpy() if tensor.is_floating_point() else None
        stem, _, leaf = name.rpartition(".")
        block = f"blk.{name.split('.')[2]}." if ".layers." in name else ""
        part = stem.split(".", 3)[3] if block else stem
        if part in names:
            writer.add_tensor(f"{block}{names[part]}.{leaf}", value)
        elif leaf == "sinks":
            writer.add_tensor(f"{block}attn_sinks.weight", value)
        elif leaf == "down_proj_bias":
            writer.add_tensor(f"{block}ffn_down_exps.bias", value)
        elif leaf == "gate_up_proj_bias":
            writer.add_tensor(f"{block}ffn_gate_exps.bias", np.ascontiguousarray(value[:, 0::2]))
            writer.add_tensor(f"{block}ffn_up_exps.bias", np.ascontiguousarray(value[:, 1::2]))
    for name, drawn in sample.drawn.items():
        block = f"blk.{name.split('.')[2]}."
        both = name.endswith("gate_up_proj")
        parts = {"gate": np.s_[:, 0::2], "up": np.s_[:, 1::2]} if both else {"down": np.s_[:]}
        for part, rows in parts.items():
            raw = mxfp4_samples.ggml_blocks(*(array[rows] for array in drawn))
            writer.add_tensor(f"{block}ffn_{part}_exps.weight", raw, raw_dtype=type_id("MXFP4"))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    one = nb.load_quantized(sample.write(tmp_path / "m"))
    two = nb.load_gguf(tmp_path / "m.gguf")
    state = two.state_dict()
    assert state.keys() == one.state_dict().keys()
    for key, value in one.state_dict().items():
        assert torch.equal(value.float(), state[key].float()), key
    for key in ("layer_types", "sliding_window", "intermediate_size", "num_local_experts"):
        assert getattr(one.config, key) == getattr(two.config, key), key
    ids = tokens(one, 30)  # past the window
    torch.testing.assert_close(logits(two, ids), logits(one, ids), rtol=1e-4, atol=1e-4)
