"""Key sharing (stage 2): the token permutations of the middle blocks.

With them the untrusted side strips and orders its own products of those blocks. Keys of the first and last blocks are
not in it, and follow from nothing in it.
"""

from torch import Tensor

from scx_kernels.hidden import Hidden

__all__ = ["SharedKeys"]


class SharedKeys(Hidden):
    """What the secure side gives away in stage 2.

    `token_position` (M, B, S) int64: where each token lies among the rows of each middle block in the prefill.
    `positions` (B or 1, S) int64: the tokens' rotary positions. `blocks`: the M middle blocks. `session` and `model`:
    public id and fingerprint of what they belong to.
    """

    __slots__ = ("blocks", "model", "positions", "session", "token_position")

    def __init__(
        self, session: str, model: str, blocks: tuple[int, ...], token_position: Tensor, positions: Tensor
    ) -> None:
        self.session = session
        self.model = model
        self.blocks = blocks
        self.token_position = token_position
        self.positions = positions

    def __repr__(self) -> str:
        return f"SharedKeys(session={self.session}, blocks={len(self.blocks)}, tokens={self.positions.shape[1]})"
