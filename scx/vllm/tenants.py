"""Tenants and their keys: who a caller is, the salt that says so to the engine, and the keys below it.

    master key -> tenant id, salt                   of every caller, where there is no registry
               -> tenant key (seed, id, version) -> keys by purpose

docs/formats.md has the bytes. A salt is vLLM's `cache_salt`: it travels with a request to every part of the engine, and
parts blocks in device memory and in every tier below. It depends on the tenant's id, never on a version of its key.
"""

import logging
import os
import re
import threading
from dataclasses import dataclass
from hmac import compare_digest
from pathlib import Path
from typing import Protocol

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.hmac import HMAC

from scx.files.refusal import FileRefusedError
from scx.keystream import Secret, derive
from scx.vllm.master import master_of_environment
from scx.vllm.registry import REGISTRY_VARIABLE, Record, Registry, hash_of, read_registry
from scx_kernels.hidden import Hidden, guarded

__all__ = ["MAX_SALT_CHARACTERS", "Keyring", "Tenant"]

MAX_SALT_CHARACTERS = 128
"""vLLM takes no longer one. A salt of this package has 103."""

_ID = re.compile(r"[0-9a-f]{32}")
_SALT = re.compile(r"(scx1\.([0-9a-f]{32})\.[0-9a-f]{32})\.([0-9a-f]{32})")
_MAX_KEYS = 4096  # held at once: where every credential is a tenant, strangers make tenants
_LOG = logging.getLogger(__name__)

_Stamp = tuple[int, ...]


@dataclass(frozen=True)
class Tenant:
    """Whose blocks are meant.

    Attributes:
        id: 32 hexadecimal digits: a pseudonym, which may be seen.
        kind: the tenant's class, for metrics.
        versions: of its key, newest first: the first one writes, all read.
    """

    id: str
    kind: str
    versions: tuple[int, ...]


class _Tenants(Protocol):
    """Who is known."""

    def of_credential(self, credential: str) -> Tenant | None: ...
    def named(self, name: str) -> Tenant | None: ...
    def find(self, id: str) -> Tenant | None: ...
    def seed(self, id: str, version: int) -> bytes | None: ...


class _Anyone(Hidden):
    """Every credential, and every name, is a tenant."""

    __slots__ = ("_ids",)

    def __init__(self, master: Secret) -> None:
        self._ids = derive(master, "scx vllm tenant id v1")

    def of_credential(self, credential: str) -> Tenant | None:
        return self._derived(b"credential", credential)

    def named(self, name: str) -> Tenant | None:
        return self._derived(b"name", name)

    def _derived(self, kind: bytes, text: str) -> Tenant:
        return self._tenant(_mac(self._ids, kind, text.encode("utf-8", "surrogateescape")))

    def find(self, id: str) -> Tenant | None:
        return self._tenant(id) if _ID.fullmatch(id) else None

    def seed(self, id: str, version: int) -> bytes | None:
        return b"" if version == 1 and _ID.fullmatch(id) else None

    def _tenant(self, id: str) -> Tenant:
        return Tenant(id, "default", (1,))


class _Registered(Hidden):
    """Those whom a registry has."""

    __slots__ = ("_by_credential", "_by_id", "_by_name")

    def __init__(self, registry: Registry) -> None:
        self._by_id = {record.id: record for record in registry}
        self._by_name = {record.name: record for record in registry}
        self._by_credential = {credential: record for record in registry for credential in record.credentials}

    def of_credential(self, credential: str) -> Tenant | None:
        return _tenant_of(self._by_credential.get(hash_of(credential)))

    def named(self, name: str) -> Tenant | None:
        return _tenant_of(self._by_name.get(name))

    def find(self, id: str) -> Tenant | None:
        return _tenant_of(self._by_id.get(id))

    def seed(self, id: str, version: int) -> bytes | None:
        record = self._by_id.get(id)
        seed = record.seeds.get(version) if record else None
        return bytes(seed.reveal()) if seed else None


def _tenant_of(record: Record | None) -> Tenant | None:
    return Tenant(record.id, record.kind, record.versions) if record else None


class Keyring(Hidden):
    """The master key, and the tenants below it. Any number of threads may ask.

    Without a registry, every credential is a tenant of its own, and every name. With one, those in it are, as the file
    has them now: it is read again when it changed. **While it cannot be read, nobody is a tenant** (`problem` says why,
    and so does the log, once): what one process last read, another one would not know, and a tenant that was forgotten
    meanwhile would live on.

    Args:
        master: the master key.
        registry: the registry's file.

    Raises: FileRefusedError, OSError for a registry that cannot be read.
    """

    __slots__ = ("_keys", "_known", "_lock", "_master", "_path", "_problem", "_salts", "_stamp")

    @guarded
    def __init__(self, master: Secret, registry: Path | None = None) -> None:
        if not isinstance(master, Secret):
            raise TypeError(f"master: expected a Secret, got {type(master).__name__}")
        self._master = master
        self._salts = derive(master, "scx vllm salt v1")
        self._path = registry
        self._lock = threading.Lock()
        self._keys: dict[tuple[str, int, str], Secret] = {}
        self._problem: str | None = None
        self._stamp: _Stamp | None = None
        if registry is None:
            self._known: _Tenants = _Anyone(master)
        else:
            self._stamp = _stamp_of(registry)
            self._known = _Registered(read_registry(registry))

    @classmethod
    def from_environment(cls) -> "Keyring":
        """With the master key's file that `SCX_MASTER_KEY_FILE` names and, if `SCX_TENANTS_FILE` does, a registry.

        Raises: ValueError, OSError, FileRefusedError where one of them is not as it has to be, with the remedy.
        """
        registry = os.environ.get(REGISTRY_VARIABLE)
        if registry == "":  # a name that was lost on its way must not let strangers in
            raise ValueError(f"{REGISTRY_VARIABLE}: set, and empty; name the registry, or unset it")
        return cls(master_of_environment(), None if registry is None else Path(registry))

    @property
    def problem(self) -> str | None:
        """Why the registry cannot be read now, if so."""
        with self._lock:
            self._tenants()
            return self._problem

    @guarded
    def of_credential(self, credential: str) -> Tenant | None:
        """The tenant with an API key, or None."""
        if not credential:
            return None
        with self._lock:
            return self._tenants().of_credential(credential)

    def named(self, name: str) -> Tenant | None:
        """The tenant of a name, or None."""
        if not name:
            return None
        with self._lock:
            return self._tenants().named(name)

    def find(self, id: str) -> Tenant | None:
        """The tenant with an id, or None."""
        with self._lock:
            return self._tenants().find(id)

    @guarded
    def salt(self, tenant: Tenant, told: str = "") -> str:
        """A tenant's salt.

        Args:
            tenant: whose.
            told: a caller's own salt, which parts blocks within the tenant.

        Raises: ValueError for a text that is not Unicode.
        """
        try:
            own = told.encode()
        except UnicodeEncodeError:
            raise ValueError("told: expected text, got a lone surrogate") from None
        head = f"scx1.{tenant.id}.{_mac(self._salts, b'told', bytes.fromhex(tenant.id), own)}"
        return f"{head}.{_mac(self._salts, b'tag', head.encode())}"

    @guarded
    def read_salt(self, salt: str | None) -> Tenant | None:
        """Whose salt this is: None for anything that `salt` did not make with this master key, and for a tenant that is
        not known."""
        found = _SALT.fullmatch(salt) if isinstance(salt, str) else None
        if found is None or not compare_digest(_mac(self._salts, b"tag", found[1].encode()), found[3]):
            return None
        return self.find(found[2])

    @guarded
    def key(self, tenant: Tenant, version: int, purpose: str) -> Secret:
        """The key for a purpose, below a version of a tenant's key.

        Raises: LookupError for a tenant or a version that is gone.
        """
        with self._lock:
            seed = self._tenants().seed(tenant.id, version)
            if seed is None:
                raise LookupError(f"tenant {tenant.id}: version {version} of its key is gone")
            name = tenant.id, version, purpose
            key = self._keys.get(name)
            if key is None:
                own = derive(self._master, f"scx vllm tenant key v1\0{tenant.id}\0{version}", seed)
                key = self._keys[name] = derive(own, purpose)
                while len(self._keys) > _MAX_KEYS:
                    del self._keys[next(iter(self._keys))]
            return key

    def _tenants(self) -> _Tenants:
        """Who is known now. The lock is held."""
        if self._path is None:
            return self._known
        stamp = _stamp_of(self._path)
        if stamp is None or stamp != self._stamp:
            self._reread(self._path, stamp)
        return self._known

    def _reread(self, path: Path, stamp: _Stamp | None) -> None:
        problem = None
        try:
            known = _Registered(read_registry(path))
        except (OSError, FileRefusedError) as error:
            known, problem = _Registered(Registry()), str(error)
            if isinstance(error, OSError):
                stamp = None  # it may be over by the next time, with the file as it is
        # Nobody holds on to keys of who may be gone. They are wiped where nothing computes with them any more.
        self._keys.clear()
        self._known, self._stamp = known, stamp
        if problem and problem != self._problem:
            _LOG.error("nobody is a tenant until the registry can be read: %s", problem)
        elif self._problem and not problem:
            _LOG.warning("the registry can be read again")
        self._problem = problem


def _stamp_of(path: Path) -> _Stamp | None:
    """What changes with a file. None if there is none."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_mtime_ns, status.st_ctime_ns, status.st_size, status.st_ino, status.st_dev


def _mac(key: Secret, label: bytes, *parts: bytes) -> str:
    """HMAC-SHA256 of a label and parts, of which only the last has no fixed length: 16 bytes, hexadecimal."""
    mac = HMAC(key.reveal(), hashes.SHA256())
    mac.update(label + b"\0" + b"".join(parts))
    return mac.finalize()[:16].hex()
