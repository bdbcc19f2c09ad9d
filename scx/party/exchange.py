"""Requests and replies of one worker, of whichever thread: a request, its reply, the next request.

A thread may leave a reply where it is for a while, or for good. Whoever wants to send the next request then reads it
first and puts it by, so that it stands in nobody's way and is never taken for another's.
"""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from threading import Lock

from torch import Tensor

from scx.party.boundary import PartyLostError, Request
from scx.party.channel import Channel, ChannelError
from scx.party.messages import MessageError, read_reply, write_request

__all__ = ["Exchange", "Worker"]

_Shapes = Mapping[str, tuple[int, ...]]


class Exchange:
    """A request that was sent, and its reply or what came instead, once somebody has read that.

    Args:
        name: of the request, for errors.
        number: of the message. shapes: of the reply's tensors, by name.
    """

    def __init__(self, name: str, number: int, shapes: _Shapes) -> None:
        self.name = name
        self.number = number
        self.shapes = shapes
        self.reply: dict[str, Tensor] | None = None
        self.error: Exception | None = None


class Worker:
    """The secure side's end of a worker's connection.

    Args:
        channel: to a worker that has agreed.
        number: of the worker, for errors.
    """

    def __init__(self, channel: Channel, number: int) -> None:
        self.number = number
        self._channel = channel
        self._lock = Lock()
        self._sent = 0
        self._under_way: Exchange | None = None
        self.is_lost = False

    def begin(self, request: Request, shapes: _Shapes, seconds: float) -> Exchange:
        """Send a request.

        Args:
            shapes: of the reply's tensors, by name.
            seconds: that sending may take, and so may reading a reply that was left.

        Raises: PartyLostError; TypeError for tensors of a dtype that does not cross.
        """
        name = f"{request.operation}, block {request.block}: worker {self.number}"
        with self._lock:
            self._settle(seconds)
            if self.is_lost:
                raise PartyLostError(f"{name} is not connected")
            message = write_request(self._sent + 1, request)
            self._sent += 1
            try:
                with self._ending():
                    self._channel.send(message, time.monotonic() + seconds)
            except ChannelError as error:
                raise _lost(name, error) from error
            self._under_way = exchange = Exchange(name, self._sent, shapes)
            return exchange

    def finish(self, exchange: Exchange, seconds: float) -> dict[str, Tensor]:
        """Wait for the reply. Raises PartyLostError for any other than was asked for, and for one that is not whole
        within these seconds."""
        with self._lock:
            if exchange is self._under_way:
                self._settle(seconds)
        if exchange.reply is None:
            raise _lost(exchange.name, exchange.error) from exchange.error
        return exchange.reply

    def end(self) -> None:
        """End the connection, whoever waits for it."""
        self.is_lost = True
        self._channel.end()

    def _settle(self, seconds: float) -> None:
        """Read the reply that is under way, if there is one."""
        exchange, self._under_way = self._under_way, None
        if exchange is None:
            return
        try:
            with self._ending():
                fill = self._channel.source(time.monotonic() + seconds)
                exchange.reply = read_reply(fill, exchange.number, exchange.shapes)
        except (ChannelError, MessageError) as error:
            exchange.error = error

    @contextmanager
    def _ending(self) -> Iterator[None]:
        """What breaks off in here, by an interruption as well, leaves a connection that nobody can use."""
        try:
            yield
        except BaseException:
            self.end()
            raise


def _lost(name: str, error: Exception | None) -> PartyLostError:
    return PartyLostError(f"{name} is lost: {'interrupted' if error is None else error}")
