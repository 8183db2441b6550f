"""Which paths are language models, or become one on a base; and how they are loaded."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional

import torch

from nibblock import _adapter_files, _sparse_files
from nibblock._report_cli.describe import describe
from nibblock._report_cli.facts import Facts, FolderFacts, GGUFFacts, ModelFacts, TrainedFacts
from nibblock._report_cli.folder import MODEL, weight_files
from nibblock._report_cli.tensor_file import open_file
from nibblock._report_cli.trained_file import read_records

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Candidate:
    """A model to be measured; plain values, for another process.

    Attributes:
        path: what the user named. base: the GGUF file or transformers folder of its architecture,
            weights and tokenizer.
        form: of the base: "exact" (`load_gguf`), "empty" (no weights: a file has them all), "dense
            DTYPE", or "int4 GROUP" (dense float32 accelerated).
        files: of `nibblock.save`, loaded onto that in order.
        disk_bytes: of everything that is read.
    """

    path: str
    base: str
    form: str
    files: tuple[str, ...]
    disk_bytes: int


def candidates(
    paths: list[str], base: Optional[str]
) -> tuple[list[Candidate], list[tuple[str, str]]]:
    """The models that the paths are, and (path, why not) for the others.

    Raises:
        FileNotFoundError, ValueError, ImportError: as `describe`; a base that is no model; an
        adapter whose base is another.
    """
    below = None if base is None else _standing(base, describe(base))
    if isinstance(below, str):
        raise ValueError(f"report: --base must be a causal language model, got {base!r}: {below}")
    found, left = [], []
    for path in paths:
        facts = describe(path)
        if isinstance(facts, (ModelFacts, TrainedFacts)):
            if below is None:
                left.append((path, "it stands on a base; name that with --base"))
            else:
                found.append(_on_base(path, facts, below))
            continue
        one = _standing(path, facts)
        if isinstance(one, str):
            left.append((path, one))
        else:
            found.append(one)
    return found, left


def _standing(path: str, facts: Facts) -> Candidate | str:
    """The model that a path is by itself, or why it is none."""
    if isinstance(facts, GGUFFacts):
        if facts.refusal:
            return f"load_gguf does not build it: it must {facts.refusal.partition(' must ')[2]}"
        return Candidate(path, path, "exact", (), facts.file_bytes)
    if not isinstance(facts, FolderFacts):
        return "no GGUF file or transformers folder"
    if facts.architecture and not _is_causal(facts.architecture):
        return f"{facts.architecture} is no causal language model"
    if facts.saved is not None:
        return Candidate(path, path, "empty", (str(Path(path) / MODEL),), facts.saved.file_bytes)
    if not weight_files(Path(path)):
        return "the folder holds no weights"
    return Candidate(path, path, f"dense {_own_dtype(facts)}", (), facts.file_bytes)


def _is_causal(architecture: str) -> bool:
    from nibblock.integrations.transformers import require_transformers

    require_transformers("report")
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as names

    return architecture in set(names.values())


def _own_dtype(facts: FolderFacts) -> str:
    known = {name: size for name, size in facts.dtypes.items() if name in _DTYPES}
    return max(known, key=known.get) if known else "float32"


def _on_base(path: str, facts: Facts, base: Candidate) -> Candidate:
    if isinstance(facts, ModelFacts):  # it replaces every weight of the base
        form = "exact" if Path(base.base).is_file() else "empty"
        return Candidate(path, base.base, form, (path,), facts.file_bytes)
    form = base.form if base.form == "empty" else _matching_form(path, base)
    return Candidate(path, base.base, form, (*base.files, path), base.disk_bytes + facts.file_bytes)


def _matching_form(path: str, base: Candidate) -> str:
    """How the base must be loaded for the file to be of it: its fingerprints tell."""
    file = open_file(Path(path))
    what, records, _ = read_records(file)
    if not records:
        return base.form
    name, record = next(iter(records.items()))
    if what == _sparse_files.KIND:
        return f"dense {record['dtype']}" if record["dtype"] in _DTYPES else "dense float32"
    forms = ["exact"] if Path(base.base).is_file() else [base.form, "int4 32", "int4 128"]
    forms = list(dict.fromkeys([*forms, "dense float32", "dense bfloat16", "dense float16"]))
    for form in forms:
        layer = dict(load_base(base.base, form).named_modules()).get(name)
        if isinstance(layer, torch.nn.Linear):
            if _adapter_files.fingerprint(layer) == record["base"]:
                return form
    raise ValueError(
        f"report: {Path(path).name} must be trained on --base, got another weight at {name} "
        f"(looked at: {', '.join(forms)})"
    )


# --- loading --------------------------------------------------------------------------------------


def load(candidate: Candidate) -> torch.nn.Module:
    """The model, in eval mode.

    Raises:
        ValueError, OSError, ImportError: as `load_gguf`, transformers and `load`.
    """
    import nibblock as nb

    model = load_base(candidate.base, candidate.form)
    for file in candidate.files:
        nb.load(file, model)
    return model.eval()


def load_base(path: str, form: str) -> torch.nn.Module:
    """The base alone, in that form."""
    import nibblock as nb
    from nibblock.formats.gguf import load_gguf_dense
    from nibblock.integrations.transformers import empty_folder, load_folder

    kind, _, value = form.partition(" ")
    if form == "exact":
        return nb.load_gguf(path)
    if form == "empty":
        return empty_folder(path)
    dtype = _DTYPES[value] if kind == "dense" else torch.float32
    model = load_gguf_dense(path, dtype) if Path(path).is_file() else load_folder(path, dtype)
    if kind == "int4":
        nb.accelerate(model, nb.Int4Config(group_size=int(value)), progress=False)
    return model


def load_tokenizer(candidate: Candidate) -> Any:
    """The tokenizer beside the base.

    Raises:
        ValueError: there is none.
    """
    from nibblock.formats import gguf
    from nibblock.integrations.transformers import load_folder_tokenizer

    path = Path(candidate.base)
    if path.is_file():
        return gguf.load_tokenizer(path)
    try:
        return load_folder_tokenizer(path)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"report: {path.name} must hold a tokenizer, got a folder without one that can be "
            f"loaded; tokenizer.save_pretrained(folder) puts one there"
        ) from error
