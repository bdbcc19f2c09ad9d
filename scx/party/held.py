"""What the untrusted side holds of one conversation. Nothing in here knows a key."""

from torch import Tensor

from scx.kvcache.layers import GrowingLayer

__all__ = ["Held"]


class Held:
    """What the untrusted side holds of one conversation."""

    def __init__(self, first_key: Tensor | None) -> None:
        self.first_key = first_key  # (B,) first token that is no padding
        self.step = 0  # of the generation, counted by the secure side
        self.residual: Tensor | None = None  # encoded rows of the prefill under way
        self.products: dict[int, tuple[Tensor, Tensor]] = {}  # middle blocks: k and v before key sharing, (B, T, G*d)
        self.unlocked: dict[int, GrowingLayer] = {}  # middle blocks: K and V after it
        self.encoded: dict[int, GrowingLayer] = {}  # start blocks under a reused π_r
        self.keys: dict[int, Tensor] = {}  # end blocks: Kᶜ (B, G, rows, d)

    def truncate(self, past: int, key_rows: int) -> None:
        """Forget what a step that was not completed, or a crop, has left behind."""
        for layer in (*self.unlocked.values(), *self.encoded.values()):
            if layer.get_seq_length() > past:
                layer.crop(past - layer.get_seq_length())
        self.keys = {block: keys[:, :, :key_rows] for block, keys in self.keys.items()}

    def select(self, rows: Tensor) -> None:
        self.first_key = None if self.first_key is None else self.first_key.index_select(0, rows)
        for layer in (*self.unlocked.values(), *self.encoded.values()):
            layer.batch_select_indices(rows)
        self.keys = {block: keys.index_select(0, rows) for block, keys in self.keys.items()}
