"""Off-loaded blocks: no keystream serves twice, nothing plain or secret stays, and what is refused at the door."""

import copy
import pickle
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch

from bench.rehearsal.device import StandInDevice
from bench.rehearsal.operators import Operators
from bench.rehearsal.tensors import StandIn
from scx.keystream import Secret
from scx.vllm.blocks import TRAILER_BYTES, Block, DeviceCipher, HostCipher, Transfer, host
from scx.vllm.blocks.block import Tag
from scx.vllm.blocks.staging import Staging
from scx.vllm.blocks.transfer import AtOnce
from scx_kernels.kernels.launch import TARGETS
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
    new_block,
    place_of,
    refusals,
    sealed,
)


@pytest.fixture(params=WAYS)
def cipher(request) -> Iterator[Any]:
    with cipher_of(request.param) as made:
        yield made


@pytest.fixture(params=[way for way in WAYS if "kernels" not in way])
def fast_cipher(request) -> Iterator[Any]:
    with cipher_of(request.param) as made:
        yield made


class Later(Executor):
    """Runs nothing before it is told to."""

    def __init__(self) -> None:
        self.waiting: list[tuple[Future[Any], Callable[[], Any]]] = []

    def submit(self, function: Callable[..., Any], /, *args: Any, **options: Any) -> Future[Any]:
        self.waiting.append((Future(), lambda: function(*args, **options)))
        return self.waiting[-1][0]

    def run(self) -> None:
        future, call = self.waiting.pop(0)
        future.set_result(call())


def windows(data: bytes | np.ndarray) -> set[bytes]:
    """Every run of eight bytes."""
    held = bytes(data)
    return {held[place : place + 8] for place in range(len(held) - 7)}


def chi_square(values: np.ndarray) -> float:
    counts = np.bincount(values, minlength=256)
    return float(((counts - len(values) / 256) ** 2).sum() / (len(values) / 256))


class TestKeystream:
    @pytest.mark.parametrize("plain", [bytes(60_000), b"a text that repeats. " * 3000, bytes(range(256)) * 200])
    def test_rows_are_uniform_and_hold_no_plain_run(self, fast_cipher, plain) -> None:
        made = new_block([torch.frombuffer(bytearray(plain), dtype=torch.uint8)])
        fast_cipher.store([made]).wait()
        row = made.row
        assert not windows(row) & windows(plain)
        # 255 degrees of freedom: mean 255, deviation 22.6; seven of them are met once in 10^9 rows.
        for values in (row, row[1:] ^ row[:-1], row[64:] ^ row[:-64], row[1024:] ^ row[:-1024]):
            assert chi_square(values) < 255 + 7 * 22.6

    def test_no_keystream_serves_twice(self, fast_cipher) -> None:
        """Of zeros the row is the keystream: 10,000 blocks, and the 64-byte blocks of long ones."""
        made = [new_block([torch.zeros(32, dtype=torch.uint8)]) for _ in range(10_000)]
        for first in range(0, len(made), 100):
            fast_cipher.store(made[first : first + 100]).wait()
        long = [new_block([torch.zeros(5000, dtype=torch.uint8)]) for _ in range(8)]
        for pair in (long[:2], long[2:4], long[4:]):
            fast_cipher.store(pair).wait()
        pieces = [each.row.tobytes() for each in made]
        pieces += [each.row[at : at + 32].tobytes() for each in long for at in range(0, 4960, 32)]
        assert len(set(pieces)) == len(pieces)
        heads = {each.trailer[:48].tobytes() for each in made + long}
        assert len(heads) == len(made + long)
        assert len({head[8:32] for head in heads}) == (len(heads) if isinstance(fast_cipher, HostCipher) else 103)

    def test_write_numbers_of_a_call_never_meet(self) -> None:
        with cipher_of("device") as cipher:
            made = sealed(cipher, (1025,), 5)
        first = [int.from_bytes(each.trailer[32:40].tobytes(), "little") for each in made]
        assert first == [0, 2, 4, 6, 8]
        assert len({each.trailer[8:32].tobytes() for each in made}) == 1

    def test_the_same_block_again_is_another_row(self, cipher) -> None:
        (one,), (two,) = sealed(cipher), sealed(cipher)
        assert content(one) == content(two)
        assert (one.row == two.row).mean() < 0.1


class TestWhatStays:
    def test_staging_holds_no_plain_byte_and_no_key(self) -> None:
        with cipher_of("device") as cipher:
            given = sealed(cipher, (900, 700), 5)
            opened = [emptied(each) for each in given]
            opened[2] = opened[2]._replace(row=altered(opened[2].row, 9))
            assert refusals(cipher, opened) == [2]
            stagings = [*cipher._storing._stagings, *cipher._loading._stagings]
            plain = set().union(*(windows(content(each)) for each in given))
            assert len(stagings) == 4
            for staging in stagings:
                assert staging._held == []
                for held in (staging._host, staging._device):
                    assert not windows(held.numpy()) & plain
                for keys in (staging._keys, staging._device_keys):
                    assert not keys.any()

    def test_only_ciphertext_and_no_key_leaves_an_accelerator(self, monkeypatch) -> None:
        """All that is copied to the host, by a stand-in for a GPU. Nothing waits for a copy that is not pinned."""
        copy, crossed = StandInDevice._copy, []

        def note(self: StandInDevice, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
            result = copy(self, func, args, kwargs)
            source = args[1] if func is torch.ops.aten.copy_.default else args[0]
            if isinstance(source, StandIn) and not isinstance(result, StandIn):
                crossed.append(result.flatten().view(torch.uint8).numpy().tobytes())
            return result

        def to_cuda(plain: bytes) -> list[torch.Tensor]:
            return [torch.frombuffer(bytearray(plain[at : at + 900]), dtype=torch.uint8).to("cuda") for at in (0, 900)]

        operators = Operators((TARGETS["cuda", 90],), lambda *given: None)
        with StandInDevice(operators) as stand_in, torch.no_grad():
            cipher = DeviceCipher(torch.device("cuda"), staging_bytes=4096, executor=AtOnce())
            plain = [drawn(1800, seed).numpy().tobytes() for seed in range(5)]
            given = [new_block([])._replace(pages=to_cuda(each), row=np.zeros(1800, np.uint8)) for each in plain]
            pages = [[torch.zeros_like(page) for page in block.pages] for block in given]
            monkeypatch.setattr(StandInDevice, "_copy", note)
            stand_in.waits.clear()
            cipher.store(given).wait()
            sent = b"".join(crossed)
            loading = cipher.load([block._replace(pages=own) for block, own in zip(given, pages, strict=True)])
            loading.wait()
            assert {wait.operation for wait in stand_in.waits} <= {"Event.synchronize", "Stream.synchronize"}
            assert len(b"".join(crossed)) == len(sent), "to load, nothing is copied to the host"
            monkeypatch.undo()
            opened = [b"".join(page.cpu().numpy().tobytes() for page in own) for own in pages]
        assert (loading.refused, opened) == ([], plain)
        assert len(sent) == 5 * 2048
        assert not windows(sent) & windows(b"".join(plain))
        assert all(block.row.tobytes() in sent for block in given)

    def test_keys_are_wiped_after_a_failure(self, monkeypatch) -> None:
        with cipher_of("device") as cipher:
            (given,) = sealed(cipher)
            monkeypatch.setattr(torch, "_foreach_copy_", _fails)
            loading = cipher.load([emptied(given)])
            for _ in range(2):  # whoever asks is told, every time
                with pytest.raises(OSError, match="planted"):
                    loading.wait()
                with pytest.raises(OSError, match="planted"):
                    loading.is_done()
            assert not any(staging._keys.any() or staging._held for staging in cipher._loading._stagings)
            monkeypatch.undo()
            assert refusals(cipher, [emptied(given)]) == []

    def test_errors_leave_no_locals(self, cipher, monkeypatch) -> None:
        """Of this package's frames, which have keys and plain bytes."""
        monkeypatch.setattr(Tag, "finish", _fails)
        made = new_block([drawn(100)], on=place_of(cipher))
        with pytest.raises(OSError, match="planted") as raised:
            cipher.store([made]).wait()
        frames = [frame for frame, _ in traceback.walk_tb(raised.value.__traceback__)]
        inner = [frame for frame in frames if "/scx/vllm/blocks/" in frame.f_code.co_filename]
        assert len(inner) >= 2
        held = [value for frame in inner for value in frame.f_locals.values()]
        assert not any(isinstance(value, (Block, Secret, Tag, Staging, np.ndarray)) for value in held)

    def test_a_block_shows_and_pickles_no_key(self) -> None:
        made = new_block([drawn(10)], context=b"who this is of")
        assert repr(made) == "Block(1 pages, 10 bytes)"
        for give_away in (pickle.dumps, copy.deepcopy):
            if give_away is copy.deepcopy:
                assert give_away(made).key is made.key
            else:
                with pytest.raises(TypeError, match="key material"):
                    give_away(made)


def _fails(*given: Any, **options: Any) -> Any:
    raise OSError("planted")


class TestTransfers:
    def test_a_transfer_under_way_tells_nothing(self) -> None:
        later = Later()
        cipher = DeviceCipher(CPU, executor=later)
        made = new_block([drawn(5000)])
        before = made.row.copy()
        storing = cipher.store([made])
        assert not storing.is_done()
        assert np.array_equal(made.row, before)
        for name in ("refused", "bytes", "seconds"):
            with pytest.raises(RuntimeError, match="not done"):
                getattr(storing, name)
        later.run()
        assert storing.is_done()
        assert (storing.refused, storing.bytes) == ([], 5000)
        opened = emptied(made)
        loading = cipher.load([opened])
        assert content(opened) == bytes([SENTINEL]) * 5000
        later.run()
        assert loading.is_done()
        assert content(opened) == content(made)

    def test_transfers_of_a_direction_keep_their_order(self) -> None:
        """The second store of a row is the one that is found."""
        with cipher_of("device") as cipher:
            one = new_block([drawn(3000)])
            two = one._replace(pages=[drawn(3000, 1)])
            transfers = [cipher.store([made]) for made in [one, two] * 5]
            for transfer in transfers:
                transfer.wait()
            opened = emptied(one)
            assert refusals(cipher, [opened]) == []
            assert content(opened) == content(two)

    @pytest.mark.parametrize("staging", [1, 1024, 5000, 1 << 20])
    def test_staging_of_any_size(self, staging) -> None:
        """Blocks larger than it go alone."""
        cipher = DeviceCipher(CPU, staging)
        given = [new_block([drawn(size, size)], on=CPU) for size in (10, 4000, 2000, 1, 30_000, 1024, 1024)]
        storing = cipher.store(given)
        storing.wait()
        assert storing.bytes == sum(each.row.nbytes for each in given)
        opened = [emptied(each) for each in given]
        assert refusals(cipher, opened) == []
        assert list(map(content, opened)) == list(map(content, given))
        cipher.close()

    def test_close_waits_for_what_was_begun(self) -> None:
        with ThreadPoolExecutor(1) as executor:
            for own in (None, executor):
                cipher = DeviceCipher(CPU, executor=own)
                storing = [cipher.store([new_block([drawn(200_000)])]) for _ in range(5)]
                cipher.close()
                assert all(transfer.is_done() for transfer in storing)

    def test_a_closed_cipher_takes_nothing(self) -> None:
        cipher = DeviceCipher(CPU)
        cipher.close()
        with pytest.raises(RuntimeError, match="shutdown"):
            cipher.store([new_block([drawn(10)])])

    def test_bytes_of_what_was_refused_are_not_counted(self, cipher) -> None:
        given = sealed(cipher, (100, 60), 3)
        loading: Transfer = cipher.load([emptied(given[0]), emptied(given[1], context=b""), emptied(given[2])])
        loading.wait()
        assert (loading.refused, loading.bytes) == ([1], 320)


class TestDoor:
    def test_what_does_not_fit_is_named(self, cipher) -> None:
        right, on = new_block([drawn(10), drawn(6)], on=place_of(cipher)), place_of(cipher)
        pages, row, trailer = right.pages, right.row, right.trailer
        elsewhere = torch.zeros(10, dtype=torch.uint8, device="meta")
        frozen = row.copy()
        frozen.flags.writeable = False
        wrong = [
            (TypeError, r"pages\[1\]: expected a tensor", {"pages": [pages[0], row]}),
            (ValueError, r"pages\[0\]: expected \(bytes,\) uint8 or int8.*float32", {"pages": [pages[0].float()]}),
            (ValueError, r"pages\[0\]: .*got \(2, 5\)", {"pages": [pages[0].view(2, 5)]}),
            (ValueError, r"pages\[0\]: .*contiguous", {"pages": [torch.zeros(20, dtype=torch.uint8, device=on)[::2]]}),
            (ValueError, r"pages\[1\]: .* on meta", {"pages": [pages[0], elsewhere]}),
            (ValueError, "pages: expected at least one byte", {"pages": []}),
            (ValueError, "pages: expected at least one byte", {"pages": [pages[0][:0]]}),
            (ValueError, r"row: expected \(16,\) uint8, contiguous, got \(15,\)", {"row": row[:15]}),
            (ValueError, r"row: .*got \(16,\) int8", {"row": row.view(np.int8)}),
            (ValueError, r"row: .*contiguous", {"row": np.zeros(32, np.uint8)[::2]}),
            (TypeError, r"row: expected an array, got bytes", {"row": row.tobytes()}),
            (ValueError, r"trailer: expected \(64,\)", {"trailer": trailer[:63]}),
            (ValueError, r"trailer: expected \(64,\)", {"trailer": trailer.reshape(8, 8)}),
            (TypeError, "context: expected bytes, got str", {"context": "text"}),
            (TypeError, "key: expected a Secret, got bytes", {"key": KEY}),
        ]
        for error, words, changed in wrong:
            for call in (cipher.store, cipher.load):
                with pytest.raises(error, match=r"blocks\[1\]\." + words):
                    call([right, right._replace(**changed)])
        for name in ("row", "trailer"):
            array = np.zeros(TRAILER_BYTES if name == "trailer" else 16, np.uint8)
            array.flags.writeable = False
            with pytest.raises(ValueError, match=rf"blocks\[1\]\.{name}: .*read only"):
                cipher.store([right, right._replace(**{name: array})])
        assert (row == 7).all()  # not even the first block was sealed
        assert (trailer == 7).all()

    def test_no_host_block_is_longer_than_its_counter(self, monkeypatch) -> None:
        assert host.MOST_BYTES == 64 * (2**32 - 1)
        monkeypatch.setattr(host, "MOST_BYTES", 16)
        sealed(HostCipher(), (16,))
        with pytest.raises(ValueError, match=r"blocks\[0\]\.row: expected at most 16 bytes, got 17"):
            sealed(HostCipher(), (17,))

    def test_devices(self) -> None:
        with pytest.raises(ValueError, match="device: expected one of CUDA or ROCm, or the CPU, got meta"):
            DeviceCipher(torch.device("meta"))
        with pytest.raises(ValueError, match="staging_bytes: expected 1 or more, got 0"):
            DeviceCipher(CPU, staging_bytes=0)
