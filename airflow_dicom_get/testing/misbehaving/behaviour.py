"""The well-behaved SCP, as hooks that a mode overrides, and the table of modes."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from airflow_dicom_get.testing.misbehaving import archive, wire
from airflow_dicom_get.testing.misbehaving.archive import Instance, RefusedError, Row
from airflow_dicom_get.testing.misbehaving.link import Link
from airflow_dicom_get.testing.misbehaving.wire import Answer, AssociateRequest, GoneError, Message, Role

Stage = Literal["associate", "find", "get", "release"]
ASSOCIATE: Stage = "associate"
FIND: Stage = "find"
GET: Stage = "get"
RELEASE: Stage = "release"

_PENDING = 0xFF00
_CLASS_UNKNOWN, _SYNTAX_UNKNOWN = 3, 4


@dataclass
class Site:
    """What all associations of one server share; counted under ``lock``."""

    instances: list[Instance]
    param: str | float | None = None
    ae_title: str | None = None
    list_syntaxes: bool = False
    victim: str | None = None
    lock: threading.Lock = field(default_factory=threading.Lock)
    sent: Counter[str] = field(default_factory=Counter)
    answers: list[tuple[int, int]] = field(default_factory=list)
    finals: list[int] = field(default_factory=list)
    gets: int = 0
    ill_associations: int = 0


class Retrieval:
    """One running C-GET: what is to be sent and how it goes."""

    def __init__(self, message: Message, instances: Sequence[Instance]) -> None:
        self.message = message
        self.instances = instances
        self.index = 0
        self.completed = 0
        self.failed: list[str] = []
        self.warning = 0
        self.cancelled = False

    @property
    def remaining(self) -> int:
        """Sub-operations still to do."""
        return len(self.instances) - self.completed - len(self.failed) - self.warning

    def counters(self) -> dict[int, wire.Value]:
        """The four counters of a C-GET-RSP."""
        return {
            wire.REMAINING: self.remaining,
            wire.COMPLETED: self.completed,
            wire.FAILED: len(self.failed),
            wire.WARNING: self.warning,
        }


class Behaviour:
    """How the server acts on one association; as it stands, well.

    A mode overrides hooks and names in ``stages`` those of :meth:`associate`, :meth:`find`,
    :meth:`get` and :meth:`release` on whose way they lie. An association counts as a misbehaving
    one (for ``heal_after``) from the first of these stages that it reaches.

    Attributes
    ----------
    stages : frozenset of str
        Where this behaviour differs from the good one.
    param : str or float or None
        Default of the mode's parameter.
    heal_after : int or None
        Default number of associations that misbehave; ``None`` means all.
    max_seconds, max_bytes : float, int
        The bounds of a misbehaviour, whatever the client does.
    """

    stages: ClassVar[frozenset[Stage]] = frozenset()
    param: str | float | None = None
    heal_after: ClassVar[int | None] = None
    max_seconds: ClassVar[float] = 120.0
    max_bytes: ClassVar[int] = 512 << 20

    max_pdu: ClassVar[int] = 131072
    version: ClassVar[bytes] = b"MISBEHAVING"
    refused_classes: ClassVar[frozenset[str]] = frozenset()

    def __init__(self, link: Link, site: Site) -> None:
        self.link = link
        self.site = site
        if site.param is not None:
            self.param = site.param

    @property
    def number(self) -> float:
        """The parameter as a number."""
        if isinstance(self.param, str):
            return int(self.param, 16) if self.param.lower().startswith("0x") else float(self.param)
        return float(self.param or 0)

    # --- association -------------------------------------------------------------------------

    def associate(self, request: AssociateRequest) -> bool:
        """Answer the A-ASSOCIATE-RQ; false if the association does not come to be."""
        if self.site.ae_title is not None and request.called != self.site.ae_title:
            self.link.send(wire.reject(1, 1, 7))
            return False
        self.link.answers = self.negotiate(request)
        roles = self.roles(request)
        self.link.scp_classes = frozenset(r.abstract for r in roles if r.scp)
        self.answer(wire.associate_accept(request, self.answers_sent(request), roles, self.max_pdu, self.version))
        return True

    def negotiate(self, request: AssociateRequest) -> list[Answer]:
        """Answer each proposed context: known classes, and the syntax in which the archive holds them."""
        held: dict[str, set[str]] = {}
        for instance in self.site.instances:
            held.setdefault(instance.sop_class, set()).add(instance.syntax)
        answers = []
        for proposal in request.proposals:
            abstract, offered = proposal.abstract, proposal.syntaxes
            known = abstract in wire.FIND | wire.GET or abstract == wire.VERIFICATION
            if known:
                usable = [s for s in (wire.IMPLICIT_LE, wire.EXPLICIT_LE) if s in offered]
            else:
                usable = [s for s in offered if s in held.get(abstract, ())] or list(offered[:1])
                known = abstract.startswith("1.2.840.10008.5.1.4.") or abstract in held
            if not known or abstract in self.refused_classes:
                answers.append(Answer(proposal.id, _CLASS_UNKNOWN, abstract, offered[:1]))
            elif not usable:
                answers.append(Answer(proposal.id, _SYNTAX_UNKNOWN, abstract, offered[:1]))
            else:
                answers.append(Answer(proposal.id, 0, abstract, (usable[0],)))
        return answers

    def answers_sent(self, request: AssociateRequest) -> list[Answer]:
        """The contexts as the A-ASSOCIATE-AC gives them."""
        return self.link.answers

    def roles(self, request: AssociateRequest) -> list[Role]:
        """The role selection items of the answer: granted as proposed."""
        return list(request.roles)

    def answer(self, accept: bytes) -> None:
        """Send the A-ASSOCIATE-AC."""
        self.link.send(accept)

    def release(self) -> None:
        """Answer an A-RELEASE-RQ."""
        self.link.send(wire.pdu(wire.RELEASE_RP, bytes(4)))

    # --- C-ECHO and C-FIND -------------------------------------------------------------------

    def syntax_of(self, context: int) -> str:
        """The transfer syntax of an accepted context."""
        for answer in self.link.answers:
            if answer.id == context and answer.result == 0:
                return answer.syntaxes[0]
        raise GoneError(f"a request on context {context}, which was not accepted")

    def respond(self, message: Message, status: int, data: bytes = b"") -> None:
        """Answer a request by a response and, if given, its data set."""
        fields: dict[int, wire.Value] = {
            wire.CLASS: message.elements.get(wire.CLASS, b""),
            wire.FIELD: message.number(wire.FIELD) | wire.RESPONSE,
            wire.RESPONDED_ID: message.number(wire.MESSAGE_ID),
            wire.STATUS: status,
        }
        self.send_response(message, fields, data)

    def send_response(self, message: Message, fields: dict[int, wire.Value], data: bytes = b"") -> None:
        """Send a response of the given elements on the context of its request."""
        fields[wire.DATA_SET_TYPE] = wire.WITH_DATA_SET if data else wire.NO_DATA_SET
        self.link.send_command(message.context, fields)
        if data:
            self.link.send_data(message.context, (data,))

    def echo(self, message: Message) -> None:
        """Answer a C-ECHO-RQ."""
        self.respond(message, 0x0000)

    def find(self, message: Message) -> None:
        """Answer a C-FIND-RQ: a Pending per row, then Success."""
        syntax = self.syntax_of(message.context)
        query = archive.parse_identifier(message.data, syntax)
        for row in self.rows(query.get(0x00080052, ""), query):
            if self.link.readable():
                other = self.link.read()
                if other is None:
                    raise GoneError("released in the middle of a C-FIND")
                if other.number(wire.FIELD) == wire.C_CANCEL:
                    self.respond(message, 0xFE00)
                    return
            self.respond(message, _PENDING, archive.encode_identifier(row, syntax))
        self.respond(message, 0x0000)

    def listing(self) -> Sequence[Instance]:
        """The instances that C-FIND knows."""
        return self.site.instances

    def describe(self, level: str, group: Sequence[Instance]) -> Row:
        """The attributes of a study, a series or an instance."""
        row = archive.attributes(level, group)
        if not self.site.list_syntaxes:
            row.pop(0x00083002, None)
        return row

    def rows(self, level: str, query: Row) -> Iterable[Row]:
        """The answers to a C-FIND."""
        return archive.find(level, query, self.listing(), self.describe)

    # --- C-GET -------------------------------------------------------------------------------

    def get(self, message: Message) -> None:
        """Serve a C-GET-RQ: sub-operations with a Pending after each, then the final response."""
        request = archive.parse_identifier(message.data, self.syntax_of(message.context))
        try:
            retrieval = Retrieval(message, self.select(request))
        except RefusedError as refusal:
            self.respond(message, refusal.status)
            with self.site.lock:
                self.site.finals.append(refusal.status)
            return
        self.before(retrieval)
        for index, instance in enumerate(retrieval.instances):
            retrieval.index = index
            self.look_for_cancel(retrieval)
            if retrieval.cancelled:
                break
            self.operate(retrieval, instance)
            self.pending(retrieval)
        with self.site.lock:
            self.site.gets += 1
        self.final(retrieval)
        self.after(retrieval)

    def holdings(self) -> Sequence[Instance]:
        """The instances that C-GET can send."""
        return self.site.instances

    def select(self, request: Row) -> list[Instance]:
        """The instances that an identifier names."""
        return archive.select(request, self.holdings())

    def before(self, retrieval: Retrieval) -> None:
        """Called before the first sub-operation."""

    def after(self, retrieval: Retrieval) -> None:
        """Called after the final response."""

    def look_for_cancel(self, retrieval: Retrieval) -> None:
        """Read what the client sent unasked; a C-CANCEL-RQ is remembered."""
        while self.link.readable():
            message = self.link.read()
            if message is None:
                self.release()
                raise GoneError("released in the middle of a C-GET")
            if message.number(wire.FIELD) == wire.C_CANCEL:
                retrieval.cancelled = True

    def context_for(self, instance: Instance) -> int | None:
        """The context on which an instance can be sent as it is held."""
        if instance.sop_class not in self.link.scp_classes:
            return None
        for answer in self.link.answers:
            if answer.result == 0 and answer.abstract == instance.sop_class and instance.syntax in answer.syntaxes:
                return answer.id
        return None

    def operate(self, retrieval: Retrieval, instance: Instance) -> None:
        """One sub-operation: send the instance, wait for the answer, count."""
        context = self.context_for(instance)
        if context is None:
            retrieval.failed.append(instance.sop)
        else:
            self.send(retrieval, instance, context)

    def send(self, retrieval: Retrieval, instance: Instance, context: int) -> None:
        """Send an instance whole and count its answer."""
        self.store(retrieval, instance, context)
        self.tally(retrieval, instance, self.await_response(retrieval))

    def tally(self, retrieval: Retrieval, instance: Instance, status: int) -> None:
        """Count the answer to a C-STORE-RQ."""
        if status == 0:
            retrieval.completed += 1
        elif status & 0xF000 == 0xB000:
            retrieval.warning += 1
        else:
            retrieval.failed.append(instance.sop)

    def store_fields(self, retrieval: Retrieval, instance: Instance) -> dict[int, wire.Value]:
        """The command elements of the C-STORE-RQ of an instance."""
        return {
            wire.CLASS: instance.sop_class,
            wire.FIELD: wire.C_STORE,
            wire.MESSAGE_ID: self.link.next_message_id(),
            wire.PRIORITY: 0,
            wire.DATA_SET_TYPE: wire.WITH_DATA_SET,
            wire.INSTANCE: instance.sop,
        }

    def store(self, retrieval: Retrieval, instance: Instance, context: int) -> None:
        """Send the C-STORE-RQ and the data set of an instance."""
        self.store_command(retrieval, instance, context)
        self.send_dataset(context, instance.pieces())
        self.count(instance)

    def store_command(self, retrieval: Retrieval, instance: Instance, context: int) -> None:
        """Send the command set of a C-STORE-RQ."""
        self.link.send_command(context, self.store_fields(retrieval, instance))

    def send_dataset(self, context: int, pieces: Iterator[bytes]) -> None:
        """Send a data set as fragments."""
        self.link.send_data(context, pieces)

    def count(self, instance: Instance) -> None:
        """Count an instance as sent whole."""
        with self.site.lock:
            self.site.sent[instance.sop] += 1

    def await_response(self, retrieval: Retrieval) -> int:
        """Wait for the answer to a request of ours and return its status."""
        while True:
            message = self.link.read()
            if message is None:
                self.release()
                raise GoneError("released in the middle of a C-GET")
            field_ = message.number(wire.FIELD)
            if field_ == wire.C_CANCEL:
                retrieval.cancelled = True
            elif field_ & wire.RESPONSE:
                status = message.number(wire.STATUS)
                with self.site.lock:
                    self.site.answers.append((field_, status))
                return status

    def pending(self, retrieval: Retrieval) -> None:
        """Send the Pending response after a sub-operation."""
        self.get_response(retrieval, _PENDING, retrieval.counters())

    def get_response(
        self, retrieval: Retrieval, status: int | None, counters: dict[int, wire.Value], failed: Sequence[str] = ()
    ) -> None:
        """Send a C-GET-RSP, with a Failed SOP Instance UID List if one is given."""
        message = retrieval.message
        fields: dict[int, wire.Value] = {
            wire.CLASS: message.elements.get(wire.CLASS, b""),
            wire.FIELD: wire.C_GET | wire.RESPONSE,
            wire.RESPONDED_ID: message.number(wire.MESSAGE_ID),
            **counters,
        }
        if status is not None:
            fields[wire.STATUS] = status
        identifier = b""
        if failed:
            identifier = archive.encode([(0x00080058, b"UI", wire.uid_list(failed))], self.syntax_of(message.context))
        self.send_response(message, fields, identifier)
        if status != _PENDING:
            with self.site.lock:
                self.site.finals.append(-1 if status is None else status)

    def final(self, retrieval: Retrieval) -> None:
        """Send the final response."""
        counters = retrieval.counters()
        if retrieval.cancelled:
            self.get_response(retrieval, 0xFE00, counters, retrieval.failed)
            return
        del counters[wire.REMAINING]
        if not retrieval.failed and not retrieval.warning:
            status = 0x0000
        else:
            status = 0xB000 if retrieval.completed or retrieval.warning else 0xA702
        self.get_response(retrieval, status, counters, retrieval.failed)


class Spoiler(Behaviour):
    """Base of modes that spoil one sub-operation: that of the site's victim if it has one, else the middle one.

    The middle one is the first of the second half of what was asked for; those before it arrive well.
    """

    stages = frozenset({GET})

    def operate(self, retrieval: Retrieval, instance: Instance) -> None:
        context = self.context_for(instance)
        if context is not None and self.strikes(retrieval, instance):
            self.spoil(retrieval, instance, context)
        else:
            super().operate(retrieval, instance)

    def strikes(self, retrieval: Retrieval, instance: Instance) -> bool:
        """Whether this is the instance to spoil."""
        if self.site.victim is not None:
            return instance.sop == self.site.victim
        return retrieval.index == len(retrieval.instances) // 2

    def spoil(self, retrieval: Retrieval, instance: Instance, context: int) -> None:
        """What happens in place of the good sub-operation."""
        raise NotImplementedError

    def refuse_to_go_on(self) -> None:
        """Send no more, as a peer that is stuck, until the client has had enough."""
        self.link.hold()


MODE_CLASSES: dict[str, type[Behaviour]] = {}
MODES: dict[str, str] = {}


def mode(name: str) -> Callable[[type[Behaviour]], type[Behaviour]]:
    """Register a behaviour; the first paragraph of its docstring is its sentence in :data:`MODES`."""

    def register(cls: type[Behaviour]) -> type[Behaviour]:
        if name in MODES:
            raise ValueError(f"the mode {name!r} is registered twice")
        if not cls.__doc__ or not cls.stages:
            raise ValueError(f"the mode {name!r} has no sentence or no stage")
        MODE_CLASSES[name] = cls
        MODES[name] = " ".join(cls.__doc__.strip().split("\n\n")[0].split())
        return cls

    return register
