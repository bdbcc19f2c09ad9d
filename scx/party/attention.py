"""Causal attention as either party computes it, and the secure side's check of some rows of it.

The result is compared with the secure side's own. With u of the accumulation dtype and γ_n = nu / (1 - nu), either is
off by: δ = γ_{d+8}·|q||k|·scale in a score of d features, the largest of its row subtracted, so by e^{2δ} in a
probability; the roundings of the exponential; γ_{3N} in sums over N keys, rescaled block by block or not; and u of a
half precision in probabilities and in the result, if it is one. All of it relative to Σ p|v|, element by element.
"""

from typing import Any

import torch
from torch import Tensor

import scx_kernels as ops
from scx.architecture import sliding_window
from scx.party.freivalds import Comparison, gamma, unit_roundoff

__all__ = ["attend", "compare_attention"]

_EXPONENTIAL = 64  # roundings: PyTorch's vectorised exponential promises 20 units in the last place, a GPU's is closer


def attend(attention: Any, q: Tensor, k: Tensor, v: Tensor, first_key: Tensor | None) -> Tensor:
    """Causal attention of the last n tokens' q (B, H, n, d) on k and v (B, G, N, d) -> (B, H, n, d).

    Args:
        attention: the block's, for its scaling and window.
        first_key: (B,) first token that is no padding, or None.
    """
    window, scale = sliding_window(attention), attention.scaling
    if q.shape[2] == 1:
        return ops.attention_step(q, k, v, softmax_scale=scale, window=window, kv_start=first_key)
    return ops.attention(q, k, v, softmax_scale=scale, is_causal=True, window=window, kv_start=first_key)


def compare_attention(
    attention: Any, q: Tensor, k: Tensor, v: Tensor, first_key: Tensor | None, attended: Tensor, rows: Tensor
) -> Comparison:
    """Some rows (m,) of what is said to be `attend` of the other arguments, (B, H, n, d) -> (B, G, H/G·m, d)."""
    dtype = q.dtype
    wide, (tokens, keys) = ops.accumulation_dtype(dtype), (q.shape[2], k.shape[2])
    k, v, grouped = k.to(wide), v.to(wide), (k.shape[1], -1)
    # Query heads of one key head are rows of one matrix.
    q, attended = (x.index_select(2, rows).to(wide).unflatten(1, grouped).flatten(2, 3) for x in (q, attended))
    seen = _seen(rows + keys - tokens, keys, sliding_window(attention), first_key)
    seen = seen.repeat(1, 1, q.shape[2] // len(rows), 1)
    scores = (q @ k.transpose(-1, -2)).mul_(attention.scaling)
    # A query that sees no key gives zeros.
    probabilities = scores.masked_fill_(~seen, -torch.inf).softmax(dim=-1).masked_fill_(~seen, 0)
    own, magnitude = probabilities @ v, probabilities @ v.abs()
    largest = attention.scaling * q.norm(dim=-1, keepdim=True) * k.norm(dim=-1).amax(dim=-1)[..., None, None]
    exponents = torch.expm1(2 * gamma(q.shape[-1] + 8, wide) * largest)
    relative = 2 * (exponents + gamma(3 * keys + _EXPONENTIAL, wide) * (1 + exponents))
    if dtype != wide:
        relative = relative + 2 * unit_roundoff(dtype) * (1 + relative)
    least = torch.finfo(dtype).tiny + keys * torch.finfo(wide).tiny * v.abs().amax()
    return Comparison((attended - own).abs(), relative * magnitude * (1 + 2**-6) + least)


def _seen(own: Tensor, keys: int, window: int | None, first_key: Tensor | None) -> Tensor:
    """(B or 1, 1, m, N) bool: which keys the queries in the places `own` (m,) see."""
    key = torch.arange(keys, device=own.device)
    seen = key <= own[:, None]
    if window is not None:
        seen = seen & (key > own[:, None] - window)
    seen = seen[None] if first_key is None else seen & (key >= first_key[:, None, None])
    return seen[:, None]
