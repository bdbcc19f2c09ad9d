"""A model whose cache is sealed: the same output, and noise to whoever reads the cache without the key."""

import copy
import json
import pickle

import parity
import pytest
import torch
from tiny import tiny_model
from torch import Tensor
from transformers import DynamicCache, set_seed
from transformers.cache_utils import DynamicLayer

import scx_kernels as ops
from scx import (
    EncodedCache,
    FileRefusedError,
    SCXKeyGenerator,
    decode_kvcache,
    encoded_llama,
    load_keys,
    load_kvcache,
    merge_kvcache_dynamic,
    save_keys,
    save_kvcache,
    split_kvcache_dynamic,
)
from scx.audit import read_first_block
from scx.files.container import read_container, write_container
from scx.kvcache import SealedLayer, SealedSlidingLayer

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
KEY = b"\x11" * 32


def keys_for(model, **options) -> SCXKeyGenerator:
    return SCXKeyGenerator.for_model(model, **{"cache_encoding": "sealed", "redundant_num": 3, "alp": True, **options})


def stored(cache: EncodedCache) -> list[Tensor]:
    return [x for layer in cache.layers for x in (layer.keys, layer.values)]


def patterns(x: Tensor) -> Tensor:
    return x.view(torch.int32 if x.dtype == torch.float32 else torch.int16)


def assert_same(got: list[Tensor], expected: list[Tensor]) -> None:
    """Bit by bit; on a GPU up to rounding: PyTorch attends to a permuted cache there where a kernel attends to a sealed
    one, and steps on the two have tiles of their own."""
    for a, b in zip(got, expected, strict=True):
        if parity.DEVICE.type == "cuda":
            torch.testing.assert_close(a, b, rtol=0, atol=64 * torch.finfo(b.dtype).eps * b.abs().max().item())
        else:
            assert torch.equal(a, b)


@torch.no_grad()
def run_passes(model, passes: list[Tensor], mask: Tensor | None = None, **options):
    """Logits of passes one after the other, under the same session keys every time, and the cache."""
    logits, cache, seen = [], None, 0
    with encoded_llama(model, keys_for(model, master_key=KEY, **options)), pytest.MonkeyPatch.context() as patch:
        patch.setattr("secrets.token_bytes", lambda size: b"\x22" * size)
        for ids in passes:
            seen += ids.shape[1]
            given = None if mask is None else mask[:, :seen]
            out = model(ids, attention_mask=given, past_key_values=cache, use_cache=True)
            logits, cache = [*logits, out.logits], out.past_key_values
    return logits, cache


def run(model, ids: Tensor, steps: int, mask: Tensor | None = None, **options):
    """`run_passes` of a prefill and of steps after it, whose tokens are the prompt's."""
    if mask is not None:
        mask = torch.cat((mask, mask.new_ones(len(mask), steps)), dim=1)
    return run_passes(model, [ids, *ids[:, :steps].split(1, dim=1)], mask, **options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rounds", [8, 12, 20])
def test_logits_are_bitwise_those_of_the_unsealed_cache(prompt, dtype, rounds) -> None:
    model, ids = tiny_model(dtype=dtype), prompt(9, 2)
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    for given in (None, mask):
        permuted, plain_cache = run(model, ids, 4, given, cache_encoding="permuted")
        sealed, cache = run(model, ids, 4, given, cipher_rounds=rounds)
        assert_same(sealed, permuted)
        assert all(isinstance(layer, SealedLayer) for layer in cache.layers)
        for a, b in zip(stored(cache), stored(plain_cache), strict=True):
            assert (patterns(a) == patterns(b)).float().mean() < 0.01, "nothing is stored as it was"
        decoded = [decode_kvcache(x, x.session) for x in (cache, plain_cache)]
        assert_same(*map(stored, decoded))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16], ids=str)
def test_bitwise_equal_on_the_kernels(prompt, dtype) -> None:
    """With every operation computed by its kernel, sealed and unsealed, prefill and steps."""
    model, ids = tiny_model(dtype=dtype, layers=2, heads=2, kv_heads=1), prompt(7)
    with ops.backend("triton"):
        permuted, _ = run(model, ids, 2, cache_encoding="permuted")
        sealed, cache = run(model, ids, 2)
    assert all(torch.equal(a, b) for a, b in zip(sealed, permuted, strict=True))
    by_reference, same = run(model, ids, 2)
    for a, b in zip(stored(cache), stored(same), strict=True):
        assert a.shape == b.shape
    for a, b in zip(sealed, by_reference, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=64 * torch.finfo(dtype).eps * b.abs().max().item())


def assert_same_passes(model, passes: list[Tensor], mask: Tensor | None = None, **options) -> None:
    permuted, _ = run_passes(model, passes, mask, cache_encoding="permuted", **options)
    sealed, _ = run_passes(model, passes, mask, **options)
    assert_same(sealed, permuted)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("cuts", [(5, 4, 1, 2), (1, 3, 1), (1, 1, 6)], ids=str)
def test_chunked_prefill_is_bitwise_equal(prompt, dtype, cuts) -> None:
    """The first pass attends to what it has not sealed yet, the others to what lies sealed: alone, after padding, and
    after a first pass of one token."""
    model, ids = tiny_model(dtype=dtype), prompt(sum(cuts), 2)
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    for given in (None, mask):
        assert_same_passes(model, list(ids.split(cuts, dim=1)), given)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32], ids=str)
def test_chunked_prefill_is_bitwise_equal_on_the_kernels(prompt, dtype) -> None:
    model, ids = tiny_model(dtype=dtype, layers=2, heads=2, kv_heads=1), prompt(11)
    with ops.backend("triton"):
        assert_same_passes(model, list(ids.split((6, 4, 1), dim=1)), cipher_rounds=8)


@torch.no_grad()
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_what_is_unsealed_in_a_pass(prompt, monkeypatch, attention) -> None:
    """The pass that opens a cache unseals nothing; one that meets tokens in it unseals K and V once a layer."""
    unsealed = []
    for module in ("scx_kernels.reference", "scx.models.fused.ops"):
        monkeypatch.setattr(f"{module}.unseal", lambda x, *args, **options: unsealed.append(x) or x)
    model = tiny_model(layers=2)
    model.set_attn_implementation(attention)
    with encoded_llama(model, keys_for(model)):
        cache = model(prompt(6)).past_key_values
        assert not unsealed
        model(prompt(3), past_key_values=cache)
        assert len(unsealed) == 4
        cache.reset()
        model(prompt(6), past_key_values=cache)
        assert len(unsealed) == 4


GENERATIONS = {
    "greedy": {"do_sample": False},
    "sampling": {"do_sample": True, "top_k": 20},
    "beams": {"do_sample": False, "num_beams": 4},
    "several samples": {"do_sample": True, "num_return_sequences": 3},
    "prompt lookup": {"do_sample": False, "prompt_lookup_num_tokens": 3},
    "chunked prefill": {"do_sample": False, "prefill_chunk_size": 4},
}


@pytest.mark.parametrize("kind", GENERATIONS)
def test_generate_gives_the_plain_models_tokens(prompt, kind: str) -> None:
    check_generation(tiny_model(), prompt, kind)


def check_generation(model, prompt, kind: str) -> None:
    """The plain model's tokens from a batch with left padding."""
    batch = 1 if kind == "prompt lookup" else 2
    ids = prompt(10, batch)
    mask = torch.ones_like(ids)
    mask[-1, : 4 * (batch - 1)] = 0
    settings = {"max_new_tokens": 12, "attention_mask": mask, **GENERATIONS[kind]}

    def generate() -> Tensor:
        set_seed(1)
        return model.generate(ids.masked_fill(mask == 0, 0), **settings)

    plain = generate()
    with encoded_llama(model, keys_for(model)):
        assert torch.equal(generate(), plain)


class Witness:
    """Reads memory, and knows what it holds: no keystream may ever serve two values."""

    def __init__(self) -> None:
        self.known: dict[tuple, bytes] = {}

    def look(self, cache: EncodedCache) -> int:
        """Enter all that is stored. Returns how many rows were new."""
        before = len(self.known)
        for index, layer in enumerate(cache.layers):
            sealing = cache.sealing(index, layer.keys.device)
            assert sealing is not None
            for kind, states in enumerate((layer.keys, layer.values)):
                plain = patterns(ops.unseal(states, sealing, is_value=kind == 1))
                for b in range(states.shape[0]):
                    for n, number in enumerate(layer.writes[b].tolist()):
                        for head in range(states.shape[1]):
                            name = (cache.session_id, layer.branch, index, kind, head, number)
                            row = plain[b, head, n].numpy(force=True).tobytes()
                            assert self.known.setdefault(name, row) == row, f"{name} sealed two values"
        return len(self.known) - before


def interrupt(*_) -> None:
    raise KeyboardInterrupt


@torch.no_grad()
def test_keystream_is_never_used_twice(prompt) -> None:
    """Whatever transformers does to a cache, two snapshots of memory never differ under the same keystream."""
    model, witness = tiny_model(layers=2), Witness()
    with encoded_llama(model, keys_for(model)):
        cache = model(prompt(9, 2)).past_key_values

        def step(given: EncodedCache, seed: int, count: int = 1) -> None:
            model(prompt(count, given.rows, seed), past_key_values=given)
            assert witness.look(given) > 0, "what is written is new to the witness"

        witness.look(cache)
        step(cache, 1)
        cache.crop(-3)
        step(cache, 2)
        fork = copy.deepcopy(cache)
        step(cache, 3)
        step(fork, 4, count=3)
        cache.reorder_cache(torch.tensor([1, 1]))
        witness.look(cache)
        step(cache, 5)
        cache.batch_repeat_interleave(2)
        step(cache, 6)
        cache.batch_select_indices(torch.tensor([3, 0]))
        step(cache, 7)
        gpu, cpu = split_kvcache_dynamic(cache, gpu_layers=[], cpu_device=cache.layers[0].keys.device)
        model(prompt(1, 2, 8), gpu_kvcache=gpu, cpu_kvcache=cpu)
        witness.look(merge_kvcache_dynamic(gpu, cpu))
        step(cache, 9)
        cache.crop(-2)
        step(cache, 10)
        cache.reset()
        # A pass that breaks off half-way has written rows that the next one writes again.
        handle = model.model.layers[1].register_forward_pre_hook(interrupt)
        with pytest.raises(KeyboardInterrupt):
            model(prompt(4, 2), past_key_values=fork)
        handle.remove()
        step(fork, 11, count=4)


@torch.no_grad()
def test_every_bit_looks_random(prompt) -> None:
    """Bytes of a sealed cache are uniform, whatever it holds; those of a permuted one are far from it."""
    model, ids = tiny_model(dtype=torch.bfloat16, heads=4, kv_heads=4, head_dim=64), prompt(200)

    def chi_square(encoding: str) -> float:
        with encoded_llama(model, keys_for(model, cache_encoding=encoding)):
            cache = model(ids).past_key_values
        counts = torch.stack(stored(cache)).contiguous().view(torch.uint8).flatten().long().bincount(minlength=256)
        expected = counts.sum() / 256
        return float(((counts - expected) ** 2 / expected).sum())

    assert 150 < chi_square("sealed") < 380  # 255 degrees of freedom: mean 255, deviation 22.6
    assert chi_square("permuted") > 10_000


@torch.no_grad()
def test_first_block_attack(prompt) -> None:
    """Sorting V's features reads every token out of a permuted cache, and none beyond chance out of a sealed one."""
    model, ids = tiny_model(heads=4, kv_heads=4, head_dim=32), prompt(64, seed=4)

    def read(encoding: str) -> int:
        with encoded_llama(model, keys_for(model, cache_encoding=encoding)):
            cache = model(ids).past_key_values
            return int((read_first_block(model, cache.layers[0].values) == ids).sum())

    assert read("permuted") == 64
    assert read("sealed") <= 5  # chance is 64 / 211


@torch.no_grad()
def test_an_encoding_for_each_layer(prompt) -> None:
    model, ids = tiny_model(), prompt(8)
    expected, _ = run(model, ids, 2, cache_encoding="permuted")
    logits, cache = run(model, ids, 2, cache_encoding=["sealed", "permuted", "sealed"])
    assert [isinstance(layer, SealedLayer) for layer in cache.layers] == [True, False, True]
    assert all(torch.equal(a, b) for a, b in zip(logits, expected, strict=True))


@torch.no_grad()
def test_files_and_another_holder(prompt, tmp_path) -> None:
    """A saved cache holds what memory held; who loads it goes on under a key of their own."""
    model, ids, witness = tiny_model(), prompt(9), Witness()
    with encoded_llama(model, keys_for(model)):
        cache = model(ids).past_key_values
        witness.look(cache)
        plain = [x.clone() for x in stored(decode_kvcache(cache, cache.session))]
        save_kvcache(tmp_path / "cache", cache, cache.session)
        save_keys(tmp_path / "keys", cache.session, passphrase="a passphrase")
        file = (tmp_path / "cache").read_bytes()
        assert cache.layers[0].keys.cpu().contiguous().view(torch.uint8).numpy().tobytes() in file
        expected = model(prompt(1, seed=2), past_key_values=copy.deepcopy(cache)).logits

        branches = {cache.session.branch}
        for _ in range(2):
            session = load_keys(tmp_path / "keys", passphrase="a passphrase", model=model)
            loaded = load_kvcache(tmp_path / "cache", session, device=ids.device, at_least=0)
            assert all(torch.equal(a, b) for a, b in zip(stored(decode_kvcache(loaded, session)), plain, strict=True))
            logits = model(prompt(1, seed=2), past_key_values=loaded).logits
            torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)  # under one-time noise of its own
            assert {layer.branch for layer in loaded.layers} == {session.branch}
            branches.add(session.branch)
            witness.look(loaded)
        assert len(branches) == 3


def sliding_model(family: str, window: int, **options):
    """Every layer of Mistral slides, and all but the first of the others."""
    if family != "mistral":
        options |= {"use_sliding_window": True, "max_window_layers": 1}
    return tiny_model(family, sliding_window=window, **options)


class TestSlidingWindows:
    """A layer that slides keeps its window's rows alone, sealed, and does what a permuted one does."""

    @pytest.mark.slow
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("family", ["mistral", "qwen2", "qwen3"])
    @pytest.mark.parametrize(("window", "length"), [(5, 12), (6, 6), (9, 5), (2, 4)])
    def test_bitwise_equal(self, prompt, family: str, dtype, window: int, length: int) -> None:
        """In a prompt longer than the window, a shorter one, and steps over its edge; padded or not."""
        model, ids = sliding_model(family, window, dtype=dtype), prompt(length, 2)
        mask = torch.ones_like(ids)
        mask[1, :3] = 0
        for given in (None, mask):
            permuted, plain_cache = run(model, ids, min(length, 8), given, cache_encoding="permuted")
            sealed, cache = run(model, ids, min(length, 8), given)
            assert_same(sealed, permuted)
            slides = [layer.is_sliding for layer in plain_cache.layers]
            assert slides == [isinstance(layer, SealedSlidingLayer) for layer in cache.layers]
            assert any(slides)
            for a, b in zip(stored(cache), stored(plain_cache), strict=True):
                assert a.shape == b.shape
                assert (patterns(a) == patterns(b)).float().mean() < 0.01, "nothing is stored as it was"
            decoded = [decode_kvcache(x, x.session) for x in (cache, plain_cache)]
            assert_same(*map(stored, decoded))
            for a, b in zip(*(x.layers for x in decoded), strict=True):
                assert type(a) is type(b) or not b.is_sliding
                assert a.get_seq_length() == b.get_seq_length()
                assert a.get_mask_sizes(1) == b.get_mask_sizes(1)

    @pytest.mark.slow
    @torch.no_grad()
    @pytest.mark.parametrize("attention", ["sdpa", "eager"])
    def test_many_steps_in_bounded_memory(self, prompt, attention: str) -> None:
        """Its buffers are renewed again and again; chunks longer than the window pass through them."""
        model, logits = sliding_model("mistral", 5, layers=2), {}
        model.set_attn_implementation(attention)
        for encoding in ("permuted", "sealed"):
            with encoded_llama(model, keys_for(model, cache_encoding=encoding, alp=False, redundant_num=0)):
                cache = model(prompt(100)).past_key_values
                logits[encoding] = [
                    model(prompt(count, seed=i), past_key_values=cache).logits
                    for i, count in enumerate([1] * 140 + [7, 1, 30, 1, 1])
                ]
            assert cache.get_seq_length() == 100 + 140 + 40
            if encoding == "sealed":
                for layer in cache.layers:
                    assert layer.keys.shape[2] == layer.writes.shape[1] == 4
                    assert layer.keys.untyped_storage().nbytes() <= 2 * 64 * layer.keys[:, :, 0].nbytes
        # Their one-time keys differ, and with them the order of sums.
        for a, b in zip(logits["sealed"], logits["permuted"], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize("kind", GENERATIONS)
    def test_generate(self, prompt, kind: str) -> None:
        check_generation(sliding_model("qwen2", 6), prompt, kind)

    @torch.no_grad()
    @pytest.mark.parametrize("family", ["mistral", "qwen3"])
    def test_keystream_is_never_used_twice(self, prompt, family: str) -> None:
        """Rows leave at the front, others come behind them, and the cache is rolled back, forked and reordered."""
        model, witness = sliding_model(family, 6, layers=2), Witness()
        with encoded_llama(model, keys_for(model)):
            cache = DynamicCache(config=model.config)
            cache.activate_past_recording()
            model(prompt(9, 2), past_key_values=cache)
            witness.look(cache)

            def step(given: EncodedCache, seed: int, count: int = 1) -> None:
                model(prompt(count, given.rows, seed), past_key_values=given)
                assert witness.look(given) > 0, "what is written is new to the witness"

            for seed in range(70):
                step(cache, seed)
                if seed % 3:
                    cache.crop(-(seed % 3 - 1))
            fork = copy.deepcopy(cache)
            step(cache, 100, count=9)
            step(fork, 101, count=3)
            cache.crop(-2)
            step(cache, 102)
            for number, change in enumerate(
                (
                    lambda: cache.reorder_cache(torch.tensor([1, 1])),
                    lambda: cache.batch_repeat_interleave(2),
                    lambda: cache.batch_select_indices(torch.tensor([3, 0])),
                )
            ):
                change()
                witness.look(cache)
                step(cache, 110 + number)
            handle = model.model.layers[1].register_forward_pre_hook(interrupt)
            with pytest.raises(KeyboardInterrupt):
                model(prompt(4, 2), past_key_values=fork)
            handle.remove()
            step(fork, 120, count=4)
            gpu, cpu = split_kvcache_dynamic(cache, gpu_layers=[], cpu_device=cache.layers[0].keys.device)
            model(prompt(1, 2, 8), gpu_kvcache=gpu, cpu_kvcache=cpu)
            witness.look(merge_kvcache_dynamic(gpu, cpu))
            step(cache, 121)
            cache.reset()
            model(prompt(9), past_key_values=cache)
            step(cache, 122)

    @torch.no_grad()
    def test_cut_off_and_rolled_back_as_a_permuted_one(self, prompt) -> None:
        """Crop is refused behind the window without recording, and gives the same rows with it."""
        model, ids = sliding_model("mistral", 5, layers=2), prompt(9, 2)
        with encoded_llama(model, keys_for(model)):
            cache = model(ids).past_key_values
            before = [x.clone() for x in stored(cache)]
            with pytest.raises(RuntimeError, match="does not track past states"):
                cache.crop(-1)
            assert all(torch.equal(patterns(a), patterns(b)) for a, b in zip(stored(cache), before, strict=True))

            cache = DynamicCache(config=model.config)
            cache.activate_past_recording()
            model(ids, past_key_values=cache)
            plain = decode_kvcache(cache, cache.session)
            for count in (-2, 0, -3, -1):
                for given in (cache, plain):
                    given.crop(count)
                decoded = decode_kvcache(cache, cache.session)
                for a, b in zip(decoded.layers, plain.layers, strict=True):
                    assert (a.get_seq_length(), a.record_past) == (b.get_seq_length(), b.record_past)
                    assert torch.equal(a.keys, b.keys)
                    assert torch.equal(a.values, b.values)

    @torch.no_grad()
    def test_files_pickles_and_parts(self, prompt, tmp_path) -> None:
        """What leaves holds the window's rows alone, and goes on as the cache that stayed."""
        model, witness = sliding_model("qwen2", 6), Witness()
        with encoded_llama(model, keys_for(model, alp=False, redundant_num=0)):
            cache = model(prompt(20, 2)).past_key_values
            model(prompt(1, 2), past_key_values=cache)
            witness.look(cache)
            sliding = cache.layers[1]
            assert sliding.keys.shape[2] == 5 < sliding._buffers.capacity
            pickled = pickle.loads(pickle.dumps(cache))
            assert all(x.untyped_storage().nbytes() == x.nbytes for x in stored(pickled))
            save_kvcache(tmp_path / "cache", cache, cache.session)
            save_keys(tmp_path / "keys", cache.session, key=KEY)
            session = load_keys(tmp_path / "keys", key=KEY, model=model)
            loaded = load_kvcache(tmp_path / "cache", session, device=model.device, at_least=0)
            merged = merge_kvcache_dynamic(*split_kvcache_dynamic(cache, gpu_layers=[1]), device=model.device)
            for other in (pickled, loaded, merged):
                assert [type(layer) for layer in other.layers] == [type(layer) for layer in cache.layers]
                assert other.get_seq_length() == 21
                for a, b in zip(other.layers, cache.layers, strict=True):
                    assert torch.equal(a.writes, b.writes)
                    assert torch.equal(patterns(a.keys), patterns(b.keys))
            for seed in range(8):
                token = prompt(1, 2, seed)
                expected = model(token, past_key_values=cache).logits
                for other in (pickled, loaded, merged):
                    logits = model(token, past_key_values=other).logits
                    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
                    witness.look(other)

    @pytest.mark.slow
    def test_on_the_kernels(self, prompt) -> None:
        model, ids = sliding_model("mistral", 3, layers=1, heads=2, kv_heads=1), prompt(4)
        with ops.backend("triton"):
            permuted, _ = run(model, ids, 2, cache_encoding="permuted", redundant_num=0, alp=False)
            sealed, _ = run(model, ids, 2, redundant_num=0, alp=False)
        assert all(torch.equal(a, b) for a, b in zip(sealed, permuted, strict=True))

    @torch.no_grad()
    @pytest.mark.parametrize(
        ("change", "match"),
        [
            ({"kind": "sliding"}, "of a sliding layer"),
            ({"kind": "sealed"}, "of a sealed layer"),
            ({"kind": ["sealed sliding"]}, "expected one of the kinds"),
            ({"branch": "00"}, "branch: expected 16 bytes"),
            ({"window": 1}, "expected the window and length"),
            ({"window": 9}, "4 tokens do not fit a length of 12"),
            ({"records_past": 0}, "expected the window and length"),
            ({"length": 3}, "4 tokens do not fit a length of 3"),
        ],
    )
    def test_wrong_files_are_refused(self, prompt, tmp_path, change: dict, match: str) -> None:
        model, path = sliding_model("mistral", 5), tmp_path / "cache"
        with encoded_llama(model, keys_for(model)):
            cache = model(prompt(12)).past_key_values
        save_kvcache(path, cache, cache.session)
        file = {"kind": "cache", "key": cache.session.derive_key("cache file")}
        written = read_container(path, protection="authenticated", **file)
        layers = json.loads(written.metadata["layers"])
        assert layers[0]["kind"] == "sealed sliding"
        layers[0] |= change
        metadata = dict(written.metadata) | {"layers": json.dumps(layers)}
        write_container(path, dict(written.tensors), metadata, encrypt=False, **file)
        with pytest.raises(FileRefusedError, match=match) as refused:
            load_kvcache(path, cache.session, at_least=0)
        assert refused.value.reason == "format"


class StrangeLayer(DynamicLayer):
    pass


class TestRefused:
    def test_settings(self, llama) -> None:
        with pytest.raises(ValueError, match="cache_encoding: expected"):
            keys_for(llama, cache_encoding="encrypted")
        with pytest.raises(ValueError, match="cipher_rounds: expected one of"):
            keys_for(llama, cipher_rounds=10)
        with (
            pytest.raises(ValueError, match="the model has 3 layers, got 2"),
            encoded_llama(llama, keys_for(llama, cache_encoding=["sealed", "permuted"])),
        ):
            pass

    @torch.no_grad()
    def test_layers_of_a_kind_that_is_not_known(self, llama, prompt) -> None:
        cache = DynamicCache(config=llama.config)
        cache.layers[1] = StrangeLayer()
        with encoded_llama(llama, keys_for(llama)), pytest.raises(TypeError, match="a StrangeLayer cannot be sealed"):
            llama(prompt(4), past_key_values=cache)

    @torch.no_grad()
    def test_caches_of_other_settings(self, llama, prompt) -> None:
        for mine, theirs in (({}, {"cache_encoding": "permuted"}), ({}, {"cipher_rounds": 8})):
            with encoded_llama(llama, keys_for(llama, **theirs)):
                cache = llama(prompt(4)).past_key_values
            with (
                encoded_llama(llama, keys_for(llama, **mine)),
                pytest.raises(ValueError, match="sealed_layers|cipher_rounds"),
            ):
                llama(prompt(1), past_key_values=cache)

    @torch.no_grad()
    def test_running_out_of_write_numbers(self, llama, prompt) -> None:
        with encoded_llama(llama, keys_for(llama)):
            cache = llama(prompt(4)).past_key_values
            before = [x.clone() for x in stored(cache)]
            cache.session.one_time._writes = ops.WriteCounter(count=2**31)
            with pytest.raises(OverflowError, match="write numbers"):
                llama(prompt(1), past_key_values=cache)
            assert cache.get_seq_length() == 4
            assert all(torch.equal(patterns(a), patterns(b)) for a, b in zip(stored(cache), before, strict=True))

    @torch.no_grad()
    def test_rows_without_numbers(self, llama, prompt) -> None:
        with encoded_llama(llama, keys_for(llama)):
            cache = llama(prompt(4)).past_key_values
        states = torch.zeros(1, 2, 1, 16, device=cache.layers[0].keys.device)
        with pytest.raises(ValueError, match="writes: layer 0 is sealed"):
            cache.append(states, states, 0)
