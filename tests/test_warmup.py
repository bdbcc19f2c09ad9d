"""What is compiled before the first request: everything that requests ask for."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny import tiny_model

from scx import SCXKeyGenerator, encoded_llama, warm_up
from scx.warmup import _powers_of_two

ROOT = Path(__file__).parent.parent


ASKED = """
from bench.rehearsal.rehearsal import ALL_TARGETS, Rehearsal
from bench.rehearsal.requests import SHAPE_REQUESTS
from bench.rehearsal.settings import REAL

rehearsal = Rehearsal(ALL_TARGETS[1:2])
for setting in REAL[1:3]:
    rehearsal.serve(setting, SHAPE_REQUESTS, has_values=False)
print(*rehearsal.failures, sep="\\n")
print(len(rehearsal.variants), len(rehearsal.failures))
"""


@pytest.mark.slow
def test_requests_compile_nothing_that_the_warm_up_has_not() -> None:
    """Of SmolLM2-135M, permuted and sealed, at many lengths; the rehearsal's own test has more kinds of requests. Its
    own process: this one may run Triton's interpreter."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, "-c", ASKED], env=environment, capture_output=True, text=True, check=False, cwd=ROOT
    )
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]
    variants, failures = run.stdout.split()[-2:]
    assert failures == "0", run.stdout[-6000:]
    assert int(variants) > 30, "the requests were recorded"


def test_powers_of_two_reach_the_largest_batch() -> None:
    assert [_powers_of_two(n) for n in (1, 2, 3, 4, 5)] == [[1], [1, 2], [1, 2, 4], [1, 2, 4], [1, 2, 4, 8]]


@torch.no_grad()
def test_leaves_the_model_as_it_was(prompt) -> None:
    model, ids = tiny_model(), prompt(5)
    with encoded_llama(model, SCXKeyGenerator.for_model(model, redundant_num=2)):
        before = model(ids).logits
        warm_up(model, tokens=(1, 4), batch_size=2, longest=512)
        torch.testing.assert_close(model(ids).logits, before, rtol=1e-4, atol=1e-4)


def test_bad_input(llama) -> None:
    with pytest.raises(ValueError, match="not encoded"):
        warm_up(llama)
    with encoded_llama(llama, SCXKeyGenerator.for_model(llama)):
        for wrong in ({"tokens": ()}, {"tokens": (0,)}, {"batch_size": 0}, {"longest": 0}):
            with pytest.raises(ValueError, match="expected positive numbers"):
                warm_up(llama, **wrong)
