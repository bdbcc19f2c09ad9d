"""Stage: two blocks at Llama-3-8B's width under SCX beside the same two plain: logits of a prompt, of tokens one by one
and of a later turn, and what `generate` writes.

Logits may be as far from the plain model's as `bench.model.allowed_error` says, in the token where they are farthest:
a few times as far as its own eager attention is from its sdpa attention. Generated tokens are equal; or else, at the
first that is not, the plain model has both within that distance: its own two attentions might disagree there."""

import functools
import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedModel

from bench.hardware.sizes import device_of, two_blocks
from bench.model import AGREEMENT, allowed_error
from bench.model_cases import KEYS
from bench.work import CaseFailed, Work
from scx import SCXKeyGenerator, encoded_llama

VARIANTS: dict[str, dict[str, Any]] = {
    "bare": {},
    **{name: keys for name, keys in KEYS.items() if name != "sealed by 12 rounds"},
}
DTYPES = (torch.bfloat16, torch.float32, torch.float16)
PROMPTS = (128, 7, 1)
STEPS, LATER_TURN, GENERATED = 4, 9, 16


def run(work: Work) -> None:
    rehearsed = itertools.product(DTYPES[1:2], list(VARIANTS)[::3])
    for dtype, name in work.share(rehearsed if work.rehearsal else itertools.product(DTYPES, VARIANTS)):
        title = f"{str(dtype).removeprefix('torch.')}, {name}"
        work.case(title, partial(compare, name, dtype, work.rehearsal), limit=40)


@dataclass(frozen=True)
class Plain:
    """The plain model's answers, by prompt length; `error` and `farthest`: of its eager attention, relative, and of a
    logit."""

    model: PreTrainedModel
    tokens: dict[int, Tensor]
    logits: dict[int, Tensor]
    generated: Tensor
    error: float
    farthest: float


@functools.cache
def plain(dtype: torch.dtype, rehearsal: bool) -> Plain:
    torch.manual_seed(0)
    shape, device = two_blocks(rehearsal), device_of(rehearsal)
    with torch.device(device):
        model = LlamaForCausalLM(shape.config()).eval().to(dtype)
    lengths = [min(length, 20) for length in PROMPTS] if rehearsal else PROMPTS
    rest = STEPS + LATER_TURN
    tokens = {n: torch.randint(3, shape.vocabulary, (1, n + rest), device=device) for n in lengths}
    logits = {length: converse(model, ids) for length, ids in tokens.items()}
    with attending(model, "eager"):
        eager = {length: converse(model, ids) for length, ids in tokens.items()}
    error = max(farthest_row(eager[length], logits[length]) for length in lengths)
    farthest = max((eager[length] - logits[length]).abs().max().item() for length in lengths)
    return Plain(model, tokens, logits, generate(model, tokens[lengths[0]], rehearsal), error, farthest)


@contextmanager
def attending(model: PreTrainedModel, implementation: str) -> Iterator[None]:
    before = model.config._attn_implementation
    model.set_attn_implementation(implementation)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


@torch.no_grad()
def converse(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """Logits (S, vocabulary) of a prompt, of STEPS tokens one by one and of a later turn."""
    pieces = ids.split([ids.shape[1] - STEPS - LATER_TURN, *[1] * STEPS, LATER_TURN], dim=1)
    cache, logits = None, []
    for piece in pieces:
        out = model(piece, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        logits.append(out.logits[0].float())
    return torch.cat(logits)


@torch.no_grad()
def generate(model: PreTrainedModel, ids: Tensor, rehearsal: bool) -> Tensor:
    count = 4 if rehearsal else GENERATED
    return model.generate(ids, max_new_tokens=count, do_sample=False, pad_token_id=0)


def farthest_row(got: Tensor, expected: Tensor) -> float:
    """The largest error of a token's logits, relative to their size; not finite where one of them is not."""
    return ((got - expected).norm(dim=-1) / expected.norm(dim=-1)).max().item()


def compare(name: str, dtype: torch.dtype, rehearsal: bool) -> dict[str, Any]:
    """Raises: CaseFailed."""
    right, options = plain(dtype, rehearsal), VARIANTS[name]
    allowed = allowed_error(right.error, dtype, bool(options.get("alp")))
    with encoded_llama(right.model, SCXKeyGenerator.for_model(right.model, **options)) as encoded:
        errors = {n: farthest_row(converse(encoded, ids), right.logits[n]) for n, ids in right.tokens.items()}
        generated = generate(encoded, right.tokens[max(right.tokens)], rehearsal)
    figures = {"errors": errors, "allowed": allowed, "eager_error": right.error}
    for length, error in errors.items():
        if not error <= allowed:
            cause = f"prompt of {length}: a token's logits differ by {error:.2g}, allowed {allowed:.2g}"
            raise CaseFailed(cause, **figures)
    return {**figures, "equal_tokens": tokens_before_a_difference(right, generated)}


@torch.no_grad()
def tokens_before_a_difference(right: Plain, generated: Tensor) -> int:
    """How many generated tokens equal the plain model's. Raises CaseFailed if it was sure of the first that differs."""
    start = right.tokens[max(right.tokens)].shape[1]
    differing = (generated != right.generated)[0].nonzero()
    if not len(differing):
        return right.generated.shape[1] - start
    first = int(differing[0])
    logits = right.model(right.generated[:, :first]).logits[0, -1].float()
    gap = (logits[right.generated[0, first]] - logits[generated[0, first]]).item()
    if gap > 2 * AGREEMENT * right.farthest:
        raise CaseFailed(f"token {first - start} of generate differs, by {gap:.2g} of a logit in the plain model")
    return first - start
