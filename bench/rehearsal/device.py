"""A stand-in for a GPU: tensors that say they lie on "cuda:0" and compute on the CPU.

Within `StandInDevice`, whatever asks for "cuda" gets `StandIn` tensors, so that code takes its branches for a GPU
truthfully. What real hardware refuses is refused here: an operator given tensors of both sides, values that are read as
if they lay in the host's memory. Where the host would wait for the device is noted.

It is no simulation: orders of execution, streams and memory are not those of a GPU. Values are the CPU's.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from bench.rehearsal.methods import HostMethods, parts
from bench.rehearsal.tensors import CPU, CUDA, StandIn, Wait, backing_of, in_use, mapped, wait_here

aten = torch.ops.aten

_COPIES = (aten._to_copy.default, aten.copy_.default)
# Whose result's size, or the value itself, the host has to know.
_WAITING = {
    "_local_scalar_dense", "_unique", "_unique2", "bincount", "equal", "is_nonzero", "masked_select", "nonzero",
    "nonzero_numpy", "unique_consecutive", "unique_dim",
}  # fmt: skip
# Their index tensors may lie on the CPU; a mask among them is counted first.
_INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index", "_unsafe_index_put"}


class _Queue:
    """Stands in for a CUDA stream, and for an event of it: everything before it is done."""

    def __init__(self, owner: "StandInDevice", name: str) -> None:
        self.owner, self.name = owner, name

    def synchronize(self) -> None:
        self.owner.note(f"{self.name}.synchronize")

    def record_event(self, event: Any = None) -> "_Queue":
        return event or _Queue(self.owner, "Event")

    def record(self, stream: Any = None) -> None: ...

    def query(self) -> bool:
        return True

    def wait_event(self, event: Any) -> None: ...

    def wait_stream(self, stream: Any) -> None: ...


class _Operators(TorchDispatchMode):
    def __init__(self, owner: "StandInDevice") -> None:
        super().__init__()
        self.owner = owner

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.owner.dispatch(func, args, kwargs or {})


class StandInDevice:
    """The stand-in device, as a context; one at a time.

    Args:
        run_operator: called for every operator of the package on stand-in tensors, with the device, the operator and
            its arguments; gives its results. Default: it is refused.
        has_values: False: tensors made on the device have shapes alone, and what is read of them is zero.

    Attributes:
        waits: where the host waited for the device, in order.
    """

    def __init__(
        self, run_operator: Callable[["StandInDevice", Any, Any, Any], Any] | None = None, *, has_values: bool = True
    ) -> None:
        self.run_operator = run_operator
        self.backing_device = CPU if has_values else torch.device("meta")
        self.waits: list[Wait] = []
        self._pinned: dict[int, StorageWeakRef] = {}
        self._open = contextlib.ExitStack()

    def __enter__(self) -> "StandInDevice":
        if in_use:
            raise RuntimeError("another stand-in device is in use")
        with contextlib.ExitStack() as stack:
            torch._C._ensureCUDADeviceGuardSet()  # in a build without CUDA, one that does nothing
            in_use.append(self)
            stack.callback(in_use.remove, self)
            stack.enter_context(self._cuda_functions())
            stack.enter_context(self.resumed())
            self._open = stack.pop_all()
        return self

    def __exit__(self, *error: Any) -> None:
        self._open.close()

    @contextlib.contextmanager
    def resumed(self) -> Iterator[None]:
        """For code that `run_operator` calls: PyTorch suspends a device's modes while it is asked."""
        with HostMethods(self), _Operators(self):
            yield

    @contextlib.contextmanager
    def _cuda_functions(self) -> Iterator[None]:
        """What is used of `torch.cuda`. Modules make new parameters where they change dtype: a wrapper cannot."""
        stand_ins = {
            "_lazy_init": lambda: None,
            "current_device": lambda: 0,
            "current_stream": lambda device=None: _Queue(self, "Stream"),
            "synchronize": lambda device=None: self.note("torch.cuda.synchronize"),
            "Event": lambda **options: _Queue(self, "Event"),
            "Stream": lambda device=None, **options: _Queue(self, "Stream"),
            "stream": contextlib.nullcontext,
        }
        overwrote = torch.__future__.get_overwrite_module_params_on_conversion()
        torch.__future__.set_overwrite_module_params_on_conversion(True)
        try:
            with patch.multiple(torch.cuda, **stand_ins):
                yield
        finally:
            torch.__future__.set_overwrite_module_params_on_conversion(overwrote)

    def note(self, operation: str) -> None:
        """The host waits here."""
        self.waits.append(wait_here(operation))

    def pin(self, x: Tensor, *_: Any) -> Tensor:
        """x in page-locked memory, from and to which copies go while the host goes on."""
        if isinstance(x, StandIn):
            raise RuntimeError(f"cannot pin {x.type()}: only dense CPU tensors can be pinned")
        return x if self.is_pinned(x) else self._lock(x.clone(memory_format=torch.contiguous_format))

    def is_pinned(self, x: Tensor, *_: Any) -> bool:
        """Whether x lies in page-locked memory."""
        if isinstance(x, StandIn):
            return False
        found = self._pinned.get(x.untyped_storage()._cdata)
        return found is not None and not found.expired()

    def _lock(self, x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        self._pinned[storage._cdata] = StorageWeakRef(storage)
        return x

    def inside(self, x: Any) -> Any:
        """What computes in x's place: of a stand-in its backing; of a CPU tensor that meets stand-ins without values,
        its shape."""
        if isinstance(x, StandIn):
            return x.backing
        without_values = self.backing_device.type == "meta"
        return x.to("meta") if without_values and isinstance(x, Tensor) and x.dim() else x

    def to_host(self, x: StandIn) -> Tensor:
        """x on the CPU; the host waits."""
        self.note("copy to the host")
        return torch.zeros_like(x.backing, device=CPU) if x.backing.is_meta else x.backing.clone()

    def note_masks(self, index: Any) -> None:
        """The host waits where a mask among these indices has to be counted."""
        if any(isinstance(i, StandIn) and i.dtype in (torch.bool, torch.uint8) for i in parts(index)):
            self.note("index by a mask")

    def dispatch(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """Run an operator: on the CPU for stand-ins, as it is for tensors that are on the CPU."""
        tensors = _tensors_in(args, kwargs)
        stand_ins = [x for x in tensors if isinstance(x, StandIn)]
        if func in _COPIES and (stand_ins or kwargs.get("device") == CUDA):
            return self._copy(func, args, kwargs)
        on_host = kwargs.get("device") is None or torch.device(kwargs["device"]).type != "cuda"
        if kwargs.get("pin_memory"):
            if not on_host:
                raise RuntimeError("Only dense CPU tensors can be pinned")
            return self._lock(func(*args, **{**kwargs, "pin_memory": False}))
        if not stand_ins and on_host:
            return func(*args, **kwargs)
        if func.namespace == "scx_kernels":
            _check_one_side(func, tensors, ())
            # A rehearsal names somebody: to guess what a kernel gives would prove nothing.
            if self.run_operator is None:
                raise NotImplementedError(f"{func}: nobody was named to run the package's operators")
            return self.run_operator(self, func, args, kwargs)
        name = func._schema.name.partition("::")[2]
        _check_one_side(func, tensors, _tensors_in(args[1:2], {}) if name in _INDEXING else ())
        self._note_waits(name, args)
        return self._compute(func, args, kwargs, name)

    def _compute(self, func: Any, args: Any, kwargs: dict[str, Any], name: str) -> Any:
        known: dict[int, StandIn] = {}

        def unwrap(x: Any) -> Any:
            if isinstance(x, StandIn):
                known[id(x.backing)] = x
            return self.inside(x)

        args, kwargs = mapped(unwrap, args), {key: mapped(unwrap, x) for key, x in kwargs.items()}
        if kwargs.get("device") is not None:
            kwargs["device"] = self.backing_device
        if name == "_local_scalar_dense" and args[0].is_meta:
            return torch.zeros((), dtype=args[0].dtype).item()
        if name in ("equal", "is_nonzero") and args[0].is_meta:
            return name == "equal"

        def wrap(x: Any) -> Any:
            if not isinstance(x, Tensor):
                return x
            found = known.get(id(x))
            if found is None:
                return StandIn(x)
            # A stand-in's shape is its own, fixed when it is made: an operator that changes it would leave two truths.
            if found.shape != x.shape or found.dtype != x.dtype:
                raise NotImplementedError(f"{func} changes the shape of a stand-in in place")
            return found

        return mapped(wrap, func(*args, **kwargs))

    def _note_waits(self, name: str, args: Any) -> None:
        if name in _INDEXING:
            self.note_masks(args[1])
        repeats = name == "repeat_interleave" and isinstance(args[0], StandIn) and len(args) == 1
        if name in _WAITING or repeats:
            self.note(name)

    def _copy(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """Copies are what may lead from one side to the other."""
        if func is aten.copy_.default:
            target, source = args[0], args[1]
            waits_not = args[2] if len(args) > 2 else kwargs.get("non_blocking", False)
            self._note_copy(source, isinstance(target, StandIn), waits_not, target)
            self._written(backing_of(target), backing_of(source))
            return target
        (source,) = args
        device = kwargs.get("device")
        to_stand_in = isinstance(source, StandIn) if device is None else torch.device(device).type == "cuda"
        options = {name: x for name, x in kwargs.items() if name not in ("device", "non_blocking", "pin_memory")}
        x = backing_of(source)
        if to_stand_in:
            self._note_copy(source, True, kwargs.get("non_blocking", False), None)
            device_of = x.device if isinstance(source, StandIn) else self.backing_device
            return StandIn(func(x, device=device_of, **options))
        copied = func(x, device=CPU, **options) if not x.is_meta else torch.zeros_like(x, device=CPU, **options)
        self._note_copy(source, False, kwargs.get("non_blocking", False), copied)
        return copied

    def _written(self, target: Tensor, source: Tensor) -> None:
        if not target.is_meta and source.is_meta:
            target.zero_()
        elif not target.is_meta:
            target.copy_(source)

    def _note_copy(self, source: Tensor, to_stand_in: bool, non_blocking: bool, target: Tensor | None) -> None:
        from_stand_in = isinstance(source, StandIn)
        host = target if from_stand_in else source
        if (from_stand_in and to_stand_in) or not source.numel():
            return
        if not (non_blocking and host is not None and self.is_pinned(host)):
            self.note("copy to the device" if to_stand_in else "copy to the host")


def _tensors_in(args: Any, kwargs: dict[str, Any]) -> list[Tensor]:
    found = []
    for x in (*args, *kwargs.values()):
        if isinstance(x, Tensor):
            found.append(x)
        elif isinstance(x, (list, tuple)):
            found += [y for y in x if isinstance(y, Tensor)]
    return found


def _check_one_side(func: Any, tensors: list[Tensor], indices: Any) -> None:
    """PyTorch's rule: operands lie on one device. A tensor of no dimensions on the CPU is a number to operators that
    work element by element; an accelerator's tensor may be indexed by the CPU's."""
    numbers = torch.Tag.pointwise in func.tags or bool(indices) or "index_put" in func.name()
    allowed = {id(x) for x in indices if tensors and isinstance(tensors[0], StandIn)}
    strangers = [
        x for x in tensors if not isinstance(x, StandIn) and id(x) not in allowed and not (numbers and x.dim() == 0)
    ]
    if strangers and any(isinstance(x, StandIn) for x in tensors):
        raise RuntimeError(
            f"Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu! "
            f"(when checking {func.name()}, given shapes {[tuple(x.shape) for x in tensors]})"
        )
