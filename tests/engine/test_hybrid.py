"""A model in which some layers see a window alone, so that blocks come in two groups: random weights, a few layers."""

import random
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from engine.engines import answers, counted, engine, transfer
from transformers import Gemma3ForCausalLM, Gemma3TextConfig

WINDOW, VOCABULARY = 64, 512
OPTIONS = {"skip_tokenizer_init": True}


@dataclass(frozen=True)
class Run:
    plain: list[list[int]]
    first: list[list[int]]
    again: list[list[int]]
    cached: list[int]
    counts: dict[str, float]


@pytest.fixture(scope="module")
def hybrid(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its tokens hang on all of a prompt: what layers add is large beside the embeddings that they add it to."""
    torch.manual_seed(0)
    config = Gemma3TextConfig(
        vocab_size=VOCABULARY,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=64,
        sliding_window=WINDOW,
        layer_types=["sliding_attention", "full_attention"] * 2,
        max_position_embeddings=1024,
        initializer_range=0.2,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    made = Gemma3ForCausalLM(config).float()
    made.model.embed_tokens.weight.data.mul_(0.1)
    path = tmp_path_factory.mktemp("hybrid")
    made.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def run(hybrid: Path, master_key: Path) -> Run:
    drawn = random.Random(0)  # noqa: S311  prompts, no secrets
    prompts = [[drawn.randrange(3, VOCABULARY) for _ in range(150 + 30 * n)] for n in range(8)]
    with engine(hybrid, **OPTIONS) as llm:
        plain, _ = answers(llm, prompts)
    config = transfer(tenant="alice")
    with engine(hybrid, {"SCX_MASTER_KEY_FILE": str(master_key)}, kv_transfer_config=config, **OPTIONS) as llm:
        before = counted()
        first, _ = answers(llm, prompts)
        assert llm.reset_prefix_cache()
        again, cached = answers(llm, prompts)
        counts = {name: value - before.get(name, 0.0) for name, value in counted().items()}
    return Run(plain, first, again, cached, counts)


def test_tokens_are_those_of_plain_vllm(run: Run) -> None:
    assert len({tuple(tokens) for tokens in run.plain}) == len(run.plain)
    assert run.first == run.plain
    assert run.again == run.plain


def test_blocks_of_both_groups_come_back(run: Run) -> None:
    """Of layers with a window those in it, of the others all."""
    assert all(tokens >= 4 * 32 for tokens in run.cached)
    assert run.counts["scx:kv_blocks_opened"] > sum(run.cached) // 32
    assert run.counts.get("scx:kv_blocks_refused", 0) == 0
