"""Stage: what runs here and what bounds it. Versions, bandwidth of a copy, rates of a product and of a keystream, and
what a launch costs the host and the device when the kernel does nothing."""

import importlib.util
import statistics
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bench.hardware.sizes import device_of
from bench.operations import measure_ceilings
from bench.provenance import provenance
from bench.timing import time_calls
from bench.work import Work

DTYPES = ("bfloat16", "float16", "float32")
ROUNDS = (20, 12, 8)


def run(work: Work) -> None:
    device = device_of(work.rehearsal)
    work.case("versions", versions)
    work.case("ceilings", partial(ceilings, device, work.rehearsal))
    work.case("launches", partial(launches, device))


def versions() -> dict[str, Any]:
    about = {**provenance(), "command": "python -m bench.hardware"}
    packages = ", ".join(f"{name} {version}" for name, version in about["packages"].items() if version)
    doubts = [f"doubtful: {text}" for text in about["warnings"]]
    where = about["cuda_device"] or about["processor"]
    return {"result": about, "headlines": [f"{where}; Python {about['python']}, {packages}", *doubts]}


def ceilings(device: torch.device, rehearsal: bool) -> dict[str, Any]:
    rounds = ROUNDS if importlib.util.find_spec("triton") else ()
    found = measure_ceilings(device, DTYPES[-1:] if rehearsal else DTYPES, rounds[:1] if rehearsal else rounds)
    products = ", ".join(f"{rate:.4g} in {dtype}" for dtype, rate in found["product_tflop_s"].items())
    ciphers = ", ".join(f"{rate:.4g} by {rounds} rounds" for rounds, rate in found["keystream_gb_s"].items())
    ciphers = ciphers or "not measured, needs triton"
    copy = f"copy {found['copy_gb_s']:.4g} GB/s; product, TFLOP/s: {products}; keystream, GB/s: {ciphers}"
    return {"result": found, "headlines": [copy]}


def launches(device: torch.device) -> dict[str, Any]:
    """An idle kernel of Triton's through the package's `launch`, and PyTorch's addition of one number to another."""
    from bench.hardware.idle import idle  # where Triton is missing, it is this case alone that is left out  # noqa: PLC0415

    inputs = [torch.randn(1, device=device) for _ in range(8)]

    found = {name: time_calls(call, inputs, device, 20) for name, call in (("Triton", idle), ("PyTorch", _add))}
    result, told = {}, []
    for name, times in found.items():
        ms, host = statistics.median(times.ms), times.host_us and statistics.median(times.host_us)
        result[name] = {"ms": ms, "host_us": host}
        told.append(f"{name}'s: host {_text(host)}, device {1e3 * ms:.1f} µs ({times.timed_by})")
    return {"result": result, "headlines": [f"an idle launch, {'; '.join(told)}"]}


def _add(x: Tensor) -> None:
    x.add_(1)


def _text(microseconds: float | None) -> str:
    return "not measured" if microseconds is None else f"{microseconds:.1f} µs"
