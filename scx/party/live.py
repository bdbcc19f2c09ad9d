"""Modules as they are now: a copy on another device that follows its source, and a watch over those that must stay.

What changes by neither object, memory nor counter of versions, as `weight.data.mul_` does, is seen by whoever uses the
module itself, by a copy when it is made anew, and by a watch where it looks at numbers.
"""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from scx.architecture import is_hooked

__all__ = ["Followed", "Mirror", "Watch", "accelerated"]

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


class Followed:
    """What was made of modules, by name, and is made anew when they are others or have changed.

    Args:
        by_numbers: whether `renew` compares some numbers of every weight, where making anew costs too much.
    """

    def __init__(self, by_numbers: bool = False) -> None:
        self._by_numbers = by_numbers
        self._made: dict[str, tuple[list[Any], _Look, list[Tensor], Any]] = {}

    def of(self, name: str, modules: Sequence[Any], make: Callable[[], Any]) -> Any:
        """What `make` gives, now or earlier.

        Args:
            name: by which it is kept.
            modules: of which it is made.
        """
        known = self._made.get(name)
        if known is None or any(x is not y for x, y in zip(known[0], modules, strict=True)) or not known[1].holds():
            look = _Look([part for module in modules for part in module.modules()])
            known = self._made[name] = ([*modules], look, self._samples(modules), make())
        return known[3]

    def renew(self) -> None:
        """Have all of it made anew when it is next asked for, or by numbers that of which these are others."""
        if not self._by_numbers:
            self._made.clear()
            return
        for name, (modules, _, samples, _) in [*self._made.items()]:
            if any(not torch.equal(x, y) for x, y in zip(self._samples(modules), samples, strict=True)):
                del self._made[name]

    def clear(self) -> None:
        """Have all of it made anew when it is next asked for."""
        self._made.clear()

    def _samples(self, modules: Sequence[Any]) -> list[Tensor]:
        return [_sample(module) for module in modules] if self._by_numbers else []


class Mirror:
    """Modules on one device: those that are there, and copies of others, which follow them."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._copies = Followed()

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
        return self._copies.of(name, [module], lambda: self._copy(module))

    def renew(self) -> None:
        """Have every copy made anew when it is next asked for."""
        self._copies.renew()

    def _copy(self, module: Any) -> Any:
        return copy.deepcopy(module)._apply(lambda x: x if x.is_meta else x.to(self._device))


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
