"""The perplexity of the untrusted side alone: what stands in its caches, and what each query sees of them."""

import pytest
import torch
from tiny import tiny_model
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from bench.statelessness import measure
from scx.audit import continuing
from scx.audit.continuing import Held, attempts, losses, protected, token_permuted
from scx.commands.audit.subject import encoded_and_plain

FIRST, COUNT = 20, 12


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return tiny_model(layers=5)


@pytest.fixture
def ids(prompt) -> Tensor:
    return prompt(FIRST + COUNT + 1, batch=2)


@torch.no_grad()
def plain_losses(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """Of the tokens after FIRST, from one pass of the model over everything."""
    logits, targets = model(ids).logits[:, FIRST:-1], ids[:, FIRST + 1 :]
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view(targets.shape)


@pytest.mark.parametrize("alone", [False, True])
def test_with_the_key_the_text_goes_on_as_plain(model: PreTrainedModel, ids: Tensor, alone: bool) -> None:
    """The stored cache, decoded with its session's key, gives the plain model's losses; as it is, it gives others."""
    encoded, plain = encoded_and_plain(model, ids[:, :-1])
    if not alone:
        encoded, plain = ([held.before(FIRST) for held in blocks] for blocks in (encoded, plain))
    expected = plain_losses(model, ids)
    torch.testing.assert_close(losses(model, plain, ids, FIRST, alone=alone), expected, rtol=1e-4, atol=1e-4)
    without = losses(model, encoded, ids, FIRST, alone=alone)
    assert ((without - expected).abs() > 1e-2).float().mean() > 0.9


@pytest.mark.parametrize("alone", [False, True])
def test_an_order_of_rows_hides_nothing_from_attention(
    model: PreTrainedModel, ids: Tensor, alone: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without redundant rows, token-permuted caches give the same losses: masks follow the rows."""
    monkeypatch.setattr(continuing, "REDUNDANT", 0)
    encoded, _ = encoded_and_plain(model, ids[:, :-1])
    expected = losses(model, encoded, ids, FIRST, alone=alone)
    found = losses(model, [token_permuted(held) for held in encoded], ids, FIRST, alone=alone)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_redundant_rows_are_seen(model: PreTrainedModel, ids: Tensor) -> None:
    encoded, _ = encoded_and_plain(model, ids[:, :FIRST])
    found = [token_permuted(held) for held in encoded]
    assert {held.keys.shape[2] for held in found} == {FIRST + continuing.REDUNDANT}
    difference = losses(model, found, ids, FIRST) - losses(model, encoded, ids, FIRST)
    assert difference.abs().max() > 1e-2


@torch.no_grad()
def test_without_caches_a_token_sees_itself(model: PreTrainedModel, ids: Tensor) -> None:
    """Next token, all blocks left out: each token as if it were the only one, in its place."""
    _, plain = encoded_and_plain(model, ids[:, :-1])
    found = losses(model, [held.before(0) for held in plain], ids, FIRST, alone=True)
    for step in range(COUNT):
        place = FIRST + step
        logits = model(ids[:, place : place + 1], position_ids=torch.full((2, 1), place, device=ids.device)).logits
        expected = F.cross_entropy(logits[:, 0], ids[:, place + 1], reduction="none")
        torch.testing.assert_close(found[:, step], expected, rtol=1e-4, atol=1e-4)


def held(number: int) -> Held:
    rows = torch.full((1, 2, 3, 4), float(number))
    return Held(rows, -rows, torch.arange(3)[None])


def test_only_locked_blocks_are_replaced() -> None:
    """By what the attempt is named after; the others keep the plain cache."""
    encoded, plain = ([held(base + index) for index in range(6)] for base in (10, 0))
    locked = protected(6, 2)
    assert locked == {0, 1, 4, 5}
    found = {
        name: [block.keys[0, 0, :1, 0].tolist() for block in blocks]
        for name, blocks in attempts(encoded, plain, locked)
    }
    permuted = found.pop("encoded, token-permuted")
    assert permuted[2:4] == [[2], [3]]
    assert found == {
        "zeros": [[0], [0], [2], [3], [0], [0]],
        "left out": [[], [], [2], [3], [], []],
        "encoded": [[10], [11], [2], [3], [14], [15]],
        "nearest block's": [[2], [2], [2], [3], [3], [3]],
    }


def test_every_figure_is_there(model: PreTrainedModel, ids: Tensor) -> None:
    """Both ways of going on, three sets of locked blocks; with all locked there is no block to take another's from."""
    found = measure(model, ids, FIRST)
    assert found.keys() == {"continued", "next token"}
    usual = float(plain_losses(model, ids).mean().exp())
    for way in found.values():
        assert way.pop("normal") == pytest.approx(usual, rel=1e-4)
        assert [len(figures) for figures in way.values()] == [5, 5, 4]
