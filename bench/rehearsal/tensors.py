"""Tensors that say they lie on "cuda:0", what computes in their place, and where in the package execution is."""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from types import FrameType
from typing import Any

import torch
from torch import Tensor

CUDA = torch.device("cuda", 0)
CPU = torch.device("cpu")
in_use: list[Any] = []
"""The stand-in device that is entered, if one is."""


class StandIn(torch.Tensor):
    """A tensor on the stand-in device. `backing` holds its values, or on the "meta" device only its shape."""

    backing: Tensor

    @staticmethod
    def __new__(cls, backing: Tensor) -> "StandIn":
        wrapper: StandIn = torch.Tensor._make_wrapper_subclass(
            cls,
            backing.size(),
            strides=backing.stride(),
            storage_offset=backing.storage_offset(),
            dtype=backing.dtype,
            device=CUDA,
            requires_grad=backing.requires_grad,
        )
        wrapper.backing = backing.detach()
        return wrapper

    def __init__(self, backing: Tensor) -> None: ...

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _device().dispatch(func, args, kwargs or {})

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return f"StandIn(shape={tuple(self.shape)}, dtype={self.dtype})"


def mapped(function: Callable[[Any], Any], x: Any) -> Any:
    """x with its tensors and other leaves replaced; lists and tuples of them are what operators take and give."""
    if isinstance(x, tuple):
        return tuple(mapped(function, y) for y in x)
    if isinstance(x, list):
        return [mapped(function, y) for y in x]
    return function(x)


def backing_of(x: Any) -> Any:
    """What computes in a stand-in tensor's place; anything else as it is."""
    return x.backing if isinstance(x, StandIn) else x


def _device() -> Any:
    if not in_use:
        raise RuntimeError("a stand-in tensor was used outside of its device")
    return in_use[-1]


@dataclass(frozen=True)
class Wait:
    """The host waits for the device. `frames` are the package's functions that asked for it, outermost first, as
    (file, line, name); `is_ours` says whether they did, or transformers called by them."""

    operation: str
    frames: tuple[tuple[str, int, str], ...]
    is_ours: bool


def package_frames() -> tuple[tuple[str, int, str], ...]:
    """Where in the package execution is, outermost first: (file from the root, line, qualified name)."""
    frames: list[tuple[str, int, str]] = []
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        path = frame.f_code.co_filename.replace("\\", "/")
        for root in ("/scx/", "/scx_kernels/"):
            if root in path and "/bench/" not in path:
                name = root[1:] + path.rsplit(root, 1)[1]
                frames.append((name, frame.f_lineno, frame.f_code.co_qualname))
                break
        frame = frame.f_back
    return tuple(reversed(frames))


def _is_ours() -> bool:
    """Whether the innermost frame that is neither PyTorch's nor the stand-in's is this package's."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        path = frame.f_code.co_filename.replace("\\", "/")
        if "/torch/" not in path and "/bench/rehearsal/" not in path and "/contextlib.py" not in path:
            return "/transformers/" not in path
        frame = frame.f_back
    return False


def wait_here(operation: str) -> Wait:
    """The host waits where the caller is."""
    return Wait(operation, package_frames(), _is_ours())
