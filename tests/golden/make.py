"""Writes the golden files, their manifest and the vectors into a folder: `python -m tests.golden.make tests/golden`.

Keys, ids and salts are fixed, so the same code writes the same bytes.
"""

import hashlib
import itertools
import json
import secrets
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from transformers.cache_utils import DynamicSlidingWindowLayer

import scx_kernels as ops
from scx import EncodedCache, SCXKeyGenerator, Session, SharedKeys, save_keys, save_kvcache, save_shared_keys
from scx.files.container import read_container, write_container
from scx.keys import ModelShape
from scx.kvcache import GrowingLayer, SealedLayer, SealedSlidingLayer
from tests import specification
from tests.golden.wrong_files import WRONG

MASTER, KEY, PASSPHRASE = bytes(range(32)), bytes(range(100, 132)), "correct horse battery staple"
SESSION_ID = bytes(range(200, 216))
SHAPE = ModelShape(4, 32, 4, 2, 8, 211, 1.25, "a golden model")
OTHER_SHAPE = replace(SHAPE, fingerprint="another model")
TOKENS, WINDOW, SAVES = 5, 4, 2
SHARED = SharedKeys(
    SESSION_ID.hex(), SHAPE.fingerprint, (1, 2), torch.arange(20).view(2, 2, 5).flip(2), torch.arange(5)[None]
)
_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@contextmanager
def fixed_randomness() -> Iterator[None]:
    drawn = itertools.count()

    def token_bytes(size: int) -> bytes:
        return hashlib.shake_256(f"golden {next(drawn)}".encode()).digest(size)

    with mock.patch.object(secrets, "token_bytes", token_bytes):
        yield


def open_session(session_id: bytes = SESSION_ID) -> Session:
    generator = SCXKeyGenerator(
        TOKENS, 32, 8, 2, True, 2, master_key=MASTER, cache_encoding=("permuted", "sealed", "permuted", "sealed")
    )
    with mock.patch.object(secrets, "token_bytes", bytes):  # its branch is zeros
        return generator.open_session(SHAPE, 2, session_id)


def plain_rows(layer: int, is_value: bool) -> Tensor:
    """K or V (2, 2, 5, 8) bfloat16 as the plain model would have it: numbers that say where they belong."""
    batch, heads, tokens, features = torch.meshgrid(*map(torch.arange, (2, 2, TOKENS, 8)), indexing="ij")
    return (layer + 8 * is_value + batch / 2 + heads / 4 + tokens * 16 + features / 8 * 0.25).to(torch.bfloat16)


def encoded_cache(session: Session) -> EncodedCache:
    """A layer of every kind, its two sequences exchanged after they were written."""
    sliding = (kind(sliding_window=WINDOW) for kind in (DynamicSlidingWindowLayer, SealedSlidingLayer))
    layers = [GrowingLayer(), SealedLayer(), *sliding]
    cache, writes = EncodedCache(session, layers), session.take_writes(2, TOKENS, torch.device("cpu"))
    for layer in range(4):
        key = session.feature_key(layer, torch.device("cpu"))
        keys = ops.permute_features(plain_rows(layer, False), key.key)
        values = ops.permute_features(plain_rows(layer, True), key.value)
        cache.append(keys, values, layer, writes)
    cache.batch_select_indices(torch.tensor([1, 0]))
    return cache


def write_right(folder: Path) -> Session:
    """The right files. Returns the session that they belong to."""
    session = open_session()
    session.newest_save = SAVES - 1
    save_kvcache(folder / "cache.scx", encoded_cache(session), session)
    save_keys(folder / "session.scx", session, key=KEY)
    save_keys(folder / "session-passphrase.scx", session, passphrase=PASSPHRASE)
    save_shared_keys(folder / "shared-keys.scx", SHARED, key=KEY)
    return session


def write_wrong(folder: Path, session: Session) -> list[dict[str, str]]:
    """The wrong files. Returns the manifest."""
    authentic: dict[str, dict[str, Any]] = {
        "session": {"kind": "session", "key": KEY},
        "cache": {"kind": "cache", "key": session.derive_key("cache file"), "protection": "authenticated"},
        "shared-keys": {"kind": "shared keys", "key": KEY},
    }
    (folder / "wrong").mkdir(exist_ok=True)
    manifest = []
    for wrong in WRONG:
        right, name = folder / f"{wrong.of}.scx", f"wrong/{wrong.name}.scx"
        if wrong.written is None:
            (folder / name).write_bytes(wrong.change(right.read_bytes()))
        else:
            options = dict(authentic[wrong.of])
            held = read_container(right, **options)
            tensors, words = dict(held.tensors), dict(held.metadata)
            wrong.written(tensors, words)
            options["encrypt"] = options.pop("protection", "encrypted") == "encrypted"
            write_container(folder / name, tensors, words, **options)
        opened = wrong.opened or wrong.of
        manifest.append({"file": name, "opened": opened, "refusal": wrong.refusal, "why": wrong.why})
    return manifest


def derived_keys(session: Session) -> dict[str, Any]:
    """What is derived from the master key, down to the permutations under which the cache is stored."""
    purposes = ("cache file", "sealed cache", "a purpose of your own")
    branches = (None, "00" * 16, bytes(range(16)).hex())
    keys = [
        {"purpose": purpose, "branch": branch, "key": session.derive_key(purpose, branch=branch).reveal().hex()}
        for purpose, branch in itertools.product(purposes, branches)
    ]
    drawn = [session.feature_key(layer, torch.device("cpu")) for layer in range(SHAPE.num_layers)]
    permutations = [
        {"layer": layer, "sequence": sequence, "key": key.key[sequence].tolist(), "value": key.value[sequence].tolist()}
        for layer, key in enumerate(drawn)
        for sequence in range(2)
    ]
    return {
        "master_key": MASTER.hex(),
        "session_id": SESSION_ID.hex(),
        "session_keys": keys,
        "feature_permutations": permutations,
    }


def write_numbers() -> list[dict[str, int]]:
    cases = ((0, 0, 0), (0, 0, 1), (0, 3, 2**28), (1, 0, 7), (4095, 65534, 2**31 - 1))
    return [
        {"epoch": epoch, "sequence": sequence, "count": count,
         "number": int(ops.WriteCounter(epoch, count).take(sequence + 1, 1)[sequence, 0])}
        for epoch, sequence, count in cases
    ]  # fmt: skip


def sealed_rows() -> list[dict[str, Any]]:
    """Rows of one head, under numbers, layers and heads at the edges of their fields."""
    numbers = (0, 1, 2**28 - 1, 2**28, 2**32 + 5, 2**60 - 1)
    places = ((0, 0), (31, 7), (2**16 - 1, 2**16 - 1))
    sizes = (("bfloat16", 8), ("float16", 128), ("float32", 80), ("float32", 256))
    rows = []
    for place, (number, (layer, head)) in enumerate(itertools.product(numbers, places)):
        (dtype, head_dim), rounds, is_value = sizes[place % 4], (20, 12, 8)[place // 2 % 3], place % 2 == 1
        key = hashlib.sha256(f"golden row {place}".encode()).digest()
        size = head_dim * _DTYPES[dtype].itemsize
        plain = hashlib.shake_256(key).digest(size)
        x = torch.frombuffer(bytearray(plain), dtype=_DTYPES[dtype]).view(1, 1, 1, head_dim)
        sealing = ops.Sealing(ops.key_words(key), torch.tensor([[number]]), layer, rounds, head)
        sealed = ops.seal(x, sealing, is_value=is_value).view(torch.uint8).numpy().tobytes()
        rows.append({
            "key": key.hex(), "rounds": rounds, "write_number": number, "layer": layer, "head": head,
            "is_value": is_value, "dtype": dtype, "head_dim": head_dim,
            "words": specification.counter_words(number, layer, head, is_value, size),
            "plain": plain.hex(), "sealed": sealed.hex(),
        })  # fmt: skip
    return rows


def file_keys(folder: Path, session: Session) -> list[dict[str, str]]:
    """The key of each right file, from its salt and what it was written with."""
    cache_key = session.derive_key("cache file").reveal()
    written: tuple[tuple[str, bytes | None, str | None], ...] = (
        ("session", KEY, None), ("session-passphrase", None, PASSPHRASE), ("cache", cache_key, None),
        ("shared-keys", KEY, None),
    )  # fmt: skip
    keys = []
    for name, key, passphrase in written:
        words = specification.split((folder / f"{name}.scx").read_bytes())[0]
        own = specification.file_key(words, key, passphrase)
        keys.append({"file": f"{name}.scx", "salt": words["salt"], "kdf": words["kdf"], "key": own.hex()})
    return keys


def write(folder: Path) -> None:
    with fixed_randomness():
        session = write_right(folder)
        manifest = write_wrong(folder, session)
    vectors = {"keys": derived_keys(session), "file_keys": file_keys(folder, session)}
    vectors |= {"write_numbers": write_numbers(), "sealed_rows": sealed_rows()}
    for name, content in (("manifest.json", manifest), ("vectors.json", vectors)):
        (folder / name).write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    write(Path(sys.argv[1]))
