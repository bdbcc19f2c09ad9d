"""Shared keys on disk: what stage 2 gives to the untrusted side, in an encrypted file."""

import json
import os
from collections.abc import Mapping

import torch

from scx.files.container import FileRefusedError, read_container, write_container
from scx.keys.sharing import SharedKeys
from scx.keystream import Secret

__all__ = ["load_shared_keys", "save_shared_keys"]

_KIND = "shared keys"


def save_shared_keys(
    path: str | os.PathLike[str],
    shared: SharedKeys,
    *,
    passphrase: str | bytes | None = None,
    key: Secret | bytes | None = None,
) -> None:
    """Write shared keys into an encrypted, authenticated file for the untrusted side.

    Args:
        path: the file; an old one of that name is replaced. It appears whole or not at all, with mode 0600.
        shared: from `Session.share_keys`.
        passphrase: text or bytes agreed with the untrusted side. Give either this or `key`, 32 bytes.

    Raises: TypeError, ValueError naming the argument; OSError if the file cannot be written.
    """
    if not isinstance(shared, SharedKeys):
        raise TypeError(f"shared: expected SharedKeys, got {type(shared).__name__}")
    metadata = {"session": shared.session, "model": shared.model, "blocks": json.dumps(shared.blocks)}
    tensors = {"token_position": shared.token_position, "positions": shared.positions}
    write_container(path, tensors, metadata, kind=_KIND, passphrase=passphrase, key=key)


def load_shared_keys(
    path: str | os.PathLike[str],
    *,
    passphrase: str | bytes | None = None,
    key: Secret | bytes | None = None,
    session_id: str | None = None,
) -> SharedKeys:
    """Read what `save_shared_keys` wrote.

    Args:
        path: the file.
        passphrase, key: what it was written with.
        session_id: the session that it must belong to; default: any.

    Raises: FileRefusedError, whose `reason` is "format", "version", "kind", "session" or "key", and nothing is loaded;
        TypeError, ValueError naming the argument; OSError if the file cannot be read.
    """

    def check(metadata: Mapping[str, str]) -> None:
        if session_id is not None and metadata.get("session") != session_id:
            raise FileRefusedError("session", f"the keys belong to session {metadata.get('session')!r:.80}")

    container = read_container(path, kind=_KIND, passphrase=passphrase, key=key, check=check)
    try:
        metadata, tensors = container.metadata, container.tensors
        blocks = tuple(json.loads(metadata["blocks"]))
        shared = SharedKeys(
            metadata["session"], metadata["model"], blocks, tensors["token_position"], tensors["positions"]
        )
        _check(shared)
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise FileRefusedError("format", f"the file holds no shared keys: {error!s:.200}") from None
    return shared


def _check(shared: SharedKeys) -> None:
    index, positions, blocks = shared.token_position, shared.positions, shared.blocks
    if not all(type(block) is int and block >= 0 for block in blocks):
        raise ValueError("blocks: expected block numbers")
    if index.dtype != torch.int64 or index.dim() != 3 or len(index) != len(blocks) or 0 in index.shape[1:]:
        raise ValueError("token_position: expected int64 (blocks, B, S)")
    rows = (1, index.shape[1])
    if positions.dtype != torch.int64 or positions.dim() != 2 or positions.shape[0] not in rows:
        raise ValueError("positions: expected int64 (B or 1, S)")
    if positions.shape[1] != index.shape[2] or positions.min() < 0 or (index.numel() and index.min() < 0):
        raise ValueError("token_position, positions: expected one of each per token, from 0")
