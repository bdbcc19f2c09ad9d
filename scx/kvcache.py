"""The encoded key-value cache: made by a prefill, split between the sides, joined again, decoded with its session.

Each layer holds K and V in token order under the session's feature permutations, (B, G, N, d), in the layers that
transformers uses for plain caches. The cache carries its session while it stays in the process; pickled or saved it
carries the session's public id alone.
"""

import copy
import secrets
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

import scx_kernels as ops
from scx.devices import upload
from scx.encoding import FeatureKey
from scx.keys import Session

__all__ = [
    "EncodedCache",
    "GrowingLayer",
    "SealedLayer",
    "SealedSlidingLayer",
    "decode_kvcache",
    "merge_kvcache_dynamic",
    "split_kvcache_dynamic",
]


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


class Slots(NamedTuple):
    """Where a layer's next tokens are written: buffers (B, G, capacity, d) and the slots offset..offset+tokens-1."""

    keys: Tensor
    values: Tensor
    offset: int
    tokens: int
    sealing: ops.Sealing | None = None

    @property
    def arguments(self) -> dict[str, Any]:
        """As arguments of `qkv_decode_encode`."""
        return {"keys": self.keys, "values": self.values, "offset": self.offset, "sealing": self.sealing}


class Stored(NamedTuple):
    """K and V as a layer stores them, (B, G, N, d), and how they are sealed, None if they are not."""

    keys: Tensor
    values: Tensor
    sealing: ops.Sealing | None = None


def _begins(x: Tensor, buffer: Tensor) -> bool:
    return x.data_ptr() == buffer.data_ptr()


class WriteLog:
    """Write numbers (B, capacity) of rows in the order of their slots, of which the first `filled` are given out.

    It grows at its end only, so layers that the same passes filled share one: a token has the same number in all.
    Whoever goes on from an earlier row takes a log of its own.
    """

    __slots__ = ("filled", "numbers")

    def __init__(self, numbers: Tensor, filled: int) -> None:
        self.numbers = numbers
        self.filled = filled

    def append(self, writes: Tensor) -> None:
        """Fill the next slots with the numbers (B, S) of their rows."""
        end = self.filled + writes.shape[1]
        self.numbers[:, self.filled : end] = writes
        self.filled = end


SharedLogs = dict[Any, tuple[WriteLog | Tensor | None, WriteLog]]
"""Logs that a pass has written, with what a layer held before it, by that object's identity and the slots written."""


class GrowingLayer(DynamicLayer):
    """A layer that grows in place: `keys` and `values` are the filled part of buffers with room for more tokens.

    A layer whose states were replaced (reordered, cropped, moved) or that was copied has no room; it gets new buffers
    when it grows. So nothing that another layer still shows is ever written over.
    """

    _buffers: tuple[Tensor, Tensor] | None = None
    _first = 0  # slot of the first token that is held

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_buffers": None}

    @property
    def held_tokens(self) -> int:
        """How many tokens' K and V are here."""
        return 0 if not self.is_initialized or self.keys is None or not self.keys.numel() else self.keys.shape[2]

    def crop(self, *args: Any, **kwargs: Any) -> None:
        super().crop(*args, **kwargs)
        self._buffers = None

    def room(self, tokens: int, shape: tuple[int, ...], like: Tensor) -> Slots:
        """Slots for `tokens` more tokens of (B, G, d) states, in like's dtype and on its device."""
        batch, groups, size = shape
        held = self.held_tokens
        if self._buffers is None or not self._has_room(self._buffers[0], held + tokens):
            capacity = max(held + tokens, held + held // 4, 64)
            keys, values = (like.new_empty(batch, groups, capacity, size) for _ in range(2))
            if held:
                keys[:, :, :held], values[:, :, :held] = self.keys, self.values
            self._buffers, self._first = (keys, values), 0
        return Slots(*self._buffers, self._first + held, tokens)

    def _has_room(self, buffer: Tensor, tokens: int) -> bool:
        if not self.held_tokens:
            return False
        place = buffer[:, :, self._first :] if self._first else buffer
        return _begins(self.keys, place) and tokens <= place.shape[2]

    def take_in(self, slots: Slots) -> Stored:
        """Count the tokens written into `slots` as the layer's. Returns all of its K and V."""
        filled = slots.offset + slots.tokens
        self.keys, self.values = slots.keys[:, :, :filled], slots.values[:, :, :filled]
        self.dtype, self.device, self.is_initialized = self.keys.dtype, self.keys.device, True
        return Stored(self.keys, self.values)


class SealedLayer(GrowingLayer):
    """A growing layer whose rows are sealed by a stream cipher, K and V under the session's key of one branch.

    `writes` (B, N) int64 are the rows' write numbers, public. They move with the rows, whatever is done to the layer;
    a row that is written anew has a number of its own. `branch` names the writer.
    """

    writes: Tensor | None = None
    branch: str | None = None
    _log: WriteLog | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_log": None}

    def number(self, slots: Slots, writes: Tensor, shared: SharedLogs) -> Tensor:
        """Write the numbers (B, S) of the tokens that go into `slots` beside them. Returns those of all slots.

        Args:
            shared: the logs that this pass has written so far; layers that were alike before it stay so.
        """
        capacity, first, end = slots.keys.shape[2], self._first, slots.offset
        held, log = None if end == first else self.writes, self._log
        goes_on = (
            log is not None and held is not None and _begins(held, log.numbers[:, first:] if first else log.numbers)
        )
        earlier = log if goes_on else held
        alike = (id(earlier), capacity, first, end, writes.device)
        _, self._log = shared.get(alike, (None, None))
        if self._log is None:
            if log is None or not goes_on or log.filled != end or log.numbers.shape[1] != capacity:
                log = WriteLog(writes.new_zeros(slots.keys.shape[0], capacity), end)
                if held is not None:
                    log.numbers[:, first:end] = held
            log.append(writes)
            # What the layer held stays alive with its place here: the next object may have its id.
            _, self._log = shared[alike] = earlier, log
        return self._log.numbers

    def take_in(self, slots: Slots) -> Stored:
        """Count the tokens written into `slots` as the layer's. Returns all of its sealed K and V."""
        keys, values, _ = super().take_in(slots)
        if slots.sealing is None:
            return Stored(keys, values)
        self.writes = slots.sealing.writes[:, : slots.offset + slots.tokens]
        return Stored(keys, values, slots.sealing.at(self.writes))

    def crop(self, *args: Any, **kwargs: Any) -> None:
        held, tokens = self.held_tokens, self.get_seq_length()
        super().crop(*args, **kwargs)
        end = held - (tokens - self.get_seq_length())
        self.writes = None if self.writes is None else self.writes[:, end - self.held_tokens : end]

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        self.writes = None if self.writes is None else self.writes.repeat_interleave(repeats, dim=0)

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        self.writes = None if self.writes is None else self.writes[indices.to(self.writes.device)]

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)
        self.writes = None if self.writes is None else self.writes.index_select(0, beam_idx.to(self.writes.device))

    def reset(self) -> None:
        super().reset()
        self.writes = self.branch = None


class SealedSlidingLayer(SealedLayer, DynamicSlidingWindowLayer):
    """A sealed layer that keeps the tokens which the next one's window reaches: the last `sliding_window` - 1, or all
    of them while it records the past, as transformers' own does.

    The window moves along buffers that have room for a quarter more tokens, or 64; rows that it leaves stay there,
    sealed, until new buffers take the place of these.
    """

    def room(self, tokens: int, shape: tuple[int, ...], like: Tensor) -> Slots:
        if self._buffers is not None and self._buffers[0].shape[2] > 2 * (self.held_tokens + tokens) + 64:
            self._buffers = None  # a long prompt's, most of which the window has left
        return super().room(tokens, shape, like)

    def take_in(self, slots: Slots) -> Stored:
        """Count the tokens written into `slots` as the layer's, and forget those that the next token will not see.
        Returns the sealed K and V that the new tokens may see."""
        if not self.is_initialized:
            self.lazy_initialization(slots.keys, slots.values)
        window, end = self.sliding_window, slots.offset + slots.tokens
        self.cumulative_length += slots.tokens
        seen = slice(max(self._first, end - slots.tokens - window + 1), end)
        if not self.record_past:
            self._first = max(self._first, end - window + 1)
        held = slice(self._first, end)
        self.keys, self.values = slots.keys[:, :, held], slots.values[:, :, held]
        self.writes = None if slots.sealing is None else slots.sealing.writes[:, held]
        sealing = None if slots.sealing is None else slots.sealing.at(slots.sealing.writes[:, seen])
        return Stored(slots.keys[:, :, seen], slots.values[:, :, seen], sealing)


def _without_room(layer: CacheLayerMixin) -> CacheLayerMixin:
    """The layer as it leaves the process: tokens that it holds, not what lies behind them in its buffers."""
    if not isinstance(layer, GrowingLayer) or not layer.is_initialized:
        return layer
    twin = copy.copy(layer)
    twin.keys, twin.values = _alone(layer.keys), _alone(layer.values)
    if isinstance(twin, SealedLayer) and twin.writes is not None:
        twin.writes = _alone(twin.writes)
    return twin


def _alone(x: Tensor) -> Tensor:
    """x in memory that holds nothing else."""
    return x if x.untyped_storage().nbytes() == x.nbytes else x.clone(memory_format=torch.contiguous_format)


def _growing(layer: CacheLayerMixin, is_sealed: bool) -> CacheLayerMixin:
    """The layer, or in place of an empty plain one the kind that stores its tokens encoded.

    Raises: TypeError for an empty layer that is to be sealed and is of a kind that cannot be.
    """
    if layer.is_initialized or isinstance(layer, AbsentLayer):
        return layer
    if type(layer) in (DynamicLayer, GrowingLayer, SealedLayer):
        full = SealedLayer if is_sealed else GrowingLayer
        return layer if type(layer) is full else full()
    if type(layer) in (DynamicSlidingWindowLayer, SealedSlidingLayer):
        sliding = SealedSlidingLayer if is_sealed else DynamicSlidingWindowLayer
        if type(layer) is sliding:
            return layer
        other = sliding(sliding_window=layer.sliding_window)
        other.record_past = layer.record_past
        return other
    if is_sealed:
        raise TypeError(f"past_key_values: a {type(layer).__name__} cannot be sealed; use a DynamicCache of the model")
    return layer


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
    # Of the pass that brought these numbers: the logs that hold them.
    _logs_of: Tensor | None = None
    _logs: SharedLogs

    def __init__(self, session: Session, layers: list[CacheLayerMixin]) -> None:
        sealed = session.settings.sealed_layers
        Cache.__init__(self, layers=[_growing(layer, i in sealed) for i, layer in enumerate(layers)])
        self._bind(session)

    @classmethod
    def adopt(cls, cache: DynamicCache, session: Session) -> "EncodedCache":
        """Turn an empty plain cache, in place, into the cache of `session`; its other holders see the same object."""
        adopted: Any = cache
        adopted.__class__ = cls
        missing = session.shape.num_layers - len(cache.layers) if cache.layer_class_to_replicate is DynamicLayer else 0
        layers, sealed = [*cache.layers, *(DynamicLayer() for _ in range(missing))], session.settings.sealed_layers
        adopted.layers = [_growing(layer, i in sealed) for i, layer in enumerate(layers)]
        adopted._bind(session)
        return adopted

    def _bind(self, session: Session) -> None:
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
        return {**self.__dict__, "layers": [_without_room(x) for x in self.layers], **of_the_process}

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

    @property
    def is_attached(self) -> bool:
        """Whether the session's keys are here, or its id alone."""
        return self._session is not None

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
            key = self.session.feature_key(layer, device).select(upload(self.sequences, device))
            self._selected[layer, device] = key
        return key

    def room(
        self, layer_idx: int, tokens: int, shape: tuple[int, ...], like: Tensor, writes: Tensor | None = None
    ) -> Slots | None:
        """Slots in a layer's own buffers for `tokens` more tokens of (B, G, d) states in like's dtype.

        None where states cannot be written in place: in a sliding layer, in one that lies on another device than
        `like`, and where gradients are to flow through them.

        Args:
            writes: (B, tokens) write numbers, which a sealed layer needs.

        Raises: ValueError where gradients are to flow through a sealed layer.
        """
        layer = self.layers[layer_idx] if layer_idx < len(self.layers) else None
        wants_gradients = like.requires_grad and torch.is_grad_enabled()
        if wants_gradients and isinstance(layer, SealedLayer):
            raise ValueError(
                "cache_encoding: gradients do not flow through a sealed cache; "
                "use torch.no_grad(), name the mode, or use_cache=False"
            )
        if not isinstance(layer, GrowingLayer) or wants_gradients:
            return None
        if layer.is_initialized and layer.keys.device != like.device:
            return None
        if not isinstance(layer, SealedLayer):
            return layer.room(tokens, shape, like)
        if writes is None:
            raise ValueError(f"writes: layer {layer_idx} is sealed and needs the numbers of its tokens")
        self._own(layer_idx, layer)
        slots = layer.room(tokens, shape, like)
        if self._logs_of is not writes:
            self._logs_of, self._logs = writes, {}
        numbers = layer.number(slots, writes.to(like.device), self._logs)
        sealing = self.session.sealing(layer_idx, numbers, self.session.branch, layer)
        if sealing.kept is not None:
            rows = numbers[:, slots.offset - layer.held_tokens : slots.offset + tokens]
            sealing.kept.cover(sealing.at(rows), shape[1], shape[2], like.dtype)
        return Slots(slots.keys, slots.values, slots.offset, tokens, sealing)

    @contextmanager
    def restored_on_failure(self) -> Iterator[None]:
        """A pass that breaks off half-way leaves every layer with the tokens it had, so that it can be run again."""
        before = [dict(vars(layer)) for layer in self.layers]
        try:
            yield
        except BaseException:
            for layer, state in zip(self.layers, before, strict=True):
                vars(layer).clear()
                vars(layer).update(state)
            raise

    def _own(self, layer_idx: int, layer: SealedLayer) -> None:
        """Make a layer this branch's own: what another holder of the session wrote is sealed anew, so that no two ever
        write under one key."""
        branch = self.session.branch
        if layer.is_initialized and layer.branch not in (None, branch):
            old = self.sealing(layer_idx, layer.keys.device)
            writes = self.session.take_writes(layer.keys.shape[0], layer.keys.shape[2], layer.keys.device)
            new = self.session.sealing(layer_idx, writes, branch)
            if old is None:
                raise RuntimeError(f"layer {layer_idx} holds sealed rows without their numbers")
            layer.keys = ops.reseal(layer.keys, old, new, is_value=False)
            layer.values = ops.reseal(layer.values, old, new, is_value=True)
            layer.writes = writes
        layer.branch = branch

    def sealing(self, layer_idx: int, device: torch.device) -> ops.Sealing | None:
        """How the rows that a layer holds are sealed, for operations that read them on `device`; None if they are
        not."""
        layer = self.layers[layer_idx]
        if not isinstance(layer, SealedLayer) or layer.branch is None or layer.writes is None:
            return None
        return self.session.sealing(layer_idx, layer.writes.to(device), layer.branch, layer)

    def take_in(self, layer_idx: int, slots: Slots) -> Stored:
        """Count the tokens written into `slots` as the layer's. Returns the layer's K and V, of all tokens that the new
        ones may see."""
        return self.layers[layer_idx].take_in(slots)

    def append(self, keys: Tensor, values: Tensor, layer_idx: int, writes: Tensor | None = None) -> Stored:
        """Append feature-permuted K and V (B, G, S, d) to a layer, which seals them if it is sealed.

        Args:
            writes: (B, S) write numbers, which a sealed layer needs; `session.take_writes` gives them.

        Returns: the layer's K and V as they are stored, of all tokens that the new ones may see.
        """
        if not isinstance(self.layers[layer_idx], SealedLayer):
            return Stored(*super().update(keys, values, layer_idx))
        batch, groups, tokens, size = keys.shape
        slots = self.room(layer_idx, tokens, (batch, groups, size), keys, writes)
        if slots is None or slots.sealing is None:
            raise ValueError(f"keys: expected them on {self.layers[layer_idx].keys.device}, where the layer lies")
        new = slice(slots.offset, slots.offset + tokens)
        own = slots.sealing.at(slots.sealing.writes[:, new])
        slots.keys[:, :, new] = ops.seal(keys, own, is_value=False)
        slots.values[:, :, new] = ops.seal(values, own, is_value=True)
        return self.take_in(layer_idx, slots)

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


def _moved(layer: CacheLayerMixin, device: torch.device | str | None) -> CacheLayerMixin:
    """A layer object of its own with its tensors on `device`; the tensors are shared where they lie there already."""
    twin: Any = copy.copy(layer)
    if device is not None and twin.is_initialized:
        twin.keys, twin.values = twin.keys.to(device), twin.values.to(device)
        twin.device = twin.keys.device
        if isinstance(twin, SealedLayer) and twin.writes is not None:
            twin.writes = twin.writes.to(device)
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

    A cache of the split placement is divided between the parties already; its two parts stand for what each side holds,
    and `gpu_layers` must be the layers of the untrusted side.

    Returns: (untrusted part, secure part). They grow in place when a decode call is given both.
    Raises: TypeError for a plain cache; ValueError for layers out of range, named twice or protected, or a part.
    """
    from scx.party.cache import SplitCache

    if isinstance(cache, SplitCache):
        parts: Any = cache.divide(gpu_layers)
        return parts
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
