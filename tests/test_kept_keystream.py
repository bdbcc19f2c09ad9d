"""Keystream that a session keeps on a CPU: always that of the rows asked for, made once, gone with the cache."""

import copy
import gc
import pickle
import weakref
from collections.abc import Iterator

import pytest
import torch
from tiny import tiny_model
from torch import Tensor
from transformers import DynamicCache

import scx_kernels as ops
from scx import (
    EncodedCache,
    SCXKeyGenerator,
    encoded_llama,
    load_keys,
    load_kvcache,
    merge_kvcache_dynamic,
    save_keys,
    save_kvcache,
    split_kvcache_dynamic,
)
from scx.models.llama import model_shape
from scx_kernels import KeptKeystream, Sealing, WriteCounter, kept, key_words, sealing
from scx_kernels.chacha import BLOCK_BYTES

GROUPS = 2
AHEAD = kept._ROWS_AHEAD
SIZES = [(16, torch.float32), (40, torch.bfloat16), (80, torch.float32)]


def sealed_by(writes: Tensor, rounds: int = 20, layer: int = 3) -> Sealing:
    return Sealing(KEY, writes, layer, rounds)


KEY = key_words(bytes(range(32)))


def assert_keeps(store: KeptKeystream, own: Sealing, head_dim: int = 16, dtype: torch.dtype = torch.float32) -> None:
    for is_value in (False, True):
        expected = sealing.keystream(own, GROUPS, head_dim, dtype, is_value=is_value)
        found = store.find(own, GROUPS, head_dim, dtype, is_value=is_value)
        assert found is not None
        assert torch.equal(found, expected)


class Made:
    """Counts the bytes of keystream that are made, by the library or in PyTorch."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.bytes = 0
        by_library, by_torch = sealing.cipher_memory, sealing.chacha_blocks

        def cipher_memory(key: bytes, words: tuple, source: int, target: int, size: int) -> None:
            self.bytes += size
            by_library(key, words, source, target, size)

        def chacha_blocks(key: Tensor, words: Tensor, rounds: int = 20) -> Tensor:
            self.bytes += words.shape[1] * BLOCK_BYTES
            return by_torch(key, words, rounds)

        patch.setattr(sealing, "cipher_memory", cipher_memory)
        patch.setattr(sealing, "chacha_blocks", chacha_blocks)

    def take(self) -> int:
        """Bytes since this was called before."""
        made, self.bytes = self.bytes, 0
        return made


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> Made:
    return Made(monkeypatch)


def histories(counter: WriteCounter) -> Iterator[Tensor]:
    """Write numbers (B, N) of a cache after one operation and another: what transformers does to its rows."""
    generator = torch.Generator().manual_seed(0)
    rows = counter.take(2, 20)
    yield rows
    for turn in range(40):
        action = int(torch.randint(0, 7, (1,), generator=generator))
        if action <= 1:
            rows = torch.cat((rows, counter.take(len(rows), 1 + 12 * action)), 1)
        elif action == 2 and rows.shape[1] > 9:
            rows = rows[:, : -1 - turn % 9]
        elif action == 3:
            rows = torch.cat((rows[:, : max(1, rows.shape[1] - 3)], counter.take(len(rows), 2)), 1)
        elif action == 4:
            rows = rows[torch.randint(0, len(rows), (len(rows),), generator=generator)]
        elif action == 5:
            rows = rows.repeat_interleave(2, 0)[: 1 + turn % 4]
        else:
            rows = torch.cat((rows[:, 1 + turn % 5 :], counter.take(len(rows), 1)), 1)  # a window moves
        yield rows


@pytest.mark.parametrize(("head_dim", "dtype"), SIZES, ids=str)
@pytest.mark.parametrize("rounds", [8, 20])
def test_keeps_the_rows_own_keystream_after_any_history(head_dim, dtype, rounds) -> None:
    store = KeptKeystream()
    for writes in histories(WriteCounter(1)):
        own = sealed_by(writes, rounds)
        store.cover(own, GROUPS, head_dim, dtype)
        assert_keeps(store, own, head_dim, dtype)
        assert_keeps(store, sealed_by(writes[:, -1:], rounds), head_dim, dtype)
        width = sealing.blocks_of(head_dim, dtype.itemsize) * BLOCK_BYTES
        assert store.nbytes <= 2 * len(writes) * GROUPS * width * (2 * writes.shape[1] + 64), "bounded by the cache"


def test_seal_and_reseal_take_what_is_kept(made: Made) -> None:
    """The public operations give the same bits with it, and make nothing where it is there."""
    x = torch.randn(2, GROUPS, 9, 16)
    own = sealed_by(WriteCounter().take(2, 9))
    expected = [ops.seal(x, own, is_value=is_value) for is_value in (False, True)]
    with_kept = own.replace(kept=KeptKeystream())
    with_kept.kept.cover(own, GROUPS, 16, x.dtype)
    made.take()
    for is_value, stored in enumerate(expected):
        out = torch.full_like(x, torch.nan)
        for got in (
            ops.seal(x, with_kept, is_value=is_value == 1),
            ops.seal(x, with_kept, is_value=is_value == 1, out=out),
        ):
            assert torch.equal(got.view(torch.int32), stored.view(torch.int32))
        assert torch.equal(ops.unseal(stored, with_kept, is_value=is_value == 1), x)
    assert made.take() == 0
    other = sealed_by(WriteCounter(5).take(2, 9))
    assert torch.equal(
        ops.reseal(expected[0], with_kept, other, is_value=False).view(torch.int32),
        ops.reseal(expected[0], own, other, is_value=False).view(torch.int32),
    )


def test_nothing_else_is_found() -> None:
    """Under another key, layer, number of rounds, head, or of other rows or sizes, there is nothing."""
    store, own = KeptKeystream(), sealed_by(WriteCounter().take(2, 5))
    assert store.find(own, GROUPS, 16, torch.float32, is_value=False) is None
    store.cover(own, GROUPS, 16, torch.float32)
    others = (
        own.replace(key=KEY.clone()),
        own.replace(layer=4),
        own.replace(rounds=12),
        own.replace(first_head=1),
        own.replace(writes=own.writes.flip(1)),
        own.replace(writes=own.writes[:, 1:4]),
        own.replace(writes=own.writes[:1]),
        own.replace(writes=torch.cat((own.writes, own.writes[:, -1:] + 1), 1)),
    )
    for other in others:
        assert store.find(other, GROUPS, 16, torch.float32, is_value=False) is None
    assert store.find(own, GROUPS + 1, 16, torch.float32, is_value=False) is None
    assert store.find(own, GROUPS, 32, torch.float32, is_value=False) is None
    for other in others:
        store.cover(other, GROUPS, 16, torch.float32)
        assert_keeps(store, other)


def test_rows_made_ahead_are_not_given_out() -> None:
    """What is there for numbers that nobody asked for yet is found by no one who did not cover them."""
    counter, store = WriteCounter(), KeptKeystream()
    rows = counter.take(1, 40)
    for count in (39, 40):
        store.cover(sealed_by(rows[:, :count]), GROUPS, 16, torch.float32)
    following = counter.take(1, 1)
    assert store.find(sealed_by(following), GROUPS, 16, torch.float32, is_value=False) is None


@pytest.mark.parametrize("last", [2**28 - 3, 2**60 - 3])
def test_rows_ahead_at_a_limit_of_the_counter(last: int) -> None:
    """A carry inside them, and numbers that do not exist."""
    store, rows = KeptKeystream(), torch.arange(last - 20, last)[None]
    for count in (19, 20):
        own = sealed_by(rows[:, :count])
        store.cover(own, GROUPS, 16, torch.float32)
        assert_keeps(store, own)
    own = sealed_by(torch.arange(last - 20, last + 2)[None])
    store.cover(own, GROUPS, 16, torch.float32)
    assert_keeps(store, own)


@pytest.mark.parametrize("breaks_at", [1, 2, 3])
def test_an_interruption_leaves_no_wrong_keystream(monkeypatch: pytest.MonkeyPatch, breaks_at: int) -> None:
    store, counter = KeptKeystream(), WriteCounter()
    first, calls = counter.take(2, 40), 0
    store.cover(sealed_by(first), GROUPS, 16, torch.float32)
    cipher = sealing.cipher_memory

    def interrupted(*args) -> None:
        nonlocal calls
        calls += 1
        if calls == breaks_at:
            raise KeyboardInterrupt
        cipher(*args)

    monkeypatch.setattr(sealing, "cipher_memory", interrupted)
    moved = sealed_by(torch.cat((first[:, 5:].flip(0), counter.take(2, 1)), 1))
    with pytest.raises(KeyboardInterrupt):
        store.cover(moved, GROUPS, 16, torch.float32)
    for own in (moved, sealed_by(first)):
        assert store.find(own, GROUPS, 16, torch.float32, is_value=False) is None
    monkeypatch.setattr(sealing, "cipher_memory", cipher)
    for own in (sealed_by(first), moved):
        store.cover(own, GROUPS, 16, torch.float32)
        assert_keeps(store, own)


def test_numbers_out_of_range_are_refused() -> None:
    store = KeptKeystream()
    for wrong in (-1, 2**60):
        with pytest.raises(ValueError, match="sealing.writes: expected"):
            store.cover(sealed_by(torch.full((1, 2), wrong)), GROUPS, 16, torch.float32)
        assert store.nbytes == 0


def test_it_is_never_copied_printed_or_pickled() -> None:
    store = KeptKeystream()
    store.cover(sealed_by(WriteCounter().take(1, 3)), GROUPS, 16, torch.float32)
    assert repr(store) == "KeptKeystream(rows=3)"
    for leave in (pickle.dumps, copy.copy, copy.deepcopy):
        with pytest.raises(TypeError, match="key material"):
            leave(store)


def keys_for(model, **options) -> SCXKeyGenerator:
    return SCXKeyGenerator.for_model(model, **{"cache_encoding": "sealed", "redundant_num": 3, "alp": True, **options})


@pytest.fixture
def model():
    return tiny_model(layers=2).to("cpu")


def tokens(count: int, batch: int = 1, seed: int = 0) -> Tensor:
    return torch.randint(1, 200, (batch, count), generator=torch.Generator().manual_seed(seed))


ROW = 2 * BLOCK_BYTES  # of K and V in a head of 16 features in float32
HEADS, LAYERS = 2, 2
TOKEN = ROW * HEADS * LAYERS


@torch.no_grad()
@pytest.mark.parametrize(("rounds", "window"), [(8, None), (20, None), (20, 30), (20, 200)])
def test_a_token_costs_its_own_row(made: Made, rounds: int, window: int | None) -> None:
    """Counted in bytes: a prompt makes every row once, tokens one by one make theirs, and those ahead, once."""
    model = tiny_model("mistral", layers=2, sliding_window=window).to("cpu")
    with encoded_llama(model, keys_for(model, cipher_rounds=rounds)):
        cache = model(tokens(50)).past_key_values
        assert made.take() == 50 * TOKEN
        steps = []
        for seed in range(60):
            model(tokens(1, seed=seed), past_key_values=cache)
            steps.append(made.take())
    assert max(steps) == (1 + AHEAD) * TOKEN
    assert 60 * TOKEN <= sum(steps) <= (60 + AHEAD) * TOKEN
    assert steps.count(0) > 40, "most find theirs made ahead"


@torch.no_grad()
def test_moved_rows_are_not_made_again(model, made: Made) -> None:
    """Beam search, selection and rollback bring rows to other places; only rows that are new cost something."""
    few = (2 * AHEAD + 1) * TOKEN
    with encoded_llama(model, keys_for(model)):
        cache = model(tokens(60, 2)).past_key_values
        made.take()
        for change, rows in (
            (lambda: cache.reorder_cache(torch.tensor([1, 0])), 2),
            (lambda: cache.batch_repeat_interleave(2), 4),
            (lambda: cache.batch_select_indices(torch.tensor([3, 0, 0])), 3),
            (lambda: cache.crop(-5), 3),
        ):
            change()
            model(tokens(1, rows), past_key_values=cache)
            assert made.take() <= rows * few < rows * 50 * TOKEN
        fork = copy.deepcopy(cache)
        length = fork.get_seq_length()
        model(tokens(1, 3), past_key_values=fork)
        assert made.take() >= 3 * length * TOKEN, "a copy begins anew"
        model(tokens(1, 3), past_key_values=fork)
        assert made.take() <= 3 * few


@torch.no_grad()
def test_switched_off_every_token_costs_the_whole_cache(model, made: Made) -> None:
    with encoded_llama(model, keys_for(model, keep_keystream=False)):
        cache = model(tokens(50)).past_key_values
        assert kept_by(cache) == []
        made.take()
        model(tokens(1), past_key_values=cache)
        assert made.take() >= 51 * TOKEN
        assert kept_by(cache) == []
    with encoded_llama(model, keys_for(model, master_key=bytes(32))):  # the generator of the model that runs decides
        cache = model(tokens(50)).past_key_values
        assert len(kept_by(cache)) == LAYERS
    with encoded_llama(model, SCXKeyGenerator.for_session(cache.session, keep_keystream=False)):
        model(tokens(1), past_key_values=cache)
        assert kept_by(cache) == []
    assert not SCXKeyGenerator.for_session(cache.session).keep_keystream


def kept_by(cache: EncodedCache) -> list[KeptKeystream]:
    return list(cache.session._kept.values())


def run_through(model, path, *, keep: bool) -> list[Tensor]:
    """Logits and stored bits of everything that can be done to a cache, under the same keys every time."""
    seen: list[Tensor] = []
    options = {"keep_keystream": keep, "master_key": b"\x11" * 32}
    seed = iter(range(1000))

    def step(cache: EncodedCache, count: int = 1) -> None:
        seen.append(model(tokens(count, cache.rows, next(seed)), past_key_values=cache).logits)
        seen.extend(x.view(torch.int32).clone() for layer in cache.layers for x in (layer.keys, layer.values))

    with encoded_llama(model, keys_for(model, **options)):
        cache = DynamicCache(config=model.config)
        cache.activate_past_recording()  # a window can be cropped only where what leaves it is recorded
        model(tokens(30, 2), past_key_values=cache)
        step(cache)
        step(cache, 5)
        cache.crop(-3)
        step(cache)
        fork = copy.deepcopy(cache)
        step(fork)
        step(cache, 2)
        for change in (
            lambda: cache.reorder_cache(torch.tensor([1, 1])),
            lambda: cache.batch_repeat_interleave(3),
            lambda: cache.batch_select_indices(torch.tensor([5, 0, 3])),
        ):
            change()
            step(cache)
            step(cache)
        gpu, cpu = split_kvcache_dynamic(cache, gpu_layers=[])
        seen.append(model(tokens(1, 3), gpu_kvcache=gpu, cpu_kvcache=cpu).logits)
        step(merge_kvcache_dynamic(gpu, cpu))
        step(pickle.loads(pickle.dumps(cache)))
        save_keys(path / "keys", cache.session, key=bytes(32))
        save_kvcache(path / "cache", cache, cache.session)
        for _ in range(2):
            session = load_keys(path / "keys", key=bytes(32))
            loaded = load_kvcache(path / "cache", session)
            step(loaded)
            step(loaded)
        cache.reset()
        out = model(tokens(7), past_key_values=cache)
        seen.append(out.logits)
        step(cache)
    return seen


@torch.no_grad()
@pytest.mark.parametrize("window", [None, 9])
def test_switching_it_off_changes_no_bit(tmp_path, monkeypatch: pytest.MonkeyPatch, window: int | None) -> None:
    model = tiny_model("mistral", layers=2, sliding_window=window).to("cpu")
    runs = []
    for keep in (True, False):
        with monkeypatch.context() as patch:
            number = iter(range(10**6))
            patch.setattr("secrets.token_bytes", lambda size, n=number: next(n).to_bytes(4, "little") * (size // 4))
            path = tmp_path / str(keep)
            path.mkdir()
            runs.append(run_through(model, path, keep=keep))
    assert len(runs[0]) == len(runs[1]) > 50
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@torch.no_grad()
def test_a_forked_process_makes_and_keeps_its_own(model, made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    """It goes on in another branch, so nothing that its parent kept serves what it writes."""
    with encoded_llama(model, keys_for(model, alp=False)):
        cache = model(tokens(30)).past_key_values
        expected = model(tokens(1), past_key_values=copy.deepcopy(cache)).logits
        parent = cache.session.branch
        monkeypatch.setattr("os.getpid", lambda: -1)
        made.take()
        assert torch.equal(model(tokens(1), past_key_values=cache).logits, expected)
        assert made.take() >= 31 * TOKEN
        for index, layer in enumerate(cache.layers):
            own = cache.sealing(index, layer.keys.device)
            assert layer.branch != parent
            for is_value in (False, True):
                fresh = sealing.keystream(own, HEADS, 16, torch.float32, is_value=is_value)
                assert torch.equal(own.kept.find(own, HEADS, 16, torch.float32, is_value=is_value), fresh)


@torch.no_grad()
def test_it_goes_with_the_cache(model) -> None:
    with encoded_llama(model, keys_for(model)):
        cache = model(tokens(20)).past_key_values
        session = cache.session
        model(tokens(1), past_key_values=cache)
        stores = [weakref.ref(store) for store in kept_by(cache)]
        cached = sum(x.nbytes for layer in cache.layers for x in (layer.keys, layer.values))
        assert len(stores) == LAYERS
        assert cached <= sum(store().nbytes for store in stores) <= 2 * cached + LAYERS * 64 * ROW * HEADS * 2
        fork = copy.deepcopy(cache)
        model(tokens(1), past_key_values=fork)
        assert len(session._kept) == 2 * LAYERS
        del fork
        gc.collect()
        assert len(session._kept) == LAYERS
        cache.reset()
        assert len(session._kept) == 0
        gc.collect()
        assert all(store() is None for store in stores)
        cache = model(tokens(4), past_key_values=cache).past_key_values
        stores = [weakref.ref(store) for store in kept_by(cache)]
        del cache
        gc.collect()
        assert [store() for store in stores] == [None] * LAYERS


@torch.no_grad()
def test_it_is_in_nothing_that_leaves(model, tmp_path) -> None:
    """Not in a pickle, a file, a copy of a layer or what a session prints."""
    with encoded_llama(model, keys_for(model)):
        cache = model(tokens(20)).past_key_values
        session = cache.session
        save_kvcache(tmp_path / "cache", cache, session)
        save_keys(tmp_path / "keys", session, key=bytes(32))
        left = [pickle.dumps(cache), pickle.dumps(cache.layers), repr([session, cache, cache.layers]).encode()]
        left += [(tmp_path / name).read_bytes() for name in ("cache", "keys")]
        for index, layer in enumerate(cache.layers):
            own = cache.sealing(index, layer.keys.device)
            for is_value in (False, True):
                bits = own.kept.find(own, HEADS, 16, torch.float32, is_value=is_value)
                for row in bits.contiguous().view(-1, 16).numpy():
                    assert not any(row.tobytes() in data for data in left)
        assert len(session._kept) == LAYERS
        with pytest.raises(TypeError, match="never pickled"):
            pickle.dumps(session)


def test_nothing_is_kept_on_an_accelerator(model) -> None:
    """There keystream is made in registers."""
    session = keys_for(model).open_session(*shape_and_batch(model))
    owner = model.model.layers[0]
    here = torch.zeros(1, 3, dtype=torch.int64)
    assert session.sealing(0, here, session.branch, owner).kept is not None
    assert session.sealing(0, here.to("meta"), session.branch, owner).kept is None
    assert len(session._kept) == 0
    assert session.sealing(0, here, session.branch).kept is None


def shape_and_batch(model) -> tuple:
    return model_shape(model), 1


def test_operators_take_a_sealing_that_keeps(made: Made) -> None:
    """Kernels get key, numbers and layer, and none of what is kept."""
    own = sealed_by(WriteCounter().take(1, 4), rounds=8)
    store = KeptKeystream()
    store.cover(own, 1, 16, torch.float32)
    q, k, v = (torch.randn(1, 1, n, 16) for n in (1, 4, 4))
    k, v = ops.seal(k, own, is_value=False), ops.seal(v, own, is_value=True)
    with ops.backend("triton"):
        expected = ops.attention_step(q, k, v, softmax_scale=0.3, sealing=own)
        got = ops.attention_step(q, k, v, softmax_scale=0.3, sealing=own.replace(kept=store))
        assert torch.equal(got, expected)
        resealed = ops.reseal(k, own.replace(kept=store), own.replace(layer=9, kept=store), is_value=False)
    assert torch.equal(
        resealed.view(torch.int32), ops.reseal(k, own, own.replace(layer=9), is_value=False).view(torch.int32)
    )
