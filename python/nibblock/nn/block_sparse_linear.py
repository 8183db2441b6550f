"""`BlockSparseLinear`: an `nn.Linear` of which only some B x B blocks are stored."""

from __future__ import annotations

import math
from typing import Any, Optional

import torch
from torch import nn

from nibblock.nn import _conv1d
from nibblock.nn._blocks import BlockValues, ReadOnlyWeight
from nibblock.ops import _block_checks, _checks
from nibblock.sparse import _choose

_linear = torch.ops.nibblock.block_sparse_linear.default
_forward = torch.ops.nibblock._block_sparse_linear_forward.default


class BlockSparseLinear(ReadOnlyWeight, BlockValues, nn.Linear):
    """A pruned linear layer; stands wherever an `nn.Linear` stands, and trains.

        y[m, n] = sum over stored blocks (I, J) with n in I of
                  sum over k in J of x[m, k] * S[n, k]  + bias[n]

    Args:
        in_features, out_features: K, N.
        bias: whether there is a bias, a trainable Parameter [N].
        block: B, one of 16, 32, 64, 128.
        blocks: which blocks are stored: int [Z, 2] (row block, column block), sorted by row block,
            then column block; a bool mask [ceil(N/B), ceil(K/B)]; or a float, that share of all
            blocks, spread evenly and repeatably.
        dtype: float32 | bfloat16 of `values` and bias.
        device: where they live; "meta" allocates nothing.

    Attributes:
        values: Parameter [Z, B, B], in the order of `blocks`; zero outside [N, K] in ragged blocks.
        blocks: int32 [Z, 2].
        density: Z over the number of all blocks.
        weight: read-only, the dense [N, K].

    The constructor draws values as `nn.Linear` does, for the inputs that a row really has. The
    state dict holds `values`, `blocks` and `bias`; loading other blocks than the module's replaces
    them.

    Input: [..., K] float32 | bfloat16 | float16. Output: [..., N] of the input's dtype.
    Raises: TypeError for another dtype, ValueError for another shape.
    Gradients: input, values (stored blocks only), bias.
    Determinism and numerics: as `nibblock.ops.block_sparse_linear`. `.half()` turns the bias into
    float16 and leaves values as they are.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        block: int = 32,
        blocks: _choose.BlockChoice = 0.25,
        dtype: torch.dtype = torch.float32,
        device: Any = None,
    ) -> None:
        index = _choose.resolve_blocks(
            "BlockSparseLinear", blocks, out_features, in_features, block
        )
        own_bias = torch.zeros(out_features, dtype=dtype, device=device) if bias else None
        self._build(in_features, out_features, block, index, None, own_bias, dtype, device)
        self.reset_parameters()

    def _build(self, in_features, out_features, block, blocks, values, bias, dtype, device):
        nn.Module.__init__(self)
        self.in_features, self.out_features = in_features, out_features
        self._init_blocks(out_features, in_features, block, blocks, values, dtype, device)
        if bias is not None and not isinstance(bias, nn.Parameter):
            bias = nn.Parameter(bias)
        self.register_parameter("bias", bias)

    @classmethod
    def from_linear(
        cls,
        linear: nn.Module,
        density: float = 0.25,
        block: int = 32,
        mask: Optional[torch.Tensor] = None,
        dtype: Optional[torch.dtype] = None,
    ) -> BlockSparseLinear:
        """Prunes a dense linear: keeps the blocks of largest Frobenius norm, or those of a mask.

        Args:
            linear: an `nn.Linear`, its weight [N, K] float32 | bfloat16 | float16, finite; or
                transformers' `Conv1D`, its weight [K, N].
            density: share of all blocks to keep, in (0, 1]; ignored when there is a mask.
            block: B, one of 16, 32, 64, 128.
            mask: bool [ceil(N/B), ceil(K/B)], true for the blocks to keep; or None.
            dtype: float32 | bfloat16 of `values`; None for the weight's (float32 for float16).
        Returns:
            A new module on the linear's device, in its training mode. The bias Parameter is taken
            over, not copied.
        Raises:
            TypeError: neither of the two, or a dtype that is not listed. ValueError: a block edge
            that does not exist, a density or mask that does not fit, or a weight that is not
            finite.
        Determinism: the same weight gives the same blocks; of equal norms the first block wins.
        """
        op = "BlockSparseLinear.from_linear"
        if _conv1d.is_conv1d(linear):
            linear = _conv1d.as_linear(linear)
        if not isinstance(linear, nn.Linear):
            raise TypeError(f"{op}: linear must be an nn.Linear, got {type(linear).__name__}")
        weight = linear.weight.detach()
        _checks.check_float(op, "weight", weight)
        _block_checks.check_block(op, block)
        if mask is None:
            _choose.check_density(op, density)
            blocks = _choose.magnitude_blocks(weight, block, density)
        else:
            blocks = _choose.mask_blocks(mask, *weight.shape, block)
        if dtype is None:
            dtype = weight.dtype if weight.dtype in _block_checks.VALUES else torch.float32
        return cls.from_values(
            _choose.read_blocks(weight, blocks, block).to(dtype),
            blocks,
            linear.bias,
            in_features=weight.shape[1],
            out_features=weight.shape[0],
        ).train(linear.training)

    @classmethod
    def from_values(
        cls,
        values: torch.Tensor,
        blocks: torch.Tensor,
        bias: Optional[torch.Tensor] = None,
        *,
        in_features: int,
        out_features: int,
    ) -> BlockSparseLinear:
        """Wraps stored blocks; Parameters are taken over, not copied.

        Args:
            values: [Z, B, B] float32 | bfloat16.
            blocks: int [Z, 2], sorted and distinct.
            bias: [N] float32 | bfloat16 | float16, or None.
            in_features, out_features: K, N.
        Returns:
            A new module on the device of values.
        Raises:
            TypeError: a dtype that is not listed. ValueError: shapes that do not fit each other.
        """
        op = "BlockSparseLinear.from_values"
        block = values.shape[-1] if values.dim() else 0
        _block_checks.check_block(op, block)
        _block_checks.check_values(op, values, block)
        index = _block_checks.check_blocks(op, blocks, out_features, in_features, block)
        if len(index) != len(values):
            raise ValueError(f"{op}: values must be {len(index)} blocks, got {list(values.shape)}")
        if bias is not None:
            _checks.check_float(op, "bias", bias)
            if list(bias.shape) != [out_features]:
                raise ValueError(f"{op}: bias must be [{out_features}], got {list(bias.shape)}")
        out = cls.__new__(cls)
        sizes = (in_features, out_features, block)
        out._build(*sizes, index, values, bias, values.dtype, values.device)
        return out

    def dense(self) -> torch.Tensor:
        """The dense weight [N, K] that the blocks stand for: a new tensor without gradient."""
        return _choose.scatter_blocks(self.values, self.blocks, self._rows, self._columns)

    def reset_parameters(self) -> None:
        """Draws values and bias uniformly within 1 / sqrt(inputs of an output)."""
        bound = 1 / math.sqrt(max(1.0, self.density * self.in_features))
        nn.init.uniform_(self.values, -bound, bound)
        if self.bias is not None:
            nn.init.uniform_(self.bias, -bound, bound)
        if self.values.is_meta:
            return
        rows, columns = _block_checks.grid(self._rows, self._columns, self.block)
        with torch.no_grad():
            for axis, last, whole in ((0, rows - 1, self._rows), (1, columns - 1, self._columns)):
                inside = whole - last * self.block
                edge = self.values[(self.blocks[:, axis] == last).nonzero().flatten()]
                edge.narrow(axis + 1, inside, self.block - inside).zero_()
                self.values[(self.blocks[:, axis] == last).nonzero().flatten()] = edge

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        # Straight from the dictionaries, and without autograd where nothing asks for a gradient:
        # see Int4Linear.forward.
        parameters = self._parameters
        values, bias = parameters["values"], parameters["bias"]
        try:
            if input.shape[-1] == self.in_features:
                op = _forward
                if torch.is_grad_enabled() and (
                    values.requires_grad
                    or input.requires_grad
                    or (bias is not None and bias.requires_grad)
                ):
                    op = _linear
                layout = self._buffers["layout"]
                return op(input, values, layout, bias, None, self.out_features, self.block)
        except (RuntimeError, AttributeError, IndexError):
            self._diagnose(input)
            raise
        self._diagnose(input)
        raise AssertionError("unreachable: the shape above was refused")

    def _diagnose(self, x: object) -> None:
        """Raises the error that says what is wrong with x; returns if nothing is."""
        check_input(self, "block_sparse_linear", x)
        _block_checks.check_linear(
            "block_sparse_linear",
            x,
            self.values,
            self.layout,
            self.bias,
            None,
            self.out_features,
            self.block,
        )

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, block={self.block}, blocks={len(self.values)}, "
            f"density={self.density:.3g}"
        )


def check_input(layer: nn.Module, op: str, x: object) -> None:
    """Raises what is wrong with a layer's input before its op is asked."""
    _checks.check_float(op, "x", x)
    if x.dim() < 1:
        raise ValueError(f"{op}: x must have at least 1 dimension, got a scalar")
    if x.shape[-1] != layer.in_features:
        raise ValueError(
            f"{op}: x last dim must equal in_features {layer.in_features}, got {list(x.shape)}"
        )
