"""Benchmarks of nibblock, installed as `nibblock.bench`."""
