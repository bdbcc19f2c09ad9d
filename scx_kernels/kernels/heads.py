"""A head's tiles of Q, K and V, as both kernels of attention handle them: loaded, sealed or not; scored and added up in
an online softmax; stored.

A head of d features is cut into a power of two and a tail (80 = 64 + 16, 96 = 64 + 32), so that no product is padded
to the next power of two.
"""

import math

import triton
import triton.language as tl
from torch import Tensor

from scx_kernels.kernels.chacha import load_unsealed
from scx_kernels.kernels.launch import check_dtype, dot, narrow

__all__ = [
    "LOG2E",
    "NO_WINDOW",
    "add_values",
    "check_head",
    "head_blocks",
    "load_rows",
    "scores_of",
    "softmax_step",
    "store_heads",
]

LOG2E = math.log2(math.e)
NO_WINDOW = 2**30


@triton.jit
def load_tile(pointers, mask, limit: tl.constexpr, IS_FULL: tl.constexpr, BLOCK: tl.constexpr):
    """(rows, BLOCK) of a tensor; columns from `limit` on, and rows outside `mask` unless IS_FULL, are zero."""
    if IS_FULL and limit >= BLOCK:
        return tl.load(pointers)
    elif IS_FULL:
        return tl.load(pointers, mask=(tl.arange(0, BLOCK) < limit)[None, :], other=0)
    elif limit >= BLOCK:
        return tl.load(pointers, mask=mask[:, None], other=0)
    return tl.load(pointers, mask=mask[:, None] & (tl.arange(0, BLOCK) < limit)[None, :], other=0)


@triton.jit
def load_rows(rows, columns, stride_feature, mask, limit: tl.constexpr, BLOCK: tl.constexpr):
    return load_tile(rows[:, None] + columns[None, :] * stride_feature, mask, limit, False, BLOCK)


@triton.jit
def load_stored(
    pointers, rows, stride_feature, mask, seal_key, writes, word14, IS_VALUE: tl.constexpr, HEAD_DIM: tl.constexpr,
    START: tl.constexpr, BLOCK: tl.constexpr, IS_FULL: tl.constexpr, INT64: tl.constexpr, ENCODING: tl.constexpr,
    ROUNDS: tl.constexpr,
):  # fmt: skip
    """(rows, BLOCK) of K or V: features START.. of a head, zero where `load_tile` has zero. What is permuted is loaded
    by the tile's pointers, what is sealed by those of its rows; the others are dropped by the compiler."""
    if ENCODING == "sealed":
        x = load_unsealed(
            rows, stride_feature, mask, seal_key, writes, word14, IS_VALUE, HEAD_DIM, START, BLOCK, IS_FULL, INT64,
            ROUNDS,
        )  # fmt: skip
    else:
        x = load_tile(pointers, mask, HEAD_DIM - START, IS_FULL, BLOCK)
    return x


@triton.jit
def scores_of(
    q, q_tail, tile_ptr, offsets, tail_offsets, rows, stride_feature, mask, seal_key, writes, word14,
    HEAD_DIM: tl.constexpr, IS_FULL: tl.constexpr, INT64: tl.constexpr, ENCODING: tl.constexpr, ROUNDS: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_TAIL: tl.constexpr,
):  # fmt: skip
    """(queries, BLOCK_N): q @ k.T of a tile of keys. They lie at tile_ptr + offsets, and their tails at tile_ptr +
    tail_offsets; the rest is as in `load_stored`."""
    k = load_stored(
        tile_ptr + offsets, rows, stride_feature, mask, seal_key, writes, word14, False, HEAD_DIM, 0, BLOCK_D, IS_FULL,
        INT64, ENCODING, ROUNDS,
    )  # fmt: skip
    scores = dot(q, tl.trans(k), tl.zeros((q.shape[0], BLOCK_N), tl.float32))
    if BLOCK_TAIL:
        k = load_stored(
            tile_ptr + tail_offsets, rows, stride_feature, mask, seal_key, writes, word14, False, HEAD_DIM, BLOCK_D,
            BLOCK_TAIL, IS_FULL, INT64, ENCODING, ROUNDS,
        )  # fmt: skip
        scores = dot(q_tail, tl.trans(k), scores)
    return scores


@triton.jit
def softmax_step(scores, row_max, row_sum, acc, tail, HAS_TAIL: tl.constexpr, MAY_BE_EMPTY: tl.constexpr):
    """One step of the online softmax in base 2. Returns the weights and the rescaled state."""
    new_max = tl.maximum(row_max, tl.max(scores, axis=1))
    # A row that has seen no key yet has maximum -inf; subtracting it from itself would give NaN.
    shift = tl.where(new_max == float("-inf"), 0.0, new_max) if MAY_BE_EMPTY else new_max
    weights = tl.math.exp2(scores - shift[:, None])
    decay = tl.math.exp2(row_max - shift)
    row_sum = row_sum * decay + tl.sum(weights, axis=1)
    acc = acc * decay[:, None]
    if HAS_TAIL:
        tail = tail * decay[:, None]
    return weights, new_max, row_sum, acc, tail


@triton.jit
def add_values(
    acc, tail, weights, tile_ptr, offsets, tail_offsets, rows, stride_feature, mask, seal_key, writes, word14,
    HEAD_DIM: tl.constexpr, IS_FULL: tl.constexpr, INT64: tl.constexpr, ENCODING: tl.constexpr, ROUNDS: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_TAIL: tl.constexpr,
):  # fmt: skip
    """acc and tail + weights @ v of a tile of values, which lie as the keys in `scores_of`."""
    v = load_stored(
        tile_ptr + offsets, rows, stride_feature, mask, seal_key, writes, word14, True, HEAD_DIM, 0, BLOCK_D, IS_FULL,
        INT64, ENCODING, ROUNDS,
    )  # fmt: skip
    weights = narrow(weights, v.dtype)
    acc = dot(weights, v, acc)
    if BLOCK_TAIL:
        v = load_stored(
            tile_ptr + tail_offsets, rows, stride_feature, mask, seal_key, writes, word14, True, HEAD_DIM, BLOCK_D,
            BLOCK_TAIL, IS_FULL, INT64, ENCODING, ROUNDS,
        )  # fmt: skip
        tail = dot(weights, v, tail)
    return acc, tail


@triton.jit
def _in_plain_order(acc, tail, index, BLOCK_D: tl.constexpr, BLOCK_TAIL: tl.constexpr):
    """Columns `index` of acc ⊕ tail."""
    ROWS: tl.constexpr = acc.shape[0]
    COLUMNS: tl.constexpr = index.shape[0]
    first = tl.broadcast_to(tl.minimum(index, BLOCK_D - 1)[None, :], (ROWS, COLUMNS))
    taken = tl.gather(acc, first, axis=1)
    if BLOCK_TAIL:
        second = tl.broadcast_to(tl.maximum(index - BLOCK_D, 0)[None, :], (ROWS, COLUMNS))
        taken = tl.where((index < BLOCK_D)[None, :], taken, tl.gather(tail, second, axis=1))
    return taken


@triton.jit
def store_heads(
    out_rows, acc, tail, index_ptr, in_rows, stride_index_feature, stride_out_feature, HEAD_DIM: tl.constexpr,
    HAS_INDEX: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_TAIL: tl.constexpr,
):  # fmt: skip
    """Write a tile of finished rows, their features in plain order where there is an index."""
    columns = tl.arange(0, BLOCK_D)
    tail_columns = tl.arange(0, max(BLOCK_TAIL, 1)) + BLOCK_D
    acc = narrow(acc, out_rows.dtype.element_ty)
    head = acc
    if BLOCK_TAIL:
        tail = narrow(tail, out_rows.dtype.element_ty)
    if HAS_INDEX:
        index = tl.load(index_ptr + columns * stride_index_feature, mask=columns < HEAD_DIM, other=0).to(tl.int32)
        head = _in_plain_order(acc, tail, index, BLOCK_D, BLOCK_TAIL)
        if BLOCK_TAIL:
            index = tl.load(index_ptr + tail_columns * stride_index_feature, mask=tail_columns < HEAD_DIM, other=0)
            index = index.to(tl.int32)
            tail = _in_plain_order(acc, tail, index, BLOCK_D, BLOCK_TAIL)
    mask = in_rows[:, None] & (columns < HEAD_DIM)[None, :]
    tl.store(out_rows[:, None] + columns[None, :].to(tl.int64) * stride_out_feature, head, mask=mask)
    if BLOCK_TAIL:
        mask = in_rows[:, None] & (tail_columns < HEAD_DIM)[None, :]
        tl.store(out_rows[:, None] + tail_columns[None, :].to(tl.int64) * stride_out_feature, tail, mask=mask)


def head_blocks(size: int) -> dict[str, int]:
    """d as a power of two and a tail, where that pads less than the next power of two."""
    whole = max(16, triton.next_power_of_2(size))
    half = whole // 2
    tail = max(16, triton.next_power_of_2(max(1, size - half)))
    if half < 16 or half + tail >= whole:
        return {"BLOCK_D": whole, "BLOCK_TAIL": 0}
    return {"BLOCK_D": half, "BLOCK_TAIL": tail}


def check_head(q: Tensor, v: Tensor) -> None:
    check_dtype("q", q)
    if v.shape[3] != q.shape[3] or not 0 < q.shape[3] <= 256:
        raise ValueError(f"v: expected q's head size, at most 256, got {v.shape[3]} and {q.shape[3]}")
