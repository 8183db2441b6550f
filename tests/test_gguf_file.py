"""GGUF container and blocks: exactness, and clear errors for every way a file can be bad."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest
from gguf_samples import HALVES, Model, blocks, ggml_values, gguf, type_id
from nibblock import _native as native
from nibblock.formats._ggml_types import EXACT_TYPES, decode, dequantize, form
from nibblock.formats._gguf_file import GGML_TYPES, GGUFFile
from nibblock.formats._gguf_metadata import llama3_scaling
from nibblock.formats._gguf_model import plan, unpermute

GOLDEN = sorted((Path(__file__).parent / "golden").glob("ggml_blocks*.npz"))


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Path:
    """A one-layer model of 32 columns: short enough to damage at every byte of its header."""
    model = Model(hidden=32, inner=64, heads=2, kv_heads=1, vocab=9, layers=1)
    return model.write(tmp_path_factory.mktemp("gguf") / "small.gguf")


def check(path: Path) -> None:
    plan(GGUFFile(path))


def refusal(path: Path) -> str:
    try:
        check(path)
    except ValueError as error:
        return str(error)
    return ""


# --- decoding -------------------------------------------------------------------------------------


def test_type_table_is_ggufs():
    for kind, (values, size) in gguf.GGML_QUANT_SIZES.items():
        if kind.value in GGML_TYPES:
            assert GGML_TYPES[kind.value] == (kind.name, values, size)
    assert all(name in gguf.GGMLQuantizationType.__members__ for name, _, _ in GGML_TYPES.values())


@pytest.mark.parametrize("kind", sorted(EXACT_TYPES))
def test_codes_are_exact(kind):
    raw = blocks(np.random.default_rng(3), kind, 5, 768)
    codes = decode(kind, raw)
    expected = ggml_values(kind, raw)
    np.testing.assert_array_equal(codes.dequantize(), expected)
    np.testing.assert_array_equal(dequantize(kind, raw), expected)
    assert codes.qweight.dtype == np.uint8
    assert codes.qweight.shape == (5, 768 * codes.bits // 8)
    assert codes.scales.shape == (5, 768 // codes.group)
    narrow = kind in ("Q1_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "IQ4_NL", "NVFP4")
    assert codes.scales.dtype == (np.float16 if narrow else np.float32)
    assert form(kind) == codes.form
    assert codes.form[:3] == (codes.bits, codes.group, codes.offsets is not None)
    # A d for 256 values and a small factor for 16 or 32 of them: what int8 scales are.
    runs = kind.endswith("_K") or kind == "IQ4_XS"
    assert codes.form[3] == ("int8" if runs else codes.scales.dtype.name)
    parts = [codes.scales] if codes.offsets is None else [codes.scales, codes.offsets]
    assert not runs or all(native.int8_scales_fit(p, 768, codes.group) for p in parts)


@pytest.mark.parametrize("kind", sorted(EXACT_TYPES))
def test_extreme_codes_are_exact(kind):
    """All bits zero and all bits one, besides every byte value in turn: the ends of each field."""
    values, size = gguf.GGML_QUANT_SIZES[type_id(kind)]
    raw = blocks(np.random.default_rng(5), kind, 258, values)
    fill = np.concatenate((np.arange(256), [0, 255])).astype(np.uint8)[:, None]
    kept = [at + i for at in HALVES.get(kind, ()) for i in range(2)]
    # Scales that are no halves.
    kept = {"IQ1_M": range(48, 56), "MXFP4": [0], "NVFP4": range(4)}.get(kind, kept)
    raw[:, np.setdiff1d(np.arange(size), kept)] = fill
    np.testing.assert_array_equal(decode(kind, raw).dequantize(), ggml_values(kind, raw))


def test_golden_blocks():
    """Values fixed in a file: an update of the gguf package cannot move both sides at once."""
    golden = {name: array for path in GOLDEN for name, array in np.load(path).items()}
    kinds = [name[4:] for name in golden if name.startswith("raw_")]
    assert set(kinds) == EXACT_TYPES
    for kind in kinds:
        got = decode(kind, golden[f"raw_{kind}"]).dequantize()
        np.testing.assert_array_equal(got, golden[f"values_{kind}"], err_msg=kind)


@pytest.mark.parametrize("kind", sorted(EXACT_TYPES))
def test_dense_values_are_those_of_gguf(kind):
    raw = blocks(np.random.default_rng(3), kind, 3, 512)
    np.testing.assert_array_equal(dequantize(kind, raw), ggml_values(kind, raw))


def test_row_order_of_q_and_k_is_undone():
    heads, head_dim = 3, 8
    rows = np.arange(heads * head_dim)
    stored = (
        rows.reshape(heads, 2, head_dim // 2).swapaxes(1, 2).reshape(-1)
    )  # the converter's order
    np.testing.assert_array_equal(stored[unpermute(len(rows), heads)], rows)


def test_llama3_factors_are_recognised():
    half, theta = 32, 500000.0
    wavelength = 2 * np.pi * theta ** (np.arange(half) / half)
    smooth = (8192 / wavelength - 1) / 3
    factors = np.where(
        wavelength < 2048, 1, np.where(wavelength > 8192, 32, 1 / ((1 - smooth) / 32 + smooth))
    ).astype(np.float32)
    found = llama3_scaling(factors, theta, 131072)
    assert found is not None
    assert found["factor"] == 32
    assert found["rope_type"] == "llama3"
    factors[0] = 3
    assert llama3_scaling(factors, theta, 131072) is None


# --- the container --------------------------------------------------------------------------------


def test_header(small):
    file = GGUFFile(small)
    assert file.metadata["general.architecture"] == "llama"
    info = file.tensors["blk.0.attn_k.weight"]
    assert (info.type, info.shape) == ("Q4_0", (16, 32))
    assert file.read("blk.0.attn_k.weight").shape == (16, 18)
    assert file.read("blk.0.attn_k.weight", 3, 2).shape == (2, 18)
    check(small)


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError):
        GGUFFile(tmp_path / "none.gguf")


@pytest.mark.parametrize(
    ("at", "new", "message"),
    [
        (0, b"GGML", "magic b'GGUF', got b'GGML'"),
        (4, struct.pack("<I", 1), "version 2 or 3, got 1"),
        (4, struct.pack("<I", 4), "version 2 or 3, got 4"),
        (4, struct.pack(">I", 3), "little-endian"),
        (8, struct.pack("<Q", 2**63), "stated counts"),
        (16, struct.pack("<Q", 2**63), "stated counts"),
        (24, struct.pack("<Q", 2**63), "metadata key 0"),
    ],
)
def test_bad_header(small, tmp_path, at, new, message):
    data = bytearray(small.read_bytes())
    data[at : at + len(new)] = new
    bad = tmp_path / "bad.gguf"
    bad.write_bytes(data)
    with pytest.raises(ValueError, match=message) as caught:
        GGUFFile(bad)
    assert "'bad.gguf'" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("size", [0, 3, 23])
def test_too_short(tmp_path, size):
    path = tmp_path / "short.gguf"
    path.write_bytes(b"GGUF"[:size].ljust(size, b"\0"))
    with pytest.raises(ValueError, match="'short.gguf' must hold a GGUF header of 24 bytes"):
        GGUFFile(path)


def test_every_truncation_is_an_error(small, tmp_path):
    data = small.read_bytes()
    last = max(GGUFFile(small).tensors.values(), key=lambda t: t.offset)
    end = last.offset + last.nbytes  # what follows is padding
    bad = tmp_path / "cut.gguf"
    for size in [*range(0, end, 7), end - 1]:
        bad.write_bytes(data[:size])
        with pytest.raises(ValueError, match="'cut.gguf'") as caught:
            check(bad)
    assert last.name in str(caught.value)
    assert "truncated" in str(caught.value)


def test_every_damaged_byte_is_harmless(small, tmp_path):
    """Each header byte in turn: a ValueError of one line, or a file that still reads."""
    data = small.read_bytes()
    header = min(t.offset for t in GGUFFile(small).tensors.values())
    bad = tmp_path / "bad.gguf"
    rng = np.random.default_rng(0)
    refused = 0
    for at in range(header):
        for value in {data[at] ^ 0xFF, data[at] ^ (1 << int(rng.integers(8)))}:
            damaged = bytearray(data)
            damaged[at] = value
            bad.write_bytes(damaged)
            message = refusal(bad)
            refused += bool(message)
            assert not message or ("'bad.gguf'" in message and "\n" not in message), (at, message)
    assert refused > header  # most damage is noticed


def test_random_bytes_are_refused(tmp_path):
    rng = np.random.default_rng(1)
    path = tmp_path / "noise.gguf"
    for _ in range(200):
        noise = rng.integers(0, 256, 400, dtype=np.uint8).tobytes()
        path.write_bytes(b"GGUF\3\0\0\0" + struct.pack("<QQ", 3, 5) + noise)
        with pytest.raises(ValueError, match="noise.gguf"):
            GGUFFile(path)


# --- the model's plan -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"arch": "mamba"}, "architecture llama, qwen2, qwen3, .*gpt-oss, got 'mamba'"),
        ({"replace": {"blk.1.attn_q.weight": None}}, "hold tensor blk.1.attn_q.weight, got none"),
        ({"replace": {"output_norm.weight": None}}, "hold tensor output_norm.weight"),
        (
            {"replace": {"blk.0.ffn_up.weight": (64, 64)}},
            r"tensor blk.0.ffn_up.weight with shape \[512, 256\], got \[64, 64\]",
        ),
        ({"replace": {"blk.0.attn_sinks.weight": (4,)}}, "only tensors .* got 'blk.0.attn_sinks"),
        ({"meta": {"llama.block_count": 3}}, "hold tensor blk.2.attn_norm.weight"),
        (
            {"meta": {"llama.block_count": 0}},
            "llama.block_count as an integer of at least 1, got 0",
        ),
        ({"meta": {"llama.block_count": None}}, "llama.block_count .* got nothing"),
        ({"meta": {"llama.block_count": "two"}}, "llama.block_count .* got two"),
        ({"meta": {"llama.expert_count": 8}}, "llama.expert_used_count .* got nothing"),
        ({"arch": "qwen3", "meta": {"qwen3.expert_count": 8}}, "expert_count as 0"),
        ({"meta": {"split.count": 2}}, "one whole file"),
        ({"meta": {"llama.attention.head_count_kv": 3}}, "head_count_kv as a divisor"),
        ({"meta": {"llama.attention.value_length": 32}}, "value_length as the head size 64"),
        ({"meta": {"llama.attention.layer_norm_rms_epsilon": None}}, "layer_norm_rms_epsilon"),
        ({"meta": {"llama.rope.freq_base": -1.0}}, "rope.freq_base as a positive number"),
        ({"meta": {"llama.rope.scaling.type": "longrope"}}, "one of none, linear, yarn"),
        ({"meta": {"tokenizer.ggml.eos_token_id": 70}}, "eos_token_id as an id below 70"),
        ({"extra": {"rope_freqs.weight": np.ones(7, np.float32)}}, r"rope_freqs.weight .*\[32\]"),
    ],
)
def test_bad_models(tmp_path, options, message):
    arch = options.pop("arch", "llama")
    path = Model(arch, **options).write(tmp_path / "bad.gguf")
    with pytest.raises(ValueError, match=message) as caught:
        check(path)
    assert "'bad.gguf'" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_unknown_tensor_type(small, tmp_path):
    data = small.read_bytes()
    name = b"blk.0.attn_k.weight"
    at = data.index(name) + len(name) + 4 + 16  # past the rank and two dimensions
    bad = tmp_path / "bad.gguf"
    for kind in (4, 31, 200):
        bad.write_bytes(data[:at] + struct.pack("<I", kind) + data[at + 4 :])
        with pytest.raises(
            ValueError, match=f"blk.0.attn_k.weight in a known type, got type id {kind}"
        ):
            check(bad)


def test_misaligned_tensor(small, tmp_path):
    data = small.read_bytes()
    name = b"blk.0.attn_k.weight"
    at = data.index(name) + len(name) + 4 + 16 + 4
    (offset,) = struct.unpack_from("<Q", data, at)
    bad = tmp_path / "bad.gguf"
    bad.write_bytes(data[:at] + struct.pack("<Q", offset + 1) + data[at + 8 :])
    with pytest.raises(ValueError, match="blk.0.attn_k.weight at a multiple of 32 bytes"):
        check(bad)
