"""The public operations of sealed storage: one name each, whatever device the tensors are on.

CPU tensors take `scx_kernels.sealing`, CUDA and ROCm tensors take Triton, through operators registered with PyTorch;
`backend(...)` of `scx_kernels.operations` says otherwise, as for every operation. Nothing here has a gradient.

Names, arguments and results are those of `scx_kernels.sealing`, where they are documented.
"""

from functools import wraps

import torch
from torch import Tensor

from scx_kernels import operations
from scx_kernels import sealing as reference
from scx_kernels.operations import _operation
from scx_kernels.sealing import Sealing, check_out, check_sealing, check_streams

__all__ = ["random_bits", "reseal", "seal", "unseal"]


def _sealings(
    key: Tensor, writes: Tensor, numbers: list[int], old_key: Tensor | None, old_writes: Tensor | None
) -> tuple[Sealing, Sealing | None, bool]:
    """What an operator's schema can carry -> what the functions take. numbers: is_value, then layer, rounds and
    first_head of the new and of the old sealing."""
    is_value, layer, rounds, first_head, *old_numbers = numbers
    new = Sealing(key, writes, layer, rounds, first_head)
    if old_key is None or old_writes is None:
        return new, None, bool(is_value)
    layer, rounds, first_head = old_numbers
    return new, Sealing(old_key, old_writes, layer, rounds, first_head), bool(is_value)


def _run(x: Tensor, new: Sealing, old: Sealing | None, is_value: bool, out: Tensor | None) -> Tensor:
    from scx_kernels.kernels import sealing as kernels

    if old is None:
        return kernels.seal(x, new, is_value=is_value, out=out)
    return kernels.reseal(x, old, new, is_value=is_value, out=out)


@torch.library.custom_op("scx_kernels::seal", mutates_args=())
def _seal(
    x: Tensor, key: Tensor, writes: Tensor, numbers: list[int], old_key: Tensor | None, old_writes: Tensor | None
) -> Tensor:
    return _run(x, *_sealings(key, writes, numbers, old_key, old_writes), None)


@_seal.register_fake
def _(
    x: Tensor, key: Tensor, writes: Tensor, numbers: list[int], old_key: Tensor | None, old_writes: Tensor | None
) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.custom_op("scx_kernels::seal_into", mutates_args=("out",))
def _seal_into(
    out: Tensor, x: Tensor | None, key: Tensor, writes: Tensor, numbers: list[int], old_key: Tensor | None,
    old_writes: Tensor | None,
) -> None:  # fmt: skip
    """x None: in place."""
    _run(out if x is None else x, *_sealings(key, writes, numbers, old_key, old_writes), out)


@torch.library.custom_op("scx_kernels::random_bits", mutates_args=())
def _random_bits(key: Tensor, streams: Tensor, count: int, rounds: int) -> Tensor:
    from scx_kernels.kernels import sealing as kernels

    return kernels.random_bits(key, streams, count, rounds=rounds)


@_random_bits.register_fake
def _(key: Tensor, streams: Tensor, count: int, rounds: int) -> Tensor:
    return key.new_empty(streams.shape[0], count)


def _by_triton(x: Tensor, new: Sealing, old: Sealing | None, is_value: bool, out: Tensor | None) -> Tensor:
    check_out(x, out)
    numbers = [int(is_value), *new[2:5], *(old[2:5] if old is not None else ())]
    old_key, old_writes = (None, None) if old is None else old[:2]
    if out is None:
        return _seal(x, new.key, new.writes, numbers, old_key, old_writes)
    _seal_into(out, None if x is out else x, new.key, new.writes, numbers, old_key, old_writes)
    return out


@_operation(reference.seal)
def seal(x: Tensor, sealing: Sealing, *, is_value: bool, out: Tensor | None = None) -> Tensor:
    check_sealing(x, sealing)
    return _by_triton(x, sealing, None, is_value, out)


@_operation(reference.unseal)
def unseal(x: Tensor, sealing: Sealing, *, is_value: bool, out: Tensor | None = None) -> Tensor:
    return seal(x, sealing, is_value=is_value, out=out)


@_operation(reference.reseal)
def reseal(x: Tensor, old: Sealing, new: Sealing, *, is_value: bool, out: Tensor | None = None) -> Tensor:
    check_sealing(x, old, "old")
    check_sealing(x, new, "new")
    return _by_triton(x, new, old, is_value, out)


@wraps(reference.random_bits)
def random_bits(key: Tensor, streams: Tensor, count: int, *, rounds: int = 20) -> Tensor:
    chosen = operations._backend
    if chosen == "reference" or (chosen == "auto" and not operations.is_accelerator(key.device)):
        return reference.random_bits(key, streams, count, rounds=rounds)
    check_streams(key, streams, count, rounds)
    return _random_bits(key, streams, count, rounds)
