"""How exactly SCX gives the plain model's output on SmolLM2: tokens, and logits beside transformers' own spread."""

import argparse
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from bench.prompts import PROMPTS, tokenize
from bench.provenance import save
from scx import SCXKeyGenerator, encoded_llama
from scx.smollm2 import smollm2_path

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SETTINGS = {"permutations": {}, "redundant rows": {"redundant_num": 64}, "noise": {"redundant_num": 64, "alp": True}}


def tokens_agree(model: PreTrainedModel, inputs: list[Any], new_tokens: int) -> tuple[int, int]:
    """(tokens that agree, tokens generated), one prompt at a time, greedy, with redundant rows and noise."""
    settings = {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens, "do_sample": False}
    keys = SCXKeyGenerator.for_model(model, redundant_num=64, alp=True)
    agreeing = total = 0
    for number, prompt in enumerate(inputs, 1):
        plain = model.generate(**prompt, **settings)
        with encoded_llama(model, keys):
            encoded = model.generate(**prompt, **settings)
        generated = prompt["input_ids"].shape[1]
        agreeing += int((plain[:, generated:] == encoded[:, generated:]).sum())
        total += plain.shape[1] - generated
        print(f"\rprompt {number} of {len(inputs)}: {agreeing} of {total} tokens agree", end="", flush=True)
    print()
    return agreeing, total


@torch.no_grad()
def logit_differences(model: PreTrainedModel, inputs: list[Any]) -> dict[str, float]:
    """Largest difference to the plain model with sdpa attention, over all prompts, of each setting and of eager."""

    def run() -> list[torch.Tensor]:
        return [model(**prompt).logits.double() for prompt in inputs]

    plain = run()

    def largest() -> float:
        return max((a - b).abs().max().item() for a, b in zip(run(), plain, strict=True))

    model.set_attn_implementation("eager")
    found = {"eager attention": largest()}
    model.set_attn_implementation("sdpa")
    for name, options in SETTINGS.items():
        with encoded_llama(model, SCXKeyGenerator.for_model(model, **options)):
            found[name] = largest()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.agreement", description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=64, help="new tokens per prompt (default: %(default)s)")
    parser.add_argument("--save", metavar="NAME", help="write bench/results/NAME.json")
    options = parser.parse_args()
    path = smollm2_path()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    inputs = [tokenize(path, [prompt], device) for prompt in PROMPTS]
    results: dict[str, Any] = {"prompts": len(inputs), "largest_logit_difference": {}}
    for dtype in DTYPES:
        model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype).eval().to(device)
        if dtype == torch.float32:
            results["tokens_agreeing"], results["tokens"] = tokens_agree(model, inputs, options.tokens)
        found = logit_differences(model, inputs)
        results["largest_logit_difference"][str(dtype).removeprefix("torch.")] = found
        print(f"{dtype}: " + ", ".join(f"{name} {value:.1e}" for name, value in found.items()))
    if options.save:
        print(f"written to {save(options.save, results)}")


if __name__ == "__main__":
    main()
