"""Cases that are measured in rounds, breadth first: what is asked of, a few rounds each; then a few of all others; then
more of everything, as time allows on this machine."""

import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from bench.lines import LATE
from bench.work import Figures, Work, outcome, passed


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


class Course:
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
        self.has_ended = True  # should it fail: a generator that raised gives nothing more
        entries = list(itertools.islice(self._steps, wanted))
        self.has_ended = len(entries) < wanted
        return passed({"id": self.job.id, **entries[-1]}) if entries else {}


def pace(courses: Iterable[Course]) -> float:
    """How long this machine took for the few rounds of what was begun, over what a usual one takes."""
    begun = [course for course in courses if course.seconds]
    usual = sum(course.usual for course in begun)
    return sum(course.seconds[0] for course in begun) / usual if usual else 1.0


def in_rounds(work: Work, jobs: Iterable[Job]) -> None:
    """Measure the few rounds of every marked job, then those of every other one, then a round of each in turn, until
    all have enough or time is up. Nothing is begun that time does not suffice for, going by how long this machine took
    for what came before; what was not begun at all is named."""
    courses = [Course(job) for job in jobs]
    marked, others = ([one for one in courses if one.job.is_marked is wanted] for wanted in (True, False))
    for turn in itertools.chain((marked, others), itertools.repeat(courses)):
        went_on = [_goes_on(work, course, pace(courses)) for course in turn]
        if turn is courses and not any(went_on):
            break
    if late := [course.job.id for course in courses if not course.seconds]:
        work.say(f"{len(late)} cases", LATE, cause=f"no time: {', '.join(late)}")


def _goes_on(work: Work, course: Course, pace: float) -> bool:
    """Measure a course's next rounds, if it has any and there is time for them."""
    if course.has_ended or work.left() < course.expected(pace):
        return False
    start = work.clock()
    state, figures = outcome(course.take)
    course.seconds.append(work.clock() - start)
    if figures:
        work.say(course.job.id, state, seconds=round(course.seconds[-1], 2), **figures)
    return bool(figures)
