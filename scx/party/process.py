"""The parties in two processes: the secure one listens, and workers with the weights come to it.

The secure side (`RemoteParty`) talks to one worker (`scx.party.worker`) and turns to the next when that is lost; one
that comes early waits for its turn. What passes between them are messages (`scx.party.messages`) over a channel that is
enciphered and whose ends know one another (`scx.party.channel`, `scx.party.credentials`). A worker may be several ranks
(`scx.party.ranks`), which the secure side does not notice: rank 0 has the connection (`serve`), the others `follow` it.
"""

import os
import threading
import time
import weakref
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor

from scx.life import this_life
from scx.party.boundary import PartyLostError, Request, Rule
from scx.party.channel import PATIENCE, ChannelClosedError, ChannelError, dial
from scx.party.credentials import Credentials
from scx.party.door import Door
from scx.party.exchange import Worker
from scx.party.messages import read_agreement, read_request, write_agreement, write_failure, write_reply
from scx.party.plan import Plan
from scx.party.ranks import ParallelRanks, Ranks
from scx.party.untrusted import UntrustedParty, sum_in_float32

__all__ = ["RemoteParty", "follow", "serve"]


class RemoteParty:
    """An untrusted party in another process, as the boundary sees it. Any number of threads may use it.

    Args:
        plan: the agreement that workers are told when they join.
        fingerprint: of the model that they must have.
        host, port: where to listen, and nowhere else; port 0 takes a free one.
        timeout: seconds that a reply may take as a whole, and that `connect` may.
        credentials: the secure side's half of a pair; None for a pair of this object's own, whose other half
            `save_worker_credentials` writes for the workers.

    Raises: ValueError for the other half; OSError where nobody can listen.
    """

    def __init__(
        self,
        plan: Plan,
        fingerprint: str,
        *,
        host: str = "127.0.0.1",
        port: int = 0,
        timeout: float = 60.0,
        credentials: Credentials | None = None,
    ) -> None:
        self.plan = plan
        self.timeout = timedelta(seconds=timeout)
        self._of_workers: Credentials | None = None
        if credentials is None:
            credentials, self._of_workers = Credentials.generate()
        credentials.check("secure side")
        self._door = Door(host, port, credentials, write_agreement(plan, fingerprint))
        self.address = f"{host}:{self._door.port}"
        self._life = this_life()
        self._worker: Worker | None = None
        self._turned = 0
        self._turning = threading.Lock()
        self._homes: dict[str, int] = {}  # conversation -> number of the worker that has it
        self._own = threading.local()  # its `worker`: the number of the one that this thread last meant
        weakref.finalize(self, self._door.close)

    def __repr__(self) -> str:
        return f"RemoteParty({self.address}, worker={self._turned})"

    def save_worker_credentials(self, path: str | os.PathLike[str]) -> None:
        """Write the workers' half of the pair to a new file, mode 0600.

        Raises: ValueError if the pair was given, and the other half is elsewhere; FileExistsError.
        """
        if self._of_workers is None:
            raise ValueError("credentials: they were given, and with them no worker's; whoever made the pair has these")
        self._of_workers.save(path)

    def connect(self) -> None:
        """Turn to the next worker that has joined and lives, waiting for one.

        Where several threads lost a worker, the first to call this turns to the next, and the others come along.

        Raises: PartyLostError if none joins in time, and in a process that was forked from this object's.
        """
        self._check_life("connect")
        with self._turning:
            lost = self._worker
            if lost is not None and not lost.is_lost and self._meant() != lost.number:
                self._own.worker = lost.number
                return
            if lost is not None:
                lost.end()
            channel = self._door.next(time.monotonic() + self.timeout.total_seconds())
            if channel is None:
                reason = f" (last sent away: {self._door.refusal})" if self._door.refusal else ""
                raise PartyLostError(f"no worker joined {self.address} within {self.timeout}{reason}")
            self._turned += 1
            self._worker = Worker(channel, self._turned)
            self._own.worker = self._turned

    def close(self) -> None:
        """End the connection, and with it the worker; and those that wait. Nobody joins any more."""
        if self._worker is not None:
            self._worker.end()
        self._door.close()

    def begin(self, request: Request, rule: Rule) -> Callable[[], Mapping[str, Tensor]]:
        """Send a request; what is returned waits for the reply. Both raise PartyLostError; `connect` turns to the next
        worker then."""
        worker, conversation = self._worker, request.conversation
        name = f"{request.operation}, block {request.block}"
        self._check_life(name)
        if request.operation == "close" and self._homes.pop(conversation, None) != self._turned:
            return dict  # it went with its worker
        if worker is None:
            raise PartyLostError(f"{name}: worker 0 is not connected")
        if request.operation == "open":
            self._homes[conversation] = worker.number
        home = self._own.worker = self._homes.get(conversation, worker.number)
        if home != worker.number:
            raise PartyLostError(f"{name}: worker {home}, which had this conversation, is not connected")
        exchange = worker.begin(request, rule.expected(request), self.timeout.total_seconds())
        return lambda: worker.finish(exchange, self.timeout.total_seconds())

    def _check_life(self, name: str) -> None:
        if self._life != this_life():
            raise PartyLostError(
                f"{name}: the connection at {self.address} belongs to the process that this one was forked from; it "
                "needs a RemoteParty of its own"
            )

    def _meant(self) -> int | None:
        return getattr(self._own, "worker", None)


def serve(
    address: str, credentials: Credentials, layers: Any, rotary: Any, head: Any, fingerprint: str,
    timeout: float = 60.0, ranks: Ranks | None = None,
) -> None:  # fmt: skip
    """Be the untrusted party of a secure process until that ends, or until a request fails.

    Args:
        address: HOST:PORT where it listens.
        credentials: the workers' half of its pair.
        layers, rotary, head: the blocks, the rotary embedding, and final norm and head, as `UntrustedParty` takes them.
        fingerprint: of the model.
        timeout: seconds to find the secure process, and to be told what it wants.
        ranks: of which this is rank 0; None if there are no others. They `follow`.

    Raises: ValueError if it expects another model, and for the other half of the pair; ChannelError if it is not found,
        or is another than the paired one; what a request raised, after the secure side was told.
    """
    ranks = Ranks() if ranks is None else ranks
    credentials.check("worker")
    ranks.wait()
    deadline = time.monotonic() + timeout
    channel = dial(address, credentials, deadline)
    number = 0
    try:
        plan, expected = read_agreement(channel.source(deadline))
        if expected != fingerprint:
            raise ValueError(f"model: the secure side expects {expected:.16}, this is {fingerprint:.16}")
        party = UntrustedParty(layers, rotary, plan, head)
        ranks.agree(plan)
        if plan.verify:
            sum_in_float32()
        channel.send(write_reply(0, {}), deadline)
        device = next(layers.parameters()).device
        while True:
            number += 1
            request = ranks.pass_on(read_request(channel.source(PATIENCE), number))
            reply = ranks.gather(party.receive(_move(request, device)))
            channel.send(write_reply(number, reply), PATIENCE)
    except ChannelClosedError:  # the secure process has ended
        ranks.end()
    except Exception as error:
        # It may have failed on one rank alone: nobody knows where the others are.
        with suppress(ChannelError):
            channel.send(write_failure(number, error), time.monotonic() + timeout)
        raise
    finally:
        channel.end()


def follow(layers: Any, rotary: Any, head: Any, ranks: ParallelRanks) -> None:
    """Be one of the ranks behind rank 0 until that ends.

    Args:
        layers, rotary, head: this rank's share of the blocks, the rotary embedding, and final norm and head.
        ranks: of which this is one, not rank 0.

    Raises: RuntimeError if rank 0 is lost; what a request raised.
    """
    party = UntrustedParty(layers, rotary, ranks.hear(), head)
    device = next(layers.parameters()).device
    while (request := ranks.take()) is not None:
        ranks.gather(party.receive(_move(request, device)))


def _move(request: Request, device: torch.device) -> Request:
    return replace(request, tensors={name: x.to(device) for name, x in request.tensors.items()})
