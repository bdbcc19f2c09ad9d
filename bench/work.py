"""What whoever measures is given: a way to run cases one after the other, each of which may fail by itself, and a way
to measure many of them in rounds until time is up."""

import faulthandler
import importlib.util
import itertools
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
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


@dataclass(frozen=True)
class Job:
    """A case that is measured in rounds.

    Args:
        id: its name.
        rounds: begins it. Each step gives the figures of all rounds so far; it ends when they are enough.
        is_marked: something is asked of its figures, so they come first.
        few: rounds without which its figures say little.
        seconds: about what these take on a usual machine, two cores or a GPU of today's; a function where that hangs on
            what was measured before.
    """

    id: str
    rounds: Callable[[], Iterator[Figures]]
    is_marked: bool = False
    few: int = 1
    seconds: float | Callable[[], float] = 1.0

    def usual_seconds(self) -> float:
        return self.seconds() if callable(self.seconds) else self.seconds


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
            self._say(name, LATE, cause=f"no time: {max(0.0, self.left()):.0f} s left, it needs {least:.0f}")
            return
        self._say(name, BEGUN, limit=round(limit, 1))
        # A call that never comes back from the GPU's driver holds Python's lock: no signal handler would run.
        if limit < self.left():
            faulthandler.dump_traceback_later(limit, exit=True)
        start = self.clock()
        try:
            state, figures = outcome(run)
        finally:
            faulthandler.cancel_dump_traceback_later()
        self._say(name, state, seconds=round(self.clock() - start, 2), **figures)
        if state == FAILED:
            self._end_if_broken()

    def in_rounds(self, jobs: Iterable[Job]) -> None:
        """Measure breadth first: the few rounds of every marked job, then those of every other one, then a round of
        each in turn, until all have enough or time is up. Nothing is begun that time does not suffice for, going by how
        long this machine took for what came before; what was not begun at all is named."""
        courses = [_Course(job) for job in jobs]
        marked, others = ([one for one in courses if one.job.is_marked is wanted] for wanted in (True, False))
        for turn in itertools.chain((marked, others), itertools.repeat(courses)):
            went_on = [self._goes_on(course, courses) for course in turn]
            if turn is courses and not any(went_on):
                break
        if late := [course.job.id for course in courses if not course.seconds]:
            self._say(f"{len(late)} cases", LATE, cause=f"no time: {', '.join(late)}")

    def _goes_on(self, course: "_Course", courses: Iterable["_Course"]) -> bool:
        """Measure a course's next rounds, if it has any and there is time for them."""
        if course.has_ended or self.left() < course.expected(pace(courses)):
            return False
        start = self.clock()
        state, figures = outcome(course.take)
        course.seconds.append(self.clock() - start)
        if figures:
            self._say(course.job.id, state, seconds=round(course.seconds[-1], 2), **figures)
        return bool(figures)

    def _say(self, name: str, state: str, **figures: Any) -> None:
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


class _Course:
    """How far a job is: the seconds of its few rounds, then of each later one."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.seconds: list[float] = []
        self.has_ended = False
        self.usual = 0.0
        self._steps = job.rounds()

    def expected(self, pace: float) -> float:
        """Seconds of what comes next, on a machine that takes `pace` times as long as a usual one."""
        if not self.seconds:
            return pace * self.job.usual_seconds()
        return self.seconds[-1] / (self.job.few if len(self.seconds) == 1 else 1)

    def take(self) -> Figures:
        """Measure the few rounds, or one more. Returns nothing where there were enough. Raises: CaseFailed."""
        wanted = 1 if self.seconds else self.job.few
        self.usual = self.usual or self.job.usual_seconds()
        try:
            entries = list(itertools.islice(self._steps, wanted))
        except Exception:
            self.has_ended = True
            raise
        self.has_ended = len(entries) < wanted
        return passed({"id": self.job.id, **entries[-1]}) if entries else {}


def pace(courses: Iterable[_Course]) -> float:
    """How long this machine took for the few rounds of what was begun, over what a usual one takes."""
    begun = [course for course in courses if course.seconds]
    return sum(one.seconds[0] for one in begun) / sum(one.usual for one in begun) if begun else 1.0


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
