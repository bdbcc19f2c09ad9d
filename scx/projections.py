"""What projections make of rows under noise, and of the noise alone: as they are now, with whatever is around them.

A projection is plain if its weight says all. Any other, with an adapter, hooks or a parametrised weight, is called.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

import scx_kernels as ops
from scx.architecture import QKV, is_plain_linear

__all__ = ["noise_images", "project_noisy", "project_quiet", "projection_dtype"]

_ROUNDING = 1e-4  # of float32, in sums over some thousand features, relative to the largest


def projection_dtype(module: Any) -> torch.dtype:
    """The dtype of a projection's weight; of one without, that of its first floating parameter."""
    weight = getattr(module, "weight", None)
    if isinstance(weight, Tensor):
        return weight.dtype
    return next(x.dtype for x in module.parameters() if x.is_floating_point())


def project_noisy(module: Any, rows: Tensor, image: Tensor | None = None) -> Tensor:
    """`module(rows)` for rows under noise, multiplied in their own dtype.

    Args:
        module: a linear layer, D features to N.
        rows: (B, T, D) in `scx_kernels.accumulation_dtype` of the module's dtype.
        image: of their noise, (B, T, N) in the rows' dtype, to be taken off; None leaves it in.

    Returns: (B, T, N) in the module's dtype; in the rows' while noise is still in it.
    """
    if is_plain_linear(module):
        return ops.permuted_linear(rows, module.weight, bias=module.bias, image=image)
    product = _call_wide(module, rows)
    return product if image is None else (product - image).to(projection_dtype(module))


def noise_images(modules: Sequence[Any], noise: Tensor, layer: int = 0) -> tuple[Tensor, ...]:
    """What additive noise becomes behind q, k and v of a layer, without their biases.

    Args:
        modules: linear layers, D features to N each.
        noise: (B, T, D) in `scx_kernels.accumulation_dtype` of the modules' dtype.
        layer: that they belong to, for the error.

    Returns: (B, T, N) each, in the noise's dtype.
    Raises: ValueError for a module that is not linear, or computes less precisely than the noise's dtype.
    """
    if all(is_plain_linear(module) for module in modules):
        return _products(modules, noise)
    names = (f"layers.{layer}.self_attn.{name}" for name in QKV)
    return tuple(_image(module, noise, name) for module, name in zip(modules, names, strict=False))


def project_quiet(modules: Sequence[Any], rows: Tensor, noise: Tensor, layer: int = 0) -> list[Tensor]:
    """The products of rows (B, T, D) that carry `noise` (B, T, D), with its images off: (B, T, N) each.

    Arguments and errors as of `project_noisy` and `noise_images`.
    """
    if rows.shape[1] > 1 or not all(is_plain_linear(module) for module in modules):
        images = noise_images(modules, noise, layer)
        return [project_noisy(module, rows, image) for module, image in zip(modules, images, strict=True)]
    # A lone row costs what reading the weights costs: once for it and its noise.
    pairs = zip(modules, _products(modules, torch.cat((rows, noise), dim=1)), strict=True)
    return [_with_bias(both[:, :1] - both[:, 1:], module) for module, both in pairs]


def _products(modules: Sequence[Any], rows: Tensor) -> tuple[Tensor, ...]:
    """`rows @ weight.T` of plain projections, in the rows' dtype."""
    weights = [module.weight for module in modules]
    if all(weight.dtype == rows.dtype for weight in weights):
        return ops.permuted_linears(rows, weights)
    return tuple(ops.permuted_linear(rows, weight) for weight in weights)


def _with_bias(product: Tensor, module: Any) -> Tensor:
    product = product if module.bias is None else product + module.bias.to(product.dtype)
    return product.to(module.weight.dtype)


def _image(module: Any, noise: Tensor, name: str) -> Tensor:
    one, zero = noise[:, :1], torch.zeros_like(noise[:, :1])
    other = one.roll(1, -1)
    products = _call_wide(module, torch.cat((noise, other, one + other, zero), dim=1))
    images = products - products[:, -1:]
    of_other, of_both = images[:, -3:-2], images[:, -2:-1]
    _check_linear(images[:, :1], of_other, of_both, f"{name} ({type(module).__name__})")
    return images[:, :-3]


def _check_linear(one: Tensor, other: Tensor, both: Tensor, place: str) -> None:
    """The image of a sum is the sum of images, unless something on the way bends, rounds or drops."""
    sizes = torch.stack((both - one - other, both)).detach().abs().amax(dim=(1, 2, 3))
    if not sizes[0] <= _ROUNDING * sizes[1]:
        raise ValueError(
            f"{place}: alp=True needs a linear projection behind which the noise's image can be taken off; here the "
            "image of the sum of two rows is not the sum of their images. Use eval() if it drops at random, alp=False "
            "otherwise"
        )


def _call_wide(module: nn.Module, rows: Tensor) -> Tensor:
    """`module(rows)` in the rows' dtype, to which parameters and buffers are cast."""
    named = (*module.named_parameters(), *module.named_buffers())
    cast = {name: x.to(rows.dtype) for name, x in named if x.is_floating_point() and x.dtype != rows.dtype}
    with torch.autocast(rows.device.type, enabled=False):
        product: Tensor = torch.func.functional_call(module, cast, (rows,)) if cast else module(rows)
    return product
