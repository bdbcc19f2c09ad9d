"""The launches that are compiled offline: representative shapes on tensors without memory."""

import torch

from scx_kernels.kernels import attention, product, qkv, rows, sealing, unlock
from scx_kernels.sealing import Sealing


def meta(*shape, dtype=torch.bfloat16):
    return torch.empty(shape, dtype=dtype, device="meta")


def index(*shape):
    return meta(*shape, dtype=torch.int64)


def inject(features, norm, noisy):
    def call(dtype):
        rows.inject_permute(
            meta(2, 4096, features, dtype=dtype),
            index(2, 4224),
            meta(2, 128, features, dtype=dtype),
            norm_weight=meta(features, dtype=dtype) if norm else None,
            noise=meta(4224, features, dtype=torch.float32) if noisy else None,
        )

    return call


def reorder(heads, size, decoys):
    def call(dtype):
        encoded = 4096 + decoys
        redundant = meta(2, decoys, heads * size, dtype=dtype) if decoys else None
        features = index(2, heads, size)
        rows.inject_permute(
            meta(2, 4096, heads * size, dtype=dtype), index(2, encoded), redundant, feature_index=features
        )

    return call


def norm_alone(features):
    def call(dtype):
        rows.inject_permute(meta(2, 1, features, dtype=dtype), None, norm_weight=meta(features, dtype=dtype))

    return call


def strip(features, noisy):
    def call(dtype):
        rows.strip_restore(
            meta(2, 4224, features, dtype=torch.float32 if noisy else dtype),
            index(2, 4096),
            meta(2, 4096, features, dtype=dtype),
            image=meta(4224, features, dtype=torch.float32) if noisy else None,
            dtype=dtype,
        )

    return call


def sealed(batch, tokens, rounds):
    if not rounds:
        return None
    return Sealing(meta(8, dtype=torch.int32), index(batch, tokens), 3, rounds)


def transcode(tokens, heads, groups, size, norm=False, noisy=False, offsets=False, rounds=0, opens=False):
    """opens: the first tokens of a sealed cache, whose K and V are also returned unsealed."""

    def call(dtype):
        z_dtype, encoded = torch.float32 if noisy else dtype, tokens + 128
        z = meta(2, encoded, (heads + 2 * groups) * size, dtype=z_dtype)
        widths = [heads * size, groups * size, groups * size]
        weight = meta(size, dtype=dtype) if norm else None
        qkv.qkv_decode_encode(
            *z.split(widths, dim=-1),
            index(2, tokens),
            meta(1, tokens, size, dtype=dtype),
            meta(1, tokens, size, dtype=dtype),
            *(index(2, n, size) for n in (heads, groups, groups)),
            images=tuple(meta(encoded, width, dtype=torch.float32) for width in widths) if noisy else None,
            q_norm=weight,
            k_norm=weight,
            keys=meta(2, groups, 8192, size, dtype=dtype),
            values=meta(2, groups, 8192, size, dtype=dtype),
            **({"offsets": index(2)} if offsets else {"offset": 0 if opens else 17}),
            sealing=sealed(2, 8192, rounds),
            return_unsealed=opens,
        )

    return call


def prefill(
    heads, groups, tokens, keys, size, window=None, lengths=False, permuted=False, mask=False, rounds=0, decoys=128
):
    def call(dtype):
        rows = heads * size
        q, k, v = (meta(2, m, n, size, dtype=dtype) for m, n in ((heads, tokens), (groups, keys), (groups, keys)))
        attention.attention(
            q,
            k,
            v,
            softmax_scale=0.1,
            is_causal=not mask,
            mask=meta(2, 1, tokens, keys, dtype=torch.bool) if mask else None,
            window=window,
            kv_start=index(2) if lengths else None,
            kv_length=index(2) if lengths else None,
            output_index=index(2, heads, size),
            row_index=index(2, tokens + decoys) if permuted else None,
            redundant=meta(2, decoys, rows, dtype=dtype) if permuted and decoys else None,
            sealing=sealed(2, keys, rounds),
        )

    return call


def starting(heads, groups, tokens, size):
    """What the untrusted side of two parties asks: where each sequence begins, nothing about features."""

    def call(dtype):
        q, k, v = (meta(2, n, tokens, size, dtype=dtype) for n in (heads, groups, groups))
        attention.attention(q, k, v, softmax_scale=0.1, is_causal=True, kv_start=index(2))
        cache = meta(2, groups, 8192, size, dtype=dtype)
        attention.attention_step(q[:, :, :1], cache, cache, softmax_scale=0.1, kv_start=index(2))

    return call


def step(batch, heads, groups, tokens, capacity, size, permuted=False, rounds=0):
    def call(dtype):
        attention.attention_step(
            meta(batch, heads, tokens, size, dtype=dtype),
            meta(batch, groups, capacity, size, dtype=dtype),
            meta(batch, groups, capacity, size, dtype=dtype),
            softmax_scale=0.1,
            output_index=index(batch, heads, size),
            kv_length=index(batch),
            position=index(batch, capacity - 128) if permuted else None,
            sealing=sealed(batch, capacity, rounds),
        )

    return call


def shared(batch, tokens, inner, *widths):
    def call(dtype):
        weights = [meta(width, inner, dtype=dtype) for width in widths]
        product.permuted_linears(meta(batch, tokens, inner, dtype=dtype), weights)

    return call


def locked(heads, size, in_place):
    def call(dtype):
        unlock.unlock(meta(2, heads, 8192, size, dtype=dtype), index(2, 8064), in_place=in_place)

    return call


def linear(batch, tokens, decoys, inner, columns, noisy=False, strip=False, added=False):
    def call(dtype):
        encoded = tokens + decoys
        product.permuted_linear(
            meta(batch, tokens, inner, dtype=torch.float32 if added else dtype),
            meta(columns, inner, dtype=dtype),
            index(batch, encoded),
            meta(batch, decoys, inner, dtype=torch.float32 if added else dtype) if decoys else None,
            meta(columns, dtype=dtype),
            noise=meta(encoded, inner, dtype=torch.float32) if noisy else None,
            image=meta(encoded, columns, dtype=torch.float32) if noisy or added else None,
            scatter_index=index(batch, encoded) if strip else None,
            out_rows=tokens if strip else None,
        )

    return call


def seal(batch, groups, tokens, size, rounds):
    def call(dtype):
        sealing.seal(meta(batch, groups, tokens, size, dtype=dtype), sealed(batch, tokens, rounds), is_value=True)

    return call


def reseal(batch, groups, tokens, size, rounds):
    def call(dtype):
        old, new = sealed(batch, tokens, rounds), sealed(batch, tokens, rounds)
        sealing.reseal(meta(batch, groups, tokens, size, dtype=dtype), old, new, is_value=True)

    return call


def bits(streams, count):
    def call(dtype):
        sealing.random_bits(meta(8, dtype=torch.int32), index(streams, 3), count)

    return call


# Patterns of 16 bits are the same to a cipher, whatever they mean.
SEALED = {"dtypes": ("fp32", "fp16"), "keystreams": 1}
# Where the cipher runs: in the loops over heads of K and of V; over whole tiles of keys and over those at the edge, in
# each of which K and V are a tile; and over keys, also where a mask is given.
QKV = {"loops": 2, "tiles": 2, "tile_rows": "BLOCK_S"}
PREFILL = {"loops": 2, "tiles": 4, "tile_rows": "BLOCK_N"}
MASKED = {"loops": 1, "tiles": 2, "tile_rows": "BLOCK_N"}
STEP = {"loops": 1, "tiles": 2, "tile_rows": "BLOCK_N"}

CASES = [
    {"name": "inject 4096", "call": inject(4096, False, False), "quick": True},
    {"name": "inject 576", "call": inject(576, False, False)},
    {"name": "inject 4096 norm", "call": inject(4096, True, False), "quick": True},
    {"name": "inject 4096 norm noise", "call": inject(4096, True, True)},
    {"name": "inject 16384 norm noise", "call": inject(16384, True, True)},
    {"name": "inject 18432 norm noise", "call": inject(18432, True, True)},
    {"name": "inject 1 4096 norm", "call": norm_alone(4096)},
    {"name": "reorder 32x128", "call": reorder(32, 128, 128), "quick": True},
    {"name": "reorder 9x64", "call": reorder(9, 64, 0)},
    {"name": "reorder 32x80", "call": reorder(32, 80, 128)},
    {"name": "unlock 8x128", "call": locked(8, 128, False), "quick": True},
    {"name": "unlock 3x80 in place", "call": locked(3, 80, True)},
    {"name": "strip 4096", "call": strip(4096, False), "quick": True},
    {"name": "strip 4096 noise", "call": strip(4096, True)},
    {"name": "strip 576", "call": strip(576, False)},
    {"name": "qkv 4096 32x8x128", "call": transcode(4096, 32, 8, 128), "quick": True},
    {"name": "qkv 4096 32x8x128 norm noise", "call": transcode(4096, 32, 8, 128, True, True), "quick": True},
    {"name": "qkv 512 9x3x64", "call": transcode(512, 9, 3, 64)},
    {"name": "qkv 512 32x32x80", "call": transcode(512, 32, 32, 80)},
    {"name": "qkv 512 32x32x96 norm", "call": transcode(512, 32, 32, 96, True)},
    {"name": "qkv 512 8x4x256 noise", "call": transcode(512, 8, 4, 256, False, True)},
    {"name": "qkv 1 32x8x128", "call": transcode(1, 32, 8, 128, offsets=True)},
    {"name": "attention 4096 128", "call": prefill(32, 8, 4096, 4096, 128), "matrix": "HGMMA", "quick": True},
    {"name": "attention 4096 128 encoded", "call": prefill(32, 8, 4096, 4096, 128, permuted=True), "matrix": "HGMMA"},
    {
        "name": "attention 4096 128 window lengths",
        "call": prefill(32, 8, 4096, 4096, 128, 1024, True),
        "matrix": "HGMMA",
    },
    {"name": "attention 1024 128 mask", "call": prefill(32, 8, 1024, 1024, 128, mask=True), "matrix": "HGMMA"},
    {
        "name": "attention 4096 64",
        "call": prefill(9, 3, 4096, 4096, 64, permuted=True),
        "matrix": "HGMMA",
        "quick": True,
    },
    {"name": "attention 4096 80", "call": prefill(32, 32, 4096, 4096, 80), "matrix": "HGMMA", "quick": True},
    {"name": "attention 4096 96", "call": prefill(32, 32, 4096, 4096, 96, permuted=True), "matrix": "HGMMA"},
    {
        "name": "attention 4096 128 encoded, no redundant rows",
        "call": prefill(32, 8, 4096, 4096, 128, permuted=True, decoys=0),
        "matrix": "HGMMA",
    },
    {"name": "attention 4096 128 starts", "call": starting(32, 8, 4096, 128), "matrix": "MMA"},
    {"name": "attention 4096 192", "call": prefill(32, 32, 4096, 4096, 192), "matrix": "HGMMA"},
    {"name": "attention 4096 256", "call": prefill(16, 8, 4096, 4096, 256, 1024, permuted=True), "matrix": "HGMMA"},
    {"name": "attention 40 128", "call": prefill(32, 8, 40, 4096, 128), "matrix": "HGMMA"},
    {"name": "step 1 8192 128", "call": step(1, 32, 8, 1, 8192, 128), "matrix": "MMA", "quick": True},
    {"name": "step 8 65536 128 permuted", "call": step(8, 32, 8, 1, 65536, 128, True), "matrix": "MMA", "quick": True},
    {"name": "step 4 8192 80", "call": step(4, 32, 32, 4, 8192, 80), "matrix": "MMA"},
    {"name": "step 1 8192 256", "call": step(1, 16, 8, 16, 8192, 256, True), "matrix": "MMA"},
    {"name": "step 1 8192 64", "call": step(1, 9, 3, 1, 8192, 64), "matrix": "MMA"},
    {"name": "product 4224 4096 6144", "call": linear(1, 4096, 128, 4096, 6144), "matrix": "HGMMA", "quick": True},
    {
        "name": "product 4224 4096 6144 noise",
        "call": linear(1, 4096, 128, 4096, 6144, True),
        "matrix": "HGMMA",
        "quick": True,
    },
    {"name": "product 4224 4096 6144 strip", "call": linear(1, 4096, 128, 4096, 6144, strip=True), "matrix": "HGMMA"},
    {"name": "product 300 577 960", "call": linear(2, 140, 10, 577, 960), "matrix": "HGMMA"},
    {"name": "product 300 4096 4096 noise", "call": linear(2, 140, 10, 4096, 4096, True), "matrix": "HGMMA"},
    {"name": "product 1 4096 6144", "call": linear(1, 1, 0, 4096, 6144), "matrix": "HGMMA", "quick": True},
    {"name": "product 16 4096 4096 noise", "call": linear(1, 12, 4, 4096, 4096, True), "matrix": "HGMMA"},
    {"name": "product 33 577 1024", "call": linear(1, 30, 3, 577, 1024), "matrix": "HGMMA"},
    {"name": "product 64 4096 1024", "call": linear(4, 16, 0, 4096, 1024), "matrix": "HGMMA"},
    {"name": "product 1 4096 q k v", "call": shared(1, 1, 4096, 4096, 1024, 1024), "matrix": "HGMMA", "quick": True},
    {"name": "product 64 576 q k v", "call": shared(1, 64, 576, 576, 192, 192), "matrix": "HGMMA"},
    {
        "name": "product 4224 4096 6144 noisy rows",
        "call": linear(1, 4096, 128, 4096, 6144, added=True),
        "matrix": "HGMMA",
    },
    {"name": "step 4 4096 128 many rows", "call": step(4, 32, 4, 8, 4096, 128), "matrix": "MMA"},
    {"name": "step 4 4096 96 many rows", "call": step(4, 32, 4, 8, 4096, 96, True), "matrix": "MMA"},
    {"name": "product 64 4096 6144 noise", "call": linear(1, 60, 4, 4096, 6144, True), "matrix": "HGMMA"},
    {"name": "seal 8 8192 128 rounds 20", "call": seal(1, 8, 8192, 128, 20), **SEALED},
    {"name": "seal 8 8192 128 rounds 12", "call": seal(1, 8, 8192, 128, 12), **SEALED},
    {"name": "seal 8 8192 128 rounds 8", "call": seal(1, 8, 8192, 128, 8), **SEALED},
    {"name": "seal 8 1 128 rounds 20", "call": seal(1, 8, 1, 128, 20), **SEALED, "dtypes": ("fp16",)},
    {"name": "seal 3 8192 64 rounds 20", "call": seal(8, 3, 8192, 64, 20), **SEALED, "dtypes": ("fp32",)},
    {"name": "seal 32 4096 80 rounds 20", "call": seal(1, 32, 4096, 80, 20), **SEALED, "dtypes": ("fp16",)},
    {
        "name": "seal 32 4096 96 rounds 8",
        "call": seal(1, 32, 4096, 96, 8),
        **SEALED,
        "dtypes": ("fp16",),
        "quick": True,
    },
    {"name": "seal 8 4096 256 rounds 20", "call": seal(1, 8, 4096, 256, 20), **SEALED, "dtypes": ("fp32",)},
    {"name": "reseal 8 8192 128 rounds 20", "call": reseal(1, 8, 8192, 128, 20), **SEALED, "keystreams": 2},
    {"name": "random bits", "call": bits(64, 4096), **SEALED, "dtypes": ("fp32",)},
    {"name": "sealed qkv 4096 32x8x128", "call": transcode(4096, 32, 8, 128, rounds=20), **QKV},
    {"name": "sealed qkv 1 32x8x128", "call": transcode(1, 32, 8, 128, offsets=True, rounds=20), **QKV},
    {"name": "sealed qkv 512 32x32x80", "call": transcode(512, 32, 32, 80, rounds=8), **QKV},
    {
        "name": "opening qkv 4096 32x8x128",
        "call": transcode(4096, 32, 8, 128, rounds=20, opens=True),
        "quick": True,
        **QKV,
    },
    {"name": "opening qkv 4096 32x8x128 norm", "call": transcode(4096, 32, 8, 128, True, rounds=8, opens=True), **QKV},
    {"name": "opening qkv 512 32x32x80", "call": transcode(512, 32, 32, 80, rounds=8, opens=True), **QKV},
    {"name": "opening qkv 512 9x3x64", "call": transcode(512, 9, 3, 64, rounds=20, opens=True), **QKV},
    {"name": "opening qkv 512 8x4x256", "call": transcode(512, 8, 4, 256, rounds=12, opens=True), **QKV},
    {
        "name": "sealed attention 4096 128",
        "call": prefill(32, 8, 4096, 4096, 128, rounds=8),
        "matrix": "HGMMA",
        **PREFILL,
    },
    {
        "name": "sealed attention 1024 9217 128",
        "call": prefill(32, 8, 1024, 9217, 128, mask=True, rounds=20),
        "matrix": "HGMMA",
        **MASKED,
    },
    {
        "name": "sealed turn 1024 9217 128, no redundant rows",
        "call": prefill(32, 8, 1024, 9217, 128, permuted=True, mask=True, rounds=20, decoys=0),
        "matrix": "HGMMA",
        "quick": True,
        **MASKED,
    },
    {
        "name": "sealed turn 1024 9217 128",
        "call": prefill(32, 8, 1024, 9217, 128, permuted=True, mask=True, rounds=8),
        "matrix": "HGMMA",
        **MASKED,
    },
    {
        "name": "sealed turn 33 9217 80",
        "call": prefill(32, 32, 33, 9217, 80, permuted=True, mask=True, rounds=8),
        "matrix": "HGMMA",
        **MASKED,
    },
    {
        "name": "sealed turn 33 9217 256, no redundant rows",
        "call": prefill(8, 4, 33, 9217, 256, permuted=True, mask=True, rounds=12, decoys=0),
        "matrix": "HGMMA",
        **MASKED,
    },
    {
        "name": "sealed padded token 9217 64",
        "call": prefill(9, 3, 1, 9217, 64, mask=True, rounds=20),
        "matrix": "HGMMA",
        **MASKED,
    },
    {
        "name": "sealed step 1 8192 128 rounds 12",
        "call": step(1, 32, 8, 1, 8192, 128, rounds=12),
        "matrix": "MMA",
        **STEP,
    },
    {
        "name": "sealed step 1 8192 128 rounds 8",
        "call": step(1, 32, 8, 1, 8192, 128, rounds=8),
        "matrix": "MMA",
        **STEP,
    },
    {
        "name": "sealed attention 4096 80",
        "call": prefill(32, 32, 4096, 4096, 80, rounds=20),
        "matrix": "HGMMA",
        **PREFILL,
    },
    {"name": "sealed step 1 8192 128", "call": step(1, 32, 8, 1, 8192, 128, rounds=20), "matrix": "MMA", **STEP},
    {
        "name": "sealed step 8 65536 128 permuted",
        "call": step(8, 32, 8, 1, 65536, 128, True, 8),
        "matrix": "MMA",
        **STEP,
    },
    {"name": "sealed step 4 8192 80", "call": step(4, 32, 32, 4, 8192, 80, rounds=8), "matrix": "MMA", **STEP},
    {"name": "sealed step 4 4096 96", "call": step(4, 32, 4, 8, 4096, 96, rounds=8), "matrix": "MMA", **STEP},
    {
        "name": "sealed attention 4096 160",
        "call": prefill(32, 32, 4096, 4096, 160, rounds=20),
        "matrix": "HGMMA",
        **PREFILL,
    },
    {"name": "sealed step 4 8192 160", "call": step(4, 16, 8, 1, 8192, 160, rounds=20), "matrix": "MMA", **STEP},
    {"name": "sealed step 4 8192 192", "call": step(4, 16, 8, 1, 8192, 192, rounds=8), "matrix": "MMA", **STEP},
    {"name": "sealed step 1 8192 64", "call": step(1, 9, 3, 1, 8192, 64, rounds=20), "matrix": "MMA", **STEP},
    {"name": "sealed step 1 8192 256", "call": step(1, 16, 8, 16, 8192, 256, rounds=8), "matrix": "MMA", **STEP},
]
