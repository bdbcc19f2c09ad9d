"""Shared keys on disk: what stage 2 gives to the untrusted side, in an encrypted file."""

import json
import os
from collections.abc import Mapping

import torch

from scx.files.container import MAX_ENCRYPTED_BYTES, Container, read_container, write_container
from scx.files.header import read_json
from scx.files.refusal import FileRefusedError, malformed
from scx.keys.sharing import SharedKeys
from scx.keystream import Secret
from scx_kernels.hidden import guarded

__all__ = ["load_shared_keys", "save_shared_keys"]

_KIND = "shared keys"
_MAX_BYTES = 2**26
_MAX_BLOCKS = 2**16


@guarded
def save_shared_keys(
    path: str | os.PathLike[str],
    shared: SharedKeys,
    *,
    passphrase: str | bytes | None = None,
    key: Secret | bytes | None = None,
) -> None:
    """Write shared keys into an encrypted, authenticated file for the untrusted side.

    Args:
        path: the file; an old one of that name is replaced, behind a link too. It appears whole or not at all, with
            mode 0600.
        shared: from `Session.share_keys`.
        passphrase: text or bytes agreed with the untrusted side. Give either this or `key`, 32 bytes.

    Raises: TypeError, ValueError naming the argument; OSError if the file cannot be written.
    """
    if not isinstance(shared, SharedKeys):
        raise TypeError(f"shared: expected SharedKeys, got {type(shared).__name__}")
    metadata = {"session": shared.session, "model": shared.model, "blocks": json.dumps(shared.blocks)}
    tensors = {"token_position": shared.token_position, "positions": shared.positions}
    write_container(path, tensors, metadata, kind=_KIND, passphrase=passphrase, key=key)


@guarded
def load_shared_keys(
    path: str | os.PathLike[str],
    *,
    passphrase: str | bytes | None = None,
    key: Secret | bytes | None = None,
    session_id: str | None = None,
    max_bytes: int = _MAX_BYTES,
) -> SharedKeys:
    """Read what `save_shared_keys` wrote.

    Args:
        path: the file.
        passphrase, key: what it was written with.
        session_id: the session that it must belong to; default: any.
        max_bytes: how many bytes of data to accept. 8 are needed for each token and block: the default, 64 MiB, is
            262,144 tokens of 32 blocks. A file has 256 MiB at most.

    Raises: FileRefusedError, whose `reason` is "format", "version", "kind", "session" or "key", and nothing is loaded;
        TypeError, ValueError naming the argument; OSError if the file cannot be read.
    """

    def check(metadata: Mapping[str, str], _: object) -> None:
        if session_id is not None and metadata.get("session") != session_id:
            raise FileRefusedError("session", f"the keys belong to session {metadata.get('session')!r:.80}")

    container = read_container(
        path, kind=_KIND, passphrase=passphrase, key=key, check=check, max_bytes=min(max_bytes, MAX_ENCRYPTED_BYTES)
    )
    with malformed("the file holds no shared keys"):
        return _restore(container)


def _restore(container: Container) -> SharedKeys:
    """Raises KeyError, TypeError, ValueError for what are no shared keys."""
    metadata, tensors = container.metadata, container.tensors
    if set(tensors) != {"token_position", "positions"}:
        raise ValueError("tensors: expected token_position and positions")
    blocks, index, positions = read_json(metadata["blocks"]), tensors["token_position"], tensors["positions"]
    if not isinstance(blocks, list) or not all(type(block) is int and 0 <= block < _MAX_BLOCKS for block in blocks):
        raise ValueError(f"blocks: expected block numbers below {_MAX_BLOCKS}")
    if index.dtype != torch.int64 or index.dim() != 3 or len(index) != len(blocks) or 0 in index.shape[1:]:
        raise ValueError("token_position: expected int64 (blocks, B, S)")
    rows = (1, index.shape[1])
    if positions.dtype != torch.int64 or positions.dim() != 2 or positions.shape[0] not in rows:
        raise ValueError("positions: expected int64 (B or 1, S)")
    if positions.shape[1] != index.shape[2] or positions.min() < 0 or (index.numel() and index.min() < 0):
        raise ValueError("token_position, positions: expected one of each per token, from 0")
    return SharedKeys(metadata["session"], metadata["model"], tuple(blocks), index, positions)
