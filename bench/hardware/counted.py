"""Operations that marks are about, once each, for whoever counts what their kernels do: `python -m
bench.hardware.counted SECONDS [--rehearsal]`.

Before each operation a line says which one it is."""

import sys
import time

import torch

from bench.contest import SCX, Case
from bench.hardware.counters import TITLE
from bench.hardware.operations import by_kernels
from bench.hardware.sizes import counted_cases, device_of
from bench.operation_cases import OPERATIONS


@torch.no_grad()
def call(case: Case, device: torch.device) -> None:
    operation = OPERATIONS[case.operation]
    inputs = operation.make(case, device)
    (ours,) = (contestant for contestant in operation.contestants(case) if contestant.kind == SCX)
    with by_kernels(device), ours.within():
        ours.call(inputs)
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def main() -> None:
    """Every case that begins within the seconds, so that the tool, which writes at the end, comes to write."""
    until = time.monotonic() + float(sys.argv[1])
    rehearsal = "--rehearsal" in sys.argv
    torch.manual_seed(0)
    for case in counted_cases(rehearsal):
        if time.monotonic() > until:
            break
        print(f"{TITLE}{case.id}", flush=True)
        call(case, device_of(rehearsal))


if __name__ == "__main__":
    main()
