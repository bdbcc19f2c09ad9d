"""What a user does with a whole cache: divide it between the sides, join it again, decode it with its session."""

import copy
from collections.abc import Iterable

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

import scx_kernels as ops
from scx.keys import Session
from scx.kvcache.cache import EncodedCache
from scx.kvcache.conversation import ConversationCache
from scx.kvcache.layers import SealedLayer, SealedSlidingLayer

__all__ = ["check_encoded", "decode_kvcache", "merge_kvcache_dynamic", "split_kvcache_dynamic"]


def check_encoded(name: str, cache: object, kind: type[ConversationCache] = EncodedCache) -> None:
    """Raises TypeError for what is no encoded cache, or none of this kind."""
    if not isinstance(cache, kind):
        raise TypeError(f"{name}: expected an encoded cache, as a prefill returns it, got {type(cache).__name__}")


def split_kvcache_dynamic(
    cache: EncodedCache,
    gpu_layers: Iterable[int],
    *,
    gpu_device: torch.device | str | None = None,
    cpu_device: torch.device | str = "cpu",
) -> tuple[EncodedCache, EncodedCache]:
    """Divide an encoded cache between the untrusted side and the secure side.

    Args:
        cache: a whole cache; it stays as it is.
        gpu_layers: layers for the untrusted side; none that the session protects.
        gpu_device: device of the untrusted part; default: where its layers lie.
        cpu_device: device of the secure part, which gets the other layers.

    A cache of the split placement is divided between the parties already; its two parts stand for what each side holds,
    and `gpu_layers` must be the layers of the untrusted side.

    Returns: (untrusted part, secure part). They grow in place when a decode call is given both.
    Raises: TypeError for a plain cache; ValueError for layers out of range, named twice or protected, or a part.
    """
    check_encoded("cache", cache, ConversationCache)
    return cache.divide(gpu_layers, gpu_device, cpu_device)


def merge_kvcache_dynamic(
    gpu_kvcache: EncodedCache, cpu_kvcache: EncodedCache, *, device: torch.device | str | None = None
) -> EncodedCache:
    """The inverse of `split_kvcache_dynamic`: one whole cache, on `device` if given; the parts stay as they are.

    Raises: TypeError for a plain cache; ValueError if the parts overlap, leave a layer out, or differ in session,
    split or length.
    """
    for name, part in (("gpu_kvcache", gpu_kvcache), ("cpu_kvcache", cpu_kvcache)):
        check_encoded(name, part)
    return gpu_kvcache.join(cpu_kvcache).on(device)


def decode_kvcache(cache: EncodedCache, session: Session) -> DynamicCache:
    """The plain cache, equal to what the plain model would have stored.

    Args:
        cache: an encoded cache; it stays as it is.
        session: the session it belongs to (`cache.session`, while it has not left the process).

    Returns: a cache of the same layer kinds, devices and dtypes; absent layers of a part stay absent.
    Raises: TypeError for a plain cache; ValueError for a session that is not the cache's.
    """
    check_encoded("cache", cache)
    if session.id != cache.session_id:
        raise ValueError(f"session: this cache belongs to session {cache.session_id}, got {session.id}")
    keyed = copy.copy(cache)
    keyed.layers = cache.layers
    keyed.attach(session)
    plain = DynamicCache()
    Cache.__init__(plain, layers=[copy.copy(layer) for layer in cache.layers])
    for index, layer in enumerate(plain.layers):
        if not layer.is_initialized:
            continue
        sealing = keyed.sealing(index, layer.keys.device)
        if sealing is not None:
            unsealed = (ops.unseal(x, sealing, is_value=i == 1) for i, x in enumerate((layer.keys, layer.values)))
            plain.layers[index] = layer = _plain_layer(layer, *unsealed)
        key = keyed.feature_key(index, layer.keys.device)
        layer.keys, layer.values = key.decode_cache(layer.keys, layer.values)
    return plain


def _plain_layer(sealed: SealedLayer, keys: Tensor, values: Tensor) -> DynamicLayer:
    layer = DynamicLayer()
    if isinstance(sealed, SealedSlidingLayer):
        layer = DynamicSlidingWindowLayer(sliding_window=sealed.sliding_window)
        layer.cumulative_length, layer.record_past = sealed.cumulative_length, sealed.record_past
    layer.lazy_initialization(keys, values)
    layer.keys, layer.values = keys, values
    return layer
