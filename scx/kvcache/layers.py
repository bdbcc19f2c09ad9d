"""How one layer's K and V lie in memory: growing in place, sealed or not, sliding or not.

Nothing here knows a key: a sealed layer is told how its rows are sealed. Notation: B sequences, G key/value heads,
N cached tokens, d head size.
"""

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin, DynamicLayer, DynamicSlidingWindowLayer

import scx_kernels as ops
from scx.devices import outside_inference_mode

__all__ = [
    "EDITED",
    "AbsentLayer",
    "Buffers",
    "GrowingLayer",
    "SealedLayer",
    "SealedSlidingLayer",
    "SharedLogs",
    "Slots",
    "Stored",
    "WriteLog",
    "append",
    "fill",
    "growing",
    "keep_tokens",
    "moved",
    "without_room",
]

EDITED = (
    "its K and V are sealed, and are not those that were sealed there: they were replaced, cut or written over by "
    "hand. A cache is cut and selected from by its methods (crop, keep_tokens, batch_select_indices, reorder_cache); "
    "for what else is to be done to it, edit the plain cache that decode_kvcache gives, and pass that"
)
_AS_THEY_ARE = "expected one that is not sealed; `EncodedLayers.append` seals what it writes"


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


class Buffers:
    """Room for a layer's K and V, (B, G, capacity, d), whose first `filled` slots were shown.

    They are filled at their end only. What was shown is never written again: whoever took a tensor out of a layer, or
    shares it with another one, keeps what it held. Whoever goes on from an earlier token takes buffers of their own.
    """

    __slots__ = ("filled", "keys", "values")

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        self.keys = keys
        self.values = values
        self.filled = 0

    @property
    def capacity(self) -> int:
        """Slots."""
        return self.keys.shape[2]

    def show(self, first: int, end: int) -> tuple[Tensor, Tensor]:
        """K and V in the slots first..end-1, of which none will be written again."""
        self.filled = end
        # Their versions are their own: they change where these rows are edited, not where other slots are filled.
        return self.keys.data.narrow(2, first, end - first), self.values.data.narrow(2, first, end - first)

    def take_more(self, tokens: int, dtype: torch.dtype, keys: Tensor, values: Tensor) -> bool:
        """Whether `tokens` more in this dtype can be written behind these rows, which are the last that were shown."""
        return (
            self.filled + tokens <= self.keys.shape[2]
            and self.keys.dtype == dtype
            and _lies_at_end(keys, self.keys, self.filled)
            and _lies_at_end(values, self.values, self.filled)
        )


def _lies_at_end(x: Tensor, buffer: Tensor, filled: int) -> bool:
    (batch, groups, _, size), stride, tokens = buffer.shape, buffer.stride(), x.shape[2]
    return (
        x.data_ptr() == buffer.data_ptr() + (filled - tokens) * stride[2] * buffer.element_size()
        and x.shape == (batch, groups, tokens, size)
        and x.stride() == stride
    )


class Slots(NamedTuple):
    """Where a layer's next tokens are written: the slots offset..offset+tokens-1 of buffers."""

    buffers: Buffers
    offset: int
    tokens: int
    sealing: ops.Sealing | None = None

    @property
    def keys(self) -> Tensor:
        """(B, G, capacity, d)."""
        return self.buffers.keys

    @property
    def values(self) -> Tensor:
        """(B, G, capacity, d)."""
        return self.buffers.values

    @property
    def arguments(self) -> dict[str, Any]:
        """As arguments of `qkv_decode_encode`."""
        return {"keys": self.keys, "values": self.values, "offset": self.offset, "sealing": self.sealing}


class Stored(NamedTuple):
    """K and V as a layer stores them, (B, G, N, d), and how they are sealed, None if they are not."""

    keys: Tensor
    values: Tensor
    sealing: ops.Sealing | None = None


class Witness:
    """Which tensor was seen, where it lay, and how often it had been written.

    A tensor that was made in inference mode does not count how often.
    """

    __slots__ = ("_place", "_tensor", "_version")

    def __init__(self, x: Tensor) -> None:
        self._tensor = x
        self._place = x.data_ptr()
        self._version = None if x.is_inference() else x._version

    def recognises(self, x: Tensor | None) -> bool:
        """Whether x is this tensor, and unchanged as far as can be seen."""
        return (
            x is self._tensor and x.data_ptr() == self._place and (self._version is None or x._version == self._version)
        )


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

    That is so while they are the rows that these buffers showed last. A layer whose states were replaced, whoever did
    it, that is behind its buffers, or that was copied, gets buffers of its own when it grows.
    """

    keys: Any
    values: Any
    _buffers: Buffers | None = None
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

    def reset(self) -> None:
        # Older transformers would write zeros over states that others may hold.
        self.keys = self.values = self._buffers = None
        self.is_initialized = False
        super().reset()

    def update(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append K and V (B, G, n, d) as a plain layer does, for gradients to flow through. Returns all of them."""
        self._buffers = None
        return super().update(*args, **kwargs)

    def room(self, tokens: int, shape: tuple[int, ...], like: Tensor) -> Slots:
        """Slots for `tokens` more tokens of (B, G, d) states, on like's device, in the dtype to which like's and that
        of the states here are promoted."""
        held = self.held_tokens
        dtype = like.dtype
        if held:
            dtype = torch.promote_types(dtype, torch.promote_types(self.keys.dtype, self.values.dtype))
        buffers = self._buffers
        if buffers is not None and held and buffers.take_more(tokens, dtype, self.keys, self.values):
            end = buffers.filled
        else:
            buffers, end = self._new_buffers(tokens, shape, like, dtype), held
        self._buffers, self._first = buffers, end - held
        return Slots(buffers, end, tokens)

    def _new_buffers(self, tokens: int, shape: tuple[int, ...], like: Tensor, dtype: torch.dtype) -> Buffers:
        """Buffers with what the layer holds in their first slots, and room for `tokens` more."""
        held, (batch, groups, size) = self.held_tokens, shape
        capacity = max(held + tokens, held + held // 4, 64)
        with outside_inference_mode():
            buffers = Buffers(*(like.new_empty(batch, groups, capacity, size, dtype=dtype) for _ in range(2)))
        if held:
            buffers.keys[:, :, :held], buffers.values[:, :, :held] = self.keys.detach(), self.values.detach()
        return buffers

    def take_in(self, slots: Slots) -> Stored:
        """Count the tokens written into `slots` as the layer's. Returns all of its K and V."""
        self.keys, self.values = slots.buffers.show(self._first, slots.offset + slots.tokens)
        self.dtype, self.device, self.is_initialized = self.keys.dtype, self.keys.device, True
        return Stored(self.keys, self.values)


def append(layer: GrowingLayer, k: Tensor, v: Tensor) -> Stored:
    """Append plain or permuted K and V (B, G, n, d) to a layer that is not sealed. Returns all of its K and V.

    Raises: TypeError for a sealed layer, in which they would lie as they are.
    """
    if isinstance(layer, SealedLayer):
        raise TypeError(f"layer: {_AS_THEY_ARE}")
    batch, groups, tokens, size = k.shape
    slots = layer.room(tokens, (batch, groups, size), k)
    slots.keys[:, :, slots.offset : slots.offset + tokens] = k
    slots.values[:, :, slots.offset : slots.offset + tokens] = v
    return layer.take_in(slots)


class SealedLayer(GrowingLayer):
    """A growing layer whose rows are sealed by a stream cipher, K and V under the session's key of one branch.

    `writes` (B, N) int64 are the rows' write numbers, public. They move with the rows, whatever is done to the layer by
    its methods; a row that is written anew has a number of its own. `branch` names the writer. Rows that were replaced
    or edited otherwise have no numbers, and cannot be unsealed.
    """

    writes: Tensor | None = None
    branch: str | None = None
    _log: WriteLog | None = None
    _sealed: tuple[Witness, Witness] | None = None  # K and V that `writes` number

    def __getstate__(self) -> dict[str, Any]:
        self._require_unedited()
        return {**super().__getstate__(), "_log": None, "_sealed": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if self.writes is not None:
            self.hold(self.keys, self.values, self.writes)

    def hold(self, keys: Tensor, values: Tensor, writes: Tensor) -> None:
        """Take sealed K and V (B, G, N, d) and their write numbers (B, N) as what the layer holds."""
        self.keys, self.values, self.writes = keys, values, writes
        self._sealed = Witness(keys), Witness(values)

    @property
    def is_unedited(self) -> bool:
        """Whether K and V are, as far as can be seen, those that were sealed here."""
        if self._sealed is None or self.writes is None:
            return not self.held_tokens
        keys, values = self._sealed
        is_whole = self.writes.shape[1] == self.keys.shape[2]
        return is_whole and keys.recognises(self.keys) and values.recognises(self.values)

    def _require_unedited(self) -> None:
        if not self.is_unedited:
            raise ValueError(f"layer: {EDITED}")

    def number(self, slots: Slots, writes: Tensor, shared: SharedLogs) -> Tensor:
        """Write the numbers (B, S) of the tokens that go into `slots` beside them. Returns those of all slots.

        Args:
            shared: the logs that this pass has written so far; layers that were alike before it stay so.
        """
        capacity, first, end = slots.buffers.capacity, self._first, slots.offset
        held, log = None if end == first else self.writes, self._log
        goes_on = log is not None and held is not None and held.data_ptr() == log.numbers[:, first:].data_ptr()
        earlier = log if goes_on else held
        alike = (id(earlier), capacity, first, end, writes.device)
        _, self._log = shared.get(alike, (None, None))
        if self._log is None:
            if log is None or not goes_on or log.filled != end or log.numbers.shape[1] != capacity:
                with outside_inference_mode():
                    log = WriteLog(writes.new_zeros(len(writes), capacity), end)
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
        writes = slots.sealing.writes[:, self._first : slots.offset + slots.tokens]
        self.hold(keys, values, writes)
        return Stored(keys, values, slots.sealing.at(writes))

    def update(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Refuses to append K and V that are not sealed."""
        raise TypeError(f"layer: {_AS_THEY_ARE}")

    def crop(self, *args: Any, **kwargs: Any) -> None:
        self._require_unedited()
        held, tokens = self.held_tokens, self.get_seq_length()
        super().crop(*args, **kwargs)
        end = held - (tokens - self.get_seq_length())
        self._move_numbers(lambda writes: writes[:, end - self.held_tokens : end])

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._require_unedited()
        super().batch_repeat_interleave(repeats)
        self._move_numbers(lambda writes: writes.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._require_unedited()
        super().batch_select_indices(indices)
        self._move_numbers(lambda writes: writes[indices.to(writes.device)])

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._require_unedited()
        super().reorder_cache(beam_idx)
        self._move_numbers(lambda writes: writes.index_select(0, beam_idx.to(writes.device)))

    def _move_numbers(self, move: Callable[[Tensor], Tensor]) -> None:
        """What was done to K and V, to their numbers (B, N)."""
        if self.writes is not None:
            self.hold(self.keys, self.values, move(self.writes))

    def reset(self) -> None:
        super().reset()
        self.writes = self.branch = self._log = self._sealed = None


class SealedSlidingLayer(SealedLayer, DynamicSlidingWindowLayer):
    """A sealed layer that keeps the tokens which the next one's window reaches: the last `sliding_window` - 1, or all
    of them while it records the past, as transformers' own does.

    The window moves along buffers that have room for a quarter more tokens, or 64; rows that it leaves stay there,
    sealed, until new buffers take the place of these.
    """

    def room(self, tokens: int, shape: tuple[int, ...], like: Tensor) -> Slots:
        if self._buffers is not None and self._buffers.capacity > 2 * (self.held_tokens + tokens) + 64:
            self._buffers = None  # a long prompt's, most of which the window has left
        return super().room(tokens, shape, like)

    def take_in(self, slots: Slots) -> Stored:
        """Count the tokens written into `slots` as the layer's, and forget those that the next token will not see.
        Returns the sealed K and V that the new tokens may see."""
        if not self.is_initialized:
            self.lazy_initialization(slots.keys, slots.values)
        window, end = self.sliding_window, slots.offset + slots.tokens
        self.cumulative_length += slots.tokens
        seen_first = max(self._first, end - slots.tokens - window + 1)
        if not self.record_past:
            self._first = max(self._first, end - window + 1)
        self.keys, self.values = slots.buffers.show(self._first, end)
        seen = slots.buffers.show(seen_first, end)
        if slots.sealing is None:
            return Stored(*seen)
        self.hold(self.keys, self.values, slots.sealing.writes[:, self._first : end])
        return Stored(*seen, slots.sealing.at(slots.sealing.writes[:, seen_first:end]))


def fill(layer: Any, keys: Tensor, values: Tensor, writes: Tensor | None = None) -> None:
    """Give an empty layer its K and V (B, G, N, d), not copied, and a sealed one their numbers (B, N)."""
    layer.lazy_initialization(keys, values)
    if writes is None:
        layer.keys, layer.values = keys, values
    else:
        layer.hold(keys, values, writes)


def keep_tokens(layer: Any, index: Tensor) -> None:
    """Keep these (n,) int64 of the tokens that a layer holds, as if there had been no others."""
    keys, values = (x.index_select(2, index.to(x.device)) for x in (layer.keys, layer.values))
    if isinstance(layer, SealedLayer):
        writes: Any = layer.writes
        layer.hold(keys, values, writes.index_select(1, index.to(writes.device)))
    else:
        layer.keys, layer.values = keys, values
    if layer.is_sliding:
        layer.cumulative_length = len(index)


def growing(layer: CacheLayerMixin, is_sealed: bool) -> CacheLayerMixin:
    """In place of an empty layer, an empty one of the kind that stores its tokens encoded.

    Raises: TypeError for a layer that is to be sealed and is of a kind that cannot be.
    """
    if type(layer) in (DynamicLayer, GrowingLayer, SealedLayer):
        return SealedLayer() if is_sealed else GrowingLayer()
    if type(layer) in (DynamicSlidingWindowLayer, SealedSlidingLayer):
        sliding: Any = SealedSlidingLayer if is_sealed else DynamicSlidingWindowLayer
        other = sliding(sliding_window=layer.sliding_window)
        other.record_past = layer.record_past
        return other
    if is_sealed:
        raise TypeError(f"past_key_values: a {type(layer).__name__} cannot be sealed; use a DynamicCache of the model")
    return layer


def moved(layer: CacheLayerMixin, device: torch.device | str | None) -> CacheLayerMixin:
    """A layer object of its own with its tensors on `device`; the tensors are shared where they lie there already."""
    if device is None or not layer.is_initialized:
        return copy.copy(layer)
    twin = _twin(layer, lambda x: x.to(device))
    twin.device = twin.keys.device
    return twin


def without_room(layer: CacheLayerMixin) -> CacheLayerMixin:
    """The layer as it leaves the process: tokens that it holds, not what lies behind them in its buffers."""
    return _twin(layer, _alone) if isinstance(layer, GrowingLayer) and layer.is_initialized else layer


def _twin(layer: CacheLayerMixin, change: Callable[[Tensor], Tensor]) -> Any:
    """A copy of a layer whose tensors were changed."""
    twin: Any = copy.copy(layer)
    keys, values = change(twin.keys), change(twin.values)
    if isinstance(twin, SealedLayer) and twin.writes is not None:
        twin.hold(keys, values, change(twin.writes))
    else:
        twin.keys, twin.values = keys, values
    return twin


def _alone(x: Tensor) -> Tensor:
    """x in memory that holds nothing else."""
    return x if x.untyped_storage().nbytes() == x.nbytes else x.clone(memory_format=torch.contiguous_format)
