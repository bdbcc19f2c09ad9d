"""Times this process's own first call and prints it as JSON: `python -m bench.probe plain`, `scx` or `warmed`.

Nothing here may be imported before it is timed.
"""

import importlib
import json
import sys
import time
from typing import Any

PROMPT, STEPS = 128, 2


def imported(*names: str) -> tuple[float, ...]:
    """(seconds, *modules)."""
    start = time.perf_counter()
    modules = [importlib.import_module(name) for name in names]
    return (time.perf_counter() - start, *modules)


def probe(who: str) -> dict[str, float]:
    """Milliseconds of imports and of two equal requests, made by the plain model, by SCX, or by SCX after its warm-up,
    whose own time is told as well."""
    libraries, torch, llama = imported("torch", "transformers.models.llama.modeling_llama")
    package, scx = imported("scx")
    found = {"libraries": libraries, "package": package}
    model = _small_model(torch, llama.LlamaForCausalLM)
    if who != "plain":
        scx.encode_llama(model, scx.SCXKeyGenerator.for_model(model, redundant_num=100))
    if who == "warmed":
        start = time.perf_counter()
        scx.warm_up(model)
        found["warm-up"] = time.perf_counter() - start
    ids = torch.randint(model.config.vocab_size, (1, PROMPT), device=model.device)
    with torch.no_grad():
        found |= {"first": _request(model, ids), "second": _request(model, ids)}
    return {name: 1e3 * seconds for name, seconds in found.items()}


def _small_model(torch: Any, model_class: Any) -> Any:
    """Two blocks of Llama-3-8B on CUDA, of SmolLM2 on a CPU: what is compiled for two serves all of them."""
    _, dataclasses, shapes = imported("dataclasses", "bench.shapes")
    on_cuda = torch.cuda.is_available()
    shape = dataclasses.replace(shapes.SHAPES["Llama-3-8B" if on_cuda else "SmolLM2"], layers=2, vocabulary=1000)
    with torch.device("cuda" if on_cuda else "cpu"):
        return model_class(shape.config()).eval().to(torch.bfloat16 if on_cuda else torch.float32)


def _request(model: Any, ids: Any) -> float:
    """Seconds of a prefill and STEPS tokens."""
    start = time.perf_counter()
    out = model(ids, logits_to_keep=1)
    for _ in range(STEPS):
        token = out.logits[:, -1:].argmax(dim=-1)
        token.tolist()
        out = model(token, past_key_values=out.past_key_values)
    out.logits.argmax(dim=-1).tolist()
    return time.perf_counter() - start


if __name__ == "__main__":
    print(json.dumps(probe(sys.argv[1])))
