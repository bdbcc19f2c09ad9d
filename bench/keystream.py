"""How fast a GPU makes keystream when nothing else keeps it: the limit that sealed caches are held against."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from scx_kernels.kernels.chacha import block_words, load_key
from scx_kernels.kernels.launch import launch

BLOCK_U = 256


@triton.jit
def _fold_kernel(key_ptr, out_ptr, ROUNDS: tl.constexpr, BLOCK_U: tl.constexpr):
    block = tl.program_id(0) * BLOCK_U + tl.arange(0, BLOCK_U)
    zero = tl.full((), 0, tl.uint32)
    words = block_words(load_key(key_ptr), block.to(tl.uint32), zero, zero, zero, ROUNDS)
    folded = words[0]
    for place in tl.static_range(1, 16):
        folded = folded ^ words[place]
    tl.store(out_ptr + block, folded.to(tl.int32, bitcast=True))


def fold(key: Tensor, blocks: int, rounds: int) -> Tensor:
    """The XOR of the sixteen words of each block: 64 bytes of keystream for 4 that are written.

    Args:
        key: (8,) int32.
        blocks: a multiple of 256, counted from block 0.

    Returns: (blocks,) int32.
    """
    out = torch.empty(blocks, dtype=torch.int32, device=key.device)
    launch(_fold_kernel, (blocks // BLOCK_U,), key, out, ROUNDS=rounds, BLOCK_U=BLOCK_U, num_warps=4, device=key.device)
    return out
