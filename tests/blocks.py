"""What tests of off-loaded blocks share: ciphers on every way that they take, blocks, and what is refused."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from parity import DEVICE
from torch import Tensor

from scx.keystream import Secret
from scx.vllm.blocks import TRAILER_BYTES, Block, DeviceCipher, HostCipher
from scx_kernels import backend

WAYS = ("host", "device", "device, kernels")
"""On the CPU by the library; and by the kernels, on a GPU or interpreted."""
KEY = bytes(range(32))
CPU = torch.device("cpu")
SENTINEL = 0x5A


@contextmanager
def cipher_of(way: str) -> Iterator[Any]:
    """A cipher of small staging, so that it takes turns."""
    if way == "host":
        yield HostCipher()
        return
    with backend("triton" if way == "device, kernels" else "auto"):
        made = DeviceCipher(DEVICE if way == "device, kernels" else CPU, staging_bytes=4096)
        yield made
        made.close()


def kind_of(cipher: Any) -> str:
    return "host" if isinstance(cipher, HostCipher) else "device"


def place_of(cipher: Any) -> torch.device:
    return CPU if isinstance(cipher, HostCipher) else cipher.device


def drawn(size: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 256, (size,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def new_block(
    pages: list[Tensor], context: bytes = b"a context", key: Secret | None = None, on: torch.device = CPU
) -> Block:
    size = sum(page.numel() for page in pages)
    own = Secret(KEY) if key is None else key
    row, trailer = np.full(size, 7, np.uint8), np.full(TRAILER_BYTES, 7, np.uint8)
    return Block([page.to(on) for page in pages], row, trailer, context, own)


def emptied(given: Block, **changed: Any) -> Block:
    """The same row, to be opened into pages of its own."""
    pages = [torch.full_like(page, SENTINEL) for page in given.pages]
    return given._replace(pages=pages, **changed)


def content(given: Block) -> bytes:
    return b"".join(page.cpu().view(torch.uint8).numpy().tobytes() for page in given.pages)


def sealed(cipher: Any, sizes: tuple[int, ...] = (100, 60), count: int = 1, **options: Any) -> list[Block]:
    made = [
        new_block([drawn(size, 100 * seed + place) for place, size in enumerate(sizes)], on=place_of(cipher), **options)
        for seed in range(count)
    ]
    cipher.store(made).wait()
    return made


def refusals(cipher: Any, given: list[Block]) -> list[int]:
    """What is refused. Nothing of such blocks is in their pages."""
    loading = cipher.load(given)
    loading.wait()
    for place in loading.refused:
        assert content(given[place]) == bytes([SENTINEL]) * given[place].row.nbytes
    return loading.refused


def altered(array: np.ndarray, place: int) -> np.ndarray:
    changed = array.copy()
    changed[place] ^= 1 << place % 8
    return changed
