"""Going on alone: what the untrusted side makes of a text after key sharing, without the locked blocks' caches.

It has the weights and the plain K and V of the middle blocks; of the first and last blocks it has what SCX stores, and
tries to go on with these as they are, with zeros, without them, or with the nearest middle block's.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import DynamicCache, PreTrainedModel

__all__ = ["REDUNDANT", "Held", "attempts", "losses", "perplexity", "protected", "token_permuted"]

REDUNDANT = 64
"""Rows that `token_permuted` puts among the others."""


@dataclass(frozen=True)
class Held:
    """What the untrusted side holds of one block: keys and values (B, G, N, d), and which token each row belongs to,
    `token` (B, N); -1 for a redundant row."""

    keys: Tensor
    values: Tensor
    token: Tensor

    def before(self, tokens: int) -> "Held":
        """Rows of the first tokens; in token order and without redundant rows so far."""
        return Held(self.keys[:, :, :tokens], self.values[:, :, :tokens], self.token[:, :tokens])


def zeros(held: Held) -> Held:
    return Held(held.keys.new_zeros(held.keys.shape), held.values.new_zeros(held.values.shape), held.token)


def left_out(held: Held) -> Held:
    return held.before(0)


def token_permuted(held: Held) -> Held:
    """Rows in a random order with redundant ones among them, normal at the scale of the others: π_l(K ⊕ r)."""

    def appended(x: Tensor) -> Tensor:
        decoys = x.new_empty(*x.shape[:2], REDUNDANT, x.shape[3]).normal_() * x.std(dim=(2, 3), keepdim=True)
        return torch.cat((x, decoys), dim=2)

    token = F.pad(held.token, (0, REDUNDANT), value=-1)
    order = torch.rand(token.shape, device=token.device).argsort(dim=1)

    def permuted(x: Tensor) -> Tensor:
        return x.take_along_dim(order[:, None, :, None], dim=2)

    return Held(permuted(appended(held.keys)), permuted(appended(held.values)), token.gather(1, order))


@contextmanager
def masks_of_blocks(model: PreTrainedModel, masks: Sequence[Tensor]) -> Iterator[None]:
    """Give every block's attention a mask of its own: blocks hold different numbers of rows."""

    def hook(mask: Tensor) -> Callable[..., Any]:
        return lambda module, args, kwargs: (args, {**kwargs, "attention_mask": mask})

    layers = model.model.layers
    handles = [
        layer.self_attn.register_forward_pre_hook(hook(mask), with_kwargs=True)
        for layer, mask in zip(layers, masks, strict=True)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def losses(model: PreTrainedModel, blocks: Sequence[Held], ids: Tensor, first: int, *, alone: bool = False) -> Tensor:
    """Negative log-likelihoods (B, N) of the tokens after `first`, from blocks' caches and the right tokens.

    Args:
        blocks: a cache for each block; of its rows a query sees redundant ones and earlier tokens'.
        ids: (B, first + N + 1); tokens first.. are fed, each predicts the next one.
        alone: of the tokens that are fed, each sees itself only, not those before it.
    """
    fed, targets = ids[:, first:-1], ids[:, first + 1 :]
    count = fed.shape[1]
    position = torch.arange(first, first + count, device=ids.device)
    own = torch.eye(count, device=ids.device) if alone else torch.ones(count, count, device=ids.device).tril()
    own = own.bool().expand(len(ids), 1, count, count)

    def mask(held: Held) -> Tensor:
        seen = held.token[:, None, None, :] < position[:, None]
        visible = torch.cat((seen, own), dim=-1)
        return torch.zeros(visible.shape, device=ids.device).masked_fill_(~visible, float("-inf"))

    masks = [mask(held) for held in blocks]
    cache = DynamicCache()
    for index, held in enumerate(blocks):
        cache.update(held.keys, held.values, index)
    with masks_of_blocks(model, masks):
        logits = model(
            fed, attention_mask=masks[0], position_ids=position.expand(fed.shape), past_key_values=cache
        ).logits
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view(targets.shape)


def perplexity(*arguments: Any, **options: Any) -> float:
    return math.exp(losses(*arguments, **options).double().mean())


def protected(count: int, each_end: int) -> set[int]:
    return {*range(each_end), *range(count - each_end, count)}


def attempts(encoded: Sequence[Held], plain: Sequence[Held], locked: set[int]) -> Iterator[tuple[str, list[Held]]]:
    """(what stands in the locked blocks, all blocks): zeros, nothing, what SCX stores, the nearest other block's."""

    def instead(stand_in: Callable[[int], Held]) -> list[Held]:
        return [stand_in(index) if index in locked else held for index, held in enumerate(plain)]

    yield "zeros", instead(lambda index: zeros(plain[index]))
    yield "left out", instead(lambda index: left_out(plain[index]))
    yield "encoded", instead(lambda index: encoded[index])
    yield "encoded, token-permuted", instead(lambda index: token_permuted(encoded[index]))
    others = [index for index in range(len(plain)) if index not in locked]
    if others:
        yield "nearest block's", instead(lambda index: plain[min(others, key=lambda other: abs(other - index))])
