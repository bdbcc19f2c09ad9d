"""Keystream that was made once, kept for as long as its rows are: a CPU makes it once a row and not once a step.

On an accelerator keystream is made in registers, where the key is, and nothing of it is kept. On a CPU the process that
computes is the secure side: it holds the key, so it may hold what the key gives.
"""

import torch
from torch import Tensor

from scx_kernels.hidden import Hidden
from scx_kernels.sealing import BIT_DTYPES, WRITE_LIMIT, Sealing, blocks_of, check_values, cipher_in_place, keystream

__all__ = ["KeptKeystream"]

_LEAST_ROWS = 64
# A call to the library costs as much as the keystream of some ten rows, so tokens that come one by one share it.
_ROWS_AHEAD = 16

# Numbers (B, N), and keystream of K and V, (B, G, N, 16n) int32 each.
_Rows = tuple[Tensor, list[Tensor]]


class KeptKeystream(Hidden):
    """The keystream of the rows of one layer's cache, found by their write numbers.

    It is key material: whoever has it reads these rows. It belongs beside the key, and is never copied, printed or
    pickled. It has the size of the rows' K and V, a head's row rounded up to 64 bytes, and room for a quarter more.
    Where rows are added to those that are kept, up to 16 more are made ahead, for the numbers that follow.

    Every answer is held against the numbers that were asked for, and against key, layer and rounds. So whatever was
    done to the cache in the meantime, keystream is that of its rows or is made anew.
    """

    __slots__ = ("_end", "_first", "_made", "_source", "_words", "_writes")

    def __init__(self) -> None:
        self._source: tuple[Tensor, tuple[int, ...]] | None = None  # what keystream depends on beside numbers
        self._writes: Tensor  # (B, capacity) int64
        self._words: tuple[Tensor, Tensor]  # K's and V's, (B, G, capacity, 16n) int32
        self._first = self._end = self._made = 0  # rows _first.._end-1 are kept, _end.._made-1 made ahead

    def __repr__(self) -> str:
        return f"KeptKeystream(rows={self._end - self._first})"

    def wipe(self) -> None:
        """Overwrite what is kept; it is made anew where it is asked for."""
        for words in getattr(self, "_words", ()):
            words.zero_()
        self._source, self._first, self._end, self._made = None, 0, 0, 0

    __del__ = wipe

    @property
    def nbytes(self) -> int:
        """Bytes that are held, room for more rows among them."""
        return 0 if self._source is None else sum(words.nbytes for words in self._words)

    def find(
        self, sealing: Sealing, groups: int, head_dim: int, dtype: torch.dtype, *, is_value: bool
    ) -> Tensor | None:
        """What `keystream` gives for these rows, if they are the first or the last of those that are kept.

        Returns: None if they are not, else (B, groups, N, head_dim) int32 or int16, to be read only.
        """
        rows = sealing.writes.shape[1]
        if rows > self._end - self._first or not self._is_from(_source(sealing, groups, head_dim, dtype)):
            return None
        start = self._end - rows
        if not torch.equal(self._writes.narrow(1, start, rows), sealing.writes):
            start = self._first
            if not torch.equal(self._writes.narrow(1, start, rows), sealing.writes):
                return None
        words = self._words[is_value].narrow(2, start, rows).view(BIT_DTYPES[dtype])
        return words if words.shape[3] == head_dim else words[..., :head_dim]

    def cover(self, sealing: Sealing, groups: int, head_dim: int, dtype: torch.dtype) -> None:
        """Keep the keystream of these rows, K's and V's, and of no others: moved where it was kept, made where not.

        Args: as for `keystream`.
        """
        writes, source = sealing.writes, _source(sealing, groups, head_dim, dtype)
        if not self._is_from(source):
            self._source, self._first, self._end, self._made = None, 0, 0, 0
        start, same = self._overlap(writes)
        rows, made = writes.shape[1], self._made
        if same < rows:
            elsewhere = self._kept_from(start + same)
            self._first = self._end = self._made = 0  # until all rows are in their places, none is found
            if not self._has_room(start, writes):
                start = self._move(start, same, (len(writes), groups, rows, 16 * source[1][-1]))
            new = writes[:, same:]
            if same:
                new = _with_rows_ahead(new, self._writes.shape[1] - start - rows)
            made = start + same + new.shape[1]
            own = sealing.replace(writes=new.contiguous(), kept=None)
            _fill([words[:, :, start + same : made] for words in self._words], own, elsewhere)
            self._writes[:, start + same : made] = own.writes
        self._source, self._first, self._end, self._made = source, start, start + rows, made

    def _is_from(self, source: tuple[Tensor, tuple[int, ...]]) -> bool:
        return self._source is not None and self._source[0] is source[0] and self._source[1] == source[1]

    def _overlap(self, writes: Tensor) -> tuple[int, int]:
        """(first row, rows): which rows that are there are the first of those asked for, in their order."""
        if self._first == self._made or len(self._writes) != len(writes) or not writes.numel():
            return self._first, 0
        held, rows = self._writes[:, self._first : self._made], writes.shape[1]
        if torch.equal(held[:, :rows], writes[:, : held.shape[1]]):
            return self._first, min(rows, held.shape[1])
        places = (held[0] == writes[0, 0]).nonzero()
        if not len(places):
            return self._first, 0
        start = int(places[0])
        held, writes = held[:, start : start + rows], writes[:, : held.shape[1] - start]
        differs = (held != writes).any(0).nonzero()
        return self._first + start, int(differs[0]) if len(differs) else held.shape[1]

    def _kept_from(self, row: int) -> _Rows | None:
        """What there is from this row on, if it is so much that to look for rows in it is faster than to make them."""
        if row + _ROWS_AHEAD >= self._made:
            return None
        return self._writes[:, row : self._made], [words[:, :, row : self._made] for words in self._words]

    def _has_room(self, start: int, writes: Tensor) -> bool:
        if self._source is None or len(self._writes) != len(writes):
            return False
        rows, capacity = writes.shape[1], self._writes.shape[1]
        return start + rows <= capacity <= 2 * rows + _LEAST_ROWS

    def _move(self, start: int, same: int, shape: tuple[int, int, int, int]) -> int:
        """New memory for rows of this shape; the first `same` are those from `start` on. Returns their new start."""
        batch, groups, rows, width = shape
        if self._source is not None:
            rows = max(rows + rows // 4, rows + _ROWS_AHEAD, _LEAST_ROWS)
        writes = torch.empty(batch, rows, dtype=torch.int64)
        keys, values = (torch.empty(batch, groups, rows, width, dtype=torch.int32) for _ in range(2))
        if same:
            writes[:, :same] = self._writes[:, start : start + same]
            for new, old in zip((keys, values), self._words, strict=True):
                new[:, :, :same] = old[:, :, start : start + same]
        self._writes, self._words = writes, (keys, values)
        return 0


def _source(sealing: Sealing, groups: int, head_dim: int, dtype: torch.dtype) -> tuple[Tensor, tuple[int, ...]]:
    blocks = blocks_of(head_dim, dtype.itemsize)
    return sealing.key, (sealing.layer, sealing.rounds, sealing.first_head, groups, blocks)


def _with_rows_ahead(new: Tensor, room: int) -> Tensor:
    """Write numbers (B, N), and behind them those that rows to come will have if nothing else is written."""
    rows = min(_ROWS_AHEAD, room)
    if rows <= 0 or int(new[:, -1].max()) + rows >= WRITE_LIMIT:
        return new
    return torch.cat((new, new[:, -1:] + torch.arange(1, rows + 1)), dim=1)


def _fill(target: list[Tensor], own: Sealing, kept: _Rows | None) -> None:
    """Each of target (B, G, N, 16n) = the keystream of rows with own.writes (B, N), from `kept` where it is there."""
    if kept is None:
        _make(target, own)
        return
    writes, words = kept
    numbers, order = writes.flatten().sort()
    place = torch.searchsorted(numbers, own.writes).clamp_(max=len(numbers) - 1)
    is_kept = numbers[place] == own.writes
    if not is_kept.any():
        _make(target, own)
        return
    place = order[place[is_kept]]
    sequence, row = is_kept.nonzero(as_tuple=True)
    for to, source in zip(target, words, strict=True):
        to[sequence, :, row] = source[place // writes.shape[1], :, place % writes.shape[1]]
    if is_kept.all():
        return
    numbers, place = own.writes[~is_kept].unique(return_inverse=True)
    made = [x.new_empty(1, x.shape[1], len(numbers), x.shape[3]) for x in target]
    _make(made, own.replace(writes=numbers[None]))
    sequence, row = is_kept.logical_not().nonzero(as_tuple=True)
    for to, source in zip(target, made, strict=True):
        to[sequence, :, row] = source[0][:, place].transpose(0, 1)


def _make(target: list[Tensor], own: Sealing) -> None:
    """Each of target (B, G, N, 16n) = the keystream of rows with own.writes (B, N)."""
    check_values(own.writes, WRITE_LIMIT, "sealing.writes")
    for is_value, words in enumerate(target):
        words.zero_()
        if not cipher_in_place(words, own, bool(is_value), words):
            groups, width = words.shape[1], words.shape[3]
            words.copy_(keystream(own, groups, width, torch.float32, is_value=bool(is_value)))
