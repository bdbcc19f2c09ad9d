"""The fused placement: both sides share the model's own device, and what lies in memory between operations is encoded.

The modules stay; their classes become subclasses of their own that run the protocol's steps. So parameter names and
recorded outputs keep working, no weight is copied, and undoing the swap restores the model exactly.

Rows travel as the protocol says: the residual stream is token-permuted with redundant rows among them, and what each
half of a block takes out of it lies under a permutation of its own, with fresh redundant rows; token order exists only
between q, k, v and the output projection, where features are permuted instead. A block that somebody has hooked is
given and gives rows in token order, without redundant ones, as the plain model's; hooks inside of a block see the rows
as they are there.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from inspect import signature
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.cache_utils import Cache
from transformers.generation.continuous_batching.cache import PagedAttentionCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import eager_attention_forward

import scx_kernels as ops
from scx.architecture import (
    SUPPORTED,
    Decoder,
    has_hooks,
    head_norms,
    home,
    is_plain_linear,
    running_blocks,
    sliding_window,
)
from scx.devices import is_autocast
from scx.encoding import FeatureKey, Noise, RowKey, TokenKeys
from scx.keys import Session
from scx.kvcache import EncodedCache
from scx.kvcache.conversation import ConversationCache, working_on
from scx.kvcache.layers import SealedLayer, Stored
from scx.models.encoded import EncodedModel, EncodedModule, EncodedOuter, ModelEncoding, generating_models
from scx.models.gradients import refuse_backward, wants_gradients
from scx.models.request import GIVEN_TO_ATTENTION, Admitted
from scx.models.step import Step
from scx.models.swap import encode_class, restore_class
from scx.projections import project_quiet
from scx_kernels.hidden import guarded

__all__ = ["EncodedAttention", "EncodedDecoderLayer", "FusedEncoding", "FusedModel", "fuse"]

_GIVEN = (*GIVEN_TO_ATTENTION, "attention_mask", "kwargs")
_SDPA_KEYWORDS = (
    "cache",
    "softcap",
    *(name for name in signature(sdpa_attention_forward).parameters if name not in _GIVEN),
)
"""What transformers' sdpa acts upon beside what every block gives it."""


_PAGES_ARE_NOT_SEALED = (
    "the pages of continuous batching are not sealed, and K and V would lie in them as they are; use generate with a "
    "DynamicCache, or cache_encoding='permuted'"
)


class SealedOuter(EncodedOuter):
    """A model that generates, around a decoder whose caches are sealed."""

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> Any:
        """Not with sealed caches: every way to generate in continuous batches begins here."""
        raise ValueError(f"generate_batch, cache_implementation='paged': {_PAGES_ARE_NOT_SEALED}")


class EncodedAttention(EncodedModule):
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
        scx_place: int,
        scx_noise: Noise | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        place, device, cache = scx_place, hidden_states.device, past_key_values
        feature_key, keys = scx_step.feature_key(place, device), scx_step.layer_keys(place, device)
        cos, sin = position_embeddings
        products = self._project_qkv(hidden_states, scx_noise)
        has_gradients = torch.is_grad_enabled() and any(product.requires_grad for product in products)
        slots, into = None, {}
        if cache is not None and scx_step.in_place and not has_gradients:
            slots = cache.room(place, cos.shape[1], feature_key.key.shape, products[1], scx_step.writes)
        if slots is not None:
            # A layer's first tokens attend to one another alone: their K and V go sealed into the cache, and unsealed,
            # as q does, into this pass's attention.
            into = {**slots.arguments, "return_unsealed": slots.sealing is not None and slots.offset == 0}

        q, k, v = feature_key.encode(products, cos, sin, keys.attention.position, **head_norms(self), **into)
        stored = Stored(k, v)
        if cache is not None and slots is not None:
            held = cache.take_in(place, slots)
            stored = stored if into["return_unsealed"] else held
        elif cache is not None and has_gradients and isinstance(cache.layers[place], SealedLayer):
            _seal_first(cache, place, k, v, scx_step)
        elif cache is not None:
            q, stored, attention_mask = _meet_cache(cache, place, q, stored, attention_mask, scx_step)
        if q.device != device:
            feature_key, keys = scx_step.feature_key(place, q.device), scx_step.layer_keys(place, q.device)
        rows, weights = self._attend(q, stored, attention_mask, feature_key, keys.output, **kwargs)
        return self.o_proj(rows.to(device)), weights

    def _project_qkv(self, rows: Tensor, noise: Noise | None) -> Sequence[Tensor]:
        """The products of encoded rows, of q, k and v, (B, T, *) each; without the noise's image if there is noise."""
        projections = (self.q_proj, self.k_proj, self.v_proj)
        if noise is not None:
            return project_quiet(projections, rows, noise.values(rows.dtype), self.layer_idx)
        if all(is_plain_linear(projection) for projection in projections) and not is_autocast(rows):
            weights = [projection.weight for projection in projections]
            return ops.permuted_linears(rows, weights, biases=[projection.bias for projection in projections])
        return [projection(rows) for projection in projections]

    def _attend(
        self, q: Tensor, stored: Stored, mask: Tensor | None, feature_key: FeatureKey, key: RowKey, /, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        """Attention with the backend that the model is set to, π_r undone; (B, T, H*d) rows of the output encoding."""
        (k, v, sealing), output_index = stored, feature_key.output
        backend = self.config._attn_implementation
        if self._is_plain_sdpa(backend, kwargs):
            options: dict[str, Any] = {"softmax_scale": self.scaling, "output_index": output_index, "sealing": sealing}
            if q.shape[2] == 1 and mask is None and key.entry is None:
                out = ops.attention_step(q, k, v, **options)
                return out.reshape(len(out), 1, -1), None
            options |= {"mask": mask, "is_causal": mask is None and q.shape[2] > 1}
            rows = ops.attention(q, k, v, row_index=key.entry, redundant=key.redundant_as(q.dtype), **options)
            return rows if key.entry is not None else rows.transpose(1, 2).flatten(2), None
        if sealing is not None:
            k, v = ops.unseal(k, sealing, is_value=False), ops.unseal(v, sealing, is_value=True)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(backend, eager_attention_forward)
        own: dict[str, Any] = {"dropout": self.attention_dropout if self.training else 0.0, "scaling": self.scaling}
        window = sliding_window(self)
        if window is not None:
            own["sliding_window"] = window
        out, weights = attend(self, q, k, v, mask, **own, **kwargs)
        return key.enter_heads(out, output_index), weights

    def _is_plain_sdpa(self, backend: str, keywords: dict[str, Any]) -> bool:
        """Whether the kernels compute what the backend would: transformers' own sdpa, without dropout, causal, and with
        no keyword that it acts upon."""
        return (
            backend == "sdpa"
            and not self.training
            and ALL_ATTENTION_FUNCTIONS["sdpa"] is sdpa_attention_forward
            and getattr(self, "is_causal", True)
            and all(keywords.get(name) is None for name in _SDPA_KEYWORDS)
        )


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


def _seal_first(cache: EncodedCache, place: int, k: Tensor, v: Tensor, step: Step) -> None:
    """Store a layer's first K and V sealed, while gradients go through what this pass attends to."""
    if cache.layers[place].held_tokens:
        raise ValueError(
            "cache_encoding: gradients do not go through a sealed cache that holds tokens; use torch.no_grad(), or "
            "use_cache=False for the whole text"
        )
    with torch.no_grad():
        cache.append(k, v, place, step.writes)


class EncodedDecoderLayer(EncodedModule):
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
        place, device = scx_step.begin(self), hidden_states.device
        keys = scx_step.layer_keys(place, device)
        rows = scx_step.enter(hidden_states, place)

        noise = scx_step.take_noise() if place == 0 else None
        entered = keys.attention.enter(rows, self.input_layernorm, noise)
        projected, _ = self.self_attn(
            hidden_states=entered, scx_step=scx_step, scx_place=place, scx_noise=noise, **kwargs
        )
        rows = keys.output.add_to(rows, projected)

        entered = keys.feed_forward.enter(rows, self.post_attention_layernorm)
        rows = keys.feed_forward.add_to(rows, self.mlp(entered))
        return scx_step.leave(rows, place)


class FusedEncoding(ModelEncoding):
    """What a model in the fused placement knows beyond its weights."""

    cache_kind = part_kind = EncodedCache

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._paged_sessions: WeakKeyDictionary[PagedAttentionCache, Session] = WeakKeyDictionary()

    def undo(self, decoder: Decoder) -> None:
        for layer in decoder.layers:
            restore_class(layer.self_attn)
            restore_class(layer)

    def draw_token_keys(
        self, session: Session, request: Admitted, embedding: nn.Module, **options: Any
    ) -> TokenKeys | None:
        """The row keys of one forward pass; None for a lone token that continues a session, whose rows stay in token
        order. `options` are those of `Branch.draw_token_keys`, of a block that runs again in the pass."""
        if not request.opens and request.tokens == 1:
            return None
        dtype, device = next(embedding.parameters()).dtype, home(embedding)
        scale = None if self.scale is None else self.scale.to(device)
        vocabulary = self.redundant_tokens(embedding) if self.generator.redundant_num else None
        sizes = (request.tokens, request.batch)
        return session.draw_token_keys(*sizes, scale, dtype, device, vocabulary=vocabulary, **options)

    def paged_session(self, pages: PagedAttentionCache) -> Session:
        """The session of the pages of continuous batching: one for all requests that share them, for one sequence of
        rows, which is how these come."""
        if self.generator.sealed(self.shape):
            raise ValueError(f"cache: {_PAGES_ARE_NOT_SEALED}")
        session = self._paged_sessions.get(pages)
        if session is None:
            session = self._paged_sessions[pages] = self.open_session(1)
        return session

    def check_blocks(self, blocks: list[Any]) -> None:
        """The blocks that are to run must be encoded, each once, and no more than there were."""
        if not 0 < len(blocks) <= self.shape.num_layers:
            raise ValueError(
                f"model: it had {self.shape.num_layers} blocks when it was encoded, {len(blocks)} are to run"
            )
        if len(set(map(id, blocks))) != len(blocks):
            raise ValueError(
                "model: one block stands in several places of the stack; copy it, so that each has its own"
            )
        foreign = [place for place, block in enumerate(blocks) if not isinstance(block, EncodedDecoderLayer)]
        if foreign:
            raise ValueError(f"model: blocks {foreign} came after it was encoded; decode_llama it and encode it anew")

    def check_adoptable(self, cache: Cache | None) -> None:
        super().check_adoptable(cache)
        if isinstance(cache, EncodedCache) and not cache.is_complete:
            raise ValueError("past_key_values: this is one part of a split cache")

    def check_cache(self, cache: Cache | None, batch: int, num_blocks: int) -> EncodedCache:
        """A cache that is to be continued by `batch` sequences in so many blocks, attached to its session; a plain one,
        encoded."""
        if isinstance(cache, DynamicCache) and not isinstance(cache, ConversationCache):
            return EncodedCache.encode(cache, self.open_session(batch), num_blocks)
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
        if len(cache.layers) != num_blocks:
            raise ValueError(f"past_key_values: {len(cache.layers)} blocks have filled it, and {num_blocks} are to run")
        cache.check_continued()
        if cache.rows != batch:
            raise ValueError(f"past_key_values: holds {cache.rows} sequences, the input has {batch}")
        session.keep_keystream = self.generator.keep_keystream
        return cache


class FusedModel(EncodedModel):
    """The decoder stack: opens or continues a request's session, and runs the blocks with its keys."""

    _scx: FusedEncoding

    @guarded
    def _serve(
        self, request: Admitted, *, attention_mask: Tensor | None, position_ids: Tensor | None, use_cache: bool,
        **kwargs: Any,
    ) -> Any:  # fmt: skip
        step, kept, refusal = self._open(request, use_cache, kwargs)
        recording = torch.is_grad_enabled() and request.mode is None and refusal is None
        restored = nullcontext() if kept is None else kept.restored_on_failure()
        fresh = None if kept is request.cache else kept  # nobody could claim it before
        with torch.set_grad_enabled(recording), working_on("past_key_values", fresh), restored:
            outputs = super(EncodedModel, self).forward(  # the original's: what this class is swapped in above
                inputs_embeds=step.embed(
                    self.embed_tokens, request.input_ids, request.inputs_embeds, home(self.embed_tokens)
                ),
                attention_mask=attention_mask,
                position_ids=position_ids,
                past_key_values=kept,
                use_cache=use_cache,
                return_dict=True,
                scx_step=step,
                **kwargs,
            )
        if outputs.get("hidden_states") is not None:
            # Before the first block there is one more, unless older transformers records blocks of a list.
            first = step.num_blocks + 1 - len(outputs.hidden_states)
            states = enumerate(outputs.hidden_states, first)
            outputs.hidden_states = tuple(None if x is None else step.in_token_order(x, place) for place, x in states)
        if refusal is not None:
            for name in ("last_hidden_state", "hidden_states"):
                outputs[name] = _refused(outputs.get(name), refusal)
        return outputs

    @torch.compiler.disable  # keys are drawn for every pass, and are no constants of a program
    def _open(
        self, request: Admitted, use_cache: bool, keywords: dict[str, Any]
    ) -> tuple[Step, EncodedCache | None, str | None]:
        """The keys of a pass, its cache, and why gradients do not go through it if they would."""
        encoding, blocks = self._scx, running_blocks(self)
        encoding.check_blocks(blocks)
        session, kept = self._session(request, len(blocks), use_cache, keywords.get("cache"))
        # Who names a stage serves a model: the kernels, which have no backward, are not to be kept out by its weights.
        records = request.mode is None and wants_gradients(self, request.inputs_embeds, kept)
        refusal = None if kept is None or not records else self._refusal_of_gradients(kept, request.opens)
        if kept is not None and refusal is not None:
            kept.has_cut_gradients = True

        open_at = _hooked_places(blocks)
        if records and refusal is None:
            # What is recorded on the way to a loss, or checkpointed, must be given to the block, not kept beside it.
            if _wants_hidden_states(self, keywords):
                open_at |= set(range(len(blocks)))
            elif self.gradient_checkpointing and self.training:
                open_at.add(0)
        draw_keys = partial(encoding.draw_token_keys, session, request, self.embed_tokens)
        holder = session if kept is None else kept
        step = Step(session, holder, draw_keys, blocks, open_at, in_place=not records or refusal is not None)
        first = blocks[0].self_attn.q_proj
        step.prepare(request.batch, request.tokens, home(first))
        return step, kept, refusal

    def _session(
        self, request: Admitted, num_blocks: int, use_cache: bool, pages: PagedAttentionCache | None
    ) -> tuple[Session, EncodedCache | None]:
        """The session that a request opens or continues, and its cache if it has one of its own."""
        encoding, cache = self._scx, request.cache
        if pages is not None:
            if cache is not None or use_cache:
                raise ValueError("past_key_values, use_cache: the pages of continuous batching are a request's cache")
            return encoding.paged_session(pages), None
        if not request.opens:
            kept = encoding.check_cache(cache, request.batch, num_blocks)
            return kept.session, kept
        encoding.check_adoptable(cache)
        session = encoding.open_session(request.batch)
        if not use_cache and cache is None:
            return session, None
        empty: Any = DynamicCache(config=self.config) if cache is None else cache
        return session, EncodedCache.adopt(empty, session, num_blocks)

    def _refusal_of_gradients(self, kept: EncodedCache, opens: bool) -> str | None:
        """Why no gradient goes through this request, which would have some in the plain model; None if they do.

        What autograd keeps for a backward is not sealed. So a sealed cache is filled with gradients in training alone,
        and gradients do not go through what it holds.
        """
        if not kept.session.settings.sealed_layers:
            return None
        reason = "cache_encoding: gradients do not go through a sealed cache"
        if not self.training:
            return f"{reason}; train with model.train(), or with use_cache=False"
        if not opens:
            raise ValueError(f"{reason} that holds tokens; use torch.no_grad(), or use_cache=False for the whole text")
        return None


def _refused(result: Any, reason: str) -> Any:
    """`refuse_backward` of a tensor, of each of a tuple's, or of none."""
    if isinstance(result, tuple):
        return tuple(_refused(x, reason) for x in result)
    return None if result is None else refuse_backward(result, reason)


def _hooked_places(blocks: Sequence[nn.Module]) -> set[int]:
    """Where hooks of blocks see the residual stream, by the place of the block behind it."""
    return {border for place, block in enumerate(blocks) if has_hooks(block) for border in (place, place + 1)}


def _wants_hidden_states(model: Any, keywords: dict[str, Any]) -> bool:
    wanted = keywords.get("output_hidden_states")
    wanted = getattr(model.config, "output_hidden_states", False) if wanted is None else wanted
    return wanted is not None and wanted is not False  # a number selects one of them


def fuse(model: nn.Module, decoder: Decoder, encoding: FusedEncoding) -> None:
    """Put a model's decoder into the fused placement."""
    layer_class, attention_class = SUPPORTED[type(decoder)]
    decoder._scx = encoding
    for layer in decoder.layers:
        encode_class(layer.self_attn, EncodedAttention, attention_class)
        encode_class(layer, EncodedDecoderLayer, layer_class)
    encode_class(decoder, FusedModel)
    if encoding.generator.sealed(encoding.shape):
        for outer in generating_models(model):
            encode_class(outer, SealedOuter)
