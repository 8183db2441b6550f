"""`AdapterLinear`: a frozen linear layer plus trainable blocks (and a low-rank pair) on top."""

from __future__ import annotations

import math
from typing import Any, Optional

import torch
import torch.nn.functional as F
from torch import nn

from nibblock.nn._blocks import BlockValues, ReadOnlyWeight
from nibblock.nn.block_sparse_linear import BlockSparseLinear, check_input
from nibblock.nn.int4_linear import Int4Linear
from nibblock.nn.masked_linear import MaskedLinear
from nibblock.ops import _block_checks, _block_register, _checks
from nibblock.sparse import _choose

_ops = torch.ops.nibblock
_block = _ops.block_sparse_linear.default
_block_forward = _ops._block_sparse_linear_forward.default
_fused = _ops.int4_block_sparse_linear.default
_fused_forward = _ops._int4_block_sparse_linear_forward.default


class Adapter(BlockValues, nn.Module):
    """The trainable part of one adapter of one layer: S in blocks, and C A of rank r.

    Attributes:
        values: Parameter [Z, B, B]; blocks: int32 [Z, 2].
        lora_a, lora_c: Parameters [r, K] and [N, r], or None where the rank is 0.
    """

    def __init__(
        self,
        out_features: int,
        in_features: int,
        block: int,
        blocks: torch.Tensor,
        rank: int = 0,
        dtype: torch.dtype = torch.float32,
        device: Any = None,
    ) -> None:
        super().__init__()
        self._init_blocks(out_features, in_features, block, blocks, None, dtype, device)
        if isinstance(rank, bool) or not isinstance(rank, int):
            raise TypeError(f"Adapter: rank must be int, got {type(rank).__name__}")
        if rank < 0:
            raise ValueError(f"Adapter: rank must be at least 0, got {rank}")
        self.register_parameter("lora_a", None)
        self.register_parameter("lora_c", None)
        if rank:
            like = {"dtype": dtype, "device": device}
            self.lora_a = nn.Parameter(torch.empty(rank, in_features, **like))
            self.lora_c = nn.Parameter(torch.zeros(out_features, rank, **like))
            bound = 1 / math.sqrt(max(1, in_features))
            nn.init.uniform_(self.lora_a, -bound, bound)

    @property
    def rank(self) -> int:
        """r; 0 without a low-rank pair."""
        return 0 if self.lora_a is None else self.lora_a.shape[0]

    def trains(self) -> bool:
        """Whether any of its Parameters asks for a gradient."""
        return any(p is not None and p.requires_grad for p in self._parameters.values())

    def dense(self) -> torch.Tensor:
        """S + C A as a dense float32 [N, K], without gradient."""
        out = _choose.scatter_blocks(self.values.float(), self.blocks, self._rows, self._columns)
        if self.lora_a is not None:
            out += self.lora_c.detach().float() @ self.lora_a.detach().float()
        return out

    def extra_repr(self) -> str:
        return (
            f"block={self.block}, blocks={len(self.values)}, density={self.density:.3g}, "
            f"rank={self.rank}"
        )


class AdapterLinear(ReadOnlyWeight, nn.Module):
    """A frozen linear layer with a trainable block-sparse adapter; stands where its base stood.

        y = x W^T + bias + x S^T (+ (x A^T) C^T)        W frozen, S in blocks, A [r, K], C [N, r]

    Args:
        base: an `nn.Linear` (not a `BlockSparseLinear` or `MaskedLinear`) or `Int4Linear` in
            float32, bfloat16 or float16. Its Parameters are frozen.
        block: B, one of 16, 32, 64, 128.
        blocks: which blocks of W the adapter holds: int [Z, 2] (row block, column block), sorted by
            row block, then column block; a bool mask [ceil(N/B), ceil(K/B)]; or a float, that share
            of all blocks, spread evenly and repeatably (0: none).
        rank: r of the low-rank pair; 0 for none.
        name: of this adapter, without dots.
        dtype: float32 | bfloat16 of the adapter's Parameters.

    Values and C start at zero, and adding zeros changes no bit of the base's (finite) result. A
    layer may hold several adapters; one of them, or none, is active: `activate` only changes which
    one the next call reads. `merge` writes the active one into a dense base and keeps the blocks
    that were there; `unmerge` puts those back, byte for byte. While merged, the layer neither gives
    nor takes a state dict (ValueError; modules before it may have loaded theirs by then).

    Attributes (of the active adapter; ValueError while none is):
        values: Parameter [Z, B, B]. blocks: int32 [Z, 2]. lora_a, lora_c: Parameters or None.
    Attributes:
        base; adapters: a container of every `Adapter` by name; active: a name or None; merged: the
        name of the merged adapter or None; weight: read-only, the dense [N, K] of base and active
        adapter; bias, in_features, out_features: the base's.

    Input: [..., K] float32 | bfloat16 | float16. Output: [..., N] of the input's dtype.
    Raises: TypeError for another dtype, ValueError for another shape.
    Gradients: input, values, A, C. No N x K tensor is made for them. While merged: input only.
    Determinism and numerics: on an `Int4Linear` as `nibblock.ops.int4_block_sparse_linear` (one
    pass over x, one rounding); on an `nn.Linear`, on an `Int4Linear` with hooks, which stay the
    base's and see its call, and on one with a `column_order`, which the blocks do not have, as
    `block_sparse_linear` with the base's result as y0.
    """

    _weight_source = "the base and the active adapter"

    def __init__(
        self,
        base: nn.Linear,
        block: int = 32,
        blocks: _choose.BlockChoice = 0.02,
        rank: int = 0,
        name: str = "default",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        # A MaskedLinear would write its own values over what `merge` puts into the weight.
        if not isinstance(base, nn.Linear) or isinstance(base, (BlockSparseLinear, MaskedLinear)):
            raise TypeError(
                f"AdapterLinear: base must be an nn.Linear or Int4Linear, got {type(base).__name__}"
            )
        if not isinstance(base, Int4Linear):
            _checks.check_float("AdapterLinear", "base.weight", base.weight)
        self.in_features, self.out_features = base.in_features, base.out_features
        self.base = base
        self.adapters = nn.Module()
        self._active: Optional[str] = None
        self._merged: Optional[str] = None
        self._tied = ""  # who shares the base's weight, as far as add_adapters or load saw it
        self.register_buffer("_saved", None, persistent=False)
        self.add(name, block=block, blocks=blocks, rank=rank, dtype=dtype)
        base.requires_grad_(False)
        self.train(base.training)

    # --- adapters --------------------------------------------------------------------------------

    @property
    def names(self) -> list[str]:
        """The names of all adapters."""
        return list(self.adapters._modules)

    @property
    def active(self) -> Optional[str]:
        """The name of the adapter that runs; None: the base alone."""
        return self._active

    @property
    def merged(self) -> Optional[str]:
        """The name of the adapter that is merged into the base, or None."""
        return self._merged

    def adapter(self, name: Optional[str] = None) -> Adapter:
        """One adapter by name; the active one when None.

        Raises:
            ValueError: there is none of that name, or none is active.
        """
        wanted = self._active if name is None else name
        if wanted is None:
            raise ValueError("AdapterLinear: an adapter must be active, got none; call activate")
        found = self.adapters._modules.get(wanted)
        if found is None:
            names = ", ".join(self.names) or "none"
            raise ValueError(f"AdapterLinear: adapter must be one of {names}, got {wanted!r}")
        return found

    def add(
        self,
        name: str,
        block: int = 32,
        blocks: _choose.BlockChoice = 0.02,
        rank: int = 0,
        dtype: torch.dtype = torch.float32,
    ) -> Adapter:
        """Adds a zero adapter under a new name and activates it; arguments as in the constructor.

        Returns:
            The new `Adapter`.
        Raises:
            TypeError, ValueError: as the constructor; the name is taken; an adapter is merged.
        """
        op = "AdapterLinear"
        self._check_name(name)
        self._check_unmerged("another is added")
        sizes = (self.out_features, self.in_features, block)
        index = _choose.resolve_blocks(op, blocks, *sizes)
        made = Adapter(*sizes, index, rank, dtype, self._device())
        self._put(name, made.train(self.base.training))
        return made

    def _check_name(self, name: object) -> None:
        if not isinstance(name, str):
            raise TypeError(f"AdapterLinear: name must be str, got {type(name).__name__}")
        if not name or "." in name:
            raise ValueError(f"AdapterLinear: name must be a word without dots, got {name!r}")
        if name in self.adapters._modules:
            raise ValueError(
                f"AdapterLinear: name must be new, got {name!r}, which there is already"
            )

    def _put(self, name: str, adapter: Adapter) -> None:
        self.adapters._modules[name] = adapter
        self._active = name

    def remove(self, name: str) -> None:
        """Drops an adapter; if it was active, the base runs alone.

        Raises:
            ValueError: there is none of that name, or it is merged.
        """
        self.adapter(name)
        if self._merged == name:
            self._check_unmerged("it is removed")
        del self.adapters._modules[name]
        if self._active == name:
            self._active = None

    def activate(self, name: Optional[str]) -> None:
        """Makes one adapter the active one (None: the base runs alone). Nothing is copied.

        Raises:
            ValueError: there is none of that name, or one is merged into the base.
        """
        if name is not None:
            self.adapter(name)
        if self._merged is not None and name != self._active:
            self._check_unmerged("another is activated")
        self._active = name

    def _check_unmerged(self, before: str) -> None:
        if self._merged is not None:
            raise ValueError(
                f"AdapterLinear: the adapter must be unmerged before {before}, got "
                f"{self._merged!r} merged; call unmerge()"
            )

    def _device(self) -> torch.device:
        base = self.base
        return base.packed.device if isinstance(base, Int4Linear) else base.weight.device

    # What of the active adapter is read so often that it deserves a short name.

    def _of_active(self, part: str):
        # ValueError, not AttributeError: nn.Module would turn that into "has no attribute".
        return getattr(self.adapter(), part)

    @property
    def values(self) -> nn.Parameter:
        """Parameter [Z, B, B] of the active adapter."""
        return self._of_active("values")

    @property
    def blocks(self) -> torch.Tensor:
        """int32 [Z, 2], (row block, column block), of the active adapter."""
        return self._of_active("blocks")

    @property
    def layout(self) -> torch.Tensor:
        """The index array of the active adapter; see `nibblock.ops.block_layout`."""
        return self._of_active("layout")

    @property
    def lora_a(self) -> Optional[nn.Parameter]:
        """A [r, K] of the active adapter, or None."""
        return self._of_active("lora_a")

    @property
    def lora_c(self) -> Optional[nn.Parameter]:
        """C [N, r] of the active adapter, or None."""
        return self._of_active("lora_c")

    @property
    def block(self) -> int:
        """B of the active adapter."""
        return self._of_active("block")

    @property
    def density(self) -> float:
        """The active adapter's share of all blocks."""
        return self._of_active("density")

    @property
    def bias(self) -> Optional[nn.Parameter]:
        """The base's bias."""
        return self.base.bias

    # --- the weight ------------------------------------------------------------------------------

    def dense(self) -> torch.Tensor:
        """The dense weight [N, K] of base and active adapter: a new tensor without gradient.

        Its dtype is the base's (float32 for an `Int4Linear`).
        """
        weight = self.base.weight.detach()
        if self._active is None or self._merged is not None:
            return weight.clone()
        return _sum(weight, self.adapter().dense())

    @torch.no_grad()
    def merge(self) -> None:
        """Writes the active adapter into the base's weight, in place.

        The base then runs alone, as fast as without an adapter; the adapter gets no gradient. What
        stood in its blocks is kept (with a low-rank pair: the whole weight). To stay merged for
        good, put `base` where this module stands.

        Raises:
            TypeError: the base is not dense. ValueError: no adapter is active, one is merged
            already, or the base's weight is tied to another module's.
        """
        base = self.base
        if isinstance(base, Int4Linear):
            raise TypeError("AdapterLinear.merge: base must be a dense nn.Linear, got Int4Linear")
        adapter = self.adapter()
        self._check_unmerged("another is merged")
        if self._tied:
            raise ValueError(
                f"AdapterLinear.merge: base must own its weight, got one tied to {self._tied}"
            )
        weight = base.weight
        if adapter.lora_a is None:
            saved = _choose.read_blocks(weight, adapter.blocks, adapter.block)
            new = _sum(saved, adapter.values)
            _choose.write_blocks(weight, adapter.blocks, new, adapter.block)
        else:
            saved = weight.detach().clone()
            weight.copy_(_sum(saved, adapter.dense()))
        self._saved, self._merged = saved, self._active

    @torch.no_grad()
    def unmerge(self) -> None:
        """Puts back the bytes that `merge` replaced.

        Raises:
            ValueError: nothing is merged.
        """
        if self._merged is None:
            raise ValueError("AdapterLinear.unmerge: an adapter must be merged, got none")
        adapter, weight = self.adapter(self._merged), self.base.weight
        if adapter.lora_a is None:
            _choose.write_blocks(weight, adapter.blocks, self._saved, adapter.block)
        else:
            weight.copy_(self._saved)
        self._saved = self._merged = None

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        if self._merged is not None:  # base and values would hold the adapter twice
            raise ValueError(
                f"AdapterLinear: {prefix[:-1] or 'the layer'} must be unmerged for a state dict, "
                f"got {self._merged!r} merged; call unmerge(), or keep base alone"
            )
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(self, state_dict, prefix, *args):
        # `unmerge` would write the old bytes over the new base. Raised at once, unlike what torch
        # gathers for the end: base and adapters, which come next, must not take anything.
        if self._merged is not None and any(key.startswith(prefix) for key in state_dict):
            raise ValueError(
                f"AdapterLinear: {prefix[:-1] or 'the layer'} must be unmerged to load a state "
                f"dict, got {self._merged!r} merged; call unmerge() first"
            )
        super()._load_from_state_dict(state_dict, prefix, *args)

    # --- running ---------------------------------------------------------------------------------

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        base = self._modules["base"]
        if self._active is None or self._merged is not None:
            return base(input)
        adapter = self._modules["adapters"]._modules[self._active]
        parameters, layout = adapter._parameters, adapter._buffers["layout"]
        values, a, c = parameters["values"], parameters["lora_a"], parameters["lora_c"]
        try:
            if input.shape[-1] == self.in_features:
                grad = torch.is_grad_enabled() and (input.requires_grad or adapter.trains())
                if not fused(base):
                    return self._on_base(base, adapter, input, grad)
                own = base._parameters
                bias = own["bias"]
                grad = grad or (torch.is_grad_enabled() and bias is not None and bias.requires_grad)
                op = _fused if grad else _fused_forward
                return op(
                    input, own["packed"], bias, *base._args, values, layout, adapter.block, a, c
                )
        except (RuntimeError, AttributeError, IndexError):
            if isinstance(base, Int4Linear) and base._follow_packed():
                return self.forward(input)
            self._diagnose(input)
            raise
        self._diagnose(input)
        raise AssertionError("unreachable: the shape above was refused")

    def _on_base(self, base: nn.Module, adapter: Adapter, x: torch.Tensor, grad: bool):
        y = base(x)
        a, c = adapter._parameters["lora_a"], adapter._parameters["lora_c"]
        if a is not None:
            a, c = (t if t.dtype == x.dtype else t.to(x.dtype) for t in (a, c))
            y = _sum_of_zeros(y, F.linear(F.linear(x, a), c))
        values, layout = adapter._parameters["values"], adapter._buffers["layout"]
        op = _block if grad or y.requires_grad else _block_forward
        return op(x, values, layout, None, y, self.out_features, adapter.block)

    def _diagnose(self, x: object) -> None:
        """Raises the error that says what is wrong with x; returns if nothing is."""
        base, adapter = self.base, self.adapter()
        if isinstance(base, Int4Linear):
            op = "int4_block_sparse_linear"
            check_input(self, op, x)
            _block_register.check_fused(
                op, x, base.packed, base.bias, *base._args, adapter.values, adapter.layout,
                adapter.block, adapter.lora_a, adapter.lora_c,
            )  # fmt: skip
            return
        op = "block_sparse_linear"
        check_input(self, op, x)
        if x.dtype != base.weight.dtype and not torch.is_autocast_enabled(x.device.type):
            raise TypeError(
                f"{op}: x must be {_checks.dtype_name(base.weight.dtype)} as base.weight is, got "
                f"{_checks.dtype_name(x.dtype)}"
            )
        _block_checks.check_linear(
            op, x, adapter.values, adapter.layout, None, None, self.out_features, adapter.block
        )

    def extra_repr(self) -> str:
        text = f"in_features={self.in_features}, out_features={self.out_features}, "
        text += f"active={self._active!r}"
        return text + (f", merged={self._merged!r}" if self._merged is not None else "")


def fused(base: nn.Module) -> bool:
    """Whether base and adapter run as one op: an `Int4Linear` whose call nobody watches, and which
    reads x as the blocks do.
    """
    return isinstance(base, Int4Linear) and not (
        base._buffers.get("column_order") is not None
        or base._forward_hooks
        or base._forward_pre_hooks
        or base._backward_hooks
        or base._backward_pre_hooks
        or "forward" in base.__dict__
    )


def _sum(weight: torch.Tensor, addend: torch.Tensor) -> torch.Tensor:
    """weight + addend in float32, rounded once to weight's dtype; adding zero changes no bit."""
    return _sum_of_zeros(weight.float(), addend.float()).to(weight.dtype)


def _sum_of_zeros(y: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
    """y + z, and y's very bits where z is 0 or -0: -0 + 0 would be +0, but -0 - (+0) is -0."""
    return y - (0.0 - z)
