"""Operations of SCX on encoded tensors. They know tensors and index arrays; no models, no keys."""

from scx_kernels.checks import check_permutation
from scx_kernels.kept import KeptKeystream
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
from scx_kernels.sealed_operations import random_bits, reseal, seal, unseal
from scx_kernels.sealing import Sealing, WriteCounter, key_words

__all__ = [
    "KeptKeystream",
    "Sealing",
    "WriteCounter",
    "accumulation_dtype",
    "attention",
    "attention_step",
    "backend",
    "check_permutation",
    "inject_permute",
    "key_words",
    "noise_image",
    "permute_features",
    "permuted_linear",
    "permuted_linears",
    "qkv_decode_encode",
    "random_bits",
    "reseal",
    "rotary_permute",
    "seal",
    "strip_restore",
    "unlock",
    "unseal",
]
