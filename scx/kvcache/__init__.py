"""The encoded key-value cache: made by a prefill, split between the sides, joined again, decoded with its session.

Each layer holds K and V in token order under the session's feature permutations, (B, G, N, d), in the layers that
transformers uses for plain caches.
"""

from scx.kvcache.cache import EncodedCache
from scx.kvcache.functions import decode_kvcache, merge_kvcache_dynamic, split_kvcache_dynamic
from scx.kvcache.layers import GrowingLayer, SealedLayer, SealedSlidingLayer

__all__ = [
    "EncodedCache",
    "GrowingLayer",
    "SealedLayer",
    "SealedSlidingLayer",
    "decode_kvcache",
    "merge_kvcache_dynamic",
    "split_kvcache_dynamic",
]
