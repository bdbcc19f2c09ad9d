"""The public operations: one name each, whatever device the tensors are on.

CPU tensors take the reference. CUDA and ROCm tensors take Triton, through operators registered with PyTorch, so that
`torch.compile` sees one call with a shape rule and CUDA graphs capture it. Where gradients are wanted the reference
serves every device: the kernels have no backward.

`SCX_KERNELS` in the environment, or `backend(...)` in code, says otherwise for debugging: "reference" keeps to plain
PyTorch; "triton" sends CPU tensors to the kernels as well, which run there only in Triton's interpreter
(`TRITON_INTERPRET=1` before triton is imported).

Names, arguments and results are those of `scx_kernels.reference`, where they are documented.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F

from scx_kernels import reference
from scx_kernels.checks import check_attention, check_qkv, check_rows

__all__ = ["attention", "backend", "inject_permute", "permuted_linear", "qkv_decode_encode", "strip_restore"]

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


def _takes_triton(*tensors: Tensor | None) -> bool:
    """Whether these tensors are for the kernels; the first one says on which device."""
    first = tensors[0]
    if _backend == "reference" or first is None or first.dtype not in _KERNEL_DTYPES:
        return False
    if _backend == "auto" and first.device.type != "cuda":
        return False
    return not (torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors))


def _documented_by(original: Callable) -> Callable[[_Function], _Function]:
    """Take the docstring of the reference, whose signature the function shares."""

    def decorate(function: _Function) -> _Function:
        function.__doc__ = original.__doc__
        return function

    return decorate


@torch.library.custom_op("scx_kernels::inject_permute", mutates_args=())
def _inject_permute(
    x: Tensor, row_index: Tensor, redundant: Tensor | None, norm_weight: Tensor | None, eps: float, noise: Tensor | None
) -> Tensor:
    from scx_kernels.kernels import rows

    return rows.inject_permute(x, row_index, redundant, norm_weight=norm_weight, eps=eps, noise=noise)


@_inject_permute.register_fake
def _(
    x: Tensor, row_index: Tensor, redundant: Tensor | None, norm_weight: Tensor | None, eps: float, noise: Tensor | None
) -> Tensor:
    check_rows(x, row_index, redundant)
    dtype = x.dtype if noise is None else torch.float32
    return x.new_empty(x.shape[0], row_index.shape[1], x.shape[2], dtype=dtype)


@_documented_by(reference.inject_permute)
def inject_permute(
    x: Tensor,
    row_index: Tensor,
    redundant: Tensor | None = None,
    *,
    norm_weight: Tensor | None = None,
    eps: float = 1e-6,
    noise: Tensor | None = None,
) -> Tensor:
    if not _takes_triton(x, redundant, norm_weight):
        return reference.inject_permute(x, row_index, redundant, norm_weight=norm_weight, eps=eps, noise=noise)
    return _inject_permute(x, row_index, redundant, norm_weight, eps, noise)


@torch.library.custom_op("scx_kernels::strip_restore", mutates_args=())
def _strip_restore(z: Tensor, position: Tensor, residual: Tensor | None, image: Tensor | None) -> Tensor:
    from scx_kernels.kernels import rows

    return rows.strip_restore(z, position, residual, image=image)


@_strip_restore.register_fake
def _(z: Tensor, position: Tensor, residual: Tensor | None, image: Tensor | None) -> Tensor:
    check_rows(z, position, None, index_name="position")
    return z.new_empty(z.shape[0], position.shape[1], z.shape[2])


@_documented_by(reference.strip_restore)
def strip_restore(
    z: Tensor, position: Tensor, residual: Tensor | None = None, *, image: Tensor | None = None
) -> Tensor:
    if not _takes_triton(z, residual):
        return reference.strip_restore(z, position, residual, image=image)
    return _strip_restore(z, position, residual, image)


@torch.library.custom_op("scx_kernels::permuted_linear", mutates_args=())
def _permuted_linear(
    x: Tensor, weight: Tensor, row_index: Tensor, redundant: Tensor | None, bias: Tensor | None,
    noise: Tensor | None, image: Tensor | None,
) -> Tensor:  # fmt: skip
    from scx_kernels.kernels import product

    return product.permuted_linear(x, weight, row_index, redundant, bias, noise=noise, image=image)


@_permuted_linear.register_fake
def _(
    x: Tensor, weight: Tensor, row_index: Tensor, redundant: Tensor | None, bias: Tensor | None,
    noise: Tensor | None, image: Tensor | None,
) -> Tensor:  # fmt: skip
    check_rows(x, row_index, redundant)
    return x.new_empty(x.shape[0], row_index.shape[1], weight.shape[0])


@_documented_by(reference.permuted_linear)
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
    if not _takes_triton(x, weight, redundant, bias):
        return reference.permuted_linear(x, weight, row_index, redundant, bias, noise=noise, image=image)
    if noise is None and row_index.numel() > _FEW_ROWS and _backend == "auto":
        return F.linear(inject_permute(x, row_index, redundant), weight, bias)
    return _permuted_linear(x, weight, row_index, redundant, bias, noise, image)


@torch.library.custom_op("scx_kernels::qkv_decode_encode", mutates_args=())
def _qkv_decode_encode(
    z_q: Tensor, z_k: Tensor, z_v: Tensor, position: Tensor | None, cos: Tensor, sin: Tensor,
    query: Tensor, key: Tensor, value: Tensor, q_norm: Tensor | None, k_norm: Tensor | None, eps: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    from scx_kernels.kernels import qkv

    return qkv.qkv_decode_encode(
        z_q, z_k, z_v, position, cos, sin, query, key, value, q_norm=q_norm, k_norm=k_norm, eps=eps
    )


@_qkv_decode_encode.register_fake
def _(
    z_q: Tensor, z_k: Tensor, z_v: Tensor, position: Tensor | None, cos: Tensor, sin: Tensor,
    query: Tensor, key: Tensor, value: Tensor, q_norm: Tensor | None, k_norm: Tensor | None, eps: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    check_qkv(z_q, z_k, z_v, position, cos, sin, query, key, value, q_norm, k_norm)
    tokens = z_q.shape[1] if position is None else position.shape[1]

    def heads(index: Tensor) -> Tensor:
        return z_q.new_empty(index.shape[0], index.shape[1], tokens, index.shape[2])

    return heads(query), heads(key), heads(value)


@_documented_by(reference.qkv_decode_encode)
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
    if not _takes_triton(z_q, z_k, z_v, q_norm, k_norm):
        return reference.qkv_decode_encode(
            z_q, z_k, z_v, position, cos, sin, query, key, value, q_norm=q_norm, k_norm=k_norm, eps=eps
        )
    return _qkv_decode_encode(z_q, z_k, z_v, position, cos, sin, query, key, value, q_norm, k_norm, eps)


@torch.library.custom_op("scx_kernels::attention", mutates_args=())
def _attention(
    q: Tensor, k: Tensor, v: Tensor, softmax_scale: float, mask: Tensor | None, is_causal: bool,
    output_index: Tensor | None,
) -> Tensor:  # fmt: skip
    from scx_kernels.kernels import attention as kernels

    if q.shape[2] == 1 and mask is None:
        return kernels.attention_step(q, k, v, softmax_scale=softmax_scale, output_index=output_index)
    return kernels.attention(
        q, k, v, softmax_scale=softmax_scale, mask=mask, is_causal=is_causal, output_index=output_index
    )


@_attention.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, softmax_scale: float, mask: Tensor | None, is_causal: bool,
    output_index: Tensor | None,
) -> Tensor:  # fmt: skip
    check_attention(q, k, v, mask, is_causal)
    batch, heads, tokens, size = q.shape
    return q.new_empty(batch, tokens, heads, size).transpose(1, 2)


@_documented_by(reference.attention)
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
    # PyTorch's fused backends hold whole prompts and masks better; a lone query against a cache is the kernel's.
    by_backend = _backend == "auto" and (q.shape[2] > 1 or mask is not None)
    if by_backend or not _takes_triton(q, k, v):
        return reference.attention(
            q, k, v, softmax_scale=softmax_scale, mask=mask, is_causal=is_causal, output_index=output_index
        )
    check_attention(q, k, v, mask, is_causal)
    return _attention(q, k, v, softmax_scale, mask, is_causal, output_index)
