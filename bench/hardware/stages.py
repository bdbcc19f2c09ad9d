"""The stages: what each is about, where its work is, and how long it may take. The order is the order of the run: what
would make later figures worthless comes first, and what is measured is never the first call of a process."""

import os
from dataclasses import dataclass
from typing import Any

SECONDS = 480.0
"""Of all stages together; their limits add up to no more."""
CORES = os.cpu_count() or 1


@dataclass(frozen=True)
class Stage:
    """One stage.

    Args:
        name: in lines, table and `--only`.
        module: whose `run(work)` does it.
        seconds: its limit.
        about: a few words.
        parts: processes that share its cases on a GPU machine; a rehearsal has one.
        anywhere: needs no GPU.
        takes_spare: time that other stages left over is shared among those that can use any.
        is_last: runs whatever else was asked for, in time that is kept for it.
        is_whole: run again, it is run as a whole: other figures are read beside its own.
        needs: stages that run before it, whatever was asked for: what they measured or compiled is used.
        packages: without which nothing of it runs; others are missed, and named, case by case.
    """

    name: str
    module: str
    seconds: float
    about: str
    parts: int = 1
    anywhere: bool = False
    takes_spare: bool = False
    is_last: bool = False
    is_whole: bool = False
    needs: tuple[str, ...] = ()
    packages: tuple[str, ...] = ("torch", "triton")


def _stage(name: str, seconds: float, about: str, **options: Any) -> Stage:
    return Stage(name, f"bench.hardware.{name}", seconds, about, **options)


COMPILED = ("compilation",)
STAGES = (
    _stage("ceilings", 30, "versions, bandwidth, rates, cost of a launch", is_whole=True, packages=("torch",)),
    _stage("operations", 46, "every operation against the reference, and 50 repeats bit for bit", parts=min(4, CORES)),
    _stage("compilation", 46, "kernels of later stages, side by side", is_whole=True, parts=min(16, CORES)),
    _stage("blocks", 45, "two blocks at full width against the plain model", parts=min(12, CORES), needs=COMPILED),
    _stage("parity", 70, "the test suite's parity, production tiles first, over all cores", takes_spare=True),
    _stage("sanitizer", 35, "memory and race checks of every operation", parts=2, needs=COMPILED),
    _stage("marks", 60, "operations by graph replay, host and device time apart", needs=("ceilings", *COMPILED)),
    _stage("models", 65, "whole models beside plain transformers", takes_spare=True, needs=COMPILED),
    _stage("profiles", 34, "where the time of a prefill and of a token goes, and the host's"),
    _stage("counters", 33, "what marked operations' kernels do, by the GPU's own counters", needs=COMPILED),
    _stage("report", 15, "tables and pictures", anywhere=True, is_last=True, is_whole=True, packages=("torch",)),
)
