"""Configurations by shape class: lookup, files, and the tuner with a clock of the test's own.

Needs no GPU. Every candidate is compiled ahead of time by `tests/triton_grid.py write`; the test
here holds its committed figures to today's grid, and compiles a few anew.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from nibblock import __main__ as command
from nibblock import _tune
from nibblock.triton_kernels import _configs, _table, _tuned
from nibblock.triton_kernels._configs import candidates

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
REPORT = ROOT / "bench/results/triton_grid.json"
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024}  # bytes a program may use
BF16 = torch.bfloat16
SHAPE = _configs.int4_class("int4_linear", 1, 4096, 4096, BF16, 128, 4)
GPU = "NVIDIA Test-1 80GB"


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    monkeypatch.delenv(_tuned.VARIABLE, raising=False)
    _tuned.forget()
    yield
    _tuned.forget()


# --- classes and grids ----------------------------------------------------------------------------


def test_what_falls_together():
    assert [_configs.rows_class(m) for m in (1, 16, 17, 64, 65, 512, 9000)] == [
        16, 16, 32, 64, 128, 512, 4096,
    ]  # fmt: skip
    assert [_configs.nearest_class(n) for n in (1, 4096, 5120, 6144, 14336, 28672, 57344)] == [
        1, 4096, 4096, 8192, 16384, 32768, 65536,
    ]  # fmt: skip
    again = _configs.int4_class("int4_linear", 16, 5120, 4096, BF16, 128, 4)
    assert again == SHAPE
    assert str(SHAPE) == "int4_linear rows=16 n=4096 k=4096 dtype=bfloat16 group=128 bits=4"
    for other in (
        _configs.int4_class("int4_linear", 17, 4096, 4096, BF16, 128, 4),
        _configs.int4_class("int4_linear_dx", 1, 4096, 4096, BF16, 128, 4),
        _configs.int4_class("int4_linear", 1, 4096, 4096, torch.float16, 128, 4),
        _configs.int4_class("int4_linear", 1, 4096, 4096, BF16, 64, 4),
    ):
        assert other != SHAPE


def every_class():
    for op in ("int4_linear", "int4_linear_dx"):
        for rows in (16, 32, 64, 128, 256, 512, 1024, 4096):
            for dtype in (torch.float32, BF16, torch.float16):
                for group in (32, 64, 128, 256, -1):
                    yield _configs.int4_class(op, rows, 4096, 4096, dtype, group, 4)
    for block in (16, 32, 64, 128):
        for dtype in (torch.float32, BF16, torch.float16):
            for rows in (16, 64, 128, 4096):
                for op in ("block_sparse_linear", "block_sparse_linear_dx"):
                    yield _configs.blocks_class(op, rows, 4096, 4096, dtype, dtype, block)
                yield _configs.weight_grad_class(rows, 100, dtype, block)
            yield _configs.scores_class(1024, 4096, 4096, dtype, block)
        yield _configs.updates_class("adamw", "block", torch.float32, block)
    yield _configs.updates_class("sgd", "flat", torch.float32, 0)


def test_candidates_are_legal_constants_of_one_row():
    """What a kernel takes for granted: whoever adds a candidate that breaks it gets wrong sums."""
    for shape in every_class():
        assert shape.op in _table.TABLE
        for capability in (80, 90):
            grid = candidates(shape, capability)
            assert all(a != b for i, a in enumerate(grid) for b in grid[:i]), shape
            for config in grid:
                assert config.keys() == grid[0].keys(), shape
                for key, value in config.items():
                    power = value & (value - 1) == 0
                    assert power or key in ("TARGET", "num_stages"), (shape, config)
                if config.get("SCALE_SUMS"):  # one scale a step
                    assert config["BK"] <= (shape.group if shape.group > 0 else 1 << 30), shape
                if shape.op.startswith("int4"):
                    by_hand = grid[0].get("SCALE_SUMS")
                    assert config.get("SCALE_SUMS") == by_hand, (shape, config)
                    if shape.rows <= _table.FEW_ROWS:
                        assert config["BM"] >= shape.rows, shape
                if "BO" in config:
                    assert config["BO"] <= shape.block
                    assert config["STEP"] >= 16
                if shape.op == "block_weight_grad":
                    assert max(config["BI"], config["BJ"]) <= shape.block
                if shape.op == "block_scores":
                    assert min(config["BI"], config["BJ"]) >= shape.block


# --- files ----------------------------------------------------------------------------------------


def content(entries, **changes):
    return {"format": 1, "gpu": GPU, "capability": [9, 0], "entries": entries, **changes}


def entry(config=None, shape=SHAPE, **changes):
    facts = {k: v for k, v in shape._asdict().items() if v}
    return {**facts, "config": candidates(shape, 90)[1] if config is None else config, **changes}


def put(folder, what):
    path = folder / f"{_tuned.slug(GPU)}.json"
    path.write_text(what if isinstance(what, str) else json.dumps(what))
    return path


def test_a_gpu_without_a_file_keeps_what_was_chosen_by_hand(monkeypatch, tmp_path):
    own = candidates(SHAPE, 90)[0]
    assert _tuned.lookup(GPU, SHAPE) is None
    assert _tuned.choose(GPU, SHAPE, own) is own
    monkeypatch.setenv(_tuned.VARIABLE, str(tmp_path))  # a folder with other GPUs' files is fine
    _tuned.forget()
    put(tmp_path, content([entry()]))
    assert _tuned.choose("NVIDIA Other", SHAPE, own) is own


def test_a_users_file_wins_over_the_shipped_one_class_by_class(monkeypatch, tmp_path):
    grid = candidates(SHAPE, 90)
    other = _configs.int4_class("int4_linear_dx", 1, 4096, 4096, BF16, 128, 4)
    shipped, user = tmp_path / "shipped", tmp_path / "user"
    shipped.mkdir()
    user.mkdir()
    put(shipped, content([entry(grid[2]), entry(shape=other)]))
    monkeypatch.setattr(_tuned, "SHIPPED", shipped)
    assert _tuned.lookup(GPU, SHAPE) == grid[2]
    monkeypatch.setenv(_tuned.VARIABLE, str(user))
    put(user, content([entry(grid[1])]))
    _tuned.forget()
    assert _tuned.choose(GPU, SHAPE, grid[0]) == grid[1]
    assert _tuned.choose(GPU, other, {}) == candidates(other, 90)[1]
    assert _tuned.choose("", SHAPE, grid[0]) is grid[0]  # no GPU, no file
    with _tuned.forcing("int4_linear", grid[3]):
        assert _tuned.choose(GPU, SHAPE, grid[0]) == grid[3]
        assert _tuned.choose(GPU, other, {}) == candidates(other, 90)[1]
    assert _tuned.choose(GPU, SHAPE, grid[0]) == grid[1]


WRONG = [
    ("{", "content must be JSON"),
    ("[]", "format must be 1, got list"),
    (content([], format=7), "format must be 1, got 7"),
    (content([], gpu="NVIDIA Other"), "gpu must be the one the file is named after"),
    (content([], capability="9.0"), r"capability must be \[major, minor\], got 9.0"),
    (content({}), "entries must be a list, got dict"),
    (content([3]), r"entries\[0\] must be an object, got int"),
    (content([entry(), entry(op="int4_lin")]), r"entries\[1\] must be of a known op"),
    (content([entry(rows="16")]), r"entries\[0\] must be of a known op with the fields"),
    (content([entry(dtype="int8")]), r"entries\[0\] must be of a known op with the fields"),
    (content([entry(group=7)]), r"entries\[0\] must be of a known op with the fields"),
    (content([{"op": "block_weight_grad", "dtype": "bfloat16", "block": 20}]), "of a known op"),
    (content([entry(), entry()]), r"entries\[1\] must be of a class of its own"),
    (content([entry({"BN": 64})]), r"entries\[0\].config must be one of the \d+ candidates of"),
    (content([entry({**candidates(SHAPE, 90)[0], "BK": 4096})]), "one of the"),
]


@pytest.mark.parametrize("number", range(len(WRONG)))
def test_a_file_that_is_not_in_order_is_named_in_one_line(number, monkeypatch, tmp_path):
    what, text = WRONG[number]
    path = put(tmp_path, what)
    monkeypatch.setenv(_tuned.VARIABLE, str(tmp_path))
    for _ in range(2):  # at every launch, not only at the first
        with pytest.raises(ValueError, match=text) as raised:
            _tuned.lookup(GPU, SHAPE)
        assert str(raised.value).startswith(str(path))
        assert "\n" not in str(raised.value)


def test_a_folder_that_is_not_there_is_an_error(monkeypatch, tmp_path):
    monkeypatch.setenv(_tuned.VARIABLE, str(tmp_path / "none"))
    with pytest.raises(ValueError, match="NIBBLOCK_TUNED: must be a folder, got"):
        _tuned.lookup(GPU, SHAPE)


def test_shipped_files_are_in_order():
    for path in _tuned.SHIPPED.glob("*.json"):
        assert _tuned.read(path), path


def test_shipped_files_are_in_the_wheel(tmp_path):
    tree = tmp_path / "tree"
    for folder in ("python", "triton_kernels", "bench"):
        shutil.copytree(
            ROOT / folder, tree / folder, symlinks=True,
            ignore=shutil.ignore_patterns("*.so", "__pycache__", "results", "*.egg-info"),
        )  # fmt: skip
    for link in (p for p in (tree / "python").rglob("*") if p.is_symlink()):
        link.unlink()
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "MANIFEST.in"):
        shutil.copy(ROOT / name, tree)
    put(tree / "triton_kernels/configs", content([]))
    (tree / "csrc").mkdir()
    out = tmp_path / "out"
    build = [sys.executable, "setup.py", "-q", "build_py", "--build-lib", str(out)]
    done = subprocess.run(build, cwd=tree, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    found = out / "nibblock/triton_kernels/configs" / f"{_tuned.slug(GPU)}.json"
    assert json.loads(found.read_text())["gpu"] == GPU
    assert "recursive-include triton_kernels *.py *.json" in (tree / "MANIFEST.in").read_text()


# --- the tuner ------------------------------------------------------------------------------------


class Bench:
    """A class whose results and times the test sets by candidate: no GPU, no kernel."""

    def __init__(self, seconds, results=None, refuse=(), want=None, shape=SHAPE):
        self.grid = candidates(shape, 90)
        self.seconds, self.results, self.refuse = seconds, results or {}, refuse
        self.made, self.want, self.shape = 0, want, shape

    def job(self):
        return _tune.Job(self.shape, "4096x4096", self.make)

    def make(self):
        self.made += 1
        return _tune.Work(self.call, 2, self.want)

    def call(self, i):
        number = self.grid.index(_tuned.choose("", self.shape, None))
        if number in self.refuse:
            raise RuntimeError("out of resource: shared memory\nmore lines")
        return torch.tensor(self.results.get(number, [1.0, 100.0]))

    def clock(self, calls):
        out = {}
        for name, (call, copies) in calls.items():
            assert copies == 2
            call(0)
            out[name] = [self.seconds.get(int(name), 1.0) * f for f in (3, 1, 1)]
        return out


def test_the_fastest_candidate_that_computes_the_same_wins():
    bench = Bench(
        {1: 0.5, 2: 0.1, 3: 0.2, 4: 0.7},
        results={1: [1.0, 100.3], 2: [1.0, 103.0], 4: [float("nan"), 100.0]},
        refuse=(3,),
    )
    said = []
    entries, left = _tune.tune([bench.job(), bench.job()], 90, bench.clock, 1e9, say=said.append)
    assert not left
    assert bench.made == 1  # a class that comes again is passed over
    (found,) = entries
    assert found["config"] == bench.grid[1]
    assert found["seconds"] == 0.5
    assert found["by_hand_seconds"] == 1.0
    rejected = {i: row["rejected"] for i, row in enumerate(found["candidates"]) if "seconds" not in
                row}  # fmt: skip
    assert rejected == {
        2: "differs by 0.03 of the largest value",
        3: "RuntimeError: out of resource: shared memory",
        4: "differs by inf of the largest value",
    }
    assert len(found["candidates"]) == len(bench.grid)
    assert said == [f"{SHAPE}: 2.00x over the one chosen by hand, 3 candidates rejected"]


def test_noise_does_not_move_a_configuration():
    bench = Bench({1: 0.99})
    (found,), _ = _tune.tune([bench.job()], 90, bench.clock, 1e9, say=lambda text: None)
    assert found["config"] == bench.grid[0]


def test_a_wrong_kernel_is_left_out_and_the_rest_goes_on():
    wrong = Bench({}, want=torch.tensor([1.0, 50.0]))
    good = Bench({2: 0.5}, shape=SHAPE._replace(rows=64))

    def clock(calls):
        return good.clock(calls)

    entries, left = _tune.tune([wrong.job(), good.job()], 90, clock, 1e9, say=lambda text: None)
    assert [e["rows"] for e in entries] == [64]
    assert left == [f"{SHAPE}: AssertionError: the configuration chosen by hand is off by over 2 %"]


def test_it_stops_when_the_time_is_up():
    ticks = iter([0.0, 1.0, 61.0])
    first, second = Bench({}), Bench({}, shape=SHAPE._replace(rows=64))
    entries, left = _tune.tune(
        [first.job(), second.job()], 90, first.clock, 60, now=lambda: next(ticks),
        say=lambda text: None,
    )  # fmt: skip
    assert len(entries) == 1
    assert not second.made
    assert left == [f"{second.shape}: the time was up"]


def test_what_it_writes_is_what_a_launch_reads(monkeypatch, tmp_path):
    facts = {"gpu": GPU, "capability": [9, 0], "versions": {}, "date": "2026-11-22"}
    monkeypatch.setenv(_tuned.VARIABLE, str(tmp_path))
    for number, shape in ((1, SHAPE), (2, SHAPE._replace(rows=64)), (3, SHAPE)):
        bench = Bench({number: 0.5}, shape=shape)
        entries, _ = _tune.tune([bench.job()], 90, bench.clock, 1e9, say=lambda text: None)
        _tune.write(tmp_path, facts, entries)
    assert _tuned.lookup(GPU, SHAPE) == candidates(SHAPE, 90)[3]  # the later run's
    wider = SHAPE._replace(rows=64)
    assert _tuned.lookup(GPU, wider) == candidates(wider, 90)[2]  # kept
    assert len(json.loads((tmp_path / f"{_tuned.slug(GPU)}.json").read_text())["entries"]) == 2
    put(tmp_path, "{")
    with pytest.raises(ValueError, match="must be JSON"):  # and does not write over it
        _tune.write(tmp_path, facts, entries)


def test_differences():
    nan, inf = float("nan"), float("inf")
    same = torch.tensor([1.0, nan, inf, -inf])
    assert _tune.off(same, same) == 0
    assert _tune.off(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 4.0])) == 0.5
    for one in ([nan, 1.0], [inf, 1.0], [-inf, 1.0]):
        assert _tune.off(torch.tensor(one), torch.tensor([1.0, 1.0])) == inf
        assert _tune.off(torch.tensor([1.0, 1.0]), torch.tensor(one)) == inf


def test_jobs_cover_every_part_with_classes_that_files_may_hold():
    found = list(_tune.jobs(_tune.PARTS, _tune.LAYERS))
    tuned = {job.shape for job in found if len(candidates(job.shape, 90)) > 1}
    assert {shape.op for shape in tuned} == {
        "int4_linear", "int4_linear_dx", "block_sparse_linear", "block_sparse_linear_dx",
        "block_weight_grad", "block_scores", "masked_adamw_block",
    }  # fmt: skip
    entries = [entry(candidates(s, 90)[1], s) for s in tuned]
    assert _tuned._shape(entries[0]) is not None
    for one, shape in zip(entries, tuned):
        assert _tuned._shape(one) == shape


def test_the_command_needs_a_gpu(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert command.main(["tune", "--minutes", "1"]) == 1
    text = capsys.readouterr().err
    assert text == "nibblock tune: needs an NVIDIA GPU and a CUDA build of torch, got none\n"
    with pytest.raises(SystemExit):
        command.main(["tune", "--layer", "4096x100"])
    assert "must be NxK with K a multiple of 128, got 4096x100" in capsys.readouterr().err


# --- the grid as machine code ---------------------------------------------------------------------


def child(*arguments, cache):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(cache)
    command = [sys.executable, str(HERE / "triton_grid.py"), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed"
)


def check(rows):
    assert {row["capability"] for row in rows} == {80, 90}
    for row in rows:
        where = f"{row['label']} on {row['capability']}"
        assert row["stack"] == 0, f"spills: {where}"
        assert row["registers"] <= 255, where
        assert row["shared"] <= SHARED_LIMIT[row["capability"]], where


@needs_triton
def test_every_candidate_was_compiled_and_fits(tmp_path):
    rows = json.loads(REPORT.read_text())["kernels"]
    check(rows)
    assert {(row["capability"], row["label"], row["name"]) for row in rows} == {
        tuple(line) for line in child("list", cache=tmp_path)
    }


@needs_triton
def test_a_few_candidates_compile_today(tmp_path):
    rows = child("core", cache=tmp_path)
    assert len(rows) >= 4
    check(rows)


def test_the_readme_of_the_folder_names_the_command():
    text = (_tuned.SHIPPED / "README.md").read_text()
    assert "python -m nibblock tune" in text
