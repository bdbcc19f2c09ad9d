"""Triton kernels with their launchers, one file per operation, under the names of `scx_kernels.reference`."""
