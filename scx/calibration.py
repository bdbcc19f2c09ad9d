"""What is ordinary in a model, which redundant rows are to be like: the tokens of its vocabulary, and the scale of real
rows, measured where the blocks are. Nobody's prompt has a part in it, and measuring leaves no trace."""

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["CALIBRATION_TOKENS", "Tokens", "measure_scale", "ordinary_tokens", "pick_tokens", "untouched"]

CALIBRATION_TOKENS = 64
_ORDINARY = 1000.0

Tokens = int | Tensor
"""Tokens of a vocabulary: how many, counted from 0, or which ones, (n,) int64."""


def ordinary_tokens(embedding: Tensor) -> Tokens:
    """The tokens whose rows of an embedding (V, D) are ordinary: V, if all are.

    An ordinary row is finite, and its largest magnitude is at most 1000 times the median of all rows' and at least a
    thousandth of it. Others, such as those of tokens that were never trained, would be known at sight among a prompt's.

    Raises: ValueError if there is none.
    """
    low, high = embedding.detach().aminmax(dim=1)
    magnitude = torch.maximum(high, -low).float()
    median = magnitude.where(magnitude.isfinite(), torch.nan).nanmedian()
    strange = (magnitude > _ORDINARY * median) | (_ORDINARY * magnitude < median) | ~magnitude.isfinite()
    if not strange.any():
        return len(embedding)
    if strange.all():
        raise ValueError("model: no row of embed_tokens is finite; redundant rows need tokens to be drawn from")
    return (~strange).nonzero()[:, 0]


def pick_tokens(draws: Tensor, tokens: Tokens) -> Tensor:
    """One of `tokens` for each of uniform int64 `draws`, which are overwritten."""
    if isinstance(tokens, int):
        return draws.remainder_(tokens)
    return tokens.to(draws.device)[draws.remainder_(len(tokens))]


@contextmanager
def untouched(module: nn.Module) -> Iterator[None]:
    """The module in evaluation mode, and afterwards every part of it and PyTorch's random numbers as they were."""
    flags = [(part, part.training) for part in module.modules()]
    devices = {x.device for x in module.parameters() if x.is_cuda} if torch.cuda.is_initialized() else ()
    with torch.random.fork_rng(devices):
        try:
            module.eval()
            yield
        finally:
            for part, flag in flags:
                part.training = flag


@contextmanager
def _copied(owner: Any, name: str) -> Iterator[None]:
    """A copy of `owner.name` in its place: what is changed in it is gone afterwards."""
    own = getattr(owner, name)
    setattr(owner, name, copy.deepcopy(own))
    try:
        yield
    finally:
        setattr(owner, name, own)


@torch.inference_mode(False)
@torch.no_grad()
def measure_scale(
    layers: Sequence[Any], run: Callable[[], object], device: torch.device, rotary: tuple[Any, str]
) -> dict[str, Tensor]:
    """The scale of rows where they enter each encoding, per block and feature, while `run` goes through the blocks.

    It is the median magnitude over tokens, as that of a normal distribution: one token with huge values, as attention
    sinks have, does not move it.

    Args:
        layers: the decoder's L blocks. run: takes one sequence through all of them, in order.
        device: of the result.
        rotary: who has the rotary embedding, and under which name. Some kinds grow with the longest sequence that they
            have seen: `run` finds a copy there.

    Returns: by the names of `scx.encoding.ENCODINGS`, float32 (L, D), (L, H*d) and (L, D).
    """
    # By block: a hook may run one twice.
    recorded: dict[str, dict[int, Tensor]] = {"attention": {}, "output": {}, "feed_forward": {}}

    def record(name: str, block: int) -> Any:
        def hook(module: Any, args: tuple[Tensor, ...]) -> None:
            magnitude = args[0][0].float().abs()
            recorded[name][block] = magnitude.median(dim=0).values.to(device) / 0.6745

        return hook

    with ExitStack() as undone, _copied(*rotary):
        for block, layer in enumerate(layers):
            entered = (layer.input_layernorm, layer.self_attn.o_proj, layer.post_attention_layernorm)
            for name, module in zip(recorded, entered, strict=True):
                undone.callback(module.register_forward_pre_hook(record(name, block)).remove)
        run()
    return {name: torch.stack([scales[block] for block in sorted(scales)]) for name, scales in recorded.items()}
