"""`scx audit`: the attacks of `scx.audit` on a real model, and what they read."""

import time
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from scx.audit import read_first_block
from scx.commands.smollm2 import smollm2_path
from scx.keys import CACHE_ENCODINGS, SCXKeyGenerator
from scx.kvcache import EncodedCache
from scx.models.llama import encoded_llama

__all__ = ["Finding", "run"]


@dataclass(frozen=True)
class Finding:
    """What an attack got: tokens read of tokens there, and seconds."""

    attack: str
    read: int
    tokens: int
    seconds: float

    def __str__(self) -> str:
        return f"{self.attack}: {self.read} of {self.tokens} tokens read in {self.seconds:.1f} s"


def run(*, model: str | None = None, tokens: int = 256, redundant: int = 64, noise: float = 10.0) -> list[Finding]:
    """Prefill SmolLM2 (or `model`) under SCX with all encodings on, and read the prompt from its stored cache, once
    permuted and once sealed.

    Args:
        tokens: random prompt tokens.
        redundant: redundant rows R.
        noise: noise scale in units of the rows' root mean square; 0 for none.
    """
    path = model or str(smollm2_path())
    llama = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    prompt = torch.randint(0, len(AutoTokenizer.from_pretrained(path)), (1, tokens))
    options: dict[str, Any] = {"noise_scale": noise} if noise else {}
    findings = []
    for encoding in CACHE_ENCODINGS:
        keys = SCXKeyGenerator.for_model(
            llama, redundant_num=redundant, alp=noise > 0, cache_encoding=encoding, **options
        )
        with encoded_llama(llama, keys), torch.no_grad():
            cache: EncodedCache = llama(prompt).past_key_values
        start = time.perf_counter()
        found = read_first_block(llama, cache.layers[0].values)
        read = int((found == prompt).sum())
        findings.append(Finding(f"V of the first block, stored {encoding}", read, tokens, time.perf_counter() - start))
    return findings
