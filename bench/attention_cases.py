"""Attention of several tokens and of one on a permuted or a sealed cache, and a cache unlocked with a shared key."""

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import scx_kernels as ops
from bench.contest import Case, Contestant, Draw, Inputs, Operation, operation, rival
from bench.row_cases import appended, gathered, rows_from

QUERY_SAMPLE = 256
"""Queries whose attention is held against float64: all of a long prompt's would need its squared scores."""

DECOYS = 100
"""Redundant rows of a cache that is still token-permuted."""

BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cuDNN": SDPBackend.CUDNN_ATTENTION,
    "memory-efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}


# What plain attention is of the inputs.


def by_token(cache: Tensor, position: Tensor) -> Tensor:
    return cache.gather(2, position[:, None, :, None].expand(-1, cache.shape[1], -1, cache.shape[3]))


def in_the_clear(i: Inputs) -> tuple[Tensor, Tensor]:
    """K and V unsealed and in token order."""
    if "opened" in vars(i):
        return i.opened
    return (by_token(i.k, i.position), by_token(i.v, i.position)) if "position" in vars(i) else (i.k, i.v)


def sdpa(i: Inputs) -> Tensor:
    k, v = in_the_clear(i)
    masking = {"attn_mask": i.mask} if "mask" in vars(i) else {"is_causal": i.q.shape[2] > 1}
    return F.scaled_dot_product_attention(i.q, k, v, **masking, enable_gqa=i.q.shape[1] != k.shape[1])


def in_order(i: Inputs, out: Tensor) -> Tensor:
    """The output with V's feature permutation undone."""
    return gathered(out, i.output_index)


def as_rows(i: Inputs, out: Tensor) -> Tensor:
    """The output as rows of the next encoding, (1, T, H*d)."""
    return rows_from(appended(in_order(i, out).transpose(1, 2).flatten(2), i.redundant), i.row_index)


# What of it is compared.


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
    q = sample(i, i.q).double()
    k, v = (x[batches].double().repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in in_the_clear(i))
    scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    if i.q.shape[2] > 1:
        own_key = queries + k.shape[2] - i.q.shape[2]  # the last query's is the last
        scores.masked_fill_(torch.arange(k.shape[2], device=k.device) > own_key[:, None], float("-inf"))
    return gathered(scores.softmax(-1) @ v, i.output_index[batches])


def sampled_rows(i: Inputs, out: Tensor) -> Tensor:
    """Of rows in the next encoding those of sampled queries, then the redundant ones."""
    place = i.row_index.argsort(dim=1)[0]
    return out[:, torch.cat((place[sampled(i)[1]], place[i.q.shape[2] :]))]


def exact_rows(i: Inputs) -> Tensor:
    redundant = None if i.redundant is None else i.redundant.double()
    return appended(exact_attention(i).transpose(1, 2).flatten(2), redundant)


# The operations.


def seal_cache(inputs: Inputs, draw: Draw) -> Inputs:
    """K and V sealed, in a cache that grew in place; `opened` are the same before, for who reads those."""

    def stored(x: Tensor, is_value: bool) -> Tensor:
        batch, heads, filled, size = x.shape
        patterns = x if x.is_meta else ops.seal(x, inputs.sealing, is_value=is_value)
        return x.new_empty(batch, heads, filled + filled // 4, size)[:, :, :filled].copy_(patterns)

    inputs.opened = inputs.k, inputs.v
    inputs.sealing = draw.sealing(inputs.k.shape[2])
    inputs.k, inputs.v = (stored(x, is_value) for x, is_value in zip(inputs.opened, (False, True), strict=True))
    return inputs


def attention(*, encoding: bool = False, sealed: bool = False) -> Operation:
    """Of a whole prompt, or of tokens on a cache that holds earlier ones: a chunk of a prompt, or a later turn.
    `encoding`: into the next one."""
    finish = as_rows if encoding else in_order

    def make(draw: Draw) -> Inputs:
        """Queries lie in memory by tokens, keys and values by heads, as a QKV pass leaves them. On a cache the mask is
        what transformers gives such a pass."""
        case, shape, keys = draw.case, draw.shape, draw.case.cached + draw.case.tokens
        inputs = Inputs(
            q=draw(case.batch, case.tokens, shape.heads, shape.head_dim).transpose(1, 2),
            k=draw.heads(shape.kv_heads, keys),
            v=draw.heads(shape.kv_heads, keys),
            output_index=draw.features(shape.heads),
            softmax_scale=shape.head_dim**-0.5,
        )
        if case.cached:
            own_key = torch.arange(case.cached, keys, device=draw.device)
            seen = torch.arange(keys, device=draw.device) <= own_key[:, None]
            inputs.mask = seen.expand(case.batch, 1, -1, -1).contiguous()
        else:
            inputs.is_causal = True
        if encoding:
            inputs.row_index = draw.order(case.rows)
            inputs.redundant = draw.rows(case.redundant, shape.query_width) if case.redundant else None
        return seal_cache(inputs, draw) if sealed else inputs

    def flops(case: Case) -> int:
        """Two products per query and key that see each other."""
        seen = case.tokens * case.cached + case.tokens * (case.tokens + 1) // 2
        return 4 * case.batch * case.shape.query_width * seen

    return operation(
        "attention",
        make,
        lambda case: against_sdpa(finish, sealed=sealed),
        flops,
        exact=exact_rows if encoding else exact_attention,
        select=sampled_rows if encoding else sample,
        by_triton=True,
        sealed=("k", "v") if sealed else (),
    )


def step(*, position: bool = False, sealed: bool = False) -> Operation:
    """Of one token on its cache, the filled part of buffers with room for a quarter more. `position`: which is still
    token-permuted."""

    def make(draw: Draw) -> Inputs:
        case, shape = draw.case, draw.shape
        filled = case.cached + (DECOYS if position else 0)
        k, v = (draw.heads(shape.kv_heads, filled + filled // 4)[:, :, :filled] for _ in range(2))
        inputs = Inputs(
            q=draw.heads(shape.heads, case.tokens),
            k=k,
            v=v,
            output_index=draw.features(shape.heads),
            softmax_scale=shape.head_dim**-0.5,
        )
        if position:
            inputs.position = draw.position(filled, case.cached)
        return seal_cache(inputs, draw) if sealed else inputs

    return operation(
        "attention_step",
        make,
        lambda case: against_sdpa(in_order, sealed=sealed, backends=not position),
        flops=lambda case: 4 * case.batch * case.shape.query_width * case.tokens * case.cached,
        exact=exact_attention,
        select=sample,
        sealed=("k", "v") if sealed else (),
        copied=("k", "v"),
        copied_name="the cache",
    )


def against_sdpa(
    finish: Callable[[Inputs, Tensor], Tensor], *, sealed: bool, backends: bool = True
) -> Iterator[Contestant]:
    """PyTorch's attention and its backends on plain Q, K, V. What brings a backend's output into SCX's encoding is not
    timed."""
    if sealed:
        yield rival("plain, sdpa", sdpa, finish=finish)
        return
    yield rival("PyTorch, unfused", lambda i: finish(i, sdpa(i)))
    for name, backend in BACKENDS.items() if backends else ():
        yield rival(f"sdpa, {name}", sdpa, within=partial(sdpa_kernel, backend), finish=finish)


def unlock(*, in_place: bool) -> Operation:
    """A layer's keys, or its values, into token order."""

    def make(draw: Draw) -> Inputs:
        case = draw.case
        cache = draw.heads(draw.shape.kv_heads, case.rows)
        return Inputs(cache=cache, position=draw.position(case.rows, case.tokens), in_place=in_place)

    def stored(i: Inputs, taken: Tensor) -> Tensor:
        return i.cache[:, :, : taken.shape[2]].copy_(taken) if in_place else taken

    return operation(
        "unlock",
        make,
        lambda case: [
            rival("PyTorch, gather", lambda i: stored(i, by_token(i.cache, i.position))),
            rival("PyTorch, index_select", lambda i: stored(i, i.cache.index_select(2, i.position[0]))),
        ],
        writes=in_place,
    )


ATTENTION_OPERATIONS = {
    "attention": attention(),
    "attention+encoding": attention(encoding=True),
    "attention_step": step(),
    "attention_step+position": step(position=True),
    "unlock": unlock(in_place=False),
    "unlock+in place": unlock(in_place=True),
    "attention_step+sealed": step(sealed=True),
    "attention+sealed": attention(sealed=True),
}
