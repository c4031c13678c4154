"""What becomes of each object that a source sends, without a socket and without a disk."""

from __future__ import annotations

import struct
from dataclasses import dataclass, field

import pytest

from airflow_dicom_get.config.options import GetOptions
from airflow_dicom_get.engine.contexts import PeerKnowledge
from airflow_dicom_get.engine.events import Events
from airflow_dicom_get.engine.listing import Listing, SeriesInfo
from airflow_dicom_get.engine.receiver import Receiver
from airflow_dicom_get.engine.resolve import Scope
from airflow_dicom_get.engine.retrieval import Intake, Retrieval
from airflow_dicom_get.engine.state import StudyState
from airflow_dicom_get.errors import DestinationFull, DestinationSlow, ForwardLate, SinkError
from airflow_dicom_get.net.association import CancelToken
from airflow_dicom_get.net.get import StoreRequest
from airflow_dicom_get.records import Instance, SubOperation
from airflow_dicom_get.sinks.base import Confirmation, Taken

STUDY, SERIES, SOP = "1.2", "1.2.3", "1.2.3.1"
CT, MR = "1.2.840.10008.5.1.4.1.1.2", "1.2.840.10008.5.1.4.1.1.4"
EXPLICIT_LE, JPEG, JPEG_LOSSLESS = "1.2.840.10008.1.2.1", "1.2.840.10008.1.2.4.50", "1.2.840.10008.1.2.4.70"


def element(tag: int, vr: bytes, text: str) -> bytes:
    value = text.encode() + b"\0" * (len(text) % 2)
    if vr == b"OW":
        return struct.pack("<HH2sHL", tag >> 16, tag & 0xFFFF, vr, 0, len(value)) + value
    return struct.pack("<HH2sH", tag >> 16, tag & 0xFFFF, vr, len(value)) + value


def data_set(study: str = STUDY, series: str = SERIES, sop: str = SOP, sop_class: str = CT, lossy: str = "") -> bytes:
    parts = [
        element(0x00080016, b"UI", sop_class),
        element(0x00080018, b"UI", sop),
        element(0x00080060, b"CS", "CT"),
        element(0x0020000D, b"UI", study),
        element(0x0020000E, b"UI", series),
        element(0x00200011, b"IS", "4"),
        element(0x00200013, b"IS", "17"),
        *([element(0x00282110, b"CS", lossy)] if lossy else []),
        element(0x7FE00010, b"OW", "x" * 600),
    ]
    return b"".join(parts)


@dataclass
class Writer:
    """Takes bytes; does with ``take`` what the test says."""

    sink: Sink
    instance: Instance
    got: bytearray = field(default_factory=bytearray)

    def write(self, view: memoryview) -> None:
        if self.sink.write_error is not None:
            raise self.sink.write_error
        self.got += view

    def take(self) -> Taken:
        if self.sink.take_error is not None:
            raise self.sink.take_error
        self.instance.bytes = len(self.got)
        self.sink.taken[self.instance.sop] = bytes(self.got)
        return self.sink.answer

    def abort(self) -> None:
        self.sink.aborted += 1


@dataclass
class Sink:
    """A destination in memory."""

    answer: Taken = field(default_factory=lambda: Taken(0x0000))
    write_error: Exception | None = None
    take_error: Exception | None = None
    taken: dict[str, bytes] = field(default_factory=dict)
    aborted: int = 0
    due: list[Confirmation] = field(default_factory=list)

    def begin(self, instance: Instance) -> Writer:
        return Writer(self, instance)

    def end_study(self, study: str) -> None:
        """Nothing is held open."""

    def confirmations(self, *, wait: bool = False) -> list[Confirmation]:
        due, self.due = self.due, []
        return due


class Source:
    """What a receiver asks of its source."""

    def __init__(self) -> None:
        self.deadlines = GetOptions.check({"addr": "PACS@localhost:104"}).deadlines
        self.cancel = CancelToken()


class Desk:
    """A receiver with all that it works on."""

    def __init__(
        self, listed: bool = True, listed_syntax: str | None = None, limit: str | None = None, **options: object
    ):
        self.state = StudyState(Scope(STUDY), rounds=1)
        if listed:
            found = Listing(series={SERIES: SeriesInfo(SERIES, listed=1)})
            one = Instance(STUDY, SERIES, SOP, CT)
            one.listed_syntax = listed_syntax
            found.instances[one.key] = one
            self.state.take_list(found)
        self.sink, self.source, self.events = Sink(), Source(), list[SubOperation]()
        self.retrieval = Retrieval(
            options=GetOptions.check({"addr": "PACS@localhost:104", **options}),
            query_model="StudyRoot",
            source=self.source,  # type: ignore[arg-type]
            sink=self.sink,  # type: ignore[arg-type]
            peer=PeerKnowledge(),
            events=Events(self.events.append),
            limit=lambda: limit,
        )
        self.receiver = Receiver(Intake(self.retrieval, self.state), 7)

    def send(
        self, data: bytes = b"", *, size: int = 64, syntax: str = EXPLICIT_LE, sop: str = SOP, command_class: str = CT,
        context_class: str = CT,
    ) -> int:  # fmt: skip
        """Let an object come in pieces of ``size`` bytes; the status it is answered with."""
        data = data or data_set()
        self.receiver.begin(StoreRequest(1, context_class, syntax, command_class, sop))
        for start in range(0, len(data), size):
            self.receiver.data(memoryview(data)[start : start + size], start + size >= len(data))
        status = self.receiver.finish()
        self.receiver.answered()
        return status

    @property
    def row(self) -> Instance:
        return self.state.instances[SERIES, SOP]


@pytest.mark.parametrize("size", [1, 7, 64, 4096])
def test_the_bytes_are_handed_on_as_they_came_however_they_were_cut(size: int) -> None:
    desk = Desk()
    assert desk.send(size=size) == 0x0000
    assert desk.sink.taken == {SOP: data_set()}
    row = desk.row
    assert (row.state, row.syntax, row.modality, row.series_number, row.instance_number) == (
        "stored",
        EXPLICIT_LE,
        "CT",
        4,
        17,
    )
    assert (row.association, row.dimse_status, row.exactness, row.attempt) == (7, 0, "peer_choice", 1)
    assert [(e.sop_instance_uid, e.completed, e.failed, e.bytes) for e in desk.events] == [(SOP, 1, 0, len(data_set()))]


@pytest.mark.parametrize(
    ("data", "arguments", "status", "reason"),
    [
        (data_set(study="1.9"), {}, 0x0124, "foreign_study"),
        (data_set(series="1.9.9"), {}, 0xA900, "uid_mismatch"),
        (data_set(sop="1.2.3.2"), {}, 0xA900, "uid_mismatch"),
        (data_set(sop_class=MR), {}, 0xA900, "uid_mismatch"),
        (data_set(sop="../x"), {"sop": "../x"}, 0xA900, "bad_uid"),
        (data_set(series="1..2"), {}, 0xA900, "bad_uid"),
        (data_set(), {"context_class": MR}, 0xA900, "uid_mismatch"),
        (b"\xff" * 600, {}, 0xC000, "unparsable"),
    ],
)
def test_what_contradicts_is_refused_and_nothing_of_it_is_taken(
    data: bytes, arguments: dict[str, str], status: int, reason: str
) -> None:
    desk = Desk()
    assert desk.send(data, **arguments) == status  # type: ignore[arg-type]
    assert desk.sink.taken == {}
    found = desk.row.reason if desk.row.state in ("failed", "missing") else next(iter(desk.state.strays), None)
    assert found == reason


def test_outside_of_the_scope_nothing_is_taken() -> None:
    desk = Desk()
    desk.state.scope.instances = frozenset({SOP})
    assert desk.send(data_set(sop="1.2.3.9"), sop="1.2.3.9") == 0x0124
    assert desk.state.strays == {"not_asked": 1}


def test_an_unlisted_one_of_the_scope_is_taken() -> None:
    desk = Desk(listed=False)
    assert desk.send() == 0x0000
    assert desk.state.unlisted == {(SERIES, SOP)}


def test_one_that_comes_again_is_judged_by_the_sink_beside_the_first_row() -> None:
    desk = Desk()
    desk.send()
    desk.sink.answer = Taken(0x0111, "different_content", "Another data set lies there.")
    assert desk.send() == 0x0111
    assert (desk.row.state, desk.row.reason) == ("conflict", "different_content")


def test_one_that_comes_on_two_associations_at_a_time_fills_one_record_once() -> None:
    desk = Desk()
    other = Receiver(desk.receiver._intake, 8)
    request = StoreRequest(1, CT, EXPLICIT_LE, CT, SOP)
    for receiver in (desk.receiver, other):
        receiver.begin(request)
        receiver.data(memoryview(data_set()), True)
    first, second = desk.receiver._instance, other._instance
    assert first is desk.row
    assert second is not None
    assert second is not first
    assert second.key == first.key
    assert other.finish() == 0x0000
    assert desk.state.missing() == [desk.row]
    assert desk.receiver.finish() == 0x0000
    after = desk.row
    assert (after.state, after.association) == ("stored", 7)


def test_of_two_at_a_time_that_differ_the_conflict_stays() -> None:
    desk = Desk()
    other = Receiver(desk.receiver._intake, 8)
    for receiver in (desk.receiver, other):
        receiver.begin(StoreRequest(1, CT, EXPLICIT_LE, CT, SOP))
        receiver.data(memoryview(data_set()), True)
    desk.sink.answer = Taken(0x0111, "different_content", "Another data set lies there.")
    assert other.finish() == 0x0111
    desk.sink.answer = Taken(0x0000)
    assert desk.receiver.finish() == 0x0000
    assert (desk.row.state, desk.row.reason) == ("conflict", "different_content")


def test_a_record_that_was_abandoned_is_filled_by_the_next() -> None:
    desk = Desk()
    desk.receiver.begin(StoreRequest(1, CT, EXPLICIT_LE, CT, SOP))
    desk.receiver.data(memoryview(data_set()), False)
    desk.receiver.abandon()
    next_one = Receiver(desk.receiver._intake, 8)
    next_one.begin(StoreRequest(1, CT, EXPLICIT_LE, CT, SOP))
    next_one.data(memoryview(data_set()), True)
    assert next_one.finish() == 0x0000
    assert (desk.row.state, desk.row.association) == ("stored", 8)


@pytest.mark.parametrize(
    ("listed", "came", "lossy", "exactness"),
    [
        (None, EXPLICIT_LE, "", "peer_choice"),
        (None, EXPLICIT_LE, "01", "converted"),
        (None, JPEG, "01", "as_received"),
        (None, JPEG_LOSSLESS, "", "as_received"),
        (EXPLICIT_LE, EXPLICIT_LE, "", "as_listed"),
        (JPEG_LOSSLESS, EXPLICIT_LE, "", "converted"),
    ],
)
def test_exactness(listed: str | None, came: str, lossy: str, exactness: str) -> None:
    desk = Desk(listed_syntax=listed)
    desk.send(data_set(lossy=lossy), syntax=came)
    assert desk.row.exactness == exactness


def test_require_exact_refuses_what_may_be_converted() -> None:
    desk = Desk(require_exact=True)
    assert desk.send() == 0xA900
    assert (desk.row.state, desk.row.reason, desk.sink.taken) == ("failed", "syntax_refused", {})


@pytest.mark.parametrize(
    ("error", "reason", "stop"),
    [
        (DestinationFull("There is no room left."), "destination_full", "destination_full"),
        (SinkError("It cannot be written."), "destination_error", None),
    ],
)
def test_a_destination_that_fails_costs_the_instance(error: SinkError, reason: str, stop: str | None) -> None:
    desk = Desk()
    desk.sink.write_error = error
    assert desk.send() == 0xA700
    assert (desk.row.state, desk.row.reason, desk.state.stop_reason) == ("failed", reason, stop)
    assert desk.source.cancel.reason == stop
    assert desk.sink.aborted == 1


def test_an_object_without_a_data_set_is_refused() -> None:
    desk = Desk()
    desk.receiver.begin(StoreRequest(1, CT, EXPLICIT_LE, CT, SOP))
    assert desk.receiver.finish() == 0xC000
    assert (desk.row.state, desk.row.reason) == ("failed", "empty_dataset")


def test_what_will_never_be_whole_is_aborted() -> None:
    desk = Desk()
    desk.receiver.begin(StoreRequest(1, CT, EXPLICIT_LE, CT, SOP))
    desk.receiver.data(memoryview(data_set()), False)
    desk.receiver.abandon()
    assert desk.sink.aborted == 1
    assert desk.state.missing() == [desk.row]


def test_no_answer_is_late() -> None:
    desk = Desk()
    desk.receiver.begin(StoreRequest(1, CT, EXPLICIT_LE, CT, SOP))
    desk.receiver.data(memoryview(data_set()), True)
    desk.receiver.came_at -= desk.source.deadlines.sub_operation + 1
    with pytest.raises(DestinationSlow, match="sub_operation"):
        desk.receiver.finish()
    assert desk.row.state == "stored"  # what it keeps counts


def test_one_left_to_the_destination_counts_when_it_is_confirmed() -> None:
    desk = Desk()
    desk.sink.take_error = ForwardLate("It has not answered yet.")
    with pytest.raises(ForwardLate):
        desk.send()
    assert desk.state.missing() == [desk.row]
    desk.sink.due = [Confirmation(desk.row)]
    desk.receiver.answered()
    assert desk.row.state == "forwarded"


@pytest.mark.parametrize(("error", "status"), [(None, 0x0000), ("The disk failed.", 0xA700)])
def test_ack_durable_answers_once_it_is_confirmed(error: str | None, status: int) -> None:
    desk = Desk(ack="durable")
    desk.sink.due = [Confirmation(desk.row, error)]
    assert desk.send() == status


def test_after_each_answer_the_limits_are_held() -> None:
    desk = Desk(limit="window")
    desk.send()
    assert desk.state.stop_reason == desk.source.cancel.reason == "window"
