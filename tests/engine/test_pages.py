"""The paged cache sealed in memory (`SCX_SEAL_PAGES=1`): plain vLLM's tokens, from pages that are noise."""

from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from engine import sealed_pages
from engine.bytes_seen import assert_noise, count_of
from engine.engines import BLOCK, FEW_BLOCKS, answers, counted, engine, transfer
from engine.ledgers import TWENTY
from engine.plain import Plain
from transformers import PreTrainedTokenizerBase
from vllm.config import KVTransferConfig
from vllm.v1.attention.backends import registry
from vllm.v1.kv_cache_interface import FullAttentionSpec

from scx.vllm.pages import are_sealed, plain_bytes, register_pages
from scx.vllm.pages.format import check_config, sealed_spec

SEALED = {"SCX_SEAL_PAGES": "1"}


@dataclass
class Run:
    """What an engine answered, and what lay in its pages."""

    first: list[list[int]]
    again: list[list[int]]
    anew: list[list[int]]
    cached_again: list[int]
    cached_anew: list[int]
    implementations: set[str]
    layer_numbers: list[int]
    pages: np.ndarray
    plain_pages: np.ndarray
    write_numbers: np.ndarray
    pages_anew: int
    same: float
    is_clear: bool


@pytest.fixture(scope="module")
def prompts(tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    return [ledger.prompt(tokenizer) for ledger in TWENTY]


@pytest.fixture(scope="module")
def run(model: Path, prompts: list[list[int]]) -> Run:
    with engine(model, SEALED) as llm:
        first, _ = answers(llm, prompts)
        looks = (sealed_pages.pages, sealed_pages.plain_pages, sealed_pages.write_numbers)
        pages, plain_pages, write_numbers = (llm.collective_rpc(look)[0] for look in looks)
        again, cached_again = answers(llm, prompts)
        pages_anew, same = llm.collective_rpc(sealed_pages.seal_anew)[0]
        anew, cached_anew = answers(llm, prompts)
        return Run(
            first=first,
            again=again,
            anew=anew,
            cached_again=cached_again,
            cached_anew=cached_anew,
            implementations=llm.collective_rpc(sealed_pages.implementations)[0],
            layer_numbers=llm.collective_rpc(sealed_pages.layer_numbers)[0],
            pages=pages,
            plain_pages=plain_pages,
            write_numbers=write_numbers,
            pages_anew=pages_anew,
            same=same,
            is_clear=llm.collective_rpc(sealed_pages.scratch_is_clear)[0],
        )


def test_tokens_are_plain_vllms(run: Run, plain: Plain) -> None:
    assert run.implementations == {"SealedCPUImpl"}
    assert run.first == [plain.tokens[ledger] for ledger in TWENTY]


def test_prefixes_are_read_from_sealed_pages(run: Run) -> None:
    assert run.again == run.first
    assert min(run.cached_again) >= 64


def test_pages_that_went_through_plain_bytes_are_read(run: Run) -> None:
    """Off-loading's way: unsealed, and sealed again under fresh numbers; attention gives the same."""
    assert run.anew == run.first
    assert run.cached_anew == run.cached_again
    assert run.pages_anew > 30 * 20 * 3  # layers, prompts, blocks
    assert run.same < 0.01  # of bytes, one of 256 by chance


def test_pages_are_noise(run: Run) -> None:
    assert run.pages.nbytes > 8e6
    assert_noise(run.pages.flatten())


def test_pages_hold_no_plain_row(run: Run) -> None:
    words = np.unique(run.plain_pages.view(np.uint64))
    assert count_of(words, words.view(np.uint8)) == len(words) > 1e6
    assert count_of(words, run.pages.flatten()) == 0
    assert np.isfinite(run.plain_pages.view(np.float32)).all()


def test_no_write_number_is_used_twice(run: Run) -> None:
    """Numbers are told apart within a layer, and layers by theirs."""
    assert sorted(run.layer_numbers) == list(range(len(run.layer_numbers)))
    for numbers in run.write_numbers:
        assert len(np.unique(numbers)) == numbers.size


def test_nothing_plain_is_left_between_steps(run: Run) -> None:
    assert run.is_clear


def test_preempted_requests(model: Path, prompts: list[list[int]], plain: Plain) -> None:
    with engine(model, SEALED, num_gpu_blocks_override=FEW_BLOCKS, enable_prefix_caching=False) as llm:
        before = counted()
        found, _ = answers(llm, prompts, tokens=48)
        after = counted()
    assert [tokens[:16] for tokens in found] == [plain.tokens[ledger] for ledger in TWENTY]
    assert after["vllm:num_preemptions"] > before.get("vllm:num_preemptions", 0)


def test_blocks_come_back_into_sealed_pages(
    model: Path, prompts: list[list[int]], plain: Plain, master_key: Path
) -> None:
    """Off-loaded under a tenant's key, since that of the pages is the process's own."""
    environment = SEALED | {"SCX_MASTER_KEY_FILE": str(master_key)}
    settings = {"kv_transfer_config": transfer(tenant="alice"), "num_gpu_blocks_override": FEW_BLOCKS}
    with engine(model, environment, **settings) as llm:
        first, _ = answers(llm, prompts)
        assert llm.reset_prefix_cache()
        again, cached = answers(llm, prompts)
        counts = counted()
        pages = llm.collective_rpc(sealed_pages.pages)[0]
    assert first == again == [plain.tokens[ledger] for ledger in TWENTY]
    assert cached == [(len(prompt) - 1) // BLOCK * BLOCK for prompt in prompts]
    assert counts["scx:kv_blocks_opened"] >= sum(cached) // BLOCK
    assert counts["scx:kv_blocks_refused"] == 0
    assert_noise(pages.flatten())


@pytest.mark.parametrize("dtype", ["bfloat16"])
def test_half_precision(model: Path, prompts: list[list[int]], dtype: str) -> None:
    """Bit for bit what plain pages give: rows are moved, not rounded."""
    found = []
    for environment in ({}, SEALED):
        with engine(model, environment, dtype=dtype) as llm:
            found.append(answers(llm, prompts)[0])
    assert found[0] == found[1]


def test_three_ranks(model: Path, prompts: list[list[int]], plain: Plain) -> None:
    """A key/value head a rank, each under a key of its own."""
    environment = {**SEALED, "VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"}
    with engine(model, environment, tensor_parallel_size=3) as llm:
        found, _ = answers(llm, prompts[:4], tokens=8)
        assert llm.collective_rpc(sealed_pages.first_heads) == [{0}, {1}, {2}]
    assert found == [plain.tokens[ledger][:8] for ledger in TWENTY[:4]]


def spec(**changed: Any) -> FullAttentionSpec:
    return FullAttentionSpec(
        **{"block_size": 32, "num_kv_heads": 3, "head_size": 64, "dtype": torch.float32, **changed}
    )


def test_pages_grow_by_their_write_numbers() -> None:
    plain, sealed = spec(), sealed_spec(spec(), 1)
    assert 8 * 32 <= sealed.page_size_bytes - plain.page_size_bytes <= 0.01 * plain.page_size_bytes
    assert sealed_spec(sealed, 1) == sealed


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"dtype": torch.float8_e4m3fn}, "float8"),
        ({"head_size_v": 32}, "V of 32 features"),
        ({"head_size": 512}, "2048 bytes"),
        ({"num_head_slots": 1}, "packed"),
        ({"state_content_bytes": 777}, "777 bytes"),
    ],
)
def test_specs_that_are_not_sealed_are_refused(changed: dict[str, Any], named: str) -> None:
    with pytest.raises(NotImplementedError, match=f"SCX_SEAL_PAGES=1.*{named}"):
        sealed_spec(spec(**changed), 1)


def test_backends_that_seal_nothing_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_ATTN_OVERRIDES", {})
    monkeypatch.setattr(registry, "_MAMBA_ATTN_OVERRIDES", {})
    monkeypatch.setenv("SCX_SEAL_PAGES", "1")
    register_pages()
    attention, state = registry.AttentionBackendEnum, registry.MambaAttentionBackendEnum
    assert attention.CPU_ATTN.get_class().__name__ == "SealedCPUBackend"
    assert attention.CUSTOM.get_path().endswith("SealedCUDABackend")
    for backend in (attention.CPU_MLA, attention.FLASH_ATTN, attention.TRITON_ATTN, state.MAMBA2):
        with pytest.raises(NotImplementedError, match="unsealed"):
            backend.get_class().get_impl_cls()
    assert attention.FLASH_ATTN.get_class().validate_configuration(head_size=64) != []


def config(connector: str | None = None, dbo: bool = False, fast_prefill: bool = False) -> SimpleNamespace:
    """What is read of a `VllmConfig`."""
    transfer = None if connector is None else KVTransferConfig(kv_connector=connector, kv_role="kv_both")
    return SimpleNamespace(
        kv_transfer_config=transfer,
        parallel_config=SimpleNamespace(use_ubatching=dbo),
        cache_config=SimpleNamespace(kv_sharing_fast_prefill=fast_prefill),
    )


def test_what_would_share_pages_is_refused() -> None:
    check_config(config())
    check_config(config("SCXSealedOffloading"))
    for given, named in (({"connector": "OffloadingConnector"}, "OffloadingConnector"), ({"dbo": True}, "enable-dbo")):
        with pytest.raises(NotImplementedError, match=named):
            check_config(config(**given))
    with pytest.raises(NotImplementedError, match="fast-prefill"):
        check_config(config(fast_prefill=True))


@pytest.mark.parametrize("value", ["2", "true", "yes"])
def test_other_values_are_refused(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("SCX_SEAL_PAGES", value)
    with pytest.raises(ValueError, match="SCX_SEAL_PAGES: expected 0 or 1"):
        are_sealed()


def test_unknown_layers_are_refused() -> None:
    with pytest.raises(LookupError, match="layer_name"):
        plain_bytes(torch.zeros(8, dtype=torch.uint8), "a layer of nobody")
