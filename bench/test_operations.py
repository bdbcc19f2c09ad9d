"""The operations on the CPU, beside what would run otherwise, under pytest-benchmark."""

from typing import Any

import pytest
import torch

from bench.contest import RIVAL, SCX, Case, Contestant
from bench.operation_cases import OPERATIONS, cases
from bench.operations import check, enough_inputs
from bench.timing import rotating

CPU = torch.device("cpu")
COMPETITIONS = [
    pytest.param(case, contestant, id=f"{case.operation}-{contestant.name}")
    for case in cases(on_cuda=False)
    if case.headline
    for contestant in OPERATIONS[case.operation].contestants(case)
    if contestant.kind in (SCX, RIVAL)
]


@pytest.mark.parametrize(("case", "contestant"), COMPETITIONS)
def test_operation(benchmark: Any, case: Case, contestant: Contestant) -> None:
    operation = OPERATIONS[case.operation]
    first = operation.make(case, CPU)
    problem = check(operation, [contestant], first)[contestant.name]
    # Only a rival's: what PyTorch lacks on this machine. A contestant of ours that fails is a failure.
    if problem is not None and problem.startswith("not available"):
        pytest.skip(problem)
    if problem is not None:
        pytest.fail(problem)
    benchmark.group = case.id
    with torch.no_grad(), contestant.within():
        benchmark(rotating(contestant.call, enough_inputs(operation, case, CPU, first)))
