"""The fine-tuning bench: cells that resume, its tables, and its beds."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from finetune_samples import tiny_bert
from nibblock._finetune.settings import Settings
from nibblock.bench import cli
from nibblock.bench import finetune_beds as beds
from nibblock.bench import finetune_cells as cells_of
from nibblock.bench import finetune_report as report
from nibblock.bench import finetune_suite as suite
from nibblock.bench.cli import BENCHMARKS
from nibblock.bench.finetune_cells import (
    INT4_MUON,
    OURS_FEW,
    OURS_MANY,
    OURS_MUON,
    OURS_THIRD,
    RANDOM_MUON,
    VARIANTS,
    Cell,
    Cells,
    due,
)

pytest.importorskip("transformers", reason="the transformers package is not installed")


def result(bed: str, lr: float, losses: list[float], seconds: float, **more) -> dict:
    """As a run on a bed leaves it: an evaluation every `seconds`."""
    evaluations = [
        {"step": 8 * i, "seconds": i * seconds, "loss": loss, "accuracy": 1 / (1 + loss)}
        for i, loss in enumerate(losses)
    ]
    best = min(evaluations, key=lambda e: e["loss"])
    train = evaluations[-1]["seconds"]
    return {
        "settings": {"lr": lr},
        "weights": 1000,
        "trained": 20,
        "before": evaluations[0],
        "best": best,
        "steps": evaluations[-1]["step"],
        "evaluations": evaluations,
        "seconds": {"select": 1.0, "train": train, "total": train + 1.0},
        "peak_bytes": 400,
        "state_bytes": 100,
        "file_bytes": 80,
        **more,
    }


def fill(path, bed: str = "smollm2") -> Cells:
    """Sweeps of five variants, and the other seeds of all but random blocks."""
    found = Cells(path)
    curves = {
        "full": ([4.0, 3.0, 2.0, 1.9], 100.0),
        OURS_MANY: ([4.0, 2.5, 1.91, 1.8], 30.0),
        OURS_FEW: ([4.0, 2.5, 2.3, 2.2], 20.0),
        OURS_THIRD: ([4.0, 2.6, 2.4, 2.3], 15.0),
        "random blocks": ([4.0, 3.5, 3.0, 2.9], 30.0),
    }
    for variant, (losses, seconds) in curves.items():
        rates = cells_of.rates(bed, variant)
        for at, lr in enumerate(rates):
            worse = [value + 0.1 * (at != 1) for value in losses]
            row = {
                "cell": {"bed": bed, "variant": variant, "lr": lr, "seed": 0},
                "result": result(bed, lr, worse, seconds),
            }
            found.add(row)
        for seed in beds.BEDS[bed].seeds[1:] if variant != "random blocks" else ():
            row = {
                "cell": {"bed": bed, "variant": variant, "lr": rates[1], "seed": seed},
                "result": result(bed, rates[1], losses, seconds),
            }
            found.add(row)
    return found


def test_cells_are_kept_and_never_run_again(tmp_path, monkeypatch):
    path = tmp_path / "cells.jsonl"
    ran = []

    def run(cell, threads):
        ran.append(cell.key)
        if len(ran) == 5:
            raise KeyboardInterrupt
        body = {"error": "broken"} if len(ran) == 2 else result(cell.bed, cell.lr, [2, 1], 1)
        return {"cell": vars(cell), "result": body}

    monkeypatch.setattr(suite, "run", run)
    monkeypatch.setattr(
        suite, "environment", lambda: dict.fromkeys(("cpu", "isa", "torch", "date"))
    )
    arguments = ["--beds", "smollm2", "--variants", "full", "ours", "--cells", str(path)]
    with pytest.raises(KeyboardInterrupt):
        suite.main(arguments)
    assert len(path.read_text().splitlines()) == 4
    assert suite.main(arguments) == 0
    assert len(set(ran)) == len(ran) - 1  # the interrupted one twice
    rates = len(beds.BEDS["smollm2"].rates[0])
    assert len(Cells(path).done) == 2 * rates + 2 * 2 + 4
    swept = [Cell(**json.loads(line)["cell"]) for line in path.read_text().splitlines()]
    # Sweeps first; full runs its two best rates and stops at three seeds.
    seeds = [0] * 2 * rates + [1] * 3 + [2] * 3 + [3, 4]
    assert [c.seed for c in swept] == seeds
    count = len(ran)
    assert suite.main(arguments) == 0
    assert len(ran) == count
    assert suite.main([*arguments, "--retry"]) == 0
    assert len(ran) == count + 3  # the one that had failed, and its rate's other seeds


def _all_due(found: Cells, names: list[str], variants: list[str]) -> list[Cell]:
    return list(cells_of._missing(found, names, variants))


def test_minutes_stop_the_run(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(suite, "run", lambda *a: pytest.fail("a cell was started"))
    monkeypatch.setattr(suite.time, "monotonic", iter(range(0, 10_000, 120)).__next__)
    path = str(tmp_path / "cells.jsonl")
    assert suite.main(["--beds", "smollm2", "--minutes", "1", "--cells", path]) == 0
    assert "the same command goes on" in capsys.readouterr().out


def test_best_rate_waits_for_the_whole_sweep(tmp_path):
    found = fill(tmp_path / "cells.jsonl")
    assert found.best_rate("smollm2", OURS_MANY) == cells_of.rates("smollm2", OURS_MANY)[1]
    same = "ours, top third"  # without the cache: nothing to sweep
    assert found.best_rate("smollm2", same) == found.best_rate("smollm2", OURS_THIRD)
    assert [c.seed for c in _all_due(found, ["smollm2"], [same])] == [0, 1, 2]
    assert found.best_rate("smollm2", "lora") is None
    again = Cells(tmp_path / "cells.jsonl")
    assert again.done == found.done
    missing = next(due(again, ["smollm2"], [OURS_FEW, "random blocks"]))
    assert (missing.variant, missing.seed) == ("random blocks", 1)
    more = list(cells_of._missing(again, ["smollm2"], ["random blocks"], [(0.7, 0), (0.7, 8)]))
    assert [(c.lr, c.seed) for c in more if c.lr == 0.7] == [(0.7, 0), (0.7, 8)]
    (tmp_path / "cells.jsonl").open("a").write('{"cell": ')
    with pytest.raises(ValueError, match="must be JSON"):
        Cells(tmp_path / "cells.jsonl")


def test_the_lower_mean_of_two_rates_wins(tmp_path):
    """The first seed's second best may be everybody's best; it counts once all seeds have run."""
    found = fill(tmp_path / "cells.jsonl")
    first, second, *_ = found.finalists("smollm2", OURS_MANY)
    assert found.best_rate("smollm2", OURS_MANY) == first
    wanted = [(c.lr, c.seed) for c in _all_due(found, ["smollm2"], [OURS_MANY])]
    assert wanted == [(second, 1), (second, 2)]
    for lr, seed in wanted:
        assert found.best_rate("smollm2", OURS_MANY) == first
        cell = {"bed": "smollm2", "variant": OURS_MANY, "lr": lr, "seed": seed}
        found.add({"cell": cell, "result": result("smollm2", lr, [4.0, 1.5], 30.0)})
    assert found.best_rate("smollm2", OURS_MANY) == second
    assert len(found.finalists("smollm2", OURS_FEW)) == 1


def test_every_variant_is_swept_equally():
    for bed in beds.BEDS.values():
        assert len({len(rates) for rates in bed.rates}) == 1
    for variant in VARIANTS.values():
        for bed in beds.BEDS.values():
            variant.settings(bed, 1e-3, 0).checked()


def test_muon_has_rates_and_a_rival_of_its_own(tmp_path):
    by_muon = [name for name, variant in VARIANTS.items() if variant.optimizer == "muon"]
    assert by_muon == [OURS_MUON, "ours, Muon", RANDOM_MUON, INT4_MUON]
    for bed in beds.BEDS.values():
        full, others, muon = bed.rates
        for name, variant in VARIANTS.items():
            optimizer = "muon" if name in by_muon else "adamw"
            assert variant.settings(bed, 1e-3, 0).optimizer == optimizer
            usual = full if variant.method.startswith("full") else others
            assert cells_of.rates(bed.name, name) == (muon if name in by_muon else usual)
    settings = VARIANTS[INT4_MUON].settings(beds.BEDS["smollm2"], 1e-2, 0)
    assert (settings.int4, settings.compute, settings.method) == (True, "int8", "adapter")
    cells = Cells(tmp_path / "cells.jsonl")
    for name, loss in ((OURS_MUON, 2.0), (RANDOM_MUON, 2.1), (OURS_MANY, 2.2)):
        for lr in cells_of.rates("smollm2", name):
            cell = {"bed": "smollm2", "variant": name, "lr": lr, "seed": 0}
            cells.add({"cell": cell, "result": result("smollm2", lr, [4.0, loss], 30.0)})
    won = report.wins(cells, beds.BEDS["smollm2"], RANDOM_MUON)
    assert won == [(1.0, "smollm2, 1 of 1 seeds")]


def test_rows_and_goals(tmp_path):
    cells = fill(tmp_path / "cells.jsonl")
    bed = beds.BEDS["smollm2"]
    rows = {r["variant"]: r for r in report.bed_rows(cells, bed)}
    # full reaches 1.01 x 1.9 at its last evaluation, 301 s; ours at 1 + 60 s.
    assert rows["full"]["time"] == 1.0
    assert rows[OURS_MANY]["time"] == pytest.approx(61 / 301)
    assert rows[OURS_MANY]["seeds"] == 5
    assert rows[OURS_FEW]["time"] is None
    assert rows[OURS_FEW]["reached"] == 0
    assert rows[OURS_MANY]["step"] == pytest.approx(0.3)
    text = report.show(cells)
    assert "reached 0/5" in text
    assert "0.20x" in text
    even = {r["lr"]: r for r in report.equal_rates(cells, bed, "random blocks")}
    assert list(even) == list(cells_of.rates("smollm2", OURS_FEW))
    assert all(r["won"] == r["seeds"] == 1 for r in even.values())
    assert report.equal_rates(cells, bed, "magnitude blocks") == []
    assert "Ours better than random blocks, at equal rates" in text
    goals = {r["row"]: r for r in report.goal_rows(cells, None)}
    assert goals["our blocks better than random blocks, smollm2"]["measured"] == 1.0
    timed = "time to full's quality, "
    assert goals[timed + "8 % by impact, all layers"]["measured"] == pytest.approx(61 / 301)
    assert goals[timed + "2 % even, cache"]["verdict"] == "not measured"
    assert goals["training state vs full, 2 %"]["measured"] == 1.0
    assert goals["training state vs full, 2 %"]["verdict"] == "missed"
    assert goals["planted blocks found"]["verdict"] == "not measured"
    assert json.loads(json.dumps(report.figures(cells)))["cells"] == len(cells.done)
    for row in cells.of("smollm2", OURS_MANY):  # one seed of five falls short
        if row["cell"]["seed"] == 2:
            row["result"]["evaluations"] = row["result"]["evaluations"][:2]
    goals = {r["row"]: r for r in report.goal_rows(cells, None)}
    short = goals[timed + "8 % by impact, all layers"]
    assert short["verdict"] == "missed"
    assert "4 of 5 seeds" in short["detail"]
    report.chart(cells, tmp_path / "chart.png")
    assert (tmp_path / "chart.png").stat().st_size > 1000


def test_accuracy_is_the_figure_of_the_encoder(tmp_path):
    cells = fill(tmp_path / "cells.jsonl", "minilm")
    bed = beds.BEDS["minilm"]
    full = next(iter(report._by_seed(cells, bed, "full").values()))
    assert report.best_value(bed, full) == max(e["accuracy"] for e in full["evaluations"])
    assert report.target_of(bed, full) == 0.99 * report.best_value(bed, full)
    assert report.wins(cells, bed, "random blocks") == [(1.0, "minilm, 1 of 1 seeds")]


def test_a_failing_child_is_a_cell_with_a_reason(monkeypatch):
    def broken(command, **more):
        return own([sys.executable, "-c", "raise ValueError('no such bed')"], **more)

    own = subprocess.Popen
    monkeypatch.setattr(cells_of.subprocess, "Popen", broken)
    row = cells_of.run(Cell("smollm2", "ours", 1e-3, 0))
    assert row["result"] == {"error": "ValueError: no such bed"}


# --- beds -----------------------------------------------------------------------------------------


def test_labels_do_not_leak(monkeypatch):
    texts = {
        f"part{i:02d}": [f"text {i} {j} " + "word " * 20 for j in range(20 + i)] for i in range(30)
    }
    texts["part29"].append(texts["part28"][0])  # under two names: left out of both
    monkeypatch.setattr(beds, "docstrings", lambda: texts)
    train, held, names = beds.labelled(seed=0)
    assert len(names) == beds.CLASSES
    assert "part00" not in names
    assert not {t for t, _ in train} & {t for t, _ in held}
    assert texts["part28"][0] not in {t for t, _ in train + held}
    assert {label for _, label in held} == set(range(beds.CLASSES))
    assert beds.labelled(seed=1)[1] != held


def test_classifier_task_learns():
    class Bert(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = tiny_bert(2).bert
            self.config = self.inner.config

        def forward(self, **inputs):
            return self.inner(**inputs)

    from nibblock._finetune.loop import train
    from nibblock._finetune.methods import prepare

    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(32) % 4
    ids = torch.randint(0, 90, (32, 8), generator=generator)
    ids[:, 0] = 90 + labels
    data = {"ids": ids, "mask": torch.ones_like(ids), "labels": labels}
    task = beds.ClassifierTask(data, data, 8, 0)
    model = beds.Classifier(Bert(), 4).eval()
    run = Settings(model="m", method="adapter", select="even", density=0.2, steps=24, lr=1e-2)
    prepared = prepare(model, task, run, keep=("classifier",))
    assert "classifier.weight" in prepared.trained()
    record = train(task, prepared, run)
    assert max(e["accuracy"] for e in record.evaluations) > 0.8


@pytest.mark.parametrize("name", ["impact, exact", "impact, sketch"])
def test_impact_finds_planted_blocks_and_chance_does_not(name):
    assert beds.planted_recall(cells_of.PLANTED[name], seed=0) >= 0.95
    assert beds.planted_recall(cells_of.PLANTED["random blocks"], seed=0) < 0.5


@pytest.mark.parametrize("name", BENCHMARKS)
def test_every_benchmark_prints_its_help(name, capsys):
    """argparse formats help: a "%" in the name of a variant is not a place for an argument."""
    with pytest.raises(SystemExit) as stopped:
        cli.main([name, "--help"])
    assert stopped.value.code == 0
    assert f"nibblock bench {name}" in capsys.readouterr().out
