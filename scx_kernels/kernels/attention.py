"""Attention of many queries on feature-permuted Q, K, V. QKᵀ sums over features, so a feature order common to Q and K
does not matter; V's order is undone where the output is stored.

| array          | shape     | values   | meaning                                                                 |
|----------------|-----------|----------|-------------------------------------------------------------------------|
| `output_index` | (B, H, d) | 0..d-1   | plain feature i of the output is feature `output_index[i]` in V's order |
| `position`     | (B, S+R)  | 0..S+R-1 | row n of output ⊕ redundant goes to row `position[n]`                   |

A program keeps BLOCK_M queries of a head and runs over all their keys. `attention_step` (`attention_step.py`), for few
queries, is found here as well.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from scx_kernels.checks import check_attention
from scx_kernels.kernels.attention_step import attention_step, step_tile
from scx_kernels.kernels.chacha import EMPTY, head_word, load_key
from scx_kernels.kernels.heads import (
    LOG2E,
    NO_WINDOW,
    add_values,
    check_head,
    head_blocks,
    load_rows,
    scores_of,
    softmax_step,
    store_heads,
)
from scx_kernels.kernels.launch import Target, by_tokens, choose_tile, exceeds_int32, launch, strides, target_of
from scx_kernels.kernels.plans import derive, empty, planned
from scx_kernels.kernels.sealing import encoding_of, key_and_writes, layer_and_head
from scx_kernels.sealing import Sealing, check_cache

__all__ = ["attention", "attention_step", "attention_tile", "step_tile"]


@triton.jit
def _attend(
    acc, tail, row_max, row_sum, q, q_tail,
    # Pointers, at the program's head
    k_ptr, v_ptr, mask_rows, writes_ptr,
    # Of sealed K and V
    seal_key, word14,
    # The keys lo..hi-1, and which of them a query sees
    lo, hi, key_end, last_key, window, scale,
    # Strides
    stride_k_row, stride_k_feature,
    stride_v_row, stride_v_feature,
    stride_mask_key,
    stride_writes_row,
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
):  # fmt: skip
    offsets = tl.arange(0, BLOCK_N)
    columns = tl.arange(0, BLOCK_D)
    tail_columns = tl.arange(0, max(BLOCK_TAIL, 1)) + BLOCK_D
    if INT64:
        offsets = offsets.to(tl.int64)
        columns = columns.to(tl.int64)
        tail_columns = tail_columns.to(tl.int64)
    # int64: key * stride passes 2^31 in a long cache. Within a tile 32 bits do, and cost half the registers.
    k_tile = k_ptr + lo.to(tl.int64) * stride_k_row
    v_tile = v_ptr + lo.to(tl.int64) * stride_v_row
    k_offsets = offsets[:, None] * stride_k_row + columns[None, :] * stride_k_feature
    v_offsets = offsets[:, None] * stride_v_row + columns[None, :] * stride_v_feature
    k_tail = k_offsets
    v_tail = v_offsets
    if BLOCK_TAIL:
        k_tail = offsets[:, None] * stride_k_row + tail_columns[None, :] * stride_k_feature
        v_tail = offsets[:, None] * stride_v_row + tail_columns[None, :] * stride_v_feature
    step_k = tl.full((), BLOCK_N, tl.int64) * stride_k_row
    step_v = tl.full((), BLOCK_N, tl.int64) * stride_v_row
    for start in range(lo, hi, BLOCK_N):
        keys = start + tl.arange(0, BLOCK_N)
        in_keys = keys < key_end
        writes = None
        if ENCODING == "sealed":
            number = writes_ptr + keys.to(tl.int64) * stride_writes_row
            writes = tl.load(number, mask=in_keys, other=EMPTY) if IS_MASKED else tl.load(number)
        scores = scores_of(
            q, q_tail, k_tile, k_offsets, k_tail, k_tile + offsets * stride_k_row, stride_k_feature, in_keys, seal_key,
            writes, word14, HEAD_DIM, not IS_MASKED, INT64, ENCODING, ROUNDS, BLOCK_N, BLOCK_D, BLOCK_TAIL,
        )  # fmt: skip
        scores *= scale
        if IS_MASKED:
            if MASK == "additive":
                added = tl.load(mask_rows[:, None] + keys[None, :] * stride_mask_key, mask=in_keys[None, :], other=0)
                added = added.to(tl.float32)
                # Where the lowest numbers hide every key, all count alike; times log2(e) they would be -inf, which
                # hides a key for good.
                added = tl.where(added > float("-inf"), tl.maximum(added, -2.3586e38), added)
                scores += added * 1.4426950408889634
            seen = in_keys[None, :] & (keys[None, :] <= last_key[:, None])
            seen &= keys[None, :] > last_key[:, None] - window
            if MASK == "bool":
                seen &= tl.load(mask_rows[:, None] + keys[None, :] * stride_mask_key, mask=seen, other=0) != 0
            scores = tl.where(seen, scores, float("-inf"))
        weights, row_max, row_sum, acc, tail = softmax_step(
            scores, row_max, row_sum, acc, tail, BLOCK_TAIL > 0, IS_MASKED
        )
        acc, tail = add_values(
            acc, tail, weights, v_tile, v_offsets, v_tail, v_tile + offsets * stride_v_row, stride_v_feature, in_keys,
            seal_key, writes, word14, HEAD_DIM, not IS_MASKED, INT64, ENCODING, ROUNDS, BLOCK_D, BLOCK_TAIL,
        )  # fmt: skip
        k_tile += step_k
        v_tile += step_v
    return acc, tail, row_max, row_sum


# What changes from request to request is not specialised: one compiled kernel serves every length.
@triton.jit(
    do_not_specialize=["S", "N", "R", "stride_position_sequence", "stride_writes_sequence", "layer", "first_head"],
    do_not_specialize_on_alignment=["kv_start_ptr", "kv_length_ptr", "output_index_ptr", "position_ptr", "writes_ptr"],
)
def _attention_kernel(
    # Pointers
    q_ptr, k_ptr, v_ptr, mask_ptr, kv_start_ptr, kv_length_ptr,
    output_index_ptr, position_ptr, redundant_ptr, seal_key_ptr, writes_ptr, out_ptr,
    # Sizes
    S,  # queries of a sequence
    N,  # its keys
    R,  # its redundant rows
    H,  # query heads
    heads_per_group, window, scale,
    layer,  # of sealed K and V, as the next
    first_head,
    # Strides
    stride_q_sequence, stride_q_head, stride_q_token, stride_q_feature,
    stride_k_sequence, stride_k_head, stride_k_row, stride_k_feature,
    stride_v_sequence, stride_v_head, stride_v_row, stride_v_feature,
    stride_mask_sequence, stride_mask_head, stride_mask_query, stride_mask_key,
    stride_output_index_sequence, stride_output_index_head, stride_output_index_feature,
    stride_position_sequence, stride_position_row,
    stride_redundant_sequence, stride_redundant_row, stride_redundant_feature,
    stride_out_sequence, stride_out_head, stride_out_row, stride_out_feature,
    stride_writes_sequence, stride_writes_row,
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
):  # fmt: skip
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
    out_ptr += b * stride_out_sequence + head * stride_out_head

    if block < 0:
        # Programs past the queries carry redundant rows to their places, this head's columns of them.
        if HAS_REDUNDANT:
            decoy = (-1 - block).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
            in_rows = decoy < R
            positions = position_ptr + b * stride_position_sequence + (S + decoy) * stride_position_row
            place = tl.load(positions, mask=in_rows, other=0)
            redundant_rows = redundant_ptr + b * stride_redundant_sequence + decoy * stride_redundant_row
            redundant_rows += head * HEAD_DIM * stride_redundant_feature
            acc = load_rows(redundant_rows, columns, stride_redundant_feature, in_rows, HEAD_DIM, BLOCK_D)
            tail = acc
            if BLOCK_TAIL:
                tail = load_rows(
                    redundant_rows, tail_columns, stride_redundant_feature, in_rows, HEAD_DIM - BLOCK_D, BLOCK_TAIL
                )
            out_rows = out_ptr + place * stride_out_row
            store_heads(out_rows, acc, tail, None, in_rows, 0, stride_out_feature, HEAD_DIM, False, BLOCK_D, BLOCK_TAIL)
        return

    query = block.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    in_rows = query < S
    q_rows = q_ptr + b * stride_q_sequence + head * stride_q_head + query * stride_q_token
    q = load_rows(q_rows, columns, stride_q_feature, in_rows, HEAD_DIM, BLOCK_D)
    q_tail = q
    if BLOCK_TAIL:
        q_tail = load_rows(q_rows, tail_columns, stride_q_feature, in_rows, HEAD_DIM - BLOCK_D, BLOCK_TAIL)

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
        mask_rows = mask_ptr + b * stride_mask_sequence + head * stride_mask_head
        mask_rows += tl.where(in_rows, query, 0) * stride_mask_query

    k_ptr += b * stride_k_sequence + head // heads_per_group * stride_k_head
    v_ptr += b * stride_v_sequence + head // heads_per_group * stride_v_head
    seal_key = None
    word14 = None
    if ENCODING == "sealed":
        seal_key = load_key(seal_key_ptr)
        word14 = head_word(layer, first_head + head // heads_per_group)
        writes_ptr += b * stride_writes_sequence
    row_max = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    row_sum = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    tail = tl.zeros((BLOCK_M, BLOCK_TAIL if BLOCK_TAIL else 1), tl.float32)
    if HAS_WINDOW and MASK == "none":
        acc, tail, row_max, row_sum = _attend(
            acc, tail, row_max, row_sum, q, q_tail, k_ptr, v_ptr, mask_rows, writes_ptr, seal_key, word14,
            lo, tl.minimum(full_lo, hi), key_end, last_key, window, scale,
            stride_k_row, stride_k_feature, stride_v_row, stride_v_feature, stride_mask_key, stride_writes_row,
            HEAD_DIM, True, MASK, ENCODING, ROUNDS, INT64, BLOCK_N, BLOCK_D, BLOCK_TAIL,
        )  # fmt: skip
    if MASK == "none":
        acc, tail, row_max, row_sum = _attend(
            acc, tail, row_max, row_sum, q, q_tail, k_ptr, v_ptr, mask_rows, writes_ptr, seal_key, word14,
            full_lo, full_hi, key_end, last_key, window, scale,
            stride_k_row, stride_k_feature, stride_v_row, stride_v_feature, stride_mask_key, stride_writes_row,
            HEAD_DIM, False, MASK, ENCODING, ROUNDS, INT64, BLOCK_N, BLOCK_D, BLOCK_TAIL,
        )  # fmt: skip
    acc, tail, row_max, row_sum = _attend(
        acc, tail, row_max, row_sum, q, q_tail, k_ptr, v_ptr, mask_rows, writes_ptr, seal_key, word14,
        full_hi, hi, key_end, last_key, window, scale,
        stride_k_row, stride_k_feature, stride_v_row, stride_v_feature, stride_mask_key, stride_writes_row,
        HEAD_DIM, True, MASK, ENCODING, ROUNDS, INT64, BLOCK_N, BLOCK_D, BLOCK_TAIL,
    )  # fmt: skip

    # A query that sees no key (padding) gives zeros.
    scale_out = 1.0 / tl.where(row_sum == 0, 1.0, row_sum)
    row = query
    if HAS_POSITION:
        row = tl.load(position_ptr + b * stride_position_sequence + query * stride_position_row, mask=in_rows, other=0)
    index_ptr = output_index_ptr
    if HAS_INDEX:
        index_ptr += b * stride_output_index_sequence + head * stride_output_index_head
    store_heads(
        out_ptr + row * stride_out_row, acc * scale_out[:, None], tail * scale_out[:, None], index_ptr, in_rows,
        stride_output_index_feature, stride_out_feature, HEAD_DIM, HAS_INDEX, BLOCK_D, BLOCK_TAIL,
    )  # fmt: skip


def attention_tile(
    tokens: int, size: int, dtype: torch.dtype, hidden: bool, sealed: bool, target: Target
) -> dict[str, Any]:
    """Meta-parameters of `attention`: the widest tile whose accumulators stay in registers (read from the compiled
    code, not timed). `hidden`: a window, a mask or a first key hides keys of the sequence, which costs registers."""
    blocks = head_blocks(size)
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
    check_head(q, v)
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
