"""The models around a decoder in the split placement: what generation would do past the boundary is refused in them."""

from typing import Any

from torch import Tensor, nn
from transformers.cache_utils import Cache
from transformers.generation.logits_process import (
    EpsilonLogitsWarper,
    EtaLogitsWarper,
    ForcedBOSTokenLogitsProcessor,
    ForcedEOSTokenLogitsProcessor,
    InfNanRemoveLogitsProcessor,
    LogitNormalization,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)
from transformers.modeling_outputs import CausalLMOutputWithPast

from scx.models.encoded import EncodedOuter

__all__ = ["SplitCausalLM", "SplitOuter"]

_KEEP_ORDER = (
    TemperatureLogitsWarper,
    InfNanRemoveLogitsProcessor,
    LogitNormalization,
    ForcedBOSTokenLogitsProcessor,
    ForcedEOSTokenLogitsProcessor,
)
"""Processors that look at no logit but those which they set."""
_AFTER_TOP_K = (TopPLogitsWarper, MinPLogitsWarper, TypicalLogitsWarper, EpsilonLogitsWarper, EtaLogitsWarper)
"""Processors that look at what probability others have; behind a top_k, these are few."""


class SplitOuter(EncodedOuter):
    """A model that generates, around a decoder in the split placement."""

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> Any:
        """Not in the split placement: every way to generate in continuous batches begins here."""
        raise ValueError(
            "generate_batch, cache_implementation='paged': continuous batching keeps K and V of all layers in pages of "
            "its own, and in the split placement each side has only some; generate with a DynamicCache, or use the "
            "fused placement"
        )

    # Private to transformers, and the one place that every mode's settings and processors pass before anything runs.
    def _get_logits_processor(self, generation_config: Any, *args: Any, **kwargs: Any) -> Any:
        if getattr(generation_config, "assistant_early_exit", None) is not None:
            raise ValueError(
                "assistant_early_exit: the blocks are divided between the parties and all of them run; use "
                "prompt_lookup_num_tokens, or another model as assistant_model"
            )
        inherited: Any = super()
        return inherited._get_logits_processor(generation_config, *args, **kwargs)


class SplitCausalLM(SplitOuter):
    """A language model whose prefills' logits come from the untrusted side: the k largest of each token, -inf else."""

    model: Any
    lm_head: nn.Module
    config: Any

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        *,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        if labels is not None:
            raise ValueError("labels: a loss needs all logits; encode the model with prefill_top_k=None")
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            return_dict=True,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        if outputs.top_logits is None:
            logits = self.lm_head(outputs.last_hidden_state[:, kept])
        else:
            logits = outputs.top_logits.dense(self.model._scx.head_size, kept)
        result = CausalLMOutputWithPast(logits=logits, past_key_values=outputs.past_key_values)
        if return_dict is None:
            return_dict = getattr(self.config, "return_dict", True)
        return result if return_dict else result.to_tuple()

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """transformers' own, without decoding methods that are not in it: they may look at any logit."""
        if kwargs.get("custom_generate") is not None:
            raise ValueError(
                "custom_generate: with prefill_top_k only the largest logits of a prompt are known; encode the model "
                "with prefill_top_k=None"
            )
        inherited: Any = super()
        return inherited.generate(*args, **kwargs)

    def _get_logits_processor(self, generation_config: Any, *args: Any, **kwargs: Any) -> Any:
        processors = super()._get_logits_processor(generation_config, *args, **kwargs)
        _check_processors(processors, generation_config, self.model._scx.party.plan.prefill_top_k)
        return processors


def _check_processors(processors: Any, generation_config: Any, k: int) -> None:
    """Only what gives the same tokens with the k largest logits as with all of them. Raises ValueError naming it."""
    remedy = f"prefill_top_k: of a prompt only the {k} largest logits of each token are known, and"
    if generation_config.num_beams > 1:
        raise ValueError(f"{remedy} num_beams={generation_config.num_beams} needs all; encode with prefill_top_k=None")
    is_narrow = False
    for processor in processors:
        kind = type(processor)
        if kind is TopKLogitsWarper and processor.top_k <= k:
            is_narrow = True
        elif kind not in _KEEP_ORDER and not (is_narrow and kind in _AFTER_TOP_K):
            raise ValueError(f"{remedy} {kind.__name__} may choose or weigh others; encode with prefill_top_k=None")
    if generation_config.do_sample and not is_narrow:
        raise ValueError(f"{remedy} sampling may choose others; set top_k to {k} at most, or encode with another k")
