"""`python -m nibblock finetune`: a method and its baselines, side by side, on a real model.

Text is cut into documents, dealt to training and validation by whole documents, and packed into
rows. Every method sees the same rows in the same order, in a process of its own. At the end: one
table and one plot of quality, seconds, memory, training state and file.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from nibblock._finetune import report
from nibblock._finetune.settings import (
    BASELINES,
    COMPUTES,
    CUT_METHODS,
    METHODS,
    MODES,
    OPTIMIZERS,
    SCHEDULES,
    SELECTIONS,
    Settings,
    parse_size,
)
from nibblock._finetune.worker import LOCK, RESULT, SETTINGS
from nibblock._report import plain


def parser() -> argparse.ArgumentParser:
    """The command line."""
    d = {field.name: field.default for field in dataclasses.fields(Settings)}
    p = argparse.ArgumentParser(prog="python -m nibblock finetune", description=__doc__)

    def option(name: str, kind: type, text: str, **more: Any) -> None:
        key = name.replace("-", "_")
        shown = more.pop("shown", d[key])
        p.add_argument(f"--{name}", type=kind, default=d[key], help=f"{text} ({shown})", **more)

    p.add_argument(
        "--model", default="smollm2", help='a GGUF file, a transformers folder, or "smollm2"'
    )
    p.add_argument(
        "--data",
        default="",
        metavar="PATH",
        help="a text file or a folder of text files (default: Python's help topics)",
    )
    p.add_argument("--method", choices=METHODS, default=d["method"])
    option("density", float, "share of all blocks that are trained")
    option("block", int, "edge of a block")
    option("budget", float, "step time allowed, as a share of full fine-tuning's", shown="no limit")
    option("select", str, "how blocks are chosen", choices=SELECTIONS)
    option("mode", str, "how impact is measured", choices=MODES)
    option("spread", float, "of impact: at most so many even shares to a row or column; 0: no caps")
    option("batches", int, "batches that the choice looks at")
    option("rank", int, "of LoRA and SHiRA")
    p.add_argument("--int4", action="store_true", help="hold the frozen base in 4 bits (adapter)")
    option("compute", str, "of the 4-bit base: int8 is faster and coarser", choices=COMPUTES)
    option("tokens", int, "tokens a step")
    option("seq", int, "tokens a row")
    option("epochs", int, "passes over the training rows")
    option("steps", int, "steps, in place of epochs", shown="as the epochs say")
    option("optimizer", str, "muon: orthogonal updates of the trained blocks", choices=OPTIMIZERS)
    rates = "5e-5 full, 5e-4 LoRA and SHiRA, 2e-3 blocks, 1e-2 with muon"
    option("lr", float, "learning rate", shown=rates)
    option("schedule", str, "of the learning rate", choices=SCHEDULES)
    option("warmup", int, "steps until the full learning rate")
    option("weight-decay", float, "decoupled")
    option("max-norm", float, "of the gradient; 0 does not clip")
    option("valid", float, "share of the text that is held out")
    option("valid-rows", int, "held-out rows that are looked at, at most")
    option("patience", int, "evaluations without a better loss before it stops", shown="never")
    option("evaluate", int, "steps between evaluations", shown="ten a run")
    option("checkpoint", int, "steps between checkpoints; -1 for none", shown="ten a run")
    p.add_argument(
        "--cache",
        default="2G",
        metavar="SIZE",
        help="bytes for activations below the lowest trained layer, or off (2G)",
    )
    p.add_argument(
        "--baselines", default="", metavar="A,B", help=f"run besides: {', '.join(BASELINES)}"
    )
    p.add_argument("--out", default="finetune-out", metavar="DIR", help="(finetune-out)")
    p.add_argument("--resume", action="store_true", help="go on in --out where a run was stopped")
    option("seed", int, "of the split, the order and the choice")
    option("threads", int, "of torch", shown="torch's own")
    p.add_argument("--json", action="store_true", help="print the figures as JSON, and no table")
    return p


def settings_of(options: argparse.Namespace) -> tuple[Settings, list[str]]:
    """(the chosen run, the names of its baselines), checked.

    Raises:
        ValueError: an option out of range; the text names it.
    """
    values = vars(options)
    names = {field.name for field in dataclasses.fields(Settings)} - {"cache"}
    chosen = {name: values[name] for name in names if name in values}
    settings = Settings(cache=parse_size(options.cache), **chosen).checked()
    if settings.model != "smollm2":
        settings = dataclasses.replace(settings, model=str(Path(settings.model).resolve()))
    if settings.data:
        settings = dataclasses.replace(settings, data=str(Path(settings.data).resolve()))
    baselines = [name.strip() for name in options.baselines.split(",") if name.strip()]
    for name in baselines:
        if name not in BASELINES:
            raise ValueError(
                f"finetune: --baselines must be of {', '.join(BASELINES)}, got {name!r}"
            )
    if len({*baselines, settings.method}) != len(baselines) + 1:
        raise ValueError(
            f"finetune: --baselines must differ from each other and from --method, got "
            f"{options.baselines}"
        )
    return settings, baselines


def main(argv: list[str]) -> int:
    """Runs the method and its baselines; returns the exit status."""
    options = parser().parse_args(argv)
    settings, baselines = settings_of(options)
    out = Path(options.out)
    if out.exists() and not out.is_dir():
        raise ValueError(f"finetune: --out must be a folder, got the file {options.out!r}")
    if not options.resume and out.is_dir() and any(out.iterdir()):
        raise ValueError(
            f"finetune: --out must be an empty or new folder, got {options.out!r} with files in "
            f"it; add --resume to go on there"
        )
    results = []
    for name in [settings.method, *baselines]:
        run = dataclasses.replace(settings, method=name)
        if name != settings.method:  # what belongs to the chosen method alone
            run = dataclasses.replace(
                run, optimizer="adamw", lr=0.0, int4=False, compute="bf16", checkpoint=-1
            )
        if name in CUT_METHODS:
            run = dataclasses.replace(run, cut=_cut(results[0]))
        status = run_child(run.checked(), out / name, options.resume, quiet=options.json)
        if status:
            return status
        results.append(json.loads((out / name / RESULT).read_text(encoding="utf-8")))
    figures = {"results": results}
    (out / "report.json").write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    report.plot(results, out / "report.png")
    if options.json:
        print(json.dumps(plain(figures), indent=1, allow_nan=False))
    else:
        print(report.table(results))
        print(f"\n{out / 'report.json'}, {out / 'report.png'}; trained weights in {out}/*/")
    return 0


def _cut(result: dict[str, Any]) -> str:
    if not result["lowest"]:
        raise ValueError(
            "finetune: --baselines must have no method with a cut where the chosen one trains no "
            "numbered layer, got one"
        )
    return result["lowest"]


def run_child(settings: Settings, folder: Path, resume: bool, quiet: bool) -> int:
    """One run in a process of its own; nothing where its result is there already."""
    if resume and (folder / RESULT).is_file():
        found = json.loads((folder / RESULT).read_text(encoding="utf-8"))
        other = settings.differs(found["settings"])
        if other is None:
            return 0
        raise ValueError(
            f"finetune: --resume must come with the run's own --{other.replace('_', '-')} "
            f"({found['settings'].get(other)}), got {settings.to_json()[other]}"
        )
    made = _make(folder)
    text = json.dumps(settings.to_json(), indent=1) + "\n"
    (folder / SETTINGS).write_text(text, encoding="utf-8")
    command = [sys.executable, "-m", "nibblock._finetune.worker", str(folder)]
    command += ["--resume"] * resume + ["--quiet"] * quiet
    status = subprocess.run(command, check=False).returncode
    if status:
        _leave_as_found(made)
    return status


def _make(folder: Path) -> list[Path]:
    """Makes a folder; returns those that were not there, the innermost first."""
    made = [place for place in (folder, folder.parent) if not place.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    return made


def _leave_as_found(made: list[Path]) -> None:
    """Takes away the folders of a run that could not even begin, so that the same --out will do
    for the next. A folder with anything of a run in it stays."""
    for place in made:
        if {file.name for file in place.iterdir()} <= {SETTINGS, LOCK}:
            for file in place.iterdir():
                file.unlink()
            place.rmdir()
