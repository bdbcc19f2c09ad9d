"""Gradients through an encoded model are the plain model's, or a backward is refused; inference needs no `no_grad`."""

from collections.abc import Callable

import pytest
import torch
from tiny import difference, tiny_model
from torch import Tensor

from scx import SCXKeyGenerator, encode_llama, encoded_llama

SETTINGS = {"permuted": {}, "redundant rows and noise": {"redundant_num": 4, "alp": True}}
SEALED = {"redundant_num": 3, "alp": True, "cache_encoding": "sealed"}
EVERY = {**SETTINGS, "sealed": SEALED}
by_settings = pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)


def keys_for(model, **options) -> SCXKeyGenerator:
    return SCXKeyGenerator.for_model(model, **options)


def train_only(model, *words: str) -> None:
    """Ask for gradients of the parameters with one of these words in their names, and of no other."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(any(word in name for word in words))
        parameter.grad = None


def gradients(model) -> dict[str, Tensor]:
    return {name: x.grad.clone() for name, x in model.named_parameters() if x.grad is not None}


def soft_prompt(model) -> Tensor:
    torch.manual_seed(3)
    return (0.1 * torch.randn(2, 5, model.config.hidden_size)).to(model.device).requires_grad_()


def assert_same(got: dict[str, Tensor], plain: dict[str, Tensor]) -> None:
    assert got.keys() == plain.keys()
    assert plain
    for name, gradient in plain.items():
        assert difference(got[name], gradient) < 1e-3, name


class TestPlainModels:
    """Runs the same on the plain and on the encoded model."""

    def _check(self, model, settings, run: Callable[[], dict[str, Tensor]]) -> None:
        plain = run()
        with encoded_llama(model, keys_for(model, **settings)):
            assert_same(run(), plain)

    @by_settings
    @pytest.mark.parametrize(
        "trained", [("",), ("mlp",), ("v_proj",), ("k_proj", "v_proj"), ("embed",), ("norm",)], ids=str
    )
    def test_two_passes_over_one_cache(self, llama, prompt, settings, trained) -> None:
        """Through K and V of the first pass, whatever is frozen."""

        def run() -> dict[str, Tensor]:
            train_only(llama, *trained)
            cache = llama(prompt(9, 2)).past_key_values
            llama(prompt(4, 2, seed=5), past_key_values=cache).logits.square().mean().backward()
            return gradients(llama)

        self._check(llama, settings, run)

    @by_settings
    def test_soft_prompt_of_a_frozen_model(self, llama, prompt, settings) -> None:
        """It fills the cache, and two passes go on from there."""
        train_only(llama)

        def run() -> dict[str, Tensor]:
            soft = soft_prompt(llama)
            cache = llama(inputs_embeds=soft).past_key_values
            losses = [llama(prompt(n, 2, seed=n), past_key_values=cache).logits.square().mean() for n in (6, 3)]
            sum(losses).backward()
            return {"soft prompt": soft.grad}

        self._check(llama, settings, run)

    @by_settings
    @pytest.mark.parametrize("reentrant", [False, True])
    @pytest.mark.parametrize("trained", [("",), ("proj",)], ids=["all", "projections"])
    def test_checkpointed(self, llama, prompt, settings, reentrant, trained) -> None:
        llama.train()
        llama.gradient_checkpointing_enable({"use_reentrant": reentrant})
        llama.enable_input_require_grads()

        def run() -> dict[str, Tensor]:
            train_only(llama, *trained)
            llama(prompt(9, 2), labels=prompt(9, 2)).loss.backward()
            return gradients(llama)

        self._check(llama, settings, run)

    @by_settings
    def test_recorded_hidden_states_are_on_the_way(self, llama, prompt, settings) -> None:
        def run() -> dict[str, Tensor]:
            states = (out := llama(prompt(7), output_hidden_states=True)).hidden_states
            for state in states:
                state.retain_grad()
            out.logits[0, -1].max().backward()
            return {f"states {place}": state.grad for place, state in enumerate(states)}

        self._check(llama, settings, run)

    @by_settings
    def test_steering_vector_of_a_frozen_model(self, llama, prompt, settings) -> None:
        """Nothing asks for gradients but what a hook adds on the way."""
        train_only(llama)

        def run() -> dict[str, Tensor]:
            vector = torch.zeros(llama.config.hidden_size, device=llama.device, requires_grad=True)
            handle = llama.model.layers[1].register_forward_hook(lambda module, args, output: output + vector)
            cache = llama(prompt(6)).past_key_values
            llama(prompt(3, seed=1), past_key_values=cache).logits.square().mean().backward()
            handle.remove()
            return {"vector": vector.grad}

        self._check(llama, settings, run)

    def test_in_place_passes_between(self, llama, prompt) -> None:
        """Tokens without gradients before and after those with some, in one cache."""

        def run() -> dict[str, Tensor]:
            llama.zero_grad()
            with torch.no_grad():
                cache = llama(prompt(5)).past_key_values
            first = llama(prompt(3, seed=1), past_key_values=cache).logits.square().mean()
            with torch.no_grad():
                llama(prompt(2, seed=2), past_key_values=cache)
                llama(prompt(1, seed=3), past_key_values=cache)
            (first + llama(prompt(2, seed=4), past_key_values=cache).logits.square().mean()).backward()
            return gradients(llama)

        self._check(llama, {"redundant_num": 3}, run)


class TestSealed:
    """What autograd keeps is not sealed: no gradient goes through a sealed cache."""

    def test_inference_needs_no_context(self, prompt) -> None:
        model = tiny_model()
        with torch.no_grad():
            plain = model(prompt(9)).logits
            more = model(torch.cat((prompt(9), prompt(2, seed=1)), dim=1)).logits[:, -2:]
        encode_llama(model, keys_for(model, **SEALED))
        out = model(prompt(9), output_hidden_states=True)
        step = model(prompt(2, seed=1), past_key_values=out.past_key_values)
        assert difference(out.logits, plain) < 1e-4
        assert difference(step.logits, more) < 1e-4

    def test_nothing_unsealed_stays_for_a_backward(self, llama, prompt) -> None:
        """K and V of a pass are gone with it, also where its answer is kept."""
        encode_llama(llama, keys_for(llama, **SEALED))
        waiting, seen = [llama(prompt(9)).logits.grad_fn], []
        while waiting:
            node = waiting.pop()
            waiting += [following for following, _ in node.next_functions if following is not None]
            seen.append(type(node).__name__)
        assert "_RefusalBackward" in seen
        assert not any("ScaledDotProduct" in name or "Softmax" in name for name in seen)

    @pytest.mark.parametrize("trained", [("",), ("mlp",), ("v_proj",), ("embed",)], ids=str)
    def test_a_backward_is_refused(self, llama, prompt, trained) -> None:
        encode_llama(llama, keys_for(llama, **SEALED))
        train_only(llama, *trained)
        cache = llama(prompt(5)).past_key_values
        out = llama(prompt(3, seed=1), past_key_values=cache)
        with pytest.raises(RuntimeError, match=r"gradients do not go through a sealed cache; train with model.train"):
            out.logits.sum().backward()

    def test_without_anything_to_train_nothing_is_attached(self, llama, prompt) -> None:
        encode_llama(llama, keys_for(llama, **SEALED))
        train_only(llama)
        assert not llama(prompt(5)).logits.requires_grad

    def test_training_fills_a_sealed_cache(self, prompt) -> None:
        """A pass over a whole text has the plain model's gradients, and its cache goes on."""
        model, ids = tiny_model().train(), prompt(8)
        model(ids, labels=ids).loss.backward()
        plain = gradients(model)
        encode_llama(model, keys_for(model, **SEALED))
        model.zero_grad()
        out = model(ids, labels=ids)
        out.loss.backward()
        assert_same(gradients(model), plain)
        with pytest.raises(ValueError, match="gradients do not go through a sealed cache that holds tokens"):
            model(ids[:, :1], past_key_values=out.past_key_values)
        model.eval()
        with torch.no_grad():
            step = model(ids[:, :1], past_key_values=out.past_key_values).logits
            again = model(torch.cat((ids, ids[:, :1]), dim=1), use_cache=False).logits[:, -1:]
        assert difference(step, again) < 1e-4

    def test_use_cache_false(self, llama, prompt) -> None:
        ids = prompt(8)
        llama(ids, labels=ids).loss.backward()
        plain = gradients(llama)
        llama.zero_grad()
        with encoded_llama(llama, keys_for(llama, **SEALED)):
            llama(ids, labels=ids, use_cache=False).loss.backward()
            assert_same(gradients(llama), plain)

    def test_gradients_of_a_hook_in_a_frozen_model(self, llama, prompt) -> None:
        """Nothing asked for gradients until a hook did: refused in the pass, whose cache is as it was."""
        encode_llama(llama, keys_for(llama, **SEALED))
        train_only(llama)
        cache = llama(prompt(5)).past_key_values
        vector = torch.zeros(llama.config.hidden_size, device=llama.device, requires_grad=True)
        llama.model.layers[0].register_forward_hook(lambda module, args, output: output + vector)
        with pytest.raises(ValueError, match="gradients do not go through a sealed cache that holds tokens"):
            llama(prompt(3), past_key_values=cache)
        assert cache.get_seq_length() == 5


class TestAutocast:
    """Within autocast the layers compute as the plain model's; an operation keeps to its arguments' dtype."""

    @pytest.mark.parametrize("settings", EVERY.values(), ids=EVERY)
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
    @pytest.mark.parametrize("use_cache", [True, False])
    @torch.no_grad()
    def test_answers(self, prompt, settings, dtype, use_cache) -> None:
        def run() -> Tensor:
            with torch.autocast(model.device.type, dtype):
                out = model(prompt(9), use_cache=use_cache)
                if not use_cache:
                    return out.logits
                step = model(prompt(2, seed=4), past_key_values=out.past_key_values)
            last = model(prompt(1, seed=5), past_key_values=out.past_key_values)
            return torch.cat((out.logits, step.logits, last.logits), dim=1)

        model = tiny_model()
        plain = run()
        with encoded_llama(model, keys_for(model, **settings)):
            got = run()
        assert got.dtype is plain.dtype
        assert difference(got, plain) < 3e-2

    @pytest.mark.parametrize("settings", EVERY.values(), ids=EVERY)
    def test_gradients(self, prompt, settings) -> None:
        model, ids = tiny_model().train(), prompt(9)

        def run() -> dict[str, Tensor]:
            model.zero_grad()
            with torch.autocast(model.device.type, torch.bfloat16):
                loss = model(ids, labels=ids).loss
            loss.backward()
            return gradients(model)

        plain = run()
        with encoded_llama(model, keys_for(model, **settings)):
            for name, gradient in run().items():
                assert difference(gradient, plain[name]) < 0.1, name
