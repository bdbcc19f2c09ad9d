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
    do_not_specialize=["T", "N", "stride_ib"],
    do_not_specialize_on_alignment=["row_index_ptr", "feature_index_ptr"],
)
def _inject_kernel(
    # Pointers
    x_ptr,
    redundant_ptr,
    row_index_ptr,
    feature_index_ptr,
    norm_weight_ptr,
    noise_ptr,
    out_ptr,
    # Sizes
    T,
    N,
    D,
    eps,
    # Strides
    stride_xb,
    stride_xn,
    stride_xd,
    stride_rb,
    stride_rr,
    stride_rd,
    stride_ib,
    stride_it,
    stride_fb,
    stride_fh,
    stride_fd,
    stride_wd,
    stride_ab,
    stride_at,
    stride_ad,
    stride_ob,
    stride_ot,
    stride_od,
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
):
    begin()
    blocks = tl.cdiv(T, BLOCK_M)
    # int64: sequence * stride and row * stride grow with the whole tensor.
    sequence = (tl.program_id(0) // blocks).to(tl.int64)
    place = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    in_rows = place < T
    source = place
    if HAS_INDEX:
        source = tl.load(row_index_ptr + sequence * stride_ib + place * stride_it, mask=in_rows, other=0)
    x_rows = x_ptr + sequence * stride_xb + source * stride_xn
    if HAS_NOISE:
        noise_rows = noise_ptr + sequence * stride_ab + place * stride_at
    out_rows = out_ptr + sequence * stride_ob + place * stride_ot
    from_x = in_rows
    if HAS_REDUNDANT:
        from_x = in_rows & (source < N)
        redundant_rows = redundant_ptr + sequence * stride_rb + (source - N) * stride_rr

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
            x = _load_rows(x_rows, part, stride_xd, from_x[:, None] & in_columns).to(tl.float32)
            if HAS_REDUNDANT:
                decoy_mask = (in_rows & (source >= N))[:, None] & in_columns
                x += _load_rows(redundant_rows, part, stride_rd, decoy_mask).to(tl.float32)
            square_sum += tl.sum(x * x, axis=1)
        scale = tl.rsqrt(square_sum / D + eps)

    for start in range(0, D if HAS_NORM and not ONE_TILE else 1, BLOCK_D):
        part = columns + start
        in_columns = (part < end)[None, :]
        x = _load_rows(x_rows, part, stride_xd, from_x[:, None] & in_columns)
        if HEAD_DIM:
            head = feature_index_ptr + sequence * stride_fb + tl.program_id(1).to(tl.int64) * stride_fh
            index = tl.load(head + tl.arange(0, BLOCK_D) * stride_fd, mask=part < end, other=0).to(tl.int32)
            x = tl.gather(x, tl.broadcast_to(index[None, :], (BLOCK_M, BLOCK_D)), axis=1)
        if HAS_REDUNDANT:
            # Rows of one kind are masked off in the other load, so no byte is read twice.
            decoy_mask = (in_rows & (source >= N))[:, None] & in_columns
            decoy = _load_rows(redundant_rows, part, stride_rd, decoy_mask)
            x = tl.where(from_x[:, None], x, decoy)
        if HAS_NORM:
            weight = tl.load(norm_weight_ptr + part * stride_wd, mask=part < D, other=0)[None, :].to(tl.float32)
            wide = x.to(tl.float32)
            if ONE_TILE:
                scale = tl.rsqrt(tl.sum(wide * wide, axis=1) / D + eps)
            # Llama rounds the normalised row to the input dtype before it multiplies by the weight.
            normed = narrow(wide * scale[:, None], x.dtype)
            x = narrow(normed.to(tl.float32) * weight, x.dtype)
        mask = in_rows[:, None] & in_columns
        if HAS_NOISE:
            x = x.to(tl.float32) + _load_rows(noise_rows, part, stride_ad, mask)
        tl.store(out_rows[:, None] + part[None, :] * stride_od, narrow(x, out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["rows", "S", "stride_pb"], do_not_specialize_on_alignment=["position_ptr"])
def _strip_kernel(
    # Pointers
    z_ptr,
    position_ptr,
    residual_ptr,
    image_ptr,
    out_ptr,
    # Sizes
    rows,
    S,
    D,
    # Strides
    stride_zb,
    stride_zt,
    stride_zd,
    stride_pb,
    stride_ps,
    stride_rb,
    stride_rs,
    stride_rd,
    stride_ab,
    stride_at,
    stride_ad,
    stride_ob,
    stride_os,
    stride_od,
    # Meta-parameters
    HAS_RESIDUAL: tl.constexpr,
    HAS_IMAGE: tl.constexpr,
    INT64: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    begin()
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    in_rows = row < rows
    # int64: sequence * stride and row * stride grow with the whole tensor.
    sequence = (row // S).to(tl.int64)
    token = (row % S).to(tl.int64)
    place = tl.load(position_ptr + sequence * stride_pb + token * stride_ps, mask=in_rows, other=0)
    columns = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    if INT64:
        columns = columns.to(tl.int64)
    mask = in_rows[:, None] & (columns < D)[None, :]
    y = _load_rows(z_ptr + sequence * stride_zb + place * stride_zt, columns, stride_zd, mask)
    if HAS_IMAGE:
        image_rows = image_ptr + sequence * stride_ab + place * stride_at
        y = y.to(tl.float32) - _load_rows(image_rows, columns, stride_ad, mask)
    if HAS_RESIDUAL:
        residual_rows = residual_ptr + sequence * stride_rb + token * stride_rs
        y = y.to(tl.float32) + _load_rows(residual_rows, columns, stride_rd, mask).to(tl.float32)
    out_rows = out_ptr + sequence * stride_ob + token * stride_os
    tl.store(out_rows[:, None] + columns[None, :] * stride_od, narrow(y, out_ptr.dtype.element_ty), mask=mask)


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
    check_inject(x, row_index, feature_index, norm_weight, noise)
    check_dtype("x", x)
    batch, tokens, features = x.shape
    encoded = tokens if row_index is None else row_index.shape[1]
    if noise is not None:
        noise = noise.expand(batch, encoded, features)
    if out is None:
        out = empty(x, (batch, encoded, features), x.dtype if noise is None else torch.float32)
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
        *(encoded, tokens, features, eps),
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
