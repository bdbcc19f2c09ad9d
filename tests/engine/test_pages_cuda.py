"""The backend for CUDA, as far as it runs without one: what it chooses and refuses, and its layers on the host."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from vllm.platforms.interface import DeviceCapability
from vllm.v1.attention.backend import AttentionCGSupport
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheLayout, compute_layout_strides

from scx.vllm.pages.cuda import SealedCUDABackend, SealedCUDAImpl, SealedLayer
from scx.vllm.pages.format import PageFormat
from scx.vllm.pages.paged import position_of
from scx.vllm.pages.process import page_key

HEADS, TOKENS, SIZE, BLOCKS = 2, 16, 64, 6


def valid(**changed: Any) -> list[str]:
    given = {
        "head_size": 128, "dtype": torch.bfloat16, "kv_cache_dtype": "auto", "block_size": 16, "use_mla": False,
        "has_sink": False, "use_sparse": False, "use_mm_prefix": False, "use_per_head_quant_scales": False,
        "device_capability": DeviceCapability(9, 0), "attn_type": "decoder",
    }  # fmt: skip
    return SealedCUDABackend.validate_configuration(**given | changed)


def test_what_is_taken_and_what_is_refused() -> None:
    assert valid() == valid(dtype=torch.float32, head_size=80) == valid(has_sliding_window=True) == []
    for changed, named in [
        ({"head_size": 80}, "80 features in half precision"),
        ({"head_size": 512}, "head_size"),
        ({"kv_cache_dtype": "fp8"}, "kv_cache_dtype"),
        ({"has_sink": True}, "sinks"),
        ({"use_mla": True}, "MLA"),
        ({"attn_type": "encoder_only"}, "attention type"),
        ({"use_non_causal": True}, "non-causal"),
    ]:
        assert any(named in reason for reason in valid(**changed)), changed
    builder = SealedCUDABackend.get_builder_cls()
    assert builder._cudagraph_support == AttentionCGSupport.NEVER


@pytest.mark.parametrize(
    ("changed", "named"),
    [({"logits_soft_cap": 30.0}, "cap"), ({"alibi_slopes": [1.0] * 4}, "ALiBi"), ({"chunk_lookback": 1}, "chunked")],
)
def test_layers_that_are_refused(changed: dict[str, Any], named: str) -> None:
    given = {"alibi_slopes": None, "sliding_window": None, "kv_cache_dtype": "auto"} | changed
    with pytest.raises(NotImplementedError, match=f"SCX_SEAL_PAGES=1 on CUDA.*{named}"):
        SealedCUDAImpl(2 * HEADS, SIZE, 0.125, HEADS, **given)


@pytest.mark.parametrize("window", [None, 7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_layer_on_the_host(dtype: torch.dtype, window: int | None) -> None:
    """vLLM's calls, on a cache as vLLM lays it out; attention is plain attention, and pages move by their bytes."""
    page_key().prepare(torch.device("cpu"))
    spec = SealedCUDABackend.customize_spec(
        FullAttentionSpec(block_size=TOKENS, num_kv_heads=HEADS, head_size=SIZE, dtype=dtype)
    )
    strides = compute_layout_strides(spec, BLOCKS, 1, KVCacheLayout.LBNHC)[1:]
    assert SealedCUDABackend.supported_kv_cache_layouts() == (KVCacheLayout.LBNHC,)
    raw = torch.zeros(BLOCKS * spec.page_size_bytes, dtype=torch.int8)
    shape = (BLOCKS, HEADS, TOKENS, spec.state_content_size_bytes)
    cache = raw.as_strided(shape, strides).view(dtype)

    impl = SealedCUDAImpl(2 * HEADS, SIZE, SIZE**-0.5, HEADS, None, window, "auto")
    form = PageFormat(HEADS, TOKENS, SIZE, dtype, spec.state_content_size_bytes - 2 * SIZE * dtype.itemsize)
    impl.layer = SealedLayer("on the host", form, 0)
    layer = SimpleNamespace(layer_name="on the host")

    table = torch.tensor([[3, 1], [5, 0]], dtype=torch.int32)
    slots = torch.cat((position_of(table, TOKENS, 20)[0], position_of(table, TOKENS, 5)[1], torch.tensor([-1])))
    key, value = torch.randn(2, 26, HEADS, SIZE).to(dtype)
    impl.do_kv_cache_update(layer, key, value, cache, slots)

    def check() -> None:
        query = torch.randn(4, 2 * HEADS, SIZE).to(dtype)
        metadata = SimpleNamespace(
            num_actual_tokens=4, causal=True, mm_prefix_range_tensor=None, query_lengths=[3, 1], kv_lengths=None,
            seq_lens=torch.tensor([20, 5], dtype=torch.int32), position=position_of(table, TOKENS, 20),
        )  # fmt: skip
        out = torch.full_like(query, torch.nan)
        impl.forward(layer, query, key, value, cache, metadata, out)
        for own, rows in ((slice(0, 3), slice(0, 20)), (slice(3, 4), slice(20, 25))):
            q, k, v = (x.double().transpose(0, 1) for x in (query[own], key[rows], value[rows]))
            k, v = (x.repeat_interleave(2, 0) for x in (k, v))
            last = torch.arange(k.shape[1] - q.shape[1], k.shape[1])[:, None]
            seen = torch.arange(k.shape[1])
            mask = (seen <= last) & (seen > last - (window or 99))
            expected = F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(0, 1)
            # A few roundings of values that are at most about four.
            assert (out[own].double() - expected).abs().max() < 16 * torch.finfo(dtype).eps

    check()
    page = raw[3 * spec.page_size_bytes :][: spec.page_size_bytes]
    other = raw[4 * spec.page_size_bytes :][: spec.page_size_bytes]
    plain = impl.layer.plain(page)
    expected = torch.cat((key[:TOKENS], value[:TOKENS]), dim=2)
    assert torch.equal(plain, expected.reshape(-1).view(torch.uint8))
    impl.layer.write_plain(other, plain)
    page.zero_()
    table[0, 0] = 4
    check()
    # Nothing of this reads a page that was never written as anything but zeros.
    assert not impl.layer.plain(raw[: spec.page_size_bytes].zero_()).any()
