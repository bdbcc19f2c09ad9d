"""The package's operators on stand-in tensors: the launcher runs, its launches are recorded, the reference computes."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bench.rehearsal.device import StandInDevice
from bench.rehearsal.tensors import StandIn, backing_of, mapped
from scx_kernels import reference, sealing
from scx_kernels.kernels import launch
from scx_kernels.kernels.launch import Target
from scx_kernels.operations import OPERATORS

Record = Callable[[Target, Any, tuple[Any, ...], dict[str, Any]], None]


class WrongResultError(AssertionError):
    """A launcher's result is not what its shape rule, or the reference, says."""


def launcher_of(operator: Any) -> Callable[..., Any]:
    """What PyTorch would run for CUDA tensors, with the operator's own arguments."""

    def launcher(*args: Any, **kwargs: Any) -> Any:
        return operator.redispatch(torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA), *args, **kwargs)

    return launcher


def _permuted_linears(**given: Any) -> Tensor:
    return torch.cat(reference.permuted_linears(**given), dim=2)


def _qkv_into_cache(**given: Any) -> Tensor:
    return reference.qkv_decode_encode(**given)[0]


def _qkv_into_sealed_cache(**given: Any) -> tuple[Tensor, ...]:
    return reference.qkv_decode_encode(**given, return_unsealed=True)


def _unlock_in_place(**given: Any) -> None:
    reference.unlock(**given, in_place=True)


def _seal_into(out: Tensor, x: Tensor | None, **given: Any) -> None:
    sealing.seal(out if x is None else x, out=out, **given)


def _reseal_into(out: Tensor, x: Tensor | None, **given: Any) -> None:
    sealing.reseal(out if x is None else x, out=out, **given)


REFERENCES: dict[str, Callable[..., Any]] = {
    "inject_permute": reference.inject_permute,
    "strip_restore": reference.strip_restore,
    "permuted_linear": reference.permuted_linear,
    "permuted_linears": _permuted_linears,
    "qkv_decode_encode": reference.qkv_decode_encode,
    "qkv_into_cache": _qkv_into_cache,
    "qkv_into_sealed_cache": _qkv_into_sealed_cache,
    "attention": reference.attention,
    "attention_step": reference.attention_step,
    "unlock": reference.unlock,
    "unlock_in_place": _unlock_in_place,
    "seal": sealing.seal,
    "seal_into": _seal_into,
    "reseal": sealing.reseal,
    "reseal_into": _reseal_into,
    "random_bits": sealing.random_bits,
}
"""Operator -> what it computes, with the operator's arguments."""


class Operators:
    """Runs operators for a `StandInDevice`.

    Args:
        targets: whose tiles are chosen. Every launcher runs once for each.
        record: called for every launch with the target, the kernel, its arguments and its meta-parameters.
    """

    def __init__(self, targets: tuple[Target, ...], record: Record) -> None:
        self.targets = targets
        self.record = record

    def __call__(self, device: StandInDevice, operator: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        launcher, results = launcher_of(operator), None
        for target in self.targets:

            def record(kernel: Any, grid: Any, given: Any, meta: Any, target: Target = target) -> None:
                self.record(target, kernel, given, meta)

            with launch.recording(target, record), device.resumed():
                results = launcher(*args, **kwargs)
        name = operator._schema.name.partition("::")[2]
        expected = operator(
            *mapped(_without_memory, args), **{key: mapped(_without_memory, x) for key, x in kwargs.items()}
        )
        _check_like(name, "its shape rule", results, expected)
        if device.backing_device.type != "meta":
            backings = {key: mapped(backing_of, x) for key, x in kwargs.items()}
            computed = REFERENCES[name](**OPERATORS[name].arguments(mapped(backing_of, args), backings))
            _check_like(name, "the reference", results, computed, layout=False)
            for result, values in zip(_tensors(results), _tensors(computed), strict=True):
                result.backing.copy_(values)
        return results


def _tensors(results: Any) -> list[Any]:
    return [x for x in (results if isinstance(results, (list, tuple)) else (results,)) if isinstance(x, Tensor)]


def _without_memory(x: Any) -> Any:
    """A tensor of the same layout on the "meta" device."""
    if not isinstance(x, Tensor):
        return x
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta")


def _layout(x: Tensor) -> tuple[int, ...]:
    """Strides of the dimensions that are stepped along."""
    return tuple(stride for size, stride in zip(x.shape, x.stride(), strict=True) if size > 1)


def _check_like(name: str, source: str, results: Any, expected: Any, layout: bool = True) -> None:
    given, wanted = _tensors(results), _tensors(expected)
    if len(given) != len(wanted):
        raise WrongResultError(f"{name}: the launcher gives {len(given)} tensors, {source} {len(wanted)}")
    for place, (x, y) in enumerate(zip(given, wanted, strict=True)):
        if not isinstance(x, StandIn):
            raise WrongResultError(f"{name}: the launcher's result {place} lies on {x.device}, expected cuda:0")
        mine, theirs = (tuple(x.shape), x.dtype), (tuple(y.shape), y.dtype)
        if mine != theirs:
            raise WrongResultError(f"{name}: the launcher's result {place} is {mine}, {source} says {theirs}")
        if layout and _layout(x) != _layout(y):
            raise WrongResultError(f"{name}: result {place} has strides {x.stride()}, {source} says {y.stride()}")
