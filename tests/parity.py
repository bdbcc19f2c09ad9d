"""What the kernels' parity tests share. They run on the GPU where there is one, else in Triton's interpreter.

The property: the error against a float64 reference is at most twice that of plain PyTorch in the same dtype, every
element is written, strides are honoured whatever they are, and a kernel that runs again gives the same bits.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# Where PyTorch happens to be exact, one rounding of the result is still allowed (relative to its largest element).
FLOOR = {torch.float32: 2.0**-22, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
# What tests need beyond PyTorch and pytest; a machine without one runs the others.
PACKAGES = ("cryptography", "hypothesis", "safetensors", "transformers", "triton")


@dataclass(frozen=True)
class Mode:
    """How kernels run in these tests: the command line's `--tiles` and `--repeats`."""

    tiles: str = "small"
    repeats: int = 1


MODE = Mode()


def is_missing(package: str) -> bool:
    return find_spec(package) is None


def missing_package(error: BaseException | None) -> str | None:
    """The package of `PACKAGES` that an import failed for; None for any other failure, an installed one's above all."""
    while error is not None:
        package = (getattr(error, "name", None) or "").partition(".")[0]
        if isinstance(error, ImportError) and package in PACKAGES and is_missing(package):
            return package
        error = error.__cause__ or error.__context__
    return None


def needs(*packages: str) -> pytest.MarkDecorator:
    """Skips a test where one of these packages is missing, and says which."""
    missing = [package for package in packages if is_missing(package)]
    return pytest.mark.skipif(bool(missing), reason=f"waits for the package {', '.join(missing)}")


def tensors(result: Any) -> tuple[Tensor, ...]:
    return (result,) if isinstance(result, Tensor) else tuple(result)


def same_bits(a: Tensor, b: Tensor) -> bool:
    """NaN equals NaN of the same payload, and no zero equals a negative one."""
    integer = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    return a.dtype == b.dtype and torch.equal(a.view(integer), b.view(integer))


def assert_same_bits(got: Tensor, expected: Tensor) -> None:
    assert got.shape == expected.shape
    assert same_bits(got, expected)


def run_kernel(
    launcher: Callable[..., Any],
    *args: Any,
    tile: dict[str, Any] | None = None,
    writes: tuple[str, ...] = ("out", "keys", "values"),
    **options: Any,
) -> Any:
    """The result of a launcher, run as often as `--repeats` says: each time into outputs full of NaN, or of what the
    test put there, and each time with the same bits, on a GPU the sign of a kernel without races.

    Args:
        tile: what the test forces; `--tiles production` leaves the choice to the launcher.
        writes: names of the arguments that the kernel writes into, where they are given.
    """
    assert torch.are_deterministic_algorithms_enabled(), "outputs that the launcher allocates would hold old results"
    if tile is not None and MODE.tiles == "small":
        options["tile"] = tile
    written = [options[name] for name in writes if options.get(name) is not None]
    before = [x.clone() for x in written]
    first: list[Tensor] = []
    result = None
    for run in range(MODE.repeats):
        for x, content in zip(written, before, strict=True):
            x.copy_(content)
        result = launcher(*args, **options)
        given = [*tensors(result), *written]
        if run == 0 and MODE.repeats > 1:
            first = [x.clone() for x in given]
        for a, b in zip(first, given, strict=bool(first)):
            assert same_bits(a, b), f"run {run + 1} gave other bits than the first"
    return result


@contextmanager
def as_users_run() -> Iterator[None]:
    """PyTorch's own choice of algorithms, and memory as it comes: what a captured graph and the sync-error mode need,
    for deterministic algorithms (`scatter_`'s, for one) copy from the host."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(False)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


@contextmanager
def nobody_waits() -> Iterator[None]:
    """On a GPU, an operation within it that waits for the device raises."""
    with as_users_run():
        if DEVICE.type != "cuda":
            yield
            return
        before = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode(before)


class Replay:
    """A captured call: `results` are what it gave, and hold what it gives from its inputs' present values after every
    `replay()`. On a GPU that is a CUDA graph; elsewhere a stand-in calls again, which rehearses the tests of graphs."""

    def __init__(self, call: Callable[[], Any], inputs: Any = ()) -> None:
        """On a GPU the call runs three times: twice to compile and to draw memory, once into the graph.

        inputs: any nest of tensors that its results may be, for a call that writes into what it is given."""
        self._call, self._graph = call, None
        with as_users_run():
            for _ in range(2 if DEVICE.type == "cuda" else 1):
                self.results = tensors(call())
            if DEVICE.type == "cuda":
                torch.cuda.synchronize()
                self._graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(self._graph):
                    self.results = tensors(call())
        given = {x.data_ptr() for x in tree_leaves(inputs) if isinstance(x, Tensor)}
        self._fresh = [x for x in self.results if x.data_ptr() not in given]

    def replay(self) -> None:
        """Into fresh results full of NaN: what the graph does not write is seen."""
        for x in self._fresh:
            x.fill_(float("nan") if x.is_floating_point() else torch.iinfo(x.dtype).max)
        if self._graph is not None:
            self._graph.replay()
            return
        with as_users_run():
            for x, value in zip(self.results, tensors(self._call()), strict=True):
                x.copy_(value)


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


def integers(*values: int) -> Tensor:
    return torch.tensor(values, device=DEVICE)


def noise_steps(*shape: int, size: float = 8.0) -> dict[str, Any]:
    """Noise for `inject_permute`, `size` times as large as `randn`."""
    return {"noise": (2.0**22 * size * torch.randn(*shape, device=DEVICE)).int(), "noise_step": 2.0**-22}


def nans(*shape: int, dtype: torch.dtype, layout: str = "plain") -> Tensor:
    return randn(*shape, dtype=dtype, layout="plain" if layout == "expanded" else layout).fill_(float("nan"))


def of_own_sums(dtype: torch.dtype) -> int:
    """How much farther than plain PyTorch's own error a result may be: in float32 on a GPU, kernels add products one by
    one, where BLAS adds blocks of them."""
    return 4 if DEVICE.type == "cuda" and dtype == torch.float32 else 1


def assert_close(got: Tensor, plain: Tensor, exact: Tensor, dtype: torch.dtype | None = None) -> None:
    assert got.shape == exact.shape
    assert not got.isnan().any(), "an element was not written"
    exact = exact.double()
    usual = 2 * of_own_sums(got.dtype) * (plain.double() - exact).abs().max()
    allowed = usual + FLOOR[dtype or got.dtype] * exact.abs().max()
    error = (got.double() - exact).abs().max()
    assert error <= allowed, f"error {error:.3g}, allowed {allowed:.3g}"


def wide(*tensors: Tensor | None) -> list[Tensor | None]:
    """float64 copies; index arrays and None pass through."""
    return [x.double() if x is not None and x.is_floating_point() else x for x in tensors]
