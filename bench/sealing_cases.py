"""Sealed storage: a layer's keys XORed with a cipher's keystream, moved to fresh numbers, and the cipher alone."""

import torch
from torch import Tensor

import scx_kernels as ops
from bench.contest import Draw, Inputs, Operation, bound, key_of, operation, rival
from scx_kernels import sealing
from scx_kernels.chacha import chacha_blocks

INTEGER = {2: torch.int16, 4: torch.int32}
IN_PYTORCH = "the cipher in PyTorch"


def as_numbers(inputs: Inputs, result: Tensor) -> Tensor:
    """Bit patterns as numbers that can be compared; as floats some are NaN."""
    return result.view(INTEGER[result.dtype.itemsize]).double()


OF_BITS = {"reference": sealing, "select": as_numbers, "widens": False}


def pad(i: Inputs, own: ops.Sealing) -> Tensor:
    """The keystream of all rows."""
    _, heads, _, size = i.x.shape
    return sealing.keystream(own, heads, size, i.x.dtype, is_value=False)


def xored(x: Tensor, bits: Tensor) -> Tensor:
    return (x.view(bits.dtype) ^ bits).view(x.dtype)


def draw_rows(draw: Draw) -> Tensor:
    """A layer's keys as a prefill writes them."""
    return draw.heads(draw.shape.kv_heads, draw.case.tokens)


def seal(name: str) -> Operation:
    return operation(
        name,
        lambda draw: Inputs(x=draw_rows(draw), sealing=draw.sealing(draw.case.tokens), is_value=False),
        lambda case: [rival(IN_PYTORCH, lambda i: xored(i.x, pad(i, i.sealing)))],
        **OF_BITS,
        written=lambda i: i.x,
    )


def make_moved(draw: Draw) -> Inputs:
    x, tokens = draw_rows(draw), draw.case.tokens
    old = draw.sealing(tokens)
    fresh = ops.WriteCounter(count=tokens).take(draw.case.batch, tokens, draw.device)
    return Inputs(x=x, old=old, new=old.at(fresh), is_value=False)


def make_streams(draw: Draw) -> Inputs:
    """A stream for each key/value head, of a word for each element of its rows."""
    key, streams = key_of(draw.device), torch.randint(2**32, (draw.shape.kv_heads, 3), device=draw.device)
    return Inputs(key=key, streams=streams, count=draw.case.tokens * draw.shape.head_dim)


def ciphered(i: Inputs) -> Tensor:
    """The cipher on plain tensors, block numbers and streams laid out first."""
    blocks = -(-i.count // 16)
    number = torch.arange(blocks, device=i.key.device).expand(len(i.streams), blocks)
    words = torch.stack([number, *(stream[:, None].expand_as(number) for stream in i.streams.unbind(1))])
    bits = chacha_blocks(i.key, words.flatten(1).int(), 20)
    return bits.view(len(i.streams), 16 * blocks)[:, : i.count].contiguous()


def generated(i: Inputs) -> Tensor:
    return torch.randint(-(2**31), 2**31, (len(i.streams), i.count), dtype=torch.int32, device=i.key.device)


SEALING_OPERATIONS = {
    "seal": seal("seal"),
    "unseal": seal("unseal"),
    "reseal": operation(
        "reseal",
        make_moved,
        lambda case: [rival(IN_PYTORCH, lambda i: xored(i.x, pad(i, i.new) ^ pad(i, i.old)))],
        **OF_BITS,
        written=lambda i: i.x,
    ),
    "random_bits": operation(
        "random_bits",
        make_streams,
        lambda case: [rival(IN_PYTORCH, ciphered), bound("PyTorch's generator, no cipher", generated)],
        **OF_BITS,
        written=generated,
    ),
}
