"""Experts of a quantised folder: one linear each in the file, one fused tensor in the model.

transformers 5 holds the experts of a layer in 3-D Parameters and says, architecture by
architecture, which names of older files make them up: renamings first, then at most one converter,
which stacks matrices by their number (MergeModulelist) and puts those of several names below each
other (Concatenate). Its own table is used here, so that no architecture is named:

| file                                             | table           | model                    |
| model.layers.0.block_sparse_moe.experts.7.w3     | Mixtral         | gate_up_proj[7], 2nd half|
| model.layers.0.mlp.experts.7.down_proj           | Qwen, DeepSeek  | down_proj[7]             |

A file may also hold the fused tensor itself, quantised (`Reader.fused`).

Source: transformers/conversion_mapping.py and core_model_loading.py.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Optional

import torch

from nibblock.formats._quantized_folder import FLOATS, Folder, Part
from nibblock.formats._quantized_layer import Layer, Reader, Scheme
from nibblock.nn import Int4Experts, _expert_form
from nibblock.nn._packed import _exact

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_MERGE = [("MergeModulelist", 0)]
_MATRIX = re.compile(r"(?P<head>.+)\.(?P<expert>\d+)\.[^.]+\.weight")


@dataclass(frozen=True)
class Place:
    """Where a matrix of the file belongs: rows of one expert of a fused tensor of the model.

    leaves: what the file calls the matrices whose rows follow each other ("w1", "w3"). head: the
    file's name up to the expert's number.
    """

    target: str
    expert: int
    leaves: tuple[str, ...]
    head: str


class Names:
    """What transformers calls the tensors of a file in the model that it builds today."""

    def __init__(self, model: PreTrainedModel) -> None:
        from transformers.conversion_mapping import get_model_conversion_mapping

        transforms = get_model_conversion_mapping(model, add_legacy=False)
        self.renamings = [t for t in transforms if not hasattr(t, "operations")]
        self.converters = [t for t in transforms if hasattr(t, "operations")]

    def converts(self, key: str) -> bool:
        """Whether loading would change the values of a tensor of this name, or its place."""
        return any(converter.rename_source_key(key)[1] for converter in self.converters)

    def of(self, key: str) -> tuple[str, Optional[Place]]:
        """The model's name of a tensor, and its place where several make up that one.

        A converter that does something else than stack and concatenate leaves the file's name.
        """
        name = key
        for renaming in self.renamings:
            name, _ = renaming.rename_source_key(name)
        for converter in self.converters:
            target, pattern = converter.rename_source_key(name)
            if pattern is None:
                continue
            # (The file's name and not the new one: errors name what is in the file.)
            found = _MATRIX.fullmatch(key)
            sources = converter.source_patterns
            operations = [(type(o).__name__, getattr(o, "dim", None)) for o in converter.operations]
            wanted = _MERGE if len(sources) == 1 else [*_MERGE, ("Concatenate", 1)]
            if found is None or operations != wanted or len(converter.target_patterns) != 1:
                return key, None
            leaves = tuple(source.split(".")[-2] for source in sources)
            return target, Place(target, int(found["expert"]), leaves, found["head"])
        return name, None


@dataclass(frozen=True)
class _Matrices:
    """What the file must hold for one fused tensor [count, rows, columns]."""

    target: str
    count: int
    rows: int  # of one matrix
    columns: int
    leaves: tuple[str, ...]
    head: str

    def each(self) -> list[tuple[int, slice, str]]:
        """(expert, rows of the fused tensor, the file's name) of each matrix, in order."""
        return [
            (e, slice(part * self.rows, (part + 1) * self.rows), f"{self.head}.{e}.{leaf}")
            for e in range(self.count)
            for part, leaf in enumerate(self.leaves)
        ]


@dataclass(frozen=True)
class _Stacked(_Matrices):
    """The same, where the file holds all of them in one tensor: `head` is its name too."""

    def each(self) -> list[tuple[int, slice, str]]:
        return [(e, slice(0, self.rows), self.head) for e in range(self.count)]


class Experts:
    """The fused tensors of a model whose matrices lie in the folder one by one.

    Attributes:
        quantised: by name, the experts modules that become `Int4Experts`.
        dense: names of fused tensors that stay dense.
        schemes: by the file's name, of every quantised matrix.
    """

    def __init__(self, model: PreTrainedModel, folder: Folder, reader: Reader) -> None:
        self.model, self.folder, self.reader = model, folder, reader
        self.quantised: dict[str, dict[str, _Matrices]] = {}
        self.dense: dict[str, _Matrices] = {}
        self.schemes: dict[str, Scheme] = {}
        self._found: dict[str, _Matrices] = {}
        self._packed: set[str] = set()  # the file's names of quantised matrices
        self._single: set[str] = set()  # and of those that are not

    # --- checking ---------------------------------------------------------------------------------

    def add(self, place: Place, name: str, packed: bool) -> str:
        """Notes a matrix of the file, by its name without what follows; returns why it has no place
        in the model, or nothing.
        """
        path, _, leaf = place.target.rpartition(".")
        try:
            module = self.model.get_submodule(path)
        except AttributeError:
            return "none"
        tensor = module._parameters.get(leaf)
        parts = len(place.leaves)
        if tensor is None or tensor.dim() != 3 or tensor.shape[1] % parts:
            return type(module).__name__
        if packed:
            reason = _expert_form.unfit(module, meta=True)
            if not reason and module.is_transposed:
                reason = "its weights are transposed"
            if reason:
                return f"{type(module).__name__}: {reason}"
        if place.expert >= len(tensor):
            return f"experts 0 to {len(tensor) - 1}"
        count, rows, columns = tensor.shape
        wanted = _Matrices(place.target, count, rows // parts, columns, place.leaves, place.head)
        if self._found.setdefault(place.target, wanted) != wanted:
            return f"two names, of which the other begins with {self._found[place.target].head}"
        (self._packed if packed else self._single).add(name)
        return ""

    def add_stacked(self, target: str) -> str:
        """As `add`, of a fused tensor that the file holds quantised as a whole."""
        path, _, leaf = target.rpartition(".")
        try:
            module = self.model.get_submodule(path)
        except AttributeError:
            return "none"
        reason = _expert_form.unfit(module, meta=True)
        if reason:
            return f"{type(module).__name__}: {reason}"
        form = _expert_form.read_form(module)
        if leaf not in form.sizes:
            return f"{type(module).__name__}, which has no {leaf}"
        self._found[target] = _Stacked(target, form.experts, *form.sizes[leaf], (leaf,), target)
        self._packed.add(target)
        return ""

    def check(self) -> list[str]:
        """Checks that all matrices are there and fit; returns the names of their tensors."""
        used = []
        for target, wanted in self._found.items():
            names = list(dict.fromkeys(name for _, _, name in wanted.each()))
            packed = [name for name in names if name in self._packed]
            single = [name for name in names if name in self._single]
            if packed and single:
                raise self.folder.fail(
                    f"hold all experts of {target} quantised, or none",
                    f"{packed[0]} quantised and {single[0]} not",
                    self.folder.tensors[self.reader.key(packed[0], self.reader.marker)].file,
                )
            if packed:
                path, _, leaf = target.rpartition(".")
                self.quantised.setdefault(path, {})[leaf] = wanted
                used += self._check_packed(target, names, wanted)
            else:
                self.dense[target] = wanted
                for name in names:
                    shape = (wanted.rows, wanted.columns)
                    self.folder.check(f"{name}.weight", Part.of(shape, *FLOATS))
                    used.append(f"{name}.weight")
        for path, projections in self.quantised.items():
            form = _expert_form.read_form(self.model.get_submodule(path))
            for leaf in form.sizes:
                if leaf not in projections:
                    raise self.folder.fail(
                        f"hold both projections of {path} quantised, or none",
                        f"{', '.join(projections)} quantised and {leaf} not",
                    )
        return used

    def _check_packed(self, target: str, names: list[str], wanted: _Matrices) -> list[str]:
        used: list[str] = []
        # Of an expert that is not there the format is not known: any other's will do to say so.
        known = next(name for name in names if name in self._packed)
        first = self.reader.scheme(known, "Linear")
        for name in names:
            scheme = self.reader.scheme(name, "Linear") if name in self._packed else first
            if (scheme.bits, scheme.group) != (first.bits, first.group):
                raise self.folder.fail(
                    f"give all experts of {target} the same bits and group size",
                    f"{_format(first)} for {known} and {_format(scheme)} for {name}",
                    "config.json",
                )
            self.schemes[name] = scheme
            parts = self.reader.parts(scheme, wanted.rows, wanted.columns)
            for part, need in parts.items():
                need = need.stacked(wanted.count) if self.reader.fused else need
                self.folder.check(self.reader.key(name, part), need)
                used.append(self.reader.key(name, part))
            used += [] if self.reader.fused else self.reader.zero_bias(name, wanted.rows)
        return used

    def layers(self) -> dict[str, tuple[Scheme, int]]:
        """(scheme, N) of each quantised matrix, for `Reader.prepare`."""
        rows = {
            name: wanted.rows
            for projections in self.quantised.values()
            for wanted in projections.values()
            for _, _, name in wanted.each()
        }
        return {name: (scheme, rows[name]) for name, scheme in self.schemes.items()}

    def holds(self, target: str) -> bool:
        """Whether the fused tensor of this name is made of the file's matrices."""
        return target in self._found

    # --- reading ----------------------------------------------------------------------------------

    def read_dense(self, target: str, dtype: torch.dtype) -> torch.Tensor:
        """The fused tensor, in `dtype`."""
        wanted = self.dense[target]
        shape = (wanted.count, wanted.rows * len(wanted.leaves), wanted.columns)
        out = torch.empty(shape, dtype=dtype)
        with self.folder.kept_open():
            for expert, rows, name in wanted.each():
                key = f"{name}.weight"
                out[expert, rows] = self.folder.read([key])[key]
        return out

    def read(self, path: str, compute: str) -> tuple[Int4Experts, str]:
        """(the module in place of the experts of this name, what is not exact about it)."""
        codes: dict[str, Any] = {}
        bits, groups, orders, notes = {}, {}, {}, []
        for leaf, wanted in self.quantised[path].items():
            with self.folder.kept_open():
                codes[leaf], layer, rounded, order = self._stack(wanted)
            bits[leaf], groups[leaf] = layer.bits, layer.group
            scheme = self.schemes[wanted.each()[0][2]]
            if rounded:
                notes.append(f"{leaf}: {rounded} rounded to float32")
            if layer.group != scheme.group and layer.scales.shape[1] > 1:
                notes.append(f"{leaf}: groups of {scheme.group} as {layer.group}")
            if order is not None:
                orders[leaf] = order
        old = self.model.get_submodule(path)
        module = Int4Experts.from_codes(
            old, codes, group_size=groups, bits=bits, compute=compute, column_order=orders
        )
        return module, ", ".join(notes)

    def _stack(self, wanted: _Matrices) -> tuple[tuple, Layer, str, Optional[torch.Tensor]]:
        """((qweight, scales, offsets or None) of all experts, one matrix, what of them is rounded,
        the orders of columns or None).
        """
        orders = _Orders(self.reader, wanted)
        first: Optional[Layer] = None
        affine, rounded = False, ""
        for expert, rows, name in wanted.each():
            sizes, one = (wanted.rows, wanted.columns), expert if self.reader.fused else None
            layer = self.reader.read(name, self.schemes[name], *sizes, one)
            if first is None:
                first, known = layer, name
                shape = (wanted.count, wanted.rows * len(wanted.leaves))
                qweight = layer.qweight.new_empty((*shape, layer.qweight.shape[1]))
                scales = torch.empty((*shape, layer.scales.shape[1]))
                offsets = torch.empty_like(scales)
            elif layer.group != first.group:
                raise self.reader.fail(
                    name,
                    self.reader.order or self.reader.marker,
                    f"hold groups as {known} does",
                    f"{layer.group} columns in place of {first.group}",
                )
            orders.add(expert, name, layer.columns)
            qweight[expert, rows] = layer.qweight
            scales[expert, rows] = layer.scales
            if layer.offsets is not None:
                offsets[expert, rows] = layer.offsets
            else:  # the middle code is a power of two: exact, should others need an offset
                middle = 1 << (layer.bits - 1)
                torch.mul(scales[expert, rows], -middle, out=offsets[expert, rows])
            affine |= layer.offsets is not None
            rounded = rounded or layer.rounded
        if affine and not bool(torch.isfinite(offsets).all()):
            raise self.reader.fail(
                known, self.reader.scales, "hold scales that float32 can multiply", "more"
            )
        offsets = offsets if affine else None
        if all(_exact(part, torch.float16) for part in (scales, offsets) if part is not None):
            scales = scales.half()
            offsets = None if offsets is None else offsets.half()
        return (qweight, scales, offsets), first, rounded, orders.stacked()


class _Orders:
    """The order of columns of each expert of a fused tensor."""

    def __init__(self, reader: Reader, wanted: _Matrices) -> None:
        self.reader, self.columns = reader, wanted.columns
        self.known: dict[int, tuple[str, torch.Tensor]] = {}
        self.any = False

    def add(self, expert: int, name: str, order: Optional[torch.Tensor]) -> None:
        """Notes that of one matrix. Matrices whose rows follow each other read one input."""
        self.any |= order is not None
        order = torch.arange(self.columns) if order is None else order
        other, known = self.known.setdefault(expert, (name, order))
        if not torch.equal(order, known):
            need = f"hold groups as {other} does: both become one matrix"
            raise self.reader.fail(name, self.reader.order, need, "another activation order")

    def stacked(self) -> Optional[torch.Tensor]:
        """[E, K] int64; None where all columns are in order."""
        return torch.stack([order for _, order in self.known.values()]) if self.any else None


def _format(scheme: Scheme) -> str:
    return f"{scheme.bits} bits, group {scheme.group}"
