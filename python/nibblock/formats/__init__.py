"""Checkpoint formats, converted once into the canonical int4 layout."""
