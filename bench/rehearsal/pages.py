"""What vLLM's backend for sealed pages asks of a GPU: rows written into pages, and attention on them."""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.rehearsal.requests import TOLERANCE, WrongValuesError
from bench.rehearsal.settings import DTYPES
from scx.vllm.pages.format import PageFormat, spare_bytes
from scx.vllm.pages.paged import FEW_QUERIES, attend, paged_rows, plain_pages, position_of, seal_pages, write_rows
from scx.vllm.pages.process import PageKey

__all__ = ["PAGES"]

_TOKENS = 16
_TABLES = [[4, 2, 7], [4, 9, 1], [8, 3, 5]]  # of three sequences; two share their first block
_CUDA = torch.device("cuda")


def _steps(dtype: torch.dtype, head_dim: int, window: int | None) -> None:
    """A prompt each, a batch that goes on by single tokens, drafts of a few, and a page that moves."""
    heads = 2
    form = PageFormat(heads, _TOKENS, head_dim, dtype, spare_bytes(heads, head_dim, dtype, 16 * dtype.itemsize))
    key = PageKey()
    seal = partial(key.sealing, layer=3, first_head=8)
    rows = paged_rows(torch.zeros(10, form.page_bytes, dtype=torch.int8, device=_CUDA), form)
    key.prepare(rows.writes.device)
    held = torch.zeros(2, 10 * _TOKENS, heads, head_dim, dtype=dtype)
    table = torch.tensor(_TABLES, dtype=torch.int32)
    slots = position_of(table, _TOKENS, 3 * _TOKENS)
    lengths = [0, 0, 0]
    for counts in ([24, 40, 20], [1, 1, 1], [1, 3, 1], [FEW_QUERIES + 1, 1, 1]):
        new = [slots[i, n : n + count] for i, (n, count) in enumerate(zip(lengths, counts, strict=True))]
        lengths = [n + count for n, count in zip(lengths, counts, strict=True)]
        where = torch.cat([*new, torch.tensor([-1])])
        x = torch.randn(2, len(where), heads, head_dim).to(dtype)
        held[:, where[:-1]] = x[:, :-1]
        given = x.to(_CUDA)
        write_rows(rows, given[0], given[1], where.to(_CUDA), key.counter(rows.writes.device), seal)
        queries = torch.randn(sum(counts), 2 * heads, head_dim).to(dtype)
        out = torch.zeros_like(queries).to(_CUDA)
        position = position_of(table.to(_CUDA), _TOKENS, max(lengths))
        attend(
            queries.to(_CUDA), rows, position, torch.tensor(lengths, dtype=torch.int32).to(_CUDA), counts, lengths,
            seal, out, softmax_scale=head_dim**-0.5, window=window,
        )  # fmt: skip
        _compare(out.cpu(), _plain(queries, held, slots, counts, lengths, window))
    page = paged_rows(torch.zeros(2, form.page_bytes, dtype=torch.int8, device=_CUDA), form)
    seal_pages(page, held[0].repeat(1, 1, 2)[: 2 * _TOKENS].to(_CUDA), key.pages.take(2 * _TOKENS).to(_CUDA), seal)
    _compare(plain_pages(page, seal).cpu(), held[0].repeat(1, 1, 2)[: 2 * _TOKENS])


def _plain(
    queries: Tensor, held: Tensor, slots: Tensor, counts: list[int], lengths: list[int], window: int | None
) -> Tensor:
    results = []
    for q, own, count, length in zip(queries.split(counts), slots, counts, lengths, strict=True):
        k, v = (x[own[:length]].transpose(0, 1).repeat_interleave(2, 0) for x in held)
        key, last = torch.arange(length), torch.arange(length - count, length)[:, None]
        mask = (key <= last) & (key > last - (window or length))
        results.append(F.scaled_dot_product_attention(q.transpose(0, 1), k, v, attn_mask=mask).transpose(0, 1))
    return torch.cat(results)


def _compare(got: Tensor, expected: Tensor) -> None:
    difference = (got.float() - expected.float()).abs().max() / expected.float().abs().max()
    if not difference <= TOLERANCE[expected.dtype]:
        raise WrongValuesError(f"attention on sealed pages differs by {difference:.1e} of the largest value")


_REQUESTS = [
    *(("fp32", 64, None), ("fp16", 64, None), ("bf16", 64, None), ("fp32", 80, 9)),
    *(("bf16", 128, None), ("fp16", 128, 9), ("bf16", 256, None)),
]
PAGES: dict[str, Callable[[], None]] = {
    f"sealed pages, head {size}, {name}, window {window}": partial(_steps, DTYPES[name], size, window)
    for name, size, window in _REQUESTS
}
"""By the name of the request."""
