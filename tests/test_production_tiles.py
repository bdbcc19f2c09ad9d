"""Every kernel with the tile that its heuristic chooses for a real model, on the smallest shape that fills one such
tile and begins another, in every encoding. The other tests of kernels force small tiles, which need no matrix unit, no
pipelined loads and no programs that share a sum; these tiles are the ones that users run.

The tile comes from the heuristic at the real shape, for the GPU that is here, or for an H200. `real` names that shape.
"""

from collections.abc import Callable
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import parity
import pytest
import torch
from parity import (
    DEVICE,
    DTYPES,
    assert_close,
    assert_same_bits,
    integers,
    inverse,
    nans,
    noise_steps,
    permutations,
    randn,
    run_kernel,
)
from plain_attention import plain_attention, seen_keys
from torch import Tensor

from scx_kernels import Sealing, WriteCounter, key_words, reference, sealing
from scx_kernels.kernels import attention, launch, product, qkv, rows, unlock
from scx_kernels.kernels import sealing as seals

TARGET = launch.target_of(DEVICE)
ROUNDS = (8, 12, 20)
# What a case gives: the launch, and the check of what came out.
Prepared = tuple[Callable[[], Any], Callable[[Any], None]]


def sealed_by(batch: int, capacity: int, rounds: int) -> Sealing | None:
    if not rounds:
        return None
    return Sealing(key_words(bytes(range(32)), DEVICE), WriteCounter(3).take(batch, capacity, DEVICE), 5, rounds)


def linear(
    dtype: torch.dtype, real: tuple[int, int, int], noisy: bool = False, groups: bool = False, strip: bool = False,
    aligned: bool = True, rest: int = 0,
) -> Prepared:  # fmt: skip
    """real: rows, columns, inner. groups: more row blocks than are taken together. rest: of a block of inner."""
    tile = product.matmul_tile(*real, dtype, noisy, aligned, TARGET)
    count = min(real[0], (8 * groups + 1) * tile["BLOCK_M"] + 3)
    columns, inner = tile["BLOCK_N"] + 8, (1 if groups else 2) * tile["SPLIT_K"] * tile["BLOCK_K"] + rest
    decoys = count // 5
    x = randn(1, count - decoys, inner, dtype=dtype, layout="plain" if aligned else "sliced")
    redundant = randn(1, decoys, inner, dtype=dtype) if decoys else None
    weight, bias = randn(columns, inner, dtype=dtype) / inner**0.5, randn(columns, dtype=dtype)
    row_index = permutations(1, count)
    given = (x, weight, row_index, redundant, bias)
    options: dict[str, Any] = {}
    if noisy:
        noise = 8 * randn(count, inner)
        image = reference.noise_image(noise[None].double(), weight.double())[0].float()
        options |= {"noise": noise, "image": image}
    if strip:
        options |= {"scatter_index": row_index, "out_rows": count - decoys}
    out = nans(1, count - decoys if strip else count, columns, dtype=dtype)

    def check(got: Tensor) -> None:
        # Noise that is taken off two half-precision terms leaves twice the error of the product without any.
        terms = {name: options[name] for name in ("noise", "image") if noisy and dtype == torch.float32}
        plain = reference.permuted_linear(*given, **terms)
        wide = dict(zip(terms, parity.wide(*terms.values()), strict=True))
        exact = reference.permuted_linear(*parity.wide(*given), **wide)
        if strip:
            plain, exact = (z.gather(1, inverse(row_index)[..., None].expand(z.shape)) for z in (plain, exact))
        assert_close(got, plain[:, : got.shape[1]], exact[:, : got.shape[1]])

    return partial(run_kernel, partial(product.permuted_linear, tile=tile), *given, **options, out=out), check


def linears(dtype: torch.dtype, real: tuple[int, int, int]) -> Prepared:
    """Three weights, of a tile and a part, a tile, and a part of one."""
    tile = product.matmul_tile(*real, dtype, False, True, TARGET)
    inner = tile["SPLIT_K"] * tile["BLOCK_K"] + 8
    widths = [tile["BLOCK_N"] + 8, tile["BLOCK_N"], 24]
    x, weights = randn(1, real[0], inner, dtype=dtype), [randn(width, inner, dtype=dtype) for width in widths]

    def check(got: Tensor) -> None:
        for part, weight in zip(got.split(widths, dim=2), weights, strict=True):
            assert_close(part, *(reference.permuted_linear(*g) for g in ((x, weight), parity.wide(x, weight))))

    return partial(run_kernel, partial(product.permuted_linears, tile=tile), x, weights), check


def prompt(
    dtype: torch.dtype, real: tuple[int, int], rounds: int = 0, window: int | None = None, masked: bool = False,
    onward: bool = False,
) -> Prepared:  # fmt: skip
    """real: tokens, head size. onward: into the next encoding, among redundant rows."""
    hidden = window is not None or masked
    tile = attention.attention_tile(*real, dtype, hidden, rounds > 0, TARGET)
    size, tokens = real[1], min(real[0], tile["BLOCK_M"] + 5)
    keys, heads = tokens + (0 if tokens > tile["BLOCK_M"] else tile["BLOCK_N"] + 3), 1 if rounds else 2
    causal = not masked and rounds <= 8
    if rounds > 8:  # what is asked again, of more rounds, is asked of fewer tiles
        tokens, keys = tile["BLOCK_M"], tile["BLOCK_N"] + 3
    q, k, v = (randn(1, n, m, size, dtype=dtype) for n, m in ((heads, tokens), (1, keys), (1, keys)))
    index, own = permutations(1, heads, size), sealed_by(1, keys, rounds)
    mask = torch.rand(1, 1, tokens, keys, device=DEVICE) < 0.5 if masked else None
    options = {"softmax_scale": 0.1, "mask": mask, "is_causal": causal, "window": window, "output_index": index}
    row_index, redundant = permutations(1, tokens + 9), randn(1, 9, heads * size, dtype=dtype)
    stored = (k, v)
    if own is not None:
        stored = sealing.seal(k, own, is_value=False), sealing.seal(v, own, is_value=True)
    launcher = partial(attention.attention, tile=tile)
    if onward:
        options |= {"row_index": row_index, "redundant": redundant}
        out = nans(1, tokens + 9, heads * size, dtype=dtype)
    else:
        out = nans(1, heads, tokens, size, dtype=dtype)

    def check(got: Tensor) -> None:
        if own is not None:
            assert_same_bits(got, launcher(q, k, v, **options))
        if onward:
            in_order = got.gather(1, inverse(row_index)[..., None].expand(got.shape))
            assert_same_bits(in_order[:, tokens:], redundant)
            got = in_order[:, :tokens].unflatten(-1, (heads, size)).transpose(1, 2)
        seen = seen_keys(1, tokens, keys, causal=causal, window=window) if mask is None else mask
        plain, exact = (plain_attention(*x, seen, 0.1, index) for x in ((q, k, v), parity.wide(q, k, v)))
        assert_close(got, plain, exact)

    return partial(run_kernel, launcher, q, *stored, **options, sealing=own, out=out), check


def step(
    dtype: torch.dtype, real: tuple[int, int, int, int, int], tokens: int = 1, permuted: bool = False, rounds: int = 0
) -> Prepared:
    """real: sequences, key heads, query rows for each (heads of its group times tokens), keys, head size."""
    _, _, count, _, size = real
    tile = attention.step_tile(*real, dtype, permuted, rounds > 0, TARGET)
    splits, heads = tile["splits"], count // tokens
    # Two tiles for the first programs and none for the last; where programs are many, none for most.
    keys = (2 if rounds > 8 else 3 if splits > 4 or (rounds and permuted) else splits + 1) * tile["BLOCK_N"] - 9
    q, k, v = (randn(1, n, m, size, dtype=dtype) for n, m in ((heads, tokens), (1, keys), (1, keys)))
    own, options = sealed_by(1, keys, rounds), {"softmax_scale": 0.1, "output_index": permutations(1, heads, size)}
    stored = (k, v)
    if own is not None:
        stored = sealing.seal(k, own, is_value=False), sealing.seal(v, own, is_value=True)
    start, end = integers(2), integers(keys - 1)
    options |= {"kv_start": start, "kv_length": end - start}
    launcher, order = partial(attention.attention_step, tile=tile), torch.arange(keys, device=DEVICE)[None]
    if permuted:
        order = options["position"] = permutations(1, keys)

    def check(got: Tensor) -> None:
        if own is not None:
            assert_same_bits(got, launcher(q, k, v, **options))
        seen = seen_keys(1, tokens, keys, causal=True, start=start, end=end, aligned_to_end=True)
        states = [x.gather(2, order[:, None, :, None].expand(x.shape)) for x in (k, v)]
        given = (q, *states)
        plain, exact = (plain_attention(*x, seen, 0.1, options["output_index"]) for x in (given, parity.wide(*given)))
        assert_close(got, plain, exact)

    return partial(run_kernel, launcher, q, *stored, **options, sealing=own), check


def transcode(
    dtype: torch.dtype, real: tuple[int, int, int], norm: bool = False, noisy: bool = False, rounds: int = 0
) -> Prepared:
    """real: tokens, heads of Q, K and V together, head size. Into a cache at an offset of each sequence."""
    tile, size = qkv.qkv_tile(*real, dtype, noisy, rounds > 0, TARGET), real[2]
    tokens, heads, groups = min(real[0], tile["BLOCK_S"] + 3), tile["HEADS"] + 1, 1
    z = [randn(1, tokens + 4, n * size, dtype=torch.float32 if noisy else dtype) for n in (heads, groups, groups)]
    images = [randn(tokens + 4, x.shape[2]) for x in z] if noisy else None
    angle = 10 * randn(1, tokens, size // 2).repeat(1, 1, 2)
    given = [*z, permutations(1, tokens + 4)[:, :tokens], angle.cos().to(dtype), angle.sin().to(dtype)]
    given += [permutations(1, n, size) for n in (heads, groups, groups)]
    weights = {name: randn(size, dtype=dtype) for name in ("q_norm", "k_norm")} if norm else {}
    keys, values = (nans(1, groups, tokens + 5, size, dtype=dtype) for _ in range(2))
    own, written = sealed_by(1, tokens + 5, rounds), slice(2, tokens + 2)
    slots = {"keys": keys, "values": values, "offsets": integers(2), "sealing": own, "return_unsealed": bool(own)}

    def check(got: tuple[Tensor, ...]) -> None:
        options = {"images": images, **weights, "dtype": dtype}
        plain = reference.qkv_decode_encode(*given, **options)
        options = {"images": images and parity.wide(*images), "dtype": torch.float64}
        options |= {name: weight.double() for name, weight in weights.items()}
        exact = reference.qkv_decode_encode(*parity.wide(*given), **options)
        opened = [keys, values]
        if own is not None:
            opened = [sealing.unseal(x, own, is_value=is_value) for x, is_value in ((keys, False), (values, True))]
            for x, fresh in zip(opened, got[1:], strict=True):
                assert_same_bits(x[:, :, written], fresh)
        for x, p, e in zip((got[0], *(x[:, :, written] for x in opened)), plain, exact, strict=True):
            assert_close(x, p, e)
        for cache in (keys, values):
            assert cache[:, :, :2].isnan().all(), "wrote before the offset"
            assert cache[:, :, tokens + 2 :].isnan().all(), "wrote behind the tokens"

    launcher = partial(qkv.qkv_decode_encode, tile=tile)
    return partial(run_kernel, launcher, *given, images=images, **weights, dtype=dtype, **slots), check


def inject(
    dtype: torch.dtype, real: int, norm: bool = False, noisy: bool = False, heads: int = 0, part: int = 0
) -> Prepared:
    """real: features of a row, or of a head where heads are reordered. part: features past the tile's."""
    tile = rows.inject_tile(real, dtype, norm, noisy, TARGET)
    features = heads * real if heads else real if not part else tile["BLOCK_D"] + part
    tokens, decoys = tile["BLOCK_M"] + 1, 2
    x, redundant = (randn(1, count, features, dtype=dtype) for count in (tokens, decoys))
    row_index = permutations(1, tokens + decoys)
    options = {
        "norm_weight": randn(features, dtype=dtype) if norm else None,
        "feature_index": permutations(1, heads, real) if heads else None,
        **(noise_steps(tokens + decoys, features) if noisy else {}),
    }
    out = nans(1, tokens + decoys, features, dtype=torch.float32 if noisy else dtype)

    def check(got: Tensor) -> None:
        plain = reference.inject_permute(x, row_index, redundant, **options)
        wide = dict(zip(options, parity.wide(*options.values()), strict=True))
        assert_close(got, plain, reference.inject_permute(x.double(), row_index, redundant.double(), **wide), dtype)

    launcher = partial(rows.inject_permute, tile=tile)
    return partial(run_kernel, launcher, x, row_index, redundant, **options, out=out), check


def strip(dtype: torch.dtype, real: int, noisy: bool = False, part: int = 0) -> Prepared:
    tile = rows.strip_tile(real, dtype, noisy, TARGET)
    features, tokens = tile["BLOCK_D"] + part if part else real, tile["BLOCK_M"] + 1
    z = randn(1, tokens + 3, features, dtype=torch.float32 if noisy else dtype)
    image = randn(tokens + 3, features) if noisy else None
    position, residual = permutations(1, tokens + 3)[:, :tokens], randn(1, tokens, features, dtype=dtype)
    out = nans(1, tokens, features, dtype=dtype)

    def check(got: Tensor) -> None:
        free = z if image is None else z - image
        plain = reference.strip_restore(free.to(dtype), position, residual)
        exact = free if image is None else z.double() - image
        assert_close(got, plain, reference.strip_restore(exact.double(), position, residual.double()))

    launcher = partial(rows.strip_restore, tile=tile)
    return partial(run_kernel, launcher, z, position, residual, image=image, out=out), check


def shared(dtype: torch.dtype, real: int, in_place: bool = False) -> Prepared:
    """real: head size."""
    tile = unlock.unlock_tile(real, dtype, TARGET)
    encoded = 2 * tile["BLOCK_S"] + 3
    cache, position = randn(1, 2, encoded, real, dtype=dtype), permutations(1, encoded)[:, : tile["BLOCK_S"] + 2]
    expected = reference.unlock(cache, position)
    options = {"in_place": in_place, "writes": ("cache",) if in_place else ()}
    launcher = partial(unlock.unlock, tile=tile)
    return partial(run_kernel, launcher, cache=cache, position=position, **options), partial(_same, expected)


def _same(expected: Tensor, got: Tensor) -> None:
    assert_same_bits(got, expected)


def storage(dtype: torch.dtype, real: tuple[int, int, int], rounds: int, old_rounds: int = 0) -> Prepared:
    """real: heads, tokens, head size. old_rounds: of the seal that is exchanged."""
    heads, tokens, size = real
    blocks = sealing.blocks_of(size, dtype.itemsize)
    tile = seals.seal_tile(tokens * blocks, heads, old_rounds > 0, TARGET)
    count = tile["BLOCK_U"] // blocks + 3
    x, own = randn(1, 1, count, size, dtype=dtype), sealed_by(1, count, rounds)
    expected, out = sealing.seal(x, own, is_value=True), nans(1, 1, count, size, dtype=dtype)
    if not old_rounds:
        launcher = partial(seals.seal, tile=tile)
        return partial(run_kernel, launcher, x, own, is_value=True, out=out), partial(_same, expected)
    old = sealed_by(1, count, old_rounds)
    old = old.replace(key=old.key.flip(0).contiguous())
    stored = sealing.seal(x, old, is_value=True)
    launcher = partial(seals.reseal, tile=tile)
    return partial(run_kernel, launcher, stored, old, own, is_value=True, out=out), partial(_same, expected)


def draw(dtype: torch.dtype, real: tuple[int, int], rounds: int) -> Prepared:
    """real: streams, numbers of each."""
    tile = seals.seal_tile(real[1] // 16, real[0], False, TARGET)
    key, streams, count = key_words(bytes(range(32)), DEVICE), integers(1, 2, 3, 4, 5, 6).view(2, 3), 16 * 3 + 5
    count += 16 * tile["BLOCK_U"]
    expected = sealing.random_bits(key, streams, count, rounds=rounds)
    launcher = partial(seals.random_bits, tile=tile)
    return partial(run_kernel, launcher, key, streams, count, rounds=rounds), partial(_same, expected)


BF16, FP32, OTHERS = (torch.bfloat16,), (torch.float32,), (torch.float16, torch.float32)
# Llama-3-8B: 4,096 features, 32 + 8 + 8 heads of 128, 14,336 in between; SmolLM2-135M: 576, 9 + 3 + 3 of 64, 1,536.
CASES: list[tuple[str, Callable[[torch.dtype], Prepared], tuple[torch.dtype, ...]]] = [
    ("product of a prompt", partial(linear, real=(4224, 6144, 4096)), DTYPES),
    ("product of a prompt, stripped", partial(linear, real=(4224, 4096, 14336), strip=True, rest=8), DTYPES),
    ("product of a prompt, row blocks past a group", partial(linear, real=(4224, 6144, 4096), groups=True), BF16),
    ("product of a prompt, noisy", partial(linear, real=(4224, 6144, 4096), noisy=True), DTYPES),
    ("product of a short prompt", partial(linear, real=(140, 960, 576), rest=24), DTYPES),
    ("product of rows that are not aligned", partial(linear, real=(4224, 960, 577), aligned=False, rest=1), DTYPES),
    ("product of a token", partial(linear, real=(1, 28672, 4096), rest=8), DTYPES),
    ("product of a token, split", partial(linear, real=(1, 1024, 4096)), DTYPES),
    ("product of a small model's token, split", partial(linear, real=(1, 576, 1536), rest=16), BF16),
    ("product of few rows, noisy, split", partial(linear, real=(16, 4096, 4096), noisy=True), DTYPES),
    ("product of 64 rows, stripped, split", partial(linear, real=(64, 4096, 4096), strip=True, rest=8), DTYPES),
    ("q, k, v of a token", partial(linears, real=(1, 6144, 4096)), DTYPES),
    ("q, k, v of a small model's token", partial(linears, real=(1, 960, 576)), BF16),
    ("attention of a prompt", partial(prompt, real=(4096, 128)), DTYPES),
    ("attention of a prompt, heads of 64", partial(prompt, real=(4096, 64), onward=True), DTYPES),
    ("attention of a prompt, heads of 80", partial(prompt, real=(4096, 80), onward=True), DTYPES),
    ("attention of a prompt, heads of 256", partial(prompt, real=(4096, 256)), DTYPES),
    ("attention of a prompt in a window", partial(prompt, real=(4096, 128), window=50), DTYPES),
    ("attention of a prompt under a mask", partial(prompt, real=(4096, 128), masked=True), DTYPES),
    ("attention of a later turn", partial(prompt, real=(40, 128)), DTYPES),
    ("step on a cache", partial(step, real=(8, 8, 4, 8192, 128)), DTYPES),
    ("step on a short cache", partial(step, real=(1, 8, 4, 2048, 128)), DTYPES),
    ("step on a small model's cache", partial(step, real=(8, 3, 3, 8192, 64)), DTYPES),
    ("step on a permuted cache", partial(step, real=(8, 8, 4, 65536, 128), permuted=True), DTYPES),
    ("step on a permuted cache, heads of 80", partial(step, real=(8, 32, 1, 8192, 80), permuted=True), DTYPES),
    ("step of many rows", partial(step, real=(8, 4, 64, 8192, 128), tokens=8), DTYPES),
    ("step, heads of 256", partial(step, real=(16, 8, 2, 8192, 256)), DTYPES),
    ("encoding of a prompt's heads", partial(transcode, real=(4096, 48, 128)), DTYPES),
    ("encoding of heads, norms, noise", partial(transcode, real=(4096, 48, 128), norm=True, noisy=True), DTYPES),
    ("encoding of a small model's heads", partial(transcode, real=(512, 15, 64)), DTYPES),
    ("encoding of heads of 80", partial(transcode, real=(4096, 96, 80)), BF16),
    ("encoding of a token's heads", partial(transcode, real=(1, 48, 128)), DTYPES),
    ("rows in, with norm", partial(inject, real=4096, norm=True), DTYPES),
    ("rows in, with norm and noise", partial(inject, real=576, norm=True, noisy=True), DTYPES),
    ("rows in, with norm, wider than a tile", partial(inject, real=18432, norm=True), DTYPES),
    ("rows in, with noise, wider than a tile", partial(inject, real=18432, norm=True, noisy=True), BF16),
    ("rows in", partial(inject, real=14336, part=72), DTYPES),
    ("rows in, with noise", partial(inject, real=4096, noisy=True), DTYPES),
    ("rows in, heads reordered", partial(inject, real=128, heads=3), DTYPES),
    ("rows in, heads of 80 reordered", partial(inject, real=80, heads=2), BF16),
    ("rows out", partial(strip, real=4096), DTYPES),
    ("rows out, noise off", partial(strip, real=4096, noisy=True), DTYPES),
    ("rows out of a small model", partial(strip, real=576), DTYPES),
    ("rows out, wider than a tile", partial(strip, real=14336, part=40), DTYPES),
    ("unlocking", partial(shared, real=128), DTYPES),
    ("unlocking in place", partial(shared, real=80, in_place=True), DTYPES),
    ("sealing a cache of other numbers", partial(storage, real=(64, 8192, 128), rounds=8), OTHERS),
    ("sealing a token, 20 rounds", partial(storage, real=(8, 1, 80), rounds=20), BF16),
    ("exchanging seals", partial(storage, real=(8, 8192, 128), rounds=12, old_rounds=20), BF16 + FP32),
    ("sealed attention, heads of 80", partial(prompt, real=(40, 80), rounds=8), BF16),
    ("sealed attention, heads of 256", partial(prompt, real=(40, 256), rounds=8), BF16),
    ("sealed attention of a later turn", partial(prompt, real=(40, 128), masked=True, rounds=8), OTHERS),
    ("sealed step on a permuted cache", partial(step, real=(8, 8, 4, 8192, 128), permuted=True, rounds=8), OTHERS),
    ("sealed step, heads of 80", partial(step, real=(8, 32, 1, 8192, 80), rounds=8), BF16),
    ("sealed step, heads of 256", partial(step, real=(16, 8, 2, 8192, 256), rounds=8), BF16),
    ("encoding of a token's heads into a sealed cache", partial(transcode, real=(1, 48, 128), rounds=8), OTHERS),
]  # fmt: skip
for sealed_rounds in ROUNDS:
    CASES += [
        (f"sealed attention, {sealed_rounds} rounds", partial(prompt, real=(4096, 128), rounds=sealed_rounds), BF16),
        (f"sealed step, {sealed_rounds} rounds", partial(step, real=(8, 8, 4, 8192, 128), rounds=sealed_rounds), BF16),
        (f"encoding, {sealed_rounds} rounds", partial(transcode, real=(4096, 48, 128), rounds=sealed_rounds), BF16),
        (f"sealing a cache, {sealed_rounds} rounds", partial(storage, real=(8, 8192, 128), rounds=sealed_rounds), BF16),
        (f"random bits, {sealed_rounds} rounds", partial(draw, real=(64, 65536), rounds=sealed_rounds), FP32),
    ]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "dtype"),
    [
        pytest.param(case, dtype, id=f"{name} {str(dtype).removeprefix('torch.')}")
        for name, case, dtypes in CASES
        for dtype in dtypes
    ],
)
def test_a_full_tile_and_a_part_of_one(case, dtype):
    """The error against float64 is at most twice plain PyTorch's, and what is sealed has the bits of what is not."""
    run, check = case(dtype)
    check(run())


def test_every_kernel_has_a_case_in_every_encoding(monkeypatch):
    """A kernel that is added, or a cipher's strength, is asked for here."""
    names, asked = {}, {}
    for path in Path(attention.__file__).parent.glob("*.py"):
        module = import_module(f"scx_kernels.kernels.{path.stem}")
        names |= {id(x): name for name, x in vars(module).items() if name.endswith("_kernel")}

    def record(kernel, grid, args, meta):
        asked.setdefault(names[id(kernel)], set()).add((meta.get("ENCODING"), meta.get("ROUNDS")))

    for _, case, _ in CASES:
        run, _ = case(torch.bfloat16)
        with launch.recording(TARGET, record):
            run()
    assert asked.keys() == set(names.values())
    for name, encodings in asked.items():
        if any(encoding for encoding, _ in encodings):
            assert encodings == {("permuted", 0), *(("sealed", rounds) for rounds in ROUNDS)}, name
        elif any(rounds for _, rounds in encodings):
            assert {rounds for _, rounds in encodings} == set(ROUNDS), name
