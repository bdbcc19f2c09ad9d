"""How well the untrusted side continues a text alone: perplexity of SmolLM2 on caches that it cannot decode.

It has the weights and, after key sharing, the plain K and V of the middle blocks; of the first and last blocks it has
what SCX stores. It tries to go on with these as they are, with zeros, without them, or with the nearest middle block's.
Two ways to go on, both with the right tokens given: "continued", it computes the entries of the tokens after the
context itself, which lie plain beside the context's; "next token", of every token but the present one it has what SCX
stores, as at any moment of a generation.
"""

import argparse
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from bench.provenance import save
from scx.audit.continuing import REDUNDANT, Held, attempts, perplexity, protected
from scx.commands.audit.subject import encoded_and_plain
from scx.commands.smollm2 import smollm2_path
from scx.commands.texts import windows

CONTEXT, WINDOWS = 256, 8
PAPER = {"normal": 1.33, "zeros": 57_396.0, "encoded": 73_566.0, "nearest block's": 19_108.0}
"""The paper's table: Llama-2-7B, WikiText-2."""


def measure(model: PreTrainedModel, ids: Tensor, context: int) -> dict[str, Any]:
    """Perplexities of ids (B, context + N + 1) by way of going on, locked blocks and what stands in them."""
    encoded, plain = encoded_and_plain(model, ids[:, :-1])
    count = len(plain)
    locked = {
        "first and last block": protected(count, 1),
        "first two and last two": protected(count, 2),
        "all blocks": set(range(count)),
    }
    found: dict[str, Any] = {}
    for way, alone in (("continued", False), ("next token", True)):

        def going_on(blocks: Iterable[Held], alone: bool = alone) -> float:
            return perplexity(model, list(blocks), ids, context, alone=alone)

        both = [[x if alone else x.before(context) for x in blocks] for blocks in (encoded, plain)]
        found[way] = {"normal": going_on(both[1])}
        print(f"{way}: normal cache {found[way]['normal']:.2f}", flush=True)
        for name, indices in locked.items():
            found[way][name] = {}
            for what, blocks in attempts(*both, indices):
                found[way][name][what] = value = going_on(blocks)
                print(f"{way}, {name}, {what}: {value:,.2f}", flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.statelessness", description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=128, help="tokens after the context (default: %(default)s)")
    parser.add_argument("--save", metavar="NAME", help="write bench/results/NAME.json")
    options = parser.parse_args()
    path = smollm2_path()
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    ids = windows(AutoTokenizer.from_pretrained(path), WINDOWS, CONTEXT + options.tokens + 1)
    results = {
        "model": "SmolLM2-135M-Instruct, float32",
        "text": "beginnings of the longest chapters of pydoc_data.topics",
        "windows": WINDOWS,
        "context": CONTEXT,
        "tokens": options.tokens,
        "redundant": REDUNDANT,
        "perplexity": measure(model, ids, CONTEXT),
        "the_papers": PAPER,
    }
    if options.save:
        print(f"written to {save(options.save, results)}")


if __name__ == "__main__":
    main()
