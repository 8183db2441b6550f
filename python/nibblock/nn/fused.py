"""Sibling linears that read the same input run as one call: q/k/v, gate/up and their likes.

The siblings keep their names, modules and Parameters. Their packed weights become neighbours in one
storage, so that one call over the concatenated panels computes all of them. The call happens when
the parent's forward asks the first sibling; the others then find their slice, provided that they
are asked with the very same tensor, unchanged, in the same thread, before the parent's forward
returns. Anything else (a different input, a direct call of a sibling, autograd, tracing) runs the
sibling alone, exactly as before.

    blob      [ panels of q | panels of k | panels of v ]     rows padded to 16 in each
    q.packed  = blob[0:a]   k.packed = blob[a:b]   v.packed = blob[b:c]      views, in the state
              dict as before
    y         [M, padded N of all] -> y[:, 0:Nq], y[:, a16:a16+Nk], ...
"""

from __future__ import annotations

import copyreg
import threading
from collections.abc import Iterable
from typing import Optional

import torch
from torch import nn

from nibblock.nn import _lean
from nibblock.nn._column_order import take_columns
from nibblock.nn.int4_linear import Int4Linear
from nibblock.ops._checks import PANEL_ROWS, format_code

_forward = torch.ops.nibblock._int4_linear_forward.default

# Names under which common models keep linears that share their input, within one parent.
SIBLINGS = (
    ("q_proj", "k_proj", "v_proj"),
    ("gate_proj", "up_proj"),
    ("query", "key", "value"),
    ("w1", "w3"),
    ("wq", "wk", "wv"),
    ("q_lin", "k_lin", "v_lin"),
    ("to_q", "to_k", "to_v"),
    ("wi_0", "wi_1"),
    ("q", "k", "v"),
)

# Above this many rows a call's fixed cost no longer matters, and slices would have to be copied.
MAX_SHARED_ROWS = 8

# A group whose results are computed and not asked for this often (cross attention) stops sharing.
MAX_WASTED = 2


def _format(layer: Int4Linear) -> tuple:
    return (
        layer.in_features,
        layer.group_size,
        layer.bits,
        layer.affine,
        layer.scale_dtype,
        layer.palette,
        layer.compute,
        layer.packed.device,
    )


def _fit(layers: list[Int4Linear]) -> bool:
    """Whether they have one format and, of their columns, one order: they read one x."""
    if len({_format(layer) for layer in layers}) != 1:
        return False
    orders = [layer._order for layer in layers]
    if any(order is None for order in orders):
        return all(order is None for order in orders)
    return all(torch.equal(order, orders[0]) for order in orders[1:])


class FusedInt4Group:
    """The shared storage of some siblings and, per thread, the results of the call in flight.

    Not a module: it adds nothing to the tree or the state dict. The blob is rebuilt when a
    sibling's storage has moved (`.to`, `load_state_dict(assign=True)`, deepcopy, unpickling).
    """

    def __init__(self, siblings: list[Int4Linear]) -> None:
        self.siblings = siblings
        self._reset()
        self._bind()

    def _reset(self) -> None:
        self._lock = threading.Lock()
        self._active: dict[int, Optional[list]] = {}
        # (pointers, blob, spans, padding of biases, format, order of columns)
        self._bound: Optional[tuple] = None
        self.enabled = True
        self._wasted = 0

    # A copy or an unpickled group starts without the blob: the siblings hold all the data.
    def __getstate__(self) -> dict:
        return {"siblings": self.siblings}

    def __setstate__(self, state: dict) -> None:
        self.siblings = state["siblings"]
        self._reset()

    # --- storage ---------------------------------------------------------------------------------

    def invalidate(self) -> None:
        """Gather the siblings anew at the next call: one of them changed.

        Their formats may differ until the others have changed too; they run alone until then.
        """
        self._bound = None
        self.enabled = self._wasted < MAX_WASTED

    def _bind(self) -> Optional[tuple]:
        """Makes the siblings' packed weights views of one blob; None where they no longer fit."""
        with self._lock:
            parameters = [s.packed for s in self.siblings]
            # (Devices first: those of the orders follow them, and cannot be compared across.)
            if any(p.device.type != "cpu" for p in parameters) or not _fit(self.siblings):
                self.enabled = False
                return None
            blob = torch.cat([p.detach() for p in parameters])
            at = columns = 0
            spans = []
            padding = []  # what stands for a sibling's bias and behind it
            for sibling, parameter in zip(self.siblings, parameters):
                parameter.data = blob[at : at + parameter.numel()]
                at += parameter.numel()
                rows = sibling.out_features
                spans.append((columns, columns + rows))
                behind = -rows % PANEL_ROWS
                columns += rows + behind
                zeros = torch.zeros(rows + behind, dtype=torch.float32)
                padding.append((zeros[:rows], zeros[rows:] if behind else None))
            pointers = [p.data_ptr() for p in parameters]
            code = format_code(columns, *self.siblings[0]._args[1:])
            # One assignment: other threads see the old state or the new one, never a mixture.
            order = self.siblings[0]._order
            self._bound = bound = (pointers, blob, spans, padding, code, order)
            return bound

    def _ready(self) -> Optional[tuple]:
        """The blob and its layout; gathered again if the siblings' storage has moved."""
        bound = self._bound
        if bound is not None:
            if [s._parameters["packed"].data_ptr() for s in self.siblings] == bound[0]:
                return bound
        return self._bind()

    def _concatenated_bias(self, padding: list) -> torch.Tensor:
        # Every call anew: edits of `.data` or through numpy move no version counter. Where dtypes
        # differ, cat takes one that holds them all exactly.
        parts = []
        for sibling, (none, behind) in zip(self.siblings, padding):
            bias = sibling._parameters["bias"]
            parts.append(none if bias is None else bias)
            if behind is not None:
                parts.append(behind)
        return torch.cat(parts)

    # --- running ---------------------------------------------------------------------------------

    def shared(self, x: torch.Tensor) -> Optional[tuple]:
        """The one call for all siblings: (x, blob, bias, format, column ranges of the siblings).

        Its result is y [..., padded N of all]. None where they cannot share a call. No gradient
        flows through it: the caller asks only where none is needed.
        """
        bound = self._ready() if self.enabled else None
        if bound is None:
            return None
        _, blob, spans, padding, code, order = bound
        if order is not None:
            x = take_columns(x, order)
        bias = None
        for sibling in self.siblings:
            if sibling._parameters["bias"] is not None:
                bias = self._concatenated_bias(padding)
                break
        return x, blob, bias, code, spans

    def _biases(self) -> list[Optional[torch.Tensor]]:
        return [s._parameters["bias"] for s in self.siblings]

    def open(self) -> Optional[list]:
        """Starts sharing in this thread (the parent's forward begins); returns what was there
        before.
        """
        key = threading.get_ident()
        before = self._active.get(key)
        self._active[key] = []
        return before

    def close(self, before: Optional[list]) -> None:
        """Ends sharing in this thread and drops what was not asked for."""
        key = threading.get_ident()
        entry = self._active.pop(key, None)
        if before is not None:
            self._active[key] = before
        if entry and any(y is not None for y in entry[2]):
            self._wasted += 1
            if self._wasted >= MAX_WASTED:
                self.enabled = False

    def take(self, index: int, x: torch.Tensor) -> Optional[torch.Tensor]:
        """The output of sibling `index` for x from a shared call, or None: run it alone."""
        entry = self._active.get(threading.get_ident())
        if entry is None or not self.enabled or x.is_inference():
            return None
        if entry:
            held, version, outputs = entry
            if held is not x or version != x._version:
                return None
            y, outputs[index] = outputs[index], None
            return y
        rows = x.numel() // max(1, x.shape[-1])
        if rows == 0 or rows > MAX_SHARED_ROWS or self.asks_gradient():
            return None
        # What runs before a sibling may change it: nothing is computed ahead of that.
        for sibling in self.siblings:
            own = sibling.__dict__
            if "forward" in own or own["_forward_pre_hooks"]:
                return None
        call = self.shared(x)
        if call is None:
            return None
        *arguments, spans = call
        y = _forward(*arguments)
        outputs = [y[..., start:end] for start, end in spans]
        if rows > 1:
            outputs = [part.contiguous() for part in outputs]
        elif torch.is_grad_enabled():
            # Views have one version counter: a change of one would spoil what autograd saved of
            # the others. `.data` has its own.
            outputs = [part.data for part in outputs]
        first, outputs[index] = outputs[index], None
        entry.extend((x, x._version, outputs))
        return first

    def asks_gradient(self) -> bool:
        """Whether a sibling's bias is being trained now."""
        if not torch.is_grad_enabled():
            return False
        return any(b is not None and b.requires_grad for b in self._biases())


# --- parents --------------------------------------------------------------------------------------
# A module's class is replaced by a subclass with another forward. A subclass keeps isinstance,
# repr, hooks and the state dict; its __reduce_ex__ names the original class, so deepcopy and pickle
# work.


class _Swapped:
    """What every replaced class has."""

    def __reduce_ex__(self, protocol):
        # What the original class decides about its copies holds (__getstate__, __reduce__).
        make, arguments, *rest = super().__reduce_ex__(max(protocol, 2))
        original = type(self)._nibblock_original
        if make is copyreg.__newobj__:
            return (_rebuild, (original, *arguments[1:]), *rest)
        if make is type(self):
            make = original  # a copy by its constructor: nothing in it is fused
        return (make, arguments, *rest)


class _Shared(_Swapped):
    """A parent of siblings: its forward opens and closes their groups."""

    def forward(self, *args, **kwargs):
        # A copy made by the class's own __getstate__ may lack them.
        groups = self.__dict__.get("_int4_groups", ())
        if torch.compiler.is_compiling():
            return super().forward(*args, **kwargs)
        before = [group.open() for group in groups]
        try:
            return super().forward(*args, **kwargs)
        finally:
            for group, was in zip(groups, before):
                group.close(was)


_classes: dict[type, type] = {}


def _swapped_class(cls: type) -> type:
    """The subclass of `cls` with a shared or shorter forward."""
    if cls not in _classes:
        alone = _lean.lean_norm(cls) or _lean.lean_layer(cls)
        lean = alone or _lean.lean_parent(cls)
        base = _Swapped if alone else _Shared
        body = {
            "_nibblock_original": cls,
            "_int4_original_forward": cls.forward if alone else _Shared.forward,
            "__module__": cls.__module__,
            "__qualname__": cls.__qualname__,
            "__doc__": cls.__doc__,
        }
        if lean is not None:
            body["forward"] = lean
        _classes[cls] = type(cls.__name__, (base, cls), body)
    return _classes[cls]


def _rebuild(cls: type, *arguments: object) -> nn.Module:
    swapped = _swapped_class(cls)
    return swapped.__new__(swapped, *arguments)


def _swap(module: nn.Module) -> str:
    """Gives the module its shared or shorter forward; why it keeps its own, empty if it does not.

    A class may refuse subclasses (`__init_subclass__`, a metaclass) or a change of `__class__`.
    """
    try:
        module.__class__ = _swapped_class(type(module))
    except Exception as error:  # noqa: BLE001  (whatever the class's own code raises)
        name = type(module).__name__
        return f"{name} cannot be subclassed: {type(error).__name__}: {error}"
    return ""


def _find_groups(module: nn.Module) -> list[list[Int4Linear]]:
    groups = []
    taken: set[int] = set()
    for names in SIBLINGS:
        found = [module._modules.get(name) for name in names]
        layers = [x for x in found if type(x) is Int4Linear and x.packed.device.type == "cpu"]
        storages = [id(layer.packed) for layer in layers]
        layers = [
            layer
            for layer in layers
            # The same weight twice: neighbours in storage are impossible.
            if storages.count(id(layer.packed)) == 1
            and id(layer) not in taken
            and layer._fused is None
        ]
        parts: list[list[Int4Linear]] = []  # files mix formats: v in 6 bits beside q and k in 4
        for layer in layers:
            part = next((part for part in parts if _fit([part[0], layer])), None)
            if part is None:
                parts.append([layer])
            else:
                part.append(layer)
        for part in parts:
            if len(part) > 1:
                taken.update(map(id, part))
                groups.append(part)
    return groups


def fuse_linears(model: nn.Module) -> list[str]:
    """Lets sibling `Int4Linear`s that read the same input run as one call, in place.

    Names, modules, Parameters and the state dict stay as they are. Siblings are found by
    name (q_proj/k_proj/v_proj, gate_proj/up_proj, query/key/value, ...) within one parent; they
    must have one in_features, one format and one order of columns, and their weights must not be
    tied to anything else.
    Attention, MLP, norm and decoder layer modules of transformers whose source is known get a
    shorter forward, if they have none yet, with the same values up to float32 rounding in norms and
    silu.

    Args:
        model: any module tree.
    Returns:
        The names of the siblings that share calls now, one "parent.(a|b)" per group.
    """
    return fuse_where_possible(model)[0]


def fuse_where_possible(model: nn.Module) -> tuple[list[str], dict[str, str]]:
    """`fuse_linears`, and why the parents that refused kept their own forward.

    Args:
        model: any module tree.
    Returns:
        The names of the siblings that share calls now, and a reason by the name of each group that
        could have and does not.
    """
    owners: dict[int, int] = {}
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                owners[id(parameter)] = owners.get(id(parameter), 0) + 1
    out: list[str] = []
    refused: dict[str, str] = {}
    for name, module in list(model.named_modules()):
        found = [
            layers
            for layers in _find_groups(module)
            if all(owners[id(layer.packed)] == 1 for layer in layers)
        ]
        if not found:
            continue
        names = []
        for layers in found:
            short = [key for key, child in module._modules.items() if child in layers]
            names.append(f"{name}.({'|'.join(short)})" if name else "|".join(short))
        reason = "" if isinstance(module, _Shared) else _swap(module)
        if reason:
            refused.update(dict.fromkeys(names, reason))
            continue
        groups = [FusedInt4Group(layers) for layers in found]
        for group in groups:
            for index, layer in enumerate(group.siblings):
                layer._fused = (group, index)
        module.__dict__["_int4_groups"] = groups
        out.extend(names)
    if out:
        shorten_forwards(model)
    return out, refused


def shorten_forwards(model: nn.Module, around: Optional[Iterable[str]] = None) -> int:
    """Gives norms, attention, MLPs and decoder layers whose forward is known their shorter one, in
    place, whatever their linears are (see `_lean`).

    Args:
        model: any module tree.
        around: names of modules; only what they lie in, and norms beside that, changes. None for
            all of the model.
    Returns:
        how many modules have another forward now.
    """
    inside = None
    if around is not None:
        inside = {name[:at] for name in around for at in range(len(name)) if name[at] == "."}
    count = 0
    for name, module in model.named_modules():
        cls = type(module)
        if issubclass(cls, _Swapped):
            continue
        norm = _lean.lean_norm(cls)
        if inside is not None and (name.rpartition(".")[0] if norm else name) not in inside:
            continue
        if norm or _lean.lean_layer(cls) or _lean.lean_parent(cls):
            count += not _swap(module)  # (a class that refuses keeps its own: both run)
    return count


def has_short_forwards(model: nn.Module) -> bool:
    """Whether any module of a model has one."""
    return any(isinstance(module, _Swapped) for module in model.modules())


def unfuse_linears(model: nn.Module) -> None:
    """Undoes `fuse_linears`, in place: every linear runs alone on its own storage, and every module
    has the forward of its class again (also where `accelerate` or a loader gave it a shorter one).
    """
    for module in model.modules():
        if isinstance(module, _Swapped):
            module.__class__ = type(module)._nibblock_original
            module.__dict__.pop("_int4_groups", None)
        elif isinstance(module, Int4Linear) and module._fused is not None:
            module._fused = None
            module.packed.data = module.packed.detach().clone()
