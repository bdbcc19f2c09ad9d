"""What somebody with write access does to the files of a conversation's blocks."""

import shutil
from collections.abc import Callable
from pathlib import Path

from scx.vllm.blocks import TRAILER_BYTES

_Alteration = Callable[..., None]


def _flip(file: Path, place: int) -> None:
    data = bytearray(file.read_bytes())
    data[place] ^= 0x10
    _write(file, data)


def _write(file: Path, data: bytes | bytearray) -> None:
    """As another process does that replaces files: at once."""
    new = file.with_suffix(".new")
    new.write_bytes(data)
    new.chmod(0o600)
    new.replace(file)


def _untouched(files: list[Path], spare: list[Path]) -> None:
    """The control: all of it is found."""


def _bit_of_payload(files: list[Path], spare: list[Path]) -> None:
    _flip(files[1], 700_001)


def _first_bit(files: list[Path], spare: list[Path]) -> None:
    for file in files:
        _flip(file, 0)


def _bit_of_trailer(files: list[Path], spare: list[Path]) -> None:
    for file in files:
        _flip(file, file.stat().st_size - TRAILER_BYTES)


def _truncated(files: list[Path], spare: list[Path]) -> None:
    data = files[0].read_bytes()
    _write(files[0], data[: len(data) - 4096])


def _swapped(files: list[Path], spare: list[Path]) -> None:
    """Whole and authentic, each in the other's place of one conversation."""
    exchange(files[:1], files[1:2])


def _replayed(files: list[Path], spare: list[Path]) -> None:
    """Whole, authentic, the same tenant's: of another prefix."""
    for file, other in zip(files, spare, strict=True):
        shutil.copyfile(other, file)


def _zeroed(files: list[Path], spare: list[Path]) -> None:
    for file in files:
        _write(file, bytes(file.stat().st_size))


def exchange(files: list[Path], others: list[Path]) -> None:
    """Each file's bytes in the other's place."""
    for one, other in zip(files, others, strict=True):
        mine, theirs = one.read_bytes(), other.read_bytes()
        _write(one, theirs)
        _write(other, mine)


ALTERATIONS: dict[str, _Alteration] = {
    "untouched": _untouched,
    "bit of payload": _bit_of_payload,
    "first bit": _first_bit,
    "bit of trailer": _bit_of_trailer,
    "truncated": _truncated,
    "swapped": _swapped,
    "replayed": _replayed,
    "zeroed": _zeroed,
}
OTHER = {kind: "untouched" for kind in ALTERATIONS}
"""Whose files are the spare ones: authentic ones of the same tenant."""
REFUSED = {"untouched": 0, "bit of payload": 1, "truncated": 0, "swapped": 2}
"""How many blocks do not authenticate, where it is not all three."""
