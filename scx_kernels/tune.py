"""`python -m scx_kernels.tune`: measure tiles on this machine's GPU and write its tile file.

For every shape, the candidates around the heuristic's tile are compiled, held against the reference and timed; the
fastest correct one becomes an entry where it beats the heuristic by more than the noise. Launchers read the file at
their first call, from the folder that SCX_TILES names or from the package.

Compiling takes most of the time, so other processes do it ahead, each a share of a shape's candidates, while shapes
that are compiled are timed. `--log` keeps every candidate's time, not only the fastest.
"""

import argparse
import json
import math
import multiprocessing
import os
import statistics
import sys
import time as clock
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import partial
from itertools import product as combinations
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from scx_kernels import tiles
from scx_kernels.kernels.launch import Target, target_of
from scx_kernels.subjects import DTYPE, SUBJECTS, Arguments, Result, Subject, tensors_of
from scx_kernels.timing import device_times

__all__ = ["SUBJECTS", "Subject", "Timed", "candidates", "main", "tune"]

# A candidate must be this much faster than the heuristic: less is within the noise of a measurement.
WORTH = 0.97
MILLISECONDS = 15.0
MOST_INPUTS = 16
NO_CODE = (
    triton.runtime.errors.OutOfResources,
    triton.runtime.errors.PTXASError,
    triton.compiler.errors.CompilationError,
)
"""What a tile raises that this device has no room for, or of which the compiler makes nothing: it is no candidate."""


class Timed(NamedTuple):
    """A candidate: milliseconds of a call, or why it is none."""

    tile: Arguments
    milliseconds: float | None
    problem: str = ""


def candidates(subject: Subject, target: Target) -> list[Arguments]:
    """The heuristic's tile first, then every one that differs from it in one or two meta-parameters."""
    start = subject.heuristic(target)
    found = [start]
    for first, second in combinations(subject.vary, repeat=2):
        for a, b in combinations(subject.vary[first], subject.vary[second]):
            tile = start | {first: a, second: b}
            if tile not in found:
                found.append(tile)
    return found


def _input_sets(subject: Subject, device: torch.device) -> list[Arguments]:
    """Inputs that together exceed the last cache twice: a repeated one would be read from there."""
    first = subject.make(device)
    if device.type != "cuda":
        return [first]
    size = sum(x.nbytes for x in first.values() if isinstance(x, Tensor))
    count = math.ceil(2 * torch.cuda.get_device_properties(device).L2_cache_size / size)
    return [first, *(subject.make(device) for _ in range(min(MOST_INPUTS, count) - 1))]


def _differs(got: Result, expected: Sequence[Tensor]) -> bool:
    """Whether an element is farther from the reference's than a few roundings of DTYPE, or no number."""
    return not all(
        bool(((x.float() - right).abs().max() <= 2.0**-6 * right.abs().max()).item())
        for x, right in zip(tensors_of(got), expected, strict=True)
    )


def measure(
    subject: Subject, device: torch.device, target: Target, time: Callable[[Sequence[Callable[[], Any]]], float]
) -> list[Timed]:
    """Every candidate of a subject, the heuristic's first.

    Args:
        time: milliseconds of one of several calls, the same work on different inputs.

    Raises: RuntimeError if the heuristic's own tile does not give the reference's result.
    """
    inputs = _input_sets(subject, device)
    arguments = inputs[0]
    expected = [x.float() for x in tensors_of(subject.expected(arguments))]
    found: list[Timed] = []
    for number, tile in enumerate(candidates(subject, target)):
        try:
            got = subject.run(arguments, tile)
        except NO_CODE as error:
            if number == 0:
                raise
            found.append(Timed(tile, None, type(error).__name__))
            continue
        if _differs(got, expected) or not subject.is_stored(arguments, got):
            if number == 0:
                raise RuntimeError(f"{subject.name}: the heuristic's tile {tile} gives a wrong result")
            found.append(Timed(tile, None, "wrong"))
            continue
        found.append(Timed(tile, time([partial(subject.run, given, tile) for given in inputs])))
    return found


def tune(
    subject: Subject, device: torch.device, target: Target, time: Callable[[Sequence[Callable[[], Any]]], float]
) -> dict[str, Any] | None:
    """The entry of a subject, or None where the heuristic's tile is as good as any. Arguments and errors as of
    `measure`."""
    return entry_of(subject, measure(subject, device, target, time))


def entry_of(subject: Subject, measured: Sequence[Timed]) -> dict[str, Any] | None:
    timed = [(one.milliseconds, one.tile) for one in measured if one.milliseconds is not None]
    (own, heuristic), (best, tile) = timed[0], min(timed, key=lambda pair: pair[0])
    if best > WORTH * own:
        return None
    return {
        "operation": subject.operation,
        "dtype": str(DTYPE).removeprefix("torch."),
        "variant": subject.variant,
        "sizes": subject.sizes,
        "tile": tile,
        "milliseconds": best,
        "heuristic": {"tile": heuristic, "milliseconds": own},
    }


def compile_share(number: int, device: torch.device, part: int, parts: int) -> None:
    """Run this part's candidates of a subject once: afterwards they lie in Triton's cache."""
    subject = SUBJECTS[number]
    arguments = subject.make(device)
    for tile in candidates(subject, target_of(device))[part::parts]:
        try:
            subject.run(arguments, tile)
        except NO_CODE:
            continue  # whoever times it says so


@contextmanager
def compiled_ahead(
    subjects: Iterable[Subject], device: torch.device, processes: int
) -> Iterator[dict[str, list[Future[None]]]]:
    """By subject what is to be waited for before it is timed. Subjects that nobody waits for any more are left out."""
    if processes < 2:
        yield {}
        return
    numbers = {subject.name: number for number, subject in enumerate(SUBJECTS)}
    pool = ProcessPoolExecutor(processes, multiprocessing.get_context("spawn"))
    try:
        yield {
            subject.name: [
                pool.submit(compile_share, numbers[subject.name], device, part, processes) for part in range(processes)
            ]
            for subject in subjects
        }
    finally:
        pool.shutdown(cancel_futures=True)


def _median_time(device: torch.device, calls: Sequence[Callable[[], Any]]) -> float:
    times, _ = device_times(calls, device, MILLISECONDS)
    return statistics.median(times)


def _provenance(target: Target) -> dict[str, Any]:
    return {
        "backend": target.backend,
        "arch": target.arch,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": " ".join(["python -m scx_kernels.tune", *sys.argv[1:]]),
    }


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m scx_kernels.tune", description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="parts of subjects' names, separated by commas, in this order")
    parser.add_argument("--write", type=Path, default=tiles.SHIPPED, help="folder of the file (default: the package)")
    parser.add_argument("--log", type=Path, help="file for every candidate's time, a line of JSON each subject")
    parser.add_argument("--seconds", type=float, default=math.inf, help="after which no subject is begun")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1, help="that compile ahead")
    options = parser.parse_args(arguments)
    asked = (subject for text in options.only.split(",") for subject in SUBJECTS if text in subject.name)
    chosen = list({subject.name: subject for subject in asked}.values())
    if not chosen:
        parser.error(f"--only {options.only!r} names none of: " + ", ".join(subject.name for subject in SUBJECTS))
    if not torch.cuda.is_available():
        print("No GPU here: tiles are measured on the device that uses them.", file=sys.stderr)
        return 1
    device = torch.device("cuda", torch.cuda.current_device())
    target, entries, until = target_of(device), [], clock.monotonic() + options.seconds
    with compiled_ahead(chosen, device, options.processes) as compiling:
        for number, subject in enumerate(chosen, 1):
            if clock.monotonic() > until:
                print(f"no time for {', '.join(left.name for left in chosen[number - 1 :])}", flush=True)
                break
            for share in compiling.get(subject.name, ()):
                share.result()
            measured = measure(subject, device, target, partial(_median_time, device))
            entry = entry_of(subject, measured)
            print(f"{number}/{len(chosen)} {subject.name}: {_told(entry)}", flush=True)
            if options.log is not None:
                with open(options.log, "a") as file:
                    file.write(json.dumps({"subject": subject.name, "timed": measured}) + "\n")
            entries += [entry] if entry else []
            # Written after every subject, so that an interrupted run keeps what it measured.
            tiles.TileFile(target.name, _provenance(target), tuple(entries)).write(options.write)
    print(f"written to {options.write / tiles.file_name(target.name)}")
    return 0


def _told(entry: dict[str, Any] | None) -> str:
    if entry is None:
        return "heuristic"
    return f"{entry['tile']} {entry['heuristic']['milliseconds'] / entry['milliseconds']:.2f} times as fast"


if __name__ == "__main__":
    sys.exit(main())
