"""The facts of folders: transformers models, and runs of fine-tuning."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, Optional

import torch

from nibblock._accelerate_plan import plan
from nibblock._finetune import checkpoint
from nibblock._finetune.worker import RESULT, SETTINGS
from nibblock._report_cli.facts import Facts, FinetuneFacts, FolderFacts, ModelFacts, RunFacts
from nibblock._report_cli.model_file import _FLOATS, describe_model
from nibblock._report_cli.tensor_file import TensorFile, open_file

REPORT = "report.json"
MODEL = "model.safetensors"  # where `convert` puts it


def describe_folder(given: str, path: Path) -> Facts:
    """The facts of a folder; see `describe`."""
    if (path / "config.json").is_file():
        return _describe_model_folder(given, path)
    if (path / SETTINGS).is_file():
        return FinetuneFacts(given, _folder_bytes(path), (_run(path),))
    found = sorted(place.parent for place in path.glob(f"*/{SETTINGS}"))
    if found:
        order = _order(path)
        found.sort(key=lambda place: order.get(place.name, len(order)))
        return FinetuneFacts(given, _folder_bytes(path), tuple(_run(place) for place in found))
    raise ValueError(
        f"report: {path.name} must hold config.json (a transformers model) or {SETTINGS} (a run of "
        f"finetune), got a folder with neither"
    )


def _folder_bytes(path: Path) -> int:
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; ValueError names the file."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(
            f"report: {path.parent.name}/{path.name} must be whole JSON, got: {error}"
        ) from error
    if not isinstance(value, dict):
        raise ValueError(
            f"report: {path.parent.name}/{path.name} must be a JSON object, got "
            f"{type(value).__name__}"
        )
    return value


# --- transformers ---------------------------------------------------------------------------------


def weight_files(path: Path) -> list[Path]:
    """The files of weights of a transformers folder: safetensors, else torch's."""
    return sorted(path.glob("*.safetensors")) or sorted(path.glob("pytorch_model*.bin"))


def saved_model(path: Path) -> Optional[TensorFile]:
    """The folder's file of `nibblock.save`, as `convert` makes it; None where it has another."""
    if not (path / MODEL).is_file():
        return None
    file = open_file(path / MODEL)
    return file if file.ours else None


def _describe_model_folder(given: str, path: Path) -> FolderFacts:
    config = read_json(path / "config.json")
    names = config.get("architectures")
    architecture = names[0] if isinstance(names, list) and names else ""
    files = weight_files(path)
    dtypes: dict[str, int] = {}
    for file in files:
        if file.suffix == ".safetensors":
            for tensor in open_file(file).tensors.values():
                name = _FLOATS.get(tensor.dtype, tensor.dtype)
                dtypes[name] = dtypes.get(name, 0) + tensor.bytes
    size = sum(file.stat().st_size for file in files)
    ours = saved_model(path)
    if ours is not None:
        saved: ModelFacts = describe_model(str(path / MODEL), ours)
        saved = replace(saved, path=f"{given.rstrip('/')}/{MODEL}")
        count = saved.by_kind()["all"]["weights"]
        return FolderFacts(given, size, architecture, count, dtypes, saved=saved)
    model = _on_meta(path, architecture, _main_dtype(dtypes, config))
    count = sum(p.numel() for p in model.parameters())
    return FolderFacts(given, size, architecture, count, dtypes, plan=plan(model))


def _main_dtype(dtypes: dict[str, int], config: dict[str, Any]) -> torch.dtype:
    """Of most of the weights; where no header says it, of the configuration, else float32."""
    named = {name: size for name, size in dtypes.items() if name in _FLOATS.values()}
    name = max(named, key=named.get) if named else config.get("dtype") or config.get("torch_dtype")
    return getattr(torch, str(name)) if name in _FLOATS.values() else torch.float32


def _on_meta(path: Path, architecture: str, dtype: torch.dtype) -> torch.nn.Module:
    from nibblock.integrations.transformers import last_line, require_transformers

    transformers = require_transformers("report")
    try:
        config = transformers.AutoConfig.from_pretrained(path, local_files_only=True)
        kind = getattr(transformers, architecture, None) if architecture else None
        build = transformers.AutoModel.from_config if kind is None else kind._from_config
        with torch.device("meta"):
            return build(config, dtype=dtype)
    except Exception as error:  # configurations fail in ways of their own
        raise ValueError(
            f"report: {path.name} must hold a configuration that transformers can build, got: "
            f"{last_line(error)}"
        ) from error


# --- fine-tuning ----------------------------------------------------------------------------------


def _order(path: Path) -> dict[str, int]:
    """Method -> its place in the run's own report; empty before there is one."""
    if not (path / REPORT).is_file():
        return {}
    try:
        results = read_json(path / REPORT)["results"]
        return {result["settings"]["method"]: i for i, result in enumerate(results)}
    except (KeyError, TypeError) as error:
        raise ValueError(
            f"report: {path.name}/{REPORT} must hold the results of finetune, got: {error!r}"
        ) from error


def _run(path: Path) -> RunFacts:
    from nibblock._finetune import report

    settings = read_json(path / SETTINGS)
    result = read_json(path / RESULT) if (path / RESULT).is_file() else None
    if result is not None:
        try:
            report.table([result])
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(
                f"report: {path.name}/{RESULT} must hold the figures of finetune, got: {error!r}"
            ) from error
    file = next((path / n for n in ("trained.safetensors", MODEL) if (path / n).is_file()), None)
    step, size = _newest_checkpoint(path / "checkpoints")
    return RunFacts(
        name=path.name,
        state="not done" if result is None else "done",
        settings=settings,
        checkpoint_step=step,
        checkpoint_bytes=size,
        file="" if file is None else file.name,
        file_bytes=0 if file is None else file.stat().st_size,
        result=result,
    )


def _newest_checkpoint(folder: Path) -> tuple[Optional[int], int]:
    """(step, bytes) of the newest one whose files have the sizes of its manifest. Their hashes are
    what a resumed run looks at; here nothing of that size is read."""
    for place in reversed(checkpoint._folders(folder)):
        try:
            manifest = json.loads((place / checkpoint.MANIFEST).read_bytes())
            sizes = {name: fact["bytes"] for name, fact in manifest["files"].items()}
            if all((place / name).stat().st_size == size for name, size in sizes.items()):
                return int(manifest["step"]), sum(sizes.values())
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            continue  # not whole: an older one may be
    return None, 0
