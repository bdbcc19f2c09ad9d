"""Stage: the operations that the kernels' marks are about, beside their rivals: device time by graph replays on
rotating inputs, and the host's time of a call apart from it."""

from functools import partial
from typing import Any

import torch

from bench.contest import Case
from bench.hardware.sizes import device_of, marked_cases
from bench.hardware.work import CaseFailed, Work
from bench.operations import measure
from bench.results import failures

MILLISECONDS, REHEARSED = 12.0, 1.0


def run(work: Work) -> None:
    for case in marked_cases(work.rehearsal):
        work.case(case.id, partial(measured, case, device_of(work.rehearsal), work.rehearsal), limit=25, least=3)


def measured(case: Case, device: torch.device, rehearsal: bool) -> dict[str, Any]:
    """Raises: CaseFailed if a contestant of ours gives a wrong result or none; the others' times are in its figures."""
    entry = {"id": case.id, **measure(case, device, REHEARSED if rehearsal else MILLISECONDS)}
    if wrong := failures({"cases": [entry]}):
        raise CaseFailed(wrong[0], result=entry)
    if "status" in entry:
        raise CaseFailed(entry["status"], result=entry)
    return {"result": entry}
