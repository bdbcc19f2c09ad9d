"""Sealed storage: a stored tensor's bits XORed with a ChaCha keystream that is used once.

K and V of a cache lie in memory as (B, G, N, d), each row of d features under a *write number*: a number that is given
out once for a key, whenever a row is written, and stored in the clear beside the cache, (B, N) int64, one for all heads
and for K and V of a layer (8 bytes a token and layer). It stands for sequence, position and epoch at once. A row may be
moved, cropped, copied or selected by beam search: its number moves with it. What is written in its place takes a fresh
number. So no operation on a cache can make two values share keystream, whatever it does to positions.

ChaCha's state of sixteen words has four beside constants and key (RFC 8439, section 2.3). Here they hold

| word | bits  | field                                                     | limit             |
|------|-------|-----------------------------------------------------------|-------------------|
| 12   | 0-31  | (write number mod 2^28) * n + block within the head's row | n <= 16           |
| 13   | 0-31  | write number div 2^28                                     | 2^60 in all       |
| 14   | 0-15  | layer                                                     | 2^16              |
| 14   | 16-31 | key/value head                                            | 2^16              |
| 15   | 0-3   | n - 1, where n = ceil(d * itemsize / 64) blocks are a row | d * itemsize 1024 |
| 15   | 4     | 0 for K, 1 for V                                          |                   |
| 15   | 5-31  | zero                                                      |                   |

Two blocks with equal words have equal n, kind, head and layer, hence equal block and write number: they are one block.
The key is one session's (HKDF over the master key and session id). A write number is itself

| bits  | field    | limit                                                                              |
|-------|----------|------------------------------------------------------------------------------------|
| 0-31  | count    | of the rows written; `WriteCounter` refuses from 2^31 on                           |
| 32-47 | sequence | of the batch: rows that follow each other in a sequence have consecutive numbers   |
| 48-59 | epoch    | of the writer: whoever continues another's cache under the same key takes the next |

Consecutive numbers of one head are consecutive in word 12 (no carry: a run is cut where the number is a multiple of
2^28), so a library deciphers a whole head in one call.

A sealed tensor holds patterns, many of them signalling NaN. Copies, `cat`, `index_select` and indexing move them as
they are; `gather` and `scatter` of 16-bit floats on the CPU do not. Where those are needed, move `patterns(x)`.
"""

import threading
from typing import Any, Protocol

import torch
from torch import Tensor

from scx_kernels.chacha import BLOCK_BYTES, HAS_LIBRARY, ROUNDS, chacha_blocks, cipher_memory, key_bytes, key_words
from scx_kernels.hidden import Hidden

__all__ = [
    "BIT_DTYPES",
    "COUNT_BITS",
    "WRITE_LIMIT",
    "Kept",
    "Sealing",
    "WriteCounter",
    "blocks_of",
    "check_cache",
    "check_sealing",
    "check_values",
    "cipher_in_place",
    "key_words",
    "keystream",
    "patterns",
    "random_bits",
    "reseal",
    "seal",
    "unseal",
]

COUNT_BITS = 28  # of a write number that count within word 12
WRITE_LIMIT = 2**60
_COUNT_LIMIT = 2**31  # half of what the field holds
_MAX_BLOCKS = 16
BIT_DTYPES = {torch.float32: torch.int32, torch.float16: torch.int16, torch.bfloat16: torch.int16}
# Shorter runs cost more in calls to the library than a gather of their keystream does.
_MIN_RUN = 8
_FEW = 64  # numbers that a list is faster for than a tensor


class Kept(Protocol):
    """Keystream that was made before: `scx_kernels.KeptKeystream`."""

    def find(
        self, sealing: "Sealing", groups: int, head_dim: int, dtype: torch.dtype, *, is_value: bool
    ) -> Tensor | None:
        """What `keystream` gives, (B, groups, N, head_dim), to be read only; None where it is not kept."""

    def cover(self, sealing: "Sealing", groups: int, head_dim: int, dtype: torch.dtype) -> None:
        """Keep the keystream of these rows, and of no others."""


class Sealing(Hidden):
    """How the rows of one layer's cache are sealed. K and V share it.

    Attributes:
        key: (8,) int32, `key_words` of the session's cache key.
        writes: (B, N) int64 in 0..2^60-1, the write number of every row, any strides; anything, say zero, for rows that
            are not written yet. On an accelerator the range is not checked.
        layer: which layer, below 2^16.
        rounds: of ChaCha: 8, 12 or 20.
        first_head: number of the tensor's first key/value head, where the heads of a layer are spread over devices.
        kept: on a CPU, where keystream of these rows may lie that was made before; the bits are the same without it.
            Kernels never see it.
    """

    __slots__ = ("first_head", "kept", "key", "layer", "rounds", "writes")

    def __init__(
        self, key: Tensor, writes: Tensor, layer: int, rounds: int = 20, first_head: int = 0, kept: Kept | None = None
    ) -> None:
        self.key = key
        self.writes = writes
        self.layer = layer
        self.rounds = rounds
        self.first_head = first_head
        self.kept = kept

    def at(self, writes: Tensor) -> "Sealing":
        """How other rows of the same tensor are sealed, those with these write numbers (B, N)."""
        return Sealing(self.key, writes, self.layer, self.rounds, self.first_head, self.kept)

    def replace(self, **changed: Any) -> "Sealing":
        """The same with other attributes."""
        return Sealing(**{name: getattr(self, name) for name in Sealing.__slots__} | changed)

    @property
    def numbers(self) -> list[int]:
        """Layer, rounds and first head."""
        return [self.layer, self.rounds, self.first_head]

    def __repr__(self) -> str:
        return f"Sealing(layer={self.layer}, rounds={self.rounds}, writes={tuple(self.writes.shape)})"


class WriteCounter:
    """Gives out write numbers, each once. One for a key; a copy is the same counter, and it is never pickled."""

    __slots__ = ("_count", "_lock", "epoch")

    def __init__(self, epoch: int = 0, count: int = 0) -> None:
        """epoch: of this writer. count: where it goes on, for a lone writer that comes back to its cache.

        Raises: ValueError for an epoch outside 0..4095 or a count outside 0..2^31.
        """
        if not 0 <= epoch < 2**12 or not 0 <= count <= _COUNT_LIMIT:
            raise ValueError(f"epoch, count: expected 0..4095 and 0..2^31, got {epoch} and {count}")
        self.epoch = epoch
        self._count = count
        self._lock = threading.Lock()

    @property
    def count(self) -> int:
        """Numbers used in each sequence."""
        return self._count

    def take(self, batch: int, tokens: int, device: torch.device | None = None) -> Tensor:
        """Fresh numbers for `tokens` further rows of each sequence: (batch, tokens) int64.

        Raises: ValueError for a batch outside 0..65535 or negative tokens; OverflowError when the numbers run out.
        """
        if not 0 <= batch < 2**16 or tokens < 0:
            raise ValueError(f"batch, tokens: expected 0..65535 and 0 or more, got {batch} and {tokens}")
        with self._lock:
            if self._count + tokens > _COUNT_LIMIT:
                raise OverflowError(f"write numbers: {self._count} used, {tokens} more pass 2^31; take a fresh key")
            first, self._count = self._count, self._count + tokens
        sequence = torch.arange(batch, device=device)[:, None] + (self.epoch << 16)
        return (sequence << 32) + torch.arange(first, first + tokens, device=device)

    def __copy__(self) -> "WriteCounter":
        return self

    def __deepcopy__(self, memo: dict) -> "WriteCounter":
        return self

    def __reduce__(self) -> str:
        raise TypeError("a write counter is never pickled: its copy would give out the same numbers")


def blocks_of(head_dim: int, itemsize: int) -> int:
    """Blocks of 64 bytes in a head's row."""
    return -(-head_dim * itemsize // BLOCK_BYTES)


def check_sealing(x: Tensor, sealing: Sealing, name: str = "sealing") -> None:
    """Whether rows of x (B, G, N, d) can be sealed so. The values of write numbers are not read here.

    Raises: TypeError, ValueError naming the argument and what was expected.
    """
    if x.dim() != 4 or x.dtype not in BIT_DTYPES:
        raise ValueError(f"x: expected (B, G, N, d) float32, float16 or bfloat16, got {tuple(x.shape)} {x.dtype}")
    (batch, groups, tokens, size), (layer, rounds, first_head) = x.shape, sealing.numbers
    if not 0 < blocks_of(size, x.element_size()) <= _MAX_BLOCKS:
        raise ValueError(f"x: expected a head of 4 to 1024 bytes, got {size} features of {x.dtype}")
    check_key(sealing.key, x.device, f"{name}.key")
    writes = sealing.writes
    if writes.dtype != torch.int64:
        raise TypeError(f"{name}.writes: expected int64, got {writes.dtype}")
    if writes.shape != (batch, tokens) or writes.device != x.device:
        got = f"{tuple(writes.shape)} on {writes.device}"
        raise ValueError(f"{name}.writes: expected ({batch}, {tokens}) on {x.device}, got {got}")
    if not 0 <= layer < 2**16:
        raise ValueError(f"{name}.layer: expected 0..65535, got {layer}")
    if first_head < 0 or first_head + groups > 2**16:
        raise ValueError(f"{name}.first_head: heads {first_head} to {first_head + groups} leave 0..65535")
    check_rounds(rounds, f"{name}.rounds")


def check_values(x: Tensor, limit: int, name: str) -> None:
    """0 <= x < limit; on an accelerator this would wait for the device, and is left out."""
    if x.device.type == "cpu" and x.numel():
        lowest, highest = (int(value) for value in x.aminmax())
        if lowest < 0 or highest >= limit:
            raise ValueError(f"{name}: expected 0..{limit - 1}, got {lowest} to {highest}")


def check_cache(keys: Tensor, values: Tensor, sealing: Sealing | None) -> None:
    """keys, values (B, G, N, d), sealed alike, or not at all where sealing is None."""
    if sealing is not None:
        check_sealing(keys, sealing)
        if values.shape[:3] != keys.shape[:3]:
            raise ValueError(
                f"values: expected the rows of keys, {tuple(keys.shape[:3])}, got {tuple(values.shape[:3])}"
            )


def check_key(key: Tensor, device: torch.device, name: str = "key") -> None:
    if key.dtype != torch.int32:
        raise TypeError(f"{name}: expected int32, got {key.dtype}")
    if key.shape != (8,) or key.device != device or not key.is_contiguous():
        raise ValueError(f"{name}: expected a contiguous (8,) on {device}, got {tuple(key.shape)} on {key.device}")


def check_rounds(rounds: int, name: str = "rounds") -> None:
    if rounds not in ROUNDS:
        raise ValueError(f"{name}: expected one of {ROUNDS}, got {rounds}")


def check_out(x: Tensor, out: Tensor | None) -> None:
    if out is None:
        return
    if out.shape != x.shape or out.dtype != x.dtype or out.device != x.device:
        got = f"{tuple(out.shape)} {out.dtype} on {out.device}"
        raise ValueError(f"out: expected {tuple(x.shape)} {x.dtype} on {x.device}, got {got}")
    if any(stride == 0 and size > 1 for stride, size in zip(out.stride(), out.shape, strict=True)):
        raise ValueError("out: expected every element in a place of its own, got an expanded tensor")


def patterns(x: Tensor) -> Tensor:
    """A view of x as integers of its size: what may be moved by any operation without a change of bits."""
    return x.detach().view(BIT_DTYPES[x.dtype])


def row_format(head_dim: int, itemsize: int, is_value: bool) -> int:
    """Word 15."""
    return blocks_of(head_dim, itemsize) - 1 | int(is_value) << 4


def _words(sealing: Sealing, groups: int, blocks: int, word15: int) -> Tensor:
    """(4, B, G, N, n) int32: words 12 to 15 of every block."""
    batch, tokens = sealing.writes.shape
    device = sealing.writes.device
    writes = sealing.writes[:, None, :, None]
    count = (writes & (1 << COUNT_BITS) - 1) * blocks + torch.arange(blocks, device=device)
    head = torch.arange(sealing.first_head, sealing.first_head + groups, device=device)[None, :, None, None]
    words = (count, writes >> COUNT_BITS, head << 16 | sealing.layer, torch.tensor(word15, device=device))
    return torch.stack([word.expand(batch, groups, tokens, blocks) for word in words]).to(torch.int32)


def _runs(writes: Tensor) -> list[tuple[int, int, int]]:
    """(N,) write numbers -> (first row, rows, first number) of every stretch that one call to the library covers."""
    if len(writes) <= _FEW:
        given = writes.tolist()
        cuts = [i for i in range(1, len(given)) if given[i] != given[i - 1] + 1 or not given[i] % (1 << COUNT_BITS)]
        numbers = [given[i] for i in (0, *cuts)] if given else []
    else:
        cut = writes.diff() != 1
        cut |= writes[1:] & (1 << COUNT_BITS) - 1 == 0
        cuts = (cut.nonzero().flatten() + 1).tolist()
        numbers = writes[[0, *cuts]].tolist() if cuts else [int(writes[0])]
    edges = [0, *cuts, len(writes)]
    return [(edges[i], edges[i + 1] - edges[i], number) for i, number in enumerate(numbers)]


def _by_library(x: Tensor, rounds: int) -> bool:
    return HAS_LIBRARY and rounds == 20 and x.device.type == "cpu"


def _cipher_run(
    key: memoryview,
    sealing: Sealing,
    number: int,
    blocks: int,
    word15: int,
    source: list[int],
    target: list[int],
    size: int,
) -> None:
    """Seal `size` bytes, rows from write number `number` on, of every head: its addresses, head after head."""
    count = (number & (1 << COUNT_BITS) - 1) * blocks
    for head, (read, written) in enumerate(zip(source, target, strict=True)):
        word14 = sealing.first_head + head << 16 | sealing.layer
        cipher_memory(key, (count, number >> COUNT_BITS, word14, word15), read, written, size)


# A compiler that traced these two would guard on the key's bytes, and print them.
@torch.compiler.disable
def _library_keystream(sealing: Sealing, groups: int, blocks: int, word15: int) -> Tensor:
    """(B, G, N, 16n) int32, from runs over the distinct numbers in their order."""
    numbers, place = sealing.writes.unique(return_inverse=True)
    rows = torch.zeros(groups, len(numbers), 16 * blocks, dtype=torch.int32)
    key, width = key_bytes(sealing.key), blocks * BLOCK_BYTES
    for first, count, number in _runs(numbers):
        heads = [rows.data_ptr() + (head * len(numbers) + first) * width for head in range(groups)]
        _cipher_run(key, sealing, number, blocks, word15, heads, heads, count * width)
    return rows[:, place].transpose(0, 1)


def keystream(sealing: Sealing, groups: int, head_dim: int, dtype: torch.dtype, *, is_value: bool) -> Tensor:
    """The bits with which a (B, groups, N, head_dim) tensor of `dtype` is XORed: int32 or int16 of that shape."""
    integer = BIT_DTYPES[dtype]
    blocks, word15 = blocks_of(head_dim, dtype.itemsize), row_format(head_dim, dtype.itemsize, is_value)
    if _by_library(sealing.writes, sealing.rounds):
        words = _library_keystream(sealing, groups, blocks, word15)
    else:
        counters = _words(sealing, groups, blocks, word15)
        words = chacha_blocks(sealing.key, counters.flatten(1), sealing.rounds)
        words = words.view(*counters.shape[1:4], 16 * blocks)
    return words.view(integer)[..., :head_dim]


@torch.compiler.disable
def cipher_in_place(x: Tensor, sealing: Sealing, is_value: bool, out: Tensor) -> bool:
    """out = sealed x by the library alone, one call a run and head. False, and nothing done, where rows have gaps."""
    blocks = blocks_of(x.shape[3], x.element_size())
    whole = blocks * BLOCK_BYTES == x.shape[3] * x.element_size()
    dense = out.stride(3) == 1 and (out.stride(2) == out.shape[3] or out.shape[2] == 1)
    if not (whole and dense and _by_library(x, sealing.rounds)):
        return False
    runs = [_runs(writes) for writes in sealing.writes]
    if sum(map(len, runs)) * _MIN_RUN > sealing.writes.numel() + _MIN_RUN * x.shape[0]:
        return False
    key, word15 = key_bytes(sealing.key), row_format(x.shape[3], x.element_size(), is_value)
    width = blocks * BLOCK_BYTES
    x = x if x.stride() == out.stride() else x.contiguous()
    for sequence, parts in enumerate(runs):
        sources, targets = (
            [
                t.data_ptr() + (sequence * t.stride(0) + head * t.stride(1)) * t.element_size()
                for head in range(t.shape[1])
            ]
            for t in (x, out)
        )
        for first, count, number in parts:
            read, written = ([address + first * width for address in heads] for heads in (sources, targets))
            _cipher_run(key, sealing, number, blocks, word15, read, written, count * width)
    return True


def seal(x: Tensor, sealing: Sealing, *, is_value: bool, out: Tensor | None = None) -> Tensor:
    """XOR the bit patterns of x with the keystream of its rows. Twice gives x back, NaN and infinity included.

    Args:
        x: (B, G, N, d) float32, float16 or bfloat16, any strides; d * itemsize at most 1024.
        sealing: key, write numbers (B, N), layer and rounds.
        is_value: whether x is V; K and V of a row share its number.
        out: (B, G, N, d) of x's dtype to write into, any strides; x itself for in place. Fresh if absent.

    Returns: (B, G, N, d) of x's dtype, for which it is a pattern of bits, not numbers.
    Raises: TypeError, ValueError naming the argument that does not fit.
    Source: RFC 8439, section 2.4, on the counter of this module's table.
    """
    check_sealing(x, sealing)
    check_out(x, out)
    sizes = (x.shape[1], x.shape[3], x.dtype)
    bits = None if sealing.kept is None else sealing.kept.find(sealing, *sizes, is_value=is_value)
    if bits is not None and out is None:
        return torch.bitwise_xor(patterns(x), bits).view(x.dtype)
    x = x.detach()
    if out is None:
        out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if bits is None:
        check_values(sealing.writes, WRITE_LIMIT, "sealing.writes")
        if cipher_in_place(x, sealing, is_value, out.detach()):
            return out
        bits = keystream(sealing, *sizes, is_value=is_value)
    torch.bitwise_xor(patterns(x), bits, out=patterns(out))
    return out


def unseal(x: Tensor, sealing: Sealing, *, is_value: bool, out: Tensor | None = None) -> Tensor:
    """Undo `seal`: the same XOR under the same arguments."""
    return seal(x, sealing, is_value=is_value, out=out)


def reseal(x: Tensor, old: Sealing, new: Sealing, *, is_value: bool, out: Tensor | None = None) -> Tensor:
    """Move x from one key, numbers, layer or rounds to others: `seal(unseal(x, old), new)`, never unsealed in memory.

    Args: as for `seal`. new.writes must be fresh numbers unless new.key is.
    """
    check_sealing(x, old, "old")
    check_sealing(x, new, "new")
    # Sealed twice, then once: in this order no plain value is ever stored.
    twice = seal(x, new, is_value=is_value, out=out)
    return seal(twice, old, is_value=is_value, out=twice)


def check_streams(key: Tensor, streams: Tensor, count: int, rounds: int) -> None:
    check_key(key, streams.device)
    if streams.dtype != torch.int64:
        raise TypeError(f"streams: expected int64, got {streams.dtype}")
    if streams.dim() != 2 or streams.shape[1] != 3:
        raise ValueError(f"streams: expected (streams, 3), got {tuple(streams.shape)}")
    if not 0 <= count < 2**32:
        raise ValueError(f"count: expected 0..2^32-1, got {count}")
    check_rounds(rounds)


def random_bits(key: Tensor, streams: Tensor, count: int, *, rounds: int = 20) -> Tensor:
    """Uniform bits: the keystream of each stream from its first block on.

    Args:
        key: (8,) int32. streams: (n, 3) int64 in 0..2^32-1, words 13 to 15: the 96-bit nonce of RFC 8439. On an
            accelerator their range is not checked.
        count: 32-bit words a stream.

    Returns: (n, count) int32 on the streams' device, the same bits everywhere.
    Raises: TypeError, ValueError naming the argument that does not fit.
    """
    check_streams(key, streams, count, rounds)
    check_values(streams, 2**32, "streams")
    if _by_library(streams, rounds):
        out = torch.zeros(len(streams), count, dtype=torch.int32)
        secret, width, first = key_bytes(key), 4 * count, out.data_ptr()
        for row, stream in enumerate(streams.tolist() if count else ()):
            cipher_memory(secret, (0, *stream), first + row * width, first + row * width, width)
        return out
    blocks = -(-count // 16)
    number = torch.arange(blocks, device=key.device).expand(len(streams), blocks)
    words = torch.stack([number, *(stream[:, None].expand_as(number) for stream in streams.unbind(1))])
    return (
        chacha_blocks(key, words.flatten(1).to(torch.int32), rounds)
        .view(len(streams), 16 * blocks)[:, :count]
        .contiguous()
    )
