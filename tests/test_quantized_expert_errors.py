"""load_quantized refuses experts that do not fit together, in one line that names the tensor."""

from __future__ import annotations

import math
import re

import numpy as np
import pytest
import torch
from quantized_samples import Sample
from test_quantized_errors import METHODS, edit, refused, resave
from test_quantized_experts import check_experts

MARKERS = {"gptq": "qweight", "awq": "qweight", "compressed": "weight_packed"}
UP = "model.layers.1.mlp.experts.2.up_proj"


@pytest.fixture(scope="module", params=METHODS)
def sample(request):
    out = Sample(request.param, arch="qwen3_moe")
    out.make()
    return out


@pytest.fixture
def folder(sample, tmp_path):
    return sample.write_made(tmp_path / "m")


def of(sample, name):
    return {k: t for k, t in sample.tensors.items() if k.startswith(f"{name}.")}


def test_an_expert_that_is_missing(sample, folder):
    marker = MARKERS[sample.method]
    for name in (UP, UP.rpartition(".")[0]):
        resave(sample, folder, **dict.fromkeys(of(sample, name)))
        leaf = "" if name is UP else r"\.\w+_proj"
        named = re.escape(name) + leaf
        refused(folder, rf"'m' must hold tensor {named}\.{marker} as I32 .*, got none$")
    for key in of(sample, UP):
        resave(sample, folder, **{key: None})
        refused(folder, rf"^load_quantized: 'm' must hold tensor {re.escape(UP)}\.\S+ as .* none$")
    whole = {k: None for k in sample.tensors if re.search(r"layers\.1.*experts.*up_proj", k)}
    resave(sample, folder, **whole)
    refused(folder, rf"must hold tensor model.layers.1.mlp.experts.0.up_proj\.{marker} as .* none$")
    whole = {k: None for k in sample.tensors if re.search(r"layers\.1.*experts", k)}
    resave(sample, folder, **whole)
    refused(folder, r"must hold tensor model\.layers\.1\.mlp\.experts\.gate_up_proj as .*got none$")


def test_an_expert_too_many(sample, folder):
    marker = MARKERS[sample.method]
    more = {k.replace(".2.", ".4."): t.clone() for k, t in of(sample, UP).items()}
    resave(sample, folder, **more)
    name = re.escape(UP.replace(".2.", ".4."))
    refused(folder, rf"hold {name}\.{marker} for an nn.Linear of the model, got experts 0 to 3$")
    resave(sample, folder, **{"model.layers.0.mlp.experts.4.up_proj.weight": torch.ones(96, 64)})
    refused(folder, r"that the model has, got model\.layers\.0\.mlp\.experts\.4\.up_proj\.weight")


def test_misshaped_experts(sample, folder):
    for key, tensor in of(sample, UP).items():
        resave(sample, folder, **{key: torch.cat((tensor, tensor[:1]))})
        shape = re.escape(str([len(tensor) + 1, *tensor.shape[1:]]))
        refused(folder, rf"safetensors' must hold tensor {re.escape(key)} as .*, got \S+ {shape}$")
        resave(sample, folder, **{key: tensor.to(torch.int16)})
        refused(folder, rf"safetensors' must hold tensor {re.escape(key)} as .*, got I16 ")


def test_bad_scales_of_an_expert(sample, folder):
    key = next(k for k in of(sample, UP) if k.endswith(("scales", "scale")))
    scales = sample.tensors[key].clone()
    scales[1, 1] = math.nan
    resave(sample, folder, **{key: scales})
    refused(folder, rf"must hold finite numbers in tensor {re.escape(key)}, got NaN")


def test_experts_that_are_quantised_in_part(sample, folder):
    marker = MARKERS[sample.method]
    # one of a projection
    change = {**dict.fromkeys(of(sample, UP)), f"{UP}.weight": torch.ones(96, 64)}
    resave(sample, folder, **change)
    first = re.escape(UP.replace("2.up_proj", "0.gate_proj"))
    refused(
        folder,
        r"must hold all experts of model\.layers\.1\.mlp\.experts\.gate_up_proj quantised, or none,"
        rf" got {first} quantised and {re.escape(UP)} not$",
    )
    # one of the projections
    change = {}
    for key in sample.tensors:
        if re.search(r"layers\.1.*experts.*down_proj", key):
            change[key] = None
            if key.endswith(f".{marker}"):
                change[key.removesuffix(marker) + "weight"] = torch.ones(64, 96)
    resave(sample, folder, **change)
    refused(
        folder,
        r"'m' must hold both projections of model\.layers\.1\.mlp\.experts quantised, or none, got "
        "gate_up_proj quantised and down_proj not$",
    )


@pytest.mark.parametrize("rule", [{"group_size": 64}, {"bits": 8}])
def test_experts_of_other_formats(tmp_path, rule):
    """One line that names two that differ."""
    path = Sample("gptq", arch="qwen3_moe").write(tmp_path / "m")
    edit(
        path,
        lambda c: c["quantization_config"].update(
            dynamic={r"+:.*layers\.1.*experts\.2\.up_proj": rule}
        ),
    )
    other = "8 bits, group 32" if "bits" in rule else "4 bits, group 64"
    refused(
        path,
        r"'m/config.json' must give all experts of model\.layers\.1\.mlp\.experts\.gate_up_proj "
        r"the same bits and group size, got 4 bits, group 32 for \S*experts\.0\.gate_proj and "
        rf"{other} for {re.escape(UP)}$",
    )


def test_biases_of_experts(tmp_path):
    sample = Sample("gptq", arch="qwen3_moe")
    path = sample.write(tmp_path / "m")
    resave(sample, path, **{f"{UP}.bias": torch.zeros(96).half()})
    check_experts(sample, path)
    resave(sample, path, **{f"{UP}.bias": torch.ones(96).half()})
    refused(path, rf"must hold zeros in {re.escape(UP)}\.bias, for the model has no bias there")


def test_activation_order_of_experts(tmp_path):
    """Of one expert, gate and up become one matrix: their columns have one order."""

    def mixed(columns, name):
        seed = list(name.encode())
        return np.random.default_rng(seed).permutation(np.arange(columns) // 32)

    path = Sample("gptq", g_idx=mixed, arch="mixtral").write(tmp_path / "m")
    head = r"model\.layers\.0\.block_sparse_moe\.experts\.0"
    refused(
        path,
        rf"must hold groups as {head}\.w1 does: both become one matrix in tensor {head}\.w3\.g_idx"
        ", got another activation order$",
    )


def test_experts_of_a_form_that_is_not_held(tmp_path, monkeypatch):
    from nibblock.nn import _expert_form

    path = Sample("gptq", arch="mixtral").write(tmp_path / "m")
    monkeypatch.setattr(_expert_form, "unfit", lambda module, meta=False: "it is odd")
    refused(path, r"w1\.qweight for an nn.Linear of the model, got MixtralExperts: it is odd$")
