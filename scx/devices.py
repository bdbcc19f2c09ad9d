"""Where tensors lie, how they get there without anybody waiting, and how they are made to last."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from scx_kernels.operations import is_accelerator

__all__ = ["CPU", "outside_inference_mode", "upload"]

CPU = torch.device("cpu")


def upload(x: Tensor, device: torch.device) -> Tensor:
    """x on `device`. From the host to a GPU it goes out of pinned memory, so that neither side waits for the other."""
    leaves_host = x.device.type == "cpu" != device.type and is_accelerator(device)
    return x.pin_memory().to(device, non_blocking=True) if leaves_host else x.to(device)


@contextmanager
def outside_inference_mode() -> Iterator[None]:
    """Tensors that are made here may be written, and saved for gradients, after an inference mode that is on has ended.
    No gradients are recorded in its place."""
    if not torch.is_inference_mode_enabled():
        yield
        return
    with torch.inference_mode(False), torch.no_grad():
        yield
