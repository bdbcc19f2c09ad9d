"""Sealed storage in plain PyTorch: published vectors, the counter's layout, numbers that never repeat, bad input."""

import copy
import itertools
import pickle
import struct
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from parity import DEVICE, assert_same_bits, by_dtype, randn
from sealings import KEY, ROUNDS, VECTORS, bits, check_refusals, check_refused_streams, scattered, sealed_by

from scx_kernels import Sealing, WriteCounter, key_words, random_bits, seal, sealing
from scx_kernels import chacha as cipher

needs_library = pytest.mark.skipif(not cipher.HAS_LIBRARY, reason="waits for the package cryptography")


@pytest.mark.parametrize("vector", VECTORS, ids=lambda v: f"{v[0]} rounds {v[1][:4]}")
def test_published_vectors(vector):
    """The block function gives the published keystream."""
    rounds, key, nonce, first, expected = vector
    words = bytes.fromhex(expected)
    expected = torch.tensor(struct.unpack(f"<{len(words) // 4}i", words))
    stream = torch.tensor([struct.unpack("<3I", bytes.fromhex(nonce))])
    key = key_words(bytes.fromhex(key))
    states = torch.zeros(4, len(expected) // 16, dtype=torch.int32)
    states[0] = torch.arange(first, first + states.shape[1])
    states[1:] = stream.T.to(torch.int32)
    assert torch.equal(cipher.chacha_blocks(key, states, rounds).flatten(), expected)
    got = sealing.random_bits(key, stream, 16 * first + len(expected), rounds=rounds)
    assert torch.equal(got[0, 16 * first :], expected)


@needs_library
@pytest.mark.parametrize(("dtype", "size"), [(torch.float32, 64), (torch.float16, 80), (torch.bfloat16, 10)])
def test_row_is_keystream_of_the_library(dtype, size):
    """The layout, said in another way: bytes of a head's row are bytes of ChaCha20 from a 16-byte nonce on."""
    from cryptography.hazmat.primitives.ciphers import Cipher, algorithms  # noqa: PLC0415

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


def test_empty():
    own = sealed_by(torch.empty(0, 4, dtype=torch.int64))
    x = torch.empty(0, 2, 4, 64, device=DEVICE)
    assert sealing.seal(x, own, is_value=True).shape == x.shape
    own, x = sealed_by(torch.empty(2, 0, dtype=torch.int64)), torch.empty(2, 2, 0, 64, device=DEVICE)
    assert sealing.seal(x, own, is_value=True).shape == x.shape


@pytest.mark.parametrize("function", [sealing.seal, seal], ids=["reference", "public"])
def test_bad_arguments_are_named(function):
    check_refusals(function)
    x, good = torch.zeros(1, 2, 3, 64), Sealing(key_words(KEY), torch.zeros(1, 3, dtype=torch.int64), 0)
    for writes in (good.writes - 1, good.writes + 2**60):  # of a CPU's tensors: an accelerator would be waited for
        with pytest.raises(ValueError, match="sealing.writes"):
            function(x, good.replace(writes=writes), is_value=True)


def test_bad_keys_numbers_and_streams_are_named():
    with pytest.raises(ValueError, match="key: expected 32 bytes, got 31"):
        key_words(KEY[:31])
    with pytest.raises(TypeError, match="key"):
        key_words("0" * 32)
    with pytest.raises(ValueError, match="epoch"):
        WriteCounter(4096)
    with pytest.raises(ValueError, match="batch"):
        WriteCounter().take(2**16, 1)
    for function in (sealing.random_bits, random_bits):
        check_refused_streams(function)
    streams = torch.zeros(1, 3, dtype=torch.int64)
    for values in (streams - 1, streams + 2**32):
        with pytest.raises(ValueError, match="streams"):
            sealing.random_bits(key_words(KEY), values, 1)


def test_a_sealing_does_not_show_its_key():
    own = Sealing(torch.full((8,), 123456789, dtype=torch.int32), torch.zeros(1, 3, dtype=torch.int64), 0)
    assert "123456789" not in f"{own} {own!r}"
