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
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from scx_kernels.checks import check_attention, check_features, check_qkv, check_rows, check_same_shape

__all__ = [
    "accumulation_dtype",
    "attention",
    "inject_permute",
    "linear",
    "noise_image",
    "permute_features",
    "permuted_linear",
    "qkv_decode_encode",
    "rotary_permute",
    "strip_restore",
]


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which noise is added, multiplied and subtracted: at least float32 (bf16 keeps 8 bits)."""
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


def inject_permute(
    x: Tensor,
    row_index: Tensor,
    redundant: Tensor | None = None,
    *,
    norm_weight: Tensor | None = None,
    eps: float = 1e-6,
    noise: Tensor | None = None,
) -> Tensor:
    """Append redundant rows and permute: `y[b, t] = (norm(x) ⊕ redundant)[b, row_index[b, t]] (+ noise[b, t])`.

    Args:
        x: (B, N, D), any floating dtype; N rows in any order (token order, or another encoding's).
        row_index: (B, T) int64 in 0..N+R-1.
        redundant: (B, R, D) of x's dtype, or None for R = 0. Taken as it is: not normalised.
        norm_weight: (D,) of x's dtype: RMS norm on the rows of x first, as in Llama; None for no norm.
        eps: added to the mean square under the root.
        noise: (T, D) or (B, T, D) in `accumulation_dtype(x.dtype)`, in encoded order, or None.

    Returns: (B, T, D) of x's dtype; in the accumulation dtype under noise.
    Raises: TypeError, ValueError naming the argument whose dtype, shape or device does not fit.
    Source: SCX, prefill, "encode"; Zhang and Sennrich, RMSNorm (arXiv 1910.07467).
    """
    check_rows(x, row_index, redundant)
    if norm_weight is not None:
        x = _rms_norm(x, norm_weight, eps)
    if redundant is None:
        rows = _take_rows(x, row_index)
    else:
        rows = _take_rows(x, row_index.clamp(max=x.shape[1] - 1))
        sequence, place = (row_index >= x.shape[1]).nonzero(as_tuple=True)
        rows[sequence, place] = redundant[sequence, row_index[sequence, place] - x.shape[1]]
    return rows if noise is None else rows.to(accumulation_dtype(x.dtype)) + noise


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
    check_rows(z, position, None, index_name="position")
    free = z if image is None else (z.to(accumulation_dtype(z.dtype)) - image).to(z.dtype)
    rows = _take_rows(free, position)
    if residual is None:
        return rows
    check_same_shape(rows, residual, "residual")
    return rows.add_(residual)


def noise_image(noise: Tensor, weight: Tensor) -> Tensor:
    """What additive noise becomes behind a linear layer: `noise @ weight.T`, without bias.

    Args:
        noise: (..., D) in the accumulation dtype.
        weight: (N, D) of any floating dtype.

    Returns: (..., N) in the noise's dtype.
    """
    return F.linear(noise, weight.to(noise.dtype))


def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, noise: Tensor | None = None, image: Tensor | None = None
) -> Tensor:
    """A linear layer on encoded rows, with removable noise: `(x + noise) @ weight.T - image + bias`.

    Args:
        x: (..., D).
        weight: (N, D), as in `torch.nn.Linear`.
        bias: (N,) or None.
        noise: (..., D) in `accumulation_dtype(x.dtype)`, or None.
        image: (..., N), `noise_image(noise, weight)`; given exactly when noise is.

    Returns: (..., N) of x's dtype. Under noise the sum, the product and the subtraction run in the accumulation
    dtype, so that the noise costs no more precision than float32 loses.
    Raises: ValueError if only one of noise and image is given or their shapes do not fit.
    """
    if (noise is None) != (image is None):
        raise ValueError("noise and image: give both or neither")
    if noise is None or image is None:
        return F.linear(x, weight, bias)
    check_same_shape(x, noise, "noise")
    dtype = accumulation_dtype(x.dtype)
    product = F.linear(x.to(dtype) + noise, weight.to(dtype)) - image
    if bias is not None:
        product = product + bias.to(dtype)
    return product.to(x.dtype)


def permuted_linear(
    x: Tensor,
    weight: Tensor,
    row_index: Tensor,
    redundant: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    noise: Tensor | None = None,
    image: Tensor | None = None,
) -> Tensor:
    """Permuted-gather product: `(inject_permute(x, row_index, redundant) + noise) @ weight.T - image + bias`.

    Args:
        x: (B, S, D). weight: (N, D). row_index: (B, T). redundant: (B, R, D) or None. bias: (N,) or None.
        noise, image: (B, T, D) and (B, T, N) as in `linear`, both or neither.

    Returns: (B, T, N) of x's dtype.
    """
    return linear(inject_permute(x, row_index, redundant), weight, bias, noise, image)


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

    Returns: (B, H, S, d), encoded.
    Source: Su et al., RoFormer (arXiv 2104.09864), in the half-split layout; SCX, prefill.
    """
    half = x.shape[-1] // 2
    cos, sin = cos[:, None], sin[:, None]
    rotated = x * cos
    rotated[..., :half].sub_(x[..., half:] * sin[..., :half])
    rotated[..., half:].add_(x[..., :half] * sin[..., half:])
    return permute_features(rotated, feature_index)


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
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor, Tensor]:
    """From projected encoded rows to encoded Q, K, V: strip, un-permute, (norm,) rotate, permute features.

    Args:
        z_q: (B, T, H*d) projected rows. z_k, z_v: (B, T, G*d) of z_q's dtype.
        position: (B, S) int64 in 0..T-1; None where the rows are S = T tokens in order.
        cos, sin: (B or 1, S, d).
        query: (B, H, d) int64 in 0..d-1, the feature order of q. key, value: (B, G, d).
        q_norm, k_norm: (d,) weights of an RMS norm on every head before the rotary step (Qwen3), with `eps`; both or
            neither.

    Returns: q (B, H, S, d), k and v (B, G, S, d) of z_q's dtype.
    Raises: TypeError, ValueError naming the argument whose dtype, shape or device does not fit.
    Source: SCX, prefill, steps 3 and 4.
    """
    check_qkv(z_q, z_k, z_v, position, cos, sin, query, key, value, q_norm, k_norm)

    def heads(z: Tensor) -> Tensor:
        rows = z if position is None else strip_restore(z, position)
        return rows.unflatten(-1, (-1, query.shape[-1]))

    q, k, v = heads(z_q), heads(z_k), heads(z_v)
    if q_norm is not None and k_norm is not None:
        q, k = _rms_norm(q, q_norm, eps), _rms_norm(k, k_norm, eps)
    q = rotary_permute(q.transpose(1, 2), cos, sin, query)
    k = rotary_permute(k.transpose(1, 2), cos, sin, key)
    return q, k, permute_features(v.transpose(1, 2), value)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    softmax_scale: float,
    mask: Tensor | None = None,
    is_causal: bool = False,
    output_index: Tensor | None = None,
) -> Tensor:
    """Attention on feature-permuted Q, K, V. QKᵀ sums over features, so their common order does not matter.

    Args:
        q: (B, H, S, d), each query head permuted as its group's keys.
        k: (B, G, N, d). v: (B, G, N, d), under a permutation of its own.
        softmax_scale: factor on QKᵀ.
        mask: broadcastable to (B, H, S, N); bool (True takes part) or additive.
        is_causal: query s sees keys 0..s; needs S = N and no mask.
        output_index: (B, H, d), the inverse of V's permutation, repeated over each group; undone on the output.

    Returns: (B, H, S, d); plain features if output_index is given, else under V's permutation.
    Raises: TypeError, ValueError naming the argument whose dtype, shape or device does not fit.
    """
    check_attention(q, k, v, mask, is_causal)
    groups = q.shape[1] // k.shape[1]
    grouped = groups > 1 and mask is None
    if groups > 1 and mask is not None:
        k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    out = F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=is_causal, scale=softmax_scale, enable_gqa=grouped
    )
    return out if output_index is None else permute_features(out, output_index)
