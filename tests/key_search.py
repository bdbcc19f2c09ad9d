"""A search for key material in whatever form Python gives it: in objects, as far as they reach, and in text."""

import base64
import gc
import re
import struct
import weakref
from collections.abc import Iterable, Iterator, Mapping
from types import CodeType, FrameType, FunctionType, MethodType, ModuleType, TracebackType
from typing import Any

import torch
from torch import Tensor

from scx.keys import Session
from scx.keystream import Secret
from scx_kernels.hidden import Hidden

__all__ = ["KeySearch", "errors_of", "frames_below", "key_material"]

_SHORTEST = 12  # numbers that no other list of numbers repeats by chance
_NEVER_ENTERED = (type, ModuleType, CodeType, FrameType, TracebackType, Hidden)


def key_material(session: Session, *others: Secret) -> dict[str, Any]:
    """What a session must not show, by name: bytes of secrets; tensors of permutations, noise and kept keystream."""
    found: dict[str, Any] = {f"another secret {i}": bytes(secret.reveal()) for i, secret in enumerate(others)}
    for holder, stream in (("session", session._stream), ("branch", session.one_time.stream)):
        found[f"{holder}'s secret"] = bytes(stream._secret.reveal())
        found |= {f"key of {name}": bytes(key.reveal()) for name, key in stream._purpose_keys.items()}
    for (_, device), words in session._cipher_keys.items():
        found[f"cipher key on {device}"] = words.value.numpy().tobytes()
    for keys in session._feature_keys.values():
        for layer, key in enumerate(keys):
            found |= {f"{name} of layer {layer}": getattr(key, name)[0, 0].clone() for name in key.__slots__}
    for layer, (_, ahead, _) in session.one_time._noise_ahead.items():
        found[f"noise of layer {layer}"] = ahead.steps[0, 0].clone()
    for number, kept in enumerate(session._kept.values()):
        found[f"kept keystream {number}"] = kept._words[0][0, 0, 0].clone()
    return found


def _integers(values: Iterable[int]) -> bytes:
    return b"".join(struct.pack("<q", value) for value in values)


class KeySearch:
    """Looks for some key material; `find` in objects, `shown` in text, each giving the names of what it came upon."""

    def __init__(self, material: Mapping[str, Any]) -> None:
        self._bytes: dict[bytes, str] = {}
        self._texts: dict[str, str] = {}
        self._numbers: dict[int, str] = {}
        for name, value in material.items():
            if isinstance(value, bytes):
                self._add_secret(name, value)
            else:
                self._add_tensor(name, value)

    def _add_secret(self, name: str, value: bytes) -> None:
        words = [struct.unpack(f"{order}8{kind}", value) for order in "<>" for kind in "iI"]
        self._bytes |= {value: name, _integers(value): name, value[::-1]: name}
        self._bytes |= {_integers(row): name for row in words}
        self._numbers |= {word: name for row in words for word in row if abs(word) > 2**20}
        self._numbers |= {int.from_bytes(value, order): name for order in ("big", "little")}
        texts = [
            value.hex(),
            base64.b64encode(value).decode().rstrip("="),
            repr(value)[2:-1],
            str(value[:_SHORTEST])[2:-1],
        ]
        texts += [", ".join(map(str, value[:_SHORTEST])), *(", ".join(map(str, row[:2])) for row in words)]
        self._texts |= {_without_space(text): name for text in texts}
        self._texts |= {str(word): name for row in words for word in row if abs(word) > 2**20}

    def _add_tensor(self, name: str, value: Tensor) -> None:
        self._bytes[value.numpy().tobytes()] = name
        if not value.is_floating_point():
            self._bytes[_integers(value.tolist())] = name
        self._texts[",".join(map(str, value.tolist()[:_SHORTEST]))] = name
        self._texts[_without_space(repr(value))[len("tensor([") :][:30]] = name

    def shown(self, text: str) -> set[str]:
        """Whose text, in any of its spellings, is in this one."""
        flat = _without_space(text)
        return {name for form, name in self._texts.items() if form in flat}

    def find(self, start: Iterable[object]) -> set[str]:
        """What can be reached from these objects: through attributes, slots, containers, closures, bound methods, weak
        references and memory that is shared; not through classes and modules, nor inside of what is `Hidden`."""
        found: set[str] = set()
        for x in reachable(start):
            found |= self._in(x)
        return found

    def _in(self, x: object) -> set[str]:
        if isinstance(x, str):
            return self.shown(x) if len(x) >= _SHORTEST else set()
        if isinstance(x, int):
            return {self._numbers[x]} if x in self._numbers else set()
        return {name for held in _as_bytes(x) for value, name in self._bytes.items() if value in held}


def _without_space(text: str) -> str:
    return re.sub(r"\s+", "", text)


def _as_bytes(x: object) -> Iterator[bytes]:
    if isinstance(x, (bytes, bytearray)):
        yield bytes(x)
    elif isinstance(x, memoryview):
        yield x.tobytes()
    elif isinstance(x, Tensor) and x.device.type == "cpu" and x.layout == torch.strided:
        x = x.detach()
        yield x.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        if not x.is_floating_point():
            yield x.long().contiguous().numpy().tobytes()
    elif isinstance(x, (list, tuple)) and len(x) >= 8 and all(type(each) is int and abs(each) < 2**62 for each in x):
        yield _integers(x)


def reachable(start: Iterable[object]) -> list[object]:
    seen: dict[int, object] = {}
    pending = list(start)
    while pending:
        x = pending.pop()
        if id(x) in seen:
            continue
        seen[id(x)] = x
        if isinstance(x, _NEVER_ENTERED):
            continue
        if isinstance(x, FunctionType):
            pending += [*(x.__closure__ or ()), *(x.__defaults__ or ()), *(x.__kwdefaults__ or {}).values(), x.__dict__]
        elif isinstance(x, MethodType):
            pending += [x.__self__, x.__func__]
        elif isinstance(x, weakref.ref):
            pending.append(x())
        elif isinstance(x, memoryview):
            pending.append(x.obj)
        elif isinstance(x, Tensor):
            pending += [x.grad, x._base, vars(x)]
        else:
            pending += gc.get_referents(x)
    return list(seen.values())


def errors_of(error: BaseException) -> list[BaseException]:
    """An error, and those it came from."""
    found: list[BaseException] = []
    pending: list[BaseException | None] = [error]
    while pending:
        each = pending.pop()
        if each is not None and each not in found:
            found.append(each)
            pending += [each.__cause__, each.__context__]
    return found


def frames_below(error: BaseException, file: str) -> list[FrameType]:
    """The frames that an error and its causes have left, but for those of one file."""
    frames = []
    for each in errors_of(error):
        step = each.__traceback__
        while step is not None:
            if step.tb_frame.f_code.co_filename != file:
                frames.append(step.tb_frame)
            step = step.tb_next
    return frames
