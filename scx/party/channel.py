"""A connection between the parties' processes: TLS 1.3, each end with the one certificate that the other expects.

Every wait has a deadline, a time of `time.monotonic()`, over all that is sent or received and not over its parts, so
that nobody stretches it drop by drop.
"""

import math
import select
import socket
import ssl
import time
import weakref
from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import partial
from typing import Any, TypeVar

from scx.life import this_life
from scx.party.credentials import Credentials
from scx.party.messages import Fill, quote

Result = TypeVar("Result")

__all__ = ["PATIENCE", "Channel", "ChannelClosedError", "ChannelError", "dial"]

PATIENCE = math.inf
"""The deadline of a wait that only the other end's own end ends."""

_CHUNK_BYTES = 2**18
_POLL_SECONDS = 3600.0
_RETRY_SECONDS = 0.2
_KEEPALIVE = {"TCP_KEEPIDLE": 60, "TCP_KEEPINTVL": 15, "TCP_KEEPCNT": 4}
"""After two minutes without a sign of the other machine it is taken for gone, where the system has these settings."""


class ChannelError(ConnectionError):
    """The other end is not who was expected, is late, or the connection was altered."""


class ChannelClosedError(ChannelError):
    """The other end, or the connection, is gone."""


class Channel:
    """One end of a connection. One thread at a time sends and receives; any may `end` it. It is the process's that made
    it: a fork has a copy of the cipher's state, and two messages would go under one keystream.

    TLS works on memory, between the socket and which nothing passes but what is read and written here: so no read of
    its own, of records that bring nothing, outlasts a deadline.

    Args:
        sock: connected. It is the channel's from now on.
        credentials: of this end.

    Raises: ChannelClosedError if the other end is gone already.
    """

    def __init__(self, sock: socket.socket, credentials: Credentials) -> None:
        self._socket = sock
        self._life = this_life()
        self._credentials = credentials
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = credentials.open(self._incoming, self._outgoing)
        self._received = memoryview(bytearray(_CHUNK_BYTES))
        weakref.finalize(self, sock.close)
        try:
            sock.setblocking(False)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            for name, value in _KEEPALIVE.items():
                if hasattr(socket, name):
                    sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
        except OSError as error:
            raise _closed(error) from error

    def handshake(self, deadline: float) -> None:
        """Show the own certificate and see the other's. Raises ChannelError unless that is the one expected.

        The end that connected knows only with the first message that its own certificate was taken.
        """
        self._repeat(self._tls.do_handshake, deadline)
        if not self._credentials.expects(self._tls.getpeercert(binary_form=True)):
            raise ChannelError("another certificate than that of the paired party")

    def send(self, parts: Iterable[memoryview], deadline: float) -> None:
        """Send buffers of bytes, one behind the other. Raises ChannelError if they are not taken in time."""
        for part in parts:
            while part:
                part = part[self._repeat(partial(self._tls.write, part[:_CHUNK_BYTES]), deadline) :]

    def source(self, deadline: float) -> Fill:
        """What fills buffers with the bytes that come. It raises ChannelError if they do not come in time."""

        def fill(buffer: memoryview) -> None:
            while buffer:
                read = partial(self._tls.read, min(len(buffer), _CHUNK_BYTES), buffer)
                count: Any = self._repeat(read, deadline)  # a number, where there is a buffer
                buffer = buffer[count:]

        return fill

    def is_quiet(self) -> bool:
        """Whether the other end is there and has nothing to say, as one that waits for its turn."""
        if self._tls.pending() or self._incoming.pending:
            return False
        try:
            self._socket.recv(1)
        except BlockingIOError:
            return True
        except OSError:
            return False
        return False

    def end(self) -> None:
        """End the connection, and with it every wait for it in any thread; in a forked process, let go of it."""
        if self._life != this_life():
            self._socket.close()
            return
        with suppress(OSError):  # it has ended already
            self._socket.shutdown(socket.SHUT_RDWR)

    def _repeat(self, step: Callable[[], Result], deadline: float) -> Result:
        """What a step of TLS returns, as soon as the bytes for it are there; what it has to say is sent."""
        if self._life != this_life():
            raise ChannelError("the connection belongs to the process that this one was forked from")
        while True:
            try:
                result = step()
            except ssl.SSLWantReadError:
                self._flush(deadline)
                self._receive(deadline)
            except ssl.SSLZeroReturnError as error:
                raise ChannelClosedError("it closed the connection") from error
            except ssl.SSLError as error:
                with suppress(ChannelError):  # the other end may be gone, and is told why this one goes
                    self._flush(deadline)
                raise ChannelError(f"the connection broke ({quote(str(error))})") from error
            else:
                self._flush(deadline)
                return result

    def _flush(self, deadline: float) -> None:
        while self._outgoing.pending:
            left = memoryview(self._outgoing.read())
            while left:
                left = left[self._wait(partial(self._socket.send, left), select.POLLOUT, deadline) :]

    def _receive(self, deadline: float) -> None:
        count = self._wait(partial(self._socket.recv_into, self._received), select.POLLIN, deadline)
        if not count:
            raise ChannelClosedError("it closed the connection")
        self._incoming.write(self._received[:count])

    def _wait(self, call: Callable[[], int], event: int, deadline: float) -> int:
        """What a call of the socket returns, as soon as it is ready for it."""
        while (left := deadline - time.monotonic()) > 0:
            try:
                return call()
            except BlockingIOError:
                ready = select.poll()
                ready.register(self._socket, event)
                ready.poll(1000 * min(left, _POLL_SECONDS))
            except OSError as error:
                raise _closed(error) from error
        raise ChannelError("it was late")


def _closed(error: OSError) -> ChannelClosedError:
    return ChannelClosedError(f"the connection is gone ({quote(str(error))})")


def dial(address: str, credentials: Credentials, deadline: float) -> Channel:
    """Connect to HOST:PORT, where nobody may listen yet.

    Raises: ChannelError for another than the paired party there; ChannelClosedError if nobody answers in time.
    """
    host, port = address.rsplit(":", 1)
    while True:
        left = max(deadline - time.monotonic(), _RETRY_SECONDS)
        try:
            channel = Channel(socket.create_connection((host, int(port)), left), credentials)
            channel.handshake(deadline)
            return channel
        except OSError as error:
            is_final = isinstance(error, ChannelError) and not isinstance(error, ChannelClosedError)
            if is_final or left <= _RETRY_SECONDS:
                raise ChannelError(f"{address}: {quote(str(error))}") from error
        time.sleep(_RETRY_SECONDS)
