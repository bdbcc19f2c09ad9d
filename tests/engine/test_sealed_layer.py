"""The sealed pages of one layer on a CPU, without an engine: scratch holds what plain vLLM would, bit by bit."""

import random

import pytest
import torch
from vllm import _custom_ops as ops

from scx.vllm.pages.cpu import SealedLayer
from scx.vllm.pages.format import PageFormat, spare_bytes
from scx.vllm.pages.pads import Places
from scx.vllm.pages.registry import enter, plain_size

TOKENS = 32


class Twin:
    """Sealed pages, and the plain rows of each slot."""

    def __init__(self, heads: int, size: int, dtype: torch.dtype, blocks: int, isa: str = "vec") -> None:
        form = PageFormat(heads, TOKENS, size, dtype, spare_bytes(heads, size, dtype, 1))
        shape = (blocks, heads, TOKENS, form.page_bytes // (heads * TOKENS * dtype.itemsize))
        self.cache = torch.zeros(shape, dtype=dtype)
        self.layer = SealedLayer(f"twin {random.random()}", form, 3, isa, Places(TOKENS))  # noqa: S311
        self.rows = torch.zeros(2, blocks * TOKENS, heads, size, dtype=dtype)
        self.given: list[int] = []

    def page(self, block: int) -> torch.Tensor:
        return self.cache[block].view(-1).view(torch.uint8)

    def step(self, tables: list[list[int]], before: list[int], after: list[int], padding: int = 0) -> None:
        """Write each sequence's tokens before..after-1, then hold what it reads against its rows."""
        slots = [
            table[n // TOKENS] * TOKENS + n % TOKENS
            for table, first, end in zip(tables, before, after, strict=True)
            for n in range(first, end)
        ]
        new = torch.randn(2, len(slots) + padding, *self.rows.shape[2:]).to(self.rows.dtype)
        self.rows[:, slots] = new[:, : len(slots)]
        width = max(map(len, tables)) + 1
        table = torch.tensor([row + [0] * (width - len(row)) for row in tables], dtype=torch.int32)
        where = torch.tensor(slots + [-1] * padding, dtype=torch.int64)
        plan = self.layer.places.plan(table, torch.tensor(after, dtype=torch.int32), where)
        self.layer.write(new[0], new[1], self.cache, plan)
        scratch = self.layer.unsealed(self.cache, plan)
        self.given += self.layer.views(self.cache)[3].flatten()[slots].tolist() if slots else []
        for row, near, length in zip(tables, plan.table.tolist(), after, strict=True):
            for i in range(-(-length // TOKENS)):
                pairs = [(n - k * TOKENS, b) for t, n in zip(tables, after, strict=True) for k, b in enumerate(t)]
                count = min(TOKENS, max(n for n, b in pairs if b == row[i]))
                found, blank, full = (
                    bits(x).view(-1, self.rows.element_size())
                    for x in (scratch[near[i]], self.expected(row[i], count), self.expected(row[i], TOKENS))
                )
                # Where nobody has a token: zero, or what was last written there, as in plain pages.
                assert ((found == blank).all(1) | (found == full).all(1)).all()

    def expected(self, block: int, count: int) -> torch.Tensor:
        """The block with its first rows, as stock attention packs it, and zeros."""
        form = self.layer.format
        packed = torch.zeros(1, form.heads, 2 * TOKENS, form.head_dim, dtype=form.dtype)
        own = [x[block * TOKENS : block * TOKENS + count] for x in self.rows]
        place = torch.arange(len(own[0]))
        ops.cpu_attn_reshape_and_cache(
            *own, *packed.chunk(2, dim=2), place, self.layer.isa, k_scale=1.0, v_scale=1.0, kv_cache_dtype="auto"
        )
        return packed[0]


def bits(x: torch.Tensor) -> torch.Tensor:
    return x.reshape(-1).view(torch.uint8)


SHAPES = [
    (3, 64, torch.float32),
    (2, 64, torch.float16),
    (1, 128, torch.bfloat16),
    (2, 96, torch.bfloat16),  # of a row, keystream is cut off
]


@pytest.mark.parametrize(("heads", "size", "dtype"), SHAPES, ids=lambda x: str(x))
def test_scratch_is_what_plain_pages_would_be(heads: int, size: int, dtype: torch.dtype) -> None:
    """Prompts, single tokens, a shared first block, padding, a sequence that goes and one whose blocks it leaves."""
    twin = Twin(heads, size, dtype, 12)
    tables, lengths = [[4, 2], [4, 9, 1], [7]], [40, 70, 5]
    twin.step(tables[:1], [0], lengths[:1])
    twin.step(tables, [40, 32, 0], lengths, padding=3)
    for _ in range(3):
        grown = [n + 1 for n in lengths]
        twin.step(tables, lengths, grown)
        lengths = grown
    twin.step([tables[1]], [lengths[1]], [lengths[1] + 1])
    twin.step([[7]], [lengths[2]], [lengths[2] + 1])  # alone, its pad behind others
    # A new owner of blocks of which more was written than it has.
    twin.step([[2, 4]], [0], [35])
    assert len(set(twin.given)) == len(twin.given)


def test_pads_never_outlive_their_numbers() -> None:
    """Whatever is done to pages behind the layer's back, rows are unsealed under the numbers that they have."""
    twin = Twin(2, 64, torch.float32, 8)
    twin.step([[1, 2]], [0], [50])
    twin.step([[1, 2]], [50], [51])
    twin.cache[3] = twin.cache[1]  # a copy moves rows and numbers
    twin.rows[:, 96:128] = twin.rows[:, 32:64]
    twin.step([[3, 2]], [51], [52])
    plain = twin.layer.plain(twin.page(3))
    twin.layer.write_plain(twin.page(3), plain)
    twin.step([[3, 2]], [52], [53])
    twin.cache[3] = twin.cache[5]  # nothing written
    twin.rows[:, 96:128] = 0
    twin.layer.pads.wipe()
    twin.step([[2, 1]], [20], [21])


def test_a_random_life() -> None:
    """Sequences come, grow, share, are preempted and go, in a cache that is too small for all of them."""
    draw = random.Random(5)  # noqa: S311
    twin = Twin(2, 32, torch.float32, 24)
    free, live, prefixes = list(range(1, 24)), [], []
    for _ in range(80):
        while len(live) < 4 and len(free) > 8:
            full = [entry[0][0] for entry in live if entry[1] >= TOKENS] + prefixes
            start = [draw.choice(full)] if full and draw.random() < 0.5 else []
            live.append([[*start, *(free.pop() for _ in range(3 - len(start)))], len(start) * TOKENS, bool(start)])
        before = [entry[1] for entry in live]
        after = [min(n + draw.choice((1, 1, 1, 30)), 3 * TOKENS) for n in before]
        twin.step([entry[0] for entry in live], before, after, padding=draw.randrange(3))
        for entry, n in zip(live, after, strict=True):
            entry[1] = n
        for entry in [entry for entry in live if entry[1] == 3 * TOKENS or draw.random() < 0.1]:
            live.remove(entry)
            held = {block for other in live for block in other[0]}
            if entry[1] >= TOKENS and len(prefixes) < 4:  # stays in the prefix cache, in nobody's batch for a while
                prefixes.append(entry[0][0])
            free += [block for block in entry[0] if block not in held and block not in prefixes]
            draw.shuffle(free)
    assert len(set(twin.given)) == len(twin.given)


def test_pages_as_bytes() -> None:
    twin = Twin(3, 64, torch.bfloat16, 6)
    twin.step([[2]], [0], [20])
    plain = twin.layer.plain(twin.page(2))
    assert torch.equal(plain, bits(twin.expected(2, 20)))
    assert plain.numel() == twin.layer.format.plain_bytes < twin.page(2).numel()
    sealed = twin.page(2).clone()
    twin.layer.write_plain(twin.page(2), plain)
    same = (twin.page(2)[: len(plain)] == sealed[: len(plain)])[plain != 0].float().mean()
    assert same < 0.01  # one byte of 256 by chance
    two = twin.cache[2:4].view(-1).view(torch.uint8)
    assert torch.equal(twin.layer.plain(two)[: len(plain)], plain)
    with pytest.raises(ValueError, match="page: expected contiguous bytes"):
        twin.layer.plain(two[1:])
    enter("twin", twin.layer)
    assert plain_size(len(two), "twin") == 2 * len(plain)
    with pytest.raises(ValueError, match="size: expected a multiple"):
        plain_size(len(two) - 1, "twin")
    with pytest.raises(ValueError, match="plain: expected"):
        twin.layer.write_plain(twin.page(2), plain[1:])


def test_pads_show_nothing() -> None:
    twin = Twin(2, 64, torch.float32, 4)
    twin.step([[1]], [0], [9])
    with pytest.raises(TypeError, match="never pickled"):
        twin.layer.pads.__reduce_ex__(2)
    assert "bits" not in dir(twin.layer.pads)
    with pytest.raises(TypeError, match="never pickled"):
        twin.layer.__reduce_ex__(2)
    twin.layer.wipe()
    assert not twin.layer.pads.bits.any()
    twin.step([[1]], [9], [10])  # what was wiped is made anew
