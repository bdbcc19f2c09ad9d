"""Readers of files and messages under hostile bytes, the same few every time; `make fuzz` goes on for longer."""

import json
import random
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, find, given, settings

from scx import FileRefusedError
from scx.files import header as headers
from scx.files import keyfile
from scx.party import messages
from tests.fuzzing.targets import BLOCK_CIPHERS, CASES, FILES, REGISTRY, REQUEST_BODY, TARGETS, check, sealed_block
from tests.golden.given import KEY, MASTER, SESSION_ID
from tests.specified_files import Refused
from tests.vectors.make import open_file

few = settings(
    derandomize=True, database=None, deadline=None, phases=[Phase.generate], suppress_health_check=list(HealthCheck)
)


@pytest.mark.parametrize("name", TARGETS)
def test_a_reader_reads_or_refuses(name) -> None:
    """Hostile bytes reach both ends: what is behind authentication is under them as well."""
    outcomes: Counter[str] = Counter()

    @settings(few, max_examples=60)
    @given(TARGETS[name].given)
    def run(data: bytes) -> None:
        outcomes[check(name, data)] += 1

    run()
    assert outcomes["refused"] > 20


def test_right_bytes_are_read() -> None:
    """So a refusal above comes from what is hostile."""
    for name, file in (("keys", "session"), ("cache", "cache"), ("shared keys", "shared-keys")):
        assert check(name, FILES[file]) == "read"
    for name, value in (("registry", REGISTRY), ("request's body", REQUEST_BODY)):
        assert check(name, json.dumps(value).encode()) == "read"
    for name, cipher in BLOCK_CIPHERS.items():
        assert check(name, sealed_block(cipher)) == "read"


OPENED: dict[str, dict[str, Any]] = {
    "keys": {"kind": "session", "key": KEY.hex()},
    "cache": {"kind": "cache", "masterKey": MASTER.hex(), "session": SESSION_ID.hex(), "newestSave": 0},
    "shared keys": {"kind": "shared keys", "key": KEY.hex()},
}


@pytest.mark.parametrize("name", OPENED)
def test_the_specification_reads_and_refuses_the_same(name) -> None:
    """For the same reason, whatever was done to the file and by whom."""

    def reason(error: type[Any], read: Callable[[], Any]) -> str:
        try:
            read()
        except error as refusal:
            return refusal.reason
        return "read"

    @settings(few, max_examples=60)
    @given(TARGETS[name].given)
    def run(data: bytes) -> None:
        own = reason(FileRefusedError, lambda: TARGETS[name].read(data))
        assert own == reason(Refused, lambda: open_file(OPENED[name], data))

    run()


def without_checks(name: str, described: Any, start: int) -> headers.Entry:
    dtype, shape = headers.DTYPES[described["dtype"]], tuple(described["shape"])
    return headers.Entry(name, dtype, shape, described["data_offsets"][1] - start)


def with_a_wish(read: dict[str, Any], shape: Any) -> Any:
    return read["redundant_num"].bit_length()


def with_trust(name: str, described: Any) -> Any:
    dtype, shape = described
    return messages._DTYPES[dtype], tuple(shape)


@pytest.mark.parametrize(
    ("module", "function", "planted"),
    [
        (headers, "_parse_entry", without_checks),
        (keyfile, "_read_settings", with_a_wish),
        (messages, "_kind", with_trust),
    ],
    ids=["before authentication", "behind it", "off the wire"],
)
def test_a_planted_fault_is_found(monkeypatch, module, function: str, planted: Callable[..., Any]) -> None:
    """A reader that believes what it reads raises LookupError, AttributeError, TypeError."""
    monkeypatch.setattr(module, function, planted)

    def fails(case: tuple[str, bytes]) -> bool:
        try:
            check(*case)
        except (LookupError, AttributeError, TypeError, ValueError, OverflowError):
            return True
        return False

    find(CASES, fails, settings=settings(few, max_examples=2000), random=random.Random(0))  # noqa: S311
