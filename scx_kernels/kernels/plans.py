"""Launch plans: what a launcher decides for one layout of its arguments, it decides once.

A launcher checks its arguments, chooses tiles, makes tensors for its results and launches kernels. All of this but
addresses follows from the *layout* of the arguments: of tensors shape, strides, dtype, device and alignment, of
anything else the value. So `@planned` notes what a launcher does for a layout, and for the next arguments laid out
alike does it again at their addresses: no checks (that layout passed them), no choice of tiles, no binding by Triton's
JIT.

A planned launcher keeps to three rules. Tensors that it makes come from `empty`, those that it computes from `derive`.
It decides nothing by values in tensors, nor by what is not an argument. It passes arguments to kernels as they came, or
expanded; a pointer that a plan cannot account for raises.
"""

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial, wraps
from typing import Any, TypeVar, cast

import torch
import triton
from torch import Tensor
from torch.nn import Parameter

from scx_kernels.sealing import Sealing

__all__ = ["LATE", "clear", "derive", "empty", "note", "planned", "plans_off"]

LATE = ("layer", "first_head")
"""Kernel parameters whose values are no part of a layout: a sealed cache's layers share their plans."""
_LATE_LIMIT = 2**16  # what `check_sealing` allows; a value beyond it takes the way of the checks
_ALIGNMENT = 16
# Plans of an earlier length of a cache are of no more use.
_MOST_PLANS = 2048

_Launcher = TypeVar("_Launcher", bound=Callable)
_Maker = Callable[[Sequence[Tensor]], Tensor]


_Launch = tuple[Callable[..., None], list[Any], list[tuple[int, int, int]], list[tuple[int, int]]]
"""How to launch; all arguments; which of them are addresses of which tensor, how far into it; which are late."""


class _Plan:
    """What a launcher did: tensors it made, kernels it launched, and what it returned."""

    __slots__ = ("launches", "makers", "result")

    def __init__(self) -> None:
        self.makers: list[_Maker] = []
        self.launches: list[_Launch] = []
        self.result: int | tuple[int, ...]

    def run(self, tensors: list[Tensor], addresses: list[int], late: Sequence[int]) -> Any:
        """Do it again, for tensors at these addresses; both lists are the plan's to extend."""
        for make in self.makers:
            made = make(tensors)
            tensors.append(made)
            addresses.append(made.data_ptr())
        for launch, template, pointers, numbers in self.launches:
            arguments = template.copy()
            for place, tensor, offset in pointers:
                arguments[place] = addresses[tensor] + offset
            for place, number in numbers:
                arguments[place] = late[number]
            launch(*arguments)
        result = self.result
        return tensors[result] if isinstance(result, int) else tuple([tensors[place] for place in result])


class _Recording(threading.local):
    """The plan that is being made in this thread, if one is; `tensors` and `addresses` as in `_Plan.run`."""

    plan: _Plan | None = None
    given = 0  # how many of the tensors are arguments
    tensors: list[Tensor]
    addresses: list[int]

    def source(self, x: Tensor, name: str) -> tuple[int, int]:
        """Which tensor lies at x's address, and how many bytes before it: 0 for an argument, more within what was
        made, whose memory is nobody else's."""
        address, storage = x.data_ptr(), x.untyped_storage().data_ptr()
        if address in self.addresses:
            return self.addresses.index(address), 0
        for place in range(self.given, len(self.tensors)):
            if self.tensors[place].untyped_storage().data_ptr() == storage:
                return place, address - self.addresses[place]
        raise RuntimeError(f"{name}: a plan knows no tensor at its address; make it with `empty` or `derive`")

    def made(self, x: Tensor, make: _Maker) -> Tensor:
        if self.plan is not None:
            self.plan.makers.append(make)
            self.tensors.append(x)
            self.addresses.append(x.data_ptr())
        return x


_recording = _Recording()
_plans: dict[tuple[Any, ...], _Plan] = {}
# The interpreter runs a kernel's source and leaves nothing that could be launched again.
_is_off = bool(triton.knobs.runtime.interpret)


def clear() -> None:
    """Forget all plans."""
    _plans.clear()


@contextmanager
def plans_off() -> Iterator[None]:
    """Within it, in the whole process, launchers run as they are written: for recording and comparing launches."""
    global _is_off
    before, _is_off = _is_off, True
    try:
        yield
    finally:
        _is_off = before


def empty(
    like: Tensor, shape: Sequence[int], dtype: torch.dtype | None = None, strides: Sequence[int] | None = None
) -> Tensor:
    """An uninitialised tensor on `like`'s device, in its dtype if none is given, contiguous if no strides are."""
    options = {"dtype": dtype or like.dtype, "device": like.device}
    if strides is None:
        make = partial(torch.empty, tuple(shape), **options)
    else:
        make = partial(torch.empty_strided, tuple(shape), tuple(strides), **options)
    return _recording.made(make(), lambda known: make())


def derive(function: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    """`function(*tensors)`: a tensor computed from arguments, in memory of its own; a plan computes it again."""
    result = function(*tensors)
    if _recording.plan is None:
        return result
    places = [next(place for place, known in enumerate(_recording.tensors) if known is x) for x in tensors]
    return _recording.made(result, lambda known: function(*[known[place] for place in places]))


def note(kernel: Any, compiled: Any, grid: tuple[int, ...], args: tuple[Any, ...], meta: dict[str, Any]) -> None:
    """Add a launch to the plan that is being made."""
    plan = _recording.plan
    if plan is None:
        return
    names: list[str] = kernel.arg_names
    values = dict(zip(names, args, strict=False)) | meta
    template = [values[name] for name in names]
    pointers, numbers = [], []
    for place, (name, value) in enumerate(zip(names, template, strict=True)):
        if isinstance(value, Tensor):
            pointers.append((place, *_recording.source(value, name)))
        elif name in LATE:
            numbers.append((place, LATE.index(name)))
    plan.launches.append((compiled[(*grid, 1, 1)[:3]], template, pointers, numbers))


def _place(result: Any) -> int | tuple[int, ...]:
    if isinstance(result, Tensor):
        return next(place for place, x in enumerate(_recording.tensors) if x is result)
    return tuple(cast(int, _place(part)) for part in result)


def _record(
    launcher: Callable, args: tuple[Any, ...], options: dict[str, Any], tensors: list[Tensor], addresses: list[int]
) -> tuple[Any, _Plan]:
    """The launcher's result, and a plan of what it did."""
    plan = _Plan()
    _recording.plan, _recording.given = plan, len(tensors)
    _recording.tensors, _recording.addresses = tensors, addresses
    try:
        result = launcher(*args, **options)
        plan.result = _place(result)
    finally:
        _recording.plan, _recording.tensors, _recording.addresses = None, [], []
    return result, plan


def planned(launcher: _Launcher) -> _Launcher:
    """Keep a launcher's plans. For tensors that share an address, by which a plan would tell them apart, and for
    subclasses of tensors, which may have none, it runs as it is written."""

    @wraps(launcher)
    def call(*args: Any, **options: Any) -> Any:
        if _is_off or _recording.plan is not None:
            return launcher(*args, **options)
        tensors: list[Tensor] = []
        addresses: list[int] = []
        key: list[Any] = [launcher, *options]
        late: Sequence[int] = (0,) * len(LATE)
        pending = [*args, *options.values()]
        for value in pending:
            kind = type(value)
            if kind is Tensor or kind is Parameter:
                address = value.data_ptr()
                tensors.append(value)
                addresses.append(address)
                key += (value.shape, value.stride(), value.dtype, value.get_device(), address % _ALIGNMENT)
            elif isinstance(value, Tensor):
                return launcher(*args, **options)
            elif kind is Sealing:
                key.append(kind)
                pending += (value.key, value.writes, value.rounds)
                late = (value.layer, value.first_head)
                if not (0 <= value.layer < _LATE_LIMIT and 0 <= value.first_head < _LATE_LIMIT // 2):
                    key += late
            elif kind is list or kind is tuple:
                key.append(len(value))
                pending += value
            else:
                key.append(value)
        try:
            plan = _plans.get(layout := tuple(key))
        except TypeError:  # a tile is a dict: whoever names one tries it, and does not serve with it
            return launcher(*args, **options)
        if len(set(addresses)) < len(addresses):
            return launcher(*args, **options)
        if plan is not None:
            return _on_device(tensors[0], plan, tensors, addresses, late)
        result, plan = _record(launcher, args, options, tensors, addresses)
        if len(_plans) >= _MOST_PLANS:
            _plans.clear()
        _plans[layout] = plan
        return result

    return cast(_Launcher, call)


def _on_device(first: Tensor, plan: _Plan, tensors: list[Tensor], addresses: list[int], late: Sequence[int]) -> Any:
    """Kernels are launched on the current device, which need not be the tensors'."""
    device = first.get_device()
    if device < 0 or device == torch.cuda.current_device():
        return plan.run(tensors, addresses, late)
    with torch.cuda.device(device):
        return plan.run(tensors, addresses, late)
