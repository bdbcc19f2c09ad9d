"""SCX: stateless KV-cache encoding for confidential transformer serving."""

from scx.keys import SCXKeyGenerator, Session
from scx.kvcache import EncodedCache, decode_kvcache, merge_kvcache_dynamic, split_kvcache_dynamic
from scx.models.llama import decode_llama, encode_llama, encoded_llama

__all__ = [
    "EncodedCache",
    "SCXKeyGenerator",
    "Session",
    "decode_kvcache",
    "decode_llama",
    "encode_llama",
    "encoded_llama",
    "merge_kvcache_dynamic",
    "split_kvcache_dynamic",
]
__version__ = "0.1.0"
