"""Blocks whose pages lie on an accelerator: sealed there, so that only ciphertext is ever copied to the host.

A transfer's blocks go through *staging*, some at a time: pages are gathered into one tensor on the device, sealed there
in place by `scx_kernels.seal`, and copied to page-locked memory of this process, out of which the host computes tags
and fills rows; loading goes the same way back. Two stagings take turns, so that the device works on one while the host
works on the other. Transfers of a direction run one after the other, in a thread and on a stream of their own.
"""

import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from scx.vllm.blocks.block import DEVICE_FORMAT, Block, Trailer, WipedKeyError, check_blocks, fresh_nonce
from scx.vllm.blocks.staging import ROW_BYTES, Keys, Staging, padded
from scx.vllm.blocks.transfer import Outcome, Transfer
from scx_kernels.hidden import guarded
from scx_kernels.operations import is_accelerator
from scx_kernels.sealing import WRITE_LIMIT

__all__ = ["DeviceCipher"]

STAGING_BYTES = 1 << 24
_STAGINGS = 2
_Work = Callable[[list[Staging], Sequence[Block]], tuple[list[int], int]]
"""Blocks through stagings: which were refused, and bytes of the others."""


class DeviceCipher:
    """Seals and opens blocks whose pages lie on `device`.

    Args:
        device: of CUDA or ROCm; or the CPU, which computes the same bits, without streams.
        staging_bytes: how much of a transfer is in staging at a time; a block that is larger goes alone. Twice as much
            is taken on the device, and on the host, for each direction, once it is used.
        executor: where transfers run instead of a thread for each direction. It must keep their order.

    Raises: ValueError for another device, or staging of no bytes.
    """

    def __init__(
        self, device: torch.device, staging_bytes: int = STAGING_BYTES, executor: Executor | None = None
    ) -> None:
        if device.type != "cpu" and not is_accelerator(device):
            raise ValueError(f"device: expected one of CUDA or ROCm, or the CPU, got {device}")
        if staging_bytes < 1:
            raise ValueError(f"staging_bytes: expected 1 or more, got {staging_bytes}")
        if is_accelerator(device) and device.index is None:
            device = torch.device(device.type, torch.cuda.current_device())
        self.device = device
        self._storing = _Lane("store", device, staging_bytes, executor)
        self._loading = _Lane("load", device, staging_bytes, executor)

    @guarded
    def store(self, blocks: Sequence[Block]) -> Transfer:
        """Seal each block's pages into its row, and write its trailer.

        The pages are read after all that the current stream has been given so far, and must stay as they are until the
        transfer is done. Its cipher's keys serve this transfer alone. Tags are computed where nobody else writes: who
        alters a row meanwhile only has it refused later.

        Raises: TypeError, ValueError naming what does not fit. The transfer raises WipedKeyError, a RuntimeError, where
        a key was wiped. Nothing is written then.
        """
        check_blocks(blocks, self.device, writes_rows=True)
        return self._storing.begin(_store, blocks)

    @guarded
    def load(self, blocks: Sequence[Block]) -> Transfer:
        """Open each block's row into its pages.

        Of a block that is refused, not one byte of the pages is written. A row is read once, into memory of this
        process alone, authenticated there and copied from there to the device. The pages are written after all that the
        current stream has been given so far; what is given to any stream once the transfer is done finds them written.

        Raises: TypeError, ValueError naming what does not fit, before anything is written.
        """
        check_blocks(blocks, self.device, writes_rows=False)
        return self._loading.begin(_load, blocks)

    def close(self) -> None:
        """Wait for all transfers, and let go of threads and staging."""
        for lane in (self._storing, self._loading):
            lane.close()


class _Lane:
    """Where transfers of one direction run: thread, stream, and stagings that take turns."""

    def __init__(self, name: str, device: torch.device, staging_bytes: int, executor: Executor | None) -> None:
        self._device, self._staging_bytes = device, staging_bytes
        self._stream = torch.cuda.Stream(device) if is_accelerator(device) else None
        self._stagings: list[Staging] = []
        self._owns = executor is None
        self._executor = executor or ThreadPoolExecutor(1, f"scx {name}")

    def begin(self, work: _Work, blocks: Sequence[Block]) -> Transfer:
        """Run `work`, once everything is done that the caller's stream has been given so far."""
        before = None if self._stream is None else torch.cuda.current_stream(self._device).record_event()
        return Transfer(self._executor.submit(self._run, work, blocks, before))

    @guarded
    def _run(self, work: _Work, blocks: Sequence[Block], before: Any) -> Outcome:
        began = time.perf_counter()
        # Caches that were made in inference mode cannot be written outside of one.
        with torch.inference_mode(), self._on_stream():
            if self._stream is not None:
                self._stream.wait_event(before)
            self._make_stagings(max((self._staging_bytes, *(block.row.nbytes for block in blocks))))
            try:
                refused, size = work(self._stagings, blocks)
            finally:
                if self._stream is not None:
                    self._stream.synchronize()  # whatever failed, the device is done with keys, staging and pages
                for staging in self._stagings:
                    staging.wipe()
        return Outcome(refused, size, time.perf_counter() - began)

    def _on_stream(self) -> AbstractContextManager[Any]:
        return nullcontext() if self._stream is None else torch.cuda.stream(self._stream)

    def _make_stagings(self, size: int) -> None:
        """On the stream that they serve, and no smaller than they were."""
        if not self._stagings or self._stagings[0].rows * ROW_BYTES < size:
            self._stagings = []
            self._stagings = [Staging(self._device, size) for _ in range(_STAGINGS)]

    def close(self) -> None:
        if self._owns:
            self._executor.shutdown()
        else:
            self._executor.submit(self._stagings.clear).result()  # behind all that was begun
        self._stagings = []


def _turns(stagings: list[Staging]) -> Iterator[Staging]:
    """Each in turn, once the device is done with it."""
    for staging in itertools.cycle(stagings):
        staging.wait()
        yield staging


def _store(stagings: list[Staging], blocks: Sequence[Block]) -> tuple[list[int], int]:
    keys, nonce, first, given = Keys(), fresh_nonce(), 0, []
    for block in blocks:
        given.append(keys.of(block, Trailer(DEVICE_FORMAT, nonce, first, b"")))
        first += padded(block.row.nbytes) // ROW_BYTES
    turns, size = _turns(stagings), 0
    staging = next(turns)
    for keyed in given:
        if not staging.has_room(keyed.block):
            staging.seal()
            staging = next(turns)
            size += staging.fill_rows()  # with what it took when it was last its turn
        staging.take(keyed)
    staging.seal()
    for staging in itertools.islice(turns, len(stagings)):
        size += staging.fill_rows()
    return [], size


def _load(stagings: list[Staging], blocks: Sequence[Block]) -> tuple[list[int], int]:
    turns, keys, refused, size = _turns(stagings), Keys(), [], 0
    staging = next(turns)
    for place, block in enumerate(blocks):
        if not staging.has_room(block):
            staging.open()
            staging = next(turns)
        if _is_taken(staging, block, keys):
            size += block.row.nbytes
        else:
            refused.append(place)
    staging.open()
    for staging in stagings:
        staging.wait()
    return refused, size


def _is_taken(staging: Staging, block: Block, keys: Keys) -> bool:
    """Whether the block is authentic; then staging has it."""
    trailer = Trailer.read(block.trailer)
    if trailer is None or trailer.format != DEVICE_FORMAT:
        return False
    if trailer.first + padded(block.row.nbytes) // ROW_BYTES > WRITE_LIMIT:
        return False
    try:
        return staging.take_authentic(keys.of(block, trailer))
    except WipedKeyError:
        return False
