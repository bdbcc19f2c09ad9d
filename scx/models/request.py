"""A model's request, checked at its door: what it brings, whether it opens or continues a session, and its cache."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache
from transformers.generation.continuous_batching.cache import PagedAttentionCache

from scx.kvcache.conversation import CachePart

__all__ = ["GIVEN_TO_ATTENTION", "Admitted", "admit", "check_keywords"]

GIVEN_TO_ATTENTION = ("module", "query", "key", "value", "dropout", "scaling")
"""What a block gives to its attention function itself."""

MODES = ("prefill", "decode")


@dataclass(frozen=True)
class Admitted:
    """A request to a decoder that has passed the checks which do not depend on the placement.

    `batch` sequences of `tokens` new tokens each, as `input_ids` (B, S) or `inputs_embeds` (B, S, D); `cache` holds
    `past` tokens of each; `opens` says whether a session is opened for it, `mode` is the stage that the caller named.
    """

    input_ids: Tensor | None
    inputs_embeds: Tensor | None
    batch: int
    tokens: int
    cache: Cache | None
    past: int
    opens: bool
    mode: str | None


def admit(
    input_ids: Tensor | None,
    inputs_embeds: Tensor | None,
    vocab_size: int,
    past_key_values: Cache | None,
    parts: tuple[CachePart | None, CachePart | None],
    part_kind: type[CachePart],
    mode: str | None,
    cache_position: Tensor | None,
) -> Admitted:
    """Check a request.

    Args:
        parts: (gpu_kvcache, cpu_kvcache). part_kind: what these must be, the placement's own kind of part.

    Raises: ValueError, TypeError naming the argument.
    """
    batch, tokens = _check_input(input_ids, inputs_embeds, vocab_size)
    cache = _join(past_key_values, parts, part_kind)
    past = 0 if cache is None else cache.get_seq_length()
    opens = _is_prefill(mode, past)
    _check_positions(cache_position, past, tokens)
    return Admitted(input_ids, inputs_embeds, batch, tokens, cache, past, opens, mode)


def check_keywords(keywords: Mapping[str, Any]) -> None:
    """Of a request's other keywords, a cache must come under the name by which it is used: `past_key_values`, or
    `cache` if continuous batching brings its pages; and none may be one that blocks give themselves. Everything else
    goes where the plain model hands it.

    Raises: TypeError naming the keyword.
    """
    for name, value in keywords.items():
        if name in GIVEN_TO_ATTENTION:
            raise TypeError(f"{name}: every block gives this to its attention itself")
        has_pages = isinstance(value, PagedAttentionCache)
        if isinstance(value, Cache):
            raise TypeError(f"{name}: a {type(value).__name__} comes as past_key_values, and as nothing else")
        if value is not None and has_pages != (name == "cache"):
            raise TypeError(
                f"{name}: pages of continuous batching, and nothing else, come as cache; got a {type(value).__name__}"
            )


def _check_input(input_ids: Tensor | None, inputs_embeds: Tensor | None, vocab_size: int) -> tuple[int, int]:
    """(sequences, tokens) of a request."""
    given, name, expected = (
        (input_ids, "input_ids", 2) if inputs_embeds is None else (inputs_embeds, "inputs_embeds", 3)
    )
    if given is None or (input_ids is not None and inputs_embeds is not None):
        raise ValueError("give exactly one of input_ids and inputs_embeds")
    if given.dim() != expected or 0 in given.shape:
        raise ValueError(f"{name}: expected {expected} dimensions, none of them empty, got {tuple(given.shape)}")
    # On an accelerator the embedding itself refuses such a token; reading values here would wait for the device.
    if input_ids is not None and input_ids.device.type == "cpu":
        low, high = input_ids.aminmax()
        if low < 0 or high >= vocab_size:
            raise ValueError(f"input_ids: expected tokens 0..{vocab_size - 1}, got {int(low)}..{int(high)}")
    return given.shape[0], given.shape[1]


def _join(
    past: Cache | None, parts: tuple[CachePart | None, CachePart | None], part_kind: type[CachePart]
) -> Cache | None:
    gpu_kvcache, cpu_kvcache = parts
    if gpu_kvcache is None and cpu_kvcache is None:
        return past
    if past is not None:
        raise ValueError("past_key_values: give either a whole cache, or gpu_kvcache and cpu_kvcache")
    if gpu_kvcache is None or cpu_kvcache is None:
        raise ValueError("gpu_kvcache and cpu_kvcache: give both parts of a split cache")
    for name, part in (("gpu_kvcache", gpu_kvcache), ("cpu_kvcache", cpu_kvcache)):
        if not isinstance(part, part_kind):
            raise TypeError(
                f"{name}: expected a part of an encoded cache as this placement divides it ({part_kind.__name__}), "
                f"got {type(part).__name__}"
            )
    return gpu_kvcache.join(cpu_kvcache)


def _is_prefill(mode: str | None, past: int) -> bool:
    """The mode asked for, or what the cache says: without tokens in it a request opens a session."""
    if mode is not None and mode not in MODES:
        raise ValueError(f"mode: expected one of {MODES} or None, got {mode!r}")
    if mode == "prefill" and past:
        raise ValueError("mode: 'prefill' opens a session, but the cache given holds tokens of another already")
    if mode == "decode" and not past:
        raise ValueError("mode: 'decode' continues a session and needs the cache that its prefill returned")
    return not past


def _check_positions(cache_position: Tensor | None, past: int, tokens: int) -> None:
    """Positions follow from the cache; a caller's `cache_position` is only held against them."""
    if cache_position is None:
        return
    if cache_position.shape != (tokens,):
        raise ValueError(f"cache_position: expected shape ({tokens},), got {tuple(cache_position.shape)}")
    if cache_position.device.type == "cpu" and not torch.equal(
        cache_position, torch.arange(past, past + tokens, dtype=cache_position.dtype)
    ):
        raise ValueError(f"cache_position: expected {past}..{past + tokens - 1}, got {cache_position.tolist()}")
