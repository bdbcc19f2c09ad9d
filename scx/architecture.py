"""What an architecture is: the families that are served, a model's sizes, and its fingerprint.

Nothing here knows a key. A family is one whose block is Llama's: norm, attention with rotary positions, residual, norm,
gated feed-forward, residual.
"""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaDecoderLayer, LlamaModel, LlamaRMSNorm
from transformers.models.mistral.modeling_mistral import (
    MistralAttention,
    MistralDecoderLayer,
    MistralModel,
    MistralRMSNorm,
)
from transformers.models.qwen2.modeling_qwen2 import Qwen2Attention, Qwen2DecoderLayer, Qwen2Model, Qwen2RMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention, Qwen3DecoderLayer, Qwen3Model, Qwen3RMSNorm

__all__ = [
    "FINGERPRINT_ROWS",
    "QKV",
    "SUPPORTED",
    "SUPPORTED_NAMES",
    "Decoder",
    "ModelShape",
    "encoded_decoders",
    "find_decoder",
    "has_data",
    "has_hooks",
    "head_norms",
    "home",
    "is_hooked",
    "is_plain_linear",
    "is_plain_rms_norm",
    "keep_checkpoint",
    "keep_query_rows",
    "kept_checkpoint",
    "kept_query_rows",
    "model_shape",
    "root_mean_square",
    "running_blocks",
    "sliding_window",
    "weight_of",
]

Decoder = Any
"""A decoder stack, whose modules have no types to speak of."""

SUPPORTED: dict[type[Decoder], tuple[type[Any], type[Any]]] = {
    LlamaModel: (LlamaDecoderLayer, LlamaAttention),
    MistralModel: (MistralDecoderLayer, MistralAttention),
    Qwen2Model: (Qwen2DecoderLayer, Qwen2Attention),
    Qwen3Model: (Qwen3DecoderLayer, Qwen3Attention),
}
"""Decoder class -> the classes of its blocks and their attention."""
SUPPORTED_NAMES = ", ".join(sorted(kind.__name__ for kind in SUPPORTED))
PLAIN_RMS_NORMS = (LlamaRMSNorm, MistralRMSNorm, Qwen2RMSNorm, Qwen3RMSNorm)

QKV = ("q_proj", "k_proj", "v_proj")
_PROJECTIONS = (*(f"self_attn.{x}" for x in (*QKV, "o_proj")), "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
_DENSE_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
FINGERPRINT_ROWS = 8
"""Rows of the embedding and of the first block's q_proj that a model's fingerprint covers."""


@dataclass(frozen=True)
class ModelShape:
    """What keys need to know of a model.

    `first_norm_rms` is the root mean square of the first block's normalised rows, the unit of the noise scale;
    `fingerprint` is public and tells two models apart; `max_tokens`, for how many positions a model was made, bounds
    what is read from a file and nothing else: two shapes that differ in it alone are equal.
    """

    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    first_norm_rms: float
    fingerprint: str
    max_tokens: int = field(default=2**17, compare=False)


def is_hooked(module: nn.Module) -> bool:
    """Whether calling the module runs more than its class's forward; transformers' recorders are no more than that."""
    return "forward" in vars(module) or has_hooks(module)


def has_hooks(module: nn.Module) -> bool:
    """Whether somebody's hooks are on the module, other than transformers' own, which record its states."""
    hooks = module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks
    return any(hooks) and not all(_is_recorder(hook) for kind in hooks for hook in kind.values())


def _is_recorder(hook: Any) -> bool:
    return getattr(hook, "__module__", None) == "transformers.utils.output_capturing"


def is_plain_linear(module: nn.Module) -> bool:
    """Whether `module(x)` is just `x @ weight.T + bias`: no subclass, no hook, no forward put around it."""
    return type(module) is nn.Linear and not is_hooked(module)


def is_plain_rms_norm(module: nn.Module) -> bool:
    """Whether `module(x)` is just Llama's RMS norm: one of transformers' classes for it, with no hook around it."""
    return type(module) in PLAIN_RMS_NORMS and not is_hooked(module)


def home(module: nn.Module) -> torch.device:
    """Where a module computes: where its weights are, or where accelerate brings them for the time of a call."""
    device = next(module.parameters()).device
    if device.type != "meta":
        return device
    return torch.device(getattr(getattr(module, "_hf_hook", None), "execution_device", None) or device)


def weight_of(module: Any, name: str = "weight") -> Tensor:
    """A module's weight: on the meta device without data, unless accelerate keeps that elsewhere between calls."""
    weight: Tensor = getattr(module, name)
    kept = _kept_weights(module) if weight.is_meta else None
    return weight if kept is None else kept[name].to(home(module))


def _kept_weights(module: nn.Module) -> Any:
    """What accelerate's hook brings to a module for the time of a call, by name; None without such a hook."""
    return getattr(getattr(module, "_hf_hook", None), "weights_map", None)


def has_data(module: nn.Module, name: str) -> bool:
    """Whether a parameter below a module, by its dotted name, has data here or where accelerate keeps it."""
    path, _, leaf = name.rpartition(".")
    owner = module.get_submodule(path)
    return not owner.get_parameter(leaf).is_meta or _kept_weights(owner) is not None


def head_norms(attention: Any) -> dict[str, Any]:
    """Qwen3 normalises every head of q and k before the rotary step: as arguments of `qkv_decode_encode`."""
    norm = attention._modules.get("q_norm")
    if norm is None:
        return {}
    return {"q_norm": weight_of(norm), "k_norm": weight_of(attention.k_norm), "eps": norm.variance_epsilon}


def running_blocks(decoder: Decoder) -> list[Any]:
    """The blocks that run, in order: those of the stack that the configuration counts."""
    return list(decoder.layers)[: decoder.config.num_hidden_layers]


def sliding_window(attention: Any) -> int | None:
    """How many keys a query of this attention sees at most; None for all."""
    window: int | None = getattr(attention, "sliding_window", getattr(attention.config, "sliding_window", None))
    return window


def root_mean_square(norm: Any) -> float:
    """Of rows behind an RMS norm: that of its weight."""
    return float(weight_of(norm).detach().float().square().mean().sqrt())


def encoded_decoders(model: nn.Module) -> Iterator[Decoder]:
    """The decoder stacks inside `model` that are encoded."""
    return (module for module in model.modules() if "_scx" in vars(module))


def find_decoder(model: nn.Module) -> Decoder:
    """The one decoder stack inside `model` that can be encoded. Raises TypeError, ValueError if there is none."""
    if any(encoded_decoders(model)):
        raise ValueError("model: it is encoded already; decode_llama undoes that")
    found = [module for module in model.modules() if type(module) in SUPPORTED]
    if len(found) != 1:
        raise TypeError(f"model: expected exactly one of {SUPPORTED_NAMES} inside, got {type(model).__name__}")
    return found[0]


def model_shape(model: PreTrainedModel) -> ModelShape:
    """The sizes of a supported model, read from its modules, of which it needs the weights that the fingerprint covers.

    Raises: TypeError, ValueError if it cannot be encoded.
    """
    decoder = find_decoder(model)
    _check_projections(decoder)
    blocks, config = running_blocks(decoder), decoder.config
    if not blocks:
        raise ValueError("model: its decoder has no blocks")
    if len(set(map(id, blocks))) != len(blocks):
        raise ValueError("model: one block stands in several places of the stack; copy it, so that each has its own")
    first = blocks[0]
    fingerprint = _fingerprint(decoder)
    return ModelShape(
        num_layers=len(blocks),
        hidden_size=config.hidden_size,
        num_heads=config.num_attention_heads,
        num_kv_heads=config.num_key_value_heads,
        head_dim=first.self_attn.head_dim,
        vocab_size=decoder.embed_tokens.weight.shape[0],
        first_norm_rms=root_mean_square(first.input_layernorm),
        fingerprint=fingerprint,
        max_tokens=_max_tokens(config),
    )


def _max_tokens(config: PreTrainedConfig) -> int:
    """Positions that a configuration counts, or to which it scales rotary embeddings."""
    rope = config.rope_parameters or {}
    scaled = rope.get("original_max_position_embeddings", 0) * rope.get("factor", 1.0)
    return max(config.max_position_embeddings, int(scaled))


def _check_projections(decoder: Decoder) -> None:
    """Every projection must be a dense floating layer whose weight is whole."""
    for index, layer in enumerate(decoder.layers):
        for name in _PROJECTIONS:
            projection = layer.get_submodule(name)
            weight = weight_of(projection) if isinstance(getattr(projection, "weight", None), Tensor) else None
            place = f"model: layers.{index}.{name} ({type(projection).__name__})"
            if not isinstance(weight, Tensor) or not weight.dtype.is_floating_point:
                kind = "no dense weight" if not isinstance(weight, Tensor) else f"a {weight.dtype} weight"
                raise TypeError(f"{place} has {kind}; quantised projections are not supported")
            if weight.dtype not in _DENSE_DTYPES:
                served = ", ".join(str(dtype).removeprefix("torch.") for dtype in _DENSE_DTYPES)
                raise TypeError(f"{place} has a {weight.dtype} weight; expected one of {served}")
            if isinstance(weight, DTensor):
                raise TypeError(f"{place} is split over devices; tensor parallelism is not supported")


def keep_query_rows(decoder: Decoder, rows: Tensor) -> None:
    """Keep the first rows of the first block's q_proj for the fingerprint, where no more of it was loaded."""
    decoder._scx_query_rows = rows


def kept_query_rows(module: nn.Module) -> Tensor | None:
    """What `keep_query_rows` kept."""
    return vars(module).get("_scx_query_rows")


def keep_checkpoint(decoder: Decoder, read: Callable[[str, Tensor], Tensor]) -> None:
    """Keep how the blocks' parameters without data are read: `read` takes a dotted name and what it is like."""
    decoder._scx_checkpoint = read


def kept_checkpoint(decoder: Decoder) -> Callable[[str, Tensor], Tensor] | None:
    """What `keep_checkpoint` kept."""
    return vars(decoder).get("_scx_checkpoint")


def _fingerprint(decoder: Decoder) -> str:
    """A public digest of a few weights, which tells models apart."""
    config, first = decoder.config, decoder.layers[0]
    query, kept = weight_of(first.self_attn.q_proj), kept_query_rows(decoder)
    if query.is_meta and kept is not None:
        query = kept.to(query.dtype)
    covered = {
        "embed_tokens": weight_of(decoder.embed_tokens)[:FINGERPRINT_ROWS],
        "norm": weight_of(decoder.norm),
        "layers.0.input_layernorm": weight_of(first.input_layernorm),
        "layers.0.self_attn.q_proj": query[:FINGERPRINT_ROWS],
    }
    digest = hashlib.sha256(f"{config.model_type} {config.hidden_size} {len(decoder.layers)}".encode())
    for name, weight in covered.items():
        if weight.is_meta:
            raise TypeError(f"model: {name} has no data (it is on the meta device)")
        digest.update(weight.detach().float().cpu().numpy().tobytes())
    return digest.hexdigest()
