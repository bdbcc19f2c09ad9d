"""The sealed layers of this process, by name: for whoever takes whole pages out of the cache or puts them in."""

from typing import Protocol

from torch import Tensor

from scx.vllm.pages.format import PageFormat

__all__ = ["SealedPages", "enter", "plain_bytes", "plain_size", "write_plain"]


class SealedPages(Protocol):
    """A layer whose pages are sealed."""

    format: PageFormat

    def plain(self, page: Tensor) -> Tensor: ...

    def write_plain(self, page: Tensor, plain: Tensor) -> None: ...


_layers: dict[str, SealedPages] = {}


def enter(name: str, layer: SealedPages) -> None:
    """Have pages of the layer of this name be read and written by `layer`, in place of one that had the name before."""
    _layers[name] = layer


def _layer(name: str) -> SealedPages:
    if name not in _layers:
        raise LookupError(f"layer_name: expected one whose pages are sealed, got {name!r} ({len(_layers)} are known)")
    return _layers[name]


def plain_size(size: int, layer_name: str) -> int:
    """How many bytes `plain_bytes` gives for a page of `size` bytes.

    Raises: LookupError, as `plain_bytes`; ValueError for a size that is not of whole pages.
    """
    form = _layer(layer_name).format
    if size <= 0 or size % form.page_bytes:
        raise ValueError(f"size: expected a multiple of {form.page_bytes}, got {size}")
    return size // form.page_bytes * form.plain_bytes


def plain_bytes(page: Tensor, layer_name: str) -> Tensor:
    """K and V of a page, unsealed, without write numbers; of rows that were never written, zeros.

    Args:
        page: (bytes,) uint8 or int8, contiguous, 8-byte aligned, on the cache's device: a page as it lies, or several
            that follow each other.
        layer_name: vLLM's, of the layer whose page it is.

    Returns: (plain bytes,) uint8 in fresh memory, in the order in which the device's attention has them.
    Raises: LookupError for a name that has no sealed pages; TypeError, ValueError for a page that does not fit.
    """
    return _layer(layer_name).plain(page)


def write_plain(page: Tensor, layer_name: str, plain: Tensor) -> None:
    """Seal K and V into a page, under fresh write numbers, all rows of it.

    Args: page, layer_name: as for `plain_bytes`. plain: what that returned, uint8 or int8, any alignment.

    Raises: as `plain_bytes`; OverflowError when write numbers have run out.
    """
    _layer(layer_name).write_plain(page, plain)
