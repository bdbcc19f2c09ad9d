"""Key material in Python's objects: what holds it shows, copies and pickles nothing of it, and can be wiped.

An object's own frames are the other place where Python shows values: a traceback with local variables, as debuggers,
loggers and test runners print it, has the tensors and bytes that a key is made of. `guarded` functions leave none.
"""

import traceback
from collections.abc import Callable, Iterable
from functools import wraps
from types import FrameType, TracebackType
from typing import Any, TypeVar, cast

from torch import Tensor

__all__ = ["Hidden", "HiddenTensor", "WipedBytes", "clear_locals", "guarded"]

_Function = TypeVar("_Function", bound=Callable)


class Hidden:
    """What holds key material, in slots. Whoever has the object reads them by name; nothing lists, prints, copies or
    pickles them, and no dictionary has them."""

    __slots__ = ("__weakref__",)

    def __repr__(self) -> str:
        return f"{type(self).__name__}(...)"

    def __dir__(self) -> Iterable[str]:
        """Without the slots: what inspects an object prints the value behind every name."""
        slots = set(_slots(type(self)))
        return [name for name in super().__dir__() if name not in slots]

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise TypeError(f"{type(self).__name__} holds key material and is never pickled or copied")

    def __getstate__(self) -> Any:
        return self.__reduce_ex__(None)

    def wipe(self) -> None:
        """Overwrite what is held, tensors with zeros: for whoever knows that nobody computes with it any more."""
        for name in _slots(type(self)):
            held = getattr(self, name, None)
            if isinstance(held, Tensor):
                held.zero_()
            elif isinstance(held, Hidden):
                held.wipe()


def _slots(kind: type) -> list[str]:
    return [name for base in kind.__mro__ for name in vars(base).get("__slots__", ())]


class HiddenTensor(Hidden):
    """A tensor of key material, `value`."""

    __slots__ = ("value",)

    def __init__(self, value: Tensor) -> None:
        self.value = value


class WipedBytes(bytearray):
    """Bytes that are overwritten when nothing refers to them any more: no view, and no tensor made of them."""

    __slots__ = ()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({len(self)})"

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise TypeError(f"{type(self).__name__} is never pickled or copied")

    def __del__(self) -> None:
        self[:] = bytes(len(self))


def guarded(function: _Function) -> _Function:
    """Let errors leave `function` without the local variables of its frames and of those it called.

    Message, type and the lines that were passed stay. Arguments are local variables, too; those of the caller's own
    frame are the caller's.
    """

    @wraps(function)
    def call(*args: Any, **options: Any) -> Any:
        try:
            return function(*args, **options)
        except BaseException as error:
            del args, options
            clear_locals(error)
            raise

    return cast(_Function, call)


def clear_locals(error: BaseException) -> None:
    """Empty the frames that an error has left on its way to the one that catches it here, and those of the errors that
    it came from."""
    here = cast(TracebackType, error.__traceback__).tb_frame
    above, frame = set[FrameType](), here.f_back
    while frame is not None:
        above.add(frame)
        frame = frame.f_back
    pending, seen = [error], set[int]()
    while pending:
        each = pending.pop()
        # What a caller was handling before is the caller's own.
        if id(each) in seen or each.__traceback__ is None or each.__traceback__.tb_frame in above:
            continue
        seen.add(id(each))
        traceback.clear_frames(each.__traceback__)
        pending += [x for x in (each.__cause__, each.__context__) if x is not None]
        if isinstance(each, BaseExceptionGroup):
            pending += each.exceptions
