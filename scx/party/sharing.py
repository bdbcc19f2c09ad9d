"""Key sharing (stage 2): the token permutations of the middle blocks, as an object and as a file.

With them the untrusted side strips and orders its own products of those blocks. Keys of the first and last blocks are
not in it, and follow from nothing in it.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from scx.container import FileRefusedError, read_container, write_container
from scx.keystream import Secret

__all__ = ["SharedKeys", "load_shared_keys", "save_shared_keys"]

_KIND = "shared keys"


@dataclass(frozen=True, repr=False)
class SharedKeys:
    """What the secure side gives away in stage 2.

    `token_position` (M, B, S) int64: where each token lies among the rows of each middle block in the prefill.
    `positions` (B or 1, S) int64: the tokens' rotary positions. `blocks`: the M middle blocks. `session` and `model`:
    public id and fingerprint of what they belong to.
    """

    session: str
    model: str
    blocks: tuple[int, ...]
    token_position: Tensor
    positions: Tensor

    def __repr__(self) -> str:
        return f"SharedKeys(session={self.session}, blocks={len(self.blocks)}, tokens={self.positions.shape[1]})"


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
