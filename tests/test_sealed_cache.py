"""Operations on a sealed cache: what they give is, bit by bit, what they give on the cache unsealed."""

from functools import partial
from types import SimpleNamespace

import parity
import pytest
import torch
from parity import assert_same_bits, by_dtype, integers, nans, permutations, randn, run_kernel
from torch import Tensor

import scx_kernels
from scx_kernels import Sealing, WriteCounter, backend, key_words, operations, reference, sealing
from scx_kernels.kernels import attention, launch, qkv, unlock

SMALL = {"BLOCK_M": 16, "BLOCK_N": 16, "num_warps": 4}


def sealed_by(batch: int, rows: int, rounds: int = 8) -> Sealing:
    """Numbers of a cache that was cropped and reordered: in no order."""
    numbers = WriteCounter(3).take(batch, 3 * rows, parity.DEVICE)
    writes = numbers.gather(1, permutations(batch, 3 * rows)[:, :rows])
    return Sealing(key_words(bytes(range(32)), parity.DEVICE), writes, 5, rounds, first_head=2)


def sealed(k: Tensor, v: Tensor, own: Sealing) -> tuple[Tensor, Tensor]:
    return sealing.seal(k, own, is_value=False), sealing.seal(v, own, is_value=True)


CASES = [  # batch, query heads, key/value heads, queries, keys, head size, options of `attention`
    (1, 2, 1, 18, 18, 64, {"is_causal": True}),
    (2, 2, 2, 5, 21, 80, {"is_causal": True, "window": 9}),
    (1, 2, 1, 4, 20, 96, {"kv_start": [3], "kv_length": [14]}),
    (1, 1, 1, 3, 17, 40, {"mask": True}),
    (1, 1, 1, 3, 17, 160, {}),
]


def tensors(options: dict, batch: int, tokens: int, keys: int) -> dict:
    """The options with their lists as tensors, and True as a mask."""
    given = {name: torch.tensor(v, device=parity.DEVICE) if isinstance(v, list) else v for name, v in options.items()}
    if "mask" in given:
        given["mask"] = torch.rand(batch, 1, tokens, keys, device=parity.DEVICE) > 0.3
    return given


@by_dtype
@pytest.mark.parametrize("case", CASES, ids=str)
def test_attention(dtype, case):
    batch, heads, groups, tokens, keys, size, options = case
    q, k, v = (randn(batch, n, m, size, dtype=dtype) for n, m in ((heads, tokens), (groups, keys), (groups, keys)))
    options = {"softmax_scale": 0.3, **tensors(options, batch, tokens, keys)}
    own = sealed_by(batch, keys)
    stored = sealed(k, v, own)
    hidden, target = not options.keys().isdisjoint(("window", "mask", "kv_start")), launch.target_of(q.device)
    production = attention.attention_tile(tokens, size, dtype, hidden, True, target)
    tile = SMALL if parity.MODE.tiles == "small" else production
    expected = attention.attention(q, k, v, **options, tile=tile)  # of other tiles, sums in another order
    assert_same_bits(run_kernel(attention.attention, q, *stored, **options, sealing=own, tile=tile), expected)
    plain = reference.attention(q, k, v, **options)
    assert_same_bits(reference.attention(q, *stored, **options, sealing=own), plain)


STEPS = [  # batch, query heads, key/value heads, queries, capacity, head size, length, permuted, splits
    (2, 4, 2, 1, 40, 64, True, False, 2),
    (1, 2, 1, 3, 37, 80, False, False, 1),
    (2, 2, 1, 1, 33, 96, True, True, 2),
    (1, 2, 2, 2, 20, 24, False, True, 1),
]


@by_dtype
@pytest.mark.parametrize("case", STEPS, ids=str)
def test_attention_step(dtype, case):
    """Rows that were never written hold anything, NaN here, under any number."""
    batch, heads, groups, tokens, capacity, size, lengths, permuted, splits = case
    q = randn(batch, heads, tokens, size, dtype=dtype)
    k, v = (randn(batch, groups, capacity, size, dtype=dtype, layout="transposed") for _ in range(2))
    own = sealed_by(batch, capacity)
    stored = sealed(k, v, own)
    options = {"softmax_scale": 0.3, "output_index": permutations(batch, heads, size)}
    if permuted:
        options["position"] = permutations(batch, capacity)[:, : capacity - 4]
    if lengths:
        options["kv_length"] = integers(*[capacity - 9, 6][:batch])
        options["kv_start"] = integers(*[2, 1][:batch])
    if lengths and not permuted:
        for stored_rows in stored:
            stored_rows[:, :, capacity - 4 :] = float("nan")
    tile = SMALL | {"splits": splits}
    expected = run_kernel(attention.attention_step, q, k, v, **options, tile=tile)
    sealed_options = {**options, "sealing": own, "force_int64": splits == 1}
    got = run_kernel(attention.attention_step, q, *stored, **sealed_options, tile=tile)
    assert not got.isnan().any()
    assert_same_bits(got, expected)
    plain = reference.attention_step(q, k, v, **options)
    assert_same_bits(reference.attention_step(q, *stored, **options, sealing=own), plain)


@pytest.mark.parametrize("target", launch.TARGETS.values(), ids=lambda t: f"{t.backend}{t.arch}")
@pytest.mark.parametrize("size", [64, 80, 96, 128, 256])
def test_what_a_seal_changes_of_a_step_s_tile(target, size):
    """The order of sums, and so the last bits of a step, only where a tile of half precision is a block of the cipher
    for each thread."""
    for batch, rows, keys in ((1, 4, 300), (8, 4, 65_536), (2, 64, 4096)):
        plain, sealed = (
            attention.step_tile(batch, 8, rows, keys, size, torch.bfloat16, False, seal, target)
            for seal in (False, True)
        )
        if target.backend == "cuda" and size in (64, 128):
            assert sealed["BLOCK_N"] * size * 2 // 64 == sealed["num_warps"] * target.warp_size
            assert sealed["splits"] >= plain["splits"]
        else:
            assert plain | {"num_stages": 0} == sealed | {"num_stages": 0}


def test_what_failed_on_a_gpu_is_refused_there():
    """Only that: half precision, and heads whose size is no power of two."""

    def is_refused(size, dtype, is_cuda=True):
        return operations.is_refused_on_sealed(SimpleNamespace(shape=(1, 1, 3, size), dtype=dtype, is_cuda=is_cuda))

    assert is_refused(40, torch.float16)
    assert is_refused(96, torch.bfloat16)
    assert not is_refused(64, torch.float16)
    assert not is_refused(96, torch.float32)
    assert not is_refused(96, torch.float16, is_cuda=False)
    with operations.allow_unproven():
        assert not is_refused(96, torch.float16)
    assert is_refused(96, torch.float16)


def test_a_refusal_says_what_works(monkeypatch):
    """On the kernels' way, and before anything runs."""
    monkeypatch.setattr(operations, "is_refused_on_sealed", lambda q: True)
    q, k, v = (randn(1, 1, n, 96) for n in (3, 17, 17))
    own = sealed_by(1, 17)
    with backend("triton"), pytest.raises(NotImplementedError, match="heads of 96 features; take a permuted cache"):
        scx_kernels.attention(q, *sealed(k, v, own), softmax_scale=0.3, sealing=own)
    with backend("triton"):
        scx_kernels.attention(q, k, v, softmax_scale=0.3)


def test_short_caches_are_spread_over_the_machine():
    """One sequence of eight heads: a program a multiprocessor, four where a cipher is at work, each with 64 keys or
    more, eight where the cache is long; and none that finds no tile left."""
    target = launch.TARGETS["cuda", 90]

    def splits(keys, seal, batch=1):
        return attention.step_tile(batch, 8, 4, keys, 128, torch.bfloat16, False, seal, target)["splits"]

    assert [splits(keys, False) for keys in (1, 64, 65, 1024, 8192, 65_536)] == [1, 1, 2, 16, 16, 16]
    assert [splits(keys, True) for keys in (1, 64, 65, 1024, 8192, 65_536)] == [1, 1, 2, 16, 64, 128]
    assert [splits(8192, seal, batch=64) for seal in (False, True)] == [1, 2]


def qkv_arguments(batch: int, tokens: int, heads: int, groups: int, size: int, dtype: torch.dtype) -> list:
    z = [randn(batch, tokens + 2, n * size, dtype=dtype) for n in (heads, groups, groups)]
    angle = randn(1, tokens, size // 2).repeat(1, 1, 2)
    position = permutations(batch, tokens + 2)[:, :tokens]
    index = [permutations(batch, n, size) for n in (heads, groups, groups)]
    return [*z, position, angle.cos().to(dtype), angle.sin().to(dtype), *index]


@by_dtype
@pytest.mark.parametrize("slots", ["fresh", "offset", "offsets"])
@pytest.mark.parametrize(("groups", "size"), [(2, 64), (1, 80), (2, 10)])
def test_qkv_seals_what_it_stores(dtype, slots, groups, size):
    """K and V come back by `unseal`; q, and every slot that was not written, are as without a seal."""
    args = qkv_arguments(2, 3, 2, groups, size, dtype)
    capacity = 3 if slots == "fresh" else 7
    own = sealed_by(2, capacity)
    start = [0, 0] if slots == "fresh" else [2, 2] if slots == "offset" else [1, 4]
    options = {} if slots == "fresh" else {"offset": 2} if slots == "offset" else {"offsets": integers(*start)}
    for function in (partial(run_kernel, qkv.qkv_decode_encode), reference.qkv_decode_encode):
        given = [dict(options), dict(options)]
        if slots != "fresh":
            for one in given:
                one["keys"], one["values"] = (nans(2, groups, capacity, size, dtype=dtype) for _ in range(2))
        q, *plain = function(*args, **given[0])
        got_q, *stored = function(*args, **given[1], sealing=own)
        assert_same_bits(got_q, q)
        for is_value, (got, expected) in enumerate(zip(stored, plain, strict=True)):
            opened = sealing.unseal(got, own, is_value=bool(is_value))
            for sequence, first in enumerate(start):
                rows = slice(first, first + 3)
                assert_same_bits(opened[sequence, :, rows], expected[sequence, :, rows])
                assert (got[sequence, :, rows] != expected[sequence, :, rows]).any()
            written = (
                expected.isnan().logical_not() if slots != "fresh" else torch.ones_like(expected, dtype=torch.bool)
            )
            assert got[~written].isnan().all(), "wrote outside the slots"


@by_dtype
@pytest.mark.parametrize("size", [64, 128, 256])
def test_a_thread_computes_a_block_of_its_own(dtype, size):
    """The tile that seals has as many blocks as threads, for many tokens on every target, and no heads on their way
    ahead; nothing else of it is another than without a seal, but on sm_90 how many tokens and heads."""
    for target in launch.TARGETS.values():
        plain, sealed = (qkv.qkv_tile(4096, 48, size, dtype, False, seal, target) for seal in (False, True))
        blocks = sealed["BLOCK_S"] * size * dtype.itemsize // 64
        assert blocks == sealed["num_warps"] * target.warp_size
        assert sealed["STAGES"] == 1
        other = dict.fromkeys(("num_warps", "STAGES", *(["BLOCK_S", "HEADS"] if target.arch == 90 else [])), 0)
        assert plain | other == sealed | other


@pytest.mark.slow
@by_dtype
@pytest.mark.parametrize(
    ("slots", "size", "tile"),
    [("offset", 64, None), ("offsets", 80, None), ("offset", 10, None), ("offsets", 80, {"BLOCK_S": 2, "HEADS": 2})],
    ids=str,
)
def test_qkv_returns_what_it_seals(dtype, slots, size, tile):
    """With `return_unsealed`, k and v are bit by bit those of a call without a cache, and what is stored is what is
    stored without it."""
    batch = 1 if tile else 2
    args = qkv_arguments(batch, 3, 2, 2, size, dtype)
    own = sealed_by(batch, 7)
    where = {"offset": 2} if slots == "offset" else {"offsets": integers(*[1, 4][:batch])}
    by_kernel = partial(run_kernel, qkv.qkv_decode_encode)
    for function in (by_kernel, reference.qkv_decode_encode):
        options = {"tile": tile, "force_int64": tile is not None} if function is by_kernel else {}
        caches = [[nans(batch, 2, 7, size, dtype=dtype, layout="transposed") for _ in range(2)] for _ in range(2)]
        expected = function(*args, **options)
        function(*args, **options, **where, keys=caches[0][0], values=caches[0][1], sealing=own)
        got = function(
            *args, **options, **where, keys=caches[1][0], values=caches[1][1], sealing=own, return_unsealed=True
        )
        for stored, alone in zip(caches[1], caches[0], strict=True):
            assert_same_bits(stored, alone)
        for fresh, plain in zip(got, expected, strict=True):
            assert_same_bits(fresh, plain)


@pytest.mark.parametrize("module", [reference, qkv, scx_kernels], ids=["reference", "kernel", "public"])
def test_nothing_to_return_beside_what_is_stored(module):
    args = qkv_arguments(1, 3, 2, 1, 16, torch.float32)
    caches = {name: nans(1, 1, 3, 16, dtype=torch.float32) for name in ("keys", "values")}
    for given in ({}, caches, {"sealing": sealed_by(1, 3)}):
        with pytest.raises(ValueError, match="return_unsealed: needs sealing, and keys and values"):
            module.qkv_decode_encode(*args, **given, return_unsealed=True)


@by_dtype
def test_a_sealed_cache_is_unlocked_as_patterns(dtype):
    """Rows move with their numbers, whatever their bits look like as floats."""
    k, v = (randn(2, 2, 30, 64, dtype=dtype) for _ in range(2))
    own, position = sealed_by(2, 30), permutations(2, 30)[:, :20]
    stored, _ = sealed(k, v, own)
    moved = own.replace(writes=own.writes.gather(1, position))
    for function in (reference.unlock, partial(run_kernel, unlock.unlock)):
        got = function(stored, position)
        assert_same_bits(sealing.unseal(got, moved, is_value=False), function(k, position))


def test_public_names_take_a_sealed_cache():
    """Through the registered operators and their shape rules: write, then attend, then one step."""
    own = sealed_by(1, 4)
    args = qkv_arguments(1, 4, 2, 1, 32, torch.float16)
    with backend("triton"):
        q, k, v = scx_kernels.qkv_decode_encode(*args)
        same_q, *stored = scx_kernels.qkv_decode_encode(*args, sealing=own)
        assert_same_bits(same_q, q)
        plain = scx_kernels.attention(q, k, v, softmax_scale=0.2, is_causal=True)
        assert_same_bits(scx_kernels.attention(q, *stored, softmax_scale=0.2, is_causal=True, sealing=own), plain)
        last = q[:, :, 3:]
        plain = scx_kernels.attention_step(last, k, v, softmax_scale=0.2)
        assert_same_bits(scx_kernels.attention_step(last, *stored, softmax_scale=0.2, sealing=own), plain)
        keys, values = (torch.zeros(1, 1, 4, 32, dtype=torch.float16, device=parity.DEVICE) for _ in range(2))
        scx_kernels.qkv_decode_encode(*args, keys=keys, values=values, sealing=own)
        assert_same_bits(keys, stored[0])
        assert_same_bits(values, stored[1])
        keys, values = (torch.zeros_like(keys) for _ in range(2))
        fresh = scx_kernels.qkv_decode_encode(*args, keys=keys, values=values, sealing=own, return_unsealed=True)
        for got, expected in zip((*fresh, keys, values), (q, k, v, *stored), strict=True):
            assert_same_bits(got, expected)


def test_operators_with_a_seal_are_registered_soundly():
    own = sealed_by(1, 4)
    q, k, v = (randn(1, 1, n, 16) for n in (1, 4, 4))
    spelled = {
        "sealing_key": own.key,
        "sealing_writes": own.writes,
        "sealing_numbers": [own.layer, own.rounds, own.first_head],
    }
    torch.library.opcheck(
        torch.ops.scx_kernels.attention_step, (q, k, v, 0.2), spelled, test_utils=("test_schema", "test_faketensor")
    )


@pytest.mark.parametrize("module", [reference, attention], ids=["reference", "kernel"])
def test_a_seal_that_does_not_fit_is_named(module):
    q, k, v = (randn(1, 1, n, 16) for n in (1, 4, 4))
    own = sealed_by(1, 4)
    for name, bad in (("writes", own.replace(writes=own.writes[:, :3])), ("rounds", own.replace(rounds=9))):
        with pytest.raises(ValueError, match=f"sealing.{name}"):
            module.attention_step(q, k, v, softmax_scale=0.2, sealing=bad)
        with pytest.raises(ValueError, match=f"sealing.{name}"):
            module.attention(q, k, v, softmax_scale=0.2, sealing=bad)
