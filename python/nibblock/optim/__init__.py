"""Optimisers that move only what a mask selects, and write it where the model reads it."""

from nibblock.optim.adamw import MaskedAdamW
from nibblock.optim.muon import MaskedMuon
from nibblock.optim.sgd import MaskedSGD

__all__ = ["MaskedAdamW", "MaskedMuon", "MaskedSGD"]
