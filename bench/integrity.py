"""What a check of the untrusted side costs: SmolLM2, split, with the paper's crossings, verified and not, in turns.

Beside the times: how near honest rounding came to the tolerance, and the bytes that crossed."""

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from bench.provenance import save
from scx import SCXKeyGenerator, encode_llama, load_secure_model, record_transcript
from scx.commands.smollm2 import smollm2_path
from scx.models.llama import model_shape
from scx.party.launch import running_worker
from scx.party.process import RemoteParty
from scx.party.secure import split_plan

KEYS = {"redundant_num": 64, "alp": True, "noise_scale": 10.0}
_REPLY_SECONDS = 600.0


def in_one_process(path: Path, verify: bool, stack: ExitStack) -> PreTrainedModel:
    """Both parties here."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    return encode_llama(model, SCXKeyGenerator.for_model(model, **KEYS), "cpu", crossings="paper", verify=verify)


def in_two_processes(path: Path, verify: bool, stack: ExitStack) -> PreTrainedModel:
    """The secure side here, with its own weights and no more, and a worker."""
    keys = SCXKeyGenerator.for_config(AutoConfig.from_pretrained(path), **KEYS)
    model = load_secure_model(path, keys, verify=verify)
    shape = model_shape(model)
    plan = split_plan(keys, shape, "paper", False, verify=verify)
    remote = RemoteParty(plan, shape.fingerprint, timeout=_REPLY_SECONDS)
    stack.enter_context(running_worker(remote, str(path)))
    stack.callback(remote.close)
    remote.connect()
    return encode_llama(model, keys, "cpu", crossings="paper", verify=verify, untrusted=remote)


PARTIES: dict[str, Callable[[Path, bool, ExitStack], PreTrainedModel]] = {
    "one process": in_one_process,
    "two processes": in_two_processes,
}


@torch.no_grad()
def request(model: PreTrainedModel, ids: Tensor, new_tokens: int) -> dict[str, float]:
    """Seconds of a prefill, and of tokens after it, key sharing left out."""
    start = time.perf_counter()
    cache = model(ids, logits_to_keep=1).past_key_values
    prefill = time.perf_counter() - start
    model(ids[:, :1], past_key_values=cache)
    start = time.perf_counter()
    for place in range(new_tokens):
        model(ids[:, place : place + 1], past_key_values=cache)
    return {"prefill": prefill, "tokens": time.perf_counter() - start}


@contextmanager
def both(make: Callable[[Path, bool, ExitStack], PreTrainedModel], path: Path) -> Iterator[list[PreTrainedModel]]:
    """The model without a check and with one."""
    with ExitStack() as stack:
        yield [make(path, verify, stack) for verify in (False, True)]


def measure(models: list[PreTrainedModel], tokens: int, new_tokens: int, rounds: int) -> dict[str, Any]:
    """Ratios of times, verified over not, a round each; the largest error over its tolerance; bytes of both."""
    ids = torch.randint(0, models[0].config.vocab_size, (1, tokens), generator=torch.Generator().manual_seed(0))
    for model in models:
        request(model, ids, 1)
    seconds = [[request(model, ids, new_tokens) for model in models] for _ in range(rounds)]
    found: dict[str, Any] = {"tokens": tokens, "new_tokens": new_tokens, "rounds": rounds}
    for what in ("prefill", "tokens"):
        ratios = sorted(checked[what] / plain[what] for plain, checked in seconds)
        found[f"{what}, verified over not"] = {
            "median": statistics.median(ratios), "all": ratios,
            "seconds": [statistics.median(times[what] for times in column) for column in zip(*seconds, strict=True)],
        }  # fmt: skip
    found["bytes"] = []
    for model in models:
        with record_transcript(model) as transcript:
            request(model, ids, 1)
        found["bytes"].append({stage: transcript.nbytes(stage) for stage in ("prefill", "generation")})
    found["largest error over its tolerance"] = models[1].base_model._scx.party.verifier.largest_ratios
    return found


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.integrity", description=" ".join(__doc__.split()))
    parser.add_argument("--parties", choices=PARTIES, default="one process")
    parser.add_argument("--tokens", type=int, default=256, help="of the prompt (default: %(default)s)")
    parser.add_argument("--new-tokens", type=int, default=32, help="default: %(default)s")
    parser.add_argument("--rounds", type=int, default=5, help="default: %(default)s")
    parser.add_argument("--save", metavar="NAME", help="write bench/results/NAME.json")
    options = parser.parse_args()
    with both(PARTIES[options.parties], smollm2_path()) as models:
        found = {"parties": options.parties, **measure(models, options.tokens, options.new_tokens, options.rounds)}
    for name, value in found.items():
        print(f"{name}: {value}")
    if options.save:
        print(f"written to {save(options.save, found)}")


if __name__ == "__main__":
    main()
