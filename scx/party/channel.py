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
from typing import TypeVar

from scx.party.credentials import Credentials
from scx.party.messages import Fill, quote

Result = TypeVar("Result")

__all__ = ["PATIENCE", "Channel", "ChannelClosedError", "ChannelError", "dial"]

PATIENCE = math.inf
"""The deadline of a wait that only the other end's own end ends."""

_CHUNK_BYTES = 2**20
_POLL_SECONDS = 3600.0
_RETRY_SECONDS = 0.2
_KEEPALIVE = {"TCP_KEEPIDLE": 60, "TCP_KEEPINTVL": 15, "TCP_KEEPCNT": 4}
"""After two minutes without a sign of the other machine it is taken for gone, where the system has these settings."""


class ChannelError(ConnectionError):
    """The other end is not who was expected, is late, or the connection was altered."""


class ChannelClosedError(ChannelError):
    """The other end, or the connection, is gone."""


class Channel:
    """One end of a connection. One thread at a time sends and receives; any may `end` it.

    Args:
        sock: connected. It is the channel's from now on.
        credentials: of this end.

    Raises: ChannelClosedError if the other end is gone already.
    """

    def __init__(self, sock: socket.socket, credentials: Credentials) -> None:
        self._credentials = credentials
        try:
            sock.setblocking(False)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            for name, value in _KEEPALIVE.items():
                if hasattr(socket, name):
                    sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
            self._socket = credentials.wrap(sock)
        except OSError as error:
            sock.close()
            raise ChannelClosedError(quote(str(error))) from error
        weakref.finalize(self, self._socket.close)

    def handshake(self, deadline: float) -> None:
        """Show the own certificate and see the other's. Raises ChannelError unless that is the one expected.

        The end that connected knows only with the first message that its own certificate was taken.
        """
        self._repeat(self._socket.do_handshake, deadline)
        if not self._credentials.expects(self._socket.getpeercert(binary_form=True)):
            raise ChannelError("another certificate than that of the paired party")

    def send(self, parts: Iterable[memoryview], deadline: float) -> None:
        """Send buffers of bytes, one behind the other. Raises ChannelError if they are not taken in time."""
        for part in parts:
            while part:
                part = part[self._repeat(partial(self._socket.send, part[:_CHUNK_BYTES]), deadline) :]

    def source(self, deadline: float) -> Fill:
        """What fills buffers with the bytes that come. It raises ChannelError if they do not come in time."""

        def fill(buffer: memoryview) -> None:
            while buffer:
                count = self._repeat(partial(self._socket.recv_into, buffer[:_CHUNK_BYTES]), deadline)
                if not count:
                    raise ChannelClosedError("it closed the connection")
                buffer = buffer[count:]

        return fill

    def is_quiet(self) -> bool:
        """Whether the other end is there and has nothing to say, as one that waits for its turn."""
        try:
            self._socket.recv(1)
        except ssl.SSLWantReadError:
            return True
        except OSError:
            return False
        return False

    def end(self) -> None:
        """End the connection, and with it every wait for it in any thread."""
        with suppress(OSError):  # it has ended already
            # Not SSLSocket's own shutdown, which opens the socket to reads that are not deciphered.
            socket.socket.shutdown(self._socket, socket.SHUT_RDWR)

    def _repeat(self, step: Callable[[], Result], deadline: float) -> Result:
        """What `step` returns as soon as the connection is ready for it."""
        while (left := deadline - time.monotonic()) > 0:
            try:
                return step()
            except ssl.SSLWantReadError:
                self._wait(select.POLLIN, left)
            except ssl.SSLWantWriteError:
                self._wait(select.POLLOUT, left)
            except (ConnectionError, ssl.SSLEOFError) as error:
                raise ChannelClosedError(f"the connection is gone ({quote(str(error))})") from error
            except OSError as error:
                raise ChannelError(f"the connection broke ({quote(str(error))})") from error
        raise ChannelError("it was late")

    def _wait(self, event: int, seconds: float) -> None:
        ready = select.poll()
        ready.register(self._socket, event)
        ready.poll(1000 * min(seconds, _POLL_SECONDS))


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
