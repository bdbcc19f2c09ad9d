"""A plugin of pytest's (`-p bench.hardware.selection`): tests of exactly one dtype, and lines for those that fail.

`-k float16` also takes bfloat16; `--exactly float16` asks each test for the dtype that it was given."""

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.hardware.lines import FAILED, Lines
from bench.hardware.work import BROKEN

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
NONE = "none"


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("hardware")
    group.addoption("--exactly", choices=(*DTYPES, NONE), help="tests of this dtype; none: those that have no dtype")
    group.addoption("--lines", type=Path, help="where lines about failed tests go")
    group.addoption("--stage", help="the stage's name in them")
    group.addoption("--part", type=int, default=0, help="the part's number in them")
    group.addoption("--totals", type=Path, help="where the counts of this session go")


def dtypes_of(item: pytest.Item) -> set[torch.dtype]:
    """The dtypes among a test's parameters."""
    given = getattr(getattr(item, "callspec", None), "params", {})
    return {value for value in given.values() if isinstance(value, torch.dtype)}


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    wanted = config.getoption("exactly")
    if wanted is None:
        return
    is_wanted = [not dtypes_of(x) if wanted == NONE else DTYPES[wanted] in dtypes_of(x) for x in items]
    config.hook.pytest_deselected(items=[x for x, kept in zip(items, is_wanted, strict=True) if not kept])
    items[:] = [x for x, kept in zip(items, is_wanted, strict=True) if kept]


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
        counts = {name: len(stats.get(name, ())) for name in ("passed", "failed", "error", "skipped", "xfailed")}
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
