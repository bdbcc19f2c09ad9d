"""SCX beside what would run otherwise, on this machine: operations, whole models, and the first call.

Every case is on the disk as soon as it is measured; an interrupted run keeps what it has. What is asked of comes first,
a few rounds of each; then a few of everything else; then more, until the time is up.
"""

import argparse
import importlib
import math
import sys
import time
from typing import Any

import torch

from bench.lines import FAILED, Lines, read
from bench.model_cases import left_out
from bench.operation_cases import cases
from bench.operations import measure_ceilings
from bench.provenance import RESULTS, machine_name, provenance, write_json
from bench.report import show, write_report
from bench.results import content_of
from bench.rounds import Job, in_rounds
from bench.work import Work

LATEST = RESULTS.parent / "latest"
MINUTES = {"cuda": 7.8, "cpu": 3.3}
SUITES = {
    "host time": "bench.host",
    "whole models": "bench.model",
    "operations": "bench.operations",
    "the channel between two processes": "bench.channel",
    "first calls": "bench.first_call",
}
"""Modules whose `jobs` are measured, by what they are about. A machine may lack a package that one needs."""
DEAR = 30.0
"""Seconds beyond which a job comes last: where time runs out, it costs the fewest cases."""


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", metavar="WORDS", help="cases whose name contains one of these words")
    parser.add_argument("--minutes", type=float, help="begin no further case after these (default: 7.8; 3.3 on a CPU)")
    parser.add_argument("--all", action="store_true", help="also what takes too long on this machine, however long")
    parser.add_argument("--keep", action="store_true", help="write to bench/results instead of bench/latest")
    parser.add_argument("--commit", help="what to call the code where the checkout has no history")
    return parser.parse_args()


def wanted_jobs(work: Work, device: torch.device, everything: bool, only: str) -> list[Job]:
    """Every suite's jobs whose id contains one of the words, if there are any. One that lacks a package is named."""
    words = only.lower().replace(",", " ").split()
    found: list[Job] = []
    for what, module in SUITES.items():

        def add(module: str = module) -> None:
            found.extend(importlib.import_module(module).jobs(device, everything))

        work.case(what, add)
    wanted = [job for job in found if not words or any(word in job.id.lower() for word in words)]
    return sorted(wanted, key=lambda job: job.usual_seconds() > DEAR)


def measure(lines: Lines, about: dict[str, Any], options: argparse.Namespace, device: torch.device) -> None:
    """Measure what was asked for, after the machine's ceilings in the dtypes and rounds of the operations among it."""
    minutes = math.inf if options.all else options.minutes or MINUTES[device.type]
    of_machine, work = Work("ceilings", lines, math.inf), Work("bench", lines, math.inf)
    of_machine.case("versions", lambda: {"result": about})
    jobs = wanted_jobs(work, device, options.all, options.only)
    of_machine.until = work.until = time.monotonic() + 60 * minutes
    ids = {job.id for job in jobs}
    if asked := [case for case in cases(device.type == "cuda") if case.id in ids]:
        dtypes, rounds = (sorted({getattr(case, name) for case in asked} - {0}) for name in ("dtype", "rounds"))
        of_machine.case("ceilings", lambda: {"result": measure_ceilings(device, dtypes, rounds)})
    in_rounds(work, jobs)


def main() -> int:
    """Returns 0, 1 if something of SCX failed, 130 after an interruption."""
    options = arguments()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    about = provenance(options.commit)
    path = (RESULTS if options.keep else LATEST) / f"{machine_name(about)}.json"
    lines = Lines(LATEST / f"{path.stem}.jsonl")
    LATEST.mkdir(parents=True, exist_ok=True)
    lines.path.unlink(missing_ok=True)
    for text in about["warnings"]:
        print(f"doubtful: {text}", flush=True)
    interruption, start = [], time.monotonic()
    try:
        measure(lines, about, options, device)
    except KeyboardInterrupt:
        interruption = ["everything after an interruption"]
    said = read(lines.path)
    content = {"provenance": about, **content_of(said)}
    content["left_out"] = [*left_out(device.type == "cuda", options.all), *content["left_out"], *interruption]
    content |= {"seconds": round(time.monotonic() - start, 1), "interrupted": bool(interruption)}
    show(content)
    print("written:", write_json(path, content), *write_report(content, path))
    if interruption:
        return 130
    return 1 if any(line["state"] == FAILED for line in said) else 0


if __name__ == "__main__":
    sys.exit(main())
