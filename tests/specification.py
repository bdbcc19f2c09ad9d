"""docs/formats.md once more, as code that knows nothing of this package: what tests hold its vectors against.

Python's own library alone, and the `cryptography` package for a second opinion on ChaCha20. Files are read by
`tests.specified_files`.
"""

import hmac
import struct

from cryptography.hazmat.primitives.ciphers import Cipher, algorithms

MASK = 2**32 - 1
ROUNDS = (8, 12, 20)


def hkdf(secret: bytes, info: str | bytes, salt: bytes = b"", size: int = 32) -> bytes:
    """HKDF-SHA256 (RFC 5869)."""
    extracted = hmac.digest(salt or bytes(32), secret, "sha256")
    words = info.encode() if isinstance(info, str) else info
    block = output = b""
    while len(output) < size:
        block = hmac.digest(extracted, block + words + bytes([len(output) // 32 + 1]), "sha256")
        output += block
    return output[:size]


def session_secret(master_key: bytes, session_id: bytes) -> bytes:
    return hkdf(master_key, "scx session v1", session_id)


def session_key(secret: bytes, purpose: str, branch: bytes | None = None) -> bytes:
    holder = "session" if branch is None else "branch"
    return hkdf(secret, f"scx session key v1, {holder}\0{purpose}", branch or b"")


def branch_secret(secret: bytes, branch: bytes) -> bytes:
    return hkdf(secret, "scx branch v1", branch)


def stream_key(secret: bytes, purpose: str) -> bytes:
    return hkdf(secret, f"scx keystream v2\0{purpose}")


def file_key(secret: bytes, salt: bytes, protection: str, kind: str) -> bytes:
    return hkdf(secret, f"scx container v1, {protection}\0{kind}", salt)


def stream(secret: bytes, purpose: str, layer: int, sequence: int, step: int, size: int) -> bytes:
    return chacha20_stream(stream_key(secret, purpose), (0, layer, sequence, step), size)


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
    """Words 12 to 15 of the first block of a head's row. Raises ValueError beyond the limits of a field."""
    blocks = -(-row_bytes // 64)
    if not (0 <= number < 2**60 and 0 <= layer < 2**16 and 0 <= head < 2**16 and 1 <= blocks <= 16):
        raise ValueError("a field of the counter is beyond its limit")
    return number % 2**28 * blocks, number // 2**28, head << 16 | layer, blocks - 1 | is_value << 4


def row_keystream(key: bytes, number: int, layer: int, head: int, is_value: bool, row_bytes: int, rounds: int) -> bytes:
    """Raises ValueError for a number of rounds or a place that there is not."""
    first, *rest = counter_words(number, layer, head, is_value, row_bytes)
    if rounds not in ROUNDS:
        raise ValueError(f"rounds: expected one of {ROUNDS}")
    blocks = [chacha_block(key, (first + block, *rest), rounds) for block in range(-(-row_bytes // 64))]
    return b"".join(blocks)[:row_bytes]


def write_number(epoch: int, sequence: int, count: int) -> int:
    """Raises ValueError beyond the limits of a field."""
    if not (0 <= epoch < 2**12 and 0 <= sequence < 2**16 - 1 and 0 <= count < 2**31):
        raise ValueError("a field of the write number is beyond its limit")
    return epoch << 48 | sequence << 32 | count


def xor(a: bytes, b: bytes) -> bytes:
    return bytes(x ^ y for x, y in zip(a, b, strict=True))


def feature_permutations(
    secret: bytes, layer: int, sequence: int, heads: int, head_dim: int
) -> tuple[list[list[int]], list[list[int]]]:
    """Of K and of V, one for each head: feature j of a stored row is feature index[j] of the plain one."""
    purpose, size = "feature permutations of K and V", 8 * 2 * heads * head_dim
    bits = stream(secret, purpose, layer, sequence, 0, size)
    drawn = [number for (number,) in struct.iter_unpack("<q", bits)]
    groups = [drawn[start : start + head_dim] for start in range(0, len(drawn), head_dim)]
    orders = [sorted(range(head_dim), key=group.__getitem__) for group in groups]
    return orders[:heads], orders[heads:]


def hkdf_expand(key: bytes, info: bytes) -> bytes:
    """32 bytes of HKDF-Expand (RFC 5869, section 2.3)."""
    return hmac.digest(key, info + b"\x01", "sha256")


def poly1305(key: bytes, message: bytes) -> bytes:
    """RFC 8439, section 2.5."""
    r = int.from_bytes(key[:16], "little") & 0x0FFFFFFC0FFFFFFC0FFFFFFC0FFFFFFF
    total = 0
    for start in range(0, len(message), 16):
        total = (total + int.from_bytes(message[start : start + 16] + b"\1", "little")) * r % (2**130 - 5)
    return (total + int.from_bytes(key[16:], "little") & 2**128 - 1).to_bytes(16, "little")


BLOCK_FORMATS = {"host": 1, "device": 2}
BLOCK_HEAD = struct.Struct("<6sH24sQ8s")
BLOCK_ROW = 1024


BLOCK_LABEL = "scx off-loaded block v1, "


def block_stream(kind: str, key: bytes, head: bytes, size: int) -> bytes:
    """Keystream of an off-loaded block. Raises ValueError beyond the limits."""
    _, _, nonce, first, _ = BLOCK_HEAD.unpack(head)
    if kind == "host":
        own = hkdf_expand(key, f"{BLOCK_LABEL}host\0".encode() + head)
        return chacha20_stream(own, (1, 0, 0, 0), size)
    cipher = hkdf_expand(key, f"{BLOCK_LABEL}device, cipher\0".encode() + nonce)
    rows = (row_keystream(cipher, first + row, 0, 0, False, BLOCK_ROW, 20) for row in range(-(-size // BLOCK_ROW)))
    return b"".join(rows)[:size]


def block_tag(kind: str, key: bytes, head: bytes, context: bytes, row: bytes) -> bytes:
    """RFC 8439, section 2.8."""
    if kind == "host":
        own = chacha20_stream(hkdf_expand(key, f"{BLOCK_LABEL}host\0".encode() + head), (0, 0, 0, 0), 32)
    else:
        own = hkdf_expand(key, f"{BLOCK_LABEL}device, tag\0".encode() + head)
    padded = [part + bytes(-len(part) % 16) for part in (context, row)]
    return poly1305(own, b"".join(padded) + struct.pack("<QQ", len(context), len(row)))


def block_trailer(
    kind: str, key: bytes, nonce: bytes, first: int, context: bytes, row: bytes, version: int | None = None
) -> bytes:
    head = BLOCK_HEAD.pack(b"SCXblk", version or BLOCK_FORMATS[kind], nonce, first, bytes(8))
    return head + block_tag(kind, key, head, context, row)


def seal_block(kind: str, key: bytes, nonce: bytes, first: int, context: bytes, plain: bytes) -> tuple[bytes, bytes]:
    """Row and trailer. Raises ValueError beyond the limits."""
    head = BLOCK_HEAD.pack(b"SCXblk", BLOCK_FORMATS[kind], nonce, first, bytes(8))
    row = xor(plain, block_stream(kind, key, head, len(plain)))
    return row, block_trailer(kind, key, nonce, first, context, row)


def open_block(kind: str, key: bytes, context: bytes, row: bytes, trailer: bytes) -> bytes:
    """Raises ValueError for what must be refused."""
    head, tag = trailer[: BLOCK_HEAD.size], trailer[BLOCK_HEAD.size :]
    magic, version, _, first, zeros = BLOCK_HEAD.unpack(head)
    if magic != b"SCXblk" or version != BLOCK_FORMATS[kind] or zeros != bytes(8) or (kind == "host" and first):
        raise ValueError("another format")
    stream = block_stream(kind, key, head, len(row))
    if not hmac.compare_digest(block_tag(kind, key, head, context, row), tag):
        raise ValueError("not authentic")
    return xor(row, stream)
