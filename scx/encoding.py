"""What the secure side does to a tensor: the keys as objects that encode and decode.

Index arrays and their direction are described in `scx_kernels.reference`. Notation: B sequences, S tokens, R redundant
rows, T = S + R, D features, H query heads, G key/value heads, d head size, L layers.
"""

from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn

import scx_kernels as ops

__all__ = [
    "ENCODINGS",
    "FeatureKey",
    "LayerKeys",
    "Noise",
    "RedundantScale",
    "TokenKey",
    "TokenKeys",
    "inverse",
    "is_plain_linear",
]

ENCODINGS = ("attention", "output", "feed_forward")
"""Where token-permuted rows enter the untrusted side: q, k and v; the output projection; the feed-forward."""


def inverse(permutation: Tensor) -> Tensor:
    """The inverse of (..., n) permutations."""
    places = torch.arange(permutation.shape[-1], device=permutation.device).expand(permutation.shape)
    return torch.empty_like(permutation).scatter_(-1, permutation, places)


def is_plain_linear(module: nn.Module) -> bool:
    """Whether `module(x)` is just `x @ weight.T + bias`: no subclass, no hook, no forward put around it."""
    is_hooked = module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module)
    return type(module) is nn.Linear and not is_hooked


@dataclass(frozen=True, repr=False)
class FeatureKey:
    """π_r of one layer: int64 index arrays.

    `query` (B, H, d) repeats `key` (B, G, d) over each group; `output` (B, H, d) undoes `value` (B, G, d) on the
    attention output; `key_inverse` and `value_inverse` (B, G, d) decode a cache.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    output: Tensor
    key_inverse: Tensor
    value_inverse: Tensor

    def __repr__(self) -> str:
        return f"FeatureKey(batch={self.key.shape[0]}, heads={self.key.shape[1]}, head_dim={self.key.shape[2]})"

    def select(self, sequences: Tensor) -> "FeatureKey":
        """The keys of the given sequences, (B',) int64."""
        return FeatureKey(*(getattr(self, f.name).index_select(0, sequences) for f in fields(self)))

    def decode_cache(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Plain K and V (B, G, N, d) from encoded ones."""
        return ops.permute_features(keys, self.key_inverse), ops.permute_features(values, self.value_inverse)


@dataclass(frozen=True, repr=False)
class TokenKey:
    """π_l of one encoding in one layer. Without index arrays it is the identity: a lone token has no order to hide.

    `entry` (B, T) leads from the rows' previous place into this encoding in one gather, with `redundant` (B, R, D)
    behind the previous rows; `position` (B, S) is where each token lies.
    """

    entry: Tensor | None = None
    position: Tensor | None = None
    redundant: Tensor | None = None

    def __repr__(self) -> str:
        return "TokenKey(identity)" if self.entry is None else f"TokenKey(rows={self.entry.shape[1]})"

    def enter(self, rows: Tensor) -> Tensor:
        """(B, N, D) in the previous order -> (B, T, D) in this one, with fresh redundant rows."""
        return rows if self.entry is None else ops.inject_permute(rows, self.entry, self.redundant)

    def enter_linear(self, rows: Tensor, linear: Any) -> Tensor:
        """`linear(enter(rows))`, as one permuted-gather product where the layer is a plain `nn.Linear`."""
        if self.entry is not None and is_plain_linear(linear):
            return ops.permuted_linear(rows, linear.weight, self.entry, self.redundant, linear.bias)
        projected: Tensor = linear(self.enter(rows))
        return projected

    def leave(self, rows: Tensor) -> Tensor:
        """(B, T, D) -> (B, S, D) in token order, redundant rows dropped."""
        return rows if self.position is None else ops.strip_restore(rows, self.position)


@dataclass(frozen=True, repr=False)
class LayerKeys:
    """The token keys of one layer in one forward pass.

    `residual_position` (B, T) is where each row of the attention encoding lies in the output encoding.
    """

    attention: TokenKey = TokenKey()
    output: TokenKey = TokenKey()
    feed_forward: TokenKey = TokenKey()
    residual_position: Tensor | None = None

    def __repr__(self) -> str:
        return f"LayerKeys({self.attention!r})"

    def add_residual(self, residual: Tensor, projected: Tensor) -> Tensor:
        """Residual rows (attention encoding) plus projected rows (output encoding), both (B, T, D)."""
        if self.residual_position is None:
            return residual + projected
        return ops.strip_restore(projected, self.residual_position, residual)


@dataclass(frozen=True, repr=False)
class TokenKeys:
    """The token keys of all layers in one forward pass, stacked by encoding (E, in the order of ENCODINGS) and layer.

    `entry` (E, L, B, T), `position` (E, L, B, S), `residual_position` (L, B, T), and per encoding `redundant`
    (L, B, R, D) or None.
    """

    entry: Tensor
    position: Tensor
    residual_position: Tensor
    redundant: tuple[Tensor | None, ...]

    def __repr__(self) -> str:
        return f"TokenKeys(layers={len(self.residual_position)})"

    @classmethod
    def compose(cls, row_index: Tensor, redundant: tuple[Tensor | None, ...], tokens: int) -> "TokenKeys":
        """Compose every encoding's `row_index` (E, L, B, T) with the way the rows come.

        Rows enter `attention` from the feed-forward of the layer before (the first layer's from token order),
        `output` from token order, and `feed_forward` from `attention`.
        """
        attention, output, feed_forward = row_index
        position = inverse(row_index)
        redundant_num = attention.shape[-1] - tokens

        def enter(index: Tensor, previous_position: Tensor) -> Tensor:
            fetched = previous_position.gather(-1, index)
            # A redundant row is never carried along: it is fetched from the fresh ones, behind the previous rows.
            return torch.where(index < tokens, fetched, index + redundant_num)

        entry_attention = torch.cat((attention[:1], enter(attention[1:], position[2][:-1])))
        return cls(
            entry=torch.stack((entry_attention, output, enter(feed_forward, position[0]))),
            position=position[..., :tokens].contiguous(),
            residual_position=position[1].gather(-1, attention),
            redundant=redundant,
        )

    def layers(self, device: torch.device) -> list[LayerKeys]:
        """The keys layer by layer, on `device`."""
        count = len(self.residual_position)
        entry, position, residual_position = (x.to(device) for x in (self.entry, self.position, self.residual_position))
        encodings = [
            map(TokenKey, entry[i], position[i], [None] * count if redundant is None else redundant.to(device))
            for i, redundant in enumerate(self.redundant)
        ]
        return [LayerKeys(*keys) for keys in zip(*encodings, residual_position, strict=True)]


@dataclass(frozen=True, repr=False)
class Noise:
    """One-time noise of the first block: `noise` (B, T, D) and, per projection, its `image` (B, T, N).

    dtype: `scx_kernels.accumulation_dtype` of the model's.
    """

    noise: Tensor
    images: tuple[Tensor, ...]

    def __repr__(self) -> str:
        return f"Noise(batch={self.noise.shape[0]}, rows={self.noise.shape[1]})"

    def __getitem__(self, rows: slice) -> "Noise":
        return Noise(self.noise[:, rows], tuple(image[:, rows] for image in self.images))


@dataclass(frozen=True)
class RedundantScale:
    """Per layer and feature, the scale of real rows where they enter each encoding: (L, D), (L, H·d), (L, D)."""

    attention: Tensor
    output: Tensor
    feed_forward: Tensor
