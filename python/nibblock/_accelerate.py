"""`accelerate`: replaces the linears and experts of a module tree by int4 or block-sparse ones, in
place, and says what it did."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Callable, Optional, Union

import torch
from torch import nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from nibblock._carry_over import carry_over
from nibblock._config import BlockSparseConfig, Int4Config, Where
from nibblock._progress import Progress, ProgressOption
from nibblock._report import LayerReport, Report
from nibblock._tied_keys import rename_tied_keys
from nibblock._ties import parameter_owners
from nibblock.nn import (
    AdapterLinear,
    BlockSparseLinear,
    Int4Embedding,
    Int4Experts,
    Int4Linear,
)
from nibblock.nn import _expert_form as _experts
from nibblock.nn._conv1d import conv1d_class, is_conv1d, linear_shape
from nibblock.nn._lean import is_linear
from nibblock.nn.fused import fuse_where_possible, shorten_forwards
from nibblock.ops import _checks

Config = Union[Int4Config, BlockSparseConfig]

# Hooks on the state dict expect to find a weight in it.
_STATE_HOOKS = (
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)
_HOOKED = "it has hooks on its state dict, which expect a weight"
# What a subclass may define without changing what the layer does for a model that runs.
_HARMLESS = frozenset(
    ("__init__", "__init_subclass__", "reset_parameters", "extra_repr", "__repr__")
    + ("forward",)  # is looked at by itself
    + ("__module__", "__qualname__", "__doc__", "__annotations__", "__constants__")
    + ("__parameters__", "__orig_bases__", "__firstlineno__", "__static_attributes__")
    + ("__slots__", "__weakref__", "__dict__", "__abstractmethods__", "_abc_impl")
)


def _is_plain(module: nn.Module) -> bool:
    """Whether it holds one weight, as all layers but experts do."""
    return isinstance(module, (nn.Linear, nn.Embedding)) or is_conv1d(module)


@dataclass
class _Layer:
    """A linear, embedding or experts module of the model, with every place it stands in."""

    name: str
    module: nn.Module
    places: list[tuple[nn.Module, str]]
    reason: str = ""  # why it is kept; empty: it will be replaced


def accelerate(
    model: nn.Module,
    config: Optional[Config] = None,
    where: Where = None,
    skip: Union[str, Iterable[str]] = (),
    fuse: bool = False,
    progress: ProgressOption = None,
) -> Report:
    """Replaces the linears of `model` by `Int4Linear`s (and fused experts by `Int4Experts`), or by
    `BlockSparseLinear`s, in place.

    transformers' `Conv1D` (GPT-2 and its relatives) is a linear like the others: its weight
    [in, out] is transposed, and what replaces it is an `nn.Linear` with `weight` [out, in].

    Around linears of 4 or 8 bits, decoder layers of transformers whose source is known (Llama,
    Mistral, Qwen2 and their kin) compute norms, rotations, silu(gate) * up and single-token
    attention in one pass each, forward and backward, equal to theirs up to float32 rounding, and
    for few rows an MLP in one call: their class becomes a subclass with another forward.

    Args:
        model: any module tree. Not itself a linear: use `Int4Linear.from_linear` or
            `BlockSparseLinear.from_linear` for a single one.
        config: how weights are stored: an `Int4Config` (the default one when None), or a
            `BlockSparseConfig` to keep the blocks of largest norm only.
        where: None for every linear and experts module; a name pattern ("*.mlp.*"), a list of them,
            or a callable (name, module) -> bool.
        skip: names or name patterns that are left alone ("lm_head", "*.router").
        fuse: True also lets sibling int4 linears that read the same input (q/k/v, gate/up) share
            storage and run as one product; names and state dict stay as they are. A parent whose
            class refuses subclasses keeps its own forward; the report says so.
        progress: None for a bar on a terminal and one line elsewhere (standard error), False for
            silence, or a callable (layers done, layers).
    Returns:
        A `Report`: a row for every linear and every module of experts (and embedding, with
        config.embeddings), with the reason for each one that was kept. Kept are: linears whose
        class has a forward, a method or an attribute of its own, which hold other parameters or are
        parametrised, or which have hooks on their state dict; projections of
        `nn.MultiheadAttention` and linears of `nn.TransformerEncoderLayer`, whose fast paths read
        weights directly; experts whose class transformers' `use_experts_implementation` does not
        decorate, and all experts with a `BlockSparseConfig`; weights tied to something that stays
        dense; weights on the meta device or in another dtype than float32, bfloat16 and float16;
        lazy ones that have not run yet. Linears tied to each other stay tied; a pruned linear must
        own its weight. Hooks on what is replaced, and attributes that were set on it, go over to
        what replaces it.
    Raises:
        TypeError: model is not a module, or config neither an Int4Config nor a BlockSparseConfig.
        ValueError: model is itself a linear or experts, or a weight is not finite. The model is
        unchanged whenever something is raised.
    Gradients: biases, kept blocks and everything dense stay trainable; int4 weights are frozen.
    Determinism: the same bits at any number of threads.
    Example:
        >>> report = nb.accelerate(model, nb.Int4Config(group_size=64), skip=("lm_head",))
        >>> print(report)
    """
    config = Int4Config() if config is None else config
    if not isinstance(model, nn.Module):
        raise TypeError(f"accelerate: model must be an nn.Module, got {type(model).__name__}")
    if not isinstance(config, (Int4Config, BlockSparseConfig)):
        raise TypeError(
            f"accelerate: config must be an Int4Config or a BlockSparseConfig, got "
            f"{type(config).__name__}"
        )
    if fuse and not isinstance(config, Int4Config):
        raise ValueError("accelerate: fuse must be False with a BlockSparseConfig, got True")
    single = isinstance(model, (nn.Linear, nn.Embedding, Int4Experts)) or is_conv1d(model)
    if single or not _experts.unfit(model, True):
        raise ValueError(
            f"accelerate: model must be a tree with layers to replace, got a single "
            f"{type(model).__name__}; use Int4Linear.from_linear, Int4Embedding.from_embedding or "
            f"Int4Experts.from_experts"
        )
    layers = _find_layers(model, config)
    owners = parameter_owners(model)
    _decide(model, layers, owners, config, _selector(where), _patterns(skip))
    chosen = [layer for layer in layers if not layer.reason]
    report = Report(model_bytes_before=model_bytes(model))
    before = {id(layer): _module_bytes(layer.module) for layer in layers}
    # Everything is converted before anything is swapped: an exception leaves the model as it was.
    replacements = _convert(chosen, owners, config, progress)
    for layer in chosen:
        new = replacements[id(layer.module)]
        for parent, attribute in layer.places:
            parent._modules[attribute] = new
    rename_tied_keys(model)
    if fuse:
        report.fused, report.not_fused = fuse_where_possible(model)
    if isinstance(config, Int4Config):
        shorten_forwards(model, [layer.name for layer in chosen])
    report.model_bytes_after = model_bytes(model)
    report.rows = [_row(layer, before[id(layer)], replacements) for layer in layers]
    return report


# --- finding and deciding -------------------------------------------------------------------------


def _patterns(value: Union[str, Iterable[str]], op: str = "accelerate") -> list[str]:
    if not isinstance(value, Iterable):
        raise TypeError(
            f"{op}: name patterns must be str or a list of them, got {type(value).__name__}"
        )
    patterns = [value] if isinstance(value, str) else list(value)
    for pattern in patterns:
        if not isinstance(pattern, str):
            raise TypeError(f"{op}: name patterns must be str, got {type(pattern).__name__}")
    return patterns


def _matches(name: str, patterns: list[str]) -> bool:
    return any(name == pattern or fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def _selector(where: Where, op: str = "accelerate") -> Callable[[str, nn.Module], bool]:
    if where is None:
        return lambda name, module: True
    if callable(where):
        return where
    patterns = _patterns(where, op)
    return lambda name, module: _matches(name, patterns)


def _find_layers(model: nn.Module, config: Config) -> list[_Layer]:
    embeddings = isinstance(config, Int4Config) and config.embeddings
    kinds = (nn.Linear, conv1d_class(), nn.Embedding if embeddings else None)
    kinds = tuple(kind for kind in kinds if kind is not None)
    layers: dict[int, _Layer] = {}
    modules = dict(model.named_modules(remove_duplicate=False))
    for name, module in modules.items():
        if isinstance(module, kinds) or (name and _experts.looks_like_experts(module)):
            prefix, _, attribute = name.rpartition(".")
            layer = layers.setdefault(id(module), _Layer(name, module, []))
            layer.places.append((modules[prefix], attribute))
    return list(layers.values())


def _unfit_parent(layer: _Layer) -> str:
    """Why no other module can stand in this one's place; empty if it can."""
    for parent, _ in layer.places:
        if isinstance(parent, nn.MultiheadAttention):
            return "projection of nn.MultiheadAttention, which reads the weight directly"
        if isinstance(parent, nn.TransformerEncoderLayer):
            return "linear of nn.TransformerEncoderLayer, whose fast path reads the weight directly"
        if isinstance(parent, AdapterLinear) and parent.merged is not None:
            return f"the adapter {parent.merged!r} is merged into it"
        if all(hasattr(parent, name) for name in ("get_param", "parameter_name")):
            # peft's ParamWrapper
            return f"wrapped by {type(parent).__name__}, which reads its {parent.parameter_name}"
    return ""


def _unfit(layer: _Layer, meta: bool = False, exact: bool = True) -> str:
    """Why this module cannot be replaced, whatever the caller wants; empty if it can.

    meta: whether a weight on the meta device will do.
    exact: whether what takes its place must give the same bits."""
    module = layer.module
    kind = type(module)
    kinds = (nn.Embedding, nn.Linear, conv1d_class() or nn.Linear)
    base = next((one for one in kinds if isinstance(module, one)), nn.Linear)
    if isinstance(module, (Int4Linear, Int4Embedding, Int4Experts)):
        return "already quantised"
    if isinstance(module, BlockSparseLinear):
        return "already block-sparse"
    refused = _unfit_parent(layer)
    if refused:
        return refused
    if not isinstance(module, base):
        hooked = any(module.__dict__.get(hooks) for hooks in _STATE_HOOKS)
        return _experts.unfit(module, meta) or (_HOOKED if hooked else "")
    if isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear):
        return "projection of an attention module that reads the weight directly"
    if parametrize.is_parametrized(module):
        return "its weight is parametrised"
    known = kind.forward is base.forward or (not exact and is_linear(kind))
    if not known or "forward" in module.__dict__:
        return f"{kind.__name__} has a forward of its own"
    if is_lazy(module._parameters.get("weight")):
        return "it is lazy and has not run yet"
    added = _added(kind, base)
    if added:
        return f"{kind.__name__} has {added} of its own"
    if any(module.__dict__.get(hooks) for hooks in _STATE_HOOKS):
        return _HOOKED
    own = set(module._parameters) | set(module._buffers) | set(module._modules)
    extra = sorted(own - {"weight", "bias"})
    if extra:
        return f"it holds more than a weight and a bias: {', '.join(extra)}"
    weight = module._parameters.get("weight")
    if weight is None:
        return "its weight is not a Parameter"
    if weight.dtype not in _checks.FLOATS:
        return f"its weight is {_checks.dtype_name(weight.dtype)}"
    if weight.is_meta and not meta:
        return "its weight is on the meta device"
    if type(weight) is not nn.Parameter:
        return f"its weight is a {type(weight).__name__}"
    if weight.layout is not torch.strided or weight.dim() != 2:
        return f"its weight is {list(weight.shape)}, {weight.layout}"
    if weight.numel() == 0:
        return "its weight is empty"
    bias = module._parameters.get("bias")
    if bias is not None and bias.dtype not in _checks.FLOATS:
        return f"its bias is {_checks.dtype_name(bias.dtype)}"
    rows = weight.shape[1 if is_conv1d(module) else 0]
    if bias is not None and bias.shape != (rows,) and not exact:  # F.linear would broadcast it
        return f"its bias is {list(bias.shape)}"
    if isinstance(module, nn.Embedding) and module.max_norm is not None:
        return "max_norm rewrites its table"
    return ""


def _added(kind: type, base: type) -> str:
    """What a subclass of a linear or embedding defines that a replacement would lose."""
    for cls in kind.__mro__[: kind.__mro__.index(base)]:
        for name in cls.__dict__:
            if name not in _HARMLESS:
                return name
    return ""


def _decide(model, layers, owners, config, wanted, skip, meta: bool = False) -> None:
    for layer in layers:
        if _matches(layer.name, skip):
            layer.reason = "in skip"
        else:
            layer.reason = _unfit(layer, meta, exact=False)
        if not layer.reason and not wanted(layer.name, layer.module):
            layer.reason = "not selected by where"
        if not layer.reason and isinstance(config, BlockSparseConfig):
            layer.reason = _unprunable(layer, owners)
    # A weight is replaced in all modules that hold it, or in none: repeat until nothing changes,
    # because keeping one layer may keep another.
    by_module = {id(layer.module): layer for layer in layers}
    changed = True
    while changed:
        changed = False
        for layer in layers:
            if layer.reason:
                continue
            for name, module, _ in _holders(layer.module, owners):
                if module is layer.module:
                    continue
                other = by_module.get(id(module)) if _is_plain(layer.module) else None
                if other is None or other.reason:
                    hint = "; Int4Config(embeddings=True) holds both in 8 bits"
                    tip = hint if other is None and type(module) is nn.Embedding else ""
                    layer.reason = f"its weight is tied to {name}, which stays dense{tip}"
                elif is_conv1d(module) != is_conv1d(layer.module):
                    layer.reason = f"its weight is tied to {name}, which reads it transposed"
                else:
                    continue
                changed = True
                break


def _holders(module: nn.Module, owners) -> list[tuple[str, nn.Module, str]]:
    """Every module that holds a weight of this one."""
    if _is_plain(module):
        return owners[id(module.weight)]
    return [owner for _, weight in _experts.weights(module) for owner in owners[id(weight)]]


def _unprunable(layer: _Layer, owners) -> str:
    """Why this linear cannot become a BlockSparseLinear, though an Int4Linear it could."""
    if not _is_plain(layer.module):
        return "experts are not pruned, only held in 4 or 8 bits"
    if any(isinstance(parent, AdapterLinear) for parent, _ in layer.places):
        return "the base of an AdapterLinear"
    tied = [n for n, module, _ in owners[id(layer.module.weight)] if module is not layer.module]
    return f"its weight is tied to {tied[0]}; pruned blocks cannot be shared" if tied else ""


# --- replacing ------------------------------------------------------------------------------------


def _convert(chosen, owners, config: Config, option: ProgressOption) -> dict[int, nn.Module]:
    replacements: dict[int, nn.Module] = {}
    packed: dict[
        int, nn.Module
    ] = {}  # first replacement made of each weight: ties share its storage
    pruning = isinstance(config, BlockSparseConfig)
    label = "nibblock: pruning" if pruning else "nibblock: quantising"
    progress = Progress(option, len(chosen), label)
    finished = False
    try:
        # Embeddings first: a tied head then takes the table's format.
        for layer in sorted(chosen, key=lambda item: not isinstance(item.module, nn.Embedding)):
            module = layer.module
            weight = module.weight if _is_plain(module) else None
            twin = packed.get(id(weight))
            if weight is None:
                new = _int4_experts(layer, config)
            elif pruning:
                new = _pruned(layer, config)
            elif isinstance(module, nn.Embedding):
                new = (
                    _tied_embedding(twin, module) if twin is not None else _embedding(layer, config)
                )
            elif twin is not None:
                new = _tied_linear(twin, module, config)
            else:
                new = _linear(layer, config)
            new.train(module.training)
            carry_over(module, new)
            if weight is not None:
                packed.setdefault(id(weight), new)
            replacements[id(module)] = new
            progress.step()
        finished = True
    finally:
        progress.close(finished)
    return replacements


def _named(layer: _Layer, make: Callable[[], nn.Module]) -> nn.Module:
    try:
        return make()
    except ValueError as error:
        raise ValueError(f"accelerate: {layer.name}: {error}") from error


def _pruned(layer: _Layer, config: BlockSparseConfig) -> BlockSparseLinear:
    return _named(
        layer,
        lambda: BlockSparseLinear.from_linear(
            layer.module, config.density, config.block, dtype=config.dtype
        ),
    )


def _linear(layer: _Layer, config: Int4Config) -> Int4Linear:
    return _named(
        layer,
        lambda: Int4Linear.from_linear(
            layer.module,
            group_size=config.group_size,
            symmetric=config.symmetric,
            bits=config.bits,
            compute=config.compute,
            method=config.method,
        ),
    )


def _int4_experts(layer: _Layer, config: Int4Config) -> Int4Experts:
    form = {k: getattr(config, k) for k in ("group_size", "symmetric", "bits", "compute", "method")}
    return _named(layer, lambda: Int4Experts.from_experts(layer.module, **form))


def _embedding(layer: _Layer, config: Int4Config) -> Int4Embedding:
    return _named(layer, lambda: Int4Embedding.from_embedding(layer.module, method=config.method))


def _tied_linear(twin: nn.Module, module: nn.Linear, config: Int4Config) -> Int4Linear:
    return Int4Linear.from_packed(
        twin.packed, module.bias, compute=config.compute, **twin._layout()
    )


def _tied_embedding(twin: nn.Module, module: nn.Embedding) -> Int4Embedding:
    return Int4Embedding.from_packed(
        twin.packed,
        num_embeddings=twin._rows,
        embedding_dim=twin._columns,
        group_size=twin.group_size,
        bits=twin.bits,
        affine=twin.affine,
        scale_dtype=twin.scale_dtype,
        padding_idx=module.padding_idx,
        dtype=module.weight.dtype,
    )


# --- bytes ----------------------------------------------------------------------------------------


def _module_bytes(module: nn.Module) -> int:
    inside = module.projections.values() if isinstance(module, Int4Experts) else ()
    own = [p for m in (module, *inside) for p in m._parameters.values()]
    return sum(_bytes(p) for p in own if p is not None)


def _bytes(tensor: torch.Tensor) -> int:
    return 0 if is_lazy(tensor) else tensor.numel() * tensor.element_size()


def model_bytes(model: nn.Module) -> int:
    """Bytes of all Parameters and buffers; tied ones count once."""
    seen: dict[int, int] = {}
    for tensor in [*model.parameters(), *model.buffers()]:
        seen[id(tensor)] = _bytes(tensor)
    return sum(seen.values())


def _row(layer: _Layer, before: int, replacements: dict[int, nn.Module]) -> LayerReport:
    old = layer.module
    new = replacements.get(id(old), old)
    action = "sparse" if isinstance(new, BlockSparseLinear) else f"int{getattr(new, 'bits', 0)}"
    if isinstance(old, nn.Embedding):
        shape = (old.num_embeddings, old.embedding_dim)
    elif _is_plain(old):
        shape = linear_shape(old)
    else:
        shape = _experts.matrix_shape(old)
    return LayerReport(
        name=layer.name,
        action="kept" if layer.reason else action,
        reason=layer.reason,
        kind=type(old).__name__,
        shape=shape,
        bytes_before=before,
        bytes_after=_module_bytes(new),
    )
