"""A token-permuted cache stripped and put in token order, by whoever was given its token permutation.

| array      | shape  | values | meaning                                |
|------------|--------|--------|----------------------------------------|
| `position` | (B, S) | 0..T-1 | token s lies in cache row `position[s]` |

A cache's rows are one list of rows for each sequence and head. In place, a row's target may be another row's source, so
heads go through a scratch buffer, as many at once as it holds.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from scx_kernels.checks import check_unlock
from scx_kernels.kernels.launch import (
    Target,
    begin,
    check_dtype,
    choose_tile,
    exceeds_int32,
    launch,
    strides,
    target_of,
)

__all__ = ["unlock", "unlock_in_place", "unlock_tile"]

SCRATCH_BYTES = 64 * 2**20


# Lengths change from request to request: one compiled kernel serves them all.
@triton.jit(do_not_specialize=["S", "stride_position_sequence"], do_not_specialize_on_alignment=["position_ptr"])
def _take_rows_kernel(
    # Pointers
    cache_ptr, position_ptr, out_ptr,
    # Sizes
    S,  # tokens of a sequence
    D,  # features of a head
    G,  # key/value heads
    # Strides
    stride_cache_sequence, stride_cache_head, stride_cache_row, stride_cache_feature,
    stride_position_sequence, stride_position_token,
    stride_out_sequence, stride_out_head, stride_out_token, stride_out_feature,
    # Meta-parameters
    HAS_POSITION: tl.constexpr,  # without it rows are copied as they lie
    INT64: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    begin()
    # int64: sequence, head and row times their stride grow with the whole cache.
    b = (tl.program_id(1) // G).to(tl.int64)
    head = (tl.program_id(1) % G).to(tl.int64)
    token = tl.program_id(0).to(tl.int64) * BLOCK_S + tl.arange(0, BLOCK_S)
    in_tokens = token < S
    place = token
    if HAS_POSITION:
        positions = position_ptr + b * stride_position_sequence + token * stride_position_token
        place = tl.load(positions, mask=in_tokens, other=0)
    columns = tl.arange(0, BLOCK_D)
    if INT64:
        columns = columns.to(tl.int64)
    mask = in_tokens[:, None] & (columns < D)[None, :]
    cache_rows = cache_ptr + b * stride_cache_sequence + head * stride_cache_head + place * stride_cache_row
    out_rows = out_ptr + b * stride_out_sequence + head * stride_out_head + token * stride_out_token
    rows = tl.load(cache_rows[:, None] + columns[None, :] * stride_cache_feature, mask=mask, other=0)
    tl.store(out_rows[:, None] + columns[None, :] * stride_out_feature, rows, mask=mask)


def unlock_tile(size: int, dtype: torch.dtype, target: Target) -> dict[str, Any]:
    """Meta-parameters of `unlock`: 64 bytes a thread, four 16-byte loads in flight."""
    block_d = triton.next_power_of_2(size)
    block_s = max(1, 8192 // (block_d * dtype.itemsize))
    warps = block_s * block_d * dtype.itemsize // (64 * target.warp_size)
    return {"BLOCK_S": block_s, "BLOCK_D": block_d, "num_warps": max(1, min(8, warps))}


def _take_rows(cache: Tensor, position: Tensor | None, out: Tensor, meta: dict[str, Any], force_int64: bool) -> None:
    batch, groups, tokens, size = out.shape
    launch(
        _take_rows_kernel,
        (triton.cdiv(tokens, meta["BLOCK_S"]), batch * groups),
        *(cache, position, out, tokens, size, groups),
        *(*cache.stride(), *strides(position, 2), *out.stride()),
        HAS_POSITION=position is not None,
        INT64=force_int64 or exceeds_int32(cache, out),
        ahead=True,
        device=cache.device,
        **meta,
    )


def unlock(
    cache: Tensor,
    position: Tensor,
    *,
    in_place: bool = False,
    out: Tensor | None = None,
    scratch_bytes: int = SCRATCH_BYTES,
    tile: dict[str, Any] | None = None,
    force_int64: bool = False,
) -> Tensor:
    """`scx_kernels.unlock` for float32, float16 and bfloat16, any strides.

    Args:
        out: (B, G, S, d) to write into, any strides; not together with in_place.
        scratch_bytes: size of the buffer that heads pass through in place, though it always holds one head.
        tile: overrides of `unlock_tile`. force_int64: 64-bit column offsets even where 32 bits suffice.
    """
    check_unlock(cache, position)
    check_dtype("cache", cache)
    (batch, groups, _, size), tokens = cache.shape, position.shape[1]
    target, sizes = target_of(cache.device), {"rows": batch * groups * tokens, "head_dim": size}
    meta = choose_tile("unlock", unlock_tile(size, cache.dtype, target), tile, target, cache.dtype, **sizes)
    if not in_place:
        out = cache.new_empty(batch, groups, tokens, size) if out is None else out
        _take_rows(cache, position, out, meta, force_int64)
        return out
    head_bytes = batch * tokens * size * cache.element_size()
    at_once = max(1, min(groups, scratch_bytes // max(1, head_bytes)))
    scratch = cache.new_empty(batch, at_once, tokens, size)
    for first in range(0, groups, at_once):
        heads = cache[:, first : first + at_once]
        taken = scratch[:, : heads.shape[1]]
        _take_rows(heads, position, taken, meta, force_int64)
        _take_rows(taken, None, heads[:, :, :tokens], meta, force_int64)
    return cache[:, :, :tokens]


def unlock_in_place(cache: Tensor, position: Tensor) -> None:
    """`unlock` into the cache's own first rows."""
    unlock(cache, position, in_place=True)
