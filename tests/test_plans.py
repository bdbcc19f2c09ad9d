"""Launch plans: a launch that was prepared is the launch that the launcher would make (`launches.py` has the cases)."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_plans_launch_what_launchers_launch() -> None:
    """In a process that compiles kernels instead of interpreting them, with a driver that launches nothing."""
    cases = Path(__file__).with_name("launches.py")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", str(cases)]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    run = subprocess.run(
        command, env={**environment, "TRITON_INTERPRET": "0"}, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]
    passed = re.search(r"(\d+) passed", run.stdout)
    assert passed is not None
    assert int(passed[1]) >= 30
    assert "skipped" not in run.stdout
