"""An encoded model computes what the plain model computes, and stores nothing plain."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from parity import of_own_sums
from tiny import FAMILIES, tiny_model
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaForSequenceClassification, PreTrainedModel

from scx import SCXKeyGenerator, decode_kvcache, decode_llama, encode_llama, encoded_llama
from scx.projections import project_quiet

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@contextmanager
def encoded(model: PreTrainedModel, **options) -> Iterator[PreTrainedModel]:
    with encoded_llama(model, SCXKeyGenerator.for_model(model, **options)):
        yield model


def largest_difference(a: Tensor, b: Tensor) -> float:
    return (a.double() - b.double()).abs().max().item()


@torch.no_grad()
def tolerance(model: PreTrainedModel, inputs: dict, *, alp: bool) -> float:
    """Twice what the plain model's two attention implementations differ by, or four roundings of the largest logit."""
    logits = model(**inputs).logits
    implementation = model.config._attn_implementation
    model.set_attn_implementation("sdpa" if implementation == "eager" else "eager")
    other = model(**inputs).logits
    model.set_attn_implementation(implementation)
    rounding = torch.finfo(logits.dtype).eps * logits.abs().max().item()
    return 2 * of_own_sums(logits.dtype) * carried(model, alp) * max(largest_difference(logits, other), 2 * rounding)


def carried(model: PreTrainedModel, alp: bool) -> int:
    """How much larger rounding may be under noise, which is carried in float32.

    A float32 model so rounds rows 1 + 5 times as large; in half precision, where the rows themselves are rounded far
    more coarsely, the error may double.
    """
    if not alp:
        return 1
    return 6 if model.dtype == torch.float32 else 2


@torch.no_grad()
def check_parity(model: PreTrainedModel, inputs: dict, *, steps: int = 0, **options) -> None:
    """Prefill and `steps` generated tokens, teacher-forced with the plain model's choice, on logits and caches."""
    real = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"])).bool()
    plain = [model(**inputs)]
    fed = []
    for _ in range(steps):
        fed.append(plain[-1].logits[:, -1:].argmax(dim=-1))
        plain.append(model(fed[-1], past_key_values=plain[-1].past_key_values, **_extended(inputs, len(fed))))

    whole = {"input_ids": torch.cat((inputs["input_ids"], *fed), dim=1), **_whole_mask(inputs, steps)}
    alp = options.get("alp", False)
    allowed = tolerance(model, whole, alp=alp)
    with encoded(model, **options):
        out = model(**inputs)
        assert out.logits.dtype == plain[0].logits.dtype
        assert largest_difference(out.logits[real], plain[0].logits[real]) <= allowed
        for number, token in enumerate(fed):
            out = model(token, past_key_values=out.past_key_values, **_extended(inputs, number + 1))
            assert largest_difference(out.logits, plain[number + 1].logits) <= allowed
    cache = decode_kvcache(out.past_key_values, out.past_key_values.session)
    for ours, theirs in zip(cache.layers, plain[-1].past_key_values.layers, strict=True):
        scale = max(theirs.keys.abs().max().item(), theirs.values.abs().max().item(), 1.0)
        kept = theirs.keys.shape[2]  # fewer than all tokens where a window slides
        stored = torch.cat((real, real.new_ones(len(real), steps)), dim=1)[:, -kept - 1 :][:, :kept]
        for a, b in ((ours.keys, theirs.keys), (ours.values, theirs.values)):
            assert a.shape == b.shape
            a, b = (x.transpose(1, 2)[stored] for x in (a, b))
            assert largest_difference(a, b) <= 8 * torch.finfo(a.dtype).eps * scale * carried(model, alp) + allowed


def _extended(inputs: dict, steps: int) -> dict:
    """The mask and the last position, for the `steps`-th generated token."""
    whole = _whole_mask(inputs, steps)
    return whole | {"position_ids": whole["position_ids"][:, -1:]} if whole else {}


def _whole_mask(inputs: dict, steps: int) -> dict:
    """The inputs' mask and positions over the prompt and `steps` tokens after it."""
    if "attention_mask" not in inputs:
        return {}
    mask = torch.nn.functional.pad(inputs["attention_mask"], (0, steps), value=1)
    return {"attention_mask": mask, "position_ids": (mask.cumsum(dim=-1) - 1).clamp(min=0)}


def ragged(prompt, batch: int, length: int) -> dict:
    """Left-padded prompts of different lengths, as a tokenizer makes them."""
    ids = prompt(length, batch)
    mask = torch.ones_like(ids)
    for row in range(batch):
        mask[row, : 2 * row] = 0
    inputs = {"input_ids": ids.masked_fill(mask == 0, 0), "attention_mask": mask}
    return inputs | _whole_mask(inputs, 0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("alp", [False, True], ids=["quiet", "noisy"])
@pytest.mark.parametrize("redundant_num", [0, 1, 40])
@pytest.mark.parametrize("tokens", [1, 13])
def test_prefill_and_32_steps(prompt, tokens: int, redundant_num: int, alp: bool, dtype: torch.dtype) -> None:
    model = tiny_model(dtype=dtype)
    check_parity(model, {"input_ids": prompt(tokens)}, steps=32, redundant_num=redundant_num, alp=alp)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [64, 80, 128])
@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 2), (3, 1), (6, 2)])
def test_heads(prompt, heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype) -> None:
    model = tiny_model(dtype=dtype, heads=heads, kv_heads=kv_heads, head_dim=head_dim, hidden_size=96)
    check_parity(model, {"input_ids": prompt(9)}, steps=2, redundant_num=3, alp=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("alp", [False, True], ids=["quiet", "noisy"])
def test_ragged_padded_batch(prompt, alp: bool, dtype: torch.dtype) -> None:
    check_parity(tiny_model(dtype=dtype), ragged(prompt, 3, 11), steps=4, redundant_num=5, alp=alp)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_families(prompt, family: str, implementation: str) -> None:
    """Biases (Qwen2), norms per head (Qwen3) and sliding windows (all but Llama) take part in the encoding."""
    options = {} if family == "llama" else {"sliding_window": 5}
    if family.startswith("qwen"):
        options |= {"use_sliding_window": True, "max_window_layers": 1}
    model = tiny_model(family, **options)
    for parameter in model.parameters():
        if parameter.dim() == 1:  # norms and biases start as ones and zeros, which would hide a missing permutation
            torch.nn.init.normal_(parameter, 1.0 if parameter.mean() > 0.5 else 0.0, 0.2)
    model.set_attn_implementation(implementation)
    check_parity(model, {"input_ids": prompt(12)}, steps=6, redundant_num=4, alp=True)
    check_parity(model, ragged(prompt, 2, 9), steps=2, redundant_num=4)


@torch.no_grad()
def test_chunked_prompt_continues_its_session(llama, prompt) -> None:
    """Several tokens after a prefill are token-permuted afresh, with redundant rows of their own."""
    ids = prompt(20, 2)
    whole = llama(ids)
    with encoded(llama, redundant_num=4, alp=True):
        first = llama(ids[:, :9])
        second = llama(ids[:, 9:], past_key_values=first.past_key_values)
    assert largest_difference(second.logits, whole.logits[:, 9:]) < 1e-4
    assert second.past_key_values.session is first.past_key_values.session


@torch.no_grad()
def test_sessions_interleaved(llama, prompt) -> None:
    """Two conversations on one model keep their own keys."""
    prompts = [prompt(7, seed=1), prompt(7, seed=2)]
    plain = [llama.generate(ids, max_new_tokens=6, do_sample=False) for ids in prompts]
    with encoded(llama, redundant_num=2, alp=True):
        outs = [llama(ids) for ids in prompts]
        sessions = [out.past_key_values.session for out in outs]
        texts = [ids for ids in prompts]
        for _ in range(6):
            for i in (0, 1):
                token = outs[i].logits[:, -1:].argmax(dim=-1)
                texts[i] = torch.cat((texts[i], token), dim=1)
                outs[i] = llama(token, past_key_values=outs[i].past_key_values)
    assert sessions[0].id != sessions[1].id
    assert all(torch.equal(a, b) for a, b in zip(texts, plain, strict=True))


@torch.no_grad()
def test_rows_of_a_batch_have_their_own_keys(llama, prompt) -> None:
    """The same prompt in both rows is stored differently."""
    ids = prompt(8).repeat(2, 1)
    with encoded(llama):
        cache = llama(ids).past_key_values
    for layer in cache.layers:
        assert not torch.equal(layer.keys[0], layer.keys[1])
        assert not torch.equal(layer.values[0], layer.values[1])


@torch.no_grad()
def test_cache_is_stored_permuted(llama, prompt) -> None:
    """No head of any layer is stored plain, yet each row holds the plain row's features in another order."""
    ids = prompt(6)
    plain = llama(ids).past_key_values
    with encoded(llama, redundant_num=2):
        cache = llama(ids).past_key_values
    for ours, theirs in zip(cache.layers, plain.layers, strict=True):
        for a, b in ((ours.keys, theirs.keys), (ours.values, theirs.values)):
            assert a.shape == b.shape
            assert all(largest_difference(a[0, head], b[0, head]) > 0.1 for head in range(a.shape[1]))
            assert largest_difference(a.sort(dim=-1).values, b.sort(dim=-1).values) < 1e-4


@torch.no_grad()
def test_rows_between_blocks_are_permuted_with_redundant_rows(llama, prompt) -> None:
    """What every projection receives in a prefill has redundant rows among permuted ones; noise covers block 1."""
    ids = prompt(10)
    received: dict[str, Tensor] = {}

    def record(name: str):
        return lambda module, args: received.__setitem__(name, args[0])

    names = ["self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj"]
    places = {f"{i}.{name}": llama.model.layers[i].get_submodule(name) for i in range(3) for name in names}
    handles = [place.register_forward_pre_hook(record(name)) for name, place in places.items()]
    llama(ids)
    plain = dict(received)
    with encoded(llama, redundant_num=6):
        llama(ids)
    for handle in handles:
        handle.remove()
    for name, rows in received.items():
        assert rows.shape[1] == 16, name
        distance = torch.cdist(plain[name][0].double(), rows[0].double())
        places_found = distance.argmin(dim=1)
        assert (distance.min(dim=1).values < 1e-3).all(), name
        assert len(places_found.unique()) == 10, name
        assert places_found.tolist() != sorted(places_found.tolist()), name


@torch.no_grad()
def test_noise_covers_the_first_blocks_input(llama, prompt) -> None:
    """With alp the rows that the first block's products see are far from the plain ones, every time by other noise."""
    ids, seen = prompt(8), []

    def spy(modules, rows, noise, layer):
        seen.append(rows)
        assert len(modules) == 3
        return project_quiet(modules, rows, noise, layer)

    normalised = llama.model.layers[0].input_layernorm(llama.get_input_embeddings()(ids))
    with pytest.MonkeyPatch.context() as patch, encoded(llama, alp=True, noise_scale=5.0):
        patch.setattr("scx.models.fused.project_quiet", spy)
        out = llama(ids)
        llama(ids[:, :1], past_key_values=out.past_key_values)
    assert len(seen) == 2  # q, k and v of the first block, in the prefill and in the step
    for noisy in seen:
        nearest = torch.cdist(normalised[0], noisy[0].to(normalised.dtype)).min()
        assert nearest > 3 * normalised[0].norm(dim=-1).mean()
    assert not torch.equal(seen[0][:, :1], seen[1])


@torch.no_grad()
@pytest.mark.parametrize("options", [{}, {"redundant_num": 3, "alp": True}])
def test_output_attentions_and_hidden_states(prompt, options: dict) -> None:
    """Recorded tensors are those of the plain model, in token order."""
    model = tiny_model()
    model.set_attn_implementation("eager")
    ids = prompt(7)
    plain = model(ids, output_attentions=True, output_hidden_states=True)
    with encoded(model, **options):
        out = model(ids, output_attentions=True, output_hidden_states=True)
        as_tuple = model(ids, return_dict=False)
    for name in ("attentions", "hidden_states"):
        assert len(out[name]) == len(plain[name])
        for a, b in zip(out[name], plain[name], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(as_tuple[0], plain.logits, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_encode_changes_no_weight_and_decode_restores_outputs_bitwise(llama, prompt) -> None:
    ids = prompt(9)
    before = llama(ids).logits
    state = {name: (weight.data_ptr(), weight.clone()) for name, weight in llama.state_dict().items()}
    kinds = [type(module) for module in llama.modules()]
    keys = SCXKeyGenerator.for_model(llama, redundant_num=2)
    assert encode_llama(llama, keys) is llama
    after = llama.state_dict()
    assert list(after) == list(state)
    assert all(
        after[name].data_ptr() == pointer and torch.equal(after[name], w) for name, (pointer, w) in state.items()
    )
    assert sum(b.nbytes for b in llama.buffers()) == sum(b.nbytes for b in tiny_model().buffers())
    llama(ids)
    assert decode_llama(llama) is llama
    assert [type(module) for module in llama.modules()] == kinds
    assert torch.equal(llama(ids).logits, before)
    assert not hasattr(llama.model, "_scx")


@torch.no_grad()
def test_save_pretrained_writes_the_plain_model(llama, prompt, tmp_path) -> None:
    ids = prompt(5)
    before = llama(ids).logits
    with encoded(llama, redundant_num=2, master_key=b"\xab" * 32):
        llama(ids)
        llama.save_pretrained(tmp_path)
        assert type(llama).__name__ == "LlamaForCausalLM"
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval().to(llama.device)
    assert loaded.config.architectures == ["LlamaForCausalLM"]
    assert torch.equal(loaded(ids).logits, before)
    for file in tmp_path.iterdir():
        assert b"\xab" * 16 not in file.read_bytes()


@torch.no_grad()
def test_other_heads(prompt) -> None:
    """The decoder is what is encoded; a classification head on top works as well."""
    config = tiny_model().config
    config.num_labels = 3
    torch.manual_seed(1)
    model = LlamaForSequenceClassification(config).eval().to(prompt(1).device)
    ids = prompt(6, 2)
    before = model(ids).logits
    with encoded(model, redundant_num=2):
        torch.testing.assert_close(model(ids).logits, before, rtol=1e-4, atol=1e-5)


def test_gradients_flow_through_an_encoded_model(llama, prompt) -> None:
    """Adapters can be trained through it: gradients equal the plain model's."""
    ids = prompt(6)
    llama(ids, labels=ids).loss.backward()
    plain = {name: weight.grad.clone() for name, weight in llama.named_parameters()}
    llama.zero_grad()
    with encoded(llama, redundant_num=2, alp=True):
        llama(ids, labels=ids).loss.backward()
    for name, weight in llama.named_parameters():
        torch.testing.assert_close(weight.grad, plain[name], rtol=1e-3, atol=1e-4, msg=name)


@torch.no_grad()
def test_embeddings_in_and_no_cache(llama, prompt) -> None:
    ids = prompt(6)
    plain = llama(ids).logits
    with encoded(llama, redundant_num=2, alp=True):
        out = llama(inputs_embeds=llama.get_input_embeddings()(ids), use_cache=False)
        assert out.past_key_values is None
        assert largest_difference(out.logits, plain) < 1e-4
        kept = llama(ids, logits_to_keep=1).logits
        assert largest_difference(kept, plain[:, -1:]) < 1e-4


@torch.no_grad()
def test_accelerate_hooks_stay_in_place(llama, prompt) -> None:
    """Modules that accelerate has wrapped are swapped underneath their hooks."""
    hooks = pytest.importorskip("accelerate.hooks", reason="accelerate is not installed")
    ids = prompt(6)
    plain = llama(ids).logits
    called = []

    class Count(hooks.ModelHook):
        def pre_forward(self, module, *args, **kwargs):
            called.append(module)
            return args, kwargs

    layer = llama.model.layers[1]
    hooks.add_hook_to_module(layer, Count())
    with encoded(llama):
        assert largest_difference(llama(ids).logits, plain) < 1e-4
        assert called == [layer]
    assert torch.equal(llama(ids).logits, plain)
    assert called == [layer, layer]
