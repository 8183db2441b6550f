"""`MaskedLinear`: a dense `nn.Linear` of which only selected blocks are trained, in place."""

from __future__ import annotations

from typing import Any, Optional

import torch
import torch.nn.functional as F
from torch import nn

from nibblock.nn._blocks import BlockValues
from nibblock.nn._links import changes, places_in
from nibblock.nn._masked_product import MaskedProduct, plan_columns
from nibblock.nn._masked_weight import WrittenThrough
from nibblock.nn.block_sparse_linear import BlockSparseLinear, check_input
from nibblock.nn.int4_linear import Int4Linear
from nibblock.ops import _block_checks, _checks
from nibblock.sparse import _choose


class MaskedLinear(WrittenThrough, BlockValues, nn.Linear):
    """A dense linear layer whose weight is updated in place, on listed blocks only.

        y = x W^T + bias         W [N, K] frozen, but for its blocks, which are `values`

    Args:
        in_features, out_features: K, N.
        bias: whether there is a bias, a Parameter [N].
        block: B, one of 16, 32, 64, 128.
        blocks: which blocks of W are trained: int [Z, 2] (row block, column block), sorted by row
            block, then column block; a bool mask [ceil(N/B), ceil(K/B)]; or a float, that share of
            all blocks, spread evenly and repeatably.
        dtype: float32 | bfloat16 | float16 of W and bias.
        device: where they live; "meta" allocates nothing.

    Attributes:
        weight: Parameter [N, K] that asks for no gradient and always holds the current values.
        values: Parameter [Z, B, B], in the order of `blocks`; float32, or the weight's dtype. Where
            it is wider than the weight, it is the master copy and the weight holds it rounded.
        blocks: int32 [Z, 2]. block: B. density: Z over the number of all blocks.
        original: [Z, B, B] in the weight's dtype, what stood in the blocks before training; None
            where it was not kept.

    The two stay one: `nibblock.optim` writes every new value into W as it computes it
    (`mark_synced`); after any other change of `values` (`load_state_dict`, arithmetic in place,
    DistributedDataParallel's broadcast, a new `.data`) the next forward copies them, which
    `values._version` and its address tell. A step of any other `torch.optim.Optimizer` that holds
    `values` is followed by the copy at once, also where it writes through `.data`. Nothing tells of
    numbers that are changed in place through `values.data` outside an optimiser's step: after those
    call `sync(always=True)`. A compiled forward looks at nothing: there, call it after every change
    but a step. Where another tensor stands in for `values` during a call (`functional_call`,
    `fully_shard`), that call works on a private copy of W.

    The state dict holds `weight`, `values`, `blocks` and `bias`. Loading other blocks than the
    module's replaces them; where a file has a weight but no values, those are read from it.

    Input: [..., K] in the weight's dtype, or any under autocast. Output: [..., N].
    Raises: TypeError for another dtype, ValueError for another shape.
    Gradients: input, values (their blocks only), bias; once (no second derivatives). Nothing of
        the size of W is allocated for them. Of the input, backward keeps the columns that some
        block uses, or all where those are half and more.
    Determinism: as torch's dense product; the gradient of values as
        `nibblock.ops.block_weight_grad`.
    Numerics: forward has exactly the bits of `F.linear` on `weight`. Under autocast the rounded
        weight is kept from call to call (N x K in autocast's dtype) and follows the values.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        block: int = 32,
        blocks: _choose.BlockChoice = 0.02,
        dtype: torch.dtype = torch.float32,
        device: Any = None,
    ) -> None:
        linear = nn.Linear(in_features, out_features, bias, device, dtype)
        self._build(type(self).__name__, linear, blocks, block, None, True)

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        blocks: _choose.BlockChoice = 0.02,
        block: int = 32,
        dtype: Optional[torch.dtype] = None,
        keep_original: bool = True,
    ) -> MaskedLinear:
        """Takes over a dense linear: its weight and bias Parameters themselves, not copies.

        Args:
            linear: its weight [N, K] float32 | bfloat16 | float16, owned by no other module: a
                tied one would change there too (`nibblock.sparse_update` refuses those).
            blocks, block: as in the constructor.
            dtype: of `values`: float32 or the weight's; None for the weight's (float32 for
                float16).
            keep_original: whether to keep what stood in the blocks, for `revert` and
                `nibblock.save`: Z B B numbers of the weight's dtype.
        Returns:
            A new module on the linear's device, in its training mode. The weight asks for no
            gradient any more; no byte of it changes.
        Raises:
            TypeError: not a dense `nn.Linear`, or a dtype that is not listed. ValueError: blocks
            that do not fit, or a linear that is parametrised.
        """
        op = f"{cls.__name__}.from_linear"
        if isinstance(linear, Int4Linear):
            raise TypeError(
                f"{op}: linear must be dense, got Int4Linear; use nibblock.AdapterLinear"
            )
        if not isinstance(linear, nn.Linear) or isinstance(linear, BlockSparseLinear):
            raise TypeError(f"{op}: linear must be an nn.Linear, got {type(linear).__name__}")
        if isinstance(linear, MaskedLinear):
            raise TypeError(f"{op}: linear must be dense, got MaskedLinear; use set_blocks")
        if linear._parameters.get("weight") is None:
            raise ValueError(f"{op}: linear must hold its weight as a Parameter, got another form")
        out = cls.__new__(cls)
        out._build(op, linear, blocks, block, dtype, keep_original)
        return out.train(linear.training)

    def _build(self, op, linear, blocks, block, dtype, keep_original) -> None:
        weight = linear.weight
        _checks.check_float(op, "weight", weight)
        rows, columns = weight.shape
        index = _choose.resolve_blocks(op, blocks, rows, columns, block)
        if dtype is None:
            dtype = weight.dtype if weight.dtype in _block_checks.VALUES else torch.float32
        if dtype != torch.float32 and (dtype != weight.dtype or dtype not in _block_checks.VALUES):
            wide = "" if weight.dtype != torch.bfloat16 else " or bfloat16"
            raise TypeError(
                f"{op}: dtype must be float32{wide} for a {_checks.dtype_name(weight.dtype)} "
                f"weight, got {_checks.dtype_name(dtype)}"
            )
        nn.Module.__init__(self)
        self.in_features, self.out_features = columns, rows
        weight.requires_grad_(False)
        weight.grad = None
        self.register_parameter("weight", weight)
        self.register_parameter("bias", linear.bias)
        held = _choose.read_blocks(weight, index, block)
        self._keeps_original = keep_original
        # What stood in every block that was ever trained: its list, and the bytes.
        self._origin = (index, held) if keep_original and not weight.is_meta else None
        values = held.to(dtype, copy=True)
        self._init_blocks(rows, columns, block, index, values, dtype, weight.device)
        self._cast = None  # autocast's copy of the weight, and the version it is of
        self._adopt()

    def _set_blocks(self, blocks: torch.Tensor, device: torch.device) -> None:
        super()._set_blocks(blocks, device)
        changes.count += 1
        index = blocks.to("cpu", torch.int32)
        self._runs, compact = plan_columns(index, self._rows, self._columns, self.block)
        self.register_buffer(
            "_compact", None if compact is None else compact.to(device), persistent=False
        )
        self._places = None

    # --- values and weight are one ------------------------------------------------------------

    def register_parameter(self, name: str, param: Optional[nn.Parameter]) -> None:
        super().register_parameter(name, param)
        changes.count += 1
        if name == "values" and "_home" in self.__dict__:  # assigned by hand: to be copied
            self._adopt()
            self._synced = -1

    def _write(self, weight: torch.Tensor, values: torch.Tensor) -> None:
        values = values.detach().to(weight.dtype)
        places = self._places
        if places is None:
            index = self.blocks.to("cpu", torch.int64)
            block = self.block
            rows, columns = weight.shape[0] // block, weight.shape[1] // block
            whole = bool(((index[:, 0] < rows) & (index[:, 1] < columns)).all())
            places = index.to(weight.device).unbind(1) if whole else ()
            self._places = places
        if not places:  # ragged blocks, one by one
            _choose.write_blocks(weight, self.blocks, values, self.block)
            return
        block = self.block
        rows, columns = weight.shape[0] // block, weight.shape[1] // block
        grid = weight[: rows * block, : columns * block].unflatten(0, (rows, block))
        grid.unflatten(2, (columns, block)).transpose(1, 2)[places] = values

    # --- running ------------------------------------------------------------------------------

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        parameters = self._parameters
        values, weight, bias = parameters["values"], parameters["weight"], parameters["bias"]
        try:
            if not torch.compiler.is_compiling() and (
                values is not self._home or self._moved(values)
            ):
                weight = self._live(values, weight)
            device = input.device.type
            if torch.is_autocast_enabled(device):
                dtype = torch.get_autocast_dtype(device)
                weight = self._casted(weight, dtype)
                if input.dtype in _checks.FLOATS:
                    input = input.to(dtype)
                if bias is not None and bias.dtype in _checks.FLOATS:
                    bias = bias.to(dtype)
            if values.requires_grad and torch.is_grad_enabled():
                runs = self._runs
                layout = self._buffers["layout" if runs is None else "_compact"]
                return MaskedProduct.apply(input, values, weight, bias, layout, self.block, runs)
            return F.linear(input, weight, bias)
        except (RuntimeError, AttributeError, IndexError):
            self._diagnose(input)
            raise

    def _diagnose(self, x: object) -> None:
        """Raises the error that says what is wrong with x or the module; returns if nothing is."""
        op = "MaskedLinear"
        check_input(self, op, x)
        weight = self.weight
        _checks.check_float(op, "weight", weight)
        _block_checks.check_values(op, self.values, self.block)
        if x.dtype != weight.dtype and not torch.is_autocast_enabled(x.device.type):
            raise TypeError(
                f"{op}: x must be {_checks.dtype_name(weight.dtype)} as weight is, got "
                f"{_checks.dtype_name(x.dtype)}"
            )
        _checks.check_device(op, "x", x, weight=weight, values=self.values, bias=self.bias)

    # --- the original, and other blocks ---------------------------------------------------------

    @property
    def original(self) -> Optional[torch.Tensor]:
        """[Z, B, B] in the weight's dtype: what stood in `blocks` before training, or None."""
        if self._origin is None:
            return None
        index, held = self._origin
        place = places_in(self.blocks, index)
        return held[place.to(held.device)]

    def _need_original(self, what: str) -> tuple[torch.Tensor, torch.Tensor]:
        if self._origin is None:
            raise ValueError(
                f"MaskedLinear.{what}: the original blocks must have been kept, got none; "
                f"pass keep_original=True"
            )
        return self._origin

    @torch.no_grad()
    def original_weight(self) -> torch.Tensor:
        """The dense weight [N, K] before training: a new tensor.

        Raises:
            ValueError: the original blocks were not kept.
        """
        index, held = self._need_original("original_weight")
        weight = self.weight.detach().clone()
        _choose.write_blocks(weight, index, held, self.block)
        return weight

    @torch.no_grad()
    def revert(self) -> None:
        """Undoes the training: every block that was ever trained gets its original bytes back.

        Saved bytes are written, nothing is subtracted: after any number of updates the weight is
        what it was, NaN payloads included (a conversion of the whole module in between converts
        them too). `values` follow; the block list stays.

        Raises:
            ValueError: the original blocks were not kept.
        """
        index, held = self._need_original("revert")
        _choose.write_blocks(self.weight, index, held, self.block)
        self.values.copy_(self.original)
        self._mark(self.values)
        self._cast = None

    def _checked_blocks(self, blocks: _choose.BlockChoice) -> torch.Tensor:
        op = "MaskedLinear.set_blocks"
        return _choose.resolve_blocks(op, blocks, self._rows, self._columns, self.block)

    @torch.no_grad()
    def set_blocks(self, blocks: _choose.BlockChoice, dropped: str = "keep") -> torch.Tensor:
        """Trains other blocks from now on; the Parameter `values` stays the same object.

        Not while a wrapper that has counted its numbers (DistributedDataParallel) is in use: wrap
        anew.

        Args:
            blocks: as in the constructor.
            dropped: what becomes of blocks that are in the list no more: "keep" leaves their
                trained values in the weight, "restore" puts the original bytes back.
        Returns:
            int64 [new Z] on the CPU: where each new block stood in the old list, -1 for those that
            did not (`nibblock.optim`'s `move_blocks` takes it).
        Raises:
            TypeError, ValueError: blocks that do not fit; another word; "restore" without the
            original. Nothing has changed then.
        """
        op = "MaskedLinear.set_blocks"
        if dropped not in ("keep", "restore"):
            raise ValueError(f'{op}: dropped must be "keep" or "restore", got {dropped!r}')
        new = self._checked_blocks(blocks)
        values, weight = self.values, self.weight
        old = self.blocks.cpu()
        if dropped == "restore":
            self._need_original("set_blocks")
        self.sync()
        gone = places_in(old, new) < 0
        if dropped == "restore" and bool(gone.any()):
            held = self.original[gone.to(values.device)]
            _choose.write_blocks(weight, old[gone], held, self.block)
        came_from = places_in(new, old)
        held = _choose.read_blocks(weight, new, self.block)
        if self._origin is not None:
            index, first = self._origin
            fresh = places_in(new, index) < 0
            self._origin = (
                torch.cat([index, new[fresh]]),
                torch.cat([first, held[fresh.to(held.device)]]),
            )
        following = held.to(values.dtype)
        stay = came_from >= 0
        following[stay.to(values.device)] = values[came_from[stay].to(values.device)]
        values.grad = None
        values.data = following
        self._set_blocks(new, values.device)
        self._mark(values)
        self._cast = None
        return came_from

    def to_linear(self) -> nn.Linear:
        """A plain `nn.Linear` with this weight and bias, the Parameters themselves, as trained."""
        self.sync()
        out = nn.Linear.__new__(nn.Linear)
        nn.Module.__init__(out)
        out.in_features, out.out_features = self.in_features, self.out_features
        out.register_parameter("weight", self._parameters["weight"])
        out.register_parameter("bias", self._parameters["bias"])
        return out.train(self.training)

    def reset_parameters(self) -> None:
        """Draws weight and bias as `nn.Linear` does, and takes `values` from the weight."""
        super().reset_parameters()
        self._read()

    @torch.no_grad()
    def _read(self) -> None:
        held = _choose.read_blocks(self.weight, self.blocks, self.block)
        self.values.copy_(held)
        self._mark(self.values)
        self._cast = None

    # --- moves and copies -----------------------------------------------------------------------

    def _apply(self, fn, recurse=True):
        self.sync()
        before = self.weight.dtype
        super()._apply(fn, recurse)
        if self._origin is not None:
            self._origin = (self._origin[0], fn(self._origin[1]))
        self._places = None
        self._cast = None
        self._adopt()
        if self.weight.dtype != before:  # each was rounded for itself
            self._synced = -1
        return self

    def __getstate__(self):
        # deepcopy and pickle start here. Version counters start anew in a copy, so the two must
        # agree; autocast's copy is not worth carrying.
        self.sync()
        return {**self.__dict__, "_cast": None, "_steps": None, "_at": 0, "_alias": None}

    def __setstate__(self, state):
        super().__setstate__(state)
        self._adopt()

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        self.sync()
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(
        self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
    ):
        blocks, values = state_dict.get(prefix + "blocks"), state_dict.get(prefix + "values")
        origin, errors = self._origin, len(error_msgs)
        if (
            origin is not None
            and blocks is not None
            and not self._same_blocks(blocks)
            and not self._refuse_blocks(blocks, values)
        ):
            first = _choose.read_blocks(self.original_weight(), blocks, self.block)
            origin = (blocks.to("cpu", torch.int32), first)
        super()._load_from_state_dict(
            state_dict,
            prefix,
            local_metadata,
            strict,
            missing_keys,
            unexpected_keys,
            error_msgs,
        )
        if len(error_msgs) > errors or self.values.is_meta or self.weight.is_meta:
            return
        self._origin = origin
        if values is not None:
            self._adopt()
            self._copy(self.values)
        elif prefix + "weight" in state_dict:
            self._read()
        self.weight.requires_grad_(False)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, block={self.block}, blocks={len(self.values)}, "
            f"density={self.density:.3g}"
        )
