"""Where workers come in: who has the paired certificate and the right model joins, anybody else is nobody.

Whoever comes is asked in a thread of their own, within a time, so that none holds up another. Of those who have not
shown a certificate the first to have come goes when they are too many.
"""

import socket
import time
from collections import deque
from contextlib import suppress
from threading import Condition, Thread

from scx.life import this_life
from scx.party.channel import Channel, ChannelClosedError, ChannelError
from scx.party.credentials import Credentials
from scx.party.messages import MessageError, read_reply

__all__ = ["Door"]

_MAX_COMING = 64
_MAX_WAITING = 64
_ADMISSION_SECONDS = 30.0
_RECOVERY_SECONDS = 0.1


class Door:
    """A listening socket, and the workers that wait behind it for their turn, in the order in which they joined.

    Args:
        host, port: to listen at, there alone; port 0 takes a free one.
        credentials: of the secure side.
        agreement: the message that a worker must agree to.
        seconds: that one may take from its coming to its agreeing.
    """

    def __init__(
        self,
        host: str,
        port: int,
        credentials: Credentials,
        agreement: list[memoryview],
        seconds: float = _ADMISSION_SECONDS,
    ) -> None:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        self._listener = socket.create_server(address[:2], family=family, backlog=_MAX_COMING)
        self.port: int = self._listener.getsockname()[1]
        self._credentials = credentials
        self._agreement = agreement
        self._seconds = seconds
        self._coming: dict[Channel, bool] = {}  # whether they have shown the certificate
        self._waiting: deque[Channel] = deque()
        self._changed = Condition()
        self._life = this_life()
        self._is_open = True
        self.refusal = ""
        """Why somebody who came last was sent away."""
        Thread(target=self._listen, name=f"workers at {host}:{self.port}", daemon=True).start()

    def next(self, deadline: float) -> Channel | None:
        """The next worker that is still there; None if there is none in time."""
        with self._changed:
            while self._is_open:
                while self._waiting:
                    channel = self._waiting.popleft()
                    if channel.is_quiet():
                        return channel
                left = deadline - time.monotonic()
                if left <= 0:
                    break
                self._changed.wait(left)
        return None

    def close(self) -> None:
        """Listen no more, and let go whoever has come. A forked process leaves them to the one that listens."""
        if self._life != this_life():
            self._listener.close()
            return
        with self._changed:
            self._is_open = False
            come = [*self._coming, *self._waiting]
            self._waiting.clear()
            self._changed.notify_all()
        for channel in come:
            channel.end()
        with suppress(OSError):  # it was closed before
            self._listener.shutdown(socket.SHUT_RDWR)  # wakes the thread that accepts
        self._listener.close()

    def _listen(self) -> None:
        while self._is_open:
            try:
                channel = Channel(self._listener.accept()[0], self._credentials)
            except ChannelClosedError:
                continue
            except OSError:  # closed, or out of files, of which some come back
                time.sleep(_RECOVERY_SECONDS)
                continue
            with self._changed:
                self._coming[channel] = False
                if len(self._coming) > _MAX_COMING:
                    first = next((x for x, is_known in self._coming.items() if not is_known), channel)
                    first.end()
                    del self._coming[first]
            Thread(target=self._admit, args=(channel,), daemon=True).start()

    def _admit(self, channel: Channel) -> None:
        deadline = time.monotonic() + self._seconds
        try:
            channel.handshake(deadline)
            with self._changed:
                if channel in self._coming:
                    self._coming[channel] = True
            channel.send(self._agreement, deadline)
            read_reply(channel.source(deadline), 0, {})
        except (ChannelError, MessageError) as error:
            self.refusal = str(error)
            channel.end()
        else:
            self._queue(channel)
        with self._changed:
            self._coming.pop(channel, None)

    def _queue(self, channel: Channel) -> None:
        with self._changed:
            self._waiting = deque(x for x in self._waiting if x.is_quiet())
            if self._is_open and len(self._waiting) < _MAX_WAITING:
                self._waiting.append(channel)
                self._changed.notify()
                return
        channel.end()
