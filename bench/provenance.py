"""Where result files lie, and what they say about where their numbers come from."""

from pathlib import Path
from typing import Any

from scx_kernels.provenance import machine_name, provenance, warnings_of, write_json

__all__ = ["RESULTS", "machine_name", "provenance", "save", "warnings_of", "write_json"]

RESULTS = Path(__file__).parent / "results"


def save(name: str, results: Any) -> Path:
    """Write results with their provenance to `bench/results/NAME.json`."""
    return write_json(RESULTS / f"{name}.json", {"provenance": provenance(), "results": results})
