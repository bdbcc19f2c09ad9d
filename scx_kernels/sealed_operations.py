"""The public operations of sealed storage: one name each, whatever device the tensors are on.

CPU tensors take `scx_kernels.sealing`, CUDA and ROCm tensors take Triton, as every operation does
(`scx_kernels.operations`, with its `backend`). Nothing here has a gradient.

Names, arguments and results are those of `scx_kernels.sealing`, where they are documented.
"""

from functools import wraps
from typing import Any

from torch import Tensor

from scx_kernels import operations
from scx_kernels import sealing as reference
from scx_kernels.operations import Operator, is_accelerator, operation, spelling
from scx_kernels.sealing import Sealing, check_out, check_sealing, check_streams

__all__ = ["random_bits", "reseal", "seal", "unseal"]

_SEALING, _OLD, _NEW = (spelling(name) for name in ("sealing", "old", "new"))


def _like(x: Tensor, **options: Any) -> Tensor:
    return x.new_empty(x.shape)


def _in_place(out: Tensor, **options: Any) -> None:
    return None


def _bits_shape(key: Tensor, streams: Tensor, count: int, rounds: int = 20) -> Tensor:
    return key.new_empty(streams.shape[0], count)


_seal = Operator("seal", "sealing", f"(Tensor x, {_SEALING}, bool is_value) -> Tensor", _like)
_reseal = Operator("reseal", "sealing", f"(Tensor x, {_OLD}, {_NEW}, bool is_value) -> Tensor", _like)
_seal_into = Operator(
    "seal_into", "sealing", f"(Tensor(a!) out, Tensor? x, {_SEALING}, bool is_value) -> ()", _in_place
)
_reseal_into = Operator(
    "reseal_into", "sealing", f"(Tensor(a!) out, Tensor? x, {_OLD}, {_NEW}, bool is_value) -> ()", _in_place
)
_random_bits = Operator(
    "random_bits", "sealing", "(Tensor key, Tensor streams, SymInt count, int rounds=20) -> Tensor", _bits_shape
)


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


@wraps(reference.random_bits)
def random_bits(key: Tensor, streams: Tensor, count: int, *, rounds: int = 20) -> Tensor:
    on_kernels = operations._backend == "triton" or (operations._backend == "auto" and is_accelerator(key.device))
    if not on_kernels:
        return reference.random_bits(key, streams, count, rounds=rounds)
    check_streams(key, streams, count, rounds)
    return _random_bits(key, streams, count, rounds=rounds)
