"""The worker's side without an engine: where blocks lie in rows of host memory, and what is refused there."""

import uuid
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from vllm.v1.kv_offload.base import (
    CanonicalKVCacheRef,
    CanonicalKVCaches,
    CanonicalKVCacheTensor,
    GPULoadStoreSpec,
    make_offload_key,
)
from vllm.v1.kv_offload.cpu.shared_offload_region import SharedOffloadRegion

from scx.keystream import Secret
from scx.vllm.blocks import TRAILER_BYTES, HostCipher
from scx.vllm.manager import Known, SealedSlots
from scx.vllm.memory import PlainMemory
from scx.vllm.tenants import Keyring
from scx.vllm.worker import Placement, SealingWorker

BLOCKS, PAGE, LAYERS = 12, 512, 3
ROW = 3 * 4096
CHUNKS = 6
LAYOUT = bytes(range(32))


@pytest.fixture
def keyring() -> Keyring:
    return Keyring(Secret(bytes(range(32)), "master"), None)


class Host:
    """A region of host memory, and workers that are its ranks."""

    def __init__(self, keyring: Keyring) -> None:
        self.keyring = keyring
        self.name = f"test-{uuid.uuid4()}"
        self.workers: list[SealingWorker] = []

    def worker(self, blocks_per_chunk: int = 1, rank: int = 0, ranks: int = 1, groups: int = 1) -> SealingWorker:
        size = PAGE * LAYERS * blocks_per_chunk
        assert size * ranks + TRAILER_BYTES * ranks * blocks_per_chunk <= ROW
        region = SharedOffloadRegion(self.name, CHUNKS, rank, ROW, size)
        torch.manual_seed(rank)
        pages = [torch.randint(-128, 128, (BLOCKS, PAGE), dtype=torch.int8) for _ in range(LAYERS * groups)]
        refs = [[CanonicalKVCacheRef(LAYERS * g + n, PAGE) for n in range(LAYERS)] for g in range(groups)]
        caches = CanonicalKVCaches([CanonicalKVCacheTensor(page, PAGE) for page in pages], refs)
        placement = Placement(rank, PAGE * LAYERS, blocks_per_chunk, LAYOUT)
        made = SealingWorker(PlainMemory(caches), region, placement, HostCipher(), self.keyring)
        made.test_pages = pages
        made.test_rows = region.base_tensor.numpy().view(np.uint8).reshape(CHUNKS, ROW)
        self.workers.append(made)
        return made

    def close(self) -> None:
        for made in reversed(self.workers):
            del made.test_rows
            made.shutdown()


@pytest.fixture
def host(keyring) -> Iterator[Host]:
    made = Host(keyring)
    yield made
    made.close()


def slots(keyring: Keyring, chunks: list[int], tenant: str = "alice", version: int = 1, first: int = 0) -> SealedSlots:
    """Chunks number first, first + 1, ... of a prompt."""
    keys = [make_offload_key(bytes([first + n]) * 32, 0) for n in range(len(chunks))]
    owner = keyring.named(tenant)
    return SealedSlots(chunks, keys, [Known(owner, version, b"name" + key) for key in keys])


def device(blocks: list[int], index: int = 0) -> GPULoadStoreSpec:
    return GPULoadStoreSpec(blocks, [len(blocks)], [index])


def held(worker: SealingWorker, block: int, group: int = 0) -> torch.Tensor:
    """A block's bytes on the device."""
    return torch.cat([page[block] for page in worker.test_pages[LAYERS * group : LAYERS * (group + 1)]]).clone()


def run(worker: SealingWorker, job: int, source, target, *, load: bool) -> tuple[set[int], set[bytes], set[int]]:
    submit = worker.submit_load if load else worker.submit_store
    assert submit(job, source, target)
    worker.wait({job})
    (result,) = worker.get_finished()
    assert (result.job_id, result.success) == (job, True)
    return worker.take_refused()


NOTHING: tuple[set[int], set[bytes], set[int]] = (set(), set(), set())


def test_there_and_back_into_other_blocks(host, keyring) -> None:
    worker = host.worker()
    expected = [held(worker, block) for block in (3, 1, 4)]
    assert run(worker, 1, device([3, 1, 4]), slots(keyring, [5, 0, 2]), load=False) == NOTHING
    assert run(worker, 2, slots(keyring, [5, 0, 2]), device([7, 8, 9]), load=True) == NOTHING
    assert all(torch.equal(held(worker, block), plain) for block, plain in zip((7, 8, 9), expected, strict=True))
    counted = worker.counts.take().reduce()
    assert counted["scx:kv_blocks_sealed:('default',)"] == counted["scx:kv_blocks_opened:('default',)"] == 3
    assert counted["scx:kv_sealed_bytes:('default',)"] == 3 * PAGE * LAYERS
    assert worker.counts.take() is None


def test_associated_data_is_that_of_the_specification() -> None:
    """docs/formats.md."""
    key = make_offload_key(bytes([9]) * 32, 5)
    found = Placement(2, 64, 3, LAYOUT).context("ab" * 16, 7, key, 1)
    numbers = bytes([0, 0, 0, 2, 0, 0, 0, 7, 0, 0, 0, 1])
    assert found == b"scx kv block v1\0" + LAYOUT + bytes([0xAB]) * 16 + numbers + bytes([9]) * 32 + bytes([0, 0, 0, 5])


def test_host_memory_holds_no_page(host, keyring) -> None:
    worker = host.worker()
    run(worker, 1, device([3]), slots(keyring, [2]), load=False)
    row, plain = worker.test_rows[2].tobytes(), held(worker, 3).numpy().tobytes()
    assert not any(plain[at : at + 8] in row for at in range(0, len(plain), 8))
    assert np.count_nonzero(worker.test_rows) <= PAGE * LAYERS + TRAILER_BYTES, "and no other row is touched"


@pytest.mark.parametrize("index", [0, 1, 2])
def test_the_first_block_may_lie_in_the_middle_of_a_chunk(host, keyring, index) -> None:
    """As vLLM's own workers count: chunks of three blocks, of which a load may want some."""
    worker = host.worker(blocks_per_chunk=3)
    stored = [0, 1, 2, 3, 4, 5]
    run(worker, 1, device(stored), slots(keyring, [4, 1]), load=False)
    wanted = stored[index:]
    expected = [held(worker, block) for block in wanted]
    targets = [6, 7, 8, 9, 10, 11][: len(wanted)]
    assert run(worker, 2, slots(keyring, [4, 1]), device(targets, index), load=True) == NOTHING
    assert all(torch.equal(held(worker, block), plain) for block, plain in zip(targets, expected, strict=True))


def test_a_block_is_bound_to_its_place_in_a_chunk(host, keyring) -> None:
    worker = host.worker(blocks_per_chunk=3)
    run(worker, 1, device([0, 1, 2]), slots(keyring, [4]), load=False)
    row, size = worker.test_rows[4], PAGE * LAYERS
    first, second = row[:size].copy(), row[size : 2 * size].copy()
    row[:size], row[size : 2 * size] = second, first
    tails = row[ROW - 3 * TRAILER_BYTES :].reshape(3, TRAILER_BYTES)
    tails[[1, 2]] = tails[[2, 1]]  # those of the second and the first block
    blocks, names, jobs = run(worker, 2, slots(keyring, [4]), device([6, 7, 8]), load=True)
    assert blocks == {6, 7}
    assert names == {slots(keyring, [4]).names[0]}
    assert jobs == {2}


def test_groups_of_a_hybrid_model(host, keyring) -> None:
    worker = host.worker(blocks_per_chunk=2, groups=2)
    stored = GPULoadStoreSpec([0, 1, 2, 3, 4], [2, 3], [0, 1])
    expected = [held(worker, 0), held(worker, 1), held(worker, 2, 1), held(worker, 3, 1), held(worker, 4, 1)]
    kept = slots(keyring, [3, 0, 5])
    run(worker, 1, stored, kept, load=False)
    run(worker, 2, kept, GPULoadStoreSpec([6, 7, 8, 9, 10], [2, 3], [0, 1]), load=True)
    found = [held(worker, 6), held(worker, 7), held(worker, 8, 1), held(worker, 9, 1), held(worker, 10, 1)]
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))


def test_ranks_share_rows_and_not_each_others_blocks(host, keyring) -> None:
    ranks = [host.worker(rank=rank, ranks=3) for rank in range(3)]
    for number, worker in enumerate(ranks):
        run(worker, number, device([1]), slots(keyring, [2]), load=False)
    for number, worker in enumerate(ranks):
        expected = held(worker, 1)
        assert run(worker, number, slots(keyring, [2]), device([5]), load=True) == NOTHING
        assert torch.equal(held(worker, 5), expected)
    row, size = ranks[0].test_rows[2], PAGE * LAYERS
    row[:size] = row[size : 2 * size]
    row[ROW - TRAILER_BYTES :] = row[ROW - 2 * TRAILER_BYTES : ROW - TRAILER_BYTES]
    assert run(ranks[0], 7, slots(keyring, [2]), device([5]), load=True)[0] == {5}
    assert run(ranks[1], 8, slots(keyring, [2]), device([5]), load=True) == NOTHING


@pytest.mark.parametrize(
    "other",
    [
        pytest.param({"tenant": "bob"}, id="another tenant"),
        pytest.param({"version": 2}, id="another version of the key"),
        pytest.param({"first": 1}, id="another place in the chain"),
    ],
)
def test_what_a_block_is_bound_to(host, keyring, other) -> None:
    worker = host.worker()
    run(worker, 1, device([3]), slots(keyring, [2]), load=False)
    with_versions = slots(keyring, [2], **other)
    before = held(worker, 5)
    if other.get("version") == 2:
        assert keyring.named("alice").versions == (1,)
    assert run(worker, 2, with_versions, device([5]), load=True) == ({5}, set(with_versions.names), {2})
    plain = held(worker, 3)
    assert not torch.equal(held(worker, 5), plain)
    assert torch.equal(held(worker, 5), before) or not held(worker, 5).any()
    counted = worker.counts.take().reduce()
    assert counted["scx:kv_blocks_refused:('default',)"] == 1
    assert "scx:kv_blocks_opened:('default',)" not in counted


def test_one_refused_block_leaves_the_others(host, keyring) -> None:
    worker = host.worker()
    kept = slots(keyring, [0, 1, 2])
    run(worker, 1, device([0, 1, 2]), kept, load=False)
    worker.test_rows[1, 100] ^= 1
    assert run(worker, 2, kept, device([6, 7, 8]), load=True) == ({7}, {kept.names[1]}, {2})
    assert torch.equal(held(worker, 6), held(worker, 0))
    assert torch.equal(held(worker, 8), held(worker, 2))


class Forgetful(Keyring):
    gone = False

    def find(self, id: str):
        return None if self.gone else super().find(id)


def test_a_tenant_that_is_forgotten_meanwhile(host) -> None:
    """Between the scheduler's word and the worker's: nothing is stored, nothing is opened, and nothing fails."""
    keyring = host.keyring = Forgetful(Secret(bytes(range(32)), "master"), None)
    worker = host.worker()
    kept = slots(keyring, [0])
    run(worker, 1, device([0]), kept, load=False)
    keyring.gone = True
    assert run(worker, 2, kept, device([6]), load=True) == ({6}, set(kept.names), {2})
    assert run(worker, 3, device([1]), kept, load=False) == NOTHING
    keyring.gone = False
    assert run(worker, 4, kept, device([7]), load=True)[0] == {7}, "a store without a key leaves nothing to open"


class Pending:
    """A transfer that is over when it is told so."""

    refused: list[int] = []  # noqa: RUF012
    bytes, seconds = 0, 0.0
    over = False

    def is_done(self) -> bool:
        return self.over

    def wait(self) -> None:
        self.over = True


class Slow(HostCipher):
    """A cipher whose stores take their time."""

    def __init__(self) -> None:
        super().__init__()
        self.store_under_way, self.is_closed = Pending(), False

    def store(self, blocks):
        return self.store_under_way

    def load(self, blocks):
        over = Pending()
        over.over = True
        return over

    def close(self) -> None:
        self.is_closed = True


def test_a_load_does_not_wait_for_a_store(host, keyring) -> None:
    worker = host.worker()
    worker._cipher = slow = Slow()
    worker.submit_store(1, device([0]), slots(keyring, [0]))
    worker.submit_load(2, slots(keyring, [1]), device([1]))
    assert [result.job_id for result in worker.get_finished()] == [2]
    assert worker.get_finished() == []
    worker.wait({1})
    assert [result.job_id for result in worker.get_finished()] == [1]
    host.close()
    host.workers.clear()
    assert slow.is_closed


def test_pages_larger_than_their_place(host, keyring) -> None:
    region = SharedOffloadRegion(host.name, CHUNKS, 0, ROW, 64)
    pages = torch.zeros(BLOCKS, PAGE, dtype=torch.int8)
    caches = CanonicalKVCaches([CanonicalKVCacheTensor(pages, PAGE)], [[CanonicalKVCacheRef(0, PAGE)]])
    with pytest.raises(ValueError, match="group 0: a block has 512 bytes, its place 64"):
        SealingWorker(PlainMemory(caches), region, Placement(0, 64, 1, LAYOUT), HostCipher(), keyring)
    region.cleanup()
