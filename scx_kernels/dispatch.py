"""Who computes a call: plain PyTorch or Triton, and whether somebody traces it.

CPU tensors take the reference, CUDA and ROCm tensors Triton. Where gradients are wanted the reference serves every
device: the kernels have no backward.

`SCX_KERNELS` in the environment, or `backend(...)` in code, says otherwise for debugging: "reference" keeps to plain
PyTorch; "triton" takes the kernels for everything, also for CPU tensors, on which they run in Triton's interpreter
(`TRITON_INTERPRET=1` before triton is imported).
"""

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

__all__ = [
    "accelerator",
    "backend",
    "chosen_backend",
    "is_accelerator",
    "is_served_at_once",
    "is_traced",
    "takes_triton",
]

BACKENDS = ("auto", "reference", "triton")
_KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def _checked(name: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"backend: expected one of {BACKENDS}, got {name!r}")
    return name


# A plain global, which torch.compile guards on; the switch is for debugging, and for the whole process.
_backend = _checked(os.environ.get("SCX_KERNELS", "auto"))


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Choose, within a `with` block and for the whole process, who computes: "auto", "reference" or "triton".

    Raises: ValueError for another name.
    """
    global _backend
    before, _backend = _backend, _checked(name)
    try:
        yield
    finally:
        _backend = before


def chosen_backend() -> str:
    """What `backend` or the environment says."""
    return _backend


# A plain global, as the backend is.
_accelerators: tuple[str, ...] = ("cuda",)


def is_accelerator(device: torch.device) -> bool:
    """Whether tensors on this device take the kernels, unless `backend` says otherwise: CUDA's and ROCm's, which
    PyTorch calls "cuda" as well."""
    return device.type in _accelerators


@contextmanager
def accelerator(kind: str) -> Iterator[None]:
    """Take, within a `with` block and for the whole process, devices of this type for accelerators, such as "cpu": to
    measure what launching costs the host where no GPU is. Triton needs a driver that does not launch, then."""
    global _accelerators
    before, _accelerators = _accelerators, (*_accelerators, kind)
    try:
        yield
    finally:
        _accelerators = before


def takes_triton(args: Sequence[Any], options: dict[str, Any]) -> bool:
    """Whether these arguments are for the kernels; the first tensor says on which device and in which dtype."""
    first = args[0] if args and isinstance(args[0], Tensor) else next(_tensors((*args, *options.values())))
    if first.dtype not in _KERNEL_DTYPES or _backend == "reference":
        return False
    if _backend == "auto" and not is_accelerator(first.device):
        return False
    return not (torch.is_grad_enabled() and any(x.requires_grad for x in _tensors((*args, *options.values()))))


def _tensors(given: Iterable[Any]) -> Iterator[Tensor]:
    for x in given:
        yield from (y for y in (x if isinstance(x, (list, tuple)) else (x,)) if isinstance(y, Tensor))


def is_traced(first: Any) -> bool:
    """Whether somebody follows the operators that are called: a compiler, a tracer, a mode or a kind of tensor; or
    there are only shapes to compute with."""
    if torch.compiler.is_compiling() or (type(first) is not Tensor and type(first) is not Parameter):
        return True
    return first.is_meta or bool(torch._C._len_torch_dispatch_stack()) or torch._C._get_tracing_state() is not None


def is_served_at_once(x: Any) -> bool:
    """Whether the kernels take a call with this first argument: all that the two functions above ask, in the usual case
    that no gradients are recorded, and in little of the host's time."""
    kind = type(x)
    return (
        not torch.compiler.is_compiling()
        and (kind is Tensor or kind is Parameter)
        # As `is_accelerator`, without making a device: a GPU's, or the CPU's where it stands in for one.
        and (x.is_cuda or (x.is_cpu and "cpu" in _accelerators))
        and _backend == "auto"
        and x.dtype in _KERNEL_DTYPES
        and not torch.is_grad_enabled()
        and not torch._C._len_torch_dispatch_stack()
        and torch._C._get_tracing_state() is None
    )
