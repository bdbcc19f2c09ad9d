"""Kernels compile for machines that are not here, spill nothing, and use the matrix unit where they should."""

import os
import subprocess
import sys

import pytest

from bench.offline import digest, waits
from bench.provenance import RESULTS


@pytest.mark.slow
def test_representative_kernels_compile_for_every_target() -> None:
    """A representative set in one dtype; `make offline` compiles all. Its own process: this one may run Triton's
    interpreter."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "bench.offline", "--quick", "--dtype", "bf16"]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]
    assert " 0 failures" in run.stdout


def test_table_in_the_repository_is_of_these_kernels() -> None:
    """Whoever changes a kernel runs `make offline` and reads what became of registers and instructions."""
    *_, summary = (RESULTS / "offline.txt").read_text().splitlines()
    assert f"kernels {digest()}" in summary, "make offline writes it anew"
    assert summary.endswith(", 0 failures")


def test_who_is_launched_ahead_waits_before_it_writes() -> None:
    """What `make offline` asks of every kernel that may begin before the one ahead of it has ended."""
    wait, load, store = "griddepcontrol.wait;\n", "ld.global.b32 %r1, [%rd1];\n", "st.global.b32 [%rd1], %r1;\n"
    assert waits(load + wait + store)
    assert not waits(store + wait)
    assert not waits(load + store)
