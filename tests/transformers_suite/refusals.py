"""The list of documented refusals, and tests held against it: a listed test must fail with exactly its refusal, every
other must pass."""

import re
import tomllib
from collections import Counter
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

import pytest

__all__ = ["LIST", "CountedByFamily", "Listed", "Refusal", "read"]

LIST = Path(__file__).with_name("refusals.toml")
FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
OUTCOMES = ("failed", "refused", "passed", "skipped")  # of a test with several, the first counts

_OUTCOMES = pytest.StashKey[set[str]]()


@dataclass(frozen=True)
class Refusal:
    """What tests of these names, patterns of fnmatch, must raise in these settings, and why that is right.

    `message` is a regular expression that the error's text must contain. `may_pass` is for what depends on the keys.
    """

    tests: tuple[str, ...]
    settings: tuple[str, ...]
    error: str
    message: str
    reason: str
    may_pass: bool = False

    def names(self, test: str) -> bool:
        return any(fnmatchcase(test, pattern) for pattern in self.tests)

    def is_met_by(self, raised: BaseException) -> bool:
        return type(raised).__name__ == self.error and re.search(self.message, str(raised)) is not None


def read(path: Path) -> list[Refusal]:
    """The refusals in a file of TOML, each a table `[[refusal]]`."""
    with path.open("rb") as file:
        tables = tomllib.load(file).get("refusal", [])
    return [
        Refusal(**{**table, "tests": tuple(table["tests"]), "settings": tuple(table["settings"])}) for table in tables
    ]


class Listed:
    """The plugin: a listed test's refusal is reported as an expected failure, its passing as an error."""

    def __init__(self, refusals: Sequence[Refusal], setting: str) -> None:
        self.refusals = [refusal for refusal in refusals if setting in refusal.settings]

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(
        self, item: pytest.Item, call: pytest.CallInfo[None]
    ) -> Generator[None, pytest.TestReport, pytest.TestReport]:
        report = yield
        expected = [refusal for refusal in self.refusals if refusal.names(item.name)]
        if not expected:
            return report
        outcomes = item.stash.setdefault(_OUTCOMES, set())
        raised = None if call.excinfo is None else call.excinfo.value
        met = next((x for x in expected if raised is not None and x.is_met_by(raised)), None)
        if report.when == "call" and report.failed and met is not None:
            report.outcome, report.wasxfail = "skipped", met.reason
            outcomes.add("refused")
        elif report.when == "teardown" and outcomes == {"passed"} and not all(x.may_pass for x in expected):
            report.outcome = "failed"
            report.longrepr = f"{LIST.name} says that this test is refused, and it passes: {expected}"
        elif report.when == "call" or not report.passed:
            outcomes.add(report.outcome)
        return report


class CountedByFamily:
    """The plugin that says at the end how many tests of each family passed, were refused as documented, or failed."""

    def __init__(self, title: str) -> None:
        self.title = title
        self.outcomes: dict[str, set[str]] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        counts = report.when == "call" or not report.passed
        outcome = "refused" if hasattr(report, "wasxfail") else report.outcome
        self.outcomes.setdefault(report.nodeid, set()).update([outcome] if counts else [])

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        counted: dict[str, Counter[str]] = {family: Counter() for family in FAMILIES}
        for nodeid, outcomes in self.outcomes.items():
            family = next((family for family in FAMILIES if family in nodeid.lower()), "other")
            worst = next((outcome for outcome in OUTCOMES if outcome in outcomes), "passed")
            counted.setdefault(family, Counter())[worst] += 1
        terminalreporter.section(self.title)
        for family, count in counted.items():
            terminalreporter.line(
                f"{family:8} {count['passed']:5} passed {count['refused']:5} refused as documented "
                f"{count['failed']:5} failed {count['skipped']:5} skipped"
            )
