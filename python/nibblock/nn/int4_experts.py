"""`Int4Experts`: the experts of a mixture-of-experts layer, their weights stored in 4 or 8 bits."""

from __future__ import annotations

from typing import Optional

import torch
from torch import nn
from torch._compile import _disable_dynamo

from nibblock.nn import _expert_form
from nibblock.nn._column_order import take_columns
from nibblock.nn._expert_form import ExpertForm
from nibblock.nn._expert_weight import ExpertWeight, Parts, pack_experts, quantize_experts
from nibblock.ops import _checks, _storage

_linear = torch.ops.nibblock.int4_linear.default
_forward = torch.ops.nibblock._int4_linear_forward.default


class Int4Experts(nn.Module):
    """Stands where a transformers module holds the experts of a layer in fused 3-D Parameters.

        h[t, j] = gate(W_up[e] x[t] + b_up[e]),  e = top_k_index[t, j]
        y[t]    = sum_j top_k_weights[t, j] * (W_down[e] h[t, j] + b_down[e])

    with w[e, n, k] = scale[e, n, g(k)] * code[e, n, k] + offset[e, n, g(k)] in both projections.
    The gate is the original class's `_apply_gate`; experts without one apply `act_fn`, and a
    `post_expert_norm` runs behind W_down where the class has one.

    Args:
        experts: a module whose class is decorated with transformers' `use_experts_implementation`.
            Its biases, submodules and attributes are taken over, its weights are not looked at.
        group_size: 32, 64, 128, 256, or -1 for one group per row of an expert's matrix; with 8
            bits also 16.
        symmetric: True stores scales only, False scales and offsets.
        bits: 4 or 8.
        compute: "bf16", or "int8" to quantise activations on the fly; may be changed at any time.
        scale_dtype: float32 | float16 | int8 of scales and offsets; the last as in
            `nibblock.ops.int4_pack`.

    The constructor makes weights of zeros on the device of the original ones; `from_experts` and
    `load_state_dict` fill them. Each projection (`gate_up_proj` or `up_proj`, and `down_proj`) is a
    module with one frozen uint8 Parameter `packed` [E, bytes] and a read-only dequantised `weight`.
    The state dict holds `<projection>.qweight` [E, N, ceil(K / 2)], `.scales` and `.offsets`
    [E, N, ceil(K / G)], biases under their own names; a dense `<projection>` in the original
    orientation is accepted on loading and rounded to nearest. Columns may be packed in an order of
    their own, one for each expert: `<projection>.column_order` [E, K], as in `Int4Linear`.

    Input: hidden_states [T, H] float32 | bfloat16 | float16, top_k_index [T, k] int64 | int32 in
        [0, E], top_k_weights [T, k] of any floating point dtype. Index E stands for an expert that
        is not here: it adds nothing.
    Output: [T, H] of hidden_states' dtype.
    Raises: TypeError for another dtype, ValueError for another shape or an index out of range.
    Gradients: hidden_states, top_k_weights, biases, and whatever gate and norm hold. Weights are
        frozen.
    Determinism: products and sums are the same bits at any number of threads; a token's sum runs in
        the order of its row of top_k_index. The gate is made of torch's own ops: from 32768 numbers
        on, those with an exponential may differ in the last bit where threads divide them.
    Numerics: products as `nibblock.ops.int4_linear`; routing weights and sums in float32, rounded
        once.
    Compilation: `torch.compile` breaks the graph here and runs this module as it is; which experts
        run depends on data. `fullgraph=True` and `torch.export` refuse it.
    Source: the forward that transformers/integrations/moe.py calls grouped_mm.
    """

    def __init__(
        self,
        experts: nn.Module,
        group_size: int = 128,
        symmetric: bool = False,
        bits: int = 4,
        compute: str = "bf16",
        scale_dtype: torch.dtype = torch.float32,
    ) -> None:
        form = _form_of("Int4Experts", experts)
        _checks.check_format("Int4Experts", group_size, bits, scale_dtype, compute)
        layout = _layout(group_size, bits, not symmetric, scale_dtype, compute)
        self._build(experts, form, dict.fromkeys(form.sizes, layout), {}, {})

    def _build(
        self,
        experts: nn.Module,
        form: ExpertForm,
        layouts: dict[str, dict],
        packed: dict[str, torch.Tensor],
        orders: dict[str, torch.Tensor],
    ) -> None:
        nn.Module.__init__(self)
        self._form = form
        again = isinstance(experts, Int4Experts)
        # The class and not its gate: functions of a class are found again by its name, in a pickle.
        self._experts_class = experts._experts_class if again else type(experts)
        for name, (rows, columns) in form.sizes.items():
            old = experts._modules[name].packed if again else experts._parameters[name]
            weight = ExpertWeight(
                form.experts,
                rows,
                columns,
                transposed=form.transposed,
                packed=packed.get(name),
                column_order=orders.get(name),
                device=old.device,
                **layouts[name],
            )
            weight._dtype = experts._modules[name]._dtype if again else old.dtype
            self.add_module(name, weight)
        for name, bias in experts._parameters.items():
            if name not in self._modules:
                self.register_parameter(name, bias)
        for name, module in experts._modules.items():
            if name not in self._modules:
                self.add_module(name, module)
        for name, value in experts.__dict__.items():  # what the gate reads, and what models ask for
            if name not in self.__dict__ and not hasattr(type(self), name):
                self.__dict__[name] = value
        self.train(experts.training)

    @classmethod
    def from_experts(
        cls,
        experts: nn.Module,
        group_size: int = 128,
        symmetric: bool = False,
        bits: int = 4,
        compute: str = "bf16",
        method: str = "rtn",
        scale_dtype: Optional[torch.dtype] = None,
    ) -> Int4Experts:
        """Quantises a dense experts module; biases, submodules and attributes are taken over.

        Args:
            experts: as in the constructor; its weights float32 | bfloat16 | float16, finite.
            group_size, symmetric, bits, compute: as in the constructor.
            method: "rtn" or "mse", see `nibblock.ops.int4_quantize`.
            scale_dtype: float16 | float32 | int8 of scales and offsets; None takes float16 for a
                projection where `Int4Linear.from_linear` would for every expert, else float32.
        Returns:
            A new module on the device of the weights, in the original's training mode.
        Raises:
            TypeError: not a module. ValueError: a module that cannot be held so (the text says
            why), a format that does not exist, or a weight that is not finite.
        """
        op = "Int4Experts.from_experts"
        form = _form_of(op, experts, meta=False)
        _checks.check_format(op, group_size, bits, scale_dtype or torch.float32, compute)
        codes, dtypes = {}, {}
        for name, weight in _expert_form.weights(experts):
            try:
                qweight, scales, offsets = quantize_experts(
                    weight.transpose(1, 2) if form.transposed else weight,
                    group_size=group_size,
                    bits=bits,
                    symmetric=symmetric,
                    method=method,
                    scale_dtype=scale_dtype or torch.float32,
                )
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from error
            if scale_dtype is None:
                dtype = _checks.compact_scale_dtype(scales, offsets)
                scales = scales.to(dtype)
                offsets = None if offsets is None else offsets.to(dtype)
            codes[name] = (qweight, scales, offsets)
            dtypes[name] = scale_dtype or scales.dtype
        return cls.from_codes(
            experts,
            codes,
            group_size=group_size,
            bits=bits,
            compute=compute,
            scale_dtype=dtypes,
            palette=dict.fromkeys(codes, False),
        )

    @classmethod
    def from_codes(
        cls,
        experts: nn.Module,
        codes: dict[str, Parts],
        *,
        group_size: int | dict[str, int],
        bits: int | dict[str, int] = 4,
        compute: str = "bf16",
        column_order: Optional[dict[str, torch.Tensor]] = None,
        scale_dtype: Optional[dict[str, torch.dtype]] = None,
        palette: Optional[dict[str, bool]] = None,
    ) -> Int4Experts:
        """Takes over canonical codes, scales and offsets; nothing is rounded.

        Args:
            experts: as in the constructor, its weights on any device.
            codes: for each projection its qweight [E, N, ceil(K / 2)] (bits = 8: [E, N, K]) uint8,
                scales [E, N, ceil(K / G)] float32 | float16, and offsets like scales or None.
            group_size, bits: as in the constructor, or for each projection its own.
            compute: as in the constructor.
            column_order: for projections whose columns have one, [E, K] int64 | int32: a row is
                what `Int4Linear.from_codes` takes.
            scale_dtype: for each projection how scales and offsets are stored; None: in their own
                dtype, or as int8 where that changes nothing.
            palette: for each projection whether 8-bit codes take 4 bits
                (`nibblock.ops.int4_pack`); None: where those of all experts can.
        Returns:
            A new module on the device of the codes.
        Raises:
            TypeError, ValueError: as `nibblock.ops.int4_pack`, and for a module that cannot be held
            so.
        """
        op = "Int4Experts.from_codes"
        form = _form_of(op, experts)
        for key, given, what in (
            ("group_size", group_size, "a number"),
            ("bits", bits, "a number"),
            ("scale_dtype", scale_dtype, "None"),
            ("palette", palette, "None"),
        ):
            if isinstance(given, dict) and given.keys() != form.sizes.keys():
                raise ValueError(
                    f"{op}: {key} must be {what}, or one for {' and '.join(form.sizes)}, got "
                    f"{', '.join(map(str, given)) or 'none'}"
                )
        layouts, packed = {}, {}
        for name, (rows, columns) in form.sizes.items():
            if name not in codes:
                raise ValueError(f"{op}: codes must hold {name}, got {', '.join(codes)}")
            qweight, scales, offsets = codes[name]
            shape = (form.experts, rows)
            for part, value in (("qweight", qweight), ("scales", scales), ("offsets", offsets)):
                if value is not None and (value.dim() != 3 or tuple(value.shape[:2]) != shape):
                    raise ValueError(
                        f"{op}: {name}.{part} must be [{form.experts}, {rows}, ...], got "
                        f"{list(value.shape)}"
                    )
            group = group_size[name] if isinstance(group_size, dict) else group_size
            width = bits[name] if isinstance(bits, dict) else bits
            if scale_dtype is None:
                dtype = _storage.exact_dtype(scales, offsets, columns, group)
            else:
                dtype = scale_dtype[name]
            if palette is None:
                few = _storage.fits_palette(qweight, width)
            else:
                few = palette[name]
            stored = (columns, group, width, dtype, few)
            packed[name] = pack_experts(qweight, scales, offsets, *stored)
            layouts[name] = _layout(group, width, offsets is not None, dtype, compute)
        out = cls.__new__(cls)
        out._build(experts, form, layouts, packed, column_order or {})
        return out

    # --- what it holds ---------------------------------------------------------------------------

    @property
    def projections(self) -> dict[str, ExpertWeight]:
        """The two projections, by name."""
        return {name: self._modules[name] for name in self._form.sizes}

    @property
    def compute(self) -> str:
        """ "bf16" or "int8"; see the class."""
        return self._modules["down_proj"].compute

    @compute.setter
    def compute(self, value: str) -> None:
        for weight in self.projections.values():
            weight.compute = value

    @property
    def bits(self) -> int:
        """4 or 8; of `down_proj` where the projections differ."""
        return self._modules["down_proj"].bits

    def dequantize(self, dtype: Optional[torch.dtype] = None) -> dict[str, torch.Tensor]:
        """The dense weights that the packed ones stand for, in the original orientation.

        Args:
            dtype: float32 (when None) | bfloat16 | float16 of the result; rounded once.
        Returns:
            {"gate_up_proj" (or "up_proj"): [E, N, H], "down_proj": [E, H, I]}, or [E, H, N] and
            [E, I, H] where the original was transposed. New tensors without gradient.
        Raises:
            TypeError: another dtype.
        """
        return {name: weight.dequantize(dtype) for name, weight in self.projections.items()}

    def extra_repr(self) -> str:
        form = self._form
        return (
            f"{self._experts_class.__name__}: experts={form.experts}, hidden={form.hidden}, "
            f"inner={form.inner}, bias={form.biased}, compute={self.compute!r}"
        )

    def _load_from_state_dict(self, state_dict, prefix, *args):
        # A dense model's file has a tensor where there is a module here, which takes it as weight.
        for name in self.projections:
            if prefix + name in state_dict:
                state_dict[f"{prefix}{name}.weight"] = state_dict.pop(prefix + name)
        super()._load_from_state_dict(state_dict, prefix, *args)

    # --- running ---------------------------------------------------------------------------------

    def forward(
        self,
        hidden_states: torch.Tensor,
        top_k_index: torch.Tensor,
        top_k_weights: torch.Tensor,
    ) -> torch.Tensor:
        if torch.compiler.is_compiling():
            return _run_uncompiled(self, hidden_states, top_k_index, top_k_weights)
        return self._run(hidden_states, top_k_index, top_k_weights)

    def _run(self, x: torch.Tensor, index: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        form = self._form
        # Ranges of indices are checked by what reads them below.
        if not (
            isinstance(x, torch.Tensor)
            and x.dim() == 2
            and x.shape[1] == form.hidden
            and x.dtype in _checks.FLOATS
            and index.dim() == 2
            and index.shape == scale.shape
            and index.shape[0] == x.shape[0]
            and index.dtype in _checks.INDEX_DTYPES
        ):
            _expert_form.check_call(form, x, index, scale)
        tokens, slots = index.shape
        if tokens * slots == 0:
            return torch.zeros_like(x)
        if tokens == 1:  # decoding: the rows are known without sorting or gathering anything
            chosen = index[0].tolist()
            if 0 <= min(chosen) and max(chosen) < form.experts:
                row = x[0]
                ups = self._each(form.up, [(expert, row) for expert in chosen])
                rows = self._inside(torch.stack(ups)).unbind(0)
                out = torch.stack(self._each("down_proj", list(zip(chosen, rows))))
                return self._sum(self._outside(out), scale, x)
        return self._run_sorted(x, index, scale)

    def _run_sorted(self, x, index, scale):
        """Rows sorted by expert, one product for each expert that has any."""
        form = self._form
        tokens, slots = index.shape
        flat = index.reshape(-1)
        order = flat.sort(stable=True).indices
        low = int(flat.min())
        counts = flat.bincount(minlength=form.experts + 1).tolist() if low >= 0 else []
        if len(counts) != form.experts + 1:
            _expert_form.check_call(form, x, index, scale)
        sizes = counts[: form.experts]
        hit = [expert for expert, size in enumerate(sizes) if size]
        absent = counts[form.experts]
        if not hit:
            return torch.zeros_like(x)
        here = order[: len(order) - absent]
        rows = x.index_select(0, here // slots).split([sizes[expert] for expert in hit])
        inner = self._inside(torch.cat(self._each(form.up, list(zip(hit, rows)))))
        parts = inner.split([sizes[expert] for expert in hit])
        out = self._outside(torch.cat(self._each("down_proj", list(zip(hit, parts)))))
        if absent:
            out = torch.cat((out, out.new_zeros(absent, form.hidden)))
        back = torch.empty_like(order)
        back[order] = torch.arange(len(order), device=order.device)
        return self._sum(out.index_select(0, back), scale, x)

    def _each(self, name: str, calls: list[tuple[int, torch.Tensor]]) -> list[torch.Tensor]:
        """One projection of each (expert, rows)."""
        weight = self._modules[name]
        biases = self._parameters[f"{name}_bias"] if self._form.biased else None
        first = calls[0][1]
        tracked = torch.is_grad_enabled() and (
            first.requires_grad or (biases is not None and biases.requires_grad)
        )
        if tracked and biases is not None:
            biases = biases.unbind(0)  # one gradient for all; indexing fills a zero one each time
        orders = None if weight._order is None else weight._order.unbind(0)
        out = []
        for expert, rows in calls:
            if orders is not None:
                rows = take_columns(rows, orders[expert])
            bias = None if biases is None else biases[expert]
            packed = weight.expert(expert)
            if tracked:
                out.append(_linear(rows, packed, bias, *weight._args))
            else:  # the op without a gradient takes less time to call
                out.append(_forward(rows, packed, bias, weight._code))
        return out

    def _inside(self, up: torch.Tensor) -> torch.Tensor:
        """[S, I]: what goes into `down_proj`."""
        if self._form.gated:
            return self._experts_class._apply_gate(self, up)
        return self.act_fn(up)

    def _outside(self, down: torch.Tensor) -> torch.Tensor:
        """[S, H]: what comes out of an expert."""
        return self.post_expert_norm(down) if self._form.normed else down

    def _sum(self, out: torch.Tensor, scale: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """[T, H]: the k rows of each token weighted and added, in the order of its slots."""
        out = out.view(*scale.shape, -1) * scale.to(torch.float32).unsqueeze(-1)
        return out.sum(1, dtype=torch.float32).to(x.dtype)


@_disable_dynamo
def _run_uncompiled(module, x, index, scale):
    return module._run(x, index, scale)


def _layout(group_size, bits, affine, scale_dtype, compute) -> dict:
    return {
        "group_size": group_size,
        "bits": bits,
        "affine": affine,
        "scale_dtype": scale_dtype,
        "compute": compute,
    }


def _form_of(op: str, experts: object, meta: bool = True) -> ExpertForm:
    if not isinstance(experts, nn.Module):
        raise TypeError(f"{op}: experts must be an nn.Module, got {type(experts).__name__}")
    if meta and isinstance(experts, Int4Experts):
        return experts._form
    reason = _expert_form.unfit(experts, meta)
    if reason:
        raise ValueError(
            f"{op}: experts must be fused 3-D experts of transformers, got "
            f"{type(experts).__name__}: {reason}"
        )
    return _expert_form.read_form(experts)
