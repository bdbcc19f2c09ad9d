"""Randomness: everything secret is a function of the master key, through HKDF and ChaCha20.

HKDF-SHA256 (RFC 5869) leads down a tree, each secret to those below it and none upwards:

    master key -> session secret -> keys by purpose
                                 -> branch secret -> one-time keys by purpose

A stream is named by (purpose, layer, sequence, step). The purpose's key is a ChaCha20 key; layer, sequence and step are
the 96-bit nonce (RFC 8439), so no two streams of a secret share keystream, and every draw can be repeated on any
machine that holds the secret.
"""

import math
import secrets
import struct
from collections.abc import Callable, Sequence
from hmac import compare_digest

import torch
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from torch import Tensor

import scx_kernels as ops
from scx.devices import CPU, upload
from scx_kernels.hidden import Hidden, WipedBytes, guarded
from scx_kernels.operations import is_accelerator

__all__ = ["KEY_BYTES", "LARGEST_NORMAL", "KeyStream", "Secret", "StreamId", "derive"]

KEY_BYTES = 32
LARGEST_NORMAL = 5.5
"""No draw of `KeyStream.normal` is larger: they end at erfinv(1 - 2^-24)·√2 = 5.42."""
_LIMIT = 2**32

StreamId = tuple[int, int, int]
"""(layer, sequence, step): which stream of a purpose is meant."""


class Secret(Hidden):
    """32 secret bytes, in memory that is overwritten by `wipe`, or when nobody has it any more. Two are equal if their
    bytes are, which takes the same time wherever they differ.

    Args:
        value: 32 bytes, which are copied; drawn from the operating system if not given.
        name: of the argument that they came by, for errors.

    Raises: TypeError, ValueError for anything but 32 bytes.
    """

    __slots__ = ("_memory",)

    @guarded
    def __init__(self, value: bytes | bytearray | memoryview | None = None, name: str = "master_key") -> None:
        if value is None:
            value = secrets.token_bytes(KEY_BYTES)
        if not isinstance(value, (bytes, bytearray, memoryview)):
            raise TypeError(f"{name}: expected {KEY_BYTES} bytes, got {type(value).__name__}")
        if len(value) != KEY_BYTES:
            raise ValueError(f"{name}: expected {KEY_BYTES} bytes, got {len(value)}")
        self._memory: memoryview | None = memoryview(WipedBytes(value))

    def reveal(self) -> memoryview:
        """The bytes where they lie, to be read only; `bytes(...)` of them is a copy, which nothing wipes.

        Raises: RuntimeError once they are wiped.
        """
        if self._memory is None:
            raise RuntimeError("this secret was wiped: its session or key generator was closed")
        return self._memory.toreadonly()

    def wipe(self) -> None:
        """Overwrite the bytes with zeros, under every view of them; nothing is revealed from then on."""
        if self._memory is not None:
            self._memory[:] = bytes(KEY_BYTES)
            self._memory = None

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Secret) or self._memory is None or other._memory is None:
            return self is other
        return compare_digest(self._memory, other._memory)

    def __repr__(self) -> str:
        return "Secret(wiped)" if self._memory is None else f"Secret({KEY_BYTES} bytes)"

    def __deepcopy__(self, memo: dict) -> "Secret":
        return self


# A compiler that traced these would guard on what it sees, and print it: keys.
@torch.compiler.disable
def derive(secret: Secret, label: str, salt: bytes = b"") -> Secret:
    """The secret named by (label, salt) below `secret`, by HKDF-SHA256 (RFC 5869, `label` as its info)."""
    return Secret(HKDF(hashes.SHA256(), KEY_BYTES, salt=salt, info=label.encode()).derive(secret.reveal()), label)


class KeyStream(Hidden):
    """The random streams below one secret."""

    __slots__ = ("_purpose_keys", "_secret")

    def __init__(self, secret: Secret) -> None:
        self._secret = secret
        self._purpose_keys: dict[str, Secret] = {}

    def __repr__(self) -> str:
        return "KeyStream()"

    def wipe(self) -> None:
        """Wipe the secret and all that was derived from it here."""
        for secret in (self._secret, *self._purpose_keys.values()):
            secret.wipe()

    def _key(self, purpose: str) -> memoryview:
        key = self._purpose_keys.get(purpose)
        if key is None:
            key = self._purpose_keys[purpose] = derive(self._secret, f"scx keystream v2\0{purpose}")
        return key.reveal()

    @torch.compiler.disable
    @guarded
    def bits(
        self, purpose: str, streams: Sequence[StreamId], count: int, dtype: torch.dtype, device: torch.device = CPU
    ) -> Tensor:
        """Uniform bits: (len(streams), count) integers of `dtype` (int32 or int64) on `device`, the same bits on any.

        A GPU draws for itself: of a draw, 32 bytes of key and the names of the streams go there, not the bits.
        """
        for stream in streams:
            if not all(0 <= number < _LIMIT for number in stream):
                raise ValueError(f"stream {stream} is outside the 32-bit counters")
        if not len(streams) or not count:
            return torch.empty(len(streams), count, dtype=dtype, device=device)
        if is_accelerator(device):
            key = upload(ops.key_words(self._key(purpose)), device)
            names = upload(torch.tensor(streams, dtype=torch.int64), device)
            return ops.random_bits(key, names, count * dtype.itemsize // 4).view(dtype)
        return self._bits_of_the_library(purpose, streams, count, dtype).to(device)

    def _bits_of_the_library(self, purpose: str, streams: Sequence[StreamId], count: int, dtype: torch.dtype) -> Tensor:
        key = self._key(purpose)
        width = count * dtype.itemsize
        zeros = bytes(width)
        drawn = bytearray(width * len(streams))
        view = memoryview(drawn)
        for row, (layer, sequence, step) in enumerate(streams):
            nonce = struct.pack("<4I", 0, layer, sequence, step)
            cipher = Cipher(algorithms.ChaCha20(key, nonce), mode=None).encryptor()
            cipher.update_into(zeros, view[row * width : (row + 1) * width])
        return torch.frombuffer(drawn, dtype=dtype).view(len(streams), count)

    @guarded
    def permutations(
        self, purpose: str, streams: Sequence[StreamId], size: int, count: int = 1, device: torch.device = CPU
    ) -> Tensor:
        """(len(streams), count, size) int64 on `device`, each row a uniform permutation of 0..size-1.

        Sorts 64-bit uniform numbers; two equal ones, the only source of bias, have odds below size² / 2^65.
        """
        draws = self.bits(purpose, streams, size * count, torch.int64, device)
        return draws.view(len(streams), count, size).argsort(dim=-1)

    @guarded
    def normal(self, purpose: str, streams: Sequence[StreamId], count: int, device: torch.device = CPU) -> Tensor:
        """(len(streams), count) float32 on `device`, standard normal by inverse transform of 32-bit uniform numbers."""
        draws = self.bits(purpose, streams, count, torch.int32, device)
        below_one = 1 - 2.0**-24
        return draws.float().mul_(2.0**-31).clamp_(-below_one, below_one).erfinv_().mul_(math.sqrt(2))

    def fine_normal(self, purpose: str, streams: Sequence[StreamId], count: int, device: torch.device = CPU) -> Tensor:
        """(len(streams), count) float64 on `device`, standard normal: neighbours up to 7 are at most 2^-25 apart, and
        none is larger than 9.2."""
        return self._from_tails(lambda tail: torch.special.ndtri(tail.mul_(0.5)), purpose, streams, count, device)

    @guarded
    def laplace(self, purpose: str, streams: Sequence[StreamId], count: int, device: torch.device = CPU) -> Tensor:
        """(len(streams), count) float64 on `device`, Laplace(0, 1): neighbours up to 26 are at most 2^-25 apart, and
        none is larger than 44.4."""
        return self._from_tails(Tensor.log_, purpose, streams, count, device)

    def _from_tails(
        self,
        quantile: Callable[[Tensor], Tensor],
        purpose: str,
        streams: Sequence[StreamId],
        count: int,
        device: torch.device,
    ) -> Tensor:
        """A symmetric distribution by inverse transform of 63-bit uniform numbers and a sign: `quantile` of the
        probability of both tails is at most 0. Small probabilities, of large draws, keep float64's precision."""
        draws = self.bits(purpose, streams, count, torch.int64, device)
        below = quantile((draws & (2**63 - 1)).double().add_(0.5).mul_(2.0**-63))
        return torch.where(draws < 0, below, -below)
