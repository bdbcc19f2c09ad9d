"""What the secure side does to a tensor: the keys as objects that encode and decode.

Index arrays and their direction are described in `scx_kernels.reference`. Notation: B sequences, S tokens, R redundant
rows, T = S + R, D features, H query heads, G key/value heads, d head size, L layers.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn

import scx_kernels as ops
from scx.architecture import is_plain_rms_norm
from scx.devices import upload
from scx.projections import noise_images, projection_dtype
from scx_kernels.hidden import Hidden, guarded

__all__ = [
    "ENCODINGS",
    "CrossingKey",
    "FeatureKey",
    "LayerKeys",
    "Noise",
    "RedundantScale",
    "ResidualKey",
    "RowKey",
    "TokenKeys",
    "inverse",
    "noise_step",
]

ENCODINGS = ("attention", "output", "feed_forward")
"""Where token-permuted rows enter the untrusted side: q, k and v; the output projection; the feed-forward."""
_ENTERED = dict(zip(ENCODINGS, ("the attention", "the output projection", "the feed-forward"), strict=True))


def inverse(permutation: Tensor) -> Tensor:
    """The inverse of (..., n) permutations."""
    places = torch.arange(permutation.shape[-1], device=permutation.device).expand(permutation.shape)
    return torch.empty_like(permutation).scatter_(-1, permutation, places)


class FeatureKey(Hidden):
    """π_r of one layer: int64 index arrays.

    `query` (B, H, d) repeats `key` (B, G, d) over each group; `output` (B, H, d) undoes `value` (B, G, d) on the
    attention output; `key_inverse` and `value_inverse` (B, G, d) decode a cache.
    """

    __slots__ = ("key", "key_inverse", "output", "query", "value", "value_inverse")

    def __init__(
        self, query: Tensor, key: Tensor, value: Tensor, output: Tensor, key_inverse: Tensor, value_inverse: Tensor
    ) -> None:
        self.query = query
        self.key = key
        self.value = value
        self.output = output
        self.key_inverse = key_inverse
        self.value_inverse = value_inverse

    def __repr__(self) -> str:
        return f"FeatureKey(batch={self.key.shape[0]}, heads={self.key.shape[1]}, head_dim={self.key.shape[2]})"

    @classmethod
    def compose(cls, key: Tensor, value: Tensor, groups: int, device: torch.device) -> "FeatureKey":
        """The key on `device`, from the permutations of K and V, (B, G, d) each, and query heads per group."""
        key_inverse, value_inverse = inverse(key), inverse(value)
        query, output = (index.repeat_interleave(groups, dim=1) for index in (key, value_inverse))
        return cls(*(upload(x, device) for x in (query, key, value, output, key_inverse, value_inverse)))

    @classmethod
    def identity(
        cls, batch: int, num_heads: int, num_kv_heads: int, head_dim: int, device: torch.device
    ) -> "FeatureKey":
        """The key that leaves every feature where it is."""
        plain = torch.arange(head_dim, device=device)
        query, kv = (plain.expand(batch, heads, head_dim) for heads in (num_heads, num_kv_heads))
        return cls(query, kv, kv, query, kv, kv)

    @guarded
    def select(self, sequences: Tensor) -> "FeatureKey":
        """The keys of the given sequences, (B',) int64."""
        return FeatureKey(**{name: getattr(self, name).index_select(0, sequences) for name in FeatureKey.__slots__})

    def encode(
        self, products: Sequence[Tensor], cos: Tensor, sin: Tensor, position: Tensor | None = None, **options: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The products of rows -> q (B, H, S, d), k and v (B, G, S, d) in token order, rotated, features permuted.

        Args:
            products: of q, k and v, (B, T, *) each. cos, sin: (B or 1, S, d).
            position: (B, S), where each token lies among the rows; None for rows in token order.
            options: the other arguments of `qkv_decode_encode`: norms of heads, images of noise, a cache to write into.
        """
        q, k, v = products
        return ops.qkv_decode_encode(q, k, v, position, cos, sin, self.query, self.key, self.value, **options)

    @guarded
    def encode_cache(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Encoded K and V (B, G, N, d) from plain ones, rotated and in token order."""
        return ops.permute_features(keys, self.key), ops.permute_features(values, self.value)

    @guarded
    def decode_cache(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Plain K and V (B, G, N, d) from encoded ones."""
        return ops.permute_features(keys, self.key_inverse), ops.permute_features(values, self.value_inverse)


class RowKey(Hidden):
    """π_l and r of one encoding of rows. Without index arrays it is the identity: a lone token has no order to hide.

    Rows come in token order, or from the residual stream, which lies under an encoding of its own (`ResidualKey`):
    `entry` (B, T) leads into this encoding in one gather, with `redundant` (B, R, F) behind the rows that come.
    `position` (B, S) is where each token lies here, `back` (B, T) where each row of the residual stream does.
    """

    __slots__ = ("back", "entry", "position", "redundant")

    def __init__(
        self,
        entry: Tensor | None = None,
        position: Tensor | None = None,
        redundant: Tensor | None = None,
        back: Tensor | None = None,
    ) -> None:
        self.entry = entry
        self.position = position
        self.redundant = redundant
        self.back = back

    def __repr__(self) -> str:
        return "RowKey(identity)" if self.entry is None else f"RowKey(rows={self.entry.shape[1]})"

    def enter(self, rows: Tensor, norm: nn.Module | None = None, noise: "Noise | None" = None) -> Tensor:
        """(B, N, F) -> the (B, T, F) rows of this encoding, with fresh redundant rows; normalised and under noise if
        these are given."""
        redundant = self.redundant_as(rows.dtype)
        added: dict[str, Any] = {} if noise is None else {"noise": noise.steps, "noise_step": noise.step}
        if norm is None:
            is_identity = self.entry is None and noise is None
            return rows if is_identity else ops.inject_permute(rows, self.entry, redundant, **added)
        if is_plain_rms_norm(norm) and norm.weight.dtype == rows.dtype:
            weight: Any = norm.weight
            eps: Any = norm.variance_epsilon
            return ops.inject_permute(rows, self.entry, redundant, norm_weight=weight, eps=eps, **added)
        entered: Tensor = norm(rows if self.entry is None else ops.inject_permute(rows, self.entry, redundant))
        return entered if noise is None else ops.inject_permute(entered, None, **added)

    def redundant_as(self, dtype: torch.dtype) -> Tensor | None:
        """The redundant rows, in the dtype of those that come."""
        return None if self.redundant is None else self.redundant.to(dtype)

    def enter_heads(self, heads: Tensor, feature_index: Tensor) -> Tensor:
        """(B, S, H, d) attention output -> (B, T, H*d) encoded rows, their features in the order of feature_index."""
        redundant = self.redundant_as(heads.dtype)
        return ops.inject_permute(heads.flatten(2), self.entry, redundant, feature_index=feature_index)

    def leave(self, rows: Tensor) -> Tensor:
        """(B, T, F) -> (B, S, F) in token order, redundant rows dropped."""
        return rows if self.position is None else ops.strip_restore(rows, self.position)

    def add_to(self, residual: Tensor, rows: Tensor) -> Tensor:
        """The residual stream plus rows of this encoding, both (B, T, D), in the wider dtype of the two."""
        if self.back is None:
            return residual + rows
        if rows.dtype != residual.dtype:
            wider = torch.promote_types(rows.dtype, residual.dtype)
            rows, residual = rows.to(wider), residual.to(wider)
        return ops.strip_restore(rows, self.back, residual)


class CrossingKey(RowKey):
    """The key of rows that cross a boundary, from token order and back."""

    __slots__ = ()

    entry: Tensor
    position: Tensor


_IDENTITY = RowKey()


class LayerKeys(Hidden):
    """The row keys of one layer in one forward pass, by the names of ENCODINGS."""

    __slots__ = ("attention", "feed_forward", "output")

    def __init__(
        self, attention: RowKey = _IDENTITY, output: RowKey = _IDENTITY, feed_forward: RowKey = _IDENTITY
    ) -> None:
        self.attention = attention
        self.output = output
        self.feed_forward = feed_forward

    def __repr__(self) -> str:
        return f"LayerKeys({self.attention!r})"


class ResidualKey(Hidden):
    """The encoding of the residual stream in one forward pass: `entry` (B, T) from token order, `position` (B, S) of
    each token, and the vocabulary's tokens `decoys` (B, R) whose embeddings start as its redundant rows."""

    __slots__ = ("decoys", "entry", "position")

    def __init__(self, entry: Tensor, position: Tensor, decoys: Tensor) -> None:
        self.entry = entry
        self.position = position
        self.decoys = decoys

    def __repr__(self) -> str:
        return f"ResidualKey(rows={self.entry.shape[1]})"

    def embed(self, embedding: nn.Module, input_ids: Tensor) -> Tensor:
        """(B, S) tokens -> their embeddings as (B, T, D) encoded rows; plain ones never lie in memory."""
        tokens = torch.cat((input_ids, self.decoys.to(input_ids.dtype)), dim=1)
        rows: Tensor = embedding(tokens.gather(1, self.entry))
        return rows

    def embed_decoys(self, embedding: nn.Module, like: Tensor) -> Tensor | None:
        """The (B, R, D) redundant rows to begin with, in the dtype and on the device of `like`; None for R = 0. Hooks
        of the embedding are for tokens, and do not see them."""
        if not self.decoys.shape[1]:
            return None
        with torch.no_grad():
            return embedding.forward(self.decoys).to(like.device, like.dtype)

    def enter(self, rows: Tensor, redundant: Tensor | None) -> Tensor:
        """(B, S, D) rows in token order and (B, R, D) redundant ones -> (B, T, D) encoded rows."""
        return ops.inject_permute(rows, self.entry, redundant)

    def redundant(self, rows: Tensor) -> Tensor | None:
        """The (B, R, D) redundant rows among (B, T, D) encoded ones, for `enter`; None for R = 0."""
        if not self.decoys.shape[1]:
            return None
        places = inverse(self.entry)[:, self.position.shape[1] :]
        return ops.strip_restore(rows.detach(), places.contiguous())

    def leave(self, rows: Tensor) -> Tensor:
        """(B, T, D) -> (B, S, D) in token order, redundant rows dropped."""
        return ops.strip_restore(rows, self.position)


class TokenKeys(Hidden):
    """The row keys of all layers in one forward pass, stacked by encoding (E, in the order of ENCODINGS) and layer.

    `entry` (E, L, B, T), `back` (2, L, B, T) of output and feed-forward, `position` (L, B, S) of attention, and per
    encoding `redundant` (L, B, R, D) or None.
    """

    __slots__ = ("back", "entry", "position", "redundant", "residual")

    def __init__(
        self,
        residual: ResidualKey,
        entry: Tensor,
        back: Tensor,
        position: Tensor,
        redundant: tuple[Tensor | None, ...],
    ) -> None:
        self.residual = residual
        self.entry = entry
        self.back = back
        self.position = position
        self.redundant = redundant

    def __repr__(self) -> str:
        return f"TokenKeys(layers={self.entry.shape[1]})"

    @classmethod
    def compose(
        cls, row_index: Tensor, residual_index: Tensor, decoys: Tensor, redundant: tuple[Tensor | None, ...]
    ) -> "TokenKeys":
        """Compose every encoding's `row_index` (E, L, B, T) with that of the residual stream, (B, T).

        Rows enter `attention` and `feed_forward` from the residual stream, `output` from token order; `output` and
        `feed_forward` return to the residual stream, redundant rows onto its redundant rows.
        """
        tokens = residual_index.shape[1] - decoys.shape[1]
        attention, output, feed_forward = row_index
        residual_position, place = inverse(residual_index), residual_index.expand_as(attention)

        def enter(index: Tensor) -> Tensor:
            fetched = residual_position.expand_as(index).gather(-1, index)
            # A redundant row is never carried along: it is fetched from the fresh ones, behind the residual's rows.
            return torch.where(index < tokens, fetched, index + decoys.shape[1])

        return cls(
            residual=ResidualKey(residual_index, residual_position[:, :tokens], decoys),
            entry=torch.stack((enter(attention), output, enter(feed_forward))),
            back=torch.stack([inverse(index).gather(-1, place) for index in (output, feed_forward)]),
            position=inverse(attention)[..., :tokens],
            redundant=redundant,
        )

    def to(self, device: torch.device) -> "TokenKeys":
        """The keys on `device`, whose stream does not wait for the host."""
        residual = ResidualKey(**{name: upload(getattr(self.residual, name), device) for name in ResidualKey.__slots__})
        entry, back, position = (upload(x.contiguous(), device) for x in (self.entry, self.back, self.position))
        redundant = tuple(None if x is None else upload(x, device) for x in self.redundant)
        return TokenKeys(residual, entry, back, position, redundant)

    def layers(self) -> list[LayerKeys]:
        """The keys layer by layer."""
        absent: list[None] = [None] * self.entry.shape[1]
        redundant = [absent if x is None else x for x in self.redundant]
        attention = map(RowKey, self.entry[0], self.position, redundant[0])
        output = map(RowKey, self.entry[1], absent, redundant[1], self.back[0])
        feed_forward = map(RowKey, self.entry[2], absent, redundant[2], self.back[1])
        return [LayerKeys(*keys) for keys in zip(attention, output, feed_forward, strict=True)]


def noise_step(scale: float) -> float:
    """The grid of rows under noise of this scale: the power of two of which `scale` is 2^24 to 2^25 multiples.

    Finer than float32's rounding of most sums, so that it costs no precision; coarse enough for noise to be drawn as
    int32 and, up to 26 scales (of Laplace noise; 7 of normal), at every point (`KeyStream.laplace`).
    """
    return math.ldexp(1.0, math.frexp(scale)[1] - 25)


class Noise(Hidden):
    """One-time noise of a block's input: `steps` (B, T, D) int32, each of the public size `step`, a power of two.

    Rows are rounded to the same grid (`scx_kernels.inject_permute`), so that their sum with noise is the sum of every
    other row with some noise: no low bits tell rows apart. `images` (B, T, N) float32 are what it becomes behind q, k
    and v, where somebody has asked for them (`project`).
    """

    __slots__ = ("images", "step", "steps")

    def __init__(self, steps: Tensor, step: float, images: tuple[Tensor, ...] = ()) -> None:
        self.steps = steps
        self.step = step
        self.images = images

    def __repr__(self) -> str:
        return f"Noise(batch={self.steps.shape[0]}, rows={self.steps.shape[1]})"

    def values(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The noise itself, (B, T, D) in the dtype of the rows under it."""
        return self.steps.to(dtype, copy=True).mul_(self.step)

    def project(self, projections: Sequence[nn.Module], layer: int = 0) -> "Noise":
        """The same with the images that a layer's projections give it now.

        Raises: ValueError for a projection that is not linear.
        """
        wide = ops.accumulation_dtype(projection_dtype(projections[0]))
        return Noise(self.steps, self.step, noise_images(projections, self.values(wide), layer))


@dataclass(frozen=True)
class RedundantScale:
    """Per layer and feature, the scale of real rows where they enter each encoding: (L, D), (L, H·d), (L, D)."""

    attention: Tensor
    output: Tensor
    feed_forward: Tensor

    def to(self, device: torch.device) -> "RedundantScale":
        """The same on `device`."""
        return RedundantScale(*(getattr(self, f.name).to(device) for f in fields(self)))

    def check_finite(self) -> None:
        """Raises ValueError naming the first block and encoding whose rows are not finite."""
        for layer in range(len(self.attention)):
            for name in ENCODINGS:
                if (~getattr(self, name)[layer].isfinite()).any():
                    raise ValueError(
                        f"model: layers.{layer}, rows that enter {_ENTERED[name]} are not finite in a pass over random "
                        "tokens, and redundant rows must be like them. Look for weights that are not finite, or too "
                        "large for their dtype; with redundant_num=0 the model is encoded as it is"
                    )
