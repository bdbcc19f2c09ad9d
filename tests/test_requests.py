"""`generate` in all its ways, the documented calls, and requests that are refused with nothing changed."""

import copy

import pytest
import torch
from tiny import VOCABULARY, tiny_model
from torch import nn
from transformers import DynamicCache, GenerationConfig, StaticCache, set_seed
from transformers.models.gpt2 import GPT2Config, GPT2LMHeadModel

from scx import SCXKeyGenerator, decode_llama, encode_llama, encoded_llama, split_kvcache_dynamic


def keys_for(model, **options) -> SCXKeyGenerator:
    return SCXKeyGenerator.for_model(model, **{"redundant_num": 3, "alp": True, **options})


@pytest.fixture
def encoded(llama):
    return encode_llama(llama, keys_for(llama))


GENERATIONS = {
    "greedy": {"do_sample": False},
    "sampling": {"do_sample": True, "temperature": 0.8, "top_k": 20},
    "several samples": {"do_sample": True, "num_return_sequences": 3},
    "beams": {"do_sample": False, "num_beams": 4},
    "beams, several": {"do_sample": False, "num_beams": 4, "num_return_sequences": 2, "length_penalty": 0.5},
    "beams, sampling": {"do_sample": True, "num_beams": 3},
    "prompt lookup": {"do_sample": False, "prompt_lookup_num_tokens": 3},
    "chunked prefill": {"do_sample": False, "prefill_chunk_size": 4},
    "no cache": {"do_sample": False, "use_cache": False},
}


@pytest.mark.parametrize("kind", GENERATIONS)
@pytest.mark.parametrize("batch", [1, 3])
def test_generate_gives_the_plain_models_tokens(prompt, kind: str, batch: int) -> None:
    """Left-padded batches included; beam search reorders rows together with their keys."""
    if kind == "prompt lookup" and batch > 1:
        batch = 1  # transformers itself refuses assisted generation of a batch
    model = tiny_model()
    ids = prompt(10, batch)
    mask = torch.ones_like(ids)
    for row in range(batch):
        mask[row, : 2 * row] = 0
    settings = {"max_new_tokens": 12, "attention_mask": mask, **GENERATIONS[kind]}

    def generate() -> torch.Tensor:
        set_seed(1)
        return model.generate(ids.masked_fill(mask == 0, 0), **settings)

    plain = generate()
    with encoded_llama(model, keys_for(model)):
        assert torch.equal(generate(), plain)


def test_generate_continues_a_cache(encoded, prompt) -> None:
    """A conversation goes on from the cache that an earlier turn returned."""
    ids = prompt(8)
    settings = {"do_sample": False, "return_dict_in_generate": True}
    first = encoded.generate(ids, max_new_tokens=4, **settings)
    session = first.past_key_values.session
    longer = torch.cat((first.sequences, prompt(3, seed=9)), dim=1)
    second = encoded.generate(longer, max_new_tokens=5, past_key_values=first.past_key_values, **settings)
    assert second.past_key_values.session is session
    decode_llama(encoded)
    assert torch.equal(second.sequences, encoded.generate(longer, max_new_tokens=5, do_sample=False))


@torch.no_grad()
def test_mode_is_told_from_the_cache(encoded, prompt) -> None:
    ids = prompt(6)
    out = encoded(ids, mode="prefill")
    named = encoded(ids[:, :1], mode="decode", past_key_values=copy.deepcopy(out.past_key_values))
    silent = encoded(ids[:, :1], past_key_values=out.past_key_values)
    torch.testing.assert_close(named.logits, silent.logits, rtol=1e-4, atol=1e-4)
    base = encoded.model(ids, mode="prefill")
    assert base.past_key_values.session_id != out.past_key_values.session_id


@torch.no_grad()
def test_seq_len_and_batch_size_are_only_expected(llama, prompt) -> None:
    """Keys are drawn for the request that comes."""
    with encoded_llama(llama, SCXKeyGenerator(4, 96, 16, redundant_num=1, batch_size=1)):
        assert llama(prompt(31, 5)).logits.shape == (5, 31, VOCABULARY)


def check_unchanged(model, prompt) -> None:
    """The model still runs plain, with the classes it had."""
    assert "transformers" in type(model).__module__
    assert not hasattr(model.model, "_scx")
    assert type(model(prompt(3)).past_key_values) is DynamicCache


class TestRefusedModels:
    @pytest.mark.parametrize(
        ("sizes", "message"),
        [((10, 95, 16), "hidden_dim: the model's is 96"), ((10, 96, 8), "qk_hidden_dim: the model's is 16")],
    )
    def test_wrong_sizes(self, llama, prompt, sizes, message) -> None:
        with pytest.raises(ValueError, match=message):
            encode_llama(llama, SCXKeyGenerator(*sizes))
        check_unchanged(llama, prompt)

    def test_protected_layers_beyond_the_model(self, llama, prompt) -> None:
        with pytest.raises(ValueError, match="the model has 3 layers"):
            encode_llama(llama, keys_for(llama, decode_start_layers=range(7)))
        check_unchanged(llama, prompt)

    def test_unsupported(self) -> None:
        gpt2 = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=32, n_head=2, vocab_size=50))
        with pytest.raises(TypeError, match="expected exactly one of LlamaModel.* inside, got GPT2LMHeadModel"):
            encode_llama(gpt2, SCXKeyGenerator(10, 32, 16))

    def test_twice(self, encoded) -> None:
        keys = encoded.model._scx.generator
        with pytest.raises(ValueError, match="encoded already"):
            encode_llama(encoded, keys)
        decode_llama(encoded)
        with pytest.raises(ValueError, match="not encoded"):
            decode_llama(encoded)

    def test_no_generator(self, llama, prompt) -> None:
        with pytest.raises(TypeError, match="key_generator: expected an SCXKeyGenerator, got str"):
            encode_llama(llama, "keys")
        check_unchanged(llama, prompt)

    @pytest.mark.parametrize(
        ("dtype", "why"),
        [
            (torch.int8, "quantised projections are not supported"),
            (torch.float8_e4m3fn, "expected one of float32, float16, bfloat16"),
            (torch.float64, "expected one of float32, float16, bfloat16"),
        ],
    )
    def test_weight_of_another_dtype(self, llama, dtype, why: str) -> None:
        llama.model.layers[1].mlp.up_proj.weight = nn.Parameter(
            llama.model.layers[1].mlp.up_proj.weight.detach().to(dtype), requires_grad=False
        )
        for attempt in (SCXKeyGenerator.for_model, lambda model: encode_llama(model, SCXKeyGenerator(10, 96, 16))):
            with pytest.raises(TypeError, match=rf"layers.1.mlp.up_proj \(Linear\) has a {dtype} weight; {why}"):
                attempt(llama)

    def test_packed_projection(self, llama) -> None:
        class Packed(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.qweight = nn.Buffer(torch.zeros(8, dtype=torch.int32))

        llama.model.layers[2].self_attn.o_proj = Packed()
        with pytest.raises(TypeError, match=r"layers.2.self_attn.o_proj \(Packed\) has no dense weight"):
            encode_llama(llama, SCXKeyGenerator(10, 96, 16))

    def test_noise_through_a_wrapped_projection(self, llama, prompt) -> None:
        """The noise's image can be taken off behind whatever is linear, and behind nothing else."""
        encode_llama(llama, keys_for(llama))
        projection = llama.model.layers[0].self_attn.q_proj
        handle = projection.register_forward_hook(lambda module, args, out: out.tanh())
        with pytest.raises(ValueError, match=r"layers.0.self_attn.q_proj \(Linear\): alp=True needs a linear proj"):
            llama(prompt(3))
        handle.remove()
        projection.register_forward_hook(lambda module, args, out: 2 * out + 1)
        assert llama(prompt(3)).logits.isfinite().all()

    def test_meta_weights(self) -> None:
        model = tiny_model().to("meta")
        with pytest.raises(TypeError, match="meta device"):
            encode_llama(model, SCXKeyGenerator(10, 96, 16))

    def test_patched_forward(self, llama) -> None:
        layer = llama.model.layers[0]
        layer.forward = layer.forward
        with pytest.raises(TypeError, match="forward of its own"):
            encode_llama(llama, keys_for(llama, redundant_num=0))


class TestRefusedRequests:
    def refuse(self, model, kind: type[Exception], message: str, *args, **kwargs) -> None:
        with pytest.raises(kind, match=message):
            model(*args, **kwargs)

    @torch.no_grad()
    def test_mode(self, encoded, prompt) -> None:
        ids = prompt(4)
        self.refuse(encoded, ValueError, r"mode: expected one of \('prefill', 'decode'\)", ids, mode="train")
        self.refuse(encoded, ValueError, "needs the cache that its prefill returned", ids, mode="decode")
        cache = encoded(ids).past_key_values
        self.refuse(encoded, ValueError, "'prefill' opens a session", ids, mode="prefill", past_key_values=cache)
        assert cache.get_seq_length() == 4

    @torch.no_grad()
    def test_plain_cache_of_other_rows(self, llama, prompt) -> None:
        plain = llama(prompt(4)).past_key_values
        encode_llama(llama, keys_for(llama))
        message = r"past_key_values: layer 0: expected K and V \(2 rows"
        self.refuse(llama, ValueError, message, prompt(1, 2), past_key_values=plain)
        assert type(plain) is DynamicCache
        assert plain.get_seq_length() == 4

    @torch.no_grad()
    def test_cache_of_another_model(self, encoded, prompt) -> None:
        other = tiny_model(layers=4)
        encode_llama(other, keys_for(other))
        cache = other(prompt(4)).past_key_values
        self.refuse(encoded, ValueError, "belongs to another model", prompt(1), past_key_values=cache)
        assert cache.get_seq_length() == 4

    @torch.no_grad()
    def test_cache_of_other_settings(self, llama, prompt) -> None:
        """A session goes on under any generator of its own settings, and no other."""
        with encoded_llama(llama, keys_for(llama)):
            cache = llama(prompt(4)).past_key_values
        for other, named in (
            ({"redundant_num": 4}, "redundant_num 3 and 4"),
            ({"alp": False}, "alp True and False"),
            ({"noise_scale": 6.0}, "noise_scale 5.0 and 6.0"),
            ({"protected_layers": 0}, r"start_layers \(0,\) and \(\), end_layers \(2,\) and \(\)"),
        ):
            with encoded_llama(llama, keys_for(llama, **other)):
                self.refuse(llama, ValueError, f"generator differ: {named}", prompt(1), past_key_values=cache)
        assert cache.get_seq_length() == 4
        with encoded_llama(llama, keys_for(llama)):
            assert llama(prompt(1), past_key_values=cache).past_key_values.get_seq_length() == 5

    @torch.no_grad()
    def test_parts_of_a_split_cache(self, encoded, prompt) -> None:
        ids = prompt(4)
        gpu, cpu = split_kvcache_dynamic(encoded(ids).past_key_values, gpu_layers=[1])
        self.refuse(encoded, ValueError, "one part of a split cache", ids[:, :1], past_key_values=gpu)
        self.refuse(encoded, ValueError, "give both parts", ids[:, :1], gpu_kvcache=gpu)
        self.refuse(
            encoded, ValueError, "give either", ids[:, :1], past_key_values=gpu, gpu_kvcache=gpu, cpu_kvcache=cpu
        )
        other = encoded(ids).past_key_values
        foreign = split_kvcache_dynamic(other, gpu_layers=[1])[1]
        self.refuse(encoded, ValueError, "differ", ids[:, :1], gpu_kvcache=gpu, cpu_kvcache=foreign)
        for name, parts in (("gpu_kvcache", (DynamicCache(), cpu)), ("cpu_kvcache", (gpu, DynamicCache()))):
            message = rf"{name}: expected a part .* \(EncodedCache\), got DynamicCache"
            self.refuse(encoded, TypeError, message, ids[:, :1], gpu_kvcache=parts[0], cpu_kvcache=parts[1])
        assert gpu.get_seq_length() == cpu.get_seq_length() == 4

    @torch.no_grad()
    def test_batch(self, encoded, prompt) -> None:
        cache = encoded(prompt(4, 2)).past_key_values
        self.refuse(encoded, ValueError, "holds 2 sequences, the input has 3", prompt(1, 3), past_key_values=cache)
        assert cache.get_seq_length() == 4

    @torch.no_grad()
    def test_cache_position(self, encoded, prompt) -> None:
        cache = encoded(prompt(4)).past_key_values
        for wrong in (torch.tensor([5]), torch.tensor([4, 5])):
            message, given = "cache_position: expected", {"past_key_values": cache, "cache_position": wrong}
            self.refuse(encoded, ValueError, message, prompt(1), **given)
        encoded(prompt(1), past_key_values=cache, cache_position=torch.tensor([4]))

    @torch.no_grad()
    def test_tokens(self, encoded, prompt) -> None:
        # Reading them on an accelerator would make the host wait for it in every step.
        if prompt(1).device.type != "cpu":
            pytest.skip("token values are read at the door on the CPU only")
        for wrong in (VOCABULARY, -1):
            message = rf"input_ids: expected tokens 0\.\.{VOCABULARY - 1}"
            self.refuse(encoded, ValueError, message, torch.tensor([[1, wrong]]))

    @torch.no_grad()
    def test_shapes(self, encoded, prompt) -> None:
        self.refuse(encoded, ValueError, "exactly one of input_ids and inputs_embeds")
        self.refuse(encoded, ValueError, "exactly one", prompt(2), inputs_embeds=torch.zeros(1, 2, 96))
        self.refuse(encoded, ValueError, "input_ids: expected 2 dimensions", prompt(2)[0])
        self.refuse(encoded, ValueError, "none of them empty", prompt(2)[:, :0])

    @torch.no_grad()
    def test_caches_that_cannot_hold_encoded_layers(self, encoded, prompt) -> None:
        static = StaticCache(config=encoded.config, max_cache_len=16)
        self.refuse(encoded, TypeError, "fills a DynamicCache, got StaticCache", prompt(3), past_key_values=static)
        settings = GenerationConfig(cache_implementation="static", max_new_tokens=2)
        with pytest.raises(TypeError, match="fills a DynamicCache, got StaticCache"):
            encoded.generate(prompt(3), generation_config=settings)
