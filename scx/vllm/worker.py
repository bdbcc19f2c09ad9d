"""The worker's side: from the device's pages to rows of host memory and back, through the cipher.

A chunk is a row of the region of host memory that vLLM shares among its processes, and that its tiers store and fetch
whole:

    | rank 0: block 0 .. block n-1 | rank 1: .. | .. | unused | rank N-1: trailers | .. | rank 0: trailers |

A block's bytes are those of its pages, layer after layer. Each rank seals its own blocks with a trailer each. What is
unused is zero, or left of a chunk that lay there before.
"""

import struct
from collections.abc import Iterator
from typing import NamedTuple, Protocol

import numpy as np
from torch import Tensor
from vllm.v1.kv_offload.base import GPULoadStoreSpec, OffloadingWorker, TransferResult
from vllm.v1.kv_offload.cpu.shared_offload_region import SharedOffloadRegion

from scx.keystream import Secret
from scx.vllm.blocks import TRAILER_BYTES, Block, Transfer
from scx.vllm.manager import SealedSlots
from scx.vllm.memory import DeviceMemory
from scx.vllm.metrics import Counts
from scx.vllm.tenants import Keyring, Tenant

__all__ = ["Cipher", "Placement", "SealingWorker"]


class Cipher(Protocol):
    """What a block goes through: `scx.vllm.blocks`."""

    def store(self, blocks: list[Block]) -> Transfer: ...

    def load(self, blocks: list[Block]) -> Transfer: ...

    def close(self) -> None: ...


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


class _Part(NamedTuple):
    """A block of the device in a job.

    Attributes:
        name: that its chunk was loaded under.
        pages: what goes through the cipher; None for a block whose key is gone.
    """

    group: int
    block: int
    name: bytes
    pages: list[Tensor] | None


class _Job(NamedTuple):
    number: int
    is_load: bool
    transfer: Transfer
    kind: str  # of the tenant
    parts: list[_Part]


class SealingWorker(OffloadingWorker):
    """Transfers of one worker.

    Args:
        memory: the device's.
        region: of host memory.
        placement: of this rank in its rows.
        cipher: for pages on this device.
        keyring: of the tenants.

    Raises: ValueError where a group's pages are larger than their place in a row.
    """

    def __init__(
        self,
        memory: DeviceMemory,
        region: SharedOffloadRegion,
        placement: Placement,
        cipher: Cipher,
        keyring: Keyring,
    ) -> None:
        for group in range(memory.groups):
            if memory.size(group) > placement.block_bytes:
                raise ValueError(
                    f"group {group}: a block has {memory.size(group)} bytes, its place {placement.block_bytes}"
                )
        self._memory = memory
        self._region = region
        self._rows = region.base_tensor.numpy().view(np.uint8).reshape(region.num_chunks, -1)
        self._at = placement
        self._cipher = cipher
        self._keyring = keyring
        self._jobs: list[_Job] = []
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
        done: list[_Job] = []
        pending: list[_Job] = []
        for job in self._jobs:  # loads do not wait for stores that began before them
            (done if job.transfer.is_done() else pending).append(job)
        self._jobs = pending
        return [self._end(job) for job in done]

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
        self._cipher.close()
        self._jobs.clear()
        del self._rows  # a view of the region, which is unmapped now
        self._region.cleanup()

    def _begin(self, job_id: int, device: GPULoadStoreSpec, host: SealedSlots, *, is_load: bool) -> None:
        tenant = self._keyring.find(host.tenant)
        secrets = {version: self._key(tenant, version) for version in set(host.versions)}
        blocks: list[Block] = []
        parts: list[_Part] = []
        for group, block, index, place in self._places(device):
            row, trailer = self._slot(int(host.block_ids[index]), place, group)
            secret = secrets[host.versions[index]]
            pages = None
            if secret is not None:
                pages = (self._memory.target if is_load else self._memory.read)(group, block)
                context = self._at.context(host.tenant, host.versions[index], host.keys[index], place)
                blocks.append(Block(pages, row, trailer, context, secret))
            elif not is_load:
                trailer[:] = 0  # what lay there is another block
            parts.append(_Part(group, block, host.names[index], pages))
        transfer = self._cipher.load(blocks) if is_load else self._cipher.store(blocks)
        self._jobs.append(_Job(job_id, is_load, transfer, "forgotten" if tenant is None else tenant.kind, parts))

    def _end(self, job: _Job) -> TransferResult:
        transfer = job.transfer
        if job.is_load:
            self._take_in(job)
        else:
            self._counts.add({"seal_seconds": transfer.seconds, "sealed_bytes": transfer.bytes}, job.kind)
            self._counts.add({"blocks_sealed": sum(part.pages is not None for part in job.parts)}, job.kind)
        return TransferResult(job.number, True, transfer.bytes, transfer.seconds)

    def _take_in(self, job: _Job) -> None:
        """Have the device's blocks hold what was opened, and remember what was refused."""
        sealed = [part for part in job.parts if part.pages is not None]
        refused = [part for part in job.parts if part.pages is None]
        refused += [sealed[index] for index in job.transfer.refused]
        for part in refused:
            self._refused_blocks.add(part.block)
            self._refused_names.add(part.name)
            self._failed_jobs.add(job.number)
        closed = set(job.transfer.refused)
        for index, part in enumerate(sealed):
            if index not in closed and part.pages is not None:
                self._memory.put(part.group, part.block, part.pages)
        self._counts.add({"open_seconds": job.transfer.seconds, "opened_bytes": job.transfer.bytes}, job.kind)
        self._counts.add({"blocks_opened": len(sealed) - len(closed), "blocks_refused": len(refused)}, job.kind)

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

    def _key(self, tenant: Tenant | None, version: int) -> Secret | None:
        if tenant is None:
            return None
        try:
            return self._keyring.key(tenant, version, "blocks")
        except LookupError:  # forgotten since the scheduler asked
            return None

    def _slot(self, chunk: int, place: int, group: int) -> tuple[np.ndarray, np.ndarray]:
        """A block's bytes in host memory, and its trailer."""
        row, count = self._rows[chunk], self._at.blocks_per_chunk
        first = (self._at.rank * count + place) * self._at.block_bytes
        end = len(row) - (self._at.rank * count + place) * TRAILER_BYTES
        return row[first : first + self._memory.size(group)], row[end - TRAILER_BYTES : end]
