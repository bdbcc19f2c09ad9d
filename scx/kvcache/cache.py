"""The encoded cache: whose rows it holds, how it is selected from, divided between the sides and joined.

The cache carries its session while it stays in the process; pickled or saved it carries the session's public id alone.
"""

import copy
import secrets
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache, DynamicLayer

from scx.devices import upload
from scx.encoding import FeatureKey
from scx.keys import Session
from scx.kvcache.layers import AbsentLayer, growing, moved, without_room
from scx.kvcache.store import EncodedLayers

__all__ = ["EncodedCache"]


class EncodedCache(EncodedLayers):
    """K and V of some or all layers under one session's feature permutations.

    `sequences` says which of the session's sequences each row of the batch continues; it follows every reordering, so
    that a row is always decoded with the key it was encoded with. `split_id` is shared by the two parts of one split.
    """

    split_id: str | None
    sequences: Tensor | None
    _selected: dict[tuple[int, torch.device], FeatureKey]

    def __init__(self, session: Session, layers: list[CacheLayerMixin]) -> None:
        Cache.__init__(self, layers=layers)
        self._bind(session)

    @classmethod
    def adopt(cls, cache: DynamicCache, session: Session) -> "EncodedCache":
        """Turn an empty plain cache, in place, into the cache of `session`; its other holders see the same object."""
        adopted: Any = cache
        adopted.__class__ = cls
        if cache.layer_class_to_replicate is DynamicLayer:
            missing = session.shape.num_layers - len(cache.layers)
            adopted.layers = [*cache.layers, *(DynamicLayer() for _ in range(missing))]
        adopted._bind(session)
        return adopted

    def _bind(self, session: Session) -> None:
        sealed = session.settings.sealed_layers
        self.layers = [growing(layer, i in sealed) for i, layer in enumerate(self.layers)]
        self._session = session
        self.session_id = session.id
        self.split_id = None
        self.sequences = None
        self._selected = {}
        self._logs_of, self._logs = None, {}

    def __repr__(self) -> str:
        return f"EncodedCache(session={self.session_id}, layers={list(self.layer_indices)})"

    def __getstate__(self) -> dict[str, Any]:
        of_the_process: dict[str, Any] = {"_session": None, "_selected": {}, "_logs_of": None, "_logs": {}}
        return {**self.__dict__, "layers": [without_room(x) for x in self.layers], **of_the_process}

    def __deepcopy__(self, memo: dict) -> "EncodedCache":
        twin = type(self).__new__(type(self))
        twin.__dict__.update(copy.deepcopy(self.__getstate__(), memo))
        twin._session = self._session
        return twin

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
            key = self.session.feature_key(layer, device).select(upload(self.sequences, device))
            self._selected[layer, device] = key
        return key

    def _require_complete(self, operation: str) -> None:
        if not self.is_complete:
            raise RuntimeError(f"{operation} changes all layers; merge the parts of a split cache first")

    def _select_sequences(self, index: Tensor) -> None:
        # Where the index is: on an accelerator nobody reads it on the way, and a beam search waits for nothing.
        if self.sequences is None:
            current = torch.arange(self.session.batch_size, device=index.device)
        else:
            current = self.sequences.to(index.device)
        self.sequences = current.index_select(0, index)
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
            if self._session is not None:
                self._session.forget_keystream(layer)

    def _with_layers(self, layers: list[CacheLayerMixin], split_id: str | None = None) -> "EncodedCache":
        other = EncodedCache(self.session, layers)
        other.sequences, other.split_id = self.sequences, split_id
        return other

    def on(self, device: torch.device | str | None) -> "EncodedCache":
        """The same cache in layer objects of its own, on `device` if given."""
        return self._with_layers([moved(layer, device) for layer in self.layers])

    def divide(
        self,
        gpu_layers: Iterable[int],
        gpu_device: torch.device | str | None = None,
        cpu_device: torch.device | str = "cpu",
    ) -> tuple["EncodedCache", "EncodedCache"]:
        """(untrusted part, secure part), as `split_kvcache_dynamic` returns them, with its arguments and errors."""
        if not self.is_complete:
            raise ValueError("cache: this is one part of a split cache; merge the parts before splitting them anew")
        wanted, count = list(gpu_layers), len(self.layers)
        if not all(isinstance(layer, int) and 0 <= layer < count for layer in wanted):
            raise ValueError(f"gpu_layers: expected layers 0..{count - 1}, got {wanted}")
        if len(set(wanted)) != len(wanted):
            raise ValueError(f"gpu_layers: a layer is named twice in {wanted}")
        protected = sorted(set(wanted) & set(self.session.protected_layers))
        if protected:
            raise ValueError(f"gpu_layers: layers {protected} are protected and stay on the secure side")
        gpu = [moved(layer, gpu_device) if i in wanted else AbsentLayer() for i, layer in enumerate(self.layers)]
        cpu = [AbsentLayer() if i in wanted else moved(layer, cpu_device) for i, layer in enumerate(self.layers)]
        split_id = secrets.token_hex(8)
        return self._with_layers(gpu, split_id), self._with_layers(cpu, split_id)

    def join(self, cpu_kvcache: "EncodedCache") -> "EncodedCache":
        """Both parts as one cache over the same layer objects: what is appended to it, the parts hold as well."""
        parts = (self, cpu_kvcache)
        _check_parts(parts)
        layers = [parts[1 if isinstance(layer, AbsentLayer) else 0].layers[i] for i, layer in enumerate(self.layers)]
        return self._with_layers(layers)


def _check_parts(parts: tuple[EncodedCache, EncodedCache]) -> None:
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
