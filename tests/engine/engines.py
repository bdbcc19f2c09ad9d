"""Engines under test: vLLM in processes of its own, as users run it, and what is read off them."""

import gc
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from prometheus_client import REGISTRY
from vllm import LLM, SamplingParams

BLOCK = 32
"""Tokens of a block of the cache."""
SIZES: dict[str, Any] = {
    "dtype": "float32",
    "max_model_len": 512,
    "enforce_eager": True,
    "max_num_seqs": 8,
    "block_size": BLOCK,
}
"""In float32, so that tokens are equal; eager, as compiling takes longer than what is tested."""
FEW_BLOCKS = 40
"""Of the device: room for five or six of the requests that run eight at once, so that blocks leave."""


def transfer(**settings: Any) -> dict[str, Any]:
    """`--kv-transfer-config` of sealed off-loading into 400 MB of host memory, with more settings of its own."""
    extra = {"cpu_bytes_to_use": 400_000_000, **settings}
    return {"kv_connector": "SCXSealedOffloading", "kv_role": "kv_both", "kv_connector_extra_config": extra}


def regions(engine_id: str) -> list[Path]:
    """The files that back an engine's host memory, as long as they have a name."""
    return sorted(Path("/dev/shm").glob(f"vllm_offload_{engine_id}*"))  # noqa: S108  where vLLM has it


def fs_tier(root: Path) -> list[dict[str, Any]]:
    return [{"type": "fs", "root_dir": str(root), "n_read_threads": 2, "n_write_threads": 2}]


@contextmanager
def changed_environment(variables: Mapping[str, str]) -> Iterator[None]:
    old = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in old.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


@contextmanager
def engine(model: Path, environment: Mapping[str, str] | None = None, **options: Any) -> Iterator[LLM]:
    """An engine for the length of a block, with `SIZES` and more options of `vllm.LLM`."""
    with changed_environment(environment or {}):
        llm = LLM(str(model), **{**SIZES, "disable_log_stats": False, **options})
        try:
            yield llm
        finally:
            llm.llm_engine.engine_core.shutdown()
            del llm
            gc.collect()


def answers(
    llm: LLM, prompts: Sequence[list[int]], tokens: int = 16, salt: str | None = None
) -> tuple[list[list[int]], list[int]]:
    """Greedy answers of requests that are there at once, and of each prompt the tokens that were not computed."""
    salted = {} if salt is None else {"cache_salt": salt}
    asked = [{"prompt_token_ids": prompt, **salted} for prompt in prompts]
    sampling = SamplingParams(temperature=0, max_tokens=tokens, detokenize=False)
    made = llm.generate(asked, sampling, use_tqdm=False)
    return [list(one.outputs[0].token_ids) for one in made], [one.num_cached_tokens or 0 for one in made]


def counted() -> dict[str, float]:
    """The counters of this process's engine now, summed over their labels; without `_total`."""
    found: dict[str, float] = {}
    for metric in REGISTRY.collect():
        if metric.type == "counter" and metric.name.startswith(("vllm:", "scx:")):
            values = [sample.value for sample in metric.samples if sample.name == f"{metric.name}_total"]
            found[metric.name] = sum(values)
    return found


def device_words(worker: Any) -> np.ndarray:
    """In a worker: every 64-bit word that is not zero of its paged cache."""
    caches = [layer.kv_cache for layer in worker.model_runner.compilation_config.static_forward_context.values()]
    return np.unique(np.concatenate([cache.flatten().view(-1).numpy().view(np.uint64) for cache in caches]))[1:]
