"""What a reply must look like: the secure side believes no shape that the untrusted side sends."""

from collections.abc import Mapping

import torch
from torch import Tensor

from scx.architecture import ModelShape
from scx.party.boundary import INTEGERS, PartyLostError, Request
from scx.party.plan import Plan, inner_products

__all__ = ["ReplyRule"]

_Shapes = dict[str, tuple[int, ...]]


class ReplyRule:
    """The tensors and shapes that answer a request, from what both parties know.

    Args:
        plan, shape: the agreement, and the model's sizes.
        inner_size: features inside a feed-forward, F; for a plan with `verify`.
    """

    def __init__(self, plan: Plan, shape: ModelShape, inner_size: int = 0) -> None:
        self.plan = plan
        self.shape = shape
        self.inner_size = inner_size
        self.vocab_size = shape.vocab_size  # logits of the head, which may be given another size

    def check(self, request: Request, reply: Mapping[str, Tensor]) -> None:
        """Raises PartyLostError for a reply with other tensors, shapes or kinds of numbers than were asked for."""
        expected = self.expected(request)
        got = {name: tuple(x.shape) for name, x in reply.items()}
        if got != expected:
            raise PartyLostError(
                f"{request.operation}, block {request.block}: expected {expected} from the untrusted side, got {got}"
            )
        for name, x in reply.items():
            is_right = x.dtype == torch.int64 if name in INTEGERS else x.is_floating_point()
            if not is_right:
                kind = "int64" if name in INTEGERS else "floating-point"
                raise PartyLostError(
                    f"{request.operation}, block {request.block}: expected {kind} {name}, got {x.dtype}"
                )

    def check_values(self, request: Request, reply: Mapping[str, Tensor]) -> None:
        """Raises PartyLostError for tokens outside the vocabulary, and for scales that are none; other numbers are
        believed."""
        tokens, size = reply.get("top_tokens"), self.vocab_size
        if tokens is not None and tokens.numel() and not 0 <= tokens.min() <= tokens.max() < size:
            raise PartyLostError(f"{request.operation}, block {request.block}: expected tokens 0..{size - 1}")
        # Zero is a scale: that of a feature which is zero in every row.
        if request.operation == "calibrate" and not all(bool((x.isfinite() & (x >= 0)).all()) for x in reply.values()):
            raise PartyLostError("calibrate: expected finite scales from 0, not negative")

    def expected(self, request: Request) -> _Shapes:
        """The shapes by name."""
        shape, plan, tensors = self.shape, self.plan, request.tensors
        rows = next((tuple(x.shape[:2]) for name, x in tensors.items() if name != "positions"), ())
        if request.operation == "calibrate":
            hidden, heads = (plan.num_layers, shape.hidden_size), (plan.num_layers, shape.num_heads * shape.head_dim)
            return {"attention_scale": hidden, "output_scale": heads, "feed_forward_scale": hidden}
        if request.operation == "project_qkv":
            return self._products(rows)
        if request.operation == "attend":
            return {"attention": tuple(tensors["query"].shape)}
        if request.operation == "project_output":
            return {"output": (*rows, shape.hidden_size)}
        if request.operation == "feed_forward":
            inner = inner_products(tensors["feed_forward_input"].dtype) if plan.verify else ()
            return {"feed_forward": (*rows, shape.hidden_size), **dict.fromkeys(inner, (*rows, self.inner_size))}
        if request.operation in ("enter", "advance") and request.block + 1 < plan.num_layers:
            return self._products(rows)
        if request.operation == "head" or (request.operation in ("enter", "advance") and plan.prefill_top_k):
            return {name: (*rows, plan.prefill_top_k or 0) for name in ("top_logits", "top_tokens")}
        if request.operation in ("enter", "advance"):
            return {"hidden": (*rows, shape.hidden_size)}
        if request.operation in ("run_middle", "score", "pass_on"):
            return self._generated(request, rows)
        return {}

    def _products(self, rows: tuple[int, ...]) -> _Shapes:
        q, kv = self.shape.num_heads * self.shape.head_dim, self.shape.num_kv_heads * self.shape.head_dim
        return {"query_product": (*rows, q), "key_product": (*rows, kv), "value_product": (*rows, kv)}

    def _generated(self, request: Request, rows: tuple[int, ...]) -> _Shapes:
        shape = self.shape
        hidden: _Shapes = {"hidden": (*rows, shape.hidden_size)}
        batch, tokens = rows
        # The end blocks' keys have grown by this step's tokens when their scores come.
        scores: _Shapes = {
            "scores": (batch, shape.num_heads, tokens, request.key_rows + tokens),
            "value": (batch, shape.num_kv_heads, tokens, shape.head_dim),
        }
        if request.operation == "run_middle":
            return hidden
        if request.operation == "score":
            return scores
        has_next = self.plan.end > 0 and request.block + 1 < self.plan.num_layers
        return {**hidden, **scores} if has_next else hidden
