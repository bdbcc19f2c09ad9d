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

from scx_kernels.checks import check_rows, check_same_shape
from scx_kernels.kernels.launch import Target, check_dtype, exceeds_int32, launch, narrow, strides, target_of

__all__ = ["inject_permute", "inject_tile", "strip_restore", "strip_tile"]


@triton.jit
def _load_rows(pointers, offsets, stride, mask):
    return tl.load(pointers[:, None] + offsets[None, :] * stride, mask=mask, other=0)


@triton.jit
def _inject_kernel(
    # Pointers
    x_ptr,
    redundant_ptr,
    row_index_ptr,
    norm_weight_ptr,
    noise_ptr,
    out_ptr,
    # Sizes
    rows,
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
    stride_wd,
    stride_ab,
    stride_at,
    stride_ad,
    stride_ob,
    stride_ot,
    stride_od,
    # Meta-parameters
    HAS_REDUNDANT: tl.constexpr,
    HAS_NORM: tl.constexpr,
    HAS_NOISE: tl.constexpr,
    ONE_TILE: tl.constexpr,  # the whole row is in registers, so the norm reads it once
    INT64: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    in_rows = row < rows
    # int64: sequence * stride and row * stride grow with the whole tensor.
    sequence = (row // T).to(tl.int64)
    place = (row % T).to(tl.int64)
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
    else:
        first = tl.program_id(1) * BLOCK_D
    columns = first + tl.arange(0, BLOCK_D)
    if INT64:
        columns = columns.to(tl.int64)

    scale = tl.full((BLOCK_M,), 1.0, tl.float32)
    if HAS_NORM:
        square_sum = tl.zeros((BLOCK_M,), tl.float32)
        if not ONE_TILE:
            for start in range(0, D, BLOCK_D):
                part = columns + start
                mask = from_x[:, None] & (part < D)[None, :]
                x = _load_rows(x_rows, part, stride_xd, mask).to(tl.float32)
                square_sum += tl.sum(x * x, axis=1)
            scale = tl.rsqrt(square_sum / D + eps)

    for start in range(0, D if HAS_NORM and not ONE_TILE else 1, BLOCK_D):
        part = columns + start
        in_columns = (part < D)[None, :]
        x = _load_rows(x_rows, part, stride_xd, from_x[:, None] & in_columns)
        if HAS_NORM:
            weight = tl.load(norm_weight_ptr + part * stride_wd, mask=part < D, other=0)[None, :].to(tl.float32)
            wide = x.to(tl.float32)
            if ONE_TILE:
                scale = tl.rsqrt(tl.sum(wide * wide, axis=1) / D + eps)
            # Llama rounds the normalised row to the input dtype before it multiplies by the weight.
            normed = narrow(wide * scale[:, None], x.dtype)
            x = narrow(normed.to(tl.float32) * weight, x.dtype)
        if HAS_REDUNDANT:
            # Rows of one kind are masked off in the other load, so no byte is read twice.
            decoy_mask = (in_rows & (source >= N))[:, None] & in_columns
            decoy = _load_rows(redundant_rows, part, stride_rd, decoy_mask)
            x = tl.where(from_x[:, None], x, decoy)
        mask = in_rows[:, None] & in_columns
        if HAS_NOISE:
            x = x.to(tl.float32) + _load_rows(noise_rows, part, stride_ad, mask)
        tl.store(out_rows[:, None] + part[None, :] * stride_od, narrow(x, out_ptr.dtype.element_ty), mask=mask)


@triton.jit
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
        return _row_tile(features, element_bytes, 64, 4096, target) | {"ONE_TILE": True}
    tile = _row_tile(features, element_bytes, 32, 16_384 if features <= 16_384 else 8192, target)
    return tile | {"ONE_TILE": tile["BLOCK_D"] >= features}


def strip_tile(features: int, dtype: torch.dtype, image: bool, target: Target) -> dict[str, Any]:
    """Meta-parameters of `strip_restore`."""
    return _row_tile(features, 4 if image else dtype.itemsize, 64, 4096, target)


def _encoded_image(name: str, image: Tensor, batch: int, rows: int, features: int, device: torch.device) -> Tensor:
    """(T, D) or (B, T, D) float32 -> (B, T, D), without a copy."""
    if image.dtype != torch.float32 or image.device != device:
        raise TypeError(f"{name}: expected float32 on {device}, got {image.dtype} on {image.device}")
    if image.shape not in ((rows, features), (batch, rows, features)):
        raise ValueError(f"{name}: expected shape ({batch}, {rows}, {features}) or without batch, got {image.shape}")
    return image.expand(batch, rows, features)


def inject_permute(
    x: Tensor,
    row_index: Tensor,
    redundant: Tensor | None = None,
    *,
    norm_weight: Tensor | None = None,
    eps: float = 1e-6,
    noise: Tensor | None = None,
    out: Tensor | None = None,
    tile: dict[str, Any] | None = None,
    force_int64: bool = False,
) -> Tensor:
    """Append redundant rows and permute: `y[b, t] = (norm(x) ⊕ redundant)[b, row_index[b, t]] (+ noise[b, t])`.

    Args:
        x: (B, N, D) float32, float16 or bfloat16, any strides.
        row_index: (B, T) int64 in 0..N+R-1.
        redundant: (B, R, D) of x's dtype, or None for R = 0. Taken as it is: not normalised.
        norm_weight: (D,) of x's dtype, RMS norm on the rows of x (float32 statistics, rounded to x's dtype, then
            multiplied by the weight, as in Llama); None for no norm.
        eps: added to the mean square under the root.
        noise: (T, D) or (B, T, D) float32 in encoded order, or None.
        out: (B, T, D) to write into, any strides; x's dtype, float32 under noise.
        tile: overrides of `inject_tile`. force_int64: 64-bit column offsets even where 32 bits suffice.

    Returns: (B, T, D) of x's dtype; float32 under noise.
    Raises: TypeError, ValueError naming the argument whose dtype, shape or device does not fit.
    Source: SCX, prefill, "encode"; Zhang and Sennrich, RMSNorm (arXiv 1910.07467).
    """
    check_rows(x, row_index, redundant)
    check_dtype("x", x)
    (batch, tokens, features), encoded = x.shape, row_index.shape[1]
    if norm_weight is not None and (norm_weight.shape != (features,) or norm_weight.dtype != x.dtype):
        raise ValueError(f"norm_weight: expected ({features},) {x.dtype}, got {norm_weight.shape} {norm_weight.dtype}")
    if noise is not None:
        noise = _encoded_image("noise", noise, batch, encoded, features, x.device)
    if out is None:
        out = x.new_empty(batch, encoded, features, dtype=x.dtype if noise is None else torch.float32)
    meta = inject_tile(features, x.dtype, norm_weight is not None, noise is not None, target_of(x.device))
    meta |= tile or {}
    columns = 1 if norm_weight is not None else triton.cdiv(features, meta["BLOCK_D"])
    launch(
        _inject_kernel,
        (triton.cdiv(batch * encoded, meta["BLOCK_M"]), columns),
        *(x, redundant, row_index, norm_weight, noise, out),
        *(batch * encoded, encoded, tokens, features, eps),
        *(*x.stride(), *strides(redundant, 3), *row_index.stride(), *strides(norm_weight, 1)),
        *(*strides(noise, 3), *out.stride()),
        HAS_REDUNDANT=redundant is not None,
        HAS_NORM=norm_weight is not None,
        HAS_NOISE=noise is not None,
        INT64=force_int64 or exceeds_int32(x, redundant, noise, out),
        device=x.device,
        **meta,
    )
    return out


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
    """Drop redundant rows and undo the permutation: `y[b, s] = (z - image)[b, position[b, s]] (+ residual[b, s])`.

    Args:
        z: (B, T, D) float32, float16 or bfloat16, encoded rows, any strides.
        position: (B, S) int64 in 0..T-1.
        residual: (B, S, D), added to the result, or None. May be `out` itself.
        image: (T, D) or (B, T, D) float32 in encoded order, what the noise became; subtracted in float32. Or None.
        dtype: of the result, by default z's. The sum is taken in float32 and rounded once.
        out: (B, S, D) to write into, any strides.
        tile: overrides of `strip_tile`. force_int64: 64-bit column offsets even where 32 bits suffice.

    Returns: (B, S, D).
    Raises: TypeError, ValueError naming the argument whose dtype, shape or device does not fit.
    Source: SCX, prefill, "decode".
    """
    check_rows(z, position, None, index_name="position")
    check_dtype("z", z)
    (batch, encoded, features), tokens = z.shape, position.shape[1]
    if image is not None:
        image = _encoded_image("image", image, batch, encoded, features, z.device)
    if out is None:
        out = z.new_empty(batch, tokens, features, dtype=dtype or z.dtype)
    if residual is not None:
        check_same_shape(out, residual, "residual")
    meta = strip_tile(features, z.dtype, image is not None, target_of(z.device)) | (tile or {})
    launch(
        _strip_kernel,
        (triton.cdiv(batch * tokens, meta["BLOCK_M"]), triton.cdiv(features, meta["BLOCK_D"])),
        *(z, position, residual, image, out),
        *(batch * tokens, tokens, features),
        *(*z.stride(), *position.stride(), *strides(residual, 3), *strides(image, 3), *out.stride()),
        HAS_RESIDUAL=residual is not None,
        HAS_IMAGE=image is not None,
        INT64=force_int64 or exceeds_int32(z, residual, image, out),
        device=z.device,
        **meta,
    )
    return out
