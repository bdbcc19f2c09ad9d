"""docs/formats.md once more, as code that knows nothing of this package: what tests hold its files and vectors against.

Python's own library alone, and for AES-256-GCM and a second opinion on ChaCha20 the `cryptography` package. It reads
right files; what wrong ones must be refused for is the manifest's business.
"""

import hashlib
import hmac
import json
import struct
from dataclasses import dataclass
from pathlib import Path

from cryptography.hazmat.primitives.ciphers import Cipher, algorithms
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

MASK = 2**32 - 1


def hkdf(secret: bytes, info: str, salt: bytes = b"") -> bytes:
    """HKDF-SHA256 (RFC 5869), 32 bytes: one block of its expansion."""
    extracted = hmac.digest(salt or bytes(32), secret, "sha256")
    return hmac.digest(extracted, info.encode() + b"\x01", "sha256")


def session_secret(master_key: bytes, session_id: bytes) -> bytes:
    return hkdf(master_key, "scx session v1", session_id)


def session_key(secret: bytes, purpose: str, branch: bytes | None = None) -> bytes:
    holder = "session" if branch is None else "branch"
    return hkdf(secret, f"scx session key v1, {holder}\0{purpose}", branch or b"")


@dataclass(frozen=True)
class File:
    metadata: dict[str, str]
    tensors: dict[str, tuple[str, list[int], bytes]]
    """Name -> dtype, shape, bytes."""

    def numbers(self, name: str) -> list[int]:
        """An int64 tensor's elements."""
        return [number for (number,) in struct.iter_unpack("<q", self.tensors[name][2])]


def split(data: bytes) -> tuple[dict[str, str], dict[str, tuple[str, list[int], bytes]], int]:
    """Metadata, tensors and the length of the header of a safetensors file."""
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    metadata = header.pop("__metadata__", {})
    tensors = {}
    for name, entry in header.items():
        first, end = entry["data_offsets"]
        tensors[name] = entry["dtype"], entry["shape"], data[start + first : start + end]
    return metadata, tensors, start


def file_key(metadata: dict[str, str], key: bytes | None, passphrase: str | None) -> bytes:
    salt = bytes.fromhex(metadata["salt"])
    if passphrase is not None:
        n, r, p = map(int, metadata["kdf"].removeprefix("scrypt ").split(" "))
        key = hashlib.scrypt(passphrase.encode(), salt=salt, n=n, r=r, p=p, maxmem=2**29, dklen=32)
    assert key is not None
    return hkdf(key, f"scx container v1, {metadata['protection']}\0{metadata['kind']}", salt)


def read(path: Path, *, key: bytes | None = None, passphrase: str | None = None) -> File:
    """A right file of either protection."""
    data = path.read_bytes()
    metadata, tensors, start = split(data)
    own = file_key(metadata, key, passphrase)
    if metadata["protection"] == "encrypted":
        plain = AESGCM(own).decrypt(bytes(12), data[start:], data[:start])
        return File(metadata, split(plain)[1])
    assert hmac.compare_digest(data[-32:], hmac.digest(own, data[:-32], "sha256"))
    return File(metadata, tensors)


def chacha_block(key: bytes, words: tuple[int, ...], rounds: int) -> bytes:
    """64 bytes of keystream; `words` are words 12 to 15 of the state (RFC 8439, section 2.3)."""
    state = [*struct.unpack("<4I", b"expand 32-byte k"), *struct.unpack("<8I", key), *words]
    x = list(state)

    def quarter(*places: int) -> None:
        a, b, c, d = places
        for one, two, three, bits in ((a, b, d, 16), (c, d, b, 12), (a, b, d, 8), (c, d, b, 7)):
            x[one] = x[one] + x[two] & MASK
            turned = x[three] ^ x[one]
            x[three] = (turned << bits | turned >> 32 - bits) & MASK

    for _ in range(rounds // 2):
        for column in range(4):
            quarter(*(column + 4 * row for row in range(4)))
        for column in range(4):
            quarter(*((column + row) % 4 + 4 * row for row in range(4)))
    return struct.pack("<16I", *(a + b & MASK for a, b in zip(x, state, strict=True)))


def chacha20_stream(key: bytes, words: tuple[int, ...], size: int) -> bytes:
    """Keystream of 20 rounds by the library, from the block that `words` name on."""
    return Cipher(algorithms.ChaCha20(key, struct.pack("<4I", *words)), mode=None).encryptor().update(bytes(size))


def counter_words(number: int, layer: int, head: int, is_value: bool, row_bytes: int) -> tuple[int, int, int, int]:
    """Words 12 to 15 of the first block of a head's row."""
    blocks = -(-row_bytes // 64)
    return number % 2**28 * blocks, number // 2**28, head << 16 | layer, blocks - 1 | is_value << 4


def row_keystream(key: bytes, number: int, layer: int, head: int, is_value: bool, row_bytes: int, rounds: int) -> bytes:
    first, *rest = counter_words(number, layer, head, is_value, row_bytes)
    blocks = [chacha_block(key, (first + block, *rest), rounds) for block in range(-(-row_bytes // 64))]
    return b"".join(blocks)[:row_bytes]


def xor(a: bytes, b: bytes) -> bytes:
    return bytes(x ^ y for x, y in zip(a, b, strict=True))


def feature_permutations(
    secret: bytes, layer: int, sequence: int, heads: int, head_dim: int
) -> tuple[list[list[int]], list[list[int]]]:
    """Of K and of V, one for each head: feature j of a stored row is feature index[j] of the plain one."""
    key = hkdf(secret, "scx keystream v2\0feature permutations of K and V")
    stream = chacha20_stream(key, (0, layer, sequence, 0), 8 * 2 * heads * head_dim)
    drawn = [number for (number,) in struct.iter_unpack("<q", stream)]
    groups = [drawn[start : start + head_dim] for start in range(0, len(drawn), head_dim)]
    orders = [sorted(range(head_dim), key=group.__getitem__) for group in groups]
    return orders[:heads], orders[heads:]
