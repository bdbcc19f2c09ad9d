"""Attention over a paged cache that is sealed in memory, in plain tensors: what the backend on CUDA computes.

A page holds tokens one after another: of each its K and V, head by head, then its write number. So all slots of all
pages lie at equal distances, and the whole cache is one sequence of rows to an operation: a block table says which
rows are a sequence's, `position`, and the keystream is taken off where the rows are used. Nothing unsealed lies in
memory but what the model made in this step.

| tensor     | shape          | meaning                                                                    |
|------------|----------------|----------------------------------------------------------------------------|
| `slots`    | (T,)           | where each token goes, block * N + offset; below zero for padding          |
| `position` | (B, n)         | the slot of each token of a sequence                                       |
| `lengths`  | (B,)           | tokens of each sequence, those of this step included                       |
| `queries`  | (T, H, d)      | of this step's tokens, sequence after sequence                             |
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

import scx_kernels as ops
from scx.devices import upload
from scx.vllm.pages.format import PageFormat, memory_of
from scx_kernels.sealing import Sealing, patterns

__all__ = ["FEW_QUERIES", "PagedRows", "attend", "paged_rows", "position_of", "write_rows"]

FEW_QUERIES = 16
"""Up to so many queries a sequence are taken by `scx_kernels.attention_step`."""
_NOBODY = 0  # the first slot of vLLM's null block, which is in no sequence

Seal = Callable[[Tensor], Sealing]
"""How rows with given write numbers (B, N) are sealed."""


class PagedRows(NamedTuple):
    """All rows of a layer's pages, in place: keys, values (1, G, slots, d); writes (1, slots) int64."""

    keys: Tensor
    values: Tensor
    writes: Tensor


def paged_rows(cache: Tensor, form: PageFormat) -> PagedRows:
    """Views of a layer's pages.

    Args: cache: (blocks, page) in elements of any dtype, `form.page_bytes` each, after each other.
    Raises: ValueError where they are not.
    """
    stride = cache.stride(0) * cache.element_size()
    if cache.dim() != 2 or not cache.is_contiguous() or stride != form.page_bytes:
        got = f"{tuple(cache.shape)} {cache.dtype}, {stride} bytes apart"
        raise ValueError(f"cache: expected pages of {form.page_bytes} bytes after each other, got {got}")
    slots, size = len(cache) * form.tokens, form.dtype.itemsize
    token_bytes = form.page_bytes // form.tokens
    token, pair = token_bytes // size, form.pair_bytes // size
    shape, strides = (1, form.heads, slots, form.head_dim), (slots * token, pair, token, 1)
    keys = memory_of(cache, form.dtype, 0, shape, strides)
    values = memory_of(cache, form.dtype, form.head_dim * size, shape, strides)
    numbers = token_bytes // 8
    writes = memory_of(cache, torch.int64, form.heads * form.pair_bytes, (1, slots), (slots * numbers, numbers))
    return PagedRows(keys, values, writes)


def write_rows(rows: PagedRows, key: Tensor, value: Tensor, slots: Tensor, counter: Tensor, seal: Seal) -> None:
    """Seal a step's K and V into their slots, under numbers that no row had before.

    Args:
        key, value: (T, G, d). slots: (T,); padding goes where nobody reads.
        counter: (1,) int64, the next number, which is moved on by T on the device: a replayed graph takes others.
    """
    numbers = counter + torch.arange(len(slots), device=slots.device)
    counter.add_(len(slots))
    where = slots.long().clamp(min=_NOBODY)
    sealing = seal(numbers[None])
    for pages, x, is_value in ((rows.keys, key, False), (rows.values, value, True)):
        sealed = ops.seal(x.transpose(0, 1)[None], sealing, is_value=is_value)
        patterns(pages)[0].index_copy_(1, where, patterns(sealed)[0])
    rows.writes[0].index_copy_(0, where, numbers)


def position_of(table: Tensor, tokens: int, longest: int) -> Tensor:
    """(B, W) blocks of `tokens` slots -> (B, longest) int64, the slot of each token."""
    slots = table.long()[:, :, None] * tokens + torch.arange(tokens, device=table.device)
    return slots.flatten(1)[:, :longest].contiguous()


def attend(
    queries: Tensor,
    rows: PagedRows,
    position: Tensor,
    lengths: Tensor,
    query_lengths: Sequence[int],
    kv_lengths: Sequence[int] | None,
    seal: Seal,
    out: Tensor,
    *,
    softmax_scale: float,
    window: int | None = None,
) -> None:
    """Causal attention of each sequence's last tokens on its rows.

    Args:
        queries: (T, H, d). lengths: (B,), read on the device only. query_lengths: B counts whose sum is at most T.
        kv_lengths: `lengths` on the host, needed where a sequence has more than `FEW_QUERIES` queries.
        window: a query sees no more than its last `window` tokens, itself among them.
        out: (T, H, d) to write into; rows behind the last sequence's are left as they are.

    Raises: ValueError naming the argument that is missing or does not fit.
    """
    if len(query_lengths) != len(position):
        raise ValueError(f"query_lengths: expected {len(position)}, got {len(query_lengths)}")
    starts, first = [], 0
    for count in query_lengths:
        starts.append(first)
        first += count
    for count in sorted(set(query_lengths) - {0}):
        members = [i for i, own in enumerate(query_lengths) if own == count]
        if count <= FEW_QUERIES:
            _few(queries, rows, position, lengths, members, starts, count, seal, out, softmax_scale, window)
            continue
        if kv_lengths is None:
            raise ValueError(f"kv_lengths: expected them for sequences with {count} queries, got None")
        for i in members:
            own = slice(starts[i], starts[i] + count)
            place = position[i, : kv_lengths[i]]
            out[own] = _many(queries[own], rows, place, seal, softmax_scale, window)


def _few(
    queries: Tensor, rows: PagedRows, position: Tensor, lengths: Tensor, members: list[int], starts: list[int],
    count: int, seal: Seal, out: Tensor, scale: float, window: int | None,
) -> None:  # fmt: skip
    """All sequences with so many queries at once."""
    first = starts[members[0]]
    together = members == list(range(members[0], members[0] + len(members)))
    own: slice | Tensor = slice(first, first + len(members) * count)
    if not together:
        index = [starts[i] + j for i in members for j in range(count)]
        own, chosen = (upload(torch.tensor(x), queries.device) for x in (index, members))
        position, lengths = position[chosen], lengths[chosen]
    elif len(members) != len(position):
        part = slice(members[0], members[-1] + 1)
        position, lengths = position[part], lengths[part]
    batch = len(members)
    q = queries[own].unflatten(0, (batch, count)).transpose(1, 2)
    keys, values = (x.expand(batch, *x.shape[1:]) for x in (rows.keys, rows.values))
    result = ops.attention_step(
        q, keys, values, softmax_scale=scale, window=window, kv_length=lengths, position=position,
        sealing=seal(rows.writes.expand(batch, -1)),
    )  # fmt: skip
    out[own] = result.transpose(1, 2).flatten(0, 1)


def _many(queries: Tensor, rows: PagedRows, place: Tensor, seal: Seal, scale: float, window: int | None) -> Tensor:
    """A prompt, (S, H, d): its rows are brought together as they are, sealed."""
    keys, values = (patterns(x).index_select(2, place).view(x.dtype) for x in (rows.keys, rows.values))
    sealing = seal(rows.writes.index_select(1, place))
    q = queries.transpose(0, 1)[None]
    result = ops.attention(q, keys, values, softmax_scale=scale, is_causal=True, window=window, sealing=sealing)
    return result[0].transpose(0, 1)


def plain_pages(rows: PagedRows, seal: Seal) -> Tensor:
    """K and V unsealed, (slots, G, 2d), zeros where nothing was written. rows: of whole pages."""
    sealing = seal(rows.writes)
    parts = [ops.unseal(x, sealing, is_value=v) for x, v in ((rows.keys, False), (rows.values, True))]
    plain = torch.cat(parts, dim=3)[0].transpose(0, 1)
    return patterns(plain).masked_fill((rows.writes[0] == 0)[:, None, None], 0).view(plain.dtype)


def seal_pages(rows: PagedRows, plain: Tensor, numbers: Tensor, seal: Seal) -> None:
    """Undo `plain_pages`, under these write numbers (slots,)."""
    sealing = seal(numbers[None])
    size = rows.keys.shape[3]
    for pages, x, v in ((rows.keys, plain[..., :size], False), (rows.values, plain[..., size:], True)):
        ops.seal(x.transpose(0, 1)[None], sealing, is_value=v, out=pages)
    rows.writes[0].copy_(numbers)
