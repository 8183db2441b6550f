"""Loads the operator library into torch, and says plainly why when that cannot be done.

The build (setup.py) puts three libraries and `build_info.json` beside this file. `load()` registers
`torch.ops.nibblock.*`; nothing is written, nothing is compiled and no device is touched.
"""

from __future__ import annotations

import functools
import json
import platform
from pathlib import Path

import torch

from nibblock._errors import BackendUnavailable

__all__ = ["build_info", "load"]

_FOLDER = Path(__file__).resolve().parent
_OPERATORS = _FOLDER / "libnibblock_cpu.so"
_REBUILD = "rebuild in the checkout: pip install --no-build-isolation --no-deps ."


@functools.cache
def build_info() -> dict:
    """What the build wrote down: torch, compiler, flags, files of each instruction set, git id.

    Returns:
        The content of build_info.json; an empty dict if the package was not built by setup.py.
    """
    path = _FOLDER / "build_info.json"
    return json.loads(path.read_text()) if path.exists() else {}


def _versions() -> str:
    built = build_info()
    return (
        f"built against torch {built.get('torch_built_against', 'unknown')}, "
        f"Python {built.get('python_built_against', 'unknown')}; "
        f"running torch {torch.__version__}, Python {platform.python_version()}"
    )


@functools.cache
def load() -> None:
    """Registers the operators with torch; does nothing when they are registered already.

    Raises:
        ImportError: a library is missing or does not fit this torch or Python; the text compares
            the versions built against with those running.
        BackendUnavailable: NIBBLOCK_ISA names an unknown level or one above this CPU's.
    """
    try:
        from nibblock import _native
    except ImportError as error:
        raise ImportError(
            f"nibblock: _native cannot be loaded ({error}); {_versions()}; {_REBUILD}"
        ) from error
    refused = _native.cpu_isa_error()
    if refused:
        raise BackendUnavailable(refused)
    if not _OPERATORS.exists():
        raise ImportError(f"nibblock: {_OPERATORS.name} is missing; {_versions()}; {_REBUILD}")
    try:
        torch.ops.load_library(str(_OPERATORS))
    except OSError as error:
        raise ImportError(
            f"nibblock: {_OPERATORS.name} cannot be loaded ({error}); {_versions()}; {_REBUILD}"
        ) from error
