"""Where tensors lie, how they get there without anybody waiting, and how they are made to last."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from scx_kernels.operations import is_accelerator

__all__ = ["CPU", "is_autocast", "outside_inference_mode", "upload"]

CPU = torch.device("cpu")


def upload(x: Tensor, device: torch.device) -> Tensor:
    """x on `device`. From the host to a GPU it goes out of pinned memory, so that neither side waits for the other."""
    leaves_host = x.device.type == "cpu" != device.type and is_accelerator(device)
    return x.pin_memory().to(device, non_blocking=True) if leaves_host else x.to(device)


def is_autocast(x: Tensor) -> bool:
    """Whether layers that are called with x may compute in a dtype of autocast's choice."""
    return torch.is_autocast_enabled(x.device.type)


@contextmanager
def outside_inference_mode() -> Iterator[None]:
    """Tensors that are made here may be written, and saved for gradients, after an inference mode that is on has ended.
    No gradients are recorded in its place."""
    if torch.compiler.is_compiling() or not torch.is_inference_mode_enabled():  # a compiler asks for no_grad itself
        yield
        return
    with torch.inference_mode(False), torch.no_grad():
        yield
