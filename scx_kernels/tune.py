"""`python -m scx_kernels.tune`: measure tiles on this machine's GPU and write its tile file.

For every shape, the candidates around the heuristic's tile are compiled, held against the reference and timed; the
fastest correct one becomes an entry where it beats the heuristic by more than the noise. Launchers read the file at
their first call, from the folder that SCX_TILES names or from the package.

Compiling takes most of the time, so other processes do it ahead, each a share of a shape's candidates, while shapes
that are compiled are timed. `--log` keeps every candidate's time, not only the fastest.
"""

import argparse
import json
import math
import multiprocessing
import os
import statistics
import sys
import time as clock
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from itertools import product as combinations
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from scx_kernels import reference, tiles
from scx_kernels.kernels import attention, product, qkv, rows, sealing
from scx_kernels.kernels.launch import Target, target_of
from scx_kernels.sealing import Sealing, WriteCounter
from scx_kernels.timing import device_times

__all__ = ["SUBJECTS", "Subject", "Timed", "candidates", "main", "tune"]

DTYPE = torch.bfloat16
# A candidate must be this much faster than the heuristic: less is within the noise of a measurement.
WORTH = 0.97
MILLISECONDS = 15.0
MOST_INPUTS = 16
ROUNDS = 20
"""Of sealed caches that are tuned: launchers choose one tile for all rounds."""
STEPS = (1024, 8192, 32_768, 65_536)
"""Keys of the caches that steps are tuned on."""
NO_CODE = (
    triton.runtime.errors.OutOfResources,
    triton.runtime.errors.PTXASError,
    triton.compiler.errors.CompilationError,
)
"""What a tile raises that this device has no room for, or of which the compiler makes nothing: it is no candidate."""
Arguments = dict[str, Any]
Result = Tensor | tuple[Tensor, ...]


class Model(NamedTuple):
    """The sizes of a model that launchers choose tiles by."""

    hidden: int
    heads: int
    kv_heads: int
    head_dim: int


# Llama-3-8B, Llama-2-7B, SmolLM2-135M
MODELS = (Model(4096, 32, 8, 128), Model(4096, 32, 32, 128), Model(576, 9, 3, 64))


def _stores_nothing(_arguments: Arguments, _result: Result) -> bool:
    """`Subject.is_stored` of launchers that write into nothing they are given."""
    return True


@dataclass(frozen=True)
class Subject:
    """One launcher at one shape.

    `make(device)` gives its arguments, `run(arguments, tile)` calls it, `expected(arguments)` is the reference;
    `heuristic(target)` the tile it would take by itself, `vary` what else is tried, by meta-parameter;
    `is_stored(arguments, result)` whether what it wrote into its arguments goes with its result.
    """

    operation: str
    sizes: dict[str, int]
    make: Callable[[torch.device], Arguments]
    run: Callable[[Arguments, Arguments | None], Result]
    expected: Callable[[Arguments], Result]
    heuristic: Callable[[Target], Arguments]
    vary: dict[str, tuple[int, ...]]
    variant: str = ""
    rounds: int = 0
    is_stored: Callable[[Arguments, Result], bool] = _stores_nothing

    @property
    def name(self) -> str:
        sizes = [f"{name}={size}" for name, size in self.sizes.items()]
        rounds = [f"rounds={self.rounds}"] if self.rounds else []
        return " ".join([self.operation, *([self.variant] if self.variant else []), *sizes, *rounds])


class Timed(NamedTuple):
    """A candidate: milliseconds of a call, or why it is none."""

    tile: Arguments
    milliseconds: float | None
    problem: str = ""


def _randn(device: torch.device, *shape: int) -> Tensor:
    return torch.randn(*shape, device=device, dtype=DTYPE)


def _permutations(device: torch.device, *shape: int) -> Tensor:
    return torch.rand(*shape, device=device).argsort(-1)


def _sealing(device: torch.device, batch: int, tokens: int, rounds: int) -> Sealing:
    key = torch.randint(-(2**31), 2**31, (8,), device=device).int()
    return Sealing(key, WriteCounter().take(batch, tokens, device), 0, rounds)


def _product(model: Model, count: int) -> Subject:
    columns = (model.heads + 2 * model.kv_heads) * model.head_dim

    def make(device: torch.device) -> Arguments:
        x, weight = _randn(device, 1, count, model.hidden), _randn(device, columns, model.hidden)
        return {"x": x, "weight": weight, "row_index": _permutations(device, 1, count)}

    vary = {"BLOCK_N": (32, 64, 128, 256), "BLOCK_K": (32, 64, 128), "num_warps": (4, 8), "num_stages": (2, 3, 4, 5)}
    return Subject(
        operation="permuted_linear",
        sizes={"rows": count, "columns": columns, "inner": model.hidden},
        make=make,
        run=lambda arguments, tile: product.permuted_linear(**arguments, tile=tile),
        expected=lambda arguments: reference.permuted_linear(**arguments),
        heuristic=lambda target: product.matmul_tile(count, columns, model.hidden, DTYPE, False, True, target),
        vary=vary | ({"SPLIT_K": (1, 2, 4, 8)} if count <= 64 else {"BLOCK_M": (64, 128)}),
    )


def _injection(model: Model, count: int, norm: bool) -> Subject:
    def make(device: torch.device) -> Arguments:
        x = _randn(device, 1, count, model.hidden)
        weight = _randn(device, model.hidden) if norm else None
        return {"x": x, "row_index": _permutations(device, 1, count), "norm_weight": weight}

    return Subject(
        operation="inject_permute",
        variant="norm" if norm else "",
        sizes={"rows": count, "features": model.hidden},
        make=make,
        run=lambda arguments, tile: rows.inject_permute(**arguments, tile=tile),
        expected=lambda arguments: reference.inject_permute(**arguments),
        heuristic=lambda target: rows.inject_tile(model.hidden, DTYPE, norm, False, target),
        vary={"BLOCK_M": (1, 2, 4, 8), "num_warps": (1, 2, 4, 8, 16)},
    )


def _heads(model: Model, count: int) -> Subject:
    """Features of heads put in order and rows permuted, as attention's output is."""
    heads, size = model.heads, model.head_dim

    def make(device: torch.device) -> Arguments:
        return {
            "x": _randn(device, 1, count, heads * size),
            "row_index": _permutations(device, 1, count),
            "feature_index": _permutations(device, 1, heads, size),
        }

    return Subject(
        operation="inject_permute",
        variant="heads",
        sizes={"rows": count, "features": size},
        make=make,
        run=lambda arguments, tile: rows.inject_permute(**arguments, tile=tile),
        expected=lambda arguments: reference.inject_permute(**arguments),
        heuristic=lambda target: rows.inject_tile(size, DTYPE, False, False, target),
        vary={"BLOCK_M": (4, 8, 16, 32, 64), "num_warps": (1, 2, 4, 8)},
    )


def _transcoding(model: Model, count: int, rounds: int = 0) -> Subject:
    """With `rounds`, into an empty sealed cache."""
    heads, size = (model.heads, model.kv_heads, model.kv_heads), model.head_dim

    def make(device: torch.device) -> Arguments:
        angle = torch.rand(1, count, size // 2, device=device).repeat(1, 1, 2)
        products = {f"z_{role}": _randn(device, 1, count, n * size) for role, n in zip("qkv", heads, strict=True)}
        names = ("query", "key", "value")
        indices = {name: _permutations(device, 1, n, size) for name, n in zip(names, heads, strict=True)}
        tables = {"cos": angle.cos().to(DTYPE), "sin": angle.sin().to(DTYPE)}
        made: Arguments = {**products, "position": _permutations(device, 1, count), **tables, **indices}
        if rounds:
            made |= {name: _randn(device, 1, model.kv_heads, count, size) for name in ("keys", "values")}
            made |= {"sealing": _sealing(device, 1, count, rounds), "return_unsealed": True}
        return made

    def expected(arguments: Arguments) -> Result:
        into = ("keys", "values", "sealing", "return_unsealed")
        return reference.qkv_decode_encode(**{name: x for name, x in arguments.items() if name not in into})

    return Subject(
        operation="qkv_decode_encode",
        variant="sealed" if rounds else "",
        sizes={"tokens": count, "heads": sum(heads), "head_dim": size},
        make=make,
        run=lambda arguments, tile: qkv.qkv_decode_encode(**arguments, tile=tile),
        expected=expected,
        heuristic=lambda target: qkv.qkv_tile(count, sum(heads), size, DTYPE, False, bool(rounds), target),
        # A keystream takes long to compile, and registers that a large tile would need.
        vary={"BLOCK_S": (8, 16, 32), "HEADS": (2, 4, 8), "STAGES": (1, 2), "num_warps": (2, 4, 8)}
        if rounds
        else {"BLOCK_S": (1, 4, 8, 16, 32), "HEADS": (1, 2, 4, 8), "STAGES": (1, 2, 3), "num_warps": (1, 2, 4, 8)},
        rounds=rounds,
        is_stored=_is_sealed if rounds else _stores_nothing,
    )


def _is_sealed(arguments: Arguments, result: Result) -> bool:
    """Whether the caches hold, sealed, the k and v that were returned beside q, to the bit."""
    own, caches = arguments["sealing"], (arguments["keys"], arguments["values"])
    return all(
        torch.equal(sealing.seal(cache, own, is_value=bool(i)).view(torch.int16), fresh.view(torch.int16))
        for i, (cache, fresh) in enumerate(zip(caches, _tensors(result)[1:], strict=True))
    )


def _prefill(model: Model, tokens: int) -> Subject:
    def make(device: torch.device) -> Arguments:
        heads, size = (model.heads, model.kv_heads, model.kv_heads), model.head_dim
        q, k, v = (_randn(device, 1, n, tokens, size) for n in heads)
        return {"q": q, "k": k, "v": v, "softmax_scale": size**-0.5, "is_causal": True}

    return Subject(
        operation="attention",
        sizes={"tokens": tokens, "keys": tokens, "head_dim": model.head_dim},
        make=make,
        run=lambda arguments, tile: attention.attention(**arguments, tile=tile),
        expected=lambda arguments: reference.attention(**arguments),
        heuristic=lambda target: attention.attention_tile(tokens, model.head_dim, DTYPE, False, False, target),
        vary={"BLOCK_M": (64, 128), "BLOCK_N": (32, 64, 128), "num_warps": (4, 8), "num_stages": (2, 3, 4)},
    )


def _step(model: Model, batch: int, keys: int, rounds: int = 0) -> Subject:
    group, size = model.heads // model.kv_heads, model.head_dim

    def make(device: torch.device) -> Arguments:
        q = _randn(device, batch, model.heads, 1, size)
        k, v = (_randn(device, batch, model.kv_heads, keys, size) for _ in range(2))
        made: Arguments = {"q": q, "k": k, "v": v, "softmax_scale": size**-0.5}
        if rounds:
            own = _sealing(device, batch, keys, rounds)
            made |= {name: sealing.seal(made[name], own, is_value=name == "v") for name in "kv"}
            made["sealing"] = own
        return made

    def expected(arguments: Arguments) -> Result:
        given = dict(arguments)
        own = given.pop("sealing", None)
        if own is not None:
            given |= {name: sealing.seal(given[name], own, is_value=name == "v") for name in "kv"}
        return reference.attention_step(**given)

    return Subject(
        operation="attention_step",
        variant="sealed" if rounds else "",
        sizes={"sequences": batch * model.kv_heads, "rows": group, "keys": keys, "head_dim": size},
        make=make,
        run=lambda arguments, tile: attention.attention_step(**arguments, tile=tile),
        expected=expected,
        heuristic=lambda target: attention.step_tile(
            batch, model.kv_heads, group, keys, size, DTYPE, False, bool(rounds), target
        ),
        vary={
            "BLOCK_N": (32, 64, 128),
            "num_warps": (2, 4, 8),
            "num_stages": (1, 2, 3, 4),
            "splits": (16, 33, 49, 66, 99),
        },
        rounds=rounds,
    )


SUBJECTS: tuple[Subject, ...] = (
    *(_product(model, count) for model in MODELS for count in (1, 16, 64, 256, 1024, 4224)),
    *(_injection(model, count, norm) for model in MODELS for count in (64, 1024, 4224) for norm in (False, True)),
    *(_heads(model, count) for model in MODELS for count in (64, 1024, 4224)),
    *(_transcoding(model, count) for model in MODELS for count in (1, 64, 1024, 4096)),
    *(_transcoding(model, count, ROUNDS) for model in MODELS for count in (64, 1024, 4096)),
    *(_prefill(model, tokens) for model in MODELS for tokens in (64, 1024, 4096)),
    *(_step(model, batch, keys) for model in MODELS for batch in (1, 8) for keys in STEPS),
    *(_step(model, 1, keys, ROUNDS) for model in MODELS for keys in STEPS),
)


def candidates(subject: Subject, target: Target) -> list[Arguments]:
    """The heuristic's tile first, then every one that differs from it in one or two meta-parameters."""
    start = subject.heuristic(target)
    found = [start]
    for first, second in combinations(subject.vary, repeat=2):
        for a, b in combinations(subject.vary[first], subject.vary[second]):
            tile = start | {first: a, second: b}
            if tile not in found:
                found.append(tile)
    return found


def _input_sets(subject: Subject, device: torch.device) -> list[Arguments]:
    """Inputs that together exceed the last cache twice: a repeated one would be read from there."""
    first = subject.make(device)
    if device.type != "cuda":
        return [first]
    size = sum(x.nbytes for x in first.values() if isinstance(x, Tensor))
    count = math.ceil(2 * torch.cuda.get_device_properties(device).L2_cache_size / size)
    return [first, *(subject.make(device) for _ in range(min(MOST_INPUTS, count) - 1))]


def _tensors(result: Result) -> tuple[Tensor, ...]:
    return (result,) if isinstance(result, Tensor) else tuple(result)


def _differs(got: Result, expected: Sequence[Tensor]) -> bool:
    """Whether an element is farther from the reference's than a few roundings of DTYPE, or no number."""
    return not all(
        bool(((x.float() - right).abs().max() <= 2.0**-6 * right.abs().max()).item())
        for x, right in zip(_tensors(got), expected, strict=True)
    )


def measure(
    subject: Subject, device: torch.device, target: Target, time: Callable[[Sequence[Callable[[], Any]]], float]
) -> list[Timed]:
    """Every candidate of a subject, the heuristic's first.

    Args:
        time: milliseconds of one of several calls, the same work on different inputs.

    Raises: RuntimeError if the heuristic's own tile does not give the reference's result.
    """
    inputs = _input_sets(subject, device)
    arguments = inputs[0]
    expected = [x.float() for x in _tensors(subject.expected(arguments))]
    found: list[Timed] = []
    for number, tile in enumerate(candidates(subject, target)):
        try:
            got = subject.run(arguments, tile)
        except NO_CODE as error:
            if number == 0:
                raise
            found.append(Timed(tile, None, type(error).__name__))
            continue
        if _differs(got, expected) or not subject.is_stored(arguments, got):
            if number == 0:
                raise RuntimeError(f"{subject.name}: the heuristic's tile {tile} gives a wrong result")
            found.append(Timed(tile, None, "wrong"))
            continue
        found.append(Timed(tile, time([partial(subject.run, given, tile) for given in inputs])))
    return found


def tune(
    subject: Subject, device: torch.device, target: Target, time: Callable[[Sequence[Callable[[], Any]]], float]
) -> dict[str, Any] | None:
    """The entry of a subject, or None where the heuristic's tile is as good as any. Arguments and errors as of
    `measure`."""
    return entry_of(subject, measure(subject, device, target, time))


def entry_of(subject: Subject, measured: Sequence[Timed]) -> dict[str, Any] | None:
    timed = [(one.milliseconds, one.tile) for one in measured if one.milliseconds is not None]
    (own, heuristic), (best, tile) = timed[0], min(timed, key=lambda pair: pair[0])
    if best > WORTH * own:
        return None
    return {
        "operation": subject.operation,
        "dtype": str(DTYPE).removeprefix("torch."),
        "variant": subject.variant,
        "sizes": subject.sizes,
        "tile": tile,
        "milliseconds": best,
        "heuristic": {"tile": heuristic, "milliseconds": own},
    }


def compile_share(number: int, device: torch.device, part: int, parts: int) -> None:
    """Run this part's candidates of a subject once: afterwards they lie in Triton's cache."""
    subject = SUBJECTS[number]
    arguments = subject.make(device)
    for tile in candidates(subject, target_of(device))[part::parts]:
        try:
            subject.run(arguments, tile)
        except NO_CODE:
            continue  # whoever times it says so


@contextmanager
def compiled_ahead(
    subjects: Iterable[Subject], device: torch.device, processes: int
) -> Iterator[dict[str, list[Future[None]]]]:
    """By subject what is to be waited for before it is timed. Subjects that nobody waits for any more are left out."""
    if processes < 2:
        yield {}
        return
    numbers = {subject.name: number for number, subject in enumerate(SUBJECTS)}
    pool = ProcessPoolExecutor(processes, multiprocessing.get_context("spawn"))
    try:
        yield {
            subject.name: [
                pool.submit(compile_share, numbers[subject.name], device, part, processes) for part in range(processes)
            ]
            for subject in subjects
        }
    finally:
        pool.shutdown(cancel_futures=True)


def _median_time(device: torch.device, calls: Sequence[Callable[[], Any]]) -> float:
    times, _ = device_times(calls, device, MILLISECONDS)
    return statistics.median(times)


def _provenance(target: Target) -> dict[str, Any]:
    return {
        "backend": target.backend,
        "arch": target.arch,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": " ".join(["python -m scx_kernels.tune", *sys.argv[1:]]),
    }


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m scx_kernels.tune", description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="parts of subjects' names, separated by commas, in this order")
    parser.add_argument("--write", type=Path, default=tiles.SHIPPED, help="folder of the file (default: the package)")
    parser.add_argument("--log", type=Path, help="file for every candidate's time, a line of JSON each subject")
    parser.add_argument("--seconds", type=float, default=math.inf, help="after which no subject is begun")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1, help="that compile ahead")
    options = parser.parse_args(arguments)
    asked = (subject for text in options.only.split(",") for subject in SUBJECTS if text in subject.name)
    chosen = list({subject.name: subject for subject in asked}.values())
    if not chosen:
        parser.error(f"--only {options.only!r} names none of: " + ", ".join(subject.name for subject in SUBJECTS))
    if not torch.cuda.is_available():
        print("No GPU here: tiles are measured on the device that uses them.", file=sys.stderr)
        return 1
    device = torch.device("cuda", torch.cuda.current_device())
    target, entries, until = target_of(device), [], clock.monotonic() + options.seconds
    with compiled_ahead(chosen, device, options.processes) as compiling:
        for number, subject in enumerate(chosen, 1):
            if clock.monotonic() > until:
                print(f"no time for {', '.join(left.name for left in chosen[number - 1 :])}", flush=True)
                break
            for share in compiling.get(subject.name, ()):
                share.result()
            measured = measure(subject, device, target, partial(_median_time, device))
            entry = entry_of(subject, measured)
            print(f"{number}/{len(chosen)} {subject.name}: {_told(entry)}", flush=True)
            if options.log is not None:
                with open(options.log, "a") as file:
                    file.write(json.dumps({"subject": subject.name, "timed": measured}) + "\n")
            entries += [entry] if entry else []
            # Written after every subject, so that an interrupted run keeps what it measured.
            tiles.TileFile(target.name, _provenance(target), tuple(entries)).write(options.write)
    print(f"written to {options.write / tiles.file_name(target.name)}")
    return 0


def _told(entry: dict[str, Any] | None) -> str:
    if entry is None:
        return "heuristic"
    return f"{entry['tile']} {entry['heuristic']['milliseconds'] / entry['milliseconds']:.2f} times as fast"


if __name__ == "__main__":
    sys.exit(main())
