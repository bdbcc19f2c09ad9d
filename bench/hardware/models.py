"""Stage: whole models beside plain transformers with its eager attention, with sdpa and compiled: prompts of 8 to 10k
tokens, and tokens on caches of 1k to 32k, for 1, 8 and 64 conversations at once. What tells most comes first."""

import functools
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from transformers import LlamaForCausalLM

from bench.hardware.sizes import device_of
from bench.model import Field, load, measure
from bench.model_cases import COMPILED, EAGER, NOISE, PLAIN, REDUNDANT, SCX, SEALED, SEALED_8, ModelCase
from bench.results import measured
from bench.shapes import SHAPES, SMALL_SHAPES
from bench.work import LeftOut, Work, passed

MODEL, DTYPE = "Llama-3-8B", "bfloat16"
OF_PREFILL = (PLAIN, EAGER, SCX, REDUNDANT, SEALED)
OF_TOKEN = (PLAIN, EAGER, SCX, SEALED, SEALED_8)
SIZES = (
    ("prefill", 1, 1024, 6),
    ("token", 1, 1024, 6),
    ("prefill", 1, 128, 5),
    ("token", 1, 8192, 7),
    ("prefill", 1, 8, 5),
    ("token", 8, 1024, 7),
    ("prefill", 1, 4096, 8),
    ("token", 1, 32_768, 10),
    ("token", 64, 1024, 8),
    ("prefill", 1, 10_240, 14),
    ("token", 8, 8192, 9),
    ("prefill", 8, 128, 7),
    ("prefill", 64, 8, 7),
    ("token", 8, 32_768, 14),
    ("token", 64, 8192, 14),
)
"""(kind, batch, context, seconds without which it is not begun)."""
SECONDS_TO_COMPILE = 50
ROOM = 1.25
"""Of a cache that grows in place, over what it holds."""
ROUNDS = 0.8
"""Seconds of rounds, beyond the fewest that there are."""


def run(work: Work) -> None:
    if work.rehearsal:
        rehearse(work)
        return
    field = functools.cache(lambda: Field(*load(MODEL, DTYPE, device_of(False))))

    def entry(case: ModelCase) -> dict[str, Any]:
        check_memory(case, torch.cuda.get_device_properties(device_of(False)).total_memory)
        return entry_of(field(), case, ROUNDS)

    for case, seconds in cases():
        work.case(case.id, partial(entry, case), limit=work.left(), least=seconds)


def check_memory(case: ModelCase, there: int) -> None:
    """Raises LeftOut where weights and a cache with room to grow exceed the GPU's bytes."""
    shape, itemsize = SHAPES[case.model], getattr(torch, case.dtype).itemsize
    cache = 2 * shape.layers * shape.kv_width * case.batch * case.context if case.kind == "token" else 0
    needed = int((shape.parameters + ROOM * cache) * itemsize)
    if needed > there:
        raise LeftOut(f"needs a GPU with {needed / 2**30:.0f} GiB, this one has {there / 2**30:.0f}")


def rehearse(work: Work) -> None:
    """The smallest shape with random weights, a prompt and a token."""
    torch.manual_seed(0)
    field = Field(LlamaForCausalLM(SMALL_SHAPES["rehearsal"].config()).eval(), "random")
    for kind, contestants in (("prefill", (PLAIN, EAGER, NOISE)), ("token", (PLAIN, EAGER, SEALED))):
        case = ModelCase("rehearsal", kind, 12, 1, "float32", contestants)
        work.case(case.id, partial(entry_of, field, case, 0.0))


def cases() -> Iterator[tuple[ModelCase, float]]:
    """And last the compiled plain model, because compiling one takes most of a minute."""
    for kind, batch, context, seconds in SIZES:
        contestants = OF_PREFILL if kind == "prefill" else OF_TOKEN
        yield ModelCase(MODEL, kind, context, batch, DTYPE, contestants), seconds
    for kind in ("token", "prefill"):
        yield ModelCase(MODEL, kind, 1024, 1, DTYPE, (PLAIN, COMPILED, SCX), "/compiled"), SECONDS_TO_COMPILE


def entry_of(field: Field, case: ModelCase, seconds: float) -> dict[str, Any]:
    """Raises: CaseFailed if SCX's logits are not the plain model's."""
    entry = measure(field, case, seconds)
    return passed({"id": case.id, **entry}, headlines=[headline(case, entry)])


def headline(case: ModelCase, entry: dict[str, Any]) -> str:
    """The plain model's time, and the others' over it."""
    told = []
    for contestant in measured(entry):
        is_plain = contestant["name"] == PLAIN.name
        figure = f"{contestant['ms']['median']:.4g} ms" if is_plain else f"{contestant['ratio']['median']:.3f}"
        told.append(f"{contestant['name']} {figure}")
    if not told:
        told = sorted({contestant["status"] for contestant in entry["contestants"]})
    return f"{case.kind}, {case.batch} × {case.context:,}: {'; '.join(told)}"
