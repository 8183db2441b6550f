"""The one exception class of this package; everything else is Python's TypeError and ValueError."""

from __future__ import annotations

__all__ = ["BackendUnavailable"]


class BackendUnavailable(RuntimeError):
    """A backend, kernel or instruction level that was asked for cannot run here; the text says why.

    Raised instead of running anything else: nibblock never falls back silently from a choice that
    the caller made.
    """
