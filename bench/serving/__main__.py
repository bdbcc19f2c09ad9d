"""`python -m bench.serving`, in the environment of `make test-vllm`: time to first token, and throughput."""

import argparse
from dataclasses import asdict
from importlib.metadata import version

from bench.provenance import RESULTS, provenance, write_json
from bench.serving.contest import (
    ANSWER,
    BLOCK,
    CONTESTANTS,
    CONVERSATIONS,
    DEVICE_BLOCKS,
    PROMPT,
    QUESTION,
    figures,
    measure,
)


def main() -> None:
    parser = argparse.ArgumentParser(prog="bench.serving", description=__doc__)
    parser.add_argument("--rounds", type=int, default=6, help="default: %(default)s")
    parser.add_argument("--save", metavar="NAME", help="write bench/results/NAME.json")
    options = parser.parse_args()
    about = provenance()
    about["packages"]["vllm"] = version("vllm")
    settings = {
        "model": "SmolLM2-135M-Instruct, float32",
        "conversations a round": CONVERSATIONS,
        "tokens of a first prompt": PROMPT,
        "tokens of an answer": ANSWER,
        "tokens of a question": QUESTION,
        "tokens of a block": BLOCK,
        "blocks of the device": DEVICE_BLOCKS,
        "requests at once": 1,
    }
    taken = []
    for number, one in enumerate(measure(options.rounds), 1):
        taken.append(one)
        for name in CONTESTANTS:
            first, second = one[name]
            print(
                f"round {number}: {name}: first token after {first.first_token:.3f} s, second turn "
                f"{second.first_token:.3f} s; {first.tokens_per_second:.0f}, {second.tokens_per_second:.0f} tokens/s; "
                f"{second.found} tokens found",
                flush=True,
            )
    found = figures(taken)
    for pair, ratios in found["beside"].items():
        print(f"{pair}: " + "; ".join(f"{turn}: {values}" for turn, values in ratios.items()))
    rounds = [{name: [asdict(turn) for turn in turns] for name, turns in one.items()} for one in taken]
    if options.save:
        results = {"settings": settings, **found, "rounds": rounds}
        print(write_json(RESULTS / f"{options.save}.json", {"provenance": about, "results": results}))


if __name__ == "__main__":
    main()
