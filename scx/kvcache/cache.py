"""The encoded cache: whose rows it holds, how it is selected from, divided between the sides and joined.

The cache carries its session while it stays in the process; pickled or saved it carries the session's public id alone.
"""

import copy
import secrets
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import (
    Cache,
    CacheLayerMixin,
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
)

import scx_kernels as ops
from scx.architecture import ModelShape
from scx.devices import CPU, outside_inference_mode, upload
from scx.encoding import FeatureKey
from scx.keys import Session
from scx.kvcache.conversation import Claim, places, working_on
from scx.kvcache.layers import EDITED, AbsentLayer, SealedLayer, fill, growing, keep_tokens, moved, without_room
from scx.kvcache.store import EncodedLayers, Numbering

__all__ = ["EncodedCache"]


class Rows:
    """Which of a session's sequences the rows of a batch continue, (rows,) int64 or None for all in order; their keys.

    Caches that share layer objects share it: the rows of one are those of the others.
    """

    def __init__(self, sequences: Tensor | None = None) -> None:
        self.sequences = sequences
        self._keys: dict[tuple[int, torch.device], FeatureKey] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {"sequences": self.sequences, "_keys": {}}

    def select(self, index: Tensor) -> None:
        """Go on with these rows, (n,) int64."""
        # Where the index is: on an accelerator nobody reads it on the way, and a beam search waits for nothing.
        self.sequences = index if self.sequences is None else self.sequences.to(index.device).index_select(0, index)
        self._keys.clear()

    def feature_key(self, session: Session, layer: int, device: torch.device) -> FeatureKey:
        """The feature permutations of one layer, row by row."""
        if self.sequences is None:
            return session.feature_key(layer, device)
        key = self._keys.get((layer, device))
        if key is None:
            key = session.feature_key(layer, device).select(upload(self.sequences, device))
            self._keys[layer, device] = key
        return key


class EncodedCache(EncodedLayers):
    """K and V of some or all layers under one session's feature permutations.

    A row is always decoded with the key it was encoded with, however rows were reordered (`sequences`). `split_id` is
    shared by the two parts of one split.

    Args:
        layers: of the kinds that store tokens as the session's settings ask for; empty, filled or absent.
        sequences: (rows,) int64, which of the session's sequences each row continues; None: all, in order.
    """

    split_id: str | None
    _rows: Rows
    _claim: Claim

    def __init__(self, session: Session, layers: list[CacheLayerMixin], sequences: Tensor | None = None) -> None:
        Cache.__init__(self, layers=layers)
        self._bind(session, sequences)

    @classmethod
    def adopt(cls, cache: DynamicCache, session: Session, num_layers: int | None = None) -> "EncodedCache":
        """Turn an empty cache, in place, into the cache of `session`; its other holders see the same object.

        Args:
            num_layers: how many layers will fill it; default: all of the model's.

        Raises: ValueError for a cache that holds tokens or has other layers than the model; TypeError for a layer that
            is to be sealed and is of a kind that cannot be.
        """
        layers = _layers_of(cache, session.shape.num_layers if num_layers is None else num_layers)
        held = [i for i, layer in enumerate(layers) if layer.get_seq_length()]
        if held:
            raise ValueError(f"past_key_values: layers {held} hold tokens, and the others none; reset the whole cache")
        sealed = session.settings.sealed_layers
        return cls._become(cache, session, [growing(layer, i in sealed) for i, layer in enumerate(layers)])

    @classmethod
    @outside_inference_mode()
    def encode(cls, plain: DynamicCache, session: Session, num_layers: int | None = None) -> "EncodedCache":
        """Turn a plain cache that holds tokens, in place, into the cache of `session`: the inverse of `decode_kvcache`.
        Its other holders see the same object.

        Args:
            plain: a DynamicCache with K and V (B, G, N, d) of every layer, as the plain model stores them.
            session: of B sequences, that nothing else is stored under.
            num_layers: how many layers have filled it; default: all of the model's.

        Raises: TypeError for another kind of cache or layer; ValueError for other layers, sequences or sizes than the
            session's, for layers of different lengths, and where gradients would have to flow through a sealed layer.
            Nothing is changed then.
        """
        layers = _layers_of(plain, session.shape.num_layers if num_layers is None else num_layers)
        _check_plain(plain, layers, session)
        return cls._become(plain, session, _encode_layers(layers, session))

    @classmethod
    def _become(cls, cache: DynamicCache, session: Session, layers: list[CacheLayerMixin]) -> "EncodedCache":
        adopted: Any = cache
        adopted.__class__, adopted.layers = cls, layers
        adopted._bind(session)
        return adopted

    def _bind(self, session: Session, sequences: Tensor | None = None) -> None:
        self._session = session
        self.session_id = session.id
        self.split_id = None
        self._rows = Rows(sequences)
        self._numbering = Numbering()
        Claim.of(self)

    def __repr__(self) -> str:
        return f"EncodedCache(session={self.session_id}, layers={list(self.layer_indices)})"

    def __getstate__(self) -> dict[str, Any]:
        of_the_process: dict[str, Any] = {"_session": None, "_numbering": Numbering()}
        with working_on("copy", self):
            return {**self.__dict__, "layers": [without_room(x) for x in self.layers], **of_the_process}

    def __copy__(self) -> "EncodedCache":
        """A fork: the tensors are shared until one of the two grows."""
        twin = type(self).__new__(type(self))
        with working_on("copy", self):
            twin.__dict__.update(self.__dict__)
            twin.layers, twin._rows = [copy.copy(layer) for layer in self.layers], Rows(self.sequences)
        twin._claim, twin._numbering = Claim(), Numbering()
        return twin

    def attached(self, session: Session) -> "EncodedCache":
        """This cache with the keys of its session, over the same layers. Raises ValueError if the id differs."""
        twin = type(self).__new__(type(self))
        twin.__dict__.update(self.__dict__)
        twin.attach(session)
        return twin

    @outside_inference_mode()
    def __deepcopy__(self, memo: dict) -> "EncodedCache":
        twin = type(self).__new__(type(self))
        twin.__dict__.update(copy.deepcopy(self.__getstate__(), memo))
        twin._session = self._session
        return twin

    @property
    def sequences(self) -> Tensor | None:
        """Which of the session's sequences each row of the batch continues, (rows,) int64; None: all, in order."""
        return self._rows.sequences

    @property
    def rows(self) -> int:
        """Sequences in the batch."""
        return self.session.batch_size if self.sequences is None else len(self.sequences)

    def feature_key(self, layer: int, device: torch.device) -> FeatureKey:
        """The feature permutations under which this layer's rows are stored."""
        return self._rows.feature_key(self.session, layer, device)

    def check_stored(self, name: str = "past_key_values") -> None:
        """Whether the layers that are here hold as many tokens each, of this cache's rows, and sealed ones what was
        sealed there.

        Args:
            name: of the argument that the cache is.

        Raises: ValueError naming the layer, and what to do instead.
        """
        layers: dict[int, Any] = {i: self.layers[i] for i in self.layer_indices}
        for index, layer in layers.items():
            if isinstance(layer, SealedLayer) and not layer.is_unedited:
                raise ValueError(f"{name}: layer {index}: {EDITED}")
        if _tokens_in(layers, name):
            _check_sizes(layers, name, self.rows, self.session.shape)

    def check_continued(self) -> None:
        """Whether a pass can continue this cache: `check_stored`, and layers that slide hold what their window reaches.

        Raises: ValueError naming the layer, and what to do instead.
        """
        self.check_stored()
        _check_windows({i: self.layers[i] for i in self.layer_indices})

    @contextmanager
    def _changed_whole(self, operation: str) -> Iterator[None]:
        """What changes all layers alike, or none of them."""
        if not self.is_complete:
            raise RuntimeError(f"{operation} changes all layers; merge the parts of a split cache first")
        with working_on(operation, self), outside_inference_mode(), self.restored_on_failure():
            if self.is_attached:
                self.check_stored(operation)
            yield

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Go on with the rows `beam_idx` (n,) of the batch, as `batch_select_indices` does."""
        self._select_rows("reorder_cache", "beam_idx", beam_idx)

    def batch_select_indices(self, indices: Tensor | Sequence[int] | Sequence[bool]) -> None:
        """Go on with some rows of the batch, which may repeat.

        Args:
            indices: (n,) integers, negative ones from the end, or (rows,) bool; a tensor or a list.

        Raises: TypeError; IndexError for rows that are not there, before anything is changed (on an accelerator, where
            indices are not read on the way, the device refuses them); RuntimeError for a part of a split cache.
        """
        self._select_rows("batch_select_indices", "indices", indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Go on with every row of the batch `repeats` times."""
        keys = next((layer.keys for layer in self.layers if layer.is_initialized), None)
        every = torch.arange(self.rows, device=CPU if keys is None else keys.device)
        self._select_rows("batch_repeat_interleave", "repeats", every.repeat_interleave(repeats))

    def _select_rows(self, operation: str, name: str, index: Any) -> None:
        with self._changed_whole(operation):
            chosen = places(name, index, self.rows)
            super().reorder_cache(chosen)
            self._rows.select(chosen)

    def keep_tokens(self, index: Tensor | Sequence[int] | Sequence[bool]) -> None:
        """Keep some of the cached tokens, in all layers and rows, as if there had been no others: the next token's
        position is their number, unless the request says another.

        Args:
            index: (n,) integers, negative ones from the end, or (tokens,) bool; a tensor or a list. In any order, none
                twice.

        Raises: TypeError; IndexError for tokens that are not there or more than there are, as for
            `batch_select_indices`; RuntimeError for a part of a split cache, and where a layer slides a window that
            has left tokens behind. Nothing is changed then.
        """
        with self._changed_whole("keep_tokens"):
            tokens = self.get_seq_length()
            chosen = places("index", index, tokens)
            if len(chosen) > tokens:
                raise IndexError(f"index: expected at most the {tokens} tokens that are here, got {len(chosen)}")
            for i, layer in enumerate(self.layers):
                if layer.is_sliding and layer.keys.shape[2] != tokens:
                    raise RuntimeError(
                        f"keep_tokens: layer {i} slides a window and holds the last {layer.keys.shape[2]} of {tokens} "
                        "tokens; call activate_past_recording on the empty cache for it to hold all of them"
                    )
                keep_tokens(layer, chosen)

    def crop(self, *args: Any, **kwargs: Any) -> None:
        # Older transformers give a tensor, which would become a layer's length.
        args = tuple(int(x) if isinstance(x, Tensor) else x for x in args)
        with self._changed_whole("crop"):
            super().crop(*args, **kwargs)

    def reset(self) -> None:
        if not self.is_complete:
            raise RuntimeError("reset changes all layers; merge the parts of a split cache first")
        with working_on("reset", self):
            for layer in self.layers:
                # Older transformers would zero the states, which others may hold, and keep their length.
                layer.keys = layer.values = None
                layer.is_initialized = False
                if self._session is not None:
                    self._session.forget_keystream(layer)
            self.has_cut_gradients = False
            super().reset()

    def _with_layers(self, layers: list[CacheLayerMixin], split_id: str | None = None) -> "EncodedCache":
        other = EncodedCache(self.session, layers, self.sequences)
        other.split_id = split_id
        return other

    @outside_inference_mode()
    def on(self, device: torch.device | str | None) -> "EncodedCache":
        """The same cache in layer objects of its own, on `device` if given."""
        with working_on("cache", self):
            return self._with_layers([moved(layer, device) for layer in self.layers])

    @outside_inference_mode()
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
        with working_on("cache", self):
            gpu = [moved(layer, gpu_device) if i in wanted else AbsentLayer() for i, layer in enumerate(self.layers)]
            cpu = [AbsentLayer() if i in wanted else moved(layer, cpu_device) for i, layer in enumerate(self.layers)]
        split_id = secrets.token_hex(8)
        gpu_part, cpu_part = self._with_layers(gpu, split_id), self._with_layers(cpu, split_id)
        cpu_part._rows, cpu_part._claim = gpu_part._rows, gpu_part._claim
        return gpu_part, cpu_part

    def join(self, cpu_kvcache: "EncodedCache") -> "EncodedCache":
        """Both parts as one cache over the same layers and rows: what is done to it, is done to the parts as well."""
        parts = (self, cpu_kvcache)
        _check_parts(parts)
        layers = [parts[1 if isinstance(layer, AbsentLayer) else 0].layers[i] for i, layer in enumerate(self.layers)]
        joined = self._with_layers(layers)
        joined._rows = cpu_kvcache._rows = self._rows
        joined._claim = cpu_kvcache._claim = self._claim
        return joined


def _layers_of(cache: DynamicCache, count: int) -> list[Any]:
    """The first layers of a cache, and those that a plain one would only make on the way."""
    layers = list(cache.layers)
    if cache.layer_class_to_replicate is DynamicLayer:
        layers += [DynamicLayer() for _ in range(count - len(layers))]
    if len(layers) < count or any(layer.get_seq_length() for layer in layers[count:]):
        raise ValueError(f"past_key_values: expected the {count} layers of the model, got {len(layers)}")
    return layers[:count]


def _check_plain(plain: DynamicCache, layers: list[Any], session: Session) -> None:
    """Raises what `EncodedCache.encode` raises."""
    if type(plain) is not DynamicCache or plain.offloading:
        kind = f"{'off-loading ' if getattr(plain, 'offloading', False) else ''}{type(plain).__name__}"
        raise TypeError(f"past_key_values: expected a DynamicCache, whose K and V can be encoded, got a {kind}")
    for index, layer in enumerate(layers):
        if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer):
            raise TypeError(f"past_key_values: layer {index} is a {type(layer).__name__}, which cannot be encoded")
    numbered = dict(enumerate(layers))
    if not _tokens_in(numbered, "past_key_values"):
        raise ValueError("past_key_values: holds no tokens")
    _check_sizes(numbered, "past_key_values", session.batch_size, session.shape)
    _check_windows(numbered)
    for index in session.settings.sealed_layers:
        layer = layers[index]
        if torch.is_grad_enabled() and (layer.keys.requires_grad or layer.values.requires_grad):
            raise ValueError(
                f"past_key_values: layer {index} is to be sealed, and gradients do not flow through what is; use "
                'torch.no_grad() or cache_encoding="permuted"'
            )


def _encode_layers(layers: list[Any], session: Session) -> list[CacheLayerMixin]:
    """Filled plain layers, encoded."""
    sealed, tokens = session.settings.sealed_layers, layers[0].get_seq_length()
    writes = session.take_writes(session.batch_size, tokens, CPU) if sealed else None
    numbers: dict[tuple[torch.device, int], Tensor] = {}  # on their device, of the last tokens: layers share them
    encoded = []
    for index, layer in enumerate(layers):
        device, held = layer.keys.device, layer.keys.shape[2]
        own: Any = growing(layer, index in sealed)
        if own.is_sliding:
            own.cumulative_length = layer.cumulative_length
        keys, values = session.feature_key(index, device).encode_cache(layer.keys, layer.values)
        if writes is None or index not in sealed:
            fill(own, keys, values)
        else:
            place = (device, held)
            numbers.setdefault(place, upload(writes.numbers[:, tokens - held :], device))
            sealing = session.sealing(index, numbers[place], writes.branch)
            own.branch = writes.branch
            keys, values = ops.seal(keys, sealing, is_value=False), ops.seal(values, sealing, is_value=True)
            fill(own, keys, values, numbers[place])
        encoded.append(own)
    return encoded


def _tokens_in(layers: dict[int, Any], name: str) -> int:
    """How many tokens each of the layers holds. Raises ValueError where they differ."""
    lengths = {layer.get_seq_length() for layer in layers.values()}
    if len(lengths) > 1:
        each = {i: layer.get_seq_length() for i, layer in layers.items()}
        raise ValueError(f"{name}: its layers hold different numbers of tokens, {each}; cut all alike")
    return max(lengths, default=0)


def _check_sizes(layers: dict[int, Any], name: str, rows: int, shape: ModelShape) -> None:
    """Whether layers hold K and V of these rows."""
    heads, size = shape.num_kv_heads, shape.head_dim
    for index, layer in layers.items():
        found = layer.keys.shape
        if found != layer.values.shape or found != (rows, heads, found.numel() // (rows * heads * size), size):
            raise ValueError(
                f"{name}: layer {index}: expected K and V ({rows} rows, {heads} heads, tokens, {size}), got "
                f"{tuple(found)} and {tuple(layer.values.shape)}; rows of several sessions are joined in the plain "
                "caches that decode_kvcache gives"
            )


def _check_windows(layers: dict[int, Any]) -> None:
    """Whether layers that slide hold the tokens that the next one's window reaches."""
    for index, layer in layers.items():
        if layer.is_sliding:
            length, held, window = layer.cumulative_length, layer.keys.shape[2], layer.sliding_window
            if not min(length, window - 1) <= held <= length:
                raise ValueError(
                    f"past_key_values: layer {index} slides a window of {window}, and only {held} of its {length} "
                    "tokens are here"
                )


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
    if first._rows is not parts[1]._rows and not _same_rows(first.sequences, parts[1].sequences):
        raise ValueError("gpu_kvcache and cpu_kvcache: their rows continue different sequences")
    lengths = {part.layers[layer].get_seq_length() for part in parts for layer in part.layer_indices}
    if len(lengths) != 1:
        raise ValueError(f"gpu_kvcache and cpu_kvcache: they hold different numbers of tokens, {sorted(lengths)}")


def _same_rows(a: Tensor | None, b: Tensor | None) -> bool:
    return a is b if a is None or b is None else torch.equal(a.cpu(), b.cpu())
