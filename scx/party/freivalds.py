"""Freivalds' test of products in floating point: whether z is x @ W.T + b, without multiplying by W.

For a secret vector r, z @ r must be x @ (Wᵀr) + b @ r, and Wᵀr is known from before (R. Freivalds, 1977; with floating
numbers as in Slalom, arXiv 1806.03287). The output features of a product fall into groups of at most 384, each with a
vector of its own, since what rounding may do to a group grows with it.

How far the two sides may be apart follows from the standard model of floating-point arithmetic (N. Higham, Accuracy and
Stability of Numerical Algorithms, 2nd edition, sections 2.2 and 3.1): with u the unit roundoff, sums of n terms in
any order are within γ_n = nu / (1 - nu) of the sum of magnitudes. So of a row x, whoever multiplied it honestly is
within γ·|x| @ |W|ᵀ|r|, and where the product was rounded to a half precision, within u·|z| @ |r| of that besides.

Entries of r are ±[½, 1), uniform. A group in which one element is off by more than four times the row's bound is always
noticed: by no less than three bounds there is a difference, of which rounding explains one. If several are, and whoever
altered them does not know r, a group is missed with a probability of at most twice the bound over the largest
alteration: r's entry there has density 1, and must lie in an interval of that length.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

import scx_kernels as ops
from scx_kernels.hidden import Hidden

__all__ = ["GROUP", "Comparison", "Sketch", "draw_vectors", "gamma", "unit_roundoff"]

GROUP = 384
"""Output features that share a bound, at most."""


def unit_roundoff(dtype: torch.dtype) -> float:
    """u: the largest relative error of rounding to the nearest."""
    return torch.finfo(dtype).eps / 2


def gamma(roundings: int, dtype: torch.dtype) -> float:
    """γ_n of n roundings in `dtype`, over 1 - γ_n: so that what it multiplies may itself be computed as carelessly."""
    nu = roundings * unit_roundoff(dtype)
    if nu >= 1 / 4:
        raise ValueError(f"verify: sums of {roundings} terms in {dtype} have no bound worth a check")
    return nu / (1 - 2 * nu)


@dataclass(frozen=True)
class Comparison:
    """What was found, `error`, and what rounding explains, `tolerance`, of the same shape, greater than 0."""

    error: Tensor
    tolerance: Tensor

    @property
    def ratio(self) -> float:
        """The largest error over its tolerance: at most 1 for honest results. NaN for what is not finite."""
        return float((self.error / self.tolerance).amax()) if self.error.numel() else 0.0


def draw_vectors(bits: Tensor) -> Tensor:
    """(G, n) float32 in ±[½, 1), from uniform int32 bits (N,), for G equal groups of at most `GROUP`."""
    size = next(n for n in range(min(GROUP, len(bits)), 0, -1) if len(bits) % n == 0)
    magnitude = (bits & (2**24 - 1)).float() * 2.0**-25 + 0.5  # exact
    return torch.where(bits < 0, -magnitude, magnitude).view(-1, size)


def _grouped(features: Tensor, vectors: Tensor) -> Tensor:
    """(T, N) with vectors (G, n) -> (T, G) dot products."""
    # One by one: each reads its features once and writes no products of them.
    parts = features.split(vectors.shape[1], dim=1)
    return torch.stack([part @ r for part, r in zip(parts, vectors, strict=True)], dim=1)


class Sketch(Hidden):
    """What the secure side keeps of P projections that share their rows, D features to N each, in G groups of all.

    `vectors`, of each projection, (G', n): secret. `images` (G, D): Wᵀr. `bounds` (P, D): the largest |W|ᵀ|r| of a
    projection's groups, which are much alike. `bias` (G,): b @ r. `bias_bound` (P,): the largest |b| @ |r|. All in the
    accumulation dtype of the weights. `projections` (G,) int64: of which projection each group is.
    """

    __slots__ = ("bias", "bias_bound", "bounds", "images", "projections", "vectors")

    def __init__(
        self,
        vectors: tuple[Tensor, ...],
        images: Tensor,
        bounds: Tensor,
        bias: Tensor,
        bias_bound: Tensor,
        projections: Tensor,
    ) -> None:
        self.vectors = vectors
        self.images = images
        self.bounds = bounds
        self.bias = bias
        self.bias_bound = bias_bound
        self.projections = projections

    def __repr__(self) -> str:
        return f"Sketch({self.images.shape[1]} features to {[r.numel() for r in self.vectors]})"

    @classmethod
    def of(cls, weights: Sequence[Tensor], biases: Sequence[Tensor | None], vectors: Sequence[Tensor]) -> "Sketch":
        """Of weights (N, D) and biases (N,), read group by group to where the vectors are."""
        found = [_images(*projection) for projection in zip(weights, biases, vectors, strict=True)]
        images, bounds, bias, bias_bound = (list(parts) for parts in zip(*found, strict=True))
        wide = ops.accumulation_dtype(weights[0].dtype)
        owners = [torch.full((len(r),), place) for place, r in enumerate(vectors)]
        return cls(
            tuple(r.to(wide) for r in vectors),
            torch.cat(images).to(wide),
            torch.stack(bounds).to(wide),
            torch.cat(bias).to(wide),
            torch.stack(bias_bound).to(wide),
            torch.cat(owners).to(vectors[0].device),
        )

    def compare(self, rows: Tensor, products: Sequence[Tensor]) -> Comparison:
        """Rows (*, D) and what is said to be their products (*, N), with their biases -> (rows, G).

        Products are computed in the accumulation dtype, and rounded to their own at last.
        """
        wide, features = self.images.dtype, self.images.shape[1]
        size = max(r.shape[1] for r in self.vectors)
        rows = rows.reshape(-1, features).to(wide)
        given = [
            (product.reshape(len(rows), -1).to(wide), r) for product, r in zip(products, self.vectors, strict=True)
        ]
        error = torch.cat([_grouped(z, r) for z, r in given], dim=1) - _linear(rows, self.images, self.bias)
        # The other side's sums over features, ours over features and over a group, and a few single roundings.
        roundings = 2 * features + 2 * size + 16
        # What underflows is off by less than the smallest normal number.
        least = size * max(torch.finfo(x.dtype).tiny for x in products) + roundings * size * torch.finfo(wide).tiny
        bounds = _linear(rows.abs(), self.bounds, self.bias_bound).mul_(gamma(roundings, wide)).add_(least)
        tolerance = bounds.expand_as(error) if len(given) == 1 else bounds[:, self.projections]
        narrow = products[0].dtype
        if narrow != wide:
            rounding = unit_roundoff(narrow) * (1 + 2 * gamma(size + 2, wide))
            tolerance = tolerance + torch.cat([_grouped(z.abs(), r.abs()) for z, r in given], dim=1) * rounding
        return Comparison(error.abs_(), tolerance)


def _images(weight: Tensor, bias: Tensor | None, vectors: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of one projection, in float64: images (G, D), the largest bounds (D,), b @ r (G,), and the largest |b| @ |r|."""
    images, bounds = [], torch.zeros(weight.shape[1], dtype=torch.float64, device=vectors.device)
    r = vectors.double()
    for group, part in zip(r, weight.detach().split(vectors.shape[1]), strict=True):
        w = part.to(r.device, torch.float64)
        images.append(group @ w)
        bounds = torch.maximum(bounds, group.abs() @ w.abs())
    b = torch.zeros_like(r) if bias is None else bias.detach().to(r.device, torch.float64).view_as(r)
    return torch.stack(images), bounds, (r * b).sum(dim=1), (r * b).abs().sum(dim=1).amax()


def _linear(rows: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Rows (T, D) with few vectors (G, D) -> (T, G), multiplied the other way round, which is faster for so few."""
    return torch.addmm(bias[:, None], weight, rows.t()).t()
