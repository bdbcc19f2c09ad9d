"""What a case of an operation is: inputs, who computes the same or less from them, what must move and be computed.

Notation as in `scx_kernels.reference`: S tokens, R redundant rows, T = S + R, D, H, G, d.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from types import SimpleNamespace as Inputs
from typing import Any

import torch
from torch import Tensor

import scx_kernels as ops
from bench.shapes import SHAPES, SMALL_SHAPES, Shape

__all__ = [
    "BOUND",
    "RIVAL",
    "SCX",
    "TRITON",
    "Case",
    "Contestant",
    "Inputs",
    "Operation",
    "appended",
    "by_triton",
    "copied",
    "copy_of",
    "gathered",
    "moved",
    "permutations",
    "randn",
    "rows_from",
    "weights",
    "wide",
]

SCX, TRITON, RIVAL, BOUND = "scx", "triton", "rival", "bound"
"""What a contestant is: the path that users run; Triton where that path chooses something else; what would run
otherwise; a limit, which does less than the work."""


@dataclass(frozen=True)
class Case:
    """One operation at one size. `cached`: keys that a cache holds before the pass (of a generation step: in all).
    `rounds`: of the cipher that seals the cache, 0 for none. `headline`: in the short table."""

    operation: str
    model: str
    tokens: int
    redundant: int = 0
    batch: int = 1
    cached: int = 0
    dtype: str = "bfloat16"
    headline: bool = False
    rounds: int = 0

    @property
    def shape(self) -> Shape:
        return SMALL_SHAPES[self.model] if self.model in SMALL_SHAPES else SHAPES[self.model]

    @property
    def rows(self) -> int:
        """T, the encoded rows of a sequence."""
        return self.tokens + self.redundant

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)

    @property
    def itemsize(self) -> int:
        return self.torch_dtype.itemsize

    @property
    def id(self) -> str:
        size = f"cached={self.cached}" if self.cached else f"tokens={self.tokens}/redundant={self.redundant}"
        if self.cached and self.tokens > 1:
            size += f"/tokens={self.tokens}"
        sealed = f"/rounds={self.rounds}" if self.rounds else ""
        return f"operations/{self.operation}/{self.model}/{size}/batch={self.batch}/{self.dtype}{sealed}"


@dataclass(frozen=True)
class Contestant:
    """Someone who computes from the inputs.

    Not timed: `within` is entered around all calls; `finish` adds what a result lacks to be compared.
    """

    name: str
    kind: str
    call: Callable[[Inputs], Any]
    within: Callable[[], AbstractContextManager[Any]] = nullcontext
    finish: Callable[[Inputs, Any], Any] = lambda inputs, result: result


@dataclass(frozen=True)
class Operation:
    """One operation.

    `make` draws inputs; `contestants` compute from them; `plain` is the reference in the same dtype, `exact` the
    part of the result in float64 that `select` leaves of the others (all of it, as a rule; `plain` on widened inputs).
    `bytes` counts every input read once and every output written once, `flops` a multiplication and an addition as
    two; `copied` is what a copy is held against, `bytes` as a rule; `keystream` counts the bytes of a cipher's that the
    work cannot do without. `writes`: a call changes its inputs. `rounding`: of a result where operands are taken in a
    narrower dtype than its own, relative to the largest element.
    """

    make: Callable[[Case, torch.device], Inputs]
    contestants: Callable[[Case], tuple[Contestant, ...]]
    plain: Callable[[Inputs], Any]
    bytes: Callable[[Case], int]
    flops: Callable[[Case], int]
    copied: Callable[[Case], int] | None = None
    keystream: Callable[[Case], int] = lambda case: 0
    exact: Callable[[Inputs], Any] | None = None
    select: Callable[[Inputs, Any], Any] = lambda inputs, result: result
    writes: bool = False
    rounding: Callable[[Inputs], float] = lambda inputs: 0.0

    def copied_bytes(self, case: Case) -> int:
        return (self.copied or self.bytes)(case)


def _each(inputs: Inputs, change: Callable[[Tensor], Tensor]) -> Inputs:
    def changed(x: Any) -> Any:
        if isinstance(x, (list, tuple)):
            return type(x)(changed(y) for y in x)
        return change(x) if isinstance(x, Tensor) else x

    return Inputs(**{name: changed(x) for name, x in vars(inputs).items()})


def wide(inputs: Inputs) -> Inputs:
    """The same inputs in float64; index arrays stay."""
    return _each(inputs, lambda x: x.double() if x.is_floating_point() else x)


def copied(inputs: Inputs) -> Inputs:
    """The same inputs in memory of their own."""
    return _each(inputs, Tensor.clone)


def moved(inputs: Inputs, device: torch.device) -> Inputs:
    """The same inputs on another device."""
    return _each(inputs, lambda x: x.to(device))


def randn(case: Case, device: torch.device, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
    return torch.randn(*shape, device=device, dtype=dtype or case.torch_dtype)


def weights(case: Case, device: torch.device, outputs: int, inputs: int) -> Tensor:
    """(N, D) at the scale that keeps a product's size that of its input."""
    return randn(case, device, outputs, inputs).mul_(inputs**-0.5)


def permutations(device: torch.device, *shape: int) -> Tensor:
    return torch.rand(*shape, device=device).argsort(-1)


def rows_from(x: Tensor, index: Tensor) -> Tensor:
    """Rows of (1, N, D) as users without SCX's operations take them."""
    return x[0].index_select(0, index[0])[None]


def appended(x: Tensor, redundant: Tensor | None) -> Tensor:
    return x if redundant is None else torch.cat((x, redundant), dim=1)


def gathered(x: Tensor, feature_index: Tensor) -> Tensor:
    """Features of (B, H, S, d) as users without SCX's operations take them."""
    return x.gather(-1, feature_index[:, :, None].expand(x.shape))


def copy_of(bytes_: Callable[[Case], int], case: Case, what: str = "the same bytes") -> Contestant:
    """A plain copy that reads and writes together as many bytes."""
    held: dict[torch.device, tuple[Tensor, Tensor]] = {}

    def call(inputs: Inputs) -> None:
        device = next(x.device for x in vars(inputs).values() if isinstance(x, Tensor))
        if device not in held:
            source = torch.randint(256, (max(1, bytes_(case) // 2),), dtype=torch.uint8, device=device)
            held[device] = source, torch.empty_like(source)
        source, target = held[device]
        target.copy_(source)

    return Contestant(f"copy of {what}", BOUND, call)


def by_triton(call: Callable[[Inputs], Any]) -> Contestant:
    """SCX with its kernel where it would take PyTorch's."""
    return Contestant("SCX, Triton", TRITON, call, within=lambda: ops.backend("triton"))
