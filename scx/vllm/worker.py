"""The worker's side: from the device's pages to rows of host memory and back, through the cipher.

A chunk is a row of the region of host memory that vLLM shares among its processes, and that its tiers store and fetch
whole:

    | rank 0: block 0 .. block n-1 | rank 1: .. | .. | unused | rank N-1: trailers | .. | rank 0: trailers |

A block's bytes are those of its pages, layer after layer. Each rank seals its own blocks with a trailer each. What is
unused is zero, or left of a chunk that lay there before.
"""

import struct
from collections import deque
from collections.abc import Iterator
from typing import NamedTuple, Protocol

import numpy as np
from torch import Tensor
from vllm.v1.kv_offload.base import CanonicalKVCaches, GPULoadStoreSpec, OffloadingWorker, TransferResult
from vllm.v1.kv_offload.cpu.shared_offload_region import SharedOffloadRegion

from scx.keystream import Secret
from scx.vllm.blocks import TRAILER_BYTES, Block, Transfer
from scx.vllm.manager import SealedSlots
from scx.vllm.metrics import Counts
from scx.vllm.tenants import Keyring

__all__ = ["Cipher", "Placement", "SealingWorker"]


class Cipher(Protocol):
    """What a block goes through: `scx.vllm.blocks`."""

    def store(self, blocks: list[Block]) -> Transfer: ...

    def load(self, blocks: list[Block]) -> Transfer: ...


class Placement(NamedTuple):
    """Where a rank's blocks lie in a row.

    Attributes:
        rank: 0..ranks-1, of those whose bytes a row holds.
        block_bytes: of one device block of this rank, at most.
        blocks_per_chunk: device blocks that are off-loaded as one.
        layout: 32 bytes that stand for all that the bytes depend on.
    """

    rank: int
    block_bytes: int
    blocks_per_chunk: int
    layout: bytes

    def context(self, tenant: str, version: int, key: bytes, place: int) -> bytes:
        """A block's associated data: what it is, whose, and where. `key` is vLLM's: a hash over the chunk's tokens and
        all before it, and the group; place: of the block in its chunk."""
        numbers = struct.pack(">III", self.rank, version, place)
        return b"scx kv block v1\0" + self.layout + bytes.fromhex(tenant) + numbers + key


class _Job(NamedTuple):
    number: int
    is_load: bool
    transfer: Transfer
    kind: str  # of the tenant
    blocks: list[tuple[int, bytes]]  # of the device, and under which name it was loaded
    lost: list[int]  # among them, whose key is gone


class SealingWorker(OffloadingWorker):
    """Transfers of one worker.

    Args:
        kv_caches: the device's pages.
        region: of host memory.
        placement: of this rank in its rows.
        cipher: for pages on this device.
        keyring: of the tenants.

    Raises: ValueError where a group's pages are larger than their place in a row.
    """

    def __init__(
        self,
        kv_caches: CanonicalKVCaches,
        region: SharedOffloadRegion,
        placement: Placement,
        cipher: Cipher,
        keyring: Keyring,
    ) -> None:
        pages = [cache.tensor for cache in kv_caches.tensors]
        self._pages = [
            [(pages[ref.tensor_idx], ref.page_size_bytes) for ref in refs] for refs in kv_caches.group_data_refs
        ]
        for group, refs in enumerate(self._pages):
            size = sum(size for _, size in refs)
            if size > placement.block_bytes:
                raise ValueError(f"group {group}: a block has {size} bytes, its place {placement.block_bytes}")
        self._region = region
        self._rows = region.base_tensor.numpy().view(np.uint8).reshape(region.num_chunks, -1)
        self._at = placement
        self._cipher = cipher
        self._keyring = keyring
        self._jobs: deque[_Job] = deque()
        self._counts = Counts()
        self._refused_blocks: set[int] = set()
        self._refused_names: set[bytes] = set()
        self._failed_jobs: set[int] = set()

    def submit_store(self, job_id: int, src_spec: GPULoadStoreSpec, dst_spec: SealedSlots) -> bool:
        self._begin(job_id, src_spec, dst_spec, is_load=False)
        return True

    def submit_load(self, job_id: int, src_spec: SealedSlots, dst_spec: GPULoadStoreSpec) -> bool:
        self._begin(job_id, dst_spec, src_spec, is_load=True)
        return True

    def get_finished(self) -> list[TransferResult]:
        finished = []
        while self._jobs and self._jobs[0].transfer.is_done():
            finished.append(self._end(self._jobs.popleft()))
        return finished

    def wait(self, job_ids: set[int]) -> None:
        for job in self._jobs:
            if job.number in job_ids:
                job.transfer.wait()

    def take_refused(self) -> tuple[set[int], set[bytes], set[int]]:
        """Device blocks, names and jobs of what did not authenticate since the last call."""
        taken = self._refused_blocks, self._refused_names, self._failed_jobs
        self._refused_blocks, self._refused_names, self._failed_jobs = set(), set(), set()
        return taken

    @property
    def counts(self) -> Counts:
        return self._counts

    def shutdown(self) -> None:
        for job in self._jobs:
            job.transfer.wait()
        self._jobs.clear()
        del self._rows  # a view of the region, which is unmapped now
        self._pages.clear()
        self._region.cleanup()

    def _begin(self, job_id: int, device: GPULoadStoreSpec, host: SealedSlots, *, is_load: bool) -> None:
        tenant = self._keyring.find(host.tenant)
        blocks: list[Block] = []
        places: list[tuple[int, bytes]] = []
        lost: list[int] = []
        secrets: dict[int, Secret | None] = {}
        for group, block, index, place in self._places(device):
            version = host.versions[index]
            if version not in secrets:
                secrets[version] = None if tenant is None else self._key(host.tenant, version)
            secret = secrets[version]
            row, trailer = self._slot(int(host.block_ids[index]), place, group)
            if secret is None:
                lost.append(len(lost) + len(blocks))
                if not is_load:
                    trailer[:] = 0  # what lay there is another block
            else:
                context = self._at.context(host.tenant, version, host.keys[index], place)
                blocks.append(Block(self._block_pages(group, block), row, trailer, context, secret))
            places.append((block, host.names[index]))
        transfer = self._cipher.load(blocks) if is_load else self._cipher.store(blocks)
        kind = "forgotten" if tenant is None else tenant.kind
        self._jobs.append(_Job(job_id, is_load, transfer, kind, places, lost))

    def _end(self, job: _Job) -> TransferResult:
        transfer, lost = job.transfer, set(job.lost)
        sealed = [place for place in range(len(job.blocks)) if place not in lost]
        refused = lost | {sealed[index] for index in transfer.refused}
        if job.is_load:
            for place in refused:
                block, name = job.blocks[place]
                self._refused_blocks.add(block)
                self._refused_names.add(name)
            if refused:
                self._failed_jobs.add(job.number)
            opened = len(job.blocks) - len(refused)
            self._counts.add({"open_seconds": transfer.seconds, "opened_bytes": transfer.bytes}, job.kind)
            self._counts.add({"blocks_opened": opened, "blocks_refused": len(refused)}, job.kind)
        else:
            self._counts.add({"seal_seconds": transfer.seconds, "sealed_bytes": transfer.bytes}, job.kind)
            self._counts.add({"blocks_sealed": len(sealed)}, job.kind)
        return TransferResult(job.number, True, transfer.bytes, transfer.seconds)

    def _places(self, device: GPULoadStoreSpec) -> Iterator[tuple[int, int, int, int]]:
        """(group, block of the device, index among the host's chunks, place in that chunk) of each block of a job.

        A group's blocks follow each other in its chunks; the first may lie in the middle of one.
        """
        at = first = 0
        for group, (count, index) in enumerate(zip(device.group_sizes, device.block_indices, strict=True)):
            if not count:
                continue
            skipped = index % self._at.blocks_per_chunk
            for number in range(count):
                chunk, place = divmod(skipped + number, self._at.blocks_per_chunk)
                yield group, int(device.block_ids[at + number]), first + chunk, place
            at += count
            first += -(-(skipped + count) // self._at.blocks_per_chunk)

    def _key(self, tenant: str, version: int) -> Secret | None:
        owner = self._keyring.find(tenant)
        if owner is None:
            return None
        try:
            return self._keyring.key(owner, version, "blocks")
        except LookupError:  # forgotten since the scheduler asked
            return None

    def _block_pages(self, group: int, block: int) -> list[Tensor]:
        return [tensor[block, :size] for tensor, size in self._pages[group]]

    def _slot(self, chunk: int, place: int, group: int) -> tuple[np.ndarray, np.ndarray]:
        """A block's bytes in host memory, and its trailer."""
        row, count = self._rows[chunk], self._at.blocks_per_chunk
        first = (self._at.rank * count + place) * self._at.block_bytes
        size = sum(size for _, size in self._pages[group])
        end = len(row) - (self._at.rank * count + place) * TRAILER_BYTES
        return row[first : first + size], row[end - TRAILER_BYTES : end]
