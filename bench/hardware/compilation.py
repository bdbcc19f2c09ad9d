"""Stage: compile, over many processes at once, what the later stages need, so that none of them waits for a compiler.

Each process runs its share of the work once, on the GPU: what lies in Triton's cache afterwards is what they will ask
for, to the alignment of a pointer."""

from functools import partial

import torch

from bench.hardware.operations import call_ours
from bench.hardware.sizes import device_of, marked_cases, sanitized_cases, two_blocks
from bench.model_cases import KEYS
from bench.work import Work

ENCODINGS = ("sealed by 8 rounds", "sealed", "100 redundant rows, noise", "permuted")
"""What takes longest comes first."""
LENGTHS = (1, 2, 3, 7, 12, 24, 48, 96, 200, 400, 800)
"""Of the warm-up's prompts, each a case."""


def run(work: Work) -> None:
    lengths = LENGTHS[:2] if work.rehearsal else LENGTHS
    cases = [(f"warm-up, {name}, {own} tokens", partial(warm, name, own, work.rehearsal))
             for name in ENCODINGS for own in lengths]  # fmt: skip
    asked = [*marked_cases(work.rehearsal), *sanitized_cases(work.rehearsal)]
    cases += [(case.id, partial(call_ours, case, device_of(work.rehearsal))) for case in asked]
    for name, compile_it in work.share([*cases[:2], cases[-1]] if work.rehearsal else cases):
        work.case(name, compile_it, limit=35)


def warm(name: str, length: int, rehearsal: bool) -> None:
    """The warm-up that users call, on two blocks: what it compiles serves a model of any depth."""
    # A machine may lack what they need: then it is these cases alone that are left out.
    from transformers import LlamaForCausalLM  # noqa: PLC0415

    from scx import SCXKeyGenerator, encode_llama, warm_up  # noqa: PLC0415

    torch.manual_seed(0)
    with torch.device(device_of(rehearsal)):
        model = LlamaForCausalLM(two_blocks(rehearsal).config()).eval().to(torch.bfloat16)
    encode_llama(model, SCXKeyGenerator.for_model(model, **KEYS.get(name, {})))
    warm_up(model, tokens=(length,), longest=32_768 if length == 1 and not rehearsal else 256)
