"""`Int4Embedding`: an `nn.Embedding` whose table is stored in 8 or 4 bits."""

from __future__ import annotations

from typing import Any, Optional

import torch
from torch import nn

from nibblock import ops as _ops
from nibblock.nn._packed import PackedWeight, packed_from_codes
from nibblock.nn.int4_linear import Int4Linear
from nibblock.ops import _checks

_embedding = torch.ops.nibblock.int4_embedding.default


class Int4Embedding(PackedWeight, nn.Embedding):
    """An embedding table stored in 8 or 4 bits; stands wherever a frozen `nn.Embedding` stands.

        y[..., k] = multiplier * (scale[i, g(k)] * code[i, k] + offset[i, g(k)]),   i = input[...]

    Args:
        num_embeddings, embedding_dim: rows and columns of the table.
        padding_idx: kept for its readers (the table is frozen, so it has no effect on gradients).
        group_size: 32, 64, 128, 256, or -1 for one group per row; with 8 bits or int8
            scales also 16.
        symmetric: True stores scales only, False scales and offsets.
        bits: 8 or 4.
        scale_dtype: float32 | float16 | int8 of scales and offsets; the last as in
            `nibblock.ops.int4_pack`.
        dtype: float32 | bfloat16 | float16 of the output; follows `.to(dtype)`, `.half()` and so
            on.
        device: where the table lives; "meta" allocates nothing.

    The attribute `multiplier` is None (for 1), or what each row is multiplied by after it was
    rounded to the output dtype, itself rounded to that dtype, as transformers' Gemma does it; it is
    no part of `weight` nor of a tied head. `from_codes` and `from_packed` take it.

    `linear()` makes an `Int4Linear` on the same `packed` Parameter: a tied head without a second
    copy. The state dict holds `qweight`, `scales` and, unless symmetric, `offsets`; a dense
    `weight` is accepted on loading and rounded to nearest.

    Input: [...] int64 | int32 in [0, num_embeddings). Output: [..., embedding_dim].
    Raises: TypeError for another dtype, ValueError for an index out of range.
    Gradients: none. Determinism: bitwise.
    """

    multiplier: Optional[float] = None

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: Optional[int] = None,
        group_size: int = 32,
        symmetric: bool = True,
        bits: int = 8,
        scale_dtype: torch.dtype = torch.float32,
        dtype: torch.dtype = torch.float32,
        device: Any = None,
    ) -> None:
        self._build(
            num_embeddings,
            embedding_dim,
            padding_idx,
            group_size,
            bits,
            not symmetric,
            scale_dtype,
            dtype,
            None,
            device,
        )

    def _build(
        self,
        num_embeddings,
        embedding_dim,
        padding_idx,
        group_size,
        bits,
        affine,
        scale_dtype,
        dtype,
        packed,
        device=None,
        multiplier=None,
    ):
        nn.Module.__init__(self)
        op = type(self).__name__
        if dtype not in _checks.FLOATS:
            raise TypeError(
                f"{op}: dtype must be float32, bfloat16 or float16, got {_checks.dtype_name(dtype)}"
            )
        if padding_idx is not None and not -num_embeddings <= padding_idx < num_embeddings:
            raise ValueError(
                f"{op}: padding_idx must be in [{-num_embeddings}, {num_embeddings}), "
                f"got {padding_idx}"
            )
        if padding_idx is not None and padding_idx < 0:
            padding_idx += num_embeddings
        if multiplier is not None:
            self.multiplier = float(multiplier)
            # (Made once: a tensor and back takes as long as the lookup of a row.)
            self._multipliers = {
                kind: torch.tensor(self.multiplier, dtype=kind).item() for kind in _checks.FLOATS
            }
        self.num_embeddings, self.embedding_dim = num_embeddings, embedding_dim
        self.padding_idx = padding_idx
        # What nn.Embedding's readers look for; none of them applies to a frozen table.
        self.max_norm, self.norm_type = None, 2.0
        self.scale_grad_by_freq = self.sparse = False
        self._init_format(num_embeddings, embedding_dim, group_size, bits, affine, scale_dtype)
        self._dtype = dtype
        self._init_packed(packed, device)

    @classmethod
    def from_embedding(
        cls,
        embedding: nn.Embedding,
        group_size: int = 32,
        symmetric: bool = True,
        bits: int = 8,
        method: str = "rtn",
    ) -> Int4Embedding:
        """Quantises a dense embedding; the output dtype is that of its weight.

        Args:
            embedding: its weight [num_embeddings, embedding_dim] float32 | bfloat16 | float16,
                finite.
            group_size, symmetric, bits: as in the constructor.
            method: "rtn" or "mse", see `nibblock.ops.int4_quantize`.
        Returns:
            A new module on the embedding's device, in its training mode.
        Raises:
            TypeError: not an `nn.Embedding`, or a dtype that is not listed. ValueError: max_norm is
            set (it rewrites the table in forward), a format that does not exist, a weight that is
            not finite.
        """
        op = "Int4Embedding.from_embedding"
        if not isinstance(embedding, nn.Embedding):
            raise TypeError(
                f"{op}: embedding must be an nn.Embedding, got {type(embedding).__name__}"
            )
        if embedding.max_norm is not None:
            raise ValueError(f"{op}: max_norm must be None, got {embedding.max_norm}")
        weight = embedding.weight
        qweight, scales, offsets = _ops.int4_quantize(
            weight, group_size=group_size, bits=bits, symmetric=symmetric, method=method
        )
        scale_dtype = _checks.compact_scale_dtype(scales, offsets)
        out = cls.from_codes(
            qweight,
            scales.to(scale_dtype),
            None if offsets is None else offsets.to(scale_dtype),
            embedding_dim=weight.shape[1],
            group_size=group_size,
            bits=bits,
            padding_idx=embedding.padding_idx,
            dtype=weight.dtype,
            scale_dtype=scale_dtype,
            palette=False,
        )
        return out.train(embedding.training)

    @classmethod
    def from_codes(
        cls,
        qweight: torch.Tensor,
        scales: torch.Tensor,
        offsets: Optional[torch.Tensor] = None,
        *,
        embedding_dim: int,
        group_size: int,
        bits: int = 8,
        padding_idx: Optional[int] = None,
        dtype: torch.dtype = torch.float32,
        multiplier: Optional[float] = None,
        scale_dtype: Optional[torch.dtype] = None,
        palette: Optional[bool] = None,
    ) -> Int4Embedding:
        """Takes over canonical codes, scales and offsets; nothing is rounded.

        Args:
            qweight, scales, offsets: as `nibblock.ops.int4_pack` takes them.
            embedding_dim, group_size, bits, padding_idx, dtype: as in the constructor.
            multiplier: of the output; see the class.
            scale_dtype: how scales and offsets are stored; None: in their own dtype, or as int8
                where that changes nothing.
            palette: whether 8-bit codes take 4 bits (`nibblock.ops.int4_pack`); None: where they
                can.
        Returns:
            A new module on the device of qweight.
        Raises:
            TypeError, ValueError: as `nibblock.ops.int4_pack`.
        """
        op = "Int4Embedding.from_codes"
        packed, scale_dtype = packed_from_codes(
            op, qweight, scales, offsets, embedding_dim, group_size, bits, scale_dtype, palette
        )
        return cls.from_packed(
            packed,
            num_embeddings=qweight.shape[0],
            embedding_dim=embedding_dim,
            group_size=group_size,
            bits=bits,
            affine=offsets is not None,
            scale_dtype=scale_dtype,
            padding_idx=padding_idx,
            dtype=dtype,
            multiplier=multiplier,
        )

    @classmethod
    def from_packed(
        cls,
        packed: torch.Tensor,
        *,
        num_embeddings: int,
        embedding_dim: int,
        group_size: int,
        bits: int = 8,
        affine: bool,
        scale_dtype: torch.dtype = torch.float32,
        padding_idx: Optional[int] = None,
        dtype: torch.dtype = torch.float32,
        multiplier: Optional[float] = None,
    ) -> Int4Embedding:
        """Wraps an already packed table; a Parameter is shared, not copied.

        Args:
            packed: [packed_bytes(num_embeddings, embedding_dim, ...)] uint8 tensor or Parameter.
            num_embeddings, embedding_dim, group_size, bits, affine, scale_dtype: the table's
            format.
            padding_idx, dtype: as in the constructor.
            multiplier: of the output; see the class.
        Returns:
            A new module.
        Raises:
            TypeError: packed of another dtype. ValueError: a size that does not fit the format.
        """
        out = cls.__new__(cls)
        out._build(
            num_embeddings,
            embedding_dim,
            padding_idx,
            group_size,
            bits,
            affine,
            scale_dtype,
            dtype,
            packed,
            multiplier=multiplier,
        )
        return out

    def linear(self, bias: Optional[torch.Tensor] = None, compute: str = "bf16") -> Int4Linear:
        """The tied head: an `Int4Linear` embedding_dim -> num_embeddings on the same `packed`
        Parameter.

        Args:
            bias: [num_embeddings] or None.
            compute: as in `Int4Linear`.
        Returns:
            A new module that shares this one's storage.
        """
        return Int4Linear.from_packed(
            self.packed, bias, compute=compute, dtype=self._dtype, **self._layout()
        )

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        try:
            rows = _embedding(
                input,
                self._parameters["packed"],
                self._rows,
                self._columns,
                self.group_size,
                self.bits,
                self.affine,
                self._scale_dtype,
                self._dtype,
            )
            return rows if self.multiplier is None else rows * self._multipliers[self._dtype]
        except RuntimeError:
            if self._follow_packed():
                return self.forward(input)
            self._diagnose(input)
            raise

    def _diagnose(self, indices: object) -> None:
        """Raises the error that says what is wrong with indices; returns if nothing is."""
        op = "int4_embedding"
        if not isinstance(indices, torch.Tensor):
            raise TypeError(f"{op}: indices must be a Tensor, got {type(indices).__name__}")
        _checks.check_embedding(
            op,
            indices,
            self.packed,
            self._rows,
            self._columns,
            self.group_size,
            self.bits,
            self.affine,
            self.scale_dtype,
            self._dtype,
        )
        if not indices.is_meta:
            _checks.check_indices(op, indices, self._rows)

    def reset_parameters(self) -> None:
        """Does nothing: the table is frozen."""

    def extra_repr(self) -> str:
        padding = "" if self.padding_idx is None else f", padding_idx={self.padding_idx}"
        times = "" if self.multiplier is None else f", multiplier={self.multiplier:g}"
        return f"{self.num_embeddings}, {self.embedding_dim}{padding}, {self._format_repr()}{times}"
