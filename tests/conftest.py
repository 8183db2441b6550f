"""Settings every test shares."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, settings
from nibblock import _native

settings.register_profile(
    "nibblock",
    deadline=None,  # the first call of a kernel builds tables
    derandomize=True,  # a red test must stay red
    max_examples=60,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("nibblock")


@pytest.fixture(autouse=True)
def restored_state():
    """The CPU's level and the number of threads belong to the process: every test restores them."""
    level, threads = _native.cpu_isa(), torch.get_num_threads()
    yield
    _native.set_cpu_isa(level)
    if torch.get_num_threads() != threads:
        torch.set_num_threads(threads)
