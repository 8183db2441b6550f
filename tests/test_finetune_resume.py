"""Checkpoints: whole or not there, and a resumed run is the run that was not stopped."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from finetune_samples import folder_of, text_file
from nibblock._finetune import checkpoint, worker
from nibblock._finetune.checkpoint import Checkpoint
from nibblock._finetune.settings import Settings

pytest.importorskip("transformers", reason="the transformers package is not installed")


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    path = tmp_path_factory.mktemp("run")
    return Settings(
        model=str(folder_of(path / "model", layers=2)),
        data=str(text_file(path / "text.txt")),
        method="masked",
        select="even",
        density=0.1,
        seq=16,
        tokens=64,
        steps=12,
        evaluate=4,
        checkpoint=3,
        valid_rows=8,
        warmup=2,
        schedule="cosine",
        threads=1,
    )


FIRST, EVENTS = (
    13,
    15,
)  # 10 events of the checkpoint at step 3 and 3 of the best weights at 4 are earlier


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_killed_while_a_checkpoint_is_written(settings, tmp_path):
    """The run dies at each file-system event of the checkpoint at step 6."""
    file = tmp_path / "settings.json"
    file.write_text(json.dumps(settings.to_json()))
    out = tmp_path / "out"
    script = Path(__file__).parent / "finetune_kill.py"
    command = [sys.executable, str(script), str(file), str(out), str(FIRST), str(FIRST + EVENTS)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    whole = json.loads((out / "whole" / worker.RESULT).read_text())
    assert len(whole["losses"]) == 12
    assert whole["losses"][0] != whole["losses"][-1]
    seen = set()
    for event in range(FIRST, FIRST + EVENTS):
        folder = out / f"killed-{event}"
        ours = json.loads((folder / worker.RESULT).read_text())
        assert ours["losses"] == whole["losses"], event
        for a, b in zip(ours["evaluations"], whole["evaluations"]):
            assert (a["step"], a["loss"]) == (b["step"], b["loss"]), event
        name = "trained.safetensors"
        assert (folder / name).read_bytes() == (out / "whole" / name).read_bytes(), event
        assert [p.name for p in (folder / "checkpoints").iterdir()] == ["step-00000012"]
        seen.add(ours["events"] < whole["events"])  # it did not begin anew
    assert seen == {True}


class Stopped(Exception):
    pass


@pytest.mark.parametrize(
    "method, optimizer",
    [
        *((method, "adamw") for method in ("full", "lora", "shira", "adapter", "masked")),
        ("masked", "muon"),
    ],
)
def test_resume_of_every_method(settings, tmp_path, method, optimizer):
    if method in ("lora", "shira"):
        pytest.importorskip("peft", reason="the peft package is not installed")
    run = dataclasses.replace(settings, method=method, optimizer=optimizer)
    folders = [tmp_path / name for name in ("whole", "parts")]
    for folder in folders:
        folder.mkdir()
    whole = worker.run(run, folders[0], False, progress=False)

    def stop(done, total):
        if done == 8:
            raise Stopped

    with pytest.raises(Stopped):
        worker.run(run, folders[1], False, progress=stop)
    parts = worker.run(run, folders[1], True, progress=False)
    assert parts["losses"] == whole["losses"]
    assert [e["loss"] for e in parts["evaluations"]] == [e["loss"] for e in whole["evaluations"]]
    assert parts["state_bytes"] == whole["state_bytes"]
    name = "model" if method == "full" else "trained"
    files = [(folder / f"{name}.safetensors").read_bytes() for folder in folders]
    assert files[0] == files[1]


def test_resume_refuses_other_settings(settings, tmp_path):
    worker.run(dataclasses.replace(settings, steps=3), tmp_path, False, progress=False)
    with pytest.raises(ValueError, match=r"--steps \(3\), got 12"):
        worker.run(settings, tmp_path, True, progress=False)


def sample(value: float) -> Checkpoint:
    parameter = torch.nn.Parameter(torch.full((3, 4), value))
    optimizer = torch.optim.AdamW([parameter], lr=0.1, fused=True)
    parameter.grad = torch.ones(3, 4)
    optimizer.step()
    return Checkpoint(
        trained={"layer.values": parameter},
        blocks={"layer": torch.tensor([[0, 1]], dtype=torch.int32)},
        random=torch.get_rng_state(),
        optimizer=optimizer.state_dict(),
        facts={"record": {"losses": [value, 1 / 3]}},
    )


def test_checkpoint_holds_everything(tmp_path):
    first = sample(0.1)
    place = checkpoint.save(tmp_path, 7, first)
    assert sorted(p.name for p in place.iterdir()) == [
        "manifest.json",
        "model.safetensors",
        "optimizer.safetensors",
    ]
    found = checkpoint.load_latest(tmp_path)
    assert torch.equal(found.trained["layer.values"], first.trained["layer.values"])
    assert found.blocks["layer"].tolist() == [[0, 1]]
    assert torch.equal(found.random, first.random)
    assert found.facts == first.facts
    assert found.optimizer["param_groups"] == first.optimizer["param_groups"]
    for key, value in first.optimizer["state"][0].items():
        assert torch.equal(found.optimizer["state"][0][key], value)
    checkpoint.save(tmp_path, 9, sample(2.0))
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000009"]


@pytest.mark.parametrize("name", ["manifest.json", "model.safetensors", "optimizer.safetensors"])
@pytest.mark.parametrize("damage", ["gone", "short", "flipped"])
def test_a_damaged_checkpoint_is_passed_over(tmp_path, name, damage):
    checkpoint.save(tmp_path, 1, sample(1.0), keep=2)
    place = checkpoint.save(tmp_path, 2, sample(2.0), keep=2)
    data = (place / name).read_bytes()
    if damage == "gone":
        (place / name).unlink()
    elif damage == "short":
        (place / name).write_bytes(data[: len(data) // 2])
    else:
        middle = data.index(b"sha256") if name == "manifest.json" else len(data) - 1
        flipped = bytes([data[middle] ^ 1])
        (place / name).write_bytes(data[:middle] + flipped + data[middle + 1 :])
    found = checkpoint.load_latest(tmp_path)
    assert found.facts["record"]["losses"][0] == 1.0


def test_no_checkpoint(tmp_path):
    assert checkpoint.load_latest(tmp_path / "nothing") is None
    assert checkpoint.load_latest(tmp_path) is None
