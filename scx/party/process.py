"""The parties in two processes: requests and replies as bytes over gloo.

The secure process listens (`RemoteParty`); workers with the weights join it (`scx.party.worker`) and are numbered as
they join. The secure side talks to one, and turns to the next when that is lost; a worker that joins early
waits for its turn. Each exchange is two messages of three parts: lengths, a header in JSON, and the tensors' bytes.
A worker may be several ranks (`scx.party.ranks`), which the secure side does not notice: rank 0 has the connection
(`serve`), the others `follow` it.
"""

import json
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, replace
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor

# torch exports ProcessGroupGloo only where gloo was built, so a type checker finds no such name in it; where it was not
# built, this import fails, and two processes need it.
from torch.distributed import PrefixStore, ProcessGroupGloo, Store, TCPStore  # type: ignore[attr-defined]

from scx.party.boundary import PartyLostError, Request
from scx.party.plan import Plan
from scx.party.ranks import ParallelRanks, Ranks
from scx.party.untrusted import UntrustedParty

__all__ = ["Peer", "RemoteParty", "follow", "serve"]

_SECURE, _UNTRUSTED = 0, 1
_MAX_HEADER_BYTES = 2**16
_MAX_BYTES = 2**34
_DTYPES = {str(x): x for x in (torch.float32, torch.float16, torch.bfloat16, torch.int64)}
_PATIENCE = timedelta(days=7)


class Peer:
    """One end of a connection.

    Args:
        store: where both ends meet.
        number: of the worker. rank: 0 for the secure side, 1 for the worker.
        timeout: to find the other end.
    """

    def __init__(self, store: Store, number: int, rank: int, timeout: timedelta) -> None:
        self._group: Any = ProcessGroupGloo(PrefixStore(f"worker {number}", store), rank, 2, timeout)
        self._other = 1 - rank

    def send(self, header: Mapping[str, Any], tensors: Mapping[str, Tensor], timeout: timedelta) -> None:
        """Send a header and named tensors. Raises RuntimeError if the other end is gone or does not take them."""
        described = {name: [str(x.dtype), list(x.shape)] for name, x in tensors.items()}
        head = torch.frombuffer(bytearray(json.dumps({**header, "tensors": described}).encode()), dtype=torch.uint8)
        parts = [x.detach().cpu().contiguous().flatten().view(torch.uint8) for x in tensors.values()]
        body = torch.cat(parts) if parts else torch.empty(0, dtype=torch.uint8)
        for part in (torch.tensor([len(head), len(body)]), head, body):
            if len(part):
                self._group.send([part], self._other, 0).wait(timeout)

    def receive(self, timeout: timedelta) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """The header and the tensors that the other end sends. Raises RuntimeError, ValueError if it does not, or if
        they make no sense."""
        lengths = torch.empty(2, dtype=torch.int64)
        self._group.recv([lengths], self._other, 0).wait(timeout)
        head_bytes, body_bytes = lengths.tolist()
        if not 0 < head_bytes <= _MAX_HEADER_BYTES or not 0 <= body_bytes <= _MAX_BYTES:
            raise ValueError(f"a message of {head_bytes} + {body_bytes} bytes is out of bounds")
        head, body = (torch.empty(n, dtype=torch.uint8) for n in (head_bytes, body_bytes))
        for part in (head, body):
            if len(part):
                self._group.recv([part], self._other, 0).wait(timeout)
        header = json.loads(head.numpy().tobytes())
        return header, _unpack(header.pop("tensors"), body)


def _unpack(described: dict[str, Any], body: Tensor) -> dict[str, Tensor]:
    tensors, start = {}, 0
    for name, (dtype_name, shape) in described.items():
        dtype = _DTYPES[dtype_name]
        end = start + math.prod(shape) * dtype.itemsize
        tensors[name] = body[start:end].clone().view(dtype).view(shape)
        start = end
    if start != len(body):
        raise ValueError(f"a message has {len(body)} bytes of tensors, its header describes {start}")
    return tensors


class RemoteParty:
    """An untrusted party in another process, as the boundary sees it.

    Args:
        plan: the agreement that workers are told when they join.
        fingerprint: of the model that they must have.
        host, port: where to listen; port 0 takes a free one.
        timeout: seconds that a reply may take, and that a worker may take to join.
    """

    def __init__(
        self, plan: Plan, fingerprint: str, *, host: str = "127.0.0.1", port: int = 0, timeout: float = 60.0
    ) -> None:
        self.plan = plan
        self.timeout = timedelta(seconds=timeout)
        self._store = TCPStore(host, port, is_master=True, wait_for_workers=False, timeout=self.timeout)
        self._store.set("agreement", json.dumps({"plan": asdict(plan), "model": fingerprint}))
        self.address = f"{host}:{self._store.port}"
        self._peer: Peer | None = None
        self._worker = 0

    def __repr__(self) -> str:
        return f"RemoteParty({self.address}, worker={self._worker})"

    def connect(self) -> None:
        """Turn to the next worker, waiting for it to join. Raises PartyLostError if none does in time."""
        self._worker += 1
        self._peer = None
        try:
            self._store.wait([f"joined {self._worker}"], self.timeout)
            self._peer = Peer(self._store, self._worker, _SECURE, self.timeout)
        except RuntimeError as error:
            self._worker -= 1
            raise PartyLostError(f"no worker joined {self.address} within {self.timeout}") from error

    def close(self) -> None:
        """End the connection, and with it the worker."""
        self._peer = None

    def begin(self, request: Request) -> Callable[[], Mapping[str, Tensor]]:
        """Send a request; what is returned waits for the reply. Both raise PartyLostError; `connect` turns to the next
        worker then."""
        if self._peer is None:
            raise PartyLostError(f"{self._name(request)} is not connected")
        header = {name: value for name, value in vars(request).items() if name != "tensors"}
        peer, self._peer = self._peer, None  # an exchange that ends half-way leaves a connection nobody can use
        with self._as_lost(request):
            peer.send(header, request.tensors, self.timeout)
        return lambda: self._end(request, peer)

    def _end(self, request: Request, peer: Peer) -> Mapping[str, Tensor]:
        with self._as_lost(request):
            answer, tensors = peer.receive(self.timeout)
        if "error" in answer:
            raise PartyLostError(f"{self._name(request)} failed: {answer['error']!s:.200}")
        self._peer = peer
        return tensors

    def _name(self, request: Request) -> str:
        return f"{request.operation}, block {request.block}: worker {self._worker}"

    @contextmanager
    def _as_lost(self, request: Request) -> Iterator[None]:
        try:
            yield
        except (RuntimeError, ValueError, KeyError, TypeError) as error:
            name = self._name(request)
            raise PartyLostError(f"{name} died or did not answer within {self.timeout}: {error!s:.200}") from error


def serve(
    address: str, layers: Any, rotary: Any, head: Any, fingerprint: str, timeout: float = 60.0,
    ranks: Ranks | None = None,
) -> None:  # fmt: skip
    """Be the untrusted party of a secure process until that ends, or until a request fails.

    Args:
        address: HOST:PORT where it listens.
        layers, rotary, head: the blocks, the rotary embedding, and final norm and head, as `UntrustedParty` takes them.
        fingerprint: of the model.
        timeout: seconds to find the secure process.
        ranks: of which this is rank 0; None if there are no others. They `follow`.

    Raises: ValueError if it expects another model; RuntimeError if it is not found; what a request raised, after the
        secure side was told.
    """
    ranks = Ranks() if ranks is None else ranks
    host, port = address.rsplit(":", 1)
    limit = timedelta(seconds=timeout)
    store = TCPStore(host, int(port), is_master=False, timeout=limit)
    agreement = json.loads(store.get("agreement"))
    if agreement["model"] != fingerprint:
        raise ValueError(f"model: the secure side expects {agreement['model'][:16]}, this is {fingerprint[:16]}")
    plan = Plan(**agreement["plan"])
    ranks.agree(plan)
    party = UntrustedParty(layers, rotary, plan, head)
    number = store.add("workers", 1)
    store.set(f"joined {number}", "")
    peer = Peer(store, number, _UNTRUSTED, _PATIENCE)
    device = next(layers.parameters()).device
    while True:
        try:
            header, tensors = peer.receive(_PATIENCE)
        except RuntimeError:  # the secure process has ended
            ranks.end()
            return
        try:
            request = ranks.pass_on(Request(**header, tensors=tensors))
            reply = ranks.gather(party.receive(_move(request, device)))
        except (RuntimeError, KeyError, ValueError, TypeError) as error:
            peer.send({"error": f"{type(error).__name__}: {error}"}, {}, limit)
            raise  # it may have failed on one rank alone: nobody knows where the others are
        peer.send({}, reply, limit)


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
