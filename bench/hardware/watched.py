"""Operations once each, for a tool that watches this process: `python -m bench.hardware.watched WHAT SECONDS
[--rehearsal]`, where WHAT is "counted" or "sanitized". `watch` starts it under the tool.

The tool knows nothing of operations. Of a sanitized one a line before it says which it is. Around a counted one an idle
kernel is launched, the n-th of n programs."""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from bench.contest import SCX
from bench.hardware.operations import call_ours
from bench.hardware.sizes import counted_cases, device_of, sanitized_cases
from bench.work import LeftOut, Work

ROOT = Path(__file__).parents[2]
TITLE = "operation: "
"""Before an operation's name, in the output of the process that is watched."""
TO_KILL = 1.0
"""Seconds before a stage's end at which what has not ended is killed."""


def watch(
    what: str, work: Work, tool: str, options: Sequence[str], *, to_write: float = TO_KILL, **environment: str
) -> tuple[int | None, str, str]:
    """Run `what` under a tool; in a rehearsal without it.

    Args:
        to_write: seconds that the tool needs after the last operation, and after the request to end.

    Returns: exit status, None if it had to be interrupted, upon which the tool writes what it has; output; the tool.
    Raises: LeftOut where the tool is missing.
    """
    found = shutil.which(tool)
    if found is None and not work.rehearsal:
        raise LeftOut(f"needs {tool}")
    command = [sys.executable, "-m", "bench.hardware.watched", what, str(work.left() - 2 * to_write)]
    command = [*command, "--rehearsal"] if work.rehearsal else [str(found), *options, *command]
    with tempfile.TemporaryFile("w+", errors="replace") as output:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env={**os.environ, **environment},
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        code = None
        try:
            code = process.wait(max(0.0, work.left() - to_write))
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGINT)
            try:
                process.wait(max(0.0, work.left() - TO_KILL))
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        output.seek(0)
        return code, output.read(), "none: a rehearsal" if work.rehearsal else str(found)


def sanitized(rehearsal: bool, until: float) -> None:
    """Inputs are drawn on the CPU: only the operation's own kernels run on the device, and are watched."""
    for case in sanitized_cases(rehearsal):
        print(f"{TITLE}{case.id}", flush=True)
        call_ours(case, device_of(rehearsal), drawn_on=torch.device("cpu"))


def counted(rehearsal: bool, until: float) -> None:
    """Every case that begins in time, so that the tool, which writes at the end, comes to write."""
    from bench.hardware.idle import idle  # needs Triton  # noqa: PLC0415

    device = device_of(rehearsal)
    anything = torch.empty(1, device=device)

    @contextmanager
    def between_idle_kernels(number: int) -> Iterator[None]:
        idle(anything, 2 * number + 1)
        yield
        idle(anything, 2 * number + 2)

    for number, case in enumerate(counted_cases(rehearsal)):
        if time.monotonic() > until:
            break
        call_ours(case, device, (SCX,), around=lambda number=number: between_idle_kernels(number))


def main() -> None:
    what, seconds = sys.argv[1:3]
    torch.manual_seed(0)
    {"counted": counted, "sanitized": sanitized}[what]("--rehearsal" in sys.argv, time.monotonic() + float(seconds))


if __name__ == "__main__":
    main()
