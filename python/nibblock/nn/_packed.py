"""What a module that holds packed int4 weights needs, whatever it computes with them.

In memory there is one frozen uint8 Parameter `packed`: a Parameter, because buffers are broadcast
on every forward by data parallel wrappers, and uint8, because `.to(bfloat16)` would round float
scales. In a state dict there are the canonical `qweight`, `scales` and `offsets`, so that a file
written on one machine loads on any other.
"""

from __future__ import annotations

from typing import Any, Optional

import torch
from torch import nn
from torch.utils.weak import TensorWeakRef, WeakIdKeyDictionary

from nibblock import ops as _ops
from nibblock.ops import _checks, _storage
from nibblock.ops._storage import fits_int8 as _fits

# __init__ of nn.Linear and nn.Embedding would allocate the dense weight; these classes never call
# it.

# By a Parameter that load_state_dict(assign=True) replaced: its successor. Modules that shared the
# first then share the second.
_successors = WeakIdKeyDictionary()


class PackedWeight:
    """Mixin of `Int4Linear`, `Int4Embedding` and `ExpertWeight`: a weight of `_rows` x `_columns`
    (of the last: one for each expert) kept in `self.packed`.
    """

    _rows: int
    _columns: int
    group_size: int
    bits: int
    affine: bool
    _scale_dtype: torch.dtype
    _dtype: torch.dtype = torch.float32  # of `weight`: what a dense layer's would have
    _transposed: bool = False  # whether state dicts hold a dense weight as [columns, rows] (Conv1D)

    def _init_format(
        self,
        rows: int,
        columns: int,
        group_size: int,
        bits: int,
        affine: bool,
        scale_dtype: torch.dtype,
    ) -> None:
        op = type(self).__name__
        _checks.check_format(op, group_size, bits, scale_dtype)
        _checks.check_int8_scales(op, scale_dtype, group_size, columns)
        self._rows, self._columns = rows, columns
        self.group_size, self.bits = group_size, bits
        self.affine, self._scale_dtype = affine, scale_dtype

    def _init_packed(self, packed: Optional[torch.Tensor], device: Any) -> None:
        if packed is None:
            shape = self._packed_shape(self._scale_dtype)
            packed = torch.empty(shape, dtype=torch.uint8, device=device)
            if not packed.is_meta:
                packed.zero_()  # scales of 0: a weight of zeros, not of whatever the memory held
        else:
            op = type(self).__name__
            _checks.check_packed(
                op,
                packed,
                self._rows,
                self._columns,
                self.group_size,
                self.bits,
                self.affine,
                self.scale_dtype,
            )
        if not isinstance(packed, nn.Parameter):
            packed = nn.Parameter(packed, requires_grad=False)
        self.register_parameter("packed", packed)

    @property
    def scale_dtype(self) -> torch.dtype:
        """float32, float16 or int8: how `packed` holds scales; follows what is loaded."""
        self._follow_packed()
        return self._scale_dtype

    def _layout(self) -> dict[str, Any]:
        """Keywords of `int4_unpack` and `int4_dequantize`: how a packed matrix is stored."""
        return {
            "out_features": self._rows,
            "in_features": self._columns,
            "group_size": self.group_size,
            "bits": self.bits,
            "affine": self.affine,
            "scale_dtype": self.scale_dtype,
        }

    def _packed_bytes(self, scale_dtype: torch.dtype, palette: bool = False) -> int:
        form = (self.group_size, self.bits, self.affine, scale_dtype)
        return _checks.packed_bytes(self._rows, self._columns, *form, palette)

    def _packed_shape(self, scale_dtype: torch.dtype, palette: bool = False) -> tuple[int, ...]:
        """Of `packed`."""
        return (self._packed_bytes(scale_dtype, palette),)

    @property
    def palette(self) -> bool:
        """Whether `packed` holds 8-bit codes in 4, as places in a table (`int4_pack`)."""
        return self.bits == 8 and self.packed.numel() == self._packed_bytes(self.scale_dtype, True)

    @property
    def _dense_shape(self) -> tuple[int, ...]:
        """Of `weight`."""
        return self._rows, self._columns

    def _follow_packed(self) -> bool:
        """Whether `packed` holds another dtype of scales than this module knew; knows it then.

        Another module that shares `packed` may have loaded a file. The size says which dtype it is.
        """
        packed = self._parameters.get("packed")
        palettes = (False, True) if self.bits == 8 else (False,)

        def held(dtype: torch.dtype) -> bool:
            return any(packed.numel() == self._packed_bytes(dtype, p) for p in palettes)

        if packed is None or held(self._scale_dtype):
            return False
        int8 = _checks.has_int8_scales(self.group_size, self._columns)
        for dtype in _checks.SCALE_DTYPES[: 3 if int8 else 2]:
            if held(dtype):
                self._scale_dtype = dtype
                self._format_changed()
                return True
        return False

    # --- the weight ------------------------------------------------------------------------------

    @property
    def weight(self) -> torch.Tensor:
        """The dequantised weight, computed anew at every access; read-only.

        Its dtype is that of the dense weight it stands for, and follows `.to(dtype)` likewise.
        """
        return self.dequantize(self._dtype)

    def _apply(self, fn, recurse=True):
        # `.to(dtype)` cannot be seen on a uint8 Parameter; a probe shows what fn does to floats.
        probe = fn(torch.empty(1, dtype=self._dtype, device=self.packed.device))
        if probe.dtype in _checks.FLOATS:
            self._dtype = probe.dtype
        return super()._apply(fn, recurse)

    @weight.setter
    def weight(self, value: object) -> None:
        self._refuse_weight()

    @weight.deleter
    def weight(self) -> None:
        self._refuse_weight()

    def _refuse_weight(self) -> None:
        raise AttributeError(
            f"{type(self).__name__}: weight must not be assigned, got an assignment; it is "
            f"computed from packed: load canonical tensors or a dense weight with load_state_dict"
        )

    def __setattr__(self, name: str, value: object) -> None:
        # nn.Module.__setattr__ would register a Parameter under this name and never see the
        # property.
        if name == "weight":
            self._refuse_weight()
        super().__setattr__(name, value)

    def dequantize(self, dtype: Optional[torch.dtype] = None) -> torch.Tensor:
        """The dense weight [rows, columns] that the packed one stands for.

        Args:
            dtype: float32 (when None) | bfloat16 | float16 of the result; rounded once.
        Returns:
            A new tensor without gradient, on the device of `packed`.
        Raises:
            TypeError: another dtype.
        """
        dtype = torch.float32 if dtype is None else dtype
        return _ops.int4_dequantize(self.packed.detach(), dtype=dtype, **self._layout())

    def canonical(self) -> dict[str, torch.Tensor]:
        """The state dict's form of the weight: `qweight`, `scales` and, when affine, `offsets`."""
        if self.packed.is_meta:
            shapes = self._canonical_shapes(self.scale_dtype)
            return {k: torch.empty(s, dtype=d, device="meta") for k, (s, d) in shapes.items()}
        qweight, scales, offsets = _ops.int4_unpack(self.packed, **self._layout())
        out = {"qweight": qweight, "scales": scales}
        if offsets is not None:
            out["offsets"] = offsets
        return out

    def _canonical_shapes(
        self, scale_dtype: torch.dtype
    ) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        codes = -(-self._columns // 2) if self.bits == 4 else self._columns
        groups = _checks.groups_of(self._columns, self.group_size)
        dtype = _storage.canonical_dtype(scale_dtype)
        shapes = {
            "qweight": ((self._rows, codes), torch.uint8),
            "scales": ((self._rows, groups), dtype),
        }
        if self.affine:
            shapes["offsets"] = ((self._rows, groups), dtype)
        return shapes

    # --- state dict ------------------------------------------------------------------------------

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        for name, tensor in self.canonical().items():
            destination[prefix + name] = tensor
        # The bias, and whatever else was registered on this module.
        super()._save_to_state_dict(destination, prefix, keep_vars)
        del destination[prefix + "packed"]

    def _load_from_state_dict(
        self,
        state_dict,
        prefix,
        local_metadata,
        strict,
        missing_keys,
        unexpected_keys,
        error_msgs,
    ):
        # nn.Module loads `packed` and `bias`; this turns what the file holds into `packed` first,
        # and what nn.Module reports about `packed` back into the file's names. Nothing changes
        # before all of the weight is known to fit.
        names = self._canonical_shapes(self.scale_dtype)
        local = {k: v for k, v in state_dict.items() if k.startswith(prefix)}
        dense = local.pop(prefix + "weight", None)
        given = {name: local.pop(prefix + name, None) for name in names}
        if dense is not None and any(v is not None for v in given.values()):
            local[prefix + "weight"] = (
                dense  # both forms at once: the canonical one, and report the other
            )
            dense = None
        absent = [name for name, value in given.items() if value is None]
        key = prefix + "packed"
        errors: list[str] = []
        assign = local_metadata.get("assign_to_params_buffers", False)
        order = self._order_to_load(prefix, local, dense is None and not absent, errors)
        if dense is not None or not absent:
            dtype = self.scale_dtype if absent else self._dtype_to_load(given)
            codes = None if absent else given["qweight"]
            palette = codes is not None and self.palette
            palette = palette and (codes.is_meta or _storage.fits_palette(codes, self.bits))
            packed = (
                self._pack_dense(prefix, dense, errors)
                if absent
                else self._pack_canonical(prefix, given, dtype, palette, errors)
            )
            absent = []
            if not errors:
                self._take_order(order, assign)  # (a dense weight has none)
                if assign:
                    self._assign_packed(packed, dtype)
                else:
                    self._make_room(dtype, palette)
                    local[key] = packed
        error_msgs.extend(errors)
        missing: list[str] = []
        super()._load_from_state_dict(
            local, prefix, local_metadata, strict, missing, unexpected_keys, error_msgs
        )
        for name in missing:
            if name == key:
                missing_keys.extend(prefix + part for part in absent)
            elif name != prefix + "column_order":  # taken above, or not in the file
                missing_keys.append(name)

    def _order_to_load(
        self, prefix: str, local: dict[str, Any], codes: bool, errors: list[str]
    ) -> Optional[torch.Tensor]:
        """Takes the order of columns out of `local`; codes: whether it has those too."""
        return None

    def _take_order(self, order: Optional[torch.Tensor], assign: bool) -> None:
        """The order of the columns that are loaded next."""

    def _dtype_to_load(self, given: dict[str, torch.Tensor]) -> torch.dtype:
        """The file's dtype of scales, so that a state dict round trip changes nothing.

        Fused siblings share one format: they keep theirs where that changes no value, and so does
        whoever stores scales as int8, which a file holds as float32.
        """
        parts = [v for name, v in given.items() if name != "qweight"]
        dtype = parts[0].dtype
        mine = self.scale_dtype
        if dtype not in (torch.float32, torch.float16) or any(v.dtype != dtype for v in parts):
            return mine
        if mine == torch.int8:
            if self.group_size not in _checks.GROUP_SIZES[self.bits]:
                return mine  # there is no other; packing says what does not fit
            wide = (v.float() for v in parts)
            fit = all(v.is_meta or _fits(v, self._columns, self.group_size) for v in wide)
            return mine if fit else dtype
        if getattr(self, "_fused", None) is not None and all(_exact(v, mine) for v in parts):
            return mine
        return dtype

    def _make_room(self, scale_dtype: torch.dtype, palette: bool) -> None:
        """Gives `packed` the size that this form needs, in all modules that share it."""
        packed, shape = self._parameters["packed"], self._packed_shape(scale_dtype, palette)
        if scale_dtype != self._scale_dtype or tuple(packed.shape) != shape:
            packed.data = torch.empty(shape, dtype=torch.uint8, device=packed.device)
            self._scale_dtype = scale_dtype
            self._format_changed()

    def _assign_packed(self, packed: torch.Tensor, scale_dtype: torch.dtype) -> None:
        """Takes `packed` over as a new Parameter; modules that shared the old one share it too,
        provided that the file holds the same weight for them.
        """
        old = self._parameters["packed"]
        known = _successors.get(old)
        new = None if known is None else known()
        if new is None or not _same(new, packed):
            new = nn.Parameter(packed, requires_grad=False)
            _successors[old] = TensorWeakRef(new)
        self.packed = new
        self._scale_dtype = scale_dtype
        self._format_changed()

    def _format_changed(self) -> None:
        """Renews what a class derives from the format."""

    def _pack_dense(self, prefix, dense, errors):
        need = self._dense_shape[::-1] if self._transposed else self._dense_shape
        if tuple(dense.shape) != need:
            errors.append(self._mismatch(prefix + "weight", dense, need))
            return None
        if self._transposed:
            dense = dense.t()
        if dense.is_meta:
            shape = self._packed_shape(self.scale_dtype)
            return torch.empty(shape, dtype=torch.uint8, device="meta")
        try:
            return self._pack(*self._quantize(dense), self.scale_dtype, False)
        except (TypeError, ValueError) as error:
            errors.append(f"{prefix}weight: {error}")
            return None

    def _pack_canonical(self, prefix, given, scale_dtype, palette, errors):
        for name, (shape, dtype) in self._canonical_shapes(scale_dtype).items():
            value = given[name]
            if tuple(value.shape) != shape:
                errors.append(self._mismatch(prefix + name, value, shape))
            elif name == "qweight" and value.dtype != torch.uint8:
                errors.append(
                    f"{prefix}qweight must be uint8, got {_checks.dtype_name(value.dtype)}"
                )
            elif value.dtype != dtype and not value.is_meta:
                # float16 to float32 is exact; the other way only if no value changes.
                if not _exact(value, dtype):
                    errors.append(
                        f"{prefix}{name} must be exact in {_checks.dtype_name(dtype)}, got "
                        f"{_checks.dtype_name(value.dtype)} values that are not; build the module "
                        f"with scale_dtype={value.dtype}"
                    )
                given[name] = value.to(dtype)
        if errors:
            return None
        if any(value.is_meta for value in given.values()):
            shape = self._packed_shape(scale_dtype, palette)
            return torch.empty(shape, dtype=torch.uint8, device="meta")
        try:
            parts = (given["qweight"], given["scales"], given.get("offsets"))
            return self._pack(*parts, scale_dtype, palette)
        except (TypeError, ValueError) as error:
            errors.append(f"{prefix}qweight: {error}")
            return None

    def _quantize(self, dense: torch.Tensor) -> tuple:
        """A dense weight's canonical parts, rounded to nearest."""
        return _ops.int4_quantize(
            dense,
            group_size=self.group_size,
            bits=self.bits,
            symmetric=not self.affine,
            scale_dtype=self.scale_dtype,
        )

    def _pack(
        self,
        qweight: torch.Tensor,
        scales: torch.Tensor,
        offsets: Optional[torch.Tensor],
        scale_dtype: torch.dtype,
        palette: bool,
    ) -> torch.Tensor:
        """What `packed` holds for canonical parts."""
        return _ops.int4_pack(
            qweight,
            scales,
            offsets,
            in_features=self._columns,
            group_size=self.group_size,
            bits=self.bits,
            scale_dtype=scale_dtype,
            palette=palette,
        )

    @staticmethod
    def _mismatch(key: str, value: torch.Tensor, shape: tuple[int, ...]) -> str:
        return (
            f"size mismatch for {key}: copying a tensor of shape {list(value.shape)} from the "
            f"checkpoint, the shape in the current model is {list(shape)}"
        )

    def _format_repr(self) -> str:
        parts = [
            f"bits={self.bits}",
            f"group_size={self.group_size}",
            f"symmetric={not self.affine}",
        ]
        if self.scale_dtype != torch.float32:
            parts.append(f"scale_dtype={_checks.dtype_name(self.scale_dtype)}")
        if self.palette:
            parts.append("palette=True")
        return ", ".join(parts)


def _exact(value: torch.Tensor, dtype: torch.dtype) -> bool:
    """Whether dtype holds every number of value; taken for granted on the meta device."""
    return value.is_meta or torch.equal(value.to(dtype).to(value.dtype), value)


def _same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two packed weights are equal; on the meta device their sizes must do."""
    if a.device != b.device or a.shape != b.shape:
        return False
    return a.is_meta or torch.equal(a, b)


def packed_from_codes(
    op, qweight, scales, offsets, columns, group_size, bits, scale_dtype, palette
):
    """(packed tensor of canonical parts, its scale_dtype), for `from_codes`.

    scale_dtype, palette: None for what is smaller and changes nothing. Meta parts give a meta
    tensor.
    """
    if scale_dtype is None:
        scale_dtype = _storage.exact_dtype(scales, offsets, columns, group_size)
    if palette is None:
        palette = _storage.fits_palette(qweight, bits)
    if qweight.is_meta:
        form = (group_size, bits, offsets is not None, scale_dtype)
        size = _checks.packed_bytes(qweight.shape[0], columns, *form, palette)
        return torch.empty(size, dtype=torch.uint8, device="meta"), scale_dtype
    packed = _ops.int4_pack(
        qweight,
        scales,
        offsets,
        in_features=columns,
        group_size=group_size,
        bits=bits,
        scale_dtype=scale_dtype,
        palette=palette,
    )
    return packed, scale_dtype
