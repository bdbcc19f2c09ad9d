"""The README's examples run as they stand."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from scx import decode_llama

README = Path(__file__).parents[1] / "README.md"


def test_examples() -> None:
    """The first opens and continues a session; the second generates with the same model, made plain again."""
    first, second = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    names: dict[str, Any] = {}
    exec(first, names)  # noqa: S102
    assert names["gpu_kvcache"].get_seq_length() == names["cpu_kvcache"].get_seq_length() == 15
    decode_llama(names["model"])
    exec(second, names)  # noqa: S102
    assert torch.equal(names["tokens"], names["model"].generate(names["input_ids"], max_new_tokens=64))


@pytest.mark.parametrize("target", ["demo", "test", "lint", "test-floor", "bench"])
def test_commands_exist(target: str) -> None:
    assert f"make {target}" in README.read_text()
    assert re.search(rf"^{target}:", (README.parent / "Makefile").read_text(), re.MULTILINE)
