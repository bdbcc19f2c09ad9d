"""What a user does with a whole cache: divide it between the sides, join it again, decode it with its session."""

import copy
from collections.abc import Iterable
from typing import Any

import torch
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

import scx_kernels as ops
from scx.devices import outside_inference_mode
from scx.keys import Session
from scx.kvcache.cache import EncodedCache
from scx.kvcache.conversation import ConversationCache, working_on
from scx.kvcache.layers import GrowingLayer, fill

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


@outside_inference_mode()
def decode_kvcache(cache: EncodedCache, session: Session) -> DynamicCache:
    """The plain cache, equal to what the plain model would have stored.

    Args:
        cache: an encoded cache; it stays as it is.
        session: the session it belongs to (`cache.session`, while it has not left the process).

    Returns: a cache of the plain model's layer kinds, on the same devices, in the same dtypes; absent layers of a part
    stay absent.
    Raises: TypeError for a plain cache; ValueError for a session that is not the cache's, and for one whose layers do
    not fit together or are sealed and were edited by hand.
    """
    check_encoded("cache", cache)
    with working_on("cache", cache):
        keyed = cache.attached(session)
        keyed.check_stored("cache")
        plain = DynamicCache()
        Cache.__init__(plain, layers=[_decoded(keyed, index) for index in range(len(cache.layers))])
    return plain


def _decoded(cache: EncodedCache, index: int) -> Any:
    """A layer of a plain cache; an absent one as it is."""
    layer: Any = cache.layers[index]
    plain = _plain_kind(layer)
    if layer.is_initialized:
        keys, values, device = layer.keys, layer.values, layer.keys.device
        sealing = cache.sealing(index, device)
        if sealing is not None:
            keys, values = ops.unseal(keys, sealing, is_value=False), ops.unseal(values, sealing, is_value=True)
        fill(plain, *cache.feature_key(index, device).decode_cache(keys, values))
    return plain


def _plain_kind(layer: Any) -> Any:
    """An empty layer in which the plain model would have stored what this one holds."""
    if isinstance(layer, DynamicSlidingWindowLayer):
        plain = DynamicSlidingWindowLayer(sliding_window=layer.sliding_window)
        plain.cumulative_length, plain.record_past = layer.cumulative_length, layer.record_past
        return plain
    return DynamicLayer() if isinstance(layer, GrowingLayer) else copy.copy(layer)
