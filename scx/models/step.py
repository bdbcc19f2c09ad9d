"""The keys of one forward pass in the fused placement, and how the residual stream enters and leaves its encoding."""

from collections.abc import Callable, Collection, Sequence
from functools import partial
from typing import Protocol

import torch
from torch import Tensor, nn

from scx.architecture import is_hooked
from scx.encoding import FeatureKey, LayerKeys, Noise, ResidualKey, TokenKeys
from scx.keys import Session, Writes

__all__ = ["Step"]

_IDENTITY = LayerKeys()


class FeatureKeys(Protocol):
    """Who knows under which feature permutations the rows of a batch are stored: a session, or a cache of it."""

    def feature_key(self, layer: int, device: torch.device) -> FeatureKey: ...


class Step:
    """The keys of one forward pass, handed to every block.

    A block is known by its place in the stack that runs, whatever index it was built with. Without token keys the rows
    stay in token order: a lone generated token has no order to hide. A block that runs again in the pass (a hook calls
    it, or a checkpoint computes it anew) has keys of its own each time.

    Args:
        draw_keys: the pass's token keys, or None; given `layers` and the pass's `residual` key, further ones of these.
        blocks: the stack, in order.
        open_at: the places at whose input rows lie in token order, without redundant ones, for hooks or a caller who
            records them.
        in_place: whether K and V may be written where they lie; not where gradients go through them.
    """

    def __init__(
        self,
        session: Session,
        feature_keys: FeatureKeys,
        draw_keys: Callable[..., TokenKeys | None],
        blocks: Sequence[nn.Module],
        open_at: Collection[int] = (),
        in_place: bool = True,
    ) -> None:
        self.session = session
        self.feature_key = feature_keys.feature_key
        self.in_place = in_place
        self.open_at = frozenset(open_at)
        self.num_blocks = len(blocks)
        self._places = {id(block): place for place, block in enumerate(blocks)}
        self._draw_keys = draw_keys
        self._token_keys = draw_keys()
        self._begun: set[int] = set()
        self._take_noise: Callable[[], Noise] | None = None  # for the first block's input
        self._noise: Noise | None = None  # drawn and not taken
        self.writes: Writes | None = None  # write numbers of the pass's tokens, where layers are sealed
        self._rows: Tensor  # the residual stream's first rows, where these are not in token order
        self._redundant: dict[int, Tensor | None] = {}  # the redundant rows, where the others are in token order
        self._on_device: dict[torch.device, tuple[ResidualKey, list[LayerKeys]]] = {}

    def __repr__(self) -> str:
        return f"Step(session={self.session.id})"

    @torch.compiler.disable  # what has run before is no constant of a program
    def begin(self, block: nn.Module) -> int:
        """Where a block stands in the stack, as it begins to run."""
        place = self._places[id(block)]
        known = self._token_keys if place in self._begun else None
        again = None if known is None else self._draw_keys(layers=[place], residual=known.residual)
        if again is not None:
            for device, (_, keys) in self._on_device.items():
                keys[place] = again.to(device).layers()[0]
        self._begun.add(place)
        return place

    def _keys_on(self, device: torch.device) -> tuple[ResidualKey, list[LayerKeys]] | None:
        if self._token_keys is None:
            return None
        keys = self._on_device.get(device)
        if keys is None:
            moved = self._token_keys.to(device)
            keys = self._on_device[device] = (moved.residual, moved.layers())
        return keys

    def residual_key(self, device: torch.device) -> ResidualKey | None:
        """The encoding of the residual stream, on the device that runs it; None for rows in token order."""
        keys = self._keys_on(device)
        return None if keys is None else keys[0]

    def layer_keys(self, place: int, device: torch.device) -> LayerKeys:
        """The token keys of one block, on the device that runs it."""
        keys = self._keys_on(device)
        return _IDENTITY if keys is None else keys[1][place]

    def prepare(self, batch: int, tokens: int, device: torch.device) -> None:
        """Draw what the blocks will need before they run, so that nothing on their way waits for the host. `device` is
        that of the rows that enter the first block's projections."""
        self.feature_key(0, device)
        key = self.layer_keys(0, device).attention
        if self.session.settings.alp:
            rows = tokens if key.entry is None else key.entry.shape[1]
            self._take_noise = partial(self.session.take_noise, batch, rows, device)
            self._noise = self._take_noise()
        if self.session.settings.sealed_layers:
            self.writes = self.session.take_writes(batch, tokens, device)

    @torch.compiler.disable
    def take_noise(self) -> Noise | None:
        """One-time noise for the first block's input, other noise whenever that runs; None where there is none."""
        noise, self._noise = self._noise, None
        return self._take_noise() if noise is None and self._take_noise is not None else noise

    def embed(
        self, embedding: nn.Module, input_ids: Tensor | None, inputs_embeds: Tensor | None, device: torch.device
    ) -> Tensor:
        """Embed a request into the residual stream's encoding.

        Returns: what goes to the first block, (B, S, D): embeddings in token order where that block's input is open or
        the embedding's own hooks are to see them; else a view of the encoded rows, from which masks and positions are
        made, and `enter` gives the rows themselves.
        """
        key = self.residual_key(device)
        if key is None:
            plain: Tensor = embedding(input_ids) if inputs_embeds is None else inputs_embeds
            return plain
        if input_ids is not None and 0 not in self.open_at and not is_hooked(embedding):
            self._rows = key.embed(embedding, input_ids)
            return self._rows[:, : key.position.shape[1]]
        rows: Tensor = embedding(input_ids) if inputs_embeds is None else inputs_embeds
        redundant = key.embed_decoys(embedding, rows)
        if 0 in self.open_at:
            self._redundant[0] = redundant
            return rows
        self._rows = key.enter(rows, redundant)
        return self._rows[:, : key.position.shape[1]]

    def enter(self, states: Tensor, place: int) -> Tensor:
        """The residual stream's rows (B, T, D), for what a block is given."""
        key = self.residual_key(states.device)
        if key is None:
            return states
        if place in self.open_at:
            redundant = self._redundant[place]
            return key.enter(states, None if redundant is None else redundant.to(states.device, states.dtype))
        return self._rows.to(states.device) if place == 0 else states

    def leave(self, rows: Tensor, place: int) -> Tensor:
        """What a block gives, for the residual stream's rows behind it: in token order behind the last one."""
        key, following = self.residual_key(rows.device), place + 1
        if key is None or (following < self.num_blocks and following not in self.open_at):
            return rows
        if following < self.num_blocks:
            self._redundant[following] = key.redundant(rows)
        return key.leave(rows)

    def in_token_order(self, states: Tensor, place: int) -> Tensor:
        """What was recorded at a block's input, (B, S, D); `place` counts the output of the last as well."""
        key = self.residual_key(states.device)
        if key is None or place in self.open_at or place >= self.num_blocks:
            return states
        return key.leave(self._rows.to(states.device) if place == 0 else states)
