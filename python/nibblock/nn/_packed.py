"""What a module that holds one packed int4 weight needs, whatever it computes with it.

In memory there is one frozen uint8 Parameter `packed`: a Parameter, because buffers are broadcast
on every forward by data parallel wrappers, and uint8, because `.to(bfloat16)` would round float
scales. In a state dict there are the canonical `qweight`, `scales` and `offsets`, so that a file
written on one machine loads on any other.
"""

from __future__ import annotations

from typing import Any, Optional

import torch
from torch import nn

from nibblock import ops as _ops
from nibblock.ops import _checks

# __init__ of nn.Linear and nn.Embedding would allocate the dense weight; these classes never call
# it.


class PackedWeight:
    """Mixin of `Int4Linear` and `Int4Embedding`: a weight of `_rows` x `_columns` kept in
    `self.packed`.
    """

    _rows: int
    _columns: int
    group_size: int
    bits: int
    affine: bool
    scale_dtype: torch.dtype

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
        self._rows, self._columns = rows, columns
        self.group_size, self.bits = group_size, bits
        self.affine, self.scale_dtype = affine, scale_dtype

    def _init_packed(self, packed: Optional[torch.Tensor], device: Any) -> None:
        if packed is None:
            packed = torch.empty(self._packed_bytes(), dtype=torch.uint8, device=device)
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

    def _packed_bytes(self) -> int:
        return _checks.packed_bytes(
            self._rows, self._columns, self.group_size, self.bits, self.affine, self.scale_dtype
        )

    # --- the weight ------------------------------------------------------------------------------

    @property
    def weight(self) -> torch.Tensor:
        """The dequantised weight, computed anew at every access; read-only."""
        return self.dequantize()

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
        return _ops.int4_dequantize(
            self.packed.detach(),
            out_features=self._rows,
            in_features=self._columns,
            group_size=self.group_size,
            bits=self.bits,
            affine=self.affine,
            scale_dtype=self.scale_dtype,
            dtype=torch.float32 if dtype is None else dtype,
        )

    def canonical(self) -> dict[str, torch.Tensor]:
        """The state dict's form of the weight: `qweight`, `scales` and, when affine, `offsets`."""
        if self.packed.is_meta:
            shapes = self._canonical_shapes()
            return {k: torch.empty(s, dtype=d, device="meta") for k, (s, d) in shapes.items()}
        qweight, scales, offsets = _ops.int4_unpack(
            self.packed,
            out_features=self._rows,
            in_features=self._columns,
            group_size=self.group_size,
            bits=self.bits,
            affine=self.affine,
            scale_dtype=self.scale_dtype,
        )
        out = {"qweight": qweight, "scales": scales}
        if offsets is not None:
            out["offsets"] = offsets
        return out

    def _canonical_shapes(self) -> dict[str, tuple[tuple[int, int], torch.dtype]]:
        codes = -(-self._columns // 2) if self.bits == 4 else self._columns
        groups = _checks.groups_of(self._columns, self.group_size)
        shapes = {
            "qweight": ((self._rows, codes), torch.uint8),
            "scales": ((self._rows, groups), self.scale_dtype),
        }
        if self.affine:
            shapes["offsets"] = ((self._rows, groups), self.scale_dtype)
        return shapes

    # --- state dict ------------------------------------------------------------------------------

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        for name, tensor in self.canonical().items():
            destination[prefix + name] = tensor
        bias = self._parameters.get("bias")
        if bias is not None:
            destination[prefix + "bias"] = bias if keep_vars else bias.detach()

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
        # and what nn.Module reports about `packed` back into the file's names.
        self._adopt_scale_dtype(state_dict, prefix)
        shapes = self._canonical_shapes()
        local = {k: v for k, v in state_dict.items() if k.startswith(prefix)}
        dense = local.pop(prefix + "weight", None)
        given = {name: local.pop(prefix + name, None) for name in shapes}
        if dense is not None and any(v is not None for v in given.values()):
            local[prefix + "weight"] = (
                dense  # both forms at once: the canonical one, and report the other
            )
            dense = None
        absent = [name for name, value in given.items() if value is None]
        key = prefix + "packed"
        errors: list[str] = []
        if dense is not None:
            local[key] = self._pack_dense(prefix, dense, errors)
        elif not absent:
            local[key] = self._pack_canonical(prefix, given, shapes, errors)
        if errors:
            error_msgs.extend(errors)
            local[key] = self._parameters["packed"]  # unchanged; the errors above say why
        missing: list[str] = []
        super()._load_from_state_dict(
            local, prefix, local_metadata, strict, missing, unexpected_keys, error_msgs
        )
        for name in missing:
            if name == key:
                missing_keys.extend(prefix + part for part in absent)
            else:
                missing_keys.append(name)

    def _adopt_scale_dtype(self, state_dict, prefix):
        """Takes over the file's dtype of scales, so that a state dict round trip changes nothing.

        Only when everything it holds fits (nothing may have changed if loading is refused), and not
        while fused with siblings, which share one format.
        """
        shapes = self._canonical_shapes()
        given = {name: state_dict.get(prefix + name) for name in shapes}
        if any(v is None or tuple(v.shape) != shapes[k][0] for k, v in given.items()):
            return
        dtypes = {v.dtype for k, v in given.items() if k != "qweight"}
        dtype = dtypes.pop()
        if (
            dtypes
            or dtype == self.scale_dtype
            or dtype not in _checks.SCALE_DTYPES
            or given["qweight"].dtype != torch.uint8
            or getattr(self, "_fused", None) is not None
        ):
            return
        self.scale_dtype = dtype
        packed = self._parameters["packed"]
        packed.data = torch.empty(self._packed_bytes(), dtype=torch.uint8, device=packed.device)
        self._format_changed()

    def _format_changed(self) -> None:
        """Renews what a class derives from the format."""

    def _pack_dense(self, prefix, dense, errors):
        if tuple(dense.shape) != (self._rows, self._columns):
            errors.append(self._mismatch(prefix + "weight", dense, (self._rows, self._columns)))
            return None
        if dense.is_meta:
            return torch.empty(self._packed_bytes(), dtype=torch.uint8, device="meta")
        try:
            parts = _ops.int4_quantize(
                dense,
                group_size=self.group_size,
                bits=self.bits,
                symmetric=not self.affine,
                scale_dtype=self.scale_dtype,
            )
            return _ops.int4_pack(
                *parts, in_features=self._columns, group_size=self.group_size, bits=self.bits
            )
        except (TypeError, ValueError) as error:
            errors.append(f"{prefix}weight: {error}")
            return None

    def _pack_canonical(self, prefix, given, shapes, errors):
        for name, (shape, dtype) in shapes.items():
            value = given[name]
            if tuple(value.shape) != shape:
                errors.append(self._mismatch(prefix + name, value, shape))
            elif name == "qweight" and value.dtype != torch.uint8:
                errors.append(
                    f"{prefix}qweight must be uint8, got {_checks.dtype_name(value.dtype)}"
                )
            elif value.dtype != dtype and not value.is_meta:
                # float16 to float32 is exact; the other way only if no value changes.
                cast = value.to(dtype)
                if not torch.equal(cast.to(value.dtype), value):
                    errors.append(
                        f"{prefix}{name} must be exact in {_checks.dtype_name(dtype)}, got "
                        f"{_checks.dtype_name(value.dtype)} values that are not; build the module "
                        f"with scale_dtype={value.dtype}"
                    )
                given[name] = cast
        if errors:
            return None
        if any(value.is_meta for value in given.values()):
            return torch.empty(self._packed_bytes(), dtype=torch.uint8, device="meta")
        return _ops.int4_pack(
            given["qweight"],
            given["scales"],
            given.get("offsets"),
            in_features=self._columns,
            group_size=self.group_size,
            bits=self.bits,
        )

    @staticmethod
    def _mismatch(key: str, value: torch.Tensor, shape: tuple[int, int]) -> str:
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
        return ", ".join(parts)


def packed_from_codes(op, qweight, scales, offsets, columns, group_size, bits):
    """The packed tensor of canonical parts, for `from_codes`; meta parts give a meta tensor."""
    if qweight.is_meta:
        size = _checks.packed_bytes(
            qweight.shape[0], columns, group_size, bits, offsets is not None, scales.dtype
        )
        return torch.empty(size, dtype=torch.uint8, device="meta")
    return _ops.int4_pack(
        qweight, scales, offsets, in_features=columns, group_size=group_size, bits=bits
    )
