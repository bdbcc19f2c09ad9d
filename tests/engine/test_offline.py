"""Sealed off-loading of an engine in a program: one tenant, few blocks on the device, no disk."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from engine.bytes_seen import assert_noise, chi_square_excess, count_of, written_rows
from engine.engines import BLOCK, FEW_BLOCKS, answers, counted, device_words, engine, regions, transfer
from engine.ledgers import QUESTION, TALKS, TWENTY
from engine.plain import Plain
from transformers import PreTrainedTokenizerBase

ENGINE_ID = "scx-test-offline"


@dataclass
class Run:
    """What an engine answered, and what lay where afterwards."""

    first: list[list[int]]
    again: list[list[int]]
    second: list[list[int]]
    cached_first: list[int]
    cached_again: list[int]
    cached_second: list[int]
    counts: dict[str, float]
    device: np.ndarray
    host: np.ndarray


@pytest.fixture(scope="module")
def run(model: Path, tokenizer: PreTrainedTokenizerBase, plain: Plain, master_key: Path) -> Run:
    prompts = [ledger.prompt(tokenizer) for ledger in TWENTY]
    turns = [ledger.second_turn(tokenizer, plain.tokens[ledger], QUESTION) for ledger in TALKS]
    config = {**transfer(tenant="alice"), "engine_id": ENGINE_ID}
    with engine(
        model,
        {"SCX_MASTER_KEY_FILE": str(master_key)},
        kv_transfer_config=config,
        num_gpu_blocks_override=FEW_BLOCKS,
    ) as llm:
        first, cached_first = answers(llm, prompts)
        assert llm.reset_prefix_cache()
        again, cached_again = answers(llm, prompts)
        assert llm.reset_prefix_cache()
        second, cached_second = answers(llm, turns)
        device = llm.collective_rpc(device_words)[0]
        (region,) = regions(ENGINE_ID)
        assert region.stat().st_mode & 0o777 == 0o600
        host = written_rows(region)
        counts = counted()
    return Run(first, again, second, cached_first, cached_again, cached_second, counts, device, host)


def test_answers_do_not_hang_on_rounding(plain: Plain) -> None:
    """Batches are summed in other orders than single requests: about 1e-5 of a logit. Tokens may be demanded equal."""
    assert plain.least_lead > 1e-3


def test_tokens_are_those_of_plain_vllm(run: Run, plain: Plain) -> None:
    expected = [plain.tokens[ledger] for ledger in TWENTY]
    assert run.first == expected
    assert run.again == expected
    assert run.second == [plain.second[ledger] for ledger in TALKS]


def test_blocks_come_back(run: Run, tokenizer: PreTrainedTokenizerBase) -> None:
    """What the device forgot is loaded: all but the last, unfinished block of every prompt."""
    assert run.cached_first == [0] * len(TWENTY)
    full = [(len(ledger.prompt(tokenizer)) - 1) // BLOCK * BLOCK for ledger in TWENTY]
    assert run.cached_again == full
    assert all(one >= other for one, other in zip(run.cached_second, full, strict=False))
    assert run.counts["scx:kv_blocks_opened"] >= sum(full) // BLOCK
    assert run.counts["scx:kv_blocks_refused"] == 0


def test_requests_were_preempted(run: Run) -> None:
    """Eight at once do not fit, so a request loses its blocks half way and gets them back; its tokens are above."""
    assert run.counts["vllm:num_preemptions"] > 0


def test_host_memory_holds_noise(run: Run) -> None:
    assert len(run.host) >= 60
    assert_noise(run.host[:48].ravel())


def test_host_memory_holds_no_row_of_the_device(run: Run) -> None:
    """No two neighbouring features that lie in the device's pages lie in host memory; in the pages all do, and they
    are no noise."""
    assert len(run.device) > 1_000_000
    assert chi_square_excess(run.device.view(np.uint8)) > 1000
    assert count_of(run.device, run.device.view(np.uint8)) == len(run.device)
    assert count_of(run.device, run.host.ravel()) == 0


def test_host_memory_is_given_back(run: Run) -> None:
    assert not regions(ENGINE_ID)
