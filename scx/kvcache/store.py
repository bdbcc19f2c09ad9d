"""The layers of an encoded cache: how rows get in and out of them, and under which key they are sealed."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

import scx_kernels as ops
from scx.keys import Session, Writes
from scx.kvcache.conversation import ConversationCache
from scx.kvcache.layers import AbsentLayer, GrowingLayer, SealedLayer, SharedLogs, Slots, Stored

__all__ = ["EncodedLayers"]


@dataclass
class Numbering:
    """What became of the write numbers of one pass: the logs that hold them, and the layers that have taken them."""

    writes: Writes | None = None
    logs: SharedLogs = field(default_factory=dict)
    layers: set[int] = field(default_factory=set)


class EncodedLayers(ConversationCache):
    """K and V of some or all layers, written and read under one session's keys."""

    _session: Session | None
    _numbering: Numbering

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
        return len(self.layer_indices) == len(self.layers)

    @property
    def carries_gradients(self) -> bool:
        """Whether gradients flow into rows that are stored here, or would if these were not sealed, so that a pass over
        them is one with gradients."""
        return self.has_cut_gradients or any(
            x is not None and x.requires_grad
            for layer in self.layers
            if not isinstance(layer, AbsentLayer)
            for x in (layer.keys, layer.values)
        )

    def room(
        self, layer_idx: int, tokens: int, shape: tuple[int, ...], like: Tensor, writes: Writes | None = None
    ) -> Slots | None:
        """Slots in a layer's own buffers for `tokens` more tokens of (B, G, d) states, for a pass without gradients.

        None where states cannot be written in place: in a sliding layer, and in one that lies on another device than
        `like`.

        Args:
            like: has the new states' dtype, and their device. The slots have the dtype to which it and that of the
                states here are promoted, as in a plain cache; what is here is converted.
            writes: (B, tokens) write numbers, which a sealed layer needs, and takes once.

        Raises: RuntimeError where one keystream would serve two values.
        """
        layer = self.layers[layer_idx] if layer_idx < len(self.layers) else None
        if not isinstance(layer, GrowingLayer):
            return None
        if layer.is_initialized and layer.keys.device != like.device:
            return None
        if not isinstance(layer, SealedLayer):
            return layer.room(tokens, shape, like)
        if writes is None:
            raise ValueError(f"writes: layer {layer_idx} is sealed and needs the numbers of its tokens")
        logs = self._take_numbers(layer_idx, writes)
        self._renew(layer_idx, layer, like.dtype, writes.branch)
        slots = layer.room(tokens, shape, like)
        numbers = layer.number(slots, writes.numbers.to(like.device), logs)
        sealing = self.session.sealing(layer_idx, numbers, writes.branch, layer)
        if sealing.kept is not None:
            rows = numbers[:, slots.offset - layer.held_tokens : slots.offset + tokens]
            sealing.kept.cover(sealing.at(rows), shape[1], shape[2], slots.keys.dtype)
        return slots._replace(sealing=sealing)

    @torch.compiler.disable  # which process this is, and what it took, are no constants of a program
    def _take_numbers(self, layer_idx: int, writes: Writes) -> SharedLogs:
        """Note that a layer takes the numbers of a pass. Returns the pass's logs."""
        if writes.branch != self.session.branch:
            raise RuntimeError(
                "the process was forked in the middle of a pass over a sealed cache, and both would write under the "
                "pass's numbers; fork between passes"
            )
        if self._numbering.writes is not writes:
            self._numbering = Numbering(writes)
        if layer_idx in self._numbering.layers:
            raise RuntimeError(
                f"layer {layer_idx}: its block runs twice in one pass, and a sealed cache has one number for each of "
                "the pass's tokens there; run it with use_cache=False or cache_encoding='permuted'"
            )
        self._numbering.layers.add(layer_idx)
        return self._numbering.logs

    def _renew(self, layer_idx: int, layer: SealedLayer, dtype: torch.dtype, branch: str) -> None:
        """Make a layer this branch's own, and wide enough for rows in `dtype`: what another holder of the session
        wrote, or lies in a narrower dtype, is sealed anew, so that no two values ever lie under one keystream."""
        if layer.held_tokens:
            wide = torch.promote_types(layer.keys.dtype, dtype)
            if layer.branch != branch or layer.keys.dtype != wide:
                self._seal_anew(layer_idx, layer, wide)
        layer.branch = branch

    def _seal_anew(self, layer_idx: int, layer: SealedLayer, dtype: torch.dtype) -> None:
        keys, values = layer.keys, layer.values
        old = self.sealing(layer_idx, keys.device)
        if old is None:
            raise RuntimeError(f"layer {layer_idx} holds sealed rows without their numbers")
        branch, writes = self.session.take_writes(keys.shape[0], keys.shape[2], keys.device)
        new = self.session.sealing(layer_idx, writes, branch)
        if dtype == keys.dtype:
            states = [ops.reseal(x, old, new, is_value=i == 1) for i, x in enumerate((keys, values))]
        else:
            states = [
                ops.seal(ops.unseal(x, old, is_value=i == 1).to(dtype), new, is_value=i == 1)
                for i, x in enumerate((keys, values))
            ]
        layer.hold(states[0], states[1], writes)

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

    def append(self, keys: Tensor, values: Tensor, layer_idx: int, writes: Writes | None = None) -> Stored:
        """Append feature-permuted K and V (B, G, S, d) to a layer, which seals them if it is sealed. Gradients flow
        through a layer that is not.

        Args:
            writes: (B, S) write numbers, which a sealed layer needs; `session.take_writes` gives them.

        Returns: the layer's K and V as they are stored, of all tokens that the new ones may see.
        """
        if not isinstance(self.layers[layer_idx], SealedLayer):
            return Stored(*DynamicCache.update(self, keys, values, layer_idx))
        batch, groups, tokens, size = keys.shape
        slots = self.room(layer_idx, tokens, (batch, groups, size), keys, writes)
        if slots is None or slots.sealing is None:
            raise ValueError(f"keys: expected them on {self.layers[layer_idx].keys.device}, where the layer lies")
        new, dtype = slice(slots.offset, slots.offset + tokens), slots.keys.dtype
        own = slots.sealing.at(slots.sealing.writes[:, new])
        slots.keys[:, :, new] = ops.seal(keys.to(dtype), own, is_value=False)
        slots.values[:, :, new] = ops.seal(values.to(dtype), own, is_value=True)
        return self.take_in(layer_idx, slots)

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

    def _first_present(self, layer_idx: int) -> int:
        if layer_idx < len(self.layers) and isinstance(self.layers[layer_idx], AbsentLayer):
            return self.layer_indices[0] if self.layer_indices else len(self.layers)
        return layer_idx

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return super().get_seq_length(self._first_present(layer_idx))

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return super().get_mask_sizes(query_length, self._first_present(layer_idx))
