"""What a result file says about where its numbers come from."""

import json
import os
import platform
import re
import subprocess
import sys
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

__all__ = ["BUSY_ABOVE", "gpu_state", "machine_name", "provenance", "warnings_of", "write_json"]

BUSY_ABOVE = 5.0
"""Utilisation of the GPU before the run, in percent, above which it counts as busy."""

_PACKAGES = ("torch", "transformers", "triton", "numpy", "cryptography")
_GPU_FIELDS = (
    *("name", "driver_version", "utilization.gpu", "memory.used", "memory.total"),
    *("clocks.sm", "clocks.max.sm", "clocks.mem", "clocks.max.mem", "temperature.gpu", "power.draw", "power.limit"),
)


def _git(*arguments: str) -> str | None:
    """What git prints, or None where the checkout has no history."""
    try:
        out = subprocess.run(("git", *arguments), capture_output=True, text=True, check=True, cwd=Path(__file__).parent)
    except (FileNotFoundError, subprocess.CalledProcessError):
        return None
    return out.stdout.strip()


def _commit() -> str:
    # Installed below somebody's project, the history found is that project's.
    ours = _git("ls-files", "--error-unmatch", Path(__file__).name)
    head = None if ours is None else _git("rev-parse", "HEAD")
    if head is None:
        return "unknown: no history here"
    changed = _git("status", "--porcelain", "--untracked-files=no", "--", ":(top)", ":(top,exclude)bench/results")
    return head + (" with changes" if changed else "")


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    for line in cpuinfo.read_text().splitlines() if cpuinfo.exists() else ():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def gpu_state() -> dict[str, str] | None:
    """The GPU as `nvidia-smi` reads it now, with its units, or None without CUDA. A failure to read is an entry."""
    if not torch.cuda.is_available():
        return None
    name = f"GPU-{torch.cuda.get_device_properties(0).uuid}"
    command = ("nvidia-smi", f"--id={name}", f"--query-gpu={','.join(_GPU_FIELDS)}", "--format=csv,noheader")
    try:
        line = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout
    except (FileNotFoundError, subprocess.SubprocessError) as error:
        return {"not readable": str(error)}
    return dict(zip(_GPU_FIELDS, (value.strip() for value in line.strip().split(",")), strict=False))


def warnings_of(state: dict[str, str] | None, load: float, processors: int) -> list[str]:
    """What makes the numbers doubtful: other work on the GPU or on the processors before the run."""
    found = []
    if state is not None:
        used = re.match(r"[\d.]+", state.get("utilization.gpu", ""))
        if used is None:
            found.append("the GPU's utilisation before the run could not be read")
        elif float(used[0]) > BUSY_ABOVE:
            found.append(f"the GPU was busy before the run: {used[0]} % utilisation")
    if load > max(0.5, processors / 4):
        found.append(f"the processors were busy before the run: load {load:.2f} on {processors}")
    return found


def _command() -> str:
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    name = sys.argv[0] if spec is None else f"-m {spec.name.removesuffix('.__main__')}"
    return " ".join(["python", name, *sys.argv[1:]])


def provenance(commit: str | None = None) -> dict[str, Any]:
    """Machine, versions, commit, date and command; the state of the machine as it is now, before the run.

    Args:
        commit: what to say where the checkout has no history; else git is asked.
    """
    state, load, processors = gpu_state(), os.getloadavg()[0], os.cpu_count() or 1
    cuda = torch.cuda.get_device_properties(0) if state is not None else None
    return {
        "processor": _processor(),
        "processors": processors,
        "threads": torch.get_num_threads(),
        "load_average": load,
        "cuda_device": cuda and cuda.name,
        "cuda_version": torch.version.cuda,
        "multiprocessors": cuda and cuda.multi_processor_count,
        "l2_bytes": cuda and cuda.L2_cache_size,
        "gpu_before": state,
        "warnings": warnings_of(state, load, processors),
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in _PACKAGES},
        "commit": commit or _commit(),
        "environment": {
            name: value for name, value in os.environ.items() if name.startswith(("MALLOC_", "SCX_KERNELS", "TRITON_"))
        },
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": _command(),
    }


def machine_name(about: dict[str, Any]) -> str:
    """The name of a machine's result file: its GPU, or its processor and threads."""
    name = about["cuda_device"] or f"{about['processor']} {about['threads']} threads"
    return re.sub(r"[^a-z0-9]+", "-", re.sub(r"\((R|TM)\)|CPU|Processor", " ", name).lower()).strip("-")


def write_json(path: Path, content: Any) -> Path:
    """Replace a file at once, so that whoever interrupts finds the old content or the new."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n")
    os.replace(partial, path)
    return path
