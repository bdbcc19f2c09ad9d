"""Modules as they are now: a copy on another device that follows its source, and a watch over those that must stay.

What changes by neither object, memory nor counter of versions, as `weight.data.mul_` does, is seen by whoever uses the
module itself, by a copy when it is made anew, and by a watch where it looks at numbers.
"""

import copy
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from scx.architecture import is_hooked

__all__ = ["Mirror", "Watch", "accelerated"]

_SAMPLE = 64
_NUMBERS = ("scaling", "variance_epsilon", "sliding_window", "attention_scaling")
"""What a module of the blocks computes with beside its tensors and modules."""


def accelerated(module: nn.Module) -> bool:
    """Whether all that is around a module's forward is accelerate's moving of tensors to where its weights are."""
    hook = getattr(module, "_hf_hook", None)
    return hook is not None and getattr(hook, "offload", None) is False


class _Look:
    """What modules are at a moment: their modules, hooks and numbers, their tensors and where and how often these were
    written. It keeps what it names, so that nothing else comes to be at the same address."""

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        self._all = [vars(module) for module in modules]
        self._tensors = [x[name] for x in self._all for name in ("_parameters", "_buffers")]
        self._others = [x[name] for x in self._all for name in ("_modules", "_forward_hooks", "_forward_pre_hooks")]
        self._numbers = [(x, name) for x in self._all for name in _NUMBERS if name in x]
        self._kept = [*self._named(self._tensors), *self._named(self._others)]
        self._seen = self._see()

    def holds(self) -> bool:
        """Whether all of it is as it was."""
        return self._see() == self._seen

    @staticmethod
    def _named(held: list[dict[str, Any]]) -> Iterator[Any]:
        return chain.from_iterable(x.values() for x in held)

    def _see(self) -> tuple[list[Any], ...]:
        tensors = [x for x in self._named(self._tensors) if x is not None]
        return (
            list(map(id, self._named(self._others))),
            list(map(id, tensors)),
            [x.data_ptr() for x in tensors],
            [x.dtype for x in tensors],
            [None if x.is_inference() else x._version for x in tensors],
            [x.get("forward") for x in self._all],
            [x[name] for x, name in self._numbers],
        )


class Mirror:
    """Modules on one device: those that are there, and copies of others, which follow them."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._copies: dict[str, tuple[nn.Module, _Look, nn.Module]] = {}

    def of(self, name: str, module: Any) -> Any:
        """The module, or its copy, made anew if the module is another or has changed.

        Args:
            name: by which the copy is kept.
        """
        tensors = (*module.parameters(), *module.buffers())
        if all(x.is_meta or x.device == self._device for x in tensors):
            return module
        return self.copy_of(name, module)

    def copy_of(self, name: str, module: Any) -> Any:
        """A copy of the module, also if that is there."""
        known = self._copies.get(name)
        if known is None or known[0] is not module or not known[1].holds():
            look = _Look([*module.modules()])
            copied = copy.deepcopy(module)._apply(lambda x: x if x.is_meta else x.to(self._device))
            known = self._copies[name] = (module, look, copied)
        return known[2]

    def renew(self) -> None:
        """Have every copy made anew when it is next asked for."""
        self._copies.clear()


def _sample(module: nn.Module) -> Tensor:
    """The bytes of some numbers of each of a module's own parameters, from all over it."""
    parts = [x.detach().flatten() for x in module.parameters(recurse=False) if not x.is_meta]
    drawn = [x[:: -(-len(x) // _SAMPLE)].contiguous().view(torch.uint8).cpu() for x in parts if len(x)]
    return torch.cat(drawn) if drawn else torch.empty(0, dtype=torch.uint8)


class Watch:
    """Modules that must stay as they are, because somebody else computes with others that were the same.

    Args:
        modules: by the names of which `changed` speaks.
    """

    def __init__(self, modules: Mapping[str, nn.Module]) -> None:
        named = [(name, *part) for name, module in modules.items() for part in module.named_modules()]
        self._named = {f"{name}.{path}" if path else name: module for name, path, module in named}
        self._look = _Look([*self._named.values()])
        self._each = {name: _Look([module]) for name, module in self._named.items()}
        self._samples = {name: _sample(module) for name, module in self._named.items()}

    def hooked(self) -> str | None:
        """The name of a module around whose forward there is something."""
        return next((name for name, x in self._named.items() if is_hooked(x) and not accelerated(x)), None)

    def changed(self, numbers: bool = False) -> str | None:
        """The name of a module that is not what it was. With `numbers` some of every weight's are compared as well."""
        if not self._look.holds():
            return next(name for name, look in self._each.items() if not look.holds())
        if not numbers:
            return None
        return next(
            (x for x, module in self._named.items() if not torch.equal(_sample(module), self._samples[x])), None
        )
