"""Kernels' launchers as operators of PyTorch, and the public faces of functions that run on them.

A launcher is called directly, and registered as an operator besides: where something compiles or traces, it sees one
call with a shape rule. The dispatcher would cost more of the host's time than the launch.

What an operator takes is what its reference takes: the schema is read off the reference's signature.
"""

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import cached_property, wraps
from importlib import import_module
from types import NoneType
from typing import Any, TypeVar, cast, get_args, get_origin

import torch
from torch import Tensor, is_autocast_enabled

from scx_kernels.dispatch import is_served_at_once, is_traced, takes_triton
from scx_kernels.hidden import clear_locals
from scx_kernels.sealing import Sealing

__all__ = ["OPERATORS", "Operator", "checked", "operation", "spelled"]

_EVERY_BACKEND = "CompositeExplicitAutograd"
_SPELLINGS = {Tensor: "Tensor", bool: "bool", int: "SymInt", float: "float", torch.dtype: "ScalarType", None: "()"}
_SEALING = {"key": "Tensor", "writes": "Tensor", "numbers": "SymInt[]"}
"""A sealing is one argument everywhere but in a schema."""
_Function = TypeVar("_Function", bound=Callable)


def _spelling(kind: Any) -> str:
    """How a schema spells a type of Python's."""
    parts = get_args(kind)
    if NoneType in parts:
        return "".join(_spelling(part) for part in parts if part is not NoneType) + "?"
    if get_origin(kind) is tuple:
        return f"({', '.join(map(_spelling, parts))})"
    return f"{_spelling(parts[0])}[]" if get_origin(kind) is Sequence else _SPELLINGS[kind]


def _schema_of(
    signature: inspect.Signature, mutates: Sequence[str], fixed: dict[str, Any], returns: Any
) -> tuple[list[str], str]:
    """The names of an operator's arguments, and its schema without its name: what must be given comes first."""
    needed: list[tuple[str, str]] = []  # names and how they are spelled
    optional: list[tuple[str, str]] = []
    for name, parameter in signature.parameters.items():
        kind, default = parameter.annotation, parameter.default
        if name in fixed:
            continue
        if name in mutates:
            needed.append((name, f"Tensor({'ab'[mutates.index(name)]}!) {name}"))
            continue
        if kind is Sealing or Sealing in get_args(kind):
            parts = {f"{name}_{part}": of + ("" if kind is Sealing else "?") for part, of in _SEALING.items()}
        else:
            parts = {name: _spelling(kind)}
        if default is parameter.empty:
            needed += [(name, f"{of} {name}") for name, of in parts.items()]
        else:
            optional += [(name, f"{of} {name}={default}") for name, of in parts.items()]
    names, spellings = zip(*needed, *optional, strict=True)
    return list(names), f"({', '.join(spellings)}) -> {_spelling(returns)}"


def spelled(options: dict[str, Any]) -> dict[str, Any]:
    """A launcher's options as its operator takes them."""
    found: dict[str, Any] = {}
    for name, value in options.items():
        if isinstance(value, Sealing):
            found |= {f"{name}_key": value.key, f"{name}_writes": value.writes, f"{name}_numbers": value.numbers}
        elif name != "sealing":
            found[name] = value
    return found


def _unspelled(arguments: dict[str, Any]) -> dict[str, Any]:
    for name in [spelled.removesuffix("_numbers") for spelled in arguments if spelled.endswith("_numbers")]:
        key, writes, numbers = (arguments.pop(f"{name}_{part}", None) for part in ("key", "writes", "numbers"))
        if key is not None:
            arguments[name] = Sealing(key, writes, *numbers)
    return arguments


def checked(check: Callable[..., Any], given: dict[str, Any]) -> Any:
    """Call `check` with those of the given arguments that it names."""
    return check(**{name: given[name] for name in inspect.signature(check).parameters if name in given})


_library = torch.library.Library("scx_kernels", "DEF")
OPERATORS: dict[str, "Operator"] = {}
"""Every operator by its name."""


class Operator:
    """A kernel's launcher, and the operator `scx_kernels::NAME` that compilers and tracers see in its place.

    Kernels, and triton, are imported by the first call.

    Args:
        reference: the function whose arguments, and results unless `returns` says otherwise, the operator has.
        module: the file of `scx_kernels.kernels` where the launcher of the operator's name is.
        shape_rule: takes all arguments of the reference by name, gives results without data (the operator's fake
            implementation).
        name: of the operator and its launcher, if it is not the reference's.
        mutates: arguments that it writes into, and that must be given.
        fixed: arguments of the reference that it has not, with the values that they have in it.
        returns: the type of its results.
    """

    def __init__(
        self,
        reference: Callable[..., Any],
        module: str,
        shape_rule: Callable[..., Any],
        *,
        name: str = "",
        mutates: Sequence[str] = (),
        fixed: dict[str, Any] | None = None,
        returns: Any = inspect.Signature.empty,
    ) -> None:
        self.name = name or reference.__name__
        self.module = module
        signature, fixed = inspect.signature(reference), fixed or {}
        returns = signature.return_annotation if returns is inspect.Signature.empty else returns
        self._names, schema = _schema_of(signature, mutates, fixed, returns)
        parameters = signature.parameters.values()
        defaults = {one.name: one.default for one in parameters if one.default is not one.empty} | fixed
        _library.define(f"{self.name}{schema}", tags=(torch.Tag.pt2_compliant_tag,))

        def launch(*args: Any, **options: Any) -> Any:
            return self.launcher(**self.arguments(args, options))

        def shape(*args: Any, **options: Any) -> Any:
            return shape_rule(**(defaults | self.arguments(args, options)))

        # On CPU tensors, too: the interpreter runs there.
        _library.impl(self.name, launch, _EVERY_BACKEND)
        torch.library.register_fake(f"scx_kernels::{self.name}", shape, lib=_library)
        self._operator = getattr(torch.ops.scx_kernels, self.name).default
        OPERATORS[self.name] = self

    @cached_property
    def launcher(self) -> Callable[..., Any]:
        """The function that launches the kernel."""
        launcher: Callable[..., Any] = getattr(import_module(f"scx_kernels.kernels.{self.module}"), self.name)
        return launcher

    def arguments(self, args: Sequence[Any], options: dict[str, Any]) -> dict[str, Any]:
        """The launcher's arguments, from those that the dispatcher gives in the schema's order and spelling."""
        return _unspelled(dict(zip(self._names, args, strict=False)) | options)

    def __call__(self, *args: Any, **options: Any) -> Any:
        if not args or is_traced(args[0]):
            return self._operator(*args, **spelled(options))
        return self.launcher(*args, **options)


@contextmanager
def _without_autocast() -> Iterator[None]:
    """An operation computes in the dtypes of its arguments; autocast is for the layers around it."""
    with ExitStack() as stack:
        for kind in ("cuda", "cpu"):
            if is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        yield


def operation(original: _Function, operator: Operator | None = None) -> Callable[[Callable], _Function]:
    """Give a function that runs on the kernels its public face: signature and documentation of the reference, which
    takes the call where the kernels do not.

    Args:
        operator: its launcher takes the call just as it is where nobody traces it.
    """
    names = frozenset(inspect.signature(original).parameters)

    def decorate(on_kernels: Callable) -> _Function:
        @wraps(original)
        def call(*args: Any, **options: Any) -> Any:
            try:  # as in `guarded`, without another call
                if is_autocast_enabled("cuda") or is_autocast_enabled("cpu"):
                    with _without_autocast():
                        return call(*args, **options)
                # Launchers take more than this; the reference raises for what nobody knows.
                if not names.issuperset(options):
                    return original(*args, **options)
                if args and is_served_at_once(args[0]):
                    return on_kernels(*args, **options) if operator is None else operator.launcher(*args, **options)
                return on_kernels(*args, **options) if takes_triton(args, options) else original(*args, **options)
            except BaseException as error:
                del args, options
                clear_locals(error)
                raise

        return cast(_Function, call)

    return decorate
