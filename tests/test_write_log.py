"""Write numbers of a sealed cache's layers: one log for layers that the same passes filled, and none written over."""

import pytest
import torch
from torch import Tensor

from scx.kvcache.layers import SealedLayer, SealedSlidingLayer, SharedLogs, append

HEADS, SIZE = 2, 16


def passed(layer: SealedLayer, writes: Tensor, shared: SharedLogs) -> None:
    """A layer takes in a pass's tokens with these numbers (1, S)."""
    tokens = writes.shape[1]
    slots = layer.room(tokens, (1, HEADS, SIZE), torch.empty(0))
    numbers = layer.number(slots, writes, shared)
    keys, values, _ = layer.take_in(slots)
    layer.hold(keys, values, numbers[:, : slots.offset + tokens])


def numbers(first: int, count: int) -> Tensor:
    return torch.arange(first, first + count)[None]


def filled(*layers: SealedLayer) -> None:
    for writes in (numbers(0, 5), numbers(5, 1)):
        shared: SharedLogs = {}
        for layer in layers:
            passed(layer, writes, shared)


def test_layers_of_the_same_passes_share_a_log() -> None:
    layers = [SealedLayer() for _ in range(3)]
    filled(*layers)
    assert len({id(layer._log) for layer in layers}) == 1
    assert layers[0]._log is not None
    assert layers[0]._log.filled == 6
    assert all(layer.writes.tolist() == [[0, 1, 2, 3, 4, 5]] for layer in layers)


def test_layers_that_part_keep_their_own_numbers() -> None:
    """One layer is cropped and goes on from an earlier row; the other's numbers stay what they were."""
    cropped, whole = SealedLayer(), SealedLayer()
    filled(cropped, whole)
    cropped.crop(-3)
    shared: SharedLogs = {}
    for layer in (cropped, whole):
        passed(layer, numbers(40, 2), shared)
    assert cropped.writes.tolist() == [[0, 1, 2, 40, 41]]
    assert whole.writes.tolist() == [[0, 1, 2, 3, 4, 5, 40, 41]]


def test_a_pass_that_broke_off_is_run_again_on_other_rows() -> None:
    """What a broken pass has written into a log is not what the layer holds; the next pass leaves it alone."""
    layer = SealedLayer()
    filled(layer)
    before = dict(vars(layer))
    passed(layer, numbers(40, 2), {})
    seen = layer.writes
    vars(layer).update(before)
    passed(layer, numbers(50, 2), {})
    assert layer.writes.tolist() == [[0, 1, 2, 3, 4, 5, 50, 51]]
    assert seen.tolist() == [[0, 1, 2, 3, 4, 5, 40, 41]]


def test_layers_grow_together() -> None:
    """New buffers in one pass: one new log, with the numbers of the old one."""
    layers = [SealedLayer() for _ in range(2)]
    filled(*layers)
    old = layers[0]._log
    shared: SharedLogs = {}
    for layer in layers:
        passed(layer, numbers(100, 70), shared)
    assert layers[0]._log is layers[1]._log is not old
    assert layers[1].writes.tolist() == [[*range(6), *range(100, 170)]]
    assert len(shared) == 1


def test_what_one_layer_held_is_never_taken_for_another_s() -> None:
    """Layers whose rows were numbered anew within a pass hold tensors that may lie where an earlier layer's lay."""
    shared: SharedLogs = {}
    for layer_number in range(50):
        layer = SealedLayer()
        slots = layer.room(5, (1, HEADS, SIZE), torch.empty(0))
        keys, values, _ = layer.take_in(slots)
        own = numbers(100 * layer_number, 5)
        layer.hold(keys, values, own)
        del keys, values, own
        passed(layer, numbers(9000, 1), shared)
        assert layer.writes.tolist() == [[*range(100 * layer_number, 100 * layer_number + 5), 9000]]
        del layer


@pytest.mark.parametrize("layer", [SealedLayer(), SealedSlidingLayer(sliding_window=4)], ids=lambda x: type(x).__name__)
def test_nothing_goes_into_a_sealed_layer_as_it_is(layer: SealedLayer) -> None:
    """Not even by the function that fills a layer which is not sealed."""
    states = torch.zeros(1, HEADS, 2, SIZE)
    with pytest.raises(TypeError, match="expected one that is not sealed"):
        append(layer, states, states)
    assert layer.held_tokens == 0
