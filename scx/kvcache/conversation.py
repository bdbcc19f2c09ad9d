"""What the caches of both placements have in common: they belong to a session, are divided between two sides, and one
pass or operation at a time works on them."""

import threading
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache

__all__ = ["CachePart", "Claim", "ConversationCache", "places", "working_on"]


class Claim:
    """Whether a pass or an operation works on a cache. Caches over the same layers have one; a copy has its own."""

    def __init__(self) -> None:
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[type["Claim"], tuple[()]]:
        return Claim, ()

    @classmethod
    @torch.compiler.disable  # who works on what is no constant of a program
    def of(cls, cache: Any) -> "Claim":
        """The claim of a cache, plain ones among them: an encoded model fills them."""
        claim: Claim = vars(cache).setdefault("_claim", cls())  # of two threads that ask first, one makes it
        return claim

    @contextmanager
    def held(self, name: str) -> Iterator[None]:
        """For a `with` block. Raises RuntimeError, naming argument or operation, while another one holds it."""
        if not self._lock.acquire(blocking=False):
            raise RuntimeError(
                f"{name}: another pass or operation on this cache has not ended. One at a time: a second conversation "
                "goes on from a copy of its own (copy.deepcopy)"
            )
        try:
            yield
        finally:
            self._lock.release()


@contextmanager
def working_on(name: str, *caches: Any) -> Iterator[None]:
    """Claim caches, or those that parts are of, for a `with` block, each once; what is neither is left alone.

    Raises: RuntimeError naming the argument or operation `name` if one of them is claimed.
    """
    whole = (getattr(cache, "conversation", cache) for cache in caches)
    claims = {id(claim): claim for claim in (Claim.of(cache) for cache in whole if isinstance(cache, Cache))}
    with ExitStack() as stack:
        for claim in claims.values():
            stack.enter_context(claim.held(name))
        yield


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
