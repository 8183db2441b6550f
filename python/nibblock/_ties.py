"""Which modules of a model hold the same weight: in one Parameter, or in two of the same memory."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

Owner = tuple[str, nn.Module, str]


def parameter_owners(model: nn.Module) -> dict[int, list[Owner]]:
    """For each Parameter (by id): the (module's name, module, Parameter's name) of every module
    that holds it or another one whose numbers lie in the same memory, as a transposed view's do.
    """
    owners: dict[int, list[Owner]] = {}
    parameters: dict[int, nn.Parameter] = {}
    for name, module in model.named_modules():
        for key, parameter in module._parameters.items():
            if parameter is not None:
                owners.setdefault(id(parameter), []).append((name, module, key))
                parameters[id(parameter)] = parameter
    alone = {key: list(found) for key, found in owners.items()}
    for one, other in _sharing(list(parameters.values())):
        owners[id(one)] += alone[id(other)]
        owners[id(other)] += alone[id(one)]
    return owners


def _sharing(parameters: list[nn.Parameter]) -> Iterator[tuple[nn.Parameter, nn.Parameter]]:
    """Pairs of distinct Parameters that have numbers in common."""
    spans = [(str(p.device), *_span(p), p) for p in parameters if _has_memory(p)]
    reaching: list[tuple] = []  # those before that may reach into this one
    for span in sorted(spans, key=lambda span: span[:3]):
        device, start, end, parameter = span
        reaching = [other for other in reaching if other[0] == device and other[2] > start]
        for _, first, last, other in reaching:
            if _meet(other, parameter, first, max(last, end)):
                yield other, parameter
        reaching.append(span)


def _has_memory(parameter: nn.Parameter) -> bool:
    # (a subclass may hold its numbers elsewhere: only what is known is looked at)
    plain = type(parameter) is nn.Parameter and parameter.layout is torch.strided
    return plain and not parameter.is_meta and parameter.numel() > 0


def _span(tensor: torch.Tensor) -> tuple[int, int]:
    """The addresses of its first byte and of the one behind its last."""
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride()))
    start = tensor.data_ptr()
    return start, start + (last + 1) * tensor.element_size()


def _meet(one: torch.Tensor, other: torch.Tensor, start: int, end: int) -> bool:
    """Whether two tensors within these addresses share a number: columns that alternate do not."""
    size = one.element_size()
    if other.element_size() != size or (other.data_ptr() - start) % size:
        return True
    seen = torch.zeros((end - start) // size, dtype=torch.bool)
    places = [((t.data_ptr() - start) // size, t) for t in (one, other)]
    first, second = (seen.as_strided(t.shape, t.stride(), offset) for offset, t in places)
    first.fill_(True)
    return bool(second.any())
