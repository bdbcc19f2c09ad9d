"""What a call costs a GPU and what it costs the thread that asks for it, measured apart.

Device time comes from replays of one CUDA graph that holds many calls: between them the device never waits for the
host, which it would for every small kernel that is launched call by call. Calls should differ in their inputs, and the
inputs together exceed the last cache; nothing is flushed, because a flush is device time behind which the host hides.
"""

import gc
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

__all__ = ["NotCapturedError", "device_times", "event_times", "graph_times", "host_times"]

Call = Callable[[], Any]

LEAST_CALLS = 16
"""Calls of a graph, where they are short: what the device needs to begin a replay is spread over them."""
LONG = 1.0
"""Milliseconds of a call from which each input is taken once in a graph."""
REPLAYS = (5, 200)
SERIES = (3, 16)
CALLS_UNASKED = 8
"""Calls made without waiting when the host's time is taken: few enough that no launch waits in a full queue."""


class NotCapturedError(RuntimeError):
    """A call that a CUDA graph cannot hold, because it waits for the device or copies from pageable memory."""


def device_times(calls: Sequence[Call], device: torch.device, milliseconds: float) -> tuple[list[float], str]:
    """(milliseconds of a call in each of several measurements, "graph" or "events").

    Args:
        calls: the same work on different inputs.
        device: a CUDA device.
        milliseconds: how long to measure, about.
    """
    with torch.cuda.device(device):
        try:
            return graph_times(calls, milliseconds), "graph"
        except NotCapturedError:
            return event_times(calls, milliseconds), "events"


def graph_times(calls: Sequence[Call], milliseconds: float) -> list[float]:
    """Milliseconds a call, of each of several replays of a graph that holds every call at least once.

    Raises: NotCapturedError.
    """
    graph, count = _captured(calls)
    (one,) = _between_events([graph.replay])
    low, high = REPLAYS
    replays = max(low, min(high, round(milliseconds / max(one, 1e-3))))
    return [ms / count for ms in _between_events([graph.replay] * replays)]


def event_times(calls: Sequence[Call], milliseconds: float) -> list[float]:
    """Milliseconds of single calls between events: with the host's time in it, where that is the longer."""
    (first,) = _between_events(calls[:1])
    count = max(REPLAYS[0], min(REPLAYS[1], round(milliseconds / max(first, 1e-3))))
    return _between_events(list(itertools.islice(itertools.cycle(calls), count)))


def host_times(calls: Sequence[Call], device: torch.device, milliseconds: float, call_ms: float) -> list[float]:
    """Microseconds of the calling thread's processor time a call, the device working meanwhile and not waited for.

    Args:
        milliseconds: of the device's time to spend, about, and at least three calls.
        call_ms: the device's time of a call.
    """
    affordable = milliseconds / max(call_ms, 1e-3)
    unasked = max(1, min(CALLS_UNASKED, int(affordable / SERIES[0])))
    series = max(SERIES[0], min(SERIES[1], int(affordable / unasked)))
    turn = itertools.cycle(calls)
    found = []
    with _uncollected():
        for _ in range(series):
            torch.cuda.synchronize(device)
            start = time.thread_time_ns()
            for _ in range(unasked):
                next(turn)()
            found.append((time.thread_time_ns() - start) / 1e3 / unasked)
    torch.cuda.synchronize(device)
    return found


def _captured(calls: Sequence[Call]) -> tuple[torch.cuda.CUDAGraph, int]:
    """A graph and how many calls it holds."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls:  # compiles, loads and allocates what only a first call does
            call()
        _refuse_to_wait(calls[0])
        (once,) = _between_events(calls[:1])
    count = len(calls) if once >= LONG else len(calls) * -(-LEAST_CALLS // len(calls))
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph, stream=stream):
            for call in itertools.islice(itertools.cycle(calls), count):
                call()
    except RuntimeError as error:
        _end_capture()
        raise NotCapturedError(str(error)) from error
    return graph, count


def _refuse_to_wait(call: Call) -> None:
    """Raises NotCapturedError for a call that waits for the device: asked before, because a capture that fails leaves
    more behind than an exception."""
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        call()
    except RuntimeError as error:
        if "synchroniz" not in str(error):
            raise
        raise NotCapturedError(str(error)) from error
    finally:
        torch.cuda.set_sync_debug_mode(before)


def _end_capture() -> None:
    """After a capture that failed: random numbers are drawn again, which the generator refuses while one goes on."""
    torch.cuda.synchronize()
    device = torch.cuda.current_device()
    fresh = torch.Generator(torch.device("cuda", device))
    fresh.manual_seed(torch.initial_seed())
    torch.cuda.default_generators[device].graphsafe_set_state(fresh)


def _between_events(calls: Sequence[Call]) -> list[float]:
    """Milliseconds from the event before to the event after each call, all of them queued at once, behind a first one
    that gives the host a lead."""
    events = [torch.cuda.Event(enable_timing=True) for _ in range(len(calls) + 1)]
    torch.cuda.synchronize()
    with _uncollected():
        calls[0]()
        events[0].record()
        for call, event in zip(calls, events[1:], strict=True):
            call()
            event.record()
    torch.cuda.synchronize()
    return [a.elapsed_time(b) for a, b in itertools.pairwise(events)]


@contextmanager
def _uncollected() -> Iterator[None]:
    """Python's garbage collector does not run within."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
