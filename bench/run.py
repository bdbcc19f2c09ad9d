"""One run: which cases are wanted, what went wrong with which, and a file that holds whatever was measured so far."""

import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from bench.provenance import write_json

__all__ = ["OUT_OF_MEMORY", "Run", "attempt"]

OUT_OF_MEMORY = "out of memory"


def attempt(call: Callable[[], Any]) -> tuple[Any, str | None]:
    """(result, None), or (None, what happened). Whatever a contestant raises ends that contestant, not the run."""
    try:
        return call(), None
    except (torch.OutOfMemoryError, MemoryError):
        problem = OUT_OF_MEMORY
    except Exception as error:
        text = str(error).strip() or "no message"
        # The CPU's allocator has no exception of its own.
        is_memory = "can't allocate memory" in text or "not enough memory" in text
        problem = OUT_OF_MEMORY if is_memory else f"raised {type(error).__name__}: {text.splitlines()[0][:200]}"
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return None, problem


class Run:
    """Collects cases into one result file, which is written anew after each of them.

    Args:
        path: the file.
        about: its provenance.
        only: words, of which a case's id must contain one; none for every case.
        minutes: after which no further case is begun; what was left out is named in the file.
    """

    def __init__(
        self, path: Path, about: dict[str, Any], only: Iterable[str] = (), minutes: float | None = None
    ) -> None:
        self.path = path
        self.only = [word.lower() for word in only]
        self._start = time.monotonic()
        self._end = None if minutes is None else self._start + 60 * minutes
        self._late: list[str] = []
        self.content: dict[str, Any] = {"provenance": about, "ceilings": {}, "left_out": [], "cases": []}

    def wants(self, case_id: str) -> bool:
        """Whether the case was asked for."""
        return not self.only or any(word in case_id.lower() for word in self.only)

    def leave_out(self, what: str) -> None:
        """Say in the result that something was not measured, and why."""
        self.content["left_out"].append(what)

    def measure(self, case_id: str, function: Callable[[], dict[str, Any]], share: float = 1.0) -> None:
        """Measure a case if it is wanted and there is time: `function` gives its entry.

        Args:
            share: of the run's minutes, after which this case is not begun any more.
        """
        if not self.wants(case_id):
            return
        if self._end is not None and time.monotonic() > self._start + share * (self._end - self._start):
            self._late.append(case_id)
            return
        entry = {"id": case_id, **function()}
        self.content["cases"].append(entry)
        self.write()
        print(f"{time.monotonic() - self._start:6.1f} s  {case_id}: {progress(entry)}", flush=True)

    def write(self) -> None:
        self.content["seconds"] = round(time.monotonic() - self._start, 1)
        write_json(self.path, self.content)

    def finish(self, interrupted: bool) -> None:
        """Write the file for the last time, with what came too late."""
        if self._late:
            self.leave_out(f"{len(self._late)} cases for lack of time: {', '.join(self._late)}")
        if interrupted:
            self.leave_out("everything after an interruption")
        self.content["interrupted"] = interrupted
        self.write()


def progress(entry: dict[str, Any]) -> str:
    """One line about a measured case."""
    if "status" in entry:
        return entry["status"]
    told = []
    for contestant in entry["contestants"]:
        status = contestant.get("status")
        result = f"{contestant['ms']['median']:.4g} ms" if status is None else status.split(":")[0]
        told.append(f"{contestant['name']} {result}")
    return "; ".join(told)
