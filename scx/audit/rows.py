"""Token-permuted rows with redundant ones among them: their order, their way through blocks, and which are real."""

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

__all__ = ["link_rows", "order_rows", "realness"]


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


@torch.no_grad()
def link_rows(model: PreTrainedModel, block: int, rows: Tensor, following: Tensor) -> Tensor:
    """Find each row that enters a block's attention among those that entered the feed-forward before it.

    What comes out of a feed-forward is what enters the next attention, to the untrusted side's own arithmetic.

    Args:
        block: the one of the feed-forward, from 0.
        rows: (B, T, D), its `feed_forward_input`. following: (B, T, D), the next block's `attention_input`.

    Returns: (B, T) int64, where each row of `following` was in `rows`; -1 for a redundant row, which was not there.
    """
    decoder: Any = model.base_model
    layer, after = decoder.layers[block], decoder.layers[block + 1]
    computed = after.input_layernorm(rows + layer.mlp(layer.post_attention_layernorm(rows)))
    distance, place = torch.cdist(following, computed).min(dim=-1)
    return place.where(distance < 1e-2 * following.norm(dim=-1), -1)


def realness(rows: Tensor, own: Tensor) -> Tensor:
    """How much likelier each row is a token's than a redundant one, as a log-likelihood ratio, from that row alone.

    Real rows are taken as normal with the mean and covariance of the attacker's own; redundant ones are drawn
    normal, feature by feature, at the scale of real ones, which is public.

    Args:
        rows: (N, F), of one message. own: (M, F), what the weights make of the attacker's own text at the same place,
            M about five times F or more.

    Returns: (N,) float64; positive for rows that look like tokens'.
    """
    rows, own = rows.double(), own.double()
    mean, covariance = own.mean(dim=0), torch.cov(own.T)
    covariance += 1e-3 * covariance.diagonal().mean() * torch.eye(len(mean), dtype=torch.float64, device=own.device)
    factor = torch.linalg.cholesky(covariance)
    whitened = torch.linalg.solve_triangular(factor, (rows - mean).T, upper=False)
    real = -0.5 * whitened.square().sum(dim=0) - factor.diagonal().log().sum()
    scale = own.abs().median(dim=0).values / 0.6745  # as `scx.calibration` measures it
    redundant = -0.5 * (rows / scale).square().sum(dim=1) - scale.log().sum()
    return real - redundant
