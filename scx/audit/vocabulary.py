"""Rows looked up in the vocabulary: which token's row is it nearest to?"""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

__all__ = ["nearest_tokens", "one_token_rows", "read_first_block", "read_noisy_rows"]

_ROWS_AT_ONCE = 4096
_TOKENS_AT_ONCE = 1023  # beside the one token that they all see


@torch.no_grad()
def read_first_block(model: PreTrainedModel, values: Tensor) -> Tensor:
    """Read the prompt out of the first block's V, permuted within heads as it may be.

    V of the first block depends on one token alone: it has no position and no context. Sorting each head's features
    removes a permutation, from the observed row as from the row of every token of the vocabulary; the nearest is it.

    Args:
        model: the weights, which the untrusted side has.
        values: (B, G, N, d), the first layer of an encoded cache.

    Returns: (B, N) int64, the tokens found.
    Source: the first-block fingerprint, a special case of vocabulary matching (arXiv 2505.18332).
    """
    block: Any = model.base_model.layers[0]
    batch, heads, tokens, size = values.shape

    def fingerprint(rows: Tensor) -> Tensor:
        return rows.float().unflatten(-1, (heads, size)).sort(dim=-1).values.flatten(-2)

    # Of a sealed cache many patterns are no numbers; an attacker has to put something in their place.
    values = values.float().nan_to_num(0.0, 0.0, 0.0)
    observed = fingerprint(values.transpose(1, 2).reshape(batch * tokens, heads * size))
    table = (fingerprint(block.self_attn.v_proj(rows)) for rows in _first_inputs(model))
    return _nearest(observed, table).view(batch, tokens)


@torch.no_grad()
def read_noisy_rows(model: PreTrainedModel, rows: Tensor) -> Tensor:
    """Guess the tokens of rows that enter the first block under Laplace noise, each from itself alone: the most likely
    is the one at the smallest distance in L1, whatever the scale of the noise.

    Args:
        rows: (B, N, D), the first block's noisy attention input.

    Returns: (B, N) int64, the tokens found.
    """
    return _nearest(rows.flatten(0, 1).float(), (x.float() for x in _first_inputs(model)), p=1.0).view(rows.shape[:2])


@torch.no_grad()
def one_token_rows(model: PreTrainedModel, blocks: int, first_token: int) -> dict[tuple[str, int], Tensor]:
    """The rows of every token of the vocabulary, each alone behind one first token, before the attention of the first
    blocks and, but for the last of these, before the feed-forward.

    The first token of a text takes much of everybody's attention, so that what is missing of a row is little more than
    the other tokens' share of it.

    Args:
        blocks: how many, from the first. first_token: any one will do that a text may begin with.

    Returns: (V, D) float16, by message and block, as these messages have rows: ("attention_input", block), behind the
    norm before its attention, and ("feed_forward_input", block), the residual stream behind its attention.
    Source: vocabulary matching (arXiv 2505.18332), with one row for each token in place of one for each prefix.
    """
    decoder: Any = model.base_model
    embedding = decoder.embed_tokens
    found: dict[tuple[str, int], list[Tensor]] = {}
    for start in range(0, embedding.weight.shape[0], _TOKENS_AT_ONCE):
        tokens = torch.arange(start, min(start + _TOKENS_AT_ONCE, embedding.weight.shape[0]))
        hidden = embedding(torch.cat((torch.tensor([first_token]), tokens))[None].to(embedding.weight.device))
        position = torch.ones(1, hidden.shape[1], dtype=torch.int64, device=hidden.device)
        position[0, 0] = 0
        seen = torch.eye(hidden.shape[1], dtype=torch.bool, device=hidden.device)
        seen[:, 0] = True
        mask = hidden.new_zeros(seen.shape).masked_fill_(~seen, torch.finfo(hidden.dtype).min)[None, None]
        rotary = decoder.rotary_emb(hidden, position)
        for block, layer in enumerate(decoder.layers[:blocks]):
            normed = layer.input_layernorm(hidden)
            found.setdefault(("attention_input", block), []).append(normed[0, 1:].half())
            if block + 1 < blocks:
                attended, _ = layer.self_attn(normed, position_embeddings=rotary, attention_mask=mask)
                hidden = hidden + attended
                found.setdefault(("feed_forward_input", block), []).append(hidden[0, 1:].half())
                hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
    return {place: torch.cat(parts) for place, parts in found.items()}


@torch.no_grad()
def nearest_tokens(rows: Tensor, table: Tensor, norm: nn.Module | None = None) -> Tensor:
    """Which token's row of a table each row is most like, by the cosine about the table's mean.

    Args:
        rows: (N, D). table: (V, D), a row for each token: `one_token_rows`, or the embedding.
        norm: an RMS norm that the rows have gone through and the table's have not: its weight is divided off, and all
            rows are brought to one length.

    Returns: (N,) int64.
    """
    if norm is not None:
        weight: Any = norm.weight
        rows, table = F.normalize(rows.float() / weight, dim=-1), F.normalize(table.float(), dim=-1)
    mean = table.mean(dim=0, dtype=torch.float32)

    def direction(x: Tensor) -> Tensor:
        return F.normalize(x.float() - mean, dim=-1)

    return _nearest(direction(rows), map(direction, table.split(_ROWS_AT_ONCE)))


def _first_inputs(model: PreTrainedModel) -> Iterator[Tensor]:
    """What enters the first block's projections for every token of the vocabulary, some (n, D) at a time."""
    decoder: Any = model.base_model
    return map(decoder.layers[0].input_layernorm, decoder.embed_tokens.weight.split(_ROWS_AT_ONCE))


def _nearest(observed: Tensor, table: Iterable[Tensor], p: float = 2.0) -> Tensor:
    """(N, F) rows, and a table's (n, F) parts in order -> which row of the table each is nearest to, (N,) int64."""
    best = torch.full((len(observed),), torch.inf, device=observed.device)
    found = torch.zeros(len(observed), dtype=torch.int64, device=observed.device)
    start = 0
    for rows in table:
        distance, nearest = torch.cdist(observed, rows, p=p).min(dim=1)
        closer = distance < best
        best = torch.where(closer, distance, best)
        found = torch.where(closer, nearest + start, found)
        start += len(rows)
    return found
