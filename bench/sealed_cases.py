"""Operations on a sealed cache beside the same on a permuted one, and beside what a plain model runs."""

from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import scx_kernels as ops
from bench.attention_cases import (
    cache_bytes,
    exact_attention,
    in_order,
    make_step,
    sample,
    sdpa,
    step_bytes,
    step_flops,
)
from bench.contest import (
    BOUND,
    RIVAL,
    SCX,
    TRITON,
    Case,
    Contestant,
    Inputs,
    Operation,
    copy_of,
    permutations,
    randn,
    wide,
)
from bench.row_cases import make_qkv_and_cache, qkv_bytes, qkv_then_stored, rotated
from scx_kernels import reference
from scx_kernels import sealing as cipher

__all__ = ["SEALED_OPERATIONS", "key_of"]

LAYER = 3
KEY_BYTES = 32


def key_of(device: torch.device) -> Tensor:
    return torch.randint(-(2**31), 2**31, (8,), device=device).int()


def sealing_of(i: Inputs) -> ops.Sealing:
    return ops.Sealing(i.cipher_key, i.writes, LAYER, i.rounds)


def sealed(x: Tensor, own: ops.Sealing, *, is_value: bool) -> Tensor:
    """x as a cache that grew in place stores it; of a tensor without memory, the shape."""
    batch, heads, filled, size = x.shape
    with ops.backend("auto" if x.device.type == "cpu" else "triton"):
        patterns = ops.seal(x, own, is_value=is_value)
    return x.new_empty(batch, heads, filled + filled // 4, size)[:, :, :filled].copy_(patterns)


def seal_cache(inputs: Inputs, case: Case, device: torch.device) -> Inputs:
    """K and V sealed, under numbers in a row; `opened` are the same before, permuted only, for who reads those."""
    inputs.opened = inputs.k, inputs.v
    inputs.cipher_key, inputs.rounds = key_of(device), case.rounds
    inputs.writes = ops.WriteCounter().take(case.batch, inputs.k.shape[2], device)
    inputs.k, inputs.v = (sealed(x, sealing_of(inputs), is_value=i == 1) for i, x in enumerate(inputs.opened))
    return inputs


def opened(i: Inputs) -> Inputs:
    """The inputs with K and V permuted only."""
    k, v = i.opened
    return Inputs(**{**vars(i), "k": k, "v": v})


def numbers_bytes(case: Case, rows: int) -> int:
    """A write number for each row, and the key."""
    return 8 * case.batch * rows + KEY_BYTES


# One token on its cache.


def step(function: Callable[..., Tensor], i: Inputs, sealing: ops.Sealing | None) -> Tensor:
    scale = i.q.shape[-1] ** -0.5
    return function(i.q, i.k, i.v, softmax_scale=scale, output_index=i.output_index, sealing=sealing)


STEP = Operation(
    make=lambda case, device: seal_cache(make_step(case, device), case, device),
    contestants=lambda case: (
        Contestant("SCX", SCX, lambda i: step(ops.attention_step, i, sealing_of(i))),
        Contestant("permuted cache", RIVAL, lambda i: step(ops.attention_step, opened(i), None)),
        Contestant("plain, sdpa", RIVAL, lambda i: sdpa(i, *i.opened), finish=in_order),
        copy_of(cache_bytes, case, "the cache"),
    ),
    plain=lambda i: step(reference.attention_step, opened(i), None),
    bytes=lambda case: step_bytes(case) + numbers_bytes(case, case.cached),
    flops=step_flops,
    copied=cache_bytes,
    keystream=cache_bytes,
    exact=lambda i: exact_attention(opened(i)),
    select=sample,
)


# Several tokens on a cache that holds earlier ones: a chunk of a prompt, or a later turn.


def all_keys(case: Case) -> int:
    return case.cached + case.tokens


def make_chunk(case: Case, device: torch.device) -> Inputs:
    """The tokens' own K and V lie in the cache already; the mask is what transformers gives such a pass."""
    shape, batch, keys = case.shape, case.batch, all_keys(case)
    own_key = torch.arange(case.cached, keys, device=device)
    inputs = Inputs(
        q=randn(case, device, batch, case.tokens, shape.heads, shape.head_dim).transpose(1, 2),
        k=randn(case, device, batch, shape.kv_heads, keys, shape.head_dim),
        v=randn(case, device, batch, shape.kv_heads, keys, shape.head_dim),
        mask=(torch.arange(keys, device=device) <= own_key[:, None]).expand(batch, 1, -1, -1).contiguous(),
        output_index=permutations(device, batch, shape.heads, shape.head_dim),
    )
    return seal_cache(inputs, case, device)


def attend(function: Callable[..., Tensor], i: Inputs, sealing: ops.Sealing | None) -> Tensor:
    options = {"softmax_scale": i.q.shape[-1] ** -0.5, "mask": i.mask, "output_index": i.output_index}
    return function(i.q, i.k, i.v, **options, sealing=sealing)


def masked_sdpa(i: Inputs) -> Tensor:
    k, v = i.opened
    return F.scaled_dot_product_attention(i.q, k, v, attn_mask=i.mask, enable_gqa=i.q.shape[1] != k.shape[1])


def chunk_bytes(case: Case) -> int:
    """Q in and the output out, K and V in, the mask, a place for each feature of the output."""
    shape, keys = case.shape, all_keys(case)
    elements = 2 * (case.tokens * shape.query_width + keys * shape.kv_width)
    per_sequence = case.itemsize * elements + case.tokens * keys + 8 * shape.query_width
    return case.batch * per_sequence + numbers_bytes(case, keys)


def chunk_flops(case: Case) -> int:
    """Two products per query and key that see each other."""
    seen = case.tokens * case.cached + case.tokens * (case.tokens + 1) // 2
    return 4 * case.batch * case.shape.query_width * seen


def chunk_contestants(case: Case) -> tuple[Contestant, ...]:
    def permuted(i: Inputs) -> Tensor:
        return attend(ops.attention, opened(i), None)

    return (
        Contestant("SCX", SCX, lambda i: attend(ops.attention, i, sealing_of(i))),
        Contestant("permuted cache", RIVAL, permuted),
        Contestant("permuted cache, Triton", TRITON, permuted, within=lambda: ops.backend("triton")),
        Contestant("plain, sdpa", RIVAL, masked_sdpa, finish=in_order),
        copy_of(chunk_bytes, case),
    )


CHUNK = Operation(
    make=make_chunk,
    contestants=chunk_contestants,
    plain=lambda i: attend(reference.attention, opened(i), None),
    bytes=chunk_bytes,
    flops=chunk_flops,
    keystream=lambda case: 2 * case.batch * all_keys(case) * case.shape.kv_width * case.itemsize,
    exact=lambda i: exact_attention(opened(i)),
    select=sample,
)


# From projected rows into a sealed cache.


def make_sealed_qkv(case: Case, device: torch.device, *, opens: bool) -> Inputs:
    """A cache with tokens before these ones, or the room alone; the numbers are those of all its slots."""
    inputs = make_qkv_and_cache(case, device)
    inputs.offset = 0 if opens else inputs.offset
    inputs.cipher_key, inputs.rounds = key_of(device), case.rounds
    inputs.writes = ops.WriteCounter().take(1, inputs.keys.shape[2], device)
    return inputs


def plain_arguments(i: Inputs) -> dict[str, Any]:
    return {name: x for name, x in vars(i).items() if name not in ("cipher_key", "rounds", "writes")}


def slots(i: Inputs) -> slice:
    return slice(i.offset, i.offset + i.cos.shape[1])


def with_new(i: Inputs, stored: tuple[Tensor, Tensor, Tensor], opens: bool) -> tuple[Tensor, ...]:
    """What a pass returns of (q, keys, values) where the cache holds k and v as they are."""
    q, *caches = stored
    return (q, *(cache[:, :, slots(i)] for cache in caches), *caches) if opens else stored


def into_sealed(module: ModuleType, i: Inputs, opens: bool) -> tuple[Tensor, ...]:
    """q, k and v where the pass opens the cache, and both caches."""
    results = module.qkv_decode_encode(**plain_arguments(i), sealing=sealing_of(i), return_unsealed=opens)
    return (*results, i.keys, i.values) if opens else results


def into_permuted(module: ModuleType, i: Inputs, opens: bool) -> tuple[Tensor, ...]:
    return with_new(i, module.qkv_decode_encode(**plain_arguments(i)), opens)


def unsealed_slots(i: Inputs, results: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The caches' new rows with their keystream taken off, by the cipher in PyTorch."""
    *others, keys, values = results
    new = slots(i)
    own = sealing_of(i)._replace(writes=i.writes[:, new])
    for is_value, cache in enumerate((keys, values)):
        cache[:, :, new] = cipher.unseal(cache[:, :, new], own, is_value=bool(is_value))
    return (*others, keys, values)


def nothing_encoded(i: Inputs) -> tuple[Tensor, ...]:
    """A plain model's rotary step and its write into the cache: rows and features in order."""
    tokens, new = i.cos.shape[1], slots(i)
    q, k, v = (z[:, :tokens].unflatten(-1, (-1, i.query.shape[-1])).transpose(1, 2) for z in (i.z_q, i.z_k, i.z_v))
    i.keys[:, :, new], i.values[:, :, new] = rotated(k, i.cos, i.sin), v
    return rotated(q, i.cos, i.sin), i.keys, i.values


def kv_bytes(case: Case) -> int:
    """K and V of the tokens."""
    return 2 * case.tokens * case.shape.kv_width * case.itemsize


def sealed_qkv(*, opens: bool) -> Operation:
    def count(case: Case) -> int:
        return qkv_bytes(case) + numbers_bytes(case, case.tokens) + (kv_bytes(case) if opens else 0)

    return Operation(
        make=lambda case, device: make_sealed_qkv(case, device, opens=opens),
        contestants=lambda case: (
            Contestant("SCX", SCX, lambda i: into_sealed(ops, i, opens), finish=unsealed_slots),
            Contestant("permuted cache", RIVAL, lambda i: into_permuted(ops, i, opens)),
            Contestant("PyTorch, unfused, permuted", RIVAL, lambda i: with_new(i, qkv_then_stored(i), opens)),
            Contestant("plain, nothing encoded", BOUND, nothing_encoded),
            copy_of(count, case),
        ),
        plain=lambda i: into_permuted(reference, i, opens),
        bytes=count,
        flops=lambda case: 3 * case.tokens * (case.shape.query_width + case.shape.kv_width),
        keystream=kv_bytes,
        exact=lambda i: into_permuted(reference, wide(i), opens),
        writes=True,
    )


SEALED_OPERATIONS = {
    "attention_step+sealed": STEP,
    "attention+sealed": CHUNK,
    "qkv_decode_encode+sealed": sealed_qkv(opens=False),
    "qkv_decode_encode+sealed+opening": sealed_qkv(opens=True),
}
