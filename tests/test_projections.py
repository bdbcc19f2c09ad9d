"""Noise is taken off behind what a projection computes now, whatever that is, as long as it is linear."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

from scx.projections import noise_images, project_noisy, project_quiet
from scx_kernels import accumulation_dtype

IN, OUT = 48, 20


class Adapted(nn.Module):
    """A projection with a low-rank adapter beside it."""

    def __init__(self, base: nn.Linear, drop: float = 0.0) -> None:
        super().__init__()
        self.base, self.drop = base, nn.Dropout(drop)
        self.down, self.up = nn.Linear(IN, 3, bias=False), nn.Linear(3, OUT, bias=False)

    def forward(self, rows: Tensor) -> Tensor:
        result: Tensor = self.base(rows) + self.up(self.down(self.drop(rows)))
        return result


class Scaled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 1.5 * weight


def hooked(change: Callable[[Tensor], Tensor]) -> nn.Linear:
    projection = nn.Linear(IN, OUT)
    projection.register_forward_hook(lambda module, args, out: change(out))
    return projection


def parametrised() -> nn.Linear:
    projection = nn.Linear(IN, OUT)
    parametrize.register_parametrization(projection, "weight", Scaled())
    return projection


LINEAR: dict[str, Callable[[], Any]] = {
    "plain": lambda: nn.Linear(IN, OUT),
    "without bias": lambda: nn.Linear(IN, OUT, bias=False),
    "adapted": lambda: Adapted(nn.Linear(IN, OUT), drop=0.5).eval(),
    "hooked": lambda: hooked(lambda out: 0.7 * out + 3.0),
    "parametrised": parametrised,
    "weight norm": lambda: parametrizations.weight_norm(nn.Linear(IN, OUT)),
}


@torch.no_grad()
@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", LINEAR)
def test_noise_comes_off(kind: str, dtype: torch.dtype, rows: int) -> None:
    """Rows under noise ten times their size give what the rows alone do, on either way, in half precision up to its
    rounding."""
    projection = LINEAR[kind]().to(dtype)
    x, noise = torch.randn(2, rows, IN).to(dtype), 10 * torch.randn(2, rows, IN)
    wide = accumulation_dtype(dtype)
    expected = projection.to(wide)(x.to(wide))
    projection.to(dtype)
    tolerance = 8 * torch.finfo(dtype).eps if dtype != wide else 1e-4
    (image,) = noise_images([projection], noise)
    (quiet,) = project_quiet([projection], x.to(wide) + noise, noise)
    for product in (project_noisy(projection, x.to(wide) + noise, image), quiet):
        assert product.dtype == dtype
        torch.testing.assert_close(
            product.to(wide), expected, rtol=tolerance, atol=tolerance * float(expected.abs().max())
        )
    assert project_noisy(projection, x.to(wide) + noise).dtype == wide


@torch.no_grad()
def test_the_image_is_of_the_weights_as_they_are() -> None:
    """A weight written to in place, past every counter of versions, changes the image with the product."""
    projection, x, noise = nn.Linear(IN, OUT), torch.randn(1, 1, IN), torch.randn(1, 1, IN)
    for _ in range(2):
        (image,) = noise_images([projection], noise)
        torch.testing.assert_close(project_noisy(projection, x + noise, image), projection(x), rtol=1e-4, atol=1e-4)
        projection.weight.data.mul_(3.0)


def rounded_to_eight_bits(out: Tensor) -> Tensor:
    step = out.abs().amax(dim=-1, keepdim=True) / 127
    return (out / step).round() * step


BENT: dict[str, Callable[[], Any]] = {
    "tanh": lambda: hooked(torch.tanh),
    "magnitude": lambda: hooked(torch.abs),
    "eight bits": lambda: hooked(rounded_to_eight_bits),
    "half precision inside": lambda: hooked(lambda out: out.bfloat16().float()),
    "drops": lambda: Adapted(nn.Linear(IN, OUT), drop=0.5).train(),
}


@torch.no_grad()
@pytest.mark.parametrize("kind", BENT)
def test_what_is_not_linear_is_refused_by_name(kind: str) -> None:
    noise = 10 * torch.randn(1, 1, IN)
    with pytest.raises(ValueError, match=r"layers.4.self_attn.k_proj \((Linear|Adapted)\): alp=True needs a linear"):
        noise_images([nn.Linear(IN, OUT), BENT[kind]()], noise, layer=4)


def test_gradients_are_those_of_the_rows_alone() -> None:
    """What the noise adds to a weight's gradient goes with its image, whichever way the product takes."""
    for kind in ("plain", "adapted"):
        for rows in (1, 4):
            projection = LINEAR[kind]()
            x, noise = torch.randn(2, rows, IN), torch.randn(2, rows, IN)
            expected = torch.autograd.grad(projection(x).square().sum(), list(projection.parameters()))
            (product,) = project_quiet([projection], x + noise, noise)
            got = torch.autograd.grad(product.square().sum(), list(projection.parameters()))
            for a, b in zip(expected, got, strict=True):
                torch.testing.assert_close(b, a, rtol=1e-3, atol=1e-3 * float(a.abs().max()))
