"""What a sealed block is: its trailer, its one-time keys, its tag, and what is refused before anything is done.

Keys of one block come from its tenant's key by HKDF-Expand (RFC 5869) over a nonce of 24 random bytes. Two blocks of a
tenant share a key only if their nonces are equal: of 2^64 blocks, with a probability of 2^-65. A forger who offers a
block of L bytes, associated data included, is believed with one of at most 8 · ceil(L / 16) / 2^106 each time
(RFC 8439, section 4; Bernstein 2005): 2^-85 for 4 MiB.
"""

import secrets
import struct
from collections.abc import Sequence
from hmac import compare_digest
from typing import NamedTuple

import numpy as np
import torch
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.kdf.hkdf import HKDFExpand
from cryptography.hazmat.primitives.poly1305 import Poly1305
from torch import Tensor

from scx.keystream import KEY_BYTES, Secret
from scx_kernels.hidden import Hidden, WipedBytes

__all__ = [
    "DEVICE_FORMAT",
    "HOST_FORMAT",
    "NONCE_BYTES",
    "PIECE_BYTES",
    "TAG_BYTES",
    "TRAILER_BYTES",
    "Block",
    "Tag",
    "Trailer",
    "WipedKeyError",
    "check_blocks",
    "copied",
    "expand",
    "fresh_nonce",
]

HOST_FORMAT, DEVICE_FORMAT = 1, 2
NONCE_BYTES, TAG_BYTES = 24, 16
_MAGIC = b"SCXblk"
_HEAD = struct.Struct(f"<6sH{NONCE_BYTES}sQ8s")
TRAILER_BYTES = _HEAD.size + TAG_BYTES
"""Of a block's trailer, in every format: 64."""
PIECE_BYTES = 1 << 16
"""What is enciphered, authenticated and copied at a time stays in a core's nearest caches."""
_LABEL = "scx off-loaded block v1, "
_BYTES = (torch.uint8, torch.int8)


class Block(NamedTuple):
    """One block, on both sides.

    Attributes:
        pages: tensors (bytes,) uint8 or int8, contiguous, on the device; in this order they are the block's bytes.
        row: (bytes,) uint8, contiguous, where the ciphertext lies in host memory, all of the pages' bytes.
        trailer: (TRAILER_BYTES,) uint8, contiguous, beside it.
        context: associated data. What is sealed under one context opens under no other.
        key: the tenant's, from which the block's own keys are derived.
    """

    pages: Sequence[Tensor]
    row: np.ndarray
    trailer: np.ndarray
    context: bytes
    key: Secret

    def __repr__(self) -> str:
        return f"Block({len(self.pages)} pages, {self.row.nbytes} bytes)"


class Trailer(NamedTuple):
    """What is read of a trailer, once. Nothing in it is authentic before `tag` has been compared."""

    format: int
    nonce: bytes
    first: int
    tag: bytes

    @classmethod
    def read(cls, trailer: np.ndarray) -> "Trailer | None":
        """None where no trailer of any format lies."""
        held = trailer.tobytes()
        magic, kind, nonce, first, zero = _HEAD.unpack(held[: _HEAD.size])
        return cls(kind, nonce, first, held[_HEAD.size :]) if magic == _MAGIC and not any(zero) else None

    @property
    def head(self) -> bytes:
        """All before the tag. The key of the tag is derived from it."""
        return _HEAD.pack(_MAGIC, self.format, self.nonce, self.first, b"")

    def write(self, trailer: np.ndarray) -> None:
        trailer[:] = np.frombuffer(self.head + self.tag, np.uint8)


class Tag(Hidden):
    """Poly1305 over associated data and ciphertext as RFC 8439, section 2.8, composes them."""

    __slots__ = ("_context_bytes", "_mac", "_row_bytes")

    def __init__(self, key: memoryview, context: bytes) -> None:
        """key: 32 bytes that serve no other block."""
        self._mac = Poly1305(key)
        self._mac.update(context)
        self._mac.update(bytes(-len(context) % 16))
        self._context_bytes, self._row_bytes = len(context), 0

    def update(self, sealed: np.ndarray) -> None:
        """Further ciphertext. It MUST lie where nobody else writes, or the tag would not be that of what was copied."""
        self._mac.update(sealed.data)
        self._row_bytes += len(sealed)

    def finish(self) -> bytes:
        self._mac.update(bytes(-self._row_bytes % 16) + struct.pack("<QQ", self._context_bytes, self._row_bytes))
        return self._mac.finalize()

    def is_right(self, expected: bytes) -> bool:
        """In a time that does not tell where they differ."""
        return compare_digest(self.finish(), expected)


class WipedKeyError(RuntimeError):
    """A block's key was wiped: nothing is sealed under it, and it opens nothing."""

    def __init__(self) -> None:
        super().__init__("blocks: the key of one was wiped; its tenant is gone")


def fresh_nonce() -> bytes:
    return secrets.token_bytes(NONCE_BYTES)


def expand(key: Secret, purpose: str, name: bytes) -> Secret:
    """The secret of (purpose, name) below a tenant's key: HKDF-Expand (RFC 5869), which is HMAC under that key, so it
    does not matter who chose the name.

    Raises: WipedKeyError for a key that was wiped.
    """
    try:
        held = WipedBytes(key.reveal())
    except RuntimeError as error:
        raise WipedKeyError from error
    if not any(held):  # another thread is wiping it, and what is sealed under zeros is open to everybody
        raise WipedKeyError
    info = f"{_LABEL}{purpose}\0".encode() + name
    return Secret(HKDFExpand(hashes.SHA256(), KEY_BYTES, info).derive(held), purpose)


def copied(source: np.ndarray, target: np.ndarray, tag: Tag, private: np.ndarray) -> None:
    """target = source, piece by piece. What goes into the tag is read from `private`, which is that of the two where
    nobody else writes."""
    for first in range(0, len(source), PIECE_BYTES):
        piece = slice(first, first + PIECE_BYTES)
        target[piece] = source[piece]
        tag.update(private[piece])


def check_blocks(blocks: Sequence[Block], device: torch.device, *, writes_rows: bool) -> None:
    """Whether blocks can be sealed or opened on this device.

    Raises: TypeError, ValueError naming the block, its part, what was given and what was expected.
    """
    for place, block in enumerate(blocks):
        name = f"blocks[{place}]"
        size = 0
        for number, page in enumerate(block.pages):
            if not isinstance(page, Tensor):
                raise TypeError(f"{name}.pages[{number}]: expected a tensor, got {type(page).__name__}")
            if page.dtype not in _BYTES or page.dim() != 1 or not page.is_contiguous() or page.device != device:
                got = f"{tuple(page.shape)} {page.dtype} on {page.device}"
                raise ValueError(
                    f"{name}.pages[{number}]: expected (bytes,) uint8 or int8, contiguous, on {device}, got {got}"
                )
            size += page.numel()
        if not size:
            raise ValueError(f"{name}.pages: expected at least one byte, got none")
        _check_array(f"{name}.row", block.row, size, writes_rows)
        _check_array(f"{name}.trailer", block.trailer, TRAILER_BYTES, writes_rows)
        if not isinstance(block.context, bytes):
            raise TypeError(f"{name}.context: expected bytes, got {type(block.context).__name__}")
        if not isinstance(block.key, Secret):
            raise TypeError(f"{name}.key: expected a Secret, got {type(block.key).__name__}")


def _check_array(name: str, array: np.ndarray, size: int, is_written: bool) -> None:
    if not isinstance(array, np.ndarray):
        raise TypeError(f"{name}: expected an array, got {type(array).__name__}")
    if array.dtype != np.uint8 or array.shape != (size,) or not array.flags.c_contiguous:
        raise ValueError(f"{name}: expected ({size},) uint8, contiguous, got {array.shape} {array.dtype}")
    if is_written and not array.flags.writeable:
        raise ValueError(f"{name}: expected memory that can be written, got an array that is read only")
