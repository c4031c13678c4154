"""Bytes to and from a client: all that the misbehaving PACS knows of a network.

Its protocol stands on :class:`Line`. :class:`SocketLine` is one over TCP; the simulation in the tests has one
that is made of memory alone.
"""

from __future__ import annotations

import select
import socket
import struct
import time
from contextlib import suppress
from typing import Protocol

_PEER_LEFT = select.POLLHUP | select.POLLERR | getattr(select, "POLLRDHUP", 0)


class Line(Protocol):
    """One connection, from the server's side. All but :meth:`close` raise :class:`OSError` where it is lost."""

    def send(self, data: bytes | memoryview, seconds: float) -> None:
        """Send all of it within so many seconds."""

    def receive(self, size: int, seconds: float) -> bytes:
        """At most ``size`` bytes, as soon as some are there; none where the client has closed."""

    def readable(self) -> bool:
        """Whether something waits to be read, without waiting for it."""

    def left(self, seconds: float) -> bool:
        """Wait so many seconds, or until the client leaves; whether it has. Reads nothing."""

    def now(self) -> float:
        """Seconds of the clock by which it waits."""

    def reset(self) -> None:
        """End the connection by a reset."""

    def close(self) -> None:
        """Close; callable at any time and from any thread."""


class SocketLine:
    """TCP; see :class:`Line`."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._sock = sock

    def send(self, data: bytes | memoryview, seconds: float) -> None:
        """See :meth:`Line.send`."""
        self._sock.settimeout(seconds)
        self._sock.sendall(data)

    def receive(self, size: int, seconds: float) -> bytes:
        """See :meth:`Line.receive`."""
        self._sock.settimeout(seconds)
        return self._sock.recv(size)

    def readable(self) -> bool:
        """See :meth:`Line.readable`."""
        return bool(select.select([self._sock], [], [], 0)[0])

    def left(self, seconds: float) -> bool:
        """See :meth:`Line.left`."""
        poller = select.poll()
        poller.register(self._sock, getattr(select, "POLLRDHUP", 0))
        return any(event & _PEER_LEFT for _, event in poller.poll(seconds * 1000))

    def now(self) -> float:
        """See :meth:`Line.now`."""
        return time.monotonic()

    def reset(self) -> None:
        """See :meth:`Line.reset`."""
        self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self._sock.close()

    def close(self) -> None:
        """See :meth:`Line.close`."""
        with suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)

    def free(self) -> None:
        """Give the descriptor back: for the thread that uses the line, at its end."""
        self.close()
        self._sock.close()
