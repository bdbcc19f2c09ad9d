"""Sealed storage: published vectors, the counter's layout, kernels against the reference bit by bit, bad input."""

import copy
import itertools
import pickle
import struct
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import triton
import triton.language as tl
from parity import DEVICE, by_dtype, nans, randn
from torch import Tensor

from scx.keystream import KeyStream, Secret
from scx_kernels import Sealing, WriteCounter, backend, key_words, random_bits, reseal, seal, sealing, unseal
from scx_kernels import chacha as cipher
from scx_kernels.kernels import chacha
from scx_kernels.kernels import sealing as kernels

KEY = bytes(range(32))
ROUNDS = (8, 12, 20)
needs_library = pytest.mark.skipif(not cipher.HAS_LIBRARY, reason="waits for the cryptography package")

# RFC 8439, section 2.3.2 (block 1), and draft-strombergson-chacha-test-vectors-01, TC1, TC7 and TC8 with 256 bits of
# key (blocks 0 and 1): rounds, key, words 13 to 15 as bytes, first block, keystream.
VECTORS = [
    (20, KEY.hex(), "000000090000004a00000000", 1,
     "10f1e7e4d13b5915500fdd1fa32071c4c7d1f4c733c068030422aa9ac3d46c4e"
     "d2826446079faa0914c2d705d98b02a2b5129cd1de164eb9cbd083e8a2503c4e"),
    (8, "00" * 32, "00" * 12, 0,
     "3e00ef2f895f40d67f5bb8e81f09a5a12c840ec3ce9a7f3b181be188ef711a1e"
     "984ce172b9216f419f445367456d5619314a42a3da86b001387bfdb80e0cfe42"
     "d2aefa0deaa5c151bf0adb6c01f2a5adc0fd581259f9a2aadcf20f8fd566a26b"
     "5032ec38bbc5da98ee0c6f568b872a65a08abf251deb21bb4b56e5d8821e68aa"),
    (12, "00" * 32, "00" * 12, 0,
     "9bf49a6a0755f953811fce125f2683d50429c3bb49e074147e0089a52eae155f"
     "0564f879d27ae3c02ce82834acfa8c793a629f2ca0de6919610be82f411326be"
     "0bd58841203e74fe86fc71338ce0173dc628ebb719bdcbcc151585214cc089b4"
     "42258dcda14cf111c602b8971b8cc843e91e46ca905151c02744a6b017e69316"),
    (8, "00112233445566778899aabbccddeeffffeeddccbbaa99887766554433221100", "000000000f1e2d3c4b5a6978", 0,
     "db43ad9d1e842d1272e4530e276b3f568f8859b3f7cf6d9d2c74fa53808cb515"
     "7a8ebf46ad3dcc4b6c7dadde131784b0120e0e22f6d5f9ffa7407d4a21b695d9"
     "c5dd30bf55612fab9bdd118920c19816470c7f5dcd42325dbbed8c57a56281c1"
     "44cb0f03e81b3004624e0650a1ce5afaf9a7cd8163f6dbd72602257dd96e471e"),
    (12, "00112233445566778899aabbccddeeffffeeddccbbaa99887766554433221100", "000000000f1e2d3c4b5a6978", 0,
     "7ed12a3a63912ae941ba6d4c0d5e862e568b0e5589346935505f064b8c2698db"
     "f7d850667d8e67be639f3b4f6a16f92e65ea80f6c7429445da1fc2c1b9365040"
     "e32e50c4106f3b3da1ce7ccb1e7140b153493c0f3ad9a9bcff077ec4596f1d0f"
     "29bf9cbaa502820f732af5a93c49eee33d1c4f12af3b4297af91fe41ea9e94a2"),
    (12, "c46ec1b18ce8a878725a37e780dfb7351f68ed2e194c79fbc6aebee1a667975d", "000000001ada31d5cf688221", 0,
     "1482072784bc6d06b4e73bdc118bc0103c7976786ca918e06986aa251f7e9cc1"
     "b2749a0a16ee83b4242d2e99b08d7c20092b80bc466c87283b61b1b39d0ffbab"
     "d94b116bc1ebdb329b9e4f620db695544a8e3d9b68473d0c975a46ad966ed631"
     "e42aff530ad5eac7d8047adfa1e5113c91f3e3b883f1d189ac1c8fe07ba5a42b"),
]  # fmt: skip


def bits(x: Tensor) -> Tensor:
    return x.view(torch.int32 if x.element_size() == 4 else torch.int16)


def assert_same_bits(got: Tensor, expected: Tensor) -> None:
    assert got.dtype == expected.dtype
    assert torch.equal(bits(got), bits(expected))


def sealed_by(writes: Tensor, layer: int = 5, rounds: int = 8, first_head: int = 0, key: bytes = KEY) -> Sealing:
    return Sealing(key_words(key, DEVICE), writes.to(DEVICE), layer, rounds, first_head)


def scattered(batch: int, tokens: int) -> Tensor:
    """Write numbers as a cache has them after crops and reordering: in no order, high and low."""
    numbers = torch.randint(0, 2**59, (batch, tokens))
    numbers[:, ::3] = torch.arange(numbers[:, ::3].numel()).view(batch, -1) + 2**28 - 2
    return numbers


@pytest.mark.parametrize("vector", VECTORS, ids=lambda v: f"{v[0]} rounds {v[1][:4]}")
def test_published_vectors(vector):
    """Block function and kernel give the published keystream."""
    rounds, key, nonce, first, expected = vector
    words = bytes.fromhex(expected)
    expected = torch.tensor(struct.unpack(f"<{len(words) // 4}i", words))
    stream = torch.tensor([struct.unpack("<3I", bytes.fromhex(nonce))])
    key = key_words(bytes.fromhex(key))
    states = torch.zeros(4, len(expected) // 16, dtype=torch.int32)
    states[0] = torch.arange(first, first + states.shape[1])
    states[1:] = stream.T.to(torch.int32)
    assert torch.equal(cipher.chacha_blocks(key, states, rounds).flatten(), expected)
    got = kernels.random_bits(key.to(DEVICE), stream.to(DEVICE), 16 * first + len(expected), rounds=rounds)
    assert torch.equal(got.cpu()[0, 16 * first :], expected)


def test_random_bits_are_those_of_a_session():
    """What a session draws on the CPU, an accelerator draws for itself: permutations and noise need no copy."""
    stream = KeyStream(Secret(KEY))
    streams = [(0, 0, 0), (5, 6, 2**32 - 1), (2**31, 1, 0)]
    expected = stream.bits("a purpose", streams, 37, torch.int32)
    key = key_words(stream._key("a purpose"), DEVICE)
    assert torch.equal(kernels.random_bits(key, torch.tensor(streams, device=DEVICE), 37).cpu(), expected)
    assert torch.equal(sealing.random_bits(key.cpu(), torch.tensor(streams), 37), expected)
    wide = sealing.random_bits(key.cpu(), torch.tensor(streams), 74).view(torch.int64)
    assert torch.equal(wide, stream.bits("a purpose", streams, 37, torch.int64))


@pytest.mark.parametrize("count", [0, 1, 16])
@pytest.mark.parametrize("rounds", [8, 12])
def test_random_bits_of_any_count(count, rounds):
    key, streams = key_words(KEY), torch.randint(0, 2**32, (3, 2)).T.repeat(1, 2)[:, :3]
    got = kernels.random_bits(key.to(DEVICE), streams.to(DEVICE), count, rounds=rounds)
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


@needs_library
@pytest.mark.parametrize(("dtype", "size"), [(torch.float32, 64), (torch.float16, 80), (torch.bfloat16, 10)])
def test_row_is_keystream_of_the_library(dtype, size):
    """The layout, said in another way: bytes of a head's row are bytes of ChaCha20 from a 16-byte nonce on."""
    from cryptography.hazmat.primitives.ciphers import Cipher, algorithms

    writes, layer, blocks = torch.tensor([[7, 2**28 + 5, 2**59 + 1]]), 513, -(-size * dtype.itemsize // 64)
    own = Sealing(key_words(KEY), writes, layer, 20, first_head=3)
    got = sealing.keystream(own, 2, size, dtype, is_value=True)
    for head, (token, number) in itertools.product(range(2), enumerate(writes[0].tolist())):
        words = number % 2**28 * blocks, number // 2**28, (3 + head) * 2**16 + layer, 16 + blocks - 1
        stream = Cipher(algorithms.ChaCha20(KEY, struct.pack("<4I", *words)), mode=None).encryptor()
        row = torch.frombuffer(bytearray(stream.update(bytes(size * dtype.itemsize))), dtype=got.dtype)
        assert torch.equal(got[0, head, token], row)


@needs_library
@by_dtype
@pytest.mark.parametrize("size", [32, 64, 80])
@pytest.mark.parametrize("order", ["run", "boundary", "scattered", "interleaved"])
def test_library_and_plain_pytorch_agree(dtype, size, order, monkeypatch):
    """Whether rows follow each other, cross the carry of word 12 or lie anywhere: the same bits by either way."""
    writes = {
        "run": torch.arange(40).view(2, 20) + 9,
        "boundary": torch.arange(40).view(2, 20) + 2**28 - 11,
        "scattered": scattered(2, 20),
        "interleaved": torch.arange(40).view(20, 2).T,
    }[order]
    own, x = Sealing(key_words(KEY), writes, 3), torch.randn(2, 3, 20, size).to(dtype)
    by_library = sealing.seal(x, own, is_value=False)
    monkeypatch.setattr(sealing, "HAS_LIBRARY", False)
    assert_same_bits(sealing.seal(x, own, is_value=False), by_library)


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
    assert kernels.seal(x, own, is_value=True, out=out) is out
    assert_same_bits(out, expected)
    assert not torch.equal(bits(expected), bits(x))
    assert_same_bits(sealing.unseal(out, own, is_value=True, out=out), x)


def test_kernel_seals_in_place_over_several_programs():
    x = randn(2, 2, 50, 80, dtype=torch.float16)
    cache = x.clone()
    own = sealed_by(WriteCounter(9).take(2, 50))
    kernels.seal(cache, own, is_value=False, out=cache, tile={"BLOCK_U": 64})
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
    assert_same_bits(kernels.seal(sealing.seal(x, own, is_value=True), own, is_value=True), x)


def test_sealed_zeros_look_uniform():
    """Chi-square of byte counts (255 degrees of freedom) and of bits, at odds of about 1 in 10,000."""
    for rounds in ROUNDS:
        own = Sealing(key_words(KEY), WriteCounter().take(2, 64), 0, rounds)
        stored = sealing.seal(torch.zeros(2, 4, 64, 64, dtype=torch.bfloat16), own, is_value=False)
        data = stored.view(torch.uint8).flatten()
        counts, mean = torch.bincount(data.int(), minlength=256).double(), data.numel() / 256
        assert 176 < ((counts - mean) ** 2 / mean).sum() < 347
        ones = sum((data >> bit & 1).sum().item() for bit in range(8))
        assert abs(ones - 4 * data.numel()) < 4 * (2 * data.numel()) ** 0.5


def test_no_two_blocks_have_the_same_counter():
    """Over what differs between blocks: numbers at the edges of every field, layer, head, K or V, head size, dtype."""
    numbers = [0, 1, 2, 2**28 - 1, 2**28, 2**28 + 1, 2**32 - 1, 2**32, 2**48, sealing.WRITE_LIMIT - 1]
    writes = torch.tensor([numbers])
    seen: set[tuple[int, ...]] = set()
    total = 0
    for layer, is_value, blocks in itertools.product((0, 1, 65535), (False, True), range(1, 17)):
        own = Sealing(key_words(KEY), writes, layer, first_head=65533)
        words = sealing._words(own, 3, blocks, sealing.row_format(16 * blocks, 4, is_value)).flatten(1)
        seen.update(zip(*words.tolist(), strict=True))
        total += words.shape[1]
    assert len(seen) == total


def test_write_numbers_are_given_out_once():
    """By one counter, by its copies, to threads, and under the next epoch."""
    counter = WriteCounter()
    copies = [counter, copy.copy(counter), copy.deepcopy(counter)]
    with ThreadPoolExecutor(4) as pool:
        drawn = list(pool.map(lambda i: copies[i % 3].take(3, 7), range(50)))
    drawn.append(WriteCounter(epoch=1).take(3, 400))
    assert torch.cat([d.flatten() for d in drawn]).unique().numel() == 50 * 21 + 1200
    assert (drawn[0].diff(dim=1) == 1).all(), "rows of a sequence follow each other"
    assert WriteCounter(4095).take(65535, 1).max() < sealing.WRITE_LIMIT


def test_write_numbers_run_out_long_before_they_repeat():
    counter = WriteCounter(count=2**31 - 1)
    assert counter.take(2, 1).tolist() == [[2**31 - 1], [2**32 + 2**31 - 1]]
    with pytest.raises(OverflowError, match="fresh key"):
        counter.take(1, 1)
    assert counter.count == 2**31
    with pytest.raises(TypeError, match="pickled"):
        pickle.dumps(counter)


def test_overwritten_rows_share_no_keystream():
    """Two snapshots of a slot under fresh numbers: their XOR is not that of what was written."""
    counter = WriteCounter()
    x, y = randn(1, 2, 4, 64), randn(1, 2, 4, 64)
    first, second = (bits(sealing.seal(t, sealed_by(counter.take(1, 4)), is_value=True)) for t in (x, y))
    assert ((first ^ second) != (bits(x) ^ bits(y))).all()


@by_dtype
@pytest.mark.parametrize("rounds", [(8, 12), (20, 8)], ids=str)
def test_reseal_is_unseal_and_seal(dtype, rounds):
    x = randn(2, 2, 4, 80, dtype=dtype)
    old = sealed_by(scattered(2, 4), layer=1, rounds=rounds[0], first_head=4)
    new = sealed_by(scattered(2, 4), layer=9, rounds=rounds[1], key=KEY[::-1])
    stored, expected = (sealing.seal(x, own, is_value=True) for own in (old, new))
    assert_same_bits(kernels.reseal(stored, old, new, is_value=True), expected)
    assert_same_bits(sealing.reseal(stored, old, new, is_value=True), expected)
    assert sealing.reseal(stored, old, new, is_value=True, out=stored) is stored
    assert_same_bits(stored, expected)


def test_reference_reseal_stores_nothing_plain(monkeypatch):
    """Each of its two steps leaves bits under a keystream: no step gives the plain tensor."""
    x = randn(1, 1, 4, 64)
    old, new = sealed_by(scattered(1, 4)), sealed_by(scattered(1, 4), key=KEY[::-1])
    stored, step, results = sealing.seal(x, old, is_value=True), sealing.seal, []

    def watched(*args, **options):
        result = step(*args, **options)
        results.append(bits(result).clone())
        return result

    monkeypatch.setattr(sealing, "seal", watched)
    sealing.reseal(stored, old, new, is_value=True)
    assert len(results) == 2
    assert all((result != bits(x)).all() for result in results)


def test_public_names_take_the_kernels():
    x, own = randn(1, 2, 3, 32), sealed_by(scattered(1, 3))
    new = own._replace(layer=6)
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
    assert kernels.seal(x, own, is_value=True).shape == sealing.seal(x, own, is_value=True).shape == x.shape
    own, x = sealed_by(torch.empty(2, 0, dtype=torch.int64)), torch.empty(2, 2, 0, 64, device=DEVICE)
    assert kernels.seal(x, own, is_value=True).shape == sealing.seal(x, own, is_value=True).shape == x.shape


@pytest.mark.parametrize("function", [sealing.seal, kernels.seal, seal], ids=["reference", "kernel", "public"])
def test_bad_arguments_are_named(function):
    x = torch.zeros(1, 2, 3, 64)
    good = Sealing(key_words(KEY), torch.zeros(1, 3, dtype=torch.int64), 0)
    bad = [
        (TypeError, "sealing.key", x, good._replace(key=good.key.long())),
        (ValueError, "sealing.key", x, good._replace(key=good.key[:7])),
        (TypeError, "sealing.writes", x, good._replace(writes=good.writes.int())),
        (ValueError, "sealing.writes", x, good._replace(writes=good.writes[:, :2])),
        (ValueError, "sealing.layer", x, good._replace(layer=2**16)),
        (ValueError, "sealing.first_head", x, good._replace(first_head=2**16 - 1)),
        (ValueError, "sealing.rounds", x, good._replace(rounds=10)),
        (ValueError, "x: ", x[0], good),
        (ValueError, "x: ", x.double(), good),
        (ValueError, "x: .*1024 bytes", torch.zeros(1, 2, 3, 257), good),
    ]
    for error, message, tensor, own in bad:
        with pytest.raises(error, match=message):
            function(tensor, own, is_value=True)
    if function is not kernels.seal and DEVICE.type == "cpu":  # an accelerator would wait for the values
        for writes in (good.writes - 1, good.writes + 2**60):
            with pytest.raises(ValueError, match="sealing.writes"):
                function(x, good._replace(writes=writes), is_value=True)
    for out in (x.half(), x[:, :1], torch.zeros(1, 2, 1, 64).expand(x.shape)):
        with pytest.raises(ValueError, match="out"):
            function(x, good, is_value=True, out=out)


def test_bad_keys_numbers_and_streams_are_named():
    with pytest.raises(ValueError, match="key: expected 32 bytes, got 31"):
        key_words(KEY[:31])
    with pytest.raises(TypeError, match="key"):
        key_words("0" * 32)
    with pytest.raises(ValueError, match="epoch"):
        WriteCounter(4096)
    with pytest.raises(ValueError, match="batch"):
        WriteCounter().take(2**16, 1)
    streams = torch.zeros(1, 3, dtype=torch.int64)
    for error, name, changed in [
        (TypeError, "streams", {"streams": streams.int()}),
        (ValueError, "streams", {"streams": streams[:, :2]}),
        (ValueError, "count", {"count": -1}),
        (ValueError, "rounds", {"rounds": 7}),
        (ValueError, "key", {"key": torch.zeros(4, dtype=torch.int32)}),
    ]:
        arguments = {"key": key_words(KEY), "streams": streams, "count": 1} | changed
        for function in (sealing.random_bits, kernels.random_bits):
            with pytest.raises(error, match=name):
                function(**arguments)
    for values in (streams - 1, streams + 2**32):
        with pytest.raises(ValueError, match="streams"):
            sealing.random_bits(key_words(KEY), values, 1)


def test_a_sealing_does_not_show_its_key():
    own = Sealing(torch.full((8,), 123456789, dtype=torch.int32), torch.zeros(1, 3, dtype=torch.int64), 0)
    assert "123456789" not in f"{own} {own!r}"
