"""C-STORE (PS3.4 B) as SCU: the command, then the data set as it arrives, then the response.

The data set is not held: full P-DATA-TF PDUs go out as soon as more follows, and the last one waits
in the one buffer until the caller says that it is the last.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from airflow_dicom_get.dicom import command as c
from airflow_dicom_get.dicom.pdata import P_DATA_HEADER_LENGTH, frame_message, put_p_data_header
from airflow_dicom_get.errors import PeerProtocolError
from airflow_dicom_get.net.association import Association
from airflow_dicom_get.net.messages import read_response

MAX_PDU_LENGTH = 131072
"""The largest P-DATA-TF that is sent, whatever the peer allows: larger ones measured slower."""
_BUFFER = 3 << 18
"""Bytes of a data set that are kept until they are digested."""
_COMMAND_ROOM = 4096
_EAGER = 1 << 16
"""Bytes that are sent in one write, where the peer's PDUs are smaller."""


class StoreResponse(NamedTuple):
    """A C-STORE-RSP. The comment is the peer's text: escape it, and show it at DEBUG only."""

    status: int
    comment: str


class StoreChannel:
    """Stores instances over one association, one after the other.

    Bytes are digested only when they have gone: the end of a data set, or the whole of a small one,
    while the peer is busy with it. Memory: one buffer of 1.1 MiB at most.

    Parameters
    ----------
    association : Association
        With accepted contexts for storage.
    max_pdu_length : int
        The largest PDU to send; the peer's own maximum holds besides.
    """

    def __init__(self, association: Association, max_pdu_length: int = MAX_PDU_LENGTH) -> None:
        peer = association.accepted.max_pdu_length or max_pdu_length
        room = min(peer, max_pdu_length) - 6  # a PDV's own header counts into the length of its PDU
        self._room = max(room - room % 2, 2)  # fragments stay even (PS3.8 E.1)
        self._peer_length = self._room + 6
        self._association = association
        self._buffer = memoryview(bytearray(_COMMAND_ROOM + _BUFFER + _EAGER + 2 * (P_DATA_HEADER_LENGTH + self._room)))
        self._context_id = 0
        self._message_id = 0
        self._sent = 0
        self._start = 0
        """Where the current PDU begins; the PDUs before it are whole."""
        self._end = 0
        self._digest: Any = None
        self._undigested: list[tuple[int, int]] = []

    def begin(self, context_id: int, sop_class: str, sop_instance: str, digest: Any = None) -> None:
        """Begin an instance. Nothing is sent before its first bytes are there.

        ``digest``, if given, is a hash object that is fed with the data set.
        """
        self._context_id = context_id
        self._message_id = self._association.next_message_id()
        encoded = c.encode(
            {
                c.AFFECTED_SOP_CLASS: sop_class,
                c.COMMAND_FIELD: c.C_STORE_RQ,
                c.MESSAGE_ID: self._message_id,
                c.PRIORITY: 0,
                c.DATASET_TYPE: c.DATASET_FOLLOWS,
                c.AFFECTED_SOP_INSTANCE: sop_instance,
            }
        )
        if self._association.told is not None:
            self._association.told.sent(context_id, encoded)
        command = frame_message(context_id, encoded, None, self._peer_length)
        self._sent, self._start = 0, len(command)
        self._buffer[: self._start] = command
        self._end = self._start + P_DATA_HEADER_LENGTH
        self._digest = digest
        self._undigested.clear()

    def write(self, view: memoryview, limit: float) -> None:
        """Take the next bytes of the data set; ``limit`` is the ``time.monotonic()`` value by which they must go.

        Raises
        ------
        AssociationAborted, DeadlineExceeded (phase ``stall``), Cancelled
        """
        pos, size = 0, len(view)
        buffer = self._buffer
        while pos < size:
            full = self._start + P_DATA_HEADER_LENGTH + self._room
            if self._end == full:
                self._seal(last=False)
                if self._start - self._sent >= _EAGER:
                    self._flush(limit, "stall")
                    if self._start >= _BUFFER:
                        self.digest_sent()
                        self._sent = self._start = 0
                self._end = self._start + P_DATA_HEADER_LENGTH
                full = self._end + self._room
            take = min(full - self._end, size - pos)
            buffer[self._end : self._end + take] = view[pos : pos + take]
            self._end += take
            pos += take

    def end(self) -> None:
        """The data set is whole; what is left of it, its last fragment at the least, has not gone yet."""
        self._seal(last=True)

    def finish(self, limit: float) -> None:
        """Send what is left of the data set after its :meth:`end`.

        Raises
        ------
        AssociationAborted, DeadlineExceeded (phase ``sub_operation``), Cancelled
        """
        self._flush(limit, "sub_operation")

    def _seal(self, *, last: bool) -> None:
        size = self._end - self._start - P_DATA_HEADER_LENGTH
        put_p_data_header(self._buffer, self._start, size, self._context_id, last=last)
        if self._association.told is not None:
            self._association.told.data(size)
        if self._digest is not None:
            self._undigested.append((self._start + P_DATA_HEADER_LENGTH, self._end))
        self._start = self._end

    def _flush(self, limit: float, phase: str) -> None:
        self._association.send(self._buffer[self._sent : self._start], limit, phase)
        self._sent = self._start

    def digest_sent(self) -> None:
        """Feed the digest with what is framed since the last time; after :meth:`end`, with all the rest."""
        for start, end in self._undigested:
            self._digest.update(self._buffer[start:end])
        self._undigested.clear()

    def response(self, limit: float, phase: str = "sub_operation") -> StoreResponse:
        """Wait for the C-STORE-RSP; in the phase ``idle`` for one that has begun to arrive, until a cancel.

        Raises
        ------
        AssociationAborted, DeadlineExceeded (in this phase), PeerProtocolError, Cancelled
        """
        association = self._association
        answer, _, _ = read_response(association, self._context_id, self._message_id, c.C_STORE_RSP, limit, phase)
        if answer.status is None:
            association.abort(2)
            raise PeerProtocolError(
                f"{association.node} sent a C-STORE-RSP without status.", node=str(association.node)
            )
        return StoreResponse(answer.status, answer.text(c.ERROR_COMMENT))

    def wait_for_response(self, limit: float) -> bool:
        """Whether the response begins to arrive before ``limit``. Raises :class:`Cancelled`."""
        return self._association.wait_for_data(limit)
