"""Cells of the fine-tuning bench that take turns, and what their table says."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

pytest.importorskip("transformers", reason="the transformers package is not installed")

from nibblock.bench import finetune_beds as beds
from nibblock.bench import finetune_suite as suite
from nibblock.bench import finetune_together as together
from nibblock.bench.finetune_cells import INT4_MUON, RANDOM_MUON, Cell, Cells
from test_finetune_bench import fill, result

BED = beds.BEDS["smollm2"]

# A child that is a cell in all but its training: it says in a file what it does and when.
CHILD = """
import sys
from pathlib import Path
from nibblock._finetune import loop
from nibblock.bench.finetune_cells import _in_turn

name, steps, folder, log, go, done = sys.argv[1:]
log = open(log, "a", buffering=1)
loop.one_step = lambda: log.write(f"{name} steps\\n")
with _in_turn(int(go), int(done)):
    for _ in range(int(steps)):
        log.write(f"{name} evaluates\\n")
        loop.one_step()
    if name == "b":
        raise ValueError("no memory")
    log.write(f"{name} saves\\n")
Path(folder, "result.json").write_text('{"loss": 1}')
"""


def test_a_step_of_each_in_turn(tmp_path, monkeypatch):
    """And one that fails, or is done before the others, holds nobody up."""
    log = tmp_path / "log"

    def start(cell, threads, folder, turns):
        arguments = [cell.variant, str(cell.seed), str(folder), str(log), *map(str, turns)]
        with open(folder / "errors", "wb") as errors:
            command = [sys.executable, "-c", CHILD, *arguments]
            return subprocess.Popen(command, stderr=errors, pass_fds=turns)

    monkeypatch.setattr(together, "start", start)
    cells = [Cell("smollm2", "a", 1.0, 2), Cell("smollm2", "b", 1.0, 1), Cell("smollm2", "c", 1, 3)]
    rows = together.run_together(cells)
    keys = [cell.key for cell in cells]
    assert [row["together"] for row in rows] == [keys] * 3
    assert [row["result"] for row in rows] == [
        {"loss": 1},
        {"error": "ValueError: no memory"},
        {"loss": 1},
    ]
    turn = "{0} evaluates\n{0} steps\n".format
    last = turn("a") + turn("c") + "a saves\n" + turn("c") + "c saves\n"
    assert log.read_text() == turn("a") + turn("b") + turn("c") + last


def rows_of(cells, keys, **more):
    for key, seconds in zip(keys, (100.0, 40.0)):
        bed, variant, lr, seed = key.split("/")
        cell = {"bed": bed, "variant": variant, "lr": float(lr), "seed": int(seed)}
        curve = [4.0, 2.5, 1.905, 1.9] if variant == "full" else [4.0, 3.0, 1.91, 1.8]
        cells.add({"cell": cell, "result": result(bed, float(lr), curve, seconds), **more})


def test_what_is_due_and_what_the_table_says(tmp_path):
    like = fill(tmp_path / "like.jsonl")
    variants = ("full", "random blocks")
    cells = Cells(tmp_path / "cells.jsonl")
    due = together.due_together(cells, like, BED, variants, (0, 1))
    keys = [[cell.key for cell in those] for those in due]
    assert keys == [[f"smollm2/{v}/{like.best_rate('smollm2', v):g}/{s}" for v in variants]
                    for s in (0, 1)]  # fmt: skip
    rows_of(cells, keys[0])  # run, but each by itself
    assert together.due_together(cells, like, BED, variants, (0, 1)) == due
    assert together.pair_rows(cells, BED, variants) == []
    rows_of(cells, keys[0], together=keys[0])
    assert together.due_together(cells, like, BED, variants, (0, 1)) == due[1:]
    (row,) = together.pair_rows(Cells(tmp_path / "cells.jsonl"), BED, variants)
    # full is at 1.9 x 1.01 after 201 s with its second of selection, ours after 81 of full's 301
    assert (row["seed"], row["best"], row["of_first"]) == (0, 1.8, 1.9)
    assert row["time"] == pytest.approx(81 / 201)
    assert row["whole"] == pytest.approx(81 / 301)
    assert row["step"] == pytest.approx(0.4)
    assert "random blocks" in together.show(cells, BED, variants)
    with pytest.raises(ValueError, match="must hold the whole sweep of 'random blocks, 8 %, Muon"):
        together.due_together(cells, like, BED, ("full", RANDOM_MUON), (0,))


def test_the_command(tmp_path, monkeypatch, capsys):
    fill(tmp_path / "like.jsonl")
    own = tmp_path / "own.jsonl"

    def run_together(those, threads):
        keys = [cell.key for cell in those]
        fresh = Cells(tmp_path / "fresh.jsonl")
        rows_of(fresh, keys, together=keys)
        return [fresh.done[key] for key in keys]

    monkeypatch.setattr(suite, "run_together", run_together)
    command = ["--together", str(tmp_path / "like.jsonl"), "--cells", str(own), "--seeds", "1", "2"]
    with pytest.raises(SystemExit, match="one of --beds and two --variants at least, got 2 and 0"):
        suite.main(command)
    command += ["--beds", "smollm2", "--variants", "full", "random blocks"]
    assert suite.main(command) == 0
    assert "time to target" in capsys.readouterr().out
    assert len(own.read_text().splitlines()) == 4
    row = json.loads(own.read_text().splitlines()[0])
    assert row["environment"].keys() == {"cpu", "isa", "torch", "date"}
    assert suite.main(command) == 0  # nothing is due
    assert len(own.read_text().splitlines()) == 4
    assert INT4_MUON not in own.read_text()
