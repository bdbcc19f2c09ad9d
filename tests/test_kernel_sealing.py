"""The kernels of sealed storage: published vectors, the reference's bits, and what other kernels call of the cipher."""

import struct

import pytest
import torch
import triton
import triton.language as tl
from parity import DEVICE, assert_same_bits, by_dtype, integers, nans, needs, randn, run_kernel
from sealings import KEY, VECTORS, bits, check_refusals, check_refused_streams, scattered, sealed_by

from scx_kernels import WriteCounter, backend, key_words, random_bits, reseal, seal, sealing, unseal
from scx_kernels.kernels import chacha
from scx_kernels.kernels import sealing as kernels


@pytest.mark.parametrize("vector", VECTORS, ids=lambda v: f"{v[0]} rounds {v[1][:4]}")
def test_published_vectors(vector):
    rounds, key, nonce, first, expected = vector
    words = bytes.fromhex(expected)
    expected = torch.tensor(struct.unpack(f"<{len(words) // 4}i", words))
    stream = integers(*struct.unpack("<3I", bytes.fromhex(nonce)))[None]
    key = key_words(bytes.fromhex(key), DEVICE)
    got = run_kernel(kernels.random_bits, key, stream, 16 * first + len(expected), rounds=rounds)
    assert torch.equal(got.cpu()[0, 16 * first :], expected)


@needs("cryptography", "safetensors", "transformers")
def test_random_bits_are_those_of_a_session():
    """What a session draws on the CPU, an accelerator draws for itself: permutations and noise need no copy."""
    from scx.keystream import KeyStream, Secret  # noqa: PLC0415

    stream = KeyStream(Secret(KEY))
    streams = [(0, 0, 0), (5, 6, 2**32 - 1), (2**31, 1, 0)]
    expected = stream.bits("a purpose", streams, 37, torch.int32)
    key = key_words(stream._key("a purpose"), DEVICE)
    assert torch.equal(run_kernel(kernels.random_bits, key, torch.tensor(streams, device=DEVICE), 37).cpu(), expected)
    assert torch.equal(sealing.random_bits(key.cpu(), torch.tensor(streams), 37), expected)
    wide = sealing.random_bits(key.cpu(), torch.tensor(streams), 74).view(torch.int64)
    assert torch.equal(wide, stream.bits("a purpose", streams, 37, torch.int64))


@pytest.mark.parametrize("count", [0, 1, 16])
@pytest.mark.parametrize("rounds", [8, 12])
def test_random_bits_of_any_count(count, rounds):
    key, streams = key_words(KEY), torch.randint(0, 2**32, (3, 2)).T.repeat(1, 2)[:, :3]
    got = run_kernel(kernels.random_bits, key.to(DEVICE), streams.to(DEVICE), count, rounds=rounds)
    assert torch.equal(got.cpu(), sealing.random_bits(key, streams, count, rounds=rounds))


def run_assembly(text: str, registers: list[int]) -> list[int]:
    """The few instructions of `chacha`'s quarter rounds on eight registers; the first four are what comes out."""
    operations = {
        "add": lambda x, y: x + y,
        "xor": lambda x, y: x ^ y,
        "shf": lambda x, y, bits: (x << 32 | y) << bits >> 32,  # left, wrapping
        "v_add": lambda x, y: x + y,
        "v_xor": lambda x, y: x ^ y,
        "v_alignbit": lambda x, y, bits: (x << 32 | y) >> bits,
    }
    values = [*(0,) * 4, *registers]
    for line in filter(None, (part.strip() for part in text.replace("\n", ";").split(";"))):
        name, operands = line.split(maxsplit=1)
        target, *sources = [operand.strip() for operand in operands.split(",")]
        given = [values[int(source[1:])] if source.startswith("$") else int(source) for source in sources]
        operation = operations[name.split(".")[0] if "." in name else name.rsplit("_", 1)[0]]
        values[int(target[1:])] = operation(*given) & 0xFFFFFFFF
    return values[:4]


@pytest.mark.parametrize("text", [chacha.PTX_QUARTER_ROUND, chacha.GCN_QUARTER_ROUND], ids=["ptx", "gcn"])
def test_assembly_is_the_quarter_round(text):
    """The vector of RFC 8439, section 2.1.1. The interpreter takes another way, which the other vectors test."""
    given = [0x11111111, 0x01020304, 0x9B8D6F43, 0x01234567]
    assert run_assembly(text.value, given) == [0xEA2A92F4, 0xCB1CF8CE, 0x4581472E, 0x5881C4BB]


@by_dtype
@pytest.mark.parametrize(
    ("shape", "layout", "rounds"),
    [
        ((2, 3, 5, 64), "plain", 12),
        ((1, 2, 3, 16), "plain", 8),
        ((2, 1, 7, 80), "transposed", 8),
        ((1, 2, 4, 96), "sliced", 8),
        ((2, 2, 3, 10), "expanded", 8),
        ((1, 1, 9, 256), "plain", 8),
    ],
    ids=str,
)
def test_kernel_is_the_reference(dtype, shape, layout, rounds):
    batch, _, tokens, _ = shape
    x = randn(*shape, dtype=dtype, layout=layout)
    own = sealed_by(scattered(batch, tokens), rounds=rounds, first_head=2)
    expected = sealing.seal(x, own, is_value=True)
    out = nans(*shape, dtype=dtype, layout=layout)
    assert run_kernel(kernels.seal, x, own, is_value=True, out=out) is out
    assert_same_bits(out, expected)
    assert not torch.equal(bits(expected), bits(x))
    assert_same_bits(sealing.unseal(out, own, is_value=True, out=out), x)


def test_kernel_seals_in_place_over_several_programs():
    x = randn(2, 2, 50, 80, dtype=torch.float16)
    cache = x.clone()
    own = sealed_by(WriteCounter(9).take(2, 50))
    run_kernel(kernels.seal, cache, own, is_value=False, out=cache, tile={"BLOCK_U": 64})
    assert_same_bits(cache, sealing.seal(x, own, is_value=False))


@triton.jit
def _tile_kernel(
    x_ptr, out_ptr, key_ptr, writes_ptr, layer, head, N, stride_n, SEAL: tl.constexpr, HEAD_DIM: tl.constexpr,
    START: tl.constexpr, WIDTH: tl.constexpr, IS_FULL: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Rows past N and columns past HEAD_DIM are written too: what a caller's product would meet there."""
    row = tl.arange(0, BLOCK_N)
    key = chacha.load_key(key_ptr)
    writes = tl.load(writes_ptr + row, mask=row < N, other=chacha.EMPTY)
    columns = tl.arange(0, WIDTH) + START
    word14 = chacha.head_word(layer, head)
    if SEAL:
        x = tl.load(x_ptr + row[:, None] * stride_n + columns[None, :])
        x = chacha.seal(x, key, writes, word14, True, HEAD_DIM, START, 8)
    else:
        x = chacha.load_unsealed(
            x_ptr + row * stride_n, 1, row < N, key, writes, word14, True, HEAD_DIM, START, WIDTH, IS_FULL, False, 8
        )
    tl.store(out_ptr + row[:, None] * stride_n + columns[None, :], x)


@pytest.mark.parametrize("is_full", [False, True], ids=["masked", "full"])
@pytest.mark.parametrize(
    ("dtype", "size", "cuts"),
    [
        (torch.float16, 80, [(0, 64), (64, 16)]),
        (torch.bfloat16, 96, [(0, 64), (64, 32)]),
        (torch.float16, 64, [(0, 16), (16, 16), (32, 32)]),
        (torch.float32, 80, [(0, 64), (64, 16)]),
        (torch.float16, 72, [(0, 64), (64, 16)]),
        (torch.float16, 10, [(0, 16)]),
    ],
    ids=str,
)
def test_tiles_are_unsealed_as_they_are_loaded_and_sealed_before_they_are_stored(dtype, size, cuts, is_full):
    """What other kernels call, on a head cut into column ranges: zero where there is no row or no feature."""
    rows, width = 8 if is_full else 5, cuts[-1][0] + cuts[-1][1]
    x = torch.zeros(8, width, dtype=dtype, device=DEVICE)
    x[:rows, :size] = randn(rows, size, dtype=dtype)
    own = sealed_by(scattered(1, 8), layer=2, first_head=7)
    stored = torch.full_like(x, float("nan"))
    stored[:, :size] = sealing.seal(x[None, None, :, :size], own, is_value=True)[0, 0]
    unsealed, sealed = torch.full_like(x, float("nan")), torch.full_like(x, float("nan"))
    for start, block in cuts:
        options = size, start, block, is_full, 8
        _tile_kernel[(1,)](stored, unsealed, own.key, own.writes, 2, 7, rows, width, False, *options)
        _tile_kernel[(1,)](x, sealed, own.key, own.writes, 2, 7, rows, width, True, *options)
    assert_same_bits(unsealed, x)
    assert_same_bits(sealed[:rows, :size], stored[:rows, :size])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_every_pattern_comes_back(dtype):
    """NaN payloads, signalling NaN, infinities, subnormals and negative zero included."""
    integer = bits(torch.empty(0, dtype=dtype)).dtype
    limits = torch.iinfo(integer)
    x = torch.randint(limits.min, limits.max, (1, 2, 16, 64), dtype=integer)
    x[0, 0, 0] = bits(torch.tensor([float("nan"), float("inf"), -float("inf"), -0.0] * 16, dtype=dtype))
    x[0, 0, 1] = limits.max  # all bits but the sign: NaN
    x = x.view(dtype).to(DEVICE)
    own = sealed_by(scattered(1, 16))
    stored = sealing.seal(x, own, is_value=True)
    assert_same_bits(run_kernel(kernels.seal, stored, own, is_value=True), x)


@by_dtype
@pytest.mark.parametrize("rounds", [(8, 12), (20, 8)], ids=str)
def test_reseal_is_unseal_and_seal(dtype, rounds):
    x = randn(2, 2, 4, 80, dtype=dtype)
    old = sealed_by(scattered(2, 4), layer=1, rounds=rounds[0], first_head=4)
    new = sealed_by(scattered(2, 4), layer=9, rounds=rounds[1], key=KEY[::-1])
    stored, expected = (sealing.seal(x, own, is_value=True) for own in (old, new))
    assert_same_bits(run_kernel(kernels.reseal, stored, old, new, is_value=True), expected)


def test_public_names_take_the_kernels():
    x, own = randn(1, 2, 3, 32), sealed_by(scattered(1, 3))
    new = own.replace(layer=6)
    expected = sealing.seal(x, own, is_value=True)
    with backend("triton"):
        assert_same_bits(seal(x, own, is_value=True), expected)
        out = torch.full_like(x, float("nan"))
        assert seal(x, own, is_value=True, out=out) is out
        assert_same_bits(out, expected)
        assert unseal(out, own, is_value=True, out=out) is out
        assert_same_bits(out, x)
        assert_same_bits(reseal(expected, own, new, is_value=True), sealing.seal(x, new, is_value=True))
        streams = torch.tensor([[1, 2, 3]], device=DEVICE)
        assert torch.equal(
            random_bits(own.key, streams, 5, rounds=8), sealing.random_bits(own.key, streams, 5, rounds=8)
        )
    assert_same_bits(seal(x, own, is_value=True), expected)


def test_operators_are_registered_soundly():
    """Shape rules, schemas and mutation as declared, so that torch.compile may rely on them."""
    x, own = randn(1, 1, 2, 16), sealed_by(scattered(1, 2))
    utils = ("test_schema", "test_faketensor")
    operators = torch.ops.scx_kernels
    how, before = (own.key, own.writes, [5, 8, 0]), (own.key, own.writes, [4, 12, 0])
    torch.library.opcheck(operators.seal, (x, *how, True), test_utils=utils)
    torch.library.opcheck(operators.seal_into, (x.clone(), x, *how, True), test_utils=utils)
    torch.library.opcheck(operators.seal_into, (x.clone(), None, *how, True), test_utils=utils)
    torch.library.opcheck(operators.reseal, (x, *before, *how, True), test_utils=utils)
    torch.library.opcheck(operators.reseal_into, (x.clone(), x, *before, *how, True), test_utils=utils)
    streams = torch.zeros(2, 3, dtype=torch.int64, device=DEVICE)
    torch.library.opcheck(operators.random_bits, (own.key, streams, 5, 8), test_utils=utils)


def test_empty():
    own = sealed_by(torch.empty(0, 4, dtype=torch.int64))
    x = torch.empty(0, 2, 4, 64, device=DEVICE)
    assert kernels.seal(x, own, is_value=True).shape == x.shape
    own, x = sealed_by(torch.empty(2, 0, dtype=torch.int64)), torch.empty(2, 2, 0, 64, device=DEVICE)
    assert kernels.seal(x, own, is_value=True).shape == x.shape


@pytest.mark.parametrize("function", [kernels.seal, seal], ids=["kernel", "public"])
def test_bad_arguments_are_named(function):
    with backend("triton"):
        check_refusals(function)


@pytest.mark.parametrize("function", [kernels.random_bits, random_bits], ids=["kernel", "public"])
def test_bad_streams_are_named(function):
    with backend("triton"):
        check_refused_streams(function)
