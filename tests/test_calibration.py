"""Encoding measures what real rows are like: without a trace in the model, and so that no redundant row is known at
sight."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from parity import same_bits
from tiny import FAMILIES, VOCABULARY, tiny_model
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from scx import SCXKeyGenerator, decode_llama, encode_llama, encoded_llama, record_transcript
from scx.calibration import CALIBRATION_TOKENS, ordinary_tokens
from scx.encoding import ENCODINGS
from scx.keys.settings import MOST_NOISE
from scx.models.split import SplitModel
from scx.party.plan import Plan
from scx.party.untrusted import UntrustedParty

PLACEMENTS = {"fused": {}, "split": {"secure_device": "cpu"}, "paper": {"secure_device": "cpu", "crossings": "paper"}}
placements = pytest.mark.parametrize("placement", PLACEMENTS)


def keys_for(model: Any, **options: Any) -> SCXKeyGenerator:
    return SCXKeyGenerator.for_model(model, **{"redundant_num": 3, **options})


def relative(a: Tensor, b: Tensor) -> float:
    return ((a.float() - b.float()).abs().max() / b.float().abs().max()).item()


ROPES: dict[str, dict[str, Any]] = {
    "default": {},
    "linear": {"factor": 4.0},
    "dynamic": {"factor": 4.0},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 8},
    "longrope": {
        "factor": 4.0, "original_max_position_embeddings": 32, "short_factor": [1.0] * 8, "long_factor": [3.0] * 8,
    },
    "llama3": {
        "factor": 4.0, "original_max_position_embeddings": 8, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    },
    "proportional": {"factor": 2.0},
}  # fmt: skip


def scaled_llama(kind: str, longest: int) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=96, intermediate_size=160, num_hidden_layers=3, num_attention_heads=6,
        num_key_value_heads=2, head_dim=16, max_position_embeddings=longest, initializer_range=0.1, eos_token_id=None,
        rope_parameters={"rope_theta": 1e4, "rope_type": kind, **ROPES[kind]},
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def state_of(module: nn.Module) -> dict[str, Any]:
    """Everything that a module without children holds, tensors copied."""
    held = {name: x for name, x in vars(module).items() if name not in ("_buffers", "config")}
    return {name: x.clone() if isinstance(x, Tensor) else x for name, x in {**held, **module._buffers}.items()}


def assert_same_state(got: dict[str, Any], expected: dict[str, Any]) -> None:
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        assert same_bits(got[name], value) if isinstance(value, Tensor) else got[name] == value, name


def test_every_rotary_embedding_of_transformers_is_tried() -> None:
    assert set(ROPE_INIT_FUNCTIONS) <= set(ROPES)


@torch.no_grad()
@pytest.mark.parametrize("grown", [False, True], ids=["fresh", "grown"])
@pytest.mark.parametrize("longest", [32, 48, 128])
@pytest.mark.parametrize("kind", sorted({"default", *ROPE_INIT_FUNCTIONS}))
def test_rotary_embedding_is_left_as_it_was(prompt, kind: str, longest: int, grown: bool) -> None:
    """Some grow with the longest sequence that they have seen; the calibration's is none of the user's."""
    assert CALIBRATION_TOKENS > 48
    model, twin = scaled_llama(kind, longest), scaled_llama(kind, longest)
    if grown:
        for each in (model, twin):
            each(prompt(100).cpu())
    rotary, before = model.model.rotary_emb, state_of(model.model.rotary_emb)
    encode_llama(model, keys_for(model))
    assert model.model.rotary_emb is rotary
    assert_same_state(state_of(rotary), before)
    ids = prompt(40).cpu()
    assert relative(model(ids).logits, twin(ids).logits) < 1e-5
    decode_llama(model)
    ids = prompt(56).cpu()
    assert torch.equal(model(ids).logits, twin(ids).logits)
    assert_same_state(state_of(rotary), state_of(twin.model.rotary_emb))


@torch.no_grad()
def test_rotary_embedding_of_the_untrusted_party_is_left_as_it_was() -> None:
    model = scaled_llama("dynamic", 32).model
    party = UntrustedParty(model.layers, copy.deepcopy(model.rotary_emb), Plan(3, 1, 1, "few", False, False))
    rotary, before = party.rotary, state_of(party.rotary)
    scales = party.calibrate(torch.randn(1, CALIBRATION_TOKENS, 96))
    assert all(x.isfinite().all() for x in scales.values())
    assert party.rotary is rotary
    assert_same_state(state_of(rotary), before)


def hooks_of(model: nn.Module) -> list[Any]:
    return [[*x._forward_hooks.values(), *x._forward_pre_hooks.values()] for x in model.modules()]


@pytest.mark.parametrize("fails", [False, True], ids=["measured", "failed"])
def test_no_hook_mode_or_random_number_is_left_behind(llama, fails: bool) -> None:
    """Parts of a model may be in another mode than the whole, as frozen ones are; also where the pass fails."""

    def disturb(module: nn.Module, args: Any) -> None:
        torch.rand(3)
        if fails:
            raise OSError("no pass")

    llama.train()
    llama.model.layers[1].eval()
    llama.model.layers[2].mlp.register_forward_pre_hook(disturb)
    modes, hooks, random = [x.training for x in llama.modules()], hooks_of(llama), torch.get_rng_state()
    keys = keys_for(llama)
    if fails:
        with pytest.raises(OSError, match="no pass"):
            encode_llama(llama, keys)
    else:
        encode_llama(llama, keys)
    assert [x.training for x in llama.modules()] == modes
    assert hooks_of(llama) == hooks
    assert torch.equal(torch.get_rng_state(), random)


@placements
def test_scales_of_a_model_encoded_in_inference_mode_are_tensors_as_others(prompt, placement: str) -> None:
    model = tiny_model()
    with torch.no_grad():
        plain = model(prompt(9)).logits
    with torch.inference_mode():
        encode_llama(model, keys_for(model), **PLACEMENTS[placement])
    scale = model.model._scx.scale
    assert not any(getattr(scale, name).is_inference() or getattr(scale, name).requires_grad for name in ENCODINGS)
    with torch.no_grad():
        assert relative(model(prompt(9)).logits, plain) < 1e-5


STRANGE = [float("nan"), float("inf"), 1e30, 0.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_ordinary_tokens(dtype: torch.dtype) -> None:
    """Finite rows, whose largest magnitude is within a factor of 1000 of the median's."""
    embedding = torch.randn(500, 16).to(dtype)
    assert ordinary_tokens(embedding) == 500
    strange = torch.arange(3, 500, 17)
    for place, row in enumerate(strange):
        embedding[row] = STRANGE[place % len(STRANGE)]
    embedding[strange[0], 1:] = 0.5  # one number of a row is enough
    expected = torch.ones(500, dtype=torch.bool).index_fill_(0, strange, False)
    found = ordinary_tokens(embedding)
    assert torch.equal(found, expected.nonzero()[:, 0])
    with pytest.raises(ValueError, match="no row of embed_tokens is finite"):
        ordinary_tokens(torch.full((5, 16), torch.nan, dtype=dtype))


@torch.no_grad()
@placements
@pytest.mark.parametrize("strange", STRANGE)
def test_redundant_rows_are_like_a_models_ordinary_ones(prompt, placement: str, strange: float) -> None:
    """Whatever the rows of tokens that no prompt uses are."""
    model, ids = tiny_model(), prompt(9)
    unused = torch.arange(VOCABULARY)[60:]
    unused = unused[~torch.isin(unused, ids.cpu())][:90]
    with encoded_llama(model, keys_for(model, master_key=bytes(32)), **PLACEMENTS[placement]):
        usual = model.model._scx.scale
    model.model.embed_tokens.weight[unused] = strange
    plain = model(ids).logits
    with encoded_llama(model, keys_for(model, redundant_num=40, master_key=bytes(32)), **PLACEMENTS[placement]):
        scale = model.model._scx.scale
        for name in ENCODINGS:
            ratio = getattr(scale, name).mean() / getattr(usual, name).mean()
            assert 0.5 < ratio < 2, "measured on ordinary tokens"
        if placement == "fused":
            check_decoys(model, ids, unused)
        else:
            with record_transcript(model) as transcript:
                assert relative(model(ids).logits, plain) < 1e-5
            sent = [x.tensor for x in transcript.received("prefill") if x.tensor.is_floating_point()]
            assert sent
            assert all(x.isfinite().all() for x in sent)


def check_decoys(model: Any, ids: Tensor, unused: Tensor) -> None:
    tokens = tokens_embedded(model, ids)
    assert tokens.shape == (1, 9 + 40)
    assert not torch.isin(tokens.cpu(), unused).any()


@torch.no_grad()
def test_embedding_that_changes_under_an_encoded_model_is_looked_at_again(prompt) -> None:
    model, ids = tiny_model(), prompt(9)
    encode_llama(model, keys_for(model, redundant_num=40))
    unused = torch.arange(VOCABULARY)[60:]
    unused = unused[~torch.isin(unused, ids.cpu())]
    model.model.embed_tokens.weight[unused] = float("nan")
    check_decoys(model, ids, unused)


@torch.no_grad()
@placements
@pytest.mark.parametrize("rows", [150, 300])
def test_vocabulary_resized_after_encoding(prompt, placement: str, rows: int) -> None:
    """Tokens are drawn from the vocabulary that is there: none is missing, and new ones are asked for and drawn too."""
    model = tiny_model(tie_word_embeddings=True)
    encode_llama(model, keys_for(model, redundant_num=20), **PLACEMENTS[placement])
    model.resize_token_embeddings(rows, mean_resizing=False)
    plain = tiny_model(tie_word_embeddings=True)
    plain.resize_token_embeddings(rows, mean_resizing=False)
    plain.load_state_dict(model.state_dict())
    ids = prompt(9).clamp(max=rows - 1)
    ids[0, 4] = rows - 1
    for _ in range(3):
        assert relative(model(ids).logits, plain(ids).logits) < 1e-5
    if rows > VOCABULARY and placement == "fused":
        tokens = torch.cat([tokens_embedded(model, ids) for _ in range(3)])
        assert (tokens >= VOCABULARY).sum() > 3, "beside the prompt's own"
    with pytest.raises(ValueError, match=f"input_ids: expected tokens 0..{rows - 1}"):
        model(torch.full_like(ids, rows))


def tokens_embedded(model: Any, ids: Tensor) -> Tensor:
    """What a prefill looks up, redundant tokens among the prompt's."""
    embedded, embed = [], torch.nn.functional.embedding

    def watched(tokens: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        embedded.append(tokens)
        return embed(tokens, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.functional, "embedding", watched)
        model(ids)
    (tokens,) = embedded
    return tokens


@torch.no_grad()
@placements
def test_embedding_larger_than_the_configuration_says(placement: str) -> None:
    model = tiny_model()
    model.model.embed_tokens = nn.Embedding(256, 96, device=model.device)
    nn.init.normal_(model.model.embed_tokens.weight, std=0.1)
    ids = torch.tensor([[3, 230, 17, 250]], device=model.device)
    plain = model(ids).logits
    with encoded_llama(model, keys_for(model), **PLACEMENTS[placement]):
        assert relative(model(ids).logits, plain) < 1e-5


BROKEN: dict[str, tuple[Callable[[Any], Tensor], str]] = {
    "attention": (lambda model: model.model.layers[1].input_layernorm.weight, r"layers\.1, rows that enter the output"),
    "values": (lambda model: model.model.layers[0].self_attn.v_proj.weight, r"layers\.0, rows that enter the output"),
    "output": (lambda model: model.model.layers[1].self_attn.o_proj.weight, r"layers\.1, rows that enter the feed-f"),
    "feed-forward": (lambda model: model.model.layers[1].mlp.down_proj.weight, r"layers\.2, rows that enter the att"),
}


@torch.no_grad()
@placements
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("where", BROKEN)
def test_scale_that_is_not_finite_is_refused(placement: str, where: str, value: float) -> None:
    """By name, before anything is changed; without redundant rows such a model is nobody's business but its owner's."""
    model, (weight, message) = tiny_model(), BROKEN[where]
    weight(model).fill_(value)
    before = [type(x) for x in model.modules()]
    with pytest.raises(ValueError, match=f"model: {message}.*not finite"):
        encode_llama(model, keys_for(model), **PLACEMENTS[placement])
    assert [type(x) for x in model.modules()] == before
    encode_llama(model, keys_for(model, redundant_num=0), **PLACEMENTS[placement])


@torch.no_grad()
@pytest.mark.parametrize("feature", [1e4, 3e4, 6e4])
@placements
def test_redundant_rows_are_finite_in_half_precision(prompt, placement: str, feature: float) -> None:
    model = tiny_model(dtype=torch.float16)
    model.model.embed_tokens.weight[:, 5] = feature
    with encoded_llama(model, keys_for(model, redundant_num=400), **PLACEMENTS[placement]):
        scale, ids = model.model._scx.scale, prompt(9)
        assert scale.feed_forward.max() > feature
        if isinstance(model.model, SplitModel):
            with record_transcript(model) as transcript:
                model(ids)
            rows = [x.tensor for x in transcript.received("prefill") if x.tensor.is_floating_point()]
        else:
            session = model.model._scx.open_session(1)
            drawn = session.draw_token_keys(9, 1, scale, torch.float16, model.device).redundant
            rows = [x for x in drawn if x is not None]
        assert len(rows) >= 3
        assert all(x.isfinite().all() for x in rows)


@torch.no_grad()
@pytest.mark.parametrize("placement", ["fused", "split"])
@pytest.mark.parametrize("distribution", ["laplace", "normal"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_most_noise_cancels(prompt, family: str, distribution: str, placement: str) -> None:
    """Within a ten-thousandth of the largest logit, in float32."""
    model, ids = tiny_model(family), prompt(40, 2)
    plain = model(ids).logits
    keys = keys_for(model, alp=True, noise_scale=MOST_NOISE, noise_distribution=distribution)
    with encoded_llama(model, keys, **PLACEMENTS[placement]):
        assert relative(model(ids).logits, plain) < 1e-4
