"""The encoded cache: stored under its session's keys, split, joined, reordered, and never carrying a key away."""

import copy
import io
import pickle

import pytest
import torch
from tiny import tiny_model
from transformers import DynamicCache

from scx import (
    EncodedCache,
    SCXKeyGenerator,
    decode_kvcache,
    decode_llama,
    encode_llama,
    merge_kvcache_dynamic,
    split_kvcache_dynamic,
)


@pytest.fixture
def encoded(llama):
    return encode_llama(llama, SCXKeyGenerator.for_model(llama, redundant_num=3, alp=True, master_key=b"\xcd" * 32))


@pytest.fixture
def cache(encoded, prompt) -> EncodedCache:
    with torch.no_grad():
        return encoded(prompt(9, 2)).past_key_values


def tensors(cache: DynamicCache) -> list[torch.Tensor]:
    return [x for layer in cache.layers for x in (layer.keys, layer.values)]


def same(a: DynamicCache, b: DynamicCache) -> bool:
    return all(torch.equal(x, y) for x, y in zip(tensors(a), tensors(b), strict=True))


def test_split_moves_layers_and_merge_is_its_inverse(cache) -> None:
    gpu, cpu = split_kvcache_dynamic(cache, gpu_layers=[1])
    assert (gpu.layer_indices, cpu.layer_indices) == ((1,), (0, 2))
    assert all(cpu.layers[i].keys.device.type == "cpu" for i in (0, 2))
    assert gpu.get_seq_length() == cpu.get_seq_length() == 9
    assert gpu.get_mask_sizes(1, 0) == (10, 0)
    merged = merge_kvcache_dynamic(gpu, cpu, device=cache.layers[0].keys.device)
    assert merged.is_complete
    assert same(merged, cache)


def test_session_tells_protected_layers_from_shared_ones(cache) -> None:
    assert cache.session.protected_layers == (0, 2)
    assert cache.session.shared_layers == (1,)


@torch.no_grad()
def test_decode_with_parts_grows_them_in_place(encoded, cache, prompt) -> None:
    """The documented loop hands the same two parts to every step; the whole cache stays as it was."""
    whole = copy.deepcopy(cache)
    gpu, cpu = split_kvcache_dynamic(cache, gpu_layers=[1])
    for step in range(4):
        token = prompt(1, 2, seed=step)
        position = torch.arange(9 + step, 10 + step)
        parted = encoded(token, mode="decode", cache_position=position, gpu_kvcache=gpu, cpu_kvcache=cpu)
        joined = encoded(token, past_key_values=whole)
        torch.testing.assert_close(parted.logits, joined.logits, rtol=1e-4, atol=1e-4)
        assert gpu.get_seq_length() == cpu.get_seq_length() == parted.past_key_values.get_seq_length() == 10 + step
    assert cache.get_seq_length() == 9


@torch.no_grad()
def test_decoded_cache_continues_the_plain_model(encoded, cache, prompt) -> None:
    """A decoded cache is an ordinary one, and the encoded one is left as it was."""
    before, token = copy.deepcopy(cache), prompt(1, 2)
    plain = decode_kvcache(cache, cache.session)
    assert type(plain) is DynamicCache
    assert same(before, cache)
    expected = encoded(token, past_key_values=cache).logits
    decode_llama(encoded)
    torch.testing.assert_close(encoded(token, past_key_values=plain).logits, expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_rows_keep_their_keys_when_reordered(encoded, cache, prompt) -> None:
    """Selecting, repeating and swapping sequences moves their keys along."""
    plain = decode_kvcache(cache, cache.session)
    token = prompt(1, 4)
    for change in (
        lambda c: c.reorder_cache(torch.tensor([1, 0])),
        lambda c: c.batch_repeat_interleave(2),
        lambda c: c.batch_select_indices(torch.tensor([3, 0, 1])),
        lambda c: c.reorder_cache(torch.tensor([2, 2, 0])),
    ):
        change(cache)
        change(plain)
        decoded = decode_kvcache(cache, cache.session)
        assert same(decoded, plain)
    out = encoded(token[:3], past_key_values=cache)
    assert out.past_key_values.rows == 3


def test_crop_and_reset(encoded, cache, prompt) -> None:
    plain = decode_kvcache(cache, cache.session)
    cache.crop(-4)
    plain.crop(-4)
    assert same(decode_kvcache(cache, cache.session), plain)
    first = cache.session_id
    cache.reset()
    assert cache.get_seq_length() == 0
    with torch.no_grad():
        again = encoded(prompt(4), past_key_values=cache).past_key_values
    assert again is cache
    assert cache.session_id != first
    assert cache.rows == 1


@torch.no_grad()
def test_cache_grows_in_place(encoded, prompt) -> None:
    """New tokens go into room that is there; K and V of earlier ones are not copied at every step."""
    cache = encoded(prompt(80)).past_key_values
    places = []
    for _ in range(24):
        encoded(prompt(1), past_key_values=cache)
        places.append(cache.layers[1].keys.data_ptr())
    assert cache.get_seq_length() == 104
    assert 1 < len(set(places)) <= 3, "moved once, when its first buffer was full, and not at every step"
    held = sum(x.untyped_storage().nbytes() for x in tensors(cache))
    assert held <= 1.3 * sum(x.nbytes for x in tensors(cache)), "room for a quarter more tokens at most"


@torch.no_grad()
@pytest.mark.parametrize("kind", ["split", "deepcopy", "crop"])
def test_nothing_is_written_over(encoded, prompt, kind: str) -> None:
    """Two caches that began as one go on independently, whichever goes first."""
    ids, other = prompt(70), prompt(1, seed=3)
    cache = encoded(ids).past_key_values
    encoded(prompt(1), past_key_values=cache)  # the buffers now have room
    if kind == "split":
        gpu, cpu = split_kvcache_dynamic(cache, gpu_layers=[1])
        given = {"gpu_kvcache": gpu, "cpu_kvcache": cpu}
    else:
        given = {"past_key_values": copy.deepcopy(cache)}
    if kind == "crop":
        view = [x[:, :, :69] for x in tensors(cache)]
        kept = [x.clone() for x in view]
        cache.crop(-3)
        encoded(other, past_key_values=cache)
        assert all(torch.equal(a, b) for a, b in zip(view, kept, strict=True))
        return
    alone = encoded(other, past_key_values=copy.deepcopy(cache)).logits
    encoded(prompt(1, seed=5), past_key_values=cache)
    torch.testing.assert_close(encoded(other, **given).logits, alone, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_pass_that_breaks_off_changes_nothing(encoded, cache, prompt) -> None:
    """Whatever stops a pass half-way, the conversation goes on from the last token that was finished."""

    def interrupt(*_) -> None:
        raise KeyboardInterrupt

    expected = encoded(prompt(2, 2, seed=6), past_key_values=copy.deepcopy(cache)).logits
    handle = encoded.model.layers[1].register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        encoded(prompt(5, 2), past_key_values=cache)
    handle.remove()
    assert [layer.get_seq_length() for layer in cache.layers] == [9, 9, 9]
    logits = encoded(prompt(2, 2, seed=6), past_key_values=cache).logits
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


def test_pickled_cache_holds_its_tokens_alone(cache) -> None:
    """What lies behind the tokens in a layer's buffers does not leave the process."""
    loaded = pickle.loads(pickle.dumps(cache))
    for x in tensors(loaded):
        assert x.untyped_storage().nbytes() == x.nbytes


@torch.no_grad()
@pytest.mark.parametrize("encoding", ["permuted", "sealed"])
def test_pickled_cache_of_one_head_holds_its_tokens_alone(prompt, encoding: str) -> None:
    """There the filled part of a buffer is contiguous, and would bring the whole buffer along."""
    model = tiny_model(heads=2, kv_heads=1, layers=1)
    encode_llama(model, SCXKeyGenerator.for_model(model, cache_encoding=encoding))
    cache = model(prompt(5)).past_key_values
    assert cache.layers[0].keys.is_contiguous()
    for x in tensors(pickle.loads(pickle.dumps(cache))):
        assert x.untyped_storage().nbytes() == x.nbytes


@torch.no_grad()
def test_deepcopy_forks_a_conversation(encoded, cache, prompt) -> None:
    """Two continuations of one prefix share its session and go their own ways."""
    fork = copy.deepcopy(cache)
    assert fork.session is cache.session
    a = encoded(prompt(1, 2, seed=5), past_key_values=cache).past_key_values
    assert (a.get_seq_length(), fork.get_seq_length()) == (10, 9)
    encoded(prompt(3, 2, seed=6), past_key_values=fork)
    assert same(decode_kvcache(cache, cache.session), decode_kvcache(a, a.session))


def test_pickled_cache_carries_the_id_and_no_key(cache) -> None:
    buffer = io.BytesIO()
    pickle.dump(cache, buffer)
    assert b"\xcd" * 32 not in buffer.getvalue()
    loaded = pickle.loads(buffer.getvalue())
    assert loaded.session_id == cache.session_id
    assert same(loaded, cache)
    with pytest.raises(RuntimeError, match=f"carries the id of session {cache.session_id}, not its keys"):
        loaded.session  # noqa: B018
    loaded.attach(cache.session)
    assert same(decode_kvcache(loaded, cache.session), decode_kvcache(cache, cache.session))


@torch.no_grad()
def test_pickled_cache_finds_its_living_session(encoded, cache, prompt) -> None:
    loaded = pickle.loads(pickle.dumps(cache))
    token = prompt(1, 2)
    torch.testing.assert_close(
        encoded(token, past_key_values=loaded).logits, encoded(token, past_key_values=cache).logits
    )


@torch.no_grad()
def test_a_callers_empty_cache_is_filled_in_place(encoded, prompt) -> None:
    """Whoever passes a DynamicCache and keeps it goes on with the encoded one, not with an empty one."""
    mine = DynamicCache(config=encoded.config)
    out = encoded(prompt(5), past_key_values=mine)
    assert out.past_key_values is mine
    assert isinstance(mine, EncodedCache)
    lazy = DynamicCache()
    encoded(prompt(5), past_key_values=lazy)
    assert lazy.get_seq_length() == 5
    split_kvcache_dynamic(lazy, gpu_layers=[1])


class TestBadInput:
    @pytest.mark.parametrize(
        ("layers", "message"),
        [
            ([3], "expected layers 0..2"),
            ([-1], "expected layers 0..2"),
            ([1, 1], "named twice"),
            ([0, 1], r"layers \[0\] are protected"),
            (["1"], "expected layers 0..2"),
        ],
    )
    def test_split(self, cache, layers, message) -> None:
        with pytest.raises(ValueError, match=message):
            split_kvcache_dynamic(cache, gpu_layers=layers)
        assert cache.is_complete

    def test_split_of_a_plain_cache_or_a_part(self, cache) -> None:
        with pytest.raises(TypeError, match="expected an encoded cache"):
            split_kvcache_dynamic(DynamicCache(), gpu_layers=[])
        gpu, _ = split_kvcache_dynamic(cache, gpu_layers=[1])
        with pytest.raises(ValueError, match="one part of a split cache"):
            split_kvcache_dynamic(gpu, gpu_layers=[1])

    def test_merge_overlapping_missing_foreign(self, encoded, cache, prompt) -> None:
        gpu, cpu = split_kvcache_dynamic(cache, gpu_layers=[1])
        with pytest.raises(ValueError, match=r"layers \[0, 2\] are in neither|both hold layers"):
            merge_kvcache_dynamic(gpu, gpu)
        none, _ = split_kvcache_dynamic(cache, gpu_layers=[])
        with pytest.raises(ValueError, match=r"layers \[1\] are in neither"):
            merge_kvcache_dynamic(none, cpu)
        with torch.no_grad():
            other = encoded(prompt(9, 2)).past_key_values
        with pytest.raises(ValueError, match=r"sessions \w+ and \w+ differ"):
            merge_kvcache_dynamic(gpu, split_kvcache_dynamic(other, gpu_layers=[1])[1])

    def test_parts_of_two_splits(self, cache) -> None:
        """Even of one session: the conversation may have forked between the two splits."""
        gpu, _ = split_kvcache_dynamic(cache, gpu_layers=[1])
        _, cpu = split_kvcache_dynamic(copy.deepcopy(cache), gpu_layers=[1])
        with pytest.raises(ValueError, match="not the two parts of one split"):
            merge_kvcache_dynamic(gpu, cpu)

    def test_parts_of_different_length(self, cache) -> None:
        gpu, cpu = split_kvcache_dynamic(cache, gpu_layers=[1])
        row = torch.zeros_like(gpu.layers[1].keys[:, :, :1])
        gpu.append(row, row, 1)
        with pytest.raises(ValueError, match=r"different numbers of tokens, \[9, 10\]"):
            merge_kvcache_dynamic(gpu, cpu)

    def test_parts_refuse_what_changes_all_layers(self, cache) -> None:
        gpu, _ = split_kvcache_dynamic(cache, gpu_layers=[1])
        for change in (
            lambda: gpu.crop(-1),
            lambda: gpu.reset(),
            lambda: gpu.reorder_cache(torch.tensor([1, 0])),
            lambda: gpu.batch_repeat_interleave(2),
            lambda: gpu.batch_select_indices(torch.tensor([0])),
        ):
            with pytest.raises(RuntimeError, match="merge the parts"):
                change()
        assert gpu.get_seq_length() == 9

    def test_decode_with_a_foreign_session(self, encoded, cache, prompt) -> None:
        with torch.no_grad():
            other = encoded(prompt(3)).past_key_values
        with pytest.raises(ValueError, match=f"belongs to session {cache.session_id}"):
            decode_kvcache(cache, other.session)
        with pytest.raises(ValueError, match=f"belongs to session {cache.session_id}"):
            cache.attach(other.session)
        with pytest.raises(TypeError, match="expected an encoded cache"):
            decode_kvcache(DynamicCache(), other.session)

    @torch.no_grad()
    def test_plain_model_with_an_encoded_cache(self, encoded, cache, prompt) -> None:
        before = copy.deepcopy(cache)
        decode_llama(encoded)
        with pytest.raises(RuntimeError, match="a plain model was given an encoded cache"):
            encoded(prompt(1, 2), past_key_values=cache)
        assert same(cache, before)

    def test_absent_layer_is_never_read(self, cache) -> None:
        gpu, _ = split_kvcache_dynamic(cache, gpu_layers=[1])
        with pytest.raises(RuntimeError, match="other part of a split cache"):
            gpu.append(torch.zeros(2, 2, 1, 16), torch.zeros(2, 2, 1, 16), 0)


def test_split_with_everything_shared() -> None:
    """Where no layer is protected, all may go to the untrusted side, and the secure part is empty but joinable."""
    model = tiny_model()
    encode_llama(model, SCXKeyGenerator.for_model(model, protected_layers=0))
    with torch.no_grad():
        cache = model(torch.ones(1, 4, dtype=torch.long, device=model.device)).past_key_values
    gpu, cpu = split_kvcache_dynamic(cache, gpu_layers=range(3))
    assert cpu.layer_indices == ()
    assert same(merge_kvcache_dynamic(gpu, cpu), cache)
