"""Which kernels requests of a model compile, and whether `scx.warm_up` has compiled them before.

`python -m bench.variants` needs no GPU: launches are recorded for sm_90, not run. It prints, per model, how many
variants the warm-up and a series of requests ask for, with a permuted and with a sealed cache, and exits with 1 if a
request asks for one that the warm-up did not.
"""

import argparse
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

import scx_kernels
from bench.offline import source_of
from scx import SCXKeyGenerator, encode_llama, warm_up
from scx_kernels.kernels import launch
from scx_kernels.kernels.launch import TARGETS

LENGTHS = (1, 2, 5, 9, 16, 17, 31, 33, 64, 65, 100, 128, 150, 257, 391, 512)
TURNS = ((5, 2, 33, 24), (40, 7, 130, 79))
"""Tokens of a prompt and of later turns."""
MODELS: dict[str, tuple[type, type, dict[str, int]]] = {
    "SmolLM2-135M": (
        LlamaConfig,
        LlamaForCausalLM,
        {"hidden_size": 576, "num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 64},
    ),
    "Llama-3-8B": (
        LlamaConfig,
        LlamaForCausalLM,
        {"hidden_size": 4096, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128},
    ),
    "Qwen3-0.6B": (
        Qwen3Config,
        Qwen3ForCausalLM,
        {"hidden_size": 1024, "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128},
    ),
}


def variants(requests: Callable[[], None]) -> set[str]:
    """What a JIT would compile, told apart as it does: by kernel, types, divisibility, constants and options."""
    asked: set[str] = set()

    def record(kernel: Any, grid: Any, args: tuple[Any, ...], meta: dict[str, Any]) -> None:
        source, options = source_of(kernel, args, meta)
        asked.add(f"{kernel.__name__} {source.signature} {source.attrs} {source.constants} {options}")

    with launch.recording(TARGETS["cuda", 90], record), scx_kernels.backend("triton"):
        requests()
    return asked


@torch.no_grad()
def serve(model: Any, lengths: tuple[int, ...]) -> None:
    """A request of every length, with three generated tokens each."""
    for length in lengths:
        out = model(torch.ones(1, length, dtype=torch.int64), mode="prefill")
        for _ in range(3):
            out = model(torch.ones(1, 1, dtype=torch.int64), mode="decode", past_key_values=out.past_key_values)


@torch.no_grad()
def converse(model: Any) -> None:
    """A later turn on a sealed cache is a pass of several tokens on the kernels. On a permuted one attention is
    PyTorch's, which needs no compiling and is not recorded."""
    for turns in TURNS:
        cache = None
        for count in turns:
            cache = model(torch.ones(1, count, dtype=torch.int64), past_key_values=cache).past_key_values


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.variants", description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=MODELS, help="one model")
    only = parser.parse_args().only
    wanted = [name for name in MODELS if only in (None, name)]
    missing = sum(_late(name, encoding) for name in wanted for encoding in ("permuted", "sealed"))
    return 1 if missing else 0


def _late(name: str, encoding: str) -> int:
    """Print what a model's warm-up and requests ask for. Returns how many variants the warm-up has not."""
    config, kind, sizes = MODELS[name]
    small = {"vocab_size": 128, "num_hidden_layers": 2, "intermediate_size": 64, "max_position_embeddings": 1024}
    model = kind(config(**small, **sizes)).eval().bfloat16()
    keys = SCXKeyGenerator.for_model(model, redundant_num=5, alp=True, cache_encoding=encoding)
    encode_llama(model, keys)
    before = variants(partial(warm_up, model))
    asked = variants(partial(serve, model, LENGTHS))
    if encoding == "sealed":
        asked |= variants(partial(converse, model))
    late = asked - before
    counts = f"{len(before)} variants warmed up, {len(asked)} asked for, {len(late)} not warmed up"
    print(f"{name}, {encoding}: {counts}")
    print("".join(f"  {variant[:1000]}\n" for variant in sorted(late)), end="")
    return len(late)


if __name__ == "__main__":
    sys.exit(main())
