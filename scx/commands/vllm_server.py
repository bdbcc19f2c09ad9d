"""`vllm serve` for the length of a `with` block: started, waited for, asked for its metrics, and ended whole."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

__all__ = ["ServerFailed", "VLLMServer", "on_this_cpu", "serving"]

_SECONDS_TO_START = 240
_SECONDS_TO_END = 30
_REGIONS = Path("/dev/shm")  # noqa: S108  where vLLM maps the host memory that it off-loads to


class ServerFailed(RuntimeError):
    """The server ended before it answered. The message has the end of its log."""


@dataclass(frozen=True)
class VLLMServer:
    """A running server.

    Args:
        url: without a trailing slash; the OpenAI interface is at `url/v1`.
        process: the server's first process, the leader of a process group of all of them.
        log: what it and its workers print.
        engine_id: names its region of host memory.
    """

    url: str
    process: subprocess.Popen
    log: Path
    engine_id: str

    def metrics(self) -> dict[str, float]:
        """Prometheus' counters and gauges now: by name, summed over their labels; and by name and labels as printed."""
        found: dict[str, float] = {}
        with urllib.request.urlopen(f"{self.url}/metrics", timeout=30) as answer:  # noqa: S310  http, this machine's
            lines = answer.read().decode().splitlines()
        for line in lines:
            if line and not line.startswith("#"):
                labelled, value = line.rsplit(" ", 1)
                name = labelled.partition("{")[0]
                found[name] = found.get(name, 0.0) + float(value)
                if labelled != name:
                    found[labelled] = float(value)
        return found

    def regions(self) -> list[Path]:
        """The files that back its host memory, as long as they have a name."""
        return sorted(_REGIONS.glob(f"vllm_offload_{self.engine_id}*"))

    def kill(self) -> None:
        """End every process of it at once, as a machine that fails does."""
        _signal_group(self.process, signal.SIGKILL)
        self.process.wait()


def on_this_cpu() -> dict[str, str]:
    """The environment in which vLLM runs on a CPU of few cores and without a network.

    vLLM keeps a core from the engine for each connector; on two cores this takes half of them, hence the third.
    """
    return {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "HF_HUB_OFFLINE": "1",
        "VLLM_CPU_NUM_OF_RESERVED_CPU": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
    }


@contextmanager
def serving(
    model: str | Path,
    options: Sequence[str],
    *,
    log: Path,
    transfer: Mapping[str, object] | None = None,
    environment: Mapping[str, str] | None = None,
) -> Iterator[VLLMServer]:
    """A server on a free port of this machine, ready when the block begins and gone when it ends, however it ends.

    Args:
        model: as `vllm serve` takes it. options: further arguments of its.
        log: a file for what it prints.
        transfer: `--kv-transfer-config`; its `engine_id` is chosen here.
        environment: added to `on_this_cpu` and to this process's.

    Raises: ServerFailed if it ends, or does not answer within four minutes.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    engine_id = f"scx-{os.getpid()}-{port}"
    command = [str(Path(sys.executable).with_name("vllm")), "serve", str(model)]
    command += ["--host", "127.0.0.1", "--port", str(port), *options]
    if transfer is not None:
        command += ["--kv-transfer-config", json.dumps({**transfer, "engine_id": engine_id})]
    with log.open("wb") as out:
        process = subprocess.Popen(  # noqa: S603  vLLM of this environment
            command,
            stdout=out,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env={**os.environ, **on_this_cpu(), **(environment or {})},
            start_new_session=True,  # a process group of its own, which is ended as one
        )
    server = VLLMServer(f"http://127.0.0.1:{port}", process, log, engine_id)
    try:
        _wait_until_ready(server)
        yield server
    finally:
        _end(server)


def _wait_until_ready(server: VLLMServer) -> None:
    until = time.monotonic() + _SECONDS_TO_START
    while time.monotonic() < until:
        if (status := server.process.poll()) is not None:
            raise ServerFailed(f"vllm serve ended with status {status}:\n{_end_of(server.log)}")
        try:
            with urllib.request.urlopen(f"{server.url}/health", timeout=5):  # noqa: S310  http, this machine's
                return
        except (urllib.error.URLError, TimeoutError, ConnectionError):
            time.sleep(0.2)  # not there yet
    raise ServerFailed(f"vllm serve does not answer after {_SECONDS_TO_START} s:\n{_end_of(server.log)}")


def _end_of(log: Path, characters: int = 6000) -> str:
    return log.read_text(errors="replace")[-characters:]


def _end(server: VLLMServer) -> None:
    if server.process.poll() is None:
        server.process.send_signal(signal.SIGTERM)
        try:
            server.process.wait(_SECONDS_TO_END)
        except subprocess.TimeoutExpired:
            server.kill()
    _signal_group(server.process, signal.SIGKILL)  # workers that outlived it
    for region in server.regions():
        region.unlink(missing_ok=True)  # whoever was killed left it: memory that nobody would give back


def _signal_group(process: subprocess.Popen, number: signal.Signals) -> None:
    try:
        os.killpg(process.pid, number)
    except ProcessLookupError:
        return  # all of it has ended
