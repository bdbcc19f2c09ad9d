"""What a request to the split placement may ask, and what its model must be, checked before anything runs."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from scx.architecture import SUPPORTED, Decoder, head_norms, is_hooked, is_plain_rms_norm
from scx.party.live import accelerated

__all__ = ["check_attention", "check_blocks", "check_keywords", "check_padding", "check_positions", "padding"]

_UNUSED = ("num_items_in_batch", "token_type_ids")
"""Keywords that the decoder of a plain model does not act upon."""
_INNER = ("output_attentions", "output_hidden_states", "output_router_logits")


def check_blocks(decoder: Decoder, blocks: Sequence[Any]) -> None:
    """The blocks that were divided must be those that run, in order, and nothing may be around what is not called.

    Raises: ValueError naming the layer.
    """
    running = list(decoder.layers)
    if decoder.config.num_hidden_layers != len(blocks):
        raise ValueError(
            f"config.num_hidden_layers: {len(blocks)} blocks were divided between the parties, and "
            f"{decoder.config.num_hidden_layers} are to run; decode_llama, change the model, and encode it again"
        )
    for place, block in enumerate(blocks):
        if place >= len(running) or running[place] is not block:
            raise ValueError(
                f"model: layers.{place} is not the block that was divided between the parties; decode_llama, change "
                "the model, and encode it again"
            )
    layer_class, attention_class = SUPPORTED[_original(decoder)]
    for place, block in enumerate(blocks):
        attention = block.self_attn
        for name, module, expected in (
            (f"layers.{place}", block, layer_class),
            (f"layers.{place}.self_attn", attention, attention_class),
        ):
            if type(module) is not expected:
                raise TypeError(f"model: {name} is a {type(module).__name__}, expected a {expected.__name__}")
            if is_hooked(module) and not accelerated(module):
                raise ValueError(
                    f"model: {name} has hooks, or a forward of its own, and the split placement does not call it as a "
                    "module; hook its projections, norms or feed-forward, or use the fused placement"
                )
        if head_norms(attention) and not all(map(is_plain_rms_norm, (attention.q_norm, attention.k_norm))):
            raise ValueError(
                f"model: layers.{place}.self_attn.q_norm and k_norm must be transformers' own, without hooks: the "
                "secure side applies their weights itself"
            )


def _original(decoder: Decoder) -> type[Any]:
    return next(kind for kind in type(decoder).__mro__ if kind in SUPPORTED)


def check_attention(config: Any) -> None:
    """The attention that a model is set to must be one of transformers' own, which all compute what the parties do.

    Raises: ValueError naming it.
    """
    name = config._attn_implementation
    given = ALL_ATTENTION_FUNCTIONS.get(name) if name in ALL_ATTENTION_FUNCTIONS else None
    is_own = name in (None, "eager") if given is None else given.__module__.startswith("transformers.integrations.")
    if not is_own or "paged" in str(name):
        raise ValueError(
            f"config._attn_implementation: the split placement computes attention itself, as transformers' sdpa does, "
            f"and cannot use {name!r}; call set_attn_implementation('sdpa')"
        )


def check_keywords(keywords: Mapping[str, Any], config: Any) -> None:
    """Of a request's other keywords, only those that change nothing in the decoder.

    Raises: ValueError naming the keyword.
    """
    for name in _INNER:
        wanted = keywords.get(name)
        if getattr(config, name, False) if wanted is None else wanted:
            raise ValueError(f"{name}: inner states are not recorded in the split placement; use the fused one")
    if keywords.get("is_causal") not in (None, True):
        raise ValueError("is_causal: attention is causal in the split placement; use the fused one")
    for name, value in keywords.items():
        if value is not None and name not in (*_UNUSED, *_INNER, "is_causal"):
            raise ValueError(
                f"{name}: the split placement does not know this keyword, which the plain model hands to its "
                "attention; leave it out, or use the fused placement"
            )


def check_positions(position_ids: Tensor | None, attention_mask: Tensor | None, has_cache: bool, config: Any) -> None:
    """Sequences packed into one row, whose positions begin anew, are attended to apart by the plain model.

    Args:
        has_cache: whether the request fills or continues a cache.
    Raises: ValueError naming the argument.
    """
    is_flash = "flash" in str(config._attn_implementation)
    if position_ids is None or attention_mask is not None or (has_cache and not is_flash):
        return
    if position_ids.dim() == 2 and (position_ids.diff(dim=1) != 1).any():
        raise ValueError(
            "position_ids: expected consecutive positions; rows that hold several sequences are not attended to apart "
            "in the split placement. Give each sequence a row of its own, with left padding and an attention_mask"
        )


def padding(attention_mask: Tensor | None, batch: int, total: int) -> Tensor | None:
    """(B,) int64, the first token of each sequence that is no padding; None where there is no padding."""
    if attention_mask is None:
        return None
    if not isinstance(attention_mask, Tensor) or attention_mask.shape != (batch, total):
        shape = tuple(attention_mask.shape) if isinstance(attention_mask, Tensor) else type(attention_mask).__name__
        raise ValueError(f"attention_mask: the split placement expects ({batch}, {total}) with 0 and 1, got {shape}")
    given = attention_mask.cpu()
    mask = given.to(torch.int64)
    if (mask != given).any() or ((mask != 0) & (mask != 1)).any() or (mask.diff(dim=1) < 0).any():
        raise ValueError("attention_mask: the split placement expects left padding, zeros before ones")
    first = total - mask.sum(dim=1)
    return first if first.any() else None


def check_padding(given: Tensor | None, known: Tensor | None) -> None:
    """The padding of a conversation is that of its prompt."""
    if given is not None and (known is None or not torch.equal(given.cpu(), known.cpu())):
        raise ValueError(
            f"attention_mask: the conversation's first tokens are {None if known is None else known.tolist()}, "
            f"got {given.tolist()}"
        )
