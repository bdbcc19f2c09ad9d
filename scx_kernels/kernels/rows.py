"""Rows in and out of an encoding, one pass over memory each.

| array       | shape  | values   | meaning                                                                 |
|-------------|--------|----------|-------------------------------------------------------------------------|
| `row_index` | (B, T) | 0..N+R-1 | encoded row t is row `row_index[t]` of the N rows x followed by R redundant |
| `position`  | (B, S) | 0..T-1   | token s lies in encoded row `position[s]`                               |

Both kernels see the rows of all sequences as one list of B*T (or B*S) rows; a program owns BLOCK_M of them.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from scx_kernels.checks import check_inject, check_rows, check_strip
from scx_kernels.kernels.launch import (
    Target,
    begin,
    check_dtype,
    choose_tile,
    exceeds_int32,
    launch,
    narrow,
    strides,
    target_of,
)
from scx_kernels.kernels.plans import empty, planned

__all__ = ["inject_permute", "inject_tile", "strip_restore", "strip_tile"]


@triton.jit
def _load_rows(pointers, offsets, stride, mask):
    return tl.load(pointers[:, None] + offsets[None, :] * stride, mask=mask, other=0)


# What changes from request to request is not specialised: one compiled kernel serves every length.
@triton.jit(
    do_not_specialize=["T", "N", "stride_row_index_sequence"],
    do_not_specialize_on_alignment=["row_index_ptr", "feature_index_ptr"],
)
def _inject_kernel(
    # Pointers
    x_ptr, redundant_ptr, row_index_ptr, feature_index_ptr, norm_weight_ptr, noise_ptr, out_ptr,
    # Sizes
    T,  # encoded rows of a sequence
    N,  # rows of x
    D,  # features
    eps,
    noise_step, steps_per_unit,  # a power of two, and one over it
    # Strides
    stride_x_sequence, stride_x_row, stride_x_feature,
    stride_redundant_sequence, stride_redundant_row, stride_redundant_feature,
    stride_row_index_sequence, stride_row_index_row,
    stride_feature_index_sequence, stride_feature_index_head, stride_feature_index_feature,
    stride_norm_weight_feature,
    stride_noise_sequence, stride_noise_row, stride_noise_feature,
    stride_out_sequence, stride_out_row, stride_out_feature,
    # Meta-parameters
    HAS_INDEX: tl.constexpr,
    HAS_REDUNDANT: tl.constexpr,
    HEAD_DIM: tl.constexpr,  # of heads whose features are reordered, one head a program; 0 if there are none
    HAS_NORM: tl.constexpr,
    HAS_NOISE: tl.constexpr,
    ONE_TILE: tl.constexpr,  # the whole row is in registers, so the norm reads it once
    INT64: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    begin()
    blocks = tl.cdiv(T, BLOCK_M)
    # int64: sequence * stride and row * stride grow with the whole tensor.
    sequence = (tl.program_id(0) // blocks).to(tl.int64)
    place = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    in_rows = place < T
    source = place
    if HAS_INDEX:
        row_indices = row_index_ptr + sequence * stride_row_index_sequence + place * stride_row_index_row
        source = tl.load(row_indices, mask=in_rows, other=0)
    x_rows = x_ptr + sequence * stride_x_sequence + source * stride_x_row
    if HAS_NOISE:
        noise_rows = noise_ptr + sequence * stride_noise_sequence + place * stride_noise_row
    out_rows = out_ptr + sequence * stride_out_sequence + place * stride_out_row
    from_x = in_rows
    if HAS_REDUNDANT:
        from_x = in_rows & (source < N)
        redundant_rows = redundant_ptr + sequence * stride_redundant_sequence + (source - N) * stride_redundant_row

    if HAS_NORM:
        first = 0
        end = D
    elif HEAD_DIM:
        first = tl.program_id(1) * HEAD_DIM
        end = first + HEAD_DIM
    else:
        first = tl.program_id(1) * BLOCK_D
        end = D
    columns = first + tl.arange(0, BLOCK_D)
    if INT64:
        columns = columns.to(tl.int64)

    scale = tl.full((BLOCK_M,), 1.0, tl.float32)
    if HAS_NORM and not ONE_TILE:
        square_sum = tl.zeros((BLOCK_M,), tl.float32)
        for start in range(0, D, BLOCK_D):
            part = columns + start
            in_columns = (part < D)[None, :]
            x = _load_rows(x_rows, part, stride_x_feature, from_x[:, None] & in_columns).to(tl.float32)
            if HAS_REDUNDANT:
                decoy_mask = (in_rows & (source >= N))[:, None] & in_columns
                x += _load_rows(redundant_rows, part, stride_redundant_feature, decoy_mask).to(tl.float32)
            square_sum += tl.sum(x * x, axis=1)
        scale = tl.rsqrt(square_sum / D + eps)

    for start in range(0, D if HAS_NORM and not ONE_TILE else 1, BLOCK_D):
        part = columns + start
        in_columns = (part < end)[None, :]
        x = _load_rows(x_rows, part, stride_x_feature, from_x[:, None] & in_columns)
        if HEAD_DIM:
            index_row = feature_index_ptr + sequence * stride_feature_index_sequence
            index_row += tl.program_id(1).to(tl.int64) * stride_feature_index_head
            features = index_row + tl.arange(0, BLOCK_D) * stride_feature_index_feature
            index = tl.load(features, mask=part < end, other=0).to(tl.int32)
            x = tl.gather(x, tl.broadcast_to(index[None, :], (BLOCK_M, BLOCK_D)), axis=1)
        if HAS_REDUNDANT:
            # Rows of one kind are masked off in the other load, so no byte is read twice.
            decoy_mask = (in_rows & (source >= N))[:, None] & in_columns
            decoy = _load_rows(redundant_rows, part, stride_redundant_feature, decoy_mask)
            x = tl.where(from_x[:, None], x, decoy)
        if HAS_NORM:
            weight = tl.load(norm_weight_ptr + part * stride_norm_weight_feature, mask=part < D, other=0)
            weight = weight[None, :].to(tl.float32)
            wide = x.to(tl.float32)
            if ONE_TILE:
                scale = tl.rsqrt(tl.sum(wide * wide, axis=1) / D + eps)
            # Llama rounds the normalised row to the input dtype before it multiplies by the weight.
            normed = narrow(wide * scale[:, None], x.dtype)
            x = narrow(normed.to(tl.float32) * weight, x.dtype)
        mask = in_rows[:, None] & in_columns
        if HAS_NOISE:
            noise = _load_rows(noise_rows, part, stride_noise_feature, mask)
            # Adding 1.5 * 2^52 rounds to integers, ties to even. Nothing else rounds before the sum is narrowed.
            steps = x.to(tl.float64) * steps_per_unit + 6755399441055744.0
            steps = steps + noise.to(tl.float64) - 6755399441055744.0
            x = (steps * noise_step).to(tl.float32)
        tl.store(out_rows[:, None] + part[None, :] * stride_out_feature, narrow(x, out_ptr.dtype.element_ty), mask=mask)


@triton.jit(
    do_not_specialize=["rows", "S", "stride_position_sequence"], do_not_specialize_on_alignment=["position_ptr"]
)
def _strip_kernel(
    # Pointers
    z_ptr, position_ptr, residual_ptr, image_ptr, out_ptr,
    # Sizes
    rows,  # of all sequences
    S,  # tokens of a sequence
    D,  # features
    # Strides
    stride_z_sequence, stride_z_row, stride_z_feature,
    stride_position_sequence, stride_position_token,
    stride_residual_sequence, stride_residual_token, stride_residual_feature,
    stride_image_sequence, stride_image_row, stride_image_feature,
    stride_out_sequence, stride_out_token, stride_out_feature,
    # Meta-parameters
    HAS_RESIDUAL: tl.constexpr,
    HAS_IMAGE: tl.constexpr,
    INT64: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    begin()
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    in_rows = row < rows
    # int64: sequence * stride and row * stride grow with the whole tensor.
    sequence = (row // S).to(tl.int64)
    token = (row % S).to(tl.int64)
    positions = position_ptr + sequence * stride_position_sequence + token * stride_position_token
    place = tl.load(positions, mask=in_rows, other=0)
    columns = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    if INT64:
        columns = columns.to(tl.int64)
    mask = in_rows[:, None] & (columns < D)[None, :]
    y = _load_rows(z_ptr + sequence * stride_z_sequence + place * stride_z_row, columns, stride_z_feature, mask)
    if HAS_IMAGE:
        image_rows = image_ptr + sequence * stride_image_sequence + place * stride_image_row
        y = y.to(tl.float32) - _load_rows(image_rows, columns, stride_image_feature, mask)
    if HAS_RESIDUAL:
        residual_rows = residual_ptr + sequence * stride_residual_sequence + token * stride_residual_token
        y = y.to(tl.float32) + _load_rows(residual_rows, columns, stride_residual_feature, mask).to(tl.float32)
    out_rows = out_ptr + sequence * stride_out_sequence + token * stride_out_token
    tl.store(out_rows[:, None] + columns[None, :] * stride_out_feature, narrow(y, out_ptr.dtype.element_ty), mask=mask)


def _row_tile(features: int, element_bytes: int, thread_bytes: int, widest: int, target: Target) -> dict[str, Any]:
    block_d = min(triton.next_power_of_2(features), widest)
    block_m = max(1, min(16, 4096 // block_d))
    warps = block_m * block_d * element_bytes // (thread_bytes * target.warp_size)
    warps = triton.next_power_of_2(max(1, min(warps, 1024 // target.warp_size)))
    return {"BLOCK_M": block_m, "BLOCK_D": block_d, "num_warps": warps}


def inject_tile(features: int, dtype: torch.dtype, norm: bool, noise: bool, target: Target) -> dict[str, Any]:
    """Meta-parameters of `inject_permute`: 64 bytes a thread, four 16-byte loads in flight before the first use.

    A norm holds whole rows in float32 registers, hence half as many bytes a thread; rows of more than 16,384 features
    are read twice.
    """
    element_bytes = 4 if noise else dtype.itemsize
    if not norm:
        return _row_tile(features, element_bytes, 64, 4096, target)
    return _row_tile(features, element_bytes, 32, 16_384 if features <= 16_384 else 8192, target)


def strip_tile(features: int, dtype: torch.dtype, image: bool, target: Target) -> dict[str, Any]:
    """Meta-parameters of `strip_restore`."""
    return _row_tile(features, 4 if image else dtype.itemsize, 64, 4096, target)


@planned
def inject_permute(
    x: Tensor,
    row_index: Tensor | None,
    redundant: Tensor | None = None,
    *,
    feature_index: Tensor | None = None,
    norm_weight: Tensor | None = None,
    eps: float = 1e-6,
    noise: Tensor | None = None,
    noise_step: float | None = None,
    out: Tensor | None = None,
    tile: dict[str, Any] | None = None,
    force_int64: bool = False,
) -> Tensor:
    """`scx_kernels.inject_permute` for float32, float16 and bfloat16, any strides, in one pass.

    Args:
        out: (B, T, D) to write into, any strides; x's dtype, float32 under noise.
        tile: overrides of `inject_tile`. force_int64: 64-bit column offsets even where 32 bits suffice.
    """
    check_rows(x, row_index, redundant)
    check_inject(x, row_index, feature_index, norm_weight, noise, noise_step)
    check_dtype("x", x)
    batch, tokens, features = x.shape
    encoded = tokens if row_index is None else row_index.shape[1]
    if noise is not None:
        noise = noise.expand(batch, encoded, features)
    if out is None:
        out = empty(x, (batch, encoded, features), x.dtype if noise is None else torch.float32)
    step = 1.0 if noise_step is None else noise_step
    head_dim = 0 if feature_index is None else feature_index.shape[2]
    target, width = target_of(x.device), head_dim or features
    heuristic = inject_tile(width, x.dtype, norm_weight is not None, noise is not None, target)
    variant = "norm" if norm_weight is not None else "heads" if head_dim else ""
    sizes = {"rows": batch * encoded, "features": width}
    meta = choose_tile("inject_permute", heuristic, tile, target, x.dtype, variant, **sizes)
    columns = 1 if norm_weight is not None else triton.cdiv(features, head_dim or meta["BLOCK_D"])
    launch(
        _inject_kernel,
        (batch * triton.cdiv(encoded, meta["BLOCK_M"]), columns),
        *(x, redundant, row_index, feature_index, norm_weight, noise, out),
        *(encoded, tokens, features, eps, step, 1 / step),
        *(*x.stride(), *strides(redundant, 3), *strides(row_index, 2), *strides(feature_index, 3)),
        *(*strides(norm_weight, 1), *strides(noise, 3), *out.stride()),
        HAS_INDEX=row_index is not None,
        HAS_REDUNDANT=redundant is not None,
        HEAD_DIM=head_dim,
        HAS_NORM=norm_weight is not None,
        HAS_NOISE=noise is not None,
        ONE_TILE=meta["BLOCK_D"] >= features,
        INT64=force_int64 or exceeds_int32(x, redundant, noise, out),
        ahead=True,
        device=x.device,
        **meta,
    )
    return out


@planned
def strip_restore(
    z: Tensor,
    position: Tensor,
    residual: Tensor | None = None,
    *,
    image: Tensor | None = None,
    dtype: torch.dtype | None = None,
    out: Tensor | None = None,
    tile: dict[str, Any] | None = None,
    force_int64: bool = False,
) -> Tensor:
    """`scx_kernels.strip_restore` for float32, float16 and bfloat16, any strides, in one pass.

    Args:
        residual: may be `out` itself.
        dtype: of the result, by default z's. The sum is taken in float32 and rounded once.
        out: (B, S, D) to write into, any strides.
        tile: overrides of `strip_tile`. force_int64: 64-bit column offsets even where 32 bits suffice.
    """
    check_strip(z, position, residual, image)
    check_dtype("z", z)
    (batch, encoded, features), tokens = z.shape, position.shape[1]
    if image is not None:
        image = image.expand(batch, encoded, features)
    if out is None:
        out = empty(z, (batch, tokens, features), dtype)
    target, sizes = target_of(z.device), {"rows": batch * tokens, "features": features}
    heuristic = strip_tile(features, z.dtype, image is not None, target)
    meta = choose_tile("strip_restore", heuristic, tile, target, z.dtype, **sizes)
    launch(
        _strip_kernel,
        (triton.cdiv(batch * tokens, meta["BLOCK_M"]), triton.cdiv(features, meta["BLOCK_D"])),
        *(z, position, residual, image, out),
        *(batch * tokens, tokens, features),
        *(*z.stride(), *position.stride(), *strides(residual, 3), *strides(image, 3), *out.stride()),
        HAS_RESIDUAL=residual is not None,
        HAS_IMAGE=image is not None,
        INT64=force_int64 or exceeds_int32(z, residual, image, out),
        ahead=True,
        device=z.device,
        **meta,
    )
    return out
