"""The connection of one association: bounded sends, whole messages in, and the moment the peer leaves."""

from __future__ import annotations

import random
import struct
from collections.abc import Iterable

from airflow_dicom_get.testing.misbehaving import wire
from airflow_dicom_get.testing.misbehaving.line import Line
from airflow_dicom_get.testing.misbehaving.wire import Answer, GoneError, Message

_IDLE_SECONDS = 600.0


class Link:
    """One accepted connection.

    Every method raises :class:`~airflow_dicom_get.testing.misbehaving.wire.GoneError` when the peer has
    left, the server closes the line, or a bound set by :meth:`bound` is reached.

    Parameters
    ----------
    line : Line
        Its bytes.
    number : int
        1 for the first connection of the server.
    """

    def __init__(self, line: Line, number: int) -> None:
        self.line = line
        self.number = number
        self.answers: list[Answer] = []
        self.scp_classes: frozenset[str] = frozenset()
        self.peer_max_pdu = 0
        self.bytes_sent = 0
        self.ill = False
        self._deadline: float | None = None
        self._last_byte: int | None = None
        self._fault_at: int | None = None
        self._fault = ""
        self._message_id = 0
        self._noise: random.Random | None = None

    # --- bounds ------------------------------------------------------------------------------

    def bound(self, seconds: float, size: int) -> None:
        """From now on send at most ``size`` bytes and end after ``seconds``."""
        self._deadline = self.line.now() + seconds
        self._last_byte = self.bytes_sent + size

    def fault_at(self, offset: int, fault: str) -> None:
        """After ``offset`` further bytes ``stall``, ``close`` or ``reset`` the connection."""
        self._fault_at, self._fault = self.bytes_sent + offset, fault

    def mutate(self, seed: str) -> None:
        """From now on change a few random bytes of what is sent, the same ones for the same seed."""
        self._noise = random.Random(seed)

    def _remaining(self) -> float:
        if self._deadline is None:
            return _IDLE_SECONDS
        left = self._deadline - self.line.now()
        if left <= 0:
            raise GoneError("the time bound is reached")
        return left

    # --- sending -----------------------------------------------------------------------------

    @property
    def fragment_size(self) -> int:
        """Largest payload of one PDV that the peer takes; even, as PS3.8 E.1 asks."""
        limit = self.peer_max_pdu or 131072
        return max(2, (min(limit, 131072) - 6) & ~1)

    def next_message_id(self) -> int:
        """A fresh message id for a request of ours."""
        self._message_id = self._message_id % 0xFFFF + 1
        return self._message_id

    def send(self, *parts: bytes | memoryview) -> None:
        """Send bytes in one write."""
        size = sum(map(len, parts))
        if self._fault_at is not None and self.bytes_sent + size >= self._fault_at:
            head = b"".join(parts)[: self._fault_at - self.bytes_sent]
            self._fault_at = None
            self._write(head)
            self._strike()
        if self._last_byte is not None and self.bytes_sent + size > self._last_byte:
            raise GoneError("the byte bound is reached")
        self._write(b"".join(parts) if len(parts) != 1 else parts[0])

    def _write(self, data: bytes | memoryview) -> None:
        if self._noise is not None:
            data = mutated(bytes(data), self._noise)
        try:
            self.line.send(data, self._remaining())
        except OSError as error:
            raise GoneError(f"send: {error}") from error
        self.bytes_sent += len(data)

    def _strike(self) -> None:
        if self._fault == "reset":
            self.reset()
        if self._fault == "stall":
            self.hold()
        raise GoneError("closed on purpose")

    def send_command(self, context: int, fields: dict[int, wire.Value]) -> None:
        """Send a command set in one PDV, or in as many as the peer's PDU size asks for."""
        self.send_raw_command(context, wire.command(fields))

    def send_raw_command(self, context: int, encoded: bytes) -> None:
        """Send an encoded command set."""
        for piece, last in wire.fragments((encoded,), self.fragment_size):
            self.send(wire.p_data(context, wire.COMMAND_BIT | (wire.LAST_BIT if last else 0), bytes(piece)))

    def send_data(self, context: int, pieces: Iterable[bytes]) -> None:
        """Send a data set, one PDV per PDU, each as large as the peer takes."""
        for piece, last in wire.fragments(pieces, self.fragment_size):
            self.send_fragment(context, piece, last)

    def send_fragment(self, context: int, piece: bytes | memoryview, last: bool) -> None:
        """Send one data fragment in a PDU of its own."""
        size = len(piece)
        self.send(struct.pack(">BBIIBB", wire.P_DATA, 0, size + 6, size + 2, context, wire.LAST_BIT * last), piece)

    def flood(self, chunk: bytes) -> None:
        """Send the same bytes until a bound is reached or the peer leaves."""
        while True:
            self.send(chunk)

    def drip(self, data: bytes, pause: float, step: int = 1) -> None:
        """Send ``step`` bytes at a time with a pause after each."""
        for at in range(0, len(data), step):
            self.send(data[at : at + step])
            self.wait(pause)

    # --- waiting and closing -----------------------------------------------------------------

    def wait(self, seconds: float) -> None:
        """Wait without reading; ends early, with ``GoneError``, when the peer leaves."""
        if self.line.left(min(seconds, self._remaining())):
            raise GoneError("the peer left")

    def hold(self) -> None:
        """Neither send nor read until the peer leaves or the time bound is reached."""
        self.wait(_IDLE_SECONDS)
        raise GoneError("held to the end")

    def reset(self) -> None:
        """End the connection by a TCP reset."""
        self.line.reset()
        raise GoneError("reset on purpose")

    # --- receiving ---------------------------------------------------------------------------

    def readable(self) -> bool:
        """Whether something waits to be read, without waiting for it."""
        return self.line.readable()

    def _exactly(self, size: int) -> bytes:
        data = bytearray()
        while len(data) < size:
            try:
                chunk = self.line.receive(min(size - len(data), 1 << 20), self._remaining())
            except OSError as error:
                raise GoneError(f"receive: {error}") from error
            if not chunk:
                raise GoneError("the peer closed the connection")
            data += chunk
        return bytes(data)

    def read_pdu(self) -> tuple[int, bytes]:
        """Read one PDU: its type and body."""
        kind, _, length = struct.unpack(">BBI", self._exactly(6))
        if length > 64 << 20:
            raise GoneError(f"a PDU of {length} bytes")
        return kind, self._exactly(length)

    def read(self) -> Message | None:
        """Read a whole DIMSE message; ``None`` stands for an A-RELEASE-RQ."""
        parts: dict[int, bytearray] = {wire.COMMAND_BIT: bytearray(), 0: bytearray()}
        fields: dict[int, bytes] | None = None
        while True:
            kind, body = self.read_pdu()
            if kind == wire.RELEASE_RQ:
                return None
            if kind != wire.P_DATA:
                raise GoneError("aborted by the peer" if kind == wire.ABORT else f"an unexpected PDU of type {kind}")
            at = 0
            while at + 6 <= len(body):
                length, context, flags = struct.unpack_from(">IBB", body, at)
                parts[flags & wire.COMMAND_BIT] += body[at + 6 : at + 4 + length]
                at += 4 + length
                if not flags & wire.LAST_BIT:
                    continue
                if flags & wire.COMMAND_BIT:
                    fields = wire.parse_command(bytes(parts[wire.COMMAND_BIT]))
                if fields is None:
                    raise GoneError("a data set without a command")
                message = Message(context, fields, bytes(parts[0]))
                if not flags & wire.COMMAND_BIT or message.number(wire.DATA_SET_TYPE) == wire.NO_DATA_SET:
                    return message


def mutated(data: bytes, noise: random.Random) -> bytes:
    """One write in twenty-five is changed: near its start, where the headers are, or anywhere."""
    if not data or noise.random() > 0.04:
        return data
    at = noise.randrange(min(len(data), noise.choice((12, 200, 1 << 20))))
    some = noise.randrange(1, 9)
    changes = (
        data[:at] + bytes((data[at] ^ 1 << noise.randrange(8),)) + data[at + 1 :],
        data[:at] + noise.choice((b"\0", b"\xff")) * some + data[at + some :],
        data[:at] + data[at + some :],
        data[:at] + noise.randbytes(some) + data[at:],
        data[: at + some] + data[at:],
        data[:at],
    )
    return noise.choice(changes)
