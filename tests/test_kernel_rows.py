"""Kernels that move rows into and out of an encoding."""

from fractions import Fraction

import parity
import pytest
import torch
from parity import (
    DEVICE,
    assert_close,
    assert_same_bits,
    by_dtype,
    inverse,
    nans,
    noise_steps,
    permutations,
    randn,
    run_kernel,
)

from scx_kernels import reference
from scx_kernels.kernels import rows

LAYOUTS = ("plain", "transposed", "sliced", "expanded")


@by_dtype
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(1, 5, 0, 64), (2, 7, 3, 100), (3, 1, 2, 33)])
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("noisy", [False, True])
def test_inject(dtype, layout, shape, norm, noisy):
    batch, tokens, decoys, features = shape
    x = randn(batch, tokens, features, dtype=dtype, layout=layout)
    redundant = randn(batch, decoys, features, dtype=dtype, layout=layout) if decoys else None
    weight = randn(features, dtype=dtype) if norm else None
    noise = noise_steps(tokens + decoys, features) if noisy else {}
    row_index = permutations(batch, tokens + decoys)

    def plain(x, redundant, weight):
        return reference.inject_permute(x, row_index, redundant, norm_weight=weight, eps=1e-5, **noise)

    out = nans(batch, tokens + decoys, features, dtype=torch.float32 if noisy else dtype, layout=layout)
    options = {"norm_weight": weight, "eps": 1e-5, **noise}
    got = run_kernel(rows.inject_permute, x, row_index, redundant, **options, out=out)
    assert got is out
    exact = plain(*parity.wide(x, redundant, weight))
    assert_close(got, plain(x, redundant, weight), exact, dtype)
    narrow = {"BLOCK_D": 32, "BLOCK_M": 2}
    again = run_kernel(rows.inject_permute, x, row_index, redundant, **options, tile=narrow, force_int64=True)
    assert_close(again, plain(x, redundant, weight), exact, dtype)


@by_dtype
@pytest.mark.parametrize("layout", ["plain", "sliced"])
@pytest.mark.parametrize("decoys", [0, 3])
@pytest.mark.parametrize(("heads", "size"), [(2, 16), (3, 10), (1, 80)])
def test_inject_with_features_reordered(dtype, layout, decoys, heads, size):
    """Each head's features of real rows take the given order; redundant rows stay as they are."""
    x = randn(2, 5, heads * size, dtype=dtype, layout=layout)
    redundant = randn(2, decoys, heads * size, dtype=dtype) if decoys else None
    row_index, feature_index = permutations(2, 5 + decoys), permutations(2, heads, size)
    expected = reference.inject_permute(x, row_index, redundant, feature_index=feature_index)
    out = nans(2, 5 + decoys, heads * size, dtype=dtype, layout=layout)
    options = {"feature_index": feature_index, "out": out}
    got = run_kernel(rows.inject_permute, x, row_index, redundant, **options, tile={"BLOCK_M": 2})
    assert torch.equal(got, expected)


@by_dtype
def test_rows_that_stay_as_they_lie(dtype):
    """Without an index the pass is the norm alone, or the noise."""
    x, weight, noise = randn(2, 3, 40, dtype=dtype), randn(40, dtype=dtype), noise_steps(3, 40)
    for options in ({"norm_weight": weight}, {"norm_weight": weight, **noise}, noise):
        wide = {"norm_weight": weight.double()} if "norm_weight" in options else {}
        exact = reference.inject_permute(x.double(), None, **options | wide)
        got = run_kernel(rows.inject_permute, x, None, **options)
        assert_close(got, reference.inject_permute(x, None, **options), exact, dtype)


@by_dtype
@pytest.mark.parametrize("step", [2.0**-100, 2.0**-24, 4.0])
def test_sums_on_the_grid_are_exact_and_rounded_once(dtype, step):
    """Rows round to the nearest step, ties to even, and noise of any int32 is added: the same bits as by fractions."""
    ends, near = torch.iinfo(torch.int32), step * torch.arange(-8, 8).double() / 4
    values = torch.cat((near, step * torch.tensor([2.0**30, 2.0**51]), torch.tensor([1e-30, -3.1, 40_000.0, 0.0])))
    x = values.to(DEVICE, dtype).nan_to_num(posinf=0.0)[None, :, None].expand(-1, -1, 8).contiguous()
    noise = torch.tensor([0, 1, -1, 2**24 + 1, 2**25 + 1, -3 * 2**24 - 1, ends.max, ends.min], dtype=torch.int32)
    noise = noise.to(DEVICE).expand(x.shape[1], -1)
    got = run_kernel(rows.inject_permute, x, None, noise=noise, noise_step=step)
    sums = [
        [round(Fraction(value) / Fraction(step)) + more for more in noise[0].tolist()] for value in x[0, :, 0].tolist()
    ]
    scaled = [[_nearest_float32(total) * step for total in row] for row in sums]
    assert_same_bits(got + 0.0, torch.tensor(scaled, dtype=torch.float64, device=DEVICE).float()[None] + 0.0)
    assert_same_bits(reference.inject_permute(x, None, noise=noise, noise_step=step) + 0.0, got + 0.0)


def _nearest_float32(total: int) -> float:
    """An integer rounded to 24 bits, ties to even."""
    beyond = max(0, total.bit_length() - 24)
    return float(round(Fraction(total, 2**beyond)) * 2**beyond)


@by_dtype
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(1, 5, 5, 64), (2, 7, 10, 100), (3, 1, 3, 33)])
@pytest.mark.parametrize("residue", [False, True])
@pytest.mark.parametrize("noisy", [False, True])
def test_strip(dtype, layout, shape, residue, noisy):
    batch, tokens, encoded, features = shape
    z = randn(batch, encoded, features, dtype=torch.float32 if noisy else dtype, layout=layout)
    residual = randn(batch, tokens, features, dtype=dtype, layout=layout) if residue else None
    image = randn(encoded, features) if noisy else None
    position = permutations(batch, encoded)[:, :tokens]

    def plain(z, residual, image, dtype):
        z = z if image is None else z - image
        return reference.strip_restore(z.to(dtype), position, residual)

    out = nans(batch, tokens, features, dtype=dtype, layout=layout)
    got = run_kernel(rows.strip_restore, z, position, residual, image=image, out=out)
    exact = plain(*parity.wide(z, residual, image), torch.float64)
    assert_close(got, plain(z, residual, image, dtype), exact)
    options = {"image": image, "dtype": dtype, "force_int64": True}
    again = run_kernel(rows.strip_restore, z, position, residual, **options, tile={"BLOCK_D": 32, "BLOCK_M": 2})
    assert torch.equal(again, got)


def test_strip_onto_its_residual():
    z, residual, position = randn(2, 9, 40), randn(2, 6, 40), permutations(2, 9)[:, :6]
    expected = reference.strip_restore(z, position, residual)
    assert torch.equal(run_kernel(rows.strip_restore, z, position, residual, out=residual), expected)


def test_round_trip_is_exact():
    x, row_index = randn(2, 6, 48, dtype=torch.bfloat16), permutations(2, 8)
    encoded = run_kernel(rows.inject_permute, x, row_index, randn(2, 2, 48, dtype=torch.bfloat16))
    assert torch.equal(run_kernel(rows.strip_restore, encoded, inverse(row_index)[:, :6]), x)


@pytest.mark.parametrize("shape", [(0, 4, 8), (2, 0, 8)])
def test_empty(shape):
    x, index = randn(*shape), permutations(*shape[:2])
    assert rows.inject_permute(x, index).shape == shape
    assert rows.strip_restore(x, index).shape == shape


def test_bad_arguments_are_named():
    x, index = randn(1, 4, 8), permutations(1, 4)
    with pytest.raises(TypeError, match="row_index"):
        rows.inject_permute(x, index.int())
    with pytest.raises(TypeError, match="x:"):
        rows.inject_permute(x.double(), index)
    with pytest.raises(ValueError, match="norm_weight"):
        rows.inject_permute(x, index, norm_weight=randn(7))
    with pytest.raises(TypeError, match="noise: expected torch.int32"):
        rows.inject_permute(x, index, noise=randn(4, 8), noise_step=0.5)
    with pytest.raises(ValueError, match="noise: expected shape"):
        rows.inject_permute(x, index, **noise_steps(5, 8))
    for given in ({"noise": noise_steps(4, 8)["noise"]}, {"noise_step": 0.5}):
        with pytest.raises(ValueError, match="noise, noise_step: give both or neither"):
            rows.inject_permute(x, index, **given)
    for step in (0.0, -0.5, 0.3, 2.0**-127, float("inf"), float("nan")):
        with pytest.raises(ValueError, match="noise_step: expected a power of two"):
            rows.inject_permute(x, index, **noise_steps(4, 8) | {"noise_step": step})
    with pytest.raises(ValueError, match="feature_index"):
        rows.inject_permute(x, index, feature_index=permutations(1, 2, 3))
    with pytest.raises(ValueError, match="feature_index"):
        rows.inject_permute(x, index, feature_index=permutations(1, 2, 4), norm_weight=randn(8))
    with pytest.raises(ValueError, match="redundant: needs row_index"):
        rows.inject_permute(x, None, x)
    with pytest.raises(ValueError, match="residual"):
        rows.strip_restore(x, index, randn(1, 3, 8))
