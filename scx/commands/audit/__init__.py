"""`scx audit`: the attacks of `scx.audit` on a real model, by placement and setting, and what they read."""

from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from scx.commands.audit.cases import CASES, run_cases
from scx.commands.audit.report import Finding, draw, print_table, write
from scx.commands.audit.subject import Subject
from scx.commands.smollm2 import smollm2_path
from scx.commands.texts import windows
from scx_kernels.provenance import provenance

__all__ = ["CASES", "run"]

_OWN_WINDOWS, _OWN_TOKENS = 8, 385


def run(
    *,
    model: str | None = None,
    tokens: int = 256,
    redundant: int = 64,
    noise: float = 10.0,
    only: Sequence[str] = (),
    json: Path | None = None,
    picture: Path | None = None,
) -> list[Finding]:
    """Run SmolLM2 (or `model`) under SCX in both placements, attack what is stored, lies in memory and crosses, and
    print what the attacks read.

    The prompt is the beginning of the longest chapter of the Python manual; where an attacker needs text of his own it
    is that of others.

    Args:
        tokens: of the prompt. redundant: redundant rows R.
        noise: noise scale in units of the rows' root mean square; 0 for none.
        only: names in `CASES`; all if empty.
        json, picture: files to write the findings to, with machine, versions, commit and command.
    """
    about, path = provenance(), model or str(smollm2_path())
    tokenizer = AutoTokenizer.from_pretrained(path)
    subject = Subject(
        AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval(),
        prompt=windows(tokenizer, 1, tokens),
        own_text=windows(tokenizer, _OWN_WINDOWS + 1, _OWN_TOKENS)[1:],
        redundant=redundant,
        noise=noise,
    )
    findings = run_cases(subject, only or tuple(CASES))
    settings = {
        "model": Path(path).name,
        "dtype": "float32",
        "text": "beginning of the longest chapter of pydoc_data.topics",
        "tokens": tokens,
        "redundant": redundant,
        "noise": noise,
    }
    print_table(findings)
    if json is not None:
        print(f"written to {write(json, about, settings, findings)}")
    if picture is not None:
        print(f"picture: {draw(picture, about, settings, findings)}")
    return findings
