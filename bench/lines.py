"""Lines of JSON that say how a run stands. Each is on the disk before the next step is taken, so that whoever is
killed, or loses the machine, keeps what was said.

A line is of a case (`stage`, `case`, `part`, `state`) or of a whole stage (without `case`). States: "begun", and then
one of ENDED.
"""

import json
import math
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

Line = dict[str, Any]

BEGUN, PASSED, FAILED, LATE, LEFT_OUT = "begun", "passed", "failed", "late", "left out"
WRONG = (FAILED, LATE, LEFT_OUT)
ENDED = (PASSED, *WRONG)


class Lines:
    """A file that several processes append to."""

    def __init__(self, path: Path) -> None:
        self.path = Path(path)

    def write(self, **line: Any) -> None:
        """Append a line, in one piece, and wait until it is on the disk. Raises OSError."""
        text = json.dumps({"at": round(time.time(), 3), **_finite(line)}, ensure_ascii=False, allow_nan=False)
        file = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            os.write(file, f"{text}\n".encode())
            os.fsync(file)
        finally:
            os.close(file)

    def size(self) -> int:
        """Bytes so far: where the lines of whoever comes next begin."""
        return self.path.stat().st_size if self.path.exists() else 0


def read(path: Path, offset: int = 0) -> list[Line]:
    """The lines from a byte on. One that a full disk cut short is not among them."""
    if not Path(path).exists():
        return []
    with open(path, "rb") as file:
        file.seek(offset)
        return list(_parsed(file.read().decode(errors="replace")))


def ended_cases(lines: list[Line], stage: str, states: tuple[str, ...] = ENDED) -> set[str]:
    """Names of a stage's cases that ended in one of these states."""
    return {line["case"] for line in lines if line.get("stage") == stage and "case" in line and line["state"] in states}


def open_case(lines: list[Line], stage: str, part: int) -> Line | None:
    """The line of the case that a part of a stage has begun and not ended."""
    own = [line for line in lines if line.get("stage") == stage and line.get("part") == part and "case" in line]
    ended = {line["case"] for line in own if line["state"] != BEGUN}
    return next((line for line in own if line["case"] not in ended), None)


def _parsed(text: str) -> Iterator[Line]:
    for row in text.splitlines():
        try:
            line = json.loads(row)
        except ValueError:
            continue
        if isinstance(line, dict) and "stage" in line and "state" in line:
            yield line


def _finite(value: Any) -> Any:
    """JSON has no infinities: they are written as text."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {str(key): _finite(x) for key, x in value.items()}
    return [_finite(x) for x in value] if isinstance(value, (list, tuple)) else value
