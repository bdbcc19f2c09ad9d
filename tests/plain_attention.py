"""Attention spelled out: which keys a query sees, and a softmax over all scores."""

import math

import torch
from parity import DEVICE, integers


def seen_keys(batch, tokens, keys, *, causal, window=None, start=None, end=None, aligned_to_end=False):
    """(B, 1, S, N) bool: which key a query sees, spelled out."""
    start = integers(*[0] * batch) if start is None else start
    end = integers(*[keys] * batch) if end is None else end
    key, token = (torch.arange(count, device=DEVICE) for count in (keys, tokens))
    key = key[None, None]
    last = token[None, :, None] + ((end[:, None, None] - tokens) if aligned_to_end else keys - tokens)
    seen = (key >= start[:, None, None]) & (key < end[:, None, None])
    if causal:
        seen = seen & (key <= last)
    if window is not None:
        seen = seen & (key > last - window)
    return seen.expand(batch, tokens, keys)[:, None]


def plain_attention(q, k, v, mask, scale, output_index=None):
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    scores = (q * scale) @ k.transpose(-1, -2)
    scores = scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask
    out = scores.softmax(-1).nan_to_num(0) @ v
    if output_index is None:
        return out
    return out.gather(-1, output_index[:, :, None].expand(out.shape))
