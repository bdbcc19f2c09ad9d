"""Feature permutations that stand for more than one token: what is known of one opens the others."""

import torch
from torch import Tensor

__all__ = ["find_feature_order", "undo_feature_order"]


def find_feature_order(plain: Tensor, encoded: Tensor) -> Tensor:
    """Find a feature permutation from known tokens: which feature of a head is each encoded one?

    The weights give K and V of a known beginning, such as a chat's template. One token is enough where no two features
    of a head are equal; more tell close ones apart.

    Args:
        plain: (G, n, d), K or V of known tokens. encoded: (G, n, d), the same rows as they are stored or cross.

    Returns: (G, d) int64, the plain feature under each encoded one.
    """
    exact = "donot_use_mm_for_euclid_dist"  # features lie close together
    return torch.cdist(encoded.float().mT, plain.float().mT, compute_mode=exact).argmin(dim=-1)


def undo_feature_order(encoded: Tensor, order: Tensor) -> Tensor:
    """(G, n, d) rows of other tokens under the same permutation -> plain, as far as `order` (G, d) is right."""
    return torch.zeros_like(encoded).scatter_(2, order[:, None].expand(encoded.shape), encoded)
