"""`python -m tests.fuzzing --seconds 60`: every reader under hostile bytes until the time is up.

Guided by coverage where `atheris` is installed, else at random. The first fault ends it, with the bytes that repeat it.
"""

import argparse
import itertools
import os
import random
import sys
import tempfile
import time
import traceback
from collections import Counter
from contextlib import ExitStack
from pathlib import Path
from typing import NoReturn

from hypothesis import HealthCheck, Phase, given, settings

try:
    import atheris
except ImportError:
    atheris = None

if atheris is None:
    from tests.fuzzing.targets import CASES, check
else:
    with atheris.instrument_imports(include=["scx.files", "scx.party.messages", "scx.vllm", "json"]):
        from tests.fuzzing.targets import CASES, check

COUNTS: Counter[tuple[str, str]] = Counter()
LEFT = ExitStack()
"""What has to be put away at the end, which comes within libFuzzer's own loop."""


@settings(database=None, deadline=None, suppress_health_check=list(HealthCheck), phases=[Phase.generate])
@given(CASES)
def readers(case: tuple[str, bytes]) -> None:
    name, data = case
    COUNTS[name, check(name, data)] += 1


def one(choices: bytes, seconds: float, began: float) -> None:
    """One example, drawn as these bytes say; the process ends with it if it fails or the time is up."""
    try:
        readers.hypothesis.fuzz_one_input(choices)
    except BaseException:
        traceback.print_exc()
        end(1, f"repeat it with: python -m tests.fuzzing --repeat {choices.hex()}")
    if time.monotonic() - began > seconds:
        end(0, "no fault")


def end(status: int, words: str) -> NoReturn:
    for (name, outcome), count in sorted(COUNTS.items()):
        print(f"{name}: {count} {outcome}")
    print(f"{COUNTS.total()} examples; {words}", flush=True)
    LEFT.close()
    os._exit(status)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzzing", description=__doc__)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=None, help="default: another one every time")
    parser.add_argument("--repeat", default=None, metavar="HEX", help="the bytes of a fault, and nothing else")
    options = parser.parse_args()
    if options.repeat is not None:
        one(bytes.fromhex(options.repeat), 0, 0)
    seed = random.SystemRandom().randrange(1, 2**31) if options.seed is None else options.seed
    print(f"{'guided by coverage' if atheris else 'at random (atheris is not installed)'}, seed {seed}", flush=True)
    drawn, began = random.Random(seed), time.monotonic()  # noqa: S311
    choices = (drawn.randbytes(drawn.randrange(1, 2048)) for _ in itertools.count())
    if atheris is None:
        for first in choices:
            one(first, options.seconds, began)
    corpus = Path(LEFT.enter_context(tempfile.TemporaryDirectory()))
    for first in itertools.islice(choices, 200):
        (corpus / first[:8].hex()).write_bytes(first)
    limits = ["-max_len=4096", "-len_control=0", "-rss_limit_mb=4096", "-verbosity=0"]
    atheris.Setup([sys.argv[0], f"-seed={seed}", *limits, str(corpus)], lambda x: one(x, options.seconds, began))
    atheris.Fuzz()


if __name__ == "__main__":
    main()
