"""What a stage's module is given: a way to run its cases one after the other, each of which may fail by itself."""

import faulthandler
import importlib.util
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from bench.hardware.lines import BEGUN, FAILED, LATE, LEFT_OUT, PASSED, Lines, ended_cases, read

__all__ = ["BROKEN", "CaseFailed", "Late", "LeftOut", "Work", "cause_of", "judged"]

BROKEN = 75
"""Exit status of a process that the GPU answers no more: a fresh one must go on."""

T = TypeVar("T")
Figures = dict[str, Any]


class LeftOut(Exception):
    """A case that cannot run here; the message says what it waits for."""


class Late(Exception):
    """A case that ended before all of it was done; `figures` go into its line."""

    def __init__(self, cause: str, **figures: Any) -> None:
        super().__init__(cause)
        self.figures = figures


class CaseFailed(Exception):
    """A case that gave a wrong result; `figures` go into its line."""

    def __init__(self, cause: str, **figures: Any) -> None:
        super().__init__(cause)
        self.figures = figures


class Work:
    """A stage's cases within one process.

    Args:
        stage: its name in the lines.
        lines: where they go.
        until: on the clock `time.monotonic`, when the process is killed.
        part, parts: which of several processes that share the cases this is.
        rehearsal: on a machine without a GPU, at sizes that a CPU computes in moments.
        again: lines of an earlier run, of which what passed is not run again.
        since: byte of the lines' file where this run begins.
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
    ) -> None:
        self.stage = stage
        self.lines = lines
        self.until = until
        self.part = part
        self.parts = parts
        self.rehearsal = rehearsal
        self.since = since
        earlier = set() if again is None else ended_cases(read(again), stage, (PASSED,))
        self._done = earlier | ended_cases(read(lines.path, since), stage)

    @property
    def folder(self) -> Path:
        return self.lines.path.parent

    def left(self) -> float:
        """Seconds until the process is killed."""
        return self.until - time.monotonic()

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
            self._say(name, LATE, cause=f"no time: {max(0.0, self.left()):.0f} s left, it needs {least:.0f}")
            return
        self._say(name, BEGUN, limit=round(limit, 1))
        start = time.monotonic()
        if limit < self.left():
            # A call that never comes back from the GPU's driver holds Python's lock: no signal handler would run.
            faulthandler.dump_traceback_later(limit, exit=True)
        try:
            figures, state = run() or {}, PASSED
        except Exception as error:
            state, figures = judged(error)
        finally:
            faulthandler.cancel_dump_traceback_later()
        self._say(name, state, seconds=round(time.monotonic() - start, 2), **figures)
        if state == FAILED:
            self._end_if_broken()

    def _say(self, name: str, state: str, **figures: Any) -> None:
        self.lines.write(stage=self.stage, case=name, part=self.part, state=state, **figures)
        print(f"[{self.stage}] {name}: {state} {figures.get('cause', '')}", flush=True)

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


def judged(error: Exception) -> tuple[str, Figures]:
    """The state that an exception means, and what to say with it."""
    if isinstance(error, LeftOut):
        return LEFT_OUT, {"cause": str(error)}
    if isinstance(error, Late):
        return LATE, {"cause": str(error), **error.figures}
    if isinstance(error, ImportError) and _is_absent(error.name):
        return LEFT_OUT, {"cause": f"needs {str(error.name).split('.')[0]}"}
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
