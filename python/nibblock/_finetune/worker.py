"""One run in a process of its own: `python -m nibblock._finetune.worker FOLDER`.

FOLDER/settings.json says what to do; FOLDER/result.json is there when it is done. A process of its
own, because the peak of a process's memory is only one run's where no other ran in it.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Callable, Optional

import torch

from nibblock._files import _write as write_whole
from nibblock._finetune import checkpoint as files
from nibblock._finetune.settings import Settings
from nibblock._measure import memory

RESULT, SETTINGS, LOCK = "result.json", "settings.json", "lock"


def import_everything(settings: Settings) -> None:
    """What the run will import anyway, before its memory is counted."""
    import transformers
    import transformers.models.llama.modeling_llama

    import nibblock  # noqa: F401

    transformers.utils.logging.disable_progress_bar()  # the loop's own bar is the one to see
    if settings.method in ("lora", "lora-cut", "shira"):
        from nibblock._finetune.methods import _peft

        _peft(settings.method)


def load_model(settings: Settings) -> tuple[torch.nn.Module, Any]:
    """(model in eval mode, tokenizer): a GGUF file or a transformers folder (quantised ones too),
    dense float32 or int4, which computes as the settings say.

    Raises:
        FileNotFoundError: no such model. ValueError, ImportError: as the loaders.
    """
    import nibblock as nb
    from nibblock._demo import smollm2_path
    from nibblock.formats.gguf import load_gguf_dense, load_tokenizer
    from nibblock.formats.quantized import is_quantized, load_quantized_dense
    from nibblock.integrations.transformers import load_folder, load_folder_tokenizer

    path = smollm2_path() if settings.model == "smollm2" else Path(settings.model)
    if not path.exists():
        raise FileNotFoundError(
            f"finetune: --model must be a file or folder that exists, got {settings.model!r}"
        )
    packed = {"compute": settings.compute} if settings.int4 else {}
    if path.is_file():
        load = nb.load_gguf if settings.int4 else load_gguf_dense
        return load(path, dtype=torch.float32, **packed), load_tokenizer(path)
    if is_quantized(path):
        load = nb.load_quantized if settings.int4 else load_quantized_dense
        return load(path, dtype=torch.float32, **packed), load_folder_tokenizer(path)
    model = load_folder(path, torch.float32)
    if settings.int4:
        nb.accelerate(model, nb.Int4Config(group_size=32, **packed), progress=False)
    return model, load_folder_tokenizer(path)


def load_task(settings: Settings, model: torch.nn.Module, tokenizer: Any):
    from nibblock._finetune import data
    from nibblock._finetune.task import TextTask, check_head

    blocks = data.blocks_of(data.read_documents(settings.data))
    train, valid = data.split(blocks, settings.valid, settings.seed)
    rows = [data.pack(tokenizer, part, settings.seq) for part in (train, valid)]
    task = TextTask(rows[0], rows[1][: settings.valid_rows], settings.rows_per_step, settings.seed)
    check_head(model, task.valid)
    return task


def build(settings: Settings):
    """(model, task, names of modules that every method trains) of a run on text."""
    model, tokenizer = load_model(settings)
    return model, load_task(settings, model, tokenizer), ()


def run(
    settings: Settings,
    folder: Path,
    resume: bool,
    progress: Any = None,
    build: Callable[[Settings], tuple] = build,
) -> dict[str, Any]:
    """Trains and returns the figures; also writes what was trained into the folder.

    Args:
        settings, folder, resume, progress: as the command line says.
        build: settings -> (model, task, keep), for other beds than text.
    """
    from nibblock._finetune.loop import train
    from nibblock._finetune.methods import prepare
    from nibblock._measure import weight_count
    from nibblock.sparse import Selection

    if settings.threads:
        torch.set_num_threads(settings.threads)
    import_everything(settings)
    before = memory("VmRSS")
    found = _checkpoint(settings, folder) if resume else None
    start = time.perf_counter()
    model, task, keep = build(settings)
    weights = weight_count(model)
    loading = time.perf_counter() - start
    prepared = prepare(model, task, settings, None if found is None else found.blocks, keep)
    if found is not None:
        prepared.seconds = found.facts["select_seconds"]
    elif isinstance(prepared.selection, Selection):
        prepared.selection.save(folder / "selection.safetensors")
        prepared.notes.append(str(prepared.selection).splitlines()[-1])
    record = train(task, prepared, settings, folder, found, progress)
    peak = memory("VmHWM") - before
    name = "model" if settings.method.startswith("full") else "trained"
    file_bytes = prepared.save(folder / f"{name}.safetensors")
    first = record.evaluations[0]
    best = next(e for e in record.evaluations if e["step"] == record.best)
    lowest = _lowest(prepared, task)
    return {
        "settings": settings.to_json(),
        "threads": torch.get_num_threads(),
        "weights": weights,
        "rows": {"train": task.order.rows, "valid": len(task.valid)},
        "trained": sum(p.numel() for p in prepared.trained().values()),
        "lowest": lowest,
        "before": first,
        "best": best,
        "steps": record.step,
        "stopped": record.stopped,
        "losses": record.losses,
        "evaluations": record.evaluations,
        "seconds": {
            "load": loading,
            "select": prepared.seconds,
            "train": record.seconds,
            "total": prepared.seconds + record.seconds,
            **{f"train {k}": v for k, v in record.phases.items()},
        },
        "peak_bytes": peak,
        "imports_bytes": before,
        "state_bytes": record.state_bytes,
        "file_bytes": file_bytes,
        "notes": prepared.notes,
    }


def _lowest(prepared, task) -> Optional[str]:
    """The lowest trained layer, as a base model names it; None where nothing is in a stack."""
    from nibblock.sparse.prefix_cache import find_boundary

    model = prepared.model
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    try:
        stack, index = find_boundary(inner)
    except ValueError:
        return None
    return f"{stack}.{index}"


def _checkpoint(settings: Settings, folder: Path) -> Optional[files.Checkpoint]:
    found = files.load_latest(folder / "checkpoints")
    if found is not None:
        other = settings.differs(found.facts["settings"])
        if other is not None:
            raise ValueError(
                f"finetune: --resume must come with the run's own --{other.replace('_', '-')} "
                f"({found.facts['settings'].get(other)}), got {settings.to_json()[other]}"
            )
    return found


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Holds the folder for this process: a run whose parent was killed may still be going on.

    Raises:
        ValueError: another process holds it.
    """
    try:
        import fcntl
    except ImportError:  # not a POSIX system: there are no such locks
        yield
        return
    with open(folder / LOCK, "w", encoding="ascii") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # gone with the process
        except BlockingIOError as error:
            raise ValueError(
                f"finetune: --out must not be in use, got a run at work in {folder.name}; "
                f"wait for it or end it"
            ) from error
        yield


def main(argv: list[str]) -> int:
    """argv: FOLDER, then "--resume" and "--quiet" where wanted."""
    folder = Path(argv[0])
    settings = Settings.from_json(json.loads((folder / SETTINGS).read_text(encoding="utf-8")))
    try:
        with alone(folder):
            result = run(settings, folder, "--resume" in argv, False if "--quiet" in argv else None)
    except (ImportError, OSError, ValueError) as error:
        if sys.flags.dev_mode:
            raise
        text = str(error)
        print(text if text.startswith("finetune") else f"finetune: {text}", file=sys.stderr)
        return 2
    write_result(folder, result)
    return 0


def write_result(folder: Path, result: dict[str, Any]) -> None:
    write_whole(folder / RESULT, (json.dumps(result, indent=1) + "\n").encode())


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
