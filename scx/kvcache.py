"""The encoded key-value cache: made by a prefill, split between the sides, joined again, decoded with its session.

Each layer holds K and V in token order under the session's feature permutations, (B, G, N, d), in the layers that
transformers uses for plain caches. The cache carries its session while it stays in the process; pickled or saved it
carries the session's public id alone.
"""

import copy
import secrets
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache, DynamicLayer

from scx.encoding import FeatureKey
from scx.keys import Session

__all__ = ["EncodedCache", "decode_kvcache", "merge_kvcache_dynamic", "split_kvcache_dynamic"]


class AbsentLayer(CacheLayerMixin):
    """The place of a layer whose entries lie in the other part of a split cache."""

    def _refuse(self) -> RuntimeError:
        return RuntimeError("this layer's entries are in the other part of a split cache; use both parts together")

    def lazy_initialization(self, *args: Any, **kwargs: Any) -> None:
        raise self._refuse()

    def update(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        raise self._refuse()

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        raise self._refuse()

    def get_seq_length(self) -> int:
        raise self._refuse()

    def get_max_length(self) -> int:
        return -1


@dataclass(frozen=True)
class Slots:
    """Where a layer's next tokens are written: buffers (B, G, capacity, d) and the slots offset..offset+tokens-1."""

    keys: Tensor
    values: Tensor
    offset: int
    tokens: int

    @property
    def arguments(self) -> dict[str, Any]:
        """As arguments of `qkv_decode_encode`."""
        return {"keys": self.keys, "values": self.values, "offset": self.offset}


class GrowingLayer(DynamicLayer):
    """A layer that grows in place: `keys` and `values` are the filled part of buffers with room for more tokens.

    A layer whose states were replaced (reordered, cropped, moved) or that was copied has no room; it gets new buffers
    when it grows. So nothing that another layer still shows is ever written over.
    """

    _buffers: tuple[Tensor, Tensor] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_buffers": None}

    def crop(self, *args: Any, **kwargs: Any) -> None:
        super().crop(*args, **kwargs)
        self._buffers = None

    def room(self, tokens: int, shape: tuple[int, ...], like: Tensor) -> Slots:
        """Slots for `tokens` more tokens of (B, G, d) states, in like's dtype and on its device."""
        batch, groups, size = shape
        filled = self.get_seq_length()
        if self._buffers is None or not self._has_room(self._buffers[0], filled + tokens):
            capacity = max(filled + tokens, filled + filled // 4, 64)
            keys, values = (like.new_empty(batch, groups, capacity, size) for _ in range(2))
            if filled:
                keys[:, :, :filled], values[:, :, :filled] = self.keys, self.values
            self._buffers = (keys, values)
        return Slots(*self._buffers, filled, tokens)

    def _has_room(self, buffer: Tensor, tokens: int) -> bool:
        if not self.get_seq_length():
            return False
        return self.keys.data_ptr() == buffer.data_ptr() and tokens <= buffer.shape[2]

    def take_in(self, slots: Slots) -> tuple[Tensor, Tensor]:
        """Count the tokens written into `slots` as the layer's. Returns all of its K and V."""
        filled = slots.offset + slots.tokens
        self.keys, self.values = slots.keys[:, :, :filled], slots.values[:, :, :filled]
        self.dtype, self.device, self.is_initialized = self.keys.dtype, self.keys.device, True
        return self.keys, self.values


def _growing(layer: CacheLayerMixin) -> CacheLayerMixin:
    return GrowingLayer() if type(layer) is DynamicLayer and not layer.is_initialized else layer


class EncodedCache(DynamicCache):
    """K and V of some or all layers under one session's feature permutations.

    `sequences` says which of the session's sequences each row of the batch continues; it follows every reordering, so
    that a row is always decoded with the key it was encoded with. `split_id` is shared by the two parts of one split.
    """

    session_id: str
    split_id: str | None
    sequences: Tensor | None
    _session: Session | None
    _selected: dict[tuple[int, torch.device], FeatureKey]

    def __init__(self, session: Session, layers: list[CacheLayerMixin]) -> None:
        Cache.__init__(self, layers=[_growing(layer) for layer in layers])
        self._bind(session)

    @classmethod
    def adopt(cls, cache: DynamicCache, session: Session) -> "EncodedCache":
        """Turn an empty plain cache, in place, into the cache of `session`; its other holders see the same object."""
        adopted: Any = cache
        adopted.__class__ = cls
        missing = session.shape.num_layers - len(cache.layers) if cache.layer_class_to_replicate is DynamicLayer else 0
        adopted.layers = [_growing(layer) for layer in cache.layers] + [GrowingLayer() for _ in range(missing)]
        adopted._bind(session)
        return adopted

    def _bind(self, session: Session) -> None:
        self._session = session
        self.session_id = session.id
        self.split_id = None
        self.sequences = None
        self._selected = {}

    def __repr__(self) -> str:
        return f"EncodedCache(session={self.session_id}, layers={list(self.layer_indices)})"

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_session": None, "_selected": {}}

    def __deepcopy__(self, memo: dict) -> "EncodedCache":
        twin = type(self).__new__(type(self))
        twin.__dict__.update(copy.deepcopy(self.__getstate__(), memo))
        twin._session = self._session
        return twin

    @property
    def session(self) -> Session:
        """The session whose keys decode this cache. Raises RuntimeError if only its id came along."""
        if self._session is None:
            raise RuntimeError(f"this cache carries the id of session {self.session_id}, not its keys; attach them")
        return self._session

    def attach(self, session: Session) -> None:
        """Give a cache that was pickled or saved its session back. Raises ValueError if the id differs."""
        if session.id != self.session_id:
            raise ValueError(f"session: this cache belongs to session {self.session_id}, got {session.id}")
        self._session = session

    @property
    def layer_indices(self) -> tuple[int, ...]:
        """The layers whose entries are here."""
        return tuple(i for i, layer in enumerate(self.layers) if not isinstance(layer, AbsentLayer))

    @property
    def is_complete(self) -> bool:
        """Whether every layer's entries are here."""
        return not any(isinstance(layer, AbsentLayer) for layer in self.layers)

    @property
    def rows(self) -> int:
        """Sequences in the batch."""
        return self.session.batch_size if self.sequences is None else len(self.sequences)

    def feature_key(self, layer: int, device: torch.device) -> FeatureKey:
        """The feature permutations under which this layer's rows are stored."""
        if self.sequences is None:
            return self.session.feature_key(layer, device)
        key = self._selected.get((layer, device))
        if key is None:
            key = self.session.feature_key(layer, device).select(self.sequences.to(device))
            self._selected[layer, device] = key
        return key

    def room(self, layer_idx: int, tokens: int, shape: tuple[int, ...], like: Tensor) -> Slots | None:
        """Slots in a layer's own buffers for `tokens` more tokens of (B, G, d) states in like's dtype.

        None where states cannot be written in place: in a sliding layer, in one that lies on another device than
        `like`, and where gradients are to flow through them.
        """
        layer = self.layers[layer_idx] if layer_idx < len(self.layers) else None
        if not isinstance(layer, GrowingLayer) or (like.requires_grad and torch.is_grad_enabled()):
            return None
        if layer.is_initialized and layer.keys.device != like.device:
            return None
        return layer.room(tokens, shape, like)

    def take_in(self, layer_idx: int, slots: Slots) -> tuple[Tensor, Tensor]:
        """Count the tokens written into `slots` as the layer's. Returns all of the layer's K and V."""
        return self.layers[layer_idx].take_in(slots)

    def append(self, keys: Tensor, values: Tensor, layer_idx: int) -> tuple[Tensor, Tensor]:
        """Append encoded K and V (B, G, S, d) to a layer. Returns all of the layer's K and V."""
        return super().update(keys, values, layer_idx)

    def update(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """What a plain model would call; its K and V must not be mixed with encoded ones."""
        raise RuntimeError(
            "a plain model was given an encoded cache: encode the model, or decode the cache with decode_kvcache"
        )

    def _first_present(self, layer_idx: int) -> int:
        if layer_idx < len(self.layers) and isinstance(self.layers[layer_idx], AbsentLayer):
            return self.layer_indices[0] if self.layer_indices else len(self.layers)
        return layer_idx

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return super().get_seq_length(self._first_present(layer_idx))

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return super().get_mask_sizes(query_length, self._first_present(layer_idx))

    def _require_complete(self, operation: str) -> None:
        if not self.is_complete:
            raise RuntimeError(f"{operation} changes all layers; merge the parts of a split cache first")

    def _select_sequences(self, index: Tensor) -> None:
        current = torch.arange(self.session.batch_size) if self.sequences is None else self.sequences
        self.sequences = current.index_select(0, index.to(current.device))
        self._selected.clear()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._require_complete("reorder_cache")
        super().reorder_cache(beam_idx)
        self._select_sequences(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        self._require_complete("batch_select_indices")
        super().batch_select_indices(indices)
        self._select_sequences(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._require_complete("batch_repeat_interleave")
        super().batch_repeat_interleave(repeats)
        self._select_sequences(torch.arange(self.rows).repeat_interleave(repeats))

    def crop(self, *args: Any, **kwargs: Any) -> None:
        self._require_complete("crop")
        super().crop(*args, **kwargs)

    def reset(self) -> None:
        self._require_complete("reset")
        super().reset()
        for layer in self.layers:  # older transformers zero the states and keep their length
            layer.keys = layer.values = None
            layer.is_initialized = False


def _moved(layer: CacheLayerMixin, device: torch.device | str | None) -> CacheLayerMixin:
    """A layer object of its own with its tensors on `device`; the tensors are shared where they lie there already."""
    twin: Any = copy.copy(layer)
    if device is not None and twin.is_initialized:
        twin.keys, twin.values = twin.keys.to(device), twin.values.to(device)
        twin.device = twin.keys.device
    return twin


def _with_layers(cache: EncodedCache, layers: list[CacheLayerMixin], split_id: str | None = None) -> EncodedCache:
    other = EncodedCache(cache.session, layers)
    other.sequences, other.split_id = cache.sequences, split_id
    return other


def _check_encoded(cache: object, name: str) -> EncodedCache:
    if not isinstance(cache, EncodedCache):
        raise TypeError(f"{name}: expected an encoded cache, as a prefill returns it, got {type(cache).__name__}")
    return cache


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

    Returns: (untrusted part, secure part). They grow in place when a decode call is given both.
    Raises: TypeError for a plain cache; ValueError for layers out of range, named twice or protected, or a part.
    """
    _check_encoded(cache, "cache")
    if not cache.is_complete:
        raise ValueError("cache: this is one part of a split cache; merge the parts before splitting them anew")
    wanted, count = list(gpu_layers), len(cache.layers)
    if not all(isinstance(layer, int) and 0 <= layer < count for layer in wanted):
        raise ValueError(f"gpu_layers: expected layers 0..{count - 1}, got {wanted}")
    if len(set(wanted)) != len(wanted):
        raise ValueError(f"gpu_layers: a layer is named twice in {wanted}")
    protected = sorted(set(wanted) & set(cache.session.protected_layers))
    if protected:
        raise ValueError(f"gpu_layers: layers {protected} are protected and stay on the secure side")
    gpu = [_moved(layer, gpu_device) if i in wanted else AbsentLayer() for i, layer in enumerate(cache.layers)]
    cpu = [AbsentLayer() if i in wanted else _moved(layer, cpu_device) for i, layer in enumerate(cache.layers)]
    split_id = secrets.token_hex(8)
    return _with_layers(cache, gpu, split_id), _with_layers(cache, cpu, split_id)


def _check_parts(parts: Sequence[EncodedCache]) -> None:
    first = parts[0]
    for part in parts[1:]:
        if part.session is not first.session:
            raise ValueError(f"gpu_kvcache and cpu_kvcache: sessions {first.session_id} and {part.session_id} differ")
    held = [layer for part in parts for layer in part.layer_indices]
    if len(set(held)) != len(held):
        raise ValueError(
            f"gpu_kvcache and cpu_kvcache: both hold layers {sorted({i for i in held if held.count(i) > 1})}"
        )
    missing = sorted(set(range(len(first.layers))) - set(held))
    if missing:
        raise ValueError(f"gpu_kvcache and cpu_kvcache: layers {missing} are in neither")
    if len({part.split_id for part in parts}) != 1:
        raise ValueError("gpu_kvcache and cpu_kvcache: they are not the two parts of one split")
    lengths = {part.layers[layer].get_seq_length() for part in parts for layer in part.layer_indices}
    if len(lengths) != 1:
        raise ValueError(f"gpu_kvcache and cpu_kvcache: they hold different numbers of tokens, {sorted(lengths)}")


def join_parts(gpu_kvcache: EncodedCache, cpu_kvcache: EncodedCache) -> EncodedCache:
    """Both parts as one cache over the same layer objects: what is appended to it, the parts hold as well."""
    parts = (_check_encoded(gpu_kvcache, "gpu_kvcache"), _check_encoded(cpu_kvcache, "cpu_kvcache"))
    _check_parts(parts)
    layers = [parts[1 if isinstance(layer, AbsentLayer) else 0].layers[i] for i, layer in enumerate(parts[0].layers)]
    return _with_layers(parts[0], layers)


def merge_kvcache_dynamic(
    gpu_kvcache: EncodedCache, cpu_kvcache: EncodedCache, *, device: torch.device | str | None = None
) -> EncodedCache:
    """The inverse of `split_kvcache_dynamic`: one whole cache, on `device` if given; the parts stay as they are.

    Raises: TypeError for a plain cache; ValueError if the parts overlap, leave a layer out, or differ in session,
    split or length.
    """
    joined = join_parts(gpu_kvcache, cpu_kvcache)
    return _with_layers(joined, [_moved(layer, device) for layer in joined.layers])


def decode_kvcache(cache: EncodedCache, session: Session) -> DynamicCache:
    """The plain cache, equal to what the plain model would have stored.

    Args:
        cache: an encoded cache; it stays as it is.
        session: the session it belongs to (`cache.session`, while it has not left the process).

    Returns: a cache of the same layer kinds, devices and dtypes; absent layers of a part stay absent.
    Raises: TypeError for a plain cache; ValueError for a session that is not the cache's.
    """
    _check_encoded(cache, "cache")
    if session.id != cache.session_id:
        raise ValueError(f"session: this cache belongs to session {cache.session_id}, got {session.id}")
    keyed = copy.copy(cache)
    keyed.attach(session)
    plain = DynamicCache()
    Cache.__init__(plain, layers=[copy.copy(layer) for layer in cache.layers])
    for index, layer in enumerate(plain.layers):
        if layer.is_initialized:
            key = keyed.feature_key(index, layer.keys.device)
            layer.keys, layer.values = key.decode_cache(layer.keys, layer.values)
    return plain
