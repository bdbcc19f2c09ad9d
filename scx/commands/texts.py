"""English text that every Python carries, for what is measured on text."""

from pydoc_data.topics import topics

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

__all__ = ["windows"]


def windows(tokenizer: PreTrainedTokenizerBase, count: int, tokens: int) -> Tensor:
    """(count, tokens): beginnings of the longest chapters of the Python manual that Python carries, longest first."""
    longest = sorted(topics.values(), key=len, reverse=True)[:count]
    return torch.stack([tokenizer(text, return_tensors="pt").input_ids[0, :tokens] for text in longest])
