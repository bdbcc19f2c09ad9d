"""A plugin of pytest's (`-p bench.hardware.selection`): one test of every kind first, until time is up, and lines for
those that fail."""

import json
import math
import os
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.lines import FAILED, Lines
from bench.work import BROKEN

NO_TIME = "no time"


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("hardware")
    group.addoption("--until", type=float, default=math.inf, help="on the clock time.monotonic: no test begins later")
    group.addoption("--lines", type=Path, help="where lines about failed tests go")
    group.addoption("--stage", help="the stage's name in them")
    group.addoption("--part", type=int, default=0, help="the part's number in them")
    group.addoption("--totals", type=Path, help="where the counts of this session go")


def kind_of(item: pytest.Item) -> tuple[str, tuple[str, ...]]:
    """A test's function and the dtypes among its parameters."""
    given = getattr(getattr(item, "callspec", None), "params", {})
    dtypes = sorted(str(value) for value in given.values() if isinstance(value, torch.dtype))
    return item.nodeid.partition("[")[0], tuple(dtypes)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The first of every kind, then the second of every kind, and so on."""
    seen: Counter[tuple[str, tuple[str, ...]]] = Counter()
    turn = {}
    for item in items:
        turn[item.nodeid] = seen[kind_of(item)]
        seen[kind_of(item)] += 1
    items.sort(key=lambda item: turn[item.nodeid])


def pytest_runtest_setup(item: pytest.Item) -> None:
    """No test begins after its time. That hides nothing: such skips are counted apart, and make their group late."""
    if time.monotonic() > item.config.getoption("until"):
        pytest.skip(NO_TIME)


@pytest.hookimpl(trylast=True)
def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """A fault of a kernel leaves the worker's device unusable: it ends, and a fresh one takes its next tests."""
    if not report.failed or not torch.cuda.is_initialized():
        return
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        sys.stderr.write(f"{report.nodeid}: the GPU answers this process no more\n")
        sys.stderr.flush()
        os._exit(BROKEN)  # an exception would be caught, and the next test begun


class Teller:
    """Writes what fails as it fails, and the counts at the end."""

    def __init__(self, config: pytest.Config) -> None:
        self.config = config
        self.waiting: set[str] = set()
        self.told: set[str] = set()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self._tell(report.nodeid, cause(report))

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self._tell(report.nodeid, cause(report))
        elif report.skipped:
            self.waiting.add(str(report.longrepr[-1] if isinstance(report.longrepr, tuple) else report.longrepr))

    def _tell(self, name: str, text: str) -> None:
        """Once: a file that cannot be collected fails in every worker."""
        if name in self.told:
            return
        self.told.add(name)
        option = self.config.getoption
        tiles = f" ({option('tiles')} tiles)" if option("tiles", None) else ""
        about = {"stage": option("stage"), "case": f"{name}{tiles}", "part": option("part")}
        Lines(option("lines")).write(**about, state=FAILED, cause=text)

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        stats = terminalreporter.stats
        # No test is expected to fail today; one that will be does not count as passed.
        counts = {name: len(stats.get(name, ())) for name in ("passed", "failed", "error", "xfailed")}
        late = sum(NO_TIME in str(report.longrepr) for report in stats.get("skipped", ()))
        counts |= {"late": late, "skipped": len(stats.get("skipped", ())) - late}
        self.config.getoption("totals").write_text(json.dumps({"tests": counts, "waiting": sorted(self.waiting)}))


def cause(report: Any) -> str:
    """One line about a failure."""
    crash = getattr(getattr(report, "longrepr", None), "reprcrash", None)
    lines = (crash.message if crash else str(report.longrepr)).strip().splitlines() or ["no message"]
    return (lines[0] if crash else lines[-1])[:200]


def pytest_configure(config: pytest.Config) -> None:
    is_worker = hasattr(config, "workerinput")
    if config.getoption("lines") and not is_worker:
        config.pluginmanager.register(Teller(config), "hardware-teller")
