"""How exactly SCX gives the plain model's output on SmolLM2: tokens, and logits beside transformers' own spread."""

import argparse
import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from bench.prompts import PROMPTS, tokenize
from bench.provenance import save
from scx import SCXKeyGenerator, encoded_llama, load_secure_model
from scx.commands.smollm2 import smollm2_path
from scx.models.llama import model_shape
from scx.party.launch import running_worker
from scx.party.loading import weight_bytes
from scx.party.plan import CROSSINGS
from scx.party.process import RemoteParty
from scx.party.secure import split_plan

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
ALL = {"redundant_num": 64, "alp": True}
SETTINGS = {"permutations": {}, "redundant rows": {"redundant_num": 64}, "noise": ALL}
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
_REPLY_SECONDS = 600.0


def load(path: Path, dtype: torch.dtype, device: str) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(path, dtype=dtype).eval().to(device)


def tokenized(path: Path, prompts: int, device: str) -> list[Any]:
    """The first prompts, one by one."""
    return [tokenize(path, [prompt], device) for prompt in PROMPTS[:prompts]]


def generate(model: PreTrainedModel, inputs: list[Any], new_tokens: int) -> list[list[int]]:
    """The new tokens of every prompt, one prompt at a time, greedy."""
    made = []
    for number, prompt in enumerate(inputs, 1):
        out = model.generate(**prompt, max_new_tokens=new_tokens, min_new_tokens=new_tokens, do_sample=False)
        made.append(out[0, prompt["input_ids"].shape[1] :].tolist())
        print(f"\rprompt {number} of {len(inputs)}", end="", flush=True)
    print()
    return made


def agreeing(plain: list[list[int]], encoded: list[list[int]]) -> int:
    """Tokens that agree."""
    return sum(a == b for x, y in zip(plain, encoded, strict=True) for a, b in zip(x, y, strict=True))


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


def fused(path: Path, prompts: int, new_tokens: int) -> dict[str, Any]:
    """Tokens in float32 and logits in every dtype, on one device."""
    inputs = tokenized(path, prompts, DEVICE)
    results: dict[str, Any] = {"largest_logit_difference": {}}
    for dtype in DTYPES:
        model = load(path, dtype, DEVICE)
        if dtype == torch.float32:
            plain, keys = generate(model, inputs, new_tokens), SCXKeyGenerator.for_model(model, **ALL)
            with encoded_llama(model, keys):
                results["tokens_agreeing"] = agreeing(plain, generate(model, inputs, new_tokens))
        found = logit_differences(model, inputs)
        results["largest_logit_difference"][str(dtype).removeprefix("torch.")] = found
        print(f"{dtype}: " + ", ".join(f"{name} {value:.1e}" for name, value in found.items()))
    return results


def split(path: Path, prompts: int, new_tokens: int) -> dict[str, Any]:
    """Tokens of two parties in this process, which holds the whole model: secure side on the CPU, both crossings."""
    inputs, model = tokenized(path, prompts, DEVICE), load(path, torch.float32, DEVICE)
    plain = generate(model, inputs, new_tokens)
    keys, found = SCXKeyGenerator.for_model(model, **ALL), {}
    for crossings in CROSSINGS:
        with encoded_llama(model, keys, "cpu", crossings=crossings):
            found[crossings] = agreeing(plain, generate(model, inputs, new_tokens))
    return {"tokens_agreeing": found}


def plain_answers(path: Path, prompts: int, new_tokens: int) -> list[list[int]]:
    """The plain model's tokens."""
    return generate(load(path, torch.float32, "cpu"), tokenized(path, prompts, "cpu"), new_tokens)


def processes(path: Path, prompts: int, new_tokens: int) -> dict[str, Any]:
    """Tokens of two processes, both crossings: this one holds the secure side's part of the weights and no more; the
    plain model, too, answers in a process of its own."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as other:
        plain = other.submit(plain_answers, path, prompts, new_tokens).result()
    keys = SCXKeyGenerator.for_config(AutoConfig.from_pretrained(path), **ALL)
    model, inputs, found = load_secure_model(path, keys), tokenized(path, prompts, "cpu"), {}
    shape = model_shape(model)
    for crossings in CROSSINGS:
        plan = split_plan(keys, shape, crossings, False)
        remote = RemoteParty(plan, shape.fingerprint, timeout=_REPLY_SECONDS)
        with running_worker(remote, str(path)):
            try:
                remote.connect()
                with encoded_llama(model, keys, "cpu", crossings=crossings, untrusted=remote):
                    found[crossings] = agreeing(plain, generate(model, inputs, new_tokens))
            finally:
                remote.close()
    held = weight_bytes(model)
    print(f"the secure process holds {held}")
    return {"tokens_agreeing": found, "weight_bytes": {"secure process": held.held, "whole model": held.whole}}


PARTIES: dict[str, Callable[[Path, int, int], dict[str, Any]]] = {
    "fused": fused,
    "split": split,
    "processes": processes,
}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.agreement", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--parties", choices=PARTIES, default="fused",
        help="one device, two parties in one process, or two processes (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--prompts", type=int, default=len(PROMPTS), help="how many (default: all %(default)s)")
    parser.add_argument("--tokens", type=int, default=64, help="new tokens per prompt (default: %(default)s)")
    parser.add_argument("--save", metavar="NAME", help="write bench/results/NAME.json")
    options = parser.parse_args()
    if not 1 <= options.prompts <= len(PROMPTS):
        parser.error(f"--prompts: expected 1 to {len(PROMPTS)}, got {options.prompts}")
    found = PARTIES[options.parties](smollm2_path(), options.prompts, options.tokens)
    total = options.prompts * options.tokens
    print(f"{options.parties}: of {total} tokens agree: {found['tokens_agreeing']}")
    if options.save:
        results = {"parties": options.parties, "prompts": options.prompts, "tokens": total, **found}
        print(f"written to {save(options.save, results)}")


if __name__ == "__main__":
    main()
