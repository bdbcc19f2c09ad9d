"""Compile ahead of the first request what its requests will need."""

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

import scx_kernels as ops
from scx.architecture import Decoder, encoded_decoders
from scx_kernels.operations import is_refused_on_sealed

__all__ = ["warm_up"]

# One prompt for each tile that a launcher may choose by its length.
PROMPTS = (1, 2, 3, 7, 12, 24, 48, 96, 200, 400, 800)
_TURN = 3
_KEYS_A_PROGRAM = 256


@torch.no_grad()
def warm_up(
    model: PreTrainedModel, *, tokens: Sequence[int] = PROMPTS, batch_size: int = 4, longest: int = 16_384
) -> None:
    """Run short requests through an encoded model, so that no kernel is compiled while a person waits.

    Kernels are compiled once for a model's sizes, whatever a request's length; lengths only choose among a few tiles.
    So a prompt of each length is run with a token after it and, where caches are sealed, with as many tokens once more,
    as a later turn or the next chunk of a prompt has; and for every power of two of sequences a batch, with padding and
    without. Beams are sequences of a batch, cropped caches are caches. In the split placement the untrusted side is
    asked for what it does in such requests. On a CPU nothing is compiled, and the requests just run.

    Args:
        model: as `encode_llama` returns it.
        tokens: lengths of the prompts that are run.
        batch_size: the most sequences that a request has, beams counted each.
        longest: cache length in tokens up to which generation is prepared.

    Raises: ValueError for a model that is not encoded, or lengths that are none.
    """
    decoder = next(encoded_decoders(model), None)
    if decoder is None:
        raise ValueError("model: it is not encoded; encode_llama does that")
    if not tokens or min(tokens) < 1 or batch_size < 1 or longest < 1:
        raise ValueError(
            f"tokens, batch_size, longest: expected positive numbers, got {tokens}, {batch_size}, {longest}"
        )
    seals = bool(decoder._scx.generator.sealed(decoder._scx.shape))
    head = decoder.layers[0].self_attn.q_proj.weight.new_empty(0, decoder._scx.shape.head_dim)
    turns_are_refused = seals and is_refused_on_sealed(head)
    for count in tokens:
        _converse(model, 1, count, turn=count if seals and count > 1 and not turns_are_refused else 0)
    for batch in _powers_of_two(batch_size):
        for is_padded in (False,) if turns_are_refused else (False, True):
            _converse(model, batch, _TURN + 1, turn=0 if turns_are_refused else _TURN, is_padded=is_padded)
    _warm_up_long_caches(decoder, longest)


def _powers_of_two(largest: int) -> list[int]:
    """1, 2, 4, ... up to the first that is at least `largest`: launchers round rows up to one."""
    return [1 << n for n in range((largest - 1).bit_length() + 1)]


def _converse(model: PreTrainedModel, batch: int, tokens: int, *, turn: int, is_padded: bool = False) -> None:
    """A prompt, a token after it and a later turn; padded: one token of padding before every sequence."""
    mask = torch.ones(batch, tokens + 1 + turn, dtype=torch.int64, device=model.device)
    mask[:, 0] = not is_padded
    ids, cache, first = torch.zeros_like(mask), None, 0
    for count in (tokens, 1, turn):
        if count:
            given = {"attention_mask": mask[:, : first + count]} if is_padded else {}
            mode = "prefill" if cache is None else "decode"
            cache = model(
                ids[:, first : first + count], past_key_values=cache, mode=mode, use_cache=True, **given
            ).past_key_values
            first += count


def _warm_up_long_caches(decoder: Decoder, longest: int) -> None:
    """One step of attention at every power of two of keys: they choose over how many programs a cache is split."""
    shape = decoder._scx.shape
    weight = decoder.layers[0].self_attn.q_proj.weight
    q = weight.new_zeros(1, 1, shape.num_heads, shape.head_dim).transpose(1, 2)
    index = torch.arange(shape.head_dim, device=weight.device).expand(1, shape.num_heads, shape.head_dim)
    keys = _KEYS_A_PROGRAM
    while keys <= longest:
        cache = weight.new_zeros(1, shape.num_kv_heads, keys, shape.head_dim)
        ops.attention_step(q, cache, cache, softmax_scale=1.0, output_index=index.contiguous())
        keys *= 2
