"""What seals the pages of this process: a key that lives as long as it does, numbers for layers, and write numbers.

The key is drawn when a process seals its first page and is never written down, so what is left of pages when it has
ended (swap, dumps, memory given back) is noise for good. A forked child draws its own: parent and child would otherwise
give out the same numbers under one key.

Write numbers have 60 bits (`scx_kernels.sealing`). The lower half of them is for what attention writes, from a counter
that lies where the writes happen; the upper half for pages that are written whole, counted on the host. At a million
rows a second either lasts for 18,000 years, and on the host a counter that has run out refuses.
"""

import threading

import torch
from torch import Tensor

from scx.devices import upload
from scx.keystream import Secret
from scx.life import Life, this_life
from scx_kernels.hidden import Hidden
from scx_kernels.sealing import WRITE_LIMIT, Sealing, key_words

__all__ = ["HALF", "Counter", "PageKey", "page_key"]

HALF = WRITE_LIMIT // 2
"""Write numbers below are attention's, those from it on belong to pages that are written whole."""
_LAYERS = 2**16


class Counter:
    """Write numbers from `first` on, each given out once, to any thread."""

    def __init__(self, first: int, end: int) -> None:
        self._next, self._end, self._lock = first, end, threading.Lock()

    def take(self, count: int) -> Tensor:
        """(count,) int64, the next numbers in their order.

        Raises: OverflowError where fewer are left; a worker that is started anew has a fresh key.
        """
        with self._lock:
            first = self._next
            if first + count > self._end:
                raise OverflowError(f"write numbers: {self._end - first} left, {count} asked for; restart the worker")
            self._next = first + count
        return torch.arange(first, first + count)

    def __reduce__(self) -> str:
        raise TypeError("a counter of write numbers is never pickled: its copy would give out the same ones")


class PageKey(Hidden):
    """The key of this process's pages, and who has which numbers under it.

    Attributes:
        rows: write numbers of rows that attention writes, on a CPU. pages: of pages that are written whole.
    """

    __slots__ = ("_counters", "_devices", "_key", "_layers", "_lock", "pages", "rows")

    def __init__(self) -> None:
        self._key = key_words(Secret().reveal())
        self._devices = {torch.device("cpu"): self._key}
        self._counters: dict[torch.device, Tensor] = {}
        self._layers: dict[str, int] = {}
        self._lock = threading.Lock()
        self.rows, self.pages = Counter(1, HALF), Counter(HALF, WRITE_LIMIT)

    def layer(self, name: str) -> int:
        """The number of the layer of this name, by the order in which layers are first asked for.

        Raises: OverflowError for more than 65,536 names.
        """
        with self._lock:
            number = self._layers.setdefault(name, len(self._layers))
        if number >= _LAYERS:
            raise OverflowError(f"layer {name}: expected at most {_LAYERS} layers in a process")
        return number

    def prepare(self, device: torch.device) -> None:
        """Bring the key to `device`, and start counting there. Before any graph is captured: a counter that a graph
        made would start anew whenever it is replayed."""
        with self._lock:
            if device not in self._counters:
                self._devices[device] = upload(self._key, device)
                self._counters[device] = torch.ones(1, dtype=torch.int64, device=device)

    def counter(self, device: torch.device) -> Tensor:
        """(1,) int64 on `device`, the next write number of attention's there; who takes some adds to it in the stream.

        Two streams must not do so at once.

        Raises: LookupError for a device that is not prepared.
        """
        if device not in self._counters:
            raise LookupError(f"device: expected one that was prepared, got {device}")
        return self._counters[device]

    def sealing(self, writes: Tensor, layer: int, first_head: int) -> Sealing:
        """How rows with these write numbers (B, N), on a CPU or a device that was prepared, are sealed."""
        key = self._devices.get(writes.device)
        if key is None:
            raise LookupError(f"device: expected one that was prepared, got {writes.device}")
        return Sealing(key, writes, layer, first_head=first_head)


_held: tuple[Life, PageKey] | None = None
_lock = threading.Lock()


def page_key() -> PageKey:
    """This process's, drawn when it is first asked for."""
    global _held
    life = this_life()
    with _lock:
        if _held is None or _held[0] != life:
            _held = life, PageKey()
        return _held[1]
