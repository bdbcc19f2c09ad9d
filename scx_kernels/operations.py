"""The public operations: one name each, whatever device the tensors are on.

CPU tensors take the reference. CUDA and ROCm tensors take Triton, through operators registered with PyTorch, so that
`torch.compile` sees one call with a shape rule and CUDA graphs capture it; where a vendor's product or attention is the
faster kernel, the operation takes that one on the encoded tensors. Where gradients are wanted the reference serves
every device: the kernels have no backward.

`SCX_KERNELS` in the environment, or `backend(...)` in code, says otherwise for debugging: "reference" keeps to plain
PyTorch; "triton" takes the kernels for everything, also for CPU tensors, on which they run in Triton's interpreter
(`TRITON_INTERPRET=1` before triton is imported).

Names, arguments and results are those of `scx_kernels.reference`, where they are documented.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial, wraps
from importlib import import_module
from typing import Any, TypeVar, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from scx_kernels import checks, reference
from scx_kernels.sealing import Sealing, check_cache

__all__ = [
    "attention",
    "attention_step",
    "backend",
    "inject_permute",
    "is_accelerator",
    "noise_image",
    "permuted_linear",
    "permuted_linears",
    "qkv_decode_encode",
    "strip_restore",
    "unlock",
]

BACKENDS = ("auto", "reference", "triton")
_KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# A product of more rows is bound by arithmetic, where a vendor's product gains more than the gather it would absorb.
_FEW_ROWS = 64
_Function = TypeVar("_Function", bound=Callable)


def _checked(name: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"backend: expected one of {BACKENDS}, got {name!r}")
    return name


# A plain global, which torch.compile guards on; the switch is for debugging, and for the whole process.
_backend = _checked(os.environ.get("SCX_KERNELS", "auto"))


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Choose, within a `with` block and for the whole process, who computes: "auto", "reference" or "triton".

    Raises: ValueError for another name.
    """
    global _backend
    before, _backend = _backend, _checked(name)
    try:
        yield
    finally:
        _backend = before


def is_accelerator(device: torch.device) -> bool:
    """Whether tensors of this device take the kernels: CUDA's and ROCm's, both of which PyTorch calls "cuda"."""
    return device.type == "cuda"


def _takes_triton(*given: Any) -> bool:
    """Whether these arguments are for the kernels; the first tensor says on which device and in which dtype."""
    tensors = [y for x in given for y in (x if isinstance(x, (list, tuple)) else (x,)) if isinstance(y, Tensor)]
    first = tensors[0]
    if _backend == "reference" or first.dtype not in _KERNEL_DTYPES:
        return False
    if _backend == "auto" and not is_accelerator(first.device):
        return False
    return not (torch.is_grad_enabled() and any(x.requires_grad for x in tensors))


# How an operator's schema spells `sealing`, which is one argument everywhere else.
_SEALING = "Tensor? seal_key=None, Tensor? seal_writes=None, SymInt[]? seal_numbers=None"


def _spelled(sealing: Sealing | None) -> dict[str, Any]:
    if sealing is None:
        return {}
    key, writes, *numbers = sealing[:5]
    return {"seal_key": key, "seal_writes": writes, "seal_numbers": numbers}


def _unspelled(arguments: dict[str, Any]) -> dict[str, Any]:
    key, writes, numbers = (arguments.pop(f"seal_{name}", None) for name in ("key", "writes", "numbers"))
    return arguments if key is None else arguments | {"sealing": Sealing(key, writes, *numbers)}


def _register(name: str, module: str, schema: str, shape_rule: Callable[..., Any]) -> Any:
    """Register a kernel's launcher as the operator `scx_kernels::NAME`. Kernels, and triton, are imported by the first
    call."""
    arguments = schema[1 : schema.index(") ->")].split(",")
    names = [argument.split("=")[0].split()[-1] for argument in arguments]
    mutates = [name for name, argument in zip(names, arguments, strict=True) if "!" in argument]

    def launch(*args: Any, **options: Any) -> Any:
        launcher = getattr(import_module(f"scx_kernels.kernels.{module}"), name)
        return launcher(**_unspelled(dict(zip(names, args, strict=False)) | options))

    def shape(*args: Any, **options: Any) -> Any:
        return shape_rule(**_unspelled(dict(zip(names, args, strict=False)) | options))

    operator = torch.library.custom_op(f"scx_kernels::{name}", launch, mutates_args=mutates, schema=schema)
    operator.register_fake(shape)
    return operator


def _operation(original: _Function) -> Callable[[Callable], _Function]:
    """Give a function that runs on the kernels its public face: signature and documentation of the reference, which
    takes the call where the kernels do not."""

    def decorate(on_kernels: Callable) -> _Function:
        @wraps(original)
        def call(*args: Any, **options: Any) -> Any:
            if _takes_triton(*args, *options.values()):
                return on_kernels(*args, **options)
            return original(*args, **options)

        return cast(_Function, call)

    return decorate


def _inject_shape(
    x: Tensor,
    row_index: Tensor | None,
    redundant: Tensor | None = None,
    *,
    feature_index: Tensor | None = None,
    norm_weight: Tensor | None = None,
    eps: float = 1e-6,
    noise: Tensor | None = None,
) -> Tensor:
    checks.check_rows(x, row_index, redundant)
    checks.check_inject(x, row_index, feature_index, norm_weight, noise)
    rows = x.shape[1] if row_index is None else row_index.shape[1]
    return x.new_empty(x.shape[0], rows, x.shape[2], dtype=x.dtype if noise is None else torch.float32)


_inject_permute = _register(
    "inject_permute",
    "rows",
    "(Tensor x, Tensor? row_index, Tensor? redundant=None, Tensor? feature_index=None, Tensor? norm_weight=None, "
    "float eps=1e-6, Tensor? noise=None) -> Tensor",
    _inject_shape,
)


@_operation(reference.inject_permute)
def inject_permute(*args: Any, **options: Any) -> Tensor:
    return _inject_permute(*args, **options)


def _strip_shape(z: Tensor, position: Tensor, residual: Tensor | None = None, *, image: Tensor | None = None) -> Tensor:
    checks.check_strip(z, position, residual, image)
    return z.new_empty(z.shape[0], position.shape[1], z.shape[2])


_strip_restore = _register(
    "strip_restore",
    "rows",
    "(Tensor z, Tensor position, Tensor? residual=None, Tensor? image=None) -> Tensor",
    _strip_shape,
)


@_operation(reference.strip_restore)
def strip_restore(*args: Any, **options: Any) -> Tensor:
    return _strip_restore(*args, **options)


def _linear_shape(
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
    checks.check_linear(x, weight, row_index, redundant, bias, noise, image, scatter_index, out_rows)
    rows = x.shape[1] if row_index is None else row_index.shape[1]
    noisy = noise is not None or x.dtype != weight.dtype
    dtype = torch.float32 if noisy and image is None else weight.dtype
    return x.new_empty(x.shape[0], rows if out_rows is None else out_rows, weight.shape[0], dtype=dtype)


_permuted_linear = _register(
    "permuted_linear",
    "product",
    "(Tensor x, Tensor weight, Tensor? row_index=None, Tensor? redundant=None, Tensor? bias=None, "
    "Tensor? noise=None, Tensor? image=None, Tensor? scatter_index=None, SymInt? out_rows=None) -> Tensor",
    _linear_shape,
)


def _is_large(x: Tensor, row_index: Tensor | None) -> bool:
    rows = x.shape[0] * x.shape[1] if row_index is None else row_index.numel()
    return _backend == "auto" and rows > _FEW_ROWS


@_operation(reference.permuted_linear)
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
    noisy = noise is not None or image is not None or x.dtype != weight.dtype
    if noisy or not _is_large(x, row_index):
        return _permuted_linear(
            x, weight, row_index, redundant, bias, noise=noise, image=image, scatter_index=scatter_index,
            out_rows=out_rows,
        )  # fmt: skip
    checks.check_linear(x, weight, row_index, redundant, bias, noise, image, scatter_index, out_rows)
    product = F.linear(x if row_index is None else _inject_permute(x, row_index, redundant), weight, bias)
    if scatter_index is None:
        return product
    return _strip_restore(product, scatter_index.argsort(dim=1)[:, :out_rows])


def _linears_shape(
    x: Tensor,
    weights: Sequence[Tensor],
    row_index: Tensor | None = None,
    redundant: Tensor | None = None,
    biases: Sequence[Tensor | None] | None = None,
) -> Tensor:
    checks.check_linears(x, weights, row_index, redundant, biases)
    rows = x.shape[1] if row_index is None else row_index.shape[1]
    return x.new_empty(x.shape[0], rows, sum(weight.shape[0] for weight in weights))


_permuted_linears = _register(
    "permuted_linears",
    "product",
    "(Tensor x, Tensor[] weights, Tensor? row_index=None, Tensor? redundant=None, Tensor?[]? biases=None) -> Tensor",
    _linears_shape,
)


@_operation(reference.permuted_linears)
def permuted_linears(
    x: Tensor,
    weights: Sequence[Tensor],
    row_index: Tensor | None = None,
    redundant: Tensor | None = None,
    biases: Sequence[Tensor | None] | None = None,
) -> tuple[Tensor, ...]:
    if not _is_large(x, row_index):
        side_by_side = _permuted_linears(x, list(weights), row_index, redundant, biases and list(biases))
        return side_by_side.split([weight.shape[0] for weight in weights], dim=2)
    biases = checks.check_linears(x, weights, row_index, redundant, biases)
    rows = x if row_index is None else _inject_permute(x, row_index, redundant)
    return tuple(F.linear(rows, weight, bias) for weight, bias in zip(weights, biases, strict=True))


@wraps(reference.noise_image)
def noise_image(noise: Tensor, weight: Tensor) -> Tensor:
    return permuted_linear(noise, weight)


_QKV_ROWS = (
    "Tensor z_q, Tensor z_k, Tensor z_v, Tensor? position, Tensor cos, Tensor sin, Tensor query, Tensor key, "
    "Tensor value"
)
_QKV_OPTIONS = "Tensor[]? images=None, Tensor? q_norm=None, Tensor? k_norm=None, float eps=1e-6, ScalarType? dtype=None"


def _qkv_shape(
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
) -> Any:
    dtype = checks.check_qkv(
        z_q, z_k, z_v, position, cos, sin, query, key, value, images, q_norm, k_norm, dtype, keys, values, offset,
        offsets,
    )  # fmt: skip
    checks.check_return_unsealed(return_unsealed, keys, sealing is not None)
    tokens = z_q.shape[1] if position is None else position.shape[1]
    batch, heads, size = query.shape
    q = z_q.new_empty(batch, tokens, heads, size, dtype=dtype).transpose(1, 2)
    k, v = (z_q.new_empty(batch, key.shape[1], tokens, size, dtype=dtype) for _ in range(2))
    check_cache(k if keys is None else keys, v if values is None else values, sealing)
    return q if keys is not None and not return_unsealed else (q, k, v)


_qkv_decode_encode = _register(
    "qkv_decode_encode", "qkv", f"({_QKV_ROWS}, {_QKV_OPTIONS}, {_SEALING}) -> (Tensor, Tensor, Tensor)", _qkv_shape
)
_QKV_INTO_CACHE = (
    f"({_QKV_ROWS}, Tensor(a!) keys, Tensor(b!) values, {_QKV_OPTIONS}, SymInt offset=0, Tensor? offsets=None, "
    f"{_SEALING}) -> "
)
_qkv_into_cache = _register("qkv_into_cache", "qkv", f"{_QKV_INTO_CACHE}Tensor", _qkv_shape)
_qkv_into_sealed_cache = _register(
    "qkv_into_sealed_cache",
    "qkv",
    f"{_QKV_INTO_CACHE}(Tensor, Tensor, Tensor)",
    partial(_qkv_shape, return_unsealed=True),
)


@_operation(reference.qkv_decode_encode)
def qkv_decode_encode(
    *args: Any, keys: Tensor | None = None, values: Tensor | None = None, offset: int = 0,
    offsets: Tensor | None = None, sealing: Sealing | None = None, return_unsealed: bool = False, **options: Any,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    checks.check_return_unsealed(return_unsealed, keys, sealing is not None)
    options |= _spelled(sealing)
    if keys is None or values is None:
        checks.check_no_slots(keys, values, offset, offsets)
        return _qkv_decode_encode(*args, **options)
    options |= {"keys": keys, "values": values, "offset": offset, "offsets": offsets}
    if return_unsealed:
        return _qkv_into_sealed_cache(*args, **options)
    return _qkv_into_cache(*args, **options), keys, values


def _attention_shape(
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
    checks.check_attention(
        q, k, v, softmax_scale, mask, is_causal, window, kv_start, kv_length, output_index, row_index, redundant
    )
    check_cache(k, v, sealing)
    batch, heads, tokens, size = q.shape
    if row_index is not None:
        return q.new_empty(batch, row_index.shape[1], heads * size)
    return q.new_empty(batch, tokens, heads, size).transpose(1, 2)


_attention = _register(
    "attention",
    "attention",
    "(Tensor q, Tensor k, Tensor v, float softmax_scale, Tensor? mask=None, bool is_causal=False, "
    "SymInt? window=None, Tensor? kv_start=None, Tensor? kv_length=None, Tensor? output_index=None, "
    f"Tensor? row_index=None, Tensor? redundant=None, {_SEALING}) -> Tensor",
    _attention_shape,
)


@_operation(reference.attention)
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    is_causal: bool = False,
    window: int | None = None,
    kv_start: Tensor | None = None,
    kv_length: Tensor | None = None,
    output_index: Tensor | None = None,
    row_index: Tensor | None = None,
    redundant: Tensor | None = None,
    sealing: Sealing | None = None,
    **options: Any,
) -> Tensor:
    # PyTorch's fused backends hold whole prompts better; what they would need a mask for is the kernel's.
    limited = window is not None or kv_start is not None or kv_length is not None
    # A sealed cache must not lie unsealed in memory, where they would need it.
    if _backend == "triton" or sealing is not None or limited or (is_causal and q.shape[2] != k.shape[2]):
        return _attention(
            q, k, v, is_causal=is_causal, window=window, kv_start=kv_start, kv_length=kv_length,
            output_index=output_index, row_index=row_index, redundant=redundant, **_spelled(sealing), **options,
        )  # fmt: skip
    out = reference.attention(q, k, v, is_causal=is_causal, **options)
    if output_index is None and row_index is None:
        return out
    checks.check_attention(
        q, k, v, 1.0, None, False, None, None, None, output_index, row_index, redundant
    )  # fmt: skip
    # The permutations ride on the next pass over the rows.
    rows = _inject_permute(out.transpose(1, 2).flatten(2), row_index, redundant, feature_index=output_index)
    return rows if row_index is not None else rows.unflatten(2, (q.shape[1], -1)).transpose(1, 2)


def _step_shape(
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
    checks.check_attention_step(q, k, v, softmax_scale, window, kv_start, kv_length, position, output_index)
    check_cache(k, v, sealing)
    batch, heads, tokens, size = q.shape
    return q.new_empty(batch, tokens, heads, size).transpose(1, 2)


_attention_step = _register(
    "attention_step",
    "attention",
    "(Tensor q, Tensor k, Tensor v, float softmax_scale, SymInt? window=None, Tensor? kv_start=None, "
    f"Tensor? kv_length=None, Tensor? position=None, Tensor? output_index=None, {_SEALING}) -> Tensor",
    _step_shape,
)


@_operation(reference.attention_step)
def attention_step(*args: Any, sealing: Sealing | None = None, **options: Any) -> Tensor:
    return _attention_step(*args, **options, **_spelled(sealing))


def _unlock_shape(cache: Tensor, position: Tensor) -> Tensor:
    checks.check_unlock(cache, position)
    return cache.new_empty(*cache.shape[:2], position.shape[1], cache.shape[3])


def _unlock_in_place_shape(cache: Tensor, position: Tensor) -> None:
    checks.check_unlock(cache, position)


_unlock = _register("unlock", "unlock", "(Tensor cache, Tensor position) -> Tensor", _unlock_shape)
_unlock_in_place = _register(
    "unlock_in_place", "unlock", "(Tensor(a!) cache, Tensor position) -> ()", _unlock_in_place_shape
)


@_operation(reference.unlock)
def unlock(cache: Tensor, position: Tensor, *, in_place: bool = False) -> Tensor:
    if not in_place:
        return _unlock(cache, position)
    _unlock_in_place(cache, position)
    return cache[:, :, : position.shape[1]]
