"""The keys of one forward pass in the fused placement, and how the residual stream enters and leaves its encoding."""

from typing import Protocol

import torch
from torch import Tensor, nn

from scx.encoding import FeatureKey, LayerKeys, ResidualKey, TokenKeys
from scx.keys import Session

__all__ = ["Step"]

_IDENTITY = LayerKeys()


class FeatureKeys(Protocol):
    """Who knows under which feature permutations the rows of a batch are stored: a session, or a cache of it."""

    def feature_key(self, layer: int, device: torch.device) -> FeatureKey: ...


class Step:
    """The keys of one forward pass, handed to every block.

    Without `token_keys` the rows stay in token order: a lone generated token has no order to hide.
    """

    def __init__(self, session: Session, feature_keys: FeatureKeys, token_keys: TokenKeys | None) -> None:
        self.session = session
        self.feature_key = feature_keys.feature_key
        self._token_keys = token_keys
        self.noise: Tensor | None = None  # of the first block's input, once prepared
        self.writes: Tensor | None = None  # write numbers of the pass's tokens (B, S), where layers are sealed
        self._rows: Tensor
        self._on_device: dict[torch.device, tuple[ResidualKey, list[LayerKeys]]] = {}

    def __repr__(self) -> str:
        return f"Step(session={self.session.id})"

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

    def layer_keys(self, layer: int, device: torch.device) -> LayerKeys:
        """The token keys of one layer, on the device that runs it."""
        keys = self._keys_on(device)
        return _IDENTITY if keys is None else keys[1][layer]

    def prepare(self, batch: int, tokens: int, dtype: torch.dtype, device: torch.device) -> None:
        """Draw what the blocks will need before they run, so that nothing on their way waits for the host.

        Args:
            dtype, device: of the first block.
        """
        self.feature_key(0, device)
        key = self.layer_keys(0, device).attention
        if self.session.settings.alp:
            rows = tokens if key.entry is None else key.entry.shape[1]
            self.noise = self.session.take_noise(batch, rows, dtype, device)
        if self.session.settings.sealed_layers:
            self.writes = self.session.take_writes(batch, tokens, device)

    def embed(self, embedding: nn.Module, input_ids: Tensor | None, inputs_embeds: Tensor | None) -> Tensor:
        """Embed a request straight into the residual stream's encoding.

        Returns: what goes to the first block in the embeddings' place, (B, S, D): a view of the encoded rows, from
        which masks and positions are made; `start` gives the rows themselves.
        """
        key = self.residual_key(next(embedding.parameters()).device)
        if key is None:
            plain: Tensor = embedding(input_ids) if inputs_embeds is None else inputs_embeds
            return plain
        if inputs_embeds is not None:
            self._rows = key.enter(inputs_embeds, embedding)
        elif input_ids is not None:
            self._rows = key.embed(embedding, input_ids)
        return self._rows[:, : key.position.shape[1]]

    def start(self, stand_in: Tensor) -> Tensor:
        """The residual stream's first rows, (B, T, D), for what `embed` returned."""
        return stand_in if self._token_keys is None else self._rows.to(stand_in.device)

    def leave(self, rows: Tensor) -> Tensor:
        """The residual stream's rows in token order, (B, S, D)."""
        key = self.residual_key(rows.device)
        return rows if key is None else key.leave(rows)
