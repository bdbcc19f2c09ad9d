"""What a result file says about where its numbers come from."""

import json
import os
import platform
import subprocess
import sys
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"
_PACKAGES = ("torch", "transformers", "triton", "numpy", "cryptography")


def _git(*arguments: str) -> str:
    out = subprocess.run(("git", *arguments), capture_output=True, text=True, check=True, cwd=RESULTS.parent)
    return out.stdout.strip()


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor()


def provenance() -> dict[str, Any]:
    """Machine, versions, commit, date and command."""
    cuda = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    changed = _git("status", "--porcelain", "--untracked-files=no", "--", ":!bench/results")
    return {
        "processor": _processor(),
        "threads": torch.get_num_threads(),
        "cuda_device": cuda,
        "python": platform.python_version(),
        "packages": {name: version(name) for name in _PACKAGES},
        "commit": _git("rev-parse", "HEAD") + (" with changes" if changed else ""),
        "allocator": {name: value for name, value in os.environ.items() if name.startswith("MALLOC_")},
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": " ".join(["python", "-m", sys.modules["__main__"].__spec__.name, *sys.argv[1:]]),  # type: ignore[union-attr]
    }


def save(name: str, results: Any) -> Path:
    """Write results with their provenance to `bench/results/NAME.json`."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps({"provenance": provenance(), "results": results}, indent=1) + "\n")
    return path
