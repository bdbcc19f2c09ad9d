"""Prompts of some hundred tokens that share no beginning, the same on every machine: a page of a shop's ledger each."""

import random
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

_NAMES = ("Ada", "Ivo", "Mira", "Jonas", "Leila", "Tomas", "Wanda", "Pavel", "Edith", "Hugo")
_WARES = ("copper bowls", "wool blankets", "clay lamps", "iron keys", "glass beads", "oak chairs", "brass clocks")
_DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday")
_BEGUN, _TOLD = "<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n"


@dataclass(frozen=True)
class Ledger:
    """A page: who bought what of whom, and a question about it."""

    text: str
    question: str

    @classmethod
    def numbered(cls, number: int, lines: int) -> "Ledger":
        """Page `number` of `lines` lines, 16 to 18 tokens each."""
        drawn = random.Random(number)  # noqa: S311  prompts, no secrets
        told, seller = [], ""
        for _ in range(lines):
            seller, buyer = drawn.sample(_NAMES, 2)
            count, ware, day = drawn.randint(2, 90), drawn.choice(_WARES), drawn.choice(_DAYS)
            told.append(f"On {day} {seller} sold {count} {ware} to {buyer}.")
        return cls(f"Page {number} of the ledger.\n" + "\n".join(told), f"What did {seller} sell, and to whom?")

    def prompt(self, tokenizer: PreTrainedTokenizerBase) -> list[int]:
        """The first turn's tokens, as SmolLM2's chat has them."""
        return tokenizer(f"{_BEGUN}{self.text}\n\n{self.question}{_TOLD}")["input_ids"]

    def second_turn(self, tokenizer: PreTrainedTokenizerBase, answer: list[int], question: str) -> list[int]:
        """The tokens of the same conversation after `answer`, with another question."""
        return [*self.prompt(tokenizer), *answer, *tokenizer(f"<|im_end|>\n{_BEGUN}{question}{_TOLD}")["input_ids"]]


TWENTY = [Ledger.numbered(number, 6 + number % 7) for number in (*range(18), 19, 23)]
"""Of 110 to 200 tokens. Every token of SmolLM2's answers leads the next best by more than rounding could turn round:
`test_offline.py` holds it to that."""
TALKS = TWENTY[:8]
"""Whose conversations have a second turn."""
QUESTION = "Who was named first on that page?"
SHORT = [Ledger.numbered(number, 6) for number in range(100, 112)]
"""Three full blocks each."""
LONG = [Ledger.numbered(number, 22) for number in range(200, 208)]
"""Eleven or twelve full blocks each."""


def answer_length(ledger: Ledger) -> int:
    """How many tokens a test asks for: more of those that are compared, few of those whose blocks are what matters."""
    return 16 if ledger in TWENTY else 8
