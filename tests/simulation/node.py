"""The model node: instances are stored at it, and it lists what it holds, or does not."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from airflow_dicom_get.testing.misbehaving import archive, wire
from airflow_dicom_get.testing.misbehaving.archive import Instance
from airflow_dicom_get.testing.misbehaving.line import Line
from airflow_dicom_get.testing.misbehaving.wire import Answer, AssociateRequest, GoneError, Message
from tests.simulation.marks import mark
from tests.simulation.pacs import LEVEL, SERIES, SOP, STUDY, BreakingLink, header_of

_ANSWERS = {"A700": 0xA700, "C000": 0xC000, "0122": 0x0122, "B007": 0xB007}
NODE_FAULTS = tuple(f"answer {status}" for status in _ANSWERS)
"""What a C-STORE may be answered with; a warning says that it was stored."""
DOWN = (0, "down")
"""Nobody listens there in the whole run."""


class Held(NamedTuple):
    """An instance that it holds."""

    study: str
    series: str
    data: bytes


class ModelNode:
    """A node.

    Attributes
    ----------
    find : {"yes", "no", "fails", "short"}
        Whether it offers C-FIND, and answers it; ``short``: with an instance of each series left out, though counted.
    again : {"replaces", "keeps", "refuses"}
        What becomes of a second object of one SOP Instance UID: it is answered with success, or refused as a duplicate.
    refuses : str
        SOP class for which it accepts no presentation context.
    held : dict
        By SOP Instance UID.
    down : bool
        Whether nobody listens.
    """

    def __init__(self) -> None:
        self.find, self.again, self.refuses = "yes", "replaces", ""
        self.held: dict[str, Held] = {}
        self.down = False
        self._breaks: dict[int, str] = {}
        self._answers: dict[int, int] = {}
        self._sends = self._stores = self._number = 0

    def begin(self, met: Iterable[tuple[int, str]]) -> None:
        """A run begins, which meets this: the number of something that it sends, or of a C-STORE, and what comes."""
        faults = tuple(met)
        self.down = DOWN in faults
        self._answers = {n: _ANSWERS[what.removeprefix("answer ")] for n, what in faults if what in NODE_FAULTS}
        self._breaks = {n: what for n, what in faults if what not in NODE_FAULTS and (n, what) != DOWN}
        self._sends = self._stores = 0

    def accept(self, line: Line) -> Callable[[], object]:
        """See :class:`~tests.simulation.line.Network`."""
        if self.down:
            mark("node: down")
            raise OSError(errno.ECONNREFUSED, os.strerror(errno.ECONNREFUSED))
        self._number += 1
        link = BreakingLink(line, self._number, self._send)

        def serve() -> None:
            try:
                self._converse(link)
            except GoneError:
                pass

        return serve

    def _send(self) -> str | None:
        self._sends += 1
        how = self._breaks.get(self._sends)
        if how is not None:
            mark("node: breaks off")
        return how

    def _converse(self, link: BreakingLink) -> None:
        kind, body = link.read_pdu()
        if kind != wire.ASSOCIATE_RQ:
            return
        request = wire.parse_associate(body)
        link.peer_max_pdu = request.max_pdu
        link.answers = [*self._negotiate(request)]
        link.send(wire.associate_accept(request, link.answers, request.roles, 131072, b"NODE"))
        syntaxes = {answer.id: answer.syntaxes[0] for answer in link.answers}
        while True:
            message = link.read()
            if message is None:
                link.send(wire.pdu(wire.RELEASE_RP, bytes(4)))
                return
            field, syntax = message.number(wire.FIELD), syntaxes[message.context]
            if field == wire.C_STORE:
                _respond(link, message, self._store(message, syntax))
            elif field == wire.C_FIND:
                self._find(link, message, syntax)
            elif field != wire.C_CANCEL:
                _respond(link, message, 0)

    def _negotiate(self, request: AssociateRequest) -> Iterable[Answer]:
        for proposal in request.proposals:
            refused = proposal.abstract == self.refuses or (proposal.abstract in wire.FIND and self.find == "no")
            yield Answer(proposal.id, 3 if refused else 0, proposal.abstract, proposal.syntaxes[:1])

    def _store(self, message: Message, syntax: str) -> int:
        self._stores += 1
        status = self._answers.get(self._stores, 0)
        if status:
            mark(f"node: answered {status:04X}")
        if status and status & 0xF000 != 0xB000:
            return status
        header = header_of(message.data, syntax)
        sop = header.get(SOP, "")
        if sop in self.held:
            mark("node: stored again")
            if self.again == "refuses":
                mark("node: answered 0111")
                return 0x0111
        if sop not in self.held or self.again == "replaces":
            self.held[sop] = Held(header.get(STUDY, ""), header.get(SERIES, ""), message.data)
        return status

    def _find(self, link: BreakingLink, message: Message, syntax: str) -> None:
        if self.find == "fails":
            mark("node: C-FIND fails")
            _respond(link, message, 0xC001)
            return
        query = archive.parse_identifier(message.data, syntax)
        held: Sequence[Instance] = [Instance(x.study, x.series, sop, 1, 1, 100) for sop, x in self.held.items()]
        rows = [*archive.find(query.get(LEVEL, ""), query, held, archive.attributes)]
        if self.find == "short" and query.get(LEVEL) == "IMAGE" and rows:
            mark("node: lists too little")
            del rows[self._stores % len(rows)]
        for row in rows:
            _respond(link, message, 0xFF00, archive.encode_identifier(row, syntax))
        _respond(link, message, 0)


def _respond(link: BreakingLink, message: Message, status: int, data: bytes = b"") -> None:
    fields: dict[int, wire.Value] = {
        wire.CLASS: message.elements.get(wire.CLASS, b""),
        wire.FIELD: message.number(wire.FIELD) | wire.RESPONSE,
        wire.RESPONDED_ID: message.number(wire.MESSAGE_ID),
        wire.DATA_SET_TYPE: wire.WITH_DATA_SET if data else wire.NO_DATA_SET,
        wire.STATUS: status,
    }
    if wire.INSTANCE in message.elements:
        fields[wire.INSTANCE] = message.elements[wire.INSTANCE]
    link.send_command(message.context, fields)
    if data:
        link.send_data(message.context, (data,))
