"""`PrefixCache`: what enters the lowest trained layer, computed once for each example."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Callable, Optional, Union

import torch
from torch import nn

from nibblock.sparse._row_store import RowStore

_OP = "PrefixCache"


class PrefixCache:
    """Reuses the activations that enter the lowest trained layer of a model, epoch after epoch.

        h_b(example) = layer_{b-1}(... layer_0(embed(example)))      frozen, so the same every epoch

    The model must hold its layers in an `nn.ModuleList` that runs once, in order, and passes one
    hidden state [batch, ...] from layer to layer (Llama, BERT and most transformers). Inside
    `batch`, layers below b run without gradient and their result is kept; when every example of a
    batch is known, they do nothing and the kept rows go into layer b. Everything in front of the
    stack (embeddings) still runs. It does not matter what is trained above: blocks, LoRA, or all.

    Args:
        model: the module that is called; it is changed only inside `batch`.
        boundary: the name of the lowest trained layer, or of anything inside it; None takes the
            lowest layer with a Parameter that asks for a gradient.
        max_bytes: bytes that the rows may take; examples beyond are computed every time.
        folder: keep the rows in an unnamed file there, mapped for each read; None keeps them in
            memory.
    Attributes:
        index: b. stack: name of the `nn.ModuleList`. hits, misses: examples that were reused and
        computed. stale: how often a change below b made it forget everything. bytes: in use.
    Raises:
        TypeError: model is no module, or max_bytes no int. ValueError: no trained layer in a stack,
        trained layers in several stacks, a boundary that is not in one, b = 0 (there is no prefix),
        something trained below it, or max_bytes below 0. OSError: as the file system says.
        In a forward: ValueError where the prefix is random (dropout in training mode is refused,
        never switched off), is trained, is not run once and in order, or uses a key-value cache.
    Gradients: as without it; the prefix has none. Determinism and numerics: the rows are copies, so
        results have the same bits as without the cache whenever an example's rows do not depend on
        its neighbours in the batch; grouping examples in the same batches every epoch makes sure.
        A Parameter or buffer of the prefix that is written in place or replaced empties the cache;
        writes through `.data` are not seen. An example whose input to layer 0 has other bits than
        when it was kept (another text under the same number, a changed embedding) is computed anew.
    Source: freezing and caching of early layers as in Egeria, https://arxiv.org/abs/2201.06227.
    Example:
        >>> with nibblock.sparse.PrefixCache(model, max_bytes=1 << 30) as cache:
        ...     for ids, rows in loader:  # ids: one number for each example of the batch
        ...         with cache.batch(ids):
        ...             loss = loss_fn(model, rows)
        ...         loss.backward()
    """

    def __init__(
        self,
        model: nn.Module,
        boundary: Optional[str] = None,
        max_bytes: int = 1 << 30,
        folder: Optional[Union[str, os.PathLike]] = None,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"{_OP}: model must be an nn.Module, got {type(model).__name__}")
        if isinstance(max_bytes, bool) or not isinstance(max_bytes, int):
            raise TypeError(f"{_OP}: max_bytes must be int, got {type(max_bytes).__name__}")
        if max_bytes < 0:
            raise ValueError(f"{_OP}: max_bytes must be at least 0, got {max_bytes}")
        self.stack, self.index = find_boundary(model, boundary)
        if self.index == 0:
            raise ValueError(
                f"{_OP}: boundary must lie above the first layer, got {self.stack}.0; "
                "there is no frozen prefix to keep"
            )
        self._model = model
        self._layers = list(model.get_submodule(self.stack))[: self.index]
        self._check_frozen()
        self._tuples: list[bool] = [False] * self.index
        self._state = self._versions()
        self._store = RowStore(max_bytes, folder)
        self._run: Optional[_Run] = None
        self.hits = self.misses = self.stale = 0

    # --- what it is ------------------------------------------------------------------------------

    @property
    def bytes(self) -> int:
        """Bytes of the kept rows."""
        return self._store.bytes

    def __len__(self) -> int:
        return len(self._store)

    def __repr__(self) -> str:
        return (
            f"PrefixCache({self.stack}.0..{self.index - 1}, {len(self)} examples, "
            f"{self.bytes / 1e6:.1f} of {self._store.max_bytes / 1e6:.1f} MB, {self.hits} reused, "
            f"{self.misses} computed)"
        )

    def clear(self) -> None:
        """Forgets every example."""
        self._store.clear()
        self._state = self._versions()

    def close(self) -> None:
        """Frees the memory or the file; the cache then keeps nothing more."""
        self._store.close()

    def __enter__(self) -> PrefixCache:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # --- one batch -------------------------------------------------------------------------------

    @contextmanager
    def batch(self, ids: Union[Sequence[int], torch.Tensor]) -> Iterator[None]:
        """Inside, one forward of the model on these examples uses or fills the cache.

        Args:
            ids: int [batch], one number for each row of the batch; the same number must always
                stand for the same tokens, mask and padding.
        Raises:
            ValueError: ids repeat or are none; another `batch` is open; see also the class.
        """
        keys = [int(i) for i in ids]
        if not keys or len(set(keys)) != len(keys):
            raise ValueError(f"{_OP}: ids must be distinct numbers, at least one, got {keys}")
        if self._run is not None:
            raise ValueError(f"{_OP}: batch must be closed before another is opened, got two")
        self._check_frozen()
        state = self._versions()
        if state != self._state:
            self.stale += len(self._store) > 0
            self.clear()
        self._run = _Run(keys, _random_state())
        handle = self._model.register_forward_pre_hook(self._begin)
        before = [layer.__dict__.get("forward") for layer in self._layers]
        try:
            for index, layer in enumerate(self._layers):
                layer.forward = self._instead(index, layer.forward)
            yield
        finally:
            self._run = None
            handle.remove()
            for layer, own in zip(self._layers, before):
                if own is None:
                    del layer.forward  # the class's is seen again
                else:
                    layer.forward = own

    def _begin(self, *_: object) -> None:
        if self._run is not None:
            self._run.random = _random_state()

    def _instead(self, index: int, original: Callable[..., Any]) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            run = self._run
            if run is None:  # a recomputation after the batch was closed
                return original(*args, **kwargs)
            hidden = args[0] if args else kwargs.get("hidden_states")
            self._check_call(run, index, hidden, kwargs)
            if index == 0:
                run.marked = hidden.requires_grad and torch.is_grad_enabled()
                self._look_up(run, hidden)
            run.next = index + 1
            last = run.next == len(self._layers)
            if run.found is not None:
                out = run.found.requires_grad_(run.marked) if last else hidden
                return (out,) if self._tuples[index] else out
            with torch.no_grad():
                result = original(*args, **kwargs)
            self._tuples[index] = isinstance(result, tuple)
            out = result[0] if isinstance(result, tuple) and len(result) == 1 else result
            if not isinstance(out, torch.Tensor) or out.dim() < 1 or len(out) != len(run.keys):
                raise ValueError(
                    f"{_OP}: {self.stack}.{index} must return one hidden state of "
                    f"{len(run.keys)} rows, got {_describe(result)}"
                )
            if last:
                self._keep(run, out)
                out.requires_grad_(run.marked)
            return result

        return forward

    def _check_call(self, run: _Run, index: int, hidden: object, kwargs: dict[str, Any]) -> None:
        name = f"{self.stack}.{index}"
        if index != run.next:
            raise ValueError(
                f"{_OP}: {self.stack} must run once and in order inside a batch, got layer {index} "
                f"where {run.next} was due; open a batch for every forward"
            )
        if not isinstance(hidden, torch.Tensor) or hidden.dim() < 1:
            raise ValueError(f"{_OP}: {name} must be given a hidden state, got {_describe(hidden)}")
        if len(hidden) != len(run.keys):
            raise ValueError(
                f"{_OP}: ids must be {len(hidden)} numbers, one a row of the batch, got "
                f"{len(run.keys)}"
            )
        if kwargs.get("past_key_values") is not None:
            raise ValueError(
                f"{_OP}: {name} must run without a key-value cache, got one; pass use_cache=False"
            )
        if index == 0 and _trained(hidden):
            raise ValueError(
                f"{_OP}: everything in front of {self.stack}.{self.index} must be frozen, got a "
                f"Parameter that is trained in front of {name}"
            )

    def _look_up(self, run: _Run, hidden: torch.Tensor) -> None:
        run.stamps = _stamps(hidden)
        rows = [self._store.find(key) for key in run.keys]
        first = rows[0]
        for row, stamp in zip(rows, run.stamps):
            if row is None or row.stamp != stamp or row[1:3] != first[1:3]:
                self.misses += len(rows)
                return
        self.hits += len(rows)
        out = torch.empty(len(rows), *first.shape, dtype=first.dtype)
        for row, target in zip(rows, out):
            self._store.read(row, target)
        run.found = out.to(hidden.device)

    def _keep(self, run: _Run, out: torch.Tensor) -> None:
        if _random_state() != run.random:
            raise ValueError(
                f"{_OP}: everything in front of {self.stack}.{self.index} must be deterministic, "
                f"got random numbers drawn there{self._dropout()}; set its dropout to 0 or put it "
                f"in eval mode"
            )
        if self._versions() != self._state:
            raise ValueError(
                f"{_OP}: {self.stack}.0..{self.index - 1} must not change in a forward, got a "
                f"Parameter or buffer written there; put the prefix in eval mode"
            )
        for key, row, stamp in zip(run.keys, out, run.stamps):
            self._store.put(key, row, stamp)

    # --- the prefix ------------------------------------------------------------------------------

    def _dropout(self) -> str:
        for index, layer in enumerate(self._layers):
            for name, module in layer.named_modules():
                if isinstance(module, nn.modules.dropout._DropoutNd):
                    if module.training and module.p > 0:
                        where = f"{self.stack}.{index}" + (f".{name}" if name else "")
                        return f" (dropout of {module.p} at {where})"
        return ""

    def _check_frozen(self) -> None:
        for index, layer in enumerate(self._layers):
            for name, parameter in layer.named_parameters():
                if parameter.requires_grad:
                    raise ValueError(
                        f"{_OP}: {self.stack}.{index}.{name} must be frozen, got a Parameter that "
                        f"is trained below layer {self.index}"
                    )

    def _versions(self) -> list[tuple[int, int, int]]:
        return [
            (id(tensor), tensor.data_ptr(), 0 if tensor.is_inference() else tensor._version)
            for layer in self._layers
            for tensor in (*layer.parameters(), *layer.buffers())
        ]


class _Run:
    """The state of one open batch."""

    def __init__(self, keys: list[int], random: bytes) -> None:
        self.keys, self.random = keys, random
        self.next = 0  # the layer that must be called next
        self.stamps: list[int] = []
        self.marked = False  # a hook asked for a gradient of the input, for reentrant checkpoints
        self.found: Optional[torch.Tensor] = None


def _describe(value: object) -> str:
    if isinstance(value, torch.Tensor):
        return f"a tensor {list(value.shape)}"
    return f"{len(value)} of them" if isinstance(value, tuple) else type(value).__name__


def _trained(hidden: torch.Tensor) -> bool:
    """Whether a Parameter takes part in the graph behind a tensor."""
    todo, seen = [hidden.grad_fn], set()
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if isinstance(getattr(node, "variable", None), nn.Parameter):
            return True
        todo += [following for following, _ in node.next_functions]
    return False


def _random_state() -> bytes:
    state = torch.get_rng_state().numpy().tobytes()
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        state += torch.cuda.get_rng_state().numpy().tobytes()
    return state


def _stamps(hidden: torch.Tensor) -> list[int]:
    """A checksum of the bits of every row: a weighted sum in wrapping 64-bit integers."""
    rows = hidden.detach().contiguous().view(len(hidden), -1).view(torch.uint8)
    pad = -rows.shape[1] % 4
    words = torch.nn.functional.pad(rows, (0, pad)).view(torch.int32).to(torch.int64)
    weights = torch.arange(words.shape[1], device=words.device) * 2654435761 + 1
    return (words * weights).sum(1).tolist()


def find_boundary(model: nn.Module, boundary: Optional[str] = None) -> tuple[str, int]:
    """The outermost `nn.ModuleList` that holds what is trained, and the lowest trained layer in it.

    Args:
        model: any module.
        boundary: a name inside the stack; None for the lowest layer with a trained Parameter.
    Returns:
        (name of the stack, index of the layer).
    Raises:
        ValueError: nothing is trained inside a stack, or in several; boundary is not inside one.
    """
    found: dict[str, int] = {}
    if boundary is not None:
        names = {n for n, _ in model.named_modules(remove_duplicate=False)}
        names |= {n for n, _ in model.named_parameters(remove_duplicate=False)}
        place = _in_stack(model, boundary) if boundary in names else None
        if place is None:
            raise ValueError(
                f"{_OP}: boundary must name a layer of an nn.ModuleList, got {boundary!r}"
            )
        return place
    for name, parameter in model.named_parameters():
        place = _in_stack(model, name) if parameter.requires_grad else None
        if place is not None:
            stack, index = place
            found[stack] = min(index, found.get(stack, index))
    if len(found) != 1:
        got = ", ".join(sorted(found)) or "none"
        raise ValueError(
            f"{_OP}: model must train layers of one nn.ModuleList, got {got}; pass boundary"
        )
    return next(iter(found.items()))


def _in_stack(model: nn.Module, name: str) -> Optional[tuple[str, int]]:
    module, path = model, []
    for part in name.split("."):
        if isinstance(module, nn.ModuleList):
            return ".".join(path), int(part)
        path.append(part)
        module = getattr(module, "_modules", {}).get(part)
    return None
