"""Kernels of the permuted-gather product."""

import parity
import pytest
import torch
from parity import assert_close, by_dtype, nans, permutations, randn, run_kernel
from torch.nn import functional as F

from scx_kernels import reference
from scx_kernels.kernels import product

TILES = {
    "many rows": {"SWAP": False, "SPLIT_K": 1, "BLOCK_M": 16, "BLOCK_N": 32, "BLOCK_K": 32},
    "few rows": {"SWAP": True, "SPLIT_K": 1, "BLOCK_M": 16, "BLOCK_N": 16, "BLOCK_K": 32},
    "split": {"SWAP": True, "SPLIT_K": 3, "BLOCK_M": 16, "BLOCK_N": 32, "BLOCK_K": 16},
}
SHAPES = [(1, 5, 0, 64, 48), (2, 13, 4, 100, 33), (1, 1, 1, 40, 70)]  # batch, tokens, decoys, inner, columns
by_tile = pytest.mark.parametrize("tile", TILES.values(), ids=TILES)


def plain(x, weight, row_index, redundant, bias, noise=None, image=None):
    return reference.permuted_linear(x, weight, row_index, redundant, bias, noise=noise, image=image)


def check(got, *args):
    assert_close(got, plain(*args), plain(*parity.wide(*args)), args[0].dtype)


def inputs(shape, dtype, layout="plain", bias=True):
    batch, tokens, decoys, inner, columns = shape
    return [
        randn(batch, tokens, inner, dtype=dtype, layout=layout),
        randn(columns, inner, dtype=dtype, layout="plain" if layout == "expanded" else layout),
        permutations(batch, tokens + decoys),
        randn(batch, decoys, inner, dtype=dtype, layout=layout) if decoys else None,
        randn(columns, dtype=dtype) if bias else None,
    ]


@by_dtype
@by_tile
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("layout", ["plain", "transposed", "sliced", "expanded"])
def test_product(dtype, tile, shape, layout):
    args = inputs(shape, dtype, layout, bias=layout != "sliced")
    batch, tokens, decoys, _, columns = shape
    out = nans(batch, tokens + decoys, columns, dtype=dtype, layout=layout)
    got = run_kernel(product.permuted_linear, *args, out=out, tile=tile, force_int64=layout == "sliced")
    check(got, *args, None, None)


@by_dtype
@by_tile
@pytest.mark.parametrize("cancelled", [False, True])
def test_noise(dtype, tile, cancelled):
    shape = (2, 13, 4, 100, 33)
    args = inputs(shape, dtype)
    noise = 8 * randn(17, 100)
    image = reference.noise_image(noise[None].double(), args[1].double())[0].float() if cancelled else None
    got = run_kernel(product.permuted_linear, *args, noise=noise, image=image, tile=tile)
    rows = reference.inject_permute(args[0], args[2], args[3]).float() + noise
    before = run_kernel(product.permuted_linear, rows, args[1], None, None, args[4], image=image, tile=tile)
    assert torch.equal(got, before), "noise added in the load or in a pass before it"
    assert got.dtype == (dtype if cancelled else torch.float32)
    if dtype == torch.float32 or not cancelled:
        check(got, *args, noise, image)
        return
    # Two half-precision terms instead of float32: within twice the error of the product without any noise.
    exact = plain(*parity.wide(*args, None, None))
    assert_close(got, plain(*args, None, None), exact)


def test_two_terms_beat_one():
    args = inputs((1, 13, 4, 128, 33), torch.bfloat16)
    noise = 8 * randn(17, 128)
    image = reference.noise_image(noise[None].double(), args[1].double())[0].float()
    out = nans(1, 17, 33, dtype=torch.float32)
    run_kernel(product.permuted_linear, *args, noise=noise, image=image, out=out)
    exact = plain(*parity.wide(*args, None, None))
    one = (
        F.linear(
            (reference.inject_permute(*(args[0], args[2], args[3])) + noise).bfloat16().float(),
            args[1].float(),
            args[4].float(),
        )
        - image
    )
    assert (out - exact).abs().max() < (one - exact).abs().max() / 50


@by_dtype
@by_tile
def test_strip_at_the_store(dtype, tile):
    args = inputs((2, 13, 4, 64, 40), dtype)
    out = nans(2, 13, 40, dtype=dtype, layout="transposed")
    got = run_kernel(product.permuted_linear, *args, scatter_index=args[2], out_rows=13, out=out, tile=tile)
    exact = F.linear(*parity.wide(args[0], args[1], args[4]))
    assert_close(got, F.linear(args[0], args[1], args[4]), exact)


@by_dtype
@by_tile
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("widths", [(48,), (33, 20), (40, 7, 16)], ids=str)
def test_several_weights(dtype, tile, biased, widths):
    """Each weight's product lies in its own columns, whatever tile its columns end in."""
    x, _, row_index, redundant, _ = inputs((2, 9, 4, 64, 1), dtype)
    weights = [randn(width, 64, dtype=dtype) for width in widths]
    biases = [randn(width, dtype=dtype) for width in widths] if biased else None
    got = run_kernel(product.permuted_linears, x, weights, row_index, redundant, biases, tile=tile)
    parts = got.split(widths, dim=2)
    for number, (part, weight) in enumerate(zip(parts, weights, strict=True)):
        check(part, x, weight, row_index, redundant, biases[number] if biases else None)


def test_several_weights_of_different_strides():
    x, _, row_index, redundant, _ = inputs((1, 5, 2, 24, 1), torch.float32)
    weights = [randn(8, 24), randn(12, 24, layout="transposed")]
    parts = run_kernel(product.permuted_linears, x, weights, row_index, redundant).split([8, 12], dim=2)
    for part, weight in zip(parts, weights, strict=True):
        check(part, x, weight, row_index, redundant, None)


def test_redundant_rows_with_another_stride():
    args = inputs((2, 9, 3, 48, 20), torch.float32)
    args[3] = randn(2, 3, 48, layout="transposed")
    check(run_kernel(product.permuted_linear, *args), *args, None, None)


def test_float32_is_float32():
    args = inputs((1, 70, 0, 256, 32), torch.float32)
    args[0], args[1] = args[0] + 1e-5, args[1] + 1e-5
    check(run_kernel(product.permuted_linear, *args), *args, None, None)


def test_empty():
    args = inputs((0, 4, 2, 16, 8), torch.float32)
    assert product.permuted_linear(*args).shape == (0, 6, 8)
    args = inputs((2, 0, 0, 16, 8), torch.float32)
    assert product.permuted_linear(*args).shape == (2, 0, 8)


def test_bad_arguments_are_named():
    x, weight, row_index, redundant, bias = inputs((1, 4, 2, 16, 8), torch.float32)
    with pytest.raises(ValueError, match="weight"):
        product.permuted_linear(x, weight.double(), row_index, redundant)
    with pytest.raises(ValueError, match="bias"):
        product.permuted_linear(x, weight, row_index, redundant, bias[1:])
    with pytest.raises(TypeError, match="noise"):
        product.permuted_linear(x, weight, row_index, redundant, noise=randn(6, 16).double())
    with pytest.raises(ValueError, match="image"):
        product.permuted_linear(x, weight, row_index, redundant, image=randn(6, 9))
    with pytest.raises(ValueError, match="scatter_index, out_rows"):
        product.permuted_linear(x, weight, row_index, redundant, scatter_index=row_index)
    with pytest.raises(ValueError, match="biases"):
        product.permuted_linears(x, [weight, weight], row_index, redundant, [bias])
    with pytest.raises(ValueError, match="weights"):
        product.permuted_linears(x, [], row_index, redundant)
