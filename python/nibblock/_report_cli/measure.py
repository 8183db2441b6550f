"""Models side by side: quality, time, memory and cost from one run."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Callable, Optional

from nibblock._report import plain
from nibblock._report_cli.models import Candidate

_PAUSE = 0.05  # seconds for the threads of the model before to stop spinning


@dataclass
class Measured:
    """One model's figures.

    Attributes:
        path, form: as of `Candidate`. weights: numbers of the model, packed ones by their shape.
        perplexity: of the text, a token; None where it is not finite. text_tokens, text_hash: of
            what was read: perplexities compare where the hashes are equal.
        prefill, decode: tokens a second, one figure a round; medians below.
        peak_bytes: the process's largest resident memory while it loads the model, reads one prompt
            and decodes, above what it was with everything imported (and, where the system does not
            let a peak begin again, at least what the imports' own peak was).
        bytes: of Parameters and buffers. disk_bytes: of the files.
        load_seconds: once; a file that was not in the page cache takes longer.
    """

    path: str
    form: str
    weights: int
    perplexity: Optional[float]
    window: int
    text_tokens: int
    text_hash: str
    prefill_tokens: int
    decode_tokens: int
    peak_bytes: int
    bytes: int
    disk_bytes: int
    load_seconds: float
    threads: int
    price: Optional[float] = None
    prefill: list[float] = field(default_factory=list)
    decode: list[float] = field(default_factory=list)

    @property
    def prefill_rate(self) -> float:
        return statistics.median(self.prefill)

    @property
    def decode_rate(self) -> float:
        return statistics.median(self.decode)

    def cost(self, rate: float) -> Optional[float]:
        """Of a million tokens at `rate` a second, in the unit of the price an hour."""
        return None if self.price is None else self.price / 3600 * 1e6 / rate

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain values (JSON)."""
        values = {
            **asdict(self),
            "prefill_tokens_per_second": self.prefill_rate,
            "decode_tokens_per_second": self.decode_rate,
            "milliseconds_per_token": 1e3 / self.decode_rate,
        }
        if self.price is not None:
            values["price_per_million_read"] = self.cost(self.prefill_rate)
            values["price_per_million_written"] = self.cost(self.decode_rate)
        return plain(values)


class _Worker:
    """A process that holds one model; ends with the block."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __enter__(self) -> _Worker:
        self.log = tempfile.TemporaryFile()
        self.process = subprocess.Popen(
            [sys.executable, *(["-X", "dev"] if sys.flags.dev_mode else [])]
            + ["-m", "nibblock._report_cli.child"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=None if sys.flags.dev_mode else self.log,
            encoding="utf-8",
        )
        return self

    def __exit__(self, *error: object) -> None:
        self.process.kill()
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout, self.log):
            try:
                stream.close()
            except BrokenPipeError:  # a request that nobody read any more
                pass

    def ask(self, do: str, **values: Any) -> dict[str, Any]:
        try:
            self.process.stdin.write(json.dumps({"do": do, **values}) + "\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            self.log.seek(0)
            last = self.log.read().decode("utf-8", "replace").strip().splitlines()[-1:]
            why = last[0] if last else "no word"
            raise OSError(
                f"report: {self.name} must be measured by a process that lives, got exit status "
                f"{self.process.wait()}: {why}"
            )
        answer = json.loads(line)
        if "error" in answer:
            text = answer["error"]
            own = text.startswith("report: ")
            raise ValueError(text if own else f"report: {self.name}: {text}")
        return answer


def measure(
    candidates: Sequence[Candidate],
    text: Path,
    *,
    tokens: int = 2000,
    threads: int = 0,
    rounds: int = 5,
    price: Optional[float] = None,
    say: Callable[[str], None] = lambda line: None,
) -> list[Measured]:
    """Measures the models on this machine, in alternating rounds.

    Args:
        candidates: what to load; each gets a process of its own, and all of them are there at once.
        text: a UTF-8 file; its first `tokens` tokens (by each model's tokenizer) are read.
        threads: of torch; 0 for its own choice. rounds: of prefill and decode.
        price: of an hour of the machine, in any unit.
        say: is called with a line of progress.
    Returns:
        A `Measured` for each. Perplexities are repeatable; times are of this machine and compare
        only within one call.
    Raises:
        ValueError: no tokenizer, a text of fewer than 2 tokens, or a model that cannot be loaded.
        OSError: a process died (of memory, as a rule).
    """
    names = [Path(c.path).name for c in candidates]
    with ExitStack() as stack:
        workers = [stack.enter_context(_Worker(name)) for name in names]
        figures: list[dict[str, Any]] = []
        for worker, candidate in zip(workers, candidates):
            say(f"loading {worker.name}")
            where = {"text": str(text), "tokens": tokens, "threads": threads}
            figures.append(worker.ask("load", candidate=asdict(candidate), **where))
        for worker, found in zip(workers, figures):
            say(f"perplexity of {worker.name} on {found['text_tokens']} tokens")
            found.update(worker.ask("warm"))
            found.update(worker.ask("perplexity"), prefill=[], decode=[])
        for index in range(rounds):
            say(f"timing round {index + 1} of {rounds}")
            for what in ("prefill", "decode"):
                # Every other round backwards, so that no model always follows the same one.
                order = list(zip(workers, figures))[:: 1 if index % 2 == 0 else -1]
                for worker, found in order:
                    time.sleep(_PAUSE)
                    found[what].append(worker.ask(what)["rate"])
    return [
        Measured(path=c.path, form=c.form, disk_bytes=c.disk_bytes, price=price, **found)
        for c, found in zip(candidates, figures)
    ]
