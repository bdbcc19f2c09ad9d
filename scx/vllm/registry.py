"""The tenants' registry: who they are, the hashes of their API keys, and a random seed for every version of a key.

A tenant's key follows from the master key and from a seed that is written nowhere else. Whoever takes a tenant out of
the registry takes the seeds with it: nobody derives its keys from then on, not even with the master key.
"""

import hashlib
import json
import os
import re
import secrets
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from scx.files.disk import atomic_file, destination
from scx.files.private import read_private
from scx.files.refusal import FileRefusedError, malformed
from scx.keystream import KEY_BYTES, Secret
from scx_kernels.hidden import guarded

__all__ = ["REGISTRY_VARIABLE", "Record", "Registry", "edited", "hash_of", "read_registry"]

REGISTRY_VARIABLE = "SCX_TENANTS_FILE"
_REMEDY = "`python -m scx tenants add NAME` makes one"
_FORMAT, _VERSION = "scx tenants", 1
_MAX_BYTES = 2**24
_MAX_VERSIONS = 64
_NAME = re.compile(r"[!-~](?:[ -~]{0,126}[!-~])?")
_KIND = re.compile(r"[a-z][a-z0-9_-]{0,31}")
_NUMBER = re.compile(r"[1-9][0-9]{0,8}")
_ID = re.compile(r"[0-9a-f]{32}")
_HEX = re.compile(r"[0-9a-f]{64}")


def hash_of(credential: str) -> str:
    """The SHA-256 of an API key, hexadecimal: the form in which the registry knows it."""
    return hashlib.sha256(credential.encode("utf-8", "surrogateescape")).hexdigest()


@dataclass(frozen=True)
class Record:
    """A tenant as the registry has it.

    Attributes:
        name: 1 to 128 printable ASCII characters, no space at its ends.
        id: 32 hexadecimal digits, drawn when the tenant was added.
        kind: the tenant's class, for metrics: a-z, 0-9, `_` and `-`, at most 32 characters.
        credentials: `hash_of` each of its API keys.
        seeds: of each version of its key.
    """

    name: str
    id: str
    kind: str
    credentials: tuple[str, ...] = field(repr=False)
    seeds: dict[int, Secret] = field(repr=False)

    @property
    def versions(self) -> tuple[int, ...]:
        """Of its key, newest first."""
        return tuple(sorted(self.seeds, reverse=True))


class Registry:
    """Tenants by name. What changes one leaves the others as they are; nothing reaches a file but through `edited`.

    Raises: ValueError for names, ids or credentials that two tenants have.
    """

    def __init__(self, records: Iterable[Record] = ()) -> None:
        self._records: dict[str, Record] = {}
        listed = list(records)
        for what, values in (
            ("name", [x.name for x in listed]),
            ("id", [x.id for x in listed]),
            ("credential", [c for x in listed for c in x.credentials]),
        ):
            if len(set(values)) != len(values):
                raise ValueError(f"two tenants have one {what}")
        self._records = {record.name: record for record in listed}

    def __iter__(self) -> Iterator[Record]:
        return iter(self._records.values())

    def __len__(self) -> int:
        return len(self._records)

    @guarded
    def add(self, name: str, kind: str = "default") -> str:
        """A new tenant, with an id and a key that none had before.

        Returns: its API key, which is shown here and nowhere else.
        Raises: ValueError for a name that is taken, or for a name or kind of another form.
        """
        if name in self._records:
            raise ValueError(f"name: there is a tenant {name!r}; forget it first, or take another name")
        _check(_NAME, name, "name: expected 1 to 128 printable ASCII characters")
        _check(_KIND, kind, "kind: expected a-z, 0-9, _ and -, 32 characters at most")
        credential = _draw_credential()
        self._records[name] = Record(name, secrets.token_hex(16), kind, (hash_of(credential),), {1: Secret()})
        return credential

    @guarded
    def issue(self, name: str, replace: bool = False) -> str:
        """Another API key for a tenant; with `replace`, in place of those it had.

        Returns: the key, which is shown here and nowhere else.
        """
        old, credential = self[name], _draw_credential()
        kept = () if replace else old.credentials
        self._records[name] = Record(old.name, old.id, old.kind, (*kept, hash_of(credential)), old.seeds)
        return credential

    def rotate(self, name: str) -> int:
        """A new version of a tenant's key. It writes from now on; the older ones read.

        Returns: its number.
        Raises: ValueError if there are 64 versions.
        """
        old = self[name]
        if len(old.seeds) >= _MAX_VERSIONS:
            raise ValueError(f"name: {name!r} has {_MAX_VERSIONS} versions of its key; drop the oldest first")
        version = max(old.seeds) + 1
        self._records[name] = Record(old.name, old.id, old.kind, old.credentials, {**old.seeds, version: Secret()})
        return version

    def drop(self, name: str, version: int) -> None:
        """Take an old version's seed out: what was sealed under it is useless.

        Raises: ValueError for the newest version, which writes, and for one that is not there.
        """
        old = self[name]
        if version not in old.seeds:
            raise ValueError(f"version: {name!r} has {list(old.versions)}, got {version}")
        if version == old.versions[0]:
            raise ValueError(f"version: {version} is the newest of {name!r} and writes; rotate first, or forget it")
        seeds = {number: seed for number, seed in old.seeds.items() if number != version}
        self._records[name] = Record(old.name, old.id, old.kind, old.credentials, seeds)

    def forget(self, name: str) -> None:
        """Take a tenant out, seeds and all: what was sealed for it is useless. A tenant that is added under the same
        name is another one."""
        del self._records[self[name].name]

    def __getitem__(self, name: str) -> Record:
        record = self._records.get(name)
        if record is None:
            raise ValueError(f"name: there is no tenant {name!r}")
        return record

    @guarded
    def to_json(self) -> bytes:
        """What `from_json` reads."""
        tenants = [
            {
                "name": record.name,
                "id": record.id,
                "kind": record.kind,
                "credentials": list(record.credentials),
                "versions": {str(n): bytes(record.seeds[n].reveal()).hex() for n in sorted(record.seeds)},
            }
            for record in self
        ]
        return json.dumps({"format": _FORMAT, "version": _VERSION, "tenants": tenants}, indent=1).encode() + b"\n"

    @classmethod
    @guarded
    def from_json(cls, data: bytes | bytearray) -> "Registry":
        """Read a registry.

        Raises: FileRefusedError("format") for anything but exactly what docs/formats.md says, "version" for a newer
            one. No error has the file's bytes with it.
        """
        tree, problem = _parse(data)
        with malformed("not a registry of tenants"):
            if problem:
                raise ValueError(problem)
            if not isinstance(tree, dict) or tree.get("format") != _FORMAT or type(tree.get("version")) is not int:
                raise ValueError("its format and version are not those of a registry")
            if tree["version"] > _VERSION:
                raise FileRefusedError("version", f"written by a newer version of this package: {_VERSION} is known")
            _members(tree, "format", "version", "tenants")
            if tree["version"] != _VERSION:
                raise ValueError(f"version: expected {_VERSION}")
            return cls(_read_record(x) for x in _list(tree["tenants"]))


def _parse(data: bytes | bytearray) -> tuple[Any, str]:
    """The JSON, and what is wrong with it. An error on its way would have the text with it."""
    try:
        text = data.decode("utf-8")
        return json.loads(text, object_pairs_hook=_once, parse_constant=_no_number, parse_float=_no_number), ""
    except (ValueError, RecursionError) as error:
        return None, f"{error!s:.200}"


def _check(form: re.Pattern[str], value: Any, expected: str) -> str:
    if not isinstance(value, str) or not form.fullmatch(value):
        raise ValueError(expected)
    return value


def _members(tree: Any, *names: str) -> None:
    if not isinstance(tree, dict) or set(tree) != set(names):
        raise ValueError(f"expected an object of {', '.join(names)}")


def _list(tree: Any) -> list[Any]:
    if not isinstance(tree, list):
        raise ValueError("expected a list")
    return tree


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    tree = dict(pairs)
    if len(tree) != len(pairs):
        raise ValueError("two members of an object have one name")
    return tree


def _no_number(text: str) -> Any:
    raise ValueError("a number that no registry has")


def _read_record(tree: Any) -> Record:
    _members(tree, "name", "id", "kind", "credentials", "versions")
    versions = tree["versions"]
    if not isinstance(versions, dict) or not 1 <= len(versions) <= _MAX_VERSIONS:
        raise ValueError(f"versions: expected an object of 1 to {_MAX_VERSIONS}")
    seeds = {
        int(_check(_NUMBER, number, "versions: expected numbers from 1")): Secret(
            bytes.fromhex(_check(_HEX, seed, f"versions: expected {KEY_BYTES} bytes, hexadecimal")), "versions"
        )
        for number, seed in versions.items()
    }
    if len({bytes(seed.reveal()) for seed in seeds.values()}) != len(seeds):
        raise ValueError("versions: two have one seed")
    return Record(
        _check(_NAME, tree["name"], "name: expected 1 to 128 printable ASCII characters"),
        _check(_ID, tree["id"], "id: expected 16 bytes, hexadecimal"),
        _check(_KIND, tree["kind"], "kind: expected a-z, 0-9, _ and -, 32 characters at most"),
        tuple(_check(_HEX, x, "credentials: expected SHA-256, hexadecimal") for x in _list(tree["credentials"])),
        seeds,
    )


def _draw_credential() -> str:
    return "scx-" + secrets.token_urlsafe(32)


@guarded
def read_registry(path: str | os.PathLike[str]) -> Registry:
    """The registry in a private file.

    Raises: FileRefusedError for a file that holds another thing; and as `read_private` does.
    """
    data = read_private(path, REGISTRY_VARIABLE, _REMEDY, _MAX_BYTES)
    try:
        return Registry.from_json(data)
    except FileRefusedError as error:
        raise FileRefusedError(error.reason, f"{REGISTRY_VARIABLE}: {path}: {error}") from None


@contextmanager
def edited(path: str | os.PathLike[str]) -> Iterator[Registry]:
    """The registry in a file, or an empty one if there is no file, to be changed: it takes the file's place, whole and
    with mode 0600, when the block ends well.

    Others that edit the file wait meanwhile: of two that read it at once, the second to write would bring back whom the
    first forgot.

    Raises: as `read_registry` does; ValueError for a file that would be refused when read.
    """
    import fcntl  # noqa: PLC0415 not on every system; readers do without

    target = destination(path)
    lock = os.open(target.with_name(f".{target.name}.lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        registry = read_registry(target) if target.exists() else Registry()
        yield registry
        data = registry.to_json()
        if len(data) > _MAX_BYTES:
            raise ValueError(f"{REGISTRY_VARIABLE}: {path} would be longer than {_MAX_BYTES} bytes")
        _write(target, data)
    finally:
        os.close(lock)


@guarded
def _write(target: Path, data: bytes) -> None:
    with atomic_file(target) as file:
        file.write(data)
