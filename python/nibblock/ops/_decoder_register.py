"""Fakes of the private ops in csrc/decoder_ops, which nn/_lean.py calls in decode steps."""

from __future__ import annotations

import torch


@torch.library.register_fake("nibblock::_rms_norm")
def _(x, weight, eps):
    return torch.empty_like(x)


@torch.library.register_fake("nibblock::_add_rms_norm")
def _(x, delta, weight, eps):
    return torch.empty_like(x), torch.empty_like(x)


@torch.library.register_fake("nibblock::_rotate_")
def _(y, cos, sin, heads):
    return None


@torch.library.register_fake("nibblock::_silu_mul")
def _(y, width, start):
    return y.new_empty((*y.shape[:-1], width))


@torch.library.register_fake("nibblock::_attend")
def _(query, key, value, scale):
    return query.new_empty(query.shape)
