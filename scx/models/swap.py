"""Swapping a module's class in place, and back: no weight is copied, and hooks stay where they are."""

from typing import Any

from torch import nn

from scx.architecture import Decoder

__all__ = ["check_forwards", "encode_class", "restore_class"]

_encoded_classes: dict[tuple[type[Any], type[Any]], type[Any]] = {}


def _encoded_class(original: type[Any], encoded: type[Any]) -> type[Any]:
    """The subclass of `original` with the forward of `encoded`.

    It keeps the original's name and module: transformers writes a model's class name into its saved configuration
    and finds recordable outputs by it.
    """
    pair = (encoded, original)
    if pair not in _encoded_classes:
        names = {"__module__": original.__module__, "__qualname__": original.__qualname__, "__doc__": encoded.__doc__}
        _encoded_classes[pair] = type(original.__name__, pair, names)
    return _encoded_classes[pair]


def encode_class(module: Any, encoded: type[Any], original: type[Any] | None = None) -> None:
    """Give a module the forward of `encoded`, above its own class or the one given."""
    _swap(module, _encoded_class(type(module) if original is None else original, encoded))


def restore_class(module: Any) -> None:
    """Undo `encode_class`."""
    _swap(module, type(module).__bases__[1])


def _swap(module: Any, kind: type[Any]) -> None:
    """Change a module's class under the hooks that accelerate may have put around its forward."""
    hook = getattr(module, "_hf_hook", None)
    if hook is None:
        module.__class__ = kind
        return
    from accelerate.hooks import add_hook_to_module, remove_hook_from_module  # noqa: PLC0415

    remove_hook_from_module(module)
    del module.forward  # the original's, which accelerate leaves in the instance in front of the class
    module.__class__ = kind
    add_hook_to_module(module, hook)


def check_forwards(decoder: Decoder) -> None:
    """A forward that somebody put into a module would hide the class that is swapped in."""
    modules: list[nn.Module] = [decoder, *decoder.layers, *(layer.self_attn for layer in decoder.layers)]
    for module in modules:
        if "forward" in vars(module) and not hasattr(module, "_hf_hook"):
            raise TypeError(
                f"model: a {type(module).__name__} has a forward of its own in the instance; remove it first"
            )
