"""The version, from the installed metadata: one place to change it, pyproject.toml."""

from __future__ import annotations

from importlib.metadata import version

__version__ = version("nibblock")
