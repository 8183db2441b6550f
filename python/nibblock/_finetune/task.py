"""What is trained on: rows, the loss of some of them, and how good a model is on the others."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Optional

import torch
from torch import nn

from nibblock._finetune.data import Order

CHUNK = 128  # tokens whose logits exist at one time
CHUNK_TRAINED = 256  # of a trained head: each chunk makes and adds a gradient of the head's size


Around = Callable[[torch.Tensor], AbstractContextManager]  # held-out rows -> around their forward


def alone(rows: torch.Tensor) -> AbstractContextManager:
    """An `Around` that does nothing."""
    return nullcontext()


class Task:
    """Rows to train on and rows to judge by.

    Attributes:
        name; order: which rows a step sees; figure: the name of what `evaluate` returns first.
    """

    name = "task"
    figure = "loss"
    order: Order

    def batch(self, indices: torch.Tensor) -> Any:
        """The training examples at these positions."""
        raise NotImplementedError  # every task has its own

    def loss(self, model: nn.Module, batch: Any) -> torch.Tensor:
        """The mean loss of a batch, a scalar with gradient."""
        raise NotImplementedError  # every task has its own

    def evaluate(self, model: nn.Module, around: Around = alone) -> dict[str, float]:
        """{"loss": ..., ...} on the held-out rows; the model is in eval mode meanwhile.

        Each forward runs inside `around(positions of its held-out rows)`: a prefix cache.
        """
        raise NotImplementedError  # every task has its own

    def trunk(self, model: nn.Module) -> nn.Module:
        """The module whose forward runs the layers: what a prefix cache is made for."""
        return model


class TextTask(Task):
    """Next-token prediction on packed rows.

    Args:
        train, valid: int64 [rows, seq].
        per_step: rows of a step.
        seed: of the order.
    """

    name = "text"

    def __init__(self, train: torch.Tensor, valid: torch.Tensor, per_step: int, seed: int) -> None:
        if not len(valid):
            raise ValueError(
                "finetune: --valid must leave at least one row of --seq tokens, got none; "
                "give more text or a larger share"
            )
        self.train, self.valid = train, valid
        self.order = Order(len(train), per_step, seed)

    def batch(self, indices: torch.Tensor) -> torch.Tensor:
        return self.train[indices]

    def loss(self, model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
        return next_token_loss(model, batch)

    @torch.no_grad()
    def evaluate(self, model: nn.Module, around: Around = alone) -> dict[str, float]:
        total = 0.0
        for places in torch.arange(len(self.valid)).split(self.order.per_step):
            with around(places):
                total += next_token_loss(model, self.valid[places]).item() * len(places)
        loss = total / len(self.valid)
        return {"loss": loss, "perplexity": math.exp(loss) if loss < 700 else math.inf}

    def trunk(self, model: nn.Module) -> nn.Module:
        return _parts(model)[0]


def _parts(model: nn.Module) -> tuple[nn.Module, nn.Module]:
    """(decoder, head) of a causal language model, LoRA and the like looked through."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    return inner.get_decoder(), inner.get_output_embeddings()


@torch.no_grad()
def check_head(model: nn.Module, rows: torch.Tensor) -> None:
    """Makes sure that head(decoder(x)) is what the model computes, on a few tokens.

    Raises:
        ValueError: it is not (scaled or capped logits): this loss does not fit the model.
    """
    decoder, head = _parts(model)
    part = rows[:1, :8]
    ours = head(decoder(input_ids=part, use_cache=False).last_hidden_state)
    theirs = model(input_ids=part, use_cache=False).logits
    if ours.shape != theirs.shape or not torch.allclose(ours, theirs, rtol=1e-4, atol=1e-4):
        raise ValueError(
            f"finetune: --model must have plain logits (head of the last hidden state), got "
            f"{type(model).__name__}, which changes them"
        )


def next_token_loss(model: nn.Module, rows: torch.Tensor, chunk: int = 0) -> torch.Tensor:
    """Mean cross-entropy of every token given those before it in its row.

    Args:
        model: a causal language model of transformers (with adapters of any kind, or none).
        rows: int64 [batch, seq].
        chunk: tokens whose logits are made at one time, in the forward and for the backward; 0 for
            128, or 256 where the head is trained.
    Returns:
        a scalar; float32. Its gradient reaches the model and a trained head.
    Determinism: the same rows and chunk give the same bits.
    Source: the gradient of a head is made in the forward, chunk by chunk, so that no logits are
        kept: the fused linear cross-entropy of https://arxiv.org/abs/2410.10989.
    """
    decoder, head = _parts(model)
    hidden = decoder(input_ids=rows, use_cache=False).last_hidden_state[:, :-1]
    hidden, labels = hidden.reshape(-1, hidden.shape[-1]), rows[:, 1:].reshape(-1)
    trained = [p for p in head.parameters() if p.requires_grad]
    chunk = chunk or (CHUNK_TRAINED if trained else CHUNK)
    return _HeadLoss.apply(hidden, labels, head, chunk, *trained)


def _head_chunk(hidden, labels, head, wanted, trained):
    """(summed loss of these rows, gradients of it for them and for `trained`).

    A function of its own, so that a chunk's logits, the largest tensor of a step, are gone before
    the next chunk's are made.
    """
    part = hidden.detach().requires_grad_(wanted)
    with torch.set_grad_enabled(wanted):
        scores = head(part).float()
    # Memory is slower than their arithmetic: they become the sum's gradient where they stand.
    values = scores.detach()
    lost = torch.ops.nibblock._softmax_grad_(values, labels).sum()
    return lost, torch.autograd.grad(scores, [part, *trained], values) if wanted else ()


class _HeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, labels, head, chunk, *trained):
        wanted = ctx.needs_input_grad[0] or any(ctx.needs_input_grad[4:])
        total = hidden.new_zeros((), dtype=torch.float32)
        grad = torch.empty_like(hidden) if wanted else None
        sums: list[Optional[torch.Tensor]] = [None] * len(trained)
        for first in range(0, len(hidden), chunk):
            rows = slice(first, first + chunk)
            lost, grads = _head_chunk(hidden[rows], labels[rows], head, wanted, trained)
            total += lost
            if wanted:
                grad[rows] = grads[0]
                sums = [g if s is None else s.add_(g) for s, g in zip(sums, grads[1:])]
        ctx.grads = [grad, *sums]
        ctx.count = len(hidden)
        return total / len(hidden)

    @staticmethod
    def backward(ctx, outer):
        # In place: nothing else holds these, and a copy of a head's gradient is large.
        first, *rest = (None if g is None else g.mul_(outer / ctx.count) for g in ctx.grads)
        ctx.grads = None
        return (first, None, None, None, *rest)
