"""Times this process's own first call and prints it as JSON: `python -m bench.probe plain`, `scx` or `warmed`.

Nothing here may be imported before it is timed.
"""

import itertools
import json
import sys
import time
from typing import Any

PROMPT, STEPS = 128, 2


def probe(who: str) -> dict[str, float]:
    """Milliseconds of imports and of two equal requests, made by the plain model, by SCX, or by SCX after its warm-up,
    whose own time is told as well."""
    ticks = [time.perf_counter()]
    import torch
    from transformers import LlamaForCausalLM

    ticks.append(time.perf_counter())
    import scx

    ticks.append(time.perf_counter())
    libraries, package = (b - a for a, b in itertools.pairwise(ticks))

    found = {"libraries": libraries, "package": package}
    model = _small_model(LlamaForCausalLM)
    if who != "plain":
        scx.encode_llama(model, scx.SCXKeyGenerator.for_model(model, redundant_num=100))
    if who == "warmed":
        start = time.perf_counter()
        scx.warm_up(model)
        found["warm-up"] = time.perf_counter() - start
    ids = torch.randint(model.config.vocab_size, (1, PROMPT), device=model.device)
    found |= {"first": _request(model, ids), "second": _request(model, ids)}
    return {name: 1e3 * seconds for name, seconds in found.items()}


def _small_model(model_class: Any) -> Any:
    """Two blocks of Llama-3-8B on CUDA, of SmolLM2 on a CPU: what is compiled for two serves all of them."""
    import dataclasses

    import torch

    from bench.shapes import SHAPES

    on_cuda = torch.cuda.is_available()
    shape = dataclasses.replace(SHAPES["Llama-3-8B" if on_cuda else "SmolLM2"], layers=2, vocabulary=1000)
    with torch.device("cuda" if on_cuda else "cpu"):
        return model_class(shape.config()).eval().to(torch.bfloat16 if on_cuda else torch.float32)


def _request(model: Any, ids: Any) -> float:
    """Seconds of a prefill and STEPS tokens."""
    import torch

    start = time.perf_counter()
    with torch.no_grad():
        out = model(ids, logits_to_keep=1)
        for _ in range(STEPS):
            token = out.logits[:, -1:].argmax(dim=-1)
            token.tolist()
            out = model(token, past_key_values=out.past_key_values)
        out.logits.argmax(dim=-1).tolist()
    return time.perf_counter() - start


if __name__ == "__main__":
    print(json.dumps(probe(sys.argv[1])))
