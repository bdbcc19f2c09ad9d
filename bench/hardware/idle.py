"""A kernel that does nothing: what its launch takes is the cost of launching."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from scx_kernels.kernels.launch import launch


@triton.jit
def _idle_kernel(x_ptr, BLOCK: tl.constexpr):
    tl.arange(0, BLOCK)


def idle(x: Tensor, programs: int = 1) -> None:
    """Programs of one warp, on x's device, that read and write nothing."""
    launch(_idle_kernel, (programs,), x, device=torch.device(x.device), BLOCK=16, num_warps=1)
