"""vLLM's attention on a CPU, over pages that are sealed in memory.

Rows are sealed as they are written. Before stock attention reads a layer, the blocks of the batch are unsealed into
scratch, which the next layer overwrites and the last one clears: nothing of the cache lies plain between steps. The
keystream is kept for as long as the batch reads its blocks (`scx.vllm.pages.pads`).

A page is what stock attention packs, (H, 2N, d), and behind it N write numbers.
"""

from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor
from vllm import _custom_ops as ops
from vllm.config import VllmConfig, get_layers_from_vllm_config
from vllm.distributed import get_tensor_model_parallel_rank
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.attention import Attention
from vllm.v1.attention.backend import AttentionType
from vllm.v1.attention.backends.cpu_attn import (
    CPUAttentionBackend,
    CPUAttentionBackendImpl,
    CPUAttentionMetadata,
    CPUAttentionMetadataBuilder,
)
from vllm.v1.kv_cache_interface import KVCacheLayout

from scx.vllm.pages.format import PageFormat, check_config, memory_of, sealed_spec
from scx.vllm.pages.layers import owner_of
from scx.vllm.pages.pads import Pads, Places, Plan
from scx.vllm.pages.process import PageKey, page_key
from scx.vllm.pages.registry import enter
from scx_kernels.hidden import Hidden
from scx_kernels.sealing import BIT_DTYPES, Sealing, blocks_of, cipher_in_place, keystream

__all__ = ["SealedCPUBackend"]

_ALIGNMENT = 1  # of a token; a block's 32 or more make a page of whole int64


_ROWS_AHEAD = 64
# Key, write numbers (n,), and keystream of K and V under them.
_Ahead = tuple[PageKey | None, Tensor, list[Tensor]]
_NOTHING_AHEAD: _Ahead = (None, torch.zeros(0, dtype=torch.int64), [])


class SealedLayer(Hidden):
    """The sealed pages of one layer, and keystream of its rows: key material."""

    __slots__ = ("_ahead", "_views", "first_head", "format", "isa", "number", "pads", "places", "words")

    def __init__(self, name: str, format: PageFormat, first_head: int, isa: str, places: Places) -> None:
        self.format, self.isa, self.places = format, isa, places
        self.first_head = first_head
        self.number = page_key().layer(name)
        self.words = format.plain_bytes // 8
        self.pads = Pads(self.words, format.tokens)
        self._views: tuple[Tensor, tuple[Tensor, Tensor, Tensor, Tensor]] | None = None
        self._ahead: _Ahead = _NOTHING_AHEAD

    def views(self, cache: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """K and V as stock attention takes them, (blocks, H, N, d); all of both, (blocks, words) int64; write numbers,
        (blocks, N) int64."""
        if self._views is None or self._views[0] is not cache:
            stride = cache.stride(0) * cache.element_size()
            blocks, pages = len(cache), cache.view(len(cache), -1)
            bits = memory_of(pages, torch.int64, 0, (blocks, self.words), (stride // 8, 1))
            size, strides = (blocks, self.format.tokens), (stride // 8, 1)
            writes = memory_of(pages, torch.int64, self.format.plain_bytes, size, strides)
            self._views = cache, (*self.split(bits), bits, writes)
        return self._views[1]

    def wipe(self) -> None:
        """Overwrite the keystream that is kept; it is made anew where it is asked for."""
        self.pads.wipe()
        for stream in self._ahead[2]:
            stream.zero_()
        self._ahead = _NOTHING_AHEAD

    def split(self, bits: Tensor) -> tuple[Tensor, Tensor]:
        """K and V, each (blocks, H, N, d), of packed blocks (blocks, words) int64."""
        form = self.format
        words = 8 // form.dtype.itemsize
        rows = 2 * form.tokens
        size = (len(bits), form.heads, rows, form.head_dim)
        strides = (bits.stride(0) * words, rows * form.head_dim, form.head_dim, 1)
        keys, values = memory_of(bits, form.dtype, 0, size, strides).chunk(2, dim=2)
        return keys, values

    def sealing(self, writes: Tensor) -> Sealing:
        """How rows with these write numbers (N,) are sealed."""
        return page_key().sealing(writes[None], self.number, self.first_head)

    def streams(self, writes: Tensor) -> list[Tensor]:
        """Keystream of rows with these numbers (N,): for K and V, (N, H, d) of the cache's dtype."""
        form, sealing = self.format, self.sealing(writes)
        made = []
        for is_value in (False, True):
            words = torch.zeros(1, form.heads, len(writes), 16 * self._row_blocks, dtype=torch.int32)
            if not cipher_in_place(words, sealing, is_value, words):
                words = keystream(sealing, form.heads, words.shape[3], torch.float32, is_value=is_value)
            made.append(words[0].view(form.dtype)[..., : form.head_dim].transpose(0, 1))
        return made

    def _fresh(self, count: int) -> tuple[Tensor, list[Tensor]]:
        """Fresh write numbers (count,) and their keystream. A few rows cost as much as many: more are made at once."""
        key, numbers, streams = self._ahead
        if key is not page_key() or count > len(numbers):
            key = page_key()
            numbers = key.rows.take(max(count, _ROWS_AHEAD))
            streams = self.streams(numbers)
        self._ahead = (key, numbers[count:], [x[count:] for x in streams]) if count < len(numbers) else _NOTHING_AHEAD
        return numbers[:count], [x[:count] for x in streams]

    @property
    def _row_blocks(self) -> int:
        return blocks_of(self.format.head_dim, self.format.dtype.itemsize)

    def pack(self, rows: list[Tensor], packed: tuple[Tensor, Tensor], slots: Tensor) -> None:
        """Put K and V (N, H, d) where attention looks for the rows with these slots; nowhere for those below zero."""
        ops.cpu_attn_reshape_and_cache(*rows, *packed, slots, self.isa, k_scale=1.0, v_scale=1.0, kv_cache_dtype="auto")

    def write(self, key: Tensor, value: Tensor, cache: Tensor, plan: Plan) -> None:
        """Seal K and V (N, H, d) into pages, and keep their keystream."""
        keys, values, bits, writes = self.views(cache)
        self.pads.begin(plan, bits, writes)
        numbers, streams = self._fresh(len(key))
        kind = BIT_DTYPES[self.format.dtype]
        sealed = [
            torch.bitwise_xor(x.view(kind), y.view(kind)).view(x.dtype)
            for x, y in zip((key, value), streams, strict=True)
        ]
        self.pack(sealed, (keys, values), plan.slots)
        self.pack(streams, self.split(self.pads.bits), plan.where)
        where = plan.where
        if plan.real is not None:
            numbers, where = numbers[plan.real], where[plan.real]
        writes[plan.block, plan.offset] = numbers
        self.pads.seen.view(-1)[where] = numbers

    def unsealed(self, cache: Tensor, plan: Plan) -> Tensor:
        """The blocks of a plan in scratch, as a cache (P, H, N, 2d) of their own."""
        _, _, bits, writes = self.views(cache)
        self.pads.reserve(plan)
        missing = self.pads.missing(plan, writes)
        if missing is not None:
            self._restore(missing.nonzero().flatten(), plan, bits, writes)
        count, form = len(plan.blocks), self.format
        scratch = self.places.scratch_for(count * self.words).view(count, self.words)
        torch.index_select(bits, 0, plan.blocks, out=scratch)
        pads = self.pads.bits
        scratch.bitwise_xor_(pads[:count] if plan.rows is None else pads.index_select(0, plan.rows))
        return scratch.view(form.dtype).view(count, form.heads, form.tokens, 2 * form.head_dim)

    def _restore(self, rows: Tensor, plan: Plan, bits: Tensor, writes: Tensor) -> None:
        """Make the pads of these rows of scratch anew."""
        blocks = plan.blocks[rows]
        places = rows if plan.rows is None else plan.rows[rows]
        self.pads.blank(places, blocks, bits, writes)
        numbers = writes[blocks]
        block, offset = ((plan.unseen[rows] == 0) & (numbers != 0)).nonzero(as_tuple=True)
        if not len(block):
            return
        numbers, where = numbers[block, offset], places[block] * self.format.tokens + offset
        self.pack(self.streams(numbers), self.split(self.pads.bits), where)
        self.pads.seen.view(-1)[where] = numbers

    def plain(self, page: Tensor) -> Tensor:
        """`scx.vllm.pages.plain_bytes`."""
        form = self.format
        count = form.check_pages(page)
        bits, writes = self._parts(page, count)
        plain = bits.clone()
        # Rows that were never written are XORed with themselves.
        pads = bits.clone()
        written = (writes != 0).flatten()
        where = torch.arange(len(written)).masked_fill_(~written, -1)
        numbers = writes.flatten()
        self.pack(self.streams(numbers), self.split(pads), where)
        return plain.bitwise_xor_(pads).view(torch.uint8).flatten()

    def write_plain(self, page: Tensor, plain: Tensor) -> None:
        """`scx.vllm.pages.write_plain`."""
        form = self.format
        count = form.check_pages(page)
        form.check_plain(plain, count)
        bits, writes = self._parts(page, count)
        numbers = page_key().pages.take(count * form.tokens)
        pads = torch.empty(count, self.words, dtype=torch.int64)
        self.pack(self.streams(numbers), self.split(pads), torch.arange(len(numbers)))
        plain = plain.contiguous().view(torch.uint8)
        if plain.storage_offset() % 8:
            plain = plain.clone()
        torch.bitwise_xor(plain.view(torch.int64).view(count, self.words), pads, out=bits)
        writes.copy_(numbers.view(count, form.tokens))

    def _parts(self, page: Tensor, count: int) -> tuple[Tensor, Tensor]:
        stride = self.format.page_bytes // 8
        bits = memory_of(page, torch.int64, 0, (count, self.words), (stride, 1))
        size = (count, self.format.tokens)
        return bits, memory_of(page, torch.int64, self.format.plain_bytes, size, (stride, 1))


class SealedCPUImpl(CPUAttentionBackendImpl):
    """Stock attention of a layer, on unsealed scratch."""

    layer: SealedLayer | None = None
    is_last = False

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        # The model is being built: this fails the server's start, not a request. vLLM takes its one backend for a CPU
        # without asking what that supports.
        if self.is_fp8_kv_cache:
            raise NotImplementedError(
                f"SCX_SEAL_PAGES=1 does not seal a cache of {self.kv_cache_dtype}; take --kv-cache-dtype auto"
            )
        if self.attn_type == AttentionType.ENCODER_DECODER:
            raise NotImplementedError("SCX_SEAL_PAGES=1 does not seal what a decoder keeps of its encoder")

    def do_kv_cache_update(
        self, layer: Any, key: Tensor, value: Tensor, kv_cache: Tensor, slot_mapping: Tensor
    ) -> None:
        if self.attn_type != AttentionType.DECODER:
            return  # an encoder stores nothing
        own: SealedLayer = owner_of(self, layer)
        metadata = get_forward_context().attn_metadata
        plan = metadata[layer.layer_name].plan if isinstance(metadata, dict) else None
        if plan is None or not torch.equal(plan.slots, slot_mapping):
            nobody = torch.zeros(0, 1, dtype=torch.int32)
            plan = own.places.plan(nobody, nobody[:, 0], slot_mapping)
        tokens = len(slot_mapping)
        own.write(key[:tokens], value[:tokens], kv_cache, plan)

    def forward(
        self, layer: Any, query: Tensor, key: Tensor, value: Tensor, kv_cache: Tensor,
        attn_metadata: CPUAttentionMetadata | None, output: Tensor, *args: Any, **options: Any,
    ) -> Tensor:  # fmt: skip
        if attn_metadata is None or self.attn_type != AttentionType.DECODER:
            return super().forward(layer, query, key, value, kv_cache, attn_metadata, output, *args, **options)
        own: SealedLayer = owner_of(self, layer)
        plain = own.unsealed(kv_cache, attn_metadata.plan)
        near = attn_metadata.near
        super().forward(layer, query, key, value, plain, near, output, *args, **options)
        if self.is_last:
            plain.zero_()
        return output


class SealedCPUMetadataBuilder(CPUAttentionMetadataBuilder):
    """Stock metadata, with a step's `plan`, and as `near` the metadata of attention on scratch."""

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: VllmConfig, device: Any) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        check_config(vllm_config)
        self.places = Places(kv_cache_spec.block_size)
        if self.is_encoder_only_attention:
            return
        spare = kv_cache_spec.state_content_size_bytes - 2 * self.head_dim * kv_cache_spec.dtype.itemsize
        heads = self.num_kv_heads
        form = PageFormat(heads, self.block_size, self.head_dim, kv_cache_spec.dtype, spare)
        layers = get_layers_from_vllm_config(vllm_config, Attention, layer_names)
        for name, layer in layers.items():
            layer.impl.is_last = name == list(layers)[-1]
            if layer.impl.kv_sharing_target_layer_name is None:
                first_head = get_tensor_model_parallel_rank() * heads
                layer.impl.layer = SealedLayer(name, form, first_head, self.isa, self.places)
                enter(name, layer.impl.layer)

    def build(self, *args: Any, **options: Any) -> CPUAttentionMetadata:
        metadata = super().build(*args, **options)
        if not self.is_encoder_only_attention:
            metadata.plan = self.places.plan(metadata.block_table, metadata.seq_lens, metadata.slot_mapping)
            metadata.near = replace(metadata, block_table=metadata.plan.table)
        return metadata


class SealedCPUBackend(CPUAttentionBackend):
    """Replaces `CPU_ATTN`, whose name it keeps."""

    supported_kv_cache_dtypes: ClassVar[list[str]] = ["auto", "float16", "bfloat16"]

    @classmethod
    def customize_spec(cls, spec: Any) -> Any:
        return sealed_spec(spec, _ALIGNMENT)

    @classmethod
    def supports_attn_type(cls, attn_type: str) -> bool:
        return attn_type != AttentionType.ENCODER_DECODER and super().supports_attn_type(attn_type)

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
        return (KVCacheLayout.LBHNC,)

    @staticmethod
    def get_impl_cls() -> type[SealedCPUImpl]:
        return SealedCPUImpl

    @staticmethod
    def get_builder_cls() -> type[SealedCPUMetadataBuilder]:
        return SealedCPUMetadataBuilder
