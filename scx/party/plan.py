"""What both parties know before they begin: sizes, which blocks belong to which stage, and where rows stay."""

from dataclasses import dataclass

__all__ = ["CROSSINGS", "Plan"]

CROSSINGS = ("few", "paper")
"""How a prefill crosses the boundary: see `scx.party.boundary`."""


@dataclass(frozen=True)
class Plan:
    """A public agreement between the parties.

    `start` and `end` are l_s and l_e, the numbers of first and last blocks whose keys stay on the secure side. With
    `reuse_feature_keys`, start blocks keep one π_r over all steps of a generation. `noisy` says whether noise covers
    the inputs of the first block and, in generation, of all start blocks. With `prefill_top_k`, norm and head of a
    prefill are the untrusted side's, which answers the k largest logits of every encoded row.
    """

    num_layers: int
    start: int
    end: int
    crossings: str = "few"
    reuse_feature_keys: bool = False
    noisy: bool = False
    prefill_top_k: int | None = None

    def __post_init__(self) -> None:
        if self.crossings not in CROSSINGS:
            raise ValueError(f"crossings: expected one of {CROSSINGS}, got {self.crossings!r}")
        k = self.prefill_top_k
        if k is not None and (type(k) is not int or k < 1):
            raise ValueError(f"prefill_top_k: expected a number of logits from 1, or None, got {k!r}")

    @property
    def start_blocks(self) -> range:
        return range(self.start)

    @property
    def middle_blocks(self) -> range:
        return range(self.start, self.num_layers - self.end)

    @property
    def end_blocks(self) -> range:
        return range(self.num_layers - self.end, self.num_layers)

    @property
    def protected_blocks(self) -> tuple[int, ...]:
        return (*self.start_blocks, *self.end_blocks)

    @property
    def few(self) -> bool:
        return self.crossings == "few"

    def is_border(self, block: int) -> bool:
        """Whether rows come back to the secure side after this block's output projection.

        With few crossings, behind the first block, whose input was under noise, and before the first middle and the
        first end block: so no shared token permutation is that of a protected block.
        """
        if not self.few or block == 0:
            return True
        return block + 1 < self.num_layers and block + 1 in (self.middle_blocks.start, self.end_blocks.start)
