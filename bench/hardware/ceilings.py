"""Stage: what runs here and what bounds it. Versions, bandwidth of a copy, rates of a product and of a keystream, and
what a launch costs the host and the device when the kernel does nothing."""

import statistics
from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from bench.hardware.sizes import device_of
from bench.hardware.work import Work
from bench.operations import measure_ceilings
from bench.provenance import provenance
from bench.timing import Times, time_calls
from scx_kernels.kernels.launch import launch

DTYPES = ("bfloat16", "float16", "float32")
ROUNDS = (20, 12, 8)


def run(work: Work) -> None:
    device = device_of(work.rehearsal)
    work.case("versions", versions)
    work.case("ceilings", partial(ceilings, device, work.rehearsal))
    work.case("launches", partial(launches, device))


def versions() -> dict[str, Any]:
    about = provenance()
    packages = ", ".join(f"{name} {version}" for name, version in about["packages"].items() if version)
    doubts = [f"doubtful: {text}" for text in about["warnings"]]
    where = about["cuda_device"] or about["processor"]
    return {"result": about, "headlines": [f"{where}; Python {about['python']}, {packages}", *doubts]}


def ceilings(device: torch.device, rehearsal: bool) -> dict[str, Any]:
    found = measure_ceilings(device, DTYPES[-1:] if rehearsal else DTYPES, ROUNDS[:1] if rehearsal else ROUNDS)
    products = ", ".join(f"{rate:.4g} in {dtype}" for dtype, rate in found["product_tflop_s"].items())
    ciphers = ", ".join(f"{rate:.4g} by {rounds} rounds" for rounds, rate in found["keystream_gb_s"].items())
    copy = f"copy {found['copy_gb_s']:.4g} GB/s; product, TFLOP/s: {products}; keystream, GB/s: {ciphers}"
    return {"result": found, "headlines": [copy]}


@triton.jit
def _idle_kernel(x_ptr, BLOCK: tl.constexpr):
    """Reads and writes nothing."""
    tl.arange(0, BLOCK)


def launches(device: torch.device) -> dict[str, Any]:
    """An idle kernel of Triton's through the package's `launch`, and PyTorch's addition of one number to another."""
    inputs = [torch.randn(1, device=device) for _ in range(8)]

    def idle(x: Tensor) -> None:
        launch(_idle_kernel, (1,), x, device=device, BLOCK=16, num_warps=1)

    found = {name: time_calls(call, inputs, device, 20) for name, call in (("Triton", idle), ("PyTorch", _add))}
    result = {name: {"ms": statistics.median(times.ms), "host_us": _host(times)} for name, times in found.items()}
    told = [f"{name}'s: host {_text(_host(times))}, device {1e3 * statistics.median(times.ms):.1f} µs ({times.timed_by})"
            for name, times in found.items()]  # fmt: skip
    return {"result": result, "headlines": [f"an idle launch, {'; '.join(told)}"]}


def _add(x: Tensor) -> None:
    x.add_(1)


def _host(times: Times) -> float | None:
    return None if times.host_us is None else statistics.median(times.host_us)


def _text(microseconds: float | None) -> str:
    return "not measured" if microseconds is None else f"{microseconds:.1f} µs"
