"""Every decoder that a test makes is encoded when it is first used, in one of the settings below."""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import nn
from transformers.generation import GenerationMixin

from scx import SCXKeyGenerator, encode_llama
from scx.architecture import SUPPORTED

__all__ = ["SETTINGS", "Setting", "encode_at_first_use", "left_plain"]


@dataclass(frozen=True)
class Setting:
    """How decoders are encoded: options of the key generator, and of `encode_llama`."""

    keys: dict[str, Any]
    placement: dict[str, Any] = field(default_factory=dict)

    def encode(self, decoder: nn.Module) -> None:
        with left_plain():  # calibration is a plain pass
            encode_llama(decoder, SCXKeyGenerator.for_model(decoder, **self.keys), **self.placement)


SETTINGS = {
    "rows": Setting({"redundant_num": 3, "alp": True}),
    "sealed": Setting({"redundant_num": 3, "cache_encoding": "sealed"}),
    "split": Setting({"redundant_num": 3, "alp": True}, {"secure_device": "cpu"}),
}

_plain = ContextVar("plain", default=False)


@contextmanager
def left_plain() -> Iterator[None]:
    """What runs inside is not encoded."""
    token = _plain.set(True)
    try:
        yield
    finally:
        _plain.reset(token)


def encode_at_first_use(setting: Setting, patch: pytest.MonkeyPatch) -> None:
    """Have a plain decoder's forward encode it first, and whatever looks at a model before its first forward."""

    def encode_inside(model: Any) -> None:
        for module in list(model.modules()) if isinstance(model, nn.Module) else ():
            if type(module) in SUPPORTED and not any(parameter.is_meta for parameter in module.parameters()):
                setting.encode(module)

    for kind in SUPPORTED:
        patch.setattr(kind, "forward", _encoding_itself(kind, kind.forward, setting))
    for name in ("generate", "generate_batch"):
        patch.setattr(GenerationMixin, name, _encoding_self(getattr(GenerationMixin, name), encode_inside))
    patch.setattr(torch, "compile", _encoding_argument(torch.compile, encode_inside))
    patch.setattr(torch.export, "export", _encoding_argument(torch.export.export, encode_inside))


def _encoding_itself(kind: type, forward: Callable[..., Any], setting: Setting) -> Callable[..., Any]:
    @functools.wraps(forward)
    def encoded_first(self: Any, *args: Any, **kwargs: Any) -> Any:
        if type(self) is not kind or _plain.get():
            return forward(self, *args, **kwargs)
        setting.encode(self)
        return self.forward(*args, **kwargs)

    return encoded_first


def _encoding_self(method: Callable[..., Any], encode: Callable[[Any], None]) -> Callable[..., Any]:
    @functools.wraps(method)
    def encoded_first(self: Any, *args: Any, **kwargs: Any) -> Any:
        encode(self)
        return method(self, *args, **kwargs)

    return encoded_first


def _encoding_argument(function: Callable[..., Any], encode: Callable[[Any], None]) -> Callable[..., Any]:
    """Of a function whose first argument is a model or one of its methods, which encoding replaces."""

    @functools.wraps(function)
    def encoded_first(first: Any = None, *args: Any, **kwargs: Any) -> Any:
        owner = getattr(first, "__self__", None)
        encode(first if owner is None else owner)
        return function(first if owner is None else getattr(owner, first.__name__), *args, **kwargs)

    return encoded_first
