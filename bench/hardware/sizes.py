"""Which operations and shapes the stages take, on a GPU and in a rehearsal."""

import dataclasses
from collections.abc import Iterable, Iterator

import torch

from bench.contest import Case
from bench.marks import MARKS
from bench.operation_cases import cases
from bench.shapes import SHAPES, SMALL_SHAPES, Shape

MODEL = "Llama-3-8B"
REHEARSED = ("strip_restore", "unlock+in place", "inject_permute+norm", "qkv_decode_encode+cache", "attention_step")
"""What Triton's interpreter computes in moments."""


def device_of(rehearsal: bool) -> torch.device:
    return torch.device("cpu" if rehearsal else "cuda")


def two_blocks(rehearsal: bool) -> Shape:
    """Two blocks of Llama-3-8B with a small vocabulary: every shape of a kernel is the model's own."""
    return SMALL_SHAPES["rehearsal"] if rehearsal else dataclasses.replace(SHAPES[MODEL], layers=2, vocabulary=4096)


def checked_cases(rehearsal: bool) -> list[Case]:
    """Every operation at its usual size, at few rows where that is another kernel, and without redundant rows."""
    found: dict[tuple[str, int, bool, bool, bool], Case] = {}
    for case in sorted(_of_the_model(), key=lambda case: not case.headline):
        kind = (case.operation, case.rounds, case.rows == 1, case.redundant > 0, case.rows <= 64 or case.cached > 0)
        if case.rows <= 8320 and case.cached * case.batch <= 10_240:
            found.setdefault(kind, case)
    if not rehearsal:
        return list(found.values())
    return [_shrunk(case) for case in _once(found.values()).values() if case.operation in REHEARSED]


def marked_cases(rehearsal: bool) -> list[Case]:
    """What marks and the short table are about, the former first."""
    of_model = list(_of_the_model())
    marked = [case for case in of_model if any(mark.is_for(dataclasses.asdict(case)) for mark in MARKS)]
    wanted = list(dict.fromkeys([*(c for c in marked if c.headline), *marked, *(c for c in of_model if c.headline)]))
    return [_shrunk(case) for case in wanted[:3]] if rehearsal else wanted


def counted_cases(rehearsal: bool) -> list[Case]:
    """The longest cache in each encoding, then the cases of the short table, ciphered ones first: they are the farthest
    from their limits."""
    marked = marked_cases(rehearsal)
    longest = {(case.operation, case.rounds): case for case in sorted(marked, key=lambda case: case.cached)}
    short = sorted((case for case in marked if case.headline), key=lambda case: "seal" not in case.operation)
    return list(dict.fromkeys([*(case for case in longest.values() if case.cached), *short]))


def sanitized_cases(rehearsal: bool) -> list[Case]:
    """Every operation once, with Llama-3-8B's heads and more rows and keys than a tile of a long prompt has."""
    once = _once(checked_cases(False))
    if rehearsal:
        return [_shrunk(case) for case in once.values() if case.operation in REHEARSED[:2]]
    return [_shrunk(case, "narrow", 160, 12, 320, dtype=case.dtype) for case in once.values()]


def _once(found: Iterable[Case]) -> dict[str, Case]:
    """The first case of each operation."""
    once: dict[str, Case] = {}
    for case in found:
        once.setdefault(case.operation, case)
    return once


def _of_the_model() -> Iterator[Case]:
    return (case for case in cases(on_cuda=True) if case.model == MODEL)


def _shrunk(
    case: Case, model: str = "rehearsal", tokens: int = 9, redundant: int = 3, cached: int = 24, dtype: str = "float32"
) -> Case:
    most = {"tokens": tokens, "redundant": redundant, "cached": cached}
    small = {name: min(getattr(case, name), size) for name, size in most.items()}
    return dataclasses.replace(case, model=model, dtype=dtype, **small)
