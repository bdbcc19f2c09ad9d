"""What whoever measures is given: a way to run cases one after the other, each of which may fail by itself."""

import faulthandler
import importlib.util
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from bench.lines import BEGUN, FAILED, LATE, LEFT_OUT, PASSED, Lines, ended_cases, read
from bench.results import failures, progress

BROKEN = 75
"""Exit status of a process that the GPU answers no more: a fresh one must go on."""

T = TypeVar("T")
Figures = dict[str, Any]


class NotPassedError(Exception):
    """A case that did not pass; `figures` go into its line."""

    state = FAILED

    def __init__(self, cause: str, **figures: Any) -> None:
        super().__init__(cause)
        self.figures = figures


class CaseFailed(NotPassedError):
    """A case that gave a wrong result."""


class Late(NotPassedError):
    """A case that ended before all of it was done."""

    state = LATE


class LeftOut(NotPassedError):
    """A case that cannot run here; the message says what it waits for."""

    state = LEFT_OUT


class Work:
    """Cases within one process.

    Args:
        stage: its name in the lines.
        lines: where they go.
        until: on the clock, when the process is killed, or begins nothing more.
        part, parts: which of several processes that share the cases this is.
        rehearsal: on a machine without a GPU, at sizes that a CPU computes in moments.
        again: lines of an earlier run, of which what passed is not run again.
        since: byte of the lines' file where this run begins.
        clock: seconds.
    """

    def __init__(
        self,
        stage: str,
        lines: Lines,
        until: float,
        *,
        part: int = 0,
        parts: int = 1,
        rehearsal: bool = False,
        again: Path | None = None,
        since: int = 0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.stage, self.lines, self.until, self.clock = stage, lines, until, clock
        self.part, self.parts, self.rehearsal, self.since = part, parts, rehearsal, since
        earlier = set() if again is None else ended_cases(read(again), stage, (PASSED,))
        self._done = earlier | ended_cases(read(lines.path, since), stage)

    @property
    def folder(self) -> Path:
        return self.lines.path.parent

    def left(self) -> float:
        """Seconds until time is up."""
        return self.until - self.clock()

    def share(self, items: Iterable[T]) -> Iterator[T]:
        """This part's items."""
        return (item for number, item in enumerate(items) if number % self.parts == self.part)

    def case(self, name: str, run: Callable[[], Figures | None], limit: float = 60.0, least: float = 2.0) -> None:
        """Run a case that has not ended yet and say how it did.

        Args:
            run: gives figures for the line, or raises.
            limit: seconds after which the case is given up, and this process with it.
            least: seconds without which it is not begun.
        """
        if name in self._done:
            return
        self._done.add(name)
        if self.left() < least:
            self.say(name, LATE, cause=f"no time: {max(0.0, self.left()):.0f} s left, it needs {least:.0f}")
            return
        self.say(name, BEGUN, limit=round(limit, 1))
        # A call that never comes back from the GPU's driver holds Python's lock: no signal handler would run.
        if limit < self.left():
            faulthandler.dump_traceback_later(limit, exit=True)
        start = self.clock()
        try:
            state, figures = outcome(run)
        finally:
            faulthandler.cancel_dump_traceback_later()
        self.say(name, state, seconds=round(self.clock() - start, 2), **figures)
        if state == FAILED:
            self._end_if_broken()

    def say(self, name: str, state: str, **figures: Any) -> None:
        """Write a case's line, and a short one to who looks on."""
        self.lines.write(stage=self.stage, case=name, part=self.part, state=state, **figures)
        print(f"[{self.stage}] {name}: {state} {figures.get('cause') or progress(figures)}", flush=True)

    def _end_if_broken(self) -> None:
        """A fault of a kernel leaves the process's device context unusable: whatever came next would fail as well."""
        torch = sys.modules.get("torch")
        if torch is None or not torch.cuda.is_initialized():
            return
        try:
            torch.cuda.synchronize()
        except RuntimeError:
            print(f"[{self.stage}] the GPU answers this process no more", flush=True)
            sys.stdout.flush()
            sys.exit(BROKEN)


def passed(entry: Figures, **figures: Any) -> Figures:
    """What a line says of a case's entry. Raises: CaseFailed if a contestant of ours gave a wrong result or none; the
    others' times are in its figures."""
    figures = {"result": entry, **figures}
    if wrong := failures({"cases": [entry]}):
        raise CaseFailed(wrong[0], **figures)
    return figures


def outcome(run: Callable[[], Figures | None]) -> tuple[str, Figures]:
    """The state in which a case ends, and what to say with it."""
    try:
        return PASSED, run() or {}
    except Exception as error:
        return judged(error)


def judged(error: Exception) -> tuple[str, Figures]:
    """The state that an exception means, and what to say with it."""
    if isinstance(error, ImportError) and _is_absent(error.name):
        return LEFT_OUT, {"cause": f"needs {str(error.name).split('.')[0]}"}
    if isinstance(error, NotPassedError) and error.state != FAILED:
        return error.state, {"cause": str(error), **error.figures}
    traceback.print_exception(error)
    return FAILED, {"cause": cause_of(error), **getattr(error, "figures", {})}


def _is_absent(module: str | None) -> bool:
    """Whether a module belongs to a package that is not installed at all: else its absence is a fault of ours."""
    package = (module or "").split(".")[0]
    return bool(package) and importlib.util.find_spec(package) is None


def cause_of(error: BaseException) -> str:
    """One line about an exception."""
    first = (str(error).strip() or "no message").splitlines()[0][:200]
    return first if isinstance(error, CaseFailed) else f"{type(error).__name__}: {first}"
