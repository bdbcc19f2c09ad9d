"""What every kernel file shares: the target a launch is for, the launch itself, and small device functions."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from scx_kernels import tiles
from scx_kernels.kernels import plans

__all__ = [
    "INTERPRET",
    "Target",
    "begin",
    "by_tokens",
    "check_dtype",
    "choose_tile",
    "dot",
    "exceeds_int32",
    "launch",
    "narrow",
    "recording",
    "strides",
    "target_of",
]

# The interpreter computes bfloat16 products wrongly, so there the operands of a dot are widened first.
INTERPRET = tl.constexpr(triton.knobs.runtime.interpret)

KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Target:
    """The device tiles are chosen for. `arch` is 80, 90, 100 for "cuda" and 942 for "hip"."""

    backend: str
    arch: int
    multiprocessors: int
    shared_memory: int
    name: str = ""

    @property
    def launches_ahead(self) -> bool:
        """Whether a kernel may be launched before the one ahead of it has ended."""
        return self.backend == "cuda" and self.arch >= 90

    @property
    def warp_size(self) -> int:
        return 64 if self.backend == "hip" else 32


TARGETS = {
    ("cuda", 80): Target("cuda", 80, 108, 166_912),
    ("cuda", 90): Target("cuda", 90, 132, 232_448),
    ("cuda", 100): Target("cuda", 100, 148, 232_448),
    ("hip", 942): Target("hip", 942, 304, 65_536),
}
_override: list[Target] = []
_recorder: list[Callable[..., None]] = []


@lru_cache
def _device_target(index: int) -> Target:
    properties = torch.cuda.get_device_properties(index)
    if torch.version.hip:
        arch = int(properties.gcnArchName.split(":")[0].removeprefix("gfx"), 16)
        return Target("hip", int(f"{arch:x}"), properties.multi_processor_count, 65_536, properties.name)
    arch = 10 * properties.major + properties.minor
    shared = properties.shared_memory_per_block_optin
    return Target("cuda", arch, properties.multi_processor_count, shared, properties.name)


def target_of(device: torch.device) -> Target:
    """The target of a tensor's device; for tensors that are on no GPU, an H200."""
    if _override:
        return _override[-1]
    if device.type != "cuda":
        return TARGETS["cuda", 90]
    return _device_target(torch.cuda.current_device() if device.index is None else device.index)


def choose_tile(
    operation: str,
    heuristic: dict[str, Any],
    override: dict[str, Any] | None,
    target: Target,
    dtype: torch.dtype,
    variant: str = "",
    **sizes: int,
) -> dict[str, Any]:
    """Meta-parameters of a launch: the heuristic's, then those measured for a near shape, then the caller's."""
    return heuristic | dict(tiles.nearest(target.name, operation, dtype, variant, sizes)) | (override or {})


@contextlib.contextmanager
def recording(target: Target, record: Callable[..., None]) -> Iterator[None]:
    """Within it nothing is launched: `record(kernel, grid, args, meta)` is called instead, tiles are for `target`."""
    _override.append(target)
    _recorder.append(record)
    try:
        with plans.plans_off():
            yield
    finally:
        _override.pop()
        _recorder.pop()


def launch(
    kernel: Any, grid: tuple[int, ...], *args: Any, device: torch.device, ahead: bool = False, **meta: Any
) -> None:
    """Run `kernel` over `grid` on `device` and its current stream; an empty grid launches nothing.

    Args:
        ahead: the kernel calls `begin`, and so may be launched before the one ahead of it has ended. One that does not
            call it must not be: whoever is launched after it would wait for it alone.
    """
    if 0 in grid:
        return
    if ahead and target_of(device).launches_ahead:
        meta["launch_pdl"] = True
    if _recorder:
        _recorder[-1](kernel, grid, args, meta)
        return
    # Triton launches on the current device, which need not be the tensors'.
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        compiled = kernel[grid](*args, **meta)
    plans.note(kernel, compiled, grid, args, meta)


def exceeds_int32(*tensors: Tensor | None) -> bool:
    """Whether an element of a tensor lies more than 2^31 - 1 elements from its first one."""
    return any(
        sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True)) >= 2**31
        for x in tensors
        if x is not None and x.numel()
    )


def strides(x: Tensor | None, rank: int) -> tuple[int, ...]:
    """The strides of x; zeros stand in for a tensor that is absent."""
    return (0,) * rank if x is None else tuple(x.stride())


def by_tokens(heads: int, tokens: int, size: int) -> tuple[int, ...]:
    """The strides of a (B, heads, tokens, size) tensor that lies in memory token by token."""
    return heads * tokens * size, size, heads * size, 1


def check_dtype(name: str, x: Tensor) -> None:
    if x.dtype not in KERNEL_DTYPES:
        raise TypeError(f"{name}: expected float32, float16 or bfloat16, got {x.dtype}")


@tl.core.builtin
def _is_launched_ahead(_semantic=None):
    """Whether what is compiled is launched before the kernel ahead of it has ended."""
    return tl.constexpr(bool(getattr(_semantic.builder.options, "launch_pdl", False)))


@triton.jit
def begin():
    """Wait until the kernels launched before this one have ended and what they wrote is seen.

    Before it, a kernel reads nothing that one of those may have written, and writes nothing. It may load an index array
    that is older than they are, and prefetch any address.

    Kernels are launched ahead where a GPU can do that (Programmatic Dependent Launch): their programs take their places
    while the last programs of the kernel before still run, so that a launch costs less than its latency.
    """
    if not INTERPRET:
        if _is_launched_ahead():
            gdc_wait()
            gdc_launch_dependents()


@triton.jit
def prefetch(pointers):
    """Have the lines at `pointers` on their way to L2, before `begin`: what an earlier kernel still writes to them is
    seen all the same, because L2 is where it writes."""
    if not INTERPRET:
        if _is_launched_ahead():
            tl.inline_asm_elementwise(
                "prefetch.global.L2 [$1]; mov.b32 $0, 0;", "=r,l", [pointers], dtype=tl.int32, is_pure=False, pack=1
            )


@triton.jit
def dot(a, b, acc):
    """acc + a @ b in float32. "ieee": float32 operands are not rounded to tf32."""
    if INTERPRET:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def narrow(x, DTYPE: tl.constexpr):
    """x in DTYPE, rounded to nearest. The interpreter would cut float32 down to bfloat16 instead."""
    if INTERPRET and DTYPE == tl.bfloat16 and x.dtype == tl.float32:
        bits = x.to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)).to(tl.uint32) & 0xFFFF0000
        x = bits.to(tl.uint32).to(tl.float32, bitcast=True)
    return x.to(DTYPE)
