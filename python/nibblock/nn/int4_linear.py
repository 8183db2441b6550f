"""`Int4Linear`: an `nn.Linear` whose weight is stored in 4 or 8 bits."""

from __future__ import annotations

from typing import Any, Optional

import torch
from torch import nn

from nibblock import ops as _ops
from nibblock.nn import _conv1d
from nibblock.nn._column_order import OrderedColumns, take_columns
from nibblock.nn._packed import packed_from_codes
from nibblock.ops import _checks

_linear = torch.ops.nibblock.int4_linear.default
_forward = torch.ops.nibblock._int4_linear_forward.default


class Int4Linear(OrderedColumns, nn.Linear):
    """A linear layer whose weight is stored in 4 or 8 bits; stands wherever an `nn.Linear` stands.

        y[m, n] = sum_k x[m, k] * (scale[n, g(k)] * code[n, k] + offset[n, g(k)]) + bias[n]

    Args:
        in_features, out_features: K, N.
        bias: whether there is a bias, a trainable float32 Parameter [N].
        group_size: 32, 64, 128, 256, or -1 for one group per row; with 8 bits or int8
            scales also 16.
        symmetric: True stores scales only, False scales and offsets.
        bits: 4 or 8.
        compute: "bf16", or "int8" to quantise activations, and gradients on their way through, on
            the fly; may be changed at any time.
        scale_dtype: float32 | float16 | int8 of scales and offsets; the last as in
            `nibblock.ops.int4_pack`. The attribute `palette` says whether 8-bit codes take 4 bits.
        device: where the weight lives; "meta" allocates nothing.

    The constructor makes a weight of zeros; `from_linear`, `from_codes`, `from_packed` and
    `load_state_dict` fill it. The state dict holds `qweight`, `scales`, `offsets` (unless
    symmetric) and `bias`; a dense `weight` is accepted on loading and rounded to nearest.

    The buffer `column_order` is None, or int64 [K]: column j of the codes is column column_order[j]
    of the weight, as in files that are quantised in activation order. Then y is computed from
    x[..., column_order], the state dict holds it beside the codes, and loading codes without it
    takes it away. `weight` and `dequantize` have the columns in the order of x. `from_codes` and
    `from_packed` take it.

    Input: [..., K] float32 | bfloat16 | float16. Output: [..., N] of the input's dtype.
    Raises: TypeError for another dtype, ValueError for another shape.
    Gradients: input and bias. The weight is frozen, and `.weight` is a read-only dequantised copy.
    Determinism and numerics: as `nibblock.ops.int4_linear`.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        group_size: int = 128,
        symmetric: bool = False,
        bits: int = 4,
        compute: str = "bf16",
        scale_dtype: torch.dtype = torch.float32,
        device: Any = None,
    ) -> None:
        self._build(
            in_features,
            out_features,
            nn.Parameter(torch.zeros(out_features, dtype=torch.float32, device=device))
            if bias
            else None,
            group_size,
            bits,
            not symmetric,
            scale_dtype,
            compute,
            None,
            device=device,
        )

    def _build(
        self,
        in_features,
        out_features,
        bias,
        group_size,
        bits,
        affine,
        scale_dtype,
        compute,
        packed,
        order=None,
        device=None,
    ):
        nn.Module.__init__(self)
        self.in_features, self.out_features = in_features, out_features
        self._init_format(out_features, in_features, group_size, bits, affine, scale_dtype)
        self.compute = compute
        self._init_packed(packed, device)
        self._init_order(order)
        if bias is not None and not isinstance(bias, nn.Parameter):
            bias = nn.Parameter(bias, requires_grad=bias.is_floating_point())
        self.register_parameter("bias", bias)
        self._fused = None  # (FusedInt4Group, index in it) while siblings run as one call

    # --- other ways to make one ------------------------------------------------------------------

    @classmethod
    def from_linear(
        cls,
        linear: nn.Module,
        group_size: int = 128,
        symmetric: bool = False,
        bits: int = 4,
        compute: str = "bf16",
        method: str = "rtn",
        importance: Optional[torch.Tensor] = None,
        scale_dtype: Optional[torch.dtype] = None,
    ) -> Int4Linear:
        """Quantises a dense linear. The bias Parameter is taken over, not copied.

        Args:
            linear: an `nn.Linear`, its weight [N, K] float32 | bfloat16 | float16, finite; or
                transformers' `Conv1D`, its weight [K, N]. Of the latter `load_state_dict` goes on
                taking a dense weight as [K, N]; `weight` is [N, K] as that of any linear.
            group_size, symmetric, bits, compute: as in the constructor.
            method: "rtn" or "mse", see `nibblock.ops.int4_quantize`.
            importance: [K] float32 weights of the columns' errors for method="mse"; or None.
            scale_dtype: float16 | float32 | int8 of scales and offsets, as in
                `nibblock.ops.int4_quantize`; None takes float16 where all scales are normal numbers
                in it (or zero) and no offset moves by more than an eighth of a code step, else
                float32.
        Returns:
            A new module on the linear's device, in its training mode.
        Raises:
            TypeError: neither of the two, or a dtype that is not listed. ValueError: a format that
            does not exist, or a weight that is not finite.
        """
        op = "Int4Linear.from_linear"
        transposed = _conv1d.is_conv1d(linear)
        if transposed:
            linear = _conv1d.as_linear(linear)
        if not isinstance(linear, nn.Linear):
            raise TypeError(f"{op}: linear must be an nn.Linear, got {type(linear).__name__}")
        weight = linear.weight
        _checks.check_format(op, group_size, bits, scale_dtype or torch.float32, compute)
        qweight, scales, offsets = _ops.int4_quantize(
            weight,
            group_size=group_size,
            bits=bits,
            symmetric=symmetric,
            method=method,
            importance=importance,
            scale_dtype=scale_dtype or torch.float32,
        )
        if scale_dtype is None:
            scale_dtype = _checks.compact_scale_dtype(scales, offsets)
            scales = scales.to(scale_dtype)
            offsets = None if offsets is None else offsets.to(scale_dtype)
        out = cls.from_codes(
            qweight,
            scales,
            offsets,
            linear.bias,
            in_features=weight.shape[1],
            group_size=group_size,
            bits=bits,
            compute=compute,
            scale_dtype=scale_dtype,
            palette=False,
        )
        out._dtype, out._transposed = weight.dtype, transposed
        return out.train(linear.training)

    @classmethod
    def from_codes(
        cls,
        qweight: torch.Tensor,
        scales: torch.Tensor,
        offsets: Optional[torch.Tensor] = None,
        bias: Optional[torch.Tensor] = None,
        *,
        in_features: int,
        group_size: int,
        bits: int = 4,
        compute: str = "bf16",
        column_order: Optional[torch.Tensor] = None,
        scale_dtype: Optional[torch.dtype] = None,
        palette: Optional[bool] = None,
    ) -> Int4Linear:
        """Takes over canonical codes, scales and offsets; nothing is rounded.

        Args:
            qweight, scales, offsets: as `nibblock.ops.int4_pack` takes them.
            bias: [N] float32 | bfloat16 | float16 or None; a Parameter is taken over as it is.
            in_features: K.
            group_size, bits, compute: as in the constructor.
            column_order: [K] int64 | int32, each of 0 to K - 1 once: the weight's column of each
                column of the codes (and of its group); copied. None: they are in order.
            scale_dtype: how scales and offsets are stored; None: in their own dtype, or as int8
                where that changes nothing.
            palette: whether 8-bit codes take 4 bits (`nibblock.ops.int4_pack`); None: where they
                can.
        Returns:
            A new module on the device of qweight.
        Raises:
            TypeError, ValueError: as `nibblock.ops.int4_pack`, and for a column_order that is none.
        """
        op = "Int4Linear.from_codes"
        packed, scale_dtype = packed_from_codes(
            op, qweight, scales, offsets, in_features, group_size, bits, scale_dtype, palette
        )
        return cls.from_packed(
            packed,
            bias,
            in_features=in_features,
            out_features=qweight.shape[0],
            group_size=group_size,
            bits=bits,
            affine=offsets is not None,
            scale_dtype=scale_dtype,
            compute=compute,
            column_order=column_order,
        )

    @classmethod
    def from_packed(
        cls,
        packed: torch.Tensor,
        bias: Optional[torch.Tensor] = None,
        *,
        in_features: int,
        out_features: int,
        group_size: int,
        bits: int = 4,
        affine: bool,
        scale_dtype: torch.dtype = torch.float32,
        compute: str = "bf16",
        dtype: torch.dtype = torch.float32,
        column_order: Optional[torch.Tensor] = None,
    ) -> Int4Linear:
        """Wraps an already packed weight; a Parameter is shared, not copied (tied heads).

        Args:
            packed: [packed_bytes(N, K, ...)] uint8 tensor or Parameter.
            bias: [N] or None.
            in_features, out_features, group_size, bits, affine, scale_dtype, compute: the weight's
            format.
            dtype: float32 | bfloat16 | float16 of `weight`, for code that reads it.
            column_order: as in `from_codes`.
        Returns:
            A new module.
        Raises:
            TypeError: packed, bias or column_order of another dtype. ValueError: a size that does
                not fit the format, or a column_order that is none.
        """
        op = "Int4Linear.from_packed"
        if bias is not None:
            _checks.check_float(op, "bias", bias)
            if tuple(bias.shape) != (out_features,):
                raise ValueError(f"{op}: bias must be [{out_features}], got {list(bias.shape)}")
        out = cls.__new__(cls)
        out._build(
            in_features,
            out_features,
            bias,
            group_size,
            bits,
            affine,
            scale_dtype,
            compute,
            packed,
            column_order,
        )
        out._dtype = dtype
        return out

    # --- running ---------------------------------------------------------------------------------

    @property
    def compute(self) -> str:
        """ "bf16" or "int8"; see the class."""
        return self._compute

    @compute.setter
    def compute(self, value: str) -> None:
        _checks.check_format(
            type(self).__name__, self.group_size, self.bits, self._scale_dtype, value
        )
        self._compute = value
        self._args = (
            self.out_features,
            self.group_size,
            self.bits,
            self.affine,
            self._scale_dtype,
            value,
        )
        self._code = _checks.format_code(*self._args)
        fused = self.__dict__.get("_fused")
        if fused is not None:
            fused[0].invalidate()

    def _format_changed(self) -> None:
        self.compute = self._compute

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        # The lean path: Parameters straight from their dictionary (a third of
        # nn.Module.__getattr__'s time), the autograd-free twin of the op when nothing asks for a
        # gradient, and no check that the op does not make itself. Only in_features is not among the
        # op's arguments.
        parameters = self._parameters
        bias = parameters["bias"]
        order = self._buffers.get("column_order")
        try:
            if input.shape[-1] == self.in_features:
                if torch.is_grad_enabled() and (
                    input.requires_grad or (bias is not None and bias.requires_grad)
                ):
                    x = input if order is None else take_columns(input, order)
                    return _linear(x, parameters["packed"], bias, *self._args)
                if self._fused is not None and not torch.compiler.is_compiling():
                    group, index = self._fused
                    shared = group.take(index, input)
                    if shared is not None:
                        return shared
                x = input if order is None else take_columns(input, order)
                return _forward(x, parameters["packed"], bias, self._code)
        except (RuntimeError, AttributeError, IndexError):
            if self._follow_packed():
                return self.forward(input)
            self._diagnose(input)
            raise
        self._diagnose(input)
        raise AssertionError("unreachable: the shape above was refused")

    def _diagnose(self, x: object) -> None:
        """Raises the error that says what is wrong with x; returns if nothing is."""
        op = "int4_linear"
        _checks.check_float(op, "x", x)
        if x.dim() < 1:
            raise ValueError(f"{op}: x must have at least 1 dimension, got a scalar")
        if x.shape[-1] != self.in_features:
            raise ValueError(
                f"{op}: x last dim must equal in_features {self.in_features}, got {list(x.shape)}"
            )
        _checks.check_linear(op, x, self.packed, self.bias, *self._args)

    def reset_parameters(self) -> None:
        """Does nothing to the weight, which is frozen; zeroes the bias."""
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, {self._format_repr()}, compute={self._compute!r}"
        )
