"""Rehearse the CUDA path on this machine, whatever it is.

`python -m bench.rehearsal [--quick] [--only WORDS] [--jobs N]` serves every request of every setting on a stand-in
device, compares what comes out with the plain model and what is asked for with the warm-up, and compiles every launch
for sm_80, sm_90 and sm_100. One line a group, one a failure, what a step costs the host, and at the end one of all; it
exits with 1 on any failure.
`--quick`: fewer settings, every kind of request, and of every kernel each combination of branches, for sm_90.
"""

import argparse
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from bench.host import STEPS, measure_steps
from bench.rehearsal.compilation import compile_all, representative
from bench.rehearsal.pages import PAGES
from bench.rehearsal.rehearsal import ALL_TARGETS, Failure, Rehearsal
from bench.rehearsal.requests import EXTRA_REQUESTS, REQUESTS, SHAPE_REQUESTS, SPLIT_REQUESTS, Pair
from bench.rehearsal.settings import REAL, SPLIT, Setting, covering

Requests = dict[str, Callable[[Pair], None]]
_README = {"vocab_size": 1000, "hidden_size": 4096, "num_attention_heads": 32, "num_key_value_heads": 32}
_QUICK_SETTINGS = 6  # of the covering ones, in which every value of every setting is met
_QUICK_WARM_UP = 1  # the one of them that is held against the warm-up: sealed, redundant rows, noise


@dataclass(frozen=True)
class Part:
    """A setting, what is asked of it, and how it is served (`Rehearsal.serve`)."""

    setting: Setting
    requests: Requests
    has_values: bool = True
    may_wait: bool = False
    warms_up: bool = True

    def named(self, words: list[str]) -> "Part":
        """Of its requests those in whose names all of these words are."""
        return replace(
            self,
            requests={
                name: request
                for name, request in self.requests.items()
                if all(word in f"{self.setting.name}, {name}" for word in words)
            },
        )


def groups(quick: bool) -> dict[str, list[Part]]:
    """What is rehearsed, by the name of its group."""
    settings = covering()
    small = [Part(setting, REQUESTS) for setting in settings]
    places = [replace(settings[place], layers=3) for place in (1, 3, 5)]
    other = [Part(setting, EXTRA_REQUESTS, may_wait=True, warms_up=False) for setting in places]
    documented = Setting(
        "llama", 128, "fp16", 0, False, "permuted", layers=3, sizes=tuple(_README.items()), title="README"
    )
    split_cache = {"split cache": EXTRA_REQUESTS["split cache"]}
    other.append(Part(documented, split_cache, has_values=False, may_wait=True, warms_up=False))
    other.append(Part(Setting("llama", 64, "fp32", 1, False, "sealed12", attention="eager"), REQUESTS))
    split = [Part(setting, SPLIT_REQUESTS) for setting in SPLIT]
    real = [Part(setting, SHAPE_REQUESTS, has_values=False) for setting in REAL]
    if quick:
        small = [replace(part, warms_up=place == _QUICK_WARM_UP) for place, part in enumerate(small[:_QUICK_SETTINGS])]
        other, split = other[1:4], [replace(part, warms_up=False) for part in split[:3]]
        real = [replace(real[3].named(["prefill of 150"]), warms_up=False)]
    return {"small models": small, "placements of a cache": other, "two parties": split, "real shapes": real}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.rehearsal", description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer settings, one target, a kernel's branches once")
    parser.add_argument(
        "--only", default="", help="requests in whose names all of these words are, as in 'qwen3 beams'"
    )
    parser.add_argument("--jobs", type=int, help="processes that compile; default: 2, quick: this one")
    options = parser.parse_args(arguments)
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("TRITON_INTERPRET=1 is set: kernels would be interpreted; nothing could be compiled")
    torch.set_num_threads(1)  # small models; threads would only wait for one another
    words = options.only.split()
    rehearsal = Rehearsal(ALL_TARGETS[1:2] if options.quick else ALL_TARGETS)
    for name, parts in groups(options.quick).items():
        begin, before, requests = time.perf_counter(), len(rehearsal.failures), rehearsal.requests
        chosen = [part for part in (part.named(words) for part in parts) if part.requests]
        for part in chosen:
            served = replace(part, warms_up=part.warms_up and not words)
            rehearsal.serve(**vars(served))
        new = rehearsal.failures[before:]
        seconds = time.perf_counter() - begin
        done = rehearsal.requests - requests
        print(f"{name}: {len(chosen)} settings, {done} requests, {len(new)} failures, {seconds:.0f} s", flush=True)
        print("".join(f"  {failure}\n" for failure in new), end="", flush=True)
    before, pages = len(rehearsal.failures), {n: run for n, run in PAGES.items() if all(word in n for word in words)}
    rehearsal.compute(pages)
    new = rehearsal.failures[before:]
    print(f"sealed pages: {len(pages)} requests, {len(new)} failures", flush=True)
    print("".join(f"  {failure}\n" for failure in new), end="", flush=True)
    compilations = _compile(rehearsal, options.quick, options.jobs or (1 if options.quick else 2))
    if not options.quick and not words:
        _tell_host_times()
    print(
        f"{rehearsal.requests} requests, {rehearsal.launches} launches, {len(rehearsal.variants)} variants, "
        f"{compilations} compilations, {len(rehearsal.failures)} failures"
    )
    return 1 if rehearsal.failures or not rehearsal.requests else 0


def _tell_host_times() -> None:
    """What a step would cost the host, beside plain transformers (`bench.host`)."""
    for case in STEPS:
        contestants = measure_steps(case, torch.device("cpu"))["contestants"]
        told = (f"{c['name']} {c['ms']['median']:.1f} ms ({c['ratio']['median']:.2f})" for c in contestants)
        print(f"host time, {case}: {', '.join(told)}", flush=True)


def _compile(rehearsal: Rehearsal, quick: bool, jobs: int) -> int:
    """Compile what was recorded; what does not compile is one more failure. Returns how many were compiled."""
    count = 0
    for target in rehearsal.targets:
        begin = time.perf_counter()
        variants = [variant for variant in rehearsal.variants if variant.target == target]
        wanted = representative(variants) if quick else variants
        failures = [
            Failure(rehearsal.variants[variant], f"sm_{target.arch}: {problem} ({variant.describe()})")
            for variant, problem in compile_all(wanted, jobs)
            if problem
        ]
        rehearsal.failures += failures
        count += len(wanted)
        seconds = time.perf_counter() - begin
        print(f"sm_{target.arch}: {len(wanted)} compilations, {len(failures)} failures, {seconds:.0f} s", flush=True)
        print("".join(f"  {failure}\n" for failure in failures), end="", flush=True)
    return count


if __name__ == "__main__":
    sys.exit(main())
