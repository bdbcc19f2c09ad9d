"""The benchmark of a server: what it makes of its rounds, and that its unsealed contestant moves the same bytes."""

import numpy as np
import pytest
import torch

from bench.serving import pages
from bench.serving.contest import CONTESTANTS, PLAIN, SEALED, UNSEALED, Turn, figures
from bench.serving.unsealed import Copying
from scx.keystream import Secret
from scx.vllm.blocks import TRAILER_BYTES, Block


def turns(first: float, second: float) -> tuple[Turn, Turn]:
    return Turn(first, 100 / first, 0), Turn(second, 100 / second, 64)


def test_ratios_are_those_of_one_round() -> None:
    """A slow round is slow for all: medians of ratios, no ratios of medians."""
    rounds = [
        {PLAIN: turns(2.0 * slow, 2.0 * slow), UNSEALED: turns(2.2 * slow, 0.5 * slow), SEALED: turns(own, 0.6 * slow)}
        for slow, own in ((1.0, 2.2), (3.0, 6.6), (1.5, 9.9))
    ]
    found = figures(rounds)
    beside = found["beside"][f"{SEALED} over {UNSEALED}"]
    assert beside["second turn"]["first_token"] == pytest.approx(1.2)
    assert beside["second turn"]["seconds_per_token"] == pytest.approx(1.2)
    assert beside["first turn"]["first_token"] == pytest.approx(1.0)
    assert found["beside"][f"{SEALED} over {PLAIN}"]["second turn"]["first_token"] == pytest.approx(0.3)
    assert found["contestants"][UNSEALED]["second turn"]["first_token_seconds"] == pytest.approx(0.75)
    assert set(found["contestants"]) == set(CONTESTANTS)


def test_sealed_pages_are_held_against_the_same_round() -> None:
    rounds = [
        {name: {pages.PLAIN: slow, pages.SEALED: slow * ratio, pages.EQUAL: ratio / 2} for name in pages.LOADS}
        for slow, ratio in ((1.0, 1.5), (8.0, 1.2), (2.0, 2.0))
    ]
    for found in pages.figures(rounds).values():
        assert found["sealed over plain"] == pytest.approx({"median": 1.5, "lowest": 1.2, "highest": 2.0})
        assert found["seconds"] == {pages.PLAIN: 2.0, pages.SEALED: 4.0}
        assert found[pages.EQUAL] == 0.6


def test_the_unsealed_contestant_moves_blocks_as_they_are() -> None:
    pages = [torch.randint(0, 256, (96,), dtype=torch.uint8), torch.randint(-128, 128, (64,), dtype=torch.int8)]
    row, trailer = np.zeros(160, np.uint8), np.zeros(TRAILER_BYTES, np.uint8)
    stored = Copying().store([Block(pages, row, trailer, b"", Secret())])
    assert stored.is_done()
    assert stored.bytes == 160
    assert row.tobytes() == b"".join(page.numpy().tobytes() for page in pages)
    empty = [torch.zeros_like(page) for page in pages]
    loaded = Copying().load([Block(empty, row, trailer, b"", Secret())])
    assert loaded.refused == []
    assert all(torch.equal(*pair) for pair in zip(empty, pages, strict=True))
