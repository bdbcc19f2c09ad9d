"""What a case of an operation is: inputs, who computes the same or less from them, what must move and be computed.

Notation as in `scx_kernels.reference`: S tokens, R redundant rows, T = S + R, D, H, G, d.
"""

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from inspect import Parameter, signature
from itertools import takewhile
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor

import scx_kernels as ops
from bench.shapes import Shape, shape_of
from bench.trees import tree_leaves, tree_map
from scx_kernels import reference

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
        return shape_of(self.model)

    @property
    def rows(self) -> int:
        """T, the encoded rows of a sequence."""
        return self.tokens + self.redundant

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)

    @property
    def id(self) -> str:
        size = f"cached={self.cached}" if self.cached else f"tokens={self.tokens}/redundant={self.redundant}"
        if self.cached and self.tokens > 1:
            size += f"/tokens={self.tokens}"
        sealed = f"/rounds={self.rounds}" if self.rounds else ""
        return f"operations/{self.operation}/{self.model}/{size}/batch={self.batch}/{self.dtype}{sealed}"


OF_RIVALS = ("encoded", "together", "opened")
"""The same numbers as rivals hold them."""


class Inputs(SimpleNamespace):
    """A case's inputs: the operation's arguments by their names, and what rivals alone take."""

    __slots__ = ("_call", "_unsealed")

    @property
    def given(self) -> dict[str, Any]:
        """The operation's arguments."""
        return {name: x for name, x in vars(self).items() if name not in OF_RIVALS}

    def call(self, function: Callable[..., Any], positional: tuple[str, ...]) -> Any:
        """A function of them, called as models call it; they are laid out once, so that this is not timed."""
        if not hasattr(self, "_call"):
            rest = self.given
            self._call = [rest.pop(name) for name in takewhile(rest.__contains__, positional)], rest
        arguments, options = self._call
        return function(*arguments, **options)

    @property
    def unsealed(self) -> "Inputs":
        """The same where the cache is permuted only."""
        if not hasattr(self, "_unsealed"):
            found = {name: x for name, x in vars(self).items() if name not in ("sealing", "return_unsealed")}
            self._unsealed = Inputs(**found)
            if "opened" in found:
                self._unsealed.k, self._unsealed.v = self.opened
        return self._unsealed


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


def rival(name: str, call: Callable[[Inputs], Any], **options: Any) -> Contestant:
    return Contestant(name, RIVAL, call, **options)


def bound(name: str, call: Callable[[Inputs], Any]) -> Contestant:
    return Contestant(name, BOUND, call)


@dataclass(frozen=True)
class Operation:
    """One operation, as `operation` describes it.

    `make` draws inputs; `contestants` compute from them; `plain` is the reference in the same dtype, `exact` the
    part of the result in float64 that `select` leaves of the others. `bytes` counts every input read once and every
    output written once, `flops` a multiplication and an addition as two; `copied_bytes` is what a copy is held against;
    `keystream` counts the bytes of a cipher's that the work cannot do without. `writes`: a call changes its inputs.
    `rounding`: of a result where operands are taken in a narrower dtype than its own, relative to the largest element.
    """

    make: Callable[[Case, torch.device], Inputs]
    contestants: Callable[[Case], tuple[Contestant, ...]]
    plain: Callable[[Inputs], Any]
    exact: Callable[[Inputs], Any]
    select: Callable[[Inputs, Any], Any]
    bytes: Callable[[Case], int]
    copied_bytes: Callable[[Case], int]
    keystream: Callable[[Case], int]
    flops: Callable[[Case], int]
    writes: bool
    rounding: Callable[[Inputs], float]


# How inputs are drawn.

LAYER = 3
META = torch.device("meta")
BY_POSITION = ("z", "z_q", "z_k", "z_v", "cache", "k", "v")
"""Encoded rows, which are read where `position` says that tokens lie."""


def key_of(device: torch.device) -> Tensor:
    """(8,) int32, a cipher's key."""
    return torch.randint(-(2**31), 2**31, (8,), device=device).int()


class Draw:
    """Draws the inputs of a case on a device."""

    def __init__(self, case: Case, device: torch.device) -> None:
        self.case, self.shape, self.device = case, case.shape, device

    def __call__(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.randn(*shape, device=self.device, dtype=dtype or self.case.torch_dtype)

    def rows(self, count: int, features: int, **options: Any) -> Tensor:
        """(B, count, features)."""
        return self(self.case.batch, count, features, **options)

    def heads(self, count: int, rows: int) -> Tensor:
        """(B, count, rows, d)."""
        return self(self.case.batch, count, rows, self.shape.head_dim)

    def order(self, *shape: int) -> Tensor:
        """(B, ...): permutations of the last dimension."""
        return torch.rand(self.case.batch, *shape, device=self.device).argsort(-1)

    def features(self, heads: int) -> Tensor:
        """(B, heads, d): a permutation for each head."""
        return self.order(heads, self.shape.head_dim)

    def position(self, rows: int, tokens: int) -> Tensor:
        """(B, tokens): where each lies among the rows."""
        return self.order(rows)[:, :tokens].contiguous()

    def to_encode(self, features: int) -> dict[str, Tensor | None]:
        """Tokens' rows, redundant ones if there are any, and their order."""
        redundant = self.case.redundant
        return {
            "x": self.rows(self.case.tokens, features),
            "row_index": self.order(self.case.rows),
            "redundant": self.rows(redundant, features) if redundant else None,
        }

    def weight(self, outputs: int, inputs: int) -> Tensor:
        """(N, D) at the scale that keeps a product's size that of its input."""
        return self(outputs, inputs).mul_(inputs**-0.5)

    def sealing(self, rows: int) -> ops.Sealing:
        """Of rows under numbers in a row, by the case's rounds."""
        key = key_of(self.device)
        writes = ops.WriteCounter().take(self.case.batch, rows, self.device)
        return ops.Sealing(key, writes, LAYER, self.case.rounds or 20)


def _each(inputs: Inputs, change: Callable[[Tensor], Tensor]) -> Inputs:
    return Inputs(**tree_map(lambda x: change(x) if isinstance(x, Tensor) else x, vars(inputs)))


def wide(inputs: Inputs) -> Inputs:
    """The same inputs in float64; index arrays stay."""
    return _each(inputs, lambda x: x.double() if x.is_floating_point() else x)


def copied(inputs: Inputs) -> Inputs:
    """The same inputs in memory of their own."""
    return _each(inputs, Tensor.clone)


def moved(inputs: Inputs, device: torch.device) -> Inputs:
    """The same inputs on another device."""
    return _each(inputs, lambda x: x.to(device))


# What is counted.


def nbytes(*values: Any) -> int:
    """Of the tensors in them, each counted once."""
    return sum({id(x): x.nbytes for x in tree_leaves(values) if isinstance(x, Tensor)}.values())


def read_of(i: Inputs) -> dict[str, Any]:
    """What is read of each argument: of encoded rows those that are tokens', of a cache that is written into none."""
    read = i.given
    if read.get("position") is not None:
        tokens = read["position"].shape[1]
        read.update({name: read[name].narrow(-2, 0, tokens) for name in BY_POSITION if name in read})
    if "keys" in read:
        del read["keys"], read["values"]
        if "sealing" in read:
            read["sealing"] = i.sealing.at(i.sealing.writes[:, : i.cos.shape[1]])
    return read


def copy_of(what: str, size: Callable[[Case], int], case: Case) -> Contestant:
    """A plain copy that reads and writes together as many bytes."""
    held: dict[torch.device, tuple[Tensor, Tensor]] = {}

    def call(inputs: Inputs) -> None:
        device = next(x.device for x in vars(inputs).values() if isinstance(x, Tensor))
        if device not in held:
            source = torch.randint(256, (max(1, size(case) // 2),), dtype=torch.uint8, device=device)
            held[device] = source, torch.empty_like(source)
        source, target = held[device]
        target.copy_(source)

    return bound(f"copy of {what}", call)


# The description.


def operation(
    name: str,
    make: Callable[[Draw], Inputs],
    rivals: Callable[[Case], Iterable[Contestant]],
    flops: Callable[[Case], int] = lambda case: 0,
    *,
    reference: ModuleType = reference,
    results: Callable[[Inputs, Any], Any] = lambda inputs, result: result,
    finish: Callable[[Inputs, Any], Any] = lambda inputs, result: result,
    exact: Callable[[Inputs], Any] | None = None,
    select: Callable[[Inputs, Any], Any] = lambda inputs, result: result,
    widens: bool = True,
    by_triton: bool = False,
    sealed: tuple[str, ...] = (),
    written: Callable[[Inputs], Any] | None = None,
    copied: tuple[str, ...] = (),
    copied_name: str = "the same bytes",
    writes: bool = False,
    rounding: Callable[[Inputs], float] = lambda inputs: 0.0,
) -> Operation:
    """Describe a function of `scx_kernels`, which `reference` has under the same name, beside its rivals.

    Args:
        name: of the function.
        make: its arguments by their names, and what rivals alone take.
        rivals: besides SCX and a copy; where the cache is sealed, SCX on a permuted one is the first of them.
        results: of what the function returns, what is compared.
        finish: what SCX's result lacks to be compared.
        exact: by default the reference on inputs that are widened, unless its results are bits.
        by_triton: PyTorch's kernel is chosen where nothing is sealed; ours is a contestant of its own.
        sealed: arguments, or what becomes them, that the cipher's keystream is XORed on.
        written: tensors as large as what a call writes; by default what the first rival returns.
        copied: arguments that a copy is held against, all that is moved by default; `copied_name` in words.
    """

    function, specified = getattr(ops, name), getattr(reference, name)
    parameters = signature(specified).parameters.values()
    positional = tuple(parameter.name for parameter in parameters if parameter.kind != Parameter.KEYWORD_ONLY)

    def scx(i: Inputs) -> Any:
        return results(i, i.call(function, positional))

    def plain(i: Inputs) -> Any:
        i = i.unsealed if sealed else i
        return results(i, i.call(specified, positional))

    def counted(case: Case, *names: str) -> int:
        read = read_of(make(Draw(case, META)))
        return sum(nbytes(read[name]) for name in names)

    def moved(case: Case) -> int:
        i = make(Draw(case, META))
        write = written or next(iter(rivals(case))).call
        return nbytes(*read_of(i).values()) + nbytes(write(i))

    def copied_bytes(case: Case) -> int:
        return counted(case, *copied) if copied else moved(case)

    def contestants(case: Case) -> tuple[Contestant, ...]:
        ours = [Contestant("SCX", SCX, scx, finish=finish)]
        if sealed:
            ours.append(rival("permuted cache", lambda i: scx(i.unsealed)))
        if by_triton:
            chooses = ours[-1]
            by_kernel = Contestant(f"{chooses.name}, Triton", TRITON, chooses.call, lambda: ops.backend("triton"))
            ours.append(by_kernel)
        return (*ours, *rivals(case), copy_of(copied_name, copied_bytes, case))

    return Operation(
        make=lambda case, device: make(Draw(case, device)),
        contestants=contestants,
        plain=plain,
        exact=exact or (lambda i: select(i, plain(wide(i) if widens else i))),
        select=select,
        bytes=moved,
        copied_bytes=copied_bytes,
        keystream=lambda case: counted(case, *sealed),
        flops=flops,
        writes=writes,
        rounding=rounding,
    )
