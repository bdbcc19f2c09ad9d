"""Whether bytes look like noise, and whether a cache's rows lie in them as they are."""

from pathlib import Path

import numpy as np
from engine.engines import BLOCK

BLOCK_BYTES = 30 * 2 * 3 * 64 * 4 * BLOCK
"""Of SmolLM2's K and V in float32: 30 layers, 3 heads of 64."""
_SIGMAS = 6.0
"""Six standard deviations: one file of a billion would fail of itself."""


def chi_square_excess(data: np.ndarray) -> float:
    """How far the counts of bytes (n,) uint8 lie from equal ones, in standard deviations of noise's."""
    return _excess(np.bincount(data, minlength=256))


def pair_excess(data: np.ndarray) -> float:
    """The same of pairs of neighbours, of which there must be many more than 65,536."""
    return _excess(np.bincount(data[: len(data) // 2 * 2].view(np.uint16), minlength=65536))


def _excess(counts: np.ndarray) -> float:
    expected, freedom = counts.sum() / len(counts), len(counts) - 1
    statistic = float(((counts - expected) ** 2 / expected).sum())
    return (statistic - freedom) / (2 * freedom) ** 0.5


def assert_noise(data: np.ndarray) -> None:
    """No byte and no pair of bytes is more frequent than in noise, and no 64-bit word comes twice.

    Two words of 2**24 are equal by chance in one of 100,000 runs; a keystream used twice over equal rows, or rows that
    repeat, are thousands.
    """
    assert abs(chi_square_excess(data)) < _SIGMAS
    assert abs(pair_excess(data)) < _SIGMAS
    words = data[: len(data) // 8 * 8].view(np.uint64)
    assert len(np.unique(words)) == len(words)


def written_rows(region: Path) -> np.ndarray:
    """(rows, BLOCK_BYTES) uint8: of a region of host memory whose chunks are one block, the rows that hold one."""
    stride = (BLOCK_BYTES // 4096 + 1) * 4096
    rows = np.fromfile(region, dtype=np.uint8).reshape(-1, stride)
    return rows[rows[:, :64].any(axis=1)][:, :BLOCK_BYTES]


def payloads(files: list[Path]) -> np.ndarray:
    """(files, BLOCK_BYTES) uint8: what files of the fs tier hold but for padding and trailer."""
    return np.stack([np.fromfile(file, dtype=np.uint8)[:BLOCK_BYTES] for file in files])


def count_of(words: np.ndarray, data: np.ndarray) -> int:
    """How many of these 64-bit words lie in data (n,) uint8, at a multiple of eight bytes."""
    return int(np.isin(words, data[: len(data) // 8 * 8].view(np.uint64)).sum())
