"""What attackers see. None of this takes a key: memory while a model computes, or messages at the boundary."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel

from scx.party.boundary import Transcript

__all__ = ["AttentionMemory", "Heard", "recorded_inputs", "rows_heard"]


class AttentionMemory(TorchFunctionMode):
    """Within a `with` block, what every attention on a CPU finds in memory: `keys` and `values`, (B, G, N, d) each, in
    the order of the blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if function is F.scaled_dot_product_attention:
            self.keys.append(args[1].detach().clone())
            self.values.append(args[2].detach().clone())
        return function(*args, **(kwargs or {}))


@contextmanager
def recorded_inputs(modules: Sequence[nn.Module]) -> Iterator[list[list[Tensor]]]:
    """Within a `with` block, the rows (B, N, F) that each module is given, call by call."""
    given: list[list[Tensor]] = [[] for _ in modules]
    with ExitStack() as undone:
        for module, calls in zip(modules, given, strict=True):
            undone.callback(
                module.register_forward_pre_hook(
                    lambda _, args, calls=calls: calls.append(args[0].detach().clone())
                ).remove
            )
        yield given


@dataclass(frozen=True)
class Heard:
    """The rows of a prefill on the untrusted side, block by block, (B, T, F) each: `attention_input` behind the norm,
    the `value_product` made of it, `attention_rows` where these crossed, and `feed_forward_input`, the residual stream.
    The first block's `attention_input` and `value_product` are under noise if there is some."""

    attention_input: list[Tensor]
    value_product: list[Tensor]
    attention_rows: list[Tensor]
    feed_forward_input: list[Tensor]


@torch.no_grad()
def rows_heard(model: PreTrainedModel, transcript: Transcript) -> Heard:
    """What a listener knows of a prefill's rows with the weights: what crossed, and between crossings what the
    untrusted side makes of it.

    Args:
        model: the weights. transcript: of one prefill, in either scheme, without `verify`, which has rows enter the
            feed-forward behind its norm.
    """
    layers: Any = model.base_model.layers
    heard = Heard([], [], [], [])
    residual: Tensor | None = None

    def enter_attention(block: int, rows: Tensor) -> None:
        heard.attention_input.append(rows)
        heard.value_product.append(layers[block].self_attn.v_proj(rows))

    for crossing in transcript.received("prefill"):
        block, rows = crossing.block, crossing.tensor
        if rows is None or crossing.name not in ("attention_input", "attention_rows", "feed_forward_input"):
            continue
        layer = layers[block]
        if crossing.name == "attention_input":
            enter_attention(block, rows)
            continue
        if crossing.name == "attention_rows":
            heard.attention_rows.append(rows)
            if crossing.operation == "project_output" or residual is None:
                continue
            rows = residual + layer.self_attn.o_proj(rows)
        heard.feed_forward_input.append(rows)
        if crossing.operation != "feed_forward":
            residual = rows + layer.mlp(layer.post_attention_layernorm(rows))
            if block + 1 < len(layers):
                enter_attention(block + 1, layers[block + 1].input_layernorm(residual))
    return heard
