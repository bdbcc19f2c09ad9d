"""Compile what was recorded, for GPUs that need not be here."""

import math
import traceback
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import triton

from bench.rehearsal.specialisation import Variant, gpu_target


def problem_of(variant: Variant) -> str:
    """Compile a variant. Returns what is wrong with it, with the kernel's line; empty if nothing is."""
    try:
        compiled = triton.compile(variant.source(), target=gpu_target(variant.target), options=dict(variant.options))
    except Exception as error:  # whatever the compiler raises is a finding
        return f"does not compile: {_innermost(error)}"
    shared, limit = compiled.metadata.shared, variant.target.shared_memory
    return f"wants {shared} bytes of shared memory, of {limit}" if shared > limit else ""


def _innermost(error: BaseException) -> str:
    """The error that the compiler met first, with the line of the kernel it stands at."""
    chain: list[BaseException] = [error]
    while chain[-1].__cause__ is not None:
        chain.append(chain[-1].__cause__)
    # Triton's own names the line; the last one of the chain says what is wrong with it.
    placed = [e for e in chain if getattr(e, "node", None) is not None and getattr(e, "src", None)]
    message = str(chain[-1]).strip().splitlines() or [repr(chain[-1])]
    if not placed:
        return f"{message[-1]} ({traceback.format_exception_only(chain[-1])[-1].strip()[:200]})"
    innermost: Any = placed[-1]
    node = innermost.node
    line = innermost.src.splitlines()[node.lineno - 1].strip()
    return f"{message[-1][:300]}, at line {node.lineno} of the function: {line}"


def compile_all(variants: Iterable[Variant], jobs: int) -> Iterator[tuple[Variant, str]]:
    """(variant, what is wrong with it), compiled by `jobs` processes; one job stays in this one."""
    wanted = list(variants)
    if jobs == 1:
        yield from ((variant, problem_of(variant)) for variant in wanted)
        return
    with ProcessPoolExecutor(jobs) as pool:
        yield from zip(wanted, pool.map(problem_of, wanted, chunksize=4), strict=True)


def _branches(variant: Variant) -> set[object]:
    """What of a kernel this variant compiles: every flag as it is set, a head's tail, a split, and which of its
    pointers are absent together, since a branch that reads an absent one does not compile."""
    kernel = (variant.module, variant.kernel)
    found: set[object] = {(kernel, tuple(name for name, value in variant.meta.items() if value is None))}
    for name, value in variant.meta.items():
        if isinstance(value, (bool, str)):
            found.add((kernel, name, value))
        elif name in ("BLOCK_TAIL", "OLD_ROUNDS", "HEAD_DIM", "SPLIT_K", "WEIGHTS"):
            found.add((kernel, name, value > (name in ("SPLIT_K", "WEIGHTS"))))
    return found


def _cost(variant: Variant) -> int:
    """About how long it takes to compile: by its tile, and by the rounds of a cipher that are written out."""
    sizes = (value for name, value in variant.meta.items() if name.startswith(("BLOCK_", "ROUNDS")))
    return math.prod(max(1, size) for size in sizes if isinstance(size, int))


def representative(variants: Iterable[Variant]) -> list[Variant]:
    """Variants in which every branch of every kernel that is asked for is compiled, cheap ones first."""
    met: set[object] = set()
    taken = []
    for variant in sorted(variants, key=lambda x: (_cost(x), x.module, x.kernel, x.key)):
        if not _branches(variant) <= met:
            met |= _branches(variant)
            taken.append(variant)
    return taken
