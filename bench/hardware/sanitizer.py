"""Stage: every operation once under compute-sanitizer, which finds what lies outside of its memory (memcheck) and what
meets in shared memory without a barrier (racecheck). A rehearsal runs the same operations without the tool."""

import re
from functools import partial
from typing import Any

from bench.hardware.watched import TITLE, watch
from bench.work import CaseFailed, Work

CHECKS = ("memcheck", "racecheck")
COMPLAINED = 86
PREFIX = "========= "
COMPLAINTS = ("Invalid", "Error:", "Misaligned", "Warning: Race", "Out-of-bounds")


def run(work: Work) -> None:
    for check in work.share(CHECKS[:1] if work.rehearsal else CHECKS):
        work.case(check, partial(sanitize, check, work), limit=work.left(), least=8)


def sanitize(check: str, work: Work) -> dict[str, Any]:
    """Raises: LeftOut where the tool is missing, CaseFailed with what it found."""
    options = ("--tool", check, "--error-exitcode", str(COMPLAINED), "--report-api-errors", "no")
    # Each tensor in memory of its own: inside the allocator's blocks a step too far meets the next tensor unnoticed.
    alone = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    code, text, tool = watch("sanitized", work, "compute-sanitizer", options, **alone)
    print(text[-20_000:], flush=True)
    begun = [line.removeprefix(TITLE) for line in text.splitlines() if line.startswith(TITLE)]
    found = complaints(text)
    others = {case: said for case, lines in found.items() if (said := [x for x in lines if is_of_others(x)])}
    found = {case: said for case, lines in found.items() if (said := [x for x in lines if not is_of_others(x)])}
    figures = {"operations": len(begun), "complaints": found, "complaints_of_others": others}
    if found:
        case, (first, *_) = next(iter(found.items()))
        raise CaseFailed(f"{len(found)} operations: {case}: {first}", **figures)
    place = begun[-1] if begun else "its start"
    if code is None:
        raise CaseFailed(f"no end in time, at {place}; nothing found until then", **figures)
    if code and not (others and code == COMPLAINED):
        raise CaseFailed(f"it ended with {code}, at {place}", **figures)
    return figures | {"tool": tool}


def is_of_others(complaint: str) -> bool:
    """Whether it is a race within a vendor's kernel: racecheck does not follow the barriers by which their warps hand
    tiles over, and reports cuBLAS's and cuDNN's. Accesses outside of memory count whosever they are."""
    race = re.search(r"Race reported between \w+ access at (\w+)", complaint)
    return race is not None and re.fullmatch(r"_\w+_kernel", race[1]) is None


def complaints(text: str) -> dict[str, list[str]]:
    """What the tool said of each operation, at most three lines of each."""
    found: dict[str, list[str]] = {}
    case = "before the first operation"
    for line in text.splitlines():
        if line.startswith(TITLE):
            case = line.removeprefix(TITLE)
        elif line.startswith(PREFIX) and line.removeprefix(PREFIX).lstrip().startswith(COMPLAINTS):
            said = found.setdefault(case, [])
            if len(said) < 3:
                said.append(line.removeprefix(PREFIX).strip())
    return found
