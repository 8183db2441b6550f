"""Triton kernels of nibblock, installed as `nibblock.triton_kernels` and imported on demand."""
