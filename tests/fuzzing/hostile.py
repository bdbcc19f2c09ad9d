"""Hostile bytes: right ones with something done to them, by somebody without the key or with it."""

import hmac
import json
import struct
from collections.abc import Sequence
from typing import Any

from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from hypothesis import strategies as st

from tests import specification
from tests.golden.wrong_files import Parts

__all__ = ["files", "json_texts", "messages", "mutated"]

_NUMBERS = st.sampled_from([0, 1, -1, 2**16, 2**31 - 1, 2**31, 2**48, 2**63, 2**64, 10**40]) | st.integers(-9, 300)
_WORDS = st.sampled_from(["", "0", "1", "-1", "+2", "٣", "\ud800", "\0", "\x1b[2J", "U8", "F32", "I64", "encrypted"])
_LEAVES = st.none() | st.booleans() | _NUMBERS | st.floats() | _WORDS | st.text(max_size=8)
_VALUES = st.recursive(
    _LEAVES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_WORDS, inner, max_size=3), max_leaves=6
)
"""What may stand in JSON, and what may not."""


@st.composite
def mutated(draw: st.DrawFn, data: bytes, others: Sequence[bytes] = ()) -> bytes:
    """Bits and bytes changed, pieces cut out, put in, repeated and taken from other files."""
    changed = bytearray(data)
    for _ in range(draw(st.integers(1, 3))):
        first = draw(st.integers(0, len(changed)))
        last = draw(st.integers(first, min(first + 64, len(changed))))
        match draw(st.integers(0, 5)):
            case 0 if first < len(changed):
                changed[first] ^= 1 << draw(st.integers(0, 7))
            case 1:
                changed[first:last] = draw(st.binary(max_size=16))
            case 2:
                del changed[first:]
            case 3:
                changed[first:first] = changed[first:last]
            case 4 if others:
                changed[first:last] = draw(st.sampled_from(others))[first:last]
            case _:
                changed[first : first + 8] = draw(_NUMBERS).to_bytes(20, "little", signed=True)[:8]
    return bytes(changed)


@st.composite
def json_edits(draw: st.DrawFn, tree: Any) -> Any:
    """A JSON value with one of its parts replaced, renamed or taken out; texts that hold JSON are gone into."""
    if isinstance(tree, str) and tree[:1] in ("{", "[") and draw(st.booleans()):
        return json.dumps(draw(json_edits(json.loads(tree))))
    if isinstance(tree, (dict, list)) and tree and draw(st.integers(0, 7)):
        place = draw(st.sampled_from(sorted(tree) if isinstance(tree, dict) else range(len(tree))))
        edited = tree.copy()
        match draw(st.integers(0, 5)):
            case 0:
                del edited[place]
            case 1 if isinstance(edited, dict):
                edited[draw(_WORDS)] = edited.pop(place)
            case _:
                edited[place] = draw(json_edits(tree[place]))
        return edited
    return draw(_VALUES)


def _own_key(parts: Parts, secret: bytes) -> bytes:
    words = parts.header["__metadata__"]
    return specification.file_key(secret, bytes.fromhex(words["salt"]), words["protection"], words["kind"])


_KEPT = ("salt", "protection", "kind")


@st.composite
def files(draw: st.DrawFn, right: bytes, secret: bytes, others: Sequence[bytes]) -> bytes:
    """A container that is hostile.

    Args:
        right: a right one. secret: the key that it was written with. others: files to splice with.
    """
    parts = Parts.of(right)
    edited = draw(json_edits(parts.header))
    match draw(st.integers(0, 4)):
        case 0:
            return draw(mutated(right, others))
        case 1:  # without the key
            return Parts(edited, parts.data).pack()
    if not isinstance(edited, dict) or not isinstance(edited.get("__metadata__"), dict):
        return Parts(edited, parts.data).pack()
    edited["__metadata__"] |= {name: parts.header["__metadata__"][name] for name in _KEPT}
    own = _own_key(parts, secret)
    if "tag" in parts.header:
        unsigned = Parts(edited, parts.data[:-32]).pack()
        return unsigned + hmac.digest(own, unsigned, "sha256")
    plain = AESGCM(own).decrypt(bytes(12), parts.data, Parts(parts.header, b"").pack())
    if draw(st.booleans()):
        inner = Parts.of(plain)
        plain = draw(mutated(plain) | json_edits(inner.header).map(lambda header: Parts(header, inner.data).pack()))
    size = len(plain) + 16
    if draw(st.integers(0, 3)):
        edited["payload"] = {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}
    head = Parts(edited, b"").pack()
    return head + AESGCM(own).encrypt(bytes(12), plain, head)


@st.composite
def messages(draw: st.DrawFn, right: bytes) -> bytes:
    """A message between the parties that is hostile: `right` is one that is not."""
    if draw(st.booleans()):
        return draw(mutated(right))
    start = 12 + struct.unpack(">IQ", right[:12])[0]
    head, body = json.dumps(draw(json_edits(json.loads(right[12:start])))).encode(), right[start:]
    if draw(st.booleans()):
        body = draw(mutated(body))
    return struct.pack(">IQ", len(head), len(body)) + head + body


@st.composite
def json_texts(draw: st.DrawFn, right: Any) -> bytes:
    """JSON that is hostile: `right` is a value that is not."""
    if draw(st.booleans()):
        return draw(mutated(json.dumps(right).encode()))
    return json.dumps(draw(json_edits(right))).encode()
