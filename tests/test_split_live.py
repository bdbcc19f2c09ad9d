"""What is done to a split model and asked of it is heard, or refused by name before anything crosses."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from test_split import by_crossings, keys_for, untrusted_party
from tiny import tiny_model
from torch import Tensor, nn
from torch.nn.utils import parametrize
from transformers import AttentionInterface, DynamicCache, GenerationConfig, StaticCache, set_seed
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from scx import decode_llama, encode_llama, encoded_llama, record_transcript, split_kvcache_dynamic
from scx.models.llama import model_shape
from scx.party import PartyLostError
from scx.party.live import Mirror
from scx.party.process import RemoteParty
from scx.party.secure import split_plan

CPU = torch.device("cpu")


def answers(model, prompt, between: Callable[[Any], None] = lambda model: None) -> list[Tensor]:
    """Logits of a prompt, a token, then of a token and two more behind what is done in between."""
    with torch.no_grad():
        out = model(prompt(9))
        cache, logits = (
            out.past_key_values,
            [out.logits, model(prompt(1, seed=1), past_key_values=out.past_key_values).logits],
        )
        between(model)
        logits += [model(prompt(n, seed=n), past_key_values=cache).logits for n in (1, 2)]
        return [*logits, model(prompt(5, seed=7)).logits]


def check_same(prompt, do: Callable[[Any], None], crossings: str = "few", make: Callable[[], Any] = tiny_model) -> None:
    """What is done to a model in the middle of a conversation makes the same of a plain one and of a split one."""
    expected = answers(make(), prompt, do)
    model = make()
    encode_llama(model, keys_for(model), "cpu", crossings=crossings)
    for got, wanted in zip(answers(model, prompt, do), expected, strict=True):
        tolerance = 1e-4 * float(wanted.abs().max())
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=tolerance)


# What is done to the model


class Adapted(nn.Module):
    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base_layer = base
        self.down, self.up = nn.Linear(base.in_features, 3, bias=False), nn.Linear(3, base.out_features, bias=False)
        for index, part in enumerate((self.down, self.up)):
            generator = torch.Generator().manual_seed(index)
            part.weight.data = 0.2 * torch.randn(part.weight.shape, generator=generator)

    def forward(self, rows: Tensor) -> Tensor:
        result: Tensor = self.base_layer(rows) + self.up(self.down(rows))
        return result


class CentredNorm(nn.Module):
    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, rows: Tensor) -> Tensor:
        return nn.functional.layer_norm(rows, rows.shape[-1:]) * self.weight


class Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


def adapt(model) -> None:
    for layer in model.model.layers:
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            setattr(layer.self_attn, name, Adapted(getattr(layer.self_attn, name)))
        layer.mlp.up_proj = Adapted(layer.mlp.up_proj)


def replace_modules(model) -> None:
    model.model.layers[0].input_layernorm = CentredNorm(model.model.layers[0].input_layernorm.weight)
    model.model.layers[1].mlp.act_fn = nn.GELU()
    model.model.norm = CentredNorm(model.model.norm.weight)


def hook(model) -> None:
    first, last = model.model.layers[0], model.model.layers[-1]
    for module in (
        first.self_attn.v_proj,
        first.input_layernorm,
        last.self_attn.o_proj,
        last.self_attn.k_proj,
        last.mlp,
    ):
        module.register_forward_hook(lambda module, args, out: 1.25 * out)
    model.model.norm.register_forward_pre_hook(lambda module, args: (0.5 * args[0] + 0.1,))


def load(model) -> None:
    generator = torch.Generator().manual_seed(3)
    state = model.state_dict()
    model.load_state_dict({name: x + 0.02 * torch.randn(x.shape, generator=generator) for name, x in state.items()})


def write_past_versions(model) -> None:
    for parameter in model.parameters():
        parameter.data.mul_(1.1)


def put_new_parameters(model) -> None:
    for module in model.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is not None:
                setattr(module, name, nn.Parameter(0.9 * parameter.detach()))


def parametrise(model) -> None:
    for layer in model.model.layers:
        parametrize.register_parametrization(layer.self_attn.k_proj, "weight", Doubled())


def shift_rope(model) -> None:
    model.model.rotary_emb.inv_freq.mul_(1.5)


CHANGES = [adapt, replace_modules, hook, load, write_past_versions, put_new_parameters, parametrise, shift_rope]


@by_crossings
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_changed_model_answers_as_the_plain_one(prompt, change: Callable[[Any], None], crossings: str) -> None:
    """Weights, modules and hooks are those that are there when a request comes, for both sides and for noise's images,
    also in the middle of a conversation."""
    check_same(prompt, change, crossings)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_cast_after_encoding(prompt, dtype: torch.dtype) -> None:
    """A model that is cast goes on in its new dtype; redundant rows and noise follow."""
    wanted = tiny_model().to(dtype)(prompt(9)).logits.detach()
    model = tiny_model()
    encode_llama(model, keys_for(model), "cpu")
    model.to(dtype)
    out = model(prompt(9))
    assert out.logits.dtype == dtype
    tolerance = 24 * max(torch.finfo(dtype).eps, 1e-7) * float(wanted.abs().max())
    torch.testing.assert_close(out.logits, wanted, rtol=0, atol=tolerance)
    assert model(prompt(1), past_key_values=out.past_key_values).logits.isfinite().all()


def test_functional_call(llama, prompt) -> None:
    """Weights that are there for one call are used in it."""
    weights = {name: 1.2 * x.detach() for name, x in llama.named_parameters()}
    with torch.no_grad():
        wanted = torch.func.functional_call(llama, weights, (prompt(6),)).logits
        encode_llama(llama, keys_for(llama), "cpu", crossings="paper")
        got = torch.func.functional_call(llama, weights, (prompt(6),)).logits
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4 * float(wanted.abs().max()))


@torch.no_grad()
@pytest.mark.parametrize("size", [300, 150])
@pytest.mark.parametrize("top_k", [None, 5])
def test_resized_vocabulary(prompt, size: int, top_k: int | None) -> None:
    """Embedding and head are those of the model, also where the head is the untrusted side's."""
    ids = prompt(9).clamp(max=149)
    made = []
    for encoded in (False, True):
        model = tiny_model(tie_word_embeddings=True)
        if encoded:
            encode_llama(model, keys_for(model), "cpu", prefill_top_k=top_k)
        torch.manual_seed(1)
        model.resize_token_embeddings(size, mean_resizing=False)
        made.append(model(ids).logits)
    plain, split = made
    assert split.shape == plain.shape
    places = plain.topk(top_k or size).indices
    torch.testing.assert_close(split.gather(2, places), plain.gather(2, places), rtol=1e-4, atol=1e-4)


def test_a_mirror_follows_its_source() -> None:
    """A copy on another device is the same until its source changes: by value, by object, by what is inside."""
    mirror, module = Mirror(torch.device("meta")), nn.Sequential(nn.Linear(3, 3))
    assert Mirror(CPU).of("a", module) is module
    first = mirror.of("a", module)
    assert first[0].weight.is_meta
    assert mirror.of("a", module) is first
    for change in (
        lambda: module[0].weight.detach().add_(1),
        lambda: setattr(module[0], "weight", nn.Parameter(torch.zeros(3, 3))),
        lambda: module.__setitem__(0, nn.Linear(3, 3)),
        lambda: module[0].register_forward_hook(lambda *_: None),
        lambda: module.double(),
    ):
        change()
        again = mirror.of("a", module)
        assert again is not first
        first = again
    assert mirror.of("a", nn.Sequential(nn.Linear(3, 3))) is not first
    mirror.renew()
    assert mirror.of("a", module) is not first


# What is refused of the model


@contextmanager
def refused(model, kind: Any, message: str) -> Iterator[None]:
    """What is asked within is refused before a tensor crosses."""
    with record_transcript(model) as transcript, pytest.raises(kind, match=message):
        yield
    assert not transcript.crossings


def test_stack_that_was_changed(llama, prompt) -> None:
    encode_llama(llama, keys_for(llama), "cpu")
    cache = llama(prompt(4)).past_key_values
    layers, config = llama.model.layers, llama.config
    for stack, place in (
        ([layers[1], layers[0], layers[2]], 0),
        ([layers[0], layers[0], layers[2]], 1),
        ([layers[0], layers[1]], 2),
    ):
        llama.model.layers = nn.ModuleList(stack)
        for arguments in ({}, {"past_key_values": cache}):
            with refused(llama, ValueError, rf"layers\.{place} is not the block that was divided"):
                llama(prompt(1), **arguments)
    llama.model.layers = layers
    config.num_hidden_layers = 2
    with refused(llama, ValueError, "config.num_hidden_layers: 3 blocks were divided .* 2 are to run"):
        llama(prompt(1))
    config.num_hidden_layers = 3
    with refused(llama, ValueError, "assistant_early_exit: the blocks are divided"):
        llama.generate(prompt(4), assistant_early_exit=1, max_new_tokens=2)
    assert config.num_hidden_layers == 3
    assert llama(prompt(1), past_key_values=cache).logits.isfinite().all()


def test_hooks_on_what_is_not_called(llama, prompt) -> None:
    """A block and its attention are not called as modules by either party."""
    encode_llama(llama, keys_for(llama), "cpu")
    for path in ("layers.1", "layers.2.self_attn"):
        module = llama.model.get_submodule(path)
        for attach in (
            lambda x: x.register_forward_hook(lambda *_: None),
            lambda x: x.register_forward_pre_hook(lambda *_: None),
            lambda x: x.register_full_backward_hook(lambda *_: None),
        ):
            handle = attach(module)
            with refused(llama, ValueError, f"model: {path} has hooks, or a forward of its own"):
                llama(prompt(2))
            handle.remove()
        module.forward = module.forward
        with refused(llama, ValueError, f"model: {path} has hooks, or a forward of its own"):
            llama(prompt(2))
        del module.forward
    kept, llama.model.layers[0].self_attn = llama.model.layers[0].self_attn, nn.Identity()
    with refused(llama, TypeError, r"model: layers\.0\.self_attn is a Identity, expected a LlamaAttention"):
        llama(prompt(2))
    llama.model.layers[0].self_attn = kept
    decode_llama(llama)
    llama.model.layers[1].register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match=r"model: layers\.1 has hooks"):
        encode_llama(llama, keys_for(llama), "cpu")


def test_accelerates_hooks(llama, prompt) -> None:
    """What moves a block's inputs to where its weights are is not missed; anything else around a block would be."""
    hooks = pytest.importorskip("accelerate.hooks", reason="accelerate is not installed")
    wanted = llama(prompt(5)).logits
    for module in (llama.model.layers[1], llama.model.layers[1].self_attn, llama.model.layers[0].self_attn.q_proj):
        hooks.add_hook_to_module(module, hooks.AlignDevicesHook(execution_device="cpu"))
    encode_llama(llama, keys_for(llama), "cpu")
    torch.testing.assert_close(llama(prompt(5)).logits, wanted, rtol=1e-4, atol=1e-4)
    hooks.add_hook_to_module(llama.model.layers[2], hooks.ModelHook())
    with refused(llama, ValueError, r"model: layers\.2 has hooks"):
        llama(prompt(2))


def test_hooked_norms_of_heads(prompt) -> None:
    model = tiny_model("qwen3")
    encode_llama(model, keys_for(model), "cpu")
    model.model.layers[1].self_attn.k_norm.register_forward_hook(lambda *_: None)
    with refused(model, ValueError, r"layers\.1\.self_attn\.q_norm and k_norm must be transformers' own"):
        model(prompt(2))


def test_attention_functions(llama, prompt) -> None:
    encode_llama(llama, keys_for(llama), "cpu")
    wanted = llama(prompt(5)).logits
    AttentionInterface.register("mine", lambda *args, **kwargs: sdpa_attention_forward(*args, **kwargs))
    try:
        for name in ("mine", "paged|eager"):
            llama.config._attn_implementation = name
            with refused(llama, ValueError, "config._attn_implementation: the split placement computes attention"):
                llama(prompt(5))
        llama.config._attn_implementation = "eager"
        torch.testing.assert_close(llama(prompt(5)).logits, wanted, rtol=1e-4, atol=1e-4)
    finally:
        del AttentionInterface._global_mapping["mine"]


def test_projections_that_bend(llama, prompt) -> None:
    """Noise cannot be taken off behind them; neither side has anything of the request then."""
    encode_llama(llama, keys_for(llama, protected_layers=1, decode_start_layers=[0, 1]), "cpu")
    cache = llama(prompt(4)).past_key_values
    before = untrusted_party(llama).conversations
    llama.model.layers[1].self_attn.q_proj.register_forward_hook(lambda module, args, out: out.tanh())
    with refused(llama, ValueError, r"layers\.1\.self_attn\.q_proj \(Linear\): alp=True needs a linear projection"):
        llama(prompt(1), past_key_values=cache)
    assert cache.get_seq_length() == 4
    llama.model.layers[0].self_attn.v_proj.register_forward_hook(lambda module, args, out: out.tanh())
    with refused(llama, ValueError, r"layers\.0\.self_attn\.v_proj \(Linear\): alp=True needs a linear projection"):
        llama(prompt(3))
    assert untrusted_party(llama).conversations == before


# A worker's blocks


def with_a_worker(model, **options) -> None:
    """Encode for a party in another process, of which nobody needs to be there to be refused."""
    generator, shape = keys_for(model), model_shape(model)
    plan = split_plan(generator, shape, "few", False, options.get("prefill_top_k"))
    encode_llama(model, generator, "cpu", untrusted=RemoteParty(plan, shape.fingerprint, timeout=1.0), **options)


WORKERS: list[tuple[Callable[[Any], object], str]] = [
    (lambda model: model.model.layers[1].mlp.up_proj.weight.detach().mul_(2), r"layers\.1\.mlp\.up_proj"),
    (lambda model: model.model.layers[1].mlp.down_proj.weight.data.mul_(2), r"layers\.1\.mlp\.down_proj"),
    (lambda model: setattr(model.model.layers[0].mlp, "act_fn", nn.GELU()), r"layers\.0\.mlp"),
    (lambda model: model.model.layers[2].mlp.act_fn.register_forward_hook(lambda *_: None), r"layers\.\d\.mlp\.act_fn"),
    (lambda model: model.half(), r"layers\.0\.self_attn\.q_proj"),
    (lambda model: model.model.rotary_emb.inv_freq.mul_(2), "rotary_emb"),
    (lambda model: setattr(model.model.layers[1].self_attn, "scaling", 1.0), r"layers\.1\.self_attn"),
    (lambda model: model.lm_head.weight.detach().mul_(2), "lm_head"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "name"), WORKERS)
def test_blocks_that_differ_from_the_workers(llama, prompt, change: Callable[[Any], object], name: str) -> None:
    with_a_worker(llama, prefill_top_k=4)
    change(llama)
    with refused(llama, ValueError, f"model: {name} has changed since the model was encoded, and the untrusted party"):
        llama(prompt(3))


def test_a_rotary_embedding_that_grows_is_the_workers_too(prompt) -> None:
    """Dynamic scaling changes the module by itself, here as at the worker's."""
    model = tiny_model(rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0})
    with_a_worker(model)
    for length in (300, 400):
        with pytest.raises(PartyLostError, match="(open|close), block -1: worker 0 is not connected"):
            model(prompt(length))


@torch.no_grad()
@by_crossings
def test_a_rotary_embedding_that_grows(prompt, crossings: str) -> None:
    """Keys keep the angles of their own time, and new ones have those of now, on both sides."""
    model = tiny_model(rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0})

    def run() -> list[Tensor]:
        out = model(prompt(250))
        later = [model(prompt(n, seed=n), past_key_values=out.past_key_values).logits for n in (1, 20, 1)]
        return [out.logits, *later, model(prompt(5)).logits]

    wanted = run()
    encode_llama(model, keys_for(model), "cpu", crossings=crossings)
    for got, logits in zip(run(), wanted, strict=True):
        torch.testing.assert_close(got, logits, rtol=1e-4, atol=2e-4)


def test_hooks_that_a_worker_does_not_have(llama) -> None:
    llama.model.layers[1].mlp.register_forward_hook(lambda *_: None)
    with pytest.raises(
        ValueError, match=r"model: layers\.1\.mlp has hooks, and the untrusted party in another process"
    ):
        with_a_worker(llama)
    assert type(llama.model).__mro__[1].__name__ != "SplitModel"


# Gradients


def test_a_backward_is_refused_by_name(llama, prompt) -> None:
    """With gradients on, a forward answers, and a backward that reaches it raises; of a conversation, through what it
    began with as well."""
    encode_llama(llama, keys_for(llama), "cpu")
    out = llama(prompt(4), labels=prompt(4))
    with pytest.raises(RuntimeError, match="gradients do not come back over the boundary of the split placement"):
        out.loss.backward()
    llama.zero_grad()
    llama.requires_grad_(False)
    assert not llama(prompt(4)).logits.requires_grad
    embeddings = llama.get_input_embeddings()(prompt(4)).requires_grad_()
    cache = llama(inputs_embeds=embeddings).past_key_values
    with torch.no_grad():
        assert not llama(prompt(1), past_key_values=cache).logits.requires_grad
    logits = llama(prompt(1), past_key_values=cache).logits
    with pytest.raises(RuntimeError, match="gradients do not come back over the boundary"):
        logits.sum().backward()
    assert embeddings.grad is None
    decode_llama(llama)
    llama.requires_grad_(True)
    encode_llama(llama, keys_for(llama), "cpu", prefill_top_k=3)
    with pytest.raises(RuntimeError, match="gradients do not come back over the boundary"):
        llama(prompt(4)).logits.max().backward()


# What a request asks


KEYWORDS: list[tuple[str, dict[str, Any]]] = [
    ("is_causal: attention is causal", {"is_causal": False}),
    ("output_attentions: inner states", {"output_attentions": True}),
    ("output_router_logits: inner states", {"output_router_logits": True}),
    *((f"{name}: the split placement does not know this keyword", {name: torch.tensor([0, 6])}) for name in (
        "cu_seq_lens_q", "cu_seq_lens_k", "seq_idx", "block_table", "read_index", "write_index", "position_bias")),
    *((f"{name}: the split placement does not know this keyword", {name: 6}) for name in (
        "max_length_q", "max_length_k", "softcap", "sliding_window", "nobody_knows")),
    *(("position_ids: expected consecutive positions", {"position_ids": torch.tensor([positions]), "use_cache": False})
      for positions in ([0, 1, 2, 0, 1, 2], [5, 4, 3, 2, 1, 0])),
    ("left padding, zeros before ones", {"attention_mask": torch.full((1, 6), 0.5)}),
]  # fmt: skip


@torch.no_grad()
@pytest.mark.parametrize("top_k", [None, 3])
@pytest.mark.parametrize(("message", "arguments"), KEYWORDS)
def test_keywords_that_change_the_answer(llama, prompt, message: str, arguments: dict, top_k: int | None) -> None:
    encode_llama(llama, keys_for(llama), "cpu", prefill_top_k=top_k)
    with refused(llama, ValueError, message):
        llama(prompt(6), **arguments)


@torch.no_grad()
def test_keywords_that_change_nothing(llama, prompt) -> None:
    """Those that the plain decoder does not act upon, and those without a value; positions of a cache or a mask are not
    packed ones, nor are those that begin elsewhere."""
    ids = prompt(6)
    packed = torch.tensor([[0, 1, 2, 0, 1, 2]])
    ways: list[dict[str, Any]] = [
        {"num_items_in_batch": 3, "token_type_ids": torch.zeros_like(ids), "cu_seq_lens_q": None, "is_causal": True},
        {"output_attentions": False, "output_router_logits": False, "use_cache": False},
        {"position_ids": packed},
        {"position_ids": packed, "attention_mask": torch.ones_like(ids), "use_cache": False},
        {"position_ids": torch.arange(50, 56)[None], "use_cache": False},
    ]
    wanted = [llama(ids, **way).logits for way in ways]
    encode_llama(llama, keys_for(llama), "cpu")
    for way, logits in zip(ways, wanted, strict=True):
        torch.testing.assert_close(llama(ids, **way).logits, logits, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_autocast_and_inference_mode(llama, prompt) -> None:
    """Under autocast both sides compute in the model's dtype; what was filled in inference mode goes on outside, also
    through what a user does with a cache there."""
    ids = prompt(9, 2)
    wanted = [llama(ids).logits]
    cache = llama(ids).past_key_values
    cache.reorder_cache(torch.tensor([1, 0]))
    cache.crop(-2)
    wanted += [llama(prompt(n, 2), past_key_values=cache).logits for n in (2, 1)]
    encode_llama(llama, keys_for(llama), "cpu")
    with torch.autocast("cpu", torch.bfloat16):
        out = llama(ids)
        assert out.past_key_values.layers[0].keys.dtype == torch.float32
        torch.testing.assert_close(out.logits.float(), wanted[0], rtol=0.02, atol=0.02 * float(wanted[0].abs().max()))
    with torch.inference_mode():
        cache = llama(ids).past_key_values
        cache.reorder_cache(torch.tensor([1, 0]))
        cache.crop(-2)
    for n, logits in zip((2, 1), wanted[1:], strict=True):
        torch.testing.assert_close(llama(prompt(n, 2), past_key_values=cache).logits, logits, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_compiled_model(llama, prompt) -> None:
    """Who compiles a split model has the protocol run between the graphs."""
    ids = prompt(6)
    wanted = llama(ids).logits
    encode_llama(llama, keys_for(llama), "cpu")
    compiled = torch.compile(llama, backend="eager")
    out = compiled(ids)
    torch.testing.assert_close(out.logits, wanted, rtol=1e-4, atol=1e-4)
    assert compiled(prompt(1), past_key_values=out.past_key_values).logits.isfinite().all()


# Ways to generate


@pytest.mark.parametrize("top_k", [None, 3])
def test_continuous_batching_is_refused(llama, prompt, top_k: int | None) -> None:
    """In the caller's thread, by every way into it, and before a worker thread is started."""
    encode_llama(llama, keys_for(llama), "cpu", prefill_top_k=top_k)
    ids = prompt(5)
    settings = GenerationConfig(max_new_tokens=2, eos_token_id=-1, do_sample=False)
    for ask in (
        lambda: llama.generate_batch(inputs=ids.tolist(), generation_config=settings, progress_bar=False),
        lambda: llama.generate(ids, cache_implementation="paged", max_new_tokens=2),
        lambda: llama.init_continuous_batching(generation_config=settings),
        lambda: llama.continuous_batching_context_manager(generation_config=settings).__enter__(),
    ):
        with refused(llama, ValueError, "continuous batching keeps K and V of all layers in pages"):
            ask()
    decode_llama(llama)
    assert "Split" not in "".join(kind.__name__ for kind in type(llama).__mro__)


def test_other_caches_are_refused(llama, prompt) -> None:
    encode_llama(llama, keys_for(llama), "cpu")
    for name in ("static", "offloaded"):
        with refused(llama, TypeError, "past_key_values: an encoded model fills a DynamicCache"):
            llama.generate(prompt(5), cache_implementation=name, max_new_tokens=2)
    with refused(llama, TypeError, "past_key_values: an encoded model fills a DynamicCache, got StaticCache"):
        llama(prompt(5), past_key_values=StaticCache(config=llama.config, max_cache_len=20))
    with refused(llama, (TypeError, ValueError), "cache: "):
        llama(prompt(5), cache=7)


def best_tokens(llama, prompt) -> list[int]:
    with torch.no_grad():
        tokens: list[int] = llama(prompt(7)).logits[0, -1].argsort(descending=True).tolist()
    return tokens


@pytest.mark.parametrize("k", [1, 4])
def test_top_k_serves_what_it_answers_exactly(llama, prompt, k: int) -> None:
    """Greedy, sampling below top_k, forced tokens and speculation are the plain model's, token by token."""
    ids = prompt(7)
    ways: list[dict[str, Any]] = [
        {},
        {"do_sample": True, "top_k": k},
        {"do_sample": True, "top_k": k, "top_p": 0.8, "temperature": 0.7, "min_p": 0.01},
        {"forced_eos_token_id": 5},
        {"remove_invalid_values": True, "renormalize_logits": True},
        {"prompt_lookup_num_tokens": 2},
        {"assistant_model": tiny_model()},
        {"prefill_chunk_size": 3},
    ]

    def generate(way: dict[str, Any]) -> Tensor:
        set_seed(4)
        return llama.generate(ids, **{"max_new_tokens": 6, "do_sample": False, **way})

    wanted = [generate(way) for way in ways]
    with encoded_llama(llama, keys_for(llama), "cpu", prefill_top_k=k):
        for way, tokens in zip(ways, wanted, strict=True):
            assert torch.equal(generate(way), tokens), way


@pytest.mark.parametrize("k", [1, 4])
def test_top_k_refuses_what_looks_beyond(llama, prompt, k: int) -> None:
    """Whatever may choose or weigh a token that did not come back is refused before anything crosses; where
    transformers makes its processors is private to it, and this fails if that moves."""
    best = best_tokens(llama, prompt)
    encode_llama(llama, keys_for(llama), "cpu", prefill_top_k=k)
    ways: list[dict[str, Any]] = [
        {"min_new_tokens": 3, "eos_token_id": best[0]},
        {"bad_words_ids": [[best[0]]]},
        {"suppress_tokens": best[:k]},
        {"begin_suppress_tokens": best[:k]},
        {"sequence_bias": [[[best[20]], 50.0]]},
        {"repetition_penalty": 5.0},
        {"no_repeat_ngram_size": 2},
        {"guidance_scale": 1.5},
        {"exponential_decay_length_penalty": (1, 1.5), "eos_token_id": best[3]},
        {"prefix_allowed_tokens_fn": lambda batch, tokens: [best[10]]},
        {"logits_processor": [lambda tokens, scores: scores]},
        {"num_beams": 2},
        {"do_sample": True},
        {"do_sample": True, "top_k": k + 1},
        {"do_sample": True, "top_k": 0, "top_p": 0.5},
        {"custom_generate": lambda model, input_ids, **kwargs: input_ids},
    ]
    for way in ways:
        with refused(llama, ValueError, "prefill_top_k"):
            llama.generate(prompt(7), **{"max_new_tokens": 4, "do_sample": False, **way})
    assert llama.generate(prompt(7), max_new_tokens=2, do_sample=False).shape == (1, 9)


# Caches


ROWS: list[tuple[Any, list[int]]] = [
    ([2, 0], [2, 0]),
    (torch.tensor([True, False, True]), [0, 2]),
    ([False, True, False], [1]),
    (torch.tensor([-1, 0, -3]), [2, 0, 0]),
    (torch.tensor([1, 1], dtype=torch.int32), [1, 1]),
]


@torch.no_grad()
@pytest.mark.parametrize(("rows", "same"), ROWS)
def test_rows_of_a_batch(llama, prompt, rows: Any, same: list[int]) -> None:
    """Whatever indexes a tensor's first dimension selects rows, on both sides."""
    ids, later = prompt(8, 3), prompt(2, len(same), seed=3)
    wanted = llama(torch.cat((ids[same], later), dim=1)).logits[:, -2:]
    encode_llama(llama, keys_for(llama), "cpu")
    cache = llama(ids).past_key_values
    cache.batch_select_indices(rows)
    torch.testing.assert_close(llama(later, past_key_values=cache).logits, wanted, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_rows_that_are_not_there(llama, prompt) -> None:
    encode_llama(llama, keys_for(llama), "cpu")
    ids, later = prompt(8, 3), prompt(1, 3, seed=3)
    wanted = llama(later, past_key_values=llama(ids).past_key_values).logits
    cache = llama(ids).past_key_values
    for kind, message, rows in (
        (IndexError, r"indices: expected -3\.\.2, got", [0, 3]),
        (IndexError, r"indices: expected -3\.\.2, got", torch.tensor([-4])),
        (IndexError, r"indices: expected a mask \(3,\)", [True, False]),
        (TypeError, r"indices: expected \(n,\) integers", torch.tensor([0.5])),
        (TypeError, r"indices: expected \(n,\) integers", torch.tensor([[0]])),
    ):
        with refused(llama, kind, message):
            cache.batch_select_indices(rows)
    with refused(llama, IndexError, r"beam_idx: expected -3\.\.2"):
        cache.reorder_cache(torch.tensor([3]))
    torch.testing.assert_close(llama(later, past_key_values=cache).logits, wanted, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_layers_that_somebody_else_wrote(llama, prompt) -> None:
    """Tensors put into a layer by hand would be this side's alone."""
    encode_llama(llama, keys_for(llama, decode_start_layers=[0, 1]), "cpu")
    state = llama(prompt(6)).past_key_values
    for edit in (
        lambda cache: setattr(cache.layers[0], "keys", cache.layers[0].keys[:, :, 2:]),
        lambda cache: setattr(cache.layers[1], "values", 0.5 * cache.layers[1].values),
        lambda cache: setattr(cache.layers[2], "keys", torch.zeros(1, 2, 6, 16)),
        lambda cache: cache.layers.reverse(),
    ):
        cache = llama(prompt(6)).past_key_values
        llama(prompt(1), past_key_values=cache)
        cache.crop(-1)
        edit(cache)
        for use in (
            lambda: llama(prompt(1), past_key_values=cache),  # noqa: B023
            lambda: cache.crop(-1),  # noqa: B023
            lambda: cache.batch_repeat_interleave(2),  # noqa: B023
        ):
            with refused(llama, ValueError, r"past_key_values: layer \d was replaced or given other tensors"):
                use()
    assert llama(prompt(1), past_key_values=state).logits.isfinite().all()


@torch.no_grad()
def test_a_cache_that_keeps_no_token(llama, prompt) -> None:
    """As the plain cache, it begins again; the conversation that it was is closed."""
    wanted = llama(prompt(5, 2)).logits
    encode_llama(llama, keys_for(llama), "cpu")
    cache = llama(prompt(4)).past_key_values
    first = cache.session_id
    for removed in (-4, -20):
        cache.crop(removed)
        assert cache.get_seq_length() == 0
        out = llama(prompt(5, 2), past_key_values=cache)
        assert out.past_key_values is cache
        torch.testing.assert_close(out.logits, wanted, rtol=1e-4, atol=1e-4)
        cache.crop(-1)
    assert cache.session_id != first
    assert untrusted_party(llama).conversations == (cache.session_id,)


@torch.no_grad()
def test_parts_lie_where_their_sides_are(llama, prompt) -> None:
    encode_llama(llama, keys_for(llama), "cpu")
    cache = llama(prompt(4)).past_key_values
    for name in ("gpu_device", "cpu_device"):
        with pytest.raises(ValueError, match=f"{name}: in the split placement this side's part lies on cpu, got meta"):
            split_kvcache_dynamic(cache, [1], **{name: "meta"})
    assert len(split_kvcache_dynamic(cache, [1], gpu_device="cpu", cpu_device="cpu")) == 2


@torch.no_grad()
def test_a_filled_plain_cache_is_refused(llama, prompt) -> None:
    plain = llama(prompt(4)).past_key_values
    assert type(plain) is DynamicCache
    encode_llama(llama, keys_for(llama), "cpu")
    with refused(llama, TypeError, "got a DynamicCache that holds tokens, of which the untrusted side has no K and V"):
        llama(prompt(1), past_key_values=plain)
    assert plain.get_seq_length() == 4
