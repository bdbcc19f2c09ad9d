"""What the published encodings do not hide, as attacks that run: each needs weights and encoded tensors, no key."""

import torch
from torch import Tensor
from transformers import PreTrainedModel

__all__ = ["order_rows", "read_first_block"]

_ROWS_AT_ONCE = 4096


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
    decoder = model.base_model
    block = decoder.layers[0]
    batch, heads, tokens, size = values.shape
    embedding = decoder.embed_tokens.weight

    def fingerprint(rows: Tensor) -> Tensor:
        return rows.float().unflatten(-1, (heads, size)).sort(dim=-1).values.flatten(-2)

    # Of a sealed cache many patterns are no numbers; an attacker has to put something in their place.
    values = values.float().nan_to_num(0.0, 0.0, 0.0)
    observed = fingerprint(values.transpose(1, 2).reshape(batch * tokens, heads * size))
    best = torch.full((batch * tokens,), torch.inf, device=values.device)
    found = torch.zeros(batch * tokens, dtype=torch.int64, device=values.device)
    for start in range(0, embedding.shape[0], _ROWS_AT_ONCE):
        rows = block.self_attn.v_proj(block.input_layernorm(embedding[start : start + _ROWS_AT_ONCE]))
        distance, nearest = torch.cdist(observed, fingerprint(rows)).min(dim=1)
        closer = distance < best
        best = torch.where(closer, distance, best)
        found = torch.where(closer, nearest + start, found)
    return found.view(batch, tokens)


def order_rows(value_product: Tensor, value: Tensor) -> Tensor:
    """Find where each token lies among the encoded rows of a block, from what crosses a boundary in that block.

    V has no position: the untrusted side computed it row by row, token-permuted with redundant rows among them, and
    then receives it for attention in token order with its features permuted. Sorting each head's features makes the
    rows of both alike.

    Args:
        value_product: (B, T, G*d), the untrusted side's own product.
        value: (B, G, S, d), as it came for attention.

    Returns: (B, S) int64, the token positions; rows that no token took are redundant.
    """
    own = value_product.float().unflatten(-1, (value.shape[1], -1)).sort(dim=-1).values.flatten(-2)
    came = value.float().transpose(1, 2).sort(dim=-1).values.flatten(-2)
    return torch.cdist(came, own).argmin(dim=-1)
