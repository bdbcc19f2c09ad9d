"""What a test asks of an engine's worker about its sealed pages; runs in the worker."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from scx.vllm.pages import plain_bytes, write_plain

LOOKED_AT = (0, 13, 29)
"""Layers of which pages are brought out: 46 KB a block and layer."""


def _layers(worker: Any) -> dict[str, Any]:
    return worker.model_runner.compilation_config.static_forward_context


def _full_pages(name: str, layer: Any) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """(page, plain, write numbers) of each block whose tokens are all written."""
    for block in layer.kv_cache:
        page = block.view(-1).view(torch.uint8)
        plain = plain_bytes(page, name)
        numbers = page[len(plain) :].view(torch.int64)[: block.shape[1]]
        if numbers.all():
            yield page, plain, numbers


def implementations(worker: Any) -> set[str]:
    return {type(layer.impl).__name__ for layer in _layers(worker).values()}


def layer_numbers(worker: Any) -> list[int]:
    """How layers are told apart under the key."""
    return [layer.impl.layer.number for layer in _layers(worker).values()]


def first_heads(worker: Any) -> set[int]:
    return {layer.impl.layer.first_head for layer in _layers(worker).values()}


def pages(worker: Any) -> np.ndarray:
    """(layers, blocks, bytes) uint8: of each layer of `LOOKED_AT` its full pages as they lie, without write numbers."""
    return _gathered(worker, lambda page, plain, numbers: page[: len(plain)])


def plain_pages(worker: Any) -> np.ndarray:
    """The same, unsealed."""
    return _gathered(worker, lambda page, plain, numbers: plain)


def write_numbers(worker: Any) -> np.ndarray:
    """(layers, blocks, tokens) int64: theirs."""
    return _gathered(worker, lambda page, plain, numbers: numbers)


def _gathered(worker: Any, part: Callable[[Tensor, Tensor, Tensor], Tensor]) -> np.ndarray:
    chosen = [entry for place, entry in enumerate(_layers(worker).items()) if place in LOOKED_AT]
    return torch.stack([torch.stack([part(*x) for x in _full_pages(*entry)]) for entry in chosen]).numpy()


def seal_anew(worker: Any) -> tuple[int, float]:
    """Take every full page out of the cache and put it back, as off-loading does.

    Returns: how many pages, and which part of their bytes is as before.
    """
    count, same = 0, 0.0
    for name, layer in _layers(worker).items():
        for page, plain, _ in _full_pages(name, layer):
            before = page[: len(plain)].clone()
            write_plain(page, name, plain)
            same += float((before == page[: len(plain)]).float().mean())
            count += 1
    return count, same / count


def scratch_is_clear(worker: Any) -> bool:
    """Whether nothing unsealed was left after the step's last layer."""
    return not any(layer.impl.layer.places.scratch.any() for layer in _layers(worker).values())
