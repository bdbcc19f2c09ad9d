"""Whether the untrusted side computed what it was asked for: each reply is held against what the secure side knows.

Products are checked whole, by Freivalds' test (`scx.party.freivalds`), in the dtype of the rows that were sent, before
noise is taken off. The feed-forward is three products with an activation between them: the untrusted side returns
those of gate and up as well, and the secure side computes the activation. Attention is no product with anything known
beforehand: of every request the secure side computes some rows itself, secretly chosen (`scx.party.attention`).

Random vectors and choices of rows come from the master key under a fresh nonce. Nothing of them leaves the secure side,
and after a reply that was refused all are drawn anew.
"""

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.activations import SiLUActivation
from transformers.models.llama.modeling_llama import LlamaMLP
from transformers.models.mistral.modeling_mistral import MistralMLP
from transformers.models.qwen2.modeling_qwen2 import Qwen2MLP
from transformers.models.qwen3.modeling_qwen3 import Qwen3MLP

import scx_kernels as ops
from scx.architecture import QKV, is_hooked, is_plain_linear, weight_of
from scx.devices import upload
from scx.keystream import KeyStream
from scx.party.attention import compare_attention
from scx.party.boundary import PartyLostError
from scx.party.freivalds import Comparison, Sketch, draw_vectors, unit_roundoff
from scx.party.live import Followed, accelerated

__all__ = ["IntegrityError", "Verifier", "checked_attention_rows"]

_FEED_FORWARDS = (LlamaMLP, MistralMLP, Qwen2MLP, Qwen3MLP)
_SHARED_ROWS = {
    "project_qkv": tuple(f"self_attn.{name}" for name in QKV),
    "project_output": ("self_attn.o_proj",),
    "gate and up": ("mlp.gate_proj", "mlp.up_proj"),
    "down": ("mlp.down_proj",),
}
"""Projections of a block that have their rows in common, by what is asked for."""
_PRODUCTS = ("query_product", "key_product", "value_product")
_ATTENTION_ROWS = 16
_ROWS_AT_ONCE = 128

_Found = tuple[str, Comparison]
"""What was checked, for messages, and what came of it."""


class IntegrityError(PartyLostError):
    """The untrusted side answered with other numbers than the operation gives, by more than rounding explains. Nothing
    of the reply was used; `restore_conversation` goes on with another party."""


def checked_attention_rows(tokens: int) -> int:
    """How many draws of a request's rows of attention are computed again, in each head: a sixteenth, at least 16, or
    all rows."""
    return min(tokens, max(_ATTENTION_ROWS, tokens // 16))


class Verifier:
    """Checks replies of the untrusted side.

    `largest_ratios` has, by what was checked, the largest error so far over what rounding explains; of an honest side
    no more than 1.

    Args:
        blocks: the decoder's, in the order in which they run: as they are now, whoever computes with them.
        draw: gives fresh random streams, independent of all before.
        device: the secure side's.
        read: a parameter of the blocks by its dotted name, and what it is like, where the blocks have no data.
    """

    def __init__(
        self,
        blocks: Sequence[Any],
        draw: Callable[[], KeyStream],
        device: torch.device,
        read: Callable[[str, Tensor], Tensor] | None = None,
    ) -> None:
        self._blocks = blocks
        self._draw = draw
        self._device = device
        self._read = read
        self._stream = draw()
        self._requests = itertools.count()
        self._sketches = Followed(by_numbers=True)
        self.largest_ratios: dict[str, float] = {}

    def __repr__(self) -> str:
        return f"Verifier(blocks={len(self._blocks)})"

    def __reduce__(self) -> str:
        raise TypeError("a verifier holds secret vectors and is never pickled")

    def prepare(self) -> None:
        """Take the images of all weights now, of which each is read once.

        Raises: ValueError naming a module that is no plain projection, feed-forward or activation.
        """
        for block in range(len(self._blocks)):
            for shared in _SHARED_ROWS:
                self._sketch(block, shared)

    def renew(self) -> None:
        """Look at some numbers of every weight, and take the images of those that are others."""
        self._sketches.renew()

    def check(
        self, operation: str, block: int, sent: Mapping[str, Tensor], reply: dict[str, Tensor], first_key: Tensor | None
    ) -> dict[str, Tensor]:
        """The reply, if it is what the operation gives for the tensors that were sent.

        Args:
            first_key: (B,) first token of each sequence that is no padding, or None.
        Raises: IntegrityError naming operation and block; ValueError naming a module that has come to be no plain one.
        """
        # Another dtype would be forgiven its own rounding.
        asked = {x.dtype for x in sent.values() if x.is_floating_point()}
        if not {x.dtype for x in reply.values()} <= asked:
            self._refuse(operation, block, f"reply is not in {' or '.join(map(str, asked))}, in which it was asked")
        for what, comparison in self._compare(operation, block, sent, reply, first_key):
            ratio = comparison.ratio
            if not ratio <= 1:  # nor if it is NaN
                self._refuse(operation, block, f"{what} is off by {ratio:.3g} times what rounding explains")
            self.largest_ratios[what] = max(ratio, self.largest_ratios.get(what, 0.0))
        return reply

    def _refuse(self, operation: str, block: int, reason: str) -> NoReturn:
        self._stream = self._draw()
        self._sketches.clear()
        raise IntegrityError(
            f"{operation}, block {block}: the untrusted side's {reason}; nothing of the reply was used"
        )

    def _compare(
        self, operation: str, block: int, sent: Mapping[str, Tensor], reply: dict[str, Tensor], first_key: Tensor | None
    ) -> Iterator[_Found]:
        if operation == "project_qkv":
            products = [reply[name] for name in _PRODUCTS]
            yield "q, k or v", self._sketch(block, operation).compare(sent["attention_input"], products)
        elif operation == "project_output":
            yield "output", self._sketch(block, operation).compare(sent["attention_rows"], [reply["output"]])
        elif operation == "feed_forward":
            yield from self._compare_feed_forward(block, sent["feed_forward_input"], reply)
        elif operation == "attend":
            q, k, v = (sent[name] for name in ("query", "key", "value"))
            attention, rows = self._blocks[block].self_attn, self._choose(block, q.shape[2])
            yield "attention", compare_attention(attention, q, k, v, first_key, reply["attention"], rows)

    def _compare_feed_forward(self, block: int, rows: Tensor, reply: dict[str, Tensor]) -> Iterator[_Found]:
        gate, up, result = reply["gate_product"], reply["up_product"], reply["feed_forward"]
        yield "gate or up", self._sketch(block, "gate and up").compare(rows, [gate, up])
        down, wide = self._sketch(block, "down"), ops.accumulation_dtype(gate.dtype)
        returned = reply.get("activation")
        # Some rows at a time: what is computed of them stays near the processor.
        for part in torch.arange(gate.shape[1]).split(_ROWS_AT_ONCE):
            at = slice(int(part[0]), int(part[-1]) + 1)
            activated = functional.silu(gate[:, at].to(wide)).mul_(up[:, at])
            if returned is not None:
                yield "activation", _compare_activation(activated, returned[:, at], up[:, at])
                activated = returned[:, at]
            yield "feed-forward", down.compare(activated, [result[:, at]])

    def _choose(self, block: int, tokens: int) -> Tensor:
        """Which rows of attention are computed again, (m,): all, or draws, of which some may be the same."""
        count = checked_attention_rows(tokens)
        if count == tokens:
            return torch.arange(tokens, device=self._device)
        drawn = self._stream.bits("rows of attention", [(block, 0, next(self._requests))], count, torch.int64)
        return upload(drawn[0].remainder(tokens), self._device)

    def _sketch(self, block: int, shared: str) -> Sketch:
        names = _SHARED_ROWS[shared]
        modules = [self._blocks[block].get_submodule(name) for name in names]
        if shared == "down":
            _check_feed_forward(self._blocks[block].mlp, block)
        sketch: Sketch = self._sketches.of(
            f"{block}.{shared}", modules, lambda: self._draw_sketch(block, names, modules)
        )
        return sketch

    def _draw_sketch(self, block: int, names: Sequence[str], modules: Sequence[nn.Module]) -> Sketch:
        for name, module in zip(names, modules, strict=True):
            if not (is_plain_linear(module) or (type(module) is nn.Linear and accelerated(module))):
                raise ValueError(
                    f"verify: layers.{block}.{name} ({type(module).__name__}) is no plain linear projection, or has "
                    "hooks, and its products cannot be checked; merge or remove what was put there, or use verify=False"
                )
        weights, biases, vectors = [], [], []
        for name, module in zip(names, modules, strict=True):
            bits = self._stream.bits(f"vectors of {name}", [(block, 0, 0)], module.out_features, torch.int32)
            vectors.append(upload(draw_vectors(bits[0]), self._device))
            weights.append(self._weight(block, name, module, "weight"))
            biases.append(None if module.bias is None else self._weight(block, name, module, "bias"))
        return Sketch.of(weights, biases, vectors)

    def _weight(self, block: int, name: str, module: nn.Module, leaf: str) -> Tensor:
        weight = weight_of(module, leaf)
        if not weight.is_meta:
            return weight
        if self._read is None:
            raise ValueError(
                f"verify: layers.{block}.{name}.{leaf} has no data here, and a model of load_secure_model needs "
                "verify=True there, to have it read once"
            )
        return self._read(f"{block}.{name}.{leaf}", weight)


def _check_feed_forward(mlp: Any, block: int) -> None:
    plain = type(mlp) in _FEED_FORWARDS and type(mlp.act_fn) in (SiLUActivation, nn.SiLU)
    if not plain or any(is_hooked(x) and not accelerated(x) for x in (mlp, mlp.act_fn)):
        raise ValueError(
            f"verify: layers.{block}.mlp ({type(mlp).__name__}) has another activation than SiLU, or hooks, and its "
            "result cannot be checked; use verify=False"
        )


def _compare_activation(own: Tensor, given: Tensor, up: Tensor) -> Comparison:
    """silu(gate)·up as it was returned in a half precision: rounded behind silu and behind the product."""
    u, wide = unit_roundoff(given.dtype), own.dtype
    relative = 2 * u + u * u + 2**-18  # and a few roundings of either side's accumulation dtype
    least = torch.finfo(given.dtype).tiny * (1 + up.to(wide).abs())
    return Comparison((given.to(wide) - own).abs(), relative * own.abs() + least)
