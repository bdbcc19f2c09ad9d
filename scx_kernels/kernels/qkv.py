"""From projected encoded rows to encoded Q, K, V in one pass: the secure side's work between two products.

| array                   | shape          | values | meaning                                                     |
|-------------------------|----------------|--------|-------------------------------------------------------------|
| `position`              | (B, S)         | 0..T-1 | token s lies in encoded row `position[s]`                   |
| `query`, `key`, `value` | (B, H or G, d) | 0..d-1 | encoded feature j of a head is its plain feature `index[j]` |

A program owns BLOCK_S tokens and HEADS heads of one of the three roles, so cos and sin are read once for several heads.
Rows are read whole and their features permuted on the chip: a gather of two-byte elements from memory would spend four
loads on every element (x, its rotary partner, cos, sin).
"""

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from scx_kernels.chacha import BLOCK_BYTES
from scx_kernels.checks import check_qkv, check_return_unsealed
from scx_kernels.kernels.chacha import head_word, load_key, seal
from scx_kernels.kernels.launch import (
    Target,
    begin,
    by_tokens,
    check_dtype,
    choose_tile,
    exceeds_int32,
    launch,
    narrow,
    strides,
    target_of,
)
from scx_kernels.kernels.plans import allow_offsets, empty, planned
from scx_kernels.kernels.sealing import encoding_of, key_and_writes, layer_and_head
from scx_kernels.sealing import Sealing, check_cache

__all__ = ["qkv_decode_encode", "qkv_into_cache", "qkv_into_sealed_cache", "qkv_tile"]


@triton.jit
def _load_features(z_rows, image_rows, features, in_tokens, stride_z, stride_image, HAS_IMAGE: tl.constexpr):
    """float32 (BLOCK_S, BLOCK_D): features of the given rows, free of noise."""
    offsets, in_head = features
    mask = in_tokens[:, None] & in_head[None, :]
    x = tl.load(z_rows[:, None] + offsets[None, :] * stride_z, mask=mask, other=0).to(tl.float32)
    if HAS_IMAGE:
        x -= tl.load(image_rows[:, None] + offsets[None, :] * stride_image, mask=mask, other=0)
    return x


@triton.jit
def _scale_by_norm(x, norm_weight_ptr, columns, in_head, scale, stride_norm_weight_feature, DTYPE: tl.constexpr):
    """Qwen3 rounds the normalised head to the model's dtype before and after the weight."""
    weight = tl.load(norm_weight_ptr + columns * stride_norm_weight_feature, mask=in_head, other=0).to(tl.float32)
    normed = narrow(x * scale[:, None], DTYPE).to(tl.float32)
    return narrow(normed * weight[None, :], DTYPE).to(tl.float32)


@triton.jit
def _encode_heads(
    # Pointers, at the program's sequence (but for the image, which may be absent)
    z_ptr, image_ptr, norm_weight_ptr, cos_ptr, sin_ptr, index_ptr, out_ptr, fresh_ptr,
    # What the program owns
    b, place, token, slot, in_tokens, first_head, heads, eps,
    # What seals it
    seal_key_ptr, writes, layer, sealed_head,
    # Strides
    z_strides,  # from row to row, feature to feature
    image_strides,  # from sequence to sequence, row to row, feature to feature
    stride_norm_weight_feature,
    cos_strides,  # from token to token, feature to feature
    sin_strides,
    index_strides,  # from head to head, feature to feature
    out_strides,  # from head to head, slot to slot, feature to feature
    fresh_strides,  # from head to head, token to token, feature to feature
    # Meta-parameters
    HEAD_DIM: tl.constexpr,
    IS_ROTARY: tl.constexpr,
    HAS_NORM: tl.constexpr,
    HAS_IMAGE: tl.constexpr,
    HAS_FRESH: tl.constexpr,
    ENCODING: tl.constexpr,
    ROUNDS: tl.constexpr,
    INT64: tl.constexpr,
    HEADS: tl.constexpr,
    STAGES: tl.constexpr,  # heads whose rows are on their way at once
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    DTYPE: tl.constexpr = out_ptr.dtype.element_ty
    columns = tl.arange(0, BLOCK_D)
    in_head = columns < HEAD_DIM
    # Feature i rotates with feature i + d/2; the sign of rotate_half goes into sin.
    partner = tl.where(columns < HEAD_DIM // 2, columns + HEAD_DIM // 2, columns - HEAD_DIM // 2)
    if INT64:
        columns = columns.to(tl.int64)
        partner = partner.to(tl.int64)
    mask = in_tokens[:, None] & in_head[None, :]
    stride_z, stride_image = z_strides[1], image_strides[2]
    z_rows = z_ptr + place * z_strides[0]
    # int64: one head of a cache holds capacity * d elements.
    out_rows = out_ptr + slot * out_strides[1] + first_head.to(tl.int64) * out_strides[0]
    fresh_rows = out_rows
    if HAS_FRESH:
        fresh_rows = fresh_ptr + token * fresh_strides[1] + first_head.to(tl.int64) * fresh_strides[0]
    image_rows = z_rows
    if HAS_IMAGE:
        image_rows = image_ptr + b * image_strides[0] + place * image_strides[1]
    if IS_ROTARY:
        cos_rows = cos_ptr + token * cos_strides[0]
        sin_rows = sin_ptr + token * sin_strides[0]
        cos = tl.load(cos_rows[:, None] + columns[None, :] * cos_strides[1], mask=mask, other=0).to(tl.float32)
        sin = tl.load(sin_rows[:, None] + columns[None, :] * sin_strides[1], mask=mask, other=0).to(tl.float32)
        sin = tl.where((columns < HEAD_DIM // 2)[None, :], -sin, sin)

    for head in tl.range(first_head, min(first_head + HEADS, heads), num_stages=STAGES):
        index_row = index_ptr + head * index_strides[0]
        index = tl.load(index_row + columns * index_strides[1], mask=in_head, other=0).to(tl.int32)
        own = (head * HEAD_DIM + columns, in_head)
        x = _load_features(z_rows, image_rows, own, in_tokens, stride_z, stride_image, HAS_IMAGE)
        if IS_ROTARY:
            other = (head * HEAD_DIM + partner, in_head)
            y = _load_features(z_rows, image_rows, other, in_tokens, stride_z, stride_image, HAS_IMAGE)
            if HAS_NORM:
                scale = tl.rsqrt(tl.sum(x * x, axis=1) / HEAD_DIM + eps)
                x = _scale_by_norm(x, norm_weight_ptr, columns, in_head, scale, stride_norm_weight_feature, DTYPE)
                y = _scale_by_norm(y, norm_weight_ptr, partner, in_head, scale, stride_norm_weight_feature, DTYPE)
            x = x * cos + y * sin
        encoded = tl.gather(narrow(x, DTYPE), tl.broadcast_to(index[None, :], (BLOCK_S, BLOCK_D)), axis=1)
        stored = encoded
        if ENCODING == "sealed":
            word14 = head_word(layer, sealed_head + head)
            stored = seal(encoded, load_key(seal_key_ptr), writes, word14, not IS_ROTARY, HEAD_DIM, 0, ROUNDS)
        tl.store(out_rows[:, None] + columns[None, :] * out_strides[2], stored, mask=mask)
        if HAS_FRESH:  # last: before the other store it spills on sm_100
            tl.store(fresh_rows[:, None] + columns[None, :] * fresh_strides[2], encoded, mask=mask)
            fresh_rows += fresh_strides[0]
        out_rows += out_strides[0]


# What changes from request to request is not specialised: one compiled kernel serves every length.
@triton.jit(
    do_not_specialize=["S", "offset", "stride_position_sequence", "stride_writes_sequence", "layer", "first_head"],
    do_not_specialize_on_alignment=[
        "position_ptr",
        "query_index_ptr",
        "key_index_ptr",
        "value_index_ptr",
        "offsets_ptr",
        "writes_ptr",
    ],
)
def _qkv_kernel(
    # Pointers
    z_q_ptr, z_k_ptr, z_v_ptr, image_q_ptr, image_k_ptr, image_v_ptr, position_ptr, cos_ptr, sin_ptr,
    query_index_ptr, key_index_ptr, value_index_ptr,  # the launcher's `query`, `key` and `value`
    q_norm_ptr, k_norm_ptr, offsets_ptr, seal_key_ptr, writes_ptr,
    q_ptr, keys_ptr, values_ptr, fresh_k_ptr, fresh_v_ptr,
    # Sizes
    S,  # tokens of a sequence
    H,  # query heads
    G,  # key/value heads
    offset,  # slot of the first token
    eps, layer, first_head,
    # Strides
    stride_z_q_sequence, stride_z_q_row, stride_z_q_feature,
    stride_z_k_sequence, stride_z_k_row, stride_z_k_feature,
    stride_z_v_sequence, stride_z_v_row, stride_z_v_feature,
    stride_image_q_sequence, stride_image_q_row, stride_image_q_feature,
    stride_image_k_sequence, stride_image_k_row, stride_image_k_feature,
    stride_image_v_sequence, stride_image_v_row, stride_image_v_feature,
    stride_position_sequence, stride_position_token,
    stride_cos_sequence, stride_cos_token, stride_cos_feature,
    stride_sin_sequence, stride_sin_token, stride_sin_feature,
    stride_query_index_sequence, stride_query_index_head, stride_query_index_feature,
    stride_key_index_sequence, stride_key_index_head, stride_key_index_feature,
    stride_value_index_sequence, stride_value_index_head, stride_value_index_feature,
    stride_q_norm_feature,
    stride_k_norm_feature,
    stride_offsets_sequence,
    stride_q_sequence, stride_q_head, stride_q_token, stride_q_feature,
    stride_keys_sequence, stride_keys_head, stride_keys_slot, stride_keys_feature,
    stride_values_sequence, stride_values_head, stride_values_slot, stride_values_feature,
    stride_fresh_k_sequence, stride_fresh_k_head, stride_fresh_k_token, stride_fresh_k_feature,
    stride_fresh_v_sequence, stride_fresh_v_head, stride_fresh_v_token, stride_fresh_v_feature,
    stride_writes_sequence, stride_writes_slot,
    # Meta-parameters
    HEAD_DIM: tl.constexpr,
    HAS_NORM: tl.constexpr,
    HAS_IMAGE: tl.constexpr,
    HAS_POSITION: tl.constexpr,
    HAS_FRESH: tl.constexpr,  # K and V are also stored as they are before they are sealed
    HAS_OFFSETS: tl.constexpr,  # one offset a sequence, read from memory, so that a captured graph can move on
    ENCODING: tl.constexpr,  # of K and V
    ROUNDS: tl.constexpr,
    INT64: tl.constexpr,
    HEADS: tl.constexpr,
    STAGES: tl.constexpr,  # heads whose rows are on their way at once
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    begin()
    blocks = tl.cdiv(S, BLOCK_S)
    # int64: sequence * stride, row * stride and slot * stride grow with the whole tensor.
    b = (tl.program_id(0) // blocks).to(tl.int64)
    token = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK_S + tl.arange(0, BLOCK_S)
    in_tokens = token < S
    place = token
    if HAS_POSITION:
        positions = position_ptr + b * stride_position_sequence + token * stride_position_token
        place = tl.load(positions, mask=in_tokens, other=0)
    slot = token + offset
    if HAS_OFFSETS:
        slot = token + tl.load(offsets_ptr + b * stride_offsets_sequence)
    writes = None
    if ENCODING == "sealed":
        writes = tl.load(writes_ptr + b * stride_writes_sequence + slot * stride_writes_slot, mask=in_tokens, other=0)
    cos_ptr += b * stride_cos_sequence
    sin_ptr += b * stride_sin_sequence
    if HAS_FRESH:
        fresh_k_ptr += b * stride_fresh_k_sequence
        fresh_v_ptr += b * stride_fresh_v_sequence

    chunk = tl.program_id(1)
    q_chunks = tl.cdiv(H, HEADS)
    k_chunks = tl.cdiv(G, HEADS)
    if chunk < q_chunks:
        _encode_heads(
            z_q_ptr + b * stride_z_q_sequence, image_q_ptr, q_norm_ptr, cos_ptr, sin_ptr,
            query_index_ptr + b * stride_query_index_sequence, q_ptr + b * stride_q_sequence, None,
            b, place, token, token, in_tokens, chunk * HEADS, H, eps, None, None, 0, 0,
            (stride_z_q_row, stride_z_q_feature),
            (stride_image_q_sequence, stride_image_q_row, stride_image_q_feature), stride_q_norm_feature,
            (stride_cos_token, stride_cos_feature), (stride_sin_token, stride_sin_feature),
            (stride_query_index_head, stride_query_index_feature),
            (stride_q_head, stride_q_token, stride_q_feature), (0, 0, 0),
            HEAD_DIM, True, HAS_NORM, HAS_IMAGE, False, "permuted", 0, INT64, HEADS, STAGES, BLOCK_S, BLOCK_D,
        )  # fmt: skip
    elif chunk < q_chunks + k_chunks:
        _encode_heads(
            z_k_ptr + b * stride_z_k_sequence, image_k_ptr, k_norm_ptr, cos_ptr, sin_ptr,
            key_index_ptr + b * stride_key_index_sequence, keys_ptr + b * stride_keys_sequence, fresh_k_ptr,
            b, place, token, slot, in_tokens, (chunk - q_chunks) * HEADS, G, eps,
            seal_key_ptr, writes, layer, first_head,
            (stride_z_k_row, stride_z_k_feature),
            (stride_image_k_sequence, stride_image_k_row, stride_image_k_feature), stride_k_norm_feature,
            (stride_cos_token, stride_cos_feature), (stride_sin_token, stride_sin_feature),
            (stride_key_index_head, stride_key_index_feature),
            (stride_keys_head, stride_keys_slot, stride_keys_feature),
            (stride_fresh_k_head, stride_fresh_k_token, stride_fresh_k_feature),
            HEAD_DIM, True, HAS_NORM, HAS_IMAGE, HAS_FRESH, ENCODING, ROUNDS, INT64, HEADS, STAGES, BLOCK_S, BLOCK_D,
        )  # fmt: skip
    else:
        _encode_heads(
            z_v_ptr + b * stride_z_v_sequence, image_v_ptr, None, None, None,
            value_index_ptr + b * stride_value_index_sequence, values_ptr + b * stride_values_sequence, fresh_v_ptr,
            b, place, token, slot, in_tokens, (chunk - q_chunks - k_chunks) * HEADS, G, eps,
            seal_key_ptr, writes, layer, first_head,
            (stride_z_v_row, stride_z_v_feature),
            (stride_image_v_sequence, stride_image_v_row, stride_image_v_feature), 0, (0, 0), (0, 0),
            (stride_value_index_head, stride_value_index_feature),
            (stride_values_head, stride_values_slot, stride_values_feature),
            (stride_fresh_v_head, stride_fresh_v_token, stride_fresh_v_feature),
            HEAD_DIM, False, False, HAS_IMAGE, HAS_FRESH, ENCODING, ROUNDS, INT64, HEADS, STAGES, BLOCK_S, BLOCK_D,
        )  # fmt: skip


def qkv_tile(
    tokens: int, heads: int, head_dim: int, dtype: torch.dtype, noisy: bool, sealed: bool, target: Target
) -> dict[str, Any]:
    """Meta-parameters of `qkv_decode_encode`: a tile of about 4 KB; several heads to share cos and sin where tokens
    alone fill the machine, one head a program where they do not.

    Several heads are on their way at once, with 64 bytes a thread, on an H100 in tiles of 2 KB: few threads and deep
    loads were fastest there.
    Not beside noise, whose images take the registers, nor beside a cipher, which gives the loads time anyhow; there a
    thread holds a block of it: with fewer bytes, several would compute the same one."""
    block_d = max(16, triton.next_power_of_2(head_dim))

    def shared(tile_bytes: int) -> tuple[int, int]:
        """Tokens and heads of a program."""
        block_s = max(1, min(triton.next_power_of_2(max(1, tokens)), tile_bytes // dtype.itemsize // block_d))
        return block_s, max(1, min(8, heads, triton.cdiv(tokens, block_s) * heads // (8 * target.multiprocessors)))

    block_s, per_program = shared(2048 if target.arch == 90 else 4096)
    ahead = per_program > 2 and not noisy and not sealed and target.backend == "cuda"
    if not ahead:
        block_s, per_program = shared(4096)
    held = BLOCK_BYTES if sealed or ahead else 8 * dtype.itemsize
    warps = block_s * block_d * dtype.itemsize // (held * target.warp_size)
    return {
        "BLOCK_S": block_s,
        "BLOCK_D": block_d,
        "HEADS": 1 << (per_program.bit_length() - 1),
        "STAGES": 3 if ahead else 1,
        "num_warps": max(1, min(8, triton.next_power_of_2(max(1, warps)))),
    }


@planned
def qkv_decode_encode(
    z_q: Tensor,
    z_k: Tensor,
    z_v: Tensor,
    position: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    images: Sequence[Tensor] | None = None,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    eps: float = 1e-6,
    dtype: torch.dtype | None = None,
    keys: Tensor | None = None,
    values: Tensor | None = None,
    offset: int = 0,
    offsets: Tensor | None = None,
    sealing: Sealing | None = None,
    return_unsealed: bool = False,
    out: Tensor | None = None,
    tile: dict[str, Any] | None = None,
    force_int64: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """`scx_kernels.qkv_decode_encode` for float32, float16 and bfloat16, any strides, in one pass over Z.

    Args:
        z_q, z_k, z_v: may be slices of one tensor.
        return_unsealed: a second store of each tile of K and V, before it is sealed.
        out: (B, H, S, d) for q, any strides; by default in memory by tokens.
        tile: overrides of `qkv_tile`. force_int64: 64-bit column offsets even where 32 bits suffice.
    """
    dtype = check_qkv(
        z_q, z_k, z_v, position, cos, sin, query, key, value, images, q_norm, k_norm, dtype, keys, values, offset,
        offsets,
    )  # fmt: skip
    check_return_unsealed(return_unsealed, keys, sealing is not None)
    check_dtype("z_q", z_q)
    (batch, heads, size), groups = query.shape, key.shape[1]
    tokens = z_q.shape[1] if position is None else position.shape[1]
    if keys is not None and offsets is None:
        allow_offsets(keys.shape[2] - tokens)
    wide_images = [
        None if image is None else image.expand(z.shape)
        for image, z in zip(images or (None, None, None), (z_q, z_k, z_v), strict=True)
    ]
    if out is None:
        out = empty(z_q, (batch, heads, tokens, size), dtype, by_tokens(heads, tokens, size))
    keys = empty(z_q, (batch, groups, tokens, size), dtype) if keys is None else keys
    values = empty(z_q, (batch, groups, tokens, size), dtype) if values is None else values
    check_cache(keys, values, sealing)
    fresh_k, fresh_v = (empty(z_q, (batch, groups, tokens, size), dtype) if return_unsealed else None for _ in range(2))
    target, all_heads = target_of(z_q.device), heads + 2 * groups
    noisy, sealed = images is not None, sealing is not None
    heuristic = qkv_tile(batch * tokens, all_heads, size, dtype, noisy, sealed, target)
    sizes = {"tokens": batch * tokens, "heads": all_heads, "head_dim": size}
    variant = "" if sealing is None else "sealed"
    meta = choose_tile("qkv_decode_encode", heuristic, tile, target, dtype, variant, **sizes)
    chunks = triton.cdiv(heads, meta["HEADS"]) + 2 * triton.cdiv(groups, meta["HEADS"])
    launch(
        _qkv_kernel,
        (batch * triton.cdiv(tokens, meta["BLOCK_S"]), chunks),
        *(z_q, z_k, z_v, *wide_images, position, cos, sin, query, key, value, q_norm, k_norm, offsets),
        *(*key_and_writes(sealing), out, keys, values, fresh_k, fresh_v),
        *(tokens, heads, groups, offset, eps, *layer_and_head(sealing)),
        *(*z_q.stride(), *z_k.stride(), *z_v.stride()),
        *(stride for image in wide_images for stride in strides(image, 3)),
        *strides(position, 2),
        *(0 if cos.shape[0] == 1 else cos.stride(0), *cos.stride()[1:]),
        *(0 if sin.shape[0] == 1 else sin.stride(0), *sin.stride()[1:]),
        *(*query.stride(), *key.stride(), *value.stride()),
        *(*strides(q_norm, 1), *strides(k_norm, 1), *strides(offsets, 1)),
        *(*out.stride(), *keys.stride(), *values.stride(), *strides(fresh_k, 4), *strides(fresh_v, 4)),
        *strides(key_and_writes(sealing)[1], 2),
        HEAD_DIM=size,
        HAS_NORM=q_norm is not None,
        HAS_IMAGE=images is not None,
        HAS_POSITION=position is not None,
        HAS_FRESH=return_unsealed,
        HAS_OFFSETS=offsets is not None,
        **encoding_of(sealing),
        INT64=force_int64 or exceeds_int32(z_q, z_k, z_v, *wide_images, cos, sin, out, keys, values, fresh_k, fresh_v),
        ahead=True,
        device=z_q.device,
        **meta,
    )
    return (out, keys, values) if fresh_k is None or fresh_v is None else (out, fresh_k, fresh_v)


def qkv_into_cache(*args: Any, **options: Any) -> Tensor:
    """`qkv_decode_encode` into caches that are given: q alone."""
    return qkv_decode_encode(*args, **options)[0]


def qkv_into_sealed_cache(*args: Any, **options: Any) -> tuple[Tensor, Tensor, Tensor]:
    """`qkv_decode_encode` into sealed caches that are given: q, and k and v as they are before they are sealed."""
    return qkv_decode_encode(*args, **options, return_unsealed=True)
