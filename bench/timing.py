"""Interleaved timing: every contender runs once per round, so that a slow minute of a shared
machine slows all of them alike and only ratios taken inside a round are reported.

Three rules keep the figures honest:

- A block of calls is timed as a whole, and rounds alternate the order of the contenders.
- Cold weights: call i uses copy i of the weights, and all copies together are larger than
  any cache.
- Two thread pools never compete. A worker of an OpenMP pool spins for some milliseconds after its
  last task; before a contender of another pool starts, the timer waits until those have gone to
  sleep.
"""

from __future__ import annotations

import gc
import os
import statistics
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Callable

MIB = 1 << 20


@dataclass
class Contender:
    """One thing to time.

    Args:
        name: unique within a comparison.
        call: called with the index of the copy of the weights to use, 0 .. copies - 1.
        copies: how many distinct copies `call` can address (1: the weights stay in cache).
        pool: whose worker threads run it ("torch", "onnxruntime", "native", ...).
        measure: a self-timing contender: returns a figure (GB/s, GFLOP/s) instead of being timed.
    """

    name: str
    call: Callable[[int], object]
    copies: int = 1
    pool: str = "torch"
    measure: bool = False
    cursor: int = 0
    calls: int = 1

    def next(self) -> object:
        result = self.call(self.cursor)
        self.cursor = (self.cursor + 1) % self.copies
        return result


@dataclass
class Timing:
    """One value per round: seconds a call, or the figure that a self-timing contender returned."""

    rounds: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        return statistics.median(self.rounds)

    @property
    def min(self) -> float:
        return min(self.rounds)

    @property
    def max(self) -> float:
        return max(self.rounds)

    def to_dict(self) -> dict:
        return {"median": self.median, "min": self.min, "max": self.max, "rounds": self.rounds}


def median(values: Iterable[float]) -> float:
    return statistics.median(values)


def wait_until_idle(limit: float = 0.2) -> None:
    """Returns when this process's other threads have stopped spinning, or after `limit` seconds."""
    deadline = time.perf_counter() + limit
    while time.perf_counter() < deadline:
        before = time.process_time()
        time.sleep(0.003)
        if time.process_time() - before < 0.0005:
            return


def interleave(
    contenders: Sequence[Contender],
    rounds: int = 15,
    block: float = 0.015,
    budget: float = 10.0,
    min_rounds: int = 3,
) -> dict[str, Timing]:
    """Times the contenders in alternating order, round after round.

    Args:
        contenders: what to time; names must differ.
        rounds: how many rounds at most.
        block: seconds one contender runs in one round, at least one call.
        budget: seconds after which no new round starts (but `min_rounds` are always done).

    Returns:
        name -> Timing, all with the same number of rounds, rounds aligned across contenders.

    Raises:
        ValueError: two contenders have the same name.
    """
    names = [c.name for c in contenders]
    if len(set(names)) != len(names):
        raise ValueError(f"interleave: names must differ, got {names}")
    result = {name: Timing() for name in names}
    pool = ""
    for c in contenders:  # calibrate; also the first touch of code, scratch memory and thread pools
        if c.measure:
            continue
        if c.pool != pool:
            wait_until_idle()
            pool = c.pool
        c.next()
        start = time.perf_counter()
        c.next()
        once = time.perf_counter() - start
        if once < block / 4:  # one call of a small op says little: average a few
            start = time.perf_counter()
            for _ in range(5):
                c.next()
            once = (time.perf_counter() - start) / 5
        c.calls = max(1, min(5000, int(block / max(once, 1e-7))))

    was_enabled = gc.isenabled()
    gc.disable()
    try:
        began = time.perf_counter()
        for r in range(rounds):
            if r >= min_rounds and time.perf_counter() - began > budget:
                break
            for c in contenders if r % 2 == 0 else reversed(contenders):
                if c.pool != pool:
                    wait_until_idle()
                    pool = c.pool
                if c.measure:
                    result[c.name].rounds.append(float(c.next()))  # type: ignore[arg-type]
                    continue
                c.next()  # wakes the pool up; not timed
                step, n = c.next, c.calls
                start = time.perf_counter()
                for _ in range(n):
                    step()
                result[c.name].rounds.append((time.perf_counter() - start) / n)
    finally:
        if was_enabled:
            gc.enable()
    return result


# --- memory ---------------------------------------------------------------------------------------


def last_level_cache() -> int:
    """Bytes of the largest cache the operating system reports, or 64 MiB where it reports none."""
    largest = 0
    base = "/sys/devices/system/cpu/cpu0/cache"
    if os.path.isdir(base):
        for index in sorted(os.listdir(base)):
            path = os.path.join(base, index, "size")
            if os.path.isfile(path):
                with open(path) as f:
                    text = f.read().strip()
                unit = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}.get(text[-1:], 1)
                largest = max(largest, int(text.rstrip("KMG")) * unit)
    return largest or 64 * MIB


def available_memory() -> int:
    """Bytes a new process could use now, honouring a memory limit set on this container."""
    free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    if os.path.isfile("/proc/meminfo"):
        with open("/proc/meminfo") as f:
            for line in f:
                if line.startswith("MemAvailable:"):
                    free = int(line.split()[1]) * 1024
    limit, used = "/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"
    if os.path.isfile(limit) and os.path.isfile(used):
        with open(limit) as f, open(used) as g:
            text, now = f.read().strip(), int(g.read())
        if text.isdigit():
            free = min(free, int(text) - now)
    return max(free, 0)


def cold_bytes(contenders: int = 1) -> int:
    """How many bytes of distinct weights make a rotation cold.

    More than four times the last-level cache and at least 512 MiB, at most 2 GiB, and never more
    than 40 % of the free memory over all contenders.
    """
    wanted = min(max(512 * MIB, 4 * last_level_cache() + 1), 2048 * MIB)
    return max(0, min(wanted, int(0.4 * available_memory()) // max(1, contenders)))


def copies_for(weight_bytes: int, target: int) -> int:
    """How many copies of a weight make up `target` bytes; at least one."""
    return max(1, -(-target // max(1, weight_bytes)))
