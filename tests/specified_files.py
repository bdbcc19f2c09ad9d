"""Reading files as docs/formats.md says, as code that knows nothing of this package: what is in a right file, and for
what a wrong one is refused.

Python's own library alone, and for AES-256-GCM the `cryptography` package.
"""

import hashlib
import hmac
import json
import math
import struct
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from tests import specification

DTYPES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}
RESERVED = {"format", "version", "kind", "protection", "salt", "kdf"}
SHAPE = {"num_layers", "hidden_size", "num_heads", "num_kv_heads", "head_dim", "vocab_size"}
SETTINGS = {
    "redundant_num", "alp", "noise_scale", "noise_distribution", "start_layers", "end_layers", "sealed_layers",
    "cipher_rounds",
}  # fmt: skip
LAYERS: dict[str, set[str]] = {
    "full": set(),
    "sealed": {"branch"},
    "sliding": {"window", "length", "records_past"},
    "sealed sliding": {"window", "length", "records_past", "branch"},
}
Tensors = dict[str, tuple[str, list[int], bytes]]
"""Name -> dtype, shape, bytes."""
Entries = dict[str, tuple[str, list[int], int, int]]
"""Name -> dtype, shape, first and end offset."""


class Refused(Exception):
    """A file from which nothing is loaded, and the reason."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


@dataclass(frozen=True)
class File:
    metadata: dict[str, str]
    tensors: Tensors
    key: bytes
    """The file's own."""

    def numbers(self, name: str) -> list[int]:
        """An int64 tensor's elements."""
        return [number for (number,) in struct.iter_unpack("<q", self.tensors[name][2])]


def need(holds: bool, reason: str = "format") -> None:
    if not holds:
        raise Refused(reason)


def read_json(text: str) -> Any:
    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        need(len({name for name, _ in pairs}) == len(pairs))
        return dict(pairs)

    def no_number(word: str) -> None:
        raise Refused("format")

    try:
        return json.loads(text, object_pairs_hook=once, parse_constant=no_number)
    except (ValueError, RecursionError):
        raise Refused("format") from None


def is_whole(number: Any, least: int = 0, end: int = 2**31) -> bool:
    return type(number) is int and least <= number < end


def decimal(word: str, least: int, end: int = 2**31) -> int:
    need(word.isascii() and word.isdigit() and len(word) < 12)
    need(is_whole(int(word), least, end))
    return int(word)


def is_hexadecimal(word: Any, size: int) -> bool:
    return isinstance(word, str) and len(word) == 2 * size and not set(word) - set("0123456789abcdef")


def split_header(data: bytes) -> tuple[dict[str, Any], int]:
    """The header's object, and where data begins."""
    need(len(data) >= 8)
    start = 8 + int.from_bytes(data[:8], "little")
    need(start <= 8 + 2**20 and start <= len(data))
    try:
        header = read_json(data[8:start].decode())
    except UnicodeDecodeError:
        raise Refused("format") from None
    need(isinstance(header, dict))
    return header, start


def entries_of(header: dict[str, Any]) -> Entries:
    """What a container's header says of its tensors."""
    entries, start = {}, 0
    for name, entry in header.items():
        need(isinstance(entry, dict) and entry.keys() == {"dtype", "shape", "data_offsets"})
        dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
        need(isinstance(dtype, str) and dtype in DTYPES)
        need(isinstance(shape, list) and len(shape) <= 8 and all(is_whole(size, 0, 2**48) for size in shape))
        end = start + math.prod(shape) * DTYPES[dtype]
        need(isinstance(offsets, list) and all(type(x) is int for x in offsets) and offsets == [start, end])
        entries[name] = dtype, shape, start, end
        start = end
    return entries


def read(
    data: bytes,
    kind: str,
    protection: str,
    *,
    key: bytes | None = None,
    passphrase: str | None = None,
    most_bytes: int = 2**28,
    early: Callable[[dict[str, str], Entries], None] = lambda metadata, entries: None,
) -> File:
    """A container's metadata and tensors. Raises Refused."""
    header, start = split_header(data)
    metadata = header.pop("__metadata__", None)
    need(isinstance(metadata, dict) and all(isinstance(word, str) for word in metadata.values()))
    entries = entries_of(header)
    size = max((end for *_, end in entries.values()), default=0)
    need(len(data) == start + size)
    need(metadata.get("format") == "scx container" and metadata.keys() >= RESERVED)
    need(metadata["version"] == "1", "version")
    need(metadata["kind"] == kind, "kind")
    need(metadata["protection"] == protection and is_hexadecimal(metadata["salt"], 32))
    early(metadata, entries)
    need(size <= most_bytes)
    salt = bytes.fromhex(metadata["salt"])
    own = specification.file_key(secret_of(metadata["kdf"], key, passphrase, salt), salt, protection, kind)
    if protection == "encrypted":
        need([(name, dtype, len(shape)) for name, (dtype, shape, *_) in entries.items()] == [("payload", "U8", 1)])
        try:
            plain = AESGCM(own).decrypt(bytes(12), data[start:], data[:start])
        except (InvalidTag, ValueError):
            raise Refused("key") from None
        return File(metadata, unpack(plain), own)
    need(list(entries.items())[-1:] == [("tag", ("U8", [32], size - 32, size))])
    need(hmac.compare_digest(data[-32:], hmac.digest(own, data[:-32], "sha256")), "key")
    tensors = {name: (dtype, shape, data[start + a : start + b]) for name, (dtype, shape, a, b) in entries.items()}
    del tensors["tag"]
    return File(metadata, tensors, own)


def secret_of(kdf: str, key: bytes | None, passphrase: str | None, salt: bytes) -> bytes:
    if kdf == "hkdf-sha256":
        need(key is not None, "key")
        return key or b""
    name, *numbers = kdf.split(" ")
    need(name == "scrypt" and len(numbers) == 3)
    need(all(number.isascii() and number.isdigit() and len(number) < 12 for number in numbers))
    need(passphrase is not None, "key")
    n, r, p = map(int, numbers)
    need(n in [2**power for power in range(1, 19)] and r == 8 and 1 <= p <= 4)
    text = unicodedata.normalize("NFC", passphrase or "").encode()
    return hashlib.scrypt(text, salt=salt, n=n, r=r, p=p, maxmem=2**29, dklen=32)


def unpack(plain: bytes) -> Tensors:
    """The tensors of a safetensors file, which may describe them in any order."""
    header, start = split_header(plain)
    metadata = header.pop("__metadata__", {})
    need(isinstance(metadata, dict) and all(isinstance(word, str) for word in metadata.values()))
    for entry in header.values():
        need(isinstance(entry, dict) and isinstance(entry.get("data_offsets"), list))
        need(all(type(offset) is int for offset in entry["data_offsets"]))
    entries = entries_of(dict(sorted(header.items(), key=lambda item: item[1]["data_offsets"])))
    need(len(plain) == start + max((end for *_, end in entries.values()), default=0))
    return {name: (dtype, shape, plain[start + a : start + b]) for name, (dtype, shape, a, b) in entries.items()}


def read_session(
    data: bytes, *, key: bytes | None = None, passphrase: str | None = None, model: str | None = None
) -> File:
    """A file of the kind `session`. Raises Refused."""

    def early(metadata: dict[str, str], entries: Entries) -> None:
        need(model is None or metadata.get("model") == model, "model")

    file = read(data, "session", "encrypted", key=key, passphrase=passphrase, most_bytes=4096, early=early)
    words = file.metadata
    need({name: tensor[:2] for name, tensor in file.tensors.items()} == {"secret": ("U8", [32])})
    need(words.keys() >= {"session", "model", "batch_size", "newest_save", "shape", "settings"})
    need(is_hexadecimal(words["session"], 16))
    decimal(words["batch_size"], 1)
    decimal(words["newest_save"], 0)
    shape, settings = read_json(words["shape"]), read_json(words["settings"])
    check_shape(shape)
    need(words["model"] == shape["fingerprint"])
    check_settings(settings, shape["num_layers"])
    return file


def check_shape(shape: Any) -> None:
    need(isinstance(shape, dict) and shape.keys() == SHAPE | {"first_norm_rms", "fingerprint"})
    need(all(is_whole(shape[name], 1) for name in SHAPE) and isinstance(shape["fingerprint"], str))
    need(shape["num_heads"] % shape["num_kv_heads"] == 0)
    need(type(shape["first_norm_rms"]) in (int, float) and 0 < shape["first_norm_rms"] < 1e9)


def check_settings(settings: Any, layers: int) -> None:
    need(isinstance(settings, dict) and settings.keys() == SETTINGS)
    need(is_whole(settings["redundant_num"]) and type(settings["alp"]) is bool)
    need(type(settings["noise_scale"]) in (int, float) and 0 < settings["noise_scale"] < 1e4)
    need(settings["noise_distribution"] in ("laplace", "normal"))
    need(type(settings["cipher_rounds"]) is int and settings["cipher_rounds"] in specification.ROUNDS)
    start, end, sealed = (settings[f"{name}_layers"] for name in ("start", "end", "sealed"))
    for named in (start, end, sealed):
        need(isinstance(named, list) and all(is_whole(layer, 0, layers) for layer in named))
        need(sorted(set(named)) == named)
    need(start == list(range(len(start))) and end == list(range(layers - len(end), layers)))
    need(len(start) + len(end) <= layers)


def read_cache(
    data: bytes, *, key: bytes, session: str, shape: dict[str, Any], settings: dict[str, Any], batch_size: int,
    newest_save: int,
) -> File:  # fmt: skip
    """A file of the kind `cache`, for a session of which the file of its keys says this. Raises Refused."""

    def early(metadata: dict[str, str], entries: Entries) -> None:
        need(metadata.get("session") == session, "session")
        need(metadata.get("model") == shape["fingerprint"], "model")
        need(decimal(metadata.get("number", ""), 1) >= newest_save, "replay")
        need("layers" in metadata)
        check_layers(read_json(metadata["layers"]), entries, shape, settings["sealed_layers"], batch_size)

    file = read(data, "cache", "authenticated", key=key, most_bytes=2**62, early=early)
    for name in file.tensors:
        limit = batch_size if name == "sequences" else 2**63 if name.endswith(".writes") else None
        need(limit is None or all(0 <= number < limit for number in file.numbers(name)))
    return file


def check_layers(layers: Any, entries: Entries, shape: dict[str, Any], sealed: list[int], rows: int) -> None:
    need(isinstance(layers, list) and len(layers) == shape["num_layers"])
    got = {name: (dtype, sizes) for name, (dtype, sizes, *_) in entries.items() if name != "tag"}
    expected: dict[str, Any] = {}
    need("layers.0.keys" in got)
    dtype = got["layers.0.keys"][0]
    need(dtype in ("F32", "F16", "BF16"))
    if "sequences" in got:
        rows = math.prod(got["sequences"][1])
        expected["sequences"] = "I64", [rows]
    lengths = set()
    for index, layer in enumerate(layers):
        need(isinstance(layer, dict) and isinstance(layer.get("kind"), str) and layer["kind"] in LAYERS)
        need(layer.keys() == {"kind"} | LAYERS[layer["kind"]])
        need(("branch" in layer) == (index in sealed))
        need("branch" not in layer or is_hexadecimal(layer["branch"], 16))
        need(len(got.get(f"layers.{index}.keys", ("", []))[1]) == 4)
        tokens = got[f"layers.{index}.keys"][1][2]
        if "window" in layer:
            need(is_whole(layer["window"], 2) and is_whole(layer["length"]) and type(layer["records_past"]) is bool)
            need(min(layer["length"], layer["window"] - 1) <= tokens <= layer["length"])
        lengths.add(layer.get("length", tokens))
        sizes = [rows, shape["num_kv_heads"], tokens, shape["head_dim"]]
        expected |= {f"layers.{index}.{name}": (dtype, sizes) for name in ("keys", "values")}
        expected |= {f"layers.{index}.writes": ("I64", [rows, tokens])} if "branch" in layer else {}
    need(got == expected and all(0 not in sizes for _, sizes in got.values()) and len(lengths) == 1)


def read_shared_keys(
    data: bytes, *, key: bytes | None = None, passphrase: str | None = None, session: str | None = None
) -> File:
    """A file of the kind `shared keys`. Raises Refused."""

    def early(metadata: dict[str, str], entries: Entries) -> None:
        need(session is None or metadata.get("session") == session, "session")

    file = read(data, "shared keys", "encrypted", key=key, passphrase=passphrase, most_bytes=2**26, early=early)
    need(file.metadata.keys() >= {"session", "model", "blocks"})
    blocks, tensors = read_json(file.metadata["blocks"]), file.tensors
    need(isinstance(blocks, list) and all(is_whole(block, 0, 2**16) for block in blocks))
    need(tensors.keys() == {"token_position", "positions"})
    need(all(tensor[0] == "I64" for tensor in tensors.values()))
    index, positions = (tensors[name][1] for name in ("token_position", "positions"))
    need(len(index) == 3 and index[0] == len(blocks) and 0 not in index[1:])
    need(len(positions) == 2 and positions[0] in (1, index[1]) and positions[1] == index[2])
    need(all(number >= 0 for name in tensors for number in file.numbers(name)))
    return file
