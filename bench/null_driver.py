"""A driver for Triton that launches nothing: kernels are bound, compiled and sent off as for a GPU, which need not be
here. What remains of a launch is the host's work."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver


class _Utils:
    """What Triton asks of a device: an H100's or H200's limits."""

    def load_binary(self, *args: Any) -> tuple[int, int, int, int, int]:
        """Module, function, registers, spills, most threads of a block."""
        return 1, 1, 64, 0, 1024

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 232_448, "multiprocessor_count": 132, "warpSize": 32}


class _Launcher:
    """What a compiled kernel is launched by. Triton keeps it with the kernel for the life of the process, so a kernel
    that was compiled here is told to the driver of its day, and refuses one that would launch."""

    def __init__(self, source: Any, metadata: Any) -> None:
        self.name: str = metadata.name

    def __call__(self, *args: Any) -> None:
        active = driver.active
        if not isinstance(active, NullDriver):
            raise RuntimeError(f"{self.name} was compiled under a driver that launches nothing; use another process")
        x, y, z, _, _, _, _, entered, left, *arguments = args
        active.launched(self.name, (x, y, z), arguments)
        for hook in (entered, left):
            if hook is not None:
                hook(None)


class NullDriver:
    """Stands for one GPU of `arch`; `launches` counts what would have been launched."""

    launcher_cls = _Launcher

    def __init__(self, arch: int = 90) -> None:
        self.utils = _Utils()
        self.launches = 0
        self._target = GPUTarget("cuda", arch, 32)

    def launched(self, name: str, grid: tuple[int, int, int], arguments: list[Any]) -> None:
        """A kernel of this name would have been launched, with all its arguments."""
        self.launches += 1

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


@contextmanager
def no_launches(null: NullDriver | None = None) -> Iterator[NullDriver]:
    """Within it Triton's active driver is one that launches nothing: the given one, or one for sm_90."""
    null = null or NullDriver()
    driver.set_active(null)
    try:
        yield null
    finally:
        driver.set_active(None)  # found anew by whoever launches next
