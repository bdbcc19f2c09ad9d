"""`scx transcript`: what crosses the boundary of the split placement, beside what must cross by the formula."""

from typing import Any

import torch
from transformers import AutoModelForCausalLM

from scx.commands.smollm2 import smollm2_path
from scx.keys import SCXKeyGenerator
from scx.models.llama import encoded_llama, model_shape
from scx.models.split import record_transcript
from scx.party.boundary import STAGES, Transcript
from scx.party.secure import split_plan
from scx.party.transcript import Expected, expected_bytes, format_table

__all__ = ["run"]


@torch.no_grad()
def run(
    *,
    model: str | None = None,
    tokens: int = 64,
    redundant: int = 16,
    noise: float = 5.0,
    crossings: str = "few",
    reuse_feature_keys: bool = False,
    prefill_top_k: int | None = None,
) -> str:
    """Prefill and generate two tokens in the split placement, both sides on the CPU, and tell what crossed.

    Args:
        model: a directory or hub id; SmolLM2-135M-Instruct if None.
        tokens: random prompt tokens. redundant: redundant rows R.
        noise: scale of the removable noise in units of the rows' root mean square; 0 for none.
        crossings, reuse_feature_keys, prefill_top_k: as in `encode_llama`.

    Returns: the table, and bytes and round trips per stage beside the formula.
    """
    llama = AutoModelForCausalLM.from_pretrained(model or str(smollm2_path()), dtype=torch.float32).eval()
    shape = model_shape(llama)
    options: dict[str, Any] = {"noise_scale": noise} if noise else {}
    keys = SCXKeyGenerator.for_model(llama, redundant_num=redundant, alp=noise > 0, **options)
    choices: dict[str, Any] = {"crossings": crossings, "reuse_feature_keys": reuse_feature_keys}
    choices["prefill_top_k"] = prefill_top_k
    plan = split_plan(keys, shape, **choices)
    prompt = torch.randint(0, shape.vocab_size, (1, tokens))
    with encoded_llama(llama, keys, "cpu", **choices):
        with record_transcript(llama) as transcript:
            out = llama(prompt)
            llama(prompt[:, :1], past_key_values=out.past_key_values)
        with record_transcript(llama) as later:
            llama(prompt[:, :1], past_key_values=out.past_key_values)
    lines, crossed = [format_table(transcript.crossings), ""], {x.stage for x in transcript.crossings}
    for stage in STAGES:
        if stage not in crossed:  # blocks that are here need no calibration over the boundary
            continue
        step = stage == "generation"
        given: dict[str, Any] = {"tokens": 1, "past": tokens} if step else {"tokens": tokens}
        expected = expected_bytes(plan, shape, stage, batch=1, redundant=redundant, itemsize=4, **given)
        lines.append(_summary(transcript, stage, expected))
    lines.append(f"the next step: {later.nbytes():,} bytes in {later.requests['generation']} round trips")
    return "\n".join(lines)


def _summary(transcript: Transcript, stage: str, expected: Expected) -> str:
    there, back = (transcript.nbytes(stage, way) for way in ("to untrusted", "to secure"))
    return (
        f"{stage}: {there:,} bytes there and {back:,} back in {transcript.requests[stage]} round trips; "
        f"by the formula {expected.to_untrusted:,} and {expected.to_secure:,}"
    )
