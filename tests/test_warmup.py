"""What is compiled before the first request: everything that requests ask for."""

import os
import re
import subprocess
import sys

import pytest
import torch
from tiny import tiny_model

from scx import SCXKeyGenerator, encoded_llama, warm_up


def test_requests_compile_nothing_that_the_warm_up_has_not() -> None:
    """Recorded for a GPU that need not be here. Its own process: this one may run Triton's interpreter."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "bench.variants", "--only", "SmolLM2-135M"]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]
    asked = re.findall(r"(\w+): \d+ variants warmed up, (\d+) asked for, 0 not warmed up", run.stdout)
    assert [encoding for encoding, _ in asked] == ["permuted", "sealed"]
    assert all(int(count) > 20 for _, count in asked), "the requests were recorded"


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
