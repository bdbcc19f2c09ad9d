"""Where gradients go through an encoded model, and where they do not."""

from typing import Any

import torch
from torch import Tensor, nn

from scx.kvcache import EncodedCache

__all__ = ["refuse_backward", "wants_gradients"]


def wants_gradients(module: nn.Module, inputs_embeds: Tensor | None, cache: EncodedCache | None = None) -> bool:
    """Whether a plain forward would be recorded for a backward: gradients are on, and a parameter, the embeddings given
    or what the cache holds asks for them."""
    if not torch.is_grad_enabled():
        return False
    if inputs_embeds is not None and inputs_embeds.requires_grad:
        return True
    if cache is not None and cache.carries_gradients:
        return True
    return any(parameter.requires_grad for parameter in module.parameters())


class _Refusal(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, anchor: Tensor, reason: str) -> Tensor:
        ctx.reason = reason
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        raise RuntimeError(ctx.reason)


def refuse_backward(x: Tensor, reason: str) -> Tensor:
    """x, as a result through which no gradient goes: a backward that reaches it raises RuntimeError for the reason.

    So inference needs no `torch.no_grad()`, and nobody trains on gradients that are not there.
    """
    refused: Tensor = _Refusal.apply(x, x.new_zeros(0).requires_grad_(), reason)
    return refused
