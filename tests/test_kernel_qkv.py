"""The kernel that goes from projected rows to encoded Q, K and V."""

import parity
import pytest
import torch
from parity import assert_close, by_dtype, integers, nans, permutations, randn, run_kernel

from scx_kernels import reference
from scx_kernels.kernels import qkv

SHAPES = [  # batch, tokens, decoys, query heads, key/value heads, head size
    (1, 5, 0, 2, 2, 16),
    (2, 9, 4, 4, 2, 80),
    (2, 1, 2, 3, 1, 96),
    (1, 3, 1, 2, 1, 10),
]


def arguments(shape, dtype, layout, z_dtype=None):
    batch, tokens, decoys, heads, groups, size = shape
    encoded = tokens + decoys
    if layout == "fused":
        z = randn(batch, encoded, (heads + 2 * groups) * size, dtype=z_dtype or dtype)
        z_q, z_k, z_v = z.split([heads * size, groups * size, groups * size], dim=-1)
    else:
        z_q, z_k, z_v = (
            randn(batch, encoded, n * size, dtype=z_dtype or dtype, layout=layout) for n in (heads, groups, groups)
        )
    angle = 10 * randn(batch if layout == "plain" else 1, tokens, size // 2).repeat(1, 1, 2)
    position = permutations(batch, encoded)[:, :tokens]
    indices = [permutations(batch, n, size) for n in (heads, groups, groups)]
    return [z_q, z_k, z_v, position, angle.cos().to(dtype), angle.sin().to(dtype), *indices]


def reference_of(args, images, norms, dtype):
    options = {"images": images, "q_norm": norms[0], "k_norm": norms[1], "eps": 1e-5, "dtype": dtype}
    return reference.qkv_decode_encode(*args, **options)


@by_dtype
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(
    ("layout", "option"),
    [
        ("plain", "plain"),
        ("fused", "plain"),
        ("fused", "norm"),
        ("transposed", "noise"),
        ("transposed", "norm"),
        ("sliced", "norm noise"),
    ],
)
def test_qkv(dtype, shape, layout, option):
    batch, tokens, decoys, heads, groups, size = shape
    args = arguments(shape, dtype, layout, torch.float32 if "noise" in option else dtype)
    images = tuple(randn(tokens + decoys, n * size) for n in (heads, groups, groups)) if "noise" in option else None
    norms = [randn(size, dtype=dtype) for _ in range(2)] if "norm" in option else [None, None]

    plain = reference_of(args, images, norms, dtype)
    exact = reference_of(parity.wide(*args), images and parity.wide(*images), parity.wide(*norms), torch.float64)
    options = {"images": images, "q_norm": norms[0], "k_norm": norms[1], "eps": 1e-5, "dtype": dtype}
    out = nans(batch, heads, tokens, size, dtype=dtype, layout=layout)
    caches = [nans(batch, groups, tokens + 5, size, dtype=dtype, layout=layout) for _ in range(2)]
    slots = {"keys": caches[0], "values": caches[1], "offset": 3}
    got = run_kernel(qkv.qkv_decode_encode, *args, **options, out=out, **slots)
    for name, g, p, e in zip("qkv", got, plain, exact, strict=True):
        if name != "q":
            assert g[:, :, :3].isnan().all(), "wrote before the offset"
            assert g[:, :, 3 + tokens :].isnan().all(), "wrote behind the tokens"
            g = g[:, :, 3 : 3 + tokens]
        assert_close(g, p, e)
    small = {"BLOCK_S": 2, "HEADS": 2}
    again = run_kernel(qkv.qkv_decode_encode, *args, **options, tile=small, force_int64=True)
    for a, p, e in zip(again, plain, exact, strict=True):
        assert_close(a, p, e)


@by_dtype
def test_rows_in_token_order(dtype):
    """Without a position, as for a lone generated token."""
    args = arguments((2, 3, 0, 2, 1, 16), dtype, "plain")
    args[3] = None
    exact = reference.qkv_decode_encode(*(x if x is None else parity.wide(x)[0] for x in args))
    got = run_kernel(qkv.qkv_decode_encode, *args)
    for g, p, e in zip(got, reference.qkv_decode_encode(*args), exact, strict=True):
        assert_close(g, p, e)


def test_an_offset_for_each_sequence():
    args = arguments((2, 2, 1, 2, 1, 16), torch.float32, "plain")
    caches = [nans(2, 1, 8, 16, dtype=torch.float32) for _ in range(2)]
    offset = integers(1, 5)
    run_kernel(qkv.qkv_decode_encode, *args, keys=caches[0], values=caches[1], offsets=offset)
    _, *expected = reference.qkv_decode_encode(*args)
    by_reference = [nans(2, 1, 8, 16, dtype=torch.float32) for _ in range(2)]
    reference.qkv_decode_encode(*args, keys=by_reference[0], values=by_reference[1], offsets=offset)
    torch.testing.assert_close(caches, by_reference, equal_nan=True)
    for cache, want in zip(caches, expected, strict=True):
        for sequence, start in enumerate(offset.tolist()):
            torch.testing.assert_close(cache[sequence, :, start : start + 2], want[sequence])
        assert cache.isnan().sum() == cache.numel() - want.numel(), "wrote outside the slots"


def test_empty():
    q, k, _ = qkv.qkv_decode_encode(*arguments((0, 4, 0, 2, 1, 16), torch.float32, "plain"))
    assert q.shape == (0, 2, 4, 16)
    assert k.shape == (0, 1, 4, 16)


def test_bad_arguments_are_named():
    args = arguments((1, 4, 0, 2, 1, 16), torch.float32, "plain")
    with pytest.raises(TypeError, match="position"):
        qkv.qkv_decode_encode(*args[:3], args[3].int(), *args[4:])
    with pytest.raises(ValueError, match="z_k"):
        qkv.qkv_decode_encode(args[0], args[1].half(), *args[2:])
    caches = {"keys": randn(1, 1, 4, 16), "values": randn(1, 1, 4, 16)}
    with pytest.raises(ValueError, match="offset: expected 0..0"):
        qkv.qkv_decode_encode(*args, **caches, offset=1)
    with pytest.raises(ValueError, match="values"):
        qkv.qkv_decode_encode(*args, **caches | {"values": randn(1, 1, 3, 16)})
    with pytest.raises(ValueError, match="give both or neither"):
        qkv.qkv_decode_encode(*args, keys=caches["keys"])
    with pytest.raises(ValueError, match="need keys and values"):
        qkv.qkv_decode_encode(*args, offset=1)
    with pytest.raises(ValueError, match="images: expected three"):
        qkv.qkv_decode_encode(*args, images=[randn(4, 32)])
