"""What sealing costs a core: off-loaded blocks sealed into host memory and opened again, beside a copy of their pages.

"tag and copy" is the host's part where an accelerator seals: ciphertext is authenticated and copied into rows. Rates
are bytes of pages a second of one core, in rounds in which all take turns. More blocks than a cache holds, as they come
in a transfer.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from bench.host import one_thread
from bench.provenance import save
from scx.keystream import Secret
from scx.vllm.blocks import TRAILER_BYTES, Block, HostCipher
from scx.vllm.blocks.block import Tag, copied

SHAPES = {
    "SmolLM2-135M, float32, blocks of 32 tokens": (30, 49_152),
    "Llama-3-8B, bfloat16, blocks of 16 tokens": (32, 65_536),
}
"""Pages of a block, one a layer, and bytes of a page."""
BYTES = 128 << 20
MARK = 1.5
"""GB/s a core that sealing, and opening, should reach."""


def blocks_of(pages: int, size: int) -> list[Block]:
    key = Secret()
    drawn = [torch.randint(0, 256, (pages, size), dtype=torch.uint8) for _ in range(BYTES // (pages * size))]
    return [
        Block(x.unbind(), np.zeros(pages * size, np.uint8), np.zeros(TRAILER_BYTES, np.uint8), bytes([place]), key)
        for place, x in enumerate(drawn)
    ]


def copy_out(blocks: list[Block]) -> None:
    """Pages to rows, as they are: what off-loading costs unsealed."""
    for block in blocks:
        at = 0
        for page in block.pages:
            block.row[at : at + len(page)] = page.numpy()
            at += len(page)


def copy_in(blocks: list[Block]) -> None:
    for block in blocks:
        at = 0
        for page in block.pages:
            page.numpy()[:] = block.row[at : at + len(page)]
            at += len(page)


def tag_and_copy(blocks: list[Block], sealed: np.ndarray) -> None:
    """sealed: what the device copied to the host, as large as a block."""
    for block in blocks:
        tag = Tag(block.key.reveal(), block.context)
        copied(sealed, block.row, tag, private=sealed)
        tag.finish()


def seconds(function: Callable[[list[Block]], Any], blocks: list[Block]) -> float:
    start = time.perf_counter()
    function(blocks)
    return time.perf_counter() - start


def measure(pages: int, size: int, rounds: int) -> dict[str, Any]:
    """Rates by name, and seconds over those of the copy within a round.

    Raises: ValueError where what was sealed does not open to the same bytes.
    """
    blocks, cipher = blocks_of(pages, size), HostCipher()

    def open_all(blocks: list[Block]) -> None:
        if cipher.load(blocks).refused:
            raise ValueError("sealed_blocks: blocks that were sealed did not open")

    before = [page.clone() for block in blocks for page in block.pages]
    cipher.store(blocks)
    for block in blocks:
        for page in block.pages:
            page.zero_()
    open_all(blocks)
    after = [page for block in blocks for page in block.pages]
    if not all(map(torch.equal, before, after)):
        raise ValueError("sealed_blocks: blocks did not open to what was sealed")
    # In this order: what the first two leave in rows opens to nothing.
    staged = np.zeros(pages * size, np.uint8)
    ways = {
        "copy out": copy_out,
        "tag and copy": lambda blocks: tag_and_copy(blocks, staged),
        "seal": cipher.store,
        "open": open_all,
        "copy in": copy_in,
    }
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, function in ways.items():
            taken[name].append(seconds(function, blocks))
    total = len(blocks) * pages * size
    rates = {name: [total / each / 1e9 for each in found] for name, found in taken.items()}
    over = {"seal": "copy out", "open": "copy in"}
    return {
        "pages": pages,
        "page_bytes": size,
        "blocks": len(blocks),
        "rounds": rounds,
        "gb_s": {name: {"median": statistics.median(all_), "all": all_} for name, all_ in rates.items()},
        "seconds over the copy's": {
            name: statistics.median(a / b for a, b in zip(taken[name], taken[copy], strict=True))
            for name, copy in over.items()
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.sealed_blocks", description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--save", metavar="NAME", help="write bench/results/NAME.json")
    options = parser.parse_args()
    with one_thread():
        found = {name: measure(*shape, options.rounds) for name, shape in SHAPES.items()}
    for name, result in found.items():
        told = ", ".join(f"{way} {rates['median']:.2f}" for way, rates in result["gb_s"].items())
        print(f"{name}: {told} GB/s a core, median of {options.rounds} rounds (mark: {MARK})")
    if options.save:
        print(save(options.save, {"mark": MARK, "shapes": found}))


if __name__ == "__main__":
    main()
