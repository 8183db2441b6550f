"""One training step of SmolLM2 at 512 tokens: full, LoRA, SHiRA and ours, phase by phase.

`finetune` gives every method's model our shorter forwards (norms, rotations, SwiGLU and attention
in an op each), so the first rows compare what is trained and nothing else. "..., plain" are the
same methods on the model as transformers has it, which is what their users run today; the head's
loss, chunk by chunk, is the loop's and so theirs too.

Times: all methods in one process, a step each in turn. Memory: a process for each method, so that
its peak is its own.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
import subprocess
import sys
from contextlib import nullcontext
from typing import Any

import torch
from nibblock._finetune.methods import Prepared, prepare
from nibblock._finetune.settings import Settings
from nibblock._finetune.task import TextTask

from .timing import available_memory

ROOM = 15 << 30  # bytes that the models, their states and one step's activations need together
BASE = Settings(model="smollm2", seq=512, tokens=512, density=0.02, select="magnitude")
METHODS = {
    "full": dataclasses.replace(BASE, method="full"),
    "lora": dataclasses.replace(BASE, method="lora"),
    "shira": dataclasses.replace(BASE, method="shira"),
    "masked": dataclasses.replace(BASE, method="masked"),
    "adapter int4": dataclasses.replace(BASE, method="adapter", int4=True, select="even"),
}
PLAIN = {f"{name}, plain": METHODS[name] for name in ("full", "lora", "shira")}
TIMED = {**METHODS, **PLAIN}


def task_of(rows: int, seq: int) -> TextTask:
    """Rows of tokens; which ones does not matter to a step's time."""
    ids = torch.randint(1000, 40_000, (rows + 1, seq), generator=torch.Generator().manual_seed(0))
    return TextTask(ids[:rows], ids[rows:], 1, 0)


def ready(name: str) -> tuple[Prepared, TextTask]:
    from nibblock._finetune.worker import load_model
    from nibblock.nn import unfuse_linears

    settings = TIMED[name]
    task = task_of(4, settings.seq)
    prepared = prepare(load_model(settings)[0], task, settings)
    if name in PLAIN:
        unfuse_linears(prepared.model)
    return prepared, task


def step(prepared: Prepared, task: TextTask, settings: Settings, index: int) -> dict[str, float]:
    from nibblock._finetune.loop import one_step

    batch = task.batch(task.order.indices(index))
    lr = settings.learning_rate
    return one_step(task, prepared, batch, settings.max_norm, lr, nullcontext())[1]


def times(rounds: int) -> dict[str, Any]:
    """Seconds of every method's step and of its phases, interleaved.

    Raises:
        MemoryError: not enough memory for all of them at once.
    """
    if available_memory() < ROOM:
        raise MemoryError(
            f"bench: free memory must be at least {ROOM >> 30} GiB to interleave the methods, got "
            f"{available_memory() / (1 << 30):.1f}"
        )
    made = {}
    for name in TIMED:
        print(f"loading {name}", flush=True)
        made[name] = ready(name)
    phases: dict[str, list[dict[str, float]]] = {name: [] for name in made}
    state = {}
    for index in range(rounds + 1):  # the first is not counted: optimiser states are made in it
        for name in made if index % 2 == 0 else reversed(list(made)):
            prepared, task = made[name]
            found = step(prepared, task, TIMED[name], index)
            if index:
                phases[name].append(found)
            else:
                state[name] = _state_bytes(prepared)
        print(f"round {index} of {rounds}", flush=True)
    out = {}
    for name, found in phases.items():
        totals = [sum(p.values()) for p in found]
        out[name] = {
            "median_s": statistics.median(totals),
            "min_s": min(totals),
            "rounds_s": totals,
            "phases": {k: statistics.median(p[k] for p in found) for k in found[0]},
            "state_bytes": state[name],
            "trained": sum(p.numel() for p in made[name][0].trained().values()),
        }
    return out


def _state_bytes(prepared: Prepared) -> int:
    """As at the end of a step, when the gradients are still there: each has its Parameter's
    size."""
    gradients = sum(p.numel() * p.element_size() for p in prepared.trained().values())
    return prepared.state_bytes() + gradients


def peak(name: str) -> dict[str, Any]:
    """Peak memory of two steps of a method in a process of its own, net of imports."""
    command = [sys.executable, "-m", __spec__.name, name, str(torch.get_num_threads())]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["no message"]
        raise RuntimeError(f"bench: the child of {name} failed: {lines[-1]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def child(name: str, threads: str) -> int:
    from nibblock._finetune.worker import import_everything, memory

    torch.set_num_threads(int(threads))
    settings = TIMED[name]
    import_everything(settings)
    before = memory("VmRSS")
    prepared, task = ready(name)
    loaded = memory("VmRSS") - before
    for index in range(2):
        step(prepared, task, settings, index)
    print(json.dumps({"peak_bytes": memory("VmHWM") - before, "loaded_bytes": loaded}))
    return 0


def run(rounds: int) -> dict[str, Any]:
    """Times, ratios of ours to the others (median over rounds of the ratio), states and peaks."""
    methods = times(rounds)
    for name, row in methods.items():
        print(f"memory: {name}", flush=True)
        row.update(peak(name))
    ours = methods["masked"]["rounds_s"]
    return {
        "tokens": BASE.tokens,
        "density": BASE.density,
        "threads": torch.get_num_threads(),
        "methods": methods,
        "ratios": {
            name: statistics.median(a / b for a, b in zip(ours, row["rounds_s"]))
            for name, row in methods.items()
            if name != "masked"
        },
        "state_ratio": methods["masked"]["state_bytes"] / methods["full"]["state_bytes"],
        "peak_ratio": methods["adapter int4"]["peak_bytes"] / methods["full"]["peak_bytes"],
    }


if __name__ == "__main__":
    sys.exit(child(*sys.argv[1:]))
