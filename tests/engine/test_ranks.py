"""Tensor parallelism over three ranks, two blocks a chunk: each rank seals its own heads of every block."""

from pathlib import Path

import pytest
from engine.engines import FEW_BLOCKS, answers, counted, engine, transfer
from engine.ledgers import TWENTY
from engine.plain import Plain
from transformers import PreTrainedTokenizerBase

RANKS, PER_CHUNK = 3, 2
ASKED = TWENTY[:6]
# Three processes on a machine of two cores, each with a thread of its own.
PROCESSES = {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def run(
    model: Path, tokenizer: PreTrainedTokenizerBase, master_key: Path
) -> tuple[list[list[int]], list[list[int]], list[int], dict[str, float]]:
    prompts = [ledger.prompt(tokenizer) for ledger in ASKED]
    with engine(
        model,
        {"SCX_MASTER_KEY_FILE": str(master_key), **PROCESSES},
        kv_transfer_config=transfer(tenant="alice", blocks_per_chunk=PER_CHUNK),
        num_gpu_blocks_override=FEW_BLOCKS,
        tensor_parallel_size=RANKS,
    ) as llm:
        before = counted()
        first, _ = answers(llm, prompts, 8)
        assert llm.reset_prefix_cache()
        again, cached = answers(llm, prompts, 8)
        counts = {name: value - before.get(name, 0.0) for name, value in counted().items()}
    return first, again, cached, counts


def test_tokens_are_those_of_plain_vllm(
    run: tuple[list[list[int]], list[list[int]], list[int], dict[str, float]], plain: Plain
) -> None:
    expected = [plain.tokens[ledger][:8] for ledger in ASKED]
    assert run[0] == expected
    assert run[1] == expected


def test_every_rank_opens_its_part(
    run: tuple[list[list[int]], list[list[int]], list[int], dict[str, float]],
) -> None:
    """Of every chunk of two blocks each rank has two."""
    _, _, cached, counts = run
    assert all(tokens >= 64 for tokens in cached)
    assert counts["scx:kv_blocks_opened"] == RANKS * sum(cached) // 32
    assert counts.get("scx:kv_blocks_refused", 0) == 0
