"""A TCP relay on loopback: records what a PACS sends, and breaks the line on demand.

It stands between a client and a PACS, passes bytes both ways, and reads along: of each C-STORE
request of the PACS it keeps the data set as the sum of its fragments, with the transfer syntax of
the accepted context. That record does not depend on any code under test.
"""

from __future__ import annotations

import hashlib
import queue
import select
import socket
import struct
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Self

_LINGER_RESET = struct.pack("ii", 1, 0)


@dataclass
class Sent:
    """One data set as the PACS sent it."""

    sop: str
    sop_class: str
    syntax: str
    sha256: str
    length: int
    data: bytes | None = field(repr=False, default=None)


class Relay:
    """Listens on a free loopback port and connects each client to ``host:port``.

    Parameters
    ----------
    host, port
        The PACS.
    cut_after, stall_after : int or sequence of int, optional
        Bytes from the PACS after which a connection is reset, or falls silent while it stays open.
        One number is for the first connection; the n-th number is for the n-th one; further
        connections live.
    latency : float
        Seconds by which bytes are delayed, each way.
    keep_data : bool
        Keep the data sets themselves, not only digest and length.

    Attributes
    ----------
    port : int
        Where clients connect.
    sent : list of Sent
        The data sets that went to the client in full, in order.
    down, up : int
        Bytes passed to and from the client.
    commands : list of (str, int, dict)
        ``"up"`` or ``"down"``, command field and elements of every command set.
    connections : int
        Connections accepted.
    largest_pdu : int
        The longest P-DATA that the PACS sent, by its length field.
    borders : list of list of int
        For each connection, after how many bytes from the PACS a PDU had ended.
    """

    def __init__(
        self,
        host: str,
        port: int,
        *,
        cut_after: int | Sequence[int] = (),
        stall_after: int | Sequence[int] = (),
        latency: float = 0.0,
        keep_data: bool = True,
    ) -> None:
        self.target = (host, port)
        self.cuts = [cut_after] if isinstance(cut_after, int) else list(cut_after)
        self.stalls = [stall_after] if isinstance(stall_after, int) else list(stall_after)
        self.latency, self.keep_data = latency, keep_data
        self.sent: list[Sent] = []
        self.commands: list[tuple[str, int, dict[int, bytes]]] = []
        self.down = self.up = self.connections = self.largest_pdu = 0
        self.borders: list[list[int]] = []
        self._lines: list[_Line] = []
        self._closing = threading.Event()
        self._mutex = threading.Lock()
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=64)
        self.port: int = self._listener.getsockname()[1]

    def __enter__(self) -> Self:
        threading.Thread(target=self._accept, name=f"relay-{self.port}", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closing.set()
        # Closing alone would leave the thread that waits in accept where it is.
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for line in self._lines:
            line.reset()

    def by_sop(self) -> dict[str, Sent]:
        """The data sets by SOP Instance UID, the last one where a UID was sent again."""
        return {sent.sop: sent for sent in self.sent}

    def cut(self) -> None:
        """Reset all connections now."""
        for line in self._lines:
            line.reset()

    def _accept(self) -> None:
        while not self._closing.is_set():
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            index = self.connections
            self.connections += 1
            try:
                server = socket.create_connection(self.target, timeout=10)
            except OSError:
                _reset(client)
                continue
            server.settimeout(None)
            cut = self.cuts[index] if index < len(self.cuts) else None
            stall = self.stalls[index] if index < len(self.stalls) else None
            self._lines.append(_Line(self, client, server, cut, stall))


class _Line:
    """One connection: a thread for each direction."""

    def __init__(
        self, relay: Relay, client: socket.socket, server: socket.socket, cut: int | None, stall: int | None
    ) -> None:
        self.relay, self.client, self.server = relay, client, server
        self.cut, self.stall = cut, stall
        self.passed = 0
        self.pumps = 2
        self.syntaxes: dict[int, str] = {}
        self.borders: list[int] = []
        relay.borders.append(self.borders)
        for sock in (client, server):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for direction in ("up", "down"):
            threading.Thread(target=self._pump, args=(direction,), name=f"relay-{direction}", daemon=True).start()

    def reset(self) -> None:
        for sock in (self.client, self.server):
            _reset(sock)

    def _pump(self, direction: str) -> None:
        source, target = (self.client, self.server) if direction == "up" else (self.server, self.client)
        reader = _Reader(self, direction)
        send: Callable[[bytes], object] = target.sendall
        delayed: _Delayed | None = None
        if self.relay.latency:
            delayed = _Delayed(target, self.relay.latency)
            send = delayed.put
        try:
            while True:
                source.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 1)
                data = source.recv(262144)
                if not data:
                    break
                if direction == "up":
                    self.relay.up += len(data)
                    # Read first: a cut must not lose a command that was passed on.
                    reader.feed(data)
                    send(data)
                elif not self._pass_down(data, reader, send):
                    return
            if delayed:
                delayed.finish()
            with suppress(OSError):
                target.shutdown(socket.SHUT_WR)
            self._ended()
        except OSError:
            self.reset()

    def _ended(self) -> None:
        """One direction has ended; after the second the sockets are closed, or many connections would use up all."""
        with self.relay._mutex:
            self.pumps -= 1
            over = not self.pumps
        if over:
            self.client.close()
            self.server.close()

    def _pass_down(self, data: bytes, reader: _Reader, send: Callable[[bytes], object]) -> bool:
        for limit, end in ((self.cut, self.reset), (self.stall, self._fall_silent)):
            if limit is not None and self.passed + len(data) >= limit:
                data = data[: max(limit - self.passed, 0)]
                self._count(data, reader)
                send(data)
                if end == self.reset:
                    # What was passed on should arrive: a reset discards what the client has not read.
                    self._wait_until_read()
                end()
                return False
        self._count(data, reader)
        send(data)
        return True

    def _count(self, data: bytes, reader: _Reader) -> None:
        self.passed += len(data)
        self.relay.down += len(data)
        reader.feed(data)

    def _wait_until_read(self) -> None:
        time.sleep(self.relay.latency + 0.05)

    def _fall_silent(self) -> None:
        # The PACS is read no more either, so it stands still with a full window.
        while not self.relay._closing.wait(0.2):
            with suppress(OSError, ValueError):
                # The client may have given up.
                if select.select([self.client], [], [], 0)[0] and not self.client.recv(1, socket.MSG_PEEK):
                    self.reset()
                    return


class _Delayed:
    """Sends what it is given after a delay, in a thread of its own."""

    def __init__(self, target: socket.socket, seconds: float) -> None:
        self.target, self.seconds = target, seconds
        self.waiting: queue.Queue[tuple[float, bytes]] = queue.Queue()
        self.thread = threading.Thread(target=self._run, name="relay-delay", daemon=True)
        self.thread.start()

    def put(self, data: bytes) -> None:
        self.waiting.put((time.monotonic() + self.seconds, data))

    def finish(self) -> None:
        self.put(b"")
        self.thread.join(self.seconds + 5)

    def _run(self) -> None:
        while True:
            due, data = self.waiting.get()
            if not data:
                return
            time.sleep(max(0.0, due - time.monotonic()))
            try:
                self.target.sendall(data)
            except OSError:
                return


class _Reader:
    """Reads one direction of the conversation along: PDUs, fragments, commands, data sets."""

    def __init__(self, line: _Line, direction: str) -> None:
        self.line, self.direction = line, direction
        self.buffer = bytearray()
        self.command = bytearray()
        self.store: dict[int, bytes] | None = None
        self.pieces: list[bytes] = []
        self.read = 0

    def feed(self, data: bytes) -> None:
        self.buffer += data
        at = 0
        while len(self.buffer) - at >= 6:
            kind, length = self.buffer[at], int.from_bytes(self.buffer[at + 2 : at + 6])
            if len(self.buffer) - at - 6 < length:
                break
            body = memoryview(self.buffer)[at + 6 : at + 6 + length]
            if kind == 0x02:
                self._accepted(bytes(body))
            elif kind == 0x04:
                if self.direction == "down":
                    self.line.relay.largest_pdu = max(self.line.relay.largest_pdu, length)
                self._fragments(body)
            body.release()
            at += 6 + length
            self.read += 6 + length
            if self.direction == "down":
                self.line.borders.append(self.read)
        del self.buffer[:at]

    def _accepted(self, body: bytes) -> None:
        at = 68
        while at + 4 <= len(body):
            kind, length = body[at], int.from_bytes(body[at + 2 : at + 4])
            if kind == 0x21 and body[at + 6] == 0:
                size = int.from_bytes(body[at + 10 : at + 12])
                self.line.syntaxes[body[at + 4]] = body[at + 12 : at + 12 + size].decode().strip("\0 ")
            at += 4 + length

    def _fragments(self, body: memoryview) -> None:
        at = 0
        while at + 6 <= len(body):
            length, context, control = int.from_bytes(body[at : at + 4]), body[at + 4], body[at + 5]
            value = bytes(body[at + 6 : at + 4 + length])
            if control & 1:
                self.command += value
                if control & 2:
                    self._command(context)
            elif self.store is not None:
                self.pieces.append(value)
                if control & 2:
                    self._data_set(context)
            at += 4 + length

    def _command(self, context: int) -> None:
        elements: dict[int, bytes] = {}
        at = 0
        while at + 8 <= len(self.command):
            _, element, length = struct.unpack_from("<HHI", self.command, at)
            elements[element] = bytes(self.command[at + 8 : at + 8 + length])
            at += 8 + length
        self.command.clear()
        kind = int.from_bytes(elements.get(0x0100, b""), "little")
        self.line.relay.commands.append((self.direction, kind, elements))
        self.store = elements if kind == 0x0001 else None
        self.pieces = []

    def _data_set(self, context: int) -> None:
        assert self.store is not None
        data = b"".join(self.pieces)
        relay = self.line.relay
        sent = Sent(
            sop=self.store.get(0x1000, b"").decode("latin-1").strip("\0 "),
            sop_class=self.store.get(0x0002, b"").decode("latin-1").strip("\0 "),
            syntax=self.line.syntaxes.get(context, ""),
            sha256=hashlib.sha256(data).hexdigest(),
            length=len(data),
            data=data if relay.keep_data else None,
        )
        if self.direction == "down":
            relay.sent.append(sent)
        self.store, self.pieces = None, []


def _reset(sock: socket.socket) -> None:
    """Close with a RST."""
    with suppress(OSError):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _LINGER_RESET)
    # A thread that waits in recv holds the socket open until it is woken.
    with suppress(OSError):
        sock.shutdown(socket.SHUT_RD)
    sock.close()
