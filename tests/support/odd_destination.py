"""A storage SCP on plain sockets that does as it is told: refuses, answers late, dies. For the tests of forwards."""

from __future__ import annotations

import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, Self

_QUERY = "1.2.840.10008.5.1.4.1.2."  # it stores, and no more


class DieError(Exception):
    """Drop the connection."""


@dataclass
class Stored:
    """An instance that came whole, under the status that it was answered with."""

    sop_class: str
    syntax: str
    data: bytes
    status: int
    association: int
    message_id: int


@dataclass
class OddDestination:
    """A destination; every hook has a harmless default.

    `accept` gives the result for a (class, syntax), `status` what an instance is answered, `delay` the
    seconds before that answer; they are called with the number of the instance, from 1. `reject` gives
    (result, source, reason) for an association that is not to be, by its number. `on_data` is called
    with the number of the instance and the bytes so far, and may raise `DieError` or sleep.
    """

    accept: Callable[[str, str], int] = lambda sop_class, syntax: 0
    status: Callable[[int], int] = lambda number: 0
    delay: Callable[[int], float] = lambda number: 0.0
    reject: Callable[[int], tuple[int, int, int] | None] = lambda number: None
    on_data: Callable[[int, int], None] = lambda number, size: None
    early: bool = False
    """Whether it answers as soon as it has the command, before any data."""
    max_pdu: int = 16384
    ae_title: str = "ODD"
    host: str = "127.0.0.1"
    port: int = 0
    stored: list[Stored] = field(default_factory=list)
    proposed: list[list[tuple[str, str]]] = field(default_factory=list)
    ends: Counter[str] = field(default_factory=Counter)
    open: int = 0
    peak: int = 0
    largest_pdu: int = 0
    odd_fragments: int = 0

    def __post_init__(self) -> None:
        self._mutex = threading.Lock()
        self._instances = 0
        self._sockets: list[socket.socket] = []
        self._threads: list[threading.Thread] = []
        self._stopping = False

    @property
    def node(self) -> str:
        return f"{self.ae_title}@{self.host}:{self.port}"

    def held(self) -> dict[str, bytes]:
        """Data sets by SOP Instance UID, of those answered with success or a warning."""
        return {uid: x.data for uid, x in self._by_uid.items() if x.status == 0 or x.status >> 12 == 0xB}

    @property
    def times(self) -> Counter[str]:
        """How often each instance came whole."""
        return self._times

    def __enter__(self) -> Self:
        self._by_uid: dict[str, Stored] = {}
        self._times: Counter[str] = Counter()
        self._listen()
        return self

    def _listen(self) -> None:
        self._server = socket.create_server((self.host, self.port))
        self.port = self._server.getsockname()[1]
        thread = threading.Thread(target=self._accept, args=(self._server,), daemon=True)
        thread.start()
        self._threads.append(thread)

    def __exit__(self, *_: object) -> None:
        self._stopping = True
        self.go_down()
        for thread in self._threads:
            thread.join(5)

    def go_down(self) -> None:
        """Stop listening and drop all connections."""
        try:
            self._server.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass
        self._server.close()
        with self._mutex:
            for sock in self._sockets:
                try:
                    sock.shutdown(socket.SHUT_RDWR)
                except OSError:
                    pass

    def come_back(self) -> None:
        """Listen again on the same port."""
        self._listen()

    def _accept(self, server: socket.socket) -> None:
        while True:
            try:
                sock, _ = server.accept()
            except OSError:
                return
            thread = threading.Thread(target=self._serve, args=(sock,), daemon=True)
            with self._mutex:
                self._sockets.append(sock)
                self._threads.append(thread)
            thread.start()

    def _serve(self, sock: socket.socket) -> None:
        with self._mutex:
            self.open += 1
            self.peak = max(self.peak, self.open)
        left = ExitStack()
        left.callback(self._leave)
        try:
            with sock:
                self.ends[self._converse(sock, left)] += 1
        except (DieError, OSError, struct.error):
            self.ends["dropped"] += 1
        finally:
            left.close()
            with self._mutex:
                self._sockets.remove(sock)

    def _leave(self) -> None:
        with self._mutex:
            self.open -= 1

    def _converse(self, sock: socket.socket, left: ExitStack) -> str:
        kind, body = _pdu(sock)
        if kind != 1:
            return "no association"
        with self._mutex:
            contexts = _proposed(body)
            asked = [pair for _, pair in contexts if not pair[0].startswith(_QUERY)]
            if asked:
                self.proposed.append(asked)
            number = len(self.proposed)
        refusal = self.reject(number) if asked else None
        if refusal is not None:
            sock.sendall(struct.pack(">BBLBBBB", 3, 0, 4, 0, *refusal))
            return "rejected"
        pairs = dict(contexts)
        sock.sendall(self._accepted(body, contexts))
        command, data, current, request = b"", bytearray(), 0, None
        while True:
            kind, body = _pdu(sock)
            if kind == 5:
                left.close()  # before the answer: with it the other side may open the next one
                sock.sendall(struct.pack(">BBLL", 6, 0, 4, 0))
                return "released"
            if kind == 7:
                return "aborted"
            self.largest_pdu = max(self.largest_pdu, len(body))
            pos = 0
            while pos < len(body):
                length, context, control = struct.unpack_from(">LBB", body, pos)
                part = body[pos + 6 : pos + 4 + length]
                pos += 4 + length
                if control & 1:
                    command += part
                    if control & 2:
                        request, command = _elements(command), b""
                        data, current = bytearray(), self._next()
                        if self.early:
                            self._answer(sock, context, pairs[context], request, b"", current, number)
                    continue
                assert request is not None
                if len(part) % 2 and not control & 2:
                    self.odd_fragments += 1
                data += part
                self.on_data(current, len(data))
                if control & 2 and not self.early:
                    self._answer(sock, context, pairs[context], request, bytes(data), current, number)

    def _next(self) -> int:
        with self._mutex:
            self._instances += 1
            return self._instances

    def _answer(
        self,
        sock: socket.socket,
        context: int,
        pair: tuple[str, str],
        request: dict[int, bytes],
        data: bytes,
        number: int,
        association: int,
    ) -> None:
        status = self.status(number)
        wait = time.monotonic() + self.delay(number)
        while time.monotonic() < wait and not self._stopping:
            time.sleep(0.02)
        sop = request[0x1000].rstrip(b"\0 ").decode()
        (message_id,) = struct.unpack("<H", request[0x0110])
        stored = Stored(*pair, data, status, association, message_id)
        with self._mutex:
            self.stored.append(stored)
            self._times[sop] += 1
            self._by_uid[sop] = stored
        body = _element(0x0002, request[0x0002]) + _element(0x0100, b"\x01\x80") + _element(0x0120, request[0x0110])
        body += _element(0x0800, b"\x01\x01") + _element(0x0900, struct.pack("<H", status))
        body += _element(0x1000, request[0x1000])
        answer = _element(0, struct.pack("<L", len(body))) + body
        head = struct.pack(">BBLLBB", 4, 0, len(answer) + 6, len(answer) + 2, context, 3)
        # In two writes, as many SCPs do.
        sock.sendall(head)
        sock.sendall(answer)

    def _accepted(self, request: bytes, contexts: list[tuple[int, tuple[str, str]]]) -> bytes:
        items = _item(0x10, b"1.2.840.10008.3.1.1.1")
        for number, pair in contexts:
            syntax = _item(0x40, pair[1].encode())
            items += _item(
                0x21, bytes((number, 0, 3 if pair[0].startswith(_QUERY) else self.accept(*pair), 0)) + syntax
            )
        items += _item(0x50, _item(0x51, struct.pack(">L", self.max_pdu)) + _item(0x52, b"1.2.3"))
        body = request[:68] + items
        return struct.pack(">BBL", 2, 0, len(body)) + body


def _item(kind: int, value: bytes) -> bytes:
    return struct.pack(">BBH", kind, 0, len(value)) + value


def _element(number: int, value: bytes) -> bytes:
    return struct.pack("<HHL", 0, number, len(value)) + value


def _elements(data: bytes) -> dict[int, bytes]:
    found, pos = {}, 0
    while pos < len(data):
        _, number, length = struct.unpack_from("<HHL", data, pos)
        found[number] = data[pos + 8 : pos + 8 + length]
        pos += 8 + length
    return found


def _items(data: bytes) -> list[tuple[int, bytes]]:
    found, pos = [], 0
    while pos + 4 <= len(data):
        kind, _, length = struct.unpack_from(">BBH", data, pos)
        found.append((kind, data[pos + 4 : pos + 4 + length]))
        pos += 4 + length
    return found


def _proposed(body: bytes) -> list[tuple[int, tuple[str, str]]]:
    contexts = []
    for kind, value in _items(body[68:]):
        if kind == 0x20:
            parts: dict[int, list[str]] = {}
            for inner, text in _items(value[4:]):
                parts.setdefault(inner, []).append(text.decode())
            assert len(parts[0x40]) == 1, "one transfer syntax a context"
            contexts.append((value[0], (parts[0x30][0], parts[0x40][0])))
    return contexts


def _exactly(sock: socket.socket, size: int) -> bytes:
    data = bytearray()
    while len(data) < size:
        part = sock.recv(size - len(data))
        if not part:
            raise DieError
        data += part
    return bytes(data)


def _pdu(sock: socket.socket) -> tuple[int, bytes]:
    kind, length = struct.unpack(">BxL", _exactly(sock, 6))
    return kind, _exactly(sock, length)


def accept_only(*syntaxes: str) -> Callable[[str, str], int]:
    """Accept these transfer syntaxes, whatever the class."""
    return lambda sop_class, syntax: 0 if syntax in syntaxes else 4


def at(number: int, value: Any, default: Any = 0) -> Callable[[int], Any]:
    """`value` for the instance, or association, of this number."""
    return lambda n: value if n == number else default
