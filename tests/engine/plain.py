"""What vLLM answers without SCX."""

from dataclasses import dataclass
from pathlib import Path

from engine.engines import answers, engine
from engine.ledgers import LONG, QUESTION, SHORT, TALKS, TWENTY, Ledger, answer_length
from transformers import PreTrainedTokenizerBase
from vllm import RequestOutput, SamplingParams


@dataclass(frozen=True)
class Plain:
    """What plain vLLM answers.

    Attributes:
        tokens: of each ledger, at most `answer_length` of it.
        second: of each of TALKS, its second turn's.
        least_lead: of all answered tokens, the smallest difference of log-probability to the next best.
    """

    tokens: dict[Ledger, list[int]]
    second: dict[Ledger, list[int]]
    least_lead: float


def ask_plain_vllm(model: Path, tokenizer: PreTrainedTokenizerBase) -> Plain:
    ledgers = [*TWENTY, *SHORT, *LONG]
    asked = [{"prompt_token_ids": ledger.prompt(tokenizer)} for ledger in ledgers]
    sampling = [SamplingParams(temperature=0, max_tokens=answer_length(ledger), logprobs=2) for ledger in ledgers]
    with engine(model) as llm:
        made = llm.generate(asked, sampling, use_tqdm=False)
        found = {ledger: list(one.outputs[0].token_ids) for ledger, one in zip(ledgers, made, strict=True)}
        turns = [ledger.second_turn(tokenizer, found[ledger], QUESTION) for ledger in TALKS]
        second, _ = answers(llm, turns)
    return Plain(found, dict(zip(TALKS, second, strict=True)), min(map(_least_lead, made)))


def _least_lead(one: RequestOutput) -> float:
    leads = []
    for place in one.outputs[0].logprobs:
        best, next_best = sorted((each.logprob for each in place.values()), reverse=True)[:2]
        leads.append(best - next_best)
    return min(leads)
