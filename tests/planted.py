"""Faults put into the package one after the other, each rehearsed and taken out again: `test_rehearsal` reads what is
printed, a line a fault with the first failure. A process of its own, without Triton's interpreter."""

import importlib.util
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

import scx.devices
import scx.keystream
import scx.warmup
import scx_kernels
from bench.rehearsal.compilation import problem_of
from bench.rehearsal.rehearsal import ALL_TARGETS, Failure, Rehearsal
from bench.rehearsal.requests import REQUESTS, Pair
from bench.rehearsal.settings import Setting
from scx.keystream import KeyStream
from scx.models import fused, swap
from scx_kernels.kernels import attention, rows
from scx_kernels.operations import OPERATORS

PERMUTED = Setting("llama", 64, "fp32", 0, False, "permuted")
SEALED = Setting("llama", 64, "fp16", 0, False, "sealed8")


def broken_kernel() -> Any:
    """The attention kernel with its flag for redundant rows taken out."""
    text = Path(attention.__file__).read_text()
    assert text.count("        if HAS_REDUNDANT:\n") == 1
    folder = Path(tempfile.mkdtemp())
    path = folder / "broken_attention.py"
    path.write_text(text.replace("        if HAS_REDUNDANT:\n", "        if HAS_POSITION:\n"))
    spec = importlib.util.spec_from_file_location("broken_attention", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules["broken_attention"] = module
    spec.loader.exec_module(module)
    return module._attention_kernel


def drawn_as_before(self: KeyStream, purpose: Any, streams: Any, count: int, dtype: Any, device: Any) -> Any:
    """Zero numbers are drawn as any other number is."""
    key = scx.devices.upload(scx.keystream.ops.key_words(self._key(purpose)), device)
    names = scx.devices.upload(torch.tensor(streams, dtype=torch.int64).view(-1, 3), device)
    return scx.keystream.ops.random_bits(key, names, count * dtype.itemsize // 4).view(dtype)


def inverse_on_the_cpu(permutation: torch.Tensor) -> torch.Tensor:
    places = torch.arange(permutation.shape[1]).expand(permutation.shape)
    return torch.empty_like(permutation).scatter_(1, permutation, places)


def changed(function: Callable[..., Any], change: Callable[[Any], Any]) -> Callable[..., Any]:
    return lambda *args, **options: change(function(*args, **options))


def reading(function: Callable[..., Any]) -> Callable[..., Any]:
    """A block that looks at a value of its result."""

    def forward(*args: Any, **options: Any) -> Any:
        out = function(*args, **options)
        assert out.abs().max().item() >= 0
        return out

    # As in a module's own source: the rehearsal tells blocks by their functions' names.
    forward.__code__ = forward.__code__.replace(co_filename=fused.__file__, co_qualname="EncodedDecoderLayer.forward")
    return forward


@contextmanager
def nothing() -> Iterator[None]:
    yield


@contextmanager
def a_block_that_reads() -> Iterator[None]:
    forward = reading(fused.EncodedDecoderLayer.forward)
    # Classes that were made before hold the forward of their time.
    with patch.object(fused.EncodedDecoderLayer, "forward", forward), patch.dict(swap._encoded_classes, clear=True):
        yield


FAULTS: dict[str, tuple[Any, Setting, str, bool]] = {
    "nothing": (nothing(), SEALED, "later turns", True),
    "zero numbers drawn": (patch.object(KeyStream, "bits", drawn_as_before), PERMUTED, "prefill of 7", False),
    "pointer to no redundant rows": (
        patch.object(attention, "_attention_kernel", broken_kernel()), SEALED, "later turns", False,
    ),
    "tensors of two devices": (patch.object(attention, "_inverse", inverse_on_the_cpu), SEALED, "later turns", False),
    "result of another dtype": (
        patch.dict(vars(OPERATORS["inject_permute"]), launcher=changed(rows.inject_permute, torch.Tensor.double)),
        PERMUTED, "prefill of 7", False,
    ),
    "value read in a block": (
        a_block_that_reads(), PERMUTED, "prefill of 7", False,
    ),
    "a wrong value": (
        patch.object(scx_kernels, "attention_step", changed(scx_kernels.attention_step, lambda x: 2 * x)),
        PERMUTED, "prefill of 7", False,
    ),
    "not warmed up": (
        patch.object(scx.warmup, "_converse", lambda *args, **options: None), PERMUTED, "prefill of 7", True,
    ),
}  # fmt: skip


def main() -> None:
    torch.set_num_threads(1)
    for name, (fault, setting, request, warms_up) in FAULTS.items():
        rehearsal = Rehearsal(ALL_TARGETS[1:2])
        requests: dict[str, Callable[[Pair], None]] = {request: REQUESTS[request]}
        with fault:
            rehearsal.serve(setting, requests, warms_up=warms_up)
            for variant, where in rehearsal.variants.items():
                if variant.kernel == "_attention_kernel":
                    problem = problem_of(variant)
                    rehearsal.failures += [Failure(where, problem)] if problem else []
        print(f"{name}: {' '.join(str(rehearsal.failures[0]).split()) if rehearsal.failures else '0 failures'}")


if __name__ == "__main__":
    main()
