"""Keys: who draws them, for which session, and what they are.

`SCXKeyGenerator` holds the master key. A prefill opens a `Session`, whose keys of the cache come out the same wherever
it goes on, and whose one-time keys belong to a `Branch`, the life of the session in one process.
"""

from scx.architecture import ModelShape
from scx.keys.branch import Branch, Writes
from scx.keys.generator import SCXKeyGenerator, check_generator
from scx.keys.passes import PassKeys
from scx.keys.session import Session
from scx.keys.settings import CACHE_ENCODINGS, CIPHER_ROUNDS, KeySettings, public_bytes
from scx.keys.sharing import SharedKeys

__all__ = [
    "CACHE_ENCODINGS",
    "CIPHER_ROUNDS",
    "Branch",
    "KeySettings",
    "ModelShape",
    "PassKeys",
    "SCXKeyGenerator",
    "Session",
    "SharedKeys",
    "Writes",
    "check_generator",
    "public_bytes",
]
