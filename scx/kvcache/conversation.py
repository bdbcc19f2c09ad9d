"""What the caches of both placements have in common: they belong to a session, and are divided between two sides."""

from collections.abc import Iterable, Iterator
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache

__all__ = ["CachePart", "ConversationCache", "places"]


class CachePart(Protocol):
    """One side's part of a divided cache."""

    def join(self, cpu_kvcache: Any) -> Cache:
        """The whole cache, of the untrusted part, which this is, and the secure one. Raises ValueError if they are not
        the two parts of one cache."""


class ConversationCache(DynamicCache):
    """The cache of a session, in whichever placement its model is. `session_id` is public."""

    session_id: str
    layers: list[Any]
    has_cut_gradients: bool = False  # somebody asked for gradients of rows here, through which none go

    def divide(
        self,
        gpu_layers: Iterable[int],
        gpu_device: torch.device | str | None = None,
        cpu_device: torch.device | str = "cpu",
    ) -> tuple[CachePart, CachePart]:
        """(untrusted part, secure part), as `split_kvcache_dynamic` returns them, with its arguments and errors."""
        # Not an abstract method: a plain cache becomes one of ours by its class, and nothing would ask for it.
        raise NotImplementedError(f"a {type(self).__name__} is the cache of no placement")

    def update(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """What a plain model would call; its K and V must not be mixed with encoded ones."""
        raise RuntimeError(
            "a plain model was given an encoded cache: encode the model, or decode the cache of a fused one with "
            "decode_kvcache"
        )

    def __iter__(self) -> Iterator[tuple[Tensor | None, ...]]:
        """What a plain cache would be filled with."""
        raise RuntimeError(
            "K and V of an encoded cache go into no plain one as they are: decode_kvcache gives a plain cache, and "
            "`layers` what is stored"
        )


def places(name: str, index: Any, count: int) -> Tensor:
    """Which of `count` rows or tokens are meant, (n,) int64 in 0..count-1.

    Args:
        name: of the argument, for errors.
        index: (n,) integers, negative ones from the end, or (count,) bool; a tensor or a list.

    Raises: TypeError; IndexError for none and for what is not there. The range of numbers on an accelerator is not
        checked, since nobody waits for them.
    """
    given = torch.as_tensor(index)
    if given.dtype == torch.bool:
        if given.shape != (count,):
            raise IndexError(f"{name}: expected a mask ({count},), got {tuple(given.shape)}")
        given = given.nonzero().flatten()
    if given.dim() != 1 or given.dtype not in (torch.int64, torch.int32, torch.int16, torch.int8):
        raise TypeError(f"{name}: expected (n,) integers or ({count},) bool, got {tuple(given.shape)} {given.dtype}")
    if not len(given):
        raise IndexError(f"{name}: expected at least one of {count}, got none")
    if given.device.type == "cpu":
        low, high = (int(x) for x in given.aminmax())
        if low < -count or high >= count:
            raise IndexError(f"{name}: expected {-count}..{count - 1}, got {low}..{high}")
    given = given.long()
    return torch.where(given < 0, given + count, given)
