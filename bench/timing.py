"""How times, memory and transfers are measured; the same calls on either kind of device."""

import gc
import itertools
import statistics
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from bench.trees import tree_leaves
from scx_kernels.timing import device_times, host_times

QUANTILES = (0.2, 0.5, 0.8)
OUT_OF_MEMORY = "out of memory"


def attempt(call: Callable[[], Any]) -> tuple[Any, str | None]:
    """(result, None), or (None, what happened). Whatever a contestant raises ends that contestant, not the run."""
    try:
        return call(), None
    except (torch.OutOfMemoryError, MemoryError):
        problem = OUT_OF_MEMORY
    except Exception as error:
        text = str(error).strip() or "no message"
        # The CPU's allocator has no exception of its own.
        is_memory = "can't allocate memory" in text or "not enough memory" in text
        problem = OUT_OF_MEMORY if is_memory else f"raised {type(error).__name__}: {text.splitlines()[0][:200]}"
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return None, problem


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median and the range from the 20 % to the 80 % quantile."""
    low, median, high = (
        torch.tensor(values, dtype=torch.float64).quantile(torch.tensor(QUANTILES, dtype=torch.float64)).tolist()
    )
    return {"median": median, "q20": low, "q80": high}


def spread_twice(first: Sequence[float], second: Sequence[float]) -> dict[str, float]:
    """The spread of one case measured twice, and `again`: the second series' median over the first's, minus 1."""
    again = statistics.median(second) / statistics.median(first) - 1 if first and second else 0.0
    return {**spread([*first, *second]), "again": again}


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def rotating(function: Callable[[Any], Any], inputs: Sequence[Any]) -> Callable[[], Any]:
    """A call that takes the next of several inputs each time, so that no input waits in a cache for it."""
    turn = itertools.cycle(inputs)
    return lambda: function(next(turn))


@dataclass(frozen=True)
class Times:
    """Milliseconds of a call in each of several measurements, and how they were taken.

    `timed_by`: "graph", replays of a CUDA graph; "events", single calls that no graph can hold, with the host's time in
    them where that is the longer; "clock", on a CPU. `host_us`: microseconds of processor time of the thread that
    calls; None on a CPU, where that thread computes as well.
    """

    ms: list[float]
    timed_by: str
    host_us: list[float] | None = None


def time_calls(
    function: Callable[[Any], Any], inputs: Sequence[Any], device: torch.device, milliseconds: float
) -> Times:
    """Time a function for about `milliseconds` altogether, and at least three times, on one of `inputs` after the
    other."""
    if device.type == "cuda":
        calls = [partial(function, given) for given in inputs]
        ms, timed_by = device_times(calls, device, milliseconds)
        return Times(ms, timed_by, host_times(calls, device, milliseconds, statistics.median(ms)))
    call = rotating(function, inputs)
    times: list[float] = []
    call()
    while len(times) < 3 or sum(times) < milliseconds:
        start = time.perf_counter()
        call()
        times.append(1e3 * (time.perf_counter() - start))
    return Times(times, "clock")


@contextmanager
def without_collector() -> Iterator[None]:
    """Python's garbage collector runs before and not within."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


class Turns:
    """Contestants in turns: each round takes every one once, so that a busy moment falls on all of them, and a ratio to
    `beside` is one within a round.

    Args:
        turns: by name, what takes a turn and gives its milliseconds.
        beside: whom the others are held against; None where it does not compete.

    Attributes:
        ms: the milliseconds of each contestant.
        problems: what ended whom, by name.
    """

    def __init__(self, turns: dict[str, Callable[[], float]], beside: str) -> None:
        self.turns, self.beside = dict(turns), beside
        self.ms: dict[str, list[float]] = {name: [] for name in turns}
        self.problems: dict[str, str] = {}

    def take(self, rounds: int = 1, *, counts: bool = True) -> None:
        """So many rounds; of some that do not count nothing is kept."""
        with without_collector():
            for name, turn in rounds * list(self.turns.items()):
                if name not in self.turns:
                    continue
                taken, problem = attempt(turn)
                if problem is not None:
                    self.end(name, problem)
                elif counts:
                    self.ms[name].append(taken)

    def end(self, name: str, problem: str) -> None:
        """A contestant competes no more."""
        self.problems[name] = problem
        del self.turns[name], self.ms[name]

    def figures(self, name: str) -> dict[str, Any]:
        """A contestant's times, and its ratio if there is one; or its problem. Nothing of one that takes no turns."""
        own, beside = self.ms.get(name), self.ms.get(self.beside)
        if not own:
            return {"status": self.problems[name]} if name in self.problems else {}
        found = {"ms": spread_twice(own[::2], own[1::2])}
        if beside:
            ratios = [a / b for a, b in zip(own, beside, strict=True)]
            found["ratio"] = spread_twice(ratios[::2], ratios[1::2])
        return found


def peak_memory(call: Callable[[], Any], device: torch.device) -> int:
    """Bytes of tensors alive at once during a call, beyond those before it; on CUDA with what operators need inside."""
    if device.type != "cuda":
        with LiveBytes() as live:
            call()
        return live.peak
    synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    call()
    synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


class LiveBytes(TorchDispatchMode):
    """Follows the storages that operators make, from their making to their end: bytes alive, and the most so far."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0
        self.peak = 0
        self._followed: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        given = {x.untyped_storage() for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        result = function(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            if isinstance(x, Tensor) and x.untyped_storage() not in given:
                self._follow(x.untyped_storage())
        return result

    def _follow(self, storage: torch.UntypedStorage) -> None:
        if storage in self._followed:
            return
        self._followed.add(storage)
        self._change(storage.nbytes())
        weakref.finalize(storage, self._change, -storage.nbytes())

    def _change(self, size: int) -> None:
        self.now += size
        self.peak = max(self.peak, self.now)


class TransferCounter(TorchDispatchMode):
    """Counts the bytes of tensors that are copied between the host and a device, in either direction.

    Single values read on the host (`item`) count with their own size; sizes that an operator reads inside do not.
    """

    def __init__(self) -> None:
        super().__init__()
        self.host_to_device = 0
        self.device_to_host = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = function(*args, **(kwargs or {}))
        name = function.overloadpacket
        if name is torch.ops.aten._local_scalar_dense:
            self._count(args[0], None)
        elif name is torch.ops.aten._to_copy:
            self._count(args[0], result)
        elif name is torch.ops.aten.copy_:
            self._count(args[1], args[0])
        return result

    def _count(self, source: Tensor, target: Tensor | None) -> None:
        on_host = target is None or target.device.type == "cpu"
        if source.device.type == "cpu" and not on_host:
            self.host_to_device += target.nbytes
        elif source.device.type != "cpu" and on_host:
            self.device_to_host += source.nbytes if target is None else target.nbytes
