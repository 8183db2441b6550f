"""What a module that holds the values of some blocks needs, whatever it computes with them.

`values` [Z, B, B] is a Parameter in the order of `blocks` [Z, 2]; `layout`, the index array of the
ops, is built from the blocks whenever they change and is not part of the state dict.
"""

from __future__ import annotations

from typing import Any, Optional

import torch
from torch import nn

from nibblock import ops as _ops
from nibblock.ops import _block_checks, _checks


class BlockValues:
    """Mixin of modules with the blocks of an `_rows` x `_columns` weight in `self.values`."""

    _rows: int
    _columns: int
    block: int

    def _init_blocks(
        self,
        rows: int,
        columns: int,
        block: int,
        blocks: torch.Tensor,
        values: Optional[torch.Tensor],
        dtype: torch.dtype,
        device: Any,
    ) -> None:
        """`blocks` are checked already; `values` of None makes zeros."""
        op = type(self).__name__
        if dtype not in _block_checks.VALUES:
            raise TypeError(
                f"{op}: dtype must be float32 or bfloat16, got {_checks.dtype_name(dtype)}"
            )
        self._rows, self._columns, self.block = rows, columns, block
        if values is None:
            values = torch.zeros(len(blocks), block, block, dtype=dtype, device=device)
        self.register_parameter("values", nn.Parameter(values))
        self._set_blocks(blocks, values.device)

    def _set_blocks(self, blocks: torch.Tensor, device: torch.device) -> None:
        index = blocks.to("cpu", torch.int32)
        layout = _ops.block_layout(index, self._rows, self._columns, self.block)
        self.register_buffer("blocks", index.to(device))
        self.register_buffer("layout", layout.to(device), persistent=False)
        # Data of a meta module are lost with `.to_empty`; indices of garbage would be fatal.
        self._index = index if device.type == "meta" else None

    @property
    def density(self) -> float:
        """The share of all blocks that are stored."""
        rows, columns = _block_checks.grid(self._rows, self._columns, self.block)
        return len(self.values) / max(1, rows * columns)

    # --- moves -----------------------------------------------------------------------------------

    def _apply(self, fn, recurse=True):
        # The kernels take values in float32 or bfloat16: `.half()` leaves them as they are.
        values = self.values

        def wide(tensor):
            out = fn(tensor)
            own = tensor is values or tensor is values.grad
            return tensor.to(out.device) if own and out.dtype == torch.float16 else out

        super()._apply(wide, recurse)
        if self._index is not None and not self.layout.is_meta:
            self._set_blocks(self._index, self.layout.device)
        return self

    # --- state dict ------------------------------------------------------------------------------

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
        # The blocks of the file replace the module's; nn.Module then loads `values` into the new
        # shape.
        local = {k: v for k, v in state_dict.items() if k.startswith(prefix)}
        blocks, values = local.get(prefix + "blocks"), local.get(prefix + "values")
        if blocks is not None and not self._same_blocks(blocks):
            error = self._refuse_blocks(blocks, values)
            if error:
                error_msgs.append(f"{prefix}blocks: {error}")
                for part in ("blocks", "values"):
                    local[prefix + part] = getattr(self, part)  # unchanged
            else:
                assign = local_metadata.get("assign_to_params_buffers", False)
                device = blocks.device if assign else self.blocks.device
                self._set_blocks(blocks, device)
                local[prefix + "blocks"] = self.blocks
                if len(values) != len(self.values):
                    empty = self.values.new_empty(values.shape)
                    self.values = nn.Parameter(empty, requires_grad=self.values.requires_grad)
        super()._load_from_state_dict(
            local, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )

    def _same_blocks(self, blocks: torch.Tensor) -> bool:
        if blocks.is_meta or self.blocks.is_meta or blocks.shape != self.blocks.shape:
            return False
        return torch.equal(blocks.to(self.blocks), self.blocks)

    def _refuse_blocks(self, blocks, values) -> str:
        op = type(self).__name__
        try:
            _block_checks.check_blocks(op, blocks, self._rows, self._columns, self.block)
        except (TypeError, ValueError) as error:
            return str(error)
        need = [len(blocks), self.block, self.block]
        if values is None or list(values.shape) != need:
            got = "none" if values is None else list(values.shape)
            return f"{op}: values must be {need} for these blocks, got {got}"
        return ""


class ReadOnlyWeight:
    """Mixin of modules whose `weight` is computed: it cannot be assigned or deleted."""

    _weight_source = "values"

    @property
    def weight(self) -> torch.Tensor:
        """The dense weight [out_features, in_features], computed anew at every access;
        read-only.
        """
        return self.dense()

    @weight.setter
    def weight(self, value: object) -> None:
        self._refuse_weight()

    @weight.deleter
    def weight(self) -> None:
        self._refuse_weight()

    def _refuse_weight(self) -> None:
        raise AttributeError(
            f"{type(self).__name__}: weight must not be assigned, got an assignment; it is "
            f"computed from {self._weight_source}"
        )

    def __setattr__(self, name: str, value: object) -> None:
        # nn.Module.__setattr__ would register a Parameter under this name and never see the
        # property.
        if name == "weight":
            self._refuse_weight()
        super().__setattr__(name, value)
