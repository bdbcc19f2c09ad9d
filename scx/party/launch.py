"""Starting a worker on this machine: the untrusted party's process beside the secure one."""

import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from scx.party.process import RemoteParty

__all__ = ["running_worker"]

_SECONDS_TO_END = 20


@contextmanager
def running_worker(remote: RemoteParty, model: str) -> Iterator[subprocess.Popen]:
    """A worker that torchrun starts for the length of a `with` block.

    It ends when its connection does, so close `remote` before the block; one that never had a connection is ended.

    Args:
        remote: whose pair of credentials is its own.
        model: directory or hub id.
    """
    with tempfile.TemporaryDirectory() as private:
        credentials = Path(private, "worker.pem")
        remote.save_worker_credentials(credentials)
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "1"]
        told = ["--connect", remote.address, "--credentials", str(credentials), "--model", model]
        worker = subprocess.Popen([*torchrun, "-m", "scx.party.worker", *told])  # noqa: S603
        try:
            yield worker
        finally:
            try:
                worker.wait(timeout=_SECONDS_TO_END)
            except subprocess.TimeoutExpired:
                worker.kill()
                worker.wait()
