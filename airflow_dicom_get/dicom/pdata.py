"""PDU framing (PS3.8 9.3) without I/O: bytes in, fragments out; messages in, PDUs out.

The deframer keeps no copy of P-DATA payload: it yields views into the buffer it was fed, so the
caller uses them up before it fills that buffer again.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

from airflow_dicom_get.errors import PeerProtocolError

A_ASSOCIATE_RQ, A_ASSOCIATE_AC, A_ASSOCIATE_RJ, P_DATA_TF, A_RELEASE_RQ, A_RELEASE_RP, A_ABORT = range(1, 8)

MAX_ASSOCIATE_LENGTH = 1 << 20
"""Longest A-ASSOCIATE PDU that is read, in bytes."""

_LIMITS = {
    A_ASSOCIATE_RQ: MAX_ASSOCIATE_LENGTH,
    A_ASSOCIATE_AC: MAX_ASSOCIATE_LENGTH,
    A_ASSOCIATE_RJ: 4,
    A_RELEASE_RQ: 4,
    A_RELEASE_RP: 4,
    A_ABORT: 4,
}
_PDU_HEADER = struct.Struct(">BxL")
_PDV_HEADER = struct.Struct(">LBB")
_BOTH_HEADERS = struct.Struct(">BBLLBB")
_OVERHEAD = 6  # a PDV item's own header, which counts into the PDU length
P_DATA_HEADER_LENGTH = 12
"""Bytes before the value of a P-DATA-TF PDU with one PDV."""


class Fragment(NamedTuple):
    """A piece of one PDV. ``last`` is true with the last byte of the last fragment of its message part."""

    context_id: int
    is_command: bool
    last: bool
    data: memoryview


class Pdu(NamedTuple):
    """Any PDU but P-DATA-TF, whole; ``data`` is its value after the 6-byte header."""

    pdu_type: int
    data: bytes


class Deframer:
    """Cut a byte stream into :class:`Fragment` and :class:`Pdu`.

    Parameters
    ----------
    max_pdu_length : int
        The maximum length that we announced (bytes, PS3.8 D.1); a longer P-DATA-TF is a violation.
    """

    def __init__(self, max_pdu_length: int) -> None:
        self.max_pdu_length = max_pdu_length
        self._header = bytearray()  # of the current PDU or PDV, while it is incomplete
        self._pdu_left = 0  # bytes of the current P-DATA-TF still to come
        self._pdv_left = 0  # bytes of the current PDV value still to come
        self._context_id = 0
        self._control = 0
        self._other_type = 0  # type of the current PDU that is not P-DATA
        self._other = bytearray()
        self._other_left = 0
        self._other_any = False

    @property
    def mid_pdu(self) -> bool:
        """Whether the stream stands inside a PDU."""
        return bool(self._header or self._pdu_left or self._pdv_left or self._other_any)

    def feed(self, view: memoryview) -> list[Fragment | Pdu]:
        """Consume ``view`` whole and return what it completes.

        Raises
        ------
        PeerProtocolError
            Unknown PDU type, a PDU longer than allowed or empty, or a PDV that does not fit its PDU.
        """
        out: list[Fragment | Pdu] = []
        pos, end = 0, len(view)
        header = self._header
        while pos < end:
            if self._pdv_left:
                take = min(self._pdv_left, end - pos)
                self._pdv_left -= take
                control = self._control
                out.append(
                    Fragment(
                        self._context_id,
                        bool(control & 1),
                        not self._pdv_left and bool(control & 2),
                        view[pos : pos + take],
                    )
                )
                pos += take
            elif self._other_any:
                take = min(self._other_left, end - pos)
                self._other += view[pos : pos + take]
                self._other_left -= take
                pos += take
                if not self._other_left:
                    out.append(self._finish_other())
            elif self._pdu_left:  # a PDV header is due
                if not header and end - pos >= _OVERHEAD:
                    length, self._context_id, self._control = _PDV_HEADER.unpack_from(view, pos)
                    pos += _OVERHEAD
                else:
                    take = min(_OVERHEAD - len(header), end - pos)
                    header += view[pos : pos + take]
                    pos += take
                    if len(header) < _OVERHEAD:
                        break
                    length, self._context_id, self._control = _PDV_HEADER.unpack(header)
                    header.clear()
                if length < 2 or length + 4 > self._pdu_left:
                    raise PeerProtocolError(
                        f"The peer sent a PDV of {length} bytes; its P-DATA-TF PDU had {self._pdu_left - 4} left."
                    )
                self._pdu_left -= length + 4
                self._pdv_left = length - 2
                if not self._pdv_left:
                    control = self._control
                    out.append(Fragment(self._context_id, bool(control & 1), bool(control & 2), view[pos:pos]))
            else:  # a PDU header is due
                if not header and end - pos >= 6:
                    pdu_type, length = _PDU_HEADER.unpack_from(view, pos)
                    pos += 6
                    if pdu_type == P_DATA_TF and _OVERHEAD < length <= end - pos and length <= self.max_pdu_length:
                        # Nearly every PDU holds one PDV. One that is here whole needs no state of its own.
                        size, context_id, control = _PDV_HEADER.unpack_from(view, pos)
                        if size == length - 4:
                            fragment = view[pos + _OVERHEAD : pos + length]
                            out.append(Fragment(context_id, bool(control & 1), bool(control & 2), fragment))
                            pos += length
                            continue
                else:
                    take = min(6 - len(header), end - pos)
                    header += view[pos : pos + take]
                    pos += take
                    if len(header) < 6:
                        break
                    pdu_type, length = _PDU_HEADER.unpack(header)
                    header.clear()
                other = self._start_pdu(pdu_type, length)
                if other is not None:
                    out.append(other)
        return out

    def _start_pdu(self, pdu_type: int, length: int) -> Pdu | None:
        if pdu_type == P_DATA_TF:
            if length > self.max_pdu_length:
                raise PeerProtocolError(
                    f"The peer sent a P-DATA-TF PDU of {length} bytes; at most {self.max_pdu_length} were announced."
                )
            if length < _OVERHEAD:
                raise PeerProtocolError(f"The peer sent a P-DATA-TF PDU of {length} bytes, which holds no PDV.")
            self._pdu_left = length
            return None
        limit = _LIMITS.get(pdu_type)
        if limit is None:
            raise PeerProtocolError(f"The peer sent a PDU of unknown type {pdu_type:02X}H; it may not be a DICOM node.")
        if length > limit:
            raise PeerProtocolError(
                f"The peer sent a PDU of type {pdu_type:02X}H with {length} bytes; {limit} are allowed."
            )
        self._other_type, self._other_left, self._other_any = pdu_type, length, True
        self._other = bytearray()
        return None if length else self._finish_other()

    def _finish_other(self) -> Pdu:
        self._other_any = False
        return Pdu(self._other_type, bytes(self._other))


def frame_message(context_id: int, command: bytes, dataset: bytes | None, peer_max_length: int) -> bytes:
    """The P-DATA-TF PDUs of one DIMSE message, to be sent in one write.

    Parameters
    ----------
    context_id : int
        Presentation context id, odd, 1 to 255.
    command : bytes
        Encoded command set.
    dataset : bytes or None
        Encoded data set, if the command announces one.
    peer_max_length : int
        Maximum length of a P-DATA-TF that the peer announced; 0 means no limit (PS3.8 D.1.1).
    """
    room = (peer_max_length or 0x40000) - _OVERHEAD
    room = max(room - room % 2, 2)  # fragments stay even (PS3.8 E.1), whatever the peer announced
    out = bytearray()
    for data, command_bit in ((command, 1), (dataset, 0)):
        if data is None:
            continue
        for pos in range(0, len(data) or 1, room):
            part = data[pos : pos + room]
            control = command_bit | (2 if pos + room >= len(data) else 0)
            out += _BOTH_HEADERS.pack(P_DATA_TF, 0, len(part) + _OVERHEAD, len(part) + 2, context_id, control)
            out += part
    return bytes(out)


def put_p_data_header(buffer: memoryview, pos: int, size: int, context_id: int, *, last: bool) -> None:
    """Write the header of a P-DATA-TF PDU with one fragment of a data set, ``size`` bytes, that follows it."""
    _BOTH_HEADERS.pack_into(buffer, pos, P_DATA_TF, 0, size + _OVERHEAD, size + 2, context_id, 2 if last else 0)


RELEASE_RQ = struct.pack(">BBLL", A_RELEASE_RQ, 0, 4, 0)
RELEASE_RP = struct.pack(">BBLL", A_RELEASE_RP, 0, 4, 0)


def abort_pdu(source: int = 0, reason: int = 0) -> bytes:
    """A-ABORT (PS3.8 9.3.8): source 0 is the service user, 2 the provider."""
    return struct.pack(">BBLBBBB", A_ABORT, 0, 4, 0, 0, source, reason)
