"""The public operations: one name each, whatever device the tensors are on.

CPU tensors take the reference. CUDA and ROCm tensors take Triton (`scx_kernels.dispatch` says who computes); where a
vendor's product or attention is the faster kernel, the operation takes that one on the encoded tensors.

Names, arguments and results are those of `scx_kernels.reference`, where they are documented. Functions here spell out
only the arguments by which they decide.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import wraps
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from scx_kernels import checks, reference
from scx_kernels.dispatch import accelerator, backend, chosen_backend, is_accelerator
from scx_kernels.operators import OPERATORS, Operator, checked, operation
from scx_kernels.sealing import Sealing, check_cache

__all__ = [
    "OPERATORS",
    "accelerator",
    "allow_unproven",
    "attention",
    "attention_step",
    "backend",
    "inject_permute",
    "is_accelerator",
    "is_refused_on_sealed",
    "noise_image",
    "permuted_linear",
    "permuted_linears",
    "qkv_decode_encode",
    "strip_restore",
    "unlock",
]

# A product of more rows is bound by arithmetic, where a vendor's product gains more than the gather it would absorb.
_FEW_ROWS = 64


def _encoded_rows(x: Tensor, row_index: Tensor | None) -> int:
    return x.shape[1] if row_index is None else row_index.shape[1]


def _inject_shape(x: Tensor, row_index: Tensor | None, noise: Tensor | None, **given: Any) -> Tensor:
    checks.check_rows(x, row_index, given["redundant"])
    checked(checks.check_inject, given | {"x": x, "row_index": row_index, "noise": noise})
    dtype = x.dtype if noise is None else torch.float32
    return x.new_empty(x.shape[0], _encoded_rows(x, row_index), x.shape[2], dtype=dtype)


_inject_permute = Operator(reference.inject_permute, "rows", _inject_shape)


@operation(reference.inject_permute, _inject_permute)
def inject_permute(*args: Any, **options: Any) -> Tensor:
    return _inject_permute(*args, **options)


def _strip_shape(z: Tensor, position: Tensor, **given: Any) -> Tensor:
    checks.check_strip(z, position, **given)
    return z.new_empty(z.shape[0], position.shape[1], z.shape[2])


_strip_restore = Operator(reference.strip_restore, "rows", _strip_shape)


@operation(reference.strip_restore, _strip_restore)
def strip_restore(*args: Any, **options: Any) -> Tensor:
    return _strip_restore(*args, **options)


def _linear_shape(
    x: Tensor, weight: Tensor, row_index: Tensor | None, image: Tensor | None, out_rows: int | None, **given: Any
) -> Tensor:
    checks.check_linear(x, weight, row_index, image=image, out_rows=out_rows, **given)
    rows = _encoded_rows(x, row_index) if out_rows is None else out_rows
    noisy = given["noise"] is not None or x.dtype != weight.dtype
    dtype = torch.float32 if noisy and image is None else weight.dtype
    return x.new_empty(x.shape[0], rows, weight.shape[0], dtype=dtype)


_permuted_linear = Operator(reference.permuted_linear, "product", _linear_shape)


def _is_large(x: Tensor, row_index: Tensor | None) -> bool:
    rows = x.shape[0] * x.shape[1] if row_index is None else row_index.numel()
    return chosen_backend() == "auto" and rows > _FEW_ROWS


@operation(reference.permuted_linear)
def permuted_linear(
    x: Tensor,
    weight: Tensor,
    row_index: Tensor | None = None,
    redundant: Tensor | None = None,
    bias: Tensor | None = None,
    **options: Any,
) -> Tensor:
    noisy = options.get("noise") is not None or options.get("image") is not None or x.dtype != weight.dtype
    if noisy or not _is_large(x, row_index):
        return _permuted_linear(x, weight, row_index, redundant, bias, **options)
    checks.check_linear(x, weight, row_index, redundant, bias, **options)
    product = F.linear(x if row_index is None else _inject_permute(x, row_index, redundant), weight, bias)
    scatter_index = options.get("scatter_index")
    if scatter_index is None:
        return product
    return _strip_restore(product, scatter_index.argsort(dim=1)[:, : options["out_rows"]])


def _linears_shape(x: Tensor, weights: Sequence[Tensor], row_index: Tensor | None, **given: Any) -> Tensor:
    checks.check_linears(x, weights, row_index, **given)
    return x.new_empty(x.shape[0], _encoded_rows(x, row_index), sum(weight.shape[0] for weight in weights))


# The products lie side by side in one tensor.
_permuted_linears = Operator(reference.permuted_linears, "product", _linears_shape, returns=Tensor)


@operation(reference.permuted_linears)
def permuted_linears(
    x: Tensor,
    weights: Sequence[Tensor],
    row_index: Tensor | None = None,
    redundant: Tensor | None = None,
    biases: Sequence[Tensor | None] | None = None,
) -> tuple[Tensor, ...]:
    if not _is_large(x, row_index):
        side_by_side = _permuted_linears(x, list(weights), row_index, redundant, biases and list(biases))
        return side_by_side.split_with_sizes([weight.shape[0] for weight in weights], dim=2)
    biases = checks.check_linears(x, weights, row_index, redundant, biases)
    rows = x if row_index is None else _inject_permute(x, row_index, redundant)
    return tuple(F.linear(rows, weight, bias) for weight, bias in zip(weights, biases, strict=True))


@wraps(reference.noise_image)
def noise_image(noise: Tensor, weight: Tensor) -> Tensor:
    return permuted_linear(noise, weight)


def _qkv_shape(
    z_q: Tensor, position: Tensor | None, query: Tensor, key: Tensor, keys: Tensor | None, values: Tensor | None,
    sealing: Sealing | None, return_unsealed: bool, **given: Any,
) -> Any:  # fmt: skip
    given |= {"z_q": z_q, "position": position, "query": query, "key": key, "keys": keys, "values": values}
    dtype = checked(checks.check_qkv, given)
    checks.check_return_unsealed(return_unsealed, keys, sealing is not None)
    tokens = _encoded_rows(z_q, position)
    batch, heads, size = query.shape
    q = z_q.new_empty(batch, tokens, heads, size, dtype=dtype).transpose(1, 2)
    k, v = (z_q.new_empty(batch, key.shape[1], tokens, size, dtype=dtype) for _ in range(2))
    check_cache(k if keys is None else keys, v if values is None else values, sealing)
    return q if keys is not None and not return_unsealed else (q, k, v)


_NO_CACHE = {"keys": None, "values": None, "offset": 0, "offsets": None}
_QKV = (reference.qkv_decode_encode, "qkv", _qkv_shape)
_qkv_decode_encode = Operator(*_QKV, fixed={**_NO_CACHE, "return_unsealed": False})
_qkv_into_cache = Operator(
    *_QKV, name="qkv_into_cache", mutates=("keys", "values"), fixed={"return_unsealed": False}, returns=Tensor
)
_qkv_into_sealed_cache = Operator(
    *_QKV, name="qkv_into_sealed_cache", mutates=("keys", "values"), fixed={"return_unsealed": True}
)


@operation(reference.qkv_decode_encode, _qkv_decode_encode)
def qkv_decode_encode(
    *args: Any, keys: Tensor | None = None, values: Tensor | None = None, offset: int = 0,
    offsets: Tensor | None = None, sealing: Sealing | None = None, return_unsealed: bool = False, **options: Any,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    if keys is None or values is None:
        checks.check_no_slots(keys, values, offset, offsets)
        checks.check_return_unsealed(return_unsealed, keys, sealing is not None)
        return _qkv_decode_encode(*args, sealing=sealing, **options)
    options |= {"keys": keys, "values": values, "offset": offset, "offsets": offsets}
    if return_unsealed:
        checks.check_return_unsealed(return_unsealed, keys, sealing is not None)
        return _qkv_into_sealed_cache(*args, sealing=sealing, **options)
    return _qkv_into_cache(*args, sealing=sealing, **options), keys, values


def _attention_shape(
    q: Tensor, k: Tensor, v: Tensor, row_index: Tensor | None, sealing: Sealing | None, **given: Any
) -> Tensor:
    checks.check_attention(q, k, v, row_index=row_index, **given)
    check_cache(k, v, sealing)
    batch, heads, tokens, size = q.shape
    if row_index is not None:
        return q.new_empty(batch, row_index.shape[1], heads * size)
    return q.new_empty(batch, tokens, heads, size).transpose(1, 2)


_attention = Operator(reference.attention, "attention", _attention_shape)


_refuses_unproven = True


@contextmanager
def allow_unproven() -> Iterator[None]:
    """Within it nothing is refused for having failed on a GPU: for whoever looks for the cause, or has no GPU."""
    global _refuses_unproven
    before, _refuses_unproven = _refuses_unproven, False
    try:
        yield
    finally:
        _refuses_unproven = before


def is_refused_on_sealed(q: Tensor) -> bool:
    """Whether `attention` of q, (..., d), on a sealed cache is refused: what failed on a GPU, for a reason that is not
    known (bench/results/h100/README.md)."""
    size = q.shape[-1]
    return _refuses_unproven and q.is_cuda and q.dtype.itemsize == 2 and size & (size - 1) != 0


@operation(reference.attention)
def attention(q: Tensor, k: Tensor, v: Tensor, *, sealing: Sealing | None = None, **options: Any) -> Tensor:
    # Unsealing into memory instead would break the cache's promise, and a result that may be wrong would break any.
    if sealing is not None and is_refused_on_sealed(q):
        raise NotImplementedError(
            "attention: on a sealed cache, several tokens or a padded one gave wrong results on a GPU, in half "
            f"precision with heads of {q.shape[-1]} features; take a permuted cache, or float32, or read prompts whole"
        )
    # PyTorch's fused backends hold whole prompts better; what they would need a mask for is the kernel's.
    limited = any(options.get(limit) is not None for limit in ("window", "kv_start", "kv_length"))
    limited = limited or (options.get("is_causal", False) and q.shape[2] != k.shape[2])
    # A sealed cache must not lie unsealed in memory, where they would need it.
    if limited or sealing is not None or chosen_backend() == "triton":
        return _attention(q, k, v, sealing=sealing, **options)
    checks.check_attention(q, k, v, **options)
    return _vendors_attention(q, k, v, **options)


def _vendors_attention(
    q: Tensor, k: Tensor, v: Tensor, *, softmax_scale: float, mask: Tensor | None = None, is_causal: bool = False,
    output_index: Tensor | None = None, row_index: Tensor | None = None, redundant: Tensor | None = None,
    **_absent: None,
) -> Tensor:  # fmt: skip
    out = reference.grouped_attention(q, k, v, softmax_scale, mask, is_causal)
    if output_index is None and row_index is None:
        return out
    # The permutations ride on the next pass over the rows.
    rows = _inject_permute(out.transpose(1, 2).flatten(2), row_index, redundant, feature_index=output_index)
    return rows if row_index is not None else rows.unflatten(2, (q.shape[1], -1)).transpose(1, 2)


def _step_shape(q: Tensor, k: Tensor, v: Tensor, sealing: Sealing | None, **given: Any) -> Tensor:
    checks.check_attention_step(q, k, v, **given)
    check_cache(k, v, sealing)
    batch, heads, tokens, size = q.shape
    return q.new_empty(batch, tokens, heads, size).transpose(1, 2)


_attention_step = Operator(reference.attention_step, "attention_step", _step_shape)


@operation(reference.attention_step, _attention_step)
def attention_step(*args: Any, **options: Any) -> Tensor:
    return _attention_step(*args, **options)


def _unlock_shape(cache: Tensor, position: Tensor, in_place: bool) -> Tensor | None:
    checks.check_unlock(cache, position)
    return None if in_place else cache.new_empty(*cache.shape[:2], position.shape[1], cache.shape[3])


_UNLOCK = (reference.unlock, "unlock", _unlock_shape)
_unlock = Operator(*_UNLOCK, fixed={"in_place": False})
_unlock_in_place = Operator(
    *_UNLOCK, name="unlock_in_place", mutates=("cache",), fixed={"in_place": True}, returns=None
)


@operation(reference.unlock, _unlock)
def unlock(cache: Tensor, position: Tensor, *, in_place: bool = False) -> Tensor:
    if not in_place:
        return _unlock(cache, position)
    _unlock_in_place(cache, position)
    return cache[:, :, : position.shape[1]]
