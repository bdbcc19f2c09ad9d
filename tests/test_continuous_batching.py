"""Continuous batching on encoded models: many requests share pages, which hold K and V under one session's keys."""

import copy
import logging
from collections.abc import Iterator

import pytest
import torch
from tiny import tiny_model
from transformers import GenerationConfig
from transformers.generation.configuration_utils import ContinuousBatchingConfig
from transformers.generation.continuous_batching.cache import PagedAttentionCache

from scx import SCXKeyGenerator, encode_llama, encoded_llama
from scx.audit import find_feature_order, undo_feature_order

SETTINGS = {"permuted": {}, "redundant rows and noise": {"redundant_num": 4, "alp": True}}
pytestmark = pytest.mark.slow  # pages are run by a thread that polls
by_settings = pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
PAGES = {"num_blocks": 16, "block_size": 32, "max_batch_tokens": 64, "use_cuda_graph": False}


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


def keys_for(model, **options) -> SCXKeyGenerator:
    return SCXKeyGenerator.for_model(model, **options)


def in_batches(model, prompts: list[list[int]], **options) -> list[list[int]]:
    """The new tokens of each prompt, by `generate_batch`; the attention that it switched to is switched back."""
    attention = model.config._attn_implementation
    generation = GenerationConfig(max_new_tokens=8, do_sample=False, eos_token_id=-1, pad_token_id=0)
    try:
        found = model.generate_batch(
            inputs=prompts,
            generation_config=generation,
            continuous_batching_config=ContinuousBatchingConfig(**PAGES, **options),
            progress_bar=False,
        )
    finally:
        model.set_attn_implementation(attention)
    return [found[name].generated_tokens for name in sorted(found)]


def one_by_one(model, prompts: list[list[int]]) -> list[list[int]]:
    ids = [torch.tensor([prompt], device=model.device) for prompt in prompts]
    return [model.generate(x, max_new_tokens=8, do_sample=False)[0, x.shape[1] :].tolist() for x in ids]


@by_settings
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_generate_batch(prompt, settings, family) -> None:
    model = tiny_model(family)
    prompts = [prompt(length, seed=length)[0].tolist() for length in (5, 9, 14, 70)]  # the last comes in two chunks
    plain = one_by_one(model, prompts)
    assert in_batches(model, prompts) == plain
    with encoded_llama(model, keys_for(model, **settings)):
        assert in_batches(model, prompts) == plain
        assert in_batches(model, prompts) == plain, "new pages, of a new session"
        assert one_by_one(model, prompts) == plain


@by_settings
def test_generate_with_a_paged_cache(llama, prompt, settings) -> None:
    ids = prompt(9)

    def run() -> list[int]:
        try:
            out = llama.generate(
                ids,
                max_new_tokens=8,
                do_sample=False,
                cache_implementation="paged",
                eos_token_id=-1,
                pad_token_id=0,
                continuous_batching_config=ContinuousBatchingConfig(**PAGES),
            )
        finally:
            llama.set_attn_implementation("sdpa")
        return out[0].tolist()

    plain = run()
    with encoded_llama(llama, keys_for(llama, **settings)):
        assert run() == plain


@pytest.fixture
def stored_values(monkeypatch) -> list[torch.Tensor]:
    """V as it goes into pages, layer by layer and pass by pass."""
    seen: list[torch.Tensor] = []
    update = PagedAttentionCache.update

    def watched(self, key_states, value_states, *args, **kwargs):
        seen.append(value_states.detach().clone())
        return update(self, key_states, value_states, *args, **kwargs)

    monkeypatch.setattr(PagedAttentionCache, "update", watched)
    return seen


def test_pages_hold_encoded_rows(llama, prompt, stored_values) -> None:
    """What is stored is a plain row under a permutation of its features, in every layer and head."""
    seen = stored_values
    prompts = [prompt(9)[0].tolist()]
    in_batches(llama, prompts)
    plain, layers = list(seen), llama.config.num_hidden_layers
    seen.clear()
    encode_llama(llama, keys_for(llama))
    in_batches(llama, prompts)
    for stored, row in zip(seen[-layers:], plain[-layers:], strict=True):
        torch.testing.assert_close(stored.sort(-1).values, row.sort(-1).values, rtol=1e-4, atol=1e-4)
        assert not (stored - row).abs().amax(dim=-1).lt(1e-3).any()


def test_a_tenant_opens_anothers_rows(llama, prompt, stored_values) -> None:
    """Requests that share pages share one feature permutation: who knows his own rows, and reads the pages, finds it,
    and all rows are plain to him."""
    prompts = [prompt(length, seed=length)[0].tolist() for length in (9, 13)]
    in_batches(llama, prompts)
    layers = llama.config.num_hidden_layers
    plain = stored_values[:layers]
    stored_values.clear()
    encode_llama(llama, keys_for(llama, redundant_num=4, alp=True))
    in_batches(llama, prompts)
    for stored, rows in zip(stored_values[:layers], plain, strict=True):
        assert stored.shape[2] == 9 + 13
        own, anothers = stored[0].split((9, 13), dim=1)
        known, truth = rows[0].split((9, 13), dim=1)
        assert (anothers - truth).abs().mean() > 0.1
        opened = undo_feature_order(anothers, find_feature_order(known, own))
        torch.testing.assert_close(opened, truth, rtol=1e-3, atol=1e-3)


def test_sealed_pages_are_refused_where_they_are_asked_for(llama, prompt) -> None:
    """In the caller's thread; the thread that runs batches would only log it. Decoded, the model has its own again."""
    prompts = [prompt(9)[0].tolist()]
    plain = in_batches(llama, prompts)
    with encoded_llama(llama, keys_for(llama, cache_encoding="sealed")):
        with pytest.raises(ValueError, match="generate_batch, .*: the pages of continuous batching are not sealed"):
            in_batches(llama, prompts)
        with pytest.raises(ValueError, match="cache_implementation='paged': the pages of"):
            llama.generate(prompt(9), max_new_tokens=2, cache_implementation="paged")
        assert type(llama).__name__ == "LlamaForCausalLM"
        assert isinstance(copy.deepcopy(llama), type(llama))
    assert in_batches(llama, prompts) == plain
