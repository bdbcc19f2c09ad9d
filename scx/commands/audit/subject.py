"""What is attacked: one model and prompt, run in every placement and setting when a case first asks for it, and what
each attacker sees of that. The plain rows at the end are for scoring, no attack is given them."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from scx.audit import AttentionMemory, Heard, one_token_rows, recorded_inputs, rows_heard
from scx.audit.continuing import Held
from scx.keys import CACHE_ENCODINGS, SCXKeyGenerator
from scx.kvcache import EncodedCache, decode_kvcache
from scx.models.llama import encoded_llama
from scx.models.split import record_transcript
from scx.party.boundary import Transcript
from scx.party.plan import CROSSINGS

__all__ = ["KNOWN_TOKENS", "TABLE_BLOCKS", "FusedPrefill", "Subject", "encoded_and_plain", "received"]

TABLE_BLOCKS = 4
"""First blocks whose rows are looked up among one-token rows."""
KNOWN_TOKENS = 16
"""Of the prompt's beginning, where the attacker knows it."""


@dataclass(frozen=True)
class FusedPrefill:
    """Of a prefill in the fused placement the stored cache, V of the first block as its attention found it in memory,
    and the rows that entered the first block's feed-forward, (T, D)."""

    cache: EncodedCache
    value_in_memory: Tensor
    rows: Tensor


class Subject:
    """A model under SCX.

    Args:
        prompt: (1, N). own_text: (W, M), the attacker's own. new_tokens: to generate.
        redundant: redundant rows. noise: its scale, 0 for none.
    """

    def __init__(
        self, model: PreTrainedModel, prompt: Tensor, own_text: Tensor, *, redundant: int, noise: float,
        new_tokens: int = 33,
    ) -> None:  # fmt: skip
        self.model = model
        self.prompt = prompt
        self.own_text = own_text
        self.redundant = redundant
        self.noise = noise
        self.new_tokens = new_tokens

    @property
    def layers(self) -> Any:
        return self.model.base_model.layers

    @property
    def vocabulary(self) -> int:
        return len(self.model.get_input_embeddings().weight)

    def keys(self, noise: float | None = None, **options: Any) -> SCXKeyGenerator:
        scale = self.noise if noise is None else noise
        options |= {"noise_scale": scale} if scale else {}
        return SCXKeyGenerator.for_model(self.model, redundant_num=self.redundant, alp=scale > 0, **options)

    @torch.no_grad()
    def _prefill(self, encoding: str) -> FusedPrefill:
        with (
            encoded_llama(self.model, self.keys(cache_encoding=encoding)),
            AttentionMemory() as memory,
            recorded_inputs([self.layers[0].mlp]) as (rows,),
        ):
            cache = self.model(self.prompt, logits_to_keep=1).past_key_values
        return FusedPrefill(cache, memory.values[0], rows[0][0])

    @cached_property
    def fused(self) -> dict[str, FusedPrefill]:
        """A prefill in the fused placement, by how the cache is stored."""
        return {encoding: self._prefill(encoding) for encoding in CACHE_ENCODINGS}

    @torch.no_grad()
    def _messages(self, crossings: str) -> Transcript:
        parties = encoded_llama(self.model, self.keys(), "cpu", crossings=crossings)
        with parties, record_transcript(self.model) as transcript:
            self.model(self.prompt, logits_to_keep=1)
        return transcript

    @cached_property
    def split(self) -> dict[str, Transcript]:
        """What crosses in a prefill of the split placement, by scheme."""
        return {crossings: self._messages(crossings) for crossings in CROSSINGS}

    @cached_property
    def heard(self) -> dict[str, Heard]:
        """The prefill's rows on the untrusted side, by scheme."""
        return {crossings: rows_heard(self.model, messages) for crossings, messages in self.split.items()}

    @torch.no_grad()
    def later_turn(self, noise: float | None = None, reuse_feature_keys: bool = False) -> Transcript:
        """What crosses where the first `KNOWN_TOKENS` of the prompt come in one turn and the others in a later one,
        all at once and so in token order."""
        first, later = self.prompt[:, :KNOWN_TOKENS], self.prompt[:, KNOWN_TOKENS:]
        parties = encoded_llama(self.model, self.keys(noise), "cpu", reuse_feature_keys=reuse_feature_keys)
        with parties, record_transcript(self.model) as transcript:
            cache = self.model(first, logits_to_keep=1).past_key_values
            self.model(later, past_key_values=cache, logits_to_keep=1)
        return transcript

    def _generate(self) -> Tensor:
        options = {"max_new_tokens": self.new_tokens, "min_new_tokens": self.new_tokens, "do_sample": False}
        generated: Tensor = self.model.generate(self.prompt, attention_mask=torch.ones_like(self.prompt), **options)
        return generated[0, self.prompt.shape[1] : -1]

    def generate_fused(self) -> tuple[Tensor, Tensor]:
        """The rows (n, D) of generated tokens that enter the first block's feed-forward, and the tokens (n,) that were
        fed, of a sealed cache."""
        keys = self.keys(cache_encoding="sealed")
        with encoded_llama(self.model, keys), recorded_inputs([self.layers[0].mlp]) as (rows,):
            tokens = self._generate()
        return torch.cat(rows[1:], dim=1)[0], tokens

    def generate_split(self, crossings: str) -> tuple[Transcript, Tensor]:
        """What crosses in a generation, and the tokens (n,) that were fed."""
        parties = encoded_llama(self.model, self.keys(), "cpu", crossings=crossings)
        with parties, record_transcript(self.model) as transcript:
            tokens = self._generate()
        return transcript, tokens

    @cached_property
    def tables(self) -> dict[tuple[str, int], Tensor]:
        """One-token rows of the first blocks."""
        return one_token_rows(self.model, TABLE_BLOCKS, self.model.config.bos_token_id or 0)

    def own_rows(self, blocks: Sequence[int]) -> dict[tuple[str, int], Tensor]:
        """The rows (W·M, F) of the attacker's own text, by message and block."""
        return plain_rows(self.model, self.own_text, blocks)

    @cached_property
    def scored_rows(self) -> dict[tuple[str, int], Tensor]:
        """The prompt's plain rows in token order, (N, F) by message and block: for scoring."""
        return plain_rows(self.model, self.prompt, range(len(self.layers)))

    @cached_property
    @torch.no_grad()
    def scored_cache(self) -> DynamicCache:
        """The prompt's plain cache: for scoring, and of a beginning that the attacker knows, for him."""
        cache: DynamicCache = self.model(self.prompt, logits_to_keep=1).past_key_values
        return cache


def received(transcript: Transcript, stage: str, name: str, block: int = 0) -> list[Tensor]:
    """What the untrusted side received in a stage under a name, for a block."""
    crossings = transcript.select(stage=stage, direction="to untrusted", name=name)
    return [x.tensor for x in crossings if x.block == block and x.tensor is not None]


@torch.no_grad()
def plain_rows(model: PreTrainedModel, ids: Tensor, blocks: Sequence[int]) -> dict[tuple[str, int], Tensor]:
    """The plain model's rows of texts (W, M) where messages have them, (W·M, F) by message and block."""
    layers: Any = model.base_model.layers
    places = {}
    for block in blocks:
        places["attention_input", block] = layers[block].self_attn.q_proj
        places["attention_rows", block] = layers[block].self_attn.o_proj
        places["feed_forward_input", block] = layers[block].post_attention_layernorm
    with recorded_inputs(list(places.values())) as recorded:
        for text in ids:
            model(text[None], use_cache=False, logits_to_keep=1)
    return {place: torch.cat(rows, dim=1)[0] for place, rows in zip(places, recorded, strict=True)}


@torch.no_grad()
def encoded_and_plain(model: PreTrainedModel, ids: Tensor) -> tuple[list[Held], list[Held]]:
    """Every block's cache of ids (B, N), as SCX stores it, and plain, as key sharing gives it of the middle blocks."""
    with encoded_llama(model, SCXKeyGenerator.for_model(model)):
        stored = model(ids, logits_to_keep=1).past_key_values
    token = torch.arange(ids.shape[1], device=ids.device).expand(ids.shape)
    both = (stored, decode_kvcache(stored, stored.session))
    encoded, plain = ([Held(layer.keys, layer.values, token) for layer in cache.layers] for cache in both)
    return encoded, plain
