"""Llama and the models that share its block: the protocol swapped into a transformers model in place.

The modules stay; their classes become subclasses of their own that run the protocol's steps. So parameter names, hooks
and recorded outputs keep working, no weight is copied, and undoing the swap restores the model exactly.

Rows travel as the protocol says: the residual stream is token-permuted with redundant rows among them, and what each
half of a block takes out of it lies under a permutation of its own, with fresh redundant rows; token order exists only
between q, k, v and the output projection, where features are permuted instead.
"""

import hashlib
import weakref
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import (
    LlamaAttention,
    LlamaDecoderLayer,
    LlamaModel,
    eager_attention_forward,
)
from transformers.models.mistral.modeling_mistral import MistralAttention, MistralDecoderLayer, MistralModel
from transformers.models.qwen2.modeling_qwen2 import Qwen2Attention, Qwen2DecoderLayer, Qwen2Model
from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention, Qwen3DecoderLayer, Qwen3Model

import scx_kernels as ops
from scx.calibration import CALIBRATION_TOKENS, measure_scale
from scx.encoding import Noise, RedundantScale, TokenKey, is_plain_linear
from scx.keys import ModelShape, SCXKeyGenerator, Session, Step
from scx.keystream import KeyStream
from scx.kvcache import EncodedCache, join_parts

if TYPE_CHECKING:
    from scx.party.process import RemoteParty

__all__ = ["decode_llama", "encode_llama", "encoded_llama", "model_shape"]

Decoder = Any
"""A decoder stack: one of the classes below, whose modules have no types to speak of."""

SUPPORTED: dict[type[Decoder], tuple[type[Any], type[Any]]] = {
    LlamaModel: (LlamaDecoderLayer, LlamaAttention),
    MistralModel: (MistralDecoderLayer, MistralAttention),
    Qwen2Model: (Qwen2DecoderLayer, Qwen2Attention),
    Qwen3Model: (Qwen3DecoderLayer, Qwen3Attention),
}
"""Model class -> the classes of its blocks and their attention. All share Llama's block."""

MODES = ("prefill", "decode")
_DENSE_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_QKV_PROJECTIONS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
_PROJECTIONS = (*_QKV_PROJECTIONS, "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
FINGERPRINT_ROWS = 8
"""Rows of the embedding and of the first block's q_proj that a model's fingerprint covers."""


class EncodedAttention(nn.Module):
    """Attention on encoded rows: token-permuted rows in, token-permuted rows out (another key), (B, T, D)."""

    config: Any
    layer_idx: int
    head_dim: int
    scaling: float
    attention_dropout: float
    q_proj: nn.Linear
    k_proj: nn.Linear
    v_proj: nn.Linear
    o_proj: nn.Linear
    q_norm: nn.Module
    k_norm: nn.Module

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
        device = hidden_states.device
        keys = scx_step.layer_keys(self.layer_idx, device)
        feature_key = scx_step.feature_key(self.layer_idx, device)
        cos, sin = position_embeddings
        slots, sealing, opens_sealed = None, None, False
        if past_key_values is not None:
            like, shape = self.q_proj.weight, feature_key.key.shape
            slots = past_key_values.room(self.layer_idx, cos.shape[1], shape, like, scx_step.writes)
            # A layer's first tokens attend to one another alone: their K and V go sealed into the cache, and unsealed,
            # as q does, into this pass's attention.
            opens_sealed = slots is not None and slots.sealing is not None and slots.offset == 0

        z_q, z_k, z_v = self._project(hidden_states, scx_noise)
        q, k, v = ops.qkv_decode_encode(
            z_q,
            z_k,
            z_v,
            keys.attention.position,
            cos,
            sin,
            feature_key.query,
            feature_key.key,
            feature_key.value,
            **self._head_norms(),
            **({} if slots is None else slots.arguments),
            return_unsealed=opens_sealed,
        )
        if past_key_values is not None and slots is not None:
            stored = past_key_values.take_in(self.layer_idx, slots)
            k, v, sealing = (k, v, None) if opens_sealed else stored
        elif past_key_values is not None:
            q, k, v, sealing, attention_mask = _meet_cache(
                past_key_values, self.layer_idx, q, k, v, attention_mask, scx_step
            )
        if q.device != device:
            feature_key = scx_step.feature_key(self.layer_idx, q.device)
            keys = scx_step.layer_keys(self.layer_idx, q.device)
        rows, weights = self._attend(q, k, v, attention_mask, feature_key.output, keys.output, sealing, **kwargs)
        return self.o_proj(rows.to(device)), weights

    def _head_norms(self) -> dict[str, Any]:
        """Qwen3 normalises every head of q and k before the rotary step."""
        norm = self._modules.get("q_norm")
        if norm is None:
            return {}
        return {"q_norm": norm.weight, "k_norm": self.k_norm.weight, "eps": norm.variance_epsilon}

    def _project(self, rows: Tensor, noise: Noise | None) -> Sequence[Tensor]:
        projections = (self.q_proj, self.k_proj, self.v_proj)
        weights = [projection.weight for projection in projections]
        biases = [projection.bias for projection in projections]
        if noise is not None:
            for projection in projections:
                _check_plain_linear(projection, f"layers.{self.layer_idx}")
            return [
                ops.permuted_linear(rows, weight, bias=bias, image=image)
                for weight, bias, image in zip(weights, biases, noise.images, strict=True)
            ]
        if all(is_plain_linear(projection) for projection in projections):
            return ops.permuted_linears(rows, weights, biases=biases)
        return [projection(rows) for projection in projections]

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, output_index: Tensor, output_key: TokenKey,
        sealing: ops.Sealing | None, **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        """Attention with the backend that the model is set to; (B, T, H*d) rows in the output encoding."""
        entry, redundant, scale = output_key.entry, output_key.redundant, self.scaling
        backend = self.config._attn_implementation
        if backend == "sdpa" and not self.training and kwargs.get("is_causal") is None:
            if q.shape[2] == 1 and mask is None and entry is None:
                out = ops.attention_step(q, k, v, softmax_scale=scale, output_index=output_index, sealing=sealing)
                return out.reshape(len(out), 1, -1), None
            rows = ops.attention(
                q, k, v, softmax_scale=scale, mask=mask, is_causal=mask is None and q.shape[2] > 1,
                output_index=output_index, row_index=entry, redundant=redundant, sealing=sealing,
            )  # fmt: skip
            return rows if entry is not None else rows.transpose(1, 2).flatten(2), None
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
            scaling=scale,
            sliding_window=getattr(self, "sliding_window", getattr(self.config, "sliding_window", None)),
            **kwargs,
        )
        return ops.inject_permute(out.flatten(2), entry, redundant, feature_index=output_index), weights


def _meet_cache(
    cache: EncodedCache, layer_idx: int, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, step: Step
) -> tuple[Tensor, Tensor, Tensor, ops.Sealing | None, Tensor | None]:
    """Append k and v where the layer's cache lies, and bring the queries there: a row moves, the cache does not."""
    layer = cache.layers[layer_idx] if layer_idx < len(cache.layers) else None
    if layer is not None and layer.is_initialized and layer.keys is not None:
        device = layer.keys.device
        if device != q.device:
            q, k, v = q.to(device), k.to(device), v.to(device)
            mask = None if mask is None else mask.to(device)
    return q, *cache.append(k, v, layer_idx, step.writes), mask


class EncodedDecoderLayer(nn.Module):
    """One block on the encoded residual stream. Each of its halves takes rows out of it into an encoding of its own and
    adds what comes back."""

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


class EncodedModel(nn.Module):
    """The decoder stack: admits a request, opens or continues its session, and runs the blocks with its keys."""

    config: Any
    embed_tokens: nn.Embedding
    layers: Any
    gradient_checkpointing: bool
    _scx: "ModelEncoding"

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        *,
        mode: str | None = None,
        cache_position: Tensor | None = None,
        gpu_kvcache: EncodedCache | None = None,
        cpu_kvcache: EncodedCache | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        encoding = self._scx
        batch, tokens = check_input(input_ids, inputs_embeds, self.config.vocab_size)
        cache = _join_caches(past_key_values, gpu_kvcache, cpu_kvcache)
        opens = is_prefill(mode, cache)
        check_positions(cache_position, cached_tokens(cache), tokens)
        if use_cache is None:
            use_cache = self.config.use_cache and not (self.training and self.gradient_checkpointing)

        if opens:
            encoding.check_adoptable(cache)
            session = encoding.open_session(batch)
            if cache is not None:
                cache = EncodedCache.adopt(cache, session)
            elif use_cache:
                cache = EncodedCache(session, DynamicCache(config=self.config).layers)
        else:
            session = encoding.check_cache(cache, batch)

        device = self.embed_tokens.weight.device
        step = encoding.open_step(session, cache, tokens, batch, device, permute_tokens=opens or tokens > 1)
        attention = self.layers[0].self_attn
        step.prepare(batch, tokens, [attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight])
        # Who names a stage serves a model: the kernels, which have no backward, are not to be kept out by its weights.
        restored = nullcontext() if cache is None else cache.restored_on_failure()
        with torch.set_grad_enabled(torch.is_grad_enabled() and mode is None), restored:
            outputs = super().forward(
                inputs_embeds=step.embed(self.embed_tokens, input_ids, inputs_embeds),
                attention_mask=attention_mask,
                position_ids=position_ids,
                past_key_values=cache,
                use_cache=use_cache,
                return_dict=True,
                scx_step=step,
                **kwargs,
            )
        if outputs.get("hidden_states") is not None:
            outputs.hidden_states = _decode_hidden_states(outputs.hidden_states, step)
        if return_dict is None:
            return_dict = getattr(self.config, "return_dict", True)
        return outputs if return_dict else outputs.to_tuple()


def check_input(input_ids: Tensor | None, inputs_embeds: Tensor | None, vocab_size: int) -> tuple[int, int]:
    """(sequences, tokens) of a request."""
    given, name, expected = (
        (input_ids, "input_ids", 2) if inputs_embeds is None else (inputs_embeds, "inputs_embeds", 3)
    )
    if given is None or (input_ids is not None and inputs_embeds is not None):
        raise ValueError("give exactly one of input_ids and inputs_embeds")
    if given.dim() != expected or 0 in given.shape:
        raise ValueError(f"{name}: expected {expected} dimensions, none of them empty, got {tuple(given.shape)}")
    # On an accelerator the embedding itself refuses such a token; reading values here would wait for the device.
    if input_ids is not None and input_ids.device.type == "cpu":
        low, high = input_ids.aminmax()
        if low < 0 or high >= vocab_size:
            raise ValueError(f"input_ids: expected tokens 0..{vocab_size - 1}, got {int(low)}..{int(high)}")
    return given.shape[0], given.shape[1]


def _join_caches(
    past: Cache | None, gpu_kvcache: EncodedCache | None, cpu_kvcache: EncodedCache | None
) -> Cache | None:
    if gpu_kvcache is None and cpu_kvcache is None:
        return past
    if past is not None:
        raise ValueError("past_key_values: give either a whole cache, or gpu_kvcache and cpu_kvcache")
    if gpu_kvcache is None or cpu_kvcache is None:
        raise ValueError("gpu_kvcache and cpu_kvcache: give both parts of a split cache")
    return join_parts(gpu_kvcache, cpu_kvcache)


def cached_tokens(cache: Cache | None) -> int:
    return 0 if cache is None else cache.get_seq_length()


def is_prefill(mode: str | None, cache: Cache | None) -> bool:
    """The mode asked for, or what the cache says: without tokens in it a request opens a session."""
    if mode is not None and mode not in MODES:
        raise ValueError(f"mode: expected one of {MODES} or None, got {mode!r}")
    cached = cached_tokens(cache)
    if mode == "prefill" and cached:
        raise ValueError("mode: 'prefill' opens a session, but the cache given holds tokens of another already")
    if mode == "decode" and not cached:
        raise ValueError("mode: 'decode' continues a session and needs the cache that its prefill returned")
    return not cached


def check_positions(cache_position: Tensor | None, cached: int, tokens: int) -> None:
    """Positions follow from the cache; a caller's `cache_position` is only held against them."""
    if cache_position is None:
        return
    if cache_position.shape != (tokens,):
        raise ValueError(f"cache_position: expected shape ({tokens},), got {tuple(cache_position.shape)}")
    if cache_position.device.type == "cpu" and not torch.equal(
        cache_position, torch.arange(cached, cached + tokens, dtype=cache_position.dtype)
    ):
        raise ValueError(f"cache_position: expected {cached}..{cached + tokens - 1}, got {cache_position.tolist()}")


def _decode_hidden_states(hidden_states: Sequence[Tensor | None], step: Step) -> tuple[Tensor | None, ...]:
    """Recorded hidden states in token order. The first one recorded stands in for the rows that the step embedded."""
    decoded = [None if states is None else step.start(states) for states in hidden_states[:1]]
    decoded += hidden_states[1:]
    last = step.session.shape.num_layers
    return tuple(states if i >= last or states is None else step.leave(states) for i, states in enumerate(decoded))


class ModelEncoding:
    """What an encoded model knows beyond its weights: whose keys, and the sessions that are alive."""

    def __init__(self, generator: SCXKeyGenerator, shape: ModelShape, scale: RedundantScale | None, dtype: torch.dtype):
        self.generator = generator
        self.shape = shape
        self.scale = scale
        self.dtype = dtype
        self._sessions: weakref.WeakValueDictionary[str, Session] = weakref.WeakValueDictionary()

    def __repr__(self) -> str:
        return f"ModelEncoding({self.generator!r})"

    def __deepcopy__(self, memo: dict) -> "ModelEncoding":
        return ModelEncoding(self.generator, self.shape, self.scale, self.dtype)

    def open_session(self, batch: int) -> Session:
        session = self.generator.open_session(self.shape, batch)
        self._sessions[session.id] = session
        return session

    def open_step(
        self,
        session: Session,
        cache: EncodedCache | None,
        tokens: int,
        batch: int,
        device: torch.device,
        *,
        permute_tokens: bool,
    ) -> Step:
        token_keys = None
        if permute_tokens:
            scale = None if self.scale is None else self.scale.to(device)
            token_keys = session.draw_token_keys(tokens, batch, scale, self.dtype, device)
        return Step(session, session if cache is None else cache, token_keys)

    def check_adoptable(self, cache: Cache | None) -> None:
        """An empty cache given to a prefill must be one that can hold encoded layers."""
        if cache is None:
            return
        if type(cache) not in (DynamicCache, EncodedCache) or cache.offloading:
            kind = "an off-loading cache" if getattr(cache, "offloading", False) else type(cache).__name__
            raise TypeError(f"past_key_values: an encoded model fills a DynamicCache, got {kind}")
        if isinstance(cache, EncodedCache) and not cache.is_complete:
            raise ValueError("past_key_values: this is one part of a split cache")

    def check_cache(self, cache: Cache | None, batch: int) -> Session:
        """The session of a cache that is to be continued by `batch` sequences."""
        if not isinstance(cache, EncodedCache):
            raise TypeError(
                f"past_key_values: expected an encoded cache, got a plain {type(cache).__name__} that holds tokens; "
                "prefill with the encoded model"
            )
        if not cache.is_complete:
            raise ValueError("past_key_values: this is one part of a split cache; give gpu_kvcache and cpu_kvcache")
        known = self._sessions.get(cache.session_id)
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
        if cache.rows != batch:
            raise ValueError(f"past_key_values: holds {cache.rows} sequences, the input has {batch}")
        session.keep_keystream = self.generator.keep_keystream
        return session


def _find_decoder(model: nn.Module) -> Decoder:
    """The one decoder stack inside `model` that can be encoded."""
    found = [module for module in model.modules() if type(module) in SUPPORTED]
    if any(isinstance(module, EncodedModel) for module in model.modules()):
        raise ValueError("model: it is encoded already; decode_llama undoes that")
    if len(found) != 1:
        names = ", ".join(sorted(kind.__name__ for kind in SUPPORTED))
        raise TypeError(f"model: expected exactly one of {names} inside, got {type(model).__name__}")
    return found[0]


def _check_plain_linear(projection: nn.Module, place: str) -> None:
    if not is_plain_linear(projection):
        raise TypeError(
            f"{place}: alp=True needs plain nn.Linear projections without hooks, whose weight alone gives the noise's "
            f"image; got {type(projection).__name__}"
        )


def _check_projections(decoder: Decoder) -> None:
    """Every projection must be a dense floating layer whose weight is whole."""
    for index, layer in enumerate(decoder.layers):
        for name in _PROJECTIONS:
            projection = layer.get_submodule(name)
            weight = getattr(projection, "weight", None)
            place = f"model: layers.{index}.{name} ({type(projection).__name__})"
            if not isinstance(weight, Tensor) or weight.dtype not in _DENSE_DTYPES:
                kind = "no dense weight" if not isinstance(weight, Tensor) else f"a {weight.dtype} weight"
                raise TypeError(f"{place} has {kind}; quantised projections are not supported")
            if isinstance(weight, DTensor):
                raise TypeError(f"{place} is split over devices; tensor parallelism is not supported")


def _check_data(decoder: Decoder, names: Iterable[str]) -> None:
    """The named parameters of the blocks must be here, not on the meta device."""
    for name in names:
        if decoder.layers.get_parameter(name).is_meta:
            raise TypeError(
                f"model: layers.{name} has no data (it is on the meta device). A model of load_secure_model needs the "
                "settings that it was loaded for, secure_device, and an untrusted party in another process"
            )


def _fingerprint(decoder: Decoder) -> str:
    """A public digest of a few weights, which tells models apart."""
    config, first = decoder.config, decoder.layers[0]
    covered = {
        "embed_tokens": decoder.embed_tokens.weight[:FINGERPRINT_ROWS],
        "norm": decoder.norm.weight,
        "layers.0.input_layernorm": first.input_layernorm.weight,
        "layers.0.self_attn.q_proj": first.self_attn.q_proj.weight[:FINGERPRINT_ROWS],
    }
    kept = vars(decoder).get("_scx_query_rows")  # where no more of this projection was loaded
    if kept is not None and covered["layers.0.self_attn.q_proj"].is_meta:
        covered["layers.0.self_attn.q_proj"] = kept.to(first.self_attn.q_proj.weight.dtype)
    digest = hashlib.sha256(f"{config.model_type} {config.hidden_size} {len(decoder.layers)}".encode())
    for name, weight in covered.items():
        if weight.is_meta:
            raise TypeError(f"model: {name} has no data (it is on the meta device)")
        digest.update(weight.detach().float().cpu().numpy().tobytes())
    return digest.hexdigest()


def model_shape(model: PreTrainedModel) -> ModelShape:
    """The sizes of a supported model, read from its modules, of which it needs the weights that the fingerprint covers.

    Raises: TypeError, ValueError if it cannot be encoded.
    """
    decoder = _find_decoder(model)
    _check_projections(decoder)
    attention = decoder.layers[0].self_attn
    first_norm = decoder.layers[0].input_layernorm.weight
    config = decoder.config
    fingerprint = _fingerprint(decoder)
    return ModelShape(
        num_layers=len(decoder.layers),
        hidden_size=config.hidden_size,
        num_heads=config.num_attention_heads,
        num_kv_heads=config.num_key_value_heads,
        head_dim=attention.head_dim,
        vocab_size=decoder.embed_tokens.weight.shape[0],
        first_norm_rms=float(first_norm.detach().float().square().mean().sqrt()),
        fingerprint=fingerprint,
    )


def _check_forwards(decoder: Decoder) -> None:
    """A forward that somebody put into a module would hide the class that is swapped in."""
    for module in (decoder, *decoder.layers, *(layer.self_attn for layer in decoder.layers)):
        if "forward" in vars(module) and not hasattr(module, "_hf_hook"):
            raise TypeError(
                f"model: a {type(module).__name__} has a forward of its own in the instance; remove it first"
            )


def check_generator(generator: SCXKeyGenerator, shape: ModelShape) -> None:
    if not isinstance(generator, SCXKeyGenerator):
        raise TypeError(f"key_generator: expected an SCXKeyGenerator, got {type(generator).__name__}")
    if generator.hidden_dim != shape.hidden_size:
        raise ValueError(f"hidden_dim: the model's is {shape.hidden_size}, the key generator's {generator.hidden_dim}")
    if generator.qk_hidden_dim != shape.head_dim:
        raise ValueError(f"qk_hidden_dim: the model's is {shape.head_dim}, the generator's {generator.qk_hidden_dim}")
    generator.settings(shape)


def calibration_tokens(generator: SCXKeyGenerator, shape: ModelShape) -> Tensor:
    """Random tokens of nobody's prompt, (1, n) int64 on the CPU, the same for the same master key."""
    stream = KeyStream(generator._master_key)
    draws = stream.bits("calibration tokens", [(0, 0, 0)], CALIBRATION_TOKENS, torch.int64)
    return draws.remainder(shape.vocab_size)


@torch.no_grad()
def _calibrate(decoder: Decoder, generator: SCXKeyGenerator, shape: ModelShape) -> RedundantScale:
    """The scale of real rows per layer and feature, from one plain pass over random tokens.

    Redundant rows made to this scale look like rows of the layer, without depending on anybody's prompt.
    """
    device = decoder.embed_tokens.weight.device
    tokens = calibration_tokens(generator, shape).to(device)
    was_training = decoder.training
    try:
        decoder.eval()
        scales = measure_scale(decoder.layers, lambda: decoder(input_ids=tokens, use_cache=False), device)
    finally:
        decoder.train(was_training)
    return RedundantScale(**scales)


_encoded_classes: dict[tuple[type[Any], type[Any]], type[Any]] = {}


def _encoded_class(original: type[Any], encoded: type[Any]) -> type[Any]:
    """The subclass of `original` with the forward of `encoded`.

    It keeps the original's name and module: transformers writes a model's class name into its saved configuration
    and finds recordable outputs by it.
    """
    pair = (encoded, original)
    if pair not in _encoded_classes:
        names = {"__module__": original.__module__, "__qualname__": original.__qualname__, "__doc__": encoded.__doc__}
        _encoded_classes[pair] = type(original.__name__, pair, names)
    return _encoded_classes[pair]


def _swap(module: Any, kind: type[Any]) -> None:
    """Change a module's class under the hooks that accelerate may have put around its forward."""
    hook = getattr(module, "_hf_hook", None)
    if hook is None:
        module.__class__ = kind
        return
    from accelerate.hooks import add_hook_to_module, remove_hook_from_module

    remove_hook_from_module(module)
    del module.forward  # the original's, which accelerate leaves in the instance in front of the class
    module.__class__ = kind
    add_hook_to_module(module, hook)


def encode_llama(
    model: PreTrainedModel,
    key_generator: SCXKeyGenerator,
    secure_device: torch.device | str | None = None,
    *,
    crossings: str = "few",
    reuse_feature_keys: bool = False,
    prefill_top_k: int | None = None,
    untrusted: "RemoteParty | None" = None,
) -> PreTrainedModel:
    """Change a Llama-like model in place so that it runs under SCX with the keys of `key_generator`.

    Weights, parameter names and outputs stay as they are; every prefill opens a session, whose keys the returned
    cache carries. With redundant rows, one plain pass over 64 random tokens measures the scale of real rows.

    Args:
        model: Llama, Mistral, Qwen2 or Qwen3 of transformers, alone or with any head, in float32, float16 or
            bfloat16.
        key_generator: its sizes must be the model's.
        secure_device: None for the fused placement, on the model's own device. A device, or SCX_SECURE_DEVICE in the
            environment, for the split placement (`scx.party`): keys, tokens, embedding, head and what the secure side
            computes go there, the blocks stay with an untrusted party, and every message crosses a boundary, also
            where both devices are the same.
        crossings: of the split placement's boundary. "few": between one attention and the next, rows stay on the
            untrusted side. "paper": rows come back after every product.
        reuse_feature_keys: in the split placement, keep one feature permutation per start block over a generation, so
            that only new keys and values cross, not the whole encoded cache of these blocks in every step. It costs
            secrecy: with every step the same order is seen on more rows.
        prefill_top_k: in the split placement, have the untrusted side compute a prefill's logits, on encoded rows, and
            return the k largest of each row; only the secure side knows which rows are tokens. The others are -inf:
            greedy generation, and sampling with a `top_k` of at most k, are the plain model's; beams' scores are not.
            None: the head is on the secure side, as it always is for generated tokens.
        untrusted: in the split placement, an untrusted party in another process; this one's blocks are not used then,
            and need not be here (`scx.party.loading.load_secure_model`). Where they are not, that party measures the
            scale of real rows, before the first prefill.

    Returns: `model`.
    Raises: TypeError for a model that is not supported, has quantised or split projections, or lacks weights that
        are used here, ValueError for one that is encoded already or does not fit the generator, and for options of
        the split placement that are not known. The model is unchanged then.
    """
    from scx.models import split

    decoder = _find_decoder(model)
    shape = model_shape(model)
    check_generator(key_generator, shape)
    plan, outer, secure = None, None, split.secure_device(secure_device)
    if secure is not None:
        plan = split.split_plan(key_generator, shape, crossings, reuse_feature_keys, prefill_top_k)
        outer = None if prefill_top_k is None else split.causal_lm(model, decoder)
    _check_data(decoder, split.needed_here(decoder, plan, untrusted))
    _check_forwards(decoder)
    if key_generator.alp:
        for name in _QKV_PROJECTIONS:
            _check_plain_linear(decoder.layers[0].get_submodule(name), f"model: layers.0.{name}")
    is_whole = not any(parameter.is_meta for parameter in decoder.layers.parameters())
    scale = _calibrate(decoder, key_generator, shape) if key_generator.redundant_num and is_whole else None
    if plan is not None and secure is not None:
        decoder._scx = split.make_parties(model, decoder, plan, key_generator, shape, scale, secure, untrusted)
        _swap(decoder, _encoded_class(type(decoder), split.SplitModel))
        if outer is not None:
            _swap(outer, _encoded_class(type(outer), split.SplitCausalLM))
        return model
    layer_class, attention_class = SUPPORTED[type(decoder)]

    decoder._scx = ModelEncoding(key_generator, shape, scale, decoder.embed_tokens.weight.dtype)
    for layer in decoder.layers:
        _swap(layer.self_attn, _encoded_class(attention_class, EncodedAttention))
        _swap(layer, _encoded_class(layer_class, EncodedDecoderLayer))
    _swap(decoder, _encoded_class(type(decoder), EncodedModel))
    return model


def decode_llama(model: PreTrainedModel) -> PreTrainedModel:
    """Undo `encode_llama` in place. Caches that were made keep their sessions.

    Returns: `model`, as it was before. Raises: ValueError if it is not encoded.
    """
    from scx.models import split

    decoders: list[Decoder] = [module for module in model.modules() if isinstance(module, EncodedModel)]
    if not decoders:
        raise ValueError("model: it is not encoded")
    for outer in [module for module in model.modules() if isinstance(module, split.SplitCausalLM)]:
        _swap(outer, type(outer).__bases__[1])
    for decoder in decoders:
        if isinstance(decoder, split.SplitModel):
            decoder._scx.restore_devices()
        else:
            for layer in decoder.layers:
                for module in (layer.self_attn, layer):
                    _swap(module, type(module).__bases__[1])
        _swap(decoder, type(decoder).__bases__[1])
        del decoder._scx
    return model


@contextmanager
def encoded_llama(
    model: PreTrainedModel,
    key_generator: SCXKeyGenerator,
    secure_device: torch.device | str | None = None,
    **options: Any,
) -> Iterator[PreTrainedModel]:
    """`encode_llama`, with its arguments, for the length of a `with` block."""
    encode_llama(model, key_generator, secure_device, **options)
    try:
        yield model
    finally:
        decode_llama(model)
