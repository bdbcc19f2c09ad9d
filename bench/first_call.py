"""What the first request of a process costs: imports, and compilation, with Triton's cache, without it, and ahead."""

import functools
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.run import Run, attempt
from bench.timing import spread_twice

__all__ = ["run_first_call"]

Figures = dict[str, float]
WARMED = "SCX, warmed up"
CASES = ("imports", "warm-up", "first request", "second request")


def _probe(who: str, triton_cache: Path) -> Figures:
    """Milliseconds of a fresh process's imports and requests; `who` is "plain", "scx" or "warmed"."""
    done = subprocess.run(
        (sys.executable, "-m", "bench.probe", who),
        capture_output=True,
        text=True,
        env={**os.environ, "TRITON_CACHE_DIR": str(triton_cache)},
        cwd=Path(__file__).parents[1],
        timeout=300,
    )
    if done.returncode:
        raise RuntimeError((done.stderr.strip().splitlines() or ["the process said nothing"])[-1])
    return json.loads(done.stdout.splitlines()[-1])


def measure(on_cuda: bool) -> dict[str, list[Figures]]:
    """Two processes of each variant, one of the warmed one: it compiles what all lengths need. All compile anew, but
    those that find a cache; without CUDA nothing is compiled."""
    with tempfile.TemporaryDirectory() as directory:
        first, second, third = (Path(directory) / name for name in ("first", "second", "third"))
        found = {"plain": [_probe("plain", cache) for cache in (first, second)]}
        found["SCX, cold" if on_cuda else "SCX"] = [_probe("scx", cache) for cache in (first, second)]
        if on_cuda:
            found["SCX, Triton's cache kept"] = [_probe("scx", cache) for cache in (first, second)]
        return {**found, WARMED: [_probe("warmed", third)]}


def entries(found: dict[str, Sequence[Figures]]) -> dict[str, list[dict[str, Any]]]:
    """Contestants of each of CASES."""

    def contestant(name: str, kind: str, figure: str, who: str) -> dict[str, Any]:
        first, *second = found[who]
        ms = spread_twice([first[figure]], [figures[figure] for figures in second])
        return {"name": name, "kind": kind, "ms": ms}

    def requests(figure: str) -> list[dict[str, Any]]:
        return [contestant(who, "rival" if who == "plain" else "scx", figure, who) for who in found]

    imports = [
        contestant("torch and transformers", "rival", "libraries", "plain"),
        contestant("scx on top of them", "scx", "package", "plain"),
    ]
    warm_up = [contestant(WARMED, "scx", "warm-up", WARMED)]
    return dict(zip(CASES, (imports, warm_up, requests("first"), requests("second")), strict=True))


def run_first_call(run: Run, on_cuda: bool, share: float = 1.0) -> None:
    """The cases of this suite, from one set of processes."""
    found = functools.cache(lambda: attempt(lambda: entries(measure(on_cuda))))

    def entry(name: str) -> dict[str, Any]:
        contestants, problem = found()
        status = {"status": problem} if problem else {}
        return {"suite": "first call", **status, "contestants": contestants[name] if contestants else []}

    for name in CASES:
        run.measure(f"first call/{name}", functools.partial(entry, name), share)
