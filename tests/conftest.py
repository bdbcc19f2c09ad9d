"""Shared by all tests: small models, uninitialised memory that shows, and what happens where a package is missing.

`--tiles production` has kernels take the tiles of their own heuristics where a test forces small ones; `--repeats N`
runs each kernel N times on the same inputs and demands the same bits (`parity.run_kernel`).

`-m "not slow"` leaves out what is marked `slow`: tests that start processes with models or compilers in them, load or
build a large model, or take more than a few seconds of a core; of tests in several dtypes the half precisions; and
whole files about what does not change from edit to edit: how benchmarks and a GPU's stages run, what is packed.

`tests/engine` is not collected here: it needs vLLM, whose environment is another (`make test-vllm`).

`--floor` leaves out files that no other version of transformers or triton can change: `make test-floor` passes it.
"""

import hashlib
import itertools
import os
import secrets
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA starts; deterministic products need it
if "PYTEST_XDIST_WORKER" in os.environ:
    # Read when torch is imported, here and in processes that tests start: all of them share the cores.
    os.environ["OMP_NUM_THREADS"] = "1"

import pytest
import torch

if not torch.cuda.is_available():
    # Read when triton is imported: kernels run on CPU tensors.
    os.environ.setdefault("TRITON_INTERPRET", "1")

import parity

if not parity.is_missing("triton"):
    from interpreter import hasten

    hasten()

if TYPE_CHECKING:
    from transformers import PreTrainedModel

collect_ignore = ["engine"]


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("kernels")
    group.addoption("--tiles", choices=("small", "production"), default="small", help="tiles of parity tests")
    group.addoption("--floor", action="store_true", help="leave out what no floor changes")
    group.addoption("--repeats", type=int, default=1, metavar="N", help="runs of a kernel that must agree bit by bit")


def pytest_configure(config: pytest.Config) -> None:
    parity.MODE = parity.Mode(config.getoption("tiles"), config.getoption("repeats"))
    # Of the poison below, on a GPU: only the filling is wanted, not the advice.
    config.addinivalue_line("filterwarnings", "ignore:.*does not have a deterministic implementation")


def pytest_report_header() -> str:
    return f"kernels: {parity.MODE.tiles} tiles, repeats: {parity.MODE.repeats}, on {parity.DEVICE}"


class PatientModule(pytest.Module):
    """A test file that is skipped, and says for what, where its imports miss one of `parity.PACKAGES`."""

    def collect(self) -> list[pytest.Item | pytest.Collector]:
        try:
            return list(super().collect())
        except self.CollectError as failed:
            package = parity.missing_package(failed.__cause__)
            if package is None:
                raise
            # Of packages that a measuring machine may lack; where they are installed, as in CI, nothing comes here.
            pytest.skip(f"{self.path.name} waits for the package {package}", allow_module_level=True)


def pytest_pycollect_makemodule(module_path: Path, parent: pytest.Collector) -> pytest.Module:
    return PatientModule.from_parent(parent, path=module_path)


FLOORLESS = {
    *("test_audit.py", "test_bench_cases.py", "test_bench_channel.py", "test_bench_report.py", "test_bench_run.py"),
    *("test_bench_statelessness.py", "test_blocks.py", "test_channel.py", "test_disk.py", "test_fuzzing.py"),
    *("test_golden.py", "test_hardware.py", "test_hardware_run.py", "test_hardware_stages.py"),
    *("test_hostile_worker.py", "test_integrity.py", "test_keyfile.py", "test_keys.py", "test_packaging.py"),
    *("test_projections.py", "test_readme.py", "test_reference.py", "test_sealing.py", "test_secrets.py"),
    *("test_tenant_middleware.py", "test_tenants.py", "test_tiles.py", "test_timing.py", "test_transformers_suite.py"),
    *("test_vectors.py", "test_write_log.py"),
}
"""Files about keys, files, channels, the audit, integrity, benchmarks and documents."""


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    return True if config.getoption("--floor") and collection_path.name in FLOORLESS else None


SLOW_FILES = {"test_bench_run.py", "test_hardware.py", "test_hardware_run.py", "test_packaging.py"}


def pytest_itemcollected(item: pytest.Item) -> None:
    if item.path.name in SLOW_FILES:
        item.add_marker(pytest.mark.slow)
    given = item.callspec.params if isinstance(item, pytest.Function) and hasattr(item, "callspec") else {}
    if given.get("dtype") in (torch.float16, torch.bfloat16):
        item.add_marker(pytest.mark.slow)


@pytest.fixture(autouse=True)
def _uninitialised_memory_is_nan() -> Iterator[None]:
    """Random inputs repeat, and every fresh buffer is filled with NaN, so that a row nobody wrote is seen.

    PyTorch fills only where it also takes deterministic algorithms. Some of those read the host's memory, which a graph
    and the sync-error mode forbid: `parity.as_users_run` leaves them."""
    torch.manual_seed(7)
    torch.use_deterministic_algorithms(True, warn_only=parity.DEVICE.type == "cuda")
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
    return parity.DEVICE


@pytest.fixture
def llama() -> "PreTrainedModel":
    from tiny import tiny_model  # noqa: PLC0415

    return tiny_model()


@pytest.fixture
def prompt(device: torch.device) -> Callable[..., torch.Tensor]:
    """Random tokens (batch, length), never the padding token."""
    from tiny import VOCABULARY  # noqa: PLC0415

    def draw(length: int, batch: int = 1, seed: int = 0) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        return torch.randint(1, VOCABULARY, (batch, length), generator=generator).to(device)

    return draw
