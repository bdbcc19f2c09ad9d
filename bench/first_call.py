"""What the first request of a process costs: imports, and compilation, with Triton's cache, without it, and ahead."""

import functools
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from bench.rounds import Job
from bench.timing import attempt, spread_twice

Figures = dict[str, float]
COLD, KEPT, WARMED = "SCX, cold", "SCX, Triton's cache kept", "SCX, warmed up"
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
        for name in (COLD, KEPT) if on_cuda else ("SCX",):
            found[name] = [_probe("scx", cache) for cache in (first, second)]
        return {**found, WARMED: [_probe("warmed", third)]}


def entries(found: dict[str, list[Figures]]) -> dict[str, list[dict[str, Any]]]:
    """Contestants of each of CASES."""

    def contestant(name: str, kind: str, figure: str, who: str) -> dict[str, Any]:
        first, *second = found[who]
        return {"name": name, "kind": kind, "ms": spread_twice([first[figure]], [other[figure] for other in second])}

    def requests(figure: str) -> list[dict[str, Any]]:
        return [contestant(who, "rival" if who == "plain" else "scx", figure, who) for who in found]

    imports = [
        contestant("torch and transformers", "rival", "libraries", "plain"),
        contestant("scx on top of them", "scx", "package", "plain"),
    ]
    warm_up = [contestant(WARMED, "scx", "warm-up", WARMED)]
    return dict(zip(CASES, (imports, warm_up, requests("first"), requests("second")), strict=True))


def jobs(device: torch.device, everything: bool) -> Iterator[Job]:
    """The cases of this suite, from one set of processes, which the first of them starts."""
    found = functools.cache(lambda: attempt(lambda: entries(measure(device.type == "cuda"))))

    def once(name: str) -> Iterator[dict[str, Any]]:
        contestants, problem = found()
        status = {"status": problem} if problem else {}
        yield {"suite": "first call", **status, "contestants": contestants[name] if contestants else []}

    def seconds() -> float:
        return 0.0 if found.cache_info().currsize else 40.0

    for name in CASES:
        yield Job(f"first call/{name}", functools.partial(once, name), seconds=seconds)
