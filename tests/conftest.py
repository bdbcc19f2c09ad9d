"""Shared by all tests: small models, and uninitialised memory that shows."""

import hashlib
import itertools
import os
import secrets
from collections.abc import Callable, Iterator

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA starts; deterministic products need it

import pytest
import torch

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)  # the processes share the cores

if not torch.cuda.is_available():
    # Read when triton is imported: kernels run on CPU tensors.
    os.environ.setdefault("TRITON_INTERPRET", "1")

from tiny import VOCABULARY, tiny_model
from transformers import PreTrainedModel


@pytest.fixture(autouse=True)
def _uninitialised_memory_is_nan() -> Iterator[None]:
    """Random inputs repeat, and every fresh buffer is filled with NaN, so that a row nobody wrote is seen."""
    torch.manual_seed(7)
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def _keys_repeat(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """The system's random numbers are a fixed sequence, other in every test, so that a tolerance met once is met."""
    drawn = itertools.count()

    def token_bytes(size: int) -> bytes:
        return hashlib.shake_256(f"{request.node.nodeid} {next(drawn)}".encode()).digest(size)

    monkeypatch.setattr(secrets, "token_bytes", token_bytes)


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def llama() -> PreTrainedModel:
    return tiny_model()


@pytest.fixture
def prompt(device: torch.device) -> Callable[..., torch.Tensor]:
    """Random tokens (batch, length), never the padding token."""

    def draw(length: int, batch: int = 1, seed: int = 0) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        return torch.randint(1, VOCABULARY, (batch, length), generator=generator).to(device)

    return draw
