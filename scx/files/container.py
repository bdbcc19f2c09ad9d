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

import os
import secrets
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from io import BufferedReader
from typing import BinaryIO

import safetensors.torch
import torch
from cryptography.exceptions import InvalidSignature, InvalidTag
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hmac import HMAC
from cryptography.hazmat.primitives.kdf.scrypt import Scrypt
from safetensors import SafetensorError
from torch import Tensor

from scx.files.disk import atomic_file, destination, open_regular
from scx.files.header import Entry, Header, describe, pack_header, read_header, truncated
from scx.files.refusal import FileRefusedError
from scx.keystream import Secret, derive
from scx_kernels.hidden import guarded

__all__ = ["Container", "EarlyCheck", "is_number", "read_container", "write_container"]

FORMAT = "scx container"
VERSION = 1
SALT_BYTES = 32
TAG_BYTES = 32
MAX_ENCRYPTED_BYTES = 2**28
SCRYPT = (2**17, 8, 1)
"""n, r, p for new files: 128 MiB and about a third of a second."""
MAX_SCRYPT = (2**18, 8, 4)
"""What a file may ask for at most: Scrypt needs 128·n·r bytes, p times in turn."""

_RESERVED = frozenset({"format", "version", "kind", "protection", "salt", "kdf"})
_PROTECTIONS = ("encrypted", "authenticated")
_CHUNK_BYTES = 2**24
_NONCE = bytes(12)  # each file has a key of its own, so its one nonce may be constant


EarlyCheck = Callable[[Mapping[str, str], Sequence[Entry]], None]
"""Called with the metadata and what the header says of the tensors, before any of them is read; may raise
`FileRefusedError`, so that a foreign or too large file is refused early. What it is shown is authentic once the file
has been read, and not before."""


@dataclass(frozen=True)
class Container:
    """An authenticated file's metadata, its own names left out, and its tensors, on the CPU."""

    metadata: dict[str, str]
    tensors: dict[str, Tensor]

    def __repr__(self) -> str:
        return f"Container(metadata={sorted(self.metadata)}, tensors={sorted(self.tensors)})"


@guarded
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
        path: the file; an old one of that name is replaced. A link stays, and the file that it names is replaced or
            made; other names of an old file (hard links) keep what they held. Nothing that is no regular file, such as
            a directory, a device, a pipe or a socket, is touched.
        tensors: by name, dense, of any device; with `encrypt`, up to 256 MiB in all.
        metadata: public and authenticated; none of the names in the table above.
        kind: what the file holds.
        key: 32 bytes. Give either this or `passphrase`.
        passphrase: text or bytes; a slow function (Scrypt) makes the key of it.
        encrypt: whether the tensors are secret, or only authenticated.

    Raises: TypeError, ValueError naming the argument; OSError if the file cannot be written.
    """
    place = destination(path)
    reserved = sorted(_RESERVED & set(metadata))
    if reserved:
        raise ValueError(f"metadata: the names {reserved} are the container's own")
    salt = secrets.token_bytes(SALT_BYTES)
    secret, kdf = _writing_secret(key, passphrase, salt)
    own = {"format": FORMAT, "version": str(VERSION), "kind": kind, "salt": salt.hex(), "kdf": kdf}
    own["protection"] = _PROTECTIONS[0 if encrypt else 1]
    file_key = _file_key(secret, own)
    write = _write_encrypted if encrypt else _write_authenticated
    with atomic_file(place) as file:
        write(file, {**own, **metadata}, tensors, file_key)


@guarded
def read_container(
    path: str | os.PathLike[str],
    *,
    kind: str,
    key: Secret | bytes | None = None,
    passphrase: str | bytes | None = None,
    protection: str = "encrypted",
    check: EarlyCheck | None = None,
    max_bytes: int | None = None,
) -> Container:
    """Read and authenticate a whole file, or refuse it and load nothing.

    Args:
        path: the file.
        kind, protection: what the file must be ("encrypted" or "authenticated").
        key, passphrase: what it was written with.
        check: what the kind checks before any data is read.
        max_bytes: how many bytes of data to accept; default: 256 MiB encrypted, else what the file has.

    Returns: metadata and tensors, all of them authentic.
    Raises: TypeError, ValueError naming the argument; FileRefusedError; OSError if the file cannot be read.
    """
    _check_key_arguments(key, passphrase)
    with open_regular(path) as (file, file_bytes):
        header = read_header(file, file_bytes)
        _check_identity(header.metadata, kind, protection)
        metadata = {name: value for name, value in header.metadata.items() if name not in _RESERVED}
        if check is not None:
            check(metadata, header.entries)
        limit = MAX_ENCRYPTED_BYTES if max_bytes is None and protection == "encrypted" else max_bytes
        if limit is not None and header.data_bytes > limit:
            too_much = f"the file has {header.data_bytes} bytes of data, expected at most {limit}"
            raise FileRefusedError("format", too_much)
        file_key = _file_key(_reading_secret(key, passphrase, header.metadata), header.metadata)
        read = _read_encrypted if protection == "encrypted" else _read_authenticated
        tensors = read(file, header, file_key)
        if file.read(1):
            raise FileRefusedError("format", "the file grew while it was read")
        return Container(metadata, tensors)


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
    if words[0] != "scrypt" or len(words) != 4 or not all(is_number(word) for word in words[1:]):
        raise FileRefusedError("format", f"kdf: expected hkdf-sha256 or scrypt n r p, got {metadata['kdf']!r:.80}")
    if passphrase is None:
        raise FileRefusedError("key", "the file was written with a passphrase, not with a key")
    n, r, p = (int(word) for word in words[1:])
    max_n, only_r, max_p = MAX_SCRYPT
    if not 2 <= n <= max_n or n & (n - 1) or r != only_r or not 1 <= p <= max_p:
        bounds = f"kdf: {metadata['kdf']!r:.80} is out of bounds, the most is scrypt {MAX_SCRYPT}"
        raise FileRefusedError("format", bounds)
    return _stretch(passphrase, bytes.fromhex(metadata["salt"]), n, r, p)


def is_number(word: str) -> bool:
    """Whether a word of the metadata is a whole number in 1 to 11 decimal digits."""
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
    header = pack_header(metadata, [Entry("payload", torch.uint8, (len(plain) + 16,), len(plain) + 16)])
    file.write(header)
    file.write(AESGCM(file_key.reveal()).encrypt(_NONCE, plain, header))


def _read_encrypted(file: BufferedReader, header: Header, file_key: Secret) -> dict[str, Tensor]:
    if [(entry.name, entry.dtype) for entry in header.entries] != [("payload", torch.uint8)]:
        raise FileRefusedError("format", "an encrypted file holds one tensor, payload")
    ciphertext = file.read(header.data_bytes)
    if len(ciphertext) < header.data_bytes:
        raise truncated()
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
    entries = [describe(name, tensor) for name, tensor in tensors.items()]
    header = pack_header(metadata, [*entries, Entry("tag", torch.uint8, (TAG_BYTES,), TAG_BYTES)])
    mac = HMAC(file_key.reveal(), hashes.SHA256())
    mac.update(header)
    file.write(header)
    for tensor in tensors.values():
        for chunk in _chunks(tensor.detach().cpu().contiguous()):
            mac.update(chunk)
            file.write(chunk)
    file.write(mac.finalize())


def _read_authenticated(file: BufferedReader, header: Header, file_key: Secret) -> dict[str, Tensor]:
    *entries, last = header.entries or [Entry("", torch.uint8, (), 0)]
    if (last.name, last.dtype, last.shape) != ("tag", torch.uint8, (TAG_BYTES,)):
        raise FileRefusedError("format", "an authenticated file ends with the tensor tag")
    mac = HMAC(file_key.reveal(), hashes.SHA256())
    mac.update(header.raw)
    tensors = {}
    for entry in entries:
        tensors[entry.name] = tensor = _allocate(entry)
        for chunk in _chunks(tensor):
            if file.readinto(chunk) != len(chunk):
                raise truncated()
            mac.update(chunk)
    tag = file.read(TAG_BYTES)
    if len(tag) < TAG_BYTES:
        raise truncated()
    try:
        mac.verify(tag)
    except InvalidSignature:
        raise _wrong_key() from None
    return tensors


def _allocate(entry: Entry) -> Tensor:
    try:
        return torch.empty(entry.shape, dtype=entry.dtype)
    except RuntimeError:  # a sparse file can claim more than there is memory
        raise FileRefusedError("format", f"{entry.name!r:.80} has {entry.nbytes} bytes, more than can be had") from None


def _chunks(tensor: Tensor) -> Iterator[memoryview]:
    """The bytes of a contiguous CPU tensor, without a copy."""
    flat = tensor.reshape(-1).view(torch.uint8).numpy().data
    for start in range(0, len(flat), _CHUNK_BYTES):
        yield flat[start : start + _CHUNK_BYTES]


def _check_identity(metadata: Mapping[str, str], kind: str, protection: str) -> None:
    missing = sorted(_RESERVED - set(metadata))
    if metadata.get("format") != FORMAT or missing:
        raise FileRefusedError("format", "the file is no file of this package: its header does not say so")
    version = metadata["version"]
    if version != str(VERSION):
        newer = is_number(version) and int(version) > VERSION
        why = f"version {version}, newer than {VERSION}; update this package" if newer else f"version {version!r:.80}"
        raise FileRefusedError("version", f"the file has format {why}")
    if metadata["kind"] != kind:
        raise FileRefusedError("kind", f"the file holds {metadata['kind']!r:.80}, expected {kind!r}")
    if metadata["protection"] != protection:
        raise FileRefusedError("format", f"the file is {metadata['protection']!r:.80}, expected {protection}")
    salt = metadata["salt"]
    if len(salt) != 2 * SALT_BYTES or set(salt) - set("0123456789abcdef"):
        raise FileRefusedError("format", f"salt: expected {SALT_BYTES} bytes in hexadecimal")
