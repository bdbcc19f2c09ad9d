"""Every operation once, for whoever watches this process's memory: `python -m bench.hardware.sanitized [--rehearsal]`.

Before each operation a line says which one it is, so that what a watcher prints belongs to the line above it."""

import sys

import torch

from bench.contest import SCX, TRITON, Case, moved
from bench.hardware.operations import by_kernels
from bench.hardware.sanitizer import TITLE
from bench.hardware.sizes import device_of, sanitized_cases
from bench.operation_cases import OPERATIONS

CPU = torch.device("cpu")


@torch.no_grad()
def call(case: Case, device: torch.device) -> None:
    """Inputs are drawn on the CPU: only the operation's own kernels run on the device, and are watched."""
    operation = OPERATIONS[case.operation]
    inputs = moved(operation.make(case, CPU), device)
    for contestant in operation.contestants(case):
        if contestant.kind in (SCX, TRITON):
            with by_kernels(device), contestant.within():
                contestant.call(inputs)
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def main() -> None:
    torch.manual_seed(0)
    rehearsal = "--rehearsal" in sys.argv
    for case in sanitized_cases(rehearsal):
        print(f"{TITLE}{case.id}", flush=True)
        call(case, device_of(rehearsal))


if __name__ == "__main__":
    main()
