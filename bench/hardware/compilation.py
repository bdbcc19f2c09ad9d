"""Stage: compile, over many processes at once, what the later stages need, so that none of them waits for a compiler.

Each process runs its share of the work once, on the GPU: what lies in Triton's cache afterwards is what they will ask
for, to the alignment of a pointer."""

from functools import partial
from typing import Any

import torch

from bench.contest import BOUND, RIVAL, Case
from bench.hardware.operations import by_kernels
from bench.hardware.sizes import device_of, marked_cases, sanitized_cases, two_blocks
from bench.hardware.work import Work
from bench.operation_cases import OPERATIONS

KEYS = {
    "permuted": {},
    "100 redundant rows, noise": {"redundant_num": 100, "alp": True},
    "sealed": {"cache_encoding": "sealed"},
    "sealed by 8 rounds": {"cache_encoding": "sealed", "cipher_rounds": 8},
}
LENGTHS = (1, 2, 3, 7, 12, 24, 48, 96, 200, 400, 800)
"""Of the warm-up's prompts, each a case."""


def run(work: Work) -> None:
    lengths = LENGTHS[:2] if work.rehearsal else LENGTHS
    # What takes longest comes first.
    cases = [(f"warm-up, {name}, {own} tokens", partial(warm, name, own, work.rehearsal))
             for name in reversed(KEYS) for own in lengths]  # fmt: skip
    asked = [*marked_cases(work.rehearsal), *sanitized_cases(work.rehearsal)]
    cases += [(case.id, partial(call_once, case, device_of(work.rehearsal))) for case in asked]
    for name, compile_it in work.share([*cases[:2], cases[-1]] if work.rehearsal else cases):
        work.case(name, compile_it, limit=35)


def warm(name: str, length: int, rehearsal: bool) -> dict[str, Any]:
    """The warm-up that users call, on two blocks: what it compiles serves a model of any depth."""
    from transformers import LlamaForCausalLM

    from scx import SCXKeyGenerator, encode_llama, warm_up

    torch.manual_seed(0)
    with torch.device(device_of(rehearsal)):
        model = LlamaForCausalLM(two_blocks(rehearsal).config()).eval().to(torch.bfloat16)
    encode_llama(model, SCXKeyGenerator.for_model(model, **KEYS[name]))
    warm_up(model, tokens=(length,), longest=32_768 if length == 1 and not rehearsal else 256)
    return {}


@torch.no_grad()
def call_once(case: Case, device: torch.device) -> dict[str, Any]:
    operation = OPERATIONS[case.operation]
    inputs = operation.make(case, device)
    for contestant in operation.contestants(case):
        if contestant.kind not in (RIVAL, BOUND):
            with by_kernels(device), contestant.within():
                contestant.call(inputs)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return {}
