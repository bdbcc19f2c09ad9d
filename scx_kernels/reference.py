"""Every operation of the protocol in plain PyTorch: the specification, and the path that serves CPUs.

Notation: B batch, S tokens, R redundant rows, T encoded rows, D features, H query heads, G key/value heads
(H a multiple of G), d head size. An index array says for each *output* place which *input* place fills it, as
`torch.gather` does:

| array           | shape     | values   | meaning                                                              |
|-----------------|-----------|----------|----------------------------------------------------------------------|
| `row_index`     | (B, T)    | 0..N+R-1 | encoded row t is row `row_index[t]` of N rows and R redundant ones   |
| `position`      | (B, S)    | 0..T-1   | token s lies in encoded row `position[s]`                            |
| `feature_index` | (B, *, d) | 0..d-1   | encoded feature j of a head is its plain feature `feature_index[j]`  |

Two permutations in a row compose into one index array, so "leave one token order, enter the next" is one
`inject_permute` as well. Index arrays are int64 on the device of the tensor they index.

A long file, because a specification is read as one; more than half of it is signatures and what they mean.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from scx_kernels.checks import (
    check_attention,
    check_attention_step,
    check_features,
    check_inject,
    check_linear,
    check_linears,
    check_qkv,
    check_return_unsealed,
    check_rows,
    check_strip,
    check_unlock,
)
from scx_kernels.sealing import Sealing, check_cache, patterns, seal, unseal

__all__ = [
    "accumulation_dtype",
    "attention",
    "attention_step",
    "grouped_attention",
    "inject_permute",
    "noise_image",
    "permute_features",
    "permuted_linear",
    "permuted_linears",
    "qkv_decode_encode",
    "rotary_permute",
    "strip_restore",
    "unlock",
]


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which rows under noise are written and multiplied: at least float32 (bf16 keeps 8 bits)."""
    return torch.promote_types(dtype, torch.float32)


def _take_rows(x: Tensor, index: Tensor) -> Tensor:
    """Rows of (B, N, D) by (B, M) index -> (B, M, D)."""
    batch, rows, features = x.shape
    if batch == 1:
        return x[0].index_select(0, index[0])[None]
    first_row = torch.arange(batch, device=index.device)[:, None] * rows
    taken = x.reshape(batch * rows, features).index_select(0, (index + first_row).flatten())
    return taken.view(batch, index.shape[1], features)


def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Llama's: statistics in the accumulation dtype, rounded to x's dtype, then multiplied by the weight."""
    wide = x.to(accumulation_dtype(x.dtype))
    return weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype)


def _add_on_grid(rows: Tensor, noise: Tensor, step: float) -> Tensor:
    """Rows rounded to multiples of `step`, plus as many as `noise` says: exact in float64, then rounded once."""
    wide = accumulation_dtype(rows.dtype)
    noisy = rows.detach().to(torch.float64, copy=True).div_(step).round_().add_(noise).mul_(step).to(wide)
    return noisy + (rows - rows.detach()).to(wide) if rows.requires_grad else noisy


def inject_permute(
    x: Tensor,
    row_index: Tensor | None,
    redundant: Tensor | None = None,
    *,
    feature_index: Tensor | None = None,
    norm_weight: Tensor | None = None,
    eps: float = 1e-6,
    noise: Tensor | None = None,
    noise_step: float | None = None,
) -> Tensor:
    """Append redundant rows and permute: `y[b, t] = norm((x ⊕ redundant)[b, row_index[b, t]])`, or under noise
    `y[b, t] = round(noise_step * (rint(norm(...) / noise_step) + noise[b, t]))`.

    Rows and noise lie on one grid, so their exact sum is a sum of any other row on it and some noise; rounding that sum
    once, to the accumulation dtype, tells no more than the sum does.

    Args:
        x: (B, N, D), any floating dtype; N rows in any order (token order, or another encoding's).
        row_index: (B, T) int64 in 0..N+R-1; None where rows stay as they lie, and none is redundant.
        redundant: (B, R, D) of x's dtype, or None for R = 0.
        feature_index: (B, H, d) int64 with H*d = D, or None: the order in which each head's features of x are read.
            Not of redundant rows, and not together with a norm.
        norm_weight: (D,) of x's dtype: RMS norm on every row, as in Llama; None for no norm.
        eps: added to the mean square under the root.
        noise: (T, D) or (B, T, D) int32, in multiples of `noise_step` and in encoded order, or None.
        noise_step: a power of two, with noise: the grid to which rows are rounded, to nearest and ties to even. The
            gradient passes the rounding as if it were not there.

    Returns: (B, T, D) of x's dtype; in `accumulation_dtype(x.dtype)` under noise.
    Raises: TypeError, ValueError naming the argument whose dtype, shape or device does not fit.
    Source: SCX, prefill, "encode"; Zhang and Sennrich, RMSNorm (arXiv 1910.07467); why a grid: Mironov, On significance
        of the least significant bits for differential privacy (CCS 2012).
    """
    check_rows(x, row_index, redundant)
    check_inject(x, row_index, feature_index, norm_weight, noise, noise_step)
    if feature_index is not None:
        heads = x.unflatten(-1, feature_index.shape[1:]).transpose(1, 2)
        x = permute_features(heads, feature_index).transpose(1, 2).flatten(2)
    if row_index is None:
        rows = x
    elif redundant is None:
        rows = _take_rows(x, row_index)
    else:
        rows = _take_rows(x, row_index.clamp(max=x.shape[1] - 1))
        sequence, place = (row_index >= x.shape[1]).nonzero(as_tuple=True)
        rows[sequence, place] = redundant[sequence, row_index[sequence, place] - x.shape[1]]
    if norm_weight is not None:
        rows = _rms_norm(rows, norm_weight, eps)
    return rows if noise is None or noise_step is None else _add_on_grid(rows, noise, noise_step)


def strip_restore(
    z: Tensor, position: Tensor, residual: Tensor | None = None, *, image: Tensor | None = None
) -> Tensor:
    """Drop redundant rows and undo the permutation: `y[b, s] = (z - image)[b, position[b, s]] (+ residual[b, s])`.

    Args:
        z: (B, T, D), encoded rows.
        position: (B, S) int64 in 0..T-1.
        residual: (B, S, D) of z's dtype, added to the result, or None.
        image: (T, D) or (B, T, D) in `accumulation_dtype(z.dtype)`, in encoded order: what the noise became, or None.

    Returns: (B, S, D) of z's dtype.
    Raises: TypeError, ValueError naming the argument whose dtype, shape or device does not fit.
    Source: SCX, prefill, "decode".
    """
    check_strip(z, position, residual, image)
    free = z if image is None else (z.to(accumulation_dtype(z.dtype)) - image).to(z.dtype)
    rows = _take_rows(free, position)
    return rows if residual is None else rows.add_(residual)


def permuted_linear(
    x: Tensor,
    weight: Tensor,
    row_index: Tensor | None = None,
    redundant: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    noise: Tensor | None = None,
    image: Tensor | None = None,
    scatter_index: Tensor | None = None,
    out_rows: int | None = None,
) -> Tensor:
    """Permuted-gather product: `(inject_permute(x, row_index, redundant) + noise) @ weight.T - image + bias`.

    Rows that carry noise, added here or before (x in the accumulation dtype of a half-precision weight), are
    multiplied in the accumulation dtype, or as two half-precision terms summed in float32; the image is subtracted
    before the one rounding. So the noise costs no more precision than float32 loses. What is added here is never
    written to memory, and needs no grid.

    Args:
        x: (B, N, D) of weight's dtype, or float32.
        weight: (M, D), as in `torch.nn.Linear`.
        row_index: (B, T) int64 in 0..N+R-1; None where the rows are taken as they lie.
        redundant: (B, R, D) of x's dtype, or None for R = 0.
        bias: (M,) or None.
        noise: (T, D) or (B, T, D) in the accumulation dtype, or None.
        image: (T, M) or (B, T, M) in the accumulation dtype, `noise_image(noise, weight)`, or None.
        scatter_index: (B, T) int64, row t of the product goes to row `scatter_index[t]` of the result, or nowhere
            where that is `out_rows` or more; every row of the result must be hit. The row_index of an encoding leaves
            that encoding.
        out_rows: rows of the result, with scatter_index.

    Returns: (B, T or out_rows, M) of weight's dtype; in the accumulation dtype while noise is still in it.
    Raises: TypeError, ValueError naming the argument whose dtype, shape or device does not fit.
    """
    check_linear(x, weight, row_index, redundant, bias, noise, image, scatter_index, out_rows)
    rows = inject_permute(x, row_index, redundant)
    rows = rows if noise is None else rows.to(accumulation_dtype(x.dtype)) + noise
    noisy = rows.dtype != weight.dtype
    if not noisy and image is None:
        product = F.linear(rows, weight, bias)
    else:
        product = F.linear(rows, weight.to(rows.dtype))
        product = product if image is None else product - image
        product = product if bias is None else product + bias.to(product.dtype)
        product = product if noisy and image is None else product.to(weight.dtype)
    if scatter_index is None:
        return product
    out = product.new_empty(product.shape[0], out_rows or 0, product.shape[2])
    sequence, row = (scatter_index < out.shape[1]).nonzero(as_tuple=True)
    out[sequence, scatter_index[sequence, row]] = product[sequence, row]
    return out


def permuted_linears(
    x: Tensor,
    weights: Sequence[Tensor],
    row_index: Tensor | None = None,
    redundant: Tensor | None = None,
    biases: Sequence[Tensor | None] | None = None,
) -> tuple[Tensor, ...]:
    """Several linear layers on the same permuted rows, such as q, k and v: `permuted_linear` for each.

    Args:
        x, row_index, redundant: as in `permuted_linear`.
        weights: each (M, D) of x's dtype.
        biases: each (M,) or None, as many as weights; None for none.

    Returns: the products, each (B, T, M) of x's dtype; they may be slices of one tensor.
    Raises: TypeError, ValueError naming the argument whose dtype, shape or device does not fit.
    """
    biases = check_linears(x, weights, row_index, redundant, biases)
    rows = inject_permute(x, row_index, redundant)
    return tuple(F.linear(rows, weight, bias) for weight, bias in zip(weights, biases, strict=True))


def noise_image(noise: Tensor, weight: Tensor) -> Tensor:
    """What additive noise becomes behind a linear layer: `noise @ weight.T`, without bias.

    Args:
        noise: (B, T, D) in the accumulation dtype.
        weight: (M, D) of any floating dtype.

    Returns: (B, T, M) in the noise's dtype.
    """
    return permuted_linear(noise, weight)


def permute_features(x: Tensor, feature_index: Tensor) -> Tensor:
    """Permute each head's features: `y[b, h, s, j] = x[b, h, s, feature_index[b, h, j]]`.

    Args:
        x: (B, H, S, d), any strides.
        feature_index: (B, H, d) int64 in 0..d-1.

    Returns: (B, H, S, d), in memory by heads or by tokens as x is.
    Raises: TypeError, ValueError naming the argument whose dtype, shape or device does not fit.
    Source: SCX, feature permutation π_r.
    """
    check_features(x, feature_index)
    batch, heads, tokens, size = x.shape
    if x.stride(1) < x.stride(2):
        by_tokens = feature_index[:, None].expand(batch, tokens, heads, size)
        return x.transpose(1, 2).gather(-1, by_tokens).transpose(1, 2)
    return x.gather(-1, feature_index[:, :, None].expand(batch, heads, tokens, size))


def rotary_permute(x: Tensor, cos: Tensor, sin: Tensor, feature_index: Tensor) -> Tensor:
    """Rotary position embedding, then the feature permutation.

    Feature i rotates with feature i + d/2: `x * cos + rotate_half(x) * sin`, as Llama does.

    Args:
        x: (B, H, S, d) plain queries or keys, in token order.
        cos, sin: (B or 1, S, d).
        feature_index: (B, H, d) int64 in 0..d-1.

    Returns: (B, H, S, d) of x's dtype, encoded.
    Source: Su et al., RoFormer (arXiv 2104.09864), in the half-split layout; SCX, prefill.
    """
    half = x.shape[-1] // 2
    cos, sin = cos[:, None], sin[:, None]
    rotated = x * cos
    rotated[..., :half].sub_(x[..., half:] * sin[..., :half])
    rotated[..., half:].add_(x[..., :half] * sin[..., half:])
    return permute_features(rotated.to(x.dtype), feature_index)


def qkv_decode_encode(
    z_q: Tensor,
    z_k: Tensor,
    z_v: Tensor,
    position: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    images: Sequence[Tensor] | None = None,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    eps: float = 1e-6,
    dtype: torch.dtype | None = None,
    keys: Tensor | None = None,
    values: Tensor | None = None,
    offset: int = 0,
    offsets: Tensor | None = None,
    sealing: Sealing | None = None,
    return_unsealed: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """From projected encoded rows to encoded Q, K, V: strip, un-permute, cancel noise, (norm,) rotate, permute features
    and, where a cache is given, write into it.

    Args:
        z_q: (B, T, H*d) projected rows. z_k, z_v: (B, T, G*d) of z_q's dtype.
        position: (B, S) int64 in 0..T-1; None where the rows are S = T tokens in order.
        cos, sin: (B or 1, S, d).
        query: (B, H, d) int64 in 0..d-1, the feature order of q. key, value: (B, G, d).
        images: what the noise became in z_q, z_k, z_v, each of z's shape in the accumulation dtype; or None.
        q_norm, k_norm: (d,) weights of an RMS norm on every head before the rotary step (Qwen3), with `eps`; both or
            neither.
        dtype: of q, k and v; z_q's, or the cache's, if absent.
        keys, values: (B, G, capacity, d) caches to write k and v into; both or neither.
        offset: slot of the first token. offsets: (B,) int64, a slot for each sequence instead, read on the device;
            range not checked.
        sealing: seals what is stored of k and v; writes (B, capacity) numbers the cache's slots, (B, S) without one.
            None stores them permuted only.
        return_unsealed: with a sealed cache, return k and v as they are before they are sealed, beside what is stored:
            for attention among the first tokens, which then unseals nothing.

    Returns: q (B, H, S, d), k and v (B, G, S, d); with a cache, unless return_unsealed, the caches instead of k and v.
    Raises: TypeError, ValueError naming the argument whose dtype, shape or device does not fit.
    Source: SCX, prefill, steps 3 and 4.
    """
    dtype = check_qkv(
        z_q, z_k, z_v, position, cos, sin, query, key, value, images, q_norm, k_norm, dtype, keys, values, offset,
        offsets,
    )  # fmt: skip
    check_return_unsealed(return_unsealed, keys, sealing is not None)

    def heads(z: Tensor, image: Tensor | None) -> Tensor:
        rows = z if image is None else z.to(accumulation_dtype(z.dtype)) - image
        rows = rows if position is None else strip_restore(rows, position)
        return rows.to(dtype).unflatten(-1, (-1, query.shape[-1]))

    q, k, v = (heads(*pair) for pair in zip((z_q, z_k, z_v), images or (None, None, None), strict=True))
    if q_norm is not None and k_norm is not None:
        q, k = _rms_norm(q, q_norm, eps), _rms_norm(k, k_norm, eps)
    q = rotary_permute(q.transpose(1, 2), cos, sin, query)
    k = rotary_permute(k.transpose(1, 2), cos, sin, key)
    v = permute_features(v.transpose(1, 2), value)
    check_cache(k if keys is None else keys, v if values is None else values, sealing)
    fresh, slots = (q, k, v), None
    if offsets is not None:
        slots = offsets[:, None] + torch.arange(k.shape[2], device=k.device)
    if sealing is not None:
        writes = sealing.writes[:, offset : offset + k.shape[2]] if slots is None else sealing.writes.gather(1, slots)
        own = sealing.replace(writes=writes)
        k, v = seal(k, own, is_value=False), seal(v, own, is_value=True)
    if keys is None or values is None:
        return q, k, v
    for cache, new in ((keys, k), (values, v)):
        if sealing is None:
            _write_slots(cache, new, offset, slots)
        else:
            _write_slots(patterns(cache), patterns(new), offset, slots)
    return fresh if return_unsealed else (q, keys, values)


def _write_slots(cache: Tensor, new: Tensor, offset: int, slots: Tensor | None) -> None:
    if slots is None:
        cache[:, :, offset : offset + new.shape[2]] = new
    else:
        cache.scatter_(2, slots[:, None, :, None].expand(new.shape), new)


def _unsealed(k: Tensor, v: Tensor, sealing: Sealing | None) -> tuple[Tensor, Tensor]:
    check_cache(k, v, sealing)
    if sealing is None:
        return k, v
    return unseal(k, sealing, is_value=False), unseal(v, sealing, is_value=True)


def _without_absent(k: Tensor, v: Tensor, kv_start: Tensor | None, kv_length: Tensor | None) -> tuple[Tensor, Tensor]:
    """Copies of k and v (B, G, N, d) that are zero where rows take no part: unsealed, what was never written is noise
    that may hold NaN."""
    if kv_start is None and kv_length is None:
        return k, v
    first = torch.zeros(k.shape[0], 1, dtype=torch.int64, device=k.device)
    seen = _seen_keys(first, k.shape[2], False, None, kv_start, _end_of_keys(kv_start, kv_length, k.shape[2]))
    absent = ~seen.transpose(2, 3)
    return k.masked_fill(absent, 0), v.masked_fill(absent, 0)


def _seen_keys(
    last: Tensor, keys: int, is_causal: bool, window: int | None, start: Tensor | None, end: Tensor | None
) -> Tensor:
    """(B or 1, 1, S, N) bool: which of `keys` keys each query sees; `last` (B or 1, S) is its own key."""
    key = torch.arange(keys, device=last.device)
    seen = torch.ones_like(last, dtype=torch.bool)[..., None].expand(*last.shape, keys)
    if is_causal:
        seen = key <= last[..., None]
    if window is not None:
        seen = seen & (key > last[..., None] - window)
    if start is not None:
        seen = seen & (key >= start[:, None, None])
    if end is not None:
        seen = seen & (key < end[:, None, None])
    return seen[:, None]


def _end_of_keys(kv_start: Tensor | None, kv_length: Tensor | None, keys: int) -> Tensor | None:
    if kv_length is None:
        return None
    return (kv_length if kv_start is None else kv_start + kv_length).clamp(max=keys)


def grouped_attention(q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None, is_causal: bool) -> Tensor:
    """PyTorch's attention with grouped heads; a query that sees no key gives zeros."""
    groups = q.shape[1] // k.shape[1]
    if groups > 1 and mask is not None:
        k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    out = F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=is_causal, scale=scale, enable_gqa=groups > 1 and mask is None
    )
    if mask is None:
        return out
    # A GPU's fused backends leave something else where a query sees no key.
    seen = mask if mask.dtype == torch.bool else mask > -torch.inf
    return out.masked_fill(~seen.any(dim=-1, keepdim=True), 0)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    softmax_scale: float,
    mask: Tensor | None = None,
    is_causal: bool = False,
    window: int | None = None,
    kv_start: Tensor | None = None,
    kv_length: Tensor | None = None,
    output_index: Tensor | None = None,
    row_index: Tensor | None = None,
    redundant: Tensor | None = None,
    sealing: Sealing | None = None,
) -> Tensor:
    """Attention on feature-permuted Q, K, V. QKᵀ sums over features, so their common order does not matter.

    Args:
        q: (B, H, S, d), each query head permuted as its group's keys.
        k: (B, G, N, d), H a multiple of G. v: (B, G, N, d), under a permutation of its own.
        softmax_scale: positive factor on QKᵀ.
        mask: broadcastable to (B, H, S, N); bool (True takes part) or additive.
        is_causal: query s sees keys 0..N-S+s; needs S <= N and no mask.
        window: with is_causal, a query sees no more than its last `window` keys, itself among them.
        kv_start: (B,) int32 or int64, first key that takes part (left padding); 0 if absent.
        kv_length: (B,) int32 or int64, how many keys from kv_start on take part; all if absent.
        output_index: (B, H, d), the inverse of V's permutation, repeated over each group; undone on the output.
        row_index: (B, T) int64 in 0..S+R-1: merge the heads and enter the next encoding, as `inject_permute` does.
        redundant: (B, R, H*d) of q's dtype, with row_index; R = 0 if absent.
        sealing: how k and v are sealed beside their permutations, with the write numbers of their N rows; None if not.

    Returns: (B, H, S, d), or with row_index the encoded (B, T, H*d). Plain features if output_index is given, else in
    V's order. A query that sees no key gives zeros.
    Raises: TypeError, ValueError naming the argument whose dtype, shape or device does not fit.
    Source: SCX, prefill, steps 4 and 5.
    """
    check_attention(
        q, k, v, softmax_scale, mask, is_causal, window, kv_start, kv_length, output_index, row_index, redundant
    )
    k, v = _unsealed(k, v, sealing)
    if sealing is not None:
        k, v = _without_absent(k, v, kv_start, kv_length)
    tokens, keys = q.shape[2], k.shape[2]
    limited = window is not None or kv_start is not None or kv_length is not None
    if limited or (is_causal and tokens != keys):
        last = torch.arange(keys - tokens, keys, device=q.device)[None]
        seen = _seen_keys(last, keys, is_causal, window, kv_start, _end_of_keys(kv_start, kv_length, keys))
        mask = seen if mask is None else mask & seen if mask.dtype == torch.bool else mask.where(seen, -torch.inf)
    out = grouped_attention(q, k, v, softmax_scale, mask, is_causal and mask is None)
    if row_index is None:
        return out if output_index is None else permute_features(out, output_index)
    return inject_permute(out.transpose(1, 2).flatten(2), row_index, redundant, feature_index=output_index)


def attention_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    softmax_scale: float,
    window: int | None = None,
    kv_start: Tensor | None = None,
    kv_length: Tensor | None = None,
    position: Tensor | None = None,
    output_index: Tensor | None = None,
    sealing: Sealing | None = None,
) -> Tensor:
    """Attention of a sequence's last few queries on its encoded cache (generation).

    The queries are the sequence's last S tokens: with keys kv_start..e-1, query s sees keys up to e - S + s.

    Args:
        q: (B, H, S, d), each query head permuted as its group's keys; S of 1 to about 16.
        k, v: (B, G, capacity, d), H a multiple of G.
        softmax_scale: positive factor on QKᵀ.
        window: a query sees no more than its last `window` keys, itself among them.
        kv_start: (B,) int32 or int64, first key that takes part (left padding); 0 if absent.
        kv_length: (B,) int32 or int64, how many keys from kv_start on take part; all if absent. Read on the device
            only.
        position: (B, N) int64 in 0..capacity-1, the cache row of each key, in token order: for a cache that is
            token-permuted and has redundant rows among the others. kv_start, kv_length and window count in N.
        output_index: (B, H, d), the inverse of V's permutation, repeated over each group; undone on the output.
        sealing: how k and v are sealed beside their permutations, with the write numbers of their rows (B, capacity);
            None if not.

    Returns: (B, H, S, d); plain features if output_index is given, else in V's order. A query that sees no key gives
    zeros.
    Raises: TypeError, ValueError naming the argument whose dtype, shape or device does not fit.
    Source: SCX, generation.
    """
    check_attention_step(q, k, v, softmax_scale, window, kv_start, kv_length, position, output_index)
    k, v = _unsealed(k, v, sealing)
    if position is not None:
        k, v = unlock(k, position), unlock(v, position)
    if sealing is not None:
        k, v = _without_absent(k, v, kv_start, kv_length)
    tokens, keys = q.shape[2], k.shape[2]
    mask = None
    if tokens > 1 or window is not None or kv_start is not None or kv_length is not None:
        end = _end_of_keys(kv_start, kv_length, keys)
        own = torch.arange(tokens, device=q.device) - tokens
        last = own[None] + (keys if end is None else end[:, None])
        mask = _seen_keys(last, keys, True, window, kv_start, end)
    out = grouped_attention(q, k, v, softmax_scale, mask, False)
    return out if output_index is None else permute_features(out, output_index)


def unlock(cache: Tensor, position: Tensor, *, in_place: bool = False) -> Tensor:
    """Strip a token-permuted cache with a shared key, into token order: `y[b, g, s] = cache[b, g, position[b, s]]`.

    Args:
        cache: (B, G, T, d), any strides.
        position: (B, S) int64 in 0..T-1, where each token lies.
        in_place: write into the first S rows of `cache`; the other rows are then unspecified.

    Returns: (B, G, S, d): a new tensor, or in place a view of `cache`.
    Raises: TypeError, ValueError naming the argument whose dtype, shape or device does not fit.
    Source: SCX, key sharing.
    """
    check_unlock(cache, position)
    index = position[:, None, :, None].expand(-1, cache.shape[1], -1, cache.shape[3])
    if cache.dtype in (torch.float16, torch.bfloat16) and not cache.requires_grad:
        taken = patterns(cache).gather(2, index).view(cache.dtype)  # a gather of floats changes sealed patterns
    else:
        taken = cache.gather(2, index)
    if not in_place:
        return taken
    return cache[:, :, : position.shape[1]].copy_(taken)
