"""Operations of SCX on encoded tensors. They know tensors and index arrays; no models, no keys."""

from scx_kernels.checks import check_permutation
from scx_kernels.operations import (
    attention,
    attention_step,
    backend,
    inject_permute,
    noise_image,
    permuted_linear,
    permuted_linears,
    qkv_decode_encode,
    strip_restore,
    unlock,
)
from scx_kernels.reference import accumulation_dtype, permute_features, rotary_permute

__all__ = [
    "accumulation_dtype",
    "attention",
    "attention_step",
    "backend",
    "check_permutation",
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
