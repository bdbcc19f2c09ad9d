"""SCX: stateless KV-cache encoding for confidential transformer serving."""

from importlib.util import find_spec

if missing := [name for name in ("cryptography", "safetensors", "transformers") if find_spec(name) is None]:
    raise ImportError(
        f"scx needs {' and '.join(missing)}, not installed here: `python -m pip install {' '.join(missing)}`, or put "
        "the wheels on PYTHONPATH. Its operations alone, `import scx_kernels`, do without.",
        name=missing[0],
    )

from scx.files import (
    FileRefusedError,
    load_keys,
    load_kvcache,
    load_shared_keys,
    save_keys,
    save_kvcache,
    save_shared_keys,
)
from scx.keys import SCXKeyGenerator, Session, SharedKeys
from scx.kvcache import EncodedCache, decode_kvcache, merge_kvcache_dynamic, split_kvcache_dynamic
from scx.models.llama import decode_llama, encode_llama, encoded_llama
from scx.models.split import record_transcript, restore_conversation
from scx.party.loading import load_secure_model
from scx.warmup import warm_up

__all__ = [
    "EncodedCache",
    "FileRefusedError",
    "SCXKeyGenerator",
    "Session",
    "SharedKeys",
    "decode_kvcache",
    "decode_llama",
    "encode_llama",
    "encoded_llama",
    "load_keys",
    "load_kvcache",
    "load_secure_model",
    "load_shared_keys",
    "merge_kvcache_dynamic",
    "record_transcript",
    "restore_conversation",
    "save_keys",
    "save_kvcache",
    "save_shared_keys",
    "split_kvcache_dynamic",
    "warm_up",
]
__version__ = "0.1.0"
