"""Attention of a whole prompt and of a few tokens on their cache, and a cache unlocked with a shared key."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import scx_kernels as ops
from bench.contest import (
    RIVAL,
    SCX,
    Case,
    Contestant,
    Inputs,
    Operation,
    appended,
    by_triton,
    copy_of,
    gathered,
    permutations,
    randn,
    rows_from,
)
from scx_kernels import reference

__all__ = [
    "ATTENTION_OPERATIONS",
    "cache_bytes",
    "exact_attention",
    "in_order",
    "make_step",
    "sample",
    "sdpa",
    "step_bytes",
    "step_flops",
]

QUERY_SAMPLE = 256
"""Queries whose attention is held against float64: all of a long prompt's would need its squared scores."""

DECOYS = 100
"""Redundant rows of a cache that is still token-permuted."""


def sdpa(i: Inputs, k: Tensor, v: Tensor) -> Tensor:
    grouped = i.q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(i.q, k, v, is_causal=i.q.shape[2] > 1, enable_gqa=grouped)


def sdpa_backends(finish: Callable[[Inputs, Tensor], Tensor]) -> tuple[Contestant, ...]:
    """PyTorch's backends on plain Q, K, V. `finish` brings their outputs into SCX's encoding, and is not timed."""
    backends = {
        "flash": SDPBackend.FLASH_ATTENTION,
        "cuDNN": SDPBackend.CUDNN_ATTENTION,
        "memory-efficient": SDPBackend.EFFICIENT_ATTENTION,
        "math": SDPBackend.MATH,
    }

    def contestant(name: str, backend: SDPBackend) -> Contestant:
        def within() -> Any:
            return sdpa_kernel(backend)

        return Contestant(f"sdpa, {name}", RIVAL, lambda i: sdpa(i, i.k, i.v), within=within, finish=finish)

    return tuple(contestant(*backend) for backend in backends.items())


def in_order(i: Inputs, out: Tensor) -> Tensor:
    """The output with V's feature permutation undone."""
    return gathered(out, i.output_index)


def as_rows(i: Inputs, out: Tensor) -> Tensor:
    """The output as rows of the next encoding, (1, T, H*d)."""
    return rows_from(appended(in_order(i, out).transpose(1, 2).flatten(2), i.redundant), i.row_index)


def sampled(i: Inputs) -> tuple[list[int], Tensor]:
    """First and last sequence, and up to QUERY_SAMPLE queries."""
    queries = torch.linspace(0, i.q.shape[2] - 1, min(i.q.shape[2], QUERY_SAMPLE), device=i.q.device).long()
    return sorted({0, len(i.q) - 1}), queries


def sample(i: Inputs, out: Tensor) -> Tensor:
    batches, queries = sampled(i)
    return out[batches][:, :, queries]


def exact_attention(i: Inputs) -> Tensor:
    """Sampled queries in float64, by the formula."""
    batches, queries = sampled(i)
    groups = i.q.shape[1] // i.k.shape[1]
    q = sample(i, i.q).double()
    k, v = (x[batches] if "position" not in vars(i) else by_token(x, i.position)[batches] for x in (i.k, i.v))
    k, v = (x.double().repeat_interleave(groups, dim=1) for x in (k, v))
    scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    if i.q.shape[2] > 1:
        own_key = queries + k.shape[2] - i.q.shape[2]  # the last query's is the last
        scores.masked_fill_(torch.arange(k.shape[2], device=k.device) > own_key[:, None], float("-inf"))
    return gathered(scores.softmax(-1) @ v, i.output_index[batches])


# A whole prompt.


def make_attention(case: Case, device: torch.device) -> Inputs:
    """Queries lie in memory by tokens, keys and values by heads, as a QKV pass leaves them."""
    shape, batch = case.shape, case.batch
    return Inputs(
        q=randn(case, device, batch, case.tokens, shape.heads, shape.head_dim).transpose(1, 2),
        k=randn(case, device, batch, shape.kv_heads, case.tokens, shape.head_dim),
        v=randn(case, device, batch, shape.kv_heads, case.tokens, shape.head_dim),
        output_index=permutations(device, batch, shape.heads, shape.head_dim),
    )


def make_encoding(case: Case, device: torch.device) -> Inputs:
    """Attention's inputs and the next encoding."""
    inputs, width = make_attention(case, device), case.shape.query_width
    inputs.row_index = permutations(device, 1, case.rows)
    inputs.redundant = randn(case, device, 1, case.redundant, width) if case.redundant else None
    return inputs


def attend(function: Callable[..., Tensor], i: Inputs) -> Tensor:
    given = {name: x for name, x in vars(i).items() if name not in ("q", "k", "v")}
    return function(i.q, i.k, i.v, softmax_scale=i.q.shape[-1] ** -0.5, is_causal=True, **given)


def sampled_rows(i: Inputs, out: Tensor) -> Tensor:
    """Of rows in the next encoding those of sampled queries, then the redundant ones."""
    place = i.row_index.argsort(dim=1)[0]
    return out[:, torch.cat((place[sampled(i)[1]], place[i.q.shape[2] :]))]


def exact_rows(i: Inputs) -> Tensor:
    redundant = None if i.redundant is None else i.redundant.double()
    return appended(exact_attention(i).transpose(1, 2).flatten(2), redundant)


def prompt_bytes(case: Case) -> int:
    """Q in and the output out, K and V in, a place for each feature of the output."""
    shape = case.shape
    elements = 2 * case.tokens * (shape.query_width + shape.kv_width)
    return case.batch * (case.itemsize * elements + 8 * shape.query_width)


def encoding_bytes(case: Case) -> int:
    """And redundant rows in and out, and an index for each row."""
    return prompt_bytes(case) + 2 * case.redundant * case.shape.query_width * case.itemsize + 8 * case.rows


def prompt_flops(case: Case) -> int:
    """Two products per query and key that see each other: half of the square, and its diagonal."""
    return 4 * case.batch * case.shape.query_width * (case.tokens * (case.tokens + 1) // 2)


def prompt_operation(*, next_encoding: bool = False) -> Operation:
    finish = as_rows if next_encoding else in_order
    count = encoding_bytes if next_encoding else prompt_bytes

    def contestants(case: Case) -> tuple[Contestant, ...]:
        def scx(i: Inputs) -> Tensor:
            return attend(ops.attention, i)

        return (
            Contestant("SCX", SCX, scx),
            by_triton(scx),
            Contestant("PyTorch, unfused", RIVAL, lambda i: finish(i, sdpa(i, i.k, i.v))),
            *sdpa_backends(finish),
            copy_of(count, case),
        )

    return Operation(
        make=make_encoding if next_encoding else make_attention,
        contestants=contestants,
        plain=lambda i: attend(reference.attention, i),
        bytes=count,
        flops=prompt_flops,
        exact=exact_rows if next_encoding else exact_attention,
        select=sampled_rows if next_encoding else sample,
    )


# One token on its cache.


def make_step(case: Case, device: torch.device, *, permuted: bool = False) -> Inputs:
    """A cache as it grows in place: the filled part of buffers with room for a quarter more."""
    shape, batch = case.shape, case.batch
    filled = case.cached + (DECOYS if permuted else 0)
    size = (batch, shape.kv_heads, filled + filled // 4, shape.head_dim)
    k, v = (randn(case, device, *size)[:, :, :filled] for _ in range(2))
    inputs = Inputs(
        q=randn(case, device, batch, shape.heads, case.tokens, shape.head_dim),
        k=k,
        v=v,
        output_index=permutations(device, batch, shape.heads, shape.head_dim),
    )
    if permuted:
        inputs.position = permutations(device, batch, filled)[:, : case.cached].contiguous()
    return inputs


def step(function: Callable[..., Tensor], i: Inputs) -> Tensor:
    return function(**vars(i), softmax_scale=i.q.shape[-1] ** -0.5)


def by_token(cache: Tensor, position: Tensor) -> Tensor:
    return cache.gather(2, position[:, None, :, None].expand(-1, cache.shape[1], -1, cache.shape[3]))


def cache_bytes(case: Case) -> int:
    """K and V of the tokens."""
    return 2 * case.batch * case.cached * case.shape.kv_width * case.itemsize


def step_bytes(case: Case) -> int:
    """The cache, a query in and its output out, a place for each feature of the output."""
    return cache_bytes(case) + case.batch * case.shape.query_width * (2 * case.tokens * case.itemsize + 8)


def step_flops(case: Case) -> int:
    """Two products per query and key."""
    return 4 * case.batch * case.shape.query_width * case.tokens * case.cached


def step_contestants(case: Case) -> tuple[Contestant, ...]:
    return (
        Contestant("SCX", SCX, lambda i: step(ops.attention_step, i)),
        Contestant("PyTorch, unfused", RIVAL, lambda i: in_order(i, sdpa(i, i.k, i.v))),
        *sdpa_backends(in_order),
        copy_of(cache_bytes, case, "the cache"),
    )


def permuted_step_contestants(case: Case) -> tuple[Contestant, ...]:
    def unfused(i: Inputs) -> Tensor:
        return in_order(i, sdpa(i, by_token(i.k, i.position), by_token(i.v, i.position)))

    return (
        Contestant("SCX", SCX, lambda i: step(ops.attention_step, i)),
        Contestant("PyTorch, unfused", RIVAL, unfused),
        copy_of(cache_bytes, case, "the cache"),
    )


STEP = Operation(
    make=make_step,
    contestants=step_contestants,
    plain=lambda i: step(reference.attention_step, i),
    bytes=step_bytes,
    flops=step_flops,
    copied=cache_bytes,
    exact=exact_attention,
    select=sample,
)
PERMUTED_STEP = Operation(
    make=lambda case, device: make_step(case, device, permuted=True),
    contestants=permuted_step_contestants,
    plain=lambda i: step(reference.attention_step, i),
    bytes=lambda case: step_bytes(case) + 8 * case.batch * case.cached,
    flops=step_flops,
    copied=cache_bytes,
    exact=exact_attention,
    select=sample,
)


# A layer's keys, or its values, into token order.


def make_locked(case: Case, device: torch.device) -> Inputs:
    shape = case.shape
    return Inputs(
        cache=randn(case, device, 1, shape.kv_heads, case.rows, shape.head_dim),
        position=permutations(device, 1, case.rows)[:, : case.tokens].contiguous(),
    )


def unlock_bytes(case: Case) -> int:
    """S rows of every head in and out, and a place for each token."""
    return case.tokens * (2 * case.shape.kv_width * case.itemsize + 8)


def unlock_operation(*, in_place: bool) -> Operation:
    def stored(i: Inputs, taken: Tensor) -> Tensor:
        return i.cache[:, :, : taken.shape[2]].copy_(taken) if in_place else taken

    def by_gather(i: Inputs) -> Tensor:
        return stored(i, by_token(i.cache, i.position))

    def by_index_select(i: Inputs) -> Tensor:
        return stored(i, i.cache.index_select(2, i.position[0]))

    return Operation(
        make=make_locked,
        contestants=lambda case: (
            Contestant("SCX", SCX, lambda i: ops.unlock(i.cache, i.position, in_place=in_place)),
            Contestant("PyTorch, gather", RIVAL, by_gather),
            Contestant("PyTorch, index_select", RIVAL, by_index_select),
            copy_of(unlock_bytes, case),
        ),
        plain=lambda i: reference.unlock(i.cache, i.position, in_place=in_place),
        bytes=unlock_bytes,
        flops=lambda case: 0,
        writes=in_place,
    )


ATTENTION_OPERATIONS = {
    "attention": prompt_operation(),
    "attention+encoding": prompt_operation(next_encoding=True),
    "attention_step": STEP,
    "attention_step+position": PERMUTED_STEP,
    "unlock": unlock_operation(in_place=False),
    "unlock+in place": unlock_operation(in_place=True),
}
