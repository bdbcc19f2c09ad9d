"""A paged cache that is sealed in memory: attention on it is plain attention, and no write number is used twice.

On a GPU, or in Triton's interpreter, the kernels that vLLM's backend calls; and the reference on the CPU.
"""

import pytest
import torch
from parity import DEVICE, by_dtype, needs, same_bits
from plain_attention import plain_attention, seen_keys

from scx.vllm.pages.format import PageFormat, memory_of, spare_bytes
from scx.vllm.pages.paged import (
    FEW_QUERIES,
    attend,
    paged_rows,
    plain_pages,
    position_of,
    seal_pages,
    write_rows,
)
from scx.vllm.pages.process import HALF, Counter, page_key
from scx_kernels import backend

pytestmark = needs("cryptography")
LAYER, FIRST_HEAD = 7, 12


def seal(writes):
    page_key().prepare(writes.device)
    return page_key().sealing(writes, LAYER, FIRST_HEAD)


class Cache:
    """A paged cache, and beside it the plain rows that it should hold: what the tests below drive."""

    def __init__(self, heads, tokens, size, dtype, blocks):
        spare = spare_bytes(heads, size, dtype, 16 * dtype.itemsize)
        self.form = PageFormat(heads, tokens, size, dtype, spare)
        self.memory = torch.zeros(blocks, self.form.page_bytes, dtype=torch.int8, device=DEVICE)
        self.rows = paged_rows(self.memory, self.form)
        self.plain = torch.zeros(2, blocks * tokens, heads, size, dtype=dtype, device=DEVICE)
        self.counter = torch.ones(1, dtype=torch.int64, device=DEVICE)
        self.numbers = []

    def write(self, slots):
        """Fresh rows in these slots."""
        slots = torch.tensor(slots, device=DEVICE)
        x = torch.randn(2, len(slots), *self.plain.shape[2:], device=DEVICE).to(self.plain.dtype)
        first = int(self.counter)
        write_rows(self.rows, *x, slots, self.counter, seal)
        self.numbers += range(first, int(self.counter))
        real = slots >= 0
        self.plain[:, slots[real]] = x[:, real]

    def slots(self, table, first, count):
        size = self.form.tokens
        return [table[n // size] * size + n % size for n in range(first, first + count)]

    def check(self, tables, query_lengths, lengths, window=None):
        """Attention of these sequences, against plain attention in float64."""
        width = max(map(len, tables))
        table = torch.tensor([row + [0] * (width - len(row)) for row in tables], dtype=torch.int32, device=DEVICE)
        position = position_of(table, self.form.tokens, max(lengths))
        heads, size, dtype = 2 * self.form.heads, self.form.head_dim, self.form.dtype
        queries = torch.randn(sum(query_lengths), heads, size, device=DEVICE).to(dtype)
        out = torch.full_like(queries, torch.nan)
        on_device = torch.tensor(lengths, dtype=torch.int32, device=DEVICE)
        options = {"softmax_scale": size**-0.5, "window": window}
        attend(queries, self.rows, position, on_device, query_lengths, lengths, seal, out, **options)
        first = 0
        for row, count, length in zip(tables, query_lengths, lengths, strict=True):
            slots = self.slots(row, 0, length)
            for kind, bound in ((torch.float64, None), (dtype, 2)):
                k, v = (x[slots].transpose(0, 1)[None].to(kind) for x in self.plain)
                q = queries[first : first + count].transpose(0, 1)[None].to(kind)
                mask = seen_keys(1, count, length, causal=True, window=window)
                result = plain_attention(q, k, v, mask, size**-0.5)[0].transpose(0, 1)
                if bound is None:
                    exact = result
            # Twice what PyTorch is off by in the same dtype, and a rounding of the largest result.
            error = (out[first : first + count].double() - exact).abs().max()
            floor = torch.finfo(dtype).eps * exact.abs().max()
            assert error <= bound * (result.double() - exact).abs().max() + floor
            first += count
        assert first == len(queries)


@pytest.fixture(params=["reference", "triton"])
def by(request):
    with backend(request.param):
        yield request.param


@by_dtype
@pytest.mark.parametrize("shape", [(3, 16, 32), (2, 32, 48)], ids=str)
def test_attention_reads_what_was_written(by, dtype, shape):
    """Prompts, then single tokens, several sequences with a shared first block, in blocks that lie in any order."""
    heads, tokens, size = shape
    if dtype.itemsize == 2 and size == 48:
        heads, size = 1, 64  # heads of 48 are refused on a GPU in half precision
    cache = Cache(heads, tokens, size, dtype, blocks=9)
    tables = [[5, 2], [5, 8, 3], [1]]
    lengths = [tokens + 3, 2 * tokens + 1, 4]
    cache.write(cache.slots(tables[0], 0, lengths[0]))
    cache.write(cache.slots(tables[1], tokens, lengths[1] - tokens) + cache.slots(tables[2], 0, 4) + [-1, -1])
    cache.check(tables, [3, 1, 4], lengths)
    for _ in range(2):
        lengths = [length + 1 for length in lengths]
        cache.write([cache.slots(row, n - 1, 1)[0] for row, n in zip(tables, lengths, strict=True)])
        cache.check(tables, [1, 1, 1], lengths)
    cache.check(tables, [1, 1, 2], lengths, window=5)
    cache.check(tables[:1], [FEW_QUERIES + 1], lengths[:1])
    assert len(set(cache.numbers)) == len(cache.numbers)


def test_slots_that_are_written_again(by):
    """A preempted sequence's blocks go to another, which reads its own rows: the longer old one leaves nothing."""
    cache = Cache(2, 16, 32, torch.float32, blocks=4)
    cache.write(cache.slots([1, 2], 0, 32))
    before = cache.memory.clone()
    cache.write(cache.slots([2, 1], 0, 20))
    cache.check([[2, 1]], [4], [20])
    # A row that did not change is sealed anew all the same.
    x = cache.plain[:, :1].clone()
    for slot in (16, 17):
        write_rows(cache.rows, *x, torch.tensor([slot], device=DEVICE), cache.counter, seal)
    first, second = (cache.rows.keys[0, :, slot] for slot in (16, 17))
    assert not torch.equal(first, second)
    assert (before != cache.memory).any()


def test_numbers_of_a_replayed_step_are_fresh(by):
    """The counter moves in the stream: the same call on the same tensors takes other numbers."""
    cache = Cache(2, 16, 32, torch.float32, blocks=3)
    slots, x = torch.tensor([17, 18], device=DEVICE), torch.randn(2, 2, 2, 32, device=DEVICE)
    seen = []
    for _ in range(3):
        write_rows(cache.rows, *x, slots, cache.counter, seal)
        seen += cache.rows.writes[0, slots].tolist()
    assert sorted(seen) == list(range(1, 7))


@by_dtype
def test_a_page_moves_through_plain_bytes(by, dtype):
    cache = Cache(3, 16, 32, dtype, blocks=6)
    cache.write(cache.slots([4, 2], 0, 21))
    page = paged_rows(cache.memory[2:3], cache.form)
    plain = plain_pages(page, seal)
    assert torch.equal(plain[5:], torch.zeros_like(plain[5:]))  # never written
    expected = torch.cat(list(cache.plain[:, 32:37]), dim=2)
    assert same_bits(plain[:5].contiguous(), expected)
    numbers = page_key().pages.take(16).to(DEVICE)
    assert int(numbers[0]) >= HALF
    seal_pages(paged_rows(cache.memory[5:6], cache.form), plain, numbers, seal)
    assert not torch.equal(cache.memory[5], cache.memory[2])
    cache.plain[:, 80:96] = cache.plain[:, 32:48]
    cache.check([[4, 5]], [2], [21])


def test_pages_hold_no_plain_row():
    cache = Cache(2, 16, 64, torch.float32, blocks=9)
    cache.write(range(16, 144))
    stored = cache.rows.keys[0, :, 16:].transpose(0, 1)
    assert not (stored.view(torch.int32) == cache.plain[0, 16:].view(torch.int32)).all(-1).any()
    drawn = torch.bincount(stored.contiguous().view(torch.uint8).flatten().int(), minlength=256).double()
    expected = drawn.sum() / 256
    # Chi-square of 255 degrees of freedom: six of its standard deviations; uniform bytes pass but once in 1e8.
    assert float(((drawn - expected) ** 2 / expected).sum()) < 255 + 6 * 510**0.5


def test_refusals():
    form = PageFormat(2, 16, 32, torch.float16, 16)
    with pytest.raises(ValueError, match="after each other"):
        paged_rows(torch.zeros(3, form.page_bytes + 8, dtype=torch.int8), form)
    with pytest.raises(TypeError, match="page: expected uint8"):
        form.check_pages(torch.zeros(form.page_bytes))
    with pytest.raises(ValueError, match="page: expected contiguous bytes"):
        form.check_pages(torch.zeros(form.page_bytes - 1, dtype=torch.int8))
    with pytest.raises(ValueError, match="plain: expected"):
        form.check_plain(torch.zeros(3, dtype=torch.int8), 1)
    with pytest.raises(ValueError, match="aligned to 8"):
        memory_of(torch.zeros(64, dtype=torch.int8)[4:], torch.int64, 0, (1,), (1,))
    cache = Cache(2, 16, 32, torch.float32, blocks=3)
    cache.write(range(16, 40))
    position, lengths = torch.arange(16, 40)[None], torch.tensor([24])
    q = torch.zeros(20, 4, 32)
    with pytest.raises(ValueError, match="kv_lengths"):
        attend(q, cache.rows, position, lengths, [20], None, seal, q, softmax_scale=1.0)
    with pytest.raises(ValueError, match="query_lengths"):
        attend(q, cache.rows, position, lengths, [10, 10], None, seal, q, softmax_scale=1.0)
    with pytest.raises(OverflowError, match="restart"):
        Counter(3, 5).take(3)


def test_a_token_has_room_for_its_number():
    """Sizes of models: a token of all heads is aligned, and grows by the write number and what alignment takes."""
    for heads in (1, 2, 3, 4, 5, 8, 12, 32):
        for size, dtype in ((64, torch.float32), (80, torch.bfloat16), (96, torch.float16), (128, torch.bfloat16)):
            for alignment in (8, 16 * dtype.itemsize):
                spare = spare_bytes(heads, size, dtype, alignment)
                token = heads * (2 * size * dtype.itemsize + spare)
                assert heads * spare >= 8
                assert spare % dtype.itemsize == 0
                assert token % alignment == token % 8 == 0
    assert spare_bytes(8, 128, torch.bfloat16, 32) == 4  # 32 bytes of 4,128 for Llama-3-8B


def test_a_key_is_one_process_and_prepared_devices():
    key = page_key()
    assert page_key() is key
    assert "key" not in repr(key).lower().replace("pagekey", "")
    with pytest.raises(TypeError, match="never pickled"):
        key.__reduce_ex__(2)
    assert key.layer("a") != key.layer("b")
    assert key.layer("a") == key.layer("a")
    nowhere = torch.zeros(1, 1, dtype=torch.int64, device="meta")
    with pytest.raises(LookupError, match="prepared"):
        key.sealing(nowhere, 0, 0)
    with pytest.raises(LookupError, match="prepared"):
        key.counter(nowhere.device)


def test_a_forked_process_has_a_key_of_its_own(monkeypatch):
    """A fork copies key and counters; a child that went on with them would seal other rows under the same keystream."""
    writes = torch.arange(3)[None]
    mine = page_key().sealing(writes, 0, 0)
    monkeypatch.setattr("os.getpid", lambda: -1)
    other = page_key().sealing(writes, 0, 0)
    assert not torch.equal(mine.key, other.key)
    assert int(page_key().rows.take(1)) == 1
