"""Tiles from measurement: one data file a device, the nearest entry for a shape, else the launcher's own heuristic.

A file is JSON: {"device": name as PyTorch gives it, "provenance": {...}, "entries": [{"operation", "dtype", "variant",
"sizes", "tile"}, ...]}. `sizes` are those a launcher chooses tiles by; `variant` names what else changes the kernel.
Files lie beside this module in `tiles/` and, before those, in the folder that SCX_TILES names. `python -m
scx_kernels.tune` writes them.
"""

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

__all__ = ["TileFile", "directories", "file_name", "load", "nearest"]

SHIPPED = Path(__file__).parent / "tiles"
# An entry speaks for shapes up to twice or half its own in every size, but a row is as wide as its tile expects.
FARTHEST = 1.0
EXACT = frozenset({"features", "head_dim"})


@dataclass(frozen=True)
class TileFile:
    """The measured tiles of one device."""

    device: str
    provenance: Mapping[str, Any]
    entries: tuple[Mapping[str, Any], ...]

    def write(self, directory: Path) -> Path:
        """Write the file into `directory`. Returns its path."""
        directory.mkdir(parents=True, exist_ok=True)
        path = directory / file_name(self.device)
        content = {"device": self.device, "provenance": self.provenance, "entries": self.entries}
        path.write_text(json.dumps(content, indent=1) + "\n")
        return path


def file_name(device: str) -> str:
    """The file of a device: "NVIDIA H200" -> "nvidia-h200.json"."""
    return "-".join("".join(c if c.isalnum() else " " for c in device.lower()).split()) + ".json"


def directories() -> tuple[Path, ...]:
    """Where tile files are looked for, first to last."""
    given = os.environ.get("SCX_TILES")
    return (SHIPPED,) if given is None else (Path(given), SHIPPED)


def _read(path: Path) -> TileFile:
    content = json.loads(path.read_text())
    for entry in content["entries"]:
        if not isinstance(entry["tile"], dict) or not all(size > 0 for size in entry["sizes"].values()):
            raise ValueError(f"{path.name}: expected entries with positive sizes and a tile, got {entry}")
    return TileFile(content["device"], content["provenance"], tuple(content["entries"]))


@lru_cache
def load(device: str, searched: tuple[Path, ...]) -> TileFile | None:
    """The first file of a device in these folders, or None. Raises ValueError, KeyError for a file that is none."""
    paths = [folder / file_name(device) for folder in searched]
    return next((_read(path) for path in paths if path.exists()), None)


def nearest(
    device: str, operation: str, dtype: torch.dtype, variant: str, sizes: Mapping[str, int]
) -> Mapping[str, Any]:
    """The measured tile of the nearest shape, or nothing where none is near.

    Args:
        device: its name; "" for none.
        variant: what else changes the kernel, such as "noise".
        sizes: by name, positive.
    """
    if not device:
        return {}
    kind = (operation, str(dtype).removeprefix("torch."), variant)
    return _nearest(device, directories(), kind, tuple(sizes.items()))


@lru_cache(4096)
def _nearest(
    device: str, searched: tuple[Path, ...], kind: tuple[str, str, str], sizes: tuple[tuple[str, int], ...]
) -> Mapping[str, Any]:
    file = load(device, searched)
    if file is None:
        return {}
    candidates = [
        (_distance(entry["sizes"], dict(sizes)), place)
        for place, entry in enumerate(file.entries)
        if (entry["operation"], entry["dtype"], entry["variant"]) == kind
    ]
    distance, place = min(candidates, default=(math.inf, 0))
    return {} if distance > FARTHEST else file.entries[place]["tile"]


def _distance(measured: Mapping[str, int], wanted: Mapping[str, int]) -> float:
    """How many doublings apart two shapes are in the size that differs most."""
    if measured.keys() != wanted.keys() or any(measured[name] != wanted[name] for name in EXACT & wanted.keys()):
        return math.inf
    return max(abs(math.log2(measured[name] / max(1, size))) for name, size in wanted.items())
