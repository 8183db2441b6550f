"""`python -m nibblock report`: facts, bytes and differences against hand counts, and errors."""

from __future__ import annotations

import json
import math

import nibblock as nb
import pytest
import torch
from finetune_samples import folder_of, text_file, tiny_bert, tiny_llama
from nibblock import _measure
from nibblock._accelerate_plan import plan
from nibblock._report_cli import changes, cli, describe, tensor_file
from nibblock._report_cli.facts import ModelFacts, TrainedFacts
from nibblock._report_cli.plot import maps
from nibblock.integrations.transformers import load_folder
from report_samples import Small, adapter, dense64, strict, update
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

transformers = pytest.importorskip(
    "transformers", reason="the transformers package is not installed"
)


# --- whole models ---------------------------------------------------------------------------------


def test_bytes_of_a_model_by_hand(tmp_path, monkeypatch):
    model = Small()
    nb.accelerate(model, nb.Int4Config(group_size=32), where="up", progress=False)
    nb.accelerate(model, nb.BlockSparseConfig(density=0.1, block=16), where="down", progress=False)
    nb.save(model, tmp_path / "m.safetensors")
    monkeypatch.setattr(tensor_file.TensorFile, "read", None)  # headers only
    facts = describe(tmp_path / "m.safetensors")
    assert isinstance(facts, ModelFacts)
    assert (facts.kind, facts.version, facts.library) == ("model", 1, nb.__version__)
    rows = {row.name: row for row in facts.rows}
    up, down, norm, step = (rows[name] for name in ("up", "down", "norm", "step"))
    # 70 rows of 50 bytes of codes, 4 groups (the last one of 4 weights) with a scale and an offset
    assert up.dtype == "float16"
    assert (up.kind, up.module, up.shape, up.group_size) == ("int4", "linear", (70, 100), 32)
    assert (up.bytes, up.weights) == (70 * 50 + 70 * 4 * 2 * 2 + 70 * 4, 70 * 100 + 70)
    assert (down.kind, down.block, down.all_blocks) == ("block-sparse", 16, 7 * 5)
    assert down.blocks == len(model.down.blocks)
    assert down.bytes == down.blocks * (16 * 16 * 4 + 2 * 4)
    assert (down.weights, down.density) == (100 * 70, down.blocks / 35)
    assert (norm.kind, norm.bytes, norm.weights) == ("vectors", 2 * 70 * 4, 140)
    assert (step.kind, step.bytes, step.weights, step.fixed_bytes) == ("vectors", 16, 0, 16)
    every = facts.by_kind()["all"]
    assert every["layers"] == 4
    assert every["weights"] == 7070 + 7000 + 140
    assert every["float32_bytes"] == 4 * every["weights"] + 16
    assert every["bfloat16_bytes"] == 2 * every["weights"] + 16
    held = sum(row.bytes for row in facts.rows)
    assert every["bits_per_weight"] == 8 * held / every["weights"]
    assert facts.file_bytes == (tmp_path / "m.safetensors").stat().st_size > held
    assert facts.by_kind()["int4"]["bytes"] == up.bytes
    assert strict(json.dumps(facts.to_dict()))["groups"] == {"32": 1}


def test_tied_layers_and_tensors_count_once(tmp_path):
    model = tiny_llama(1)
    nb.save(model, tmp_path / "dense.safetensors")
    dense = describe(tmp_path / "dense.safetensors")
    assert dense.by_kind()["all"]["weights"] == _measure.weight_count(model)
    assert dense.tied == {"lm_head.weight": "model.embed_tokens.weight"}
    config = nb.Int4Config(group_size=32, symmetric=True, embeddings=True)
    nb.accelerate(model, config, progress=False)
    nb.save(model, tmp_path / "m.safetensors")
    facts = describe(tmp_path / "m.safetensors")
    rows = {row.name: row for row in facts.rows}
    head, table = rows["lm_head"], rows["model.embed_tokens"]
    assert (head.kind, head.tied, head.bytes, head.weights) == ("int8", table.name, 0, 0)
    assert (table.kind, table.module) == ("int8", "embedding")
    assert table.bytes == 260 * 64 + 260 * 2 * 2  # a byte a code, a float16 for each group of 32
    assert facts.by_kind()["all"]["weights"] == _measure.weight_count(model)


def test_experts(tmp_path):
    from expert_samples import dense_experts

    model = nn.Module()
    model.experts = dense_experts()
    nb.accelerate(model, nb.Int4Config(group_size=32), progress=False)
    nb.save(model, tmp_path / "m.safetensors")
    rows = {row.name: row for row in describe(tmp_path / "m.safetensors").rows}
    down = rows["experts.down_proj"]
    assert (down.kind, down.module, down.shape) == ("int4", "experts", (4, 64, 96))
    assert down.bytes == 4 * 64 * (48 + 3 * 2 * 2)
    assert down.weights == 4 * 64 * 96
    total = sum(row.weights for row in rows.values())
    assert total == _measure.weight_count(model) == 4 * (64 * 96 + 192 * 64)


def test_a_file_of_before_the_library_was_named(tmp_path):
    path = tmp_path / "m.safetensors"
    nb.save(nn.Sequential(nn.Linear(4, 4)), path)
    with safe_open(path, framework="pt") as file:
        header = json.loads(file.metadata()["nibblock"])
        tensors = {key: file.get_tensor(key) for key in file.keys()}
    assert header.pop("library") == nb.__version__
    save_file(tensors, path, {"nibblock": json.dumps(header)})
    assert describe(path).library is None
    nb.load(path, nn.Sequential(nn.Linear(4, 4)))


# --- adapters and updates -------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [0, 3])
def test_an_adapter_by_hand(tmp_path, rank):
    layers = adapter(tmp_path / "a.safetensors", rank)
    facts = describe(tmp_path / "a.safetensors")
    assert isinstance(facts, TrainedFacts)
    assert (facts.kind, facts.name, facts.version) == ("adapters", "default", 1)
    for row in facts.rows:
        layer = layers[row.name]
        count = len(layer.blocks)
        assert (row.kind, row.blocks, row.all_blocks, row.rank) == ("adapter", count, 35, rank)
        assert row.bytes == count * (16 * 16 * 4 + 8) + 4 * rank * (70 + 100)
        assert row.norm == pytest.approx(dense64(layer).norm().item(), rel=1e-5)
        assert row.weights == 7000
    assert facts.blocks == sum(len(layer.blocks) for layer in layers.values())
    assert facts.to_dict()["density"] == facts.blocks / 70
    assert facts.norm == pytest.approx(math.hypot(*(row.norm for row in facts.rows)))
    assert facts.to_dict()["ranks"] == [rank]


def test_an_update_by_hand(tmp_path):
    blocks = {"up": [[0, 0], [4, 6]], "down": [[6, 4]]}
    model = update(tmp_path / "u.safetensors", blocks, by=0.5, train_norm=True)
    facts = describe(tmp_path / "u.safetensors")
    assert (facts.kind, facts.name, facts.library) == ("sparse_update", "", nb.__version__)
    assert [(r.name, r.blocks, r.all_blocks, r.kind) for r in facts.rows] == [
        ("up", 2, 35, "masked"),
        ("down", 1, 35, "masked"),
    ]
    values = facts.to_dict()
    assert values["bytes"] == {"masked": 3 * (16 * 16 * 4 + 8), "dense": 70 * 4}
    assert values["layers"] == {"masked": 2, "dense": 1}
    assert values["trained"] == {
        "norm.weight": {"shape": [70], "dtype": "float32", "bytes": 280},
    }
    assert values["density"] == 3 / 70
    weight = model.up.weight.double()
    square = weight[:16, :16].square().sum() + weight[64:, 96:].square().sum()
    assert facts.rows[0].norm == pytest.approx(square.sqrt().item(), rel=1e-12)
    update(tmp_path / "v.safetensors", blocks, by=0.1)
    update(tmp_path / "w.safetensors", blocks, seed=1)
    other = [describe(tmp_path / f"{name}.safetensors").base for name in "vw"]
    assert other[0] == facts.base != other[1]


# --- what changed ---------------------------------------------------------------------------------


def test_changes_of_updates_by_hand(tmp_path):
    paths = [tmp_path / f"{name}.safetensors" for name in "ab"]
    update(paths[0], {"up": [[0, 0], [1, 1], [4, 6]]}, by=0.5, train_norm=True)
    update(paths[1], {"up": [[0, 0], [2, 0], [4, 6]], "down": [[0, 0]]}, by=0.25)
    found = changes(*paths)
    up, down = found.rows
    assert (up.name, up.both, up.first_only, up.second_only) == ("up", 2, 1, 1)
    assert (down.name, down.both, down.first_only, down.second_only) == ("down", 0, 0, 1)
    # A whole block and one of 6 x 4 that lie in both, all their weights moved by a quarter less.
    assert up.norm == pytest.approx(0.25 * math.sqrt(256 + 24), rel=1e-6)
    weight = Small().up.weight.detach().double() + 0.5
    square = weight[:16, :16].square().sum() + weight[64:, 96:].square().sum()
    assert up.reference == pytest.approx(square.sqrt().item(), rel=1e-6)
    assert up.relative == up.norm / up.reference
    assert down.relative is None
    assert found.relative == up.relative
    assert [(t.name, t.first_only, t.both) for t in found.trained] == [("norm.weight", 1, 0)]
    same = changes(paths[0], paths[0])
    assert (same.norm, same.relative, same.trained[0].norm) == (0.0, 0.0, 0.0)


@pytest.mark.parametrize("ranks", [(0, 0), (2, 2), (0, 3), (3, 1)])
def test_changes_of_adapters_are_those_of_what_they_add(tmp_path, ranks):
    paths = [tmp_path / f"{name}.safetensors" for name in "ab"]
    first, second = (
        adapter(path, rank, seed, density=density)
        for path, rank, seed, density in zip(paths, ranks, (1, 2), (0.2, 0.3))
    )
    found = changes(*paths)
    for row in found.rows:
        one, other = dense64(first[row.name]), dense64(second[row.name])
        assert row.norm == pytest.approx((other - one).norm().item(), rel=1e-5)
        assert row.reference == pytest.approx(one.norm().item(), rel=1e-5)
        lists = [set(map(tuple, a[row.name].blocks.tolist())) for a in (first, second)]
        assert row.both == len(lists[0] & lists[1])
        assert row.first_only == len(lists[0] - lists[1])
        assert row.second_only == len(lists[1] - lists[0])
    back = changes(*paths[::-1])
    assert back.norm == pytest.approx(found.norm, rel=1e-12)
    again = changes(paths[0], paths[0])
    assert (again.norm, again.relative) == (0.0, 0.0)


def test_what_cannot_be_compared(tmp_path, capsys):
    p = {name: tmp_path / f"{name}.safetensors" for name in ("one", "base", "far", "kind", "size")}
    update(p["one"], {"up": [[0, 0]]})
    update(p["base"], {"up": [[0, 0]]}, seed=1)
    update(p["far"], {"down": [[0, 0]]})
    adapter(p["kind"])
    model = nb.sparse_update(Small(), {"up": [[0, 0]]}, block=32)
    nb.save(model, p["size"])
    for name, text in (
        ("base", "must be of the same base to be compared, got .* at up"),
        ("far", "no layer in common"),
        ("kind", "of one kind to be compared, got sparse_update and adapters"),
        ("size", "in blocks of one size to be compared, got 16 and 32 at up"),
    ):
        with pytest.raises(ValueError, match=text):
            changes(p["one"], p[name])
    nb.save(Small(), tmp_path / "whole.safetensors")
    with pytest.raises(ValueError, match="must be an adapter or sparse update to be compared"):
        changes(p["one"], tmp_path / "whole.safetensors")
    # The command shows all three, compares the pair that it can, and says why not the other.
    assert cli.main([str(p["base"]), str(p["one"]), str(p["one"]), "--json"]) == 0
    values = strict(capsys.readouterr().out)
    assert [file["kind"] for file in values["files"]] == ["sparse_update"] * 3
    assert [change["relative"] for change in values["changes"]] == [0.0]
    assert len(values["not_compared"]) == 1
    assert cli.main([str(p["base"]), str(p["one"])]) == 0
    assert "not compared: base.safetensors and one.safetensors" in capsys.readouterr().out


# --- GGUF files and folders -----------------------------------------------------------------------


def test_gguf(tmp_path, capsys):
    from gguf_samples import Model

    types = {
        "": "Q4_1",
        "token_embd": "Q8_0",
        "ffn_down": "Q6_K",
        "attn_q": "Q3_K",
        "ffn_up": "F16",
    }
    path = Model(types=types).write(tmp_path / "m.gguf")
    facts = describe(path)
    assert facts.architecture == "llama"
    # 2 layers of 7 linears, an embedding, a head; 5 norms
    assert facts.layers == {"int4": 11, "int8": 3, "dense": 2, "vectors": 5}
    assert facts.types["Q6_K"] == {"tensors": 2, "weights": 2 * 256 * 512, "bytes": 2 * 256 * 420}
    assert facts.types["Q4_1"]["tensors"] == 9
    assert sum(t["tensors"] for t in facts.types.values()) == 21
    report = nb.load_gguf(path).nibblock_report
    assert facts.bytes_here == report.model_bytes_after
    assert facts.layers["dense"] == len(report.kept)
    assert cli.main([str(path)]) == 0
    assert "11 tensors exactly in 4 bits, 3 exactly in 8, 2 dense" in capsys.readouterr().out
    other = Model("mamba").write(tmp_path / "g.gguf")
    facts = describe(other)
    assert (facts.architecture, facts.layers, facts.bytes_here) == ("mamba", None, None)
    assert "architecture llama, qwen2, qwen3" in facts.refusal
    assert cli.main([str(other)]) == 0
    assert "load_gguf refuses it: it must hold a model of" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "types", "layers"),
    [
        # 7 linears and 3 experts' tensors a layer, an embedding, a head; a router, its shared
        # gate, 3 biases and 2 norms a layer, a norm
        (
            "qwen2moe",
            {"": "Q4_0", "ffn_up_exps": "Q5_1", "ffn_down_exps": "Q4_K"},
            {"int4": 18, "int8": 4, "dense": 0, "vectors": 15},
        ),
        (
            "mixtral",
            {"": "Q4_1", "blk.1.ffn_gate_exps": "F16"},
            {"int4": 13, "int8": 0, "dense": 3, "vectors": 7},
        ),
        # norms with a bias, one of each head's norms, 3 biases
        ("stablelm", {"": "Q8_0"}, {"int4": 0, "int8": 16, "dense": 0, "vectors": 20}),
        # 4 linears and 3 experts' tensors a layer, an embedding, a head; a router, 8 biases, sinks
        # and 2 norms a layer, a norm
        (
            "gpt-oss",
            {"": "Q8_0", "_exps": "MXFP4", "blk.0.ffn_up_exps": "F32"},
            {"int4": 0, "int8": 20, "dense": 3, "vectors": 37},
        ),
    ],
)
def test_gguf_of_other_architectures(tmp_path, name, types, layers):
    from gguf_architectures import Sample

    options = {"hidden": 256, "inner": 256, "expert_inner": 256} if "moe" in name else {}
    path = Sample(name, types, **options).write(tmp_path / "m.gguf")
    facts = describe(path)
    assert facts.layers == layers
    assert facts.bytes_here == nb.load_gguf(path).nibblock_report.model_bytes_after


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_transformers_folder_says_what_accelerate_does(tmp_path, dtype, capsys):
    tiny_llama(2).to(dtype).save_pretrained(tmp_path)
    model = load_folder(tmp_path, dtype)
    facts = describe(tmp_path)
    assert (facts.kind, facts.architecture) == ("transformers", "LlamaForCausalLM")
    assert facts.parameters == sum(p.numel() for p in model.parameters())
    assert facts.dtypes == {
        str(dtype).removeprefix("torch."): _measure.weight_count(model) * dtype.itemsize
    }
    buffers = sum(b.numel() * b.element_size() for b in model.buffers())
    assert facts.plan.model_bytes_before == facts.parameters * dtype.itemsize + buffers
    assert facts.plan.to_dict() == nb.accelerate(model, progress=False).to_dict()
    assert cli.main([str(tmp_path), "--json"]) == 0
    assert strict(capsys.readouterr().out)["files"][0]["accelerate"]["replaced"] == 14


@pytest.mark.parametrize(
    "config",
    [
        nb.Int4Config(embeddings=True, group_size=32, symmetric=True),
        nb.Int4Config(bits=8, group_size=-1),
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", ["llama", "bert", "mixtral"])
def test_the_plan_is_what_accelerate_does(config, kind):
    if kind == "mixtral":
        values = transformers.MixtralConfig(
            vocab_size=100, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, num_local_experts=4,
        )  # fmt: skip
        model = transformers.MixtralForCausalLM(values)
    else:
        model = tiny_llama(2) if kind == "llama" else tiny_bert(2)
    expected = plan(model, config).to_dict()
    assert expected == nb.accelerate(model, config, progress=False).to_dict()
    assert any(row["action"] == f"int{config.bits}" for row in expected["rows"])


@pytest.mark.slow
def test_finetune_folder(tmp_path, capsys):
    from finetune_samples import SMALL
    from nibblock._finetune import cli as finetune

    source, text, out = (
        folder_of(tmp_path / "m", 2),
        text_file(tmp_path / "t.txt"),
        tmp_path / "out",
    )
    asked = [
        "--model",
        str(source),
        "--data",
        str(text),
        "--out",
        str(out),
        *SMALL,
        "--block",
        "16",
    ]
    asked += ["--checkpoint", "2"]
    assert finetune.main([*asked, "--baselines", "full"]) == 0
    capsys.readouterr()
    facts = describe(out)
    masked, full = facts.runs
    assert (masked.name, masked.state, masked.file) == ("masked", "done", "trained.safetensors")
    assert (full.name, full.file, full.checkpoint_step) == ("full", "model.safetensors", None)
    assert masked.file_bytes == (out / "masked/trained.safetensors").stat().st_size
    assert masked.checkpoint_step == 6
    assert masked.settings["block"] == 16
    assert cli.main([str(out)]) == 0
    shown = capsys.readouterr().out
    assert "masked" in shown
    assert "time to a loss 1 % above its best" in shown  # the run's own table
    assert cli.main([str(out), "--json"]) == 0
    assert len(strict(capsys.readouterr().out)["files"][0]["runs"]) == 2
    # Its file is an update of its model, and both are measured by the command: see below.
    assert describe(out / "masked/trained.safetensors").to_dict()["block_sizes"] == [16]
    assert describe(out / "masked").runs == (masked,)
    # A run that was stopped: no result; a checkpoint whose file was cut short does not count.
    (out / "masked/result.json").unlink()
    (out / "report.json").unlink()
    weights = next((out / "masked/checkpoints").glob("step-*/model.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-1])
    stopped = {run.name: run for run in describe(out).runs}["masked"]
    assert (stopped.state, stopped.result, stopped.checkpoint_step) == ("not done", None, None)
    (out / "full/result.json").write_text('{"settings": {}}')
    with pytest.raises(ValueError, match=r"full/result\.json must hold the figures of finetune"):
        describe(out)


# --- what the command prints ----------------------------------------------------------------------


def test_plot_draws_blocks_only(tmp_path, capsys):
    pytest.importorskip("matplotlib", reason="the matplotlib package is not installed")
    layers = adapter(tmp_path / "a.safetensors")
    picture = tmp_path / "p.png"
    assert cli.main([str(tmp_path / "a.safetensors"), "--plot", str(picture)]) == 0
    assert picture.read_bytes()[:4] == b"\x89PNG"
    columns, rows, density, norm = maps(describe(tmp_path / "a.safetensors").rows)
    assert (columns, rows) == (list(layers), [""])
    assert density.tolist() == [[len(layer.blocks) / 35 for layer in layers.values()]]
    assert norm[0] == pytest.approx(
        [dense64(layer).norm().item() for layer in layers.values()], rel=1e-5
    )
    nb.save(Small(), tmp_path / "m.safetensors")
    assert cli.main([str(tmp_path / "m.safetensors"), "--plot", str(picture)]) == 2
    assert "--plot must go with a file that holds blocks" in capsys.readouterr().err


def test_numbers_that_are_not_finite_are_null(tmp_path, capsys):
    path = tmp_path / "u.safetensors"
    update(path, {"up": [[0, 0]]}, by=math.nan)
    assert cli.main([str(path), str(path), "--json"]) == 0
    values = strict(capsys.readouterr().out)
    assert values["files"][0]["norm"] is None
    assert values["changes"][0]["relative"] is None
    assert cli.main([str(path), "--layers"]) == 0
