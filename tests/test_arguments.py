"""A request's keywords are known, passed on with their meaning, or refused by name, in either placement.

Which keywords there are is read from the installed transformers: one that no table here has fails until somebody has
decided what it means for an encoded model.
"""

import copy
import inspect
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from tiny import VOCABULARY, tiny_model
from torch import Tensor
from transformers import (
    CompileConfig,
    ContinuousBatchingConfig,
    DynamicCache,
    GenerationConfig,
    GenerationMixin,
    LlamaForCausalLM,
    LlamaModel,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    StaticCache,
    StoppingCriteriaList,
    WatermarkingConfig,
    set_seed,
)
from transformers.cache_utils import Cache
from transformers.generation import BaseStreamer, MaxLengthCriteria
from transformers.generation.configuration_utils import ALL_CACHE_IMPLEMENTATIONS, ALL_STATIC_CACHE_IMPLEMENTATIONS
from transformers.generation.continuous_batching.cache import PagedAttentionCache
from transformers.modeling_flash_attention_utils import FlashAttentionKwargs
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaDecoderLayer, eager_attention_forward
from transformers.utils.generic import TransformersKwargs

from scx import SCXKeyGenerator, encode_llama
from scx.kvcache.conversation import ConversationCache

PLACEMENTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "permuted": ({"alp": True}, {}),
    "sealed": ({"cache_encoding": "sealed"}, {}),
    "split": ({"alp": True}, {"secure_device": "cpu"}),
}
BATCH, PROMPT, LATER = 2, 12, 3

by_placement = pytest.mark.parametrize("placement", PLACEMENTS)


@dataclass(frozen=True)
class Call:
    """What a value may depend on: the model, the tokens that the call brings, and those that went before.

    `chosen` are the plain model's greedy tokens behind the prompt.
    """

    model: PreTrainedModel
    ids: Tensor
    past: int = 0
    chosen: Tensor | None = None

    @property
    def tokens(self) -> int:
        return self.ids.shape[1]

    @property
    def total(self) -> int:
        return self.past + self.tokens


class Pages(PagedAttentionCache):
    """Pages that keep nothing; attention finds what the request brought."""

    def __init__(self) -> None:
        pass

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        return key_states, value_states


class Heard(BaseStreamer):
    """A streamer that keeps what it hears."""

    def __init__(self) -> None:
        self.tokens: list[Tensor] = []

    def put(self, value: Tensor) -> None:
        self.tokens.append(value.clone())

    def end(self) -> None:
        self.tokens.append(torch.tensor(-1))


def ones(call: Call) -> Tensor:
    return torch.ones(BATCH, call.total, dtype=torch.long)


def zeroed(x: Tensor, place: Any) -> Tensor:
    x[place] = 0
    return x


def positions(call: Call) -> Tensor:
    return torch.arange(call.past, call.total).expand(BATCH, -1)


def causal(call: Call, window: int) -> Tensor:
    """(B, 1, S, N) bool, of a window of keys."""
    query, key = positions(call)[0][:, None], torch.arange(call.total)
    return ((key <= query) & (key > query - window)).expand(BATCH, 1, -1, -1)


def additive(mask: Tensor) -> Tensor:
    return torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)


def packed(call: Call) -> Tensor:
    """Two sequences in each row, of which the second begins in the call's middle."""
    begun = positions(call)[0] - call.past - call.tokens // 2
    return torch.where(begun < 0, positions(call)[0], begun).expand(BATCH, -1)


def bias(call: Call) -> Tensor:
    heads = call.model.config.num_attention_heads
    return torch.linspace(-1, 1, heads * call.tokens * call.total).view(1, heads, call.tokens, call.total)


class Without(LogitsProcessor):
    """Nobody may choose one token."""

    def __init__(self, token: Tensor) -> None:
        self.token = token

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return scores.index_fill(1, self.token.view(1), -torch.inf)


def once(model: PreTrainedModel, input_ids: Tensor, **kwargs: Any) -> Tensor:
    """A decoding loop of the caller's own, of one step."""
    return torch.cat((input_ids, model(input_ids).logits[:, -1:].argmax(-1)), dim=1)


def assisted(call: Call, **options: Any) -> dict[str, Any]:
    """A generation of one sequence with an assistant, whose own configuration has the options too."""
    assistant = tiny_model(layers=2)
    assistant.generation_config.update(**{name: value for name, value in options.items() if name != "do_sample"})
    return {"input_ids": call.ids[:1], "assistant_model": assistant, **options}


Values = dict[str, Callable[[Call], dict[str, Any]]]

# Of `forward`: "keyword" or "keyword: which value" -> the arguments.
FORWARD: Values = {
    "input_ids": lambda call: {"input_ids": call.ids.flip(1)},
    "inputs_embeds": lambda call: {
        "input_ids": None,
        "inputs_embeds": call.model.get_input_embeddings()(call.ids.flip(1)),
    },
    "attention_mask: left padding": lambda call: {"attention_mask": zeroed(ones(call), (0, slice(2)))},
    "attention_mask: right padding": lambda call: {"attention_mask": zeroed(ones(call), (0, slice(-1, None)))},
    "attention_mask: holes": lambda call: {"attention_mask": zeroed(ones(call), (0, slice(3, 5)))},
    "attention_mask: four dimensions": lambda call: {"attention_mask": additive(causal(call, 4))},
    "attention_mask: four dimensions, bool": lambda call: {"attention_mask": causal(call, 4)},
    "attention_mask: prepared": lambda call: {"attention_mask": {"full_attention": additive(causal(call, 4))}},
    "position_ids": lambda call: {"position_ids": 2 * positions(call)},
    "position_ids: packed": lambda call: {"position_ids": packed(call)},
    "past_key_values": lambda call: {"past_key_values": DynamicCache(config=call.model.config)},
    "past_key_values: static": lambda call: {
        "past_key_values": StaticCache(config=call.model.config, max_cache_len=2 * PROMPT)
    },
    "use_cache": lambda call: {"use_cache": False},
    "labels": lambda call: {"labels": call.ids},
    "logits_to_keep": lambda call: {"logits_to_keep": 2},
    "logits_to_keep: tensor": lambda call: {"logits_to_keep": torch.tensor([0, 2])},
    "num_items_in_batch": lambda call: {"num_items_in_batch": torch.tensor(5), "labels": call.ids},
    "shift_labels": lambda call: {"shift_labels": call.ids.flip(0), "labels": call.ids},
    "output_hidden_states": lambda call: {"output_hidden_states": True},
    "output_attentions": lambda call: {"output_attentions": True},
    "output_router_logits": lambda call: {"output_router_logits": True},
    "return_dict": lambda call: {"return_dict": False},
    "cache_position": lambda call: {"cache_position": torch.arange(call.past, call.total)},
    "cu_seq_lens_q": lambda call: {"cu_seq_lens_q": torch.tensor([0, 1, call.tokens], dtype=torch.int32)},
    "cu_seq_lens_k": lambda call: {"cu_seq_lens_k": torch.tensor([0, 1, call.tokens], dtype=torch.int32)},
    "max_length_q": lambda call: {"max_length_q": call.tokens - 1},
    "max_length_k": lambda call: {"max_length_k": call.tokens - 1},
    "seq_idx": lambda call: {"seq_idx": (positions(call) > call.past).int()},
    "is_causal": lambda call: {"is_causal": False},
    "is_causal: true": lambda call: {"is_causal": True},
    "scaling": lambda call: {"scaling": 0.1},
    "dropout": lambda call: {"dropout": 0.5},
    "sliding_window": lambda call: {"sliding_window": 4},
    "softcap": lambda call: {"softcap": 5.0},
    "s_aux": lambda call: {"s_aux": torch.ones(call.model.config.num_attention_heads)},
    "position_bias": lambda call: {"position_bias": bias(call)},
    "cache": lambda call: {"cache": Pages(), "use_cache": True},
    "block_table": lambda call: {"block_table": torch.zeros(BATCH, 1, dtype=torch.int32)},
    "max_seqlen_q": lambda call: {"max_seqlen_q": call.tokens - 1},
    "max_seqlen_k": lambda call: {"max_seqlen_k": call.tokens - 1},
    **{
        name: lambda call, name=name: {name: torch.ones(BATCH, 1)}
        for name in ("module", "query", "key", "value", "q", "k", "v", "hidden_states", "position_embeddings")
    },
    "anything_else": lambda call: {"anything_else": 1},
}

# Of `generate`, likewise, with what else it takes for the keyword to do something.
GENERATE: Values = {
    "inputs": lambda call: {"input_ids": None, "inputs": call.ids.flip(1)},
    "generation_config": lambda call: {"generation_config": GenerationConfig(max_new_tokens=3, num_beams=2)},
    "logits_processor": lambda call: {"logits_processor": LogitsProcessorList([Without(call.chosen[0, 0])])},
    "stopping_criteria": lambda call: {"stopping_criteria": StoppingCriteriaList([MaxLengthCriteria(call.total + 2)])},
    "prefix_allowed_tokens_fn": lambda call: {"prefix_allowed_tokens_fn": lambda row, ids: list(range(5, 90 + row))},
    "synced_gpus": lambda call: {"synced_gpus": True},
    "assistant_model": lambda call: {"input_ids": call.ids[:1], "assistant_model": tiny_model(layers=2)},
    "streamer": lambda call: {"input_ids": call.ids[:1], "streamer": Heard()},
    "negative_prompt_ids": lambda call: {"negative_prompt_ids": call.ids.flip(0), "guidance_scale": 1.5},
    "negative_prompt_attention_mask": lambda call: {
        "negative_prompt_ids": call.ids.flip(0),
        "negative_prompt_attention_mask": zeroed(ones(call), (0, slice(2))),
        "guidance_scale": 1.5,
    },
    "custom_generate": lambda call: {"custom_generate": once},
    "max_length": lambda call: {"max_new_tokens": None, "max_length": PROMPT + 2},
    "max_new_tokens": lambda call: {"max_new_tokens": 2},
    "min_length": lambda call: {"min_length": PROMPT + 4, "eos_token_id": int(call.chosen[0, 1])},
    "min_new_tokens": lambda call: {"min_new_tokens": 4, "eos_token_id": int(call.chosen[0, 1])},
    "early_stopping": lambda call: {"early_stopping": True, "num_beams": 3, "eos_token_id": int(call.chosen[0, 1])},
    "max_time": lambda call: {"max_time": 0.0},
    "stop_strings": lambda call: {"stop_strings": ["a"]},
    "do_sample": lambda call: {"do_sample": True},
    "num_beams": lambda call: {"num_beams": 3},
    "use_mtp": lambda call: {"use_mtp": True},
    "use_cache": lambda call: {"use_cache": False},
    **{
        f"cache_implementation: {kind}": lambda call, kind=kind: {"cache_implementation": kind}
        for kind in ALL_CACHE_IMPLEMENTATIONS
    },
    "cache_implementation: paged": lambda call: {
        "cache_implementation": "paged",
        "continuous_batching_config": ContinuousBatchingConfig(num_blocks=16, max_batch_tokens=64),
    },
    "cache_config": lambda call: {"cache_implementation": "static", "cache_config": {"max_cache_len": 40}},
    "max_cache_len": lambda call: {"cache_implementation": "static", "max_cache_len": 40},
    "temperature": lambda call: {"do_sample": True, "temperature": 0.3},
    "top_k": lambda call: {"do_sample": True, "top_k": 3},
    "top_p": lambda call: {"do_sample": True, "top_p": 0.3},
    "min_p": lambda call: {"do_sample": True, "min_p": 0.3},
    "top_h": lambda call: {"do_sample": True, "top_h": 0.3},
    "typical_p": lambda call: {"do_sample": True, "typical_p": 0.3},
    "epsilon_cutoff": lambda call: {"do_sample": True, "epsilon_cutoff": 0.02},
    "eta_cutoff": lambda call: {"do_sample": True, "eta_cutoff": 0.02},
    "repetition_penalty": lambda call: {"repetition_penalty": 3.0},
    "encoder_repetition_penalty": lambda call: {"encoder_repetition_penalty": 3.0},
    "length_penalty": lambda call: {"num_beams": 3, "length_penalty": -2.0, "eos_token_id": int(call.chosen[0, 1])},
    "no_repeat_ngram_size": lambda call: {"no_repeat_ngram_size": 1},
    "bad_words_ids": lambda call: {"bad_words_ids": [[int(call.chosen[0, 0])]]},
    "renormalize_logits": lambda call: {"do_sample": True, "renormalize_logits": True, "top_k": 3, "num_beams": 2},
    "forced_bos_token_id": lambda call: {"input_ids": call.ids[:, :1], "forced_bos_token_id": 7},
    "forced_eos_token_id": lambda call: {"forced_eos_token_id": 7},
    "remove_invalid_values": lambda call: {"remove_invalid_values": True},
    "exponential_decay_length_penalty": lambda call: {
        "exponential_decay_length_penalty": (1, 9.0),
        "eos_token_id": int(call.chosen[0, 4]),
    },
    "suppress_tokens": lambda call: {"suppress_tokens": [int(call.chosen[0, 0])]},
    "begin_suppress_tokens": lambda call: {"begin_suppress_tokens": [int(call.chosen[0, 0])]},
    "sequence_bias": lambda call: {"sequence_bias": [[[int(call.chosen[0, 0])], -10.0]]},
    "token_healing": lambda call: {"token_healing": True},
    "guidance_scale": lambda call: {"guidance_scale": 1.5},
    "watermarking_config": lambda call: {"watermarking_config": WatermarkingConfig(bias=5.0, context_width=1)},
    "num_return_sequences": lambda call: {"num_beams": 3, "num_return_sequences": 2},
    "output_attentions": lambda call: {"output_attentions": True},
    "output_hidden_states": lambda call: {"output_hidden_states": True},
    "output_scores": lambda call: {"output_scores": True},
    "output_logits": lambda call: {"output_logits": False},
    "return_dict_in_generate": lambda call: {"return_dict_in_generate": False},
    "pad_token_id": lambda call: {"pad_token_id": 9, "eos_token_id": int(call.chosen[0, 1])},
    "bos_token_id": lambda call: {"input_ids": None, "bos_token_id": 5},
    "eos_token_id": lambda call: {"eos_token_id": int(call.chosen[0, 1])},
    "encoder_no_repeat_ngram_size": lambda call: {
        "input_ids": torch.arange(VOCABULARY - 9).expand(BATCH, -1),
        "encoder_no_repeat_ngram_size": 1,
    },
    "decoder_start_token_id": lambda call: {"decoder_start_token_id": 5},
    "is_assistant": lambda call: {"is_assistant": True},
    "num_assistant_tokens": lambda call: assisted(call, num_assistant_tokens=2),
    "num_assistant_tokens_schedule": lambda call: assisted(call, num_assistant_tokens_schedule="heuristic"),
    "assistant_confidence_threshold": lambda call: assisted(call, assistant_confidence_threshold=0.9),
    "prompt_lookup_num_tokens": lambda call: {"input_ids": call.ids[:1], "prompt_lookup_num_tokens": 3},
    "max_matching_ngram_size": lambda call: {
        "input_ids": call.ids[:1],
        "prompt_lookup_num_tokens": 3,
        "max_matching_ngram_size": 1,
    },
    "assistant_early_exit": lambda call: {"input_ids": call.ids[:1], "assistant_early_exit": 1},
    "assistant_lookbehind": lambda call: assisted(call, assistant_lookbehind=3),
    "target_lookbehind": lambda call: assisted(call, target_lookbehind=3),
    "assistant_ensemble_weight": lambda call: assisted(call, assistant_ensemble_weight=0.5, do_sample=True),
    "speculation_type": lambda call: assisted(call, speculation_type="lossless"),
    "compile_config": lambda call: {"cache_implementation": "static", "compile_config": CompileConfig()},
    "disable_compile": lambda call: {"cache_implementation": "static", "disable_compile": True},
    "continuous_batching_config": lambda call: {"continuous_batching_config": ContinuousBatchingConfig()},
    "low_memory": lambda call: {"low_memory": True, "penalty_alpha": 0.6, "top_k": 4},
    "penalty_alpha": lambda call: {"penalty_alpha": 0.6, "top_k": 4},
    "dola_layers": lambda call: {"dola_layers": [1]},
    "diversity_penalty": lambda call: {"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 1.0},
    "num_beam_groups": lambda call: {"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 1.0},
    "constraints": lambda call: {"num_beams": 3, "constraints": [1]},
    "force_words_ids": lambda call: {"num_beams": 3, "force_words_ids": [[7]]},
    "prefill_chunk_size": lambda call: {"prefill_chunk_size": 5},
    "mode": lambda call: {"mode": "prefill"},
    "_from_model_config": lambda call: {"_from_model_config": True},
    **({"_commit_hash": lambda call: {"_commit_hash": "0"}} if hasattr(GenerationConfig(), "_commit_hash") else {}),
    "transformers_version": lambda call: {"transformers_version": "5.0.0"},
}

FUSED, EVERYWHERE = ("permuted", "sealed"), tuple(PLACEMENTS)


@dataclass(frozen=True)
class Refused:
    """What is refused in some placements and stages, and not by the plain model, and why."""

    cases: tuple[str, ...]
    placements: tuple[str, ...]
    reason: str
    stages: tuple[str, ...] = ("opening", "continuing", "generating")


STATIC = tuple(f"cache_implementation: {kind}" for kind in ALL_STATIC_CACHE_IMPLEMENTATIONS if kind != "hybrid")
OF_ATTENTION = (
    *("block_table", "cu_seq_lens_k", "cu_seq_lens_q", "max_length_k", "max_length_q", "max_seqlen_k", "max_seqlen_q"),
    *("position_bias", "s_aux", "seq_idx", "shift_labels", "sliding_window", "softcap", "q", "k", "v", "anything_else"),
)
REFUSED = [
    Refused(
        ("past_key_values: static", *STATIC, "cache_config", "max_cache_len", "compile_config", "disable_compile"),
        EVERYWHERE,
        "an encoded cache grows with its conversation, and a sealed row is numbered when it is written",
    ),
    Refused(
        ("attention_mask: right padding", "attention_mask: holes"),
        ("split",),
        "the untrusted side is told where a sequence begins, not which of its tokens count",
    ),
    Refused(
        ("attention_mask: four dimensions", "attention_mask: four dimensions, bool"),
        ("split",),
        "a mask of pairs would cross the boundary in token order",
        ("opening", "continuing"),
    ),
    Refused(
        ("attention_mask: left padding",), ("split",), "a conversation keeps its prompt's padding", ("continuing",)
    ),
    Refused(
        ("output_hidden_states", "output_attentions", "output_router_logits"),
        ("split",),
        "inner states are the untrusted side's",
    ),
    Refused(OF_ATTENTION, ("split",), "the secure side does not know what the blocks' attention would make of it"),
    Refused(("is_causal",), ("split",), "attention is causal there"),
    Refused(("assistant_early_exit",), ("split",), "all blocks run, divided between the parties"),
    Refused(("cache",), EVERYWHERE, "pages and a cache cannot both hold a conversation", ("opening", "continuing")),
    Refused(("cache_implementation: paged",), ("sealed", "split"), "pages hold K and V of all layers, and no seals"),
]

WITHOUT_EFFECT = {
    "output_router_logits",
    "cu_seq_lens_q",
    "cu_seq_lens_k",
    "max_length_q",
    "max_length_k",
    "seq_idx",
    "is_causal: true",
    "cache_implementation: hybrid",
    "cache_implementation: dynamic",
    "remove_invalid_values",
    "decoder_start_token_id",
    "continuous_batching_config",
    "prefill_chunk_size",
    "_commit_hash",
    "_from_model_config",
    "transformers_version",
}
"""What changes nothing in the plain model: other backends' and other models' keywords, and what is only faster."""


def parameters(function: Callable[..., Any]) -> Iterator[str]:
    for name, parameter in inspect.signature(function).parameters.items():
        if name != "self" and parameter.kind is not parameter.VAR_KEYWORD:
            yield name


def of_forward() -> set[str]:
    """Every keyword that a request may bring: the models', their blocks', and the attention functions'."""
    forwards = (kind.forward for kind in (LlamaModel, LlamaForCausalLM, LlamaDecoderLayer, LlamaAttention))
    attentions = (eager_attention_forward, *ALL_ATTENTION_FUNCTIONS.values())
    names = {name for function in (*forwards, *attentions) for name in parameters(function)}
    return names | set(TransformersKwargs.__annotations__) | set(FlashAttentionKwargs.__annotations__)


def of_generate() -> set[str]:
    return {*parameters(GenerationMixin.generate), *vars(GenerationConfig())}


def keyword(case: str) -> str:
    return case.partition(":")[0]


def test_every_keyword_is_decided() -> None:
    assert of_forward() - set(map(keyword, FORWARD)) == set()
    assert of_generate() - set(map(keyword, GENERATE)) == set()


def encoded(model: PreTrainedModel, placement: str) -> PreTrainedModel:
    keys, options = PLACEMENTS[placement]
    twin = copy.deepcopy(model)
    return encode_llama(twin, SCXKeyGenerator.for_model(twin, redundant_num=2, **keys), **options)


Outcome = list[Any] | Exception


def outcome(run: Callable[[], Any]) -> Outcome:
    """What a request gives, as a list of tensors and plain values, or what it raises."""
    set_seed(3)
    try:
        return list(leaves(run()))
    except Exception as refused:  # of any kind: `check` says which may be
        return refused


def leaves(result: Any) -> Iterator[Any]:
    if isinstance(result, dict):
        yield list(result)
        result = list(result.values())
    if isinstance(result, Cache):
        yield result.get_seq_length()
    elif isinstance(result, list | tuple):
        yield len(result)
        for part in result:
            yield from leaves(part)
    else:
        yield result


def same(given: Outcome, plain: Outcome) -> bool:
    """Whether two requests gave the same, to a ten-thousandth of the largest number."""
    if isinstance(given, Exception) or isinstance(plain, Exception):
        return isinstance(given, Exception) and isinstance(plain, Exception)
    return len(given) == len(plain) and all(map(_alike, given, plain))


def _alike(x: Any, y: Any) -> bool:
    if not isinstance(x, Tensor) or not isinstance(y, Tensor):
        return type(x) is type(y) and x == y
    if x.shape != y.shape or x.dtype != y.dtype:
        return False
    if not x.dtype.is_floating_point or not x.numel():
        return torch.equal(x, y)
    largest = y.nan_to_num(posinf=0.0, neginf=0.0).abs().max().item()
    return torch.allclose(x, y, rtol=0.0, atol=1e-4 * largest, equal_nan=True)


def check(case: str, placement: str, stage: str, names: Iterable[str], ours: Outcome, plain: Outcome) -> None:
    """The same result, or both refuse, or ours refuses what is listed, naming one of the arguments."""
    listed = any(case in x.cases and placement in x.placements and stage in x.stages for x in REFUSED)
    if isinstance(ours, Exception) and not isinstance(plain, Exception):
        assert any(name in str(ours) for name in names), f"the refusal does not name the keyword: {ours!r}"
        assert listed, f"refused, and not listed: {ours!r}"
        return
    if isinstance(plain, Exception):
        assert isinstance(ours, Exception), f"the plain model refuses: {plain!r}"
        return
    assert same(ours, plain), "the plain model gives another result"
    assert not listed, "listed as refused, and not refused"


def requested(model: PreTrainedModel, case: str, stage: str, ids: Tensor) -> Any:
    """A request with a case's arguments that opens a conversation, continues one, or is a whole generation."""
    call = Call(model, ids[:, :PROMPT])
    if stage == "generating":
        arguments = FORWARD[case](call) if case in FORWARD else {}
        return model.generate(**{"input_ids": call.ids, "max_new_tokens": 4, "do_sample": False, **arguments})
    cache = None
    if stage == "continuing":
        cache = model(call.ids).past_key_values
        call = Call(model, ids[:, PROMPT:], PROMPT)
    arguments = FORWARD[case](call) if case in FORWARD else {}
    try:
        result = model(**{"input_ids": call.ids, "past_key_values": cache, **arguments})
    except Exception:  # whatever a model refuses with is an outcome, and is raised again; the cache is looked at before
        if isinstance(cache, ConversationCache) and cache.get_seq_length() != PROMPT:
            pytest.fail("a refused request changed the cache")  # no Exception, so no outcome takes it for a refusal
        raise
    mask = arguments.get("attention_mask")
    if isinstance(mask, Tensor) and mask.dim() == 2:  # what a padding token is followed by is nobody's
        result.logits = result.logits.masked_fill(mask[:, -call.tokens :, None] == 0, 0.0)
    return result


STAGES = [
    ("opening", "sdpa"),
    ("opening", "eager"),
    ("continuing", "sdpa"),
    ("continuing", "eager"),
    ("generating", "sdpa"),
]
by_stage = pytest.mark.parametrize(("stage", "backend"), STAGES)


@by_placement
@by_stage
@pytest.mark.parametrize("case", FORWARD)
@torch.no_grad()
def test_forward(prompt, placement: str, stage: str, backend: str, case: str) -> None:
    model, ids = tiny_model(attn_implementation=backend), prompt(PROMPT + LATER, BATCH)
    ours = encoded(model, placement)
    plain = outcome(lambda: requested(model, case, stage, ids))
    check(case, placement, stage, [keyword(case)], outcome(lambda: requested(ours, case, stage, ids)), plain)


@pytest.mark.parametrize("case", FORWARD)
@torch.no_grad()
def test_values_of_forward_mean_something(prompt, case: str) -> None:
    """Somewhere the plain model gives another result with the value than without, or refuses."""
    ids = prompt(PROMPT + LATER, BATCH)

    def differs(stage: str, backend: str) -> bool:
        model = tiny_model(attn_implementation=backend)
        plain, without = (outcome(partial(requested, model, name, stage, ids)) for name in (case, ""))
        return isinstance(plain, Exception) or not same(plain, without)

    assert any(differs(*stage) for stage in STAGES) == (case not in WITHOUT_EFFECT)


def generated(model: PreTrainedModel, case: str, ids: Tensor, chosen: Tensor) -> Any:
    settings = {"max_new_tokens": 6, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    arguments = GENERATE[case](Call(model, ids, chosen=chosen)) if case in GENERATE else {}
    result = model.generate(**{"input_ids": ids, **settings, **arguments})
    return result, arguments["streamer"].tokens if "streamer" in arguments else None


def greedy(model: PreTrainedModel, ids: Tensor) -> Tensor:
    return model.generate(ids, max_new_tokens=6, do_sample=False)[:, ids.shape[1] :]


@by_placement
@pytest.mark.parametrize("case", GENERATE)
def test_generate(prompt, placement: str, case: str) -> None:
    model, ids = tiny_model(), prompt(PROMPT, BATCH)
    ours, chosen = encoded(model, placement), greedy(model, ids)
    plain = outcome(lambda: generated(model, case, ids, chosen))
    names = [keyword(case), *GENERATE[case](Call(model, ids, chosen=chosen))]
    check(case, placement, "generating", names, outcome(lambda: generated(ours, case, ids, chosen)), plain)


@pytest.mark.parametrize("case", GENERATE)
def test_values_of_generate_mean_something(prompt, case: str) -> None:
    model, ids = tiny_model(), prompt(PROMPT, BATCH)
    chosen = greedy(model, ids)
    plain, without = (outcome(partial(generated, model, name, ids, chosen)) for name in (case, ""))
    assert (isinstance(plain, Exception) or not same(plain, without)) == (case not in WITHOUT_EFFECT)
