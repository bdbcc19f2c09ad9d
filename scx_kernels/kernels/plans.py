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
from functools import wraps
from typing import Any, NamedTuple, TypeVar, cast

import torch
import triton
from torch import Tensor
from torch.nn import Parameter

from scx_kernels.sealing import Sealing

__all__ = ["LATE", "allow_offsets", "clear", "derive", "empty", "note", "planned", "plans_off"]

LATE = ("layer", "first_head", "offset")
"""Kernel parameters whose values are no part of a layout: the layers of a sealed cache share their plans, and so do
tokens that are written into its slots one after the other."""
_MOST = 2**15  # layers and heads that any tensor may have; the launcher's checks decide of those beyond
_ALIGNMENT = 16
# Most plans are of one length of a cache, and of no more use when it has grown.
_MOST_PLANS = 2048

_VALUES = frozenset({int, float, bool, str, torch.dtype})
_Launcher = TypeVar("_Launcher", bound=Callable)
_Maker = Callable[[list[Tensor]], Tensor]


class _Launch(NamedTuple):
    """One launch of a plan."""

    compiled: Any
    grid: tuple[int, int, int]
    arguments: list[Any]  # all that the kernel takes
    pointers: list[tuple[int, int, int]]  # (place among them, number of the tensor, bytes into it)
    late: list[tuple[int, int]]  # (place among them, number in LATE)


class _Plan:
    """What a launcher did: tensors it made, kernels it launched, and what it returned (numbers of tensors)."""

    __slots__ = ("last_offset", "launches", "makers", "result")

    def __init__(self) -> None:
        self.last_offset = 0
        self.makers: list[_Maker] = []
        self.launches: list[_Launch] = []
        self.result: int | tuple[int, ...]

    def run(self, tensors: list[Tensor], addresses: list[int], late: Sequence[int]) -> Any:
        """Do it again for tensors at these addresses, to which it adds those that it makes."""
        for make in self.makers:
            made = make(tensors)
            tensors.append(made)
            addresses.append(made.data_ptr())
        active = triton.runtime.driver.active
        stream = active.get_current_stream(active.get_current_device())
        for compiled, grid, template, pointers, numbers in self.launches:
            arguments = template.copy()
            for place, tensor, offset in pointers:
                arguments[place] = addresses[tensor] + offset
            for place, number in numbers:
                arguments[place] = late[number]
            if _is_watched():
                compiled[grid](*arguments, stream=stream)
            else:
                compiled.run(*grid, stream, compiled.function, compiled.packed_metadata, None, None, None, *arguments)
        result = self.result
        return tensors[result] if type(result) is int else tuple([tensors[place] for place in result])


def _is_watched() -> bool:
    """Whether a profiler waits for launches: Triton then prepares what it is told of them."""
    runtime = triton.knobs.runtime
    return bool(runtime.launch_enter_hook.calls or runtime.launch_exit_hook.calls)


class _Recording(threading.local):
    """The plan that is being made in this thread, if one is; `tensors` and `addresses` as in `_Plan.run`."""

    plan: _Plan | None = None
    given = 0  # how many of the tensors are arguments
    tensors: list[Tensor]
    addresses: list[int]

    def source(self, x: Tensor, name: str) -> tuple[int, int]:
        """The number of the tensor that lies at x's address, and how many bytes before it: 0 for an argument, more
        within what was made, whose memory is nobody else's."""
        address, storage = x.data_ptr(), x.untyped_storage().data_ptr()
        if address in self.addresses:
            return self.addresses.index(address), 0
        for number in range(self.given, len(self.tensors)):
            if self.tensors[number].untyped_storage().data_ptr() == storage:
                return number, address - self.addresses[number]
        raise RuntimeError(f"{name}: a plan knows no such tensor; make it with `empty` or `derive`, of arguments")

    def number(self, x: Tensor) -> int:
        """The number of a tensor that is an argument or was made."""
        for number, known in enumerate(self.tensors):
            if known is x:
                return number
        raise RuntimeError("a plan knows no such tensor: make it with `empty` or `derive`, of arguments")

    def made(self, x: Tensor, make: _Maker) -> None:
        if self.plan is not None:
            self.plan.makers.append(make)
            self.tensors.append(x)
            self.addresses.append(x.data_ptr())


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
    """An uninitialised tensor on the device of `like`, an argument, and in its dtype unless one is given; contiguous
    unless strides are."""
    shape = tuple(shape)
    if strides is None:
        strides, step = [], 1
        for size in reversed(shape):
            strides.insert(0, step)
            step *= max(1, size)
    strides, dtype = tuple(strides), dtype or like.dtype
    made = like.new_empty_strided(shape, strides, dtype=dtype)
    if _recording.plan is not None:
        number = _recording.number(like)
        _recording.made(made, lambda known: known[number].new_empty_strided(shape, strides, dtype=dtype))
    return made


def derive(function: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    """`function(*tensors)`: a tensor computed from arguments, in memory of its own; a plan computes it again."""
    made = function(*tensors)
    if _recording.plan is not None:
        numbers = [_recording.number(x) for x in tensors]
        _recording.made(made, lambda known: function(*[known[number] for number in numbers]))
    return made


def allow_offsets(last: int) -> None:
    """Say in a launcher with an argument `offset` that 0 to `last` would pass its checks as well."""
    if _recording.plan is not None:
        _recording.plan.last_offset = last


def note(kernel: Any, compiled: Any, grid: tuple[int, ...], args: tuple[Any, ...], meta: dict[str, Any]) -> None:
    """Add a launch to the plan that is being made, if one is."""
    if _recording.plan is None:
        return
    values = dict(zip(kernel.arg_names, args, strict=False)) | meta
    arguments = [values[name] for name in kernel.arg_names]
    pointers, late = [], []
    for place, (name, value) in enumerate(zip(kernel.arg_names, arguments, strict=True)):
        if isinstance(value, Tensor):
            pointers.append((place, *_recording.source(value, name)))
            arguments[place] = None
        elif name in LATE:
            late.append((place, LATE.index(name)))
    _recording.plan.launches.append(_Launch(compiled, (*grid, 1, 1)[:3], arguments, pointers, late))


def _record(
    launcher: Callable, args: tuple[Any, ...], options: dict[str, Any], tensors: list[Tensor], addresses: list[int]
) -> tuple[Any, _Plan]:
    """The launcher's result, and a plan of what it did."""
    plan = _Plan()
    _recording.plan, _recording.given = plan, len(tensors)
    _recording.tensors, _recording.addresses = tensors, addresses
    try:
        result = launcher(*args, **options)
        if isinstance(result, Tensor):
            plan.result = _recording.number(result)
        else:
            plan.result = tuple(_recording.number(part) for part in result)
    finally:
        _recording.plan, _recording.tensors, _recording.addresses = None, [], []
    return result, plan


def planned(launcher: _Launcher) -> _Launcher:
    """Keep a launcher's plans. None is made of tensors that share an address, by which it would tell them apart, nor of
    subclasses of tensors, which may have none."""

    @wraps(launcher)
    def call(*args: Any, **options: Any) -> Any:
        if _is_off or _recording.plan is not None:
            return launcher(*args, **options)
        tensors: list[Tensor] = []
        addresses: list[int] = []
        key: list[Any] = [launcher]
        layer = first_head = offset = 0
        pending = [*args]
        for name, value in options.items():
            key.append(name)
            if name == "offset":
                offset = value
            else:
                pending.append(value)
        for value in pending:
            kind = type(value)
            if value is None or kind in _VALUES:
                key.append(value)
            elif kind is Tensor or kind is Parameter:
                address = value.data_ptr()
                tensors.append(value)
                addresses.append(address)
                key += (value.shape, value.stride(), value.dtype, value.get_device(), address % _ALIGNMENT)
            elif kind is list or kind is tuple:
                key.append(len(value))
                pending += value
            elif kind is Sealing:
                key.append(kind)
                pending += (value.key, value.writes, value.rounds)
                layer, first_head = value.layer, value.first_head
            else:  # a subclass of tensors; or a tile, by who tries it and does not serve with it
                return launcher(*args, **options)
        layout = tuple(key)
        plan = _plans.get(layout)
        if not (0 <= layer < _MOST and 0 <= first_head < _MOST):
            return launcher(*args, **options)
        if plan is not None and type(offset) is int and 0 <= offset <= plan.last_offset:
            device = tensors[0].get_device()
            # Kernels are launched on the current device, which need not be the tensors'; negative: they are on no GPU.
            if device < 0 or device == torch.cuda.current_device():
                return plan.run(tensors, addresses, (layer, first_head, offset))
            with torch.cuda.device(device):
                return plan.run(tensors, addresses, (layer, first_head, offset))
        if len(set(addresses)) < len(addresses):
            return launcher(*args, **options)
        result, plan = _record(launcher, args, options, tensors, addresses)
        if len(_plans) >= _MOST_PLANS:
            _plans.clear()
        _plans[layout] = plan
        return result

    return cast(_Launcher, call)
