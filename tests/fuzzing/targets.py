"""Who reads what strangers wrote: files of every kind, the messages between the parties' processes, and blocks of a
paged cache in memory that others write to."""

import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st

from scx import EncodedCache, FileRefusedError, Session, SharedKeys, load_keys, load_kvcache, load_shared_keys
from scx.files.container import Container, read_container
from scx.keystream import Secret
from scx.party.boundary import Request
from scx.party.messages import (
    Fill,
    MessageError,
    read_agreement,
    read_reply,
    read_request,
    write_agreement,
    write_failure,
    write_reply,
    write_request,
)
from scx.party.plan import Plan
from scx.vllm.blocks import TRAILER_BYTES, Block, DeviceCipher, HostCipher
from scx.vllm.blocks.transfer import AtOnce
from scx.vllm.body import Body, RefusedError
from scx.vllm.registry import Registry
from tests import specification
from tests.fuzzing.hostile import files, json_texts, messages, mutated
from tests.golden import make
from tests.golden.given import KEY, MASTER, SESSION_ID

__all__ = ["BLOCK_CIPHERS", "CASES", "TARGETS", "Target", "check", "sealed_block"]

GOLDEN = Path(make.__file__).parent
FILES = {name: (GOLDEN / f"{name}.scx").read_bytes() for name in ("session", "cache", "shared-keys")}
CACHE_KEY = specification.session_key(specification.session_secret(MASTER, SESSION_ID), "cache file")


class EndOfBytesError(Exception):
    """A message was longer than the bytes that came."""


@dataclass(frozen=True)
class Target:
    """A reader, what it is given, what it makes of it, and how it refuses."""

    read: Callable[[bytes], Any]
    given: st.SearchStrategy[bytes]
    makes: type[Any]
    refusals: tuple[type[Exception], ...]


def on_disk(load: Callable[[Path], Any]) -> Callable[[bytes], Any]:
    """A reader of a path as one of bytes."""

    def read(data: bytes) -> Any:
        with tempfile.NamedTemporaryFile() as file:
            file.write(data)
            file.flush()
            return load(Path(file.name))

    return read


def off_wire(read: Callable[[Fill], Any]) -> Callable[[bytes], Any]:
    """A reader of what comes as one of bytes."""

    def read_bytes(data: bytes) -> Any:
        place = 0

        def fill(buffer: memoryview) -> None:
            nonlocal place
            if place + len(buffer) > len(data):
                raise EndOfBytesError
            buffer[:] = data[place : place + len(buffer)]
            place += len(buffer)

        return read(fill)

    return read_bytes


def container(name: str, kind: str, protection: str, key: bytes) -> Target:
    read = on_disk(lambda path: read_container(path, kind=kind, key=key, protection=protection, max_bytes=2**20))
    return Target(read, hostile_file(name, key), Container, (FileRefusedError,))


def hostile_file(name: str, key: bytes) -> st.SearchStrategy[bytes]:
    return files(FILES[name], key, list(FILES.values()))


def cache(path: Path) -> EncodedCache:
    return load_kvcache(path, make.open_session(), at_least=0)


def hostile_message(*buffers: list[memoryview]) -> st.SearchStrategy[bytes]:
    return st.sampled_from([b"".join(parts) for parts in buffers]).flatmap(messages)


POSITIONS = torch.arange(3)[None]
REQUEST = Request("score", "00" * 16, "generation", 2, 1, 3, 4, {"hidden": torch.ones(1, 3, 8), "positions": POSITIONS})
CLOSE = Request("close", "00" * 16, "generation", -1, 0, 0, 0, {})
REPLY = {"scores": torch.ones(1, 2, 3, 4), "value": torch.ones(1, 2, 3, 4, dtype=torch.bfloat16)}
SHAPES = {name: tuple(x.shape) for name, x in REPLY.items()}


class RefusedBlockError(Exception):
    """A block that did not authenticate."""


BLOCK = bytes(range(200)) * 6
BLOCK_KEY = Secret(bytes(32 * [7]))
BLOCK_CIPHERS = {
    "off-loaded block, host": HostCipher(),
    "off-loaded block, device": DeviceCipher(torch.device("cpu"), executor=AtOnce()),
}


def block_in(memory: bytes, page: torch.Tensor) -> Block:
    """Row and trailer as they lie in memory that others write to: what is too short is followed by zeros."""
    size = len(BLOCK) + TRAILER_BYTES
    held = np.frombuffer(bytearray(memory[:size].ljust(size, b"\0")), np.uint8)
    return Block([page[:500], page[500:]], held[: len(BLOCK)], held[len(BLOCK) :], b"its place", BLOCK_KEY)


def sealed_block(cipher: Any) -> bytes:
    """Row and trailer of a right one."""
    made = block_in(b"", torch.frombuffer(bytearray(BLOCK), dtype=torch.uint8))
    cipher.store([made]).wait()
    return made.row.tobytes() + made.trailer.tobytes()


def off_loaded(cipher: Any) -> Target:
    def read(data: bytes) -> bytes:
        page = torch.zeros(len(BLOCK), dtype=torch.uint8)
        loading = cipher.load([block_in(data, page)])
        loading.wait()
        opened = page.numpy().tobytes()
        assert opened == (bytes(len(BLOCK)) if loading.refused else BLOCK), "neither opened rightly nor left as it was"
        if loading.refused:
            raise RefusedBlockError("refused")
        return opened

    right = [sealed_block(cipher), sealed_block(cipher)]
    return Target(read, st.sampled_from(right).flatmap(lambda data: mutated(data, right)), bytes, (RefusedBlockError,))


AGREEMENT = write_agreement(Plan(4, 1, 1, prefill_top_k=3), "a model")
WIRE = (MessageError, EndOfBytesError)
REGISTRY = {
    "format": "scx tenants",
    "version": 1,
    "tenants": [
        {
            "name": f"tenant {i}",
            "id": SESSION_ID.hex() if i else "00" * 16,
            "kind": "default",
            "credentials": [(KEY[i:] + KEY[:i]).hex()],
            "versions": {"1": KEY.hex(), "2": MASTER.hex()},
        }
        for i in range(2)
    ],
}
REQUEST_BODY = {
    "model": "a model",
    "messages": [{"role": "user", "content": [{"type": "text", "text": "words"}]}],
    "cache_salt": "told",
    "seed": 2**63,
    "kv_transfer_params": {"max_load_tokens": 5, "kv_load_tiers": [{"medium": "CPU"}]},
    "vllm_xargs": {"a": [1, 2.5]},
}


def salted(data: bytes) -> bytes:
    """What the engine gets, which is JSON with the salt."""
    body = Body(data)
    made = body.salted("a salt of " + body.told)
    assert json.loads(made)["cache_salt"].startswith("a salt of ")
    return made


TARGETS: dict[str, Target] = {
    "authenticated container": container("cache", "cache", "authenticated", CACHE_KEY),
    "encrypted container": container("session", "session", "encrypted", KEY),
    "keys": Target(
        on_disk(lambda path: load_keys(path, key=KEY)), hostile_file("session", KEY), Session, (FileRefusedError,)
    ),
    "cache": Target(on_disk(cache), hostile_file("cache", CACHE_KEY), EncodedCache, (FileRefusedError,)),
    "shared keys": Target(
        on_disk(lambda path: load_shared_keys(path, key=KEY)),
        hostile_file("shared-keys", KEY),
        SharedKeys,
        (FileRefusedError,),
    ),
    "request": Target(
        off_wire(lambda fill: read_request(fill, 5)),
        hostile_message(write_request(5, REQUEST), write_request(5, CLOSE)),
        Request,
        WIRE,
    ),
    "reply": Target(
        off_wire(lambda fill: read_reply(fill, 5, SHAPES)),
        hostile_message(write_reply(5, REPLY), write_failure(5, ValueError("words"))),
        dict,
        WIRE,
    ),
    "registry": Target(Registry.from_json, json_texts(REGISTRY), Registry, (FileRefusedError,)),
    "request's body": Target(salted, json_texts(REQUEST_BODY), bytes, (RefusedError,)),
    "agreement": Target(off_wire(read_agreement), hostile_message(AGREEMENT), tuple, WIRE),
    **{name: off_loaded(cipher) for name, cipher in BLOCK_CIPHERS.items()},
}

CASES = st.one_of([st.tuples(st.just(name), target.given) for name, target in TARGETS.items()])
"""(name of a target, bytes for it)."""


def check(name: str, data: bytes) -> str:
    """Whether a reader takes bytes as it should. Returns "read" or "refused"; whatever else it raises comes out."""
    target = TARGETS[name]
    try:
        made = target.read(data)
    except target.refusals as refusal:
        text = str(refusal)
        assert len(text) < 2000, "a refusal is a few words"
        assert text.isprintable(), f"a refusal shows control characters: {text!r}"
        return "refused"
    assert isinstance(made, target.makes), made
    return "read"
