"""Blocks whose pages lie in host memory: ChaCha20-Poly1305 straight between pages and rows."""

import struct
import threading
import time
from collections.abc import Sequence

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, CipherContext, algorithms
from torch import Tensor

from scx.devices import CPU
from scx.vllm.blocks.block import (
    HOST_FORMAT,
    PIECE_BYTES,
    Block,
    Tag,
    Trailer,
    WipedKeyError,
    check_blocks,
    copied,
    expand,
    fresh_nonce,
)
from scx.vllm.blocks.transfer import Outcome, Transfer
from scx_kernels.chacha import BLOCK_BYTES
from scx_kernels.hidden import WipedBytes, guarded

__all__ = ["HostCipher"]

MOST_BYTES = 2**38 - 64
"""Of a block: what RFC 8439's counter of 32 bits reaches."""
_START = struct.pack("<4I", 0, 0, 0, 0)  # counter and nonce; the key serves one block


class HostCipher:
    """Seals and opens blocks in the caller's thread: what it returns is done. Any number of threads may share one."""

    def __init__(self) -> None:
        self._own = threading.local()

    @guarded
    def store(self, blocks: Sequence[Block]) -> Transfer:
        """Seal each block's pages into its row, and write its trailer.

        The tag is computed where nobody else writes: who alters the row meanwhile only has it refused later.

        Raises: TypeError, ValueError naming what does not fit, before anything is written. WipedKeyError, a
        RuntimeError, where a key was wiped; blocks before that one are sealed then.
        """
        _check(blocks, writes_rows=True)
        began = time.perf_counter()
        for block in blocks:
            self._seal(block)
        size = sum(block.row.nbytes for block in blocks)
        return Transfer.done(Outcome([], size, time.perf_counter() - began))

    @guarded
    def load(self, blocks: Sequence[Block]) -> Transfer:
        """Open each block's row into its pages.

        Of a block that is refused, not one byte of the pages is written. The row is read once, into memory of this
        thread's own, and authenticated and deciphered there.

        Raises: TypeError, ValueError naming what does not fit, before anything is written.
        """
        _check(blocks, writes_rows=False)
        began = time.perf_counter()
        is_open = [self._open(block) for block in blocks]
        size = sum(block.row.nbytes for block, opened in zip(blocks, is_open, strict=True) if opened)
        refused = [place for place, opened in enumerate(is_open) if not opened]
        return Transfer.done(Outcome(refused, size, time.perf_counter() - began))

    def close(self) -> None:
        """Nothing is under way here, and no thread or staging is held."""

    def _seal(self, block: Block) -> None:
        trailer = Trailer(HOST_FORMAT, fresh_nonce(), 0, b"")
        stream, tag = _keyed(block, trailer)
        at, private = 0, self._private(PIECE_BYTES)
        for page in block.pages:
            plain = _bytes_of(page)
            for first in range(0, len(plain), PIECE_BYTES):
                part = plain[first : first + PIECE_BYTES]
                sealed = private[: len(part)]
                stream.update_into(part.data, sealed.data)
                tag.update(sealed)
                block.row[at : at + len(part)] = sealed
                at += len(part)
        trailer._replace(tag=tag.finish()).write(block.trailer)

    def _open(self, block: Block) -> bool:
        trailer = Trailer.read(block.trailer)
        if trailer is None or trailer.format != HOST_FORMAT or trailer.first != 0:
            return False
        try:
            stream, tag = _keyed(block, trailer)
        except WipedKeyError:
            return False
        sealed = self._private(block.row.nbytes)
        copied(block.row, sealed, tag, private=sealed)
        if not tag.is_right(trailer.tag):
            return False
        at = 0
        for page in block.pages:
            plain = _bytes_of(page)
            stream.update_into(sealed[at : at + len(plain)].data, plain.data)
            at += len(plain)
        return True

    def _private(self, size: int) -> np.ndarray:
        """(size,) uint8 of this thread's, for ciphertext. New memory for every block would cost more than a copy."""
        held = getattr(self._own, "memory", None)
        if held is None or len(held) < size:
            held = self._own.memory = np.empty(size, np.uint8)
        return held[:size]


def _check(blocks: Sequence[Block], *, writes_rows: bool) -> None:
    check_blocks(blocks, CPU, writes_rows=writes_rows)
    for place, block in enumerate(blocks):
        if block.row.nbytes > MOST_BYTES:
            raise ValueError(f"blocks[{place}].row: expected at most {MOST_BYTES} bytes, got {block.row.nbytes}")


def _bytes_of(page: Tensor) -> np.ndarray:
    return page.numpy().view(np.uint8)


def _keyed(block: Block, trailer: Trailer) -> tuple[CipherContext, Tag]:
    """The block's keystream from RFC 8439's block 1 on, and its tag, whose key is the half of block 0."""
    own = expand(block.key, "host", trailer.head)
    stream = Cipher(algorithms.ChaCha20(own.reveal(), _START), mode=None).encryptor()
    first = WipedBytes(BLOCK_BYTES)
    stream.update_into(bytes(BLOCK_BYTES), first)
    return stream, Tag(memoryview(first)[:32], block.context)
