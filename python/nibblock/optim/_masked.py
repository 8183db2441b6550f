"""What the masked optimisers share: a `torch.optim.Optimizer` over masked updates."""

from __future__ import annotations

import math
import numbers
import operator
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any, Callable, Optional

import torch
from torch import nn

from nibblock import ops
from nibblock.ops import _block_checks
from nibblock.optim import _hooks, _plan
from nibblock.optim._states import States, fill

_layout = operator.attrgetter("layout")
_TINY = 1e-6  # as torch.nn.utils.clip_grad_norm_


class MaskedOptimizer(torch.optim.Optimizer):
    """Base class: kinds, states, clipping, GradScaler, write-through. Rules are subclasses."""

    _step_supports_amp_scaling = True
    _writes_through = True  # MaskedLinears need no look at their versions after our step
    _states: tuple[str, ...] = ()  # the float32 states of an entry

    def __init__(
        self,
        params: Iterable,
        defaults: dict[str, Any],
        max_norm: Optional[float],
        masks: Optional[Mapping[nn.Parameter, torch.Tensor]],
    ) -> None:
        if max_norm is not None and not self._number("max_norm", max_norm) > 0:
            raise ValueError(f"{self._name}: max_norm must be above 0 or None, got {max_norm}")
        self.max_norm = max_norm
        self.last_norm: Optional[torch.Tensor] = None
        self._masks: dict[torch.Tensor, _plan.Mask] = {}
        self._wanted = dict(_plan.check_masks(self._name, masks))
        self._plans: dict[int, _plan.Plan] = {}
        self._built = False  # until then, masks may belong to Parameters of a later group
        super().__init__(params, defaults)
        self._built = True
        self.state = States(self.state)
        if self._wanted:
            self._refuse_masks(self._wanted)

    def _refuse_masks(self, masks: Mapping[nn.Parameter, Any]) -> None:
        shape = list(next(iter(masks)).shape)
        raise ValueError(
            f"{self._name}: masks must belong to Parameters of params, got one of shape {shape}"
        )

    @property
    def _name(self) -> str:
        return type(self).__name__

    # --- rules -----------------------------------------------------------------------------------

    def _check_group(self, group: dict[str, Any]) -> None:
        raise NotImplementedError  # every rule has its own

    def _update(
        self,
        group: dict[str, Any],
        batch: _plan.Batch,
        grads: list[torch.Tensor],
        multiplier: Optional[torch.Tensor],
        found_inf: Optional[torch.Tensor],
    ) -> None:
        raise NotImplementedError  # every rule has its own

    def _state_names(self, group: dict[str, Any], blocks: bool) -> tuple[str, ...]:
        """Of values of a `MaskedLinear`, or of other Parameters."""
        return self._states

    def _is_stack(self, parameter: torch.Tensor) -> bool:
        """Whether a Parameter that no MaskedLinear owns is moved as blocks: it is [Z, B, B] then,
        and nothing is written through."""
        return False

    def _all_names(self, group: dict[str, Any]) -> tuple[str, ...]:
        return self._state_names(group, True) + self._state_names(group, False)

    def _added_states(self, state: dict, like: dict) -> dict[str, torch.Tensor]:
        """What a changed rule of the group adds to a state that is there already."""
        return {}

    def _number(self, name: str, value: Any) -> float:
        if isinstance(value, torch.Tensor) and value.numel() == 1:
            value = value.item()
        if isinstance(value, bool) or not isinstance(value, numbers.Real):
            raise TypeError(f"{self._name}: {name} must be a number, got {type(value).__name__}")
        return float(value)

    def _check_range(self, name: str, value: Any) -> None:
        number = self._number(name, value)
        if not number >= 0:
            raise ValueError(f"{self._name}: {name} must be at least 0, got {value}")
        self._check_finite(name, number)

    def _check_finite(self, name: str, value: Any) -> None:
        if not math.isfinite(self._number(name, value)):
            raise ValueError(f"{self._name}: {name} must be finite, got {value}")

    # --- parameters ------------------------------------------------------------------------------

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch's; the group may bring its own "masks".

        Raises:
            TypeError, ValueError: as the constructor. The optimiser is unchanged then.
        """
        group = dict(param_group)
        masks = {**self._wanted, **_plan.check_masks(self._name, group.pop("masks", None))}
        super().add_param_group(group)
        try:
            added = self.param_groups[-1]
            self._check_group(added)
            made = {p: self._prepare(p, masks.pop(p, None)) for p in added["params"]}
            if masks and self._built:
                self._refuse_masks(masks)
        except (TypeError, ValueError):
            del self.param_groups[-1]
            raise
        self._masks.update({p: m for p, m in made.items() if m is not None})
        self._wanted = masks
        self._plans.clear()

    def _prepare(self, parameter: torch.Tensor, mask: Any) -> Optional[_plan.Mask]:
        if parameter.requires_grad:  # what is frozen may come along, as with torch's optimisers
            _plan.check_parameter(self._name, parameter)
        if _plan.masked_layer(parameter) is None:
            return _plan.make_mask(self._name, parameter, mask)
        if mask is not None:
            raise ValueError(
                f"{self._name}: masks must be of other Parameters than values of a MaskedLinear, "
                f"got one of shape {list(mask.shape)}; use set_blocks"
            )
        return None

    # --- state ----------------------------------------------------------------------------------

    def _new_state(self, parameter: torch.Tensor, group: dict[str, Any], layer: Any) -> dict:
        like = {"device": parameter.device}
        blocks = layer is not None or self._is_stack(parameter)
        if blocks:
            shape = tuple(parameter.shape)
            state = {"age": torch.zeros(shape[0], dtype=torch.int32, **like)}
        else:
            shape = (self._masks[parameter].count,)
            state = {"step": torch.zeros(1, dtype=torch.int32, **like)}
        for name in self._state_names(group, blocks):
            state[name] = torch.zeros(shape, dtype=torch.float32, **like)
        return state

    def _check_state(self, state: dict, like: dict, hint: str) -> None:
        for name, tensor in like.items():
            found = state.get(name)
            if not isinstance(found, torch.Tensor) or found.shape != tensor.shape:
                got = "none" if found is None else list(getattr(found, "shape", []))
                raise ValueError(
                    f"{self._name}: state {name} must be {list(tensor.shape)}, got {got}{hint}"
                )

    def state_dict(self) -> dict[str, Any]:
        """As torch's; each state also says which entries it belongs to ("mask")."""
        out = super().state_dict()
        for at, parameter in enumerate(p for g in self.param_groups for p in g["params"]):
            if at in out["state"]:
                state = _plan.apart(out["state"][at])
                out["state"][at] = {**state, "mask": self._print(parameter)}
        return out

    def _print(self, parameter: torch.Tensor) -> int:
        layer = _plan.masked_layer(parameter)
        if layer is None:
            mask = self._masks.get(parameter)
            return 0 if mask is None else mask.print()
        return _plan.print_of(layer.blocks, layer.block)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, but states stay float32 (torch's casts them to the Parameter's dtype).

        Raises:
            ValueError: as torch's; or states of other blocks or masks than the optimiser has. What
            there was is kept then.
        """
        final: list[dict] = []
        catch = self.register_load_state_dict_pre_hook(lambda _, found: final.append(found))
        before = (self.state, self.param_groups)
        try:
            super().load_state_dict(state_dict)
            self._restore(final[0])
        except ValueError:
            self.state, self.param_groups = before
            raise
        finally:
            catch.remove()
            self._plans.clear()

    def _restore(self, saved: dict[str, Any]) -> None:
        """Takes the states as they are in the file, onto the Parameters' devices."""
        keys = [key for group in saved["param_groups"] for key in group["params"]]
        places = [(p, g) for g in self.param_groups for p in g["params"]]
        for key, (parameter, group) in zip(keys, places):
            if key not in saved["state"]:
                continue
            state = dict(saved["state"][key])
            mask = state.pop("mask", None)
            if mask is not None and mask != self._print(parameter):
                raise ValueError(
                    f"{self._name}: the state must be of the same blocks or mask, got another for "
                    f"a Parameter of shape {list(parameter.shape)}"
                )
            like = self._new_state(parameter, group, _plan.masked_layer(parameter))
            self._check_state(state, like, " in the file")
            self.state[parameter] = {
                name: value.to(parameter.device, like[name].dtype if name in like else None,
                               copy=True)
                if isinstance(value, torch.Tensor)
                else value
                for name, value in state.items()
            }  # fmt: skip

    def move_blocks(self, values: nn.Parameter, came_from: torch.Tensor) -> None:
        """Lets the state of `values` follow a change of their block list.

        Args:
            values: the Parameter of a `MaskedLinear` after `set_blocks`, or of an adapter whose
                blocks `nibblock.sparse` has changed (its state has one count of steps, no
                ages, but for `MaskedMuon`'s).
            came_from: int64 [Z], what `set_blocks` returned: blocks that stayed keep their state
                and age; new ones (-1) start at age 0.
        """
        state = self.state.get(values)
        self._plans.clear()
        entries = _plan.masked_layer(values) is None and values in self._masks
        if entries:
            entries = not self._is_stack(values)
            self._masks[values] = _plan.make_mask(self._name, values, None)
        if not state:
            return
        stay = came_from >= 0
        for name, old in state.items():
            if entries and name == "step":
                continue
            rows = old.view(-1, values.shape[1] * values.shape[2]) if entries else old
            new = rows.new_zeros((len(came_from), *rows.shape[1:]))
            new[stay.to(old.device)] = rows[came_from[stay].to(old.device)]
            state[name] = new.view(-1) if entries else new

    def __getstate__(self) -> dict[str, Any]:
        held = super().__getstate__()
        apart = defaultdict(dict, {p: _plan.apart(s) for p, s in self.state.items()})
        return {**held, "state": apart, "_masks": self._masks, "max_norm": self.max_norm}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.__dict__.setdefault("_masks", {})
        self.__dict__.setdefault("last_norm", None)
        self._wanted, self._plans, self._built = {}, {}, True
        self.state = States(self.state)

    # --- calls ----------------------------------------------------------------------------------

    def _ready(self, at: int, group: dict[str, Any]) -> list[tuple[_plan.Batch, list]]:
        """The op calls of a group, each with its gradients."""
        plan, names = self._plans.get(at), self._all_names(group)
        found = None
        if plan is not None and plan.fits(group["params"], names, self.state):
            found = plan.gradients()
        if found is None:
            plan = self._plans[at] = self._new_plan(group)
            found = plan.gradients()
        for batch, grads in zip(plan.batches, found):
            self._check_layouts(grads)
            # Not at once: those that get gradients may be others at every step.
            if batch.used and batch.steps is None and batch.packs:
                kept = [self.state[p] for p in batch.parameters]
                batch.pack(kept, self._state_names(group, True))
        return list(zip(plan.batches, found))

    def _new_plan(self, group: dict[str, Any]) -> _plan.Plan:
        found: dict[tuple, _plan.Batch] = {}
        idle = []
        for parameter in group["params"]:
            if parameter.grad is None:
                idle.append(parameter)
            else:
                self._join(found, parameter, group)
        names, params = self._all_names(group), list(group["params"])
        return _plan.Plan(params, names, self.state, list(found.values()), idle)

    def _join(self, found: dict, parameter: torch.Tensor, group: dict[str, Any]) -> None:
        layer = _plan.masked_layer(parameter)
        if layer is None and parameter not in self._masks:
            # It was a layer's when it was added: without one nothing would read what it learns.
            if self.state.get(parameter) or hasattr(parameter, "_masked_linear"):
                raise ValueError(
                    f"{self._name}: values must belong to a MaskedLinear that lives, got a "
                    f"Parameter of shape {list(parameter.shape)} without one"
                )
            self._masks[parameter] = self._prepare(parameter, None)
        like = self._new_state(parameter, group, layer)
        state = self.state.own(parameter)
        fill(state, self._added_states(state, like) if state else like)
        self._check_state(state, like, "; after set_blocks call move_blocks")
        stack = layer is None and self._is_stack(parameter)
        names = self._state_names(group, stack or layer is not None)
        if stack:
            key = ("block", parameter.shape[1], parameter.dtype, "stack", parameter.device)
        elif layer is None:
            mask = self._masks[parameter]
            key = (mask.kind, 0, parameter.dtype, None, parameter.device)
        else:
            weight = layer._parameters["weight"]
            # The kernels write float32 and bfloat16 rows; other weights are left to `sync`.
            direct = weight.dtype in _block_checks.VALUES and weight.stride(1) == 1
            sort = weight.dtype if direct else None
            key = ("block", layer.block, parameter.dtype, sort, parameter.device)
        batch = found.setdefault(key, _plan.Batch(key[0], key[1], states=[[] for _ in names]))
        batch.parameters.append(parameter)
        batch.clocks.append(state["age" if stack or layer is not None else "step"])
        for tensors, name in zip(batch.states, names):
            tensors.append(state[name])
        if stack:  # places that nothing is written to
            batch.entries.append(
                torch.zeros(len(parameter), 2, dtype=torch.int32, device=parameter.device)
            )
        elif layer is None:
            batch.entries.append(mask.entries)
            batch.offsets.append(mask.offsets)
        else:
            batch.entries.append(layer._buffers["blocks"])
            batch.layers.append(layer)
            if direct:
                batch.weights.append(weight)

    def step(self, closure: Optional[Callable[[], Any]] = None) -> Any:
        """One update of everything that has a gradient.

        Args:
            closure: computes the loss anew, with gradients; or None.
        Returns:
            What closure returned, or None.
        """
        return _hooks.run(self, self._step, () if closure is None else (closure,))

    @torch.no_grad()
    def _step(self, closure: Optional[Callable[[], Any]] = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if type(self.state) is not States:  # somebody has put another one there
            self.state = States(self.state)
        work = []
        for at, group in enumerate(self.param_groups):
            work += [(group, batch, grads) for batch, grads in self._ready(at, group)]
        if not work:
            return loss
        multiplier, found_inf = self._scale([(batch, grads) for _, batch, grads in work])
        for group, batch, grads in work:
            self._update(group, batch, grads, multiplier, found_inf)
            self._tell(batch)
        return loss

    step.hooked = True  # torch leaves it as it is, then

    def _tell(self, batch: _plan.Batch) -> None:
        """Lets the layers know that their weights hold the new values."""
        batch.used = True
        if batch.steps is not None:
            batch.steps.count += 1
            if batch.told:
                return
            batch.told = True
        for layer in batch.layers:
            if batch.weights:
                layer.mark_synced(batch.steps)
            else:
                layer.sync()

    def _check_layouts(self, grads: list[torch.Tensor]) -> None:
        for layout in set(map(_layout, grads)):
            if layout != torch.strided:
                raise TypeError(f"{self._name}: gradients must be dense tensors, got {layout}")

    def _scale(self, work: list) -> tuple[Optional[torch.Tensor], Optional[torch.Tensor]]:
        """What every gradient is multiplied with, and whether the step is void."""
        # GradScaler puts these two on the optimiser for the time of a step.
        scale = getattr(self, "grad_scale", None)
        found_inf = getattr(self, "found_inf", None)
        multiplier = None if scale is None else scale.to(torch.float32).reciprocal()
        if self.max_norm is not None:
            self.last_norm = norm = self._norm(work, multiplier)
            clip = (self.max_norm / (norm + _TINY)).clamp(max=1.0)
            multiplier = clip if multiplier is None else multiplier * clip
        return multiplier, found_inf

    def _norm(self, work: list, multiplier: Optional[torch.Tensor]) -> torch.Tensor:
        """The L2 norm over every gradient that moves something."""
        moving: dict[torch.device, list] = {}
        for batch, grads in work:
            if batch.kind == "block":
                moving.setdefault(grads[0].device, []).extend(grads)
                continue
            for grad, entries in zip(grads, batch.entries):
                if batch.kind == "flat" and grad.shape != entries.shape:
                    grad = grad.reshape(-1)[entries]
                elif batch.kind == "bool" and entries.numel():
                    grad = grad.masked_select(entries)
                moving.setdefault(grad.device, []).append(grad)
        norms = [
            ops.grad_norm(grads, multiplier=None if multiplier is None else multiplier.to(device))
            for device, grads in moving.items()
        ]
        if len(norms) == 1:
            return norms[0].view(())
        return torch.linalg.vector_norm(torch.stack([n.view(()).to(norms[0]) for n in norms]))
