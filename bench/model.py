"""Time of SCX over plain transformers on SmolLM2, both on this machine, in turns.

Each round runs every setting once, so that a busy minute falls on all of them; a ratio is taken within its round and
the median over rounds is reported beside the 20 % and 80 % quantiles. A setting whose tokens differ from the plain
model's is reported as failed and not timed.
"""

import argparse
import gc
import time
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from bench.provenance import save
from scx import SCXKeyGenerator, encoded_llama
from scx.smollm2 import smollm2_path

STEPS = 16


@dataclass(frozen=True)
class Setting:
    name: str
    redundant_num: int = 0
    alp: bool = False


PLAIN = Setting("plain (sdpa)")
SETTINGS = (
    Setting("SCX"),
    Setting("SCX, 64 redundant rows", redundant_num=64),
    Setting("SCX, 64 redundant rows, noise", redundant_num=64, alp=True),
)


@torch.no_grad()
def measure(model: PreTrainedModel, ids: Tensor) -> tuple[float, float, list[int]]:
    """Seconds of a prefill and per generated token, and the tokens."""
    gc.collect()
    start = time.perf_counter()
    out = model(ids, logits_to_keep=1)
    prefill = time.perf_counter() - start
    tokens = []
    start = time.perf_counter()
    for _ in range(STEPS):
        token = out.logits[:, -1:].argmax(dim=-1)
        tokens.append(int(token))
        out = model(token, past_key_values=out.past_key_values)
    return prefill, (time.perf_counter() - start) / STEPS, tokens


def spread(values: list[float]) -> dict[str, float]:
    low, median, high = torch.tensor(values).quantile(torch.tensor([0.2, 0.5, 0.8])).tolist()
    return {"median": median, "q20": low, "q80": high}


def run(context: int, rounds: int) -> list[dict[str, Any]]:
    model = AutoModelForCausalLM.from_pretrained(smollm2_path(), dtype=torch.float32).eval()
    ids = torch.randint(3, model.config.vocab_size, (1, context), generator=torch.Generator().manual_seed(0))
    generators = {
        setting: SCXKeyGenerator.for_model(model, redundant_num=setting.redundant_num, alp=setting.alp)
        for setting in SETTINGS
    }
    times: dict[Setting, list[tuple[float, float]]] = {setting: [] for setting in (PLAIN, *SETTINGS)}
    failed: set[Setting] = set()
    expected: list[int] = []
    for number in range(rounds + 1):
        for setting in times:
            with nullcontext() if setting is PLAIN else encoded_llama(model, generators[setting]):
                measure(model, ids[:, :8])
                prefill, step, tokens = measure(model, ids)
            if setting is PLAIN:
                expected = tokens
            elif tokens != expected:
                failed.add(setting)
            if number:  # the first round warms up
                times[setting].append((prefill, step))
        print(f"\rround {number} of {rounds}", end="", flush=True)
    print()

    def row(setting: Setting) -> dict[str, Any]:
        case = {"setting": setting.name, "context": context, "redundant": setting.redundant_num}
        if setting in failed:
            return {**case, "failed": "its tokens differ from the plain model's"}
        for index, name in enumerate(("prefill", "token")):
            own = [entry[index] for entry in times[setting]]
            plain = [entry[index] for entry in times[PLAIN]]
            case[f"{name}_ms"] = spread([1e3 * seconds for seconds in own])
            case[f"{name}_ratio"] = spread([a / b for a, b in zip(own, plain, strict=True)])
        return case

    return [row(setting) for setting in times]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.model", description=__doc__.splitlines()[0])
    parser.add_argument("--context", type=int, default=512, help="prompt tokens (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=25, help="timed rounds (default: %(default)s)")
    parser.add_argument("--save", metavar="NAME", help="write bench/results/NAME.json")
    options = parser.parse_args()
    results = run(options.context, options.rounds)
    print(f"{'':32}{'prefill':>10}{'ratio':>8}{'(20-80 %)':>14}{'token':>10}{'ratio':>8}{'(20-80 %)':>14}")
    for case in results:
        line = f"{case['setting']:32}"
        if "failed" in case:
            print(line + case["failed"])
            continue
        for name in ("prefill", "token"):
            ratio = case[f"{name}_ratio"]
            line += f"{case[f'{name}_ms']['median']:7.1f} ms{ratio['median']:8.3f}"
            line += f"{ratio['q20']:7.3f}-{ratio['q80']:.3f} "
        print(line)
    if options.save:
        print(f"written to {save(options.save, results)}")


if __name__ == "__main__":
    main()
