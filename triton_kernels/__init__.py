"""Triton kernels of nibblock, installed as `nibblock.triton_kernels` and imported on demand.

This package imports nothing; its modules import Triton. `nibblock.ops._triton` brings them in when
an operator first meets a CUDA tensor.
"""
