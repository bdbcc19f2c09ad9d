"""The model as it is now: whatever is changed, added or taken away after it was encoded, an answer is the plain model's
at that moment, or the request is refused by name."""

import copy

import pytest
import torch
from tiny import VOCABULARY, difference, tiny_model
from torch import nn

from scx import SCXKeyGenerator, decode_llama, encode_llama, encoded_llama

SETTINGS = {
    "permuted": {},
    "redundant rows and noise": {"redundant_num": 4, "alp": True},
    "sealed": {"redundant_num": 3, "alp": True, "cache_encoding": "sealed"},
}
by_settings = pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)


def keys_for(model, **options) -> SCXKeyGenerator:
    return SCXKeyGenerator.for_model(model, **options)


@torch.no_grad()
def logits(model, ids: torch.Tensor) -> torch.Tensor:
    return model(ids, use_cache=False).logits


class TestWeights:
    @staticmethod
    def _in_place(model) -> None:
        for name in ("q_proj", "k_proj", "v_proj"):
            model.model.layers[0].self_attn.get_submodule(name).weight.mul_(1.1)

    @staticmethod
    def _behind_autograd(model) -> None:
        """As adapters are merged: no version counter sees it."""
        weight = model.model.layers[0].self_attn.v_proj.weight
        weight.data += 0.05 * torch.ones_like(weight)

    @staticmethod
    def _loaded(model) -> None:
        torch.manual_seed(9)
        model.load_state_dict({k: v + 0.01 * torch.randn_like(v) for k, v in model.state_dict().items()})

    @staticmethod
    def _replaced(model) -> None:
        attention = model.model.layers[0].self_attn
        attention.q_proj = copy.deepcopy(attention.q_proj)
        attention.q_proj.weight.mul_(0.7)

    @staticmethod
    def _stepped(model) -> None:
        with torch.enable_grad():
            ids = torch.arange(2, 12, device=model.device)[None]
            model(ids, labels=ids, use_cache=False).loss.backward()
        torch.optim.SGD(model.parameters(), lr=0.05).step()

    @by_settings
    @pytest.mark.parametrize("change", ["_in_place", "_behind_autograd", "_loaded", "_replaced", "_stepped"])
    @torch.no_grad()
    def test_changed_while_a_session_is_open(self, prompt, settings, change) -> None:
        """Lone tokens before and after the change: their noise is drawn ahead, what it becomes is not."""

        def converse(model) -> list[torch.Tensor]:
            cache, answers = model(prompt(9)).past_key_values, []
            for step in range(4):
                if step == 2:
                    getattr(self, change)(model)
                answers.append(model(prompt(1, seed=step), past_key_values=cache).logits)
            return answers

        plain, model = converse(tiny_model()), tiny_model()
        encode_llama(model, keys_for(model, **settings))
        for a, b in zip(converse(model), plain, strict=True):
            assert difference(a, b) < 1e-4

    @by_settings
    @torch.no_grad()
    def test_of_a_functional_call(self, llama, prompt, settings) -> None:
        ids, others = prompt(8), {name: 1.05 * weight for name, weight in llama.named_parameters()}

        def call() -> torch.Tensor:
            return torch.func.functional_call(llama, others, (ids,), {"use_cache": False}).logits

        plain = call()
        with encoded_llama(llama, keys_for(llama, **settings)):
            assert difference(call(), plain) < 1e-4

    @by_settings
    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
    @torch.no_grad()
    def test_cast(self, prompt, settings, dtype) -> None:
        ids = prompt(9)

        def converse(model) -> torch.Tensor:
            model.to(dtype)
            out = model(ids)
            return torch.cat((out.logits, model(prompt(2, seed=1), past_key_values=out.past_key_values).logits), dim=1)

        model = tiny_model()
        encode_llama(model, keys_for(model, **settings))
        plain = converse(tiny_model())
        assert converse(model).dtype is dtype
        assert difference(converse(model), plain) < 2e-2


class TestStack:
    """A block is known by its place among those that run."""

    @by_settings
    @pytest.mark.parametrize("order", [[0, 2], [0, 2, 1], [2, 1, 0], [1]], ids=str)
    @pytest.mark.parametrize("when", ["before", "after"])
    @torch.no_grad()
    def test_blocks_taken_out_or_reordered(self, prompt, settings, order, when) -> None:
        ids = prompt(9)

        def rearrange(model) -> None:
            model.model.layers = nn.ModuleList([model.model.layers[i] for i in order])
            model.config.num_hidden_layers = len(order)

        plain, model = tiny_model(), tiny_model()
        rearrange(plain)
        if when == "before":
            rearrange(model)
        encode_llama(model, keys_for(model, **settings))
        if when == "after":
            rearrange(model)
        expected = logits(plain, ids)
        assert difference(logits(model, ids), expected) < 1e-4
        out = model(ids)
        step = model(ids[:, :1], past_key_values=out.past_key_values).logits
        for place, block in enumerate(plain.model.layers):
            block.self_attn.layer_idx = place  # without it the plain model's cache goes by the old places
        expected = plain(torch.cat((ids, ids[:, :1]), dim=1)).logits[:, -1:]
        assert difference(step, expected) < 1e-4

    @by_settings
    @torch.no_grad()
    def test_fewer_blocks_for_a_while(self, llama, prompt, settings) -> None:
        """As an early exit does it; a conversation goes on with the blocks that it began with, or is refused."""
        ids = prompt(9)

        def run() -> list[torch.Tensor]:
            whole = model(ids).past_key_values
            model.config.num_hidden_layers = 2
            fewer = model(ids).logits
            tokens = model.generate(ids, max_new_tokens=5, do_sample=False)
            model.config.num_hidden_layers = 3
            return [fewer, tokens, model(ids[:, :2], past_key_values=whole).logits]

        model = llama
        plain = run()
        with encoded_llama(model, keys_for(model, **settings)):
            for a, b in zip(run(), plain, strict=True):
                assert difference(a, b) < 1e-4
            cache = model(ids).past_key_values
            model.config.num_hidden_layers = 2
            with pytest.raises(ValueError, match="past_key_values: 3 blocks have filled it, and 2 are to run"):
                model(ids[:, :1], past_key_values=cache)
            model.config.num_hidden_layers = 3

    @torch.no_grad()
    def test_early_exit_speculation(self, llama, prompt) -> None:
        ids = prompt(9)
        settings = {"max_new_tokens": 12, "do_sample": False, "assistant_early_exit": 2}
        plain = llama.generate(ids, **settings)
        with encoded_llama(llama, keys_for(llama, redundant_num=3)):
            assert torch.equal(llama.generate(ids, **settings), plain)

    def test_one_block_in_two_places(self, llama) -> None:
        blocks = llama.model.layers
        llama.model.layers = nn.ModuleList([blocks[0], blocks[1], blocks[1]])
        with pytest.raises(ValueError, match="one block stands in several places of the stack; copy it"):
            encode_llama(llama, keys_for(llama))
        llama.model.layers = nn.ModuleList([blocks[0], blocks[1], copy.deepcopy(blocks[1])])
        encode_llama(llama, keys_for(llama))

    @torch.no_grad()
    def test_blocks_that_were_not_encoded(self, llama, prompt) -> None:
        foreign, ids = tiny_model().model.layers, prompt(5)
        encode_llama(llama, keys_for(llama))
        own = list(llama.model.layers)
        llama.model.layers = nn.ModuleList([own[0], foreign[1], own[2]])
        with pytest.raises(ValueError, match=r"blocks \[1\] came after it was encoded"):
            llama(ids)
        llama.model.layers = nn.ModuleList([*own, copy.deepcopy(own[0])])
        llama.config.num_hidden_layers = 4
        with pytest.raises(ValueError, match="it had 3 blocks when it was encoded, 4 are to run"):
            llama(ids)
        llama.model.layers = nn.ModuleList([own[0], own[0], own[1]])
        llama.config.num_hidden_layers = 3
        with pytest.raises(ValueError, match="one block stands in several places"):
            llama(ids)


class TestHooks:
    """Hooks of blocks and of the embedding see rows in token order; those inside of a block see them as they are."""

    SEEN = (7, 96)

    def _check(self, model, settings, ids, add) -> list[torch.Size]:
        """The same hook on the plain and on the encoded model: the same logits, and the shapes that the latter saw."""
        shapes: list[torch.Size] = []
        handle = add(model, shapes)
        plain = logits(model, ids)
        with encoded_llama(model, keys_for(model, **settings)):
            shapes.clear()
            assert difference(logits(model, ids), plain) < 1e-4
            handle.remove()
            without = logits(model, ids)
            late = add(model, shapes)
            assert difference(logits(model, ids), plain) < 1e-4
            late.remove()
        assert difference(without, plain) > 1e-2, "the hook does nothing"
        return shapes

    @by_settings
    @pytest.mark.parametrize("place", [0, 1, 2])
    def test_steering_of_one_position(self, llama, prompt, settings, place) -> None:
        def add(model, shapes):
            def steer(module, args, output):
                shapes.extend((args[0].shape, output.shape))
                output = output.clone()
                output[:, -1] += 0.5
                return output

            return model.model.layers[place].register_forward_hook(steer)

        shapes = self._check(llama, settings, prompt(7), add)
        assert set(shapes) == {(1, *self.SEEN)}

    @by_settings
    @pytest.mark.parametrize("place", [0, 1, 2])
    def test_patching_of_a_blocks_input(self, llama, prompt, settings, place) -> None:
        def add(model, shapes):
            def patch(module, args):
                shapes.append(args[0].shape)
                rows = args[0].clone()
                rows[:, 2] = rows.mean(dim=1)
                return (rows, *args[1:])

            return model.model.layers[place].register_forward_pre_hook(patch)

        assert set(self._check(llama, settings, prompt(7), add)) == {(1, *self.SEEN)}

    @by_settings
    def test_on_the_embedding(self, llama, prompt, settings) -> None:
        def add(model, shapes):
            def shift(module, args, output):
                shapes.append(output.shape)
                return output + torch.linspace(0, 1, output.shape[1], device=output.device)[:, None]

            return model.get_input_embeddings().register_forward_hook(shift)

        assert set(self._check(llama, settings, prompt(7), add)) == {(1, *self.SEEN)}

    @by_settings
    @pytest.mark.parametrize("path", ["layers.1.self_attn.v_proj", "layers.0.self_attn.q_proj", "layers.2.mlp", "norm"])
    def test_row_by_row_inside_of_a_block(self, llama, prompt, settings, path) -> None:
        def add(model, shapes):
            return model.model.get_submodule(path).register_forward_hook(lambda module, args, output: 1.25 * output)

        self._check(llama, settings, prompt(7), add)

    @torch.no_grad()
    def test_what_nobody_hooks_stays_encoded(self, llama, prompt) -> None:
        """One block's hook opens its own two borders; recording hidden states opens none."""
        ids, shapes = prompt(7), {}
        encode_llama(llama, keys_for(llama, redundant_num=3))
        llama(ids, output_hidden_states=True)

        class Watched(type(llama.model.layers[0])):
            def forward(self, states, **kwargs):
                shapes[self.self_attn.layer_idx] = states.shape[1]
                return super().forward(states, **kwargs)

        for block in llama.model.layers:
            block.__class__ = Watched
        llama(ids)
        assert shapes == {0: 7, 1: 10, 2: 10}  # the first is given a stand-in of the tokens' shape
        llama.model.layers[0].register_forward_pre_hook(lambda module, args: None)
        llama(ids)
        assert shapes == {0: 7, 1: 7, 2: 10}

    def test_gradients_that_a_hook_sees(self, llama, prompt) -> None:
        ids = prompt(7)

        def gradients() -> list[torch.Tensor]:
            seen = []
            handle = llama.model.layers[1].register_full_backward_hook(
                lambda module, to_input, to_output: seen.extend((to_input[0], to_output[0]))
            )
            llama(ids, labels=ids, use_cache=False).loss.backward()
            handle.remove()
            return seen

        plain = gradients()
        with encoded_llama(llama, keys_for(llama, redundant_num=3, alp=True)):
            for a, b in zip(gradients(), plain, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


class TestOffloadedWeights:
    """accelerate keeps the weights elsewhere, and brings them for the time of a call."""

    @by_settings
    @pytest.mark.parametrize("family", ["llama", "qwen3"])
    @pytest.mark.parametrize("when", ["before", "after"])
    @torch.no_grad()
    def test_answers_are_the_plain_models(self, prompt, settings, family, when) -> None:
        accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")
        ids, model = prompt(7), tiny_model(family)
        plain = logits(model, ids)
        generated = model.generate(ids, max_new_tokens=5, do_sample=False)
        place = torch.device(model.device)
        if when == "before":
            accelerate.cpu_offload(model, execution_device=place)
        encode_llama(model, keys_for(model, **settings))
        if when == "after":
            accelerate.cpu_offload(model, execution_device=place)
        assert model.model.layers[0].mlp.up_proj.weight.is_meta
        assert difference(logits(model, ids), plain) < 1e-4
        assert torch.equal(model.generate(ids, max_new_tokens=5, do_sample=False), generated)
        decode_llama(model)
        assert torch.equal(logits(model, ids), plain)


@by_settings
@torch.no_grad()
def test_an_embedding_larger_than_the_configuration_says(llama, prompt, settings) -> None:
    """Padded by hand; what counts is the embedding."""
    larger = nn.Embedding(VOCABULARY + 45, llama.config.hidden_size, device=llama.device)
    torch.nn.init.normal_(larger.weight, 0, 0.1)
    llama.model.embed_tokens = larger
    ids = torch.tensor([[3, VOCABULARY + 19, 17, VOCABULARY + 44]], device=llama.device)
    plain = logits(llama, ids)
    with encoded_llama(llama, keys_for(llama, **settings)):
        assert difference(logits(llama, ids), plain) < 1e-4
        with pytest.raises(ValueError, match=f"input_ids: expected tokens 0..{VOCABULARY + 44}"):
            logits(llama, ids + 1)
