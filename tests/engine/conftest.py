"""Tests against a real vLLM on the CPU (`make test-vllm`). An engine takes half a minute to start: tests share them."""

import os
from pathlib import Path

import pytest

from scx.commands.vllm_server import on_this_cpu

os.environ.update(on_this_cpu())  # read when vLLM is imported
# What a test reads in a worker is a function, which vLLM sends as a pickle where it is told that nobody else can.
os.environ["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"

from engine.plain import Plain, ask_plain_vllm
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from scx.commands.smollm2 import smollm2_path
from scx.vllm.master import write_master


@pytest.fixture(scope="session")
def model() -> Path:
    return smollm2_path()


@pytest.fixture(scope="session")
def tokenizer(model: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(model)


@pytest.fixture(scope="session")
def plain(model: Path, tokenizer: PreTrainedTokenizerBase) -> Plain:
    return ask_plain_vllm(model, tokenizer)


@pytest.fixture(scope="session")
def master_key(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file of a master key."""
    return write_master(tmp_path_factory.mktemp("secrets") / "master.key")


@pytest.fixture(scope="session")
def other_master_key(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_master(tmp_path_factory.mktemp("secrets") / "other.key")
