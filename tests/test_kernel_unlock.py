"""The kernel that strips a token-permuted cache with a shared key."""

import pytest
import torch
from parity import by_dtype, inverse, nans, permutations, randn, run_kernel

from scx_kernels import reference
from scx_kernels.kernels.unlock import unlock

LAYOUTS = ("plain", "transposed", "sliced")


@by_dtype
@pytest.mark.parametrize("layout", [*LAYOUTS, "expanded"])
@pytest.mark.parametrize("shape", [(1, 2, 9, 5, 64), (2, 3, 12, 12, 80), (3, 1, 7, 1, 10)], ids=str)
def test_out_of_place(dtype, layout, shape):
    batch, groups, encoded, tokens, size = shape
    cache, position = randn(batch, groups, encoded, size, dtype=dtype, layout=layout), permutations(batch, encoded)
    position = position[:, :tokens]
    out = nans(batch, groups, tokens, size, dtype=dtype, layout=layout)
    got = run_kernel(unlock, cache, position, out=out, tile={"BLOCK_S": 4}, force_int64=layout == "sliced")
    assert got is out
    assert torch.equal(got, reference.unlock(cache, position))


@by_dtype
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("scratch_bytes", [0, 2 * 9 * 64 * 4 * 2, 2**20])
def test_in_place(dtype, layout, scratch_bytes):
    """Whatever the scratch buffer holds, one head or several, the cache's first rows become the tokens in order."""
    cache, position = randn(2, 3, 12, 64, dtype=dtype, layout=layout), permutations(2, 12)[:, :9]
    expected = reference.unlock(cache, position)
    options = {"in_place": True, "scratch_bytes": scratch_bytes, "writes": ("cache",)}
    got = run_kernel(unlock, cache=cache, position=position, **options)
    assert got.data_ptr() == cache.data_ptr()
    assert torch.equal(got, expected)
    assert torch.equal(cache[:, :, :9], expected)


def test_undoes_a_token_permutation():
    """Plain rows and redundant ones, permuted as the untrusted side caches them, come back in order."""
    plain, redundant, row_index = randn(2, 3, 6, 16), randn(2, 3, 4, 16), permutations(2, 10)
    index = row_index[:, None, :, None].expand(2, 3, 10, 16)
    encoded = torch.cat((plain, redundant), dim=2).gather(2, index)
    assert torch.equal(run_kernel(unlock, encoded, inverse(row_index)[:, :6]), plain)


def test_empty():
    assert unlock(randn(2, 1, 3, 8), permutations(2, 3)[:, :0]).shape == (2, 1, 0, 8)
    assert unlock(randn(0, 1, 3, 8), permutations(0, 3), in_place=True).shape == (0, 1, 3, 8)


def test_bad_arguments_are_named():
    cache = randn(1, 2, 4, 8)
    with pytest.raises(TypeError, match="position: expected int64"):
        unlock(cache, permutations(1, 4).int())
    with pytest.raises(ValueError, match=r"position: expected shape \(1, up to 4\)"):
        unlock(cache, permutations(1, 5))
    with pytest.raises(ValueError, match="cache: expected a floating"):
        unlock(cache[0], permutations(1, 4))
    with pytest.raises(TypeError, match="cache"):
        unlock(cache.double(), permutations(1, 4))
