"""Operations of SCX on encoded tensors. They know tensors and index arrays; no models, no keys."""

from scx_kernels.checks import check_permutation
from scx_kernels.operations import (
    attention,
    backend,
    inject_permute,
    permuted_linear,
    qkv_decode_encode,
    strip_restore,
)
from scx_kernels.reference import accumulation_dtype, linear, noise_image, permute_features, rotary_permute

__all__ = [
    "accumulation_dtype",
    "attention",
    "backend",
    "check_permutation",
    "inject_permute",
    "linear",
    "noise_image",
    "permute_features",
    "permuted_linear",
    "qkv_decode_encode",
    "rotary_permute",
    "strip_restore",
]
