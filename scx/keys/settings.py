"""What keys are drawn for: public settings, and the checks of them at the door."""

from collections.abc import Iterable
from dataclasses import dataclass, fields

__all__ = [
    "BRANCH_BYTES",
    "CACHE_ENCODINGS",
    "CIPHER_ROUNDS",
    "MOST_NOISE",
    "NOISE_DISTRIBUTIONS",
    "SESSION_ID_BYTES",
    "KeySettings",
    "check_layers",
    "check_positive",
    "public_bytes",
]

SESSION_ID_BYTES = 16
BRANCH_BYTES = 16
NOISE_DISTRIBUTIONS = ("laplace", "normal")
CACHE_ENCODINGS = ("permuted", "sealed")
CIPHER_ROUNDS = (8, 12, 20)
MOST_NOISE = 40.0
"""Up to here noise cancels in float32 to within 1e-4 of the largest logit; a test holds it."""


@dataclass(frozen=True)
class KeySettings:
    """What a generator was asked for, as it applies to one model: public, and carried by every session."""

    redundant_num: int
    alp: bool
    noise_scale: float
    noise_distribution: str
    start_layers: tuple[int, ...]
    end_layers: tuple[int, ...]
    sealed_layers: tuple[int, ...] = ()
    cipher_rounds: int = 20

    def difference(self, other: "KeySettings") -> str:
        """The fields that differ, as "name a and b"; empty if none do."""
        pairs = [(f.name, getattr(self, f.name), getattr(other, f.name)) for f in fields(self)]
        return ", ".join(f"{name} {mine} and {theirs}" for name, mine, theirs in pairs if mine != theirs)


def check_layers(name: str, layers: Iterable[int] | None) -> tuple[int, ...] | None:
    if layers is None:
        return None
    given = list(layers)
    if not all(isinstance(layer, int) and not isinstance(layer, bool) and layer >= 0 for layer in given):
        raise ValueError(f"{name}: expected layer numbers from 0, got {given}")
    ordered = tuple(sorted(given))
    if ordered and ordered != tuple(range(ordered[0], ordered[0] + len(ordered))):
        raise ValueError(f"{name}: expected neighbouring layers, each once, got {given}")
    if name == "decode_start_layers" and ordered and ordered[0] != 0:
        raise ValueError(f"{name}: expected the first layers, beginning with 0, got {given}")
    return ordered


def check_positive(name: str, value: int, least: int = 1) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: expected an integer, got {type(value).__name__}")
    if value < least:
        raise ValueError(f"{name}: expected at least {least}, got {value}")
    return value


def public_bytes(name: str, value: str, size: int) -> bytes:
    """Bytes written in hexadecimal."""
    try:
        read = bytes.fromhex(value)
    except ValueError:
        read = b""
    if len(read) != size or read.hex() != value:
        raise ValueError(f"{name}: expected {size} bytes in hexadecimal, got {value!r:.80}")
    return read
