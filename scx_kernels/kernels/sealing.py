"""Seal, unseal and re-seal stored tensors, and draw random bits: one pass over memory, keystream in registers.

A program owns BLOCK_U blocks of 64 bytes of the rows of one head, row after row, so that a row of 80 or 96 features
costs no more than its own blocks. A thread computes a block and holds its data (`kernels/chacha.py`, stripes).
"""

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from scx_kernels.kernels.chacha import block_words, head_word, load_key, row_words, stripe, stripe_columns
from scx_kernels.kernels.launch import Target, begin, launch, strides, target_of
from scx_kernels.kernels.plans import empty, planned
from scx_kernels.sealing import Sealing, blocks_of, check_out, check_sealing, check_streams, patterns, row_format

__all__ = [
    "encoding_of",
    "key_and_writes",
    "layer_and_head",
    "random_bits",
    "reseal",
    "reseal_into",
    "seal",
    "seal_into",
    "seal_tile",
]


@triton.jit
def _words(
    key_ptr, writes_ptr, token, block, in_rows, layer, head, word15, stride_writes_row, BLOCKS: tl.constexpr,
    ROUNDS: tl.constexpr,
):  # fmt: skip
    """Sixteen (BLOCK_U, 1) words of the program's blocks."""
    writes = tl.load(writes_ptr + token * stride_writes_row, mask=in_rows, other=0)
    word14 = head_word(layer, head)
    return row_words(load_key(key_ptr), writes[:, None], block[:, None], word14, word15.to(tl.uint32), BLOCKS, ROUNDS)


@triton.jit(
    do_not_specialize=["layer", "first_head", "word15", "old_layer", "old_first_head"],
    do_not_specialize_on_alignment=["writes_ptr", "old_writes_ptr"],
)
def _seal_kernel(
    # Pointers
    x_ptr, out_ptr, key_ptr, writes_ptr, old_key_ptr, old_writes_ptr,
    # Sizes
    G,  # key/value heads
    N,  # rows of a head
    # Which rows these are
    layer, first_head, word15, old_layer, old_first_head,
    # Strides
    stride_x_sequence, stride_x_head, stride_x_row, stride_x_feature,
    stride_out_sequence, stride_out_head, stride_out_row, stride_out_feature,
    stride_writes_sequence, stride_writes_row,
    stride_old_writes_sequence, stride_old_writes_row,
    # Meta-parameters
    HEAD_DIM: tl.constexpr,
    BITS: tl.constexpr,
    BLOCKS: tl.constexpr,  # in a row
    ROUNDS: tl.constexpr,
    OLD_ROUNDS: tl.constexpr,  # 0 where there is no keystream to take off
    BLOCK_U: tl.constexpr,
):  # fmt: skip
    begin()
    # int64: sequence, head, row and feature times their stride grow with the whole tensor.
    chunks = tl.cdiv(N * BLOCKS, BLOCK_U)
    b = (tl.program_id(0) // chunks // G).to(tl.int64)
    head = tl.program_id(0) // chunks % G
    unit = tl.program_id(0) % chunks * BLOCK_U + tl.arange(0, BLOCK_U)
    token = (unit // BLOCKS).to(tl.int64)
    block = unit % BLOCKS
    in_rows = token < N
    words = _words(
        key_ptr, writes_ptr + b * stride_writes_sequence, token, block, in_rows, layer, first_head + head, word15,
        stride_writes_row, BLOCKS, ROUNDS,
    )  # fmt: skip
    if OLD_ROUNDS:
        old_words = _words(
            old_key_ptr, old_writes_ptr + b * stride_old_writes_sequence, token, block, in_rows, old_layer,
            old_first_head + head, word15, stride_old_writes_row, BLOCKS, OLD_ROUNDS,
        )  # fmt: skip
    x_rows = x_ptr + b * stride_x_sequence + head.to(tl.int64) * stride_x_head + token * stride_x_row
    out_rows = out_ptr + b * stride_out_sequence + head.to(tl.int64) * stride_out_head + token * stride_out_row
    for place in tl.static_range(4):
        bits = stripe(words, None, place, BITS)
        if OLD_ROUNDS:
            bits = bits ^ stripe(old_words, None, place, BITS)
        columns = (block * (512 // BITS))[:, None] + stripe_columns(place, 1, BITS)[None, :]
        mask = in_rows[:, None]
        if HEAD_DIM * BITS % 512 != 0:
            mask = mask & (columns < HEAD_DIM)
        x = tl.load(x_rows[:, None] + columns.to(tl.int64) * stride_x_feature, mask=mask, other=0)
        places = out_rows[:, None] + columns.to(tl.int64) * stride_out_feature
        tl.store(places, x ^ bits.to(x.dtype, bitcast=True), mask=mask)


# How much is drawn changes from request to request: one compiled kernel serves every length.
@triton.jit(do_not_specialize=["count"], do_not_specialize_on_alignment=["streams_ptr"])
def _random_kernel(
    # Pointers
    key_ptr, streams_ptr, out_ptr,
    # Sizes
    count,  # words of a stream
    # Strides
    stride_streams_stream, stride_streams_word,
    # Meta-parameters
    ROUNDS: tl.constexpr,
    BLOCK_U: tl.constexpr,
):  # fmt: skip
    begin()
    # int64: stream * count grows with the whole tensor.
    chunks = tl.cdiv(tl.cdiv(count, 16), BLOCK_U)
    stream = (tl.program_id(0) // chunks).to(tl.int64)
    word13 = tl.load(streams_ptr + stream * stride_streams_stream).to(tl.uint32)
    word14 = tl.load(streams_ptr + stream * stride_streams_stream + stride_streams_word).to(tl.uint32)
    word15 = tl.load(streams_ptr + stream * stride_streams_stream + 2 * stride_streams_word).to(tl.uint32)
    unit = tl.program_id(0) % chunks * BLOCK_U + tl.arange(0, BLOCK_U)
    words = block_words(load_key(key_ptr), unit[:, None].to(tl.uint32), word13, word14, word15, ROUNDS)
    out_ptr += stream * count
    for place in tl.static_range(4):
        columns = unit.to(tl.int64)[:, None] * 16 + stripe_columns(place, 1, 32)[None, :]
        tl.store(out_ptr + columns, stripe(words, None, place, 32).to(tl.int32, bitcast=True), mask=columns < count)


def key_and_writes(sealing: Sealing | None) -> tuple[Tensor | None, Tensor | None]:
    """Pointer arguments of a kernel whose loads or stores may be sealed."""
    return (None, None) if sealing is None else (sealing.key, sealing.writes)


def layer_and_head(sealing: Sealing | None) -> tuple[int, int]:
    """Its integer arguments."""
    return (0, 0) if sealing is None else (sealing.layer, sealing.first_head)


def encoding_of(sealing: Sealing | None) -> dict[str, Any]:
    """Its meta-parameters: "permuted" costs nothing."""
    return (
        {"ENCODING": "permuted", "ROUNDS": 0} if sealing is None else {"ENCODING": "sealed", "ROUNDS": sealing.rounds}
    )


def seal_tile(units: int, heads: int, old: bool, target: Target) -> dict[str, Any]:
    """Meta-parameters of `seal`: two blocks a thread keep eight quarter rounds in flight, one where two keystreams
    share the registers or where a program more is worth it."""
    threads = 4 * target.warp_size
    few = units * heads <= 2 * threads * target.multiprocessors
    return {"BLOCK_U": threads if old or few else 2 * threads, "num_warps": 4}


def _launch(
    x: Tensor, sealing: Sealing, old: Sealing | None, is_value: bool, out: Tensor | None, tile: dict[str, Any] | None
) -> Tensor:
    check_out(x, out)
    if out is None:
        out = empty(x, x.shape)
    (batch, groups, tokens, size), blocks = x.shape, blocks_of(x.shape[3], x.element_size())
    meta = seal_tile(tokens * blocks, batch * groups, old is not None, target_of(x.device)) | (tile or {})
    launch(
        _seal_kernel,
        (triton.cdiv(tokens * blocks, meta["BLOCK_U"]) * batch * groups,),
        *(patterns(x), patterns(out), sealing.key, sealing.writes),
        *((None, None) if old is None else (old.key, old.writes)),
        *(groups, tokens, sealing.layer, sealing.first_head, row_format(size, x.element_size(), is_value)),
        *((0, 0) if old is None else (old.layer, old.first_head)),
        *(*x.stride(), *out.stride(), *sealing.writes.stride(), *strides(None if old is None else old.writes, 2)),
        HEAD_DIM=size,
        BITS=8 * x.element_size(),
        BLOCKS=blocks,
        ROUNDS=sealing.rounds,
        OLD_ROUNDS=0 if old is None else old.rounds,
        ahead=True,
        device=x.device,
        **meta,
    )
    return out


@planned
def seal(
    x: Tensor, sealing: Sealing, *, is_value: bool, out: Tensor | None = None, tile: dict[str, Any] | None = None
) -> Tensor:
    """`scx_kernels.sealing.seal`, and `unseal`; tile: overrides of `seal_tile`."""
    check_sealing(x, sealing)
    return _launch(x, sealing, None, is_value, out, tile)


def reseal(
    x: Tensor,
    old: Sealing,
    new: Sealing,
    *,
    is_value: bool,
    out: Tensor | None = None,
    tile: dict[str, Any] | None = None,
) -> Tensor:
    """`scx_kernels.sealing.reseal` in one pass: both keystreams meet in registers. tile: overrides of `seal_tile`."""
    check_sealing(x, old, "old")
    check_sealing(x, new, "new")
    return _launch(x, new, old, is_value, out, tile)


def seal_into(out: Tensor, x: Tensor | None, sealing: Sealing, *, is_value: bool) -> None:
    """`seal` into `out`; x None: in place."""
    seal(out if x is None else x, sealing, is_value=is_value, out=out)


def reseal_into(out: Tensor, x: Tensor | None, old: Sealing, new: Sealing, *, is_value: bool) -> None:
    """`reseal` into `out`; x None: in place."""
    reseal(out if x is None else x, old, new, is_value=is_value, out=out)


@planned
def random_bits(
    key: Tensor, streams: Tensor, count: int, rounds: int = 20, *, tile: dict[str, Any] | None = None
) -> Tensor:
    """`scx_kernels.sealing.random_bits`; tile: overrides of `seal_tile`."""
    check_streams(key, streams, count, rounds)
    out = empty(key, (len(streams), count))
    units = triton.cdiv(count, 16)
    meta = seal_tile(units, len(streams), False, target_of(key.device)) | (tile or {})
    launch(
        _random_kernel,
        (triton.cdiv(units, meta["BLOCK_U"]) * len(streams),),
        *(key, streams, out, count, *streams.stride()),
        ROUNDS=rounds,
        ahead=True,
        device=key.device,
        **meta,
    )
    return out
