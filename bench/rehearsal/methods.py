"""What PyTorch does with a tensor before it asks any operator, done for stand-ins: device names, values that are read,
indices, addresses. In C++ much of it asks a driver."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from bench.rehearsal.tensors import CUDA, StandIn, mapped

aten = torch.ops.aten


class HostMethods(TorchFunctionMode):
    """Gives "cuda" its index, which C++ would ask a driver for, and answers for what wrappers have no memory for."""

    def __init__(self, owner: Any) -> None:
        super().__init__()
        self.owner = owner
        self.replaced: dict[Any, Callable[..., Any]] = {
            torch.Tensor.tolist: self._tolist,
            torch.Tensor.pin_memory: owner.pin,
            torch.Tensor.is_pinned: owner.is_pinned,
            torch.Tensor.data_ptr: self._data_ptr,
            torch.Tensor.numpy: self._numpy,
            torch.tensor: self._tensor,
            torch.Tensor.__getitem__: self._getitem,
            torch.Tensor.__setitem__: self._setitem,
            torch.Tensor.copy_: self._copy_,
            torch.Tensor.contiguous: self._contiguous,
            torch.Tensor.__invert__: _on_stand_ins(torch.Tensor.__invert__, torch.bitwise_not),
            torch.Tensor.nonzero: _on_stand_ins(torch.Tensor.nonzero, aten.nonzero.default),
            torch.Tensor.__bool__: _on_stand_ins(torch.Tensor.__bool__, lambda x: bool(x.item())),
            torch.Tensor.__int__: _on_stand_ins(torch.Tensor.__int__, lambda x: int(x.item())),
            torch.Tensor.__index__: _on_stand_ins(torch.Tensor.__index__, lambda x: x.item()),
            torch.Tensor.__float__: _on_stand_ins(torch.Tensor.__float__, lambda x: float(x.item())),
        }

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = tuple(map(_indexed, args)), {name: _indexed(x) for name, x in (kwargs or {}).items()}
        instead = self.replaced.get(func)
        return func(*args, **kwargs) if instead is None else instead(*args, **kwargs)

    def _tolist(self, x: Tensor) -> Any:
        return x.cpu().tolist() if isinstance(x, StandIn) else torch.Tensor.tolist(x)

    def _numpy(self, x: Tensor, **options: Any) -> Any:
        if isinstance(x, StandIn):
            raise TypeError("can't convert a cuda:0 tensor to numpy; copy it to host memory first")
        return torch.Tensor.numpy(x, **options)

    def _data_ptr(self, x: Tensor) -> int:
        if not isinstance(x, StandIn):
            return torch.Tensor.data_ptr(x)
        # One number for each memory, beginning where allocators begin it, and the same for all of its views.
        memory: int = x.backing.untyped_storage()._cdata
        return memory * 512 + x.storage_offset() * x.element_size()

    def _tensor(self, data: Any, *, device: Any = None, **options: Any) -> Tensor:
        made = torch.tensor(data, **options)
        return made if device is None else made.to(device)

    # In C++ the methods from here on, and those above, ask the driver for a device, even where all that follows is
    # dispatched.

    def _contiguous(self, x: Tensor, memory_format: torch.memory_format = torch.contiguous_format) -> Tensor:
        if not isinstance(x, StandIn):
            return torch.Tensor.contiguous(x, memory_format=memory_format)
        return x if x.is_contiguous(memory_format=memory_format) else x.clone(memory_format=memory_format)

    def _copy_(self, x: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
        if not isinstance(x, StandIn) and not isinstance(source, StandIn):
            return torch.Tensor.copy_(x, source, non_blocking)
        copied: Tensor = self.owner.dispatch(aten.copy_.default, (x, source, non_blocking), {})
        return copied

    def _getitem(self, x: Tensor, index: Any) -> Tensor:
        index = mapped(_with_numbers, index)
        if not isinstance(x, StandIn):
            _check_index_of_cpu(index)
            return torch.Tensor.__getitem__(x, index)
        self.owner.note_masks(index)
        taken: Tensor = x.backing[mapped(self.owner.inside, index)]
        return StandIn(taken)

    def _setitem(self, x: Tensor, index: Any, value: Any) -> None:
        index = mapped(_with_numbers, index)
        if not isinstance(x, StandIn):
            _check_index_of_cpu(index)
            value = self.owner.to_host(value) if isinstance(value, StandIn) else value
            return torch.Tensor.__setitem__(x, index, value)
        self.owner.note_masks(index)
        if isinstance(value, Tensor) and not isinstance(value, StandIn):
            if value.dim() and any(isinstance(i, Tensor) for i in parts(index)):
                raise RuntimeError("Expected all tensors to be on the same device, but found cuda:0 and cpu!")
            self.owner.note("copy to the device")
        x.backing[mapped(self.owner.inside, index)] = self.owner.inside(value)
        return None


def _on_stand_ins(original: Callable[..., Any], instead: Callable[..., Any]) -> Callable[..., Any]:
    def function(x: Tensor, *args: Any, **options: Any) -> Any:
        return (instead if isinstance(x, StandIn) else original)(x, *args, **options)

    return function


def parts(index: Any) -> tuple[Any, ...]:
    return tuple(index) if isinstance(index, (tuple, list)) else (index,)


def _with_numbers(part: Any) -> Any:
    """A slice whose bounds are tensors, with their values."""
    if not isinstance(part, slice):
        return part
    bounds = (part.start, part.stop, part.step)
    return slice(*(x.item() if isinstance(x, StandIn) else x for x in bounds))


def _check_index_of_cpu(index: Any) -> None:
    if any(isinstance(i, StandIn) for i in parts(index)):
        raise RuntimeError("indices should be either on cpu or on the same device as the indexed tensor (cpu)")


def _indexed(x: Any) -> Any:
    if isinstance(x, torch.device):
        return CUDA if x.type == "cuda" else x
    return CUDA if isinstance(x, str) and x == "cuda" else x
