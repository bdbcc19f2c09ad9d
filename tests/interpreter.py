"""Triton's interpreter, at two thirds of its time."""

from typing import Any

from triton.runtime.interpreter import InterpretedFunction


def patch_once() -> None:
    """Whenever a kernel calls a function, Triton's interpreter goes through all of `triton.language` to put its own
    functions in the place of the compiler's, a third of the time of these tests; and it leaves them there. So the first
    call of each function is enough: what a launch takes back at its end, the next launch puts there itself."""
    patch_and_call, patched = InterpretedFunction.__call__, set()

    def call(self: InterpretedFunction, *args: Any, **options: Any) -> Any:
        if self.fn in patched:
            return self.rewrite()(*args, **options)
        patched.add(self.fn)
        return patch_and_call(self, *args, **options)

    InterpretedFunction.__call__ = call
