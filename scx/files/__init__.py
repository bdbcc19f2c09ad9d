"""Files: the container whose every byte is authenticated, and what is kept in one: sessions, caches, shared keys."""

from scx.files.cachefile import load_kvcache, save_kvcache
from scx.files.keyfile import load_keys, save_keys
from scx.files.refusal import FileRefusedError
from scx.files.sharedfile import load_shared_keys, save_shared_keys

__all__ = [
    "FileRefusedError",
    "load_keys",
    "load_kvcache",
    "load_shared_keys",
    "save_keys",
    "save_kvcache",
    "save_shared_keys",
]
