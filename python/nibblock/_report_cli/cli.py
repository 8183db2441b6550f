"""`python -m nibblock report PATH ...`: what files hold, what changed, and how models compare.

Without --text: the facts of each PATH, from headers. PATH is a file of nibblock.save (a model, an
adapter, a sparse update), a GGUF file, a transformers folder (also one that convert made), or the
--out folder of finetune. Adapters or updates of one base also show what changed from each to the
next: the audit of a new version before it is deployed, or of what a rollback would undo.

With --text: every PATH that is a causal language model, or becomes one on --base, is measured side
by side: perplexity, tokens a second, memory, bytes, loading, and with --price what a million tokens
cost. Each runs in a process of its own, all of them at once, and rounds alternate.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path
from typing import Any, Optional

from nibblock._report_cli.changes import changes
from nibblock._report_cli.describe import describe
from nibblock._report_cli.facts import Changes, TrainedFacts
from nibblock._report_cli.plot import plot

_MEASURING = ("base", "price", "threads", "tokens", "rounds")


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(
        prog="python -m nibblock report",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("paths", nargs="+", metavar="PATH", help="files and folders, older ones first")
    p.add_argument("--json", action="store_true", help="print the facts as JSON, and no table")
    p.add_argument("--layers", action="store_true", help="a row for every layer")
    p.add_argument("--plot", metavar="FILE.png", help="draw density and norm of layers with blocks")
    p.add_argument("--text", metavar="FILE", help="measure the models on this text (UTF-8)")
    p.add_argument(
        "--base",
        metavar="MODEL",
        help="with --text: a GGUF file or transformers folder that files of nibblock.save go onto",
    )
    p.add_argument("--price", type=float, metavar="PER_HOUR", help="with --text: of this machine")
    p.add_argument("--threads", type=int, metavar="N", help="with --text: of torch (torch's own)")
    p.add_argument("--tokens", type=int, metavar="N", help="with --text: tokens of it (2000)")
    p.add_argument("--rounds", type=int, metavar="N", help="with --text: of each timing (5)")
    return p


def _check(options: argparse.Namespace) -> None:
    for name, least in (("threads", 1), ("tokens", 2), ("rounds", 1)):
        value = getattr(options, name)
        if value is not None and value < least:
            raise ValueError(f"report: --{name} must be at least {least}, got {value}")
    if options.price is not None and not (options.price >= 0 and math.isfinite(options.price)):
        raise ValueError(f"report: --price must be a number of at least 0, got {options.price}")
    if options.text is None:
        for name in _MEASURING:
            if getattr(options, name) is not None:
                raise ValueError(f"report: --{name} must go with --text, got none")
        return
    for name in ("plot", "layers"):
        if getattr(options, name):
            raise ValueError(f"report: --{name} must go without --text, got both")
    try:
        Path(options.text).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"report: --text must be UTF-8 text, got other bytes in {Path(options.text).name}"
        ) from error
    except OSError as error:
        raise type(error)(
            f"report: --text must be a file that can be read, got {options.text!r} "
            f"({error.strerror})"
        ) from error


def main(argv: Optional[list[str]] = None) -> int:
    """Runs the command.

    Returns:
        0; or 2 after one line on stderr: an option out of range, or a PATH that is missing,
        damaged, or none of the kinds above.
    """
    options = parser().parse_args(argv)
    try:
        _check(options)
        (_facts if options.text is None else _measure)(options)
    except (ImportError, OSError, ValueError) as error:
        if sys.flags.dev_mode:
            raise
        print(" ".join(str(error).splitlines()), file=sys.stderr)
        return 2
    return 0


def _facts(options: argparse.Namespace) -> None:
    found = [describe(path) for path in options.paths]
    compared, left = _compare([f.path for f in found if isinstance(f, TrainedFacts)])
    if options.plot:
        plot(found, options.plot)
    if options.json:
        values: dict[str, Any] = {
            "files": [facts.to_dict() for facts in found],
            "changes": [change.to_dict() for change in compared],
            "not_compared": left,
        }
        print(json.dumps(values, indent=1, allow_nan=False))
        return
    from nibblock._report_cli.text import changes_text, facts_text

    parts = [facts_text(facts, options.layers) for facts in found]
    parts += [changes_text(change, options.layers) for change in compared]
    parts += [f"not compared: {reason.partition(': ')[2]}" for reason in left]
    print("\n\n".join(parts))


def _compare(paths: list[str]) -> tuple[list[Changes], list[str]]:
    """From each of the paths to the next; the reason for each pair that cannot be compared."""
    compared, left = [], []
    for first, second in zip(paths, paths[1:]):
        try:
            compared.append(changes(first, second))
        except ValueError as error:  # both are whole, describe has read them: they are unlike
            left.append(str(error))
    return compared, left


def _measure(options: argparse.Namespace) -> None:
    from nibblock._report_cli.measure import measure
    from nibblock._report_cli.models import candidates
    from nibblock._report_cli.text import measured_text
    from nibblock.integrations.transformers import require_transformers

    require_transformers("report").utils.logging.disable_progress_bar()
    found, left = candidates(options.paths, options.base)
    if not found:
        path, reason = left[0]
        raise ValueError(
            f"report: PATH must be a causal language model for --text, got {path}: {reason}"
        )

    def say(line: str) -> None:
        if sys.stderr.isatty():
            print(line, file=sys.stderr, flush=True)

    chosen = {
        key: getattr(options, key)
        for key in ("tokens", "threads", "rounds", "price")
        if getattr(options, key) is not None
    }
    rows = measure(found, Path(options.text), say=say, **chosen)
    if options.json:
        from nibblock import _native

        values = {
            "measured": [row.to_dict() for row in rows],
            "not_measured": [{"path": path, "reason": reason} for path, reason in left],
            "text": options.text,
            "isa": _native.cpu_isa(),
        }
        print(json.dumps(values, indent=1, allow_nan=False))
        return
    print(measured_text(rows, Path(options.text).name))
    for path, reason in left:
        print(f"not measured: {path}: {reason}")
