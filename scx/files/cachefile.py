"""Encoded caches on disk: K and V as they are stored, authenticated with a key of their session.

The file holds no key. What it shows to whoever reads it is what the cache in memory shows: K and V encoded, their
shapes, and the public ids. Its tag says that the session's holder wrote exactly this cache; saves of a session are
numbered, so that an old file is told from a new one by whoever remembers a number.
"""

import json
import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin, DynamicSlidingWindowLayer

from scx.devices import outside_inference_mode
from scx.files.container import TAG_BYTES, is_number, read_container, write_container
from scx.files.header import Entry, read_json
from scx.files.refusal import FileRefusedError, malformed
from scx.keys import Session, public_bytes
from scx.keys.settings import BRANCH_BYTES
from scx.kvcache import EncodedCache, GrowingLayer, SealedLayer, SealedSlidingLayer
from scx.kvcache.conversation import working_on
from scx.kvcache.layers import fill
from scx_kernels.hidden import guarded

__all__ = ["load_kvcache", "save_kvcache"]

_KIND = "cache"
_PURPOSE = "cache file"
_NO_CACHE = "the file describes no cache"
_MAX_NUMBER = 2**31
"""Saves, tokens seen, tokens of a window: nothing counts further."""
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_WINDOW = ("window", "length", "records_past")
_LAYERS: dict[str, tuple[type[Any], tuple[str, ...]]] = {
    "full": (GrowingLayer, ()),
    "sealed": (SealedLayer, ("branch",)),
    "sliding": (DynamicSlidingWindowLayer, _WINDOW),
    "sealed sliding": (SealedSlidingLayer, (*_WINDOW, "branch")),
}
"""Kind of a layer in a file -> its class, and what else the file says of it."""


@guarded
def save_kvcache(path: str | os.PathLike[str], cache: EncodedCache, session: Session) -> int:
    """Write an encoded cache, as it is stored, into an authenticated file that `load_kvcache` reads.

    Args:
        path: the file; an old one of that name is replaced, behind a link too. It appears whole or not at all, with
            mode 0600.
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
    with working_on("cache", cache):  # what is described here is never written over, and can be written out later
        cache.attached(session).check_stored("cache")
        layers = [_describe(index, layer) for index, layer in enumerate(cache.layers)]
        tensors = _tensors(cache)
    number = session.newest_save + 1
    metadata = {
        "session": session.id,
        "model": session.shape.fingerprint,
        "number": str(number),
        "layers": json.dumps(layers),
    }
    write_container(path, tensors, metadata, kind=_KIND, key=session.derive_key(_PURPOSE), encrypt=False)
    session.newest_save = max(session.newest_save, number)
    return number


@guarded
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

    Before any data is read, the header must describe a cache of this session. The tag is checked over the bytes that
    are loaded, in the same pass, before any of them is given out.

    Args:
        path: the file.
        session: the session it belongs to, from `load_keys` or still alive.
        at_least: the lowest number of a save to accept; default: the newest that the session has written or read.
            0 accepts every save, to go back to an earlier state knowingly.
        device: where the cache goes, as a rule the model's device.
        max_bytes: how many bytes of data to accept; default: what the session's sequences take in float32 with as many
            tokens as the model has positions (131,072 for a session from a file that was loaded without its model).

    Raises: FileRefusedError, whose `reason` is "format", "version", "kind", "session", "model", "replay" or "key", and
        nothing is loaded; TypeError, ValueError naming the argument; OSError if the file cannot be read.
    """
    _check_session(session)
    oldest = session.newest_save if at_least is None else at_least
    if type(oldest) is not int or oldest < 0:
        raise ValueError(f"at_least: expected a number from 0, got {at_least!r}")

    layers: list[Any] = []

    def check(metadata: Mapping[str, str], entries: Sequence[Entry]) -> None:
        _check_owner(metadata, session, oldest)
        with malformed(_NO_CACHE):
            layers.extend(_describe_layers(metadata, {entry.name: entry for entry in entries[:-1]}, session))

    container = read_container(
        path,
        kind=_KIND,
        key=session.derive_key(_PURPOSE),
        protection="authenticated",
        check=check,
        max_bytes=_most_bytes(session) if max_bytes is None else max_bytes,
    )
    with malformed(_NO_CACHE):
        cache = _restore(layers, container.tensors, session, device)
    session.newest_save = max(session.newest_save, int(container.metadata["number"]))
    return cache


def _most_bytes(session: Session) -> int:
    """What the longest cache takes for which a session is made."""
    shape = session.shape
    token = shape.num_layers * (2 * shape.num_kv_heads * shape.head_dim * 4 + 8)  # K, V and a write number
    return session.batch_size * (shape.max_tokens * token + 8) + TAG_BYTES


def _tensors(cache: EncodedCache) -> dict[str, Tensor]:
    """What a cache holds, by the names that it has in a file."""
    tensors = {}
    for index, layer in enumerate(cache.layers):
        tensors[f"layers.{index}.keys"], tensors[f"layers.{index}.values"] = layer.keys, layer.values
        if isinstance(layer, SealedLayer):
            tensors[f"layers.{index}.writes"] = layer.writes
    if cache.sequences is not None:
        tensors["sequences"] = cache.sequences
    return tensors


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
    if not (is_number(number) and 0 < int(number) < _MAX_NUMBER):
        raise FileRefusedError("format", f"number: expected that of a save, got {number!r:.80}")
    if int(number) < oldest:
        raise FileRefusedError("replay", f"the file is save {number} of its session, expected {oldest} or a newer one")


def _describe_layers(metadata: Mapping[str, str], tensors: Mapping[str, Entry], session: Session) -> list[Any]:
    """The layers that a header describes, still empty. Raises KeyError, TypeError, ValueError if they are not the
    session's, or the tensors not theirs."""
    described = read_json(metadata["layers"])
    if not isinstance(described, list) or len(described) != session.shape.num_layers:
        raise ValueError(f"layers: expected {session.shape.num_layers}")
    expected: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
    rows, dtype = session.batch_size, tensors["layers.0.keys"].dtype
    if dtype not in _DTYPES:
        raise ValueError(f"layers.0.keys: expected one of {_DTYPES}, got {dtype}")
    if "sequences" in tensors:
        rows = math.prod(tensors["sequences"].shape)
        expected["sequences"] = torch.int64, (rows,)
    layers, lengths = [], set()
    for index, description in enumerate(described):
        name, is_sealed = f"layers.{index}", index in session.settings.sealed_layers
        tokens = (*tensors[f"{name}.keys"].shape, 0, 0, 0)[2]
        shape = (rows, session.shape.num_kv_heads, tokens, session.shape.head_dim)
        layer = _empty_layer(index, description, tokens, is_sealed)
        layers.append(layer)
        lengths.add(layer.cumulative_length if layer.is_sliding else tokens)
        expected |= {f"{name}.keys": (dtype, shape), f"{name}.values": (dtype, shape)}
        expected |= {f"{name}.writes": (torch.int64, (rows, tokens))} if is_sealed else {}
    _check_tensors(tensors, expected)
    if len(lengths) != 1:
        raise ValueError(f"layers: expected one length, got {sorted(lengths)}")
    return layers


def _check_tensors(tensors: Mapping[str, Entry], expected: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]) -> None:
    if tensors.keys() != expected.keys():
        raise ValueError(f"tensors: expected {sorted(expected)}, got {sorted(tensors)}")
    for name, (dtype, shape) in expected.items():
        got = tensors[name]
        if (got.dtype, got.shape) != (dtype, shape) or 0 in shape:
            raise ValueError(f"{name}: expected {dtype} {shape} with tokens, got {got.dtype} {got.shape}")


def _restore(
    layers: list[Any], tensors: Mapping[str, Tensor], session: Session, device: torch.device | str
) -> EncodedCache:
    """The cache of these layers, filled. Raises ValueError for numbers that a session does not write."""
    sequences = tensors.get("sequences")
    if sequences is not None and not 0 <= int(sequences.min()) <= int(sequences.max()) < session.batch_size:
        raise ValueError(f"sequences: expected 0..{session.batch_size - 1}")
    for index, layer in enumerate(layers):
        keys, values = (tensors[f"layers.{index}.{name}"].to(device) for name in ("keys", "values"))
        writes = tensors.get(f"layers.{index}.writes")
        if writes is not None and int(writes.min()) < 0:
            raise ValueError(f"layer {index}: expected write numbers from 0")
        fill(layer, keys, values, None if writes is None else writes.to(device))
    return EncodedCache(session, layers, sequences)


def _empty_layer(index: int, described: Any, tokens: int, is_sealed: bool) -> Any:
    kind = described.get("kind") if isinstance(described, dict) else None
    if not isinstance(kind, str) or kind not in _LAYERS:
        raise ValueError(f"layer {index}: expected one of the kinds {list(_LAYERS)}")
    layer_class, names = _LAYERS[kind]
    if described.keys() != {"kind", *names}:
        raise ValueError(f"layer {index}: expected {names} of a {kind} layer")
    if issubclass(layer_class, SealedLayer) != is_sealed:
        raise ValueError(f"layer {index}: its encoding is not the session's")
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
    if (type(window), type(length), type(records_past)) != (int, int, bool) or not 2 <= window < _MAX_NUMBER:
        raise ValueError(f"layer {index}: expected the window and length of a sliding layer")
    if not min(length, window - 1) <= tokens <= length < _MAX_NUMBER:
        raise ValueError(f"layer {index}: {tokens} tokens do not fit a length of {length}")
    return {"sliding_window": window}
