"""Stage: the tests that hold kernels and models against references, on this device and over all cores: with the tiles
that kernels have in earnest, then kernels with small ones, which make many programs of little data.

Most of a test is compiling, so there may be no time for all. They are taken in an order that begins with one of each
kind and dtype, and whatever had no time is counted."""

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from bench.work import CaseFailed, Late, LeftOut, Work

ROOT = Path(__file__).parents[2]
KERNELS = (*sorted(path.name for path in (ROOT / "tests").glob("test_kernel_*.py")), "test_sealed_cache.py")
OPERATIONS = ("test_operations.py", "test_sealing.py", "test_hardware.py", "test_tiles.py")
MODELS = ("test_model_parity.py", "test_sealed_model.py", "test_memory.py")
NO_TESTS = 5
"""pytest's exit status where it has run none."""
LEAST = 25.0
"""Seconds without which a pytest is not begun: collecting takes half of them."""
TO_END = 6.0
"""Seconds from the last test's beginning to the end of pytest."""


@dataclass(frozen=True)
class Group:
    """Tests that one pytest runs, for `share` of the time that is left."""

    name: str
    files: tuple[str, ...]
    tiles: str
    repeats: int = 1
    share: float = 1.0


def groups(rehearsal: bool) -> tuple[Group, ...]:
    if rehearsal:
        return (Group("unlock, small tiles", ("test_kernel_unlock.py",), "small"),)
    return (
        Group("production tiles", (*OPERATIONS, *MODELS, *KERNELS), "production", repeats=3, share=0.75),
        Group("kernels, small tiles", KERNELS, "small"),
    )


def run(work: Work) -> None:
    for group in groups(work.rehearsal):
        work.case(group.name, partial(pytest_run, group, work), limit=work.left(), least=LEAST)


def pytest_run(group: Group, work: Work) -> dict[str, Any]:
    """Raises: CaseFailed, Late, LeftOut."""
    if importlib.util.find_spec("pytest") is None:
        raise LeftOut("needs pytest")
    with tempfile.TemporaryDirectory() as directory:
        totals = Path(directory) / "totals.json"
        done = subprocess.run(command(group, work, totals), cwd=ROOT, check=False)
        found = json.loads(totals.read_text()) if totals.exists() else {"tests": {}, "waiting": []}
    tests = found["tests"]
    figures = {**found, "processes": processes(work)}
    if done.returncode == NO_TESTS and found["waiting"]:
        raise LeftOut(found["waiting"][0])
    passed, wrong = tests.get("passed", 0), tests.get("failed", 0) + tests.get("error", 0)
    if wrong:
        raise CaseFailed(f"{wrong} tests failed, {passed} passed", **figures)
    if done.returncode:
        raise CaseFailed(f"pytest ended with {done.returncode}", **figures)
    if late := tests.get("late", 0):
        raise Late(f"{passed} tests passed, {late} had no time", **figures)
    return figures


def command(group: Group, work: Work, totals: Path) -> list[str]:
    until = time.monotonic() + max(0.0, group.share * work.left() - TO_END)
    told = ["--lines", str(work.lines.path), "--stage", work.stage, "--part", str(work.part), "--totals", str(totals)]
    found = [sys.executable, "-m", "pytest", "-q", "--tb=short", "-p", "no:cacheprovider"]
    found += ["-p", "bench.hardware.selection", "--until", str(until), *told]
    found += ["--tiles", group.tiles, "--repeats", str(group.repeats)]
    found += [f"tests/{file}" for file in group.files]
    if processes(work) > 1:
        found += ["-n", str(processes(work)), "--dist", "worksteal"]
    return found


def processes(work: Work) -> int:
    """Of one pytest: as many as there are cores, where pytest-xdist is installed."""
    return 1 if work.rehearsal or importlib.util.find_spec("xdist") is None else os.cpu_count() or 1
