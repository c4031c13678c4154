"""The model PACS: the misbehaving one over lines of memory, whose archive changes, and who writes down what it does.

Everything that it says on the network is said by :mod:`airflow_dicom_get.testing.misbehaving`. A history chooses for
each association one of its modes, or none; :class:`Habits` hold for all of them.
"""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from itertools import islice
from typing import Any

from airflow_dicom_get.dicom.uids import is_uid
from airflow_dicom_get.testing.misbehave import MODES
from airflow_dicom_get.testing.misbehaving import archive, wire
from airflow_dicom_get.testing.misbehaving.archive import STUDY_UID, Instance, Row
from airflow_dicom_get.testing.misbehaving.behaviour import MODE_CLASSES, Behaviour, Retrieval, Site, Stage
from airflow_dicom_get.testing.misbehaving.line import Line
from airflow_dicom_get.testing.misbehaving.link import Link
from airflow_dicom_get.testing.misbehaving.scp import Scp
from airflow_dicom_get.testing.misbehaving.wire import Answer, AssociateRequest, GoneError, Message
from tests.simulation.marks import mark

STUDY, SERIES, SOP, LEVEL = 0x0020000D, 0x0020000E, 0x00080018, 0x00080052
SOP_CLASS, SOP_CLASSES, ACCESSION, MODALITY, PATIENT = 0x00080016, 0x00080062, 0x00080050, 0x00080060, 0x00100020
_UIDS = frozenset({STUDY, SERIES, SOP, SOP_CLASS, SOP_CLASSES})
_STUDY_ROOT = frozenset({"1.2.840.10008.5.1.4.1.2.2.1", "1.2.840.10008.5.1.4.1.2.2.3"})
_PATIENT_ROOT = frozenset({"1.2.840.10008.5.1.4.1.2.1.1", "1.2.840.10008.5.1.4.1.2.1.3"})
_COUNTS = (0x00201206, 0x00201208, 0x00201209)
Key = tuple[str, str]
"""Series and SOP Instance UID: what makes an instance of a study."""

assert MODES  # imported with the modules that fill the table


@dataclass(frozen=True, slots=True)
class Habits:
    """What the PACS does on all associations of a history.

    Attributes
    ----------
    counts : {"true", "none", "high"}
        Numbers of related series and instances in its lists.
    cap : int
        Rows at which it cuts every answer without a word; 0 for never.
    syntaxes : bool
        Whether lists tell transfer syntaxes.
    counters : {"true", "none"}
        Of its C-GET responses.
    classes : bool
        Whether lists tell SOP classes.
    matching : {"exact", "prefix", "folds", "ignores", "leaves out", "empties"}
        How it matches Accession Number, Patient ID and Modality: as it should, by prefix, without regard to case and
        leading zeros, or not at all; in the last two cases its answers leave them out, or empty. One that ``ignores``
        matches no UIDs either.
    model : {"both", "patient"}
        The information models that it offers. In Patient Root it wants the Patient ID below the level of the study, and
        in every C-GET.
    gets : {"asked", "series"}
        What a C-GET for instances brings: these, or all of their series.
    """

    counts: str = "true"
    cap: int = 0
    syntaxes: bool = False
    counters: str = "true"
    classes: bool = True
    matching: str = "exact"
    model: str = "both"
    gets: str = "asked"


@dataclass(slots=True)
class Find:
    """A C-FIND and what was answered."""

    run: int
    association: int
    level: str
    query: Row
    rows: list[Row] = field(default_factory=list)
    cut: bool = False
    ended: bool = False


@dataclass(slots=True)
class Get:
    """A C-GET, and what was sent whole for it."""

    run: int
    association: int
    level: str
    series: str
    uids: list[str]
    sent: list[Key] = field(default_factory=list)
    taken: list[tuple[Key, bytes]] = field(default_factory=list)
    """What was answered with success, in order."""


@dataclass(frozen=True, slots=True)
class Change:
    """A change of the archive.

    Attributes
    ----------
    moment : int
        Requests and sub-operations of the whole history before it comes.
    what : str
        A name of :data:`CHANGES`.
    which : int
        Number of the instance, among those that are there.
    """

    moment: int
    what: str
    which: int


class ModelPacs:
    """The PACS of a history.

    Parameters
    ----------
    instances : sequence of Instance
        What it holds at the beginning, other studies included.
    habits : Habits
    changes : sequence of Change
        In the order of their moments.
    studies : sequence of str
        The studies that are asked for, the others are foreign.

    Attributes
    ----------
    known : dict
        By (series, sop) the instances of these studies that it ever held.
    finds, gets : list
        What was asked of it.
    sent : dict
        By (series, sop) the data sets that went out whole, in order.
    truncated : set of bytes
        Those of which the end is missing in the archive.
    run : int
        Number of the run that is on; a history sets it.
    ill : dict
        Mode and parameter by the number of the association within a run.
    breaks : dict
        Number of a send within the run, and how the line ends there.
    healed : bool
        No faults and no changes any more.
    on_moment : callable
        Told with each request and sub-operation how many there were in this run.
    """

    def __init__(
        self,
        instances: Sequence[Instance],
        habits: Habits,
        changes: Sequence[Change] = (),
        studies: Sequence[str] = (STUDY_UID,),
    ) -> None:
        self.studies = studies
        self.on_moment: Callable[[int], object] = lambda number: None
        self.site = Site(list(instances), list_syntaxes=habits.syntaxes)
        self.habits = habits
        self.unlisted: set[Key] = set()
        self.ever: set[tuple[str, str, str]] = {(i.study, i.series, i.sop) for i in instances}
        self.known = self.held()
        self.finds: list[Find] = []
        self.gets: list[Get] = []
        self.sent: dict[Key, list[bytes]] = defaultdict(list)
        self.truncated: set[bytes] = set()
        self.log: list[tuple[Any, ...]] = []
        self.run = 0
        self.ill: Mapping[int, tuple[str, float | None]] = {}
        self.breaks: Mapping[int, str] = {}
        self.healed = False
        self.faults: list[str] = []
        self._changes = list(changes)
        self._moment = self._moment_of_run = 0
        self._associations = 0
        self.sends = 0
        self._number = 0

    @property
    def study_of_series(self) -> Mapping[str, str]:
        """The study of each series that it ever held."""
        return {i.series: i.study for i in self.known.values()}

    # --- for the history -----------------------------------------------------------------------

    def begin(self, run: int, ill: Mapping[int, tuple[str, float | None]], breaks: Mapping[int, str]) -> None:
        """A run begins; 0 for what is none."""
        self.run = run
        self.ill, self.breaks = ill, breaks
        self._associations = self.sends = self._moment_of_run = 0

    @property
    def associations(self) -> int:
        """How many there were in this run."""
        return self._associations

    def accept(self, line: Line, port: int) -> Callable[[], object]:
        """See :class:`~tests.simulation.line.Network`."""
        self._associations += 1
        self._number += 1
        link = ModelLink(line, self._number, self)
        scp = ModelScp(self, self._associations)

        def serve() -> None:
            self.log.append(("association", self.run, self._associations))
            scp.serve(link)
            self.faults += scp.faults

        return serve

    def held(self) -> dict[Key, Instance]:
        """What it holds of the studies that are asked for; of two studies no two have one series."""
        return {(i.series, i.sop): i for i in self.site.instances if i.study in self.studies}

    # --- what happens --------------------------------------------------------------------------

    def moment(self) -> None:
        """A request or a sub-operation begins."""
        self._moment += 1
        self._moment_of_run += 1
        self.on_moment(self._moment_of_run)
        while self._changes and self._changes[0].moment <= self._moment and not self.healed:
            self.change(self._changes.pop(0))

    def change(self, change: Change) -> None:
        """Change the archive."""
        CHANGES[change.what](self, change.which)
        self.ever |= {(i.study, i.series, i.sop) for i in self.site.instances}
        self.known |= self.held()
        self.log.append(("change", change.what, change.which))
        mark(f"archive: {change.what}")

    def send(self) -> str | None:
        """Something is to be sent; how the line ends there, if it does."""
        self.sends += 1
        return self.breaks.get(self.sends)

    def changeable(self, which: int) -> Instance | None:
        """An instance of these studies, by its number."""
        own = [i for i in self.site.instances if i.study in self.studies]
        return own[which % len(own)] if own else None


class BreakingLink(Link):
    """A connection that breaks off where the history says: ``how`` is asked before something is sent."""

    def __init__(self, line: Line, number: int, how: Callable[[], str | None]) -> None:
        super().__init__(line, number)
        self._how = how

    def send_raw_command(self, context: int, encoded: bytes) -> None:
        if len(encoded) > self.fragment_size:
            super().send_raw_command(context, encoded)
        else:
            self.send(_command_pdu(context, encoded))

    def send_data(self, context: int, pieces: Iterable[bytes]) -> None:
        if isinstance(pieces, tuple) and sum(map(len, pieces)) <= self.fragment_size:
            self.send_fragment(context, b"".join(pieces), True)
        else:
            super().send_data(context, pieces)

    def send(self, *parts: bytes | memoryview) -> None:
        how = self._how()
        if how is None:
            super().send(*parts)
            return
        mark(f"break: {how}")
        whole = b"".join(parts)
        when, _, what = how.partition(" ")
        if when == "half":
            super().send(whole[: len(whole) // 2])
        elif when == "after":
            super().send(whole)
        match what:
            case "abort":
                super().send(wire.abort())
            case "reset":
                self.reset()
            case "silence":
                self.bound(1200.0, 0)
                self.hold()
        raise GoneError("broken off on purpose")


@lru_cache(10_000)
def _command_pdu(context: int, encoded: bytes) -> bytes:
    return wire.p_data(context, wire.COMMAND_BIT | wire.LAST_BIT, encoded)


_SAME = 300
"""Bytes that a correction of an instance leaves as they were: it changes pixels."""


@lru_cache(10_000)
def _pieces(instance: Instance) -> tuple[bytes, ...]:
    return tuple(instance.pieces())


class ModelLink(BreakingLink):
    """A connection of the model PACS."""

    def __init__(self, line: Line, number: int, pacs: ModelPacs) -> None:
        self.observer = Observer(pacs, self)
        super().__init__(_Observed(line, self.observer), number, pacs.send)


class _Observed:
    """A line of whose bytes somebody takes note."""

    def __init__(self, line: Line, observer: Observer) -> None:
        self._line, self._observer = line, observer
        self.receive, self.readable, self.left = line.receive, line.readable, line.left
        self.now, self.reset, self.close = line.now, line.reset, line.close

    def send(self, data: bytes | memoryview, seconds: float) -> None:
        self._line.send(data, seconds)
        self._observer.note(bytes(data))


class Observer:
    """Reads what the PACS really sends, whatever its mode makes of it: the data sets that went out whole."""

    def __init__(self, pacs: ModelPacs, link: Link) -> None:
        self._pacs, self._link = pacs, link
        self.get: Get | None = None
        self._bytes = bytearray()
        self._lost = False
        self._command, self._data = bytearray(), bytearray()
        self._storing = ""
        self._unanswered: deque[tuple[Key, bytes]] = deque()

    def answered(self, status: int) -> None:
        """The answer came to what was sent whole first."""
        if self._unanswered:
            sent = self._unanswered.popleft()
            if status == 0 and self.get is not None:
                self.get.taken.append(sent)

    def note(self, data: bytes) -> None:
        """So much went out."""
        if self._lost or self.get is None:
            return
        stream = self._bytes
        if not stream and len(data) >= 6 and len(data) == 6 + int.from_bytes(data[2:6], "big"):
            if data[0] == wire.P_DATA:  # a PDU at a time, as nearly always
                self._items(data[6:])
            return
        stream += data
        while len(stream) >= 6:
            length = int.from_bytes(stream[2:6], "big")
            if length > 1 << 24:
                self._lost = True
                return
            if len(stream) < 6 + length:
                return
            if stream[0] == wire.P_DATA:
                self._items(bytes(stream[6 : 6 + length]))
            del stream[: 6 + length]

    def _items(self, body: bytes) -> None:
        at = 0
        while at + 6 <= len(body):
            length, context, flags = int.from_bytes(body[at : at + 4], "big"), body[at + 4], body[at + 5]
            part = body[at + 6 : at + 4 + length]
            at += 4 + max(length, 2)
            if flags & wire.COMMAND_BIT:
                self._command += part
                if flags & wire.LAST_BIT:
                    fields = wire.parse_command(bytes(self._command))
                    self._command.clear()
                    self._data.clear()
                    field = int.from_bytes(fields.get(wire.FIELD, b""), "little")
                    self._storing = "store" if field == wire.C_STORE else ""
            else:
                self._data += part
                if flags & wire.LAST_BIT:
                    if self._storing:
                        self._whole(bytes(self._data), context)
                    self._data.clear()

    def _whole(self, data: bytes, context: int) -> None:
        syntax = next((a.syntaxes[0] for a in self._link.answers if a.id == context and a.syntaxes), wire.EXPLICIT_LE)
        header = header_of(data, syntax)
        key = header.get(SERIES, ""), header.get(SOP, "")
        before = self._pacs.sent[key]
        if before and before[-1] != data:
            mark("pacs: other bytes of one instance")
        before.append(data)
        known = self._pacs.known.get(key)
        if self._link.ill and known is not None:
            whole = b"".join(_pieces(known))
            if len(data) < len(whole) and whole[:_SAME] == data[:_SAME]:
                self._pacs.truncated.add(data)
        self._unanswered.append((key, data))
        if self.get is not None:
            self.get.sent.append(key)
        self._pacs.log.append(("sent", key[1], hashlib.sha256(data).hexdigest()[:8]))


def header_of(data: bytes, syntax: str) -> Row:
    """The header of an object: of a compressed one in implicit VR, too, which both ends take."""
    header = archive.parse_identifier(data[:2000], syntax)
    if SOP in header or syntax in (wire.IMPLICIT_LE, wire.EXPLICIT_LE):
        return header
    return archive.parse_identifier(data[:2000], wire.IMPLICIT_LE)


class ModelScp(Scp):
    """One association of the model PACS."""

    def __init__(self, pacs: ModelPacs, number: int) -> None:
        super().__init__(pacs.site)
        self.pacs, self.number, self.run = pacs, number, pacs.run

    def behaviour(self, link: Link, stage: Stage) -> Behaviour:
        mode, param = self.pacs.ill.get(self.number, (None, None))
        if mode is not None and stage not in MODE_CLASSES[mode].stages:
            mode = None
        made = behaviour_of(mode)(link, self.site)
        assert isinstance(made, Habitual)
        made.pacs, made.number_in_run, made.run = self.pacs, self.number, self.run
        if mode is not None:
            if not link.ill:
                link.ill = True
                link.bound(1200.0, 1 << 20)
                mark(f"mode: {mode}")
            if param is not None:
                made.param = param
        return made


class Habitual(Behaviour):
    """What the model PACS does besides its mode: its habits, and the log."""

    pacs: ModelPacs
    number_in_run = run = 0
    _find: Find | None = None
    _get: Get | None = None
    _by_patient = False

    def negotiate(self, request: AssociateRequest) -> list[Answer]:
        answers = super().negotiate(request)
        if self.pacs.habits.model == "patient":
            answers = [a._replace(result=3) if a.abstract in _STUDY_ROOT else a for a in answers]
        return answers

    # --- lists ---------------------------------------------------------------------------------

    def find(self, message: Message) -> None:
        self.pacs.moment()
        query = archive.parse_identifier(message.data, self.syntax_of(message.context))
        self._find = Find(self.run, self.number_in_run, query.get(LEVEL, ""), query)
        self.pacs.finds.append(self._find)
        if message.text(wire.CLASS) in _PATIENT_ROOT:
            mark("list: in Patient Root")
            if self._find.level != "STUDY" and not query.get(PATIENT):
                mark("list: refused without the Patient ID")
                self.respond(message, 0xA900)
                return
        super().find(message)

    def respond(self, message: Message, status: int, data: bytes = b"") -> None:
        find = self._find
        if find is not None and message.number(wire.FIELD) == wire.C_FIND:
            if data:
                row = archive.parse_identifier(data, self.syntax_of(message.context))
                find.rows.append(row)
                if not is_uid(row.get({"STUDY": STUDY, "SERIES": SERIES}.get(find.level, SOP), "")):
                    mark("list: a malformed UID")
                if row.get(STUDY, STUDY_UID) not in self.pacs.studies:
                    mark("list: another study")
            elif status == 0:
                find.ended = True
                self.pacs.log.append(("list", find.level, len(find.rows), find.cut))
        super().respond(message, status, data)

    def listing(self) -> Sequence[Instance]:
        unlisted = self.pacs.unlisted
        return [i for i in super().listing() if (i.series, i.sop) not in unlisted]

    def describe(self, level: str, group: Sequence[Instance]) -> Row:
        row = super().describe(level, group)
        counts = self.pacs.habits.counts
        for tag in _COUNTS:
            if tag in row and counts == "none":
                del row[tag]
            elif tag in row and counts == "high":
                row[tag] = str(int(row[tag]) + 1)
        if not self.pacs.habits.classes:
            row.pop(SOP_CLASS, None)
            row.pop(SOP_CLASSES, None)
        return row

    def rows(self, level: str, query: Row) -> Iterable[Row]:
        rows = super().rows(level, query) if self.pacs.habits.matching == "exact" else self._loosely(level, query)
        cap = self.pacs.habits.cap
        return self._cut(iter(rows), cap) if cap else rows

    def _loosely(self, level: str, query: Row) -> Iterator[Row]:
        how = self.pacs.habits.matching
        keys = {tag: value for tag, value in query.items() if value and tag != LEVEL and tag not in _UIDS}
        if keys:
            mark(f"list: a key is matched loosely ({how})")
        if how in ("prefix", "folds"):
            alike = _begins if how == "prefix" else _folds
            text = {tag: value for tag, value in keys.items() if tag in (ACCESSION, MODALITY, PATIENT)}
            for row in super().rows(level, query | dict.fromkeys(text, "")):
                if all(tag not in row or alike(row[tag], value) for tag, value in text.items()):
                    yield row
            return
        for row in super().rows(level, query | dict.fromkeys(query if how == "ignores" else keys, "") | {LEVEL: level}):
            match how:
                case "leaves out":
                    yield {tag: value for tag, value in row.items() if tag not in keys}
                case "empties":
                    yield row | dict.fromkeys(keys, "")
                case _:
                    yield row

    def _cut(self, rows: Iterator[Row], cap: int) -> Iterator[Row]:
        yield from islice(rows, cap)
        if next(rows, None) is not None and self._find is not None:
            self._find.cut = True
            mark(f"list: cut at {self._find.level}")

    # --- gets ----------------------------------------------------------------------------------

    def get(self, message: Message) -> None:
        self.pacs.moment()
        request = archive.parse_identifier(message.data, self.syntax_of(message.context))
        level = request.get(LEVEL, "")
        tag = {"STUDY": STUDY, "SERIES": SERIES, "IMAGE": SOP}.get(level, SOP)
        self._get = Get(self.run, self.number_in_run, level, request.get(SERIES, ""), request.get(tag, "").split("\\"))
        self.pacs.gets.append(self._get)
        link = self.link
        assert isinstance(link, ModelLink)
        link.observer.get = self._get
        self.pacs.log.append(("get", level, len(self._get.uids)))
        self._by_patient = message.text(wire.CLASS) in _PATIENT_ROOT
        super().get(message)

    def select(self, request: Row) -> list[Instance]:
        if self._by_patient:
            mark("get: in Patient Root")
            if not request.get(PATIENT):
                raise archive.RefusedError(0xA900)
        if self.pacs.habits.gets == "series" and request.get(LEVEL) == "IMAGE":
            mark("get: a whole series for some of it")
            request = request | {LEVEL: "SERIES"}
        found = super().select(request)
        return [x for x in found if x.patient_id == request[PATIENT]] if self._by_patient else found

    def operate(self, retrieval: Retrieval, instance: Instance) -> None:
        self.pacs.moment()
        super().operate(retrieval, instance)

    def store(self, retrieval: Retrieval, instance: Instance, context: int) -> None:
        self.store_command(retrieval, instance, context)
        if type(self).send_dataset is Behaviour.send_dataset:
            self.link.send_data(context, _pieces(instance))
        else:
            self.send_dataset(context, iter(_pieces(instance)))
        self.count(instance)

    def get_response(
        self, retrieval: Retrieval, status: int | None, counters: dict[int, wire.Value], failed: Sequence[str] = ()
    ) -> None:
        if self.pacs.habits.counters == "none":
            counters = {}
        super().get_response(retrieval, status, counters, failed)

    def await_response(self, retrieval: Retrieval) -> int:
        status = super().await_response(retrieval)
        link = self.link
        assert isinstance(link, ModelLink)
        link.observer.answered(status)
        self.pacs.log.append(("answered", status))
        return status


def _begins(have: str, wanted: str) -> bool:
    return have.startswith(wanted)


def _folds(have: str, wanted: str) -> bool:
    return have.lstrip("0").upper() == wanted.lstrip("0").upper()


_CLASSES: dict[str | None, type[Behaviour]] = {None: Habitual}


def behaviour_of(mode: str | None) -> type[Behaviour]:
    """A mode on top of the habits."""
    if mode not in _CLASSES:
        assert mode is not None
        _CLASSES[mode] = type(f"Habitual_{mode}", (MODE_CLASSES[mode], Habitual), {})
    return _CLASSES[mode]


# --- changes of the archive ------------------------------------------------------------------------


def _add(pacs: ModelPacs, which: int) -> None:
    """A new instance comes into a series."""
    like = pacs.changeable(which)
    if like is not None:
        number = 500 + sum(1 for _ in pacs.ever)
        pacs.site.instances.append(archive.another(like, number))


def _add_series(pacs: ModelPacs, which: int) -> None:
    """A new series of one instance comes."""
    like = pacs.changeable(which)
    if like is not None:
        number = 500 + len(pacs.ever)
        new = archive.another(like, number)
        pacs.site.instances.append(replace(new, series=_series(number), series_number=number))


def _remove(pacs: ModelPacs, which: int) -> None:
    """An instance is deleted."""
    gone = pacs.changeable(which)
    if gone is not None:
        pacs.site.instances.remove(gone)


def _unlist(pacs: ModelPacs, which: int) -> None:
    """An instance is listed no longer, and still sent to who asks for it."""
    hidden = pacs.changeable(which)
    if hidden is not None:
        pacs.unlisted.add((hidden.series, hidden.sop))


def _other_series(pacs: ModelPacs, instance: Instance) -> str:
    series = sorted({i.series for i in pacs.site.instances if i.study == instance.study} - {instance.series})
    return series[0] if series else _series(499)


def _series(number: int) -> str:
    return f"2.25.{int(STUDY_UID.removeprefix('2.25.')) + number * 10**8}"


def _in_series(pacs: ModelPacs, instance: Instance, series: str) -> Instance:
    """The instance as one of another series: the modality is the same in all of it."""
    modality = next((i.modality for i in pacs.site.instances if i.series == series), instance.modality)
    return replace(instance, series=series, modality=modality)


def _move(pacs: ModelPacs, which: int) -> None:
    """An instance moves into another series."""
    moved = pacs.changeable(which)
    if moved is not None:
        there = _other_series(pacs, moved)
        if not any(i.series == there and i.sop == moved.sop for i in pacs.site.instances):
            pacs.site.instances[pacs.site.instances.index(moved)] = _in_series(pacs, moved, there)


def _twin(pacs: ModelPacs, which: int) -> None:
    """The UID of an instance is given to another one in another series."""
    first = pacs.changeable(which)
    if first is not None:
        there = _other_series(pacs, first)
        if not any(i.series == there and i.sop == first.sop for i in pacs.site.instances):
            pacs.site.instances.append(replace(_in_series(pacs, first, there), salt=first.salt + 1))


def _correct(pacs: ModelPacs, which: int) -> None:
    """The bytes of an instance are others from now on."""
    old = pacs.changeable(which)
    if old is not None:
        pacs.site.instances[pacs.site.instances.index(old)] = replace(old, salt=old.salt + 1)


def _restore(pacs: ModelPacs, which: int) -> None:
    """The bytes of an instance are again what they were before they were corrected."""
    new = pacs.changeable(which)
    if new is not None and new.salt:
        pacs.site.instances[pacs.site.instances.index(new)] = replace(new, salt=new.salt - 1)


CHANGES: Mapping[str, Callable[[ModelPacs, int], None]] = {
    "add": _add,
    "add series": _add_series,
    "remove": _remove,
    "unlist": _unlist,
    "move": _move,
    "twin": _twin,
    "correct": _correct,
    "restore": _restore,
}


def listed(finds: Iterable[Find], study: str) -> dict[int, tuple[Counter[Key], bool]]:
    """By association the instances of a study that its lists named, and whether all of these came to their end."""
    found: dict[int, tuple[Counter[Key], bool]] = {}
    for find in finds:
        if find.level == "IMAGE" and find.query.get(STUDY, study) == study:
            named, whole = found.get(find.association, (Counter(), True))
            series = find.query.get(SERIES, "")
            for row in find.rows:
                if row.get(STUDY, study) == study and row.get(SERIES, series) == series:
                    named[series, row.get(SOP, "")] += 1
            found[find.association] = named, whole and find.ended
    return found
