"""Command sets (PS3.7 6.3.1, Annex E): always implicit VR little endian, group 0000."""

from __future__ import annotations

import struct
from collections.abc import Mapping

from airflow_dicom_get.errors import PeerProtocolError

MAX_COMMAND_LENGTH = 1 << 20
"""Longest command set that is read, in bytes: one source lists failed UIDs there."""

C_STORE_RQ, C_STORE_RSP = 0x0001, 0x8001
C_GET_RQ, C_GET_RSP = 0x0010, 0x8010
C_FIND_RQ, C_FIND_RSP = 0x0020, 0x8020
C_ECHO_RQ, C_ECHO_RSP = 0x0030, 0x8030
C_CANCEL_RQ = 0x0FFF
NO_DATASET = 0x0101
DATASET_FOLLOWS = 0x0001

AFFECTED_SOP_CLASS, COMMAND_FIELD, MESSAGE_ID, RESPONDED_MESSAGE_ID = 0x0002, 0x0100, 0x0110, 0x0120
PRIORITY, DATASET_TYPE, STATUS, ERROR_COMMENT = 0x0700, 0x0800, 0x0900, 0x0902
AFFECTED_SOP_INSTANCE = 0x1000
REMAINING, COMPLETED, FAILED, WARNING = 0x1020, 0x1021, 0x1022, 0x1023

_HEADER = struct.Struct("<HHL")
_US = struct.Struct("<H")
_STORE_RSP_TAIL = struct.Struct("<HHLH HHLH HHLH HHLH")


def encode(elements: Mapping[int, int | str]) -> bytes:
    """Encode a command set from element number to value: int becomes US, str becomes UI."""
    body = bytearray()
    for element in sorted(elements):
        value = elements[element]
        if isinstance(value, int):
            raw = _US.pack(value)
        else:
            raw = value.encode("ascii")
            raw += b"\0" * (len(raw) % 2)
        body += _HEADER.pack(0, element, len(raw)) + raw
    return _HEADER.pack(0, 0, 4) + struct.pack("<L", len(body)) + bytes(body)


def c_store_rsp(sop_class: bytes, sop_instance: bytes, message_id: int, status: int) -> bytes:
    """C-STORE-RSP (PS3.7 9.3.1.2) that echoes class and instance as received."""
    sop_class += b"\0" * (len(sop_class) % 2)
    sop_instance += b"\0" * (len(sop_instance) % 2)
    head = _HEADER.pack(0, AFFECTED_SOP_CLASS, len(sop_class)) + sop_class
    middle = _STORE_RSP_TAIL.pack(
        0, COMMAND_FIELD, 2, C_STORE_RSP,
        0, RESPONDED_MESSAGE_ID, 2, message_id,
        0, DATASET_TYPE, 2, NO_DATASET,
        0, STATUS, 2, status,
    )  # fmt: skip
    tail = _HEADER.pack(0, AFFECTED_SOP_INSTANCE, len(sop_instance)) + sop_instance
    body = head + middle + tail
    return _HEADER.pack(0, 0, 4) + struct.pack("<L", len(body)) + body


class Command:
    """A received command set. Unknown elements are kept and ignored; the group length is not trusted."""

    __slots__ = ("_raw", "field", "has_dataset", "message_id", "responded_id", "status", "stray")

    def __init__(self, data: bytes | bytearray | memoryview) -> None:
        """Parse.

        Raises
        ------
        PeerProtocolError
            An element runs past the end, or the command field or data set type is missing.
        """
        raw: dict[int, bytes] = {}
        self.stray: dict[int, bytes] = {}
        """Elements outside group 0000 by tag: one source puts (0008,0058) into the command set."""
        data = bytes(data)
        pos, end = 0, len(data)
        unpack = _HEADER.unpack_from
        while pos < end:
            if end - pos < 8:
                raise PeerProtocolError("The peer sent a command set that ends inside an element.")
            group, element, length = unpack(data, pos)
            pos += 8 + length
            if pos > end:
                raise PeerProtocolError(
                    f"The peer sent a command set whose element ({group:04X},{element:04X}) runs past its end."
                )
            value = data[pos - length : pos]
            if group == 0:
                raw.setdefault(element, value)
            else:
                self.stray.setdefault(group << 16 | element, value)
        self._raw = raw
        field, kind = self.us(COMMAND_FIELD), self.us(DATASET_TYPE)
        if field is None or kind is None:
            raise PeerProtocolError("The peer sent a command set without command field or data set type.")
        self.field = field
        self.has_dataset = kind != NO_DATASET
        self.message_id = self.us(MESSAGE_ID)
        self.responded_id = self.us(RESPONDED_MESSAGE_ID)
        self.status = self.us(STATUS)

    def us(self, element: int) -> int | None:
        """An unsigned short, or None where it is absent or has another length."""
        value = self._raw.get(element)
        return int.from_bytes(value, "little") if value is not None and len(value) == 2 else None

    def raw(self, element: int) -> bytes:
        """The value as received, with its padding; empty if absent."""
        return self._raw.get(element, b"")

    def text(self, element: int) -> str:
        """A text value without padding; not fit for a log before :func:`errors.peer_text`."""
        return self.raw(element).rstrip(b"\0 ").decode("ascii", "replace")


class Commands:
    """Parses what one peer sends. The responses of a C-FIND are the same for each row, and parsed once."""

    __slots__ = ("_command", "_data")

    def __init__(self) -> None:
        self._data = b""
        self._command: Command | None = None

    def parse(self, data: bytes | bytearray | memoryview) -> Command:
        """See :class:`Command`; what it gives may have been given before."""
        if self._command is None or data != self._data:
            self._command = None
            self._data = bytes(data)
            self._command = Command(self._data)
        return self._command
