"""Kernels of attention: many queries, and one step."""

import math

import parity
import pytest
import torch
from parity import assert_close, by_dtype, integers, inverse, nans, permutations, randn, run_kernel
from plain_attention import plain_attention, seen_keys

from scx_kernels.kernels import attention as kernels


def check(got, q, k, v, mask, scale, output_index=None):
    plain = plain_attention(q, k, v, mask, scale, output_index)
    mask = mask if mask.dtype == torch.bool else mask.double()
    assert_close(got, plain, plain_attention(*parity.wide(q, k, v), mask, scale, output_index))


SHAPES = [  # batch, query heads, key/value heads, queries, keys, head size
    (1, 2, 2, 33, 33, 64),
    (2, 4, 2, 20, 41, 80),
    (1, 2, 1, 40, 40, 96),
    (1, 1, 1, 5, 70, 256),
    (1, 3, 1, 18, 18, 40),
    (1, 1, 1, 17, 17, 160),
]
SMALL = {"BLOCK_M": 16, "BLOCK_N": 16, "num_warps": 4}


def qkv(shape, dtype, layout="plain"):
    batch, heads, groups, tokens, keys, size = shape
    return [
        randn(batch, n, m, size, dtype=dtype, layout=layout)
        for n, m in ((heads, tokens), (groups, keys), (groups, keys))
    ]


@by_dtype
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("indexed", [False, True])
def test_attention(dtype, shape, causal, indexed):
    batch, heads, _, tokens, keys, size = shape
    q, k, v = qkv(shape, dtype)
    index = permutations(batch, heads, size) if indexed else None
    out = nans(batch, heads, tokens, size, dtype=dtype, layout="sliced")
    options = {"softmax_scale": 0.3, "is_causal": causal, "output_index": index, "out": out}
    got = run_kernel(kernels.attention, q, k, v, **options, tile=SMALL)
    check(got, q, k, v, seen_keys(batch, tokens, keys, causal=causal), 0.3, index)


@by_dtype
@pytest.mark.parametrize("layout", ["transposed", "sliced", "expanded"])
def test_attention_strides(dtype, layout):
    q, k, v = qkv((2, 2, 1, 19, 37, 64), dtype, layout)
    options = {"softmax_scale": 0.2, "is_causal": True, "force_int64": True}
    got = run_kernel(kernels.attention, q, k, v, **options, tile=SMALL)
    check(got, q, k, v, seen_keys(2, 19, 37, causal=True), 0.2)


@by_dtype
@pytest.mark.parametrize("window", [1, 7, 16, 30, 100])
@pytest.mark.parametrize(("tokens", "keys"), [(50, 50), (20, 61)])
def test_attention_window(dtype, window, tokens, keys):
    q, k, v = qkv((1, 2, 1, tokens, keys, 16), dtype)
    options = {"softmax_scale": 0.3, "is_causal": True, "window": window}
    got = run_kernel(kernels.attention, q, k, v, **options, tile=SMALL)
    check(got, q, k, v, seen_keys(1, tokens, keys, causal=True, window=window), 0.3)


@by_dtype
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("window", [None, 9])
def test_attention_lengths(dtype, causal, window):
    if window and not causal:
        window = None
    q, k, v = qkv((3, 2, 1, 37, 37, 32), dtype)
    start, length = integers(0, 5, 20), integers(37, 32, 3)
    for b in range(3):  # what lies outside a sequence's keys must not be touched, whatever it is
        for x in (k, v):
            x[b, :, : start[b]] = math.nan
            x[b, :, start[b] + length[b] :] = math.nan
    got = run_kernel(
        kernels.attention, q, k, v, softmax_scale=0.3, is_causal=causal, window=window, tile=SMALL,
        kv_start=start, kv_length=length,
    )  # fmt: skip
    mask = seen_keys(3, 37, 37, causal=causal, window=window, start=start, end=start + length)
    check(got, q, k.nan_to_num(0), v.nan_to_num(0), mask, 0.3)


@by_dtype
@pytest.mark.parametrize("keys", [35, 48], ids=["rows not aligned", "rows aligned"])
@pytest.mark.parametrize("kind", ["bool", "additive"])
def test_attention_mask(dtype, kind, keys):
    q, k, v = qkv((2, 2, 2, 21, keys, 32), dtype)
    mask = torch.rand(2, 1, 21, keys, device=parity.DEVICE) < 0.5
    mask = mask if kind == "bool" else randn(1, 2, 21, keys, dtype=dtype)
    got = run_kernel(kernels.attention, q, k, v, softmax_scale=0.3, mask=mask, tile=SMALL)
    check(got, q, k, v, mask, 0.3)


@by_dtype
@pytest.mark.parametrize("mask_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("scale", [0.3, 8.0])
def test_attention_where_the_lowest_number_hides_every_key(dtype, mask_dtype, scale):
    """Beside a key that is seen it hides; a row of nothing else is the mean of its values, for every score vanishes in
    such a number; and -inf hides for good."""
    q, k, v = qkv((2, 4, 2, 21, 35, 32), dtype)
    mask = torch.zeros(2, 1, 21, 35, dtype=mask_dtype, device=parity.DEVICE)
    mask[0, :, 4:9, 3:] = torch.finfo(mask_dtype).min
    mask[0, :, 9:] = torch.finfo(mask_dtype).min
    mask[0, :, 15:, 20:] = -math.inf
    mask[1, :, :5] = -math.inf
    got = run_kernel(kernels.attention, q, k, v, softmax_scale=scale, mask=mask, tile=SMALL)
    mean = q.clone()
    mean[0, :, 9:] = 0  # float64 has room for a score beside the lowest number of float32
    exact = plain_attention(*parity.wide(mean, k, v, mask), scale)
    assert_close(got, plain_attention(q, k, v, mask.to(dtype).nan_to_num(neginf=-math.inf), scale), exact)
    everything, first = (v[0, :, :n].double().mean(1).repeat_interleave(2, 0) for n in (35, 20))
    assert_close(got[0, :, 9], everything.to(dtype), everything)
    assert_close(got[0, :, 20], first.to(dtype), first)
    assert not got[1, :, :5].any()


@by_dtype
@pytest.mark.parametrize("size", [32, 80])
@pytest.mark.parametrize("decoys", [0, 21])
def test_attention_into_the_next_order(dtype, size, decoys):
    batch, heads, tokens = 2, 2, 35
    q, k, v = qkv((batch, heads, 1, tokens, tokens, size), dtype)
    redundant = randn(batch, decoys, heads * size, dtype=dtype) if decoys else None
    row_index = permutations(batch, tokens + decoys)
    index = permutations(batch, heads, size)
    out = nans(batch, tokens + decoys, heads * size, dtype=dtype, layout="sliced")
    got = run_kernel(
        kernels.attention, q, k, v, softmax_scale=0.3, is_causal=True, output_index=index, row_index=row_index,
        redundant=redundant, out=out, tile=SMALL,
    )  # fmt: skip
    rows = got.gather(1, inverse(row_index)[:, :, None].expand(got.shape))
    if redundant is not None:
        assert torch.equal(rows[:, tokens:], redundant)
    heads_of_rows = rows[:, :tokens].unflatten(-1, (heads, size)).transpose(1, 2)
    check(heads_of_rows, q, k, v, seen_keys(batch, tokens, tokens, causal=True), 0.3, index)


@by_dtype
@pytest.mark.parametrize(
    "shape", [(1, 2, 2, 1, 90, 64), (2, 4, 2, 3, 70, 80), (1, 12, 1, 2, 40, 96), (1, 2, 1, 16, 33, 256)], ids=str
)
@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("indexed", [False, True])
def test_step(dtype, shape, splits, indexed):
    batch, heads, _, tokens, keys, size = shape
    q, k, v = qkv(shape, dtype)
    index = permutations(batch, heads, size) if indexed else None
    out = nans(batch, heads, tokens, size, dtype=dtype, layout="sliced")
    tile = {"splits": splits, "BLOCK_M": 16, "BLOCK_N": 16}
    options = {"softmax_scale": 0.3, "output_index": index, "out": out}
    got = run_kernel(kernels.attention_step, q, k, v, **options, tile=tile)
    check(got, q, k, v, seen_keys(batch, tokens, keys, causal=True), 0.3, index)


@by_dtype
@pytest.mark.parametrize("permuted", [False, True])
@pytest.mark.parametrize("window", [None, 11])
@pytest.mark.parametrize("layout", ["plain", "transposed"])
def test_step_lengths(dtype, permuted, window, layout):
    batch, tokens, keys, decoys = 3, 2, 60, 9
    q, k, v = qkv((batch, 4, 2, tokens, keys, 32), dtype, layout)
    start, length = integers(0, 7, 30), integers(60, 41, 2)
    for b in range(batch):
        for x in (k, v):
            x[b, :, : start[b]] = math.nan
            x[b, :, start[b] + length[b] :] = math.nan
    cache_k, cache_v, position = k, v, None
    if permuted:
        row_index = permutations(batch, keys + decoys)
        position = inverse(row_index)[:, :keys]
        garbage = torch.full((batch, 2, decoys, 32), math.nan, dtype=dtype, device=parity.DEVICE)
        take = row_index[:, None, :, None].expand(batch, 2, keys + decoys, 32)
        cache_k, cache_v = (torch.cat([x, garbage], 2).gather(2, take) for x in (k, v))
    got = run_kernel(
        kernels.attention_step, q, cache_k, cache_v, softmax_scale=0.3, window=window, position=position,
        kv_start=start, kv_length=length,
        tile={"splits": 3, "BLOCK_N": 16}, force_int64=layout == "transposed",
    )  # fmt: skip
    mask = seen_keys(
        batch, tokens, keys, causal=True, window=window, start=start, end=start + length, aligned_to_end=True
    )
    check(got, q, k.nan_to_num(0), v.nan_to_num(0), mask, 0.3)


def test_empty():
    for shape in ((0, 2, 1, 4, 4, 16), (1, 2, 1, 0, 4, 16)):
        q, k, v = qkv(shape, torch.float32)
        assert kernels.attention(q, k, v, softmax_scale=1.0).shape == q.shape
        assert kernels.attention_step(q, k, v, softmax_scale=1.0).shape == q.shape
    q, k, v = qkv((1, 2, 1, 3, 0, 16), torch.float32)
    assert not kernels.attention(q, k, v, softmax_scale=1.0).any(), "no keys, no output"


def test_bad_arguments_are_named():
    q, k, v = qkv((1, 2, 1, 4, 3, 16), torch.float32)
    with pytest.raises(ValueError, match="is_causal"):
        kernels.attention(q, k, v, softmax_scale=1.0, is_causal=True)
    with pytest.raises(ValueError, match="window"):
        kernels.attention(q, k, v, softmax_scale=1.0, window=4)
    with pytest.raises(ValueError, match="softmax_scale"):
        kernels.attention_step(q, k, v, softmax_scale=0.0)
    with pytest.raises(TypeError, match="kv_length"):
        kernels.attention_step(q, k, v, softmax_scale=1.0, kv_length=randn(1))
    with pytest.raises(ValueError, match="output_index"):
        kernels.attention(q, k, v, softmax_scale=1.0, output_index=permutations(1, 2, 15))
    with pytest.raises(ValueError, match="redundant: needs row_index"):
        kernels.attention(q, k, v, softmax_scale=1.0, redundant=randn(1, 2, 32))
    with pytest.raises(ValueError, match="row_index"):
        kernels.attention(q, k, v, softmax_scale=1.0, row_index=permutations(1, 5))
    with pytest.raises(ValueError, match="position"):
        kernels.attention_step(q, k, v, softmax_scale=1.0, position=permutations(2, 3))
