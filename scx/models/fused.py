"""The fused placement: both sides share the model's own device, and what lies in memory between operations is encoded.

The modules stay; their classes become subclasses of their own that run the protocol's steps. So parameter names, hooks
and recorded outputs keep working, no weight is copied, and undoing the swap restores the model exactly.

Rows travel as the protocol says: the residual stream is token-permuted with redundant rows among them, and what each
half of a block takes out of it lies under a permutation of its own, with fresh redundant rows; token order exists only
between q, k, v and the output projection, where features are permuted instead.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.cache_utils import Cache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import eager_attention_forward

import scx_kernels as ops
from scx.architecture import QKV, SUPPORTED, Decoder, head_norms, is_plain_linear, sliding_window
from scx.encoding import FeatureKey, Noise, RowKey
from scx.keys import Session
from scx.kvcache import EncodedCache
from scx.kvcache.conversation import ConversationCache
from scx.kvcache.layers import Stored
from scx.models.encoded import EncodedModel, ModelEncoding
from scx.models.request import Admitted
from scx.models.step import Step
from scx.models.swap import encode_class, restore_class

__all__ = ["EncodedAttention", "EncodedDecoderLayer", "FusedEncoding", "FusedModel", "check_plain_linear", "fuse"]


class EncodedAttention(nn.Module):
    """Attention on encoded rows: token-permuted rows in, token-permuted rows out (another key), (B, T, D)."""

    config: Any
    layer_idx: int
    scaling: float
    attention_dropout: float
    q_proj: nn.Linear
    k_proj: nn.Linear
    v_proj: nn.Linear
    o_proj: nn.Linear

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        past_key_values: EncodedCache | None = None,
        *,
        scx_step: Step,
        scx_noise: Noise | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        layer_idx, device, cache = self.layer_idx, hidden_states.device, past_key_values
        feature_key, keys = scx_step.feature_key(layer_idx, device), scx_step.layer_keys(layer_idx, device)
        cos, sin = position_embeddings
        slots, into = None, {}
        if cache is not None and not self._wants_gradients(cache):
            slots = cache.room(layer_idx, cos.shape[1], feature_key.key.shape, self.q_proj.weight, scx_step.writes)
        if slots is not None:
            # A layer's first tokens attend to one another alone: their K and V go sealed into the cache, and unsealed,
            # as q does, into this pass's attention.
            into = {**slots.arguments, "return_unsealed": slots.sealing is not None and slots.offset == 0}

        products = self._project_qkv(hidden_states, scx_noise)
        q, k, v = feature_key.encode(products, cos, sin, keys.attention.position, **head_norms(self), **into)
        stored = Stored(k, v)
        if cache is not None and slots is not None:
            held = cache.take_in(layer_idx, slots)
            stored = stored if into["return_unsealed"] else held
        elif cache is not None:
            q, stored, attention_mask = _meet_cache(cache, layer_idx, q, stored, attention_mask, scx_step)
        if q.device != device:
            feature_key, keys = scx_step.feature_key(layer_idx, q.device), scx_step.layer_keys(layer_idx, q.device)
        rows, weights = self._attend(q, stored, attention_mask, feature_key, keys.output, **kwargs)
        return self.o_proj(rows.to(device)), weights

    def _wants_gradients(self, cache: EncodedCache) -> bool:
        """Whether gradients are to flow through the cache, into which nothing is then written in place."""
        if not self.q_proj.weight.requires_grad or not torch.is_grad_enabled():
            return False
        if self.layer_idx in cache.session.settings.sealed_layers:
            raise ValueError(
                "cache_encoding: gradients do not flow through a sealed cache; "
                "use torch.no_grad(), name the mode, or use_cache=False"
            )
        return True

    def _project_qkv(self, rows: Tensor, noise: Noise | None) -> Sequence[Tensor]:
        """The products of encoded rows, of q, k and v, (B, T, *) each; without the noise's image if there is noise."""
        projections = (self.q_proj, self.k_proj, self.v_proj)
        weights = [projection.weight for projection in projections]
        biases = [projection.bias for projection in projections]
        if noise is not None:
            for projection in projections:
                check_plain_linear(projection, f"layers.{self.layer_idx}")
            return [
                ops.permuted_linear(rows, weight, bias=bias, image=image)
                for weight, bias, image in zip(weights, biases, noise.images, strict=True)
            ]
        if all(is_plain_linear(projection) for projection in projections):
            return ops.permuted_linears(rows, weights, biases=biases)
        return [projection(rows) for projection in projections]

    def _attend(
        self, q: Tensor, stored: Stored, mask: Tensor | None, feature_key: FeatureKey, key: RowKey, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        """Attention with the backend that the model is set to, π_r undone; (B, T, H*d) rows of the output encoding."""
        (k, v, sealing), output_index = stored, feature_key.output
        backend = self.config._attn_implementation
        if backend == "sdpa" and not self.training and kwargs.get("is_causal") is None:
            options: dict[str, Any] = {"softmax_scale": self.scaling, "output_index": output_index, "sealing": sealing}
            if q.shape[2] == 1 and mask is None and key.entry is None:
                out = ops.attention_step(q, k, v, **options)
                return out.reshape(len(out), 1, -1), None
            options |= {"mask": mask, "is_causal": mask is None and q.shape[2] > 1}
            rows = ops.attention(q, k, v, row_index=key.entry, redundant=key.redundant, **options)
            return rows if key.entry is not None else rows.transpose(1, 2).flatten(2), None
        if sealing is not None:
            k, v = ops.unseal(k, sealing, is_value=False), ops.unseal(v, sealing, is_value=True)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(backend, eager_attention_forward)
        out, weights = attend(
            self,
            q,
            k,
            v,
            mask,
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            sliding_window=sliding_window(self),
            **kwargs,
        )
        return key.enter_heads(out, output_index), weights


def _meet_cache(
    cache: EncodedCache, layer_idx: int, q: Tensor, new: Stored, mask: Tensor | None, step: Step
) -> tuple[Tensor, Stored, Tensor | None]:
    """Append new K and V where the layer's cache lies, and bring the queries there: a row moves, the cache does not."""
    layer = cache.layers[layer_idx] if layer_idx < len(cache.layers) else None
    k, v, _ = new
    if layer is not None and layer.is_initialized and layer.keys is not None:
        device = layer.keys.device
        if device != q.device:
            q, k, v = q.to(device), k.to(device), v.to(device)
            mask = None if mask is None else mask.to(device)
    return q, cache.append(k, v, layer_idx, step.writes), mask


class EncodedDecoderLayer(nn.Module):
    """One block on the encoded residual stream. Each of its halves takes rows out of it into an encoding of its own and
    adds what comes back.

    The steps are the split placement's (`scx.party.stage`) without the way over a boundary: rows enter the attention's
    encoding; q, k and v are projected, restored and encoded; attention; the output projection, added; rows enter the
    feed-forward's encoding; feed-forward, added.
    """

    self_attn: EncodedAttention
    mlp: nn.Module
    input_layernorm: nn.Module
    post_attention_layernorm: nn.Module

    def forward(self, hidden_states: Tensor, *, scx_step: Step, **kwargs: Any) -> Tensor:
        layer_idx, device = self.self_attn.layer_idx, hidden_states.device
        keys = scx_step.layer_keys(layer_idx, device)
        rows = scx_step.start(hidden_states) if layer_idx == 0 else hidden_states

        noise = scx_step.noise if layer_idx == 0 else None
        entered = keys.attention.enter(rows, self.input_layernorm, noise)
        projected, _ = self.self_attn(hidden_states=entered, scx_step=scx_step, scx_noise=noise, **kwargs)
        rows = keys.output.add_to(rows, projected)

        entered = keys.feed_forward.enter(rows, self.post_attention_layernorm)
        rows = keys.feed_forward.add_to(rows, self.mlp(entered))

        is_last = layer_idx == scx_step.session.shape.num_layers - 1
        return scx_step.leave(rows) if is_last else rows


class FusedEncoding(ModelEncoding):
    """What a model in the fused placement knows beyond its weights."""

    cache_kind = part_kind = EncodedCache

    def undo(self, decoder: Decoder) -> None:
        for layer in decoder.layers:
            restore_class(layer.self_attn)
            restore_class(layer)

    def open_step(self, session: Session, request: Admitted, cache: EncodedCache | None, device: torch.device) -> Step:
        """The keys of one forward pass; rows of a lone token that continues a session stay in token order."""
        token_keys = None
        if request.opens or request.tokens > 1:
            scale = None if self.scale is None else self.scale.to(device)
            token_keys = session.draw_token_keys(request.tokens, request.batch, scale, self.dtype, device)
        return Step(session, session if cache is None else cache, token_keys)

    def check_adoptable(self, cache: Cache | None) -> None:
        super().check_adoptable(cache)
        if isinstance(cache, EncodedCache) and not cache.is_complete:
            raise ValueError("past_key_values: this is one part of a split cache")

    def check_cache(self, cache: Cache | None, batch: int) -> EncodedCache:
        """A cache that is to be continued by `batch` sequences, attached to its session; a plain one, encoded."""
        if isinstance(cache, DynamicCache) and not isinstance(cache, ConversationCache):
            return EncodedCache.encode(cache, self.open_session(batch))
        if not isinstance(cache, EncodedCache):
            raise TypeError(
                f"past_key_values: expected an encoded cache, or a DynamicCache of the plain model, got a "
                f"{type(cache).__name__} that holds tokens; prefill with the encoded model"
            )
        if not cache.is_complete:
            raise ValueError("past_key_values: this is one part of a split cache; give gpu_kvcache and cpu_kvcache")
        known = self.living_session(cache.session_id)
        if known is not None and not cache.is_attached:
            cache.attach(known)
        session = cache.session
        if session.shape.fingerprint != self.shape.fingerprint:
            raise ValueError(f"past_key_values: session {session.id} belongs to another model")
        difference = session.settings.difference(self.generator.settings(self.shape))
        if difference:
            raise ValueError(
                f"past_key_values: session {session.id} and the model's key generator differ: {difference}"
            )
        cache.check_continued()
        if cache.rows != batch:
            raise ValueError(f"past_key_values: holds {cache.rows} sequences, the input has {batch}")
        session.keep_keystream = self.generator.keep_keystream
        return cache


class FusedModel(EncodedModel):
    """The decoder stack: opens or continues a request's session, and runs the blocks with its keys."""

    _scx: FusedEncoding

    def _serve(
        self, request: Admitted, *, attention_mask: Tensor | None, position_ids: Tensor | None, use_cache: bool,
        **kwargs: Any,
    ) -> Any:  # fmt: skip
        encoding, cache = self._scx, request.cache
        kept: EncodedCache | None = None
        if request.opens:
            encoding.check_adoptable(cache)
            session = encoding.open_session(request.batch)
            if use_cache or cache is not None:
                empty: Any = DynamicCache(config=self.config) if cache is None else cache
                kept = EncodedCache.adopt(empty, session)
        else:
            kept = encoding.check_cache(cache, request.batch)
            session = kept.session

        step = encoding.open_step(session, request, kept, self.embed_tokens.weight.device)
        attention = self.layers[0].self_attn
        step.prepare(request.batch, request.tokens, [attention.get_submodule(name).weight for name in QKV])
        # Who names a stage serves a model: the kernels, which have no backward, are not to be kept out by its weights.
        restored = nullcontext() if kept is None else kept.restored_on_failure()
        with torch.set_grad_enabled(torch.is_grad_enabled() and request.mode is None), restored:
            outputs = super(EncodedModel, self).forward(  # the original's: what this class is swapped in above
                inputs_embeds=step.embed(self.embed_tokens, request.input_ids, request.inputs_embeds),
                attention_mask=attention_mask,
                position_ids=position_ids,
                past_key_values=kept,
                use_cache=use_cache,
                return_dict=True,
                scx_step=step,
                **kwargs,
            )
        if outputs.get("hidden_states") is not None:
            outputs.hidden_states = _decode_hidden_states(outputs.hidden_states, step)
        return outputs


def _decode_hidden_states(hidden_states: Sequence[Tensor | None], step: Step) -> tuple[Tensor | None, ...]:
    """Recorded hidden states in token order. The first one recorded stands in for the rows that the step embedded."""
    decoded = [None if states is None else step.start(states) for states in hidden_states[:1]]
    decoded += hidden_states[1:]
    last = step.session.shape.num_layers
    return tuple(states if i >= last or states is None else step.leave(states) for i, states in enumerate(decoded))


def check_plain_linear(projection: nn.Module, place: str) -> None:
    """A projection behind noise must be one whose weight alone gives the noise's image."""
    if not is_plain_linear(projection):
        raise TypeError(
            f"{place}: alp=True needs plain nn.Linear projections without hooks, whose weight alone gives the noise's "
            f"image; got {type(projection).__name__}"
        )


def fuse(decoder: Decoder, encoding: FusedEncoding) -> None:
    """Put a decoder into the fused placement."""
    layer_class, attention_class = SUPPORTED[type(decoder)]
    decoder._scx = encoding
    for layer in decoder.layers:
        encode_class(layer.self_attn, EncodedAttention, attention_class)
        encode_class(layer, EncodedDecoderLayer, layer_class)
    encode_class(decoder, FusedModel)
