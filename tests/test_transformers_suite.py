"""The harness for transformers' own tests notices what it is there for: wrong passes, stale refusals."""

from collections.abc import Iterator

import pytest
import torch
from tiny import tiny_model
from transformers import LlamaForCausalLM
from transformers_suite.encoding import SETTINGS, encode_at_first_use
from transformers_suite.refusals import LIST, Refusal, read
from transformers_suite.twin import check_passes

from scx.kvcache.conversation import ConversationCache

pytest_plugins = ["pytester"]
REFUSED = Refusal(("test_refused",), ("rows",), "ValueError", "name: expected", "it cannot be")


@pytest.fixture(params=SETTINGS)
def tested(request) -> Iterator[LlamaForCausalLM]:
    """A plain model that the harness is going to encode."""
    with pytest.MonkeyPatch.context() as patch:
        encode_at_first_use(SETTINGS[request.param], patch)
        check_passes(patch)
        yield tiny_model()


@torch.no_grad()
def test_a_model_is_encoded_at_its_first_pass_and_passes(tested, prompt) -> None:
    out = tested(prompt(6, 2))
    assert isinstance(out.past_key_values, ConversationCache)
    tested(prompt(1, 2), past_key_values=out.past_key_values)


@torch.no_grad()
def test_a_pass_that_differs_is_noticed(tested, prompt) -> None:
    cache = tested(prompt(6)).past_key_values
    tested.model.norm.register_forward_hook(lambda module, args, out: out * 1.01)
    with pytest.raises(AssertionError, match=r"last_hidden_state\[0\]: differs by"):
        tested(prompt(6))
    with pytest.raises(AssertionError, match=r"last_hidden_state\[0\]: differs by"):
        tested(prompt(1), past_key_values=cache)


def test_every_refusal_says_why() -> None:
    for refusal in read(LIST):
        assert set(refusal.settings) <= set(SETTINGS)
        assert refusal.tests
        assert refusal.message
        assert refusal.reason


OUTCOMES = {
    'raise ValueError("name: expected a name")': {"xfailed": 1},
    'raise ValueError("another")': {"failed": 1},
    'raise TypeError("name: expected a name")': {"failed": 1},
    "pass": {"passed": 1, "errors": 1},
    "import pytest; pytest.skip()": {"skipped": 1},
}


@pytest.mark.parametrize("body", OUTCOMES)
def test_a_listed_test_must_be_refused_as_it_says(pytester: pytest.Pytester, body: str) -> None:
    pytester.makeconftest(
        f"""
        from transformers_suite.refusals import Listed, Refusal

        def pytest_configure(config):
            config.pluginmanager.register(Listed([{REFUSED!r}], "rows"))
        """
    )
    pytester.makepyfile(f"def test_refused():\n    {body}\n")
    pytester.runpytest().assert_outcomes(**OUTCOMES[body])
