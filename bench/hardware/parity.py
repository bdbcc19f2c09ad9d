"""Stage: the tests that hold kernels and models against references, on this device: kernels with small tiles, which
make many programs of little data, then with the tiles that they have in earnest; each dtype by itself, side by side."""

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from bench.hardware.work import CaseFailed, LeftOut, Work

ROOT = Path(__file__).parents[2]
KERNELS = (*sorted(path.name for path in (ROOT / "tests").glob("test_kernel_*.py")), "test_sealed_cache.py")
OPERATIONS = ("test_operations.py", "test_sealing.py", "test_hardware.py", "test_tiles.py")
MODELS = ("test_model_parity.py", "test_sealed_model.py", "test_memory.py")
DTYPES = ("bfloat16", "float16", "float32", "none")
NO_TESTS = 5
"""pytest's exit status where it has run none."""


@dataclass(frozen=True)
class Group:
    """Tests that one pytest runs."""

    title: str
    files: tuple[str, ...]
    dtype: str
    tiles: str | None = None
    repeats: int = 1

    @property
    def name(self) -> str:
        return ", ".join(text for text in (self.title, self.dtype, self.tiles and f"{self.tiles} tiles") if text)


def groups(rehearsal: bool) -> Iterator[list[Group]]:
    """For each process its groups, one after the other."""
    if rehearsal:
        yield [Group("kernels", ("test_kernel_unlock.py",), "float16", "small")]
        return
    for dtype in DTYPES:
        yield [
            Group("kernels", KERNELS, dtype, "small"),
            Group("kernels", KERNELS, dtype, "production", 3),
            Group("operations", OPERATIONS, dtype),
            Group("models", MODELS, dtype),
        ]


def run(work: Work) -> None:
    for own in work.share(groups(work.rehearsal)):
        for group in own:
            work.case(group.name, partial(pytest_run, group, work), limit=work.left(), least=8)


def pytest_run(group: Group, work: Work) -> dict[str, Any]:
    """Raises: CaseFailed, LeftOut."""
    if importlib.util.find_spec("pytest") is None:
        raise LeftOut("needs pytest")
    with tempfile.TemporaryDirectory() as directory:
        totals = Path(directory) / "totals.json"
        done = subprocess.run(command(group, work, totals), cwd=ROOT, check=False)
        found = json.loads(totals.read_text()) if totals.exists() else {"tests": {}, "waiting": []}
    tests = found["tests"]
    if done.returncode == 0:
        return {**found, "processes": processes(work)}
    if done.returncode == NO_TESTS and found["waiting"]:
        raise LeftOut(found["waiting"][0])
    wrong = tests.get("failed", 0) + tests.get("error", 0)
    cause = (
        f"{wrong} tests failed, {tests.get('passed', 0)} passed" if wrong else f"pytest ended with {done.returncode}"
    )
    raise CaseFailed(cause, **found)


def command(group: Group, work: Work, totals: Path) -> list[str]:
    told = ["--lines", str(work.lines.path), "--stage", work.stage, "--part", str(work.part), "--totals", str(totals)]
    found = [sys.executable, "-m", "pytest", "-q", "--tb=short", "-p", "no:cacheprovider"]
    found += ["-p", "bench.hardware.selection", "--exactly", group.dtype, *told]
    found += [f"tests/{file}" for file in group.files]
    if processes(work) > 1:
        found += ["-n", str(processes(work))]
    if group.tiles is not None:
        found += ["--tiles", group.tiles, "--repeats", str(group.repeats)]
    return found


def processes(work: Work) -> int:
    """Of one pytest: this process's share of the cores, where pytest-xdist is installed."""
    if work.rehearsal or importlib.util.find_spec("xdist") is None:
        return 1
    return max(1, (os.cpu_count() or 1) // work.parts)
