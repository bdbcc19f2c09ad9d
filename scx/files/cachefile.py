"""Encoded caches on disk: K and V as they are stored, authenticated with a key of their session.

The file holds no key. What it shows to whoever reads it is what the cache in memory shows: K and V encoded, their
shapes, and the public ids. Its tag says that the session's holder wrote exactly this cache; saves of a session are
numbered, so that an old file is told from a new one by whoever remembers a number.
"""

import json
import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin, DynamicSlidingWindowLayer

from scx.devices import outside_inference_mode
from scx.files.container import Container, FileRefusedError, read_container, write_container
from scx.keys import Session, public_bytes
from scx.keys.settings import BRANCH_BYTES
from scx.kvcache import EncodedCache, GrowingLayer, SealedLayer, SealedSlidingLayer
from scx.kvcache.layers import fill

__all__ = ["load_kvcache", "save_kvcache"]

_KIND = "cache"
_PURPOSE = "cache file"
_MAX_SAVES = 2**31
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_WINDOW = ("window", "length", "records_past")
_LAYERS: dict[str, tuple[type[Any], tuple[str, ...]]] = {
    "full": (GrowingLayer, ()),
    "sealed": (SealedLayer, ("branch",)),
    "sliding": (DynamicSlidingWindowLayer, _WINDOW),
    "sealed sliding": (SealedSlidingLayer, (*_WINDOW, "branch")),
}
"""Kind of a layer in a file -> its class, and what else the file says of it."""


def save_kvcache(path: str | os.PathLike[str], cache: EncodedCache, session: Session) -> int:
    """Write an encoded cache, as it is stored, into an authenticated file that `load_kvcache` reads.

    Args:
        path: the file; an old one of that name is replaced. It appears whole or not at all, with mode 0600.
        cache: a whole cache; its layers may lie on different devices, as `merge_kvcache_dynamic` leaves them.
        session: the session it belongs to.

    Returns: the number of this save, one more than the newest that the session has written or read. Keep it where
        the file's keeper cannot change it (saving the session's keys after its cache does) to refuse older files.
    Raises: TypeError, ValueError naming the argument, for a cache among others whose layers do not fit together or are
        sealed and were edited by hand; OSError if the file cannot be written.
    """
    if not isinstance(cache, EncodedCache):
        raise TypeError(f"cache: expected an encoded cache, as a prefill returns it, got {type(cache).__name__}")
    _check_session(session)
    if session.id != cache.session_id:
        raise ValueError(f"session: this cache belongs to session {cache.session_id}, got {session.id}")
    if not cache.is_complete:
        raise ValueError("cache: this is one part of a split cache; merge the parts first")
    if len(cache.layers) != session.shape.num_layers:
        raise ValueError(f"cache: {len(cache.layers)} of the model's {session.shape.num_layers} layers have filled it")
    cache.attached(session).check_stored("cache")
    number = session.newest_save + 1
    metadata = {
        "session": session.id,
        "model": session.shape.fingerprint,
        "number": str(number),
        "layers": json.dumps([_describe(index, layer) for index, layer in enumerate(cache.layers)]),
    }
    tensors = {}
    for index, layer in enumerate(cache.layers):
        tensors[f"layers.{index}.keys"], tensors[f"layers.{index}.values"] = layer.keys, layer.values
        if isinstance(layer, SealedLayer):
            tensors[f"layers.{index}.writes"] = layer.writes
    if cache.sequences is not None:
        tensors["sequences"] = cache.sequences
    write_container(path, tensors, metadata, kind=_KIND, key=session.derive_key(_PURPOSE), encrypt=False)
    session.newest_save = max(session.newest_save, number)
    return number


@outside_inference_mode()
def load_kvcache(
    path: str | os.PathLike[str],
    session: Session,
    *,
    at_least: int | None = None,
    device: torch.device | str = "cpu",
    max_bytes: int | None = None,
) -> EncodedCache:
    """Read a cache that `save_kvcache` wrote and give it to its session.

    The tag is checked over the bytes that are loaded, in the same pass, before any of them is given out.

    Args:
        path: the file.
        session: the session it belongs to, from `load_keys` or still alive.
        at_least: the lowest number of a save to accept; default: the newest that the session has written or read.
            0 accepts every save, to go back to an earlier state knowingly.
        device: where the cache goes, as a rule the model's device.
        max_bytes: how many bytes to accept; default: what the file has.

    Raises: FileRefusedError, whose `reason` is "format", "version", "kind", "session", "model", "replay" or "key", and
        nothing is loaded; TypeError, ValueError naming the argument; OSError if the file cannot be read.
    """
    _check_session(session)
    oldest = session.newest_save if at_least is None else at_least
    if type(oldest) is not int or oldest < 0:
        raise ValueError(f"at_least: expected a number from 0, got {at_least!r}")

    container = read_container(
        path,
        kind=_KIND,
        key=session.derive_key(_PURPOSE),
        protection="authenticated",
        check=lambda metadata: _check_owner(metadata, session, oldest),
        max_bytes=max_bytes,
    )
    try:
        cache = _restore(container, session, device)
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise FileRefusedError("format", f"the file describes no cache: {error!s:.200}") from None
    session.newest_save = max(session.newest_save, int(container.metadata["number"]))
    return cache


def _check_session(session: Session) -> None:
    if not isinstance(session, Session):
        raise TypeError(f"session: expected a Session, got {type(session).__name__}")


def _describe(index: int, layer: CacheLayerMixin) -> dict[str, Any]:
    if type(layer) not in (GrowingLayer, SealedLayer, SealedSlidingLayer, DynamicSlidingWindowLayer):
        raise TypeError(f"cache: layer {index} is a {type(layer).__name__}, which cannot be saved")
    if layer.get_seq_length() == 0:
        raise ValueError(f"cache: layer {index} holds no tokens")
    sealed = {"branch": layer.branch} if isinstance(layer, SealedLayer) else {}
    if not isinstance(layer, DynamicSlidingWindowLayer):
        return {"kind": "sealed" if sealed else "full"} | sealed
    window, length, records_past = layer.sliding_window, layer.cumulative_length, layer.record_past
    kind = "sealed sliding" if sealed else "sliding"
    return {"kind": kind, "window": window, "length": length, "records_past": records_past} | sealed


def _check_owner(metadata: Mapping[str, str], session: Session, oldest: int) -> None:
    if metadata.get("session") != session.id:
        named = metadata.get("session", "")
        raise FileRefusedError("session", f"the cache belongs to session {named!r:.80}, got {session.id}")
    if metadata.get("model") != session.shape.fingerprint:
        raise FileRefusedError("model", "the cache belongs to another model than the session")
    number = metadata.get("number", "")
    if not (number.isascii() and number.isdigit() and len(number) < 12 and 0 < int(number) < _MAX_SAVES):
        raise FileRefusedError("format", f"number: expected that of a save, got {number!r:.80}")
    if int(number) < oldest:
        raise FileRefusedError("replay", f"the file is save {number} of its session, expected {oldest} or a newer one")


def _restore(container: Container, session: Session, device: torch.device | str) -> EncodedCache:
    """The cache in a file. Raises KeyError, TypeError, ValueError if the tensors do not fit together."""
    tensors, described = container.tensors, json.loads(container.metadata["layers"])
    if not isinstance(described, list) or len(described) != session.shape.num_layers:
        raise ValueError(f"layers: expected {session.shape.num_layers}")
    sequences = tensors.pop("sequences", None)
    if sequences is not None:
        _check_sequences(sequences, session)
    rows = session.batch_size if sequences is None else len(sequences)
    layers = [_restore_layer(i, layer, tensors, rows, session, device) for i, layer in enumerate(described)]
    if tensors:
        raise ValueError(f"tensors of no layer: {sorted(tensors)}")
    if len({(layer.get_seq_length(), layer.keys.dtype) for layer in layers}) != 1:
        raise ValueError("layers: expected one length and one dtype")
    return EncodedCache(session, layers, sequences)


def _check_sequences(sequences: Tensor, session: Session) -> None:
    if sequences.dtype != torch.int64 or sequences.dim() != 1 or sequences.numel() == 0:
        raise ValueError("sequences: expected int64 (rows,)")
    if sequences.min() < 0 or sequences.max() >= session.batch_size:
        raise ValueError(f"sequences: expected 0..{session.batch_size - 1}")


def _restore_layer(
    index: int,
    described: Any,
    tensors: dict[str, Tensor],
    rows: int,
    session: Session,
    device: torch.device | str,
) -> Any:
    keys, values = tensors.pop(f"layers.{index}.keys"), tensors.pop(f"layers.{index}.values")
    shape = (rows, session.shape.num_kv_heads, keys.shape[-2] if keys.dim() == 4 else 0, session.shape.head_dim)
    if keys.shape != shape or values.shape != shape or 0 in shape:
        raise ValueError(f"layer {index}: expected K and V (rows, heads, tokens, head size) of the session")
    if keys.dtype not in _DTYPES or values.dtype != keys.dtype:
        raise ValueError(f"layer {index}: expected K and V of one of {_DTYPES}")
    layer = _empty_layer(index, described, tokens=shape[2])
    if isinstance(layer, SealedLayer) != (index in session.settings.sealed_layers):
        raise ValueError(f"layer {index}: its encoding is not the session's")
    writes = tensors.pop(f"layers.{index}.writes") if isinstance(layer, SealedLayer) else None
    if writes is not None:
        if writes.dtype != torch.int64 or writes.shape != (rows, shape[2]) or writes.min() < 0:
            raise ValueError(f"layer {index}: expected a write number for every row")
        writes = writes.to(device)
    fill(layer, keys.to(device), values.to(device), writes)
    return layer


def _empty_layer(index: int, described: Any, tokens: int) -> Any:
    kind = described.get("kind") if isinstance(described, dict) else None
    if not isinstance(kind, str) or kind not in _LAYERS:
        raise ValueError(f"layer {index}: expected one of the kinds {list(_LAYERS)}")
    layer_class, names = _LAYERS[kind]
    if described.keys() != {"kind", *names}:
        raise ValueError(f"layer {index}: expected {names} of a {kind} layer")
    options = _window(index, described, tokens) if "window" in names else {}
    layer = layer_class(**options)
    if options:
        layer.cumulative_length, layer.record_past = described["length"], described["records_past"]
    if "branch" in names:
        layer.branch = public_bytes("branch", described["branch"], BRANCH_BYTES).hex()
    return layer


def _window(index: int, described: dict[str, Any], tokens: int) -> dict[str, int]:
    """Arguments of a sliding layer that holds `tokens` tokens."""
    window, length, records_past = (described[name] for name in _WINDOW)
    if (type(window), type(length), type(records_past)) != (int, int, bool) or not 2 <= window < 2**31:
        raise ValueError(f"layer {index}: expected the window and length of a sliding layer")
    if not min(length, window - 1) <= tokens <= length:
        raise ValueError(f"layer {index}: {tokens} tokens do not fit a length of {length}")
    return {"sliding_window": window}
