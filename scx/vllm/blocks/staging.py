"""Where blocks are between device and rows: as many bytes on the device and in page-locked memory of this process."""

import itertools
import math
import threading
from typing import NamedTuple

import numpy as np
import torch

import scx_kernels as ops
from scx.keystream import Secret
from scx.vllm.blocks.block import Block, Tag, Trailer, copied, expand
from scx_kernels.operations import is_accelerator

__all__ = ["ROW_BYTES", "Keyed", "Keys", "Staging", "padded"]

ROW_BYTES = 1024
"""What of a block lies under one write number: the most that the sealing counter allows."""

_launching = threading.Lock()
"""Triton compiles a kernel when it is first launched; two threads would do it at once."""


def padded(size: int) -> int:
    """Bytes of whole rows in which so many lie."""
    return math.ceil(size / ROW_BYTES) * ROW_BYTES


class Keyed(NamedTuple):
    """A block, its trailer and its keys: its cipher's, which other blocks of a transfer may share, and its tag's."""

    block: Block
    trailer: Trailer
    cipher: Secret
    tag_key: Secret

    def tag(self) -> Tag:
        return Tag(self.tag_key.reveal(), self.block.context)


class Keys:
    """Of one transfer's blocks, those of ciphers derived once each."""

    def __init__(self) -> None:
        self._ciphers: dict[tuple[int, bytes], Secret] = {}

    def of(self, block: Block, trailer: Trailer) -> Keyed:
        """The block with the keys that a trailer names. Raises: WipedKeyError."""
        name = id(block.key), trailer.nonce  # the transfer holds its blocks, and so their tenants' keys
        if name not in self._ciphers:
            self._ciphers[name] = expand(block.key, "device, cipher", trailer.nonce)
        return Keyed(block, trailer, self._ciphers[name], expand(block.key, "device, tag", trailer.head))


class _Staged(NamedTuple):
    """A block in staging, from row `first` on."""

    keyed: Keyed
    first: int
    rows: int

    @property
    def bytes(self) -> slice:
        """Where its bytes are; the last row may be filled in part."""
        begin = self.first * ROW_BYTES
        return slice(begin, begin + self.keyed.block.row.nbytes)


class Staging:
    """Blocks are taken in, all of them work for the device is queued on the current stream, and `wait` waits for it.

    The host's part is page-locked and this process's own: nobody alters it between a tag and a copy.
    """

    def __init__(self, device: torch.device, size: int) -> None:
        rows, pins = padded(size) // ROW_BYTES, is_accelerator(device)
        self.rows = rows
        self._host = torch.empty(rows * ROW_BYTES, dtype=torch.uint8, pin_memory=pins)
        self._array = self._host.numpy()
        self._writes = torch.empty(1, rows, dtype=torch.int64, pin_memory=pins)
        self._keys = torch.empty(rows, 8, dtype=torch.int32, pin_memory=pins)
        self._device = torch.empty(rows * ROW_BYTES, dtype=torch.uint8, device=device)
        self._device_writes = torch.empty(1, rows, dtype=torch.int64, device=device)
        self._device_keys = torch.empty(rows, 8, dtype=torch.int32, device=device)
        self._zeros = torch.zeros(ROW_BYTES, dtype=torch.uint8, device=device)
        self._event = torch.cuda.Event(blocking=True) if pins else None
        self._held: list[_Staged] = []

    @property
    def _used(self) -> int:
        """Rows of what is held."""
        return self._held[-1].first + self._held[-1].rows if self._held else 0

    def has_room(self, block: Block) -> bool:
        return self._used + padded(block.row.nbytes) // ROW_BYTES <= self.rows

    def take(self, keyed: Keyed) -> None:
        """A block to be sealed."""
        self._held.append(_Staged(keyed, self._used, padded(keyed.block.row.nbytes) // ROW_BYTES))

    def take_authentic(self, keyed: Keyed) -> bool:
        """A block to be opened, if its row is authentic where it was copied to: here."""
        self.take(keyed)
        tag, sealed = keyed.tag(), self._array[self._held[-1].bytes]
        copied(keyed.block.row, sealed, tag, private=sealed)
        if tag.is_right(keyed.trailer.tag):
            return True
        del self._held[-1]
        return False

    def seal(self) -> None:
        """Queue: pages are gathered, sealed, and copied to the host."""
        if not self._held:
            return
        parts = []
        for staged in self._held:
            parts += [page.view(torch.uint8) for page in staged.keyed.block.pages]
            rest = staged.rows * ROW_BYTES - staged.keyed.block.row.nbytes
            parts += [self._zeros[:rest]] if rest else []
        end = self._used * ROW_BYTES
        torch.cat(parts, out=self._device[:end])
        self._cipher()
        self._host[:end].copy_(self._device[:end], non_blocking=True)
        self._mark()

    def open(self) -> None:
        """Queue: what was taken in is copied to the device, unsealed, and spread over its pages."""
        if not self._held:
            return
        end = self._used * ROW_BYTES
        self._device[:end].copy_(self._host[:end], non_blocking=True)
        self._cipher()
        pages, parts = [], []
        for staged in self._held:
            at = staged.bytes.start
            for page in staged.keyed.block.pages:
                part = self._device[at : at + page.numel()]
                # A copy moves numbers one by one: the wider, the fewer.
                places = (at, page.numel(), page.storage_offset(), page.data_ptr())
                is_wide = all(place % 8 == 0 for place in places)
                kind = torch.int64 if is_wide else torch.uint8
                pages.append(page.view(kind))
                parts.append(part.view(kind))
                at += page.numel()
        torch._foreach_copy_(pages, parts)
        self._device[:end].zero_()  # plain
        self._mark()
        self._held = []

    def fill_rows(self) -> int:
        """After `seal` and `wait`: tags are computed, rows and trailers written. Returns: bytes of rows."""
        size = 0
        for staged in self._held:
            block, tag = staged.keyed.block, staged.keyed.tag()
            sealed = self._array[staged.bytes]
            copied(sealed, block.row, tag, private=sealed)
            staged.keyed.trailer._replace(tag=tag.finish()).write(block.trailer)
            size += block.row.nbytes
        self._held = []
        return size

    def wait(self) -> None:
        """Until the device is done with what was queued. The thread sleeps meanwhile."""
        if self._event is not None:
            self._event.synchronize()

    def wipe(self) -> None:
        """Of one-time keys nothing stays. After `wait`."""
        self._held = []
        self._keys.zero_()
        self._device_keys.zero_()

    def _mark(self) -> None:
        if self._event is not None:
            self._event.record()

    def _cipher(self) -> None:
        """XOR of keystream in place, on the device. Neighbours of one key are one launch."""
        writes = self._writes[0].numpy()
        for staged in self._held:
            first = staged.keyed.trailer.first
            writes[staged.first : staged.first + staged.rows] = np.arange(first, first + staged.rows)
        used = self._used
        self._device_writes[:, :used].copy_(self._writes[:, :used], non_blocking=True)
        runs = [list(run) for _, run in itertools.groupby(self._held, key=lambda staged: id(staged.keyed.cipher))]
        for number, run in enumerate(runs):
            self._keys[number] = ops.key_words(run[0].keyed.cipher.reveal())
        self._device_keys[: len(runs)].copy_(self._keys[: len(runs)], non_blocking=True)
        for number, run in enumerate(runs):
            begin, end = run[0].first, run[-1].first + run[-1].rows
            x = self._device[begin * ROW_BYTES : end * ROW_BYTES].view(torch.float32).view(1, 1, end - begin, -1)
            sealing = ops.Sealing(self._device_keys[number], self._device_writes[:, begin:end], layer=0)
            with _launching:
                ops.seal(x, sealing, is_value=False, out=x)
