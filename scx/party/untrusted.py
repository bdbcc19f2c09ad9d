"""The untrusted party: it holds the blocks' weights and what it received, and answers requests.

Nothing in here knows a key or a module that does. Notation: B sequences, S tokens, T encoded rows, n new tokens,
N cached tokens, D features, H query heads, G key/value heads, d head size. On one of several ranks (`scx.party.ranks`)
H and G count its own heads, and its layers have the weights of these.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

import scx_kernels as ops
from scx.architecture import QKV
from scx.calibration import measure_scale
from scx.kvcache.layers import GrowingLayer, append
from scx.party.attention import attend
from scx.party.boundary import Request, Rule
from scx.party.held import Held
from scx.party.plan import Plan, inner_products
from scx.projections import project_noisy, projection_dtype

__all__ = ["UntrustedParty", "sum_in_float32"]

_HEAD_ROWS = 256  # of which all logits lie in memory at once


class UntrustedParty:
    """Weights, and what was received.

    Args:
        layers: the decoder's blocks, as transformers made them, of which the plan counts the first ones.
        rotary: the decoder's rotary embedding, a copy of its own.
        plan: the agreement with the secure side.
        head: final norm and head, rows (B, T, D) -> logits; for a plan with `prefill_top_k`.

    Raises: ValueError for such a plan without a head.
    """

    def __init__(
        self, layers: Sequence[Any], rotary: nn.Module, plan: Plan, head: Callable[[Tensor], Tensor] | None = None
    ) -> None:
        if plan.prefill_top_k is not None and head is None:
            raise ValueError("head: the plan has a prefill's logits come from here, and there is no head")
        self.layers = layers
        self.plan = plan
        self.supply(rotary, head)
        self._held: dict[str, Held] = {}

    def __repr__(self) -> str:
        return f"UntrustedParty(layers={len(self.layers)}, conversations={len(self._held)})"

    def supply(self, rotary: nn.Module, head: Callable[[Tensor], Tensor] | None) -> None:
        """Go on with this rotary embedding and head."""
        self.rotary = rotary
        self.head_of_rows = head

    @property
    def conversations(self) -> tuple[str, ...]:
        """Public ids of the conversations of which something is held."""
        return tuple(self._held)

    def begin(self, request: Request, rule: Rule) -> Callable[[], Mapping[str, Tensor]]:
        """`receive`, as the boundary calls it: on an accelerator the reply is only queued by then."""
        reply = self.receive(request)
        return lambda: reply

    @torch.no_grad()
    def receive(self, request: Request) -> Mapping[str, Tensor]:
        """Do what a request asks for. Raises KeyError for an operation or a conversation that is not known."""
        if request.operation == "open":
            self._held[request.conversation] = Held(request.tensors.get("first_key"))
            return {}
        if request.operation == "close":
            self._held.pop(request.conversation, None)
            return {}
        if request.operation == "calibrate":
            return self.calibrate(request.tensors["embeddings"])
        answer: Callable[[Held, Request], Mapping[str, Tensor]] = _OPERATIONS[request.operation].__get__(self)
        held = self._held[request.conversation]
        if request.step != held.step:
            held.step = request.step
            held.truncate(request.past, request.key_rows)
        return answer(held, request)

    def calibrate(self, rows: Tensor) -> dict[str, Tensor]:
        """Embeddings (1, n, D) -> the scale of rows where they enter attention, output projection and feed-forward,
        (L, D), (L, H*d) and (L, D)."""
        held, blocks = Held(None), range(self.plan.num_layers)
        held.unlocked = {block: GrowingLayer() for block in blocks}
        positions = torch.arange(rows.shape[1], device=rows.device)[None]

        def run() -> None:
            self._run_blocks(held, blocks, rows, positions)

        scales = measure_scale(self.layers[: len(blocks)], run, rows.device, (self, "rotary"))
        return {f"{name}_scale": scale for name, scale in scales.items()}

    def project_qkv(self, held: Held, request: Request) -> dict[str, Tensor]:
        """Rows (B, T, D) that enter q, k and v -> their products."""
        return self._project(held, request.block, request.tensors["attention_input"])

    def attend(self, held: Held, request: Request) -> dict[str, Tensor]:
        """Causal attention of feature-permuted q (B, H, n, d) on k and v (B, G, N, d) -> (B, H, n, d)."""
        q, k, v = (request.tensors[name] for name in ("query", "key", "value"))
        if self.plan.reuse_feature_keys and request.block in self.plan.start_blocks:
            k, v, _ = append(held.encoded.setdefault(request.block, GrowingLayer()), k, v)
        return {"attention": attend(self.layers[request.block].self_attn, q, k, v, held.first_key)}

    def project_output(self, held: Held, request: Request) -> dict[str, Tensor]:
        """Rows (B, T, H*d) -> their output projection, (B, T, D), upon the residual rows if these are here."""
        rows = self.layers[request.block].self_attn.o_proj(request.tensors["attention_rows"])
        if held.residual is not None:
            rows, held.residual = held.residual + rows, None
        return {"output": rows}

    def feed_forward(self, held: Held, request: Request) -> dict[str, Tensor]:
        """Rows (B, T, D) -> norm and feed-forward. To be verified: normalised rows -> it and what is inside."""
        rows = request.tensors["feed_forward_input"]
        if self.plan.verify:
            return self._feed_forward_with_inner(request.block, rows)
        return {"feed_forward": self._feed_forward(request.block, rows)}

    def enter(self, held: Held, request: Request) -> dict[str, Tensor]:
        """Residual rows (B, T, D) -> through the feed-forward to the next block's products. The rows stay here."""
        return self._go_on(held, request.block, request.tensors["feed_forward_input"])

    def advance(self, held: Held, request: Request) -> dict[str, Tensor]:
        """Attention rows (B, T, H*d) -> output projection, residual, feed-forward, and the next block's products."""
        projected = self.layers[request.block].self_attn.o_proj(request.tensors["attention_rows"])
        if held.residual is None:
            raise RuntimeError(f"advance: no residual rows are here in block {request.block}")
        return self._go_on(held, request.block, held.residual + projected)

    def head(self, held: Held, request: Request) -> dict[str, Tensor]:
        """Rows (B, T, D) behind the last block -> their largest logits."""
        return self._top_logits(request.tensors["head_input"])

    def unlock(self, held: Held, request: Request) -> dict[str, Tensor]:
        """Strip and order the middle blocks' own products with shared positions (M, B, S), and rotate the keys."""
        for position, block in zip(request.tensors["token_position"], self.plan.middle_blocks, strict=True):
            k, v = (ops.unlock(self._heads(block, z), position) for z in held.products.pop(block))
            k = self._rotate(block, None, k, request.tensors["positions"])[1]
            append(held.unlocked.setdefault(block, GrowingLayer()), k, v)
        return {}

    def encoded_keys(self, held: Held, request: Request) -> dict[str, Tensor]:
        """Keep an end block's Kᶜ, (B, G, T, d)."""
        held.keys[request.block] = request.tensors["encoded_keys"]
        return {}

    def run_middle(self, held: Held, request: Request) -> dict[str, Tensor]:
        """New tokens' hidden states (B, n, D) -> behind the middle blocks."""
        rows, positions = request.tensors["hidden"], request.tensors["positions"]
        return {"hidden": self._run_blocks(held, self.plan.middle_blocks, rows, positions)}

    def score(self, held: Held, request: Request) -> dict[str, Tensor]:
        """Hidden states (B, n, D) -> an end block's scores (B, H, n, rows) on its Kᶜ, and the new V (B, G, n, d)."""
        return self._score(held, request.block, request.tensors["hidden"], request.tensors["positions"])

    def pass_on(self, held: Held, request: Request) -> dict[str, Tensor]:
        """Hidden states behind a block's attention -> its feed-forward, the middle blocks if these follow, and the next
        end block's scores if one follows."""
        rows, positions, block = request.tensors["hidden"], request.tensors["positions"], request.block
        if block >= 0:
            rows = rows + self._feed_forward(block, rows)
        if block + 1 in self.plan.middle_blocks:
            rows = self._run_blocks(held, self.plan.middle_blocks, rows, positions)
            block = self.plan.middle_blocks[-1]
        if block + 1 == self.plan.num_layers:
            return {"hidden": rows}
        return {"hidden": rows, **self._score(held, block + 1, rows, positions)}

    def select(self, held: Held, request: Request) -> dict[str, Tensor]:
        """Go on with the given rows of the batch, (B',) int64."""
        held.select(request.tensors["rows"])
        return {}

    def _project(self, held: Held, block: int, rows: Tensor) -> dict[str, Tensor]:
        attention = self.layers[block].self_attn
        q, k, v = (_linear(attention.get_submodule(name), rows) for name in QKV)
        if block in self.plan.middle_blocks:
            held.products[block] = (k, v)
        return {"query_product": q, "key_product": k, "value_product": v}

    def _go_on(self, held: Held, block: int, rows: Tensor) -> dict[str, Tensor]:
        rows = rows + self._feed_forward(block, rows)
        if block + 1 == self.plan.num_layers:
            held.residual = None
            return {"hidden": rows} if self.plan.prefill_top_k is None else self._top_logits(rows)
        held.residual = rows
        return self._project(held, block + 1, self.layers[block + 1].input_layernorm(rows))

    def _top_logits(self, rows: Tensor) -> dict[str, Tensor]:
        """Norm and head: the k largest logits of every row and their tokens, (B, T, k) each, largest first."""
        k, head = self.plan.prefill_top_k, self.head_of_rows
        if k is None or head is None:
            raise RuntimeError("head: the plan keeps it on the secure side")
        top = [head(part).topk(k, dim=-1) for part in rows.split(_HEAD_ROWS, dim=1)]
        return {
            "top_logits": torch.cat([part.values for part in top], dim=1),
            "top_tokens": torch.cat([part.indices for part in top], dim=1),
        }

    def _feed_forward(self, block: int, rows: Tensor) -> Tensor:
        layer = self.layers[block]
        result: Tensor = layer.mlp(layer.post_attention_layernorm(rows))
        return result

    def _feed_forward_with_inner(self, block: int, rows: Tensor) -> dict[str, Tensor]:
        mlp = self.layers[block].mlp
        gate, up = mlp.gate_proj(rows), mlp.up_proj(rows)
        activation = mlp.act_fn(gate) * up
        inner = {"gate_product": gate, "up_product": up, "activation": activation}
        returned = {name: inner[name] for name in inner_products(rows.dtype)}
        return {"feed_forward": mlp.down_proj(activation), **returned}

    def _run_blocks(self, held: Held, blocks: Sequence[int], rows: Tensor, positions: Tensor) -> Tensor:
        """Plain rows (B, n, D) through blocks whose cache is plain."""
        for block in blocks:
            layer = self.layers[block]
            q, k, v = self._plain_heads(block, layer.input_layernorm(rows), positions)
            k, v, _ = append(held.unlocked[block], k, v)
            attended = attend(layer.self_attn, q, k, v, held.first_key).transpose(1, 2).flatten(2)
            rows = rows + layer.self_attn.o_proj(attended)
            rows = rows + self._feed_forward(block, rows)
        return rows

    def _score(self, held: Held, block: int, rows: Tensor, positions: Tensor) -> dict[str, Tensor]:
        q, k, v = self._plain_heads(block, self.layers[block].input_layernorm(rows), positions)
        held.keys[block] = keys = torch.cat((held.keys[block], k), dim=2)
        wide = ops.accumulation_dtype(q.dtype)
        grouped = q.unflatten(1, (keys.shape[1], -1)).to(wide)
        scores = grouped @ keys.to(wide).unsqueeze(2).transpose(-1, -2) * self.layers[block].self_attn.scaling
        return {"scores": scores.flatten(1, 2), "value": v}

    def _plain_heads(self, block: int, rows: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Plain q (B, H, n, d), k and v (B, G, n, d) of normalised rows, rotated."""
        attention = self.layers[block].self_attn
        q, k, v = (self._heads(block, attention.get_submodule(name)(rows)) for name in QKV)
        q, k = self._rotate(block, q, k, positions)
        return q, k, v

    def _heads(self, block: int, product: Tensor) -> Tensor:
        return product.unflatten(-1, (-1, self.layers[block].self_attn.head_dim)).transpose(1, 2)

    def _rotate(self, block: int, q: Tensor | None, k: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        attention = self.layers[block].self_attn
        q = k if q is None else q
        if hasattr(attention, "q_norm"):
            q, k = attention.q_norm(q) if q is not k else k, attention.k_norm(k)
        cos, sin = self.rotary(k, positions)
        rotated: tuple[Tensor, Tensor] = apply_rotary_pos_emb(q, k, cos, sin)
        return rotated


_OPERATIONS: dict[str, Any] = {
    name: getattr(UntrustedParty, name)
    for name in (
        "project_qkv", "attend", "project_output", "feed_forward", "enter", "advance", "head", "unlock",
        "encoded_keys", "run_middle", "score", "pass_on", "select",
    )
}  # fmt: skip


def sum_in_float32() -> None:
    """Have this process's accelerator sum products as checks of them expect: in float32 to the end."""
    products = torch.backends.cuda.matmul
    products.allow_tf32 = False
    products.allow_bf16_reduced_precision_reduction = products.allow_fp16_reduced_precision_reduction = False


def _linear(module: Any, rows: Tensor) -> Tensor:
    """`module(rows)`; rows under noise, wider than the weight, are multiplied in their own dtype."""
    product: Tensor = module(rows) if rows.dtype == projection_dtype(module) else project_noisy(module, rows)
    return product
