"""Callers of a server, by OpenAI's client, and the files that their requests leave."""

import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from openai import OpenAI

from scx.commands.vllm_server import VLLMServer

NAME = "smollm2"
"""Of the model, as the server serves it."""


@dataclass(frozen=True)
class Answer:
    """Tokens, and how many of its prompt's were not computed."""

    tokens: list[int]
    cached: int


@dataclass
class Caller:
    """Who has an API key of a server."""

    server: VLLMServer
    key: str = field(repr=False)

    def __post_init__(self) -> None:
        self.client = OpenAI(base_url=f"{self.server.url}/v1", api_key=self.key, max_retries=0, timeout=120)

    def ask(self, prompt: list[int], tokens: int, **body: Any) -> Answer:
        made = self.client.completions.create(
            model=NAME,
            prompt=prompt,
            max_tokens=tokens,
            temperature=0,
            extra_body={"return_token_ids": True, **body},
        )
        told = made.usage.prompt_tokens_details
        return Answer(list(made.choices[0].token_ids), told.cached_tokens if told else 0)


def ask_at_once(asked: Sequence[tuple[Caller, list[int], int]]) -> list[Answer]:
    """Of each its answer; eight requests at once."""
    with ThreadPoolExecutor(8) as pool:
        return list(pool.map(lambda one: one[0].ask(one[1], one[2]), asked))


@dataclass(frozen=True)
class Store:
    """A folder of vLLM's fs tier."""

    root: Path

    def files(self) -> set[Path]:
        """Of blocks, each whole."""
        return set(self.root.rglob("*.bin"))

    def wait_for(self, count: int, before: set[Path], seconds: float = 20.0) -> set[Path]:
        """The new files, as soon as there are so many and none is half written."""
        until = time.monotonic() + seconds
        while True:
            new = self.files() - before
            if len(new) >= count and not list(self.root.rglob("*.tmp")):
                return new
            if time.monotonic() > until:
                raise TimeoutError(f"{len(new)} of {count} blocks were stored within {seconds} s")
            time.sleep(0.05)

    def wait_for_any(self, count: int, before: set[Path], seconds: float = 60.0) -> None:
        """Until there are so many new files, whatever else is being written."""
        until = time.monotonic() + seconds
        while len(self.files() - before) < count:
            if time.monotonic() > until:
                raise TimeoutError(f"fewer than {count} blocks were stored within {seconds} s")
            time.sleep(0.005)
