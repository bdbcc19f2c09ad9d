"""Small random models of every supported family."""

from typing import Any

import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

FAMILIES = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "mistral": (MistralConfig, MistralForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
}
VOCABULARY = 211


def tiny_model(family: str = "llama", dtype: torch.dtype = torch.float32, **options: Any) -> PreTrainedModel:
    """A random model of three blocks; `heads`, `kv_heads` and `head_dim` choose its attention."""
    torch.manual_seed(0)
    config_class, model_class = FAMILIES[family]
    heads, kv_heads, head_dim = options.pop("heads", 6), options.pop("kv_heads", 2), options.pop("head_dim", 16)
    config = config_class(
        vocab_size=VOCABULARY,
        hidden_size=options.pop("hidden_size", heads * head_dim),
        intermediate_size=160,
        num_hidden_layers=options.pop("layers", 3),
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        max_position_embeddings=256,
        initializer_range=0.1,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=None,
        **options,
    )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return model_class(config).eval().to(device=device, dtype=dtype)


def difference(got: torch.Tensor, plain: torch.Tensor) -> float:
    """The largest difference from what the plain model gives, relative to the largest of its values."""
    assert got.shape == plain.shape
    if not got.is_floating_point():
        return float(not torch.equal(got, plain))
    return ((got.double() - plain.double()).abs().max() / plain.double().abs().max()).item()
