"""Workers that share their imports: one process imports what they need, and each of them is a fork of it, where a
command would take seconds to begin."""

import multiprocessing
import os
import sys

from scx.party import process, worker

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["forked", "scx.party.worker", "transformers.models.llama.modeling_llama"])


class FailingParty(process.UntrustedParty):
    def receive(self, request):
        if request.stage == "generation" and request.step == 5:
            raise RuntimeError("this rank alone fails")
        return super().receive(request)


def work(arguments: list[str], environment: dict[str, str], fails: bool) -> None:
    os.environ.update(environment)
    if fails:
        process.UntrustedParty = FailingParty
    sys.exit(worker.main(arguments))


class Worker:
    """`python -m scx.party.worker`, as far as tests ask a `subprocess.Popen` for it."""

    def __init__(self, arguments: list[str], environment: dict[str, str], *, fails: bool = False) -> None:
        self._process = CONTEXT.Process(target=work, args=(arguments, environment, fails))
        self._process.start()
        self.kill = self._process.kill

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        assert self._process.exitcode is not None, f"still runs after {timeout} seconds"
        return self._process.exitcode
