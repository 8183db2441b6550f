"""Shorter forwards for modules whose forward is known to the letter.

A parent of fused siblings is bound to one of these only if its forward compiles to exactly the code that the
shorter one was written for; every other forward is left alone.
"""

from __future__ import annotations


def lean_forward(cls: type):
    return None
