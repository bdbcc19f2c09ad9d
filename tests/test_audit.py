"""The attacks work: what the documents call broken is broken here, in front of the reader."""

import pytest
import torch
from tiny import VOCABULARY, tiny_model

from scx import SCXKeyGenerator, encoded_llama
from scx.audit import read_first_block


@pytest.mark.parametrize("family", ["llama", "qwen2"])
@pytest.mark.parametrize("alp", [False, True])
def test_first_block_reads_the_prompt_from_a_permuted_cache(prompt, family: str, alp: bool) -> None:
    """Permutations within heads, redundant rows and removable noise do not hide a stored V from who has weights."""
    model, ids = tiny_model(family), prompt(40, 2)
    with torch.no_grad(), encoded_llama(model, SCXKeyGenerator.for_model(model, redundant_num=20, alp=alp)):
        values = model(ids).past_key_values.layers[0].values
    assert torch.equal(read_first_block(model, values), ids)


def test_first_block_reads_nothing_from_noise(prompt) -> None:
    """The attack is no oracle: from rows that hold no prompt it reads no prompt."""
    model, ids = tiny_model(), prompt(200)
    found = read_first_block(model, torch.randn(1, 2, 200, 16, device=ids.device))
    assert (found == ids).float().mean() < 10 / VOCABULARY
