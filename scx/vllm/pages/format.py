"""How a sealed page lies in memory, and which layers may have one.

A page of vLLM is (H, N, C): key/value heads, tokens of a block, bytes of a head and token. Sealed, C is a little
larger, and the page is laid out anew, as bytes: the K and V that the device's attention reads, and behind or between
them write numbers, int64, one a token. So numbers move with pages, whoever copies them.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from scx_kernels.chacha import BLOCK_BYTES
from scx_kernels.sealing import BIT_DTYPES

__all__ = ["WRITE_BYTES", "PageFormat", "memory_of", "sealed_spec"]

WRITE_BYTES = 8
_HEAD_BYTES = 16 * BLOCK_BYTES
_CONNECTOR = "SCXSealedOffloading"


@dataclass(frozen=True)
class PageFormat:
    """Sizes of a layer's pages.

    Attributes:
        heads: key/value heads of this rank. tokens: of a block, as attention sees it. head_dim: features.
        dtype: float32, float16 or bfloat16. spare: bytes of a head and token beside its K and V.
    """

    heads: int
    tokens: int
    head_dim: int
    dtype: torch.dtype
    spare: int

    @property
    def pair_bytes(self) -> int:
        """K and V of a head and token."""
        return 2 * self.head_dim * self.dtype.itemsize

    @property
    def plain_bytes(self) -> int:
        """K and V of a page."""
        return self.heads * self.tokens * self.pair_bytes

    @property
    def page_bytes(self) -> int:
        """All of a page."""
        return self.heads * self.tokens * (self.pair_bytes + self.spare)

    def check_pages(self, page: Tensor, name: str = "page") -> int:
        """Of how many pages `page` is the bytes: (count * page_bytes,) uint8 or int8, contiguous.

        Raises: TypeError, ValueError for anything else.
        """
        if page.dtype not in (torch.uint8, torch.int8):
            raise TypeError(f"{name}: expected uint8 or int8, got {page.dtype}")
        if page.dim() != 1 or not page.is_contiguous() or page.numel() % self.page_bytes or not page.numel():
            got = f"{tuple(page.shape)} with strides {page.stride()}"
            raise ValueError(f"{name}: expected contiguous bytes, {self.page_bytes} a page, got {got}")
        return page.numel() // self.page_bytes

    def check_plain(self, plain: Tensor, count: int) -> None:
        """Raises: TypeError, ValueError for anything but (count * plain_bytes,) uint8 or int8."""
        if plain.dtype not in (torch.uint8, torch.int8):
            raise TypeError(f"plain: expected uint8 or int8, got {plain.dtype}")
        if plain.shape != (count * self.plain_bytes,):
            raise ValueError(f"plain: expected ({count * self.plain_bytes},), got {tuple(plain.shape)}")


def spare_bytes(heads: int, head_dim: int, dtype: torch.dtype, alignment: int) -> int:
    """The least spare bytes of a head and token with which a token of all heads has room for its write number and is a
    multiple of `alignment` bytes."""
    pair = 2 * head_dim * dtype.itemsize
    spare = -(-WRITE_BYTES // heads)
    spare += -spare % dtype.itemsize
    while heads * (pair + spare) % alignment:
        spare += dtype.itemsize
    return spare


def sealed_spec(spec: Any, alignment: int) -> Any:
    """A layer's `AttentionSpec` with room for write numbers; one that has it is left as it is.

    Raises: NotImplementedError naming what is not sealed.
    """
    head = spec.head_size * spec.dtype.itemsize
    problem = None
    if spec.dtype not in BIT_DTYPES:
        problem = f"a cache of {spec.dtype}; take --kv-cache-dtype auto"
    elif spec.head_size_v != spec.head_size:
        problem = f"V of {spec.head_size_v} features beside K of {spec.head_size}"
    elif head > _HEAD_BYTES:
        problem = f"heads of {head} bytes, more than {_HEAD_BYTES}"
    elif spec.num_head_slots is not None or spec.tokens_per_state != 1:
        problem = f"packed pages ({spec.num_head_slots} slots, {spec.tokens_per_state} tokens a state)"
    if problem is not None:
        raise NotImplementedError(f"SCX_SEAL_PAGES=1 does not seal {problem}")
    pair = 2 * head
    content = pair + spare_bytes(spec.num_kv_heads, spec.head_size, spec.dtype, alignment)
    if spec.state_content_bytes not in (None, content):
        raise NotImplementedError(f"SCX_SEAL_PAGES=1 does not seal pages of {spec.state_content_bytes} bytes a token")
    return replace(spec, state_content_bytes=content)


def check_config(config: Any) -> None:
    """Refuse what would read or copy pages under another engine's key, or write numbers from two streams at once.

    Args: config: vLLM's `VllmConfig`.
    Raises: NotImplementedError naming it.
    """
    transfer = config.kv_transfer_config
    if transfer is not None and transfer.kv_connector not in (None, _CONNECTOR):
        raise NotImplementedError(
            f"SCX_SEAL_PAGES=1: connector {transfer.kv_connector} would hand out pages that no other worker can read; "
            f"take {_CONNECTOR}"
        )
    if config.parallel_config.use_ubatching:
        raise NotImplementedError("SCX_SEAL_PAGES=1: batches in two streams (--enable-dbo) would share write numbers")
    if config.cache_config.kv_sharing_fast_prefill:
        raise NotImplementedError("SCX_SEAL_PAGES=1 does not take --kv-sharing-fast-prefill, which skips tokens")


def memory_of(
    cache: Tensor, dtype: torch.dtype, offset: int, size: tuple[int, ...], strides: tuple[int, ...]
) -> Tensor:
    """A view of cache's memory as elements of another dtype.

    Args:
        cache: (bytes,) or (pages, bytes) in elements of any dtype, the last dimension contiguous.
        offset: bytes from cache's first element on. size, strides: in elements of `dtype`.

    Raises: ValueError where it does not start at a whole element.
    """
    first = cache.storage_offset() * cache.element_size()
    if first % dtype.itemsize or offset % dtype.itemsize:
        raise ValueError(f"cache: expected memory aligned to {dtype.itemsize} bytes, got byte {first + offset}")
    elements = cache.view(dtype)
    return elements.as_strided(size, strides, elements.storage_offset() + offset // dtype.itemsize)
