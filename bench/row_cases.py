"""Operations on rows: in and out of the encoded order, products, and from projected rows to encoded Q, K, V."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

import scx_kernels as ops
from bench.contest import (
    BOUND,
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
    weights,
)
from scx_kernels import reference

__all__ = ["ROW_OPERATIONS", "make_qkv_and_cache", "qkv_bytes", "qkv_then_stored", "rotated"]

TOKENS_BEFORE = 64
"""Tokens that a cache holds before new ones are written into it."""


# Rows in and out of the encoded order.


def make_inject(
    case: Case, device: torch.device, *, norm: bool = False, noise: bool = False, features: bool = False
) -> Inputs:
    shape = case.shape
    width = shape.query_width if features else shape.hidden
    return Inputs(
        x=randn(case, device, 1, case.tokens, width),
        row_index=permutations(device, 1, case.rows),
        redundant=randn(case, device, 1, case.redundant, width) if case.redundant else None,
        feature_index=permutations(device, 1, shape.heads, shape.head_dim) if features else None,
        norm_weight=randn(case, device, width) if norm else None,
        noise=randn(case, device, 1, case.rows, width, dtype=torch.float32) if noise else None,
    )


def inject_unfused(i: Inputs) -> Tensor:
    x = i.x
    if i.feature_index is not None:
        x = gathered(x.unflatten(-1, i.feature_index.shape[1:]).transpose(1, 2), i.feature_index)
        x = x.transpose(1, 2).flatten(2)
    rows = rows_from(appended(x, i.redundant), i.row_index)
    if i.norm_weight is not None:
        rows = F.rms_norm(rows, rows.shape[-1:], i.norm_weight, 1e-6)
    return rows if i.noise is None else rows.float() + i.noise


def inject_bytes(case: Case, *, norm: bool = False, noise: bool = False, features: bool = False) -> int:
    """(S + R) rows in, T out, an index for each; under noise a float32 row in and the result in float32."""
    width = case.shape.query_width if features else case.shape.hidden
    elements = case.rows * width
    read = elements * case.itemsize + 8 * case.rows + (width * case.itemsize if norm else 0) + (8 * width * features)
    return read + elements * (4 if noise else case.itemsize) + (4 * elements if noise else 0)


def inject_operation(**options: bool) -> Operation:
    def count(case: Case) -> int:
        return inject_bytes(case, **options)

    return Operation(
        make=lambda case, device: make_inject(case, device, **options),
        contestants=lambda case: (
            Contestant("SCX", SCX, lambda i: ops.inject_permute(**vars(i))),
            Contestant("PyTorch, unfused", RIVAL, inject_unfused),
            copy_of(count, case),
        ),
        plain=lambda i: reference.inject_permute(**vars(i)),
        bytes=count,
        flops=lambda case: 4 * case.rows * case.shape.hidden if options.get("norm") else 0,
    )


def make_strip(case: Case, device: torch.device) -> Inputs:
    hidden = case.shape.hidden
    return Inputs(
        z=randn(case, device, 1, case.rows, hidden),
        position=permutations(device, 1, case.rows)[:, : case.tokens].contiguous(),
        residual=randn(case, device, 1, case.tokens, hidden),
    )


def strip_bytes(case: Case) -> int:
    """S rows of z and S of the residual in, S out, an index for each; redundant rows are not touched."""
    return case.tokens * (3 * case.shape.hidden * case.itemsize + 8)


STRIP = Operation(
    make=make_strip,
    contestants=lambda case: (
        Contestant("SCX", SCX, lambda i: ops.strip_restore(i.z, i.position, i.residual)),
        Contestant("PyTorch, unfused", RIVAL, lambda i: rows_from(i.z, i.position) + i.residual),
        copy_of(strip_bytes, case),
    ),
    plain=lambda i: reference.strip_restore(i.z, i.position, i.residual),
    bytes=strip_bytes,
    flops=lambda case: case.tokens * case.shape.hidden,
)


# Products: q, k and v of permuted rows, as one weight and as three.


def qkv_width(case: Case) -> int:
    return case.shape.query_width + 2 * case.shape.kv_width


def weight_bytes(case: Case) -> int:
    """The weights of q, k and v."""
    return case.itemsize * case.shape.hidden * qkv_width(case)


def make_product(case: Case, device: torch.device) -> Inputs:
    hidden = case.shape.hidden
    inputs = Inputs(
        x=randn(case, device, 1, case.tokens, hidden),
        weight=weights(case, device, qkv_width(case), hidden),
        row_index=permutations(device, 1, case.rows),
        redundant=randn(case, device, 1, case.redundant, hidden) if case.redundant else None,
    )
    inputs.encoded = rows_from(appended(inputs.x, inputs.redundant), inputs.row_index)
    return inputs


def product(function: Callable[..., Tensor], i: Inputs) -> Tensor:
    return function(i.x, i.weight, i.row_index, i.redundant)


def product_bytes(case: Case) -> int:
    """(S + R) rows and the weight in, T rows out, an index for each."""
    return case.itemsize * case.rows * (case.shape.hidden + qkv_width(case)) + weight_bytes(case) + 8 * case.rows


def product_flops(case: Case) -> int:
    return 2 * case.rows * case.shape.hidden * qkv_width(case)


def product_contestants(case: Case) -> tuple[Contestant, ...]:
    def scx(i: Inputs) -> Tensor:
        return product(ops.permuted_linear, i)

    def unfused(i: Inputs) -> Tensor:
        return F.linear(rows_from(appended(i.x, i.redundant), i.row_index), i.weight)

    return (
        Contestant("SCX", SCX, scx),
        by_triton(scx),
        Contestant("PyTorch, unfused", RIVAL, unfused),
        Contestant("product alone, rows encoded", RIVAL, lambda i: F.linear(i.encoded, i.weight)),
        copy_of(weight_bytes, case, "the weight"),
    )


PRODUCT = Operation(
    make=make_product,
    contestants=product_contestants,
    plain=lambda i: product(reference.permuted_linear, i),
    bytes=product_bytes,
    flops=product_flops,
    copied=weight_bytes,
)


def make_shared(case: Case, device: torch.device) -> Inputs:
    """Rows as they lie; the three weights are also held as one, as some servers do."""
    shape = case.shape
    together = weights(case, device, qkv_width(case), shape.hidden)
    widths = [shape.query_width, shape.kv_width, shape.kv_width]
    return Inputs(x=randn(case, device, 1, case.rows, shape.hidden), weights=together.split(widths), together=together)


def shared_contestants(case: Case) -> tuple[Contestant, ...]:
    def scx(i: Inputs) -> tuple[Tensor, ...]:
        return ops.permuted_linears(i.x, i.weights)

    def in_one(i: Inputs) -> tuple[Tensor, ...]:
        return F.linear(i.x, i.together).split([len(weight) for weight in i.weights], dim=2)

    return (
        Contestant("SCX", SCX, scx),
        by_triton(scx),
        Contestant("three products", RIVAL, lambda i: tuple(F.linear(i.x, weight) for weight in i.weights)),
        Contestant("one product, weights joined", RIVAL, in_one),
        copy_of(weight_bytes, case, "the weights"),
    )


SHARED = Operation(
    make=make_shared,
    contestants=shared_contestants,
    plain=lambda i: reference.permuted_linears(i.x, i.weights),
    bytes=lambda case: product_bytes(case) - 8 * case.rows,
    flops=product_flops,
    copied=weight_bytes,
)


# Products under noise: the first block's queries.


def make_noisy(case: Case, device: torch.device, *, inside: bool) -> Inputs:
    """Rows that carry noise already, as a model multiplies them; `inside`: plain rows, and the noise to add."""
    shape = case.shape
    inputs = Inputs(
        x=randn(case, device, 1, case.tokens, shape.hidden),
        weight=weights(case, device, shape.query_width, shape.hidden),
        row_index=permutations(device, 1, case.rows),
        redundant=randn(case, device, 1, case.redundant, shape.hidden) if case.redundant else None,
        noise=5 * randn(case, device, 1, case.rows, shape.hidden, dtype=torch.float32),
    )
    # In float64: the image is an input here, exact to its last bit, and not part of what is measured.
    inputs.image = ops.noise_image(inputs.noise.double(), inputs.weight).float()
    if inside:
        return inputs
    encoded = rows_from(appended(inputs.x, inputs.redundant), inputs.row_index)
    return Inputs(x=encoded.float() + inputs.noise, weight=inputs.weight, image=inputs.image, encoded=encoded)


def noisy_product(function: Callable[..., Tensor], i: Inputs, *, inside: bool) -> Tensor:
    if not inside:
        return function(i.x, i.weight, image=i.image)
    return function(i.x, i.weight, i.row_index, i.redundant, noise=i.noise, image=i.image)


def noisy_rows(i: Inputs) -> Tensor:
    """(T, D) in float32."""
    if "noise" not in vars(i):
        return i.x[0]
    return (rows_from(appended(i.x, i.redundant), i.row_index).float() + i.noise)[0]


def in_float32(i: Inputs) -> Tensor:
    return (noisy_rows(i) @ i.weight.float().T - i.image).to(i.weight.dtype)


def in_two_terms(i: Inputs) -> Tensor:
    """The rows as a sum of two in half precision; both products are summed in float32."""
    rows, weight = noisy_rows(i), i.weight
    high = rows.to(weight.dtype)
    low = (rows - high).to(weight.dtype)
    products = (torch.mm(term, weight.T, out_dtype=torch.float32) for term in (high, low))
    return (sum(products) - i.image).to(weight.dtype)


def noisy_bytes(case: Case, *, inside: bool) -> int:
    """Rows (float32 under noise), noise if it is added here, weight and image in, T rows out, indices."""
    shape, inner, outer = case.shape, case.rows * case.shape.hidden, case.rows * case.shape.query_width
    rows = (case.itemsize + 4) * inner + 8 * case.rows if inside else 4 * inner
    return rows + case.itemsize * (shape.hidden * shape.query_width + outer) + 4 * outer


def noisy_flops(case: Case) -> int:
    return 2 * case.rows * case.shape.query_width * case.shape.hidden


def noisy_operation(*, inside: bool) -> Operation:
    def count(case: Case) -> int:
        return noisy_bytes(case, inside=inside)

    def contestants(case: Case) -> tuple[Contestant, ...]:
        found = [
            Contestant("SCX", SCX, lambda i: noisy_product(ops.permuted_linear, i, inside=inside)),
            Contestant("PyTorch, float32", RIVAL, in_float32),
        ]
        if case.torch_dtype != torch.float32:
            found.append(Contestant("PyTorch, two terms", RIVAL, in_two_terms))
        if not inside:
            found.append(Contestant("product alone, no noise", BOUND, lambda i: F.linear(i.encoded, i.weight)))
        return (*found, copy_of(count, case))

    return Operation(
        make=lambda case, device: make_noisy(case, device, inside=inside),
        contestants=contestants,
        plain=lambda i: noisy_product(reference.permuted_linear, i, inside=inside),
        bytes=count,
        flops=noisy_flops,
    )


def image_bytes(case: Case) -> int:
    """Noise in and its image out in float32, and the weight."""
    shape = case.shape
    elements = case.rows * (shape.hidden + shape.query_width)
    return 4 * elements + case.itemsize * shape.hidden * shape.query_width


def make_image(case: Case, device: torch.device) -> Inputs:
    shape = case.shape
    return Inputs(
        noise=5 * randn(case, device, 1, case.rows, shape.hidden, dtype=torch.float32),
        weight=weights(case, device, shape.query_width, shape.hidden),
    )


NOISE_IMAGE = Operation(
    make=make_image,
    contestants=lambda case: (
        Contestant("SCX", SCX, lambda i: ops.noise_image(i.noise, i.weight)),
        Contestant("PyTorch, float32", RIVAL, lambda i: i.noise @ i.weight.float().T),
        copy_of(image_bytes, case),
    ),
    plain=lambda i: reference.noise_image(i.noise, i.weight),
    bytes=image_bytes,
    flops=noisy_flops,
    # Noise enters a product of half precision as two terms, each rounded to it.
    rounding=lambda i: torch.finfo(i.weight.dtype).eps ** 2 / 2,
)


# From projected rows to encoded Q, K, V, and the pieces it is made of.


def tables(case: Case, device: torch.device) -> tuple[Tensor, Tensor]:
    """cos and sin (1, S, d) of rotary positions."""
    half = case.shape.head_dim // 2
    frequency = 10_000.0 ** (-torch.arange(half, device=device) / half)
    angle = (torch.arange(case.tokens, device=device)[:, None] * frequency).repeat(1, 2)[None]
    return angle.cos().to(case.torch_dtype), angle.sin().to(case.torch_dtype)


def make_qkv(case: Case, device: torch.device) -> Inputs:
    shape = case.shape
    lone = case.rows == 1  # a lone generated token has no order to hide
    cos, sin = tables(case, device)
    return Inputs(
        z_q=randn(case, device, 1, case.rows, shape.query_width),
        z_k=randn(case, device, 1, case.rows, shape.kv_width),
        z_v=randn(case, device, 1, case.rows, shape.kv_width),
        position=None if lone else permutations(device, 1, case.rows)[:, : case.tokens].contiguous(),
        cos=cos,
        sin=sin,
        query=permutations(device, 1, shape.heads, shape.head_dim),
        key=permutations(device, 1, shape.kv_heads, shape.head_dim),
        value=permutations(device, 1, shape.kv_heads, shape.head_dim),
    )


def make_qkv_and_cache(case: Case, device: torch.device) -> Inputs:
    """A cache as it grows in place: tokens before these ones, and room behind them."""
    shape, inputs = case.shape, make_qkv(case, device)
    size = (1, shape.kv_heads, TOKENS_BEFORE + case.tokens + case.tokens // 4, shape.head_dim)
    inputs.keys, inputs.values = (randn(case, device, *size) for _ in range(2))
    inputs.offset = TOKENS_BEFORE
    return inputs


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The rotary step as transformers writes it."""
    first, second = x.chunk(2, dim=-1)
    return x * cos[:, None] + torch.cat((-second, first), dim=-1) * sin[:, None]


def qkv_unfused(i: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    def heads(z: Tensor) -> Tensor:
        rows = z if i.position is None else rows_from(z, i.position)
        return rows.unflatten(-1, (-1, i.query.shape[-1])).transpose(1, 2)

    q = gathered(rotated(heads(i.z_q), i.cos, i.sin), i.query)
    k = gathered(rotated(heads(i.z_k), i.cos, i.sin), i.key)
    return q, k, gathered(heads(i.z_v), i.value)


def qkv_then_stored(i: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    """The unfused steps, then K and V copied into the cache."""
    q, k, v = qkv_unfused(i)
    slots = slice(i.offset, i.offset + k.shape[2])
    i.keys[:, :, slots], i.values[:, :, slots] = k, v
    return q, i.keys, i.values


def qkv_bytes(case: Case) -> int:
    """S rows of Q, K and V in and out, cos and sin, a position for each token and a place for each feature."""
    width = qkv_width(case)
    positions = 8 * case.tokens if case.rows > 1 else 0
    return case.itemsize * case.tokens * (2 * width + 2 * case.shape.head_dim) + positions + 8 * width


def qkv_operation(*, into_cache: bool = False) -> Operation:
    unfused = qkv_then_stored if into_cache else qkv_unfused
    return Operation(
        make=make_qkv_and_cache if into_cache else make_qkv,
        contestants=lambda case: (
            Contestant("SCX", SCX, lambda i: ops.qkv_decode_encode(**vars(i))),
            Contestant("PyTorch, unfused", RIVAL, unfused),
            copy_of(qkv_bytes, case),
        ),
        plain=lambda i: reference.qkv_decode_encode(**vars(i)),
        bytes=qkv_bytes,
        flops=lambda case: 3 * case.tokens * (case.shape.query_width + case.shape.kv_width),
        writes=into_cache,
    )


def make_heads(case: Case, device: torch.device) -> Inputs:
    shape = case.shape
    cos, sin = tables(case, device)
    x = randn(case, device, 1, shape.kv_heads, case.tokens, shape.head_dim)
    return Inputs(x=x, cos=cos, sin=sin, feature_index=permutations(device, 1, shape.kv_heads, shape.head_dim))


def heads_bytes(case: Case) -> int:
    """A layer's keys in and out, and a place for each feature."""
    return case.shape.kv_width * (2 * case.tokens * case.itemsize + 8)


def rotary_bytes(case: Case) -> int:
    return heads_bytes(case) + 2 * case.tokens * case.shape.head_dim * case.itemsize


PERMUTE_FEATURES = Operation(
    make=make_heads,
    contestants=lambda case: (
        Contestant("SCX", SCX, lambda i: ops.permute_features(i.x, i.feature_index)),
        Contestant("PyTorch, unfused", RIVAL, lambda i: torch.take_along_dim(i.x, i.feature_index[:, :, None], dim=-1)),
        copy_of(heads_bytes, case),
    ),
    plain=lambda i: reference.permute_features(i.x, i.feature_index),
    bytes=heads_bytes,
    flops=lambda case: 0,
)
ROTARY_PERMUTE = Operation(
    make=make_heads,
    contestants=lambda case: (
        Contestant("SCX", SCX, lambda i: ops.rotary_permute(i.x, i.cos, i.sin, i.feature_index)),
        Contestant("PyTorch, unfused", RIVAL, lambda i: gathered(rotated(i.x, i.cos, i.sin), i.feature_index)),
        copy_of(rotary_bytes, case),
    ),
    plain=lambda i: reference.rotary_permute(i.x, i.cos, i.sin, i.feature_index),
    bytes=rotary_bytes,
    flops=lambda case: 3 * case.tokens * case.shape.kv_width,
)

ROW_OPERATIONS = {
    "inject_permute": inject_operation(),
    "inject_permute+norm": inject_operation(norm=True),
    "inject_permute+norm+noise": inject_operation(norm=True, noise=True),
    "inject_permute+features": inject_operation(features=True),
    "strip_restore": STRIP,
    "permuted_linear": PRODUCT,
    "permuted_linears": SHARED,
    "permuted_linear+noise": noisy_operation(inside=True),
    "permuted_linear+noisy rows": noisy_operation(inside=False),
    "noise_image": NOISE_IMAGE,
    "qkv_decode_encode": qkv_operation(),
    "qkv_decode_encode+cache": qkv_operation(into_cache=True),
    "rotary_permute": ROTARY_PERMUTE,
    "permute_features": PERMUTE_FEATURES,
}
