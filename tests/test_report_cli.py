"""`python -m nibblock report`: errors, options, and models measured side by side."""

from __future__ import annotations

import io
import json
import math
import struct
import subprocess
import sys

import nibblock as nb
import pytest
import torch
from finetune_samples import byte_tokenizer, folder_of, text_file, tiny_bert, tiny_llama
from nibblock import __main__ as command
from nibblock import _convert, _measure
from nibblock._report_cli import child, cli, models
from nibblock._report_cli.measure import Measured, _Worker
from report_samples import Small, strict, update
from safetensors import safe_open
from safetensors.torch import save_file

transformers = pytest.importorskip(
    "transformers", reason="the transformers package is not installed"
)

# --- errors ---------------------------------------------------------------------------------------


def write_bad(tmp_path):
    """name -> (path, what the one line must say)."""
    good = tmp_path / "good.safetensors"
    nb.save(Small(), good)
    plain = tmp_path / "plain.safetensors"
    save_file({"x": torch.zeros(2)}, plain)
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(good.read_bytes()[:-3])
    text = tmp_path / "notes.txt"
    text.write_text("no model at all")
    newer = tmp_path / "newer.safetensors"
    save_file({"x": torch.zeros(2)}, newer, {"nibblock": '{"version": 9, "layers": {}}'})
    odd = tmp_path / "odd.safetensors"
    header = {"version": 1, "layers": {"x": {"kind": "cubic"}}, "shared": {}, "tied": {}}
    save_file({"x": torch.zeros(2)}, odd, {"nibblock": json.dumps(header)})
    update(tmp_path / "u.safetensors", {"up": [[0, 0]]})
    less = tmp_path / "less.safetensors"
    with safe_open(tmp_path / "u.safetensors", framework="pt") as file:
        save_file({"up.blocks": file.get_tensor("up.blocks")}, less, file.metadata())
    chosen = tmp_path / "selection.safetensors"
    nb.select_blocks(Small(), [], None, method="magnitude", density=0.1, block=16).save(chosen)
    gguf = tmp_path / "bad.gguf"
    gguf.write_bytes(b"GGUF" + struct.pack("<I", 3) + bytes(4))
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken/config.json").write_text("{")
    (tmp_path / "alien").mkdir()
    (tmp_path / "alien/config.json").write_text('{"model_type": "no such model"}')
    return {
        "none.safetensors": "PATH must be a file or folder that exists",
        "plain.safetensors": "must be written by nibblock.save",
        "cut.safetensors": "must be a whole safetensors file",
        "notes.txt": "must be a whole safetensors file",
        "newer.safetensors": "must be of version 3 or older, got 9",
        "odd.safetensors": "must have whole metadata, got KeyError",
        "less.safetensors": "must hold up.weight, got a file without it",
        "selection.safetensors": "got a selection of blocks",
        "bad.gguf": "must hold a GGUF header of 24 bytes",
        "empty": "must hold config.json",
        "broken": "broken/config.json must be whole JSON",
        "alien": "must hold a configuration that transformers can build",
    }


def test_unknown_and_damaged_paths_cost_one_line(tmp_path, capsys):
    for name, text in write_bad(tmp_path).items():
        assert cli.main([str(tmp_path / name)]) == 2, name
        captured = capsys.readouterr()
        assert text in captured.err, name
        assert name.partition(".")[0] in captured.err
        assert captured.err.startswith("report: "), captured.err
        assert captured.err.count("\n") == 1, captured.err
        assert captured.out == ""


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--base", "x"], "--base must go with --text"),
        (["--price", "1"], "--price must go with --text"),
        (["--text", "no.txt"], "--text must be a file that can be read"),
        (["--text", "{t}", "--tokens", "1"], "--tokens must be at least 2, got 1"),
        (["--text", "{t}", "--threads", "0"], "--threads must be at least 1, got 0"),
        (["--text", "{t}", "--price", "nan"], "--price must be a number of at least 0, got nan"),
        (["--text", "{t}", "--layers"], "--layers must go without --text"),
        (["--text", "{t}"], "PATH must be a causal language model for --text, got"),
        (["--text", "{t}", "--base", "{u}"], "--base must be a causal language model, got"),
        (["--plot", "{t}.png"], None),
    ],
)
def test_options_are_checked(tmp_path, capsys, options, message):
    text, path = text_file(tmp_path / "t.txt", 20), tmp_path / "u.safetensors"
    update(path, {"up": [[0, 0]]})
    options = [option.format(t=text, u=path) for option in options]
    assert cli.main([str(path), *options]) == (0 if message is None else 2)
    captured = capsys.readouterr()
    assert message is None or (message in captured.err and captured.err.count("\n") == 1)


# --- measuring ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    """A folder with a model, its copy in int4, files that stand on each, and a text."""
    path = tmp_path_factory.mktemp("models")
    folder_of(path / "model", 2)
    text_file(path / "text.txt", 200)
    assert _convert.main([str(path / "model"), str(path / "int4"), "--group-size", "32"]) == 0
    names = ["model.layers.0.mlp.up_proj", "model.layers.1.self_attn.q_proj"]
    nb.save(
        nb.sparse_update(tiny_llama(2), {name: [[0, 0]] for name in names}),
        path / "update.safetensors",
    )
    model = nb.sparse_update(tiny_llama(2), {names[0]: [[0, 0], [1, 0]]})
    with torch.no_grad():
        nb.trainable_parameters(model)[0].add_(0.3)
    nb.save(model, path / "moved.safetensors")
    for name, config in (("dense", None), ("packed", nb.Int4Config(group_size=32))):
        model = tiny_llama(2)
        if config is not None:
            nb.accelerate(model, config, progress=False)
            nb.save(model, path / "whole.safetensors")
        nb.add_adapters(model, nb.AdapterConfig(density=0.1))
        nb.save(model, path / f"{name}.safetensors")
    return path


@pytest.mark.slow
def test_side_by_side(bench, capsys):
    names = ["model", "int4", "update.safetensors", "moved.safetensors"]
    paths = [str(bench / name) for name in names]
    asked = ["--base", str(bench / "model"), "--text", str(bench / "text.txt"), "--json"]
    asked += ["--tokens", "300", "--rounds", "2", "--threads", "1", "--price", "7.2"]
    assert cli.main([*paths, *asked]) == 0
    values = strict(capsys.readouterr().out)
    rows = values["measured"]
    assert [row["path"] for row in rows] == paths
    assert values["not_measured"] == []
    dense, int4, update, moved = rows
    ids = byte_tokenizer()((bench / "text.txt").read_text(), return_tensors="pt").input_ids[0]
    torch.set_num_threads(1)
    expected = _measure.perplexity(tiny_llama(2), ids[:300])
    # The same model gives the same figure: an update that moved nothing is its base.
    assert dense["perplexity"] == update["perplexity"] == pytest.approx(expected, rel=1e-6)
    model = nb.load(bench / "moved.safetensors", tiny_llama(2))
    assert moved["perplexity"] == pytest.approx(_measure.perplexity(model, ids[:300]), rel=1e-6)
    assert len({dense["perplexity"], int4["perplexity"], moved["perplexity"]}) == 3
    assert [row["form"] for row in rows] == ["dense float32", "empty"] + ["dense float32"] * 2
    assert dense["bytes"] == _measure.model_bytes(tiny_llama(2))
    assert int4["bytes"] < dense["bytes"]
    assert {row["weights"] for row in (dense, int4)} == {_measure.weight_count(tiny_llama(2))}
    sizes = {name: (bench / name).stat().st_size for name in names[2:]}
    sizes["model"] = (bench / "model/model.safetensors").stat().st_size
    assert [row["disk_bytes"] for row in rows[2:]] == [
        sizes["model"] + sizes[name] for name in names[2:]
    ]
    for row in rows:
        assert row["text_tokens"] == 300
        assert row["text_hash"] == dense["text_hash"]
        assert len(row["prefill"]) == len(row["decode"]) == 2
        assert all(math.isfinite(rate) and rate > 0 for rate in row["prefill"] + row["decode"])
        assert row["peak_bytes"] > 0
        assert row["load_seconds"] > 0
        rate = row["decode_tokens_per_second"]
        assert row["milliseconds_per_token"] == pytest.approx(1e3 / rate)
        # 7.2 an hour are 0.002 a second.
        assert row["price_per_million_written"] == pytest.approx(0.002 * 1e6 / rate)
        rate = row["prefill_tokens_per_second"]
        assert row["price_per_million_read"] == pytest.approx(0.002 * 1e6 / rate)


def test_the_table_and_what_is_not_measured(bench, capsys):
    text, model = ["--text", str(bench / "text.txt")], str(bench / "model")
    asked = ["--tokens", "50", "--rounds", "1", "--threads", "1"]
    assert cli.main([model, str(bench / "update.safetensors"), *text, *asked]) == 0
    shown = capsys.readouterr().out
    assert "not measured: " in shown
    assert "it stands on a base; name that with --base" in shown
    for words in ("perplexity of 50 tokens", "within this table only", "1 threads", "peak MB"):
        assert words in shown
    assert "1 M read" not in shown


def test_each_file_finds_the_form_of_its_base(bench, tmp_path):
    base = str(bench / "model")
    forms = {
        "dense": ("dense float32", ()),
        "packed": ("int4 32", ()),
        "update": ("dense float32", ()),
        "whole": ("empty", ()),
    }
    for name, (form, _) in forms.items():
        path = str(bench / f"{name}.safetensors")
        (one,), left = models.candidates([path], base)
        assert (one.base, one.form, one.files, left) == (base, form, (path,), [])
        assert isinstance(models.load(one), transformers.LlamaForCausalLM)
    # On a folder that convert made, its own file comes first.
    path = str(bench / "packed.safetensors")
    (one,), _ = models.candidates([path], str(bench / "int4"))
    assert one.files == (str(bench / "int4/model.safetensors"), path)
    assert models.load(one).model.layers[0].mlp.up_proj.base.packed.dtype == torch.uint8
    torch.manual_seed(5)
    other = transformers.LlamaForCausalLM(tiny_llama(2).config)
    other.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"packed\.safetensors must be trained on --base, got"):
        models.candidates([path], str(tmp_path))


def test_a_gguf_is_measured_with_its_own_tokenizer(tmp_path):
    from gguf_samples import Model

    one = Model(types={"": "Q4_1", "token_embd": "Q8_0"}).write(tmp_path / "m.gguf")
    (found,), left = models.candidates([str(one)], None)
    assert (found.form, found.files, left) == ("exact", (), [])
    with pytest.raises(ValueError, match="must hold a tokenizer"):
        models.load_tokenizer(found)
    other = Model("mamba").write(tmp_path / "g.gguf")
    ((path, why),) = models.candidates([str(other)], None)[1]
    assert path == str(other)
    assert why.startswith("load_gguf does not build it: it must hold a model of architecture llama")
    assert why.endswith("got 'mamba'")


def test_files_on_a_gguf(tmp_path):
    from gguf_samples import Model
    from nibblock.formats.gguf import load_gguf_dense

    base = Model(types={"": "Q4_1", "token_embd": "Q8_0"}).write(tmp_path / "m.gguf")
    name = "model.layers.1.mlp.up_proj"
    makers = {
        "update": ("dense float32", lambda: load_gguf_dense(base)),
        "adapter": ("exact", lambda: nb.load_gguf(base)),
        "over_dense": ("dense float32", lambda: load_gguf_dense(base)),
        "over_bfloat16": ("dense bfloat16", lambda: load_gguf_dense(base, torch.bfloat16)),
        "whole": ("exact", lambda: nb.load_gguf(base)),
    }
    ids = torch.arange(1, 13)[None]
    for kind, (form, make) in makers.items():
        model, path = make(), tmp_path / f"{kind}.safetensors"
        if kind == "update":
            nb.sparse_update(model, {name: [[0, 0], [3, 1]]})
        elif kind != "whole":
            nb.add_adapters(model, nb.AdapterConfig(density=0.1, where=name))
        with torch.no_grad():
            for parameter in nb.trainable_parameters(model) if kind != "whole" else ():
                parameter.add_(0.1)
            expected = model(ids).logits
        nb.save(model, path)
        (one,), _ = models.candidates([str(path)], str(base))
        assert (one.form, one.files) == (form, (str(path),)), kind
        sizes = [path.stat().st_size, base.stat().st_size]
        assert one.disk_bytes == (sizes[0] if kind == "whole" else sum(sizes))
        with torch.no_grad():
            assert torch.equal(models.load(one)(ids).logits, expected), kind


def test_what_is_no_causal_language_model(tmp_path):
    tiny_bert(1).save_pretrained(tmp_path / "bert")
    (tmp_path / "bare").mkdir()
    tiny_llama(1).config.save_pretrained(tmp_path / "bare")
    found, left = models.candidates([str(tmp_path / "bert"), str(tmp_path / "bare")], None)
    assert found == []
    assert [reason for _, reason in left] == [
        "BertForSequenceClassification is no causal language model",
        "the folder holds no weights",
    ]


def ask(*requests):
    """What the child answers, in this process."""
    answers = []
    child.serve(io.StringIO("\n".join(json.dumps(r) for r in requests)), answers.append)
    return answers


def candidate(path):
    return {
        "path": str(path), "base": str(path), "form": "dense float32", "files": [],
        "disk_bytes": 0,
    }  # fmt: skip


def test_a_model_that_cannot_be_measured_costs_one_line(bench, tmp_path, capsys):
    tiny_llama(1).save_pretrained(tmp_path / "bare")
    text = {"text": str(bench / "text.txt"), "tokens": 20, "threads": 1}
    load = {"do": "load", **text}
    (answer,) = ask({**load, "candidate": candidate(tmp_path / "bare")})
    assert answer["error"].startswith("report: bare must hold a tokenizer, got a folder without")
    short = tmp_path / "short.txt"
    short.write_text("x")
    (answer,) = ask({**load, "text": str(short), "candidate": candidate(bench / "model")})
    assert answer["error"] == "report: --text must hold at least 2 tokens, got 1"
    config = tiny_llama(1).config
    config.vocab_size = 40
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "small")
    byte_tokenizer().save_pretrained(tmp_path / "small")
    (answer,) = ask({**load, "candidate": candidate(tmp_path / "small")})
    assert "small must have a tokenizer of its vocabulary of 40, got token" in answer["error"]
    # From the command: the child's line, exit code 2.
    assert cli.main([str(tmp_path / "bare"), "--text", str(short)]) == 2
    captured = capsys.readouterr()
    assert captured.err.splitlines()[-1].startswith("report: bare must hold a tokenizer")


def test_a_process_that_died_is_named():
    with _Worker("m.gguf") as worker:
        worker.process.kill()
        worker.process.wait()
        with pytest.raises(OSError, match=r"report: m\.gguf must be measured by a process that"):
            worker.ask("load")


def test_a_short_context_bounds_every_length(bench, tmp_path):
    path = tmp_path / "short"
    tiny_llama(1, max_position_embeddings=24).save_pretrained(path)
    byte_tokenizer().save_pretrained(path)
    load = {"do": "load", "text": str(bench / "text.txt"), "tokens": 60, "threads": 1}
    requests = [{"do": name} for name in ("warm", "perplexity", "prefill", "decode")]
    found, warm, quality, prefill, decode = ask({**load, "candidate": candidate(path)}, *requests)
    assert (found["prefill_tokens"], found["decode_tokens"], quality["window"]) == (23, 8, 24)
    assert min(quality["perplexity"], prefill["rate"], decode["rate"]) > 0
    assert "error" not in warm


def test_the_peak_begins_again():
    """Runs in a process of its own: a peak before is not a peak after, where the system can."""
    code = """
import torch
from nibblock import _measure
torch.ones(40_000_000)
before = _measure.memory("VmRSS")
known = _measure.forget_peak()
peak = _measure.memory("VmHWM") - before
held = torch.ones(10_000_000)
print(known, peak, _measure.memory("VmHWM") - before)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=300
    )
    known, after, later = done.stdout.split()
    if known == "False":
        pytest.skip("this system does not forget a process's peak memory")
    assert int(after) < 20_000_000
    assert 38_000_000 < int(later) < 80_000_000


def test_medians_and_costs():
    sizes = dict.fromkeys(("peak_bytes", "bytes", "disk_bytes", "window", "text_tokens"), 1)
    row = Measured(
        "m", "exact", 1, None, **sizes, text_hash="", prefill_tokens=1, decode_tokens=2,
        load_seconds=0.1, threads=1, price=3.6, prefill=[9.0, 1.0, 4.0], decode=[2.0, 8.0],
    )  # fmt: skip
    values = row.to_dict()
    assert (values["prefill_tokens_per_second"], values["decode_tokens_per_second"]) == (4.0, 5.0)
    assert values["price_per_million_written"] == pytest.approx(3.6 / 3600 * 1e6 / 5)
    assert values["milliseconds_per_token"] == 200
    assert values["perplexity"] is None


# --- the other commands ---------------------------------------------------------------------------


def test_every_command_that_prints_facts_prints_json(bench, tmp_path, capsys):
    assert command.main(["info", "--json", "--no-self-test"]) == 0
    assert strict(capsys.readouterr().out)["versions"]["nibblock"] == nb.__version__
    target = tmp_path / "m.safetensors"
    assert command.main(["convert", str(bench / "model"), str(target), "--json"]) == 0
    values = strict(capsys.readouterr().out)
    assert values["file"] == str(target)
    assert values["file_bytes"] == target.stat().st_size
    assert values["report"]["replaced"] == 14
    quick = ["--tokens", "2", "--prefill", "8", "--rounds", "1", "--text-tokens", "16"]
    assert command.main(["demo", "--model", str(bench / "model"), *quick, "--json"]) == 0
    captured = capsys.readouterr()
    assert len(strict(captured.out)["models"]) == 5
    assert "perplexity on 16 tokens" in captured.err
    assert command.main(["report", str(target), "--json"]) == 0
    assert strict(capsys.readouterr().out)["files"][0]["kind"] == "model"


def test_a_run_that_diverged_is_json_too(tmp_path, monkeypatch, capsys):
    from nibblock._finetune import cli as finetune

    def diverged(settings, place, resume, quiet):
        place.mkdir(parents=True)
        (place / "result.json").write_text('{"best": {"loss": NaN, "perplexity": Infinity}}')
        return 0

    monkeypatch.setattr(finetune, "run_child", diverged)
    monkeypatch.setattr(finetune.report, "plot", lambda results, path: None)
    assert command.main(["finetune", "--out", str(tmp_path / "run"), "--json"]) == 0
    (result,) = strict(capsys.readouterr().out)["results"]
    assert result == {"best": {"loss": None, "perplexity": None}}


def test_the_command_itself():
    help_text = subprocess.run(
        [sys.executable, "-m", "nibblock", "report", "--help"],
        capture_output=True, text=True, check=True, timeout=300,
    ).stdout  # fmt: skip
    for option in ("--base", "--text", "--json", "--layers", "--plot", "--price", "--threads"):
        assert option in help_text
    assert "report" in command.usage()
