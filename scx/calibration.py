"""The scale of real rows, to which redundant rows are made: measured where the blocks are."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["CALIBRATION_TOKENS", "measure_scale"]

CALIBRATION_TOKENS = 64


@torch.no_grad()
def measure_scale(layers: Sequence[Any], run: Callable[[], object], device: torch.device) -> dict[str, Tensor]:
    """The scale of rows where they enter each encoding, per block and feature, while `run` goes through the blocks.

    It is the median magnitude over tokens, as that of a normal distribution: one token with huge values, as attention
    sinks have, does not move it.

    Args:
        layers: the decoder's L blocks. run: takes one sequence through all of them, in order.
        device: of the result.

    Returns: by the names of `scx.encoding.ENCODINGS`, float32 (L, D), (L, H*d) and (L, D).
    """
    recorded: dict[str, list[Tensor]] = {"attention": [], "output": [], "feed_forward": []}

    def record(name: str) -> Any:
        def hook(module: Any, args: tuple[Tensor, ...]) -> None:
            magnitude = args[0][0].float().abs()
            recorded[name].append(magnitude.median(dim=0).values.to(device) / 0.6745)

        return hook

    handles = []
    for layer in layers:
        entered = (layer.input_layernorm, layer.self_attn.o_proj, layer.post_attention_layernorm)
        for name, module in zip(recorded, entered, strict=True):
            handles.append(module.register_forward_pre_hook(record(name)))
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return {name: torch.stack(scales) for name, scales in recorded.items()}
