"""What the split placement costs on SmolLM2: bytes and round trips of both ways to cross, time beside plain, tokens."""

import argparse
import statistics
import time
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from bench.prompts import PROMPTS, tokenize
from bench.provenance import save
from scx import SCXKeyGenerator, encoded_llama, record_transcript
from scx.smollm2 import smollm2_path

SETTINGS = {"no redundant rows": {}, "64 redundant rows and noise": {"redundant_num": 64, "alp": True}}
CROSSINGS = ("few", "paper")
_BATCH = 10


@torch.no_grad()
def moved(model: PreTrainedModel, prompt: torch.Tensor, crossings: str, options: dict[str, Any]) -> dict[str, float]:
    """Bytes and round trips of a prefill, in all and per block, and of the second step of a generation."""
    with encoded_llama(model, SCXKeyGenerator.for_model(model, **options), "cpu", crossings=crossings):
        with record_transcript(model) as prefill:
            cache = model(prompt, logits_to_keep=1).past_key_values
        model(prompt[:, :1], past_key_values=cache)
        with record_transcript(model) as step:
            model(prompt[:, :1], past_key_values=cache)
    blocks, trips = len(model.base_model.layers), prefill.requests["prefill"]
    return {
        "prefill_bytes": prefill.nbytes(),
        "prefill_bytes_per_block": prefill.nbytes() / blocks,
        "prefill_round_trips": trips,
        "prefill_round_trips_per_block": trips / blocks,
        "step_bytes": step.nbytes(),
        "step_round_trips": step.requests["generation"],
    }


@torch.no_grad()
def time_ratios(
    model: PreTrainedModel, prompt: torch.Tensor, crossings: str, options: dict[str, Any], rounds: int
) -> list[float]:
    """Time of a split prefill over that of a plain one, taken in turns, both sides on the CPU."""
    keys = SCXKeyGenerator.for_model(model, **options)

    def seconds() -> float:
        start = time.perf_counter()
        model(prompt, logits_to_keep=1)
        return time.perf_counter() - start

    ratios = []
    for _ in range(rounds + 1):
        plain = seconds()
        with encoded_llama(model, keys, "cpu", crossings=crossings):
            ratios.append(seconds() / plain)
    return ratios[1:]


@torch.no_grad()
def tokens_agree(model: PreTrainedModel, inputs: list[Any], crossings: str, new_tokens: int) -> tuple[int, int]:
    """(tokens that agree, tokens generated): padded batches, greedy, with redundant rows and noise."""
    settings = {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens, "do_sample": False}
    keys = SCXKeyGenerator.for_model(model, redundant_num=64, alp=True)
    agreeing = total = 0
    for batch in inputs:
        plain = model.generate(**batch, **settings)
        with encoded_llama(model, keys, "cpu", crossings=crossings):
            split = model.generate(**batch, **settings)
        same = (plain == split)[:, batch["input_ids"].shape[1] :]
        agreeing, total = agreeing + int(same.sum()), total + same.numel()
    return agreeing, total


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.crossings", description=__doc__.splitlines()[0])
    parser.add_argument("--prompt", type=int, default=512, help="prompt tokens (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=64, help="new tokens per prompt (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="pairs of timings (default: %(default)s)")
    parser.add_argument("--save", metavar="NAME", help="write bench/results/NAME.json")
    options = parser.parse_args()
    path = smollm2_path()
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    prompt = torch.randint(0, model.config.vocab_size, (1, options.prompt))
    inputs = [tokenize(path, PROMPTS[i : i + _BATCH], "cpu") for i in range(0, len(PROMPTS), _BATCH)]
    results: dict[str, Any] = {"prompt_tokens": options.prompt, "threads": torch.get_num_threads(), "settings": {}}
    for name, given in SETTINGS.items():
        for crossings in CROSSINGS:
            found: dict[str, Any] = moved(model, prompt, crossings, given)
            found["prefill_time_ratios"] = time_ratios(model, prompt, crossings, given, options.rounds)
            results["settings"][f"{crossings}, {name}"] = found
            ratio = statistics.median(found["prefill_time_ratios"])
            print(
                f"{crossings}, {name}: {found['prefill_bytes']:,} bytes in {found['prefill_round_trips']} round trips, "
                f"{ratio:.3f} of the plain prefill's time; a step {found['step_bytes']:,} bytes in "
                f"{found['step_round_trips']}"
            )
    for crossings in CROSSINGS:
        agreeing, total = tokens_agree(model, inputs, crossings, options.tokens)
        results[f"tokens_agreeing_{crossings}"], results["tokens"] = agreeing, total
        print(f"{crossings}: {agreeing} of {total} tokens agree")
    if options.save:
        print(f"written to {save(options.save, results)}")


if __name__ == "__main__":
    main()
