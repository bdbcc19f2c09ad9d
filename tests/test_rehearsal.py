"""The CUDA path runs on every machine: the rehearsal finds nothing, and finds what is planted."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench.rehearsal.device import StandInDevice
from bench.rehearsal.operators import Operators
from bench.rehearsal.settings import SETTINGS, covering
from bench.rehearsal.tensors import CUDA, StandIn
from scx.keystream import KeyStream, Secret
from scx_kernels import inject_permute
from scx_kernels.kernels.launch import TARGETS

PLANTED = Path(__file__).parent / "planted.py"


def run(*command: str) -> subprocess.CompletedProcess[str]:
    """A process of its own: this one may run Triton's interpreter."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    paths = [str(PLANTED.parent.parent), *filter(None, [environment.get("PYTHONPATH")])]
    environment["PYTHONPATH"] = os.pathsep.join(paths)
    given = [sys.executable, *command]
    return subprocess.run(given, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_every_kind_of_request_runs() -> None:
    """Fewer settings than `make rehearse`, every kind of request, values held against the plain model's."""
    done = run("-m", "bench.rehearsal", "--quick")
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    *_, summary = done.stdout.splitlines()
    counts = [int(count) for count in re.findall(r"\d+", summary)]
    requests, launches, variants, compilations, failures = counts
    assert failures == 0
    assert requests > 80
    assert launches > 5000
    assert variants > 150
    assert compilations > 30


FAULTS = {
    "zero numbers drawn": "to view Int as Long",
    "pointer to no redundant rows": "does not compile",
    "tensors of two devices": "Expected all tensors to be on the same device",
    "result of another dtype": "the launcher's result 0 is",
    "value read in a block": "the host waits for the device inside the blocks",
    "a wrong value": "logits differ",
    "not warmed up": "not warmed up",
}


@pytest.mark.slow
def test_what_is_planted_is_found() -> None:
    """Each fault is put in, rehearsed, and taken out again; the failure names the request and the place."""
    done = run(str(PLANTED))
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-4000:]
    found = dict(line.split(": ", 1) for line in done.stdout.splitlines())
    assert found.keys() == {*FAULTS, "nothing"}
    assert found["nothing"] == "0 failures"
    for fault, sign in FAULTS.items():
        assert sign in found[fault], f"{fault}: {found[fault]}"
        assert found[fault].startswith("llama 64 "), "the failure names its setting and request"
    assert "at line" in found["pointer to no redundant rows"], "and the kernel's line"
    assert "redundant_ptr" in found["pointer to no redundant rows"]


def test_any_two_values_of_two_settings_meet() -> None:
    chosen = covering()
    for first in SETTINGS:
        for second in SETTINGS:
            met = {(getattr(x, first), getattr(x, second)) for x in chosen}
            wanted = {(a, b) for a in SETTINGS[first] for b in SETTINGS[second] if first != second or a == b}
            assert wanted <= met


@pytest.fixture
def device():
    with StandInDevice() as entered:
        yield entered


def test_stand_ins_lie_on_cuda_and_compute(device) -> None:
    x = torch.arange(6.0, device="cuda").view(2, 3)
    assert isinstance(x, StandIn)
    assert x.device == CUDA
    assert (x @ x.T).device == CUDA
    assert (x @ x.T).tolist() == [[5.0, 14.0], [14.0, 50.0]]
    assert x[1:].data_ptr() - x.data_ptr() == 12, "a view begins where it lies in its memory"
    x[0, 1:] = 7
    x[:, 0].copy_(torch.tensor([8.0, 9.0]))
    assert x.cpu().tolist() == [[8.0, 7.0, 7.0], [9.0, 4.0, 5.0]]
    assert torch.ones(2).device.type == "cpu", "what asks for the CPU stays there"


def test_operands_of_two_devices_are_refused_as_on_hardware(device) -> None:
    x, host = torch.ones(2, 3, device="cuda"), torch.ones(2, 3)
    for mixed in (
        lambda: x + host,
        lambda: host + x,
        lambda: x @ host.T,
        lambda: torch.cat((x, host)),
        lambda: torch.nn.functional.linear(x, host),
        lambda: x.gather(1, torch.zeros(2, 1, dtype=torch.int64)),
        lambda: torch.where(host > 0, x, x),
        lambda: host[torch.zeros(1, dtype=torch.int64, device="cuda")],
        lambda: host + torch.ones((), device="cuda"),
    ):
        with pytest.raises(RuntimeError, match="same device"):
            mixed()
    assert (x * torch.tensor(2.0)).tolist() == [[2.0] * 3] * 2, "a number on the CPU is a number"
    assert x[torch.tensor([1])].device == CUDA, "an accelerator's tensor may be indexed by the CPU's"
    with pytest.raises(TypeError, match="numpy"):
        x.numpy()


def test_where_the_host_waits_is_noted(device) -> None:
    x, pinned = torch.ones(4, device="cuda"), torch.ones(4).pin_memory()
    assert pinned.is_pinned()
    assert not torch.ones(4).is_pinned()
    pinned.to("cuda", non_blocking=True)
    torch.empty(4, pin_memory=True).copy_(x, non_blocking=True)
    x + x
    assert not device.waits
    expected = []
    for operation, wait in {
        "_local_scalar_dense": lambda: x.sum().item(),
        "copy to the host": lambda: x.cpu(),
        "copy to the device": lambda: torch.ones(4).to("cuda", non_blocking=True),
        "nonzero": lambda: x.nonzero(),
        "index by a mask": lambda: x[x > 0],
        "equal": lambda: torch.equal(x, x),
        "torch.cuda.synchronize": torch.cuda.synchronize,
    }.items():
        wait()
        expected.append(operation)
        assert [wait.operation for wait in device.waits] == expected


def test_shapes_flow_without_values() -> None:
    with StandInDevice(has_values=False):
        x = torch.randn(100_000, 100_000, device="cuda")  # 40 GB, which nobody has to have
        assert (x @ x).shape == (100_000, 100_000)
        assert x.sum().item() == 0
    with pytest.raises(RuntimeError, match="outside of its device"):
        x + x


def test_the_packages_operators_need_somebody_who_runs_them(device) -> None:
    """A stand-in by itself refuses them by name, where it could only guess."""
    with pytest.raises(NotImplementedError, match="inject_permute"):
        inject_permute(torch.ones(1, 2, 16, device="cuda"), torch.tensor([[1, 0]]).to("cuda"))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("count", [0, 1, 7, 40])
@pytest.mark.parametrize("streams", [[], [(0, 1, 2)], [(3, 0, 0), (4, 1, 9)]])
def test_draws_are_the_same_bits_on_either_device(dtype, count, streams) -> None:
    """Zero numbers and zero streams among them: there is nothing to launch, and the result has its shape and dtype."""
    stream = KeyStream(Secret(bytes(32)))
    on_cpu = stream.bits("purpose", streams, count, dtype)
    with StandInDevice(Operators((TARGETS["cuda", 90],), lambda *launch: None)):
        drawn = stream.bits("purpose", streams, count, dtype, CUDA)
        assert drawn.device == CUDA
        assert (drawn.shape, drawn.dtype) == ((len(streams), count), dtype) == (on_cpu.shape, on_cpu.dtype)
        assert torch.equal(drawn.cpu(), on_cpu)
        for draw in (stream.normal, stream.fine_normal, stream.laplace):
            assert torch.equal(draw("other", streams, count, CUDA).cpu(), draw("other", streams, count))
        permutations = stream.permutations("third", streams, count, 2, CUDA).cpu()
        assert torch.equal(permutations, stream.permutations("third", streams, count, 2))
