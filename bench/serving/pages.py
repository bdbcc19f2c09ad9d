"""vLLM with its paged cache sealed in memory beside plain vLLM: `python -m bench.serving.pages`.

Two servers take turns with the same requests: short prompts, eight at once, and long ones, of which two fill the cache.
Prefix caching is off, so that every round computes the same.
"""

import argparse
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from importlib.metadata import version
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

from openai import OpenAI
from transformers import AutoTokenizer

from bench.provenance import RESULTS, provenance, write_json
from scx.commands.smollm2 import smollm2_path
from scx.commands.texts import windows
from scx.commands.vllm_server import VLLMServer, serving

__all__ = ["CONTESTANTS", "EQUAL", "LOADS", "Load", "figures", "measure"]

PLAIN, SEALED = "vLLM", "vLLM, sealed pages"
CONTESTANTS = {PLAIN: {"SCX_SEAL_PAGES": "0"}, SEALED: {"SCX_SEAL_PAGES": "1"}}
_NAME = "smollm2"


class Load(NamedTuple):
    """Requests of a round.

    Attributes:
        prompts: how many. tokens: of each. at_once: requests. answer: tokens of each.
    """

    prompts: int
    tokens: int
    at_once: int
    answer: int


LOADS = {"short, eight at once": Load(16, 100, 8, 48), "long, two at once": Load(2, 1500, 2, 48)}

Round = dict[str, dict[str, float]]
"""Load -> contestant -> seconds, and `EQUAL` -> the share of answers that are plain vLLM's, token for token."""
EQUAL = "answers equal"


def measure(rounds: int, dtype: str) -> Iterator[Round]:
    """Seconds of every load of a round. A round before them warms up and is not given."""
    path = smollm2_path()
    tokenizer = AutoTokenizer.from_pretrained(path)
    prompts = {name: windows(tokenizer, load.prompts, load.tokens).tolist() for name, load in LOADS.items()}
    options = (
        *("--served-model-name", _NAME, "--dtype", dtype, "--max-model-len", "2048", "--max-num-seqs", "8"),
        *("--block-size", "32", "--no-enable-prefix-caching", "--enforce-eager"),
    )
    with ExitStack() as stack:
        folder = Path(stack.enter_context(TemporaryDirectory()))
        servers = {
            name: stack.enter_context(serving(path, options, log=folder / f"{number}.log", environment=environment))
            for number, (name, environment) in enumerate(CONTESTANTS.items())
        }
        for number in range(rounds + 1):
            taken: Round = {}
            for name, load in LOADS.items():
                turned = list(CONTESTANTS)[:: 1 if number % 2 else -1]
                made = {one: _answer(servers[one], prompts[name], load) for one in turned}
                equal = sum(one == other for one, other in zip(made[PLAIN][1], made[SEALED][1], strict=True))
                taken[name] = {one: seconds for one, (seconds, _) in made.items()} | {EQUAL: equal / load.prompts}
            if number:
                yield taken


def _answer(server: VLLMServer, prompts: list[list[int]], load: Load) -> tuple[float, list[list[int]]]:
    with (
        OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=300) as client,
        ThreadPoolExecutor(load.at_once) as pool,
    ):

        def ask(prompt: list[int]) -> list[int]:
            extra = {"return_token_ids": True, "ignore_eos": True}
            made = client.completions.create(
                model=_NAME, prompt=prompt, max_tokens=load.answer, temperature=0, extra_body=extra
            )
            return made.choices[0].token_ids

        began = time.perf_counter()
        answers = list(pool.map(ask, prompts))
        return time.perf_counter() - began, answers


def figures(taken: list[Round]) -> dict[str, Any]:
    """Medians over rounds, and of what sealed pages have over plain ones in the same round, with its range."""
    result: dict[str, Any] = {}
    for name in LOADS:
        ratios = sorted(one[name][SEALED] / one[name][PLAIN] for one in taken)
        result[name] = {
            "seconds": {who: median(one[name][who] for one in taken) for who in CONTESTANTS},
            EQUAL: min(one[name][EQUAL] for one in taken),
            "sealed over plain": {"median": median(ratios), "lowest": ratios[0], "highest": ratios[-1]},
        }
    return result


def main() -> None:
    parser = argparse.ArgumentParser(prog="bench.serving.pages", description=__doc__)
    parser.add_argument("--rounds", type=int, default=5, help="default: %(default)s")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="default: %(default)s")
    parser.add_argument("--save", metavar="NAME", help="write bench/results/NAME.json")
    options = parser.parse_args()
    about = provenance()
    about["packages"]["vllm"] = version("vllm")
    settings = {
        "model": f"SmolLM2-135M-Instruct, {options.dtype}",
        "tokens of a block": 32,
        "loads": {name: load._asdict() for name, load in LOADS.items()},
    }
    taken = []
    for number, one in enumerate(measure(options.rounds, options.dtype), 1):
        taken.append(one)
        print(f"round {number}: {one}", flush=True)
    found = figures(taken)
    print(found)
    if options.save:
        results = {"settings": settings, **found, "rounds": taken}
        print(write_json(RESULTS / f"{options.save}.json", {"provenance": about, "results": results}))


if __name__ == "__main__":
    main()
