"""What both parties know before they begin: sizes, which blocks belong to which stage, and where rows stay."""

from dataclasses import dataclass

import torch

__all__ = ["CROSSINGS", "Plan", "inner_products"]

CROSSINGS = ("few", "paper")
"""How a prefill crosses the boundary: see `scx.party.boundary`."""


def inner_products(dtype: torch.dtype) -> tuple[str, ...]:
    """What a feed-forward of rows in `dtype` returns beside its result, (B, T, F) each, to be checked by. In a half
    precision that is the activation as well: rounded, it cannot be told from gate and up closely enough."""
    products = ("gate_product", "up_product")
    return products if dtype.itemsize >= 4 else (*products, "activation")


@dataclass(frozen=True)
class Plan:
    """A public agreement between the parties.

    `start` and `end` are l_s and l_e, the numbers of first and last blocks whose keys stay on the secure side. With
    `reuse_feature_keys`, start blocks keep one π_r over all steps of a generation. `noisy` says whether noise covers
    the inputs of the first block and, in generation, of all start blocks. With `prefill_top_k`, norm and head of a
    prefill are the untrusted side's, which answers the k largest logits of every encoded row. With `verify`, replies
    bring along what they are checked by, and what costs as much to check as to compute is the secure side's.
    """

    num_layers: int
    start: int
    end: int
    crossings: str = "few"
    reuse_feature_keys: bool = False
    noisy: bool = False
    prefill_top_k: int | None = None
    verify: bool = False

    def __post_init__(self) -> None:
        if self.crossings not in CROSSINGS:
            raise ValueError(f"crossings: expected one of {CROSSINGS}, got {self.crossings!r}")
        k = self.prefill_top_k
        if k is not None and (type(k) is not int or k < 1):
            raise ValueError(f"prefill_top_k: expected a number of logits from 1, or None, got {k!r}")
        if self.verify:
            self._check_verifiable()

    def _check_verifiable(self) -> None:
        if self.few:
            raise ValueError(
                "verify: with crossings='few' rows stay on the untrusted side over several operations, whose results "
                "do not come back one by one to be checked; use crossings='paper'"
            )
        if self.prefill_top_k is not None:
            raise ValueError(
                "verify: with prefill_top_k the untrusted side chooses the largest logits, and whether it left out any "
                "cannot be checked; use prefill_top_k=None, with the head on the secure side"
            )
        if self.reuse_feature_keys:
            raise ValueError(
                "verify: the protected blocks' cache does not cross in a generation, and reuse_feature_keys=True would "
                "have no effect; use reuse_feature_keys=False"
            )

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
    def kept_blocks(self) -> tuple[int, ...]:
        """Whose K and V the secure side keeps, and which it attends to in a generation: of the last blocks, where they
        are not verified, it keeps V alone."""
        return self.protected_blocks if self.verify else (*self.start_blocks,)

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
