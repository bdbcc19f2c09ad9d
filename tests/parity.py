"""What the kernels' parity tests share. They run on the GPU where there is one, else in Triton's interpreter.

The property: the error against a float64 reference is at most twice that of plain PyTorch in the same dtype, every
element is written, and strides are honoured whatever they are.
"""

import pytest
import torch
from torch import Tensor

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# Where PyTorch happens to be exact, one rounding of the result is still allowed (relative to its largest element).
FLOOR = {torch.float32: 2.0**-22, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))


def randn(*shape: int, dtype: torch.dtype = torch.float32, layout: str = "plain") -> Tensor:
    """A random tensor of this shape; layout says how it lies in memory."""
    if layout == "transposed":
        return torch.randn(*shape[:-2], shape[-1], shape[-2], device=DEVICE).to(dtype).transpose(-1, -2)
    if layout == "sliced":
        wide = torch.randn(*shape[:-1], 2 * shape[-1] + 3, device=DEVICE).to(dtype)
        return wide[..., 1 : 2 * shape[-1] + 1 : 2]
    if layout == "expanded":
        return torch.randn(1, *shape[1:], device=DEVICE).to(dtype).expand(shape)
    return torch.randn(*shape, device=DEVICE).to(dtype)


def permutations(*shape: int) -> Tensor:
    """Random permutations of 0..shape[-1]-1 in the last dimension."""
    return torch.rand(*shape, device=DEVICE).argsort(-1)


def inverse(index: Tensor) -> Tensor:
    return index.argsort(-1)


def nans(*shape: int, dtype: torch.dtype, layout: str = "plain") -> Tensor:
    return randn(*shape, dtype=dtype, layout="plain" if layout == "expanded" else layout).fill_(float("nan"))


def assert_close(got: Tensor, plain: Tensor, exact: Tensor, dtype: torch.dtype | None = None) -> None:
    assert got.shape == exact.shape
    assert not got.isnan().any(), "an element was not written"
    exact = exact.double()
    allowed = 2 * (plain.double() - exact).abs().max() + FLOOR[dtype or got.dtype] * exact.abs().max()
    error = (got.double() - exact).abs().max()
    assert error <= allowed, f"error {error:.3g}, allowed {allowed:.3g}"


def wide(*tensors: Tensor | None) -> list[Tensor | None]:
    """float64 copies; index arrays and None pass through."""
    return [x.double() if x is not None and x.is_floating_point() else x for x in tensors]
