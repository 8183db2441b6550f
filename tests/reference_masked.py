"""Oracles of the masked updates, in NumPy alone.

The kernels promise more than closeness: every level does the same float32 operations in the same
order. So one twin is float32 and compared bit by bit; the other follows the formulas in float64.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from harness import load, store

F = np.float32


@dataclass
class AdamW:
    lr: float = 1e-2
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0
    states = 2

    def step32(self, p, g, states, t):
        m, v = states
        near = 1.0 - self.beta1 < 0.5
        blend = F(1.0 - self.beta1 if near else -self.beta1)
        if not near:
            blend = F((1.0 - self.beta1) - 1.0)
        m = (m if near else g) + blend * (g - m)
        v = v * F(self.beta2) + g * g * F(1.0 - self.beta2)
        root = F(1.0 / np.sqrt(1.0 - self.beta2**t))
        step = F(self.lr / (1.0 - self.beta1**t))
        p = p * F(1.0 - self.lr * self.weight_decay) - m * step / (np.sqrt(v) * root + F(self.eps))
        return p, (m, v)

    def step64(self, p, g, states, t):
        """The formula as it is documented, and a bound on what float32 may make of it."""
        p, g, m, v = (np.asarray(a, np.float64) for a in (p, g, *states))
        m = self.beta1 * m + (1 - self.beta1) * g
        v = self.beta2 * v + (1 - self.beta2) * g * g
        update = self.lr / (1 - self.beta1**t) * m
        update /= np.sqrt(v) / np.sqrt(1 - self.beta2**t) + self.eps
        new = p * (1 - self.lr * self.weight_decay) - update
        # m is a difference: its error is relative to what it is made of.
        size = self.lr / (1 - self.beta1**t) * (np.abs(states[0]) + np.abs(g))
        size /= np.sqrt(v) / np.sqrt(1 - self.beta2**t) + self.eps
        return new, 2.0**-24 * (4 * np.abs(p) + 16 * size + 64 * np.abs(update))


@dataclass
class Sgd:
    lr: float = 1e-2
    momentum: float = 0.0
    dampening: float = 0.0
    weight_decay: float = 0.0
    nesterov: bool = False

    @property
    def states(self):
        return int(self.momentum != 0)

    def step32(self, p, g, states, t):
        if self.weight_decay:
            g = g + p * F(self.weight_decay)
        d = g
        if self.momentum:
            m = g if t == 1 else states[0] * F(self.momentum) + g * F(1 - self.dampening)
            states, d = (m,), g + m * F(self.momentum) if self.nesterov else m
        return p - d * F(self.lr), states

    def step64(self, p, g, states, t):
        p, g = np.asarray(p, np.float64), np.asarray(g, np.float64)
        size = np.abs(g) + self.weight_decay * np.abs(p)
        g = g + self.weight_decay * p
        d = g
        if self.momentum:
            old = np.asarray(states[0], np.float64)
            m = g if t == 1 else self.momentum * old + (1 - self.dampening) * g
            d = g + self.momentum * m if self.nesterov else m
            size = size + np.abs(old)
        return p - self.lr * d, 2.0**-24 * (4 * np.abs(p) + 16 * self.lr * size)


RULES = (
    AdamW(),
    AdamW(weight_decay=0.1, lr=3e-3),
    AdamW(beta1=0.0, beta2=0.5, eps=1e-3),
    AdamW(beta1=0.3, weight_decay=0.01),
    Sgd(),
    Sgd(weight_decay=0.1),
    Sgd(momentum=0.9),
    Sgd(momentum=0.8, dampening=0.3, weight_decay=0.01),
    Sgd(momentum=0.9, nesterov=True),
)


@dataclass
class Tensor:
    """One parameter in flat form, with packed states; `active` are the positions that move."""

    param: np.ndarray  # float32 values that dtype can hold
    dtype: str
    active: np.ndarray  # int64 positions
    states: tuple
    ages: np.ndarray  # updates so far, of each active entry

    @staticmethod
    def random(rng, numel, active, dtype, states, fresh=True):
        param = load(store(rng.normal(0, 1, numel).astype(F), dtype), dtype)
        made = [np.zeros(len(active), F) for _ in range(states)]
        ages = np.zeros(len(active), np.int64)
        if not fresh:
            made = [rng.normal(0, 1, len(active)).astype(F) for _ in range(states)]
            made[1:] = [np.abs(v) for v in made[1:]]
            ages += 7
        return Tensor(param, dtype, np.asarray(active, np.int64), tuple(made), ages)

    def step(self, rule, grad, multiplier=1.0, check=True) -> None:
        """One update with packed gradients, float32 bit by bit; also held against float64."""
        g = grad * F(multiplier)
        old = self.param[self.active]
        new = np.empty_like(old)
        states = [np.empty_like(s) for s in self.states]
        for t in np.unique(self.ages):
            at = self.ages == t
            part = tuple(s[at] for s in self.states)
            p, made = rule.step32(old[at], g[at], part, int(t) + 1)
            if check:
                exact, bound = rule.step64(old[at], g[at], part, int(t) + 1)
                assert (np.abs(p - exact) <= bound).all(), (rule, np.abs(p - exact).max())
            new[at] = p
            for s, value in zip(states, made):
                s[at] = value
        self.param[self.active] = load(store(new, self.dtype), self.dtype)
        self.states, self.ages = tuple(states), self.ages + 1
