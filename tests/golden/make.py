"""Writes the golden files into a folder, by this package: `python -m tests.golden.make tests/golden`.

Keys, ids and salts are fixed, so the same code writes the same bytes. What each must be read as, or refused for, is in
`tests/vectors/container.json`.
"""

import hashlib
import itertools
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
from scx.files import container as containers
from scx.files.container import read_container, write_container
from scx.keys import ModelShape
from scx.kvcache import GrowingLayer, SealedLayer, SealedSlidingLayer
from tests.golden.given import KEY, MASTER, MODEL, OTHER_MODEL, PASSPHRASE, SAVES, SESSION_ID, TOKENS, WINDOW
from tests.golden.wrong_files import WRONG

SHAPE = ModelShape(4, 32, 4, 2, 8, 211, 1.25, MODEL)
OTHER_SHAPE = replace(SHAPE, fingerprint=OTHER_MODEL)
SHARED = SharedKeys(
    SESSION_ID.hex(), SHAPE.fingerprint, (1, 2), torch.arange(20).view(2, 2, 5).flip(2), torch.arange(5)[None]
)
WEAK_SCRYPT = (2**4, 8, 1)


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


def write_wrong(folder: Path, session: Session) -> None:
    """The wrong files."""
    authentic: dict[str, dict[str, Any]] = {
        "session": {"kind": "session", "key": KEY},
        "cache": {"kind": "cache", "key": session.derive_key("cache file"), "protection": "authenticated"},
        "shared-keys": {"kind": "shared keys", "key": KEY},
    }
    (folder / "wrong").mkdir(exist_ok=True)
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


def write(folder: Path) -> None:
    with fixed_randomness():
        session = write_right(folder)
        write_wrong(folder, session)
        with mock.patch.object(containers, "SCRYPT", WEAK_SCRYPT):
            save_keys(folder / "session-weak-passphrase.scx", session, passphrase=PASSPHRASE)


if __name__ == "__main__":
    write(Path(sys.argv[1]))
