"""Randomness: everything secret is a function of the master key, through HKDF and ChaCha20.

A stream is named by (session, purpose, layer, sequence, step). HKDF-SHA256 (RFC 5869) turns master key, session
and purpose into a ChaCha20 key; layer, sequence and step are the 96-bit nonce (RFC 8439), so no two streams of a
session share keystream and every draw can be repeated on any machine that holds the master key.
"""

import math
import secrets
import struct
from collections.abc import Sequence

import torch
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from torch import Tensor

__all__ = ["KEY_BYTES", "KeyStream", "Secret", "StreamId"]

KEY_BYTES = 32
_LIMIT = 2**32

StreamId = tuple[int, int, int]
"""(layer, sequence, step): which stream of a purpose is meant."""


class Secret:
    """32 secret bytes that show themselves only when asked to."""

    __slots__ = ("_value",)

    def __init__(self, value: bytes | None = None) -> None:
        if value is None:
            value = secrets.token_bytes(KEY_BYTES)
        if not isinstance(value, (bytes, bytearray)):
            raise TypeError(f"master_key: expected {KEY_BYTES} bytes, got {type(value).__name__}")
        if len(value) != KEY_BYTES:
            raise ValueError(f"master_key: expected {KEY_BYTES} bytes, got {len(value)}")
        self._value = bytes(value)

    def reveal(self) -> bytes:
        return self._value

    def __repr__(self) -> str:
        return f"Secret({KEY_BYTES} bytes)"

    def __reduce__(self) -> str:
        raise TypeError("a secret is never pickled")

    def __deepcopy__(self, memo: dict) -> "Secret":
        return self


class KeyStream:
    """The random streams of one session."""

    __slots__ = ("_purpose_keys", "_secret", "_session_id")

    def __init__(self, secret: Secret, session_id: bytes) -> None:
        self._secret = secret
        self._session_id = session_id
        self._purpose_keys: dict[str, bytes] = {}

    def __repr__(self) -> str:
        return f"KeyStream(session={self._session_id.hex()})"

    def __reduce__(self) -> str:
        raise TypeError("a key stream is never pickled")

    def _key(self, purpose: str) -> bytes:
        key = self._purpose_keys.get(purpose)
        if key is None:
            info = b"scx keystream v1\0" + purpose.encode()
            key = HKDF(hashes.SHA256(), KEY_BYTES, salt=self._session_id, info=info).derive(self._secret.reveal())
            self._purpose_keys[purpose] = key
        return key

    def bits(self, purpose: str, streams: Sequence[StreamId], count: int, dtype: torch.dtype) -> Tensor:
        """Uniform bits: (len(streams), count) integers of `dtype` (int32 or int64), on the CPU."""
        key = self._key(purpose)
        width = count * dtype.itemsize
        zeros = bytes(width)
        drawn = bytearray(width * len(streams))
        view = memoryview(drawn)
        for row, (layer, sequence, step) in enumerate(streams):
            if not (0 <= layer < _LIMIT and 0 <= sequence < _LIMIT and 0 <= step < _LIMIT):
                raise ValueError(f"stream ({layer}, {sequence}, {step}) is outside the 32-bit counters")
            nonce = struct.pack("<4I", 0, layer, sequence, step)
            cipher = Cipher(algorithms.ChaCha20(key, nonce), mode=None).encryptor()
            cipher.update_into(zeros, view[row * width : (row + 1) * width])
        if not drawn:
            return torch.empty((len(streams), count), dtype=dtype)
        return torch.frombuffer(drawn, dtype=dtype).view(len(streams), count)

    def permutations(self, purpose: str, streams: Sequence[StreamId], size: int, count: int = 1) -> Tensor:
        """(len(streams), count, size) int64, each row a uniform permutation of 0..size-1.

        Sorts 64-bit uniform numbers; two equal ones, the only source of bias, have odds below size² / 2^65.
        """
        draws = self.bits(purpose, streams, size * count, torch.int64)
        return draws.view(len(streams), count, size).argsort(dim=-1)

    def normal(self, purpose: str, streams: Sequence[StreamId], count: int) -> Tensor:
        """(len(streams), count) float32, standard normal by inverse transform of 32-bit uniform numbers."""
        draws = self.bits(purpose, streams, count, torch.int32)
        below_one = 1 - 2.0**-24
        return draws.float().mul_(2.0**-31).clamp_(-below_one, below_one).erfinv_().mul_(math.sqrt(2))

    def laplace(self, purpose: str, streams: Sequence[StreamId], count: int) -> Tensor:
        """(len(streams), count) float32, Laplace(0, 1) by inverse transform of 53-bit uniform numbers."""
        draws = self.bits(purpose, streams, count, torch.int64)
        magnitude = (draws >> 11).abs_().double().add_(0.5).mul_(2.0**-52).log_().neg_().float()
        return torch.where(draws < 0, -magnitude, magnitude)
