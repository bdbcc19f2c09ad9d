"""The public operations of sealed storage: one name each, whatever device the tensors are on.

CPU tensors take `scx_kernels.sealing`, CUDA and ROCm tensors take Triton, as every operation does
(`scx_kernels.dispatch`). Nothing here has a gradient.

Names, arguments and results are those of `scx_kernels.sealing`, where they are documented.
"""

from functools import wraps
from typing import Any

from torch import Tensor

from scx_kernels import sealing as reference
from scx_kernels.dispatch import chosen_backend, is_accelerator
from scx_kernels.hidden import guarded
from scx_kernels.operators import Operator, operation
from scx_kernels.sealing import Sealing, check_out, check_sealing, check_streams

__all__ = ["random_bits", "reseal", "seal", "unseal"]


def _like(x: Tensor, **given: Any) -> Tensor:
    return x.new_empty(x.shape)


def _bits_shape(key: Tensor, streams: Tensor, count: int, **given: Any) -> Tensor:
    return key.new_empty(streams.shape[0], count)


# What follows writes into `out`, and in place where x is None; it has no results.
def _seal_into_shape(out: Tensor, x: Tensor | None, sealing: Sealing, is_value: bool) -> None:
    return None


def _reseal_into_shape(out: Tensor, x: Tensor | None, old: Sealing, new: Sealing, is_value: bool) -> None:
    return None


_seal = Operator(reference.seal, "sealing", _like, fixed={"out": None})
_reseal = Operator(reference.reseal, "sealing", _like, fixed={"out": None})
_seal_into = Operator(_seal_into_shape, "sealing", _seal_into_shape, name="seal_into", mutates=("out",))
_reseal_into = Operator(_reseal_into_shape, "sealing", _reseal_into_shape, name="reseal_into", mutates=("out",))
_random_bits = Operator(reference.random_bits, "sealing", _bits_shape)


@operation(reference.seal, _seal)
def seal(x: Tensor, sealing: Sealing, *, is_value: bool, out: Tensor | None = None) -> Tensor:
    check_sealing(x, sealing)
    check_out(x, out)
    if out is None:
        return _seal(x, sealing=sealing, is_value=is_value)
    _seal_into(out, None if x is out else x, sealing=sealing, is_value=is_value)
    return out


@operation(reference.unseal, _seal)
def unseal(x: Tensor, sealing: Sealing, *, is_value: bool, out: Tensor | None = None) -> Tensor:
    return seal(x, sealing, is_value=is_value, out=out)


@operation(reference.reseal, _reseal)
def reseal(x: Tensor, old: Sealing, new: Sealing, *, is_value: bool, out: Tensor | None = None) -> Tensor:
    check_sealing(x, old, "old")
    check_sealing(x, new, "new")
    check_out(x, out)
    if out is None:
        return _reseal(x, old=old, new=new, is_value=is_value)
    _reseal_into(out, None if x is out else x, old=old, new=new, is_value=is_value)
    return out


@guarded
@wraps(reference.random_bits)
def random_bits(key: Tensor, streams: Tensor, count: int, *, rounds: int = 20) -> Tensor:
    chosen = chosen_backend()
    if chosen != "triton" and (chosen != "auto" or not is_accelerator(key.device)):
        return reference.random_bits(key, streams, count, rounds=rounds)
    check_streams(key, streams, count, rounds)
    return _random_bits(key, streams, count, rounds=rounds)
