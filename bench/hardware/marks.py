"""Stage: the operations that the kernels' marks are about, beside their rivals: device time by graph replays on
rotating inputs, and the host's time of a call apart from it."""

from functools import partial
from typing import Any

import torch

from bench.contest import Case
from bench.hardware.sizes import device_of, marked_cases
from bench.operations import measure
from bench.work import CaseFailed, Work, passed

MILLISECONDS, REHEARSED = 12.0, 1.0


def run(work: Work) -> None:
    milliseconds = REHEARSED if work.rehearsal else MILLISECONDS
    for case in marked_cases(work.rehearsal):
        work.case(case.id, partial(measured, case, device_of(work.rehearsal), milliseconds), limit=25, least=3)


def measured(case: Case, device: torch.device, milliseconds: float) -> dict[str, Any]:
    """Raises: CaseFailed also where nobody could be measured."""
    figures = passed({"id": case.id, **measure(case, device, milliseconds)})
    if "status" in figures["result"]:
        raise CaseFailed(figures["result"]["status"], **figures)
    return figures
