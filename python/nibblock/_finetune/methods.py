"""How each method prepares a model: what is trained, by which optimiser, and the file it leaves."""

from __future__ import annotations

import importlib
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Callable, Optional

import torch
from torch import nn

from nibblock._finetune.checkpoint import write_tensors
from nibblock._finetune.moving import START
from nibblock._finetune.settings import Settings
from nibblock._finetune.task import Task
from nibblock.nn.fused import shorten_forwards

SCORED = 512  # tokens of a batch that is scored: its whole backward needs memory, a step's may not
Selection = Mapping[str, torch.Tensor]  # layer name -> int32 [Z, 2]


@dataclass
class Prepared:
    """A model ready to be trained.

    Attributes:
        model: what the task calls. optimizer: of everything that is trained.
        selection: the blocks of `masked` and `adapter`, else None. seconds: what choosing took.
        clips: whether the optimiser clips gradients itself.
        save: writes what was trained and returns the bytes on disk.
        notes: lines for the report.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    save: Callable[[Path], int]
    selection: Optional[Selection] = None
    seconds: float = 0.0
    clips: bool = False
    notes: list[str] = field(default_factory=list)

    def trained(self) -> dict[str, nn.Parameter]:
        """Every Parameter that asks for a gradient, by its first name."""
        return {n: p for n, p in self.model.named_parameters() if p.requires_grad}

    def state_bytes(self) -> int:
        """Trained Parameters, their gradients and what the optimiser keeps, at the end of a
        step."""
        tensors = list(self.trained().values())
        tensors += [p.grad for p in tensors if p.grad is not None]
        for state in self.optimizer.state.values():
            tensors += [v for v in state.values() if isinstance(v, torch.Tensor)]
        return sum(t.numel() * t.element_size() for t in tensors)


def prepare(
    model: nn.Module,
    task: Task,
    settings: Settings,
    selection: Optional[Selection] = None,
    keep: tuple[str, ...] = (),
) -> Prepared:
    """Makes a model trainable by `settings.method`, in place where the method allows it.

    Whatever the method, known decoder layers compute what lies between their products in one pass
    forward and one backward: baselines gain as ours do.

    Args:
        model: dense, or with `Int4Linear`s for the method adapter.
        task: whose batches score the blocks.
        settings: the run.
        selection: blocks chosen earlier (a resumed run); None chooses them here.
        keep: name prefixes of modules that every method trains besides (a new classifier head).
    Raises:
        ImportError: peft is needed and not installed. ValueError: as the method's own functions.
    """
    torch.manual_seed(settings.seed)
    shorten_forwards(model)
    build = {
        "full": _full,
        "full-cut": _full,
        "lora": _lora,
        "lora-cut": _lora,
        "shira": _shira,
        "masked": _masked,
        "adapter": _adapter,
    }[settings.method]
    return build(model, task, settings, selection, keep)


def _adamw(model: nn.Module, settings: Settings) -> torch.optim.Optimizer:
    trained = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.AdamW(
        trained, lr=settings.learning_rate, weight_decay=settings.weight_decay, fused=True
    )


def _unfreeze(model: nn.Module, keep: tuple[str, ...]) -> None:
    for name, parameter in model.named_parameters():
        if keep and name.startswith(keep):
            parameter.requires_grad_(True)


# --- everything, or everything above a cut --------------------------------------------------------


def above(cut: str) -> tuple[str, int]:
    """("model.layers", 20) of "model.layers.20.self_attn.q_proj".

    Raises:
        ValueError: a name without a layer's number.
    """
    found = re.match(r"(.*?)\.(\d+)(?:\.|$)", cut)
    if not found:
        raise ValueError(
            f"finetune: the cut must name a numbered layer, got {cut!r}; "
            f"run it beside a method whose selection starts above the first layer"
        )
    return found[1], int(found[2])


def _full(model, task, settings, selection, keep) -> Prepared:
    model.requires_grad_(True)
    notes = []
    if settings.method == "full-cut":
        stack, index = above(settings.cut)
        model.requires_grad_(False)
        for layer in model.get_submodule(stack)[index:]:
            layer.requires_grad_(True)
        _unfreeze(model, keep)
        notes.append(f"trains {stack}.{index} and what is above it in the stack")

    def save(path: Path) -> int:
        return write_tensors(path, dict(model.named_parameters()))

    return Prepared(model, _adamw(model, settings), save, notes=notes)


# --- peft -----------------------------------------------------------------------------------------


def _peft(method: str) -> ModuleType:
    try:
        return importlib.import_module("peft")
    except ImportError as error:
        raise ImportError(
            f"finetune: --method {method} needs the peft package, which is not installed; "
            "pip install nibblock[finetune]"
        ) from error


def _linear_names(model: nn.Module, keep: tuple[str, ...], head: bool = False) -> list[str]:
    """Linears of the layers; not the output head and not what is trained anyway."""
    out = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and (head or module is not out)
        and not (keep and name.startswith(keep))
    ]


def _targets(model: nn.Module, settings: Settings, keep: tuple[str, ...]) -> list[str]:
    names = _linear_names(model, keep)
    if settings.method == "lora-cut":
        stack, index = above(settings.cut)
        return [name for name in names if _is_above(name, stack, index)]
    return names


def _lora(model, task, settings, selection, keep) -> Prepared:
    peft = _peft(settings.method)
    config = peft.LoraConfig(
        r=settings.rank,
        lora_alpha=2 * settings.rank,
        lora_dropout=0.0,
        target_modules=_targets(model, settings, keep),
    )
    return _with_peft(peft, model, config, settings, keep)


def _shira(model, task, settings, selection, keep) -> Prepared:
    peft = _peft(settings.method)
    config = peft.ShiraConfig(
        r=settings.rank, target_modules=_targets(model, settings, keep), random_seed=settings.seed
    )
    return _with_peft(peft, model, config, settings, keep)


def _with_peft(peft, model, config, settings, keep) -> Prepared:
    wrapped = peft.get_peft_model(model, config)
    _unfreeze(model, keep)

    def save(path: Path) -> int:
        tensors = peft.get_peft_model_state_dict(wrapped, save_embedding_layers=False)
        tensors.update((n, p) for n, p in model.named_parameters() if keep and n.startswith(keep))
        return write_tensors(path, tensors)

    return Prepared(wrapped, _adamw(wrapped, settings), save)


# --- blocks ---------------------------------------------------------------------------------------


def choose(
    model: nn.Module, task: Task, settings: Settings, keep: tuple[str, ...]
) -> tuple[Selection, float]:
    """(blocks of each layer, seconds it took). With `settings.cut`, the blocks that the density
    stands for are all chosen from there upwards: as many as without."""
    import nibblock as nb
    from nibblock.sparse import even_blocks

    names = _linear_names(model, keep)
    modules = dict(model.named_modules())
    sizes = {n: (modules[n].out_features, modules[n].in_features) for n in names}
    density = settings.density
    if settings.cut:
        every = _block_total(sizes, settings.block)
        stack, index = above(settings.cut)
        sizes = {n: s for n, s in sizes.items() if _is_above(n, stack, index)}
        density = min(1.0, density * every / max(1, _block_total(sizes, settings.block)))
    if settings.moves == "progressive":
        density *= START
    begun = time.perf_counter()
    if settings.select == "even":
        found: Selection = {
            n: even_blocks(*size, settings.block, density) for n, size in sizes.items()
        }
    else:
        count = min(settings.batches, task.order.steps_per_epoch)
        rows = max(1, SCORED // settings.seq)
        found = nb.select_blocks(
            model,
            [task.batch(task.order.indices(step)[:rows]) for step in range(count)],
            task.loss,
            density=density,
            block=settings.block,
            method=settings.select,
            mode=settings.mode,
            where=list(sizes),
            spread=settings.spread or None,
            budget=settings.budget or None,
            seed=settings.seed,
        )
    if settings.moves:  # other layers may get blocks later
        none = torch.zeros(0, 2, dtype=torch.int32)
        found = {name: found.get(name, none) for name in sizes}
    return found, time.perf_counter() - begun


def _block_total(sizes: dict[str, tuple[int, int]], block: int) -> int:
    return sum(-(-rows // block) * -(-columns // block) for rows, columns in sizes.values())


def _is_above(name: str, stack: str, index: int) -> bool:
    return name.startswith(f"{stack}.") and above(name)[1] >= index


def _chosen(model, task, settings, selection, keep) -> tuple[Selection, float]:
    return (selection, 0.0) if selection is not None else choose(model, task, settings, keep)


def _adapter(model, task, settings, selection, keep) -> Prepared:
    import nibblock as nb

    chosen, seconds = _chosen(model, task, settings, selection, keep)
    nb.add_adapters(model, nb.AdapterConfig(block=settings.block), blocks=chosen)
    _unfreeze(model, keep)
    muon = settings.optimizer == "muon"
    optimizer = _of_blocks(model, settings) if muon else _adamw(model, settings)

    def save(path: Path) -> int:
        nb.save(model, path)
        return path.stat().st_size

    return Prepared(model, optimizer, save, chosen, seconds, clips=muon)


def _of_blocks(model: nn.Module, settings: Settings) -> torch.optim.Optimizer:
    import nibblock as nb

    kind = nb.optim.MaskedMuon if settings.optimizer == "muon" else nb.optim.MaskedAdamW
    return kind(
        nb.trainable_parameters(model),
        lr=settings.learning_rate,
        weight_decay=settings.weight_decay,
        max_norm=settings.max_norm or None,
    )


def _masked(model, task, settings, selection, keep) -> Prepared:
    import nibblock as nb

    chosen, seconds = _chosen(model, task, settings, selection, keep)
    nb.sparse_update(model, chosen, block=settings.block)
    _unfreeze(model, keep)
    optimizer = _of_blocks(model, settings)

    def save(path: Path) -> int:
        nb.save(model, path)
        return path.stat().st_size

    return Prepared(model, optimizer, save, chosen, seconds, clips=True)
