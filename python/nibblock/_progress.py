"""Progress of a long conversion: a bar on a terminal, one line otherwise, or the caller's own
function.
"""

from __future__ import annotations

import sys
import time
from typing import Callable, Optional, Union

ProgressOption = Union[None, bool, Callable[[int, int], None]]


class Progress:
    """Counts steps towards `total`.

    Args:
        option: None or True for a bar on a terminal and one closing line elsewhere (standard
            error); False for silence; a callable for `option(done, total)` after every step.
        total: how many steps there are.
        label: what the bar or line begins with.
        unit: what the steps are, for the closing line.
    """

    def __init__(
        self, option: ProgressOption, total: int, label: str, unit: str = "layers"
    ) -> None:
        self._total, self._label, self._done, self._unit = total, label, 0, unit
        self._call: Optional[Callable[[int, int], None]] = option if callable(option) else None
        self._shown = option is None or option is True
        self._terminal = self._shown and sys.stderr.isatty() and total > 0
        self._start = time.perf_counter()
        self._bar = None
        if self._terminal:
            try:
                from tqdm import tqdm
            except ImportError:
                self._bar = None  # tqdm is optional; a counter on one line does the same
            else:
                self._bar = tqdm(total=total, desc=label, file=sys.stderr, leave=True)

    def step(self) -> None:
        self._done += 1
        if self._call is not None:
            self._call(self._done, self._total)
        elif self._bar is not None:
            self._bar.update(1)
        elif self._terminal:
            sys.stderr.write(f"\r{self._label}: {self._done}/{self._total}")
            sys.stderr.flush()

    def close(self, finished: bool = True) -> None:
        if self._bar is not None:
            self._bar.close()
        elif self._terminal:
            sys.stderr.write("\n")
        elif self._shown and finished and self._total > 0:
            seconds = time.perf_counter() - self._start
            print(f"{self._label}: {self._done} {self._unit} in {seconds:.1f} s", file=sys.stderr)
