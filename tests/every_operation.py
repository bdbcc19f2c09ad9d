"""Arguments for every public operation: what tests of all of them share."""

from collections.abc import Callable
from typing import Any

import torch
from parity import DEVICE, integers, noise_steps, permutations, randn

import scx_kernels as ops


def sealed_by(batch: int, rows: int, layer: int = 1) -> ops.Sealing:
    return ops.Sealing(ops.key_words(bytes(range(32)), DEVICE), ops.WriteCounter().take(batch, rows, DEVICE), layer, 8)


def arguments(name: str, dtype: torch.dtype = torch.float32) -> tuple[tuple, dict]:
    """Arguments of an operation, with everything optional given that goes together."""
    if name in SEALED_NAMES:
        return sealed_arguments(name, dtype)
    x, redundant = randn(2, 5, 24, dtype=dtype), randn(2, 3, 24, dtype=dtype)
    row_index = permutations(2, 8)
    weight, bias = randn(16, 24, dtype=dtype), randn(16, dtype=dtype)
    if name == "inject_permute":
        return (x, row_index, redundant), {"norm_weight": randn(24, dtype=dtype), "eps": 1e-5, **noise_steps(2, 8, 24)}
    if name == "strip_restore":
        z, position = randn(2, 8, 24, dtype=dtype), row_index[:, :5].contiguous()
        return (z, position, x), {"image": randn(2, 8, 24)}
    if name == "permuted_linear":
        noise = randn(2, 8, 24)
        image, scatter = ops.noise_image(noise, weight), {"scatter_index": row_index, "out_rows": 5}
        return (x, weight, row_index, redundant, bias), {"noise": noise, "image": image, **scatter}
    if name == "permuted_linears":
        weights = [weight, randn(9, 24, dtype=dtype)]
        return (x, weights, row_index, redundant), {"biases": [bias, None]}
    if name.startswith("qkv"):
        rows = [randn(2, 8, n * 16, dtype=dtype) for n in (4, 2, 2)]
        angle = randn(1, 5, 8).repeat(1, 1, 2)
        tables = (row_index[:, :5].contiguous(), angle.cos().to(dtype), angle.sin().to(dtype))
        options = {"images": [randn(2, 8, n * 16) for n in (4, 2, 2)], "q_norm": randn(16, dtype=dtype)}
        options |= {"k_norm": randn(16, dtype=dtype), "eps": 1e-5}
        if name.startswith("qkv into"):
            caches = {key: torch.zeros(2, 2, 9, 16, dtype=dtype, device=rows[0].device) for key in ("keys", "values")}
            options |= {**caches, "offset": 3}
        if name == "qkv into a sealed cache":
            options |= {"sealing": sealed_by(2, 9), "return_unsealed": True}
        return (*rows, *tables, *(permutations(2, n, 16) for n in (4, 2, 2))), options
    q, k, v = (randn(2, n, 5, 16, dtype=dtype) for n in (4, 2, 2))
    if name == "attention_step":
        lengths = {
            "kv_start": integers(0, 1),
            "kv_length": integers(4, 3),
            "window": 3,
            "position": row_index[:, :4] % 5,
        }
        return (q[:, :, :1], k, v), {"softmax_scale": 0.25, **lengths, "output_index": permutations(2, 4, 16)}
    if name.startswith("unlock"):
        return (), {"cache": k, "position": permutations(2, 5)[:, :4], "in_place": name == "unlock in place"}
    options = {"softmax_scale": 0.25, "is_causal": True, "output_index": permutations(2, 4, 16)}
    if name == "attention into the next encoding":
        limits = {"window": 3, "kv_start": integers(0, 1), "kv_length": integers(5, 3)}
        options |= {**limits, "row_index": row_index, "redundant": randn(2, 3, 64, dtype=dtype)}
    return (q, k, v), options


def sealed_arguments(name: str, dtype: torch.dtype) -> tuple[tuple, dict]:
    """Those of `SEALED_NAMES`."""
    own, x = sealed_by(1, 5), randn(1, 1, 5, 16, dtype=dtype)
    if name == "random_bits":
        return (own.key, integers(1, 2, 3, 4, 5, 6).view(2, 3), 37), {"rounds": 8}
    if name == "seal":
        return (x, own), {"is_value": True}
    if name == "reseal":
        return (x, own, sealed_by(1, 5, layer=2)), {"is_value": False}
    q, v = randn(1, 2, 5, 16, dtype=dtype), randn(1, 1, 5, 16, dtype=dtype)
    stored = ops.seal(x, own, is_value=False), ops.seal(v, own, is_value=True)
    if name.startswith("attention_step"):
        return (q[:, :, :1], *stored), {"softmax_scale": 0.25, "kv_length": integers(4), "sealing": own}
    return (q, *stored), {"softmax_scale": 0.25, "is_causal": True, "sealing": own}


NAMES = [
    "inject_permute",
    "strip_restore",
    "permuted_linear",
    "permuted_linears",
    "qkv_decode_encode",
    "qkv into a cache",
    "qkv into a sealed cache",
    "attention",
    "attention into the next encoding",
    "attention_step",
    "unlock",
    "unlock in place",
]
SEALED_NAMES = ["seal", "reseal", "random_bits", "attention on a sealed cache", "attention_step on a sealed cache"]


def operation(name: str) -> Callable[..., Any]:
    first = name.split()[0]
    return getattr(ops, "qkv_decode_encode" if first == "qkv" else first)
