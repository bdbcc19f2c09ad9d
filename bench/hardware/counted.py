"""Operations that marks are about, once each, for whoever counts what their kernels do: `python -m
bench.hardware.counted SECONDS [--rehearsal]`.

Around each operation an idle kernel is launched, the n-th of n programs: the tool that counts says what was launched,
and nothing about why."""

import sys
import time

import torch

from bench.contest import SCX, Case
from bench.hardware.idle import idle
from bench.hardware.operations import by_kernels
from bench.hardware.sizes import counted_cases, device_of
from bench.operation_cases import OPERATIONS


@torch.no_grad()
def call(case: Case, device: torch.device, number: int) -> None:
    operation = OPERATIONS[case.operation]
    inputs = operation.make(case, device)
    (ours,) = (contestant for contestant in operation.contestants(case) if contestant.kind == SCX)
    anything = torch.empty(1, device=device)
    idle(anything, 2 * number + 1)
    with by_kernels(device), ours.within():
        ours.call(inputs)
    idle(anything, 2 * number + 2)
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def main() -> None:
    """Every case that begins within the seconds, so that the tool, which writes at the end, comes to write."""
    until = time.monotonic() + float(sys.argv[1])
    rehearsal = "--rehearsal" in sys.argv
    torch.manual_seed(0)
    for number, case in enumerate(counted_cases(rehearsal)):
        if time.monotonic() > until:
            break
        call(case, device_of(rehearsal), number)


if __name__ == "__main__":
    main()
