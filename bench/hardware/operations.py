"""Stage: every public operation at the sizes of Llama-3-8B, with the tiles that its heuristics choose: within twice
PyTorch's own error of float64, every element written, and fifty repeats bit for bit the same, which a race is not."""

import os
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor

import scx_kernels as ops
from bench.contest import SCX, TRITON, Case, Contestant, Inputs, Operation, copied, moved
from bench.hardware.sizes import checked_cases, device_of
from bench.operation_cases import OPERATIONS
from bench.operations import check, tensors_of
from bench.timing import synchronize
from bench.work import CaseFailed, Work

OURS = (SCX, TRITON)
REPEATS, REHEARSED_REPEATS = 50, 1
INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def run(work: Work) -> None:
    repeats = REHEARSED_REPEATS if work.rehearsal else REPEATS
    for case in work.share(checked_cases(work.rehearsal)):
        work.case(case.id, partial(examine, case, device_of(work.rehearsal), repeats), limit=40)


@torch.no_grad()
def examine(case: Case, device: torch.device, repeats: int) -> dict[str, Any]:
    """Hold the operation, and its kernel where it chooses PyTorch's, against the reference; then repeat both.

    Raises: CaseFailed.
    """
    torch.manual_seed(0)
    operation = OPERATIONS[case.operation]
    inputs = operation.make(case, device)
    ours = [contestant for contestant in operation.contestants(case) if contestant.kind in OURS]
    with by_kernels(device):
        wrong = {name: problem for name, problem in check(operation, ours, inputs).items() if problem}
    if wrong:
        raise CaseFailed("; ".join(f"{name}: {problem}" for name, problem in wrong.items()))
    for contestant in ours:
        with by_kernels(device), contestant.within():
            number = first_difference(operation, contestant, inputs, repeats)
        if number is not None:
            raise CaseFailed(f"{contestant.name}: other bits in repeat {number} of {repeats}: a race")
    return {"contestants": [contestant.name for contestant in ours], "repeats": repeats}


def by_kernels(device: torch.device) -> AbstractContextManager[Any]:
    """On a CPU the kernels run where Triton interprets them, if they are asked to."""
    interprets = os.environ.get("TRITON_INTERPRET") == "1"
    return ops.backend("triton" if device.type == "cpu" and interprets else "auto")


@torch.no_grad()
def call_ours(
    case: Case,
    device: torch.device,
    kinds: Sequence[str] = OURS,
    *,
    drawn_on: torch.device | None = None,
    around: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> None:
    """Each of our contestants once, and wait for it.

    Args:
        drawn_on: where inputs are drawn; else on the device.
        around: entered around a call.
    """
    operation = OPERATIONS[case.operation]
    inputs = moved(operation.make(case, drawn_on or device), device)
    for contestant in operation.contestants(case):
        if contestant.kind in kinds:
            with by_kernels(device), contestant.within(), around():
                contestant.call(inputs)
    synchronize(device)


def first_difference(operation: Operation, contestant: Contestant, inputs: Inputs, repeats: int) -> int | None:
    """The number of the first repeat that gives other bits than the first run, or None."""
    own: Callable[[Inputs], Inputs] = copied if operation.writes else lambda inputs: inputs

    def bits() -> list[Tensor]:
        return [_bits(x) for x in tensors_of(contestant.call(own(inputs)))]

    first = [x.clone() for x in bits()]
    for number in range(1, repeats + 1):
        _leave_nan(first)
        if not all(map(torch.equal, first, bits())):
            return number
    return None


def _bits(x: Tensor) -> Tensor:
    """Bit patterns, which compare equal also where they are NaN."""
    return x.contiguous().view(INTEGERS[x.element_size()])


def _leave_nan(like: Sequence[Tensor]) -> None:
    """Free memory of these sizes with NaN in it, which the allocator hands to whoever asks next."""
    held = [torch.full_like(x, -1) for x in like if x.dtype != torch.uint8]
    del held
