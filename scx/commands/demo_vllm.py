"""A conversation that vLLM serves with every block sealed as it leaves the device, taken up by another process after
one of its blocks was altered, and the same from plain vLLM."""

import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import numpy as np

from scx.commands.smollm2 import smollm2_path
from scx.commands.vllm_server import VLLMServer, serving
from scx.vllm.master import write_master

__all__ = ["run"]

_NAME, _BLOCK = "smollm2", 32
_TENANT, _STRANGER = "key-of-the-demo", "key-of-somebody-else"
_OPTIONS = (
    *("--served-model-name", _NAME, "--dtype", "float32", "--max-model-len", "2048", "--enforce-eager"),
    *("--block-size", str(_BLOCK), "--enable-prompt-tokens-details"),
)
_TENANTS = ("--api-key", _TENANT, _STRANGER, "--middleware", "scx.vllm.middleware.TenantMiddleware")
_FIRST = f"{topics['context-managers'][:1400]}\n\nSay in two sentences what this is about."
_SECOND = "Name one thing that it is used for."
_NOISE = "255 +- 23"  # mean and standard deviation of chi-square with 255 degrees of freedom


@dataclass(frozen=True)
class _Answer:
    text: str
    tokens: list[int]
    asked: int
    found: int
    seconds: float

    def __str__(self) -> str:
        return f"{self.found:,} of {self.asked:,} tokens of the prompt were found, {self.seconds:.1f} s"


class _Caller:
    """Who has an API key, by OpenAI's client."""

    def __init__(self, server: VLLMServer, key: str, tokens: int) -> None:
        from openai import OpenAI  # comes with vLLM, which is optional  # noqa: PLC0415

        self._client = OpenAI(base_url=f"{server.url}/v1", api_key=key, max_retries=0, timeout=120)
        self._tokens = tokens

    def ask(self, *said: str) -> _Answer:
        """Turns of a conversation, the user's first."""
        messages: list[Any] = [
            {"role": ("user", "assistant")[turn % 2], "content": text} for turn, text in enumerate(said)
        ]
        begun = time.perf_counter()
        made = self._client.chat.completions.create(
            model=_NAME,
            messages=messages,
            max_tokens=self._tokens,
            temperature=0,
            extra_body={"return_token_ids": True},
        )
        choice, usage = made.choices[0], made.usage
        details = usage.prompt_tokens_details
        return _Answer(
            choice.message.content,
            list(choice.token_ids),
            usage.prompt_tokens,
            details.cached_tokens if details else 0,
            time.perf_counter() - begun,
        )


def run(*, tokens: int = 40) -> bool:
    """Serve a conversation of two turns, print what was stored, alter a block, and serve its second turn again.

    Everything lies in a temporary folder and is gone afterwards, however it ends: the master key, what was stored, and
    the servers.

    Args:
        tokens: of an answer at most.

    Returns: whether all answers are plain vLLM's, and the altered block alone was refused.
    Raises: ServerFailed if a server does not start.
    """
    model = smollm2_path()
    with tempfile.TemporaryDirectory(prefix="scx-demo-") as name:
        folder = Path(name)
        store = folder / "store"
        key = write_master(folder / "master.key")
        transfer = {
            "kv_connector": "SCXSealedOffloading",
            "kv_role": "kv_both",
            "kv_connector_extra_config": {
                "cpu_bytes_to_use": 200_000_000,
                "tenants": "callers",
                "secondary_tiers": [{"type": "fs", "root_dir": str(store)}],
            },
        }
        sealed = {"transfer": transfer, "environment": {"SCX_MASTER_KEY_FILE": str(key)}}
        with _served(model, folder / "first.log", "vLLM with sealed off-loading", *_TENANTS, **sealed) as server:
            caller = _Caller(server, _TENANT, tokens)
            first = caller.ask(_FIRST)
            print(f"\n{first.text}\n\nfirst turn: {first}")
            altered = _stored(store, first.asked // _BLOCK)[0]
            second = caller.ask(_FIRST, first.text, _SECOND)
            print(f"second turn: {second}")
            print(f"another tenant, the same: {_Caller(server, _STRANGER, 1).ask(_FIRST)}")
            files = _stored(store, 2 * (first.asked // _BLOCK))
        _describe(files)
        data = bytearray(altered.read_bytes())
        data[len(data) // 2] ^= 1
        altered.write_bytes(data)
        print(f"one bit of {altered.name[:16]}... flipped")
        with _served(model, folder / "second.log", "another process on the same folder", *_TENANTS, **sealed) as server:
            again = _Caller(server, _TENANT, tokens).ask(_FIRST, first.text, _SECOND)
            refused = _settled(server, "scx:kv_blocks_refused_total")
            opened = server.metrics().get("scx:kv_blocks_opened_total", 0.0)
            print(
                f"second turn again: {refused:.0f} block refused and computed anew, "
                f"{opened:.0f} opened, {again.seconds:.1f} s"
            )
        with _served(model, folder / "plain.log", "plain vLLM") as server:
            caller = _Caller(server, _TENANT, tokens)
            plain = [caller.ask(_FIRST).tokens, caller.ask(_FIRST, first.text, _SECOND).tokens]
    equal = [first.tokens, second.tokens] == plain and again.tokens == plain[1]
    print(f"tokens equal: {'yes' if equal else 'NO'}")
    return equal and refused == 1


@contextmanager
def _served(model: Path, log: Path, what: str, *options: str, **settings: Any) -> Iterator[VLLMServer]:
    print(f"{what} starts ...", end="", flush=True)
    begun = time.perf_counter()
    with serving(model, [*_OPTIONS, *options], log=log, **settings) as server:
        print(f" {time.perf_counter() - begun:.0f} s")
        yield server


def _stored(store: Path, count: int, seconds: float = 20.0) -> list[Path]:
    """The files of blocks, as soon as there are so many, and none is being written."""
    until = time.monotonic() + seconds
    while True:
        files = sorted(store.rglob("*.bin"))
        if len(files) >= count and not list(store.rglob("*.tmp")):
            return files
        if time.monotonic() > until:
            raise TimeoutError(f"{len(files)} of {count} blocks were stored within {seconds} s")
        time.sleep(0.1)


def _describe(files: list[Path]) -> None:
    data = np.concatenate([np.fromfile(file, dtype=np.uint8)[: file.stat().st_size - 4096] for file in files])
    counts = np.bincount(data, minlength=256)
    expected = len(data) / 256
    statistic = ((counts - expected) ** 2 / expected).sum()
    modes = ", ".join(sorted({f"{file.stat().st_mode & 0o777:o}" for file in files}))
    print(
        f"stored: {len(files)} files of {files[0].stat().st_size:,} bytes, mode {modes}, such as "
        f"{files[0].name[:16]}...; chi-square of their bytes {statistic:.0f} (noise: {_NOISE})"
    )


def _settled(server: VLLMServer, name: str) -> float:
    """A counter, once two readings half a second apart agree: an engine tells its counters with a later step."""
    value = server.metrics().get(name, 0.0)
    while True:
        time.sleep(0.5)
        if (now := server.metrics().get(name, 0.0)) == value:
            return value
        value = now
