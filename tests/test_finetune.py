"""`python -m nibblock finetune`: data, loss, methods, report, and whole runs on tiny models."""

from __future__ import annotations

import dataclasses
import json
import math
import subprocess
import sys

import nibblock as nb
import pytest
import torch
from finetune_samples import byte_tokenizer, folder_of, text_file, tiny_llama
from nibblock._finetune import cli, data, methods, report, worker
from nibblock._finetune.loop import make_cache, rate, train
from nibblock._finetune.settings import BASELINES, LEARNING_RATES, Settings, parse_size
from nibblock._finetune.task import TextTask, check_head, next_token_loss

pytest.importorskip("transformers", reason="the transformers package is not installed")


# --- data -----------------------------------------------------------------------------------------


def test_documents_of_a_folder(tmp_path):
    (tmp_path / "b.md").write_text("second")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "c.txt").write_text("third")
    (tmp_path / "a.txt").write_text("first")
    (tmp_path / "empty.txt").write_text("  \n")
    (tmp_path / "skipped.bin").write_bytes(b"\xff")
    assert data.read_documents(str(tmp_path)) == ["first", "second", "third"]
    assert data.read_documents(str(tmp_path / "a.txt")) == ["first"]
    assert len(data.read_documents("")[0]) > 300_000
    (tmp_path / "bad.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match=r"UTF-8 text, got other bytes in bad\.txt"):
        data.read_documents(str(tmp_path))
    with pytest.raises(FileNotFoundError, match="file or folder that exists"):
        data.read_documents(str(tmp_path / "none"))
    with pytest.raises(ValueError, match="must hold text"):
        data.read_documents(str(tmp_path / "empty.txt"))


def test_blocks_are_whole_documents_or_pieces_and_never_twice():
    many = [f"document {i}" for i in range(25)]
    assert data.blocks_of([*many, "document 3 "]) == many
    text = "\n\n".join("word " * 100 + str(i) for i in range(60))
    pieces = data.blocks_of([text])
    assert "".join(pieces).split() == text.split()
    assert all(data.BLOCK <= len(p) < 2 * data.BLOCK for p in pieces[:-1])
    assert len(data.blocks_of(["x" * 50_000])) == 2  # eleven equal pieces and a rest


@pytest.mark.parametrize("share", [0.05, 0.3, 0.99])
def test_split_does_not_leak(share):
    blocks = [f"{i} " * (i + 1) for i in range(40)]
    train, valid = data.split(blocks, share, seed=1)
    assert sorted(train + valid) == sorted(blocks)
    assert train
    assert valid
    assert not set(train) & set(valid)
    held = sum(map(len, valid)) / sum(map(len, blocks))
    assert abs(held - share) <= 0.1
    assert data.split(blocks, share, seed=1) == (train, valid)
    assert data.split(blocks, share, seed=2) != (train, valid)
    with pytest.raises(ValueError, match="at least 2 blocks of text to split, got 1"):
        data.split(blocks[:1], share, 1)


def test_pack_keeps_every_token_and_ends_documents():
    tokenizer = byte_tokenizer()
    rows = data.pack(tokenizer, ["abcd", "ef", "ghijk"], 4)
    assert rows.shape == (3, 4)
    assert rows.flatten().tolist().count(tokenizer.eos_token_id) == 2
    text = tokenizer.decode([t for t in rows.flatten().tolist() if t != tokenizer.eos_token_id])
    assert "abcdefghij".startswith(text)


def test_order_visits_every_row_in_the_same_groups_each_epoch():
    order = data.Order(rows=22, per_step=4, seed=5)
    assert order.steps_per_epoch == 5
    epochs = [[tuple(order.indices(e * 5 + i).tolist()) for i in range(5)] for e in range(3)]
    assert len({row for group in epochs[0] for row in group}) == 20
    assert sorted(epochs[0]) == sorted(epochs[1]) == sorted(epochs[2])
    assert len({tuple(e) for e in epochs}) == 3
    assert data.Order(22, 4, 6).indices(0).tolist() != order.indices(0).tolist()
    with pytest.raises(ValueError, match="at least 4 training rows for one step, got 3"):
        data.Order(3, 4, 0)


# --- loss -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [5, 16, 1000])
@pytest.mark.parametrize("head", ["tied", "frozen"])
def test_loss_and_gradients_are_the_models_own(chunk, head):
    model = tiny_llama(2)
    model.lm_head.weight.requires_grad_(head == "tied")
    rows = torch.randint(0, 260, (3, 12))
    plain = torch.nn.functional.cross_entropy(
        model(input_ids=rows).logits[:, :-1].flatten(0, 1), rows[:, 1:].flatten()
    )
    trained = [p for p in model.parameters() if p.requires_grad]
    expected = torch.autograd.grad(plain * 3, trained)
    ours = next_token_loss(model, rows, chunk)
    assert ours.item() == pytest.approx(plain.item(), rel=1e-6)
    for a, b in zip(torch.autograd.grad(ours * 3, trained), expected):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    with torch.no_grad():
        assert next_token_loss(model, rows, chunk).item() == pytest.approx(plain.item(), rel=1e-6)
    check_head(model, rows)


def test_a_model_with_other_logits_is_refused():
    model = tiny_llama(1)
    model.lm_head.register_forward_hook(lambda m, a, out: out)
    check_head(model, torch.zeros(1, 8, dtype=torch.int64))
    plain = model.forward
    model.forward = lambda **k: type("Out", (), {"logits": plain(**k).logits * 2})
    with pytest.raises(ValueError, match="must have plain logits"):
        check_head(model, torch.zeros(1, 8, dtype=torch.int64))


# --- settings -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change, message",
    [
        ({"density": 0.0}, r"--density must be in \(0, 1\], got 0.0"),
        ({"density": math.nan}, "--density must be at least 0, got nan"),
        ({"block": 48}, "--block must be one of 16, 32, 64, 128, got 48"),
        ({"valid": 1.0}, "--valid must be in"),
        ({"tokens": 64, "seq": 128}, r"--tokens must be at least --seq \(128\), got 64"),
        ({"epochs": 0}, "--epochs must be at least 1, got 0"),
        ({"lr": -1.0}, "--lr must be at least 0, got -1.0"),
        ({"max_norm": -1.0}, "--max-norm must be at least 0"),
        ({"budget": 1.5}, "--budget must be in"),
        ({"spread": 0.5}, "--spread must be at least 1, or 0 for no caps, got 0.5"),
        ({"schedule": "step"}, "--schedule must be one of linear, cosine, constant, got step"),
        ({"int4": True, "method": "full"}, "--int4 must go with --method adapter, got full"),
        ({"optimizer": "sgd"}, "--optimizer must be one of adamw, muon, got sgd"),
        (
            {"optimizer": "muon", "method": "full"},
            "--optimizer muon must go with --method masked or adapter, got full: it makes",
        ),
        ({"compute": "int4"}, "--compute must be one of bf16, int8, got int4"),
        (
            {"compute": "int8", "method": "adapter"},
            "--compute int8 must go with --int4, got a dense base",
        ),
    ],
)
def test_settings_refuse(change, message):
    with pytest.raises(ValueError, match=message):
        Settings(model="m", **change).checked()


def test_default_learning_rates():
    for method in BASELINES:
        assert Settings(model="m", method=method).learning_rate == LEARNING_RATES[method]
    muon = Settings(model="m", optimizer="muon").checked()
    assert muon.learning_rate == 1e-2
    assert dataclasses.replace(muon, lr=0.5).learning_rate == 0.5


def test_a_run_of_before_the_option_was_by_adamw():
    saved = Settings(model="m").to_json()
    del saved["optimizer"], saved["compute"]
    assert Settings.from_json(saved).differs(saved) is None
    assert Settings(model="m", optimizer="muon").differs(saved) == "optimizer"


def test_sizes():
    assert [parse_size(t) for t in ("off", "0", "4096", "512M", "1.5g")] == [
        0, 0, 4096, 512 << 20, 3 << 29,
    ]  # fmt: skip
    for bad in ("", "-1", "many", "5X", "inf"):
        with pytest.raises(ValueError, match="--cache must be a size"):
            parse_size(bad)


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant"])
def test_rates(schedule):
    settings = Settings(model="m", lr=1.0, schedule=schedule, warmup=4)
    rates = [rate(settings, step, 20) for step in range(20)]
    assert rates[:4] == pytest.approx([0.2, 0.4, 0.6, 0.8])
    assert rates[4] == 1.0
    falling = rates[4:]
    assert all(a >= b > 0 for a, b in zip(falling, falling[1:]))
    assert falling[-1] < 0.1 or schedule == "constant"


# --- methods and the loop -------------------------------------------------------------------------


def text_task(rows: int = 24) -> TextTask:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 20, (rows + 4, 12), generator=generator)
    ids[:, 1::2] = ids[:, ::2]  # something to learn
    return TextTask(ids[:rows], ids[rows:], 4, seed=0)


RUN = Settings(
    model="m", method="adapter", select="even", density=0.2, seq=12, tokens=48, steps=10, lr=3e-3
)


@pytest.mark.parametrize("method", BASELINES)
def test_every_method_learns_and_counts_its_state(method, tmp_path):
    if method in ("lora", "lora-cut", "shira"):
        pytest.importorskip("peft", reason="the peft package is not installed")
    model, task = tiny_llama(4), text_task()
    run = dataclasses.replace(RUN, method=method, cut="model.layers.2.mlp.up_proj")
    prepared = methods.prepare(model, task, run)
    names = list(prepared.trained())
    record = train(task, prepared, run)
    assert record.evaluations[-1]["loss"] < record.evaluations[0]["loss"] - 1e-3
    count = sum(p.numel() for p in prepared.trained().values())
    ages = sum(len(b) for b in (prepared.selection or {}).values())
    counters = ages if method == "masked" else len(names)  # AdamW's t, of blocks or of Parameters
    assert record.state_bytes == 4 * 4 * count + 4 * counters
    assert prepared.save(tmp_path / "f.safetensors") == (tmp_path / "f.safetensors").stat().st_size
    if method.endswith("cut"):
        assert all(".layers.0." not in n and ".layers.1." not in n for n in names)
        assert any(".layers.2." in n for n in names)
    assert sum(record.phases.values()) == pytest.approx(record.seconds)


@pytest.mark.parametrize("method", ["adapter", "masked", "lora-cut", "full-cut"])
def test_a_cut_with_the_cache_gives_the_same_losses(method, tmp_path):
    if method == "lora-cut":
        pytest.importorskip("peft", reason="the peft package is not installed")
    upper = {f"model.layers.{i}.mlp.up_proj": torch.tensor([[0, 0], [1, 1]]) for i in (2, 3)}
    curves = []
    for cache in (0, 1 << 24):
        model, task = tiny_llama(4), text_task()
        run = dataclasses.replace(RUN, method=method, cut="model.layers.2", cache=cache, steps=18)
        prepared = methods.prepare(model, task, run, selection=upper)
        record = train(task, prepared, run, folder=tmp_path)
        curves.append((record.losses, [e["loss"] for e in record.evaluations]))
        assert len(prepared.notes) == 2 * bool(cache) + (method == "full-cut")
    assert curves[0] == curves[1]
    # 24 training rows three times; 4 held-out ones at thirteen evaluations after the first epoch
    assert "96 reused, 28 computed" in prepared.notes[-1]


@pytest.mark.parametrize("optimizer, lr", [("adamw", 3e-3), ("muon", 1e-2)])
@pytest.mark.parametrize("moves", ["reselect", "prox", "progressive"])
def test_moving_blocks(moves, optimizer, lr, monkeypatch):
    from nibblock._finetune import moving

    monkeypatch.setattr(moving, "STRENGTH", 3.0)  # more than a step moves any block
    run = dataclasses.replace(
        RUN, method="masked", select="impact", density=0.3, moves=moves, steps=24, checkpoint=-1,
        optimizer=optimizer, lr=lr,
    ).checked()  # fmt: skip
    task = text_task()
    prepared = methods.prepare(tiny_llama(2), task, run)
    layers = [m for m in prepared.model.modules() if isinstance(m, nb.MaskedLinear)]
    assert len(layers) == 14

    def lists():
        return [m.blocks.tolist() for m in layers]

    before = lists()
    record = train(task, prepared, run)
    assert record.step == 24
    first, last = (record.evaluations[i]["loss"] for i in (0, -1))
    count = [sum(map(len, blocks)) for blocks in (before, lists())]
    if moves == "prox":  # every block is shrunk back to where it was, and leaves
        assert count[1] == 0
        assert last == pytest.approx(first, abs=1e-6)
        return
    assert lists() != before
    assert last < first - 1e-3
    if moves == "reselect":
        assert count[0] == count[1]
    else:
        assert count[1] == pytest.approx(4 * count[0], abs=4)


def test_moving_blocks_take_no_checkpoints():
    with pytest.raises(ValueError, match="--moves must go with --method masked"):
        dataclasses.replace(RUN, method="masked", moves="reselect").checked()


def test_no_cache_where_the_first_layer_is_trained():
    model, task = tiny_llama(2), text_task()
    run = dataclasses.replace(RUN, cache=1 << 20)
    prepared = methods.prepare(model, task, run)
    assert make_cache(prepared, task, run, None) is None
    assert prepared.notes == ["no prefix cache: layers.0 is trained"]


def test_early_stopping_returns_to_the_best_weights():
    class Worse(TextTask):
        def evaluate(self, model, around):
            seen.append({n: p.detach().clone() for n, p in model.named_parameters()})
            return {"loss": [5.0, 4.0, 4.5, 4.2, 3.0][len(seen) - 1]}

    seen: list = []
    base = text_task()
    task = Worse(base.train, base.valid, 4, 0)
    run = dataclasses.replace(RUN, evaluate=2, patience=2)
    prepared = methods.prepare(tiny_llama(1), task, run)
    record = train(task, prepared, run)
    assert (record.step, record.best, record.best_loss) == (6, 2, 4.0)
    assert "no better loss in 2 evaluations" in record.stopped
    for name, parameter in prepared.trained().items():
        assert torch.equal(parameter, seen[1][name])
        assert not torch.equal(parameter, seen[3][name])


def test_a_loss_that_is_not_a_number_ends_the_run():
    class Broken(TextTask):
        def loss(self, model, batch):
            return super().loss(model, batch) * math.nan

    base = text_task()
    task = Broken(base.train, base.valid, 4, 0)
    record = train(task, methods.prepare(tiny_llama(1), task, RUN), RUN)
    assert record.step == 1
    assert record.stopped == "the loss was nan at step 1"


def test_clipping_and_decay_take_part():
    losses = []
    for change in ({}, {"max_norm": 1e-3}, {"weight_decay": 10.0}):
        task = text_task()
        run = dataclasses.replace(RUN, method="full", **change)
        model = tiny_llama(1)
        losses.append(train(task, methods.prepare(model, task, run), run).losses[-1])
    assert len(set(losses)) == 3


# --- the command ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    path = tmp_path_factory.mktemp("finetune")
    folder_of(path / "model", layers=2)
    text_file(path / "text.txt")
    return path


def arguments(place, *more: str) -> list[str]:
    small = "--seq 16 --tokens 64 --steps 6 --threads 1 --evaluate 3 --select even --density 0.2"
    return [
        "--model", str(place / "model"), "--data", str(place / "text.txt"), *small.split(), *more
    ]  # fmt: skip


@pytest.fixture
def here(monkeypatch):
    """Runs the children in this process; what libraries start (matplotlib asks fc-list for fonts
    the first time) still runs."""
    real = subprocess.run

    def run(command, **options):
        if command[1:3] != ["-m", "nibblock._finetune.worker"]:
            return real(command, **options)
        return subprocess.CompletedProcess(command, worker.main(command[3:]))

    monkeypatch.setattr(cli.subprocess, "run", run)


def test_a_method_beside_a_baseline(place, tmp_path, here, capsys):
    out = tmp_path / "out"
    extra = ["--method", "adapter", "--baselines", "full", "--out", str(out)]
    assert cli.main(arguments(place, *extra)) == 0
    said = capsys.readouterr()
    for word in ("perplexity", "peak MB", "adapter", "full", "against full", "report.png"):
        assert word in said.out
    assert "adapter: 6 steps in" in said.err
    figures = json.loads((out / "report.json").read_text())["results"]
    adapter, full = figures
    assert adapter["trained"] < full["trained"] == full["weights"] == adapter["weights"]
    assert adapter["state_bytes"] < 0.3 * full["state_bytes"]
    assert adapter["before"]["loss"] == full["before"]["loss"]
    assert adapter["best"]["loss"] < adapter["before"]["loss"]
    assert adapter["file_bytes"] == (out / "adapter" / "trained.safetensors").stat().st_size
    assert (out / "report.png").stat().st_size > 1000
    model = worker.load_model(Settings.from_json(adapter["settings"]))[0]
    nb.load(out / "adapter" / "trained.safetensors", model)
    task = worker.load_task(Settings.from_json(adapter["settings"]), model, byte_tokenizer())
    assert task.evaluate(model)["loss"] == pytest.approx(adapter["best"]["loss"], abs=1e-6)


def test_muon_beside_a_baseline_by_adamw(place, tmp_path, here, capsys):
    extra = ["--method", "masked", "--optimizer", "muon", "--baselines", "full"]
    assert cli.main([*arguments(place, *extra), "--json", "--out", str(tmp_path / "out")]) == 0
    results = json.loads(capsys.readouterr().out)["results"]
    assert [r["settings"]["optimizer"] for r in results] == ["muon", "adamw"]
    assert [report.label(r) for r in results] == ["masked muon", "full"]
    assert results[0]["best"]["loss"] < results[0]["before"]["loss"]


def test_the_command_in_processes_of_its_own(place, tmp_path):
    out = tmp_path / "out"
    command = [sys.executable, "-m", "nibblock", "finetune", "--json", "--out", str(out)]
    command += [*arguments(place), "--method", "masked", "--select", "impact"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (result,) = json.loads(done.stdout)["results"]
    assert result["best"]["loss"] < result["before"]["loss"]
    assert 0 < result["peak_bytes"] < 5e8 < 4 * result["imports_bytes"]
    saved = nb.sparse.Selection.load(out / "masked" / "selection.safetensors")
    assert sum(map(len, saved.values())) * 32 * 32 == result["trained"]


def test_int4_base_and_json(place, tmp_path, here, capsys):
    extra = ["--method", "adapter", "--int4", "--json", "--out", str(tmp_path / "out")]
    assert cli.main(arguments(place, *extra)) == 0
    (result,) = json.loads(capsys.readouterr().out)["results"]
    assert result["best"]["loss"] < result["before"]["loss"]
    assert report.label(result) == "adapter int4"
    settings = Settings.from_json(result["settings"])
    for compute in ("bf16", "int8"):
        model, _ = worker.load_model(dataclasses.replace(settings, compute=compute))
        layers = [m for m in model.modules() if isinstance(m, nb.Int4Linear)]
        assert layers
        assert {m.compute for m in layers} == {compute}
    assert result["weights"] == tiny_llama(2).num_parameters()
    # A run that is done is not done again.
    before = (tmp_path / "out" / "adapter" / worker.RESULT).stat().st_mtime_ns
    assert cli.main([*arguments(place, *extra), "--resume"]) == 0
    assert (tmp_path / "out" / "adapter" / worker.RESULT).stat().st_mtime_ns == before
    with pytest.raises(ValueError, match=r"the run's own --seed \(0\), got 4"):
        cli.main([*arguments(place, *extra), "--resume", "--seed", "4"])


@pytest.mark.parametrize(
    "extra, message",
    [
        (["--baselines", "full,qlora"], "--baselines must be of .*, got 'qlora'"),
        (["--baselines", "full,full"], "--baselines must differ"),
        (["--cache", "much"], "--cache must be a size"),
        (["--density", "2"], "--density must be in"),
        (["--method", "full", "--optimizer", "muon"], "--optimizer muon must go with --method"),
        (["--out", "{full}"], "--out must be an empty or new folder"),
    ],
)
def test_the_command_refuses(place, tmp_path, extra, message):
    full = tmp_path / "used"
    full.mkdir()
    (full / "something").write_text("")
    with pytest.raises(ValueError, match=message):
        cli.main(arguments(place, *(e.format(full=full) for e in extra)))


def test_a_missing_model_is_one_line(place, tmp_path, here, capsys):
    out = str(tmp_path / "out")
    assert cli.main(["--model", str(tmp_path / "none"), "--out", out]) == 2
    error = capsys.readouterr().err
    assert error.startswith("finetune: --model must be a file or folder that exists")
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()  # the corrected command may use it
    (tmp_path / "kept").mkdir()
    assert cli.main(["--model", str(tmp_path / "none"), "--out", str(tmp_path / "kept")]) == 2
    assert list((tmp_path / "kept").iterdir()) == []


def test_full_that_starts_at_its_best_gives_no_ratio():
    """A target that full fine-tuning meets before its first step took it no time at all."""
    results = [
        {
            "settings": {"method": method, "int4": False},
            "evaluations": [{"loss": loss, "seconds": 0.0}],
            "best": {"loss": loss},
            "seconds": {"select": 0.0 if method == "full" else 1.0},
            "peak_bytes": 1,
            "state_bytes": 1,
        }
        for method, loss in (("masked", 2.0), ("full", 2.0))
    ]
    assert "none: full starts there" in report._ratios(results)[0]


def test_two_runs_in_one_folder_are_refused(place, tmp_path, capsys):
    settings = Settings(model=str(place / "model"), method="full")
    (tmp_path / worker.SETTINGS).write_text(json.dumps(settings.to_json()))
    with worker.alone(tmp_path):
        assert worker.main([str(tmp_path), "--quiet"]) == 2
    assert "--out must not be in use" in capsys.readouterr().err
