"""What both stages in which rows move have in common: one block's steps as the secure side leads them.

A block is: rows enter the attention's encoding and are projected (`_project_qkv`), restored to token order, rotated and
encoded by features (`_restore`), attended (`_attend`), projected (`_project_output`), added; rows enter the
feed-forward's encoding and come back (`_feed_forward`), added. With few crossings several of these are one request.

Notation: B sequences, S or n tokens, T encoded rows, D features, H query heads, G key/value heads, d head size.
"""

from dataclasses import dataclass
from typing import Generic, TypeVar

from torch import Tensor

from scx.encoding import FeatureKey, Noise, RowKey
from scx.keys import Session
from scx.party.secure import Line, Rope, SecureParty

__all__ = ["Products", "Stage"]


Key = TypeVar("Key", bound=RowKey)


@dataclass(frozen=True)
class Products(Generic[Key]):
    """q, k and v products of encoded rows, (B, T, *), the key of their order, and the noise that is still in them."""

    tensors: tuple[Tensor, Tensor, Tensor]
    rows: Key
    noise: Noise | None = None

    @classmethod
    def read(cls, reply: dict[str, Tensor], rows: Key, noise: Noise | None = None) -> "Products[Key]":
        return cls((reply["query_product"], reply["key_product"], reply["value_product"]), rows, noise)


class Stage:
    """One prefill, or one step of a generation.

    Args:
        party: the secure side.
        session: of the conversation.
        rope: rotary positions of the tokens.
        line: the boundary, for this conversation and stage.
    """

    def __init__(self, party: SecureParty, session: Session, rope: Rope) -> None:
        self.party = party
        self.plan = party.plan
        self.session = session
        self.rope = rope
        self.line: Line

    def _project_qkv(self, block: int, hidden: Tensor, key: Key, noise: Noise | None) -> Products[Key]:
        """Encode a block's attention input, (B, n, D); its q, k and v products come back."""
        rows = key.enter(hidden, self.party.weights.attention_norm(block), noise)
        return Products.read(self.line.ask("project_qkv", block, attention_input=rows), key, noise)

    def _restore(self, block: int, products: Products[Key], feature_key: FeatureKey) -> tuple[Tensor, Tensor, Tensor]:
        """Token order, the noise's image off, rotary positions, π_r on: q (B, H, n, d), k and v (B, G, n, d)."""
        weights, noise = self.party.weights, products.noise
        return feature_key.encode(
            products.tensors,
            self.rope.cos,
            self.rope.sin,
            products.rows.position,
            images=None if noise is None else noise.images,
            dtype=weights.dtype,
            **weights.head_norms(block),
        )

    def _feed_forward(self, block: int, hidden: Tensor, key: RowKey) -> Tensor:
        """Encode rows (B, n, D); their norm and feed-forward come back, and are added to them. To be verified, they are
        normalised here."""
        norm = self.party.weights.feed_forward_norm(block) if self.plan.verify else None
        reply = self.line.ask("feed_forward", block, feed_forward_input=key.enter(hidden, norm))
        return hidden + key.leave(reply["feed_forward"])
