"""Attention of a sequence's last few queries on its encoded cache.

| array          | shape     | values        | meaning                                                                 |
|----------------|-----------|---------------|-------------------------------------------------------------------------|
| `output_index` | (B, H, d) | 0..d-1        | plain feature i of the output is feature `output_index[i]` in V's order |
| `position`     | (B, N)    | 0..capacity-1 | key n lies in cache row `position[n]`                                   |

The queries of a key head's group are packed in one tile, and the keys split over programs; a second kernel adds up what
they found.
"""

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from scx_kernels.checks import check_attention_step
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
from scx_kernels.kernels.launch import (
    Target,
    begin,
    by_tokens,
    choose_tile,
    exceeds_int32,
    launch,
    narrow,
    prefetch,
    strides,
    target_of,
)
from scx_kernels.kernels.plans import empty, planned
from scx_kernels.kernels.sealing import encoding_of, key_and_writes, layer_and_head
from scx_kernels.sealing import Sealing, check_cache

__all__ = ["attention_step", "combine_tile", "step_tile"]


@triton.jit
def _prefetch_rows(head_ptr, first, N, stride_row, stride_feature, HEAD_DIM: tl.constexpr, ROWS: tl.constexpr):
    """Have rows `first`.. of a head of K or V, of N rows, on their way to L2."""
    LINE: tl.constexpr = 1024 // head_ptr.dtype.element_ty.primitive_bitwidth
    LINES: tl.constexpr = (HEAD_DIM + LINE - 1) // LINE
    rows = tl.minimum(first + tl.arange(0, ROWS), N - 1).to(tl.int64)
    for line in tl.static_range(LINES):
        prefetch(head_ptr + rows * stride_row + line * LINE * stride_feature)


# What changes from request to request is not specialised: one compiled kernel serves every length.
@triton.jit(
    do_not_specialize=["S", "N", "splits", "stride_position_sequence", "stride_writes_sequence", "layer", "first_head"],
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
    q_ptr, k_ptr, v_ptr, kv_start_ptr, kv_length_ptr, position_ptr, seal_key_ptr, writes_ptr,
    partial_ptr, max_ptr, sum_ptr,
    # Sizes
    S,  # queries of a sequence
    N,  # its keys
    H,  # query heads
    heads_per_group,
    splits,  # programs among which a sequence's keys are divided
    window, scale,
    layer,  # of sealed K and V, as the next
    first_head,
    # Strides
    stride_q_sequence, stride_q_head, stride_q_token, stride_q_feature,
    stride_k_sequence, stride_k_head, stride_k_row, stride_k_feature,
    stride_v_sequence, stride_v_head, stride_v_row, stride_v_feature,
    stride_position_sequence, stride_position_key,
    stride_writes_sequence, stride_writes_row,
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
):  # fmt: skip
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
    k_ptr += b * stride_k_sequence + group * stride_k_head
    v_ptr += b * stride_v_sequence + group * stride_v_head
    if IS_KNOWN:
        if ENCODING != "sealed":  # a cipher has enough to wait for
            _prefetch_rows(k_ptr, lo, N, stride_k_row, stride_k_feature, HEAD_DIM, BLOCK_N)
            _prefetch_rows(v_ptr, lo, N, stride_v_row, stride_v_feature, HEAD_DIM, BLOCK_N)
        begin()

    q_rows = q_ptr + b * stride_q_sequence + head * stride_q_head + token * stride_q_token
    q = load_rows(q_rows, columns, stride_q_feature, in_rows, HEAD_DIM, BLOCK_D)
    q_tail = q
    if BLOCK_TAIL:
        q_tail = load_rows(q_rows, tail_columns, stride_q_feature, in_rows, HEAD_DIM - BLOCK_D, BLOCK_TAIL)
    seal_key = None
    word14 = None
    if ENCODING == "sealed":
        seal_key = load_key(seal_key_ptr)
        word14 = head_word(layer, first_head + group)
        writes_ptr += b * stride_writes_sequence
    row_max = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    row_sum = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    tail = tl.zeros((BLOCK_M, BLOCK_TAIL if BLOCK_TAIL else 1), tl.float32)
    for start in range(lo, hi, BLOCK_N):
        keys = start + tl.arange(0, BLOCK_N)
        in_keys = keys < hi
        cache_row = keys.to(tl.int64)
        if HAS_POSITION:
            positions = position_ptr + b * stride_position_sequence + cache_row * stride_position_key
            cache_row = tl.load(positions, mask=in_keys, other=0)
        writes = None
        if ENCODING == "sealed":
            writes = tl.load(writes_ptr + cache_row * stride_writes_row, mask=in_keys, other=EMPTY)
        k_rows = k_ptr + cache_row * stride_k_row
        v_rows = v_ptr + cache_row * stride_v_row
        scores = scores_of(
            q, q_tail, k_rows[:, None], columns[None, :] * stride_k_feature, tail_columns[None, :] * stride_k_feature,
            k_rows, stride_k_feature, in_keys, seal_key, writes, word14, HEAD_DIM, False, INT64, ENCODING, ROUNDS,
            BLOCK_N, BLOCK_D, BLOCK_TAIL,
        )  # fmt: skip
        seen = in_keys[None, :] & (keys[None, :] <= last_key[:, None])
        seen &= keys[None, :] > last_key[:, None] - window
        scores = tl.where(seen, scores * scale, float("-inf"))
        weights, row_max, row_sum, acc, tail = softmax_step(scores, row_max, row_sum, acc, tail, BLOCK_TAIL > 0, True)
        acc, tail = add_values(
            acc, tail, weights, v_rows[:, None], columns[None, :] * stride_v_feature,
            tail_columns[None, :] * stride_v_feature, v_rows, stride_v_feature, in_keys, seal_key, writes, word14,
            HEAD_DIM, False, INT64, ENCODING, ROUNDS, BLOCK_D, BLOCK_TAIL,
        )  # fmt: skip

    # Workspaces are (B, H, S, splits(, d)), contiguous.
    place = ((b * H + head) * S + token) * splits + split
    tl.store(max_ptr + place, row_max, mask=in_rows)
    tl.store(sum_ptr + place, row_sum, mask=in_rows)
    partial_rows = partial_ptr + place * HEAD_DIM
    store_heads(partial_rows, acc, tail, None, in_rows, 0, 1, HEAD_DIM, False, BLOCK_D, BLOCK_TAIL)


@triton.jit(
    do_not_specialize=["S", "splits"],
    do_not_specialize_on_alignment=["max_ptr", "sum_ptr", "output_index_ptr"],
)
def _combine_kernel(
    # Pointers
    partial_ptr, max_ptr, sum_ptr, output_index_ptr, out_ptr,
    # Sizes
    S,  # queries of a sequence
    H,  # query heads
    splits,  # programs that had a part of a sequence's keys
    # Strides
    stride_output_index_sequence, stride_output_index_head, stride_output_index_feature,
    stride_out_sequence, stride_out_head, stride_out_token, stride_out_feature,
    # Meta-parameters
    HEAD_DIM: tl.constexpr,
    HAS_INDEX: tl.constexpr,
    BLOCK_SPLITS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
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
        index_ptr = output_index_ptr + b * stride_output_index_sequence + head * stride_output_index_head
        index = tl.load(index_ptr + columns * stride_output_index_feature, mask=in_head, other=0).to(tl.int32)
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
    out_row = out_ptr + b * stride_out_sequence + head * stride_out_head + token * stride_out_token
    place = columns.to(tl.int64)[None, :] * stride_out_feature
    tl.store(out_row + place, narrow(out, out_ptr.dtype.element_ty), mask=in_head[None, :])


def step_tile(
    batch: int, groups: int, rows: int, keys: int, size: int, dtype: torch.dtype, permuted: bool, sealed: bool,
    target: Target,
) -> dict[str, Any]:  # fmt: skip
    """Meta-parameters of `attention_step` and, as "splits", over how many programs a sequence's keys are spread.

    On an H100 one program a multiprocessor, with three tiles on their way, reads a cache faster than two. A sealed one
    is arithmetic: four programs of one block of the cipher a thread are faster than two of two. Those of a
    multiprocessor do not end together, so in a long cache four others follow them."""
    blocks = head_blocks(size)
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
    check_head(q, v)
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
