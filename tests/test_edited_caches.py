"""What callers do to a cache, by hand or by its methods: as with a plain one, or refused before anything changes."""

import copy
import pickle
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny import tiny_model
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, StaticCache
from transformers.cache_utils import DynamicLayer

import scx_kernels as ops
from scx import (
    EncodedCache,
    SCXKeyGenerator,
    decode_kvcache,
    encode_llama,
    encoded_llama,
    load_kvcache,
    save_kvcache,
    split_kvcache_dynamic,
)
from scx.kvcache import SealedLayer
from scx.kvcache.layers import Buffers, GrowingLayer

ENCODINGS = ["permuted", "sealed"]
TOKENS = 9


def keys_for(model: PreTrainedModel, encoding: str, **options: Any) -> SCXKeyGenerator:
    return SCXKeyGenerator.for_model(model, cache_encoding=encoding, **{"redundant_num": 3, "alp": True, **options})


def sliding_model(window: int) -> PreTrainedModel:
    """All layers but the first slide."""
    return tiny_model("qwen2", use_sliding_window=True, max_window_layers=1, sliding_window=window)


def states(cache: DynamicCache) -> list[Tensor]:
    return [x for layer in cache.layers for x in (layer.keys, layer.values)]


def patterns(tensors: list[Tensor]) -> list[Tensor]:
    """Copies that compare bit by bit; what is sealed may look like NaN."""
    return [ops.sealing.patterns(x).clone() for x in tensors]


def assert_equal(got: list[Tensor], expected: list[Tensor]) -> None:
    assert len(got) == len(expected)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def assert_close(got: Tensor, expected: Tensor, tolerance: float = 1e-4) -> None:
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)


def decoded(cache: EncodedCache) -> list[Tensor]:
    return states(decode_kvcache(cache, cache.session))


class Twins:
    """A plain and an encoded model over the same weights, each with a cache of the same prompt."""

    def __init__(self, encoding: str, prompt: Callable, batch: int = 1, model: Callable = tiny_model) -> None:
        self.plain, self.encoded = model(), model()
        encode_llama(self.encoded, keys_for(self.encoded, encoding))
        self.prompt = prompt
        ids = prompt(TOKENS, batch)
        self.plain_cache: DynamicCache = self.plain(ids).past_key_values
        self.cache: EncodedCache = self.encoded(ids).past_key_values

    def edit(self, change: Callable[[Any], Any]) -> None:
        for cache in (self.plain_cache, self.cache):
            change(cache)

    def step(self, count: int = 1, batch: int | None = None, seed: int = 5, tolerance: float = 1e-4) -> None:
        """A pass over both caches gives the same logits."""
        ids = self.prompt(count, self.cache.rows if batch is None else batch, seed)
        expected = self.plain(ids, past_key_values=self.plain_cache).logits
        assert_close(self.encoded(ids, past_key_values=self.cache).logits, expected, tolerance)


@pytest.fixture
def twins(prompt) -> Callable[..., Twins]:
    def make(encoding: str, **options: Any) -> Twins:
        with torch.no_grad():
            return Twins(encoding, prompt, **options)

    return make


def by_layer(change: Callable[[Any], None]) -> Callable[[Any], None]:
    def edit(cache: Any) -> None:
        for layer in cache.layers:
            change(layer)

    return edit


def replace(**made: Callable[[Tensor], Tensor]) -> Callable[[Any], None]:
    """Every layer's keys or values, made of those that are there."""

    def change(layer: Any) -> None:
        for name, make in made.items():
            setattr(layer, name, make(getattr(layer, name)))

    return by_layer(change)


def both(make: Callable[[Tensor], Tensor]) -> Callable[[Any], None]:
    return replace(keys=make, values=make)


def set_data(layer: Any) -> None:
    layer.values.data = layer.values.data * 0.5


def write_over(layer: Any) -> None:
    layer.values.mul_(0.5)


EDITS: dict[str, Callable[[Any], None]] = {
    "values scaled": replace(values=lambda x: x * 0.5),
    "keys scaled": replace(keys=lambda x: x * 0.5),
    "both quantised": both(lambda x: (x * 8).round() / 8),
    "values through half precision": replace(values=lambda x: x.half().float()),
    "values written over": by_layer(write_over),
    "values' data set": by_layer(set_data),
    "oldest cut": both(lambda x: x[:, :, 2:]),
    "newest cut": both(lambda x: x[:, :, :-2]),
    "every other token": both(lambda x: x[:, :, ::2]),
    "copied": both(torch.clone),
}


class TestReplaced:
    @torch.no_grad()
    @pytest.mark.parametrize("name", EDITS)
    def test_a_permuted_cache_is_what_its_holder_makes_of_it(self, twins, name: str) -> None:
        """Edits that treat all features alike do the same as in a plain cache, right after the prompt and later on."""
        pair = twins("permuted")
        # A value between two steps of a coarser kind of number may fall on either side: of half precision, 2^-11 apart.
        tolerance = 1e-3 if name == "values through half precision" else 1e-4
        for count in (4, 1, 1):
            pair.edit(EDITS[name])
            pair.step(count, tolerance=tolerance)
            pair.step(tolerance=tolerance)

    @torch.no_grad()
    @pytest.mark.parametrize("name", EDITS)
    @pytest.mark.parametrize("edited", [0, 1])
    def test_a_sealed_cache_refuses(self, twins, prompt, tmp_path, name: str, edited: int) -> None:
        """By its name and the layer's, whoever asks, where all layers were edited and where one was; nothing is
        changed."""
        pair = twins("sealed")
        cache, session = pair.cache, pair.cache.session
        EDITS[name](cache if edited == 0 else SimpleNamespace(layers=[cache.layers[edited]]))
        before, held = patterns(states(cache)), [dict(vars(layer)) for layer in cache.layers]
        for argument, use in {
            "past_key_values": lambda: pair.encoded(prompt(1), past_key_values=cache),
            "cache": lambda: decode_kvcache(cache, session),
            "crop": lambda: cache.crop(-1),
            "reorder_cache": lambda: cache.reorder_cache(torch.tensor([0])),
            "keep_tokens": lambda: cache.keep_tokens([0]),
        }.items():
            with pytest.raises(ValueError, match=f"{argument}: layer {edited}: its K and V are sealed.* keep_tokens"):
                use()
        with pytest.raises(ValueError, match=f"cache: layer {edited}"):
            save_kvcache(tmp_path / "cache", cache, session)
        for copied in (copy.copy, copy.deepcopy, pickle.dumps):
            with pytest.raises(ValueError, match="its K and V are sealed"):
                copied(cache)
        assert_equal(patterns(states(cache)), before)
        for layer, earlier in zip(cache.layers, held, strict=True):
            assert all(vars(layer)[item] is earlier[item] for item in ("keys", "values", "writes"))
        assert not list(tmp_path.iterdir())

    @torch.no_grad()
    def test_a_sealed_layer_refuses_by_itself(self, twins) -> None:
        layer = twins("sealed", batch=2).cache.layers[0]
        layer.values = layer.values * 2
        for change in (
            lambda: layer.crop(-1),
            lambda: layer.batch_repeat_interleave(2),
            lambda: layer.batch_select_indices(torch.tensor([0])),
            lambda: layer.reorder_cache(torch.tensor([1, 0])),
            lambda: copy.copy(layer),
        ):
            with pytest.raises(ValueError, match="its K and V are sealed"):
                change()
        with pytest.raises(TypeError, match="expected one that is not sealed"):
            layer.update(layer.keys, layer.values)

    @torch.no_grad()
    def test_tensors_of_another_moment(self, twins, prompt) -> None:
        """They fit in shape, but their numbers are not here."""
        pair = twins("sealed")
        first = [(layer.keys, layer.values) for layer in pair.cache.layers]
        pair.cache.crop(-2)
        pair.encoded(prompt(2), past_key_values=pair.cache)
        for layer, (keys, values) in zip(pair.cache.layers, first, strict=True):
            assert layer.keys.shape == keys.shape
            layer.keys, layer.values = keys, values
        with pytest.raises(ValueError, match="layer 0: its K and V are sealed"):
            pair.encoded(prompt(1), past_key_values=pair.cache)

    @torch.no_grad()
    def test_edited_as_the_refusal_says(self, twins, prompt) -> None:
        """Decoded, edited, given to the encoded model."""
        pair = twins("sealed")
        pair.cache = decode_kvcache(pair.cache, pair.cache.session)
        pair.edit(EDITS["values scaled"])
        pair.step(batch=1)
        assert isinstance(pair.cache, EncodedCache)


class TestKept:
    """What somebody holds, a tensor or a fork, stays what it is, whoever goes on."""

    @torch.no_grad()
    @pytest.mark.parametrize("encoding", ENCODINGS)
    def test_tensors_are_never_written_over(self, twins, prompt, encoding: str) -> None:
        pair = twins(encoding)
        kept, before = [], []

        def keep() -> None:
            kept.extend(states(pair.cache))
            before.extend(patterns(states(pair.cache)))

        def interrupt(*_) -> None:
            keep()
            raise KeyboardInterrupt

        for change in (
            lambda c: None,
            lambda c: c.crop(-1),
            lambda c: c.reorder_cache(torch.tensor([0])),
            lambda c: c.keep_tokens([0, 1, 2, -1]),
            lambda c: None,
        ):
            keep()
            change(pair.cache)
            keep()
            pair.encoded(prompt(2), past_key_values=pair.cache)
            handle = pair.encoded.model.layers[1].register_forward_hook(interrupt)
            with pytest.raises(KeyboardInterrupt):
                pair.encoded(prompt(2, seed=8), past_key_values=pair.cache)
            handle.remove()
            pair.encoded(prompt(2, seed=9), past_key_values=pair.cache)
        pair.cache.reset()
        assert_equal(patterns(kept), before)

    @torch.no_grad()
    def test_a_state_is_put_back(self, twins) -> None:
        """The caller keeps tensors, lets the cache go on, and goes back: to the prompt, and to either continuation."""
        pair = twins("permuted")
        kept: dict[str, tuple[list, ...]] = {}

        def keep(name: str) -> None:
            kept[name] = tuple([(x.keys, x.values) for x in c.layers] for c in (pair.plain_cache, pair.cache))

        def put_back(name: str) -> None:
            for cache, held in zip((pair.plain_cache, pair.cache), kept[name], strict=True):
                for layer, (keys, values) in zip(cache.layers, held, strict=True):
                    layer.keys, layer.values = keys, values

        keep("prompt")
        pair.step(4, seed=1)
        keep("one")
        put_back("prompt")
        pair.step(4, seed=2)
        keep("other")
        for name in ("one", "other", "prompt", "one"):
            put_back(name)
            pair.step(2, seed=3)

    @torch.no_grad()
    @pytest.mark.parametrize("encoding", ENCODINGS)
    @pytest.mark.parametrize("sliding", [False, True], ids=["full", "sliding"])
    @pytest.mark.parametrize("fork", ["cache", "layers", "deep", "parts", "pickled"])
    def test_forks(self, twins, prompt, encoding: str, sliding: bool, fork: str) -> None:
        """Both go on, in turns, and neither hears of the other."""
        pair = twins(encoding, model=(lambda: sliding_model(6)) if sliding else tiny_model)
        pair.step()  # the buffers have room now
        cache, other_plain = pair.cache, copy.deepcopy(pair.plain_cache)
        if fork == "parts":
            gpu, cpu = split_kvcache_dynamic(cache, gpu_layers=[1], cpu_device=cache.layers[0].keys.device)
            other = gpu.join(cpu)
        elif fork == "layers":
            other = copy.copy(cache)
            other.layers = [copy.copy(layer) for layer in cache.layers]
        else:
            made = {"cache": copy.copy, "deep": copy.deepcopy, "pickled": lambda c: pickle.loads(pickle.dumps(c))}
            other = made[fork](cache)
        for seed in range(3):
            pair.step(1 + seed, seed=seed)
            ids = prompt(2, seed=20 + seed)
            expected = pair.plain(ids, past_key_values=other_plain).logits
            assert_close(pair.encoded(ids, past_key_values=other).logits, expected)

    @torch.no_grad()
    @pytest.mark.parametrize("encoding", ENCODINGS)
    def test_growing_copies_nothing_that_is_there(self, twins, prompt, encoding: str) -> None:
        """Token after token lies in the same buffers, rows of a beam search in new ones after each selection alone."""
        pair = twins(encoding, batch=2)
        made = []
        with pytest.MonkeyPatch.context() as patch:
            init = Buffers.__init__
            patch.setattr(Buffers, "__init__", lambda self, *args: made.append(args[0].shape[2]) or init(self, *args))
            for _ in range(40):
                pair.encoded(prompt(1, 2), past_key_values=pair.cache)
            assert not made
            for _ in range(5):
                pair.cache.reorder_cache(torch.tensor([1, 0]))
                for _ in range(2):
                    pair.encoded(prompt(1, 2), past_key_values=pair.cache)
        assert len(made) == 5 * len(pair.cache.layers)

    @torch.no_grad()
    def test_parts_follow_the_whole(self, twins, prompt) -> None:
        """Rows of a joined cache are reordered; its parts, over the same layers, decode them with the same keys."""
        pair = twins("permuted", batch=3)
        gpu, cpu = split_kvcache_dynamic(pair.cache, gpu_layers=[1], cpu_device=pair.cache.layers[0].keys.device)
        ids = prompt(1, 3)
        joined = pair.encoded(ids, gpu_kvcache=gpu, cpu_kvcache=cpu).past_key_values
        pair.plain(ids, past_key_values=pair.plain_cache)
        for cache in (joined, pair.plain_cache):
            cache.reorder_cache(torch.tensor([2, 0, 0]))
        expected = pair.plain(ids, past_key_values=pair.plain_cache).logits
        assert_close(pair.encoded(ids, gpu_kvcache=gpu, cpu_kvcache=cpu).logits, expected)
        stale = pickle.loads(pickle.dumps(gpu))
        stale.attach(cpu.session)
        stale.join(pickle.loads(pickle.dumps(cpu)).attached(cpu.session))
        joined.reorder_cache(torch.tensor([1, 0, 2]))
        with pytest.raises(ValueError, match="rows continue different sequences"):
            stale.join(cpu)


INDICES = {
    "numbers": [2, 0],
    "a tensor": torch.tensor([2, 0]),
    "int32": torch.tensor([1, 2, 2, 0], dtype=torch.int32),
    "negative": torch.tensor([-1, 0, -2]),
    "negative numbers": [-3, -1],
    "a mask": torch.tensor([True, False, True]),
    "a mask as a list": [False, True, True],
}
OUT_OF_RANGE = {
    "too large": torch.tensor([0, 3]),
    "too small": [-4, 0],
    "another mask": torch.tensor([True, False]),
    "none": torch.tensor([False, False, False]),
}
NO_INDICES = {"floats": torch.tensor([0.0, 1.0]), "one number": torch.tensor(1), "a table": torch.tensor([[0], [1]])}


@pytest.mark.parametrize("encoding", ENCODINGS)
class TestRows:
    @torch.no_grad()
    @pytest.mark.parametrize("name", INDICES)
    @pytest.mark.parametrize("method", ["batch_select_indices", "reorder_cache"])
    def test_selected_as_in_a_plain_cache(self, twins, encoding: str, name: str, method: str) -> None:
        """However they are named, once and again."""
        pair, index = twins(encoding, batch=3), INDICES[name]
        for chosen in (index, [1, 1]):
            pair.plain_cache.batch_select_indices(chosen)
            getattr(pair.cache, method)(chosen)
            pair.step()
            for a, b in zip(decoded(pair.cache), states(pair.plain_cache), strict=True):
                assert_close(a, b)

    @torch.no_grad()
    @pytest.mark.parametrize("repeats", [1, 3])
    def test_repeated(self, twins, encoding: str, repeats: int) -> None:
        pair = twins(encoding, batch=2)
        pair.edit(lambda c: c.batch_repeat_interleave(repeats))
        pair.step(2)

    @torch.no_grad()
    def test_refused_before_anything_changes(self, twins, encoding: str) -> None:
        pair = twins(encoding, batch=3)
        cache, before = pair.cache, patterns(states(pair.cache))
        for change in (cache.batch_select_indices, cache.reorder_cache):
            for index in OUT_OF_RANGE.values():
                with pytest.raises(IndexError, match="(indices|beam_idx): expected"):
                    change(index)
            for index in NO_INDICES.values():
                with pytest.raises(TypeError, match=r"(indices|beam_idx): expected \(n,\) integers or \(3,\) bool"):
                    change(index)
        with pytest.raises(IndexError, match="repeats: expected at least one"):
            cache.batch_repeat_interleave(0)
        for index in (torch.tensor([TOKENS]), [-TOKENS - 1], [True, False], torch.zeros(TOKENS, dtype=torch.bool)):
            with pytest.raises(IndexError, match="index: expected"):
                cache.keep_tokens(index)
        assert cache.sequences is None
        assert_equal(patterns(states(cache)), before)
        pair.step()

    @torch.no_grad()
    def test_half_a_change_is_undone(self, prompt, encoding: str) -> None:
        """A layer that slides cannot be cropped any more, when the one before it has been."""
        model = sliding_model(5)
        with encoded_llama(model, keys_for(model, encoding)):
            cache = model(prompt(TOKENS)).past_key_values
            before = patterns(states(cache))
            with pytest.raises(RuntimeError, match="does not track past states"):
                cache.crop(-2)
            assert_equal(patterns(states(cache)), before)
            assert [layer.get_seq_length() for layer in cache.layers] == [TOKENS] * 3


KEPT_TOKENS = {
    "oldest evicted": [3, 4, 5, 6, 7, 8],
    "middle evicted": torch.tensor([0, 1, 7, 8]),
    "a mask": torch.arange(TOKENS) % 3 != 1,
    "sinks and the newest": [0, -2, -1],
    "one": torch.tensor([4], dtype=torch.int32),
    "all": list(range(TOKENS)),
}


@pytest.mark.parametrize("encoding", ENCODINGS)
class TestEviction:
    @torch.no_grad()
    @pytest.mark.parametrize("name", KEPT_TOKENS)
    @pytest.mark.parametrize("sliding", [False, True], ids=["full", "sliding"])
    def test_as_a_plain_cache_that_is_cut_by_hand(self, twins, encoding: str, name: str, sliding: bool) -> None:
        """Its tokens, and what the model makes of them, with one row and several; then cut again."""
        pair = twins(encoding, batch=2, model=(lambda: sliding_model(20)) if sliding else tiny_model)
        index = KEPT_TOKENS[name]
        pair.cache.keep_tokens(index)
        both(lambda x: x[:, :, index])(pair.plain_cache)
        for layer in pair.plain_cache.layers[sliding:]:
            layer.cumulative_length = layer.keys.shape[2]
        for a, b in zip(decoded(pair.cache), states(pair.plain_cache), strict=True):
            assert_close(a, b)
        pair.step(3)
        pair.step()
        pair.cache.keep_tokens([-1, -2])
        assert pair.cache.get_seq_length() == 2

    @torch.no_grad()
    def test_a_window_that_has_left_tokens_behind(self, prompt, encoding: str) -> None:
        """Tokens of the whole cannot be chosen there; a cache that records the past holds all of them."""
        model = sliding_model(5)
        with encoded_llama(model, keys_for(model, encoding)):
            cache = model(prompt(TOKENS)).past_key_values
            before = patterns(states(cache))
            with pytest.raises(RuntimeError, match="layer 1 slides a window and holds the last 4 of 9 tokens"):
                cache.keep_tokens([0, 1])
            assert_equal(patterns(states(cache)), before)
            recording = DynamicCache(config=model.config)
            recording.activate_past_recording()
            model(prompt(TOKENS), past_key_values=recording)
            expected = [x[:, :, [1, 3, 8]] for x in decoded(recording)]
            recording.keep_tokens([1, 3, 8])
            assert_equal(decoded(recording), expected)

    @torch.no_grad()
    def test_parts_and_too_many(self, twins, encoding: str) -> None:
        cache = twins(encoding).cache
        with pytest.raises(RuntimeError, match="keep_tokens changes all layers; merge the parts"):
            split_kvcache_dynamic(cache, gpu_layers=[1])[0].keep_tokens([0])
        with pytest.raises(IndexError, match="expected at most the 9 tokens"):
            cache.keep_tokens([0] * 10)


@pytest.mark.parametrize("encoding", ENCODINGS)
class TestWhole:
    """Layers that do not fit together are named at the door."""

    @torch.no_grad()
    @pytest.mark.parametrize(
        ("change", "match"),
        [
            (lambda c: c.layers[1].crop(-1), "different numbers of tokens, {0: 9, 1: 8, 2: 9}"),
            (lambda c: c.layers[2].reset(), "different numbers of tokens, {0: 9, 1: 9, 2: 0}"),
            (
                lambda c: [x.batch_repeat_interleave(2) for x in c.layers],
                r"layer 0: expected K and V \(2 rows, 2 heads",
            ),
            (lambda c: c.layers[1].batch_select_indices(torch.tensor([0])), r"layer 1: expected K and V \(2 rows"),
        ],
        ids=["one cut", "one empty", "all repeated", "one selected"],
    )
    def test_refused_by_name(self, twins, prompt, encoding: str, change: Callable, match: str) -> None:
        pair = twins(encoding, batch=2)
        change(pair.cache)
        before = patterns([x for x in states(pair.cache) if x is not None])
        for rows in (2, 4):
            with pytest.raises(ValueError, match=f"past_key_values: .*{match}"):
                pair.encoded(prompt(1, rows), past_key_values=pair.cache)
        with pytest.raises(ValueError, match=f"cache: .*{match}"):
            decode_kvcache(pair.cache, pair.cache.session)
        assert_equal(patterns([x for x in states(pair.cache) if x is not None]), before)

    @torch.no_grad()
    def test_joined_by_hand(self, twins, prompt, encoding: str) -> None:
        """Rows of two sessions lie under different keys; their plain caches are joined."""
        pair = twins(encoding)
        ids = prompt(TOKENS, seed=9)
        others = [model(ids).past_key_values for model in (pair.plain, pair.encoded)]
        plain = [decode_kvcache(c, c.session) for c in (pair.cache, others[1])]

        def join(a: DynamicCache, b: DynamicCache) -> None:
            for x, y in zip(a.layers, b.layers, strict=True):
                x.keys, x.values = torch.cat((x.keys, y.keys)), torch.cat((x.values, y.values))

        join(pair.cache, others[1])
        with pytest.raises(ValueError, match="layer 0.* plain cache.* decode_kvcache gives"):
            pair.encoded(prompt(1, 2), past_key_values=pair.cache)
        join(pair.plain_cache, others[0])
        join(*plain)
        pair.cache = plain[0]
        pair.step(3, batch=2)
        pair.step()

    @torch.no_grad()
    def test_a_window_cut_by_hand(self, prompt, encoding: str) -> None:
        model = sliding_model(5)
        with encoded_llama(model, keys_for(model, "permuted")):
            cache = model(prompt(TOKENS)).past_key_values
            cache.layers[1].keys, cache.layers[1].values = (x[:, :, 1:] for x in states(cache)[2:4])
            with pytest.raises(ValueError, match="layer 1 slides a window of 5, and only 3 of its 9 tokens are here"):
                model(prompt(1), past_key_values=cache)

    @torch.no_grad()
    def test_empty_at_the_front_alone(self, twins, prompt, encoding: str) -> None:
        """It looks empty to transformers; a session is not opened over tokens of another."""
        pair = twins(encoding)
        session = pair.cache.session_id
        pair.cache.layers[0].reset()
        with pytest.raises(ValueError, match=r"layers \[1, 2\] hold tokens, and the others none"):
            pair.encoded(prompt(1), past_key_values=pair.cache)
        assert pair.cache.session_id == session

    @torch.no_grad()
    def test_layers_of_another_model(self, prompt, encoding: str) -> None:
        model = tiny_model()
        cache = DynamicCache(config=tiny_model(layers=2).config)
        with (
            encoded_llama(model, keys_for(model, encoding)),
            pytest.raises(ValueError, match="expected the 3 layers of the model, got 2"),
        ):
            model(prompt(3), past_key_values=cache)
        assert type(cache) is DynamicCache


def filled(model: PreTrainedModel, ids: Tensor) -> DynamicCache:
    with torch.no_grad():
        return model(ids).past_key_values


@pytest.mark.parametrize("encoding", ENCODINGS)
class TestPlainCaches:
    """A plain cache that holds tokens goes on under the encoded model."""

    @torch.no_grad()
    @pytest.mark.parametrize("window", [None, 5, 20])
    def test_goes_on_encoded(self, twins, encoding: str, window: int | None) -> None:
        """The same object, its rows encoded; decoded it is bit by bit what it was."""
        pair = twins(encoding, batch=2, model=tiny_model if window is None else lambda: sliding_model(window))
        mine = copy.deepcopy(pair.plain_cache)
        pair.cache = copy.deepcopy(mine)
        encode = EncodedCache.encode(copy.deepcopy(mine), pair.encoded.model._scx.open_session(2))
        assert_equal(decoded(encode), states(mine))
        assert [x.get_mask_sizes(3) for x in encode.layers] == [x.get_mask_sizes(3) for x in mine.layers]
        for a, b in zip(patterns(states(encode)), patterns(states(mine)), strict=True):
            assert (a == b).float().mean() < 0.5
        assert all(isinstance(layer, SealedLayer) == (encoding == "sealed") for layer in encode.layers[:1])
        given = pair.cache
        pair.step(3, batch=2)
        assert type(given) is EncodedCache
        pair.step()
        given.reorder_cache([1, 1])
        pair.plain_cache.batch_select_indices([1, 1])
        pair.step()

    @torch.no_grad()
    def test_a_prefix_for_generation(self, prompt, encoding: str) -> None:
        model = tiny_model()
        ids = prompt(TOKENS, 2)
        prefix = filled(model, ids[:, :-1])
        expected = model.generate(ids, past_key_values=copy.deepcopy(prefix), max_new_tokens=6, do_sample=False)
        with encoded_llama(model, keys_for(model, encoding)):
            got = model.generate(ids, past_key_values=prefix, max_new_tokens=6, do_sample=False)
        assert torch.equal(got, expected)

    def test_gradients_into_a_prefix(self, prompt, encoding: str) -> None:
        """As prefix tuning trains it; under a seal they would be lost, and that is refused first."""
        model, ids = tiny_model().requires_grad_(False), prompt(4)
        prefix = [x.requires_grad_() for x in states(filled(model, prompt(3)))]
        grads = []
        for encoded in (False, True):
            cache = DynamicCache(list(zip(prefix[::2], prefix[1::2], strict=True)))
            if not encoded:
                model(ids, past_key_values=cache, labels=ids).loss.backward()
            else:
                with encoded_llama(model, keys_for(model, encoding)):
                    if encoding == "sealed":
                        with pytest.raises(ValueError, match="layer 0 is to be sealed, and gradients do not flow"):
                            model(ids, past_key_values=cache)
                        assert type(cache) is DynamicCache
                        return
                    own = EncodedCache.encode(cache, model.model._scx.open_session(1))
                    assert own.carries_gradients
                    key = own.feature_key(0, ids.device).key
                    own.layers[0].keys.square().sum().backward()
                    torch.testing.assert_close(prefix[0].grad - grads[0], 2 * prefix[0].detach())
                    assert key.shape[0] == 1
            grads = [x.grad.clone() for x in prefix]

    @torch.no_grad()
    @pytest.mark.parametrize(
        ("change", "kind", "match"),
        [
            (lambda c: c.layers.pop(), ValueError, "expected the 3 layers of the model, got 2"),
            (lambda c: c.layers[1].crop(-1), ValueError, "different numbers of tokens, {0: 9, 1: 8, 2: 9}"),
            (lambda c: c.batch_repeat_interleave(2), ValueError, r"layer 0: expected K and V \(1 rows, 2 heads"),
            (lambda c: setattr(c, "offloading", True), TypeError, "got a off-loading DynamicCache"),
            (lambda c: setattr(c.layers[2], "__class__", StrangeLayer), TypeError, "layer 2 is a StrangeLayer"),
            (lambda c: setattr(c, "__class__", StrangeCache), TypeError, "got a StrangeCache"),
        ],
        ids=["layers", "lengths", "rows", "off-loading", "a layer's kind", "kind"],
    )
    def test_refused_and_left_as_it_is(self, prompt, encoding: str, change: Callable, kind, match: str) -> None:
        model = tiny_model()
        cache = filled(model, prompt(TOKENS))
        cache.layer_class_to_replicate = None
        change(cache)
        layers, held, before = list(cache.layers), type(cache), patterns(states(cache))
        with encoded_llama(model, keys_for(model, encoding)), pytest.raises(kind, match=match):
            model(prompt(1), past_key_values=cache)
        assert type(cache) is held
        assert all(a is b for a, b in zip(cache.layers, layers, strict=True))
        assert_equal(patterns(states(cache)), before)

    @torch.no_grad()
    def test_static_caches(self, prompt, encoding: str) -> None:
        model = tiny_model()
        cache = StaticCache(config=model.config, max_cache_len=16)
        model(prompt(3), past_key_values=cache)
        with encoded_llama(model, keys_for(model, encoding)), pytest.raises(TypeError, match="got a StaticCache"):
            model(prompt(1), past_key_values=cache)

    @torch.no_grad()
    def test_encoded_rows_are_never_taken_for_plain_ones(self, twins, encoding: str) -> None:
        """A plain cache is not filled from an encoded one by going through its layers."""
        cache = twins(encoding).cache
        with pytest.raises(RuntimeError, match="decode_kvcache gives a plain cache"):
            DynamicCache(cache)
        with pytest.raises(ValueError, match="holds no tokens"):
            EncodedCache.encode(DynamicCache(), cache.session)

    @torch.no_grad()
    def test_made_ready_ahead(self, prompt, encoding: str) -> None:
        """A plain cache whose layers exist and are empty gets layers of the session's kind."""
        model = tiny_model()
        cache = DynamicCache(config=model.config)
        cache.early_initialization(1, 2, 16, torch.float32, model.device)
        with encoded_llama(model, keys_for(model, encoding)):
            model(prompt(4), past_key_values=cache)
        kind = SealedLayer if encoding == "sealed" else GrowingLayer
        assert all(type(layer) is kind for layer in cache.layers)


class StrangeLayer(DynamicLayer):
    pass


class StrangeCache(DynamicCache):
    pass


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize(
    ("first", "second"),
    [
        (torch.float32, torch.bfloat16),
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.bfloat16),
        (torch.bfloat16, torch.bfloat16),
    ],
    ids=str,
)
@torch.no_grad()
def test_rows_of_another_dtype(prompt, encoding: str, first: torch.dtype, second: torch.dtype) -> None:
    """Rows of two dtypes lie in the one that holds both, as where plain ones are joined; no keystream serves two."""
    model = tiny_model()
    with encoded_llama(model, keys_for(model, encoding)):
        session = model.model._scx.open_session(1)
        cache = EncodedCache.adopt(DynamicCache(config=model.config), session)
        numbers = []
        for layer in range(3):
            plain = []
            for tokens, dtype in ((5, first), (2, second), (1, second), (1, first)):
                states = [torch.randn(1, 2, tokens, 16, device=model.device).to(dtype) for _ in range(2)]
                key = session.feature_key(layer, model.device)
                writes = session.take_writes(1, tokens, model.device)
                stored = cache.append(*key.encode_cache(*states), layer, writes)
                plain = [states] if not plain else [[torch.cat(pair, 2) for pair in zip(plain[0], states, strict=True)]]
                assert stored.keys.dtype == stored.values.dtype == plain[0][0].dtype
                if encoding == "sealed":
                    numbers.append((cache.layers[layer].keys.dtype, layer, cache.layers[layer].writes.clone()))
            got = decode_kvcache(cache, session).layers[layer] if layer == 2 else None
            if got is not None:
                assert torch.equal(got.keys, plain[0][0])
                assert torch.equal(got.values, plain[0][1])
    used: dict[tuple[int, int], torch.dtype] = {}
    for dtype, layer, writes in numbers:
        for number in writes.flatten().tolist():
            assert used.setdefault((layer, number), dtype) == dtype


class TestGradients:
    """Rows that gradients flow into, and rows written in place, in one cache."""

    def test_between_passes_without(self, twins, prompt) -> None:
        """Gradients of two passes, with a pass in place before, between and behind them, are the plain model's."""
        pair = twins("permuted")
        grads = []
        for model, cache in ((pair.plain, pair.plain_cache), (pair.encoded, pair.cache)):
            losses = []
            for seed, with_gradients in enumerate((False, True, False, True, False, False)):
                with torch.set_grad_enabled(with_gradients):
                    logits = model(prompt(2, seed=seed), past_key_values=cache).logits
                if with_gradients:
                    losses.append(logits.square().mean())
            sum(losses).backward()
            grads.append([p.grad.clone() for p in model.parameters()])
        for a, b in zip(*grads, strict=True):
            torch.testing.assert_close(b, a, rtol=1e-3, atol=1e-3 * a.abs().max().item() + 1e-7)

    def test_rows_that_carry_gradients(self) -> None:
        """They come back through joined, selected and kept ones, and a layer in place takes copies without them."""
        layer = GrowingLayer()
        first = torch.randn(1, 2, 3, 16, requires_grad=True)
        layer.update(first, first)
        second = torch.randn(1, 2, 2, 16, requires_grad=True)
        keys, _ = layer.update(second, second)
        slots = layer.room(1, (1, 2, 16), torch.empty(0))
        slots.keys[:, :, 5:6], slots.values[:, :, 5:6] = 7.0, 7.0
        stored = layer.take_in(slots)
        assert not stored.keys.requires_grad
        keys.square().sum().backward()
        assert torch.equal(first.grad, 2 * first.detach())
        assert torch.equal(second.grad, 2 * second.detach())

    def test_a_kept_tensor_is_saved_for_gradients(self, twins, prompt) -> None:
        """Tokens that follow in its buffer do not count as a change of it."""
        pair = twins("permuted")
        kept = pair.cache.layers[0].keys
        weight = torch.ones(16, requires_grad=True)
        loss = (kept * weight).square().sum()
        with torch.no_grad():
            pair.encoded(prompt(3), past_key_values=pair.cache)
        loss.backward()
        torch.testing.assert_close(weight.grad, 2 * kept.square().sum((0, 1, 2)))


OPERATIONS: dict[str, Callable[[Any], Any]] = {
    "reorder": lambda c: c.reorder_cache(torch.tensor([1, 0])),
    "select": lambda c: c.batch_select_indices([True, True]),
    "repeat": lambda c: c.batch_repeat_interleave(1),
    "crop": lambda c: c.crop(-2),
    "keep": lambda c: c.keep_tokens([0, 3, 5]),
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "unpickle": lambda c: pickle.loads(pickle.dumps(c)),
    "decode": lambda c: decode_kvcache(c, c.session),
    "on": lambda c: c.on("cpu" if c.layers[0].keys.device.type == "cpu" else None),
}


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("sliding", [False, True], ids=["full", "sliding"])
class TestInferenceMode:
    """What is done to a cache under `torch.inference_mode` goes on outside of it."""

    def go_on(self, model, cache: Any, other: Any, prompt, gradients: bool) -> None:
        """Both caches give the same."""
        gradients = gradients and model.model._scx.generator.settings(model.model._scx.shape).sealed_layers == ()
        for count in (2, 1, 1):
            logits = []
            for given in (cache, other):
                with torch.set_grad_enabled(gradients):
                    logits.append(model(prompt(count, 2, 4), past_key_values=given).logits)
            assert_close(logits[0], logits[1])
            assert logits[0].requires_grad == gradients

    @pytest.mark.parametrize("name", OPERATIONS)
    def test_operations(self, prompt, encoding: str, gradients: bool, sliding: bool, name: str) -> None:
        model = sliding_model(20) if sliding else tiny_model()
        with encoded_llama(model, keys_for(model, encoding)):
            cache = filled(model, prompt(TOKENS, 2))
            other = copy.deepcopy(cache)
            with torch.inference_mode():
                made = OPERATIONS[name](cache) or cache
            other = OPERATIONS[name](other) or other
            self.go_on(model, made, other, prompt, gradients)

    def test_encoded_and_loaded(self, prompt, tmp_path, encoding: str, gradients: bool, sliding: bool) -> None:
        model = sliding_model(20) if sliding else tiny_model()
        with torch.inference_mode():
            plain = model(prompt(TOKENS, 2)).past_key_values
        with encoded_llama(model, keys_for(model, encoding)):
            with torch.inference_mode():
                cache = EncodedCache.encode(copy.deepcopy(plain), model.model._scx.open_session(2))
                save_kvcache(tmp_path / "cache", cache, cache.session)
                loaded = load_kvcache(tmp_path / "cache", cache.session, device=model.device)
            self.go_on(model, loaded, cache, prompt, gradients)
