"""What crossed the boundary, as a table, and what must cross, as a formula."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from scx.architecture import ModelShape
from scx.party.boundary import STAGES, Crossing
from scx.party.plan import Plan

__all__ = ["Expected", "expected_bytes", "format_table"]


@dataclass(frozen=True)
class Expected:
    """Bytes that a stage sends to the untrusted side and brings back."""

    to_untrusted: int
    to_secure: int

    @property
    def total(self) -> int:
        return self.to_untrusted + self.to_secure


def expected_bytes(
    plan: Plan,
    shape: ModelShape,
    stage: str,
    *,
    batch: int,
    tokens: int,
    redundant: int,
    past: int = 0,
    itemsize: int = 4,
    padded: bool = False,
    position_rows: int = 1,
    inner_size: int = 0,
) -> Expected:
    """What must cross in a calibration, one prefill, one key sharing, or one step of a generation.

    Args:
        stage: one of `scx.party.boundary.STAGES`.
        batch: sequences B, always 1 in a calibration. tokens: S of a prefill or its sharing, n of a step, random ones
            of a calibration. redundant: R of the prefill.
        past: cached tokens before a step.
        itemsize: bytes of an element of the model's dtype.
        padded: whether there is left padding. position_rows: rows of the rotary positions, 1 or B.
        inner_size: features inside a feed-forward, F; of a plan with `verify`.

    Raises: ValueError for another stage. Source: the formulas in docs/split.md.
    """
    if stage == "calibration":
        return _calibration_bytes(shape, tokens, itemsize)
    if stage == "prefill":
        expected = _prefill_bytes(plan, shape, tokens, redundant, itemsize, inner_size)
        extra = batch * 8 if padded else 0
    elif stage == "key sharing":
        expected = _sharing_bytes(plan, shape, tokens, redundant, itemsize)
        extra = position_rows * tokens * 8 if plan.middle_blocks else 0
    elif stage == "generation":
        if plan.verify:
            expected = _verified_step_bytes(plan, shape, tokens, itemsize, inner_size)
        else:
            expected = _step_bytes(plan, shape, tokens, past, past + redundant, itemsize)
        requests = 1 + plan.end if plan.few else bool(plan.middle_blocks) + (0 if plan.verify else plan.end)
        extra = requests * position_rows * tokens * 8
    else:
        raise ValueError(f"stage: expected one of {STAGES}, got {stage!r}")
    return Expected(batch * expected.to_untrusted + extra, batch * expected.to_secure)


def _sizes(shape: ModelShape) -> tuple[int, int, int]:
    """Features of a row, of its q product, and of its k or v product: D, H*d, G*d."""
    return shape.hidden_size, shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim


def _noisy_itemsize(plan: Plan, itemsize: int) -> int:
    return max(itemsize, 4) if plan.noisy else itemsize


def _calibration_bytes(shape: ModelShape, tokens: int, itemsize: int) -> Expected:
    hidden, q, _ = _sizes(shape)
    return Expected(tokens * hidden * itemsize, shape.num_layers * (2 * hidden + q) * 4)


def _inner_bytes(plan: Plan, rows: int, itemsize: int, inner_size: int) -> int:
    """What a feed-forward returns beside its result, to be checked by."""
    return (2 if itemsize >= 4 else 3) * rows * inner_size * itemsize if plan.verify else 0


def _prefill_bytes(
    plan: Plan, shape: ModelShape, tokens: int, redundant: int, itemsize: int, inner_size: int
) -> Expected:
    hidden, q, kv = _sizes(shape)
    layers, rows, first = plan.num_layers, tokens + redundant, _noisy_itemsize(plan, itemsize)
    borders = sum(plan.is_border(block) for block in range(layers))
    attention_inputs = 1 if plan.few else layers
    sent = rows * hidden * (first + (attention_inputs - 1) * itemsize)
    sent += layers * tokens * (q + 2 * kv) * itemsize + layers * rows * q * itemsize
    sent += borders * rows * hidden * itemsize
    returned = rows * (q + 2 * kv) * (first + (layers - 1) * itemsize) + layers * tokens * q * itemsize
    returned += borders * rows * hidden * itemsize + (1 if plan.few else layers) * rows * hidden * itemsize
    returned += layers * _inner_bytes(plan, rows, itemsize, inner_size)
    if plan.prefill_top_k is not None:
        # Logits instead of the last hidden states, or with the paper's crossings in a round trip of their own.
        sent += 0 if plan.few else rows * hidden * itemsize
        returned += rows * plan.prefill_top_k * (itemsize + 8) - (rows * hidden * itemsize if plan.few else 0)
    return Expected(sent, returned)


def _sharing_bytes(plan: Plan, shape: ModelShape, tokens: int, redundant: int, itemsize: int) -> Expected:
    _, _, kv = _sizes(shape)
    keys = 0 if plan.verify else plan.end * (tokens + redundant) * kv * itemsize
    return Expected(len(plan.middle_blocks) * tokens * 8 + keys, 0)


def _step_bytes(plan: Plan, shape: ModelShape, tokens: int, past: int, key_rows: int, itemsize: int) -> Expected:
    hidden, q, kv = _sizes(shape)
    start, end, middle, noisy = plan.start, plan.end, bool(plan.middle_blocks), _noisy_itemsize(plan, itemsize)
    row = tokens * hidden * itemsize
    moved = tokens if plan.reuse_feature_keys else past + tokens
    sent = start * (tokens * hidden * noisy + tokens * q * itemsize + 2 * moved * kv * itemsize)
    returned = start * (tokens * (q + 2 * kv) * noisy + tokens * q * itemsize)
    returned += end * (shape.num_heads * tokens * (key_rows + tokens) * max(itemsize, 4) + tokens * kv * itemsize)
    if plan.few:
        sent += (max(start, 1) + end) * row
        returned += (max(start - 1, 0) + 1 + end) * row
    else:
        sent += (start + middle + 2 * end) * row
        returned += (start + middle + end) * row
    return Expected(sent, returned)


def _verified_step_bytes(plan: Plan, shape: ModelShape, tokens: int, itemsize: int, inner_size: int) -> Expected:
    """Of a step whose attention in the first and last blocks is the secure side's."""
    hidden, q, kv = _sizes(shape)
    start, own, noisy = plan.start, plan.start + plan.end, _noisy_itemsize(plan, itemsize)
    row, middle = tokens * hidden * itemsize, bool(plan.middle_blocks)
    sent = start * tokens * hidden * noisy + (plan.end + own + middle) * row
    returned = tokens * (q + 2 * kv) * (start * noisy + plan.end * itemsize) + (own + middle) * row
    return Expected(sent, returned + own * _inner_bytes(plan, tokens, itemsize, inner_size))


_COLUMNS = ("stage", "blocks", "request", "direction", "tensor", "shape", "dtype", "bytes")


def format_table(crossings: Sequence[Crossing]) -> str:
    """Crossings as a table in text; neighbouring blocks that exchange the same are one line."""
    by_block = [(key, list(group)) for key, group in groupby(crossings, key=lambda x: (x.stage, x.block))]
    lines: list[tuple[str, ...]] = []
    for _, alike in groupby(by_block, key=lambda item: (item[0][0], [_look(x) for x in item[1]])):
        groups = [group for _, group in alike]
        for place, x in enumerate(groups[0]):
            total = sum(group[place].nbytes for group in groups)
            shape = " x ".join(map(str, x.shape))
            dtype = str(x.dtype).removeprefix("torch.")
            blocks = _block_range(groups[0][0].block, groups[-1][0].block)
            lines.append((x.stage, blocks, x.operation, x.direction, x.name, shape, dtype, f"{total:,}"))
    widths = [max(map(len, column)) for column in zip(_COLUMNS, *lines, strict=True)]
    return "\n".join("  ".join(cell.ljust(n) for cell, n in zip(line, widths, strict=True)).rstrip()
                     for line in (_COLUMNS, *lines))  # fmt: skip


def _look(x: Crossing) -> tuple[Any, ...]:
    return x.operation, x.direction, x.name, x.shape, x.dtype


def _block_range(first: int, last: int) -> str:
    if first < 0:
        return "-"
    return str(first) if first == last else f"{first}-{last}"
