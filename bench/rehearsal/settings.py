"""Which models and encodings are rehearsed.

What a kernel is compiled for depends on one or two settings at a time: a head's size and dtype, the encoding and its
rounds, whether there are redundant rows or noise. So any two values of two settings meet in some model (`covering`);
all values of all of them need not.
"""

import itertools
from dataclasses import dataclass
from typing import Any

import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

FAMILIES: dict[str, tuple[type, type, dict[str, Any]]] = {
    "llama": (LlamaConfig, LlamaForCausalLM, {}),
    "mistral": (MistralConfig, MistralForCausalLM, {"sliding_window": 9}),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, {}),  # its projections have biases
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, {}),  # it normalises every head
}
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Setting:
    """A model and how it is encoded.

    `encoding` is "permuted", or "sealed" and the cipher's rounds, as in "sealed8". `placement`: options of
    `encode_llama` for two parties, none for one device. `sizes`: of the model's configuration, where not small.
    """

    family: str
    head_dim: int
    dtype: str
    redundant: int
    noise: bool
    encoding: str
    placement: tuple[tuple[str, Any], ...] = ()
    attention: str = "sdpa"
    layers: int = 2
    sizes: tuple[tuple[str, int | None], ...] = ()
    title: str = ""

    @property
    def name(self) -> str:
        parts = [self.title or f"{self.family} {self.head_dim}", self.dtype, f"R{self.redundant}"]
        parts += ["noise"] if self.noise else []
        parts += [self.encoding] + (["eager"] if self.attention == "eager" else [])
        return " ".join(parts + [f"{key}={value}" for key, value in self.placement])

    @property
    def keys(self) -> dict[str, Any]:
        """Options of `SCXKeyGenerator`."""
        sealed = self.encoding.startswith("sealed")
        cipher = {"cache_encoding": "sealed", "cipher_rounds": int(self.encoding[6:])} if sealed else {}
        return {"redundant_num": self.redundant, "alp": self.noise, "noise_scale": 1.0, **cipher}

    def model(self) -> Any:
        """A random model, made on PyTorch's current device."""
        config_class, model_class, options = FAMILIES[self.family]
        sizes = {
            "vocab_size": 128,
            "hidden_size": 2 * self.head_dim,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": self.head_dim,
            "intermediate_size": 96,
            "max_position_embeddings": 1024,
        }
        config = config_class(
            **{**sizes, **options, **dict(self.sizes)},
            num_hidden_layers=self.layers,
            initializer_range=0.1,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=None,
            attn_implementation=self.attention,
        )
        return model_class(config).eval().to(DTYPES[self.dtype])


SETTINGS: dict[str, tuple[Any, ...]] = {
    "family": tuple(FAMILIES),
    "head_dim": (64, 80, 96, 128, 256),
    "dtype": tuple(DTYPES),
    "redundant": (0, 1, 100),
    "noise": (False, True),
    "encoding": ("permuted", "sealed8", "sealed12", "sealed20"),
}


def covering() -> list[Setting]:
    """Settings such that any two values of two of them meet, chosen greedily: each next one brings most new pairs."""
    names = list(SETTINGS)
    every = [dict(zip(names, values, strict=True)) for values in itertools.product(*SETTINGS.values())]

    def pairs(chosen: dict[str, Any]) -> set[Any]:
        return {((a, chosen[a]), (b, chosen[b])) for a, b in itertools.combinations(names, 2)}

    pairs_of = [(place, pairs(chosen)) for place, chosen in enumerate(every)]
    missing, taken = set().union(*(found for _, found in pairs_of)), []
    while missing:
        place, found = max(pairs_of, key=lambda entry: (len(entry[1] & missing), -entry[0]))
        taken.append(Setting(**every[place]))
        missing -= found
    return taken


_SECURE = ("secure_device", "cpu")
SPLIT = [
    Setting("llama", 64, "bf16", 100, True, "permuted", (_SECURE,), layers=3),
    Setting("llama", 80, "fp16", 0, False, "permuted", (_SECURE, ("crossings", "paper")), layers=3),
    Setting("qwen3", 128, "fp32", 1, True, "permuted", (_SECURE, ("prefill_top_k", 5)), layers=3),
    Setting(
        "qwen2", 96, "fp32", 100, False, "permuted", (_SECURE, ("crossings", "paper"), ("prefill_top_k", 5)), layers=3
    ),
    Setting("llama", 256, "bf16", 0, True, "permuted", (_SECURE, ("reuse_feature_keys", True)), layers=3),
    Setting("mistral", 64, "fp32", 1, False, "permuted", (_SECURE,), layers=3, sizes=(("sliding_window", None),)),
]
"""Two parties, the untrusted one on the accelerator."""


def _real(title: str, family: str, head_dim: int, hidden: int, heads: int, kv_heads: int, inner: int) -> list[Setting]:
    sizes = {
        "hidden_size": hidden, "num_attention_heads": heads, "num_key_value_heads": kv_heads,
        "intermediate_size": inner, "vocab_size": 1000,
    }  # fmt: skip
    return [
        Setting(family, head_dim, "bf16", redundant, noise, encoding, sizes=tuple(sizes.items()), title=title)
        for redundant, noise, encoding in ((0, False, "permuted"), (100, True, "permuted"), (100, False, "sealed20"))
    ]


REAL = [
    *_real("SmolLM2-135M", "llama", 64, 576, 9, 3, 1536),
    *_real("Llama-3-8B", "llama", 128, 4096, 32, 8, 14336),
    *_real("Qwen3-0.6B", "qwen3", 128, 1024, 16, 8, 3072),
]
"""Two blocks of models as they are: their shapes alone, for the tiles that they get."""
