"""The helper that runs kernels in tests sees what it is there for: races, and memory that nobody writes."""

from pathlib import Path

import parity
import pytest
import torch
from parity import DEVICE, Mode, nobody_waits, run_kernel, same_bits


@pytest.fixture
def three_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parity, "MODE", Mode("small", 3))


@pytest.mark.usefixtures("three_runs")
def test_a_result_that_changes_is_seen() -> None:
    """Also one that changes in the last run alone, or only in the sign of zero."""
    results = iter([torch.zeros(2), torch.zeros(2), -torch.zeros(2)])
    with pytest.raises(AssertionError, match="run 3 gave other bits"):
        run_kernel(lambda: next(results))


@pytest.mark.usefixtures("three_runs")
def test_every_run_begins_with_what_the_test_put_into_the_output() -> None:
    """So that what one run wrote is not taken for the next one's."""
    out, seen = torch.full((4,), float("nan")), []

    def launcher(*, out):
        seen.append(out.clone())
        out[: 4 if len(seen) == 1 else 3] = 1.0
        return out

    with pytest.raises(AssertionError, match="run 2 gave other bits"):
        run_kernel(launcher, out=out)
    assert all(x.isnan().all() for x in seen)


@pytest.mark.usefixtures("three_runs")
def test_what_a_result_does_not_show_is_compared_too() -> None:
    """A cache that is written beside the result."""
    runs, cache = iter(range(3)), torch.zeros(2)

    def launcher(*, keys):
        keys.fill_(next(runs))
        return torch.ones(1)

    with pytest.raises(AssertionError, match="run 2 gave other bits"):
        run_kernel(launcher, keys=cache)


@pytest.mark.parametrize(("tiles", "expected"), [("small", {"tile": {"BLOCK_M": 2}}), ("production", {})])
def test_a_forced_tile_is_left_out_in_production(monkeypatch, tiles: str, expected: dict) -> None:
    monkeypatch.setattr(parity, "MODE", Mode(tiles, 1))
    given = []

    def launcher(**options):
        given.append(options)
        return torch.ones(1)

    run_kernel(launcher, tile={"BLOCK_M": 2})
    assert given == [expected]


def test_fresh_memory_is_poisoned_wherever_a_kernel_runs() -> None:
    assert torch.empty(3, device=DEVICE).isnan().all()
    with nobody_waits(), pytest.raises(AssertionError, match="would hold old results"):
        run_kernel(lambda: torch.empty(3))


def test_waiting_is_forbidden_under_the_algorithms_that_users_have() -> None:
    """Deterministic ones copy from the host, which the sync-error mode would call an error of the code under test."""
    assert torch.are_deterministic_algorithms_enabled()
    with nobody_waits():
        assert not torch.are_deterministic_algorithms_enabled()
    assert torch.are_deterministic_algorithms_enabled()


def test_graphs_and_sync_errors_come_from_parity_alone() -> None:
    """So that no test meets them under deterministic algorithms. The tests of timing make up a device of their own."""
    for path in Path(__file__).parent.glob("*.py"):
        if path.name not in ("parity.py", "test_timing.py", Path(__file__).name):
            text = path.read_text()
            assert "set_sync_debug_mode" not in text, path.name
            assert "CUDAGraph" not in text, path.name


def test_bits() -> None:
    nan = torch.tensor([float("nan")])
    assert same_bits(nan, nan.clone())
    assert not same_bits(torch.zeros(1), -torch.zeros(1))
    assert not same_bits(torch.zeros(1), torch.zeros(1, dtype=torch.float16))
