"""vLLM's attention on CUDA, over pages that are sealed in memory: `--attention-backend CUSTOM`.

Rows are sealed into their pages, and attention takes their keystream off in registers (`scx.vllm.pages.paged`). What
was wrong on a GPU elsewhere is refused here too. Graphs are not captured: this backend has not run on a GPU yet.
"""

from typing import Any, ClassVar

import torch
from torch import Tensor
from vllm.config import VllmConfig, get_layers_from_vllm_config
from vllm.distributed import get_tensor_model_parallel_rank
from vllm.model_executor.layers.attention import Attention
from vllm.v1.attention.backend import AttentionCGSupport, AttentionType
from vllm.v1.attention.backends.triton_attn import (
    TritonAttentionBackend,
    TritonAttentionImpl,
    TritonAttentionMetadata,
    TritonAttentionMetadataBuilder,
)
from vllm.v1.kv_cache_interface import KVCacheLayout

from scx.devices import upload
from scx.vllm.pages.format import PageFormat, check_config, sealed_spec
from scx.vllm.pages.layers import owner_of
from scx.vllm.pages.paged import (
    FEW_QUERIES,
    PagedRows,
    attend,
    paged_rows,
    plain_pages,
    position_of,
    seal_pages,
    write_rows,
)
from scx.vllm.pages.process import page_key
from scx.vllm.pages.registry import enter
from scx_kernels.sealing import Sealing

__all__ = ["SealedCUDABackend"]

_ALIGNED_ELEMENTS = 16  # Triton reads rows at whole multiples of so many elements by vectors


class SealedLayer:
    """The sealed pages of one layer."""

    def __init__(self, name: str, format: PageFormat, first_head: int) -> None:
        self.format, self.first_head = format, first_head
        self.number = page_key().layer(name)
        self._rows: tuple[Tensor, PagedRows] | None = None

    def seal(self, writes: Tensor) -> Sealing:
        """How rows with these write numbers (B, N) are sealed."""
        return page_key().sealing(writes, self.number, self.first_head)

    def rows(self, cache: Tensor) -> PagedRows:
        """All rows of the layer's cache."""
        if self._rows is None or self._rows[0] is not cache:
            # (B, H, N, C) with tokens outside of heads: so they lie, and a page is one row.
            self._rows = cache, paged_rows(cache.transpose(1, 2).view(len(cache), -1), self.format)
        return self._rows[1]

    def plain(self, page: Tensor) -> Tensor:
        """`scx.vllm.pages.plain_bytes`."""
        count = self.format.check_pages(page)
        rows = paged_rows(page.view(count, -1), self.format)
        return plain_pages(rows, self.seal).contiguous().view(torch.uint8).flatten()

    def write_plain(self, page: Tensor, plain: Tensor) -> None:
        """`scx.vllm.pages.write_plain`."""
        form = self.format
        count = form.check_pages(page)
        form.check_plain(plain, count)
        # Others may write at the same time in another stream, so these numbers are the host's.
        numbers = upload(page_key().pages.take(count * form.tokens), page.device)
        shape = (count * form.tokens, form.heads, 2 * form.head_dim)
        plain = plain.contiguous().view(torch.uint8).clone().view(form.dtype).view(shape)
        seal_pages(paged_rows(page.view(count, -1), form), plain, numbers, self.seal)


class SealedCUDAImpl(TritonAttentionImpl):
    """Attention of a layer on its sealed pages."""

    layer: SealedLayer | None = None

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.supports_quant_query_input = False
        refused = {
            f"a cache of {self.kv_cache_dtype}": self.kv_cache_dtype not in ("auto", "float16", "bfloat16"),
            f"attention of type {self.attn_type}": self.attn_type != AttentionType.DECODER,
            "linear biases (ALiBi)": self.alibi_slopes is not None,
            "a cap on scores": bool(self.logits_soft_cap),
            "attention sinks": self.sinks is not None,
            "chunked local attention": self.chunk_lookback != -1,
        }
        # The model is being built: this fails the server's start, not a request.
        for what, is_there in refused.items():
            if is_there:
                raise NotImplementedError(f"SCX_SEAL_PAGES=1 on CUDA does not take {what}")

    def fused_output_quant_supported(self, quant_key: Any) -> bool:
        return False

    def do_kv_cache_update(
        self, layer: Any, key: Tensor, value: Tensor, kv_cache: Tensor, slot_mapping: Tensor
    ) -> None:
        own: SealedLayer = owner_of(self, layer)
        tokens = len(slot_mapping)
        counter = page_key().counter(kv_cache.device)
        write_rows(own.rows(kv_cache), key[:tokens], value[:tokens], slot_mapping, counter, own.seal)

    def forward(
        self, layer: Any, query: Tensor, key: Tensor, value: Tensor, kv_cache: Tensor,
        attn_metadata: TritonAttentionMetadata | None, output: Tensor, output_scale: Tensor | None = None,
        output_block_scale: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        if attn_metadata is None:
            return output.fill_(0)
        # Both are a step's own to ask for, though nothing that was taken at start does: a wrong answer would be silent.
        if output_scale is not None or output_block_scale is not None:
            raise NotImplementedError("SCX_SEAL_PAGES=1 on CUDA does not take quantised output")
        if attn_metadata.causal is not True or attn_metadata.mm_prefix_range_tensor is not None:
            raise NotImplementedError("SCX_SEAL_PAGES=1 on CUDA does not take attention that is not causal")
        own, tokens = owner_of(self, layer), attn_metadata.num_actual_tokens
        left = self.sliding_window[0]
        attend(
            query[:tokens], own.rows(kv_cache), attn_metadata.position, attn_metadata.seq_lens,
            attn_metadata.query_lengths, attn_metadata.kv_lengths, own.seal, output[:tokens],
            softmax_scale=self.scale, window=None if left < 0 else left + 1,
        )  # fmt: skip
        return output


class SealedCUDAMetadataBuilder(TritonAttentionMetadataBuilder):
    """Stock metadata, with each token's slot and the lengths that the host needs."""

    _cudagraph_support = AttentionCGSupport.NEVER

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: VllmConfig, device: Any) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        check_config(vllm_config)
        if kv_cache_spec.page_size_padded is not None:
            raise NotImplementedError("SCX_SEAL_PAGES=1 on CUDA does not take layers whose pages differ in size")
        page_key().prepare(torch.empty(0, device=device).device)
        heads, size, dtype = kv_cache_spec.num_kv_heads, kv_cache_spec.head_size, kv_cache_spec.dtype
        spare = kv_cache_spec.state_content_size_bytes - 2 * size * dtype.itemsize
        form = PageFormat(heads, kv_cache_spec.block_size, size, dtype, spare)
        layers = get_layers_from_vllm_config(vllm_config, Attention, layer_names)
        for name, layer in layers.items():
            if layer.impl.kv_sharing_target_layer_name is None:
                layer.impl.layer = SealedLayer(name, form, get_tensor_model_parallel_rank() * heads)
                enter(name, layer.impl.layer)

    def build(self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False) -> Any:
        metadata = super().build(common_prefix_len, common_attn_metadata, fast_build)
        metadata.query_lengths = common_attn_metadata.query_start_loc_cpu.diff().tolist()
        metadata.kv_lengths = None
        if max(metadata.query_lengths, default=0) > FEW_QUERIES:
            metadata.kv_lengths = metadata.seq_lens.tolist()  # waits for the device, in steps that read a prompt
        metadata.position = position_of(metadata.block_table, self.block_size, metadata.max_seq_len)
        return metadata


class SealedCUDABackend(TritonAttentionBackend):
    """Sealed pages, under the name `CUSTOM`."""

    supported_kv_cache_dtypes: ClassVar[list[str]] = ["auto", "float16", "bfloat16"]

    @staticmethod
    def get_name() -> str:
        return "CUSTOM"

    @classmethod
    def customize_spec(cls, spec: Any) -> Any:
        return sealed_spec(spec, _ALIGNED_ELEMENTS * spec.dtype.itemsize)

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
        return (KVCacheLayout.LBNHC,)

    @classmethod
    def supports_attn_type(cls, attn_type: str) -> bool:
        return attn_type == AttentionType.DECODER

    @classmethod
    def supports_non_causal(cls) -> bool:
        return False

    @classmethod
    def supports_mm_prefix(cls) -> bool:
        return False

    @classmethod
    def supports_sink(cls) -> bool:
        return False

    @classmethod
    def supports_alibi_sqrt(cls) -> bool:
        return False

    @classmethod
    def supports_rswa(cls) -> bool:
        return False

    @classmethod
    def supports_batch_invariance(cls) -> bool:
        return False

    @classmethod
    def supports_combination(cls, head_size: int, dtype: torch.dtype, *args: Any, **options: Any) -> str | None:
        if head_size & (head_size - 1) and dtype.itemsize == 2:
            return f"on a sealed cache, heads of {head_size} features in half precision gave wrong results on a GPU"
        return None

    @classmethod
    def supports_head_size(cls, head_size: int) -> bool:
        return 32 <= head_size <= 256

    @staticmethod
    def get_impl_cls() -> type[SealedCUDAImpl]:
        return SealedCUDAImpl

    @staticmethod
    def get_builder_cls() -> type[SealedCUDAMetadataBuilder]:
        return SealedCUDAMetadataBuilder
