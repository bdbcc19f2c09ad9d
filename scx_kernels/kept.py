"""Keystream that was made once, kept for as long as its rows are: a CPU makes it once a row and not once a step.

On an accelerator keystream is made in registers, where the key is, and nothing of it is kept. On a CPU the process that
computes is the secure side: it holds the key, so it may hold what the key gives.
"""

import torch
from torch import Tensor

from scx_kernels.sealing import _DTYPES, WRITE_LIMIT, Sealing, _check_values, _cipher_in_place, blocks_of, keystream

__all__ = ["KeptKeystream"]

_LEAST_ROWS = 64

# Numbers (B, N), and keystream (2, B, G, N, 16n) int32 of K and V, of rows that are kept.
_Rows = tuple[Tensor, Tensor]


class KeptKeystream:
    """The keystream of the rows of one layer's cache, found by their write numbers.

    It is key material: whoever has it reads these rows. It belongs beside the key, and is never copied, printed or
    pickled. It has the size of the rows' K and V, a head's row rounded up to 64 bytes, and room for a quarter more.

    Every answer is held against the numbers that were asked for, and against key, layer and rounds. So whatever was
    done to the cache in the meantime, keystream is that of its rows or is made anew.
    """

    def __init__(self) -> None:
        self._source: tuple[Tensor, tuple[int, ...]] | None = None  # what keystream depends on beside numbers
        self._writes: Tensor  # (B, capacity) int64
        self._words: Tensor  # (2, B, G, capacity, 16n) int32
        self._first = self._end = 0  # rows _first.._end-1 are kept

    def __repr__(self) -> str:
        return f"KeptKeystream(rows={self._end - self._first})"

    def __reduce__(self) -> str:
        raise TypeError("kept keystream is key material; it is never copied or pickled")

    @property
    def nbytes(self) -> int:
        """Bytes that are held, room for more rows among them."""
        return 0 if self._source is None else self._words.nbytes

    def find(
        self, sealing: Sealing, groups: int, head_dim: int, dtype: torch.dtype, *, is_value: bool
    ) -> Tensor | None:
        """What `keystream` gives for these rows, if they are the first or the last of those that are kept.

        Returns: None if they are not, else (B, groups, N, head_dim) int32 or int16, to be read only.
        """
        if not self._is_from(_source(sealing, groups, head_dim, dtype)) or len(self._writes) != len(sealing.writes):
            return None
        rows = sealing.writes.shape[1]
        if rows > self._end - self._first:
            return None
        for start in (self._first, self._end - rows):
            if torch.equal(self._writes[:, start : start + rows], sealing.writes):
                words = self._words[int(is_value), :, :, start : start + rows]
                return words.view(_DTYPES[dtype])[..., :head_dim]
        return None

    def cover(self, sealing: Sealing, groups: int, head_dim: int, dtype: torch.dtype) -> None:
        """Keep the keystream of these rows, K's and V's, and of no others: moved where it was kept, made where not.

        Args: as for `keystream`.
        """
        writes, source = sealing.writes, _source(sealing, groups, head_dim, dtype)
        if not self._is_from(source):
            self._source, self._first, self._end = None, 0, 0
        start, same = self._overlap(writes)
        elsewhere = self._kept_from(start + same)
        self._first = self._end = 0  # until all rows are in their places, none is found
        if not self._has_room(start, writes):
            start = self._move(start, same, (2, len(writes), groups, writes.shape[1], 16 * source[1][-1]))
        if same < writes.shape[1]:
            new = slice(start + same, start + writes.shape[1])
            own = sealing._replace(writes=writes[:, same:].contiguous(), kept=None)
            _fill(self._words[:, :, :, new], own, elsewhere)
            self._writes[:, new] = own.writes
        self._source, self._first, self._end = source, start, start + writes.shape[1]

    def _is_from(self, source: tuple[Tensor, tuple[int, ...]]) -> bool:
        return self._source is not None and self._source[0] is source[0] and self._source[1] == source[1]

    def _overlap(self, writes: Tensor) -> tuple[int, int]:
        """(first row, rows): which rows that are kept are the first of those asked for, in their order."""
        if self._first == self._end or len(self._writes) != len(writes) or not writes.numel():
            return self._first, 0
        held = self._writes[:, self._first : self._end]
        start = 0
        if held[0, 0] != writes[0, 0]:
            places = (held[0] == writes[0, 0]).nonzero()
            if not len(places):
                return self._first, 0
            start = int(places[0])
        common = min(held.shape[1] - start, writes.shape[1])
        held, writes = held[:, start : start + common], writes[:, :common]
        if not torch.equal(held, writes):
            common = int((held != writes).any(0).nonzero()[0])
        return self._first + start, common

    def _kept_from(self, row: int) -> _Rows | None:
        if row >= self._end:
            return None
        return self._writes[:, row : self._end], self._words[:, :, :, row : self._end]

    def _has_room(self, start: int, writes: Tensor) -> bool:
        if self._source is None or len(self._writes) != len(writes):
            return False
        rows, capacity = writes.shape[1], self._writes.shape[1]
        return start + rows <= capacity <= 2 * rows + _LEAST_ROWS

    def _move(self, start: int, same: int, shape: tuple[int, int, int, int, int]) -> int:
        """New memory for rows of this shape; the first `same` are those from `start` on. Returns their new start."""
        *outer, rows, width = shape
        if self._source is not None:
            rows = max(rows + rows // 4, _LEAST_ROWS)
        writes = torch.empty(outer[1], rows, dtype=torch.int64)
        words = torch.empty(*outer, rows, width, dtype=torch.int32)
        if same:
            writes[:, :same] = self._writes[:, start : start + same]
            words[:, :, :, :same] = self._words[:, :, :, start : start + same]
        self._writes, self._words = writes, words
        return 0


def _source(sealing: Sealing, groups: int, head_dim: int, dtype: torch.dtype) -> tuple[Tensor, tuple[int, ...]]:
    blocks = blocks_of(head_dim, dtype.itemsize)
    return sealing.key, (sealing.layer, sealing.rounds, sealing.first_head, groups, blocks)


def _fill(target: Tensor, own: Sealing, kept: _Rows | None) -> None:
    """target (2, B, G, N, 16n) = the keystream of rows with own.writes (B, N), from `kept` where it is there."""
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
    target[:, sequence, :, row] = words[:, place // writes.shape[1], :, place % writes.shape[1]]
    if is_kept.all():
        return
    numbers, place = own.writes[~is_kept].unique(return_inverse=True)
    made = target.new_empty(2, 1, target.shape[2], len(numbers), target.shape[4])
    _make(made, own._replace(writes=numbers[None]))
    sequence, row = is_kept.logical_not().nonzero(as_tuple=True)
    target[:, sequence, :, row] = made[:, 0][:, :, place].permute(2, 0, 1, 3)


def _make(target: Tensor, own: Sealing) -> None:
    """target (2, B, G, N, 16n) = the keystream of rows with own.writes (B, N)."""
    _check_values(own.writes, WRITE_LIMIT, "sealing.writes")
    for is_value, words in enumerate(target):
        words.zero_()
        if not _cipher_in_place(words, own, bool(is_value), words):
            groups, width = words.shape[1], words.shape[3]
            words.copy_(keystream(own, groups, width, torch.float32, is_value=bool(is_value)))
