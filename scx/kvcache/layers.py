"""How one layer's K and V lie in memory: growing in place, sealed or not, sliding or not.

Nothing here knows a key: a sealed layer is told how its rows are sealed. Notation: B sequences, G key/value heads,
N cached tokens, d head size.
"""

import copy
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin, DynamicLayer, DynamicSlidingWindowLayer

import scx_kernels as ops

__all__ = [
    "AbsentLayer",
    "GrowingLayer",
    "SealedLayer",
    "SealedSlidingLayer",
    "SharedLogs",
    "Slots",
    "Stored",
    "WriteLog",
    "append",
    "growing",
    "moved",
    "without_room",
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


def append(layer: GrowingLayer, k: Tensor, v: Tensor) -> Stored:
    """Append plain or permuted K and V (B, G, n, d) to a layer that is not sealed. Returns all of its K and V.

    Raises: TypeError for a sealed layer, in which they would lie as they are.
    """
    if isinstance(layer, SealedLayer):
        raise TypeError("layer: expected one that is not sealed; `EncodedLayers.append` seals what it writes")
    batch, groups, tokens, size = k.shape
    slots = layer.room(tokens, (batch, groups, size), k)
    slots.keys[:, :, slots.offset : slots.offset + tokens] = k
    slots.values[:, :, slots.offset : slots.offset + tokens] = v
    return layer.take_in(slots)


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


def without_room(layer: CacheLayerMixin) -> CacheLayerMixin:
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


def growing(layer: CacheLayerMixin, is_sealed: bool) -> CacheLayerMixin:
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


def moved(layer: CacheLayerMixin, device: torch.device | str | None) -> CacheLayerMixin:
    """A layer object of its own with its tensors on `device`; the tensors are shared where they lie there already."""
    twin: Any = copy.copy(layer)
    if device is not None and twin.is_initialized:
        twin.keys, twin.values = twin.keys.to(device), twin.values.to(device)
        twin.device = twin.keys.device
        if isinstance(twin, SealedLayer) and twin.writes is not None:
            twin.writes = twin.writes.to(device)
    return twin
