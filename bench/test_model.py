"""SmolLM2 under SCX and plain, on the machine's device, under pytest-benchmark."""

from typing import Any

import pytest
import torch

from bench.model import Field, Workload, compare, load
from bench.model_cases import EAGER, NOISE, PLAIN, REDUNDANT, SCX, Contestant, ModelCase

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
CONTESTANTS = (PLAIN, EAGER, SCX, REDUNDANT, NOISE)
CASES = [
    ModelCase("SmolLM2", kind, 128, batch, "float32", CONTESTANTS)
    for kind, batch in (("prefill", 1), ("token", 1), ("token", 8))
]


@pytest.fixture(scope="module")
def field() -> Field:
    return Field(*load("SmolLM2", "float32", DEVICE))


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.kind}-batch-{case.batch}")
@pytest.mark.parametrize("contestant", CONTESTANTS, ids=lambda contestant: contestant.name)
@torch.no_grad()
def test_model(benchmark: Any, field: Field, case: ModelCase, contestant: Contestant) -> None:
    expected, eager, own = (Workload(field, case, c) for c in (PLAIN, EAGER, contestant))
    logits = expected.run(expected.prepare())
    compare(field, EAGER, eager.run(eager.prepare()), logits)
    problem = compare(field, contestant, own.run(own.prepare()), logits)[1]
    if problem is not None:
        pytest.fail(problem)
    benchmark.group = case.id
    benchmark.pedantic(own.run, setup=lambda: ((own.prepare(),), {}), rounds=8, warmup_rounds=1)
