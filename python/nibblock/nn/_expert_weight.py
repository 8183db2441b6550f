"""`ExpertWeight`: one projection of all experts of a layer, each expert packed for itself."""

from __future__ import annotations

from typing import Optional

import torch
from torch import nn

from nibblock import ops as _ops
from nibblock.nn._column_order import OrderedColumns, take_columns
from nibblock.ops import _checks

Parts = tuple[torch.Tensor, torch.Tensor, Optional[torch.Tensor]]


class ExpertWeight(OrderedColumns, nn.Module):
    """The weights of E linears of one shape; `Int4Experts` computes with them.

    `packed` is one frozen uint8 Parameter [E, bytes]: row e is what an `Int4Linear` with expert e's
    weight would hold. The state dict has `qweight` [E, N, ceil(K / 2)], `scales` and `offsets`
    [E, N, ceil(K / G)]; a dense `weight` is accepted on loading and rounded to nearest. The buffer
    `column_order` is None, or for each expert what an `Int4Linear`'s is: int64 [E, K].

    Args:
        experts, rows, columns: E, N, K.
        transposed: whether the dense form is [E, K, N] in place of [E, N, K].
        group_size, bits, affine, scale_dtype, compute: as in `nibblock.ops.int4_linear`.
        packed: [E, bytes] uint8; None for a weight of zeros.
        column_order: [E, K] int64 | int32, or None.
        device: of a weight of zeros.
    """

    def __init__(
        self,
        experts: int,
        rows: int,
        columns: int,
        *,
        transposed: bool,
        group_size: int,
        bits: int,
        affine: bool,
        scale_dtype: torch.dtype,
        compute: str,
        packed: Optional[torch.Tensor] = None,
        column_order: Optional[torch.Tensor] = None,
        device: Optional[torch.device] = None,
    ) -> None:
        nn.Module.__init__(self)
        self.experts, self.transposed = experts, transposed
        self._init_format(rows, columns, group_size, bits, affine, scale_dtype)
        self._views: list = []
        self._viewed: tuple = ()
        self.compute = compute
        if packed is None:
            self._init_packed(None, device)
        else:
            self.register_parameter("packed", nn.Parameter(packed, requires_grad=False))
        self._init_order(column_order)

    # --- sizes -----------------------------------------------------------------------------------

    def _packed_bytes(self, scale_dtype: torch.dtype, palette: bool = False) -> int:
        return self.experts * super()._packed_bytes(scale_dtype, palette)

    def _packed_shape(self, scale_dtype: torch.dtype, palette: bool = False) -> tuple[int, ...]:
        return self.experts, super()._packed_bytes(scale_dtype, palette)

    @property
    def _dense_shape(self) -> tuple[int, ...]:
        matrix = (self._columns, self._rows) if self.transposed else (self._rows, self._columns)
        return (self.experts, *matrix)

    @property
    def _order_shape(self) -> tuple[int, ...]:
        return self.experts, self._columns

    def _canonical_shapes(self, scale_dtype):
        shapes = super()._canonical_shapes(scale_dtype)
        return {k: ((self.experts, *shape), dtype) for k, (shape, dtype) in shapes.items()}

    # --- one expert ------------------------------------------------------------------------------

    @property
    def compute(self) -> str:
        """ "bf16" or "int8", as `Int4Linear.compute`."""
        return self._compute

    @compute.setter
    def compute(self, value: str) -> None:
        form = (self._rows, self.group_size, self.bits, self.affine, self._scale_dtype, value)
        code = _checks.format_code(*form)
        self._compute, self._args, self._code = value, form, code

    def _format_changed(self) -> None:
        self.compute = self._compute

    def expert(self, index: int) -> torch.Tensor:
        """Row `index` of `packed`: a view that is made once, for making one takes as long as a
        fifth of a small product.
        """
        packed = self._parameters["packed"]
        key = (packed, packed.data_ptr())  # `.data` may be exchanged under the same Parameter
        if not self._viewed or packed is not self._viewed[0] or key[1] != self._viewed[1]:
            self._views, self._viewed = [None] * self.experts, key
        view = self._views[index]
        if view is None:
            with torch.inference_mode(False):  # backward cannot keep one made in inference mode
                view = self._views[index] = packed.detach()[index]
        return view

    def __getstate__(self) -> dict:
        # Copies and files do without the views: each would carry the whole storage along.
        return {**self.__dict__, "_views": [], "_viewed": ()}

    # --- all of them -----------------------------------------------------------------------------

    def dequantize(self, dtype: Optional[torch.dtype] = None) -> torch.Tensor:
        """The dense weights [E, N, K], or [E, K, N] when transposed.

        Args:
            dtype: float32 (when None) | bfloat16 | float16 of the result; rounded once.
        Returns:
            A new tensor without gradient, on the device of `packed`.
        Raises:
            TypeError: another dtype.
        """
        form = {**self._layout(), "dtype": torch.float32 if dtype is None else dtype}
        out, order = None, self._order
        for index, row in enumerate(self.packed.detach()):
            dense = _ops.int4_dequantize(row, **form)
            if order is not None:
                dense = take_columns(dense, order[index].argsort())
            if out is None:
                out = dense.new_empty(self._dense_shape)
            out[index] = dense.t() if self.transposed else dense
        return out

    def canonical(self) -> dict[str, torch.Tensor]:
        """All experts' `qweight`, `scales` and, when affine, `offsets`, and where there is one the
        `column_order`: the state dict's form.
        """
        device = self.packed.device
        shapes = self._canonical_shapes(self.scale_dtype)
        out = {k: torch.empty(s, dtype=d, device=device) for k, (s, d) in shapes.items()}
        if self.packed.is_meta:
            return self._with_order(out)
        form = self._layout()
        for index, row in enumerate(self.packed.detach()):
            for tensor, part in zip(out.values(), _ops.int4_unpack(row, **form)):
                tensor[index] = part
        return self._with_order(out)

    def _quantize(self, dense: torch.Tensor) -> Parts:
        return quantize_experts(
            dense.transpose(1, 2) if self.transposed else dense,
            group_size=self.group_size,
            bits=self.bits,
            symmetric=not self.affine,
            scale_dtype=self.scale_dtype,
        )

    def _pack(self, qweight, scales, offsets, scale_dtype, palette) -> torch.Tensor:
        form = (self._columns, self.group_size, self.bits, scale_dtype, palette)
        return pack_experts(qweight, scales, offsets, *form)

    def extra_repr(self) -> str:
        return (
            f"experts={self.experts}, in_features={self._columns}, out_features={self._rows}, "
            f"{self._format_repr()}"
        )


def quantize_experts(weight: torch.Tensor, **form: object) -> Parts:
    """`nibblock.ops.int4_quantize` of each [N, K] of a [E, N, K]; form: its keywords.

    Raises:
        ValueError: as it does, beginning with the expert.
    """
    found: list[Parts] = []
    for index, matrix in enumerate(weight.detach()):
        try:
            found.append(_ops.int4_quantize(matrix, **form))
        except ValueError as error:
            raise ValueError(f"expert {index}: {error}") from error
    qweight, scales, offsets = zip(*found)
    return (
        torch.stack(qweight),
        torch.stack(scales),
        None if offsets[0] is None else torch.stack(offsets),
    )


def pack_experts(
    qweight: torch.Tensor,
    scales: torch.Tensor,
    offsets: Optional[torch.Tensor],
    columns: int,
    group_size: int,
    bits: int,
    scale_dtype: torch.dtype,
    palette: bool = False,
) -> torch.Tensor:
    """[E, bytes]: `nibblock.ops.int4_pack` of each expert's parts."""
    out = None
    for index in range(len(qweight)):
        packed = _ops.int4_pack(
            qweight[index],
            scales[index],
            None if offsets is None else offsets[index],
            in_features=columns,
            group_size=group_size,
            bits=bits,
            scale_dtype=scale_dtype,
            palette=palette,
        )
        if out is None:
            out = packed.new_empty((len(qweight), len(packed)))
        out[index] = packed
    return out
