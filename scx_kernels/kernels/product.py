"""A linear layer on rows that are gathered, injected and made noisy inside the load, and scattered at the store.

| array           | shape  | values   | meaning                                                                     |
|-----------------|--------|----------|-----------------------------------------------------------------------------|
| `row_index`     | (B, T) | 0..N+R-1 | row t is row `row_index[t]` of the N rows x followed by R redundant rows     |
| `scatter_index` | (B, T) | 0..      | row t of the product goes to row `scatter_index[t]`; past the end: dropped  |

The rows of all sequences form one list of M = B*T rows. Many rows: tiles of the output, x on the left. Few rows: the
product is turned around, `(weight @ x.T).T`, so that the weight fills the matrix unit's 64 rows and x, at most 64
rows, its columns; where even then the tiles are too few for the machine, the inner dimension is split. Up to three
weights sharing the rows lie side by side in the columns of the result, each beginning a tile of its own.

A long file, because the kernels stay beside their launchers.
"""

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from scx_kernels.checks import check_linear, check_linears
from scx_kernels.kernels.launch import (
    Target,
    begin,
    check_dtype,
    choose_tile,
    dot,
    exceeds_int32,
    launch,
    narrow,
    strides,
    target_of,
)
from scx_kernels.kernels.plans import empty, planned

__all__ = ["matmul_tile", "permuted_linear", "permuted_linears"]


@triton.jit
def _load_bias(bias_ptr, bias_1_ptr, bias_2_ptr, column, N, N_0, N_1, stride_bias_column, WEIGHTS: tl.constexpr):
    """float32 biases of these columns, which are those of the weights side by side."""
    bias = tl.load(bias_ptr + column * stride_bias_column, mask=column < N_0, other=0).to(tl.float32)
    if WEIGHTS > 1:
        inside = (column >= N_0) & (column < N_1)
        bias += tl.load(bias_1_ptr + (column - N_0) * stride_bias_column, mask=inside, other=0).to(tl.float32)
    if WEIGHTS > 2:
        inside = (column >= N_1) & (column < N)
        bias += tl.load(bias_2_ptr + (column - N_1) * stride_bias_column, mask=inside, other=0).to(tl.float32)
    return bias


@triton.jit
def _finish_tile(
    # The tile and where it lies
    acc, row, column,
    # Pointers
    bias_ptr, bias_1_ptr, bias_2_ptr, image_ptr, scatter_index_ptr, out_ptr,
    # Sizes
    M, N, N_0, N_1, column_end, T, out_rows,
    # Strides
    stride_bias_column,
    image_strides,  # from sequence to sequence, row to row, column to column
    scatter_index_strides,  # from sequence to sequence, row to row
    out_strides,  # as the image's
    # Meta-parameters
    HAS_BIAS: tl.constexpr,
    HAS_IMAGE: tl.constexpr,
    HAS_SCATTER: tl.constexpr,
    WEIGHTS: tl.constexpr,
    INT64: tl.constexpr,
):  # fmt: skip
    """Subtract the noise's image, add the bias, write rows to their places, in columns before `column_end`."""
    in_rows = row < M
    in_columns = column < column_end
    # int64: sequence * stride and row * stride grow with the whole tensor.
    sequence = (row // T).to(tl.int64)
    place = (row % T).to(tl.int64)
    if INT64:
        column = column.to(tl.int64)
    if HAS_IMAGE:
        image_rows = image_ptr + sequence * image_strides[0] + place * image_strides[1]
        mask = in_rows[:, None] & in_columns[None, :]
        acc -= tl.load(image_rows[:, None] + column[None, :] * image_strides[2], mask=mask, other=0)
    if HAS_BIAS:
        acc += _load_bias(bias_ptr, bias_1_ptr, bias_2_ptr, column, N, N_0, N_1, stride_bias_column, WEIGHTS)[None, :]
    if HAS_SCATTER:
        scatter_indices = scatter_index_ptr + sequence * scatter_index_strides[0] + place * scatter_index_strides[1]
        place = tl.load(scatter_indices, mask=in_rows, other=0)
        in_rows = in_rows & (place < out_rows)
    out = out_ptr + sequence * out_strides[0] + place * out_strides[1]
    mask = in_rows[:, None] & in_columns[None, :]
    tl.store(out[:, None] + column[None, :] * out_strides[2], narrow(acc, out_ptr.dtype.element_ty), mask=mask)


# What changes from request to request is not specialised: one compiled kernel serves every length.
@triton.jit(
    do_not_specialize=["M", "T", "tokens", "out_rows", "stride_row_index_sequence", "stride_scatter_index_sequence"],
    do_not_specialize_on_alignment=["row_index_ptr", "scatter_index_ptr"],
)
def _matmul_kernel(
    # Pointers
    x_ptr, redundant_ptr, row_index_ptr, noise_ptr,
    weight_ptr, weight_1_ptr, weight_2_ptr, bias_ptr, bias_1_ptr, bias_2_ptr,
    image_ptr, scatter_index_ptr, out_ptr, partial_ptr,
    # Sizes
    M,  # encoded rows of all sequences
    N,  # columns of all weights
    N_0,  # columns of the first weight, and up to the end of the second
    N_1,
    K,  # features of a row
    T,  # encoded rows of a sequence
    tokens,  # rows of x
    out_rows,  # rows of the result
    # Strides
    stride_x_sequence, stride_x_row, stride_x_feature,
    stride_redundant_sequence, stride_redundant_row, stride_redundant_feature,
    stride_row_index_sequence, stride_row_index_row,
    stride_noise_sequence, stride_noise_row, stride_noise_feature,
    stride_weight_row, stride_weight_feature,
    stride_bias_column,
    stride_image_sequence, stride_image_row, stride_image_column,
    stride_scatter_index_sequence, stride_scatter_index_row,
    stride_out_sequence, stride_out_row, stride_out_column,
    # Meta-parameters
    HAS_INDEX: tl.constexpr,
    HAS_REDUNDANT: tl.constexpr,
    SAME_STRIDE: tl.constexpr,  # x and redundant step alike from feature to feature: keeps loads vectorised
    HAS_NOISE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_IMAGE: tl.constexpr,
    HAS_SCATTER: tl.constexpr,
    WEIGHTS: tl.constexpr,
    EVEN_K: tl.constexpr,
    INT64: tl.constexpr,
    SWAP: tl.constexpr,  # the weight is the left operand
    SPLIT_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,  # tiles of this many row blocks follow each other, so that they share weights in L2
):  # fmt: skip
    begin()
    blocks_m = tl.cdiv(M, BLOCK_M)
    blocks_0 = tl.cdiv(N_0, BLOCK_N)
    blocks_1 = blocks_0 + tl.cdiv(N_1 - N_0, BLOCK_N)
    blocks_n = blocks_1 + tl.cdiv(N - N_1, BLOCK_N)
    first_m = tl.program_id(0) // (GROUP_M * blocks_n) * GROUP_M
    group_m = tl.minimum(blocks_m - first_m, GROUP_M)
    block_m = first_m + tl.program_id(0) % (GROUP_M * blocks_n) % group_m
    block_n = tl.program_id(0) % (GROUP_M * blocks_n) // group_m
    row = block_m * BLOCK_M + tl.arange(0, BLOCK_M)
    first_block = 0
    first_column = 0
    column_end = N_0
    if WEIGHTS > 1:
        weight_ptr = tl.where(block_n < blocks_0, weight_ptr, weight_1_ptr)
        first_block = tl.where(block_n < blocks_0, 0, blocks_0)
        first_column = tl.where(block_n < blocks_0, 0, N_0)
        column_end = tl.where(block_n < blocks_0, N_0, N_1)
    if WEIGHTS > 2:
        weight_ptr = tl.where(block_n < blocks_1, weight_ptr, weight_2_ptr)
        first_block = tl.where(block_n < blocks_1, first_block, blocks_1)
        first_column = tl.where(block_n < blocks_1, first_column, N_1)
        column_end = tl.where(block_n < blocks_1, column_end, N)
    weight_row = (block_n - first_block) * BLOCK_N + tl.arange(0, BLOCK_N)
    column = first_column + weight_row

    # Rows past the end repeat the last one: no mask in the loop, and the store drops them.
    # int64: sequence * stride and row * stride grow with the whole tensor.
    sequence = (tl.minimum(row, M - 1) // T).to(tl.int64)
    place = (tl.minimum(row, M - 1) % T).to(tl.int64)
    source = place
    if HAS_INDEX:
        source = tl.load(row_index_ptr + sequence * stride_row_index_sequence + place * stride_row_index_row)
    x_rows = x_ptr + sequence * stride_x_sequence + source * stride_x_row
    step_xk = tl.full((BLOCK_M,), 1, tl.int32) * stride_x_feature
    if HAS_REDUNDANT:
        redundant_rows = redundant_ptr + sequence * stride_redundant_sequence + (source - tokens) * stride_redundant_row
        x_rows = tl.where(source < tokens, x_rows, redundant_rows)
        step_xk = tl.where(source < tokens, step_xk, step_xk * 0 + stride_redundant_feature)
    last_weight_row = column_end - first_column - 1
    weight_rows = weight_ptr + tl.minimum(weight_row, last_weight_row).to(tl.int64) * stride_weight_row

    steps = tl.cdiv(tl.cdiv(K, BLOCK_K), SPLIT_K)
    k_start = tl.program_id(1) * steps * BLOCK_K
    k_end = tl.minimum(k_start + steps * BLOCK_K, K)
    inner = k_start + tl.arange(0, BLOCK_K)
    if INT64:
        inner = inner.to(tl.int64)
    if SAME_STRIDE:
        x_pointers = x_rows[:, None] + inner[None, :] * stride_x_feature
        x_step = tl.full((), BLOCK_K, tl.int64) * stride_x_feature
    else:
        x_pointers = x_rows[:, None] + inner[None, :] * step_xk[:, None]
        x_step = (step_xk.to(tl.int64) * BLOCK_K)[:, None]
    weight_pointers = weight_rows[:, None] + inner[None, :] * stride_weight_feature
    weight_step = tl.full((), BLOCK_K, tl.int64) * stride_weight_feature
    if HAS_NOISE:
        noise_rows = noise_ptr + sequence * stride_noise_sequence + place * stride_noise_row
        noise_pointers = noise_rows[:, None] + inner[None, :] * stride_noise_feature
        noise_step = tl.full((), BLOCK_K, tl.int64) * stride_noise_feature

    DTYPE: tl.constexpr = weight_ptr.dtype.element_ty
    acc = tl.zeros((BLOCK_N, BLOCK_M) if SWAP else (BLOCK_M, BLOCK_N), tl.float32)
    for k in range(k_start, k_end, BLOCK_K):
        if EVEN_K:
            x = tl.load(x_pointers)
            weight = tl.load(weight_pointers)
        else:
            in_inner = (k + tl.arange(0, BLOCK_K) < K)[None, :]
            x = tl.load(x_pointers, mask=in_inner, other=0)
            weight = tl.load(weight_pointers, mask=in_inner, other=0)
        if HAS_NOISE:
            if EVEN_K:
                noise = tl.load(noise_pointers)
            else:
                noise = tl.load(noise_pointers, mask=in_inner, other=0)
            noise_pointers += noise_step
            x = x.to(tl.float32) + noise
        if x.dtype != DTYPE:
            # Two terms carry twice the bits of one; the products add up in float32.
            noisy = x
            x = narrow(noisy, DTYPE)
            rest = narrow(noisy - x.to(tl.float32), DTYPE)
            acc = dot(weight, tl.trans(rest), acc) if SWAP else dot(rest, tl.trans(weight), acc)
        acc = dot(weight, tl.trans(x), acc) if SWAP else dot(x, tl.trans(weight), acc)
        x_pointers += x_step
        weight_pointers += weight_step

    if SWAP:
        acc = tl.trans(acc)
    if SPLIT_K > 1:
        # The workspace is (SPLIT_K, M, N), contiguous.
        partial = partial_ptr + (tl.program_id(1).to(tl.int64) * M + row) * N
        mask = (row < M)[:, None] & (column < column_end)[None, :]
        tl.store(partial[:, None] + column[None, :], acc, mask=mask)
    else:
        _finish_tile(
            acc, row, column, bias_ptr, bias_1_ptr, bias_2_ptr, image_ptr, scatter_index_ptr, out_ptr,
            M, N, N_0, N_1, column_end, T, out_rows,
            stride_bias_column, (stride_image_sequence, stride_image_row, stride_image_column),
            (stride_scatter_index_sequence, stride_scatter_index_row),
            (stride_out_sequence, stride_out_row, stride_out_column),
            HAS_BIAS, HAS_IMAGE, HAS_SCATTER, WEIGHTS, INT64,
        )  # fmt: skip


@triton.jit(
    do_not_specialize=["M", "T", "out_rows", "stride_scatter_index_sequence"],
    do_not_specialize_on_alignment=["scatter_index_ptr"],
)
def _sum_splits_kernel(
    # Pointers
    partial_ptr, bias_ptr, bias_1_ptr, bias_2_ptr, image_ptr, scatter_index_ptr, out_ptr,
    # Sizes, as of `_matmul_kernel`
    M, N, N_0, N_1, T, out_rows,
    # Strides
    stride_bias_column,
    stride_image_sequence, stride_image_row, stride_image_column,
    stride_scatter_index_sequence, stride_scatter_index_row,
    stride_out_sequence, stride_out_row, stride_out_column,
    # Meta-parameters
    HAS_BIAS: tl.constexpr,
    HAS_IMAGE: tl.constexpr,
    HAS_SCATTER: tl.constexpr,
    WEIGHTS: tl.constexpr,
    INT64: tl.constexpr,
    SPLIT_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    begin()
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = (row < M)[:, None] & (column < N)[None, :]
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for split in tl.static_range(SPLIT_K):
        # int64: split * M * N passes 2^31 long before M * N does.
        partial = partial_ptr + (row.to(tl.int64) + split * M) * N
        acc += tl.load(partial[:, None] + column[None, :], mask=mask, other=0)
    _finish_tile(
        acc, row, column, bias_ptr, bias_1_ptr, bias_2_ptr, image_ptr, scatter_index_ptr, out_ptr,
        M, N, N_0, N_1, N, T, out_rows,
        stride_bias_column, (stride_image_sequence, stride_image_row, stride_image_column),
        (stride_scatter_index_sequence, stride_scatter_index_row),
        (stride_out_sequence, stride_out_row, stride_out_column),
        HAS_BIAS, HAS_IMAGE, HAS_SCATTER, WEIGHTS, INT64,
    )  # fmt: skip


def _few_rows_tile(
    rows: int, columns: int, inner: int, dtype: torch.dtype, noise: bool, aligned: bool, target: Target
) -> dict[str, Any]:
    """Bound by reading the weight: enough of it in flight (about 48 KB a multiprocessor), in few programs."""
    block_m = max(16, triton.next_power_of_2(rows))
    block_n, block_k, stages = 64, 128, 5
    if dtype == torch.float32:
        block_n, block_k, stages = 32, 32, 3
    elif not aligned:
        block_k, stages = 32, 2
    elif target.backend == "hip":
        block_k, stages = 64, 2
    elif target.arch < 90 or noise:
        block_k, stages = 64 if noise and rows > 32 else 128, 3
    steps, blocks = triton.cdiv(inner, block_k), triton.cdiv(columns, block_n)
    # Half a machine's worth of programs keeps the memory busy; below that, split the inner dimension.
    splits = 1 if 2 * blocks > target.multiprocessors else target.multiprocessors // (2 * blocks) + 1
    return {
        "SWAP": True,
        "SPLIT_K": max(1, min(8, steps // 4, splits)),
        "BLOCK_M": block_m,
        "BLOCK_N": block_n,
        "BLOCK_K": block_k,
        "GROUP_M": 1,
        "num_warps": 4,
        "num_stages": stages,
    }


def matmul_tile(
    rows: int, columns: int, inner: int, dtype: torch.dtype, noise: bool, aligned: bool, target: Target
) -> dict[str, Any]:
    """Meta-parameters of `permuted_linear` for (rows, inner) @ (inner, columns). `aligned`: rows of x and weight are
    contiguous and start at multiples of 16 bytes; if not, every element is a load of its own, and tiles are small."""
    if rows <= 64:
        return _few_rows_tile(rows, columns, inner, dtype, noise, aligned, target)
    block_m, block_n, block_k, warps, stages = 128, 128, 64, 8, 3
    if dtype == torch.float32:
        block_n, block_k, stages = 64, 16, 2
    elif not aligned:
        block_m, block_n, block_k, warps, stages = 64, 64, 32, 4, 2
    elif target.backend == "hip":
        block_k, warps, stages = 32, 4, 2
    elif noise:
        block_k = 32 if target.arch < 90 else 64
    elif target.arch >= 90 and triton.cdiv(rows, 128) * triton.cdiv(columns, 256) >= target.multiprocessors:
        block_n, stages = 256, 4
    if triton.cdiv(rows, block_m) * triton.cdiv(columns, block_n) < target.multiprocessors and block_m == 128:
        block_m, warps = 64, 4
    return {
        "SWAP": False,
        "SPLIT_K": 1,
        "BLOCK_M": block_m,
        "BLOCK_N": block_n,
        "BLOCK_K": block_k,
        "GROUP_M": 8,
        "num_warps": warps,
        "num_stages": stages,
    }


def _rows_are_aligned(x: Tensor) -> bool:
    return x.stride(-1) == 1 and all(stride * x.element_size() % 16 == 0 for stride in x.stride()[:-1])


@planned
def permuted_linear(
    x: Tensor,
    weight: Tensor,
    row_index: Tensor | None = None,
    redundant: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    noise: Tensor | None = None,
    image: Tensor | None = None,
    scatter_index: Tensor | None = None,
    out_rows: int | None = None,
    out: Tensor | None = None,
    tile: dict[str, Any] | None = None,
    force_int64: bool = False,
) -> Tensor:
    """`scx_kernels.permuted_linear` for float32, float16 and bfloat16, any strides, in one kernel.

    Half-precision weights meet noisy rows as two terms, so that the noise costs no more precision than it would in
    float32 (bfloat16: 16 bits).

    Args:
        out: (B, T or out_rows, M) to write into, any strides and any kernel dtype.
        tile: overrides of `matmul_tile`. force_int64: 64-bit column offsets even where 32 bits suffice.
    """
    check_linear(x, weight, row_index, redundant, bias, noise, image, scatter_index, out_rows)
    check_dtype("x", x)
    check_dtype("weight", weight)
    encoded, columns = x.shape[1] if row_index is None else row_index.shape[1], weight.shape[0]
    shape = (x.shape[0], encoded if out_rows is None else out_rows, columns)
    if out is None:
        noisy = noise is not None or x.dtype != weight.dtype
        out = empty(x, shape, torch.float32 if noisy and image is None else weight.dtype)
    if tuple(out.shape) != shape:
        raise ValueError(f"out: expected {shape}, got {tuple(out.shape)}")
    _multiply(x, (weight,), row_index, redundant, (bias,), noise, image, scatter_index, out, tile, force_int64)
    return out


@planned
def permuted_linears(
    x: Tensor,
    weights: Sequence[Tensor],
    row_index: Tensor | None = None,
    redundant: Tensor | None = None,
    biases: Sequence[Tensor | None] | None = None,
    *,
    tile: dict[str, Any] | None = None,
) -> Tensor:
    """`scx_kernels.permuted_linears` in one kernel for up to three weights of like strides: the products side by side,
    (B, T, sum of M).

    Args:
        tile: overrides of `matmul_tile`.
    """
    biases = check_linears(x, weights, row_index, redundant, biases)
    check_dtype("x", x)
    encoded = x.shape[1] if row_index is None else row_index.shape[1]
    widths = [weight.shape[0] for weight in weights]
    out = empty(x, (x.shape[0], encoded, sum(widths)))
    layouts = {(weight.stride(), strides(bias, 1)) for weight, bias in zip(weights, biases, strict=True)}
    if len(weights) <= 3 and len(layouts) == 1 and 0 not in widths:
        _multiply(x, weights, row_index, redundant, biases, None, None, None, out, tile, False)
        return out
    for weight, bias, part in zip(weights, biases, out.split(widths, dim=2), strict=True):
        _multiply(x, (weight,), row_index, redundant, (bias,), None, None, None, part, tile, False)
    return out


def _multiply(
    x: Tensor, weights: Sequence[Tensor], row_index: Tensor | None, redundant: Tensor | None,
    biases: Sequence[Tensor | None], noise: Tensor | None, image: Tensor | None, scatter_index: Tensor | None,
    out: Tensor, tile: dict[str, Any] | None, force_int64: bool,
) -> None:  # fmt: skip
    """Launch the product of arguments that are checked; weights and biases that are laid out alike share the launch."""
    (batch, tokens, inner), columns = x.shape, out.shape[2]
    encoded = tokens if row_index is None else row_index.shape[1]
    rows, weight = batch * encoded, weights[0]
    absent = [None] * (3 - len(weights))
    ends = (len(weights[0]), sum(len(weight) for weight in weights[:2]))
    noise = None if noise is None else noise.expand(batch, encoded, inner)
    image = None if image is None else image.expand(batch, encoded, columns)
    noisy = noise is not None or x.dtype != weight.dtype
    aligned = all(_rows_are_aligned(operand) for operand in (x, *weights, redundant) if operand is not None)
    target = target_of(x.device)
    heuristic = matmul_tile(rows, columns, inner, weight.dtype, noisy, aligned, target)
    variant = "noisy" if noisy else "" if aligned else "unaligned"
    sizes = {"rows": rows, "columns": columns, "inner": inner}
    meta = choose_tile("permuted_linear", heuristic, tile, target, weight.dtype, variant, **sizes)
    split = meta["SPLIT_K"] > 1
    partial = empty(x, (meta["SPLIT_K"], rows, columns), torch.float32) if split else None
    finish_strides = (*strides(biases[0], 1), *strides(image, 3), *strides(scatter_index, 2), *out.stride())
    flags = {
        "HAS_BIAS": biases[0] is not None,
        "HAS_IMAGE": image is not None,
        "HAS_SCATTER": scatter_index is not None,
        "WEIGHTS": len(weights),
        "INT64": force_int64 or exceeds_int32(x, redundant, noise, *weights, image, out),
    }
    blocks_n = sum(triton.cdiv(len(weight), meta["BLOCK_N"]) for weight in weights)
    launch(
        _matmul_kernel,
        (triton.cdiv(rows, meta["BLOCK_M"]) * blocks_n, meta["SPLIT_K"]),
        *(x, redundant, row_index, noise, *weights, *absent, *biases, *absent, image, scatter_index, out, partial),
        *(rows, columns, *ends, inner, encoded, tokens, out.shape[1]),
        *(*x.stride(), *strides(redundant, 3), *strides(row_index, 2), *strides(noise, 3), *weight.stride()),
        *finish_strides,
        HAS_INDEX=row_index is not None,
        HAS_REDUNDANT=redundant is not None,
        SAME_STRIDE=redundant is None or redundant.stride(2) == x.stride(2),
        HAS_NOISE=noise is not None,
        EVEN_K=inner % meta["BLOCK_K"] == 0,
        ahead=True,
        device=x.device,
        **flags,
        **meta,
    )
    if split:
        block_m, block_n = min(16, triton.next_power_of_2(rows)), 128
        launch(
            _sum_splits_kernel,
            (triton.cdiv(rows, block_m), triton.cdiv(columns, block_n)),
            *(partial, *biases, *absent, image, scatter_index, out),
            *(rows, columns, *ends, encoded, out.shape[1], *finish_strides),
            SPLIT_K=meta["SPLIT_K"],
            BLOCK_M=block_m,
            BLOCK_N=block_n,
            num_warps=4,
            ahead=True,
            device=x.device,
            **flags,
        )
