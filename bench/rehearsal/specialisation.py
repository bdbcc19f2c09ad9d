"""What Triton's JIT would compile for a launch, asked of Triton's own binder: no driver, no GPU.

Two launches share a compiled kernel if their variants are equal: types, integers that are 1 or multiples of 16,
addresses that are multiples of 16 bytes, constants, options.
"""

import importlib
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.compiler.compiler import make_backend
from triton.runtime.jit import create_function_from_signature

from scx_kernels.kernels.launch import Target


@dataclass(frozen=True)
class Variant:
    """A kernel as it is compiled once. `key` tells variants apart as the JIT does, for one target.

    The rest is what a compilation needs, in another process too: it is found anew by `module` and `kernel`.
    """

    target: Target
    module: str
    kernel: str
    key: str
    signature: tuple[tuple[str, str], ...] = field(compare=False)
    constants: tuple[tuple[tuple[int, ...], Any], ...] = field(compare=False)
    attributes: tuple[tuple[tuple[int, ...], Any], ...] = field(compare=False)
    options: tuple[tuple[str, Any], ...] = field(compare=False)

    def function(self) -> Any:
        """The kernel itself."""
        return getattr(importlib.import_module(self.module), self.kernel)

    def source(self) -> ASTSource:
        """What `triton.compile` takes."""
        return ASTSource(
            fn=self.function(),
            signature=dict(self.signature),
            constexprs=dict(self.constants),
            attrs={path: [list(mark) for mark in marks] for path, marks in self.attributes},
        )

    @property
    def meta(self) -> dict[str, Any]:
        """Constants by name: meta-parameters, and what is absent or 1."""
        names = [name for name, _ in self.signature]
        return {names[path[0]]: value for path, value in self.constants}

    def describe(self) -> str:
        """Types and meta-parameters in one line."""
        constants = " ".join(f"{name}={value}" for name, value in self.meta.items() if name.isupper())
        types = sorted({kind for _, kind in self.signature if kind.startswith("*")})
        options = " ".join(f"{name}={value}" for name, value in self.options)
        return f"{self.kernel} {' '.join(types)} {constants} {options}"


class _Pointer:
    """A tensor as the binder sees it: where it begins, counted from the start of its memory. Allocators begin that at
    multiples of 256 bytes or more."""

    __slots__ = ("_address", "dtype")

    def __init__(self, x: Tensor) -> None:
        self.dtype = x.dtype
        self._address = x.storage_offset() * x.element_size()

    def data_ptr(self) -> int:
        return self._address


def gpu_target(target: Target) -> GPUTarget:
    """The same in Triton's words."""
    arch = target.arch if target.backend == "cuda" else f"gfx{target.arch}"
    return GPUTarget(target.backend, arch, target.warp_size)


@lru_cache
def _binder(kernel: Any, target: Target) -> tuple[Any, Any]:
    backend = make_backend(gpu_target(target))
    return backend, create_function_from_signature(kernel.signature, kernel.params, backend)


_known: dict[tuple[Any, Target, str], Variant] = {}


def variant_of(kernel: Any, args: tuple[Any, ...], meta: dict[str, Any], target: Target) -> Variant:
    """What the JIT would compile for these arguments of a launch, as `launch.recording` gives them.

    Raises: TypeError for arguments that the kernel does not take, as a launch would.
    """
    backend, binder = _binder(kernel, target)
    values = [_Pointer(x) if isinstance(x, torch.Tensor) else x for x in args]
    bound, specialisation, options = binder(*values, **meta)
    key = f"{specialisation} {options}"
    found = _known.get((kernel, target, key))
    if found is None:
        _, signature, constants, attributes = kernel._pack_args(backend, dict(meta), bound, specialisation, options)
        found = _known[kernel, target, key] = Variant(
            target,
            kernel.fn.__module__,
            kernel.fn.__name__,
            key,
            tuple(signature.items()),
            tuple(constants.items()),
            tuple((path, tuple(map(tuple, marks))) for path, marks in attributes.items() if marks),
            tuple(options.items()),
        )
    return found
