"""What every operation asks of its arguments, said once: shapes, dtypes and devices, checked before any work.

Values of index arrays are not read here (on an accelerator that would wait for the device); `check_permutation`
does it where a caller wants it.
"""

from collections.abc import Sequence
from math import frexp, prod

import torch
from torch import Tensor

__all__ = [
    "check_attention",
    "check_attention_step",
    "check_features",
    "check_inject",
    "check_linear",
    "check_linears",
    "check_no_slots",
    "check_permutation",
    "check_qkv",
    "check_rows",
    "check_strip",
    "check_unlock",
]


def _describe(x: Tensor) -> str:
    return f"{tuple(x.shape)} {x.dtype} on {x.device}"


def _check_index(index: Tensor, name: str, device: torch.device, shape: tuple[int, ...] | None = None) -> None:
    if index.dtype != torch.int64:
        raise TypeError(f"{name}: expected int64, got {index.dtype}")
    if index.device != device or (shape is not None and tuple(index.shape) != shape):
        raise ValueError(
            f"{name}: expected {'a tensor' if shape is None else shape} on {device}, got {_describe(index)}"
        )


def _check_is(x: Tensor, name: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
    if tuple(x.shape) != shape or x.dtype != dtype or x.device != device:
        raise ValueError(f"{name}: expected {shape} {dtype} on {device}, got {_describe(x)}")


def _check_wide(x: Tensor, name: str, like: Tensor, rows: int, features: int) -> None:
    """Noise or its image in the accumulation dtype."""
    _check_added(x, name, torch.promote_types(like.dtype, torch.float32), like, rows, features)


def _check_added(x: Tensor, name: str, dtype: torch.dtype, like: Tensor, rows: int, features: int) -> None:
    """(rows, features), or one for each sequence of `like`."""
    if x.dtype != dtype or x.device != like.device:
        raise TypeError(f"{name}: expected {dtype} on {like.device}, got {x.dtype} on {x.device}")
    if tuple(x.shape) not in ((rows, features), (like.shape[0], rows, features)):
        raise ValueError(
            f"{name}: expected shape ({like.shape[0]}, {rows}, {features}) or without batch, got {tuple(x.shape)}"
        )


def check_rows(x: Tensor, row_index: Tensor | None, redundant: Tensor | None, *, index_name: str = "row_index") -> None:
    """x (B, N, D), row_index (B, T) or None, redundant (B, R, D) or None."""
    if x.dim() != 3 or not x.is_floating_point():
        raise ValueError(f"x: expected a floating (B, N, D) tensor, got {_describe(x)}")
    if row_index is None:
        if redundant is not None:
            raise ValueError(f"redundant: needs {index_name}, which says where its rows go")
        return
    _check_index(row_index, index_name, x.device)
    if row_index.dim() != 2 or row_index.shape[0] != x.shape[0]:
        raise ValueError(f"{index_name}: expected shape ({x.shape[0]}, T), got {tuple(row_index.shape)}")
    if redundant is None:
        return
    if redundant.dtype != x.dtype or redundant.device != x.device:
        raise ValueError(f"redundant: expected {x.dtype} on {x.device}, got {_describe(redundant)}")
    if redundant.dim() != 3 or (redundant.shape[0], redundant.shape[2]) != (x.shape[0], x.shape[2]):
        raise ValueError(f"redundant: expected shape ({x.shape[0]}, R, {x.shape[2]}), got {tuple(redundant.shape)}")


def check_inject(
    x: Tensor,
    row_index: Tensor | None,
    feature_index: Tensor | None,
    norm_weight: Tensor | None,
    noise: Tensor | None,
    noise_step: float | None,
) -> None:
    """What `inject_permute` takes beside its rows; those are checked by `check_rows`."""
    batch, rows, features = x.shape
    encoded = rows if row_index is None else row_index.shape[1]
    if feature_index is not None:
        _check_index(feature_index, "feature_index", x.device)
        if feature_index.dim() != 3 or feature_index.shape[0] != batch or prod(feature_index.shape[1:]) != features:
            raise ValueError(
                f"feature_index: expected shape ({batch}, H, d) with H*d = {features}, got {tuple(feature_index.shape)}"
            )
        if norm_weight is not None:
            raise ValueError("feature_index: not together with norm_weight")
    if norm_weight is not None:
        _check_is(norm_weight, "norm_weight", (features,), x.dtype, x.device)
    if (noise is None) != (noise_step is None):
        raise ValueError("noise, noise_step: give both or neither")
    if noise is not None and noise_step is not None:
        _check_added(noise, "noise", torch.int32, x, encoded, features)
        if not 2.0**-126 <= noise_step <= 2.0**126 or frexp(noise_step)[0] != 0.5:
            raise ValueError(f"noise_step: expected a power of two between 2^-126 and 2^126, got {noise_step}")


def check_strip(z: Tensor, position: Tensor, residual: Tensor | None, image: Tensor | None) -> None:
    """z (B, T, D), position (B, S), residual (B, S, D) or None, image (T, D), (B, T, D) or None."""
    check_rows(z, position, None, index_name="position")
    batch, encoded, features = z.shape
    if image is not None:
        _check_wide(image, "image", z, encoded, features)
    expected = (batch, position.shape[1], features)
    if residual is not None and (tuple(residual.shape) != expected or residual.device != z.device):
        raise ValueError(f"residual: expected shape {expected} on {z.device}, got {_describe(residual)}")


def _check_weight(x: Tensor, weight: Tensor, bias: Tensor | None, name: str = "weight") -> None:
    wide = torch.promote_types(weight.dtype, torch.float32)
    fits = x.dtype == weight.dtype or x.dtype == torch.promote_types(x.dtype, wide)
    if weight.dim() != 2 or weight.shape[1] != x.shape[2] or weight.device != x.device or not fits:
        raise ValueError(f"{name}: expected (M, {x.shape[2]}) {x.dtype} on {x.device}, got {_describe(weight)}")
    if bias is not None and (tuple(bias.shape) != (weight.shape[0],) or bias.device != x.device):
        raise ValueError(f"bias: expected ({weight.shape[0]},) on {x.device}, got {_describe(bias)}")


def check_linear(
    x: Tensor,
    weight: Tensor,
    row_index: Tensor | None,
    redundant: Tensor | None = None,
    bias: Tensor | None = None,
    noise: Tensor | None = None,
    image: Tensor | None = None,
    scatter_index: Tensor | None = None,
    out_rows: int | None = None,
) -> None:
    """x (B, N, D), weight (M, D) of x's dtype, or of half precision where x is float32."""
    check_rows(x, row_index, redundant)
    _check_weight(x, weight, bias)
    rows = x.shape[1] if row_index is None else row_index.shape[1]
    if noise is not None:
        _check_wide(noise, "noise", x, rows, x.shape[2])
    if image is not None:
        _check_wide(image, "image", x, rows, weight.shape[0])
    if (scatter_index is None) != (out_rows is None):
        raise ValueError("scatter_index, out_rows: give both or neither")
    if scatter_index is not None:
        _check_index(scatter_index, "scatter_index", x.device, (x.shape[0], rows))


def check_linears(
    x: Tensor,
    weights: Sequence[Tensor],
    row_index: Tensor | None,
    redundant: Tensor | None,
    biases: Sequence[Tensor | None] | None,
) -> Sequence[Tensor | None]:
    """The biases, one for each weight (M, D) of x's dtype."""
    check_rows(x, row_index, redundant)
    if not weights:
        raise ValueError("weights: expected at least one")
    biases = [None] * len(weights) if biases is None else biases
    if len(biases) != len(weights):
        raise ValueError(f"biases: expected {len(weights)}, as many as weights, got {len(biases)}")
    for weight, bias in zip(weights, biases, strict=True):
        _check_weight(x, weight, bias, "weights")
        if weight.dtype != x.dtype:
            raise ValueError(f"weights: expected {x.dtype}, got {weight.dtype}")
    return biases


def check_features(x: Tensor, feature_index: Tensor) -> None:
    """x (B, H, S, d), feature_index (B, H, d)."""
    if x.dim() != 4:
        raise ValueError(f"x: expected shape (B, H, S, d), got {tuple(x.shape)}")
    _check_index(feature_index, "feature_index", x.device, (x.shape[0], x.shape[1], x.shape[3]))


def _check_heads(q: Tensor, k: Tensor, v: Tensor, softmax_scale: float, output_index: Tensor | None) -> None:
    """q (B, H, S, d); k, v (B, G, N, d) with H a multiple of G."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dim() != 4 or x.shape[0] != q.shape[0]:
            raise ValueError(f"{name}: expected shape ({q.shape[0]}, heads, tokens, d), got {tuple(x.shape)}")
        if x.dtype != q.dtype or x.device != q.device or not x.is_floating_point():
            raise ValueError(f"{name}: expected {q.dtype} on {q.device}, got {_describe(x)}")
    if k.shape[:3] != v.shape[:3]:
        raise ValueError(f"v: expected heads and tokens of k, {tuple(k.shape[1:3])}, got {tuple(v.shape[1:3])}")
    if k.shape[3] != q.shape[3]:
        raise ValueError(f"k: expected head size {q.shape[3]}, got {k.shape[3]}")
    if k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise ValueError(f"k: its {k.shape[1]} heads do not divide q's {q.shape[1]}")
    if not softmax_scale > 0:
        raise ValueError(f"softmax_scale: expected a positive number, got {softmax_scale}")
    if output_index is not None:
        _check_index(output_index, "output_index", q.device, (*q.shape[:2], v.shape[3]))


def _check_lengths(q: Tensor, kv_start: Tensor | None, kv_length: Tensor | None) -> None:
    for name, value in (("kv_start", kv_start), ("kv_length", kv_length)):
        if value is None:
            continue
        if value.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"{name}: expected int32 or int64, got {value.dtype}")
        if value.shape != q.shape[:1] or value.device != q.device or not value.is_contiguous():
            raise ValueError(f"{name}: expected a contiguous ({q.shape[0]},) on {q.device}, got {_describe(value)}")


def check_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    softmax_scale: float,
    mask: Tensor | None = None,
    is_causal: bool = False,
    window: int | None = None,
    kv_start: Tensor | None = None,
    kv_length: Tensor | None = None,
    output_index: Tensor | None = None,
    row_index: Tensor | None = None,
    redundant: Tensor | None = None,
) -> None:
    """q (B, H, S, d); k, v (B, G, N, d) with H a multiple of G; row_index (B, T) or None."""
    _check_heads(q, k, v, softmax_scale, output_index)
    _check_lengths(q, kv_start, kv_length)
    (batch, heads, tokens, _), keys = q.shape, k.shape[2]
    if is_causal and (mask is not None or tokens > keys):
        raise ValueError(f"is_causal: needs no mask beside it and no more queries than keys, got {tokens} and {keys}")
    if window is not None and (window < 1 or not is_causal):
        raise ValueError(f"window: expected a positive number, with is_causal, got {window}")
    if row_index is None:
        if redundant is not None:
            raise ValueError("redundant: needs row_index, which says where its rows go")
        return
    _check_index(row_index, "row_index", q.device)
    count = 0 if redundant is None else redundant.shape[1]
    if redundant is not None:
        _check_is(redundant, "redundant", (batch, count, heads * v.shape[3]), q.dtype, q.device)
    if tuple(row_index.shape) != (batch, tokens + count):
        raise ValueError(f"row_index: expected shape {(batch, tokens + count)}, got {tuple(row_index.shape)}")


def check_attention_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    softmax_scale: float,
    window: int | None,
    kv_start: Tensor | None,
    kv_length: Tensor | None,
    position: Tensor | None,
    output_index: Tensor | None,
) -> None:
    """q (B, H, S, d); k, v (B, G, capacity, d) with H a multiple of G; position (B, N) or None."""
    _check_heads(q, k, v, softmax_scale, output_index)
    _check_lengths(q, kv_start, kv_length)
    if window is not None and window < 1:
        raise ValueError(f"window: expected a positive number, got {window}")
    if position is not None:
        _check_index(position, "position", q.device)
        if position.dim() != 2 or position.shape[0] != q.shape[0]:
            raise ValueError(f"position: expected shape ({q.shape[0]}, N), got {tuple(position.shape)}")


def check_unlock(cache: Tensor, position: Tensor) -> None:
    """cache (B, G, T, d), position (B, S) with S up to T."""
    if cache.dim() != 4 or not cache.is_floating_point():
        raise ValueError(f"cache: expected a floating (B, G, T, d) tensor, got {_describe(cache)}")
    _check_index(position, "position", cache.device)
    fits = position.dim() == 2 and position.shape[0] == cache.shape[0] and position.shape[1] <= cache.shape[2]
    if not fits:
        raise ValueError(
            f"position: expected shape ({cache.shape[0]}, up to {cache.shape[2]}), got {tuple(position.shape)}"
        )


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
    images: Sequence[Tensor] | None,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    dtype: torch.dtype | None,
    keys: Tensor | None,
    values: Tensor | None,
    offset: int,
    offsets: Tensor | None,
) -> torch.dtype:
    """The dtype of q, k and v, from z_q (B, T, H*d), z_k and z_v (B, T, G*d), position (B, S) or None, and the rest."""
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
        _check_is(z, name, (batch, encoded, index.shape[1] * size), z_q.dtype, z_q.device)
    if images is not None:
        if len(images) != 3:
            raise ValueError(f"images: expected three, of z_q, z_k and z_v, got {len(images)}")
        for image, z in zip(images, (z_q, z_k, z_v), strict=True):
            _check_wide(image, "images", z, encoded, z.shape[2])
    for name, table in (("cos", cos), ("sin", sin)):
        if tuple(table.shape) not in ((1, tokens, size), (batch, tokens, size)):
            raise ValueError(f"{name}: expected shape ({batch} or 1, {tokens}, {size}), got {tuple(table.shape)}")
    if (q_norm is None) != (k_norm is None):
        raise ValueError("q_norm, k_norm: give both or neither")
    for name, weight in (("q_norm", q_norm), ("k_norm", k_norm)):
        if weight is not None and weight.shape != (size,):
            raise ValueError(f"{name}: expected shape ({size},), got {tuple(weight.shape)}")
    return _check_slots(z_q, key, tokens, dtype, keys, values, offset, offsets)


def _check_slots(
    z_q: Tensor,
    key: Tensor,
    tokens: int,
    dtype: torch.dtype | None,
    keys: Tensor | None,
    values: Tensor | None,
    offset: int,
    offsets: Tensor | None,
) -> torch.dtype:
    """The dtype of what is written, and whether the caches, if any, have the slots."""
    if keys is None or values is None:
        check_no_slots(keys, values, offset, offsets)
        return dtype or z_q.dtype
    dtype = dtype or keys.dtype
    (batch, groups, size), capacity = key.shape, keys.shape[2] if keys.dim() == 4 else 0
    _check_is(keys, "keys", (batch, groups, capacity, size), dtype, z_q.device)
    _check_is(values, "values", (batch, groups, capacity, size), dtype, z_q.device)
    if offsets is not None:
        _check_index(offsets, "offsets", z_q.device, (batch,))
        if offset:
            raise ValueError("offset, offsets: give one of them")
    elif not 0 <= offset <= capacity - tokens:
        raise ValueError(f"offset: expected 0..{capacity - tokens}, so that {tokens} tokens fit, got {offset}")
    return dtype


def check_no_slots(keys: Tensor | None, values: Tensor | None, offset: int, offsets: Tensor | None) -> None:
    """Without one of the caches, there is neither the other nor a slot in it."""
    if keys is not None or values is not None:
        raise ValueError("keys, values: give both or neither")
    if offset or offsets is not None:
        raise ValueError("offset, offsets: need keys and values to write into")


def check_return_unsealed(return_unsealed: bool, keys: Tensor | None, is_sealed: bool) -> None:
    """What is returned unsealed is beside what is sealed in a cache; otherwise the results are there anyhow."""
    if return_unsealed and (keys is None or not is_sealed):
        raise ValueError("return_unsealed: needs sealing, and keys and values to write sealed rows into")


def check_permutation(index: Tensor, name: str = "index") -> None:
    """Read the values of (..., n) and raise ValueError unless every row is a permutation of 0..n-1.

    On an accelerator this waits for the device.
    """
    expected = torch.arange(index.shape[-1], device=index.device, dtype=index.dtype)
    if not torch.equal(index.sort(dim=-1).values, expected.expand(index.shape)):
        raise ValueError(f"{name}: a row is not a permutation of 0..{index.shape[-1] - 1}")
