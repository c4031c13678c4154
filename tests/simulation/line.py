"""Bytes between the engine and the misbehaving PACS, in memory: both ends of a connection, and who takes them."""

from __future__ import annotations

import errno
import os
import ssl
from collections.abc import Callable

from airflow_dicom_get.net.transport import SLICE, Transport
from airflow_dicom_get.testing.misbehaving.line import Line
from tests.simulation.faults import Process
from tests.simulation.loop import Loop, Wait
from tests.simulation.marks import mark

_WINDOW = 1 << 18
"""Bytes that one side may send before the other one reads."""


class _Pipe:
    """One direction."""

    def __init__(self, loop: Loop) -> None:
        self.loop = loop
        self.data = bytearray()
        self.ended = False
        """No more will come."""
        self.reset = False
        self.changed: list[Wait] = []

    def change(self) -> None:
        if self.changed:
            self.loop.wake_all(self.changed)


class Connection:
    """A connection over which neither side has said anything yet."""

    def __init__(self, loop: Loop, process: Process | None) -> None:
        self.loop = loop
        there, back = _Pipe(loop), _Pipe(loop)
        self.client = Client(there, back, process)
        self.server = Server(back, there)
        if process is not None:
            process.at_death.append(self.client.end)


class _End:
    """What both ends do."""

    def __init__(self, out: _Pipe, into: _Pipe) -> None:
        self.out, self.into, self.loop = out, into, out.loop
        self.open = True

    def _take(self, size: int) -> bytes:
        """What is there, without waiting."""
        pipe = self.into
        if pipe.reset:
            raise ConnectionResetError(errno.ECONNRESET, "Connection reset by peer")
        data = bytes(pipe.data[:size])
        del pipe.data[:size]
        pipe.change()
        return data

    def _put(self, data: bytes | memoryview) -> int:
        """As much as the line takes, without waiting."""
        pipe = self.out
        if self.into.reset:
            raise ConnectionResetError(errno.ECONNRESET, "Connection reset by peer")
        if pipe.ended:
            raise BrokenPipeError(errno.EPIPE, "Broken pipe")
        size = min(len(data), _WINDOW - len(pipe.data))
        pipe.data += data[:size]
        pipe.change()
        return size

    def end(self) -> None:
        """Close this end: the other one reads what was sent, and then the end."""
        if self.open:
            self.open = False
            self.out.ended = True
            self.out.change()
            self.into.ended = True  # who still sends hears of it
            self.into.change()


class Client(_End):
    """The engine's end: a :class:`~airflow_dicom_get.net.transport.Transport`."""

    def __init__(self, out: _Pipe, into: _Pipe, process: Process | None) -> None:
        super().__init__(out, into)
        self.process = process

    def _call(self, operation: str) -> None:
        """Count a call, and make the fault that it meets; an error comes before any effect."""
        if self.process is None:
            return
        fault = self.process.call(operation)
        if fault is not None:
            if isinstance(fault.error, int):
                mark(f"network: {operation} failed by {errno.errorcode[fault.error]}")
                raise OSError(fault.error, os.strerror(fault.error))
            self.process.end_of_call(fault)

    def receive(self, view: memoryview) -> int:
        if self.into.data:  # whoever waits for nothing meets nothing
            self._call("receive")
        if not self.open:
            raise OSError(errno.EBADF, "Bad file descriptor")
        pipe = self.into
        if not pipe.data and not pipe.ended and not pipe.reset and not self.loop.park(pipe.changed, SLICE):
            raise TimeoutError
        data = self._take(len(view))
        if not data and not pipe.ended:
            raise TimeoutError
        view[: len(data)] = data
        return len(data)

    def send(self, view: memoryview) -> int:
        self._call("send")
        if not self.open:
            raise OSError(errno.EBADF, "Bad file descriptor")
        size = self._put(view)
        if not size and len(view):
            self.loop.park(self.out.changed, SLICE)
            size = self._put(view)
            if not size:
                raise TimeoutError
        return size

    def wait(self, seconds: float) -> bool:
        self.loop.check()
        pipe = self.into
        if not pipe.data and not pipe.ended and not pipe.reset:
            self.loop.park(pipe.changed, max(min(seconds, SLICE), 0))
        return bool(pipe.data) or pipe.ended or pipe.reset

    def said(self) -> OSError | None:
        return None

    def hang_up(self, last: bytes, seconds: float) -> None:
        self.loop.check()
        try:
            self._put(last)
            limit = self.loop.at + seconds
            while (left := limit - self.loop.at) > 0 and not self.into.ended and not self.into.reset:
                self.into.data.clear()
                self.loop.park(self.into.changed, left)
        except OSError:
            pass
        self.close()

    def close(self) -> None:
        self.loop.check()
        self.end()


class Server(_End):
    """The PACS's end: a :class:`~airflow_dicom_get.testing.misbehaving.line.Line`."""

    def send(self, data: bytes | memoryview, seconds: float) -> None:
        limit = self.loop.at + seconds
        view = memoryview(data)
        while view:
            size = self._put(view)
            view = view[size:]
            if view and not size:
                if self.loop.at >= limit:
                    raise TimeoutError
                self.loop.park(self.out.changed, limit - self.loop.at)

    def receive(self, size: int, seconds: float) -> bytes:
        pipe = self.into
        limit = self.loop.at + seconds
        while not pipe.data and not pipe.ended:
            if self.loop.at >= limit:
                raise TimeoutError
            self.loop.park(pipe.changed, limit - self.loop.at)
        return self._take(size)

    def readable(self) -> bool:
        return bool(self.into.data) or self.into.ended

    def left(self, seconds: float) -> bool:
        limit = self.loop.at + seconds
        while not self.into.ended and (left := limit - self.loop.at) > 0:
            self.loop.park(self.into.changed, left)
        return self.into.ended

    def now(self) -> float:
        return self.loop.at

    def reset(self) -> None:
        self.out.reset = True
        self.out.data.clear()
        self.end()

    def close(self) -> None:
        self.end()


class Network:
    """Takes the place of ``transport.connect``.

    Parameters
    ----------
    loop : Loop
        Whose time and tasks.
    accept : callable
        Given the server's end of each connection, with its port; raises :class:`OSError` where nobody listens.
    """

    def __init__(self, loop: Loop, accept: Callable[[Line, int], Callable[[], object]]) -> None:
        self.loop, self._accept = loop, accept
        self.connections: list[Connection] = []

    def connect(
        self,
        host: str,
        port: int,
        seconds: float,
        tls: ssl.SSLContext | None = None,
        server_name: str | None = None,
        ended: Callable[[], bool] = lambda: False,
    ) -> Transport:
        process = self.loop.process
        if process is not None:
            fault = process.call("connect")
            if fault is not None and isinstance(fault.error, int):
                mark(f"network: connect failed by {errno.errorcode[fault.error]}")
                raise OSError(fault.error, os.strerror(fault.error))
        connection = Connection(self.loop, process)
        work = self._accept(connection.server, port)
        self.connections.append(connection)

        def serve() -> None:
            try:
                work()
            finally:
                connection.server.end()

        self.loop.spawn(serve, f"pacs-{len(self.connections)}")
        return connection.client

    @property
    def left_open(self) -> int:
        """Connections whose client has not closed."""
        return sum(connection.client.open for connection in self.connections)
