"""Sealed storage: a layer's keys XORed with a cipher's keystream, moved to fresh numbers, and the cipher alone."""

import torch
from torch import Tensor

import scx_kernels as ops
from bench.contest import BOUND, RIVAL, SCX, Case, Contestant, Inputs, Operation, copy_of, randn
from bench.sealed_cases import key_of
from scx_kernels import sealing as reference
from scx_kernels.chacha import chacha_blocks

__all__ = ["SEALING_OPERATIONS"]

LAYER = 3
INTEGER = {2: torch.int16, 4: torch.int32}


def make_rows(case: Case, device: torch.device) -> Inputs:
    """A layer's keys as a prefill writes them: numbers in a row."""
    shape = case.shape
    return Inputs(
        x=randn(case, device, case.batch, shape.kv_heads, case.tokens, shape.head_dim),
        key=key_of(device),
        writes=ops.WriteCounter().take(case.batch, case.tokens, device),
    )


def make_moved(case: Case, device: torch.device) -> Inputs:
    inputs = make_rows(case, device)
    inputs.fresh = ops.WriteCounter(count=case.tokens).take(case.batch, case.tokens, device)
    return inputs


def sealing(i: Inputs, writes: Tensor) -> ops.Sealing:
    return ops.Sealing(i.key, writes, LAYER)


def pad(i: Inputs, writes: Tensor) -> Tensor:
    """The keystream of all rows."""
    _, heads, _, size = i.x.shape
    return reference.keystream(sealing(i, writes), heads, size, i.x.dtype, is_value=False)


def xored(x: Tensor, bits: Tensor) -> Tensor:
    return (x.view(bits.dtype) ^ bits).view(x.dtype)


def as_numbers(inputs: Inputs, result: Tensor) -> Tensor:
    """Bit patterns as numbers that can be compared; as floats some are NaN."""
    return result.view(INTEGER[result.dtype.itemsize]).double()


def rows_bytes(case: Case) -> int:
    """The rows in and out, a number for each, and the key."""
    rows = case.batch * case.tokens
    return rows * (2 * case.shape.kv_width * case.itemsize + 8) + 32


def seal_operation(name: str) -> Operation:
    def run(module: object, i: Inputs) -> Tensor:
        return getattr(module, name)(i.x, sealing(i, i.writes), is_value=False)

    return Operation(
        make=make_rows,
        contestants=lambda case: (
            Contestant("SCX", SCX, lambda i: run(ops, i)),
            Contestant("the cipher in PyTorch", RIVAL, lambda i: xored(i.x, pad(i, i.writes))),
            copy_of(rows_bytes, case),
        ),
        plain=lambda i: run(reference, i),
        bytes=rows_bytes,
        flops=lambda case: 0,
        exact=lambda i: as_numbers(i, run(reference, i)),
        select=as_numbers,
    )


def move(module: object, i: Inputs) -> Tensor:
    return module.reseal(i.x, sealing(i, i.writes), sealing(i, i.fresh), is_value=False)


def moved_bytes(case: Case) -> int:
    """And the rows' new numbers."""
    return rows_bytes(case) + 8 * case.batch * case.tokens


RESEAL = Operation(
    make=make_moved,
    contestants=lambda case: (
        Contestant("SCX", SCX, lambda i: move(ops, i)),
        Contestant("the cipher in PyTorch", RIVAL, lambda i: xored(i.x, pad(i, i.fresh) ^ pad(i, i.writes))),
        copy_of(moved_bytes, case),
    ),
    plain=lambda i: move(reference, i),
    bytes=moved_bytes,
    flops=lambda case: 0,
    exact=lambda i: as_numbers(i, move(reference, i)),
    select=as_numbers,
)


def make_streams(case: Case, device: torch.device) -> Inputs:
    """A stream for each key/value head, of a word for each element of its rows."""
    shape = case.shape
    return Inputs(
        key=key_of(device),
        streams=torch.randint(2**32, (shape.kv_heads, 3), device=device),
        count=case.tokens * shape.head_dim,
    )


def streams_bytes(case: Case) -> int:
    """The bits out; key and streams in."""
    return 4 * case.tokens * case.shape.kv_width + 24 * case.shape.kv_heads + 32


def ciphered(i: Inputs) -> Tensor:
    """The cipher on plain tensors, block numbers and streams laid out first."""
    blocks = -(-i.count // 16)
    number = torch.arange(blocks, device=i.key.device).expand(len(i.streams), blocks)
    words = torch.stack([number, *(stream[:, None].expand_as(number) for stream in i.streams.unbind(1))])
    bits = chacha_blocks(i.key, words.flatten(1).int(), 20)
    return bits.view(len(i.streams), 16 * blocks)[:, : i.count].contiguous()


RANDOM_BITS = Operation(
    make=make_streams,
    contestants=lambda case: (
        Contestant("SCX", SCX, lambda i: ops.random_bits(i.key, i.streams, i.count)),
        Contestant("the cipher in PyTorch", RIVAL, ciphered),
        Contestant(
            "PyTorch's generator, no cipher",
            BOUND,
            lambda i: torch.randint(-(2**31), 2**31, (len(i.streams), i.count), dtype=torch.int32, device=i.key.device),
        ),
        copy_of(streams_bytes, case),
    ),
    plain=lambda i: reference.random_bits(i.key, i.streams, i.count),
    bytes=streams_bytes,
    flops=lambda case: 0,
    exact=lambda i: as_numbers(i, reference.random_bits(i.key, i.streams, i.count)),
    select=as_numbers,
)

SEALING_OPERATIONS = {
    "seal": seal_operation("seal"),
    "unseal": seal_operation("unseal"),
    "reseal": RESEAL,
    "random_bits": RANDOM_BITS,
}
