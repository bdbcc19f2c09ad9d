"""Compile what was recorded, for GPUs that need not be here."""

import traceback
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor

import triton

from bench.rehearsal.specialisation import Variant, gpu_target

__all__ = ["compile_all", "problem_of", "representative"]


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
    node = placed[-1].node  # type: ignore[attr-defined]
    line = placed[-1].src.splitlines()[node.lineno - 1].strip()  # type: ignore[attr-defined]
    return f"{message[-1][:300]}, at line {node.lineno} of the function: {line}"


def compile_all(variants: Iterable[Variant], jobs: int) -> Iterator[tuple[Variant, str]]:
    """(variant, what is wrong with it), compiled by `jobs` processes; one job stays in this one."""
    wanted = list(variants)
    if jobs == 1:
        yield from ((variant, problem_of(variant)) for variant in wanted)
        return
    with ProcessPoolExecutor(jobs) as pool:
        yield from zip(wanted, pool.map(problem_of, wanted, chunksize=4), strict=True)


def _branches(variant: Variant) -> tuple[object, ...]:
    """Which branches of a kernel are compiled: pointers that are there, flags, encoding, and a head's tail."""
    names = [name for name, _ in variant.signature]
    constants = {names[path[0]]: value for path, value in variant.constants}
    absent = tuple(name for name, value in constants.items() if value is None)
    flags = tuple((name, value) for name, value in constants.items() if isinstance(value, (bool, str)))
    single = tuple(bool(constants.get(name)) for name in ("BLOCK_TAIL", "OLD_ROUNDS", "HEAD_DIM"))
    return (variant.module, variant.kernel, absent, flags, single, constants.get("SPLIT_K", 1) > 1)


def _size(variant: Variant) -> int:
    names = [name for name, _ in variant.signature]
    size = 1
    for path, value in variant.constants:
        if names[path[0]].startswith(("BLOCK", "ROUNDS")) and isinstance(value, int):
            size *= max(1, value)
    return size


def representative(variants: Iterable[Variant]) -> list[Variant]:
    """One variant for every combination of branches of every kernel, the one with the smallest tile."""
    found: dict[tuple[object, ...], Variant] = {}
    for variant in sorted(variants, key=lambda x: (_size(x), x.module, x.kernel, x.key)):
        found.setdefault(_branches(variant), variant)
    return list(found.values())
