"""What tests of sealed storage share: published vectors of the cipher, sealings as caches have them, and bad ones."""

import pytest
import torch
from parity import DEVICE
from torch import Tensor

from scx_kernels import Sealing, key_words
from tests.vectors.published import CHACHA

KEY = bytes(range(32))
ROUNDS = (8, 12, 20)

VECTORS = [vector[1:] for vector in CHACHA]
"""Rounds, key, words 13 to 15 as bytes, first block, keystream."""


def bits(x: Tensor) -> Tensor:
    return x.view(torch.int32 if x.element_size() == 4 else torch.int16)


def sealed_by(writes: Tensor, layer: int = 5, rounds: int = 8, first_head: int = 0, key: bytes = KEY) -> Sealing:
    return Sealing(key_words(key, DEVICE), writes.to(DEVICE), layer, rounds, first_head)


def scattered(batch: int, tokens: int) -> Tensor:
    """Write numbers as a cache has them after crops and reordering: in no order, high and low."""
    numbers = torch.randint(0, 2**59, (batch, tokens))
    numbers[:, ::3] = torch.arange(numbers[:, ::3].numel()).view(batch, -1) + 2**28 - 2
    return numbers


def check_refusals(seal) -> None:
    """What `seal` must not take, with errors that name it."""
    x = torch.zeros(1, 2, 3, 64, device=DEVICE)
    good = sealed_by(torch.zeros(1, 3, dtype=torch.int64))
    bad = [
        (TypeError, "sealing.key", x, good.replace(key=good.key.long())),
        (ValueError, "sealing.key", x, good.replace(key=good.key[:7])),
        (TypeError, "sealing.writes", x, good.replace(writes=good.writes.int())),
        (ValueError, "sealing.writes", x, good.replace(writes=good.writes[:, :2])),
        (ValueError, "sealing.layer", x, good.replace(layer=2**16)),
        (ValueError, "sealing.first_head", x, good.replace(first_head=2**16 - 1)),
        (ValueError, "sealing.rounds", x, good.replace(rounds=10)),
        (ValueError, "x: ", x[0], good),
        (ValueError, "x: ", x.double(), good),
        (ValueError, "x: .*1024 bytes", x.new_zeros(1, 2, 3, 257), good),
    ]
    for error, message, tensor, own in bad:
        with pytest.raises(error, match=message):
            seal(tensor, own, is_value=True)
    for out in (x.half(), x[:, :1], x[:, :, :1].expand(x.shape)):
        with pytest.raises(ValueError, match="out"):
            seal(x, good, is_value=True, out=out)


def check_refused_streams(random_bits) -> None:
    """The same of `random_bits`."""
    good = {"key": key_words(KEY, DEVICE), "streams": torch.zeros(1, 3, dtype=torch.int64, device=DEVICE), "count": 1}
    for error, name, changed in [
        (TypeError, "streams", {"streams": good["streams"].int()}),
        (ValueError, "streams", {"streams": good["streams"][:, :2]}),
        (ValueError, "count", {"count": -1}),
        (ValueError, "rounds", {"rounds": 7}),
        (ValueError, "key", {"key": good["key"][:4]}),
    ]:
        with pytest.raises(error, match=name):
            random_bits(**good | changed)
