"""Which modules hold the experts of a layer in fused 3-D Parameters, and how.

transformers 5 decorates such a class with `use_experts_implementation`. A decorated class promises
that its forward is what the decorator's other implementations compute from a few flags, its
Parameters and its `_apply_gate`: that is what `Int4Experts` relies on. It is recognised by what the
decorator leaves behind; transformers itself is not imported.

Source: transformers/integrations/moe.py.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Optional

import torch
from torch import nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from nibblock.nn._packed import PackedWeight
from nibblock.ops import _checks

_DECORATOR = "transformers.integrations.moe"
_FLAGS = ("has_gate", "has_bias", "is_transposed")
_SIGNATURES = (
    ("hidden_states", "top_k_index", "top_k_weights"),
    ("hidden_states", "router_indices", "routing_weights"),
)
# What such a class may define: the rest could be anything, and would be lost.
_KNOWN = frozenset(
    ("__init__", "forward", "_apply_gate", "extra_repr", "__repr__", "__module__", "__qualname__")
    + ("__doc__", "__annotations__", "__constants__", "__parameters__", "__orig_bases__")
    + ("__firstlineno__", "__static_attributes__", "__slots__", "__weakref__", "__dict__")
    + ("__abstractmethods__", "_abc_impl")
)


@dataclass(frozen=True)
class ExpertForm:
    """What the eager forward of an experts module is made of.

    Attributes:
        up: the first projection's name: "gate_up_proj", or "up_proj" without a gate.
        experts, hidden, inner: E, H, I: of the first projection [E, N, H] (N is 2 I with a gate)
            and of `down_proj` [E, H, I].
        gated, biased, transposed: as the decorator's flags say.
        normed: whether `post_expert_norm` runs behind `down_proj`.
    """

    up: str
    experts: int
    hidden: int
    inner: int
    gated: bool
    biased: bool
    transposed: bool
    normed: bool

    @property
    def up_rows(self) -> int:
        """N of the first projection."""
        return 2 * self.inner if self.gated else self.inner

    @property
    def sizes(self) -> dict[str, tuple[int, int]]:
        """(N, K) of each projection, by name, the first one first."""
        return {self.up: (self.up_rows, self.hidden), "down_proj": (self.hidden, self.inner)}

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of each dense Parameter, by name."""
        shapes: dict[str, tuple[int, ...]] = {}
        for name, size in self.sizes.items():
            shapes[name] = (self.experts, *(size[::-1] if self.transposed else size))
        if self.biased:
            shapes[f"{self.up}_bias"] = (self.experts, self.up_rows)
            shapes["down_proj_bias"] = (self.experts, self.hidden)
        return shapes


def looks_like_experts(module: nn.Module) -> bool:
    """Whether somebody who looks for a model's experts would look at this module: its class is
    decorated, or named experts and holds matrices itself.
    """
    if isinstance(module, (nn.Linear, nn.Embedding, PackedWeight)):
        return False
    if all(flag in module.__dict__ for flag in _FLAGS) or _decorated(type(module)):
        return True
    if "expert" not in type(module).__name__.lower():
        return False
    own = [p for p in module._parameters.values() if p is not None and not is_lazy(p)]
    return any(p.dim() >= 2 for p in own)


def _decorated(kind: type) -> bool:
    forward = kind.forward
    return (
        hasattr(forward, "__wrapped__")
        and getattr(forward, "__globals__", {}).get("__name__") == _DECORATOR
    )


def weights(module: nn.Module) -> list[tuple[str, Optional[nn.Parameter]]]:
    """The two projections of an experts module, by name."""
    up = "gate_up_proj" if getattr(module, "has_gate", True) else "up_proj"
    return [(name, module._parameters.get(name)) for name in (up, "down_proj")]


def matrix_shape(module: nn.Module) -> tuple[int, ...]:
    """Of the largest Parameter that it holds itself: what a report shows."""
    own = [p for p in module._parameters.values() if p is not None and not is_lazy(p)]
    return tuple(max(own, key=lambda p: p.numel()).shape) if own else (0, 0)


def read_form(module: nn.Module) -> ExpertForm:
    """The form of a module that `unfit` has nothing against."""
    (up, first), (_, down) = weights(module)
    transposed = bool(module.is_transposed)
    return ExpertForm(
        up=up,
        experts=down.shape[0],
        hidden=down.shape[2 if transposed else 1],
        inner=down.shape[1 if transposed else 2],
        gated=bool(module.has_gate),
        biased=bool(module.has_bias),
        transposed=transposed,
        normed=bool(getattr(module, "has_post_expert_norm", False)),
    )


def unfit(module: nn.Module, meta: bool = False) -> str:
    """Why `Int4Experts` cannot compute what this module does; empty if it can.

    meta: whether weights on the meta device will do.
    """
    return _unfit_class(module) or _unfit_instance(module) or _unfit_weights(module, meta)


def _unfit_class(module: nn.Module) -> str:
    kind = type(module)
    if not _decorated(kind):
        if all(flag in module.__dict__ for flag in _FLAGS):
            return f"{kind.__name__} has a forward of its own"
        return f"{kind.__name__} is not decorated with transformers' use_experts_implementation"
    if parametrize.is_parametrized(module):
        return "its weights are parametrised"
    names = tuple(inspect.signature(kind.forward).parameters)[1:]
    if names not in _SIGNATURES:
        return f"its forward takes ({', '.join(names)}), not ({', '.join(_SIGNATURES[0])})"
    for cls in kind.__mro__[: kind.__mro__.index(nn.Module)]:
        for name in cls.__dict__:
            if name not in _KNOWN:
                return f"{kind.__name__} has {name} of its own"
    return ""


def _unfit_instance(module: nn.Module) -> str:
    for name in ("forward", "_apply_gate"):
        if name in module.__dict__:
            return f"{type(module).__name__} has a {name} of its own"
    if not all(flag in module.__dict__ for flag in _FLAGS):
        return f"it has no {next(f for f in _FLAGS if f not in module.__dict__)}"
    if getattr(module, "_is_expert_parallel", False):
        return "its experts are spread over processes"
    if module._buffers:
        return f"it holds more than its projections: {', '.join(sorted(module._buffers))}"
    if getattr(module, "has_post_expert_norm", False) and not hasattr(module, "post_expert_norm"):
        return "it has no post_expert_norm"
    return ""


def _unfit_weights(module: nn.Module, meta: bool) -> str:
    for name, weight in weights(module):
        if weight is None:
            return f"its {name} is not a Parameter"
        if is_lazy(weight):
            return "it is lazy and has not run yet"
        if type(weight) is not nn.Parameter:
            return f"its {name} is a {type(weight).__name__}"
        if weight.dtype not in _checks.FLOATS:
            return f"its {name} is {_checks.dtype_name(weight.dtype)}"
        if weight.is_meta and not meta:
            return "its weights are on the meta device"
        if weight.dim() != 3:
            return f"its {name} is {list(weight.shape)}, not a matrix for each expert"
        if weight.numel() == 0:
            return "its weights are empty"
    shapes = read_form(module).shapes
    for name, parameter in module._parameters.items():
        if parameter is None:
            continue
        if name not in shapes:
            return f"it holds more than its projections: {name}"
        if tuple(parameter.shape) != shapes[name]:
            return f"its {name} is {list(parameter.shape)}, not {list(shapes[name])}"
        if parameter.dtype not in _checks.FLOATS:
            return f"its {name} is {_checks.dtype_name(parameter.dtype)}"
    missing = [name for name in shapes if module._parameters.get(name) is None]
    return f"its {missing[0]} is not a Parameter" if missing else ""


def check_call(form: ExpertForm, x: torch.Tensor, index: torch.Tensor, scale: torch.Tensor) -> None:
    """Raises what is wrong with the arguments of a forward; returns if nothing is."""
    op = "Int4Experts"
    _checks.check_float(op, "hidden_states", x)
    _checks.check_tensor(op, "top_k_index", index)
    _checks.check_tensor(op, "top_k_weights", scale)
    if x.dim() != 2 or x.shape[1] != form.hidden:
        raise ValueError(
            f"{op}: hidden_states must be [tokens, {form.hidden}], got {list(x.shape)}"
        )
    if index.dtype not in _checks.INDEX_DTYPES:
        raise TypeError(
            f"{op}: top_k_index must be int64 or int32, got {_checks.dtype_name(index.dtype)}"
        )
    if index.dim() != 2 or index.shape[0] != x.shape[0]:
        raise ValueError(f"{op}: top_k_index must be [{x.shape[0]}, k], got {list(index.shape)}")
    if scale.shape != index.shape:
        raise ValueError(
            f"{op}: top_k_weights must be {list(index.shape)} as top_k_index, got "
            f"{list(scale.shape)}"
        )
    _checks.check_device(op, "hidden_states", x, top_k_index=index, top_k_weights=scale)
    bad = index[(index < 0) | (index > form.experts)]
    if bad.numel():
        raise ValueError(
            f"{op}: top_k_index must be in [0, {form.experts}], got {int(bad.flatten()[0])}"
        )
