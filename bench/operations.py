"""Operations beside their rivals, and the ceilings of the machine: bandwidth of a copy, rates of a large product and of
a keystream."""

import dataclasses
import math
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

import scx_kernels as ops
from bench.contest import BOUND, RIVAL, TRITON, Case, Contestant, Inputs, Operation, copied, key_of
from bench.marks import is_marked
from bench.operation_cases import OPERATIONS, cases
from bench.rounds import Job
from bench.timing import Times, attempt, peak_memory, rotating, spread_twice, time_calls
from bench.trees import tree_leaves

FLOOR = {torch.float32: 2.0**-22, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8, torch.float64: 0.0}
"""One rounding, relative to the largest element: allowed also where plain PyTorch happens to be exact; but not where
bits are compared, which stand in float64."""

MOST_INPUTS = 16
CPU_CACHE = 32 << 20


@contextmanager
def poisoned() -> Iterator[None]:
    """Fresh memory is filled with NaN, so that an element nobody writes is seen."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # only the filling is wanted, not the advice
            yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def tensors_of(result: Any) -> tuple[Tensor, ...]:
    return (result,) if isinstance(result, Tensor) else tuple(result)


def disagreement(got: Any, plain: Any, exact: Any, rounding: float = 0.0) -> str | None:
    """None if every element's error is at most twice that of plain PyTorch in the same dtype plus one rounding of the
    result, or the larger one that is given."""
    for result, usual, right in zip(*map(tensors_of, (got, plain, exact)), strict=True):
        if result.shape != right.shape:
            return f"failed: shape {tuple(result.shape)}, expected {tuple(right.shape)}"
        if result.isnan().any():
            return "failed: an element was not written"
        allowed = 2 * (usual.double() - right).abs().max() + max(rounding, FLOOR[result.dtype]) * right.abs().max()
        error = (result.double() - right).abs().max()
        if not error <= allowed:
            return f"failed: error {error:.3g}, allowed {allowed:.3g}"
    return None


@torch.no_grad()
def check(operation: Operation, contestants: Iterable[Contestant], inputs: Inputs) -> dict[str, str | None]:
    """What is wrong with each contestant's result, None for nothing. Limits compute something else: they only run."""
    exact = operation.exact(inputs)
    # Where a call writes into its inputs, nobody may find there what another one wrote.
    own = copied if operation.writes else lambda inputs: inputs
    plain = operation.select(inputs, operation.plain(own(inputs)))
    found: dict[str, str | None] = {}
    for contestant in contestants:
        with poisoned(), contestant.within():
            result, problem = attempt(lambda contestant=contestant: contestant.call(own(inputs)))
        if problem is None and contestant.kind != BOUND:
            result = operation.select(inputs, contestant.finish(inputs, result))
            problem = disagreement(result, plain, exact, operation.rounding(inputs))
        elif problem is not None and contestant.kind == RIVAL and problem.startswith("raised"):
            problem = f"not available: {problem}"
        found[contestant.name] = problem
        del result
    return found


def enough_inputs(operation: Operation, case: Case, device: torch.device, first: Inputs) -> list[Inputs]:
    """As many inputs as together exceed the last cache twice: a repeated one would be read from there."""
    cache = torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else CPU_CACHE
    size = sum(x.nbytes for x in tree_leaves(vars(first)) if isinstance(x, Tensor))
    count = min(MOST_INPUTS, max(1, math.ceil(2 * cache / size)))
    return [first, *(operation.make(case, device) for _ in range(count - 1))]


@torch.no_grad()
def measure(case: Case, device: torch.device, milliseconds: float) -> dict[str, Any]:
    """The entry of a case: every contestant that agrees with the reference, timed twice in turns."""
    operation = OPERATIONS[case.operation]
    entry = {
        "suite": "operations",
        **dataclasses.asdict(case),
        "bytes": operation.bytes(case),
        "copied_bytes": operation.copied_bytes(case),
        "keystream_bytes": operation.keystream(case),
        "flops": operation.flops(case),
    }
    contestants = [c for c in operation.contestants(case) if c.kind != TRITON or device.type == "cuda"]
    torch.manual_seed(0)

    def prepare() -> tuple[list[Inputs], dict[str, str | None]]:
        first = operation.make(case, device)
        problems = check(operation, contestants, first)
        return enough_inputs(operation, case, device, first), problems

    prepared, problem = attempt(prepare)
    if problem is not None:
        return {**entry, "status": problem, "contestants": []}
    inputs, problems = prepared
    entry["contestants"] = _time_all(contestants, problems, inputs, device, milliseconds)
    return entry


def _time_all(
    contestants: Iterable[Contestant],
    problems: dict[str, str | None],
    inputs: list[Inputs],
    device: torch.device,
    milliseconds: float,
) -> list[dict[str, Any]]:
    """Each contestant's times, in two rounds, and its memory; or why it has none."""
    memory: dict[str, int] = {}
    series: dict[str, list[Times]] = {}
    for _ in range(2):
        for contestant in contestants:
            name, call = contestant.name, contestant.call
            if problems[name] is not None:
                continue
            with contestant.within():
                if name not in memory:
                    turn = rotating(call, inputs)
                    memory[name], problems[name] = attempt(lambda turn=turn: peak_memory(turn, device))
                times, problem = attempt(lambda call=call: time_calls(call, inputs, device, milliseconds))
            problems[name] = problems[name] or problem
            series.setdefault(name, []).append(times)
    entries = []
    for contestant in contestants:
        entry = {"name": contestant.name, "kind": contestant.kind}
        if problems[contestant.name] is not None:
            entries.append({**entry, "status": problems[contestant.name]})
        else:
            memory_bytes = memory[contestant.name]
            entries.append({**entry, **_figures(*series[contestant.name]), "memory_bytes": memory_bytes})
    return entries


def _figures(first: Times, second: Times) -> dict[str, Any]:
    """What an entry says of a contestant's two series."""
    found = {"ms": spread_twice(first.ms, second.ms), "timed_by": second.timed_by}
    if first.host_us is not None and second.host_us is not None:
        found["host_us"] = spread_twice(first.host_us, second.host_us)
    return found


def measure_ceilings(device: torch.device, dtypes: Iterable[str], rounds: Iterable[int] = ()) -> dict[str, Any]:
    """GB/s of a large copy (read and written), TFLOP/s of a large product of random numbers in each dtype, and GB/s of
    keystream, made and written, by as many rounds (as text: the result is JSON)."""
    found: dict[str, Any] = {"copy_gb_s": _copy_rate(device), "product_tflop_s": {}}
    found["keystream_gb_s"] = {str(count): _keystream_rate(device, count) for count in rounds}
    size = 8192 if device.type == "cuda" else 1024
    for dtype in dtypes:
        a, b = (torch.randn(size, size, device=device, dtype=getattr(torch, dtype)) for _ in range(2))
        times = time_calls(lambda b, a=a: a @ b, [b], device, 100)
        found["product_tflop_s"][dtype] = _rate(2 * size**3 / 1e12, times)
    return found


def _copy_rate(device: torch.device) -> float:
    """The best of several sizes: what is far from one size's rate is no ceiling."""
    sizes = (1 << 28, 1 << 29, 1 << 30) if device.type == "cuda" else (1 << 27,)
    return max(_copied(size, device) for size in sizes)


def _copied(size: int, device: torch.device) -> float:
    source = torch.randint(256, (size,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return _rate(2 * size / 1e9, time_calls(target.copy_, [source], device, 100))


def _keystream_rate(device: torch.device, rounds: int) -> float:
    """Of keystream that stays in registers but for a word of each block; on a CPU of `random_bits`, which writes it."""
    streams, key = torch.arange(192, device=device).view(64, 3), key_of(device)
    if device.type == "cuda":
        from bench.keystream import fold  # where Triton is missing there is no keystream to measure  # noqa: PLC0415

        blocks = 1 << 24
        return _rate(64 * blocks / 1e9, time_calls(lambda key: fold(key, blocks, rounds), [key], device, 100))
    count = 1 << 14

    def draw(streams: Tensor) -> Tensor:
        return ops.random_bits(key, streams, count, rounds=rounds)

    return _rate(4 * len(streams) * count / 1e9, time_calls(draw, [streams], device, 100))


def _rate(amount: float, times: Times) -> float:
    return amount / (torch.tensor(times.ms).median().item() / 1e3)


def jobs(device: torch.device, everything: bool) -> Iterator[Job]:
    """Every case of the machine; what the short table shows comes first."""

    def once(case: Case) -> Iterator[dict[str, Any]]:
        yield measure(case, device, 20)

    for case in sorted(cases(device.type == "cuda"), key=lambda case: not case.headline):
        yield Job(case.id, partial(once, case), is_marked(case), seconds=0.4)
