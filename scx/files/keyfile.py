"""Sessions on disk: the keys of one conversation in an encrypted file, without the master key.

The file holds the session's secret and, public in its header, what the keys are drawn for. No counter of one-time keys
is in it, because none is needed: whoever loads the file goes on in a branch of its own (`scx.keys`), so that two
processes that load it, or one that loads it and one that never stopped, draw different one-time keys, and the same
keys of the cache.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, fields, replace
from typing import Any

import torch
from transformers import PreTrainedModel

from scx.architecture import ModelShape, encoded_decoders, model_shape
from scx.files.container import is_number, read_container, write_container
from scx.files.header import read_json
from scx.files.refusal import FileRefusedError, malformed
from scx.keys import CIPHER_ROUNDS, KeySettings, Session
from scx.keys.settings import NOISE_DISTRIBUTIONS, SESSION_ID_BYTES
from scx.keystream import KEY_BYTES, Secret
from scx_kernels.hidden import WipedBytes, guarded

__all__ = ["load_keys", "save_keys"]

_KIND = "session"
_MAX_BYTES = 4096
_MAX_SIZE = 2**31
"""Layers, heads, features, sequences, saves: nothing counts further."""
_SHAPE = [f.name for f in fields(ModelShape) if f.name != "max_tokens"]
_SETTINGS = [f.name for f in fields(KeySettings)]


@guarded
def save_keys(
    path: str | os.PathLike[str],
    session: Session,
    *,
    passphrase: str | bytes | None = None,
    key: Secret | bytes | None = None,
) -> None:
    """Write a session's keys into an encrypted file that `load_keys` reads.

    The header shows the session's id, settings and sizes and the model's fingerprint; the secret is encrypted with
    AES-256-GCM and the whole file authenticated. The file is written as a whole or not at all, with mode 0600.

    Args:
        path: the file; an old one of that name is replaced, behind a link too.
        session: `cache.session` of the conversation.
        passphrase: text or bytes from which Scrypt makes the key. Give either this or `key`.
        key: 32 bytes.

    Raises: TypeError, ValueError naming the argument; OSError if the file cannot be written.
    """
    if not isinstance(session, Session):
        raise TypeError(f"session: expected a Session, got {type(session).__name__}")
    metadata = {
        "session": session.id,
        "model": session.shape.fingerprint,
        "batch_size": str(session.batch_size),
        "newest_save": str(session.newest_save),
        "shape": json.dumps({name: getattr(session.shape, name) for name in _SHAPE}),
        "settings": json.dumps(asdict(session.settings)),
    }
    secret = torch.frombuffer(WipedBytes(session._secret.reveal()), dtype=torch.uint8)
    write_container(path, {"secret": secret}, metadata, kind=_KIND, passphrase=passphrase, key=key)


@guarded
def load_keys(
    path: str | os.PathLike[str],
    *,
    passphrase: str | bytes | None = None,
    key: Secret | bytes | None = None,
    model: PreTrainedModel | ModelShape | None = None,
) -> Session:
    """Read a session that `save_keys` wrote, to go on with it here.

    Feature permutations and derived keys are the saved session's; one-time keys come from a branch that nobody else
    has, however often the file is loaded. A model continues the session if it is encoded with a generator of the same
    settings, such as `SCXKeyGenerator.for_session(session)`.

    Args:
        path: the file.
        passphrase, key: what it was written with.
        model: the model, plain or encoded, or its shape: a session of another one is refused. Without it, the model
            refuses a foreign session when it is given its cache.

    Raises: FileRefusedError, whose `reason` is "format", "version", "kind", "model" or "key", and nothing is loaded;
        TypeError, ValueError naming the argument; OSError if the file cannot be read.
    """
    expected = None if model is None else _shape_of(model)

    def check(metadata: Mapping[str, str], _: object) -> None:
        if expected is not None and metadata.get("model") != expected.fingerprint:
            raise FileRefusedError("model", "the session belongs to another model than the one given")

    container = read_container(path, kind=_KIND, passphrase=passphrase, key=key, check=check, max_bytes=_MAX_BYTES)
    secret = container.tensors.get("secret")
    if len(container.tensors) != 1 or secret is None or secret.dtype != torch.uint8 or secret.shape != (KEY_BYTES,):
        raise FileRefusedError("format", f"the payload: expected the tensor secret of {KEY_BYTES} bytes")
    try:
        with malformed("the header describes no session"):
            return _restore(Secret(secret.numpy().data, "secret"), container.metadata, expected)
    finally:
        secret.zero_()


def _shape_of(model: PreTrainedModel | ModelShape) -> ModelShape:
    if isinstance(model, ModelShape):
        return model
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"model: expected a model or a ModelShape, got {type(model).__name__}")
    for decoder in encoded_decoders(model):
        shape: ModelShape = decoder._scx.shape
        return shape
    return model_shape(model)


def _restore(secret: Secret, metadata: Mapping[str, str], expected: ModelShape | None) -> Session:
    """A session in a branch of its own. Raises KeyError, TypeError, ValueError for what describes none."""
    shape = _read_shape(_read_object("shape", metadata["shape"], _SHAPE))
    settings = _read_settings(_read_object("settings", metadata["settings"], _SETTINGS), shape)
    session_id = bytes.fromhex(metadata["session"])
    if len(session_id) != SESSION_ID_BYTES or session_id.hex() != metadata["session"]:
        raise ValueError("session: expected 16 bytes in hexadecimal")
    if metadata["model"] != shape.fingerprint:
        raise ValueError("model: not the fingerprint in shape")
    batch_size = _written("batch_size", metadata, least=1)
    if expected is not None:
        shape = replace(shape, max_tokens=expected.max_tokens)
    session = Session(secret, settings, shape, batch_size, session_id)
    session.newest_save = _written("newest_save", metadata)
    return session


def _read_object(name: str, text: str, names: list[str]) -> dict[str, Any]:
    read = read_json(text)
    if not isinstance(read, dict) or set(read) != set(names):
        raise ValueError(f"{name}: expected an object with {sorted(names)}")
    return read


def _written(name: str, metadata: Mapping[str, str], least: int = 0) -> int:
    word = metadata[name]
    return _count(name, int(word) if is_number(word) else None, least)


def _count(name: str, value: Any, least: int = 0) -> int:
    if type(value) is not int or not least <= value < _MAX_SIZE:
        raise ValueError(f"{name}: expected a whole number from {least}")
    return value


def _number(name: str, value: Any, most: float) -> float:
    if type(value) not in (int, float) or not 0 < value < most:
        raise ValueError(f"{name}: expected a number between 0 and {most:g}")
    return float(value)


def _read_shape(read: dict[str, Any]) -> ModelShape:
    rms, fingerprint = _number("first_norm_rms", read.pop("first_norm_rms"), 1e9), read.pop("fingerprint")
    if not isinstance(fingerprint, str):
        raise ValueError("fingerprint: expected text")
    sizes = {name: _count(name, value, least=1) for name, value in read.items()}
    if sizes["num_heads"] % sizes["num_kv_heads"]:
        raise ValueError("num_heads: expected a multiple of num_kv_heads")
    return ModelShape(**sizes, first_norm_rms=rms, fingerprint=fingerprint)


def _are_numbers(layers: Any) -> bool:
    return isinstance(layers, list) and all(type(layer) is int for layer in layers)


def _read_settings(read: dict[str, Any], shape: ModelShape) -> KeySettings:
    if type(read["alp"]) is not bool or read["noise_distribution"] not in NOISE_DISTRIBUTIONS:
        raise ValueError("settings: expected alp to be a boolean and noise_distribution a known one")
    start, end = read["start_layers"], read["end_layers"]
    layers = range(shape.num_layers)
    if not _are_numbers(start) or start != list(layers[: len(start)]):
        raise ValueError("start_layers: expected the first layers")
    if not _are_numbers(end) or end != list(layers[max(len(layers) - len(end), len(start)) :]):
        raise ValueError("end_layers: expected the last layers")
    sealed, rounds = read["sealed_layers"], read["cipher_rounds"]
    if not _are_numbers(sealed) or [layer for layer in sorted(set(sealed)) if layer in layers] != sealed:
        raise ValueError("sealed_layers: expected layers in order")
    if rounds not in CIPHER_ROUNDS or type(rounds) is not int:
        raise ValueError("cipher_rounds: expected a known number")
    return KeySettings(
        redundant_num=_count("redundant_num", read["redundant_num"]),
        alp=read["alp"],
        noise_scale=_number("noise_scale", read["noise_scale"], 1e4),
        noise_distribution=read["noise_distribution"],
        start_layers=tuple(start),
        end_layers=tuple(end),
        sealed_layers=tuple(sealed),
        cipher_rounds=rounds,
    )
