"""PDUs, PDVs and command sets (PS3.7, PS3.8), written and read with struct alone.

Nothing here is shared with the engine on purpose: a peer made of the engine's own codec could not
show the mistakes of that codec.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

IMPLICIT_LE = "1.2.840.10008.1.2"
EXPLICIT_LE = "1.2.840.10008.1.2.1"
DEFLATED_LE = "1.2.840.10008.1.2.1.99"
EXPLICIT_BE = "1.2.840.10008.1.2.2"
JPEG_2000 = "1.2.840.10008.1.2.4.91"

VERIFICATION = "1.2.840.10008.1.1"
FIND = frozenset({"1.2.840.10008.5.1.4.1.2.1.1", "1.2.840.10008.5.1.4.1.2.2.1"})
GET = frozenset({"1.2.840.10008.5.1.4.1.2.1.3", "1.2.840.10008.5.1.4.1.2.2.3"})

ASSOCIATE_RQ, ASSOCIATE_AC, ASSOCIATE_RJ, P_DATA, RELEASE_RQ, RELEASE_RP, ABORT = range(1, 8)

# Elements of the command group by element number (PS3.7 E.1).
CLASS, FIELD, MESSAGE_ID, RESPONDED_ID, DATA_SET_TYPE, STATUS = 0x0002, 0x0100, 0x0110, 0x0120, 0x0800, 0x0900
PRIORITY, ERROR_COMMENT, INSTANCE = 0x0700, 0x0902, 0x1000
REMAINING, COMPLETED, FAILED, WARNING = 0x1020, 0x1021, 0x1022, 0x1023

C_STORE, C_GET, C_FIND, C_ECHO, N_CREATE, C_CANCEL = 0x0001, 0x0010, 0x0020, 0x0030, 0x0140, 0x0FFF
RESPONSE = 0x8000
NO_DATA_SET, WITH_DATA_SET = 0x0101, 0x0001

COMMAND_BIT, LAST_BIT = 1, 2

Value = int | str | bytes


class GoneError(ConnectionError):
    """The association is over: the peer left, a bound was reached, or the server closes."""


class Proposal(NamedTuple):
    """A presentation context as proposed."""

    id: int
    abstract: str
    syntaxes: tuple[str, ...]


class Answer(NamedTuple):
    """A presentation context as answered; ``syntaxes`` holds one, but for a peer that lies."""

    id: int
    result: int
    abstract: str
    syntaxes: tuple[str, ...]


class Role(NamedTuple):
    """An SCP/SCU role selection item (PS3.7 D.3.3.4)."""

    abstract: str
    scu: int
    scp: int


class AssociateRequest(NamedTuple):
    """What an A-ASSOCIATE-RQ says, as far as an SCP needs it."""

    called: str
    header: bytes
    proposals: tuple[Proposal, ...]
    roles: tuple[Role, ...]
    max_pdu: int


@dataclass(frozen=True, slots=True)
class Message:
    """A DIMSE message: its context, command elements by element number, and data set."""

    context: int
    elements: Mapping[int, bytes]
    data: bytes

    def number(self, element: int) -> int:
        """Value of a US element, 0 if it is absent."""
        return int.from_bytes(self.elements.get(element, b"")[:2], "little")

    def text(self, element: int) -> str:
        """Value of a text element without padding, empty if it is absent."""
        return self.elements.get(element, b"").decode("ascii", "replace").rstrip("\0 ")


def pdu(kind: int, body: bytes) -> bytes:
    """A whole PDU."""
    return struct.pack(">BBI", kind, 0, len(body)) + body


def pdv(context: int, flags: int, payload: bytes) -> bytes:
    """One presentation data value item."""
    return struct.pack(">IBB", len(payload) + 2, context, flags) + payload


def p_data(context: int, flags: int, payload: bytes) -> bytes:
    """A P-DATA-TF PDU of one item."""
    return pdu(P_DATA, pdv(context, flags, payload))


def reject(result: int, source: int, reason: int) -> bytes:
    """An A-ASSOCIATE-RJ PDU."""
    return pdu(ASSOCIATE_RJ, bytes((0, result, source, reason)))


def abort(source: int = 2, reason: int = 0) -> bytes:
    """An A-ABORT PDU."""
    return pdu(ABORT, bytes((0, 0, source, reason)))


def _item(kind: int, body: bytes) -> bytes:
    return struct.pack(">BBH", kind, 0, len(body)) + body


def associate_accept(
    request: AssociateRequest, answers: Iterable[Answer], roles: Iterable[Role], max_pdu: int, version: bytes
) -> bytes:
    """An A-ASSOCIATE-AC PDU that answers ``request``."""
    contexts = b"".join(
        _item(0x21, bytes((a.id, 0, a.result, 0)) + b"".join(_item(0x40, s.encode()) for s in a.syntaxes))
        for a in answers
    )
    user = (
        _item(0x51, struct.pack(">I", max_pdu))
        + _item(0x52, b"2.25.13117201700013117201700013117201700")
        + b"".join(
            _item(0x54, struct.pack(">H", len(r.abstract)) + r.abstract.encode() + bytes((r.scu, r.scp))) for r in roles
        )
        + _item(0x55, version)
    )
    return pdu(ASSOCIATE_AC, request.header + _item(0x10, b"1.2.840.10008.3.1.1.1") + contexts + _item(0x50, user))


def _items(body: bytes) -> Iterator[tuple[int, bytes]]:
    at = 0
    while at + 4 <= len(body):
        kind, length = body[at], int.from_bytes(body[at + 2 : at + 4], "big")
        yield kind, body[at + 4 : at + 4 + length]
        at += 4 + length


def _uid(value: bytes) -> str:
    return value.decode("ascii", "replace").rstrip("\0 ")


def parse_associate(body: bytes) -> AssociateRequest:
    """Read the body of an A-ASSOCIATE-RQ."""
    proposals: list[Proposal] = []
    roles: list[Role] = []
    max_pdu = 0
    for kind, value in _items(body[68:]):
        if kind == 0x20:
            subs = list(_items(value[4:]))
            abstract = next((_uid(v) for k, v in subs if k == 0x30), "")
            proposals.append(Proposal(value[0], abstract, tuple(_uid(v) for k, v in subs if k == 0x40)))
        elif kind == 0x50:
            for sub, content in _items(value):
                if sub == 0x51:
                    max_pdu = int.from_bytes(content, "big")
                elif sub == 0x54:
                    roles.append(Role(_uid(content[2:-2]), content[-2], content[-1]))
    called = body[4:20].decode("ascii", "replace").strip()
    return AssociateRequest(called, body[:68], tuple(proposals), tuple(roles), max_pdu)


def elements(fields: Mapping[int, Value]) -> bytes:
    """Encode elements of the command group, without the group length."""
    out = []
    for number, value in sorted(fields.items()):
        if isinstance(value, int):
            raw = struct.pack("<H", value & 0xFFFF)
        else:
            raw = value.encode("latin-1") if isinstance(value, str) else value
            raw += b"\0" * (len(raw) & 1)
        out.append(struct.pack("<HHI", 0, number, len(raw)) + raw)
    return b"".join(out)


def command(fields: Mapping[int, Value]) -> bytes:
    """Encode a command set (always implicit VR little endian) with its group length."""
    body = elements(fields)
    return struct.pack("<HHII", 0, 0, 4, len(body)) + body


def parse_command(data: bytes) -> dict[int, bytes]:
    """Read a command set into element number and raw value."""
    found: dict[int, bytes] = {}
    at = 0
    while at + 8 <= len(data):
        _, number, length = struct.unpack_from("<HHI", data, at)
        found[number] = data[at + 8 : at + 8 + length]
        at += 8 + length
    return found


def fragments(pieces: Iterable[bytes], size: int) -> Iterator[tuple[bytes | memoryview, bool]]:
    """Cut pieces into fragments of ``size`` bytes, each with a flag that marks the last one.

    Large pieces are handed on as views, so that a big object is not held or copied as a whole.
    """
    held: bytes | memoryview = b""  # kept back until it is known whether it is the last
    for piece in pieces:
        view = memoryview(piece)
        if 0 < len(held) < size:
            room = size - len(held)
            held = bytes(held) + bytes(view[:room])
            view = view[room:]
        while view:
            if held:
                yield held, False
            held, view = view[:size], view[size:]
    yield held, True


def uid_list(uids: Sequence[str]) -> bytes:
    """Value of a UI element of several UIDs."""
    raw = "\\".join(uids).encode("latin-1")
    return raw + b"\0" * (len(raw) & 1)
