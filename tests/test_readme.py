"""The README's examples run as they stand."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from parity import as_users_run
from transformers import LlamaForCausalLM

from scx import decode_llama

README = Path(__file__).parents[1] / "README.md"


@pytest.mark.slow
@as_users_run()
def test_examples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first opens and continues a session; the second generates with the same model, made plain again; the third
    goes on from files; the fourth generates with two parties."""
    monkeypatch.chdir(tmp_path)
    first, second, third, fourth = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    names: dict[str, Any] = {}
    exec(first, names)  # noqa: S102
    assert names["gpu_kvcache"].get_seq_length() == names["cpu_kvcache"].get_seq_length() == 15
    decode_llama(names["model"])
    exec(second, names)  # noqa: S102
    check_greedy(names["model"], names["tokens"], names["input_ids"].shape[1])
    exec(third, names)  # noqa: S102
    longer, tokens = names["longer"], names["tokens"]
    assert torch.equal(longer[:, : tokens.shape[1]], tokens)
    assert longer.shape[1] == tokens.shape[1] + 8
    exec(fourth, names)  # noqa: S102
    check_greedy(names["model"], names["tokens"], names["input_ids"].shape[1], new=8)
    assert names["transcript"].requests["generation"] == 4 * 7


@torch.no_grad()
def check_greedy(model: LlamaForCausalLM, tokens: torch.Tensor, prompt: int, new: int = 32) -> None:
    """Every generated token is the plain model's choice. A random float16 model has ties: five steps of its logits'
    0.004 count as one."""
    assert tokens.shape[1] == prompt + new
    logits = model(tokens).logits[:, prompt - 1 : -1].double()
    chosen = logits.gather(-1, tokens[:, prompt:, None])[..., 0]
    assert (logits.amax(dim=-1) - chosen).max() < 2e-2


@pytest.mark.parametrize("target", ["demo", "demo-split", "test", "lint", "test-floor", "bench"])
def test_commands_exist(target: str) -> None:
    assert f"make {target}" in README.read_text()
    assert re.search(rf"^{target}:", (README.parent / "Makefile").read_text(), re.MULTILINE)
