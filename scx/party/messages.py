"""What passes between the parties' processes: messages as bytes, and readers that believe nothing.

A message is 12 bytes of lengths (big-endian: 4 for the header's, 8 for the body's), a header, and a body: the tensors,
one behind the other, as they lie in memory. The header is a JSON object:

| message | from | in its header, beside `tensors` |
|---|---|---|
| agreement | the secure side, once | `plan`, `model`: the fields of `Plan`, and the model's fingerprint |
| request | the secure side | `number`, and the fields of `Request` |
| reply | the worker | `number`, that of the request; 0 answers the agreement |
| failure | the worker, at its end | `number`, `error` |

`tensors` describes the body: name -> [dtype, shape]. A reader takes bytes from a `Fill`, which is all that it knows of
where they come from, and raises `MessageError` for whatever is not exactly the message that it waits for. A buffer is
allocated when its size is known to be right, never because a message says so.
"""

import json
import math
import struct
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, fields, replace
from typing import Any, get_args, get_type_hints

import torch
from torch import Tensor

from scx.party.boundary import INTEGERS, MESSAGES, STAGES, Request
from scx.party.plan import Plan

__all__ = [
    "Fill", "Kinds", "MessageError", "quote", "read_agreement", "read_reply", "read_request", "read_request_header",
    "source_of", "write_agreement", "write_failure", "write_reply", "write_request",
]  # fmt: skip

Fill = Callable[[memoryview], None]
"""Fills a buffer with the bytes that come next, or raises."""

MAX_HEADER_BYTES = 2**16
MAX_REQUEST_BYTES = 2**34
"""Of a request's tensors, whose sizes a worker does not know."""
_LENGTHS = struct.Struct(">IQ")
_MAX_DIMENSIONS, _MAX_SIZE = 4, 2**40
_MAX_TEXT = 200
_DTYPES = {str(x): x for x in (torch.float32, torch.float16, torch.bfloat16, torch.int64)}

Kinds = dict[str, tuple[torch.dtype, tuple[int, ...]]]
"""Dtypes and shapes of tensors, by name."""


class MessageError(ValueError):
    """Bytes that are no message, or not the message that was waited for."""


def quote(text: str) -> str:
    """What somebody else wrote, as one short line without control characters."""
    return text[:_MAX_TEXT].encode("unicode_escape").decode("ascii")[:_MAX_TEXT]


def source_of(data: bytes) -> Fill:
    """What fills buffers with these bytes, and raises MessageError behind the last one."""
    left = memoryview(data)

    def fill(buffer: memoryview) -> None:
        nonlocal left
        if len(buffer) > len(left):
            raise MessageError("it is cut off")
        buffer[:], left = left[: len(buffer)], left[len(buffer) :]

    return fill


def write_agreement(plan: Plan, fingerprint: str) -> list[memoryview]:
    """The agreement, as buffers to be sent one behind the other."""
    return _write({"plan": asdict(plan), "model": fingerprint}, {})


def write_request(number: int, request: Request) -> list[memoryview]:
    """A request, as buffers. Raises TypeError for tensors of a dtype that does not cross."""
    told = {name: value for name, value in vars(request).items() if name != "tensors"}
    return _write({"number": number, **told}, request.tensors)


def write_reply(number: int, tensors: Mapping[str, Tensor]) -> list[memoryview]:
    """The reply to a request, as buffers. Raises TypeError for tensors of a dtype that does not cross."""
    return _write({"number": number}, tensors)


def write_failure(number: int, error: Exception) -> list[memoryview]:
    """That a request failed, as buffers."""
    return _write({"number": number, "error": quote(f"{type(error).__name__}: {error}")}, {})


def read_agreement(fill: Fill) -> tuple[Plan, str]:
    """The plan, and the fingerprint of the model that a worker must have."""
    header, kinds, _ = _read_header(fill, {"plan": dict, "model": str})
    _read_tensors(fill, kinds, {})
    hints = get_type_hints(Plan)
    plan = _checked(header["plan"], {x.name: hints[x.name] for x in fields(Plan)})
    try:
        return Plan(**plan), header["model"]
    except ValueError as error:
        raise MessageError(quote(str(error))) from None


def read_request(fill: Fill, number: int) -> Request:
    """The request of that number: an operation's own tensors, of the right kind of numbers, of any sizes up to 16 GiB
    together."""
    request, kinds = read_request_header(fill, number)
    shapes = {name: shape for name, (_, shape) in kinds.items()}
    return replace(request, tensors=_read_tensors(fill, kinds, shapes))


def read_request_header(fill: Fill, number: int) -> tuple[Request, Kinds]:
    """A request without its tensors, and their dtypes and shapes by name."""
    told = {x.name: x.type for x in fields(Request) if x.name != "tensors"}
    header, kinds, body_bytes = _read_header(fill, {"number": int, **told})
    _check_number(header.pop("number"), number)
    operation = header["operation"]
    if operation not in MESSAGES or header["stage"] not in STAGES:
        raise MessageError(f"no operation of a stage: {quote(operation)}, {quote(header['stage'])}")
    if not set(kinds) <= set(MESSAGES[operation][0]):
        raise MessageError(f"{operation}: tensors {_names(kinds)} do not cross")
    if body_bytes > MAX_REQUEST_BYTES:
        raise MessageError(f"a request of {body_bytes} bytes, expected at most {MAX_REQUEST_BYTES}")
    return Request(**header, tensors={}), kinds


def read_reply(fill: Fill, number: int, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """The tensors that answer the request of that number.

    Args:
        shapes: the tensors expected, all of them, by name. Their numbers are finite; floating-point ones have at most 4
            bytes each.
    """
    header, kinds, _ = _read_header(fill, {"number": int}, optional={"error": str})
    _check_number(header["number"], number)
    if "error" in header:
        raise MessageError(f"it failed: {quote(header['error'])}")
    tensors = _read_tensors(fill, kinds, shapes)
    for name, x in tensors.items():
        # One pass, nothing allocated: both bounds are NaN where any number is.
        if x.numel() and not all(math.isfinite(bound) for bound in x.aminmax()):
            raise MessageError(f"{name} has numbers that are not finite")
    return tensors


def _write(header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> list[memoryview]:
    for name, x in tensors.items():
        if str(x.dtype) not in _DTYPES:
            raise TypeError(f"{name}: expected a tensor of {', '.join(_DTYPES)} between processes, got {x.dtype}")
    described = {name: [str(x.dtype), list(x.shape)] for name, x in tensors.items()}
    head = json.dumps({**header, "tensors": described}).encode()
    body = [_bytes_of(x.detach().cpu().contiguous()) for x in tensors.values() if x.numel()]
    return [memoryview(_LENGTHS.pack(len(head), sum(map(len, body))) + head), *body]


def _bytes_of(x: Tensor) -> memoryview:
    """The memory of a contiguous tensor on the CPU."""
    return x.reshape(-1).view(torch.uint8).numpy().data


def _read_header(
    fill: Fill, expected: Mapping[str, Any], optional: Mapping[str, Any] | None = None
) -> tuple[dict[str, Any], Kinds, int]:
    """What a header tells, the tensors that it describes, and how many bytes these take."""
    lengths = bytearray(_LENGTHS.size)
    fill(memoryview(lengths))
    head_bytes, body_bytes = _LENGTHS.unpack(lengths)
    if not 0 < head_bytes <= MAX_HEADER_BYTES:
        raise MessageError(f"a header of {head_bytes} bytes, expected at most {MAX_HEADER_BYTES}")
    head = bytearray(head_bytes)
    fill(memoryview(head))
    try:
        header = json.loads(head.decode(), object_pairs_hook=_unique, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise MessageError(f"a header that cannot be read: {quote(str(error))}") from None
    header = _checked(header, {**expected, "tensors": dict}, optional or {})
    kinds = {name: _kind(name, described) for name, described in header.pop("tensors").items()}
    described_bytes = sum(dtype.itemsize * math.prod(shape) for dtype, shape in kinds.values())
    if body_bytes != described_bytes:
        raise MessageError(f"a body of {body_bytes} bytes, its header describes {described_bytes}")
    return header, kinds, body_bytes


def _read_tensors(fill: Fill, kinds: Kinds, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    got = {name: shape for name, (_, shape) in kinds.items()}
    if got != shapes:
        raise MessageError(f"expected tensors {_names(shapes)}, got {_names(got)}")
    tensors = {name: torch.empty(shape, dtype=dtype) for name, (dtype, shape) in kinds.items()}
    for x in tensors.values():
        if x.numel():
            fill(_bytes_of(x))
    return tensors


def _kind(name: str, described: Any) -> tuple[torch.dtype, tuple[int, ...]]:
    match described:
        case [str(dtype), [*shape]] if dtype in _DTYPES and len(shape) <= _MAX_DIMENSIONS:
            is_whole = all(type(size) is int and 0 <= size <= _MAX_SIZE for size in shape)
            if is_whole and (_DTYPES[dtype] == torch.int64) == (name in INTEGERS):
                return _DTYPES[dtype], tuple(shape)
    raise MessageError(f"{quote(name)}: expected a dtype of its kind and a shape, got {quote(repr(described))}")


def _checked(given: Any, expected: Mapping[str, Any], optional: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """An object with the expected fields of the expected types, and no other."""
    optional = optional or {}
    if type(given) is not dict or not expected.keys() <= given.keys() <= expected.keys() | optional.keys():
        raise MessageError(f"expected an object with {list(expected)}, got {quote(repr(given))}")
    for name, value in given.items():
        kind = {**expected, **optional}[name]
        if type(value) not in (get_args(kind) or (kind,)):
            raise MessageError(f"{name}: expected {kind}, got {quote(repr(value))}")
    return given


def _check_number(got: int, expected: int) -> None:
    if got != expected:
        raise MessageError(f"expected message {expected}, got {quote(str(got))}")


def _unique(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    pairs = list(pairs)
    if len(dict(pairs)) != len(pairs):
        raise ValueError("a name twice")
    return dict(pairs)


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


def _names(shapes: Mapping[str, Any]) -> str:
    return quote(repr(dict(shapes)))
