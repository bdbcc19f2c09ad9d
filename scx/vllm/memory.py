"""How a worker reaches the bytes of a block on its device: as they lie, or behind the seal of the paged cache."""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor
from vllm.v1.kv_offload.base import CanonicalKVCaches

from scx.vllm.pages import plain_bytes, plain_size, write_plain

__all__ = ["DeviceMemory", "PlainMemory", "SealedMemory"]


class DeviceMemory(Protocol):
    """The blocks of a device's cache, by group."""

    groups: int

    def size(self, group: int) -> int:
        """Bytes of a block of a group."""

    def read(self, group: int, block: int) -> list[Tensor]:
        """What a block's pages hold, (bytes,) each, in the order of its layers."""

    def target(self, group: int, block: int) -> list[Tensor]:
        """Where what is opened goes; `put` ends it."""

    def put(self, group: int, block: int, opened: list[Tensor]) -> None:
        """Have the block hold what was opened into its `target`."""


class PlainMemory:
    """Pages as they lie."""

    def __init__(self, kv_caches: CanonicalKVCaches) -> None:
        tensors = [cache.tensor for cache in kv_caches.tensors]
        self._pages = [
            [(tensors[ref.tensor_idx], ref.page_size_bytes) for ref in refs] for refs in kv_caches.group_data_refs
        ]
        self.groups = len(self._pages)
        self._sizes = [sum(size for _, size in refs) for refs in self._pages]

    def size(self, group: int) -> int:
        return self._sizes[group]

    def read(self, group: int, block: int) -> list[Tensor]:
        return [tensor[block, :size] for tensor, size in self._pages[group]]

    def target(self, group: int, block: int) -> list[Tensor]:
        return self.read(group, block)

    def put(self, group: int, block: int, opened: list[Tensor]) -> None:
        """Nothing is left to do."""


class SealedMemory:
    """Pages that are sealed in memory (`scx.vllm.pages`): what leaves is sealed under a tenant's key instead, since the
    pages' own ends with this process.

    Args:
        kv_caches: the device's pages.
        layers: names of each group's layers, in order.

    Raises: ValueError where pages are not one a layer.
    """

    def __init__(self, kv_caches: CanonicalKVCaches, layers: Sequence[Sequence[str]]) -> None:
        self._sealed = PlainMemory(kv_caches)
        self._layers = layers
        found = [len(refs) for refs in kv_caches.group_data_refs]
        if found != [len(names) for names in layers]:
            raise ValueError(
                f"layers: expected a page of each layer, got {found} pages for {[*map(len, layers)]} layers"
            )
        self._sizes = [
            [plain_size(ref.page_size_bytes, name) for ref, name in zip(refs, names, strict=True)]
            for refs, names in zip(kv_caches.group_data_refs, layers, strict=True)
        ]
        self._device = kv_caches.tensors[0].tensor.device
        self.groups = len(found)

    def size(self, group: int) -> int:
        return sum(self._sizes[group])

    def read(self, group: int, block: int) -> list[Tensor]:
        pages = self._sealed.read(group, block)
        return [plain_bytes(page, name) for page, name in zip(pages, self._layers[group], strict=True)]

    def target(self, group: int, block: int) -> list[Tensor]:
        return [torch.empty(size, dtype=torch.uint8, device=self._device) for size in self._sizes[group]]

    def put(self, group: int, block: int, opened: list[Tensor]) -> None:
        pages = self._sealed.read(group, block)
        for page, name, plain in zip(pages, self._layers[group], opened, strict=True):
            write_plain(page, name, plain)
