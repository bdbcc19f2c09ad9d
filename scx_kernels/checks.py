"""What every operation asks of its arguments, said once: shapes, dtypes and devices, checked before any work.

Values of index arrays are not read here (on an accelerator that would wait for the device); `check_permutation`
does it where a caller wants it.
"""

import torch
from torch import Tensor

__all__ = [
    "check_attention",
    "check_features",
    "check_permutation",
    "check_qkv",
    "check_rows",
    "check_same_shape",
]


def _describe(x: Tensor) -> str:
    return f"{tuple(x.shape)} {x.dtype} on {x.device}"


def _check_index(index: Tensor, name: str, device: torch.device) -> None:
    if index.dtype != torch.int64:
        raise TypeError(f"{name}: expected int64, got {index.dtype}")
    if index.device != device:
        raise ValueError(f"{name}: expected a tensor on {device}, got {_describe(index)}")


def check_rows(x: Tensor, row_index: Tensor, redundant: Tensor | None, *, index_name: str = "row_index") -> None:
    """x (B, N, D), row_index (B, T), redundant (B, R, D) or None."""
    if x.dim() != 3 or not x.is_floating_point():
        raise ValueError(f"x: expected a floating (B, N, D) tensor, got {_describe(x)}")
    _check_index(row_index, index_name, x.device)
    if row_index.dim() != 2 or row_index.shape[0] != x.shape[0]:
        raise ValueError(f"{index_name}: expected shape ({x.shape[0]}, T), got {tuple(row_index.shape)}")
    if redundant is None:
        return
    if redundant.dtype != x.dtype or redundant.device != x.device:
        raise ValueError(f"redundant: expected {x.dtype} on {x.device}, got {_describe(redundant)}")
    if redundant.dim() != 3 or (redundant.shape[0], redundant.shape[2]) != (x.shape[0], x.shape[2]):
        raise ValueError(f"redundant: expected shape ({x.shape[0]}, R, {x.shape[2]}), got {tuple(redundant.shape)}")


def check_same_shape(expected: Tensor, given: Tensor, name: str) -> None:
    if expected.shape != given.shape or expected.device != given.device:
        raise ValueError(f"{name}: expected shape {tuple(expected.shape)} on {expected.device}, got {_describe(given)}")


def check_features(x: Tensor, feature_index: Tensor) -> None:
    """x (B, H, S, d), feature_index (B, H, d)."""
    if x.dim() != 4:
        raise ValueError(f"x: expected shape (B, H, S, d), got {tuple(x.shape)}")
    _check_index(feature_index, "feature_index", x.device)
    expected = (x.shape[0], x.shape[1], x.shape[3])
    if tuple(feature_index.shape) != expected:
        raise ValueError(f"feature_index: expected shape {expected}, got {tuple(feature_index.shape)}")


def check_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, is_causal: bool) -> None:
    """q (B, H, S, d); k, v (B, G, N, d) with H a multiple of G."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dim() != 4 or x.shape[0] != q.shape[0]:
            raise ValueError(f"{name}: expected shape ({q.shape[0]}, heads, tokens, d), got {tuple(x.shape)}")
        if x.dtype != q.dtype or x.device != q.device:
            raise ValueError(f"{name}: expected {q.dtype} on {q.device}, got {_describe(x)}")
    if k.shape[:3] != v.shape[:3]:
        raise ValueError(f"v: expected heads and tokens of k, {tuple(k.shape[1:3])}, got {tuple(v.shape[1:3])}")
    if k.shape[3] != q.shape[3]:
        raise ValueError(f"k: expected head size {q.shape[3]}, got {k.shape[3]}")
    if k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise ValueError(f"k: its {k.shape[1]} heads do not divide q's {q.shape[1]}")
    if is_causal and (mask is not None or q.shape[2] != k.shape[2]):
        raise ValueError("is_causal: needs as many queries as keys, and no mask beside it")


def check_qkv(
    z_q: Tensor,
    z_k: Tensor,
    z_v: Tensor,
    position: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
) -> None:
    """z_q (B, T, H*d), z_k and z_v (B, T, G*d), position (B, S) or None, cos and sin (B or 1, S, d)."""
    if z_q.dim() != 3 or query.dim() != 3:
        raise ValueError(f"z_q, query: expected (B, T, H*d) and (B, H, d), got {z_q.shape} and {query.shape}")
    batch, encoded, size = z_q.shape[0], z_q.shape[1], query.shape[2]
    for name, index in (("query", query), ("key", key), ("value", value)):
        _check_index(index, name, z_q.device)
        if index.dim() != 3 or (index.shape[0], index.shape[2]) != (batch, size) or index.shape[1] == 0:
            raise ValueError(f"{name}: expected shape ({batch}, heads, {size}), got {tuple(index.shape)}")
    if key.shape[1] != value.shape[1] or query.shape[1] % key.shape[1]:
        raise ValueError(f"key, value: {key.shape[1]} and {value.shape[1]} heads do not fit query's {query.shape[1]}")
    if size % 2:
        raise ValueError(f"query: a rotary head has an even number of features, got {size}")
    tokens = encoded
    if position is not None:
        _check_index(position, "position", z_q.device)
        if position.dim() != 2 or position.shape[0] != batch:
            raise ValueError(f"position: expected shape ({batch}, S), got {tuple(position.shape)}")
        tokens = position.shape[1]
    for name, z, index in (("z_q", z_q, query), ("z_k", z_k, key), ("z_v", z_v, value)):
        expected = (batch, encoded, index.shape[1] * size)
        if z.shape != expected or z.dtype != z_q.dtype or z.device != z_q.device:
            raise ValueError(f"{name}: expected {expected} {z_q.dtype} on {z_q.device}, got {_describe(z)}")
    for name, table in (("cos", cos), ("sin", sin)):
        if tuple(table.shape) not in ((1, tokens, size), (batch, tokens, size)):
            raise ValueError(f"{name}: expected shape ({batch} or 1, {tokens}, {size}), got {tuple(table.shape)}")
    if (q_norm is None) != (k_norm is None):
        raise ValueError("q_norm, k_norm: give both or neither")
    for name, weight in (("q_norm", q_norm), ("k_norm", k_norm)):
        if weight is not None and weight.shape != (size,):
            raise ValueError(f"{name}: expected shape ({size},), got {tuple(weight.shape)}")


def check_permutation(index: Tensor, name: str = "index") -> None:
    """Read the values of (..., n) and raise ValueError unless every row is a permutation of 0..n-1.

    On an accelerator this waits for the device.
    """
    expected = torch.arange(index.shape[-1], device=index.device, dtype=index.dtype)
    if not torch.equal(index.sort(dim=-1).values, expected.expand(index.shape)):
        raise ValueError(f"{name}: a row is not a permutation of 0..{index.shape[-1] - 1}")
