"""Stages as processes: each part in a session of its own, watched until it ends or its limit comes, then removed with
everything it started."""

import contextlib
import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.hardware.process import EVERYTHING, NO_GPU
from bench.hardware.stages import Stage
from bench.lines import ENDED, FAILED, LATE, LEFT_OUT, PASSED, WRONG, Line, Lines, ended_cases, open_case, read
from bench.work import BROKEN

ROOT = Path(__file__).parents[2]
GRACE = 2.0
"""Seconds between the request to end and the killing, both within the limit."""
LEAST = 5.0
"""Seconds without which no stage is begun, and no process begun again."""
MARK = "SCX_HARDWARE_STAGE"
"""A variable in the environment of everything that a stage starts, by which what left its session is found."""
LOG_BYTES = 1_200_000
"""Of a stage's output that are kept from its beginning; beyond them the last ones."""
LAST_BYTES = 50_000


def share_of_spare(left: float, stages: Sequence[Stage]) -> float:
    """Seconds beyond its limit for the first of the stages that are still to run, of those that none of them needs."""
    takers = sum(stage.takes_spare for stage in stages)
    spare = left - sum(stage.seconds for stage in stages)
    return max(0.0, spare) / takers if stages[0].takes_spare else 0.0


class Log(io.FileIO):
    """The output of all processes, in one file."""

    def keep(self, text: bytes) -> bool:
        """Whether it could be written: on a full disk, or once the run is over, it is not, and nobody waits for it."""
        try:
            self.write(text)
        except (OSError, ValueError):
            return False
        return True


class Part:
    """A process of a stage, leader of its own session, and the thread that reads what it prints, and cuts a flood.

    Args:
        room: bytes of its output that are kept from the beginning.
        offset: byte of the lines' file where its own begin.
    """

    def __init__(
        self, number: int, command: list[str], environment: dict[str, str], log: Log, room: int, offset: int
    ) -> None:
        self.number, self.offset = number, offset
        self._log, self._room = log, room
        self._last: deque[bytes] = deque()
        self._dropped = 0
        pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        self.process = subprocess.Popen(command, env=environment, cwd=ROOT, start_new_session=True, **pipes)
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        with self.process.stdout as pipe:
            while chunk := os.read(pipe.fileno(), 65_536):
                kept, rest = chunk[: self._room], chunk[self._room :]
                self._room -= len(kept)
                self._dropped += 0 if self._log.keep(kept) else len(kept)
                if rest:
                    self._last.append(rest)
                while sum(map(len, self._last)) > LAST_BYTES + 65_536:
                    self._dropped += len(self._last.popleft())

    def signal(self, number: int) -> None:
        """To the whole session's group, also after its leader has ended."""
        _signal(os.killpg, self.process.pid, number)

    def close(self) -> None:
        """After its end: write what was held back. What is left in the pipe of a process that is not ours is lost."""
        self._reader.join(0.5)
        if self._dropped:
            self._log.keep(f"\n[... {self._dropped:,} bytes of output left out ...]\n".encode())
        self._log.keep(b"".join(self._last))


@dataclass
class Runner:
    """Runs stages into one folder.

    Args:
        folder: for `stages.jsonl` and `log.txt`.
        seconds: of all stages together.
        rehearsal: on the CPU, at small sizes.
        again: lines of an earlier run.
    """

    folder: Path
    seconds: float
    rehearsal: bool = False
    again: Path | None = None
    environment: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.lines = Lines(self.folder / "stages.jsonl")
        self.since = self.lines.size()
        self._end = time.monotonic() + self.seconds

    def read(self) -> list[Line]:
        """The lines of this run."""
        return read(self.lines.path, self.since)

    def run(self, stages: tuple[Stage, ...]) -> None:
        """Every stage in turn, whatever happens to the others. After an interruption the lines say so."""
        log = Log(self.folder / "log.txt", "a")
        try:
            for number, stage in enumerate(stages):
                left = self._end - time.monotonic()
                kept = sum(later.seconds for later in stages[number + 1 :] if later.is_last)
                self._run_within(stage, stage.seconds + share_of_spare(left, stages[number:]), left - kept, log)
        finally:
            log.close()

    def _run_within(self, stage: Stage, seconds: float, left: float, log: Log) -> None:
        if left < LEAST:
            self._say(stage, LATE, 0.0, cause=f"left out, no time: {max(0.0, left):.0f} s left")
            return
        if not self.rehearsal and not stage.anywhere and self.lacks_gpu():
            self._say(stage, LEFT_OUT, 0.0, cause=NO_GPU)
            return
        log.keep(f"\n===== {stage.name}: {stage.about}\n".encode())
        start, offset = time.monotonic(), self.lines.size()
        limit = min(seconds, left)
        watched = _Watched(self, stage, start + limit, offset, log)
        try:
            watched.run()
        except BaseException:
            watched.remove("interrupted")
            self._say(stage, FAILED, time.monotonic() - start, limit=limit, cause="interrupted")
            raise
        state, told = verdict(read(self.lines.path, offset), stage.name, watched.was_late)
        self._say(stage, state, time.monotonic() - start, limit=round(limit, 1), **told)

    def lacks_gpu(self) -> bool:
        """Whether a stage looked for one and found none."""
        return any(line["state"] == LEFT_OUT and line.get("cause") == NO_GPU for line in self.read())

    def _say(self, stage: Stage, state: str, seconds: float, **told: Any) -> None:
        self.lines.write(stage=stage.name, state=state, seconds=round(seconds, 1), **told)
        print(f"{stage.name}: {state}, {seconds:.0f} s {told.get('cause', '')}", flush=True)


class _Watched:
    """One stage's processes from their start to their end."""

    def __init__(self, runner: Runner, stage: Stage, until: float, offset: int, log: Log) -> None:
        self.runner, self.stage, self.until, self.offset, self.log = runner, stage, until, offset, log
        self.was_late = False
        self.mark = uuid.uuid4().hex
        self.count = 1 if runner.rehearsal else stage.parts
        self.parts: list[Part] = []

    def run(self) -> None:
        self.parts = [self._begin(number) for number in range(self.count)]
        while self.parts and time.monotonic() < self.until - GRACE:
            for part in [part for part in self.parts if part.process.poll() is not None]:
                self.parts.remove(part)
                self._ended(part)
            time.sleep(0.02)
        self.was_late = bool(self.parts)
        self.remove()

    def _begin(self, number: int) -> Part:
        runner, stage = self.runner, self.stage
        again = str(runner.again) if runner.again and not stage.is_whole else None
        given = {"module": stage.module, "packages": stage.packages, "anywhere": stage.anywhere, "stage": stage.name}
        given |= {"lines": str(runner.lines.path), "since": runner.since, "again": again, "rehearsal": runner.rehearsal}
        given |= {"until": self.until - GRACE, "part": number, "parts": self.count}
        command = [sys.executable, "-m", "bench.hardware.process", json.dumps(given)]
        environment = {**os.environ, **runner.environment, MARK: self.mark, "PYTHONUNBUFFERED": "1"}
        if self.count > 1:
            environment["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // self.count))
        return Part(number, command, environment, self.log, LOG_BYTES // self.count, self.runner.lines.size())

    def _ended(self, part: Part) -> None:
        """A part that ended by itself: begun again where it got on and a case took it along."""
        part.signal(signal.SIGKILL)  # whoever it left behind
        part.close()
        code = part.process.returncode
        if code == 0:
            return
        own = [line for line in read(self.runner.lines.path, part.offset) if line.get("part") == part.number]
        case = open_case(own, self.stage.name, part.number)
        if case is not None:
            self._end_case(case, FAILED, how_it_ended(code, case, time.time()))
        elif code != BROKEN:
            self._end_case({"case": EVERYTHING, "part": part.number}, FAILED, f"{how_it_ended(code)} outside of a case")
        if own and self.until - GRACE - time.monotonic() > LEAST:
            self.parts.append(self._begin(part.number))

    def remove(self, cause: str = "the stage's time was up") -> None:
        """End what still runs, first by asking; then its sessions; then whoever left them. `cause` is told of the cases
        that they were at."""
        for part in self.parts:
            part.signal(signal.SIGTERM)
        end = time.monotonic() + GRACE - 1
        while time.monotonic() < end and any(part.process.poll() is None for part in self.parts):
            time.sleep(0.02)
        for part in self.parts:
            part.signal(signal.SIGKILL)
        for process in marked(self.mark):
            _signal(os.kill, process, signal.SIGKILL)
        for part in self.parts:
            try:
                part.process.wait(0.4)
            except subprocess.TimeoutExpired:  # it hangs in the GPU's driver, where no signal reaches it
                self.log.keep(f"\n[process {part.process.pid} cannot be ended]\n".encode())
            part.close()
            lines = read(self.runner.lines.path, self.offset)
            case = open_case(lines, self.stage.name, part.number)
            if case is not None:
                self._end_case(case, LATE, cause)
        self.parts = []

    def _end_case(self, case: Line, state: str, cause: str) -> None:
        seconds = round(time.time() - case["at"], 2) if "at" in case else 0.0
        about = {"stage": self.stage.name, "case": case["case"], "part": case["part"]}
        self.runner.lines.write(**about, state=state, seconds=seconds, cause=cause)


def how_it_ended(code: int, case: Line | None = None, now: float = 0.0) -> str:
    """What a process's exit status says about the case that it was at."""
    if case is not None and code == 1 and now - case["at"] >= case["limit"]:
        return f"no end within {case['limit']:.0f} s"
    if code >= 0:
        return f"its process ended with {code}"
    try:
        return f"its process was ended by {signal.Signals(-code).name}"
    except ValueError:
        return f"its process was ended by signal {-code}"


def verdict(lines: list[Line], stage: str, was_late: bool) -> tuple[str, dict[str, Any]]:
    """A stage's state by the lines of its cases, with their counts and the first cause that is not well."""
    counts = {state: len(ended_cases(lines, stage, (state,))) for state in ENDED}
    state = PASSED if counts[PASSED] else LEFT_OUT
    if counts[FAILED]:
        state = FAILED
    elif was_late or counts[LATE]:
        state = LATE
    told: dict[str, Any] = {"cases": counts}
    causes = [line.get("cause") for line in lines if "case" in line and line["state"] in WRONG]
    if state != PASSED:
        told["cause"] = causes[0] if causes else ("the stage's time was up" if was_late else "it had no case to run")
    return state, told


def marked(mark: str) -> list[int]:
    """Processes with a stage's mark in their environment, wherever they went; none where there is no /proc."""
    wanted, found = f"{MARK}={mark}".encode(), []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            environment = (entry / "environ").read_bytes()
        except OSError:  # it has ended, or is not ours
            continue
        if wanted in environment.split(b"\0"):
            found.append(int(entry.name))
    return found


def _signal(send: Callable[[int, int], None], process: int, number: int) -> None:
    """Whoever has ended needs none."""
    with contextlib.suppress(ProcessLookupError):
        send(process, number)
