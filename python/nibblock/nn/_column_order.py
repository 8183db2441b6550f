"""Columns that are packed in another order than the layer's inputs come in.

Quantisers with activation order (GPTQ's `desc_act`) give columns of like importance one scale. Such
groups lie scattered over the row; packed one group after the other they are a weight like any:

    packed[n, j] = w[n, order[j]],    y = x[..., order] packed^T

The order belongs to the codes: it is in the state dict beside them, and goes when they are replaced
by codes without one.
"""

from __future__ import annotations

from typing import Any, Optional

import torch

from nibblock.nn._packed import PackedWeight
from nibblock.ops import _checks

NAME = "column_order"  # of the buffer, in the module and in its state dict


def take_columns(x: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """x[..., order], contiguous; its gradient is a scatter, exact for every column comes once."""
    # (index_select's gradient takes five times as long along the last dimension.)
    return x.gather(-1, order.expand(x.shape))


def as_order(op: str, order: object, shape: tuple[int, ...]) -> torch.Tensor:
    """Orders of columns [..., K] as int64; on the meta device nothing but their shape is known.

    Raises:
        TypeError: it is no tensor of int32 or int64. ValueError: another shape, or some column is
        not there exactly once.
    """
    _checks.check_tensor(op, NAME, order)
    if order.dtype not in _checks.INDEX_DTYPES:
        got = _checks.dtype_name(order.dtype)
        raise TypeError(f"{op}: {NAME} must be int64 or int32, got {got}")
    if tuple(order.shape) != shape:
        raise ValueError(f"{op}: {NAME} must be {list(shape)}, got {list(order.shape)}")
    order = order.detach().to(torch.int64)
    if order.is_meta:
        return order
    ascending, last = order.sort(-1).values, shape[-1] - 1
    wrong = (ascending != torch.arange(last + 1, device=order.device)).nonzero().tolist()
    if wrong:
        at, found = wrong[0][-1], int(ascending[tuple(wrong[0])])
        what = f"{found} twice" if 0 <= found < at else f"{found} in place of {at}"
        raise ValueError(f"{op}: {NAME} must hold each of 0 to {last} once, got {what}")
    return order


class OrderedColumns(PackedWeight):
    """A `PackedWeight` that may have a `column_order`: a buffer, int64 [columns], or None.

    One of several matrices has an order for each: [matrices, columns].
    """

    column_order: Optional[torch.Tensor]

    @property
    def _order_shape(self) -> tuple[int, ...]:
        return (self._columns,)

    def _init_order(self, order: Optional[torch.Tensor]) -> None:
        """After `_init_packed`. The order is copied: loading writes into it."""
        if order is not None:
            order = as_order(type(self).__name__, order, self._order_shape)
            order = order.to(self.packed.device, copy=True)
        self.register_buffer(NAME, order)

    @property
    def _order(self) -> Optional[torch.Tensor]:
        # (Pickles of before there were orders have no such buffer.)
        return self._buffers.get(NAME)

    def __setattr__(self, name: str, value: object) -> None:
        super().__setattr__(name, value)
        if name == NAME:
            self._format_changed()

    def dequantize(self, dtype: Optional[torch.dtype] = None) -> torch.Tensor:
        """As of `PackedWeight`, columns in the order of the inputs."""
        dense, order = super().dequantize(dtype), self._order
        return dense if order is None else take_columns(dense, order.argsort())

    def canonical(self) -> dict[str, torch.Tensor]:
        """As of `PackedWeight`, in the order of packing, and `column_order` where there is one."""
        return self._with_order(super().canonical())

    def _with_order(self, parts: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        order = self._order
        return parts if order is None else {**parts, NAME: order}

    def _order_to_load(
        self, prefix: str, local: dict[str, Any], codes: bool, errors: list[str]
    ) -> Optional[torch.Tensor]:
        order = local.pop(prefix + NAME, None)
        if order is None:
            return None
        if not codes:
            errors.append(f"{prefix}{NAME} must come with qweight, whose columns it is about")
            return None
        try:
            return as_order(type(self).__name__, order, self._order_shape)
        except (TypeError, ValueError) as error:
            errors.append(f"{prefix}{NAME}: {error}")
            return None

    def _take_order(self, order: Optional[torch.Tensor], assign: bool) -> None:
        old = self._order
        if order is None and old is None:
            return
        if order is not None and not assign:
            if old is not None and old.device == self.packed.device:
                order = old.copy_(order)  # as `packed`: whoever holds the buffer sees it
            else:
                order = order.to(self.packed.device, copy=True)
        setattr(self, NAME, order)

    def _format_repr(self) -> str:
        return super()._format_repr() + (f", {NAME}=True" if self._order is not None else "")
