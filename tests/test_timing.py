"""How times are taken on a GPU, on a device that is made up: it does what the host asks for, one after the other."""

from collections.abc import Callable
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from bench import timing as bench_timing
from bench.operations import _figures
from bench.timing import Times, time_calls
from scx_kernels import timing, tune
from scx_kernels.timing import NotCapturedError, device_times, graph_times, host_times

DEVICE = torch.device("cuda", 0)
CPU = torch.device("cpu")
REPLAY = 5.0
"""Microseconds that the host needs to ask for a replay."""


class Machine:
    """Two clocks, in microseconds: the host asks; the device begins once asked and done with what was before."""

    def __init__(self) -> None:
        self.host = self.device = 0.0
        self.capturing: list[float] | None = None
        self.refuses_to_wait = False
        self.graphs: list[list[float]] = []
        self.restored: list[Any] = []

    def call(self, host: float, device: float, waits: bool = False) -> Callable[[], None]:
        """Work that takes the host and the device so long; `waits`: for the device, which no graph can hold."""

        def work() -> None:
            self.host += host
            if waits and self.refuses_to_wait:
                raise RuntimeError("called a synchronizing CUDA operation")
            if self.capturing is not None:
                self.capturing.append(device)
                return
            self.device = max(self.device, self.host) + device

        return work

    def fake(self, patch: pytest.MonkeyPatch) -> None:
        machine = self

        class Event:
            def __init__(self, enable_timing: bool) -> None:
                self.at = 0.0

            def record(self) -> None:
                self.at = max(machine.device, machine.host)

            def elapsed_time(self, other: "Event") -> float:
                return (other.at - self.at) / 1e3

        class CUDAGraph:
            def __init__(self) -> None:
                self.work: list[float] = []

            def replay(self) -> None:
                machine.host += REPLAY
                machine.device = max(machine.device, machine.host) + sum(self.work)

        class graph:
            def __init__(self, made: CUDAGraph, stream: Any) -> None:
                self.made = made

            def __enter__(self) -> None:
                machine.capturing = []

            def __exit__(self, *raised: Any) -> None:
                self.made.work, machine.capturing = machine.capturing, None
                machine.graphs.append(self.made.work)

        def synchronize(device: Any = None) -> None:
            machine.host = max(machine.host, machine.device)

        def set_sync_debug_mode(mode: Any) -> None:
            machine.refuses_to_wait = mode == "error"

        made_up = {
            "Event": Event, "CUDAGraph": CUDAGraph, "graph": graph, "synchronize": synchronize,
            "Stream": lambda: SimpleNamespace(wait_stream=lambda other: None), "current_stream": lambda: None,
            "stream": lambda stream: nullcontext(), "device": lambda device: nullcontext(), "current_device": lambda: 0,
            "get_sync_debug_mode": lambda: 0, "set_sync_debug_mode": set_sync_debug_mode,
            "default_generators": [SimpleNamespace(graphsafe_set_state=self.restored.append)],
        }  # fmt: skip
        for name, value in made_up.items():
            patch.setattr(torch.cuda, name, value)
        patch.setattr(timing.time, "thread_time_ns", lambda: round(1e3 * machine.host))


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    machine = Machine()
    machine.fake(monkeypatch)
    return machine


def test_the_hosts_time_is_not_in_the_devices(machine: Machine) -> None:
    """A kernel of 10 µs that takes the host 250 µs to launch takes 10 µs, and 250 µs of the host's."""
    calls = [machine.call(250.0, 10.0) for _ in range(3)]
    times, timed_by = device_times(calls, DEVICE, 5.0)
    assert timed_by == "graph"
    assert times == pytest.approx([0.01] * len(times))
    assert host_times(calls, DEVICE, 5.0, 0.01) == pytest.approx([250.0] * 16)


def test_long_calls_are_few(machine: Machine) -> None:
    """Of 60 ms each, three are made for the host's time; of 1 ms, as many as fit."""
    made: list[int] = []
    for call_ms, count in ((60.0, 3), (1.0, 12), (0.01, 128)):
        made.clear()
        host_times([lambda: made.append(1)], DEVICE, 12.0, call_ms)
        assert len(made) == count


def test_a_graph_holds_every_input_equally(machine: Machine) -> None:
    """At least sixteen short calls, each input as often as the others; long ones once each."""
    graph_times([machine.call(1.0, 10.0 + n) for n in range(3)], 1.0)
    assert sorted(machine.graphs[-1]) == [10.0] * 6 + [11.0] * 6 + [12.0] * 6
    graph_times([machine.call(1.0, 2000.0 + n) for n in range(3)], 1.0)
    assert machine.graphs[-1] == [2000.0, 2001.0, 2002.0]


def test_measured_as_long_as_asked(machine: Machine) -> None:
    """In replays, between 5 and 200 of them."""
    for milliseconds, replays in ((3.2, 20), (0.001, 5), (1e6, 200)):
        assert len(graph_times([machine.call(1.0, 10.0)], milliseconds)) == replays


def test_what_waits_is_timed_between_events_and_named(machine: Machine) -> None:
    calls = [machine.call(250.0, 10.0, waits=True) for _ in range(3)]
    with pytest.raises(NotCapturedError, match="synchronizing"):
        graph_times(calls, 5.0)
    times, timed_by = device_times(calls, DEVICE, 5.0)
    assert timed_by == "events"
    assert len(times) >= 5
    assert min(times) >= 0.01
    assert not machine.graphs, "no capture was begun"
    assert not machine.refuses_to_wait


def test_a_capture_that_fails_leaves_random_numbers(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "Generator", lambda device: SimpleNamespace(manual_seed=lambda seed: None))

    def uncaptured() -> None:
        if machine.capturing is not None:
            raise RuntimeError("operation not permitted when stream is capturing")
        machine.call(1.0, 10.0)()

    assert device_times([uncaptured], DEVICE, 1.0)[1] == "events"
    assert len(machine.restored) == 1


def test_other_failures_are_not_taken_for_waiting(machine: Machine) -> None:
    def wrong() -> None:
        raise RuntimeError("no kernel image")

    with pytest.raises(RuntimeError, match="no kernel image"):
        device_times([wrong], DEVICE, 1.0)


def test_entries_say_how_they_were_timed(machine: Machine) -> None:
    """On CUDA with the host's time; on a CPU, whose thread computes as well, without it."""
    work = [machine.call(40.0, 10.0) for _ in range(2)]
    on_cuda = time_calls(lambda call: call(), work, DEVICE, 1.0)
    found = _figures(on_cuda, on_cuda)
    assert found["timed_by"] == "graph"
    assert found["ms"]["median"] == pytest.approx(0.01)
    assert found["host_us"]["median"] == pytest.approx(40.0)
    seen: list[int] = []
    on_cpu = time_calls(seen.append, [1, 2], CPU, 0.0)
    assert (on_cpu.timed_by, on_cpu.host_us, seen) == ("clock", None, [1, 2, 1, 2])
    assert "host_us" not in _figures(on_cpu, on_cpu)
    assert bench_timing.Times([1.0], "clock") == Times([1.0], "clock")


def test_the_tuner_rotates_inputs_beyond_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two caches of inputs, at most sixteen sets; the time of a candidate is one call's, on all of them in turn."""
    subject: Any = SimpleNamespace(make=lambda device: {"x": torch.ones(100), "scale": 1.0})
    cache = SimpleNamespace(L2_cache_size=1000)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: cache)
    assert len(tune._input_sets(subject, DEVICE)) == 5
    cache.L2_cache_size = 10**6
    assert len(tune._input_sets(subject, DEVICE)) == 16
    cache.L2_cache_size = 1
    assert len(tune._input_sets(subject, DEVICE)) == 1
