"""Operations of SCX on encoded tensors. They know tensors and index arrays; no models, no keys."""

from scx_kernels.checks import check_permutation
from scx_kernels.reference import (
    accumulation_dtype,
    attention,
    inject_permute,
    linear,
    noise_image,
    permute_features,
    permuted_linear,
    rotary_permute,
    strip_restore,
)

__all__ = [
    "accumulation_dtype",
    "attention",
    "check_permutation",
    "inject_permute",
    "linear",
    "noise_image",
    "permute_features",
    "permuted_linear",
    "rotary_permute",
    "strip_restore",
]
