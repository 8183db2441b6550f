"""Kills fine-tuning runs in the middle of a checkpoint and resumes them; a script, run by
test_finetune_resume.py.

    python finetune_kill.py SETTINGS.json FOLDER FIRST LAST

Counts what a checkpoint does to the file system (flush, rename, unlink, delete). A run of its own
for each event from FIRST to LAST dies by SIGKILL just before that event, and is then resumed. Each
run is a fork of this process, which has imported everything and computed nothing.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import stat
import sys
from pathlib import Path

import torch
from nibblock._finetune import worker
from nibblock._finetune.settings import Settings

EVENTS = ((os, "fsync"), (os, "replace"), (os, "unlink"), (shutil, "rmtree"))


def die_at(event: int) -> list[int]:
    """Patches the file system's functions; from now on the event with that number is the last."""
    count = [0]
    for owner, name in EVENTS:
        original = getattr(owner, name)

        def patched(*args, _original=original, _name=name, **kwargs):
            if count[0] == event:
                if _name == "fsync" and stat.S_ISREG(os.fstat(args[0]).st_mode):
                    os.ftruncate(args[0], os.fstat(args[0]).st_size // 2)  # half of it written
                os.kill(os.getpid(), signal.SIGKILL)
            count[0] += 1
            return _original(*args, **kwargs)

        setattr(owner, name, patched)
    return count


def forked(call) -> int:
    """Exit status of a child that runs call(); -9 where it was killed."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            call()
            code = 0
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def finish(settings: Settings, folder: Path, resume: bool) -> None:
    events = die_at(-1)
    result = worker.run(settings, folder, resume, progress=False)
    worker.write_result(folder, {**result, "events": events[0]})


def main(settings_file: str, out: str, first: str, last: str) -> int:
    settings = Settings.from_json(json.loads(Path(settings_file).read_text()))
    torch.set_num_threads(1)
    worker.import_everything(settings)
    whole = Path(out) / "whole"
    whole.mkdir(parents=True)
    if forked(lambda: finish(settings, whole, False)):
        return 1
    for event in range(int(first), int(last)):
        folder = Path(out) / f"killed-{event}"
        folder.mkdir()

        def until(event=event, folder=folder):
            die_at(event)
            worker.run(settings, folder, False, progress=False)

        if forked(until) != -signal.SIGKILL:
            print(f"event {event}: the run was not killed", file=sys.stderr)
            return 1
        if forked(lambda folder=folder: finish(settings, folder, True)):
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
