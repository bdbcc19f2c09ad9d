"""Off-loaded blocks: what was sealed opens, under its key and context alone, and nothing else reaches a page."""

import json
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305

from scx.keystream import Secret
from scx.vllm.blocks import TRAILER_BYTES, Block, DeviceCipher, HostCipher, block, device, host
from tests import specification
from tests.blocks import (
    CPU,
    KEY,
    SENTINEL,
    WAYS,
    altered,
    cipher_of,
    content,
    drawn,
    emptied,
    kind_of,
    new_block,
    place_of,
    refusals,
    sealed,
)

VECTORS = Path(__file__).parent / "vectors" / "off_loaded_block.json"
SIZES = [(1,), (15, 1), (16,), (17, 40), (1000, 24), (1024, 1024), (3, 0, 2000), (70_000, 70_000)]


@pytest.fixture(params=WAYS)
def cipher(request) -> Iterator[Any]:
    with cipher_of(request.param) as made:
        yield made


class TestRoundTrip:
    @pytest.mark.parametrize("dtype", [torch.uint8, torch.int8])
    def test_blocks_of_all_sizes_in_one_transfer(self, cipher, dtype) -> None:
        on = place_of(cipher)
        given = [new_block([drawn(n, n).view(dtype) for n in sizes], str(sizes).encode(), on=on) for sizes in SIZES]
        storing = cipher.store(given)
        storing.wait()
        assert storing.is_done()
        assert (storing.refused, storing.bytes) == ([], sum(map(sum, SIZES)))
        assert storing.seconds > 0
        opened = [emptied(each) for each in given]
        loading = cipher.load(opened)
        loading.wait()
        assert (loading.refused, loading.bytes) == ([], storing.bytes)
        assert list(map(content, opened)) == list(map(content, given))

    def test_no_blocks(self, cipher) -> None:
        for transfer in (cipher.store([]), cipher.load([])):
            transfer.wait()
            assert (transfer.is_done(), transfer.refused, transfer.bytes) == (True, [], 0)

    def test_blocks_of_many_transfers_keys_and_tenants_in_any_order(self, cipher) -> None:
        keys = [Secret(KEY), Secret(bytes(32 * [9]))]
        given = []
        for call in range(4):
            own = [new_block([drawn(900, 9 * call + i)], b"", keys[i % 2], place_of(cipher)) for i in range(3)]
            cipher.store(own).wait()
            given += own
        order = torch.randperm(len(given), generator=torch.Generator().manual_seed(1)).tolist()
        opened = [emptied(given[place]) for place in order]
        opened[5] = opened[5]._replace(row=altered(opened[5].row, 3))
        assert refusals(cipher, opened) == [5]
        for place, each in zip(order, opened, strict=True):
            assert each is opened[5] or content(each) == content(given[place])

    def test_pages_made_in_inference_mode(self, cipher) -> None:
        with torch.inference_mode():
            (given,) = sealed(cipher)
            opened = emptied(given)
        assert opened.pages[0].is_inference()
        assert refusals(cipher, [opened]) == []
        assert content(opened) == content(given)

    def test_pages_between_others_are_all_that_is_written(self, cipher) -> None:
        """As they lie in a paged cache: slices of a tensor, not always aligned."""
        cache = torch.full((4, 3, 101), SENTINEL, dtype=torch.uint8, device=place_of(cipher))
        given = new_block([drawn(101), drawn(101, 1)], on=place_of(cipher))
        cipher.store([given]).wait()
        opened = given._replace(pages=[cache[1, 1], cache[2, 1]])
        cipher.load([opened]).wait()
        assert content(opened) == content(given)
        cache[1:3, 1] = SENTINEL
        assert (cache == SENTINEL).all()

    def test_threads_share_a_cipher(self, cipher) -> None:
        failures = []

        def work(thread: int) -> None:
            for turn in range(3):
                own = [new_block([drawn(3000, 50 * thread + i)], bytes([thread, turn]), on=on) for i in range(4)]
                cipher.store(own).wait()
                opened = [emptied(each) for each in own]
                opened[1] = opened[1]._replace(context=b"other")
                if refusals(cipher, opened) != [1] or content(opened[3]) != content(own[3]):
                    failures.append((thread, turn))

        on = place_of(cipher)
        threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert failures == []


class TestBits:
    """Of another implementation: the `cryptography` package's own AEAD, and `tests.specification`."""

    def test_a_host_block_is_rfc_8439s(self) -> None:
        (given,) = sealed(HostCipher(), context=b"associated")
        head, tag = given.trailer[:48].tobytes(), given.trailer[48:].tobytes()
        own = specification.hkdf_expand(KEY, b"scx off-loaded block v1, host\0" + head)
        combined = given.row.tobytes() + tag
        assert ChaCha20Poly1305(own).decrypt(bytes(12), combined, b"associated") == content(given)

    @pytest.mark.parametrize("sizes", SIZES[:-1], ids=str)
    def test_the_specification_opens_what_was_sealed(self, cipher, sizes) -> None:
        given = sealed(cipher, sizes, 3)  # the second and third of a call have write numbers of their own
        for each in given:
            plain = specification.open_block(
                kind_of(cipher), KEY, each.context, each.row.tobytes(), each.trailer.tobytes()
            )
            assert plain == content(each)

    @staticmethod
    def of_vectors(cipher: Any, result: str) -> list[dict[str, Any]]:
        groups = json.loads(VECTORS.read_text())["testGroups"]
        return [test for group in groups if group["format"] == kind_of(cipher)
                for test in group["tests"] if test["result"] == result]  # fmt: skip

    @staticmethod
    def block_of(test: dict[str, Any], cipher: Any) -> Block:
        row, trailer = (np.frombuffer(bytes.fromhex(test[name]), np.uint8) for name in ("row", "trailer"))
        page = torch.full((len(row),), SENTINEL, dtype=torch.uint8, device=place_of(cipher))
        return Block([page], row, trailer, bytes.fromhex(test["context"]), Secret(bytes.fromhex(test["key"])))

    def test_valid_vectors(self, cipher) -> None:
        tests = self.of_vectors(cipher, "valid")
        given = [self.block_of(test, cipher) for test in tests]
        assert len(tests) >= 13
        assert refusals(cipher, given) == []
        assert [content(each).hex() for each in given] == [test["plain"] for test in tests]

    def test_invalid_vectors(self, cipher) -> None:
        tests = self.of_vectors(cipher, "invalid")
        assert len(tests) >= 22
        for test in tests:
            row, trailer, context, key = (bytes.fromhex(test[name]) for name in ("row", "trailer", "context", "key"))
            with pytest.raises(ValueError, match="format|authentic|limit"):
                specification.open_block(kind_of(cipher), key, context, row, trailer)
        assert refusals(cipher, [self.block_of(test, cipher) for test in tests]) == list(range(len(tests)))

    def test_sealing_gives_the_vectors_bytes(self, cipher, monkeypatch) -> None:
        """Under their nonces; of those that begin a call."""
        count = 0
        for test in self.of_vectors(cipher, "valid"):
            if int.from_bytes(bytes.fromhex(test["trailer"])[32:40], "little") == 0:
                for module in (host, device):
                    monkeypatch.setattr(module, "fresh_nonce", lambda test=test: bytes.fromhex(test["trailer"])[8:32])
                plain = torch.frombuffer(bytearray.fromhex(test["plain"]), dtype=torch.uint8)
                made = new_block(
                    [plain], bytes.fromhex(test["context"]), Secret(bytes.fromhex(test["key"])), place_of(cipher)
                )
                cipher.store([made]).wait()
                assert (made.row.tobytes().hex(), made.trailer.tobytes().hex()) == (test["row"], test["trailer"])
                count += 1
        assert count == 13


class TestRefusal:
    def test_every_byte_of_row_trailer_and_context(self, cipher) -> None:
        (given,) = sealed(cipher)
        others = [emptied(given, row=altered(given.row, place)) for place in range(len(given.row))]
        others += [emptied(given, trailer=altered(given.trailer, place)) for place in range(TRAILER_BYTES)]
        context = np.frombuffer(given.context, np.uint8)
        others += [emptied(given, context=altered(context, place).tobytes()) for place in range(len(context))]
        assert refusals(cipher, [*others, emptied(given)]) == list(range(len(others)))

    def test_swapped_replayed_and_foreign(self, cipher) -> None:
        one, two = sealed(cipher, count=2)
        (later,) = sealed(cipher)  # the same plain bytes under the same context and key, once more
        (elsewhere,) = sealed(cipher, context=b"another place")
        (foreign,) = sealed(cipher, key=Secret(bytes(32 * [3])))
        others = [
            emptied(one, row=two.row),
            emptied(one, trailer=two.trailer),
            emptied(one, row=later.row),
            emptied(elsewhere, context=one.context),
            emptied(one, context=one.context + b"\0"),
            emptied(one, context=one.context[:-1]),
            emptied(one, context=b""),
            emptied(foreign, key=one.key),
            emptied(one, key=foreign.key),
        ]
        assert refusals(cipher, [*others, emptied(later)]) == list(range(len(others)))

    def test_shortened_and_lengthened(self, cipher) -> None:
        """Lengths are under the tag: zeros behind a row, or bytes moved between context and row, are no padding."""
        (given,) = sealed(cipher, (64,))
        on = place_of(cipher)

        def of_size(row: np.ndarray, context: bytes) -> Block:
            page = torch.full((len(row),), SENTINEL, dtype=torch.uint8, device=on)
            return given._replace(row=row, pages=[page], context=context)

        row, context = given.row, given.context
        others = [of_size(row[:-1].copy(), context), of_size(row[:48].copy(), context)]
        others += [of_size(np.append(row, np.zeros(count, np.uint8)), context) for count in (1, 16)]
        others += [of_size(row[16:].copy(), context + row[:16].tobytes())]
        assert refusals(cipher, others) == list(range(len(others)))

    def test_what_never_was_a_block(self, cipher) -> None:
        (given,) = sealed(cipher)
        others = [emptied(given, trailer=np.full(TRAILER_BYTES, fill, np.uint8)) for fill in (0, 255)]
        others += [emptied(given, trailer=drawn(TRAILER_BYTES, seed).numpy()) for seed in range(4)]
        # Right but for what is derived of it: numbers at and beyond the end of the counter.
        for first in (1, 2**60 - 1, 2**60, 2**64 - 1):
            trailer = given.trailer.copy()
            trailer[32:40] = np.frombuffer(first.to_bytes(8, "little"), np.uint8)
            others.append(emptied(given, trailer=trailer))
        assert refusals(cipher, others) == list(range(len(others)))

    def test_the_other_format(self) -> None:
        one, other = HostCipher(), DeviceCipher(CPU)
        for writer, reader in ((one, other), (other, one)):
            (given,) = sealed(writer)
            assert refusals(reader, [emptied(given)]) == [0]
            assert refusals(writer, [emptied(given)]) == []
        other.close()

    def test_a_wiped_key_opens_and_seals_nothing(self, cipher) -> None:
        key = Secret(KEY)
        one, two = sealed(cipher, count=2, key=key)
        two = two._replace(key=Secret(KEY))
        key.wipe()
        assert refusals(cipher, [emptied(one), emptied(two)]) == [0]
        before = one.row.copy()
        with pytest.raises(RuntimeError, match="wiped"):
            cipher.store([one]).wait()
        assert np.array_equal(one.row, before)

    def test_a_key_that_is_being_wiped_seals_nothing(self, cipher) -> None:
        """Its bytes are zeros already, and it does not say so yet."""
        made = new_block([drawn(10)], key=Secret(bytes(32)), on=place_of(cipher))
        with pytest.raises(RuntimeError, match="wiped"):
            cipher.store([made]).wait()


class TestSharedMemory:
    """Others write to rows and trailers at the worst moment."""

    def test_what_is_authenticated_is_what_is_opened(self, cipher, monkeypatch) -> None:
        """Rows change right after a piece of them went into the tag, trailers right after they were read."""
        given = sealed(cipher, (1500,), 3)
        opened = [emptied(each, row=each.row.copy(), trailer=each.trailer.copy()) for each in given]
        update, read = block.Tag.update, block.Trailer.read

        def alter_rows(self: block.Tag, piece: np.ndarray) -> None:
            update(self, piece)
            for each in opened:
                each.row[:] ^= 0xFF

        def alter_trailers(trailer: np.ndarray) -> Any:
            found = read(trailer)
            trailer[:] = 0
            return found

        with monkeypatch.context() as patched:
            patched.setattr(block.Tag, "update", alter_rows)
            patched.setattr(block.Trailer, "read", alter_trailers)
            loading = cipher.load(opened)
            loading.wait()
        # The first block's row was whole when it was read; the others' were not any more, or were again.
        assert 0 not in loading.refused
        for place, (each, before) in enumerate(zip(opened, given, strict=True)):
            assert content(each) == (bytes([SENTINEL]) * 1500 if place in loading.refused else content(before))

    def test_bytes_that_are_right_again_in_time_for_the_tag_are_refused(self, cipher, monkeypatch) -> None:
        """Wrong when they are copied, right when they would be authenticated where they were."""
        (given,) = sealed(cipher, (1500,))
        opened = emptied(given, row=given.row.copy())
        opened.row[:] ^= 0xFF
        update = block.Tag.update

        def put_right(self: block.Tag, piece: np.ndarray) -> None:
            opened.row[:] = given.row
            update(self, piece)

        with monkeypatch.context() as patched:
            patched.setattr(block.Tag, "update", put_right)
            assert refusals(cipher, [opened]) == [0]
        assert refusals(cipher, [opened]) == []

    def test_what_is_altered_while_it_is_sealed_is_refused(self, cipher, monkeypatch) -> None:
        """The tag is not that of what somebody put into the row."""
        made = new_block([drawn(1500)], on=place_of(cipher))
        update = block.Tag.update

        def alter_first(self: block.Tag, piece: np.ndarray) -> None:
            made.row[:] ^= 0xFF
            update(self, piece)

        with monkeypatch.context() as patched:
            patched.setattr(block.Tag, "update", alter_first)
            cipher.store([made]).wait()
        stream = specification.block_stream(kind_of(cipher), KEY, made.trailer[:48].tobytes(), 1500)
        is_right = made.row.tobytes() == specification.xor(content(made), stream)
        assert refusals(cipher, [emptied(made)]) == ([] if is_right else [0])

    def test_a_writer_that_never_rests(self, cipher) -> None:
        """Blocks are opened rightly or refused while another thread alters their rows and takes it back."""
        given = sealed(cipher, (1500,), 3)
        ends = threading.Event()

        def alter() -> None:
            while not ends.is_set():
                for each in given:
                    each.row[700] ^= 1

        thread, before = threading.Thread(target=alter), sys.getswitchinterval()
        sys.setswitchinterval(1e-5)
        thread.start()
        try:
            for _ in range(20):
                opened = [emptied(each) for each in given]
                refused = refusals(cipher, opened)
                for place, each in enumerate(opened):
                    assert place in refused or content(each) == content(given[place])
        finally:
            ends.set()
            thread.join()
            sys.setswitchinterval(before)
