"""The documents' examples run as they stand, and what README says exists."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from parity import as_users_run
from transformers import LlamaForCausalLM

from scx.commands.audit.report import Finding

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"


def run_examples(page: str, names: dict[str, Any]) -> None:
    """Run a page's examples in the order in which they stand; what they assign goes into `names`."""
    examples = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)
    assert examples, f"{page} has an example"
    for example in examples:
        exec(compile(example, page, "exec"), names)  # noqa: S102


@pytest.mark.slow
@as_users_run()
def test_examples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """README's opens and continues a session. The pages go on with its model: made plain again, generating from files,
    and with two parties."""
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    run_examples("README.md", names)
    assert names["gpu_kvcache"].get_seq_length() == names["cpu_kvcache"].get_seq_length() == 15
    run_examples("docs/serving.md", names)
    check_greedy(names["model"], names["tokens"], names["input_ids"].shape[1])
    run_examples("docs/caches.md", names)
    longer, tokens = names["longer"], names["tokens"]
    assert torch.equal(longer[:, : tokens.shape[1]], tokens)
    assert longer.shape[1] == tokens.shape[1] + 8
    run_examples("docs/split.md", names)
    check_greedy(names["model"], names["tokens"], names["input_ids"].shape[1], new=8)
    assert names["transcript"].requests["generation"] == 4 * 7


def test_a_listener_reads_the_prompt(llama: LlamaForCausalLM, prompt: Callable[..., torch.Tensor]) -> None:
    """As SECURITY.md says, and shows."""
    names: dict[str, Any] = {"model": llama, "input_ids": prompt(40)}
    with torch.no_grad():
        run_examples("SECURITY.md", names)
    assert names["read"] == 40


@torch.no_grad()
def check_greedy(model: LlamaForCausalLM, tokens: torch.Tensor, prompt: int, new: int = 32) -> None:
    """Every generated token is the plain model's choice. A random float16 model has ties: five steps of its logits'
    0.004 count as one."""
    assert tokens.shape[1] == prompt + new
    logits = model(tokens).logits[:, prompt - 1 : -1].double()
    chosen = logits.gather(-1, tokens[:, prompt:, None])[..., 0]
    assert (logits.amax(dim=-1) - chosen).max() < 2e-2


def test_what_the_documents_ask_for_exists() -> None:
    """Every `make TARGET` that a page names is one, and `make help` has a line for each."""
    rules = dict(re.findall(r"^([a-z-]+):([^\n]*)", (ROOT / "Makefile").read_text(), re.MULTILINE))
    pages = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), ROOT / "bench" / "NOTES.md"]
    named = {name for page in pages for name in re.findall(r"(?m)(?:^|`)make ([a-z-]+)", page.read_text())}
    assert named <= set(rules)
    assert {"demo", "demo-split", "test", "test-floor", "lint", "docs", "bench", "help"} <= named
    assert [target for target, rule in rules.items() if "## " not in rule] == []


def test_tests_behind_figures_exist() -> None:
    """What SECURITY.md tells to run finds tests, for every word that it selects by."""
    commands = re.findall(r'`pytest (tests/\w+\.py) -k (\w+|"[^"]+")`', (ROOT / "SECURITY.md").read_text())
    assert len(commands) > 6
    for file, words in commands:
        names = re.findall(r"(?:def|class) ((?:test_|Test)\w+)", (ROOT / file).read_text())
        for word in words.strip('"').split(" or "):
            assert [name for name in names if word in name], f"{file}: no test has {word} in its name"


def test_figures_of_the_audit_are_its_results() -> None:
    """Every count and area in a line of a table that names the command is one of those in its result file."""
    written = json.loads((ROOT / "bench" / "results" / "audit-cpu.json").read_text())
    figures = {x.figure for x in (Finding(**finding) for finding in written["findings"])}
    counts = {" ".join(figure.split()[:3]) for figure in figures if " of " in figure}
    quoted = [
        count
        for page in (README, ROOT / "SECURITY.md")
        for line in page.read_text().splitlines()
        if line.startswith("|") and "`python -m scx audit`" in line
        for count in re.findall(r"AUC [\d.]+ to [\d.]+|\d(?:[\d,]*\d)? of \d(?:[\d,]*\d)?", line)
    ]
    assert len(quoted) > 3
    assert set(quoted) <= figures | counts


def test_readme_is_short() -> None:
    """It is read in one go; what does not fit has a page of its own."""
    assert len(README.read_text().splitlines()) <= 130
