"""ChaCha in plain PyTorch, and 20 rounds of it by the `cryptography` package where that is installed.

State of sixteen 32-bit words as in RFC 8439, section 2.3: four constants, eight words of key, then words 12 to 15,
which the RFC calls counter and nonce. Tensors are int32; their sums wrap as the cipher's do.
Source: Bernstein, ChaCha, a variant of Salsa20 (2008), for 8 and 12 rounds; RFC 8439 for 20.
"""

import ctypes
import struct
from collections.abc import Sequence

import torch
from torch import Tensor

from scx_kernels.hidden import WipedBytes, guarded

try:
    from cryptography.hazmat.primitives.ciphers import Cipher, algorithms

    HAS_LIBRARY = True
except ImportError:
    HAS_LIBRARY = False

__all__ = ["BLOCK_BYTES", "HAS_LIBRARY", "ROUNDS", "chacha_blocks", "cipher_memory", "key_bytes", "key_words"]

BLOCK_BYTES = 64
ROUNDS = (8, 12, 20)
_CONSTANTS = struct.unpack("<4i", b"expand 32-byte k")
# Blocks at a time: their state stays in a core's cache.
_CHUNK = 4096


@guarded
def key_words(key: bytes | bytearray | memoryview, device: torch.device | None = None) -> Tensor:
    """32 bytes -> (8,) int32 little-endian words, what every operation here takes as a key.

    On a CPU they are overwritten when no tensor is left that shares their memory.

    Raises: TypeError, ValueError for anything but 32 bytes.
    """
    if not isinstance(key, (bytes, bytearray, memoryview)):
        raise TypeError(f"key: expected 32 bytes, got {type(key).__name__}")
    if len(key) != 32:
        raise ValueError(f"key: expected 32 bytes, got {len(key)}")
    return torch.frombuffer(WipedBytes(key), dtype=torch.int32).to(device or "cpu")


def key_bytes(key: Tensor) -> memoryview:
    """The 32 bytes of an (8,) int32 key on a CPU, where they lie."""
    return memoryview((ctypes.c_char * 32).from_address(key.data_ptr())).cast("B")


def _rotate_(x: Tensor, bits: int) -> Tensor:
    """Rotate left in place; int32 shifts right with its sign, hence the mask."""
    low = (x >> (32 - bits)).bitwise_and_((1 << bits) - 1)
    return x.bitwise_left_shift_(bits).bitwise_or_(low)


def _quarter_rounds_(a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> None:
    """Four quarter rounds at once: each argument is a row (4, M) of the state, changed in place."""
    _rotate_(d.bitwise_xor_(a.add_(b)), 16)
    _rotate_(b.bitwise_xor_(c.add_(d)), 12)
    _rotate_(d.bitwise_xor_(a.add_(b)), 8)
    _rotate_(b.bitwise_xor_(c.add_(d)), 7)


def _chunk_blocks(key: Tensor, words: Tensor, rounds: int) -> Tensor:
    constants = torch.tensor(_CONSTANTS, dtype=torch.int32, device=key.device)
    fixed = torch.cat([constants, key])[:, None].expand(12, words.shape[1])
    start = torch.cat([fixed, words]).view(4, 4, -1)
    a, b, c, d = start.clone().unbind()
    for _ in range(rounds // 2):
        _quarter_rounds_(a, b, c, d)
        # Turned by its place, row after row, the diagonals stand in columns.
        b, c, d = b.roll(-1, 0), c.roll(-2, 0), d.roll(-3, 0)
        _quarter_rounds_(a, b, c, d)
        b, c, d = b.roll(1, 0), c.roll(2, 0), d.roll(3, 0)
    return torch.cat([a, b, c, d]).add_(start.view(16, -1)).T


def chacha_blocks(key: Tensor, words: Tensor, rounds: int = 20) -> Tensor:
    """The block function.

    Args:
        key: (8,) int32. words: (4, M) int32, words 12 to 15 of M states. rounds: 8, 12 or 20.

    Returns: (M, 16) int32, M blocks of keystream.
    """
    out = torch.empty(words.shape[1], 16, dtype=torch.int32, device=key.device)
    for first in range(0, words.shape[1], _CHUNK):
        part = words[:, first : first + _CHUNK]
        out[first : first + _CHUNK] = _chunk_blocks(key, part, rounds)
    return out


def cipher_memory(key: memoryview, words: Sequence[int], source: int, target: int, size: int) -> None:
    """`size` bytes at address target = those at source XOR keystream of 20 rounds, by the library. May be in place.

    Word 12 counts up from words[0] and does not carry into word 13: the caller keeps it from wrapping. Addresses, not
    tensors: slices and buffers would take longer than a short row.
    """
    cipher = Cipher(algorithms.ChaCha20(key, struct.pack("<4I", *words)), mode=None).encryptor()
    array = ctypes.c_char * size
    read, written = (memoryview(array.from_address(address)).cast("B") for address in (source, target))
    cipher.update_into(read, written)
