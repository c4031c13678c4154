"""Bytes to and from a peer: the one place that knows sockets, and where another network can be put in.

Whatever :func:`connect` gives is a :class:`Transport`; a simulation puts a function of its own in its place.
"""

from __future__ import annotations

import errno
import os
import select
import socket
import ssl
import struct
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Protocol

from airflow_dicom_get import clock

SLICE = 0.2
"""Longest single wait in seconds: how soon a cancel is seen."""
_READ = 1 << 18
_AT_ONCE = 1 << 16
"""Bytes that OpenSSL is given, or takes, at once."""
_QUICKACK = getattr(socket, "TCP_QUICKACK", None)
_TIMEVAL = struct.Struct("@ll")


class Transport(Protocol):
    """A connection with a peer. One thread reads and writes; :meth:`hang_up` and :meth:`close` are any thread's."""

    def receive(self, view: memoryview) -> int:
        """Read into ``view`` what is there, after at most :data:`SLICE` seconds; 0 where the peer has closed.

        Raises
        ------
        TimeoutError
            Nothing came in that time.
        OSError
            The connection is lost.
        """

    def send(self, view: memoryview) -> int:
        """Send what the line takes of ``view`` within :data:`SLICE` seconds; how much. Raises as :meth:`receive`."""

    def wait(self, seconds: float) -> bool:
        """Whether something is there to be read, or comes within ``seconds``, at most :data:`SLICE`. Reads nothing."""

    def said(self) -> OSError | None:
        """What a TLS peer said before it hung up on what we sent."""

    def hang_up(self, last: bytes, seconds: float) -> None:
        """Send ``last`` as far as it goes, give the peer so many seconds to close, and close. Never raises."""

    def close(self) -> None:
        """Close, at once."""


class SocketTransport:
    """TCP; see :class:`Transport`."""

    def __init__(self, sock: socket.socket) -> None:
        # The kernel's own timeouts: Python's would cost another system call before each read and write.
        sock.settimeout(None)
        for option in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
            sock.setsockopt(socket.SOL_SOCKET, option, _TIMEVAL.pack(0, int(SLICE * 1_000_000)))
        self._sock = sock
        self._read, self._option = sock.recv_into, sock.setsockopt

    def receive(self, view: memoryview) -> int:
        """See :meth:`Transport.receive`."""
        if _QUICKACK is not None:  # not sticky: without it each instance waits 40 ms for a delayed ACK
            try:
                self._option(socket.IPPROTO_TCP, _QUICKACK, 1)
            except OSError:
                pass
        try:
            return self._read(view)
        except BlockingIOError:
            raise TimeoutError from None

    def send(self, view: memoryview) -> int:
        """See :meth:`Transport.send`."""
        try:
            return self._sock.send(view)
        except BlockingIOError:
            raise TimeoutError from None

    def wait(self, seconds: float) -> bool:
        """See :meth:`Transport.wait`."""
        poll = select.poll()
        poll.register(self._sock, select.POLLIN)
        if _QUICKACK is not None:  # the answer may come in two pieces, the second held back for our ACK
            self._option(socket.IPPROTO_TCP, _QUICKACK, 1)
        return bool(poll.poll(max(min(seconds, SLICE), 0) * 1000))

    def said(self) -> OSError | None:
        """See :meth:`Transport.said`."""
        return None

    def hang_up(self, last: bytes, seconds: float) -> None:
        """See :meth:`Transport.hang_up`."""
        limit = clock.monotonic() + seconds
        try:
            self._sock.settimeout(0.5)
            self._sock.send(last)
            while (left := limit - clock.monotonic()) > 0:
                self._sock.settimeout(left)
                # Not into the buffer of the reader: a destination that is late may still be reading from that.
                if not self._sock.recv(_READ):
                    break
        except OSError:
            pass
        self.close()

    def close(self) -> None:
        """See :meth:`Transport.close`."""
        try:
            self._sock.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass
        self._sock.close()


class TlsTransport:
    """TLS over another transport; see :class:`Transport`.

    OpenSSL works in memory, on what it is given here. Where it has the socket, one call of it goes on for as long as
    a peer sends what holds no data, as session tickets or HelloRequests, and no deadline or cancel is looked at.
    """

    def __init__(self, line: SocketTransport, tls: ssl.SSLContext, server_name: str) -> None:
        self._line = line
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._session = tls.wrap_bio(self._incoming, self._outgoing, server_hostname=server_name)
        self._mutex = threading.Lock()  # of the session and of what it sends: OpenSSL has none
        self._buffer = memoryview(bytearray(_AT_ONCE))
        self._ready = b""
        """What is encrypted and has not gone."""
        self._promised = 0
        """Bytes of the caller's that are among it, and that he does not know to be taken yet."""

    def shake_hands(self, limit: float, ended: Callable[[], bool]) -> None:
        """Open the session. Raises :class:`TimeoutError` at the limit, or where it has ended, and :class:`OSError`."""
        while True:
            try:
                with self._mutex:
                    self._session.do_handshake()
                    self._flush()
                    return
            except (ssl.SSLWantReadError, TimeoutError):
                pass
            except ssl.SSLError:
                with suppress(TimeoutError):
                    self._answer()  # the peer learns why
                raise
            with suppress(TimeoutError):
                self._answer()
            left = limit - clock.monotonic()
            if left <= 0 or ended():
                raise TimeoutError
            if self._line.wait(left):
                self._take()

    def agreed(self) -> bool:
        """Whether the peer has chosen a cipher suite."""
        return self._session.cipher() is not None

    def receive(self, view: memoryview) -> int:
        """See :meth:`Transport.receive`."""
        limit = clock.monotonic() + SLICE
        while True:
            try:
                with self._mutex:
                    return self._session.read(len(view), view)  # type: ignore[return-value]
            except ssl.SSLWantReadError:
                self._answer()
            except (ssl.SSLEOFError, ssl.SSLZeroReturnError):
                return 0
            if clock.monotonic() >= limit:
                raise TimeoutError
            self._take()

    def _take(self) -> None:
        """Give OpenSSL what has come. Raises as :meth:`Transport.receive`."""
        size = self._line.receive(self._buffer)
        if size:
            self._incoming.write(self._buffer[:size])
        else:
            self._incoming.write_eof()

    def _answer(self) -> None:
        """Send what OpenSSL has to say. Raises :class:`TimeoutError` where the line does not take it."""
        try:
            with self._mutex:
                self._flush()
        except TimeoutError:
            raise
        except OSError:
            pass  # what the peer has said before it hung up can be read all the same

    def _flush(self) -> None:
        limit = clock.monotonic() + SLICE
        if self._outgoing.pending:
            self._ready += self._outgoing.read()
        while self._ready:
            if clock.monotonic() >= limit:
                raise TimeoutError
            self._ready = self._ready[self._line.send(memoryview(self._ready)) :]

    def send(self, view: memoryview) -> int:
        """See :meth:`Transport.send`; after a :class:`TimeoutError` it is called with the same bytes again."""
        with self._mutex:
            if not self._promised:
                most = min(len(view), _AT_ONCE)
                try:
                    while self._promised < most:
                        self._promised += self._session.write(view[self._promised : most])
                except ssl.SSLWantReadError:  # it waits for the peer
                    if not self._promised:
                        raise TimeoutError from None
            self._flush()
            taken, self._promised = self._promised, 0
            return taken

    def wait(self, seconds: float) -> bool:
        """See :meth:`Transport.wait`."""
        return bool(self._session.pending() or self._incoming.pending) or self._line.wait(seconds)

    def said(self) -> OSError | None:
        """See :meth:`Transport.said`."""
        try:
            self.receive(memoryview(bytearray(1)))
        except ssl.SSLError as alert:
            return alert
        except OSError:
            pass
        return None

    def hang_up(self, last: bytes, seconds: float) -> None:
        """See :meth:`Transport.hang_up`."""
        with self._mutex:
            try:
                self._session.write(last)
            except OSError:
                pass
            last = self._ready + self._outgoing.read()
        self._line.hang_up(last, seconds)

    def close(self) -> None:
        """See :meth:`Transport.close`."""
        self._line.close()


def connect_socket(
    host: str,
    port: int,
    seconds: float,
    tls: ssl.SSLContext | None = None,
    server_name: str | None = None,
    ended: Callable[[], bool] = lambda: False,
) -> Transport:
    """Connect, and shake hands where ``tls`` is given.

    Parameters
    ----------
    host, port
        Where.
    seconds : float
        For all of it.
    tls : ssl.SSLContext, optional
        How, if it is to be TLS.
    server_name : str, optional
        The name that the certificate must have; ``host`` by default.
    ended : callable
        Asked at least every :data:`SLICE` seconds; where it says so, the time is over at once.

    Raises
    ------
    HandshakeError
        No TLS session came about; its cause says why, :class:`TimeoutError` where the time was over.
    OSError
        There is no connection; :class:`TimeoutError` where the time was over.
    """
    limit = clock.monotonic() + seconds
    sock = _reach(host, port, limit, ended)
    try:
        _arm(sock)
        line = SocketTransport(sock)
        return line if tls is None else _secured(line, tls, server_name or host, limit, ended)
    except BaseException:
        sock.close()
        raise


connect: Callable[..., Transport] = connect_socket
"""What associations are opened over."""


class HandshakeError(Exception):
    """A TLS session did not come about over a connection that was there; the cause says why."""

    def __init__(self, agreed: bool) -> None:
        super().__init__(agreed)
        self.agreed = agreed
        """Whether the peer had chosen a cipher suite."""


def _reach(host: str, port: int, limit: float, ended: Callable[[], bool]) -> socket.socket:
    """A connection with the first address of a host that takes one; each has an equal share of the time that is left.

    A name is looked up as long as the resolver of the system takes.
    """
    failed: OSError | None = None
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    for left, (family, kind, protocol, _, address) in zip(range(len(found), 0, -1), found, strict=True):
        sock = socket.socket(family, kind, protocol)
        try:
            sock.setblocking(False)
            code = sock.connect_ex(address)
            now = clock.monotonic()
            while code == errno.EINPROGRESS:
                if _waited(sock, select.POLLOUT, now + (limit - now) / left, ended):
                    code = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
            if code:
                raise OSError(code, os.strerror(code))
            return sock
        except OSError as error:
            sock.close()
            failed = error
            if ended():
                break
        except BaseException:
            sock.close()
            raise
    raise failed or OSError(errno.EADDRNOTAVAIL, os.strerror(errno.EADDRNOTAVAIL))


def _waited(sock: socket.socket, event: int, limit: float, ended: Callable[[], bool]) -> bool:
    """Wait for a moment; whether it came. Raises :class:`TimeoutError` at the limit, or where it has ended."""
    left = limit - clock.monotonic()
    if left <= 0 or ended():
        raise TimeoutError
    poll = select.poll()
    poll.register(sock, event)
    return bool(poll.poll(min(left, SLICE) * 1000))


def _secured(
    line: SocketTransport, tls: ssl.SSLContext, server_name: str, limit: float, ended: Callable[[], bool]
) -> Transport:
    secure = TlsTransport(line, tls, server_name)
    try:
        secure.shake_hands(limit, ended)
        return secure
    except OSError as error:
        raise HandshakeError(secure.agreed()) from error


def _arm(sock: socket.socket) -> None:
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (("TCP_KEEPIDLE", 30), ("TCP_KEEPINTVL", 10), ("TCP_KEEPCNT", 3)):
        option = getattr(socket, name, None)
        if option is not None:
            sock.setsockopt(socket.IPPROTO_TCP, option, value)
