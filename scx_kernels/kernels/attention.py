"""Attention on feature-permuted Q, K, V. QKᵀ sums over features, so a feature order common to Q and K does not matter;
V's order is undone where the output is stored.

| array          | shape     | values        | meaning                                                                 |
|----------------|-----------|---------------|-------------------------------------------------------------------------|
| `output_index` | (B, H, d) | 0..d-1        | plain feature i of the output is feature `output_index[i]` in V's order |
| `position`     | (B, S+R)  | 0..S+R-1      | `attention`: row n of output ⊕ redundant goes to row `position[n]`      |
| `position`     | (B, N)    | 0..capacity-1 | `attention_step`: key n lies in cache row `position[n]`                 |

A head of d features is cut into a power of two and a tail (80 = 64 + 16, 96 = 64 + 32), so that no product is padded
to the next power of two. `attention` keeps BLOCK_M queries and runs over all keys;
`attention_step` has few queries, packs those of a key head's group in one tile and splits the keys over programs.
"""

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from scx_kernels.checks import check_attention, check_attention_step
from scx_kernels.kernels.chacha import EMPTY, head_word, load_key, load_unsealed
from scx_kernels.kernels.launch import (
    Target,
    begin,
    by_tokens,
    check_dtype,
    choose_tile,
    dot,
    exceeds_int32,
    launch,
    narrow,
    prefetch,
    strides,
    target_of,
)
from scx_kernels.kernels.plans import derive, empty, planned
from scx_kernels.kernels.sealing import encoding_of, key_and_writes, layer_and_head
from scx_kernels.sealing import Sealing, check_cache

__all__ = ["attention", "attention_step", "attention_tile", "step_tile"]

LOG2E = math.log2(math.e)
NO_WINDOW = 2**30


@triton.jit
def _load_tile(pointers, mask, limit: tl.constexpr, IS_FULL: tl.constexpr, BLOCK: tl.constexpr):
    """(rows, BLOCK) of a tensor; columns from `limit` on, and rows outside `mask` unless IS_FULL, are zero."""
    if IS_FULL and limit >= BLOCK:
        return tl.load(pointers)
    elif IS_FULL:
        return tl.load(pointers, mask=(tl.arange(0, BLOCK) < limit)[None, :], other=0)
    elif limit >= BLOCK:
        return tl.load(pointers, mask=mask[:, None], other=0)
    return tl.load(pointers, mask=mask[:, None] & (tl.arange(0, BLOCK) < limit)[None, :], other=0)


@triton.jit
def _prefetch_rows(head_ptr, first, N, stride_n, stride_d, HEAD_DIM: tl.constexpr, ROWS: tl.constexpr):
    """Have rows `first`.. of a head of K or V, of N rows, on their way to L2."""
    LINE: tl.constexpr = 1024 // head_ptr.dtype.element_ty.primitive_bitwidth
    LINES: tl.constexpr = (HEAD_DIM + LINE - 1) // LINE
    rows = tl.minimum(first + tl.arange(0, ROWS), N - 1).to(tl.int64)
    for line in tl.static_range(LINES):
        prefetch(head_ptr + rows * stride_n + line * LINE * stride_d)


@triton.jit
def _load_rows(rows, columns, stride, mask, limit: tl.constexpr, BLOCK: tl.constexpr):
    return _load_tile(rows[:, None] + columns[None, :] * stride, mask, limit, False, BLOCK)


@triton.jit
def _load_stored(
    pointers, rows, stride_d, mask, key, writes, word14, IS_VALUE: tl.constexpr, HEAD_DIM: tl.constexpr,
    START: tl.constexpr, BLOCK: tl.constexpr, IS_FULL: tl.constexpr, INT64: tl.constexpr, ENCODING: tl.constexpr,
    ROUNDS: tl.constexpr,
):  # fmt: skip
    """(rows, BLOCK) of K or V: features START.. of a head, zero where `_load_tile` has zero. What is permuted is loaded
    by the tile's pointers, what is sealed by those of its rows; the others are dropped by the compiler."""
    if ENCODING == "sealed":
        x = load_unsealed(
            rows, stride_d, mask, key, writes, word14, IS_VALUE, HEAD_DIM, START, BLOCK, IS_FULL, INT64, ROUNDS
        )
    else:
        x = _load_tile(pointers, mask, HEAD_DIM - START, IS_FULL, BLOCK)
    return x


@triton.jit
def _softmax_step(scores, row_max, row_sum, acc, tail, HAS_TAIL: tl.constexpr, MAY_BE_EMPTY: tl.constexpr):
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
def _attend(
    acc,
    tail,
    row_max,
    row_sum,
    q,
    q_tail,
    # Pointers, at the program's head
    k_ptr,
    v_ptr,
    mask_rows,
    writes_ptr,
    # Of sealed K and V
    key,
    word14,
    # The keys lo..hi-1, and which of them a query sees
    lo,
    hi,
    key_end,
    last_key,
    window,
    scale,
    # Strides
    stride_kn,
    stride_kd,
    stride_vn,
    stride_vd,
    stride_mn,
    stride_wn,
    # Meta-parameters
    HEAD_DIM: tl.constexpr,
    IS_MASKED: tl.constexpr,  # some of these keys are hidden from some of the queries
    MASK: tl.constexpr,
    ENCODING: tl.constexpr,
    ROUNDS: tl.constexpr,
    INT64: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_TAIL: tl.constexpr,
):
    offsets = tl.arange(0, BLOCK_N)
    columns = tl.arange(0, BLOCK_D)
    tail_columns = tl.arange(0, max(BLOCK_TAIL, 1)) + BLOCK_D
    if INT64:
        offsets = offsets.to(tl.int64)
        columns = columns.to(tl.int64)
        tail_columns = tail_columns.to(tl.int64)
    # int64: key * stride passes 2^31 in a long cache. Within a tile 32 bits do, and cost half the registers.
    k_tile = k_ptr + lo.to(tl.int64) * stride_kn
    v_tile = v_ptr + lo.to(tl.int64) * stride_vn
    k_offsets = offsets[:, None] * stride_kn + columns[None, :] * stride_kd
    v_offsets = offsets[:, None] * stride_vn + columns[None, :] * stride_vd
    if BLOCK_TAIL:
        k_tail = offsets[:, None] * stride_kn + tail_columns[None, :] * stride_kd
        v_tail = offsets[:, None] * stride_vn + tail_columns[None, :] * stride_vd
    step_k = tl.full((), BLOCK_N, tl.int64) * stride_kn
    step_v = tl.full((), BLOCK_N, tl.int64) * stride_vn
    for start in range(lo, hi, BLOCK_N):
        keys = start + tl.arange(0, BLOCK_N)
        in_keys = keys < key_end
        writes = None
        if ENCODING == "sealed":
            number = writes_ptr + keys.to(tl.int64) * stride_wn
            writes = tl.load(number, mask=in_keys, other=EMPTY) if IS_MASKED else tl.load(number)
        k = _load_stored(
            k_tile + k_offsets, k_tile + offsets * stride_kn, stride_kd, in_keys, key, writes, word14, False,
            HEAD_DIM, 0, BLOCK_D, not IS_MASKED, INT64, ENCODING, ROUNDS,
        )  # fmt: skip
        scores = dot(q, tl.trans(k), tl.zeros((q.shape[0], BLOCK_N), tl.float32))
        if BLOCK_TAIL:
            k = _load_stored(
                k_tile + k_tail, k_tile + offsets * stride_kn, stride_kd, in_keys, key, writes, word14, False,
                HEAD_DIM, BLOCK_D, BLOCK_TAIL, not IS_MASKED, INT64, ENCODING, ROUNDS,
            )  # fmt: skip
            scores = dot(q_tail, tl.trans(k), scores)
        scores *= scale
        if IS_MASKED:
            if MASK == "additive":
                added = tl.load(mask_rows[:, None] + keys[None, :] * stride_mn, mask=in_keys[None, :], other=0)
                scores += added.to(tl.float32) * 1.4426950408889634
            seen = in_keys[None, :] & (keys[None, :] <= last_key[:, None])
            seen &= keys[None, :] > last_key[:, None] - window
            if MASK == "bool":
                seen &= tl.load(mask_rows[:, None] + keys[None, :] * stride_mn, mask=seen, other=0) != 0
            scores = tl.where(seen, scores, float("-inf"))
        weights, row_max, row_sum, acc, tail = _softmax_step(
            scores, row_max, row_sum, acc, tail, BLOCK_TAIL > 0, IS_MASKED
        )
        v = _load_stored(
            v_tile + v_offsets, v_tile + offsets * stride_vn, stride_vd, in_keys, key, writes, word14, True,
            HEAD_DIM, 0, BLOCK_D, not IS_MASKED, INT64, ENCODING, ROUNDS,
        )  # fmt: skip
        weights = narrow(weights, v.dtype)
        acc = dot(weights, v, acc)
        if BLOCK_TAIL:
            v = _load_stored(
                v_tile + v_tail, v_tile + offsets * stride_vn, stride_vd, in_keys, key, writes, word14, True,
                HEAD_DIM, BLOCK_D, BLOCK_TAIL, not IS_MASKED, INT64, ENCODING, ROUNDS,
            )  # fmt: skip
            tail = dot(weights, v, tail)
        k_tile += step_k
        v_tile += step_v
    return acc, tail, row_max, row_sum


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
def _store_heads(
    out_rows, acc, tail, index_ptr, in_rows, stride_xd, stride_od, HEAD_DIM: tl.constexpr, HAS_INDEX: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_TAIL: tl.constexpr,
):  # fmt: skip
    """Write a tile of finished rows, their features in plain order where there is an index."""
    columns = tl.arange(0, BLOCK_D)
    tail_columns = tl.arange(0, max(BLOCK_TAIL, 1)) + BLOCK_D
    acc = narrow(acc, out_rows.dtype.element_ty)
    head = acc
    if BLOCK_TAIL:
        tail = narrow(tail, out_rows.dtype.element_ty)
    if HAS_INDEX:
        index = tl.load(index_ptr + columns * stride_xd, mask=columns < HEAD_DIM, other=0).to(tl.int32)
        head = _in_plain_order(acc, tail, index, BLOCK_D, BLOCK_TAIL)
        if BLOCK_TAIL:
            index = tl.load(index_ptr + tail_columns * stride_xd, mask=tail_columns < HEAD_DIM, other=0).to(tl.int32)
            tail = _in_plain_order(acc, tail, index, BLOCK_D, BLOCK_TAIL)
    mask = in_rows[:, None] & (columns < HEAD_DIM)[None, :]
    tl.store(out_rows[:, None] + columns[None, :].to(tl.int64) * stride_od, head, mask=mask)
    if BLOCK_TAIL:
        mask = in_rows[:, None] & (tail_columns < HEAD_DIM)[None, :]
        tl.store(out_rows[:, None] + tail_columns[None, :].to(tl.int64) * stride_od, tail, mask=mask)


# What changes from request to request is not specialised: one compiled kernel serves every length.
@triton.jit(
    do_not_specialize=["S", "N", "R", "stride_pb", "stride_wb", "layer", "first_head"],
    do_not_specialize_on_alignment=["kv_start_ptr", "kv_length_ptr", "output_index_ptr", "position_ptr", "writes_ptr"],
)
def _attention_kernel(
    # Pointers
    q_ptr,
    k_ptr,
    v_ptr,
    mask_ptr,
    kv_start_ptr,
    kv_length_ptr,
    output_index_ptr,
    position_ptr,
    redundant_ptr,
    key_ptr,
    writes_ptr,
    out_ptr,
    # Sizes
    S,
    N,
    R,
    H,
    heads_per_group,
    window,
    scale,
    layer,
    first_head,
    # Strides
    stride_qb,
    stride_qh,
    stride_qs,
    stride_qd,
    stride_kb,
    stride_kh,
    stride_kn,
    stride_kd,
    stride_vb,
    stride_vh,
    stride_vn,
    stride_vd,
    stride_mb,
    stride_mh,
    stride_ms,
    stride_mn,
    stride_xb,
    stride_xh,
    stride_xd,
    stride_pb,
    stride_ps,
    stride_rb,
    stride_rr,
    stride_rd,
    stride_ob,
    stride_oh,
    stride_os,
    stride_od,
    stride_wb,
    stride_wn,
    # Meta-parameters
    HEAD_DIM: tl.constexpr,
    IS_CAUSAL: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    MASK: tl.constexpr,
    HAS_START: tl.constexpr,
    HAS_LENGTH: tl.constexpr,
    HAS_INDEX: tl.constexpr,
    HAS_POSITION: tl.constexpr,
    HAS_REDUNDANT: tl.constexpr,  # without redundant rows there is no pointer to them
    ENCODING: tl.constexpr,
    ROUNDS: tl.constexpr,
    INT64: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_TAIL: tl.constexpr,
):
    # The last queries see the most keys: they start first. Heads of a group run side by side and share keys in L2.
    sequences_heads = tl.num_programs(0) // (tl.cdiv(S, BLOCK_M) + tl.cdiv(R, BLOCK_M))
    block = tl.cdiv(S, BLOCK_M) - 1 - tl.program_id(0) // sequences_heads
    # int64: sequence, head and row times their stride grow with the whole tensor.
    b = (tl.program_id(0) % sequences_heads // H).to(tl.int64)
    head = (tl.program_id(0) % H).to(tl.int64)
    columns = tl.arange(0, BLOCK_D)
    tail_columns = tl.arange(0, max(BLOCK_TAIL, 1)) + BLOCK_D
    if INT64:
        columns = columns.to(tl.int64)
        tail_columns = tail_columns.to(tl.int64)
    out_ptr += b * stride_ob + head * stride_oh

    if block < 0:
        # Programs past the queries carry redundant rows to their places, this head's columns of them.
        if HAS_REDUNDANT:
            decoy = (-1 - block).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
            in_rows = decoy < R
            place = tl.load(position_ptr + b * stride_pb + (S + decoy) * stride_ps, mask=in_rows, other=0)
            redundant_rows = redundant_ptr + b * stride_rb + decoy * stride_rr + head * HEAD_DIM * stride_rd
            acc = _load_rows(redundant_rows, columns, stride_rd, in_rows, HEAD_DIM, BLOCK_D)
            tail = acc
            if BLOCK_TAIL:
                tail = _load_rows(redundant_rows, tail_columns, stride_rd, in_rows, HEAD_DIM - BLOCK_D, BLOCK_TAIL)
            out_rows = out_ptr + place * stride_os
            _store_heads(out_rows, acc, tail, None, in_rows, 0, stride_od, HEAD_DIM, False, BLOCK_D, BLOCK_TAIL)
        return

    query = block.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    in_rows = query < S
    q_rows = q_ptr + b * stride_qb + head * stride_qh + query * stride_qs
    q = _load_rows(q_rows, columns, stride_qd, in_rows, HEAD_DIM, BLOCK_D)
    q_tail = q
    if BLOCK_TAIL:
        q_tail = _load_rows(q_rows, tail_columns, stride_qd, in_rows, HEAD_DIM - BLOCK_D, BLOCK_TAIL)

    key_start = 0
    key_end = N
    if HAS_START:
        key_start = tl.load(kv_start_ptr + b).to(tl.int32)
    if HAS_LENGTH:
        key_end = tl.minimum(key_start + tl.load(kv_length_ptr + b).to(tl.int32), N)
    last_key = tl.full((BLOCK_M,), N, tl.int32)
    first_seen = N  # by the first query of the block, and by the last
    last_seen = N
    if IS_CAUSAL:
        last_key = (query + (N - S)).to(tl.int32)
        first_seen = block * BLOCK_M + N - S
        last_seen = tl.minimum(block * BLOCK_M + BLOCK_M, S) - 1 + N - S
    lo = key_start + block * 0
    hi = tl.minimum(key_end, last_seen + 1)
    full_lo = lo
    if HAS_WINDOW:
        lo = tl.maximum(lo, first_seen - window + 1)
        full_lo = lo + tl.cdiv(tl.maximum(last_seen - window + 1 - lo, 0), BLOCK_N) * BLOCK_N
    full_hi = full_lo + tl.maximum(tl.minimum(key_end, first_seen + 1) - full_lo, 0) // BLOCK_N * BLOCK_N
    mask_rows = query
    if MASK != "none":
        full_lo = lo
        full_hi = lo
        mask_rows = mask_ptr + b * stride_mb + head * stride_mh + tl.where(in_rows, query, 0) * stride_ms

    k_ptr += b * stride_kb + head // heads_per_group * stride_kh
    v_ptr += b * stride_vb + head // heads_per_group * stride_vh
    key = None
    word14 = None
    if ENCODING == "sealed":
        key = load_key(key_ptr)
        word14 = head_word(layer, first_head + head // heads_per_group)
        writes_ptr += b * stride_wb
    row_max = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    row_sum = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    tail = tl.zeros((BLOCK_M, BLOCK_TAIL if BLOCK_TAIL else 1), tl.float32)
    if HAS_WINDOW and MASK == "none":
        acc, tail, row_max, row_sum = _attend(
            acc, tail, row_max, row_sum, q, q_tail, k_ptr, v_ptr, mask_rows, writes_ptr, key, word14,
            lo, tl.minimum(full_lo, hi), key_end, last_key, window, scale,
            stride_kn, stride_kd, stride_vn, stride_vd, stride_mn, stride_wn,
            HEAD_DIM, True, MASK, ENCODING, ROUNDS, INT64, BLOCK_N, BLOCK_D, BLOCK_TAIL,
        )  # fmt: skip
    if MASK == "none":
        acc, tail, row_max, row_sum = _attend(
            acc, tail, row_max, row_sum, q, q_tail, k_ptr, v_ptr, mask_rows, writes_ptr, key, word14,
            full_lo, full_hi, key_end, last_key, window, scale,
            stride_kn, stride_kd, stride_vn, stride_vd, stride_mn, stride_wn,
            HEAD_DIM, False, MASK, ENCODING, ROUNDS, INT64, BLOCK_N, BLOCK_D, BLOCK_TAIL,
        )  # fmt: skip
    acc, tail, row_max, row_sum = _attend(
        acc, tail, row_max, row_sum, q, q_tail, k_ptr, v_ptr, mask_rows, writes_ptr, key, word14,
        full_hi, hi, key_end, last_key, window, scale,
        stride_kn, stride_kd, stride_vn, stride_vd, stride_mn, stride_wn,
        HEAD_DIM, True, MASK, ENCODING, ROUNDS, INT64, BLOCK_N, BLOCK_D, BLOCK_TAIL,
    )  # fmt: skip

    # A query that sees no key (padding) gives zeros.
    scale_out = 1.0 / tl.where(row_sum == 0, 1.0, row_sum)
    row = query
    if HAS_POSITION:
        row = tl.load(position_ptr + b * stride_pb + query * stride_ps, mask=in_rows, other=0)
    index_ptr = output_index_ptr
    if HAS_INDEX:
        index_ptr += b * stride_xb + head * stride_xh
    _store_heads(
        out_ptr + row * stride_os, acc * scale_out[:, None], tail * scale_out[:, None], index_ptr, in_rows,
        stride_xd, stride_od, HEAD_DIM, HAS_INDEX, BLOCK_D, BLOCK_TAIL,
    )  # fmt: skip


@triton.jit(
    do_not_specialize=["S", "N", "splits", "stride_pb", "stride_wb", "layer", "first_head"],
    do_not_specialize_on_alignment=[
        "kv_start_ptr",
        "kv_length_ptr",
        "position_ptr",
        "writes_ptr",
        "max_ptr",
        "sum_ptr",
    ],
)
def _step_kernel(
    # Pointers
    q_ptr,
    k_ptr,
    v_ptr,
    kv_start_ptr,
    kv_length_ptr,
    position_ptr,
    key_ptr,
    writes_ptr,
    partial_ptr,
    max_ptr,
    sum_ptr,
    # Sizes
    S,
    N,
    H,
    heads_per_group,
    splits,
    window,
    scale,
    layer,
    first_head,
    # Strides
    stride_qb,
    stride_qh,
    stride_qs,
    stride_qd,
    stride_kb,
    stride_kh,
    stride_kn,
    stride_kd,
    stride_vb,
    stride_vh,
    stride_vn,
    stride_vd,
    stride_pb,
    stride_pn,
    stride_wb,
    stride_wn,
    # Meta-parameters
    HEAD_DIM: tl.constexpr,
    HAS_START: tl.constexpr,
    HAS_LENGTH: tl.constexpr,
    HAS_POSITION: tl.constexpr,
    ENCODING: tl.constexpr,
    ROUNDS: tl.constexpr,
    INT64: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_TAIL: tl.constexpr,
):
    groups = H // heads_per_group
    split = tl.program_id(0) % splits
    # int64: sequence, head and row times their stride grow with the whole tensor.
    b = (tl.program_id(0) // splits // groups).to(tl.int64)
    group = (tl.program_id(0) // splits % groups).to(tl.int64)
    # The queries of all heads of the group, head after head.
    row = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    in_rows = row < heads_per_group * S
    head = group * heads_per_group + row // S
    token = row % S
    columns = tl.arange(0, BLOCK_D)
    tail_columns = tl.arange(0, max(BLOCK_TAIL, 1)) + BLOCK_D
    if INT64:
        columns = columns.to(tl.int64)
        tail_columns = tail_columns.to(tl.int64)
    IS_KNOWN: tl.constexpr = not (HAS_START or HAS_LENGTH or HAS_POSITION)  # which rows these are
    if not IS_KNOWN:
        begin()
    key_start = 0
    key_end = N
    if HAS_START:
        key_start = tl.load(kv_start_ptr + b).to(tl.int32)
    if HAS_LENGTH:
        key_end = tl.minimum(key_start + tl.load(kv_length_ptr + b).to(tl.int32), N)
    last_key = key_end - S + token
    # Each sequence cuts its own keys, so that short sequences do not leave programs idle at the end of long ones.
    first = tl.maximum(key_start, key_end - S - window + 1)
    chunk = tl.cdiv(tl.cdiv(tl.maximum(key_end - first, 0), splits), BLOCK_N) * BLOCK_N
    lo = first + split * chunk
    hi = tl.minimum(lo + chunk, key_end)
    k_ptr += b * stride_kb + group * stride_kh
    v_ptr += b * stride_vb + group * stride_vh
    if IS_KNOWN:
        if ENCODING != "sealed":  # a cipher has enough to wait for
            _prefetch_rows(k_ptr, lo, N, stride_kn, stride_kd, HEAD_DIM, BLOCK_N)
            _prefetch_rows(v_ptr, lo, N, stride_vn, stride_vd, HEAD_DIM, BLOCK_N)
        begin()

    q_rows = q_ptr + b * stride_qb + head * stride_qh + token * stride_qs
    q = _load_rows(q_rows, columns, stride_qd, in_rows, HEAD_DIM, BLOCK_D)
    if BLOCK_TAIL:
        q_tail = _load_rows(q_rows, tail_columns, stride_qd, in_rows, HEAD_DIM - BLOCK_D, BLOCK_TAIL)
    key = None
    word14 = None
    if ENCODING == "sealed":
        key = load_key(key_ptr)
        word14 = head_word(layer, first_head + group)
        writes_ptr += b * stride_wb
    row_max = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    row_sum = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    tail = tl.zeros((BLOCK_M, BLOCK_TAIL if BLOCK_TAIL else 1), tl.float32)
    for start in range(lo, hi, BLOCK_N):
        keys = start + tl.arange(0, BLOCK_N)
        in_keys = keys < hi
        cache_row = keys.to(tl.int64)
        if HAS_POSITION:
            cache_row = tl.load(position_ptr + b * stride_pb + cache_row * stride_pn, mask=in_keys, other=0)
        writes = None
        if ENCODING == "sealed":
            writes = tl.load(writes_ptr + cache_row * stride_wn, mask=in_keys, other=EMPTY)
        k_rows = k_ptr + cache_row * stride_kn
        v_rows = v_ptr + cache_row * stride_vn
        k = _load_stored(
            k_rows[:, None] + columns[None, :] * stride_kd, k_rows, stride_kd, in_keys, key, writes, word14, False,
            HEAD_DIM, 0, BLOCK_D, False, INT64, ENCODING, ROUNDS,
        )  # fmt: skip
        scores = dot(q, tl.trans(k), tl.zeros((BLOCK_M, BLOCK_N), tl.float32))
        if BLOCK_TAIL:
            k = _load_stored(
                k_rows[:, None] + tail_columns[None, :] * stride_kd, k_rows, stride_kd, in_keys, key, writes, word14,
                False, HEAD_DIM, BLOCK_D, BLOCK_TAIL, False, INT64, ENCODING, ROUNDS,
            )  # fmt: skip
            scores = dot(q_tail, tl.trans(k), scores)
        seen = in_keys[None, :] & (keys[None, :] <= last_key[:, None])
        seen &= keys[None, :] > last_key[:, None] - window
        scores = tl.where(seen, scores * scale, float("-inf"))
        weights, row_max, row_sum, acc, tail = _softmax_step(scores, row_max, row_sum, acc, tail, BLOCK_TAIL > 0, True)
        v = _load_stored(
            v_rows[:, None] + columns[None, :] * stride_vd, v_rows, stride_vd, in_keys, key, writes, word14, True,
            HEAD_DIM, 0, BLOCK_D, False, INT64, ENCODING, ROUNDS,
        )  # fmt: skip
        weights = narrow(weights, v.dtype)
        acc = dot(weights, v, acc)
        if BLOCK_TAIL:
            v = _load_stored(
                v_rows[:, None] + tail_columns[None, :] * stride_vd, v_rows, stride_vd, in_keys, key, writes, word14,
                True, HEAD_DIM, BLOCK_D, BLOCK_TAIL, False, INT64, ENCODING, ROUNDS,
            )  # fmt: skip
            tail = dot(weights, v, tail)

    # Workspaces are (B, H, S, splits(, d)), contiguous.
    place = ((b * H + head) * S + token) * splits + split
    tl.store(max_ptr + place, row_max, mask=in_rows)
    tl.store(sum_ptr + place, row_sum, mask=in_rows)
    partial_rows = partial_ptr + place * HEAD_DIM
    _store_heads(partial_rows, acc, tail, None, in_rows, 0, 1, HEAD_DIM, False, BLOCK_D, BLOCK_TAIL)


@triton.jit(
    do_not_specialize=["S", "splits"],
    do_not_specialize_on_alignment=["max_ptr", "sum_ptr", "output_index_ptr"],
)
def _combine_kernel(
    # Pointers
    partial_ptr,
    max_ptr,
    sum_ptr,
    output_index_ptr,
    out_ptr,
    # Sizes
    S,
    H,
    splits,
    # Strides
    stride_xb,
    stride_xh,
    stride_xd,
    stride_ob,
    stride_oh,
    stride_os,
    stride_od,
    # Meta-parameters
    HEAD_DIM: tl.constexpr,
    HAS_INDEX: tl.constexpr,
    BLOCK_SPLITS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    # int64: (sequence, head, token) times splits times features grows with the whole workspace.
    row = tl.program_id(0).to(tl.int64)
    b = row // S // H
    head = row // S % H
    token = row % S
    split = tl.arange(0, BLOCK_SPLITS)
    in_splits = split < splits
    columns = tl.arange(0, BLOCK_D)
    in_head = columns < HEAD_DIM
    if HAS_INDEX:  # a key, older than the kernel that is waited for
        index_ptr = output_index_ptr + b * stride_xb + head * stride_xh
        index = tl.load(index_ptr + columns * stride_xd, mask=in_head, other=0).to(tl.int32)
    begin()
    row_max = tl.load(max_ptr + row * splits + split, mask=in_splits, other=float("-inf"))
    row_sum = tl.load(sum_ptr + row * splits + split, mask=in_splits, other=0)
    total_max = tl.max(row_max, axis=0)
    share = tl.math.exp2(row_max - tl.where(total_max == float("-inf"), 0.0, total_max))
    total = tl.sum(row_sum * share, axis=0)

    pointers = partial_ptr + (row * splits + split)[:, None] * HEAD_DIM + columns[None, :]
    partial = tl.load(pointers, mask=in_splits[:, None] & in_head[None, :], other=0)
    out = tl.sum(partial * share[:, None], axis=0, keep_dims=True) / tl.where(total == 0, 1.0, total)
    if HAS_INDEX:  # on the chip: gathered from memory, features would come one by one
        out = tl.gather(out, index[None, :], axis=1)
    out_row = out_ptr + b * stride_ob + head * stride_oh + token * stride_os
    place = columns.to(tl.int64)[None, :] * stride_od
    tl.store(out_row + place, narrow(out, out_ptr.dtype.element_ty), mask=in_head[None, :])


def _head_blocks(size: int) -> dict[str, int]:
    """d as a power of two and a tail, where that pads less than the next power of two."""
    whole = max(16, triton.next_power_of_2(size))
    half = whole // 2
    tail = max(16, triton.next_power_of_2(max(1, size - half)))
    if half < 16 or half + tail >= whole:
        return {"BLOCK_D": whole, "BLOCK_TAIL": 0}
    return {"BLOCK_D": half, "BLOCK_TAIL": tail}


def attention_tile(
    tokens: int, size: int, dtype: torch.dtype, hidden: bool, sealed: bool, target: Target
) -> dict[str, Any]:
    """Meta-parameters of `attention`: the widest tile whose accumulators stay in registers (read from the compiled
    code, not timed). `hidden`: a window, a mask or a first key hides keys of the sequence, which costs registers."""
    blocks = _head_blocks(size)
    width = blocks["BLOCK_D"] + blocks["BLOCK_TAIL"]
    if dtype == torch.float32:
        wide = width > 128 or hidden
        # Sixteen of AMD's waves would leave each lane 128 registers.
        rows, keys, warps, stages = 32, 16 if wide else 32, 16 if wide and target.backend == "cuda" else 8, 1
    elif target.backend == "hip":
        rows, keys, warps, stages = (128, 64, 4, 1) if width <= 128 else (64, 32, 4, 1)
    elif target.arch < 90:
        if width <= 96:
            rows, keys, warps, stages = 128, 64, 8, 3
        elif width <= 128:
            rows, keys, warps, stages = 64, 32, 4, 3
        else:
            rows, keys, warps, stages = (64, 16, 4, 2) if blocks["BLOCK_TAIL"] else (64, 32, 8, 2)
    elif width <= 128:
        rows, keys, warps, stages = (128, 64, 8, 3) if hidden or target.arch > 90 else (128, 128, 8, 2)
        if tokens <= 64:
            rows, keys, warps, stages = 64, 64, 4, 3
    elif blocks["BLOCK_TAIL"]:
        rows, keys, warps, stages = (128, 64, 8, 2) if target.arch == 90 and not hidden else (128, 32, 8, 2)
    else:
        rows, keys, warps, stages = (128, 32, 8, 2) if target.arch == 90 else (64, 64, 8, 2)
    if sealed:
        # A keystream is computed while its load is under way: no need to load ahead, and its state needs registers.
        keys, stages = min(keys, 64), 1
        if dtype == torch.float32 and warps == 16:
            rows, warps = 16, 8  # more rows, or fewer registers a thread, spill; rows add up in the same order
        elif width > 128 and blocks["BLOCK_TAIL"] and target.backend == "cuda" and target.arch < 90:
            stages = 2  # one spills
        elif blocks["BLOCK_TAIL"] and hidden and target.backend == "cuda" and target.arch < 90 and dtype.itemsize == 2:
            keys = 32  # 64 beside a mask's pointers spill
        elif width > 128 and not blocks["BLOCK_TAIL"] and hidden and target.backend == "cuda" and target.arch == 90:
            rows = 64  # with 128, a mask's pointers beside the cipher's state spill
    return blocks | {"BLOCK_M": rows, "BLOCK_N": keys, "num_warps": warps, "num_stages": stages}


def step_tile(
    batch: int, groups: int, rows: int, keys: int, size: int, dtype: torch.dtype, permuted: bool, sealed: bool,
    target: Target,
) -> dict[str, Any]:  # fmt: skip
    """Meta-parameters of `attention_step` and, as "splits", over how many programs a sequence's keys are spread.

    On an H100 one program a multiprocessor, with three tiles on their way, reads a cache faster than two. A sealed one
    is arithmetic: four programs of one block of the cipher a thread are faster than two of two. Those of a
    multiprocessor do not end together, so in a long cache four others follow them."""
    blocks = _head_blocks(size)
    width = blocks["BLOCK_D"] + blocks["BLOCK_TAIL"]
    block_m = max(16, triton.next_power_of_2(rows))
    programs = 2
    if dtype == torch.float32:
        block_m, block_n, warps, stages = min(32, block_m), 32, 8, 1
        if width > 128:
            block_m, block_n, stages = 16, 16, 2 if target.backend == "cuda" else 1
    elif target.backend == "hip":
        block_m, block_n, warps, stages = min(64, block_m), 32, 4, 2
    elif width > 128:
        block_m, block_n, warps, stages = min(32, block_m), 32, 4, 2
    else:
        block_m, warps = min(64, block_m), 4
        block_n, stages = (32, 4) if blocks["BLOCK_TAIL"] else (64, 3)
        if permuted and (target.arch >= 90 or not blocks["BLOCK_TAIL"]):
            # The position is a load ahead of the loads of K and V: two stages more keep as much of those in flight.
            stages += 2
        elif not blocks["BLOCK_TAIL"] and not sealed:
            programs = 1
    # A short cache of few heads would leave most of the machine idle.
    splits = max(triton.cdiv(keys, 256), min(32, triton.cdiv(keys, 64)))
    if sealed:
        # As in `attention_tile`. One stage spills where there is a tail, but in float32, where two do, unless the head
        # is wide.
        wide = width > 128 and target.backend == "cuda"
        stages = 2 if blocks["BLOCK_TAIL"] and (dtype != torch.float32 or wide) else 1
        if target.arch == 100 and width <= 64 and dtype != torch.float32:
            stages = 3
        block_m = 16 if blocks["BLOCK_TAIL"] and dtype == torch.float32 else block_m
        if dtype != torch.float32 and target.backend == "cuda" and width <= 128 and not blocks["BLOCK_TAIL"]:
            block_n, splits = 4096 // width, triton.cdiv(keys, 64)
            programs = 8 if keys * batch * groups >= 8 * 192 * target.multiprocessors else 4
    splits = max(1, min(splits, programs * target.multiprocessors // max(1, batch * groups)))
    # Programs take whole tiles: some would find none left.
    chunk = triton.cdiv(triton.cdiv(keys, splits), block_n) * block_n
    splits = triton.cdiv(keys, max(1, chunk))
    tile = {"BLOCK_M": block_m, "BLOCK_N": block_n, "num_warps": warps, "num_stages": stages}
    return blocks | tile | {"splits": max(1, splits)}


def combine_tile(splits: int, size: int) -> dict[str, Any]:
    """Meta-parameters of the pass that adds up what `attention_step`'s programs found: few threads, which wait for each
    other less, unless there is much to add."""
    blocks = {"BLOCK_SPLITS": triton.next_power_of_2(splits), "BLOCK_D": triton.next_power_of_2(size)}
    return blocks | {"num_warps": 2 if math.prod(blocks.values()) <= 4096 else 4}


def _check_head(q: Tensor, v: Tensor) -> None:
    check_dtype("q", q)
    if v.shape[3] != q.shape[3] or not 0 < q.shape[3] <= 256:
        raise ValueError(f"v: expected q's head size, at most 256, got {v.shape[3]} and {q.shape[3]}")


def _inverse(permutation: Tensor) -> Tensor:
    """The inverse of (B, n) permutations."""
    places = torch.arange(permutation.shape[1], device=permutation.device).expand(permutation.shape)
    return torch.empty_like(permutation).scatter_(1, permutation, places)


def _is_aligned(mask: Tensor) -> bool:
    """Whether a mask's rows begin at multiples of 16 elements. At others its pointers take so many registers that the
    kernel spills, and an odd number of keys would be one more variant to compile."""
    return mask.dim() < 2 or mask.stride(-2) % 16 == 0


def _aligned(mask: Tensor) -> Tensor:
    """A copy that is aligned."""
    keys = mask.shape[-1]
    return mask.new_empty(*mask.shape[:-1], triton.cdiv(keys, 16) * 16)[..., :keys].copy_(mask)


@planned
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    softmax_scale: float,
    mask: Tensor | None = None,
    is_causal: bool = False,
    window: int | None = None,
    kv_start: Tensor | None = None,
    kv_length: Tensor | None = None,
    output_index: Tensor | None = None,
    row_index: Tensor | None = None,
    redundant: Tensor | None = None,
    sealing: Sealing | None = None,
    out: Tensor | None = None,
    tile: dict[str, Any] | None = None,
    force_int64: bool = False,
) -> Tensor:
    """`scx_kernels.attention` for float32, float16 and bfloat16, any strides, head sizes up to 256, in one kernel.

    Args:
        mask: slow: every tile is masked. Copied first where its rows are not aligned.
        sealing: every program takes the keystream off the keys it sees, in registers, once for each block of queries.
        out: (B, H, S, d), or (B, T, H*d) with row_index, any strides; by default in memory by tokens.
        tile: overrides of `attention_tile`. force_int64: 64-bit column offsets even where 32 bits suffice.

    Source: Dao, FlashAttention-2 (arXiv 2307.08691).
    """
    check_attention(
        q, k, v, softmax_scale, mask, is_causal, window, kv_start, kv_length, output_index, row_index, redundant
    )
    _check_head(q, v)
    check_cache(k, v, sealing)
    (batch, heads, tokens, size), keys = q.shape, k.shape[2]
    decoys = 0 if redundant is None else redundant.shape[1]
    position = None if row_index is None else derive(_inverse, row_index)
    if mask is not None:
        aligned = mask if _is_aligned(mask) else derive(_aligned, mask)
        mask = aligned.expand(batch, heads, tokens, keys)
    mask_kind = "none" if mask is None else "bool" if mask.dtype == torch.bool else "additive"

    if out is None and position is None:
        out = empty(q, (batch, heads, tokens, size), strides=by_tokens(heads, tokens, size))
    elif out is None:
        out = empty(q, (batch, tokens + decoys, heads * size))
    out_strides = out.stride()
    if position is not None:
        out_strides = (out.stride(0), size * out.stride(2), out.stride(1), out.stride(2))
    hidden = mask is not None or window is not None or kv_start is not None
    target = target_of(q.device)
    heuristic = attention_tile(tokens, size, q.dtype, hidden, sealing is not None, target)
    variant = " ".join(name for name, has in (("hidden", hidden), ("sealed", sealing is not None)) if has)
    meta = choose_tile("attention", heuristic, tile, target, q.dtype, variant, tokens=tokens, keys=keys, head_dim=size)
    blocks = triton.cdiv(tokens, meta["BLOCK_M"]) + triton.cdiv(decoys, meta["BLOCK_M"])
    launch(
        _attention_kernel,
        (batch * heads * blocks,),
        *(q, k, v, mask, kv_start, kv_length, output_index, position, redundant, *key_and_writes(sealing), out),
        *(tokens, keys, decoys, heads, heads // k.shape[1], window or NO_WINDOW, softmax_scale * LOG2E),
        *layer_and_head(sealing),
        *(*q.stride(), *k.stride(), *v.stride(), *strides(mask, 4), *strides(output_index, 3)),
        *(*strides(position, 2), *strides(redundant, 3), *out_strides, *strides(key_and_writes(sealing)[1], 2)),
        HEAD_DIM=size,
        IS_CAUSAL=is_causal,
        HAS_WINDOW=window is not None,
        MASK=mask_kind,
        HAS_START=kv_start is not None,
        HAS_LENGTH=kv_length is not None,
        HAS_INDEX=output_index is not None,
        HAS_POSITION=position is not None,
        HAS_REDUNDANT=redundant is not None,
        **encoding_of(sealing),
        INT64=force_int64 or exceeds_int32(q, k, v, redundant),
        device=q.device,
        **meta,
    )
    return out


@planned
def attention_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    softmax_scale: float,
    window: int | None = None,
    kv_start: Tensor | None = None,
    kv_length: Tensor | None = None,
    position: Tensor | None = None,
    output_index: Tensor | None = None,
    sealing: Sealing | None = None,
    out: Tensor | None = None,
    tile: dict[str, Any] | None = None,
    force_int64: bool = False,
) -> Tensor:
    """`scx_kernels.attention_step` for float32, float16 and bfloat16, any strides, head sizes up to 256: the cache
    split over programs, and a second kernel that combines what they found.

    Args:
        kv_length: read on the device only, so that a captured graph can move on.
        sealing: the keystream is taken off in registers, once for all query heads of a group.
        out: (B, H, S, d), any strides; by default in memory by tokens.
        tile: overrides of `step_tile`. force_int64: 64-bit column offsets even where 32 bits suffice.

    Source: Dao et al., Flash-Decoding (2023).
    """
    check_attention_step(q, k, v, softmax_scale, window, kv_start, kv_length, position, output_index)
    _check_head(q, v)
    check_cache(k, v, sealing)
    (batch, heads, tokens, size), groups = q.shape, k.shape[1]
    keys = k.shape[2] if position is None else position.shape[1]
    if out is None:
        out = empty(q, (batch, heads, tokens, size), strides=by_tokens(heads, tokens, size))
    rows = heads // groups * tokens
    target = target_of(q.device)
    permuted, sealed = position is not None, sealing is not None
    heuristic = step_tile(batch, groups, rows, keys, size, q.dtype, permuted, sealed, target)
    variant = " ".join(name for name, has in (("permuted", permuted), ("sealed", sealed)) if has)
    sizes = {"sequences": batch * groups, "rows": rows, "keys": keys, "head_dim": size}
    meta = choose_tile("attention_step", heuristic, tile, target, q.dtype, variant, **sizes)
    splits = meta.pop("splits")
    parts = batch * heads * tokens * splits
    partial, row_max, row_sum = empty(q, (parts * (size + 2),), torch.float32).split_with_sizes(
        (parts * size, parts, parts)
    )
    launch(
        _step_kernel,
        (batch * groups * splits, triton.cdiv(rows, meta["BLOCK_M"])),
        *(q, k, v, kv_start, kv_length, position, *key_and_writes(sealing), partial, row_max, row_sum),
        *(tokens, keys, heads, heads // groups, splits, window or NO_WINDOW, softmax_scale * LOG2E),
        *layer_and_head(sealing),
        *(*q.stride(), *k.stride(), *v.stride(), *strides(position, 2), *strides(key_and_writes(sealing)[1], 2)),
        HEAD_DIM=size,
        HAS_START=kv_start is not None,
        HAS_LENGTH=kv_length is not None,
        HAS_POSITION=position is not None,
        **encoding_of(sealing),
        INT64=force_int64 or exceeds_int32(q, k, v),
        ahead=True,
        device=q.device,
        **meta,
    )
    launch(
        _combine_kernel,
        (batch * heads * tokens,),
        *(partial, row_max, row_sum, output_index, out),
        *(tokens, heads, splits, *strides(output_index, 3), *out.stride()),
        HEAD_DIM=size,
        HAS_INDEX=output_index is not None,
        **combine_tile(splits, size),
        ahead=True,
        device=q.device,
    )
    return out
