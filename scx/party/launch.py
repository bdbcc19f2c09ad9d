"""Starting a worker on this machine: the untrusted party's process beside the secure one."""

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["running_worker"]

_SECONDS_TO_END = 20


@contextmanager
def running_worker(address: str, model: str) -> Iterator[subprocess.Popen]:
    """A worker that torchrun starts for the length of a `with` block.

    It ends when its connection does, so close the `RemoteParty` before the block; one that never had a connection is
    ended.

    Args:
        address: HOST:PORT where the secure process listens.
        model: directory or hub id.
    """
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "1"]
    command = [*torchrun, "-m", "scx.party.worker", "--connect", address, "--model", model]
    worker = subprocess.Popen(command)  # noqa: S603
    try:
        yield worker
    finally:
        try:
            worker.wait(timeout=_SECONDS_TO_END)
        except subprocess.TimeoutExpired:
            worker.kill()
            worker.wait()
