"""The GPU benchmark's report, goals, chart and peers on a machine without a GPU.

The run here is made up, with numbers that decide each verdict; no file of it is kept.
"""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

import pytest
import torch
from nibblock.bench import gpu_goals, gpu_peers, gpu_plot, gpu_suite, gpu_timing, readme

ROOT = Path(__file__).resolve().parent.parent


def times(**seconds):
    return {
        name.replace("_", " "): {"graph": s, "graph_min": s, "do_bench": 2 * s}
        for name, s in seconds.items()
    }


def made_up():
    """Ours takes 1/speed of cuBLAS's second, speed by the number of rows."""
    speeds = {
        1: 3.0,
        16: 2.0,
        64: 1.5,
        128: 0.8,
        256: 0.7,
        512: 0.95,
        1024: 0.85,
        2048: 0.9,
        4096: 0.97,
    }
    int4, dx = [], []
    for model, shapes in gpu_suite.LAYERS.items():
        for n, k in shapes:
            facts = dict(model=model, shape=f"{n}x{k}", error=1e-3, bytes=n * k // 2)
            for m in gpu_suite.ROWS:
                found = times(nibblock=1 / speeds[m], humming=0.9 / speeds[m])
                found["cuBLAS bf16"] = times(x=1.0)["x"]
                int4.append(dict(facts, m=m, times=found))
            for m in gpu_suite.DX_ROWS:
                found = times(nibblock=2.0)
                found["cuBLAS bf16"] = times(x=1.0)["x"]
                dx.append(dict(facts, m=m, times=found))

    def case(ours, dense, **facts):
        found = times(nibblock=ours)
        found["cuBLAS bf16"] = times(x=dense)["x"]
        return dict(facts, times=found, error=1e-3)

    blocks = [case(1.0, 2.2, block=32, density=0.1, m=1, per_flop=0.2)]
    blocks += [case(1, 1, block=b, density=0.25, m=4096, per_flop=0.65) for b in (32, 64, 128)]
    wgrad = [case(1.0, 6.0, block=64, density=0.02, m=4096)]
    adapter = [dict(block=64, density=0.02, m=4096, times=times(base=1.0, blocks=1.1, both=1.2))]
    adamw = [dict(parameters=20e6, of_parameters=2e9, dense_parameters=1e9, bytes_per_s=3.4e12,
                  times=times(nibblock=1.0, torch_fused=15.0))]  # fmt: skip
    return {
        "benchmark": "gpu", "date": "2026-11-22", "gpu": "NVIDIA Made-Up", "capability": (9, 0),
        "versions": {"torch": "2.11.0", "triton": "3.6.0", "gemlite": None},
        "ceilings": {"copy_bytes_per_s": 4e12, "matmul_flops": 7e14},
        "left_out": {"gemlite": "6144x4096: ImportError: gemlite is not installed"},
        "seconds": {}, "tuned": False, "cuda_kernels": "no CUDA device",
        "parts": {"int4": int4, "dx": dx, "blocks": blocks, "wgrad": wgrad, "adapter": adapter,
                  "adamw": adamw},
    }  # fmt: skip


@pytest.fixture
def run():
    facts = made_up()
    facts["goals"] = gpu_goals.goals(facts)
    return facts


def test_every_goal_has_its_verdict(run):
    rows = {row["row"]: row for row in run["goals"]}
    assert len(rows) == len(run["goals"]) == 22
    assert {name: row["verdict"] for name, row in rows.items()} == {
        "int4 forward, M = 1, 8B layers": "goal met",
        "int4 forward, M = 1, 70B layers": "floor met",
        "int4 forward, M = 16, 8B layers": "floor met",
        "int4 forward, M = 16, 70B layers": "missed",
        "int4 forward, M = 64, 70B layers": "floor met",
        "int4 forward, M = 128, 70B layers": "missed",
        "int4 forward, M = 256-1023": "floor met",
        "int4 forward, M = 1024": "floor met",
        "int4 forward, M >= 2048": "floor met",
        "int4 forward over Humming": "floor met",
        "int4 dx, M = 512": "missed",
        "int4 dx, M = 1024": "missed",
        "int4 dx, M >= 2048": "missed",
        "block-sparse per FLOP, block 128": "missed",
        "block-sparse per FLOP, block 64": "floor met",
        "block-sparse per FLOP, block 32": "goal met",
        "block-sparse decode, 10 % dense": "floor met",
        "block_weight_grad, d <= 5 %, over dense dW": "floor met",
        "block_weight_grad, 25 %, over dense dW": "not measured",
        "adapter (2 %) on the base, M = 4096: more time": "floor met",
        "packed AdamW, share of copy bandwidth": "floor met",
        "packed AdamW, 1 %, over fused dense": "floor met",
    }
    assert rows["packed AdamW, 1 %, over fused dense"]["measured"] == 30
    assert rows["int4 forward over Humming"]["measured"] == pytest.approx(0.9)
    text = gpu_suite.report(run)
    assert "missed" in text
    assert "gemlite left out from 6144x4096: ImportError: gemlite is not installed" in text


def test_a_geometric_mean_is_over_a_models_layers():
    rows = [
        dict(model="8b", m=1, times={**times(nibblock=1.0), "cuBLAS bf16": {"graph": s}})
        for s in (2.0, 8.0)
    ]
    assert gpu_goals.by_model(rows, lambda m: True, ("8b",)) == [(pytest.approx(4.0), "8b M=1")]


def test_a_run_of_one_part_names_what_it_lacks():
    facts = made_up()
    facts["parts"] = {"adamw": facts["parts"]["adamw"]}
    rows = gpu_goals.goals(facts)
    measured = [row["row"] for row in rows if row["measured"] is not None]
    assert measured == [
        "packed AdamW, share of copy bandwidth", "packed AdamW, 1 %, over fused dense",
    ]  # fmt: skip
    assert "must hold the part int4" in gpu_suite.draw(facts, Path("none.png"))


def test_tables_files_and_chart(run, tmp_path):
    for part, rows in run["parts"].items():
        text = gpu_suite.show(part, rows)
        assert text.startswith(part)
        assert len(text.splitlines()) == len(rows) + 3
    path = gpu_suite.save(run, tmp_path / "new", None)
    assert path.name == "gpu-nvidia-made-up.json"
    assert gpu_suite.save(run, tmp_path, ["int4", "dx"]).name == "gpu-nvidia-made-up-int4-dx.json"
    assert json.loads(path.read_text())["goals"] == run["goals"]
    assert dict(gpu_plot.shares(run))["packed AdamW"] == pytest.approx(0.85)
    if gpu_suite.draw(run, tmp_path / "run.png").startswith("wrote"):
        assert (tmp_path / "run.png").read_bytes()[:4] == b"\x89PNG"
    else:
        pytest.skip("matplotlib is not installed")


def test_the_readme_says_row_by_row_what_never_ran(run):
    from nibblock.triton_kernels import _table

    without = readme.gpu_figures({})
    assert without.startswith("No run on a GPU is committed")
    for op in _table.TABLE:
        (line,) = re.findall(rf"^\| `{op}` \| Triton .*$", without, re.M)
        assert line.endswith("| not yet run on hardware |")
    found = {"gpu-made-up": json.loads(json.dumps(run))}
    text = readme.gpu_figures(found)
    assert "[gpu-made-up.json](bench/results/gpu-made-up.json): NVIDIA Made-Up" in text
    assert "| int4 forward, M = 1, 8B layers | 3.00x | 2.00x | goal met |" in text
    assert "## gpu" in readme.overview(found)
    assert not list((ROOT / "bench/results").glob("gpu-*made-up*"))


# --- peers ----------------------------------------------------------------------------------------


def test_a_peer_that_fails_leaves_by_name_and_the_run_goes_on(capsys):
    peers = gpu_peers.Peers()

    def fails():
        raise RuntimeError("no kernel\nand more")

    assert peers.attempt("a", "4096x4096", fails) is None
    assert peers.attempt("a", "8192x8192", lambda: 1) is None  # it stays out
    assert peers.attempt("b", "4096x4096", lambda: 2) == 2
    assert peers.left_out == {"a": "4096x4096: RuntimeError: no kernel"}
    assert "a left out from 4096x4096: RuntimeError: no kernel" in capsys.readouterr().out


def test_a_slow_peer_leaves_when_its_time_is_spent():
    ticks = iter([0.0, 20.0, 20.0, 45.0])
    peers = gpu_peers.Peers(30.0, lambda: next(ticks))
    assert peers.attempt("slow", "one", lambda: 1) == 1
    assert peers.attempt("slow", "two", lambda: 2) == 2  # measured, and the last
    assert peers.attempt("slow", "three", lambda: 3) is None
    assert peers.left_out == {"slow": "two: took 45 s until here"}


def test_a_peer_that_computes_something_else_is_left_out(monkeypatch):
    monkeypatch.setattr(gpu_peers, "measure", lambda calls: dict.fromkeys(calls, {"graph": 1.0}))
    want = torch.tensor([1.0, 2.0])
    peers = gpu_peers.Peers()
    assert peers.times("good", "here", {"good": (lambda i: want * 1.01, 1)}, want)
    assert peers.times("free", "here", {"free": (lambda i: want * 9, 1)})  # codes of its own
    for other in (want * 2, want * float("nan")):
        peers = gpu_peers.Peers()
        assert peers.times("bad", "here", {"bad": (lambda i, y=other: y, 1)}, want) == {}
        assert "of the largest value" in peers.left_out["bad"]


def test_peers_that_are_not_here_say_so(monkeypatch):
    class Layer:
        n = k = 256

    monkeypatch.setattr(gpu_peers.importlib.util, "find_spec", lambda name: None)
    monkeypatch.delitem(gpu_peers.INT4, "torch int4")  # needs no package, only a GPU
    peers = gpu_peers.Peers()
    bound = gpu_peers.Int4Peers(peers, Layer())
    assert not bound.made
    assert bound.measure(torch.zeros(1, 256), torch.zeros(1, 256)) == {}
    assert peers.left_out == {
        name: f"256x256: ImportError: {package} is not installed"
        for name, package in (
            ("humming", "humming"), ("gemlite", "gemlite"), ("bitsandbytes NF4", "bitsandbytes"),
        )
    }  # fmt: skip


def test_clocks():
    assert [gpu_timing.replays_for(s) for s in (0.0, 1e-5, 1e-3, 5e-3, 0.1)] == [20, 20, 20, 4, 1]
    with pytest.raises(AssertionError, match="bench gpu: it is off by"):
        gpu_timing.checked("it", torch.ones(2), torch.tensor([1.0, 2.0]))
    assert gpu_timing.checked("it", torch.ones(2), torch.ones(2)) == 0


def test_the_command_needs_a_gpu(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu_suite.main([]) == 2
    assert "needs an NVIDIA GPU" in capsys.readouterr().err


def test_gpu_check_names_commands_that_are_there():
    done = subprocess.run(
        ["make", "-n", "-C", str(ROOT), "gpu-check", "PART=int4", "OUT=out"],
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert re.search(r"nibblock bench gpu --out out\s.*--part int4", done.stdout, re.S)
    assert "pytest" not in done.stdout
