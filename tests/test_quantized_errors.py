"""load_quantized refuses what it cannot hold exactly, and damaged folders, in one line each."""

from __future__ import annotations

import json
import re
import sys

import nibblock as nb
import numpy as np
import pytest
import torch
from nibblock.formats.quantized import is_quantized
from quantized_samples import Sample

METHODS = ("gptq", "awq", "compressed")
UP = "model.layers.1.mlp.up_proj"


def edit(path, change):
    file = path / "config.json"
    values = json.loads(file.read_text())
    change(values)
    file.write_text(json.dumps(values))


def refused(path, message, error=ValueError, **options):
    """The call raises this one line, with the folder's name in it."""
    with pytest.raises(error, match=message) as caught:
        nb.load_quantized(path, **options)
    text = str(caught.value)
    assert text.startswith("load_quantized: ")
    assert "\n" not in text
    return text


@pytest.fixture(scope="module", params=METHODS)
def sample(request):
    out = Sample(request.param)
    out.make()
    return out


@pytest.fixture
def folder(sample, tmp_path):
    return sample.write_made(tmp_path / "m")


# --- arguments ------------------------------------------------------------------------------------


def test_bad_arguments(folder, tmp_path):
    refused(folder, "^load_quantized: dtype must be float32, bf", TypeError, dtype=torch.float64)
    refused(folder, 'compute must be "bf16" or "int8", got', compute="fp4")
    refused(tmp_path / "none", "path must be a transformers folder", FileNotFoundError)
    (folder / "model.safetensors").unlink()
    refused(folder, "must hold model.safetensors or .* no safetensors file", FileNotFoundError)


@pytest.mark.parametrize("name", ["transformers", "safetensors"])
def test_missing_packages(folder, monkeypatch, name):
    monkeypatch.setitem(sys.modules, name, None)
    refused(folder, rf"{name} package.*pip install nibblock\[transformers\]", ImportError)


# --- settings -------------------------------------------------------------------------------------

FORMATS = (
    '"pack-quantized" or "mxfp4-pack-quantized" or "nvfp4-pack-quantized" or "int-quantized" or '
    '"naive-quantized" or "mixed-precision"'
)
KEYS = {
    "gptq": [
        ({"bits": 3}, "bits as 4 or 8, got 3"),
        ({"bits": "4"}, 'bits as an integer, got "4"'),
        ({"group_size": 0}, "group_size as -1 or a positive number, got 0"),
        ({"group_size": None}, "group_size as an integer, got null"),
        ({"sym": 1}, "sym as true or false, got 1"),
        ({"checkpoint_format": "marlin"}, 'checkpoint_format as "gptq" or "gptq_v2", got "marlin"'),
        ({"checkpoint_format": None, "format": 2}, "format as .*, got 2"),
        ({"pack_dtype": "int16"}, 'pack_dtype as "int32", got "int16"'),
        ({"dynamic": {"+:(": {}}}, r"dynamic.\+:\( as a regular expression"),
        ({"dynamic": {".*up.*": {"bits": 2}}}, r"dynamic.\.\*up\.\*.bits as 4 or 8, got 2"),
        ({"dynamic": []}, None),
    ],
    "awq": [
        ({"bits": 8}, "bits as 4, the only one of version gemm, got 8"),
        ({"version": "gemv"}, 'version as "gemm", got "gemv"'),
        ({"version": "GEMM"}, None),
        ({"group_size": -2}, "group_size as -1 or a positive number, got -2"),
    ],
    "compressed": [
        ({"format": "float-quantized"}, f'format as {FORMATS}, got "float-quantized"'),
        ({"format": None}, f"format as {FORMATS}, got null"),
        ({"format": "mixed-precision"}, "config_groups.group_0.format as .*, got nothing"),
        ({"quantization_status": "frozen"}, None),  # older files say so, packed all the same
        ({"kv_cache_scheme": {"num_bits": 8}}, None),
        ({"transform_config": {"config_groups": {"r": 1}}}, "transform_config as null"),
        ({"sparsity_config": {"format": "24"}}, 'sparsity_config.format as "dense", got "24"'),
        ({"sparsity_config": {"format": "dense"}}, None),
        ({"config_groups": None}, "config_groups as an object, got null"),
    ],
}
GROUP_KEYS = [
    ({"weights": None}, "group_0.weights as an object, got null"),
    ({"weights": {"num_bits": 5}}, "weights.num_bits as 4 or 8, got 5"),
    ({"weights": {"type": "float"}}, 'weights.type as "int", got "float"'),
    ({"weights": {"strategy": "block"}}, 'strategy as "group" or "channel", got "block"'),
    ({"weights": {"dynamic": True}}, "weights.dynamic as false, got true"),
    ({"weights": {"group_size": None}}, "weights.group_size as an integer, got null"),
    ({"input_activations": 8}, "group_0.input_activations as an object, got 8"),
    ({"output_activations": {"num_bits": 8}}, "group_0.output_activations as null"),
    ({"format": "nvfp4-pack-quantized"}, 'group_0.format as "pack-quantized"'),
    ({"targets": ["re:("]}, "group_0.targets as names or regular expressions"),
    ({"targets": "Linear"}, "group_0.targets as a list of names"),
]


def test_settings_are_named(folder, sample):
    before = (folder / "config.json").read_text()
    for change, message in KEYS[sample.method]:
        (folder / "config.json").write_text(before)
        edit(folder, lambda config, c=change: config["quantization_config"].update(c))
        if message is None:
            assert isinstance(nb.load_quantized(folder), torch.nn.Module)
        else:
            assert "'m/config.json'" in refused(folder, f"quantization_config.*{message}")


@pytest.mark.parametrize("change,message", GROUP_KEYS)
def test_config_groups_are_named(tmp_path, change, message):
    path = Sample("compressed").write(tmp_path / "m")

    def update(config):
        group = config["quantization_config"]["config_groups"]["group_0"]
        for key, value in change.items():
            if isinstance(value, dict) and key == "weights":
                group[key].update(value)
            else:
                group[key] = value

    edit(path, update)
    refused(path, f"'m/config.json' must hold quantization_config.config_groups.*{message}")


@pytest.mark.parametrize("value", ["bitsandbytes", "fp8", None, 3])
def test_unknown_methods(folder, value):
    edit(folder, lambda config: config["quantization_config"].update(quant_method=value))
    assert is_quantized(folder)
    refused(
        folder,
        r"^load_quantized: 'm/config.json' must hold quantization_config.quant_method as "
        '"gptq" or "awq" or "compressed-tensors" or "modelopt" or "mxfp4", '
        f"got {re.escape(json.dumps(value))}$",
    )


def test_config_json(folder):
    file = folder / "config.json"
    text = file.read_text()
    edit(folder, lambda config: config.pop("quantization_config"))
    assert not is_quantized(folder)
    refused(folder, "'m/config.json' must hold quantization_config, got none")
    edit(folder, lambda config: config.update(quantization_config=None))
    assert not is_quantized(folder)
    edit(folder, lambda config: config.update(quantization_config=[4]))
    refused(folder, "must hold quantization_config, got list")
    file.write_text(text)
    edit(folder, lambda config: config.update(model_type="no_such_model"))
    unknown = "'m/config.json' must describe a causal language model, got model_type {}, of which"
    refused(folder, unknown.format("'no_such_model'"))
    edit(folder, lambda config: config.update(model_type="vit"))
    refused(folder, unknown.format("'vit'"))
    edit(folder, lambda config: config.pop("model_type"))
    refused(folder, unknown.format("None"))
    file.write_text(text)
    edit(folder, lambda config: config.update(hidden_size=-1))
    refused(folder, "'m/config.json' must describe a causal language model, got")
    for broken in (text[:100], "[1]", "\xff"):
        file.write_text(broken, encoding="latin-1")
        refused(folder, "'m/config.json' must (be JSON|hold an object), got")
        with pytest.raises(ValueError, match="'m/config.json' must"):
            is_quantized(folder)


@pytest.mark.parametrize("group", [16, 48, 40])
@pytest.mark.parametrize("method", METHODS)
def test_groups_without_an_exact_form(tmp_path, method, group):
    path = Sample(method, 4, group).write(tmp_path / "m")
    message = rf"group_size as -1 or a multiple of 32, got {group}$"
    assert "'m/config.json'" in refused(path, message)


@pytest.mark.parametrize("group", [8, 24, 40])
@pytest.mark.parametrize("method", ["gptq", "compressed"])
def test_groups_of_8_bits_without_an_exact_form(tmp_path, method, group):
    path = Sample(method, 8, group).write(tmp_path / "m")
    message = rf"group_size as -1 or a multiple of 16, got {group}$"
    assert "'m/config.json'" in refused(path, message)


BAD_INDICES = [
    # Of K columns, groups of 32 in activation order; what is wrong with them.
    (
        lambda k: np.zeros(k, int),
        r"hold each group from 0 to \d in tensor {}, got groups left out$",
    ),
    (lambda k: np.arange(k) // 32 - 1, r"hold each group from 0 to \d in tensor {}, got -1$"),
    (lambda k: shuffled(k) - 1, r"hold each group from 0 to \d in tensor {}, got -1$"),
    (lambda k: shuffled(k) + 1, r"hold each group from 0 to \d in tensor {}, got [45]$"),
    (lambda k: one_more(shuffled(k)), r"hold 32 columns of group 0 in tensor {}, got 33$"),
    (lambda k: one_more(shuffled(k))[::-1], r"hold 32 columns of group 0 in tensor {}, got 33$"),
]


def shuffled(columns):
    return np.random.default_rng(0).permutation(np.arange(columns) // 32)


def one_more(index):
    """A column of the second group goes over to the first."""
    index[np.flatnonzero(index == 1)[5]] = 0
    return index


@pytest.mark.parametrize("says", [True, False])
@pytest.mark.parametrize("method", ["gptq", "compressed"])
@pytest.mark.parametrize("index, message", BAD_INDICES)
def test_bad_group_indices(tmp_path, method, index, message, says):
    """What is in the tensor counts, not what desc_act says of it."""
    sample = Sample(method, settings={"desc_act": says} if method == "gptq" else {})
    path = sample.write(tmp_path / "m")
    key = f"{UP}.{'weight_g_idx' if method == 'compressed' else 'g_idx'}"
    found = torch.from_numpy(index(128).copy()).int()
    resave(sample, path, **{key: found})
    text = refused(path, message.format(re.escape(key)))
    assert "'m/model.safetensors' must hold" in text


@pytest.mark.parametrize("method", ["gptq", "compressed"])
def test_group_indices_of_another_form(tmp_path, method):
    sample = Sample(method)
    path = sample.write(tmp_path / "m")
    key = f"{UP}.{'weight_g_idx' if method == 'compressed' else 'g_idx'}"
    good = torch.from_numpy(shuffled(128)).int()
    for index, got in ((good[:-1], r"I32 \[127\]"), (good[None], r"I32 \[1, 128\]"),
                       (good.float(), r"F32 \[128\]")):  # fmt: skip
        resave(sample, path, **{key: index})
        refused(path, rf"must hold tensor {key} as I32 or I64 \[128\], got {got}$")
    if method == "compressed":  # -1 throughout says nothing; here and there it is wrong
        resave(sample, path, **{key: torch.where(good == 0, -1, good)})
        refused(path, rf"hold each group from 0 to 3 in tensor {key}, got -1$")


@pytest.mark.parametrize("group", [16, 48])
def test_activation_order_of_groups_without_an_exact_form(tmp_path, group):
    def mixed(columns, name):
        return np.random.default_rng(0).permutation(np.arange(columns) // group)

    path = Sample("gptq", 4, group, g_idx=mixed).write(tmp_path / "m")
    refused(path, rf"'m/config.json' must .*group_size as -1 or a multiple of 32, got {group}$")


# --- tensors --------------------------------------------------------------------------------------


def parts(sample):
    return sorted(key for key in sample.tensors if key.startswith(UP + "."))


def resave(sample, folder, **changes):
    """The folder with some tensors replaced; None takes one away."""
    before = dict(sample.tensors)
    for key, value in changes.items():
        sample.tensors.pop(key, None)
        if value is not None:
            sample.tensors[key] = value
    sample.save(folder)
    sample.tensors = before


def test_missing_tensors(sample, folder):
    for key in [*parts(sample), "model.norm.weight", "lm_head.weight"]:
        resave(sample, folder, **{key: None})
        marker = key.endswith((".qweight", ".weight_packed"))
        # Without its codes a linear is taken for a dense one.
        name = f"{UP}.weight" if marker else key
        refused(
            folder, rf"^load_quantized: 'm' must hold tensor {re.escape(name)} as .*, got none$"
        )


def test_misshaped_tensors(sample, folder):
    for key in [*parts(sample), "model.norm.weight"]:
        tensor = sample.tensors[key]
        resave(sample, folder, **{key: torch.cat((tensor, tensor[:1]))})
        need = re.escape(str(list(tensor.shape)))
        shape = re.escape(str([len(tensor) + 1, *tensor.shape[1:]]))
        message = rf"'m/model.safetensors' must hold tensor {re.escape(key)} as .*{need}.*{shape}$"
        refused(folder, message)


def test_tensors_of_another_dtype(sample, folder):
    for key in [*parts(sample), "model.norm.weight"]:
        tensor = sample.tensors[key]
        resave(sample, folder, **{key: tensor.to(torch.int16)})
        found = re.escape(f"I16 {list(tensor.shape)}")
        message = rf"'m/model.safetensors' must hold tensor {re.escape(key)} as .*, got {found}$"
        refused(folder, message)


def test_tensors_without_a_place(sample, folder):
    resave(sample, folder, **{"model.layers.0.mlp.k_scale": torch.ones(1)})
    refused(folder, "must hold tensors that the model has, got model.layers.0.mlp.k_scale, which")
    marker = "weight_packed" if sample.method == "compressed" else "qweight"
    for name, got in (
        ("model.layers.0.mlp.experts.0.w1", "none"),
        ("model.norm", "LlamaRMSNorm"),
        ("model.embed_tokens", "Embedding"),
    ):
        resave(sample, folder, **{f"{name}.{marker}": torch.ones(1, dtype=torch.int32)})
        refused(folder, rf"must hold {name}\.{marker} for an nn.Linear of the model, got {got}$")
    dense = {key: None for key in sample.tensors if key.rpartition(".")[0] in sample.codes}
    resave(sample, folder, **dense)
    refused(folder, rf"'m' must hold tensors named \*\.{marker} .*, got none$")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_bad_scales(sample, folder, value):
    key = next(k for k in parts(sample) if k.endswith(("scales", "scale")))
    scales = sample.tensors[key].clone()
    scales[1, 2] = value
    resave(sample, folder, **{key: scales})
    refused(folder, f"model.safetensors' must hold finite numbers in tensor {re.escape(key)}, got")


def test_a_scale_beyond_float32(tmp_path):
    sample = Sample("gptq", scale_dtype="F32")
    path = sample.write(tmp_path / "m")
    sample.tensors[f"{UP}.scales"][:] = 3e38
    sample.save(path)
    refused(path, rf"hold scales that float32 can multiply in tensor {UP}\.scales")


def test_weight_shape(tmp_path):
    sample = Sample("compressed")
    path = sample.write(tmp_path / "m")
    key = f"{UP}.weight_shape"
    resave(sample, path, **{key: sample.tensors[key].flip(0)})
    refused(path, rf"hold \[160, 128\] in tensor {key}, got \[128, 160\]")


# --- files ----------------------------------------------------------------------------------------


def test_truncated_files(folder):
    file = folder / "model.safetensors"
    data = file.read_bytes()
    for length in (0, 5, 100, len(data) // 2, len(data) - 1):
        file.write_bytes(data[:length])
        refused(folder, "^load_quantized: 'm/model.safetensors' must be a whole safetensors file")


def test_damaged_headers_never_crash(sample, folder):
    file = folder / "model.safetensors"
    data = file.read_bytes()
    rng = np.random.default_rng(0)
    size = int.from_bytes(data[:8], "little")
    for _ in range(40):
        damaged = bytearray(data)
        for at in rng.integers(0, size, 2):
            damaged[at] = int(rng.integers(256))
        file.write_bytes(damaged)
        try:
            assert isinstance(nb.load_quantized(folder), torch.nn.Module)
        except ValueError as error:
            text = str(error)
            assert re.match(r"load_quantized: 'm(/[\w.-]+)?' must ", text), text
            assert "\n" not in text


def test_damaged_shards(sample, folder):
    (folder / "model.safetensors").unlink()
    sample.save(folder, shards=2)
    index = folder / "model.safetensors.index.json"
    text = index.read_text()
    assert isinstance(nb.load_quantized(folder), torch.nn.Module)

    def with_map(change):
        values = json.loads(text)
        change(values["weight_map"])
        index.write_text(json.dumps(values))

    with_map(lambda files: files.update(extra="model-00001-of-00002.safetensors"))
    refused(folder, "-00001-of-00002.safetensors' must hold tensor extra, as .* says, got none$")
    with_map(lambda files: files.update(extra="../m/model-00001-of-00002.safetensors"))
    refused(folder, "index.json' must hold weight_map, from tensors to file names, got")
    with_map(lambda files: files.update(extra="gone.safetensors"))
    refused(folder, "'m' must hold the file gone.safetensors, got none")
    with_map(lambda files: files.pop("model.norm.weight"))
    refused(folder, "'m' must hold tensor model.norm.weight as")
    index.write_text(text[:50])
    refused(folder, "index.json' must be JSON, got")
    index.write_text("{}")
    refused(folder, "index.json' must hold weight_map")
    index.write_text(text)
    (folder / "model-00002-of-00002.safetensors").unlink()
    refused(folder, "'m' must hold the file model-00002-of-00002.safetensors, got none")


def test_linears_that_are_none(tmp_path):
    """An architecture whose projections have a class of their own."""
    config = {"hidden_size": 128, "num_hidden_layers": 1, "num_attention_heads": 4}
    sample = Sample("gptq", arch="falcon", config={**config, "vocab_size": 72})
    message = r"dense_4h_to_h.qweight for an nn.Linear .*, got FalconLinear has a forward of its"
    refused(sample.write(tmp_path / "m"), message)
