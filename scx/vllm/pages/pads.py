"""Keystream of the blocks that a batch reads, kept on a CPU from step to step.

To make keystream anew in every step would take longer than attention does. So the keystream of a row is made once, when
the row is written or its block comes into a batch, and lies packed as the row itself does: a *pad*, which is XORed with
a page in one pass. Pads have the size of the pages that were last read, not of the whole cache. Whoever has pads and
pages reads them: like the key, they lie in the memory of the process that computes, whom sealing does not keep out.

`Places` says, for all layers of a group, which block's pad lies where; `Pads` are one layer's. Every pad is held
against the write numbers that its page has now, in every step, so whatever was done to pages in the meantime, rows are
unsealed under their own numbers or their keystream is made anew.

A row that is in nobody's sequence (not written yet, or left of a block's former owner) reads as zeros, its pad being
the page's own bits, or as what was last written there, as in plain pages. Noise would do harm, since attention
multiplies what it masks by zero, and NaN times zero is NaN.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from scx_kernels.hidden import Hidden

__all__ = ["Pads", "Places", "Plan"]

_NOWHERE = -1
_NO_NUMBER = torch.iinfo(torch.int64).min
_LEAST_PLACES = 64
_NULL_BLOCK = 0


@dataclass(frozen=True)
class Plan:
    """What a step reads and writes, the same in all layers of a group. P blocks are unsealed, into rows of scratch.

    Attributes:
        blocks: (P,) int64, the block that each row of scratch is. rows: (P,) int64, the place of its pad, or None where
            that is the row's own number. batch: (P, 1) bool, whether the batch reads it, or None where it reads all.
        unseen: (P, N) int64, -1 for rows in nobody's sequence, else 0.
        table: the batch's block table, in rows of scratch.
        slots: (T,) int64, where tokens are written. real: (T,) bool, which of them are, or None for all.
        block, offset: (T',) int64, where their write numbers go.
        where: (T,) int64, their rows among pads, -1 for tokens that are not written.
        fresh: places that the plan gave to `fresh_blocks`, whose pads are not of these blocks yet.
        capacity: of pads, in places.
    """

    blocks: Tensor
    rows: Tensor | None
    batch: Tensor | None
    unseen: Tensor
    table: Tensor
    slots: Tensor
    real: Tensor | None
    block: Tensor
    offset: Tensor
    where: Tensor
    fresh: Tensor
    fresh_blocks: Tensor
    capacity: int


class Places:
    """Which block's pad lies at which place, for the layers of one group of vLLM's caches."""

    def __init__(self, tokens: int) -> None:
        """tokens: N, of a block."""
        self.tokens = tokens
        self._place = torch.full((0,), _NOWHERE, dtype=torch.int64)  # of each block
        self._block = torch.zeros(0, dtype=torch.int64)  # at each place
        self._used = torch.zeros(0, dtype=torch.int64)  # the step in which each place was last used
        self._count = 0  # places that were ever given
        self._step = 0
        self.scratch = torch.zeros(0, dtype=torch.int64)

    def plan(self, table: Tensor, lengths: Tensor, slots: Tensor) -> Plan:
        """Places for all blocks that a step touches.

        Args:
            table: (B, W) int32, the blocks of each sequence. lengths: (B,), tokens of each, new ones included.
            slots: (T,) int64, where new tokens go: block * N + offset, or below zero for nowhere.
        """
        size = self.tokens
        filled = (lengths[:, None].long() - torch.arange(table.shape[1]) * size).clamp_(0, size)
        seen = filled > 0
        read = table[seen].long()
        is_real = slots >= 0
        real = None if bool(is_real.all()) else is_real
        own = slots if real is None else slots[real]
        block, offset = own // size, own % size
        blocks = torch.cat((read, block)).unique()
        fresh = self._admit(blocks)
        places = self._place[blocks]
        count = int(places.max()) + 1 if len(places) else 0
        row = torch.arange(count)
        # Pads in the order of scratch are XORed without a copy, which is worth the blocks of some who have gone.
        is_dense = 2 * count <= 3 * len(places)
        if not is_dense:
            row[places], count = torch.arange(len(places)), len(places)
        fill = torch.zeros(count, dtype=torch.int64)
        fill.scatter_reduce_(0, row[self._place[read]], filled[seen], "amax")
        if len(blocks) and int(blocks[0]) == _NULL_BLOCK:  # stands for what a window has passed; never written
            fill[row[self._place[_NULL_BLOCK]]] = 0
        batch = torch.zeros(count, 1, dtype=torch.bool)
        batch[row[places]] = True
        near = torch.zeros_like(table)
        near[seen] = row[self._place[read]].to(table.dtype)
        where = self._place[block] * size + offset
        if real is not None:
            where = torch.full_like(slots, _NOWHERE).masked_scatter_(real, where)
        return Plan(
            blocks=self._block[:count].clone() if is_dense else blocks,
            rows=None if is_dense else places,
            batch=None if bool(batch.all()) else batch,
            unseen=-(torch.arange(size) >= fill[:, None]).long(),
            table=near,
            slots=slots,
            real=real,
            block=block,
            offset=offset,
            where=where,
            fresh=fresh,
            fresh_blocks=self._block[fresh],
            capacity=len(self._block),
        )

    def _admit(self, blocks: Tensor) -> Tensor:
        """Give places to those of `blocks`, sorted and distinct, that have none. Returns the places given."""
        self._step += 1
        highest = int(blocks[-1]) + 1 if len(blocks) else 0
        if highest > len(self._place):
            more = torch.full((highest - len(self._place),), _NOWHERE, dtype=torch.int64)
            self._place = torch.cat((self._place, more))
        places = self._place[blocks]
        self._used[places[places >= 0]] = self._step
        new = blocks[places < 0]
        free = self._free(len(new))
        former = self._block[free]
        held = former[self._place[former] == free]
        self._place[held] = _NOWHERE
        self._place[new], self._block[free], self._used[free] = free, new, self._step
        return free

    def _free(self, count: int) -> Tensor:
        """Places of blocks that the last step did not read, lowest first; where they are too few, new ones."""
        stale = (self._used[: self._count] < self._step - 1).nonzero().flatten()[:count]
        more = count - len(stale)
        if self._count + more > len(self._block):
            room = max(_LEAST_PLACES, (self._count + more) * 5 // 4) - len(self._block)
            self._block = torch.cat((self._block, torch.zeros(room, dtype=torch.int64)))
            self._used = torch.cat((self._used, torch.zeros(room, dtype=torch.int64)))
        first, self._count = self._count, self._count + more
        return torch.cat((stale, torch.arange(first, self._count)))

    def scratch_for(self, words: int) -> Tensor:
        """(words,) int64 to unseal into: whatever the last layer left there."""
        if len(self.scratch) < words:
            self.scratch.zero_()
            self.scratch = torch.zeros(words * 5 // 4, dtype=torch.int64)
        return self.scratch[:words]


class Pads(Hidden):
    """One layer's pads: key material.

    Attributes:
        bits: (capacity, words) int64. seen: (capacity, N) int64, of each row the write number whose keystream its pad
            is; the number's complement where the pad is the page's own bits.
    """

    __slots__ = ("bits", "seen")

    def __init__(self, words: int, tokens: int) -> None:
        self.bits = torch.empty(0, words, dtype=torch.int64)
        self.seen = torch.empty(0, tokens, dtype=torch.int64)

    def wipe(self) -> None:
        """Overwrite them; they are made anew where they are asked for."""
        self.bits.zero_()
        self.seen.fill_(_NO_NUMBER)

    def __del__(self) -> None:
        self.bits.zero_()

    def begin(self, plan: Plan, bits: Tensor, writes: Tensor) -> None:
        """Before a step writes: have blocks that came into the batch read as zeros until their rows are known.

        Args: bits: (blocks, words) int64, all pages. writes: (blocks, N) int64, their write numbers.
        """
        self.reserve(plan)
        if len(plan.fresh):
            self.blank(plan.fresh, plan.fresh_blocks, bits, writes)

    def reserve(self, plan: Plan) -> None:
        """Make room for what a plan reads."""
        if len(self.bits) < plan.capacity:
            old = self.bits, self.seen
            self.bits = torch.empty(plan.capacity, self.bits.shape[1], dtype=torch.int64)
            self.seen = torch.full((plan.capacity, self.seen.shape[1]), _NO_NUMBER)
            self.bits[: len(old[0])], self.seen[: len(old[1])] = old
            old[0].zero_()

    def blank(self, places: Tensor, blocks: Tensor, bits: Tensor, writes: Tensor) -> None:
        """Have these blocks read as zeros."""
        self.bits.index_copy_(0, places, bits.index_select(0, blocks))
        self.seen[places] = ~writes[blocks]

    def missing(self, plan: Plan, writes: Tensor) -> Tensor | None:
        """(P,) bool, which rows' pads are not those of their pages; None where all are. writes: as for `begin`."""
        seen = self.seen[: len(plan.blocks)] if plan.rows is None else self.seen.index_select(0, plan.rows)
        differs = seen ^ writes.index_select(0, plan.blocks)
        wrong = (differs != 0) & (differs != plan.unseen)
        if plan.batch is not None:
            wrong &= plan.batch
        return wrong.any(1) if bool(wrong.any()) else None
