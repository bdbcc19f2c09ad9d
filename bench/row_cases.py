"""Operations on rows: in and out of the encoded order, products, and from projected rows to encoded Q, K, V."""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

import scx_kernels as ops
from bench.contest import Case, Contestant, Draw, Inputs, Operation, bound, operation, rival
from scx_kernels import sealing as cipher

TOKENS_BEFORE = 64
"""Tokens that a cache holds before new ones are written into it."""


# What users without SCX's operations write.


def rows_from(x: Tensor, index: Tensor) -> Tensor:
    """Rows of (1, N, D)."""
    return x[0].index_select(0, index[0])[None]


def appended(x: Tensor, redundant: Tensor | None) -> Tensor:
    return x if redundant is None else torch.cat((x, redundant), dim=1)


def encoded(i: Inputs) -> Tensor:
    """(1, T, D)."""
    return rows_from(appended(i.x, i.redundant), i.row_index)


def gathered(x: Tensor, feature_index: Tensor) -> Tensor:
    """Features of (B, H, S, d)."""
    return x.gather(-1, feature_index[:, :, None].expand(x.shape))


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The rotary step as transformers writes it."""
    first, second = x.chunk(2, dim=-1)
    return x * cos[:, None] + torch.cat((-second, first), dim=-1) * sin[:, None]


# Rows in and out of the encoded order.


def noise_of(draw: Draw, width: int) -> dict[str, Tensor | float]:
    """Noise of the rows' size, on the grid of 2^-25 of it."""
    drawn = draw.rows(draw.case.rows, width, dtype=torch.float32)
    return {"noise": drawn.mul_(2.0**25).int(), "noise_step": 2.0**-25}


def inject(*, norm: bool = False, noise: bool = False, features: bool = False) -> Operation:
    def make(draw: Draw) -> Inputs:
        width = draw.shape.query_width if features else draw.shape.hidden
        return Inputs(
            **draw.to_encode(width),
            feature_index=draw.features(draw.shape.heads) if features else None,
            norm_weight=draw(width) if norm else None,
            **(noise_of(draw, width) if noise else {}),
        )

    def unfused(i: Inputs) -> Tensor:
        x = i.x
        if features:
            x = gathered(x.unflatten(-1, i.feature_index.shape[1:]).transpose(1, 2), i.feature_index)
            x = x.transpose(1, 2).flatten(2)
        rows = rows_from(appended(x, i.redundant), i.row_index)
        if norm:
            rows = F.rms_norm(rows, rows.shape[-1:], i.norm_weight, 1e-6)
        return rows.double().div(i.noise_step).round_().add_(i.noise).mul_(i.noise_step).float() if noise else rows

    return operation(
        "inject_permute",
        make,
        lambda case: [rival("PyTorch, unfused", unfused)],
        flops=lambda case: 4 * case.rows * case.shape.hidden if norm else 0,
    )


def make_strip(draw: Draw) -> Inputs:
    case, hidden = draw.case, draw.shape.hidden
    return Inputs(
        z=draw.rows(case.rows, hidden),
        position=draw.position(case.rows, case.tokens),
        residual=draw.rows(case.tokens, hidden),
    )


STRIP = operation(
    "strip_restore",
    make_strip,
    lambda case: [rival("PyTorch, unfused", lambda i: rows_from(i.z, i.position) + i.residual)],
    flops=lambda case: case.tokens * case.shape.hidden,
)


# Products: q, k and v of permuted rows, as one weight and as three.


def product_flops(case: Case) -> int:
    return 2 * case.rows * case.shape.hidden * case.shape.qkv_width


def make_product(draw: Draw) -> Inputs:
    shape = draw.shape
    inputs = Inputs(**draw.to_encode(shape.hidden), weight=draw.weight(shape.qkv_width, shape.hidden))
    inputs.encoded = encoded(inputs)
    return inputs


PRODUCT = operation(
    "permuted_linear",
    make_product,
    lambda case: [
        rival("PyTorch, unfused", lambda i: F.linear(encoded(i), i.weight)),
        rival("product alone, rows encoded", lambda i: F.linear(i.encoded, i.weight)),
    ],
    product_flops,
    by_triton=True,
    copied=("weight",),
    copied_name="the weight",
)


def make_shared(draw: Draw) -> Inputs:
    """Rows as they lie; the three weights are also held as one, as some servers do."""
    shape, together = draw.shape, draw.weight(draw.shape.qkv_width, draw.shape.hidden)
    x = draw.rows(draw.case.rows, shape.hidden)
    return Inputs(x=x, weights=together.split(shape.qkv_widths), together=together)


def in_one_product(i: Inputs) -> tuple[Tensor, ...]:
    return F.linear(i.x, i.together).split([len(weight) for weight in i.weights], dim=2)


SHARED = operation(
    "permuted_linears",
    make_shared,
    lambda case: [
        rival("three products", lambda i: tuple(F.linear(i.x, weight) for weight in i.weights)),
        rival("one product, weights joined", in_one_product),
    ],
    product_flops,
    by_triton=True,
    copied=("weights",),
    copied_name="the weights",
)


# Products under noise: the first block's queries.


def noisy_flops(case: Case) -> int:
    return 2 * case.rows * case.shape.query_width * case.shape.hidden


def make_image(draw: Draw) -> Inputs:
    """Noise and the weight that it meets."""
    noise = 5 * draw.rows(draw.case.rows, draw.shape.hidden, dtype=torch.float32)
    return Inputs(noise=noise, weight=draw.weight(draw.shape.query_width, draw.shape.hidden))


NOISE_IMAGE = operation(
    "noise_image",
    make_image,
    lambda case: [rival("PyTorch, float32", lambda i: i.noise @ i.weight.float().T)],
    noisy_flops,
    # Noise enters a product of half precision as two terms, each rounded to it.
    rounding=lambda i: torch.finfo(i.weight.dtype).eps ** 2 / 2,
)


def noisy(*, inside: bool) -> Operation:
    """On rows that carry noise already, as a model multiplies them; `inside`: on plain rows, and the noise to add."""

    def make(draw: Draw) -> Inputs:
        inputs = Inputs(**draw.to_encode(draw.shape.hidden), **vars(make_image(draw)))
        # In float64: the image is an input here, exact to its last bit, and not part of what is measured.
        inputs.image = ops.noise_image(inputs.noise.double(), inputs.weight).float()
        if inside:
            return inputs
        plain = encoded(inputs)
        return Inputs(x=plain.float() + inputs.noise, weight=inputs.weight, image=inputs.image, encoded=plain)

    def rows(i: Inputs) -> Tensor:
        """(T, D) in float32."""
        return (encoded(i).float() + i.noise)[0] if inside else i.x[0]

    def in_float32(i: Inputs) -> Tensor:
        return (rows(i) @ i.weight.float().T - i.image).to(i.weight.dtype)

    def in_two_terms(i: Inputs) -> Tensor:
        """The rows as a sum of two in half precision; both products are summed in float32."""
        whole, weight = rows(i), i.weight
        high = whole.to(weight.dtype)
        low = (whole - high).to(weight.dtype)
        products = (torch.mm(term, weight.T, out_dtype=torch.float32) for term in (high, low))
        return (sum(products) - i.image).to(weight.dtype)

    def rivals(case: Case) -> Iterator[Contestant]:
        yield rival("PyTorch, float32", in_float32)
        if case.torch_dtype != torch.float32:
            yield rival("PyTorch, two terms", in_two_terms)
        if not inside:
            yield bound("product alone, no noise", lambda i: F.linear(i.encoded, i.weight))

    return operation("permuted_linear", make, rivals, noisy_flops)


# From projected rows to encoded Q, K, V, into a permuted or a sealed cache, and the pieces it is made of.


def tables(draw: Draw) -> dict[str, Tensor]:
    """cos and sin (1, S, d) of rotary positions."""
    half = draw.shape.head_dim // 2
    frequency = 10_000.0 ** (-torch.arange(half, device=draw.device) / half)
    angle = (torch.arange(draw.case.tokens, device=draw.device)[:, None] * frequency).repeat(1, 2)[None]
    return {"cos": angle.cos().to(draw.case.torch_dtype), "sin": angle.sin().to(draw.case.torch_dtype)}


def slots(i: Inputs) -> slice:
    """Of a cache, those of the new tokens."""
    return slice(i.offset, i.offset + i.cos.shape[1])


def into_heads(i: Inputs, z: Tensor) -> Tensor:
    return z.unflatten(-1, (-1, i.query.shape[-1])).transpose(1, 2)


def in_token_order(i: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    """The unfused steps."""
    rows = (z if i.position is None else rows_from(z, i.position) for z in (i.z_q, i.z_k, i.z_v))
    q, k, v = (into_heads(i, z) for z in rows)
    q, k = (gathered(rotated(x, i.cos, i.sin), index) for x, index in ((q, i.query), (k, i.key)))
    return q, k, gathered(v, i.value)


def then_stored(i: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    """The unfused steps, then K and V copied into the cache."""
    q, *kv = in_token_order(i)
    i.keys[:, :, slots(i)], i.values[:, :, slots(i)] = kv
    return q, i.keys, i.values


def nothing_encoded(i: Inputs) -> tuple[Tensor, ...]:
    """A plain model's rotary step and its write into the cache: rows and features in order."""
    q, k, v = (into_heads(i, z[:, : i.cos.shape[1]]) for z in (i.z_q, i.z_k, i.z_v))
    i.keys[:, :, slots(i)], i.values[:, :, slots(i)] = rotated(k, i.cos, i.sin), v
    return rotated(q, i.cos, i.sin), i.keys, i.values


def unsealed_slots(i: Inputs, results: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The caches' new rows with their keystream taken off, by the cipher in PyTorch."""
    *others, keys, values = results
    new = slots(i)
    own = i.sealing.at(i.sealing.writes[:, new])
    for is_value, cache in enumerate((keys, values)):
        cache[:, :, new] = cipher.unseal(cache[:, :, new], own, is_value=bool(is_value))
    return (*others, keys, values)


def qkv(*, cache: bool = False, sealed: bool = False, opening: bool = False) -> Operation:
    """`cache`: into one as it grows in place, tokens before these ones and room behind them. `opening`: into its first
    slots, and K and V are returned unsealed as well."""

    def make(draw: Draw) -> Inputs:
        case, shape = draw.case, draw.shape
        lone = case.rows == 1  # a lone generated token has no order to hide
        z_q, z_k, z_v = (draw.rows(case.rows, width) for width in shape.qkv_widths)
        inputs = Inputs(
            z_q=z_q,
            z_k=z_k,
            z_v=z_v,
            position=None if lone else draw.position(case.rows, case.tokens),
            **tables(draw),
            query=draw.features(shape.heads),
            key=draw.features(shape.kv_heads),
            value=draw.features(shape.kv_heads),
        )
        capacity = TOKENS_BEFORE + case.tokens + case.tokens // 4
        if cache:
            inputs.keys, inputs.values = (draw.heads(shape.kv_heads, capacity) for _ in range(2))
            inputs.offset = 0 if opening else TOKENS_BEFORE
        if sealed:
            inputs.sealing, inputs.return_unsealed = draw.sealing(capacity), opening
        return inputs

    def results(i: Inputs, returned: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """q, k and v where the pass opens the cache, and both caches."""
        if not opening:
            return returned
        q, *kv = returned
        new = kv if "sealing" in vars(i) else [stored[:, :, slots(i)] for stored in kv]
        return (q, *new, i.keys, i.values)

    def unfused(i: Inputs) -> tuple[Tensor, ...]:
        i = i.unsealed
        return results(i, then_stored(i) if cache else in_token_order(i))

    def rivals(case: Case) -> Iterator[Contestant]:
        yield rival("PyTorch, unfused, permuted" if sealed else "PyTorch, unfused", unfused)
        if sealed:
            yield bound("plain, nothing encoded", nothing_encoded)

    return operation(
        "qkv_decode_encode",
        make,
        rivals,
        flops=lambda case: 3 * case.tokens * (case.shape.query_width + case.shape.kv_width),
        results=results,
        written=lambda i: [in_token_order(i), in_token_order(i)[1:] if opening else ()],
        writes=cache,
        **({"finish": unsealed_slots, "sealed": ("z_k", "z_v")} if sealed else {}),
    )


def heads(name: str) -> Operation:
    """A layer's keys, with or without their rotary step."""
    rotary = name == "rotary_permute"

    def make(draw: Draw) -> Inputs:
        kv_heads = draw.shape.kv_heads
        x, turned = draw.heads(kv_heads, draw.case.tokens), tables(draw) if rotary else {}
        return Inputs(x=x, **turned, feature_index=draw.features(kv_heads))

    def unfused(i: Inputs) -> Tensor:
        if rotary:
            return gathered(rotated(i.x, i.cos, i.sin), i.feature_index)
        return torch.take_along_dim(i.x, i.feature_index[:, :, None], dim=-1)

    return operation(
        name,
        make,
        lambda case: [rival("PyTorch, unfused", unfused)],
        flops=lambda case: 3 * case.tokens * case.shape.kv_width if rotary else 0,
    )


ROW_OPERATIONS = {
    "inject_permute": inject(),
    "inject_permute+norm": inject(norm=True),
    "inject_permute+norm+noise": inject(norm=True, noise=True),
    "inject_permute+features": inject(features=True),
    "strip_restore": STRIP,
    "permuted_linear": PRODUCT,
    "permuted_linears": SHARED,
    "permuted_linear+noise": noisy(inside=True),
    "permuted_linear+noisy rows": noisy(inside=False),
    "noise_image": NOISE_IMAGE,
    "qkv_decode_encode": qkv(),
    "qkv_decode_encode+cache": qkv(cache=True),
    "qkv_decode_encode+sealed": qkv(cache=True, sealed=True),
    "qkv_decode_encode+sealed+opening": qkv(cache=True, sealed=True, opening=True),
    "rotary_permute": heads("rotary_permute"),
    "permute_features": heads("permute_features"),
}
