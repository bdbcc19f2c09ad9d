"""Headers of containers: the safetensors format's, read strictly.

A header says where each tensor lies and carries the metadata. One that says anything twice, leaves gaps, or describes
more or less than the file has, is refused before anything of the data is read or room made for it.
"""

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from io import BufferedReader
from typing import Any

import torch
from torch import Tensor

from scx.files.refusal import FileRefusedError, malformed

__all__ = ["Entry", "Header", "describe", "pack_header", "read_header", "read_json", "truncated"]

MAX_HEADER_BYTES = 2**20
_MAX_DIMENSIONS = 8
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Entry:
    """What a header says of one tensor."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    nbytes: int


@dataclass(frozen=True)
class Header:
    """A header as it was read, `raw` with the eight bytes of its length in front. Nothing in it is authentic."""

    raw: bytes
    metadata: dict[str, str]
    entries: list[Entry]

    @property
    def data_bytes(self) -> int:
        return sum(entry.nbytes for entry in self.entries)


def describe(name: str, tensor: Tensor) -> Entry:
    """The entry of a tensor. Raises TypeError for a dtype that no file holds."""
    if tensor.dtype not in _NAMES:
        raise TypeError(f"tensors: {name} has dtype {tensor.dtype}, expected one of {sorted(map(str, _NAMES))}")
    return Entry(name, tensor.dtype, tuple(tensor.shape), tensor.numel() * tensor.element_size())


def pack_header(metadata: Mapping[str, str], entries: Iterable[Entry]) -> bytes:
    """The bytes of a header, its length in front. Raises ValueError if they are too many."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    start = 0
    for entry in entries:
        offsets = [start, start + entry.nbytes]
        header[entry.name] = {"dtype": _NAMES[entry.dtype], "shape": list(entry.shape), "data_offsets": offsets}
        start += entry.nbytes
    packed = json.dumps(header, separators=(",", ":")).encode()
    packed += b" " * (-len(packed) % 8)  # the format aligns data
    if len(packed) > MAX_HEADER_BYTES:
        raise ValueError(f"tensors and metadata: {len(packed)} bytes of header, expected at most {MAX_HEADER_BYTES}")
    return len(packed).to_bytes(8, "little") + packed


def read_header(file: BufferedReader, file_bytes: int) -> Header:
    """The header of a file of this size, which is what it describes. Raises FileRefusedError."""
    length = file.read(8)
    size = int.from_bytes(length, "little")
    if len(length) < 8 or size > MAX_HEADER_BYTES:
        raise FileRefusedError("format", "the file is no safetensors file with a header of this package")
    packed = file.read(size)
    if len(packed) < size:
        raise truncated()
    metadata, entries = _parse_header(packed)
    header = Header(length + packed, metadata, entries)
    expected = len(header.raw) + header.data_bytes
    if file_bytes != expected:
        how = "truncated" if file_bytes < expected else "followed by foreign data"
        raise FileRefusedError("format", f"the file is {how}: {file_bytes} bytes, expected {expected}")
    return header


def read_json(text: str) -> Any:
    """What a JSON text says, if it says nothing twice and no number that is none.

    Raises: ValueError, RecursionError.
    """
    return json.loads(text, object_pairs_hook=_each_once, parse_constant=_no_number)


def truncated() -> FileRefusedError:
    return FileRefusedError("format", "the file is truncated, or is no file of this package")


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    read = dict(pairs)
    if len(read) < len(pairs):
        raise ValueError("an object has two members of one name")
    return read


def _no_number(word: str) -> None:
    raise ValueError(f"expected a number, got {word}")


def _parse_header(packed: bytes) -> tuple[dict[str, str], list[Entry]]:
    with malformed("the file is no safetensors file with a header of this package"):
        parsed = read_json(packed.decode())
    if not isinstance(parsed, dict):
        raise FileRefusedError("format", "the file is no safetensors file: its header is not a JSON object")
    metadata = parsed.pop("__metadata__", None)
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise FileRefusedError("format", "the file is no file of this package: its header has no metadata")
    entries, start = [], 0
    for name, described in parsed.items():
        entry = _parse_entry(name, described, start)
        entries.append(entry)
        start += entry.nbytes
    return metadata, entries


def _parse_entry(name: str, described: Any, start: int) -> Entry:
    """One tensor of the header; the tensors must lie one behind the other."""
    problem = FileRefusedError("format", f"the header describes the tensor {name!r:.80} wrongly")
    if not isinstance(described, dict) or set(described) != {"dtype", "shape", "data_offsets"}:
        raise problem
    dtype = DTYPES.get(described["dtype"]) if isinstance(described["dtype"], str) else None
    shape, offsets = described["shape"], described["data_offsets"]
    if dtype is None or not _are_whole(shape) or not _are_whole(offsets) or len(shape) > _MAX_DIMENSIONS:
        raise problem
    nbytes = dtype.itemsize * math.prod(shape)
    if max(shape, default=0) >= 2**48 or offsets != [start, start + nbytes] or nbytes >= 2**62:
        raise problem
    return Entry(name, dtype, tuple(shape), nbytes)


def _are_whole(numbers: Any) -> bool:
    """Whether these are whole numbers from 0, which True and 1.0 are not."""
    return isinstance(numbers, list) and all(type(number) is int and number >= 0 for number in numbers)
