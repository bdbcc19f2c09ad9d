"""`python -m scx_kernels.tune`: measure tiles on this machine's GPU and write its tile file.

For every shape, the candidates around the heuristic's tile are compiled, held against the reference and timed; the
fastest correct one becomes an entry where it beats the heuristic by more than the noise. Launchers read the file at
their first call, from the folder that SCX_TILES names or from the package.
"""

import argparse
import math
import statistics
import sys
from collections.abc import Callable, Sequence
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
from scx_kernels.kernels import attention, product, qkv, rows
from scx_kernels.kernels.launch import Target, target_of
from scx_kernels.timing import device_times

__all__ = ["SUBJECTS", "Subject", "candidates", "main", "tune"]

DTYPE = torch.bfloat16
# A candidate must be this much faster than the heuristic: less is within the noise of a measurement.
WORTH = 0.97
MILLISECONDS = 30.0
MOST_INPUTS = 16
Arguments = dict[str, Any]


class Model(NamedTuple):
    """The sizes of a model that launchers choose tiles by."""

    hidden: int
    heads: int
    kv_heads: int
    head_dim: int


# Llama-3-8B, Llama-2-7B, SmolLM2-135M
MODELS = (Model(4096, 32, 8, 128), Model(4096, 32, 32, 128), Model(576, 9, 3, 64))


@dataclass(frozen=True)
class Subject:
    """One launcher at one shape.

    `make(device)` gives its arguments, `run(arguments, tile)` calls it, `expected(arguments)` is the reference;
    `heuristic(target)` the tile it would take by itself, `vary` what else is tried, by meta-parameter.
    """

    operation: str
    sizes: dict[str, int]
    make: Callable[[torch.device], Arguments]
    run: Callable[[Arguments, Arguments | None], Tensor]
    expected: Callable[[Arguments], Tensor]
    heuristic: Callable[[Target], Arguments]
    vary: dict[str, tuple[int, ...]]
    variant: str = ""

    @property
    def name(self) -> str:
        sizes = [f"{name}={size}" for name, size in self.sizes.items()]
        return " ".join([self.operation, *([self.variant] if self.variant else []), *sizes])


def _randn(device: torch.device, *shape: int) -> Tensor:
    return torch.randn(*shape, device=device, dtype=DTYPE)


def _permutations(device: torch.device, *shape: int) -> Tensor:
    return torch.rand(*shape, device=device).argsort(-1)


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


def _transcoding(model: Model, count: int) -> Subject:
    heads, size = (model.heads, model.kv_heads, model.kv_heads), model.head_dim

    def make(device: torch.device) -> Arguments:
        angle = torch.rand(1, count, size // 2, device=device).repeat(1, 1, 2)
        products = {f"z_{role}": _randn(device, 1, count, n * size) for role, n in zip("qkv", heads, strict=True)}
        names = ("query", "key", "value")
        indices = {name: _permutations(device, 1, n, size) for name, n in zip(names, heads, strict=True)}
        tables = {"cos": angle.cos().to(DTYPE), "sin": angle.sin().to(DTYPE)}
        return {**products, "position": _permutations(device, 1, count), **tables, **indices}

    return Subject(
        operation="qkv_decode_encode",
        sizes={"tokens": count, "heads": sum(heads), "head_dim": size},
        make=make,
        run=lambda arguments, tile: qkv.qkv_decode_encode(**arguments, tile=tile)[0],
        expected=lambda arguments: reference.qkv_decode_encode(**arguments)[0],
        heuristic=lambda target: qkv.qkv_tile(count, sum(heads), size, DTYPE, False, target),
        vary={"BLOCK_S": (1, 4, 8, 16, 32), "HEADS": (1, 2, 4, 8), "num_warps": (1, 2, 4, 8)},
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


def _step(model: Model, batch: int, keys: int) -> Subject:
    group, size = model.heads // model.kv_heads, model.head_dim

    def make(device: torch.device) -> Arguments:
        q = _randn(device, batch, model.heads, 1, size)
        k, v = (_randn(device, batch, model.kv_heads, keys, size) for _ in range(2))
        return {"q": q, "k": k, "v": v, "softmax_scale": size**-0.5}

    return Subject(
        operation="attention_step",
        sizes={"sequences": batch * model.kv_heads, "rows": group, "keys": keys, "head_dim": size},
        make=make,
        run=lambda arguments, tile: attention.attention_step(**arguments, tile=tile),
        expected=lambda arguments: reference.attention_step(**arguments),
        heuristic=lambda target: attention.step_tile(
            batch, model.kv_heads, group, keys, size, DTYPE, False, False, target
        ),
        vary={"BLOCK_N": (32, 64, 128), "num_warps": (4, 8), "num_stages": (2, 3, 4, 5), "splits": (1, 8, 16, 32, 64)},
    )


SUBJECTS: tuple[Subject, ...] = (
    *(_product(model, count) for model in MODELS for count in (1, 16, 64, 256, 1024, 4224)),
    *(_injection(model, count, norm) for model in MODELS for count in (64, 1024, 4224) for norm in (False, True)),
    *(_transcoding(model, count) for model in MODELS for count in (1, 64, 1024, 4096)),
    *(_prefill(model, tokens) for model in MODELS for tokens in (64, 1024, 4096)),
    *(_step(model, batch, keys) for model in MODELS for batch in (1, 8) for keys in (1024, 8192, 65_536)),
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


def tune(
    subject: Subject, device: torch.device, target: Target, time: Callable[[Sequence[Callable[[], Any]]], float]
) -> dict[str, Any] | None:
    """The entry of a subject, or None where the heuristic's tile is as good as any.

    Args:
        time: milliseconds of one of several calls, the same work on different inputs.

    Raises: RuntimeError if the heuristic's own tile does not give the reference's result.
    """
    inputs = _input_sets(subject, device)
    arguments = inputs[0]
    expected = subject.expected(arguments).float()
    allowed = 2.0**-6 * expected.abs().max()
    timed: list[tuple[float, Arguments]] = []
    for number, tile in enumerate(candidates(subject, target)):
        try:
            got = subject.run(arguments, tile).float()
        except (triton.runtime.errors.OutOfResources, triton.compiler.errors.CompilationError):
            if number == 0:
                raise
            continue  # a tile too large for this device is no candidate
        if not bool(((got - expected).abs().max() <= allowed).item()):
            if number == 0:
                raise RuntimeError(f"{subject.name}: the heuristic's tile {tile} gives a wrong result")
            continue
        timed.append((time([partial(subject.run, given, tile) for given in inputs]), tile))
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
    parser.add_argument("--only", default="", help="subjects whose name contains this")
    parser.add_argument("--write", type=Path, default=tiles.SHIPPED, help="folder of the file (default: the package)")
    options = parser.parse_args(arguments)
    chosen = [subject for subject in SUBJECTS if options.only in subject.name]
    if not chosen:
        parser.error(f"--only {options.only!r} names none of: " + ", ".join(subject.name for subject in SUBJECTS))
    if not torch.cuda.is_available():
        print("No GPU here: tiles are measured on the device that uses them.", file=sys.stderr)
        return 1
    device = torch.device("cuda", torch.cuda.current_device())
    target, entries = target_of(device), []
    for number, subject in enumerate(chosen, 1):
        entry = tune(subject, device, target, partial(_median_time, device))
        gain = (
            "" if entry is None else f" {entry['heuristic']['milliseconds'] / entry['milliseconds']:.2f} times as fast"
        )
        print(
            f"{number}/{len(chosen)} {subject.name}: {'heuristic' if entry is None else entry['tile']}{gain}",
            flush=True,
        )
        entries += [entry] if entry else []
        # Written after every subject, so that an interrupted run keeps what it measured.
        path = tiles.TileFile(target.name, _provenance(target), tuple(entries)).write(options.write)
    print(f"written to {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
