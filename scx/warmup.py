"""Compile ahead of the first request what its requests will need."""

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

import scx_kernels as ops
from scx.models.llama import EncodedModel

__all__ = ["warm_up"]

# One prompt for each tile that a launcher may choose by its length.
PROMPTS = (1, 2, 3, 7, 12, 24, 48, 96, 200, 400, 800)
_KEYS_A_PROGRAM = 256


@torch.no_grad()
def warm_up(
    model: PreTrainedModel, *, tokens: Sequence[int] = PROMPTS, batch_size: int = 1, longest: int = 16_384
) -> None:
    """Run short requests through an encoded model, so that no kernel is compiled while a person waits.

    Kernels are compiled once for a model's sizes, whatever a request's length; lengths only choose among a few tiles.
    On a CPU nothing is compiled, and the requests just run.

    Args:
        model: as `encode_llama` returns it.
        tokens: lengths of the prompts that are run, each followed by two generated tokens and, where caches are sealed,
            by as many tokens once more: later turns have kernels of their own there.
        batch_size: sequences of a request.
        longest: cache length in tokens up to which generation is prepared.

    Raises: ValueError for a model that is not encoded, or lengths that are none.
    """
    decoder = next((module for module in model.modules() if isinstance(module, EncodedModel)), None)
    if decoder is None:
        raise ValueError("model: it is not encoded; encode_llama does that")
    if not tokens or min(tokens) < 1 or batch_size < 1 or longest < 1:
        raise ValueError(
            f"tokens, batch_size, longest: expected positive numbers, got {tokens}, {batch_size}, {longest}"
        )
    seals = bool(decoder._scx.generator.sealed(decoder._scx.shape))
    for count in tokens:
        ids = torch.zeros(batch_size, count, dtype=torch.int64, device=model.device)
        out = model(ids, mode="prefill", use_cache=True)
        for _ in range(2):
            out = model(ids[:, :1], mode="decode", past_key_values=out.past_key_values)
        if seals and count > 1:
            model(ids, mode="decode", past_key_values=out.past_key_values)
    _warm_up_long_caches(decoder, batch_size, longest)


def _warm_up_long_caches(decoder: EncodedModel, batch_size: int, longest: int) -> None:
    """One step of attention at every power of two of keys: they choose over how many programs a cache is split."""
    shape = decoder._scx.shape
    weight = decoder.layers[0].self_attn.q_proj.weight
    q = weight.new_zeros(batch_size, 1, shape.num_heads, shape.head_dim).transpose(1, 2)
    index = torch.arange(shape.head_dim, device=weight.device).expand(batch_size, shape.num_heads, shape.head_dim)
    keys = _KEYS_A_PROGRAM
    while keys <= longest:
        cache = weight.new_zeros(batch_size, shape.num_kv_heads, keys, shape.head_dim)
        ops.attention_step(q, cache, cache, softmax_scale=1.0, output_index=index.contiguous())
        keys *= 2
