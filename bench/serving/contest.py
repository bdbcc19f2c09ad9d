"""Conversations of two turns, of servers that take turns: what came back from host memory against what was computed.

The device has blocks for one conversation, so a second turn finds nothing there. Requests come one after another: the
time to a first token is that of a request that waits for nobody.
"""

import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

from openai import OpenAI
from transformers import AutoTokenizer

from scx.commands.smollm2 import smollm2_path
from scx.commands.texts import windows
from scx.commands.vllm_server import VLLMServer, serving
from scx.vllm.master import write_master

__all__ = ["BESIDE", "CONTESTANTS", "Turn", "figures", "measure"]

PLAIN, UNSEALED, SEALED = "vLLM", "vLLM, off-loading", "vLLM, sealed off-loading"
CONTESTANTS = (PLAIN, UNSEALED, SEALED)
BESIDE = ((SEALED, UNSEALED), (SEALED, PLAIN), (UNSEALED, PLAIN))
BLOCK, DEVICE_BLOCKS, HOST_BYTES = 32, 34, 600_000_000
CONVERSATIONS, PROMPT, QUESTION, ANSWER = 3, 800, 24, 16
_NAME = "smollm2"
_OPTIONS = (
    *("--served-model-name", _NAME, "--dtype", "float32", "--max-model-len", "1024", "--max-num-seqs", "8"),
    *("--block-size", str(BLOCK), "--num-gpu-blocks-override", str(DEVICE_BLOCKS), "--enable-prompt-tokens-details"),
    "--enforce-eager",
)


@dataclass(frozen=True)
class Turn:
    """All conversations' requests of one turn: medians and sums over them.

    Attributes:
        first_token: seconds from a request to its first token.
        tokens_per_second: of prompts and answers.
        found: the prompts' tokens that were not computed.
    """

    first_token: float
    tokens_per_second: float
    found: int


def measure(rounds: int) -> Iterator[dict[str, tuple[Turn, Turn]]]:
    """Of every round each contestant's first and second turn. A round before them warms up and is not given."""
    path = smollm2_path()
    tokenizer = AutoTokenizer.from_pretrained(path)
    texts = windows(tokenizer, CONVERSATIONS * (rounds + 1), PROMPT).tolist()
    question = tokenizer("\n\nWhat is said of names in what stands above, and where?")["input_ids"][:QUESTION]
    with ExitStack() as stack:
        folder = Path(stack.enter_context(TemporaryDirectory()))
        key = write_master(folder / "master.key")
        servers = {name: stack.enter_context(_served(name, path, folder, key)) for name in CONTESTANTS}
        for number in range(rounds + 1):
            prompts = texts[number * CONVERSATIONS :][:CONVERSATIONS]
            turned = CONTESTANTS[number % 3 :] + CONTESTANTS[: number % 3]
            taken = {name: _two_turns(servers[name], prompts, question) for name in turned}
            if number:
                yield taken


def _served(name: str, path: Path, folder: Path, key: Path) -> Any:
    log = folder / f"{CONTESTANTS.index(name)}.log"
    if name == PLAIN:
        return serving(path, _OPTIONS, log=log)
    transfer: dict[str, Any] = {
        "kv_connector": "SCXSealedOffloading",
        "kv_role": "kv_both",
        "kv_connector_extra_config": {"cpu_bytes_to_use": HOST_BYTES, "tenant": "bench"},
    }
    if name == UNSEALED:
        transfer |= {
            "kv_connector": "UnsealedOffloadingConnector",
            "kv_connector_module_path": "bench.serving.unsealed",
        }
    return serving(path, _OPTIONS, log=log, transfer=transfer, environment={"SCX_MASTER_KEY_FILE": str(key)})


def _two_turns(server: VLLMServer, prompts: list[list[int]], question: list[int]) -> tuple[Turn, Turn]:
    with OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=300) as client:
        first, answers = _turn(client, prompts)
        again = [[*prompt, *answer, *question] for prompt, answer in zip(prompts, answers, strict=True)]
        return first, _turn(client, again)[0]


def _turn(client: OpenAI, prompts: list[list[int]]) -> tuple[Turn, list[list[int]]]:
    waits, answers, found = [], [], 0
    began = time.perf_counter()
    for prompt in prompts:
        asked = time.perf_counter()
        stream = client.completions.create(
            model=_NAME,
            prompt=prompt,
            max_tokens=ANSWER,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
            extra_body={"return_token_ids": True, "ignore_eos": True},
        )
        answer: list[int] = []
        for part in stream:
            for choice in part.choices:
                if not answer and choice.token_ids:
                    waits.append(time.perf_counter() - asked)
                answer += choice.token_ids or []
            if part.usage and part.usage.prompt_tokens_details:
                found += part.usage.prompt_tokens_details.cached_tokens or 0
        answers.append(answer)
    seconds = time.perf_counter() - began
    tokens = sum(map(len, prompts)) + sum(map(len, answers))
    return Turn(median(waits), tokens / seconds, found), answers


def figures(taken: list[dict[str, tuple[Turn, Turn]]]) -> dict[str, Any]:
    """Medians over rounds, and of every pair in BESIDE the medians of what one has over the other in the same round."""
    result: dict[str, Any] = {"contestants": {}, "beside": {}}
    for name in CONTESTANTS:
        result["contestants"][name] = {
            what: {
                "first_token_seconds": median(one[name][turn].first_token for one in taken),
                "tokens_per_second": median(one[name][turn].tokens_per_second for one in taken),
                "prompt_tokens_found": median(one[name][turn].found for one in taken),
            }
            for turn, what in enumerate(("first turn", "second turn"))
        }
    for one_name, other in BESIDE:
        result["beside"][f"{one_name} over {other}"] = {
            what: {
                "first_token": median(one[one_name][turn].first_token / one[other][turn].first_token for one in taken),
                "seconds_per_token": median(
                    one[other][turn].tokens_per_second / one[one_name][turn].tokens_per_second for one in taken
                ),
            }
            for turn, what in enumerate(("first turn", "second turn"))
        }
    return result
