"""Files whose every byte is authenticated: named tensors and public metadata, encrypted or not.

A container is a safetensors file, so any reader of that format shows what is public in it. Its header says, as strings:

| name | value |
|---|---|
| `format`, `version` | "scx container", "1" |
| `kind` | what the file holds, such as "session" or "cache"; each kind has keys of its own |
| `protection` | "encrypted" or "authenticated" |
| `salt` | 32 random bytes in hexadecimal, from which and the given key the file's own key is derived |
| `kdf` | "hkdf-sha256", or "scrypt n r p" where the key is a passphrase |
| anything else | the writer's metadata |

*Encrypted*: the one tensor `payload` is AES-256-GCM, of a safetensors file with the tensors in it, with everything
before it as associated data. *Authenticated*: the tensors lie as they are, one behind the other, and the last one,
`tag`, is HMAC-SHA256 over everything before it; they are written and read in one pass, without a second copy of them in
memory. Either way the file's key is used for this one file and nothing else.

Nothing read from a file is given out before all of it is authenticated, and no pickle is involved.
"""

import json
import os
import secrets
import tempfile
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import Any, BinaryIO, Literal

import safetensors.torch
import torch
from cryptography.exceptions import InvalidSignature, InvalidTag
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hmac import HMAC
from cryptography.hazmat.primitives.kdf.scrypt import Scrypt
from safetensors import SafetensorError
from torch import Tensor

from scx.keystream import Secret, derive

__all__ = ["Container", "FileRefusedError", "Reason", "read_container", "write_container"]

FORMAT = "scx container"
VERSION = 1
SALT_BYTES = 32
TAG_BYTES = 32
MAX_HEADER_BYTES = 2**20
MAX_ENCRYPTED_BYTES = 2**28
SCRYPT = (2**17, 8, 1)
"""n, r, p for new files: 128 MiB and about a third of a second."""
MAX_SCRYPT = (2**18, 8, 4)
"""What a file may ask for at most: Scrypt needs 128·n·r bytes, p times in turn."""

_RESERVED = frozenset({"format", "version", "kind", "protection", "salt", "kdf"})
_PROTECTIONS = ("encrypted", "authenticated")
_CHUNK_BYTES = 2**24
_MAX_DIMENSIONS = 8
_NONCE = bytes(12)  # each file has a key of its own, so its one nonce may be constant
_DTYPES = {
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
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}

Reason = Literal["format", "version", "kind", "key", "model", "session", "replay"]


class FileRefusedError(ValueError):
    """A file from which nothing was loaded. `reason` says why:

    "format" (not such a file, truncated, or malformed), "version" (written by a newer version), "kind" (holds something
    else), "key" (wrong key or passphrase, or altered), "model" (belongs to another model), "session" (belongs to
    another session), "replay" (older than what was asked for).
    """

    def __init__(self, reason: Reason, message: str) -> None:
        super().__init__(message)
        self.reason: Reason = reason


@dataclass(frozen=True)
class Container:
    """An authenticated file's metadata, its own names left out, and its tensors, on the CPU."""

    metadata: dict[str, str]
    tensors: dict[str, Tensor]

    def __repr__(self) -> str:
        return f"Container(metadata={sorted(self.metadata)}, tensors={sorted(self.tensors)})"


@dataclass(frozen=True)
class _Entry:
    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    nbytes: int


@dataclass(frozen=True)
class _Header:
    raw: bytes  # with the eight bytes of its length in front
    metadata: dict[str, str]
    entries: list[_Entry]

    @property
    def data_bytes(self) -> int:
        return sum(entry.nbytes for entry in self.entries)


def write_container(
    path: str | os.PathLike[str],
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str],
    *,
    kind: str,
    key: Secret | bytes | None = None,
    passphrase: str | bytes | None = None,
    encrypt: bool = True,
) -> None:
    """Write tensors and public metadata into one file that only the same key opens.

    The file appears whole or not at all, readable and writable by its owner alone.

    Args:
        path: the file; an old one of that name is replaced, but nothing that is no regular file, such as a directory,
            a device or a pipe.
        tensors: by name, dense, of any device; with `encrypt`, up to 256 MiB in all.
        metadata: public and authenticated; none of the names in the table above.
        kind: what the file holds.
        key: 32 bytes. Give either this or `passphrase`.
        passphrase: text or bytes; a slow function (Scrypt) makes the key of it.
        encrypt: whether the tensors are secret, or only authenticated.

    Raises: TypeError, ValueError naming the argument; OSError if the file cannot be written.
    """
    if _is_special(path):
        raise ValueError(f"path: expected a new name or that of a regular file, got {os.fspath(path)!r:.200}")
    reserved = sorted(_RESERVED & set(metadata))
    if reserved:
        raise ValueError(f"metadata: the names {reserved} are the container's own")
    salt = secrets.token_bytes(SALT_BYTES)
    secret, kdf = _writing_secret(key, passphrase, salt)
    own = {"format": FORMAT, "version": str(VERSION), "kind": kind, "salt": salt.hex(), "kdf": kdf}
    own["protection"] = _PROTECTIONS[0 if encrypt else 1]
    file_key = _file_key(secret, own)
    write = _write_encrypted if encrypt else _write_authenticated
    with _atomic_file(Path(path)) as file:
        write(file, {**own, **metadata}, tensors, file_key)


def read_container(
    path: str | os.PathLike[str],
    *,
    kind: str,
    key: Secret | bytes | None = None,
    passphrase: str | bytes | None = None,
    protection: str = "encrypted",
    check: Callable[[Mapping[str, str]], None] | None = None,
    max_bytes: int | None = None,
) -> Container:
    """Read and authenticate a whole file, or refuse it and load nothing.

    Args:
        path: the file.
        kind, protection: what the file must be ("encrypted" or "authenticated").
        key, passphrase: what it was written with.
        check: called with the metadata before any data is read, so that a foreign file is refused early; it may raise
            `FileRefusedError`. What it is shown is authentic once this function returns, and not before.
        max_bytes: how many bytes of data to accept; default: 256 MiB encrypted, else what the file has.

    Returns: metadata and tensors, all of them authentic.
    Raises: TypeError, ValueError naming the argument; FileRefusedError; OSError if the file cannot be read.
    """
    _check_key_arguments(key, passphrase)
    if _is_special(path):
        raise FileRefusedError("format", "the path is not a regular file")
    with open(path, "rb") as file:
        header = _read_header(file, os.fstat(file.fileno()).st_size)
        _check_identity(header.metadata, kind, protection)
        limit = MAX_ENCRYPTED_BYTES if max_bytes is None and protection == "encrypted" else max_bytes
        if limit is not None and header.data_bytes > limit:
            too_much = f"the file has {header.data_bytes} bytes of data, expected at most {limit}"
            raise FileRefusedError("format", too_much)
        metadata = {name: value for name, value in header.metadata.items() if name not in _RESERVED}
        if check is not None:
            check(metadata)
        file_key = _file_key(_reading_secret(key, passphrase, header.metadata), header.metadata)
        read = _read_encrypted if protection == "encrypted" else _read_authenticated
        return Container(metadata, read(file, header, file_key))


def _is_special(path: str | os.PathLike[str]) -> bool:
    """Whether there is something of this name that is no regular file."""
    return Path(path).exists() and not Path(path).is_file()


def _check_key_arguments(key: Secret | bytes | None, passphrase: str | bytes | None) -> None:
    if (key is None) == (passphrase is None):
        raise ValueError("give exactly one of key and passphrase")
    if key is not None and not isinstance(key, Secret):
        Secret(key, "key")
    if passphrase is not None:
        if not isinstance(passphrase, (str, bytes)):
            raise TypeError(f"passphrase: expected text or bytes, got {type(passphrase).__name__}")
        if not passphrase:
            raise ValueError("passphrase: expected at least one character, got none")


def _stretch(passphrase: str | bytes, salt: bytes, n: int, r: int, p: int) -> Secret:
    if isinstance(passphrase, str):  # the same text is typed as other code points on other systems
        passphrase = unicodedata.normalize("NFC", passphrase).encode()
    return Secret(Scrypt(salt=salt, length=32, n=n, r=r, p=p).derive(passphrase))


def _writing_secret(key: Secret | bytes | None, passphrase: str | bytes | None, salt: bytes) -> tuple[Secret, str]:
    """The secret behind the given key or passphrase, and the name of the way there."""
    _check_key_arguments(key, passphrase)
    if passphrase is not None:
        return _stretch(passphrase, salt, *SCRYPT), f"scrypt {SCRYPT[0]} {SCRYPT[1]} {SCRYPT[2]}"
    return key if isinstance(key, Secret) else Secret(key, "key"), "hkdf-sha256"


def _reading_secret(key: Secret | bytes | None, passphrase: str | bytes | None, metadata: Mapping[str, str]) -> Secret:
    words = metadata["kdf"].split(" ")
    if words == ["hkdf-sha256"]:
        if key is None:
            raise FileRefusedError("key", "the file was written with a key, not with a passphrase")
        return key if isinstance(key, Secret) else Secret(key, "key")
    if words[0] != "scrypt" or len(words) != 4 or not all(_is_number(word) for word in words[1:]):
        raise FileRefusedError("format", f"kdf: expected hkdf-sha256 or scrypt n r p, got {metadata['kdf']!r:.80}")
    if passphrase is None:
        raise FileRefusedError("key", "the file was written with a passphrase, not with a key")
    n, r, p = (int(word) for word in words[1:])
    max_n, only_r, max_p = MAX_SCRYPT
    if not 2 <= n <= max_n or n & (n - 1) or r != only_r or not 1 <= p <= max_p:
        bounds = f"kdf: {metadata['kdf']!r:.80} is out of bounds, the most is scrypt {MAX_SCRYPT}"
        raise FileRefusedError("format", bounds)
    return _stretch(passphrase, bytes.fromhex(metadata["salt"]), n, r, p)


def _is_number(word: str) -> bool:
    return word.isascii() and word.isdigit() and len(word) < 12


def _file_key(secret: Secret, metadata: Mapping[str, str]) -> Secret:
    label = f"scx container v{VERSION}, {metadata['protection']}\0{metadata['kind']}"
    return derive(secret, label, bytes.fromhex(metadata["salt"]))


def _wrong_key() -> FileRefusedError:
    return FileRefusedError("key", "the key or passphrase is wrong, or the file was altered")


def _write_encrypted(
    file: BinaryIO, metadata: Mapping[str, str], tensors: Mapping[str, Tensor], file_key: Secret
) -> None:
    plain = safetensors.torch.save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()})
    if len(plain) > MAX_ENCRYPTED_BYTES - 16:
        raise ValueError(f"tensors: {len(plain)} bytes, more than the {MAX_ENCRYPTED_BYTES} that a file may encrypt")
    header = _pack_header(metadata, [_Entry("payload", torch.uint8, (len(plain) + 16,), len(plain) + 16)])
    file.write(header)
    file.write(AESGCM(file_key.reveal()).encrypt(_NONCE, plain, header))


def _read_encrypted(file: BufferedReader, header: _Header, file_key: Secret) -> dict[str, Tensor]:
    if [(entry.name, entry.dtype) for entry in header.entries] != [("payload", torch.uint8)]:
        raise FileRefusedError("format", "an encrypted file holds one tensor, payload")
    ciphertext = file.read(header.data_bytes)
    try:
        plain = AESGCM(file_key.reveal()).decrypt(_NONCE, ciphertext, header.raw)
    except (InvalidTag, ValueError):
        raise _wrong_key() from None
    try:
        return safetensors.torch.load(plain)
    except (SafetensorError, ValueError, KeyError, RuntimeError) as error:
        raise FileRefusedError("format", f"the payload is not a safetensors file ({type(error).__name__})") from None


def _write_authenticated(
    file: BinaryIO, metadata: Mapping[str, str], tensors: Mapping[str, Tensor], file_key: Secret
) -> None:
    if "tag" in tensors:
        raise ValueError("tensors: the name tag is the container's own")
    entries = [_entry(name, tensor) for name, tensor in tensors.items()]
    header = _pack_header(metadata, [*entries, _Entry("tag", torch.uint8, (TAG_BYTES,), TAG_BYTES)])
    mac = HMAC(file_key.reveal(), hashes.SHA256())
    mac.update(header)
    file.write(header)
    for tensor in tensors.values():
        for chunk in _chunks(tensor.detach().cpu().contiguous()):
            mac.update(chunk)
            file.write(chunk)
    file.write(mac.finalize())


def _read_authenticated(file: BufferedReader, header: _Header, file_key: Secret) -> dict[str, Tensor]:
    *entries, last = header.entries or [_Entry("", torch.uint8, (), 0)]
    if (last.name, last.dtype, last.shape) != ("tag", torch.uint8, (TAG_BYTES,)):
        raise FileRefusedError("format", "an authenticated file ends with the tensor tag")
    mac = HMAC(file_key.reveal(), hashes.SHA256())
    mac.update(header.raw)
    tensors = {}
    for entry in entries:
        tensors[entry.name] = tensor = _allocate(entry)
        for chunk in _chunks(tensor):
            if file.readinto(chunk) != len(chunk):
                raise _truncated()
            mac.update(chunk)
    try:
        mac.verify(file.read(TAG_BYTES))
    except InvalidSignature:
        raise _wrong_key() from None
    return tensors


def _allocate(entry: _Entry) -> Tensor:
    try:
        return torch.empty(entry.shape, dtype=entry.dtype)
    except RuntimeError:  # a sparse file can claim more than there is memory
        raise FileRefusedError("format", f"{entry.name!r:.80} has {entry.nbytes} bytes, more than can be had") from None


def _chunks(tensor: Tensor) -> Iterator[memoryview]:
    """The bytes of a contiguous CPU tensor, without a copy."""
    flat = tensor.reshape(-1).view(torch.uint8).numpy().data
    for start in range(0, len(flat), _CHUNK_BYTES):
        yield flat[start : start + _CHUNK_BYTES]


def _entry(name: str, tensor: Tensor) -> _Entry:
    if tensor.dtype not in _NAMES:
        raise TypeError(f"tensors: {name} has dtype {tensor.dtype}, expected one of {sorted(map(str, _NAMES))}")
    return _Entry(name, tensor.dtype, tuple(tensor.shape), tensor.numel() * tensor.element_size())


def _pack_header(metadata: Mapping[str, str], entries: Iterable[_Entry]) -> bytes:
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


def _truncated() -> FileRefusedError:
    return FileRefusedError("format", "the file is truncated, or is no file of this package")


def _read_header(file: BufferedReader, file_bytes: int) -> _Header:
    length = file.read(8)
    size = int.from_bytes(length, "little")
    if len(length) < 8 or size > MAX_HEADER_BYTES:
        raise FileRefusedError("format", "the file is no safetensors file with a header of this package")
    packed = file.read(size)
    if len(packed) < size:
        raise _truncated()
    metadata, entries = _parse_header(packed)
    header = _Header(length + packed, metadata, entries)
    expected = len(header.raw) + header.data_bytes
    if file_bytes != expected:
        how = "truncated" if file_bytes < expected else "followed by foreign data"
        raise FileRefusedError("format", f"the file is {how}: {file_bytes} bytes, expected {expected}")
    return header


def _parse_header(packed: bytes) -> tuple[dict[str, str], list[_Entry]]:
    try:
        parsed = json.loads(packed.decode())
    except (ValueError, RecursionError):
        parsed = None
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


def _parse_entry(name: str, described: Any, start: int) -> _Entry:
    """One tensor of the header; the tensors must lie one behind the other."""
    problem = FileRefusedError("format", f"the header describes the tensor {name!r:.80} wrongly")
    if not isinstance(described, dict) or set(described) != {"dtype", "shape", "data_offsets"}:
        raise problem
    dtype = _DTYPES.get(described["dtype"]) if isinstance(described["dtype"], str) else None
    shape = described["shape"]
    if dtype is None or not isinstance(shape, list) or len(shape) > _MAX_DIMENSIONS:
        raise problem
    nbytes = dtype.itemsize
    for size in shape:
        if type(size) is not int or not 0 <= size < 2**48:
            raise problem
        nbytes *= size
    if described["data_offsets"] != [start, start + nbytes] or nbytes >= 2**62:
        raise problem
    return _Entry(name, dtype, tuple(shape), nbytes)


def _check_identity(metadata: Mapping[str, str], kind: str, protection: str) -> None:
    missing = sorted(_RESERVED - set(metadata))
    if metadata.get("format") != FORMAT or missing:
        raise FileRefusedError("format", "the file is no file of this package: its header does not say so")
    version = metadata["version"]
    if version != str(VERSION):
        newer = _is_number(version) and int(version) > VERSION
        why = f"version {version}, newer than {VERSION}; update this package" if newer else f"version {version!r:.80}"
        raise FileRefusedError("version", f"the file has format {why}")
    if metadata["kind"] != kind:
        raise FileRefusedError("kind", f"the file holds {metadata['kind']!r:.80}, expected {kind!r}")
    if metadata["protection"] != protection:
        raise FileRefusedError("format", f"the file is {metadata['protection']!r:.80}, expected {protection}")
    salt = metadata["salt"]
    if len(salt) != 2 * SALT_BYTES or set(salt) - set("0123456789abcdef"):
        raise FileRefusedError("format", f"salt: expected {SALT_BYTES} bytes in hexadecimal")


@contextmanager
def _atomic_file(path: Path) -> Iterator[BinaryIO]:
    """A file of mode 0600 that takes the place of `path` when all of it is on disk, and vanishes if that fails."""
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")  # mode 0600
    try:
        with os.fdopen(descriptor, "wb") as file:
            yield file
            file.flush()
            os.fsync(descriptor)
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise
    if os.name == "posix":  # else a crash may lose the new name
        directory = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)
