"""What comes without end and brings nothing: it fills no memory and no log, and no deadline waits for its end."""

from __future__ import annotations

import itertools
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, ClassVar

import pytest
from pydicom._dicom_dict import DicomDictionary

from airflow_dicom_get import GetScu, clock
from airflow_dicom_get.dicom.part10 import file_header
from airflow_dicom_get.engine import find
from airflow_dicom_get.errors import Cancelled, InvalidQuery, ListTooLong
from airflow_dicom_get.net import transport
from airflow_dicom_get.store import StoreScu
from airflow_dicom_get.testing.misbehave import MisbehavingPacs
from airflow_dicom_get.testing.misbehaving import archive, wire
from airflow_dicom_get.testing.misbehaving.archive import CT, Instance, Row
from airflow_dicom_get.testing.misbehaving.behaviour import (
    ASSOCIATE,
    FIND,
    GET,
    MODE_CLASSES,
    RELEASE,
    Behaviour,
    Retrieval,
    Spoiler,
)
from airflow_dicom_get.testing.misbehaving.wire import Message
from tests.support.certificates import Authority
from tests.support.measured import shell

MIB = 1 << 20


@pytest.fixture
def pacs(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Gives a PACS of a behaviour of these tests."""

    @contextmanager
    def make(behaviour: type[Behaviour] | None, **options: Any) -> Iterator[MisbehavingPacs]:
        if behaviour is not None:
            monkeypatch.setitem(MODE_CLASSES, "of_a_test", behaviour)
        with MisbehavingPacs("of_a_test" if behaviour is not None else None, **{"series": 1, **options}) as server:
            yield server
        assert server.faults == []

    return make


def node(server: MisbehavingPacs) -> str:
    return f"PACS@127.0.0.1:{server.port}"


# --- memory ----------------------------------------------------------------------------------------------


class _DeflatesToNothing(Spoiler):
    """Sends a deflated object of 300 MiB that inflates to nothing: of empty blocks, or behind the end of its stream."""

    def spoil(self, retrieval: Retrieval, instance: Instance, context: int) -> None:
        self.store_command(retrieval, instance, context)
        head, piece = (b"", b"\0\0\0\xff\xff" * 20_000) if self.param == "blocks" else (b"\3\0", bytes(100_000))
        self.send_dataset(context, iter([head, *[piece] * 3000]))
        self.tally(retrieval, instance, self.await_response(retrieval))


@pytest.mark.parametrize("param", ["blocks", "behind its end"])
def test_what_inflates_to_nothing_is_not_kept(pacs: Callable[..., Any], tmp_path: Path, param: str) -> None:
    deflated = {"pairs": [(CT, wire.DEFLATED_LE)], "list_syntaxes": True, "instances": 3}
    with pacs(_DeflatesToNothing, param=param, **deflated) as server:
        status, said, peak = shell(
            "get", node(server), "--study", server.study_uid, "--to", str(tmp_path), "--retries", "0"
        )
    assert status == 3, said
    assert "unparsable" in said
    assert peak < 250, f"{peak} MiB"


class _LongNames(Behaviour):
    """Counts no instances, and sends to each C-GET of a series or a study 300 objects whose UID is text of 1 MB."""

    stages = frozenset({FIND, GET})

    def describe(self, level: str, group: Any) -> dict[int, str]:
        row = super().describe(level, group)
        return {tag: value for tag, value in row.items() if tag not in (0x00201206, 0x00201208, 0x00201209)}

    def before(self, retrieval: Retrieval) -> None:
        if len(retrieval.instances) < 100:
            return
        context = self.context_for(retrieval.instances[0])
        assert context is not None
        for number in range(300):
            fields = self.store_fields(retrieval, retrieval.instances[0])
            fields[wire.INSTANCE] = f"{number}{'x' * 1_000_000}"
            self.link.send_command(context, fields)
            self.link.send_data(context, (b"\0\0",))
            self.link.read()


def test_names_of_what_was_refused_are_not_kept(pacs: Callable[..., Any], tmp_path: Path) -> None:
    with pacs(_LongNames, instances=100, size=600) as server:
        status, said, peak = shell("get", node(server), "--study", server.study_uid, "--to", str(tmp_path))
    assert status in (0, 3), said
    assert "an object with an invalid UID was sent and refused" in said
    assert peak < 250, f"{peak} MiB"


class _LongNamesWhileCounted(Behaviour):
    """Claims one instance more than it lists, and answers the C-GET that counts by long names."""

    stages = frozenset({FIND, GET})

    def describe(self, level: str, group: Any) -> Row:
        row = super().describe(level, group)
        return {tag: str(int(row[tag]) + 1) if tag in (0x00201208, 0x00201209) else row[tag] for tag in row}

    def before(self, retrieval: Retrieval) -> None:
        if self.site.gets < 1:
            return
        for number in range(300):
            fields = self.store_fields(retrieval, retrieval.instances[0]) | {
                wire.INSTANCE: f"{number}{'x' * 1_000_000}",
                wire.DATA_SET_TYPE: wire.NO_DATA_SET,
            }
            self.link.send_command(retrieval.message.context, fields)
            self.link.read()


def test_names_of_what_is_refused_are_not_kept_while_instances_are_counted(
    pacs: Callable[..., Any], tmp_path: Path
) -> None:
    with pacs(_LongNamesWhileCounted, instances=2, size=600) as server:
        status, said, peak = shell("get", node(server), "--study", server.study_uid, "--to", str(tmp_path))
    assert status in (1, 3, 4), said
    assert peak < 250, f"{peak} MiB"


class _ListsLongNames(Behaviour):
    """Lists six series of 900 instances each, whose UIDs are of 60,000 digits."""

    stages = frozenset({FIND})

    def rows(self, level: str, query: Row) -> Iterator[Row]:
        above = {tag: query.get(tag, "") for tag in (0x0020000D, 0x0020000E)}
        for number in range(6 if level == "SERIES" else 900):
            if level == "SERIES":
                yield {**above, 0x00080052: level, 0x0020000E: f"1.2.{number}"}
            else:
                yield {**above, 0x00080052: level, 0x00080018: f"{number}{'9' * 60_000}"}


def test_long_names_that_a_destination_lists_are_cut(pacs: Callable[..., Any], tmp_path: Path) -> None:
    with pacs(_ListsLongNames) as server:
        status, said, peak = shell(
            "verify", "--study", server.study_uid, "--to", f"dicom://{node(server)}", "--manifest-root", str(tmp_path)
        )
    assert status == 4, said[-1000:]  # nothing says what it should have
    assert len(said) < 6 * 900 * 400
    assert peak < 250, f"{peak} MiB"


class _ManySeriesOfOne(Behaviour):
    """Answers for each instance that is named with 1000 rows of 60 KB, each of another series."""

    stages = frozenset({FIND})

    def rows(self, level: str, query: Row) -> Iterator[Row]:
        row = {0x00080052: level, 0x0020000D: self.site.instances[0].study}
        if level == "STUDY":
            yield row
        elif level == "SERIES":
            yield {**row, 0x0020000E: query.get(0x0020000E) or "1.2.3"}
        elif query.get(0x00080018):
            for number in range(1000):
                yield {**row, 0x0020000E: f"1.2.3.{number}", 0x00080018: query[0x00080018], 0x00080016: "9" * 60_000}


def test_what_is_answered_for_instances_that_are_named_does_not_fill_the_memory(
    pacs: Callable[..., Any], tmp_path: Path
) -> None:
    named = "\\".join(f"1.9.{number}" for number in range(5))
    with pacs(_ManySeriesOfOne, max_bytes=4 << 30) as server:
        status, said, peak = shell(
            "plan", node(server), "-k", f"StudyInstanceUID={server.study_uid}", "-k", f"SOPInstanceUID={named}"
        )
    assert status in (0, 4, 5), said[-1000:]
    assert peak < 250, f"{peak} MiB"


class _ManyValues(Behaviour):
    """Answers with 5 rows, of 30,000 numbers of two bytes each."""

    stages = frozenset({FIND})

    def rows(self, level: str, query: Row) -> Iterator[Row]:
        for number in range(5):
            yield {0x00080052: level, 0x0020000D: f"1.2.{number}", 0x00080020: "20240101", 0x00101030: "1\\" * 30_000}


def test_values_of_two_bytes_do_not_fill_the_memory(pacs: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Each becomes an object of some hundred bytes."""
    monkeypatch.setattr(find, "MAX_VALUES", 100_000)
    with pacs(_ManyValues) as server, pytest.raises(ListTooLong, match="more than 100000 elements and values"):
        GetScu(node(server)).find({"StudyDate": "20240101"})


class _LongSeries(Behaviour):
    """Answers with 20 studies, each of 10 series with 60,000 bytes of text."""

    stages = frozenset({FIND})

    def rows(self, level: str, query: Row) -> Iterator[Row]:
        if level == "STUDY":
            for number in range(20):
                yield {0x00080052: level, 0x0020000D: f"1.2.{number}", 0x00080020: "20240101"}
            return
        study = query[0x0020000D]
        for number in range(10):
            uids = {0x0020000D: study, 0x0020000E: f"{study}.{number}"}
            yield {0x00080052: level, **uids, 0x0008103E: "x" * 60_000}


def test_rows_of_many_answers_do_not_fill_the_memory(pacs: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Below a key of the study there is an answer a study, each within its own bound."""
    monkeypatch.setattr(find, "MAX_ANSWER", 2 << 20)
    with pacs(_LongSeries) as server, pytest.raises(ListTooLong, match="more than 2 MiB in response to one find"):
        GetScu(node(server)).find({"StudyDate": "20240101"}, level="SERIES")


class _OtherKeywords(Behaviour):
    """Each row has an attribute that no other one has."""

    stages = frozenset({FIND})

    def rows(self, level: str, query: Row) -> Iterator[Row]:
        tags = [
            tag
            for tag, (vr, _, _, old, _) in sorted(DicomDictionary.items())
            if vr == "LO" and not old and tag >> 16 > 0x10
        ]
        for number, tag in enumerate(tags[:100]):
            yield dict(
                sorted({0x00080020: "20240101", 0x00080052: level, 0x0020000D: f"1.2.{number}", tag: "x"}.items())
            )


def test_a_table_of_rows_that_differ_in_what_they_have_does_not_fill_the_memory(
    pacs: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pacs(_OtherKeywords) as server:
        scu = GetScu(node(server))
        assert len(scu.find({"StudyDate": "20240101"}, as_frame=True)) == 100
        monkeypatch.setattr(find, "MAX_CELLS", 5_000)
        with pytest.raises(ListTooLong, match="more than what makes a table of 5000 cells in response to one find"):
            scu.find({"StudyDate": "20240101"}, as_frame=True)
        assert len(scu.find({"StudyDate": "20240101"})) == 100


class _NamedAlone(Behaviour):
    """Answers lists of instances with nothing, and each of them alone with ten rows of 60,000 bytes of text."""

    stages = frozenset({FIND})
    asked: ClassVar[list[str]] = []
    nested = ""

    def rows(self, level: str, query: Row) -> Iterator[Row]:
        instance = query[0x00080018]
        self.asked.append(instance)
        for number in range(0 if "\\" in instance else 10):
            uids = {0x0020000D: f"1.2.{number}", 0x0020000E: f"1.3.{number}.{'9' * 60_000}", 0x00080018: instance}
            yield {0x00080052: level, **uids, **({0x00081140: self.nested} if self.nested else {})}


class _NamedAloneUnreadable(_NamedAlone):
    """Of the same rows, whose sequences nest too deep."""

    nested = "\xfe\xff\x00\xe0\xff\xff\xff\xff\x08\x00\x40\x11\xff\xff\xff\xff" * 20


NAMED = {"SOPInstanceUID": [f"1.9.{number}" for number in range(6)]}


@pytest.mark.parametrize("behaviour", [_NamedAlone, _NamedAloneUnreadable])
def test_rows_of_named_instances_do_not_fill_the_memory(
    pacs: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, behaviour: type[Behaviour]
) -> None:
    """There is an answer for each of them, each within its own bound."""
    monkeypatch.setattr(find, "MAX_ANSWER", 2 << 20)
    with pacs(behaviour) as server, pytest.raises(ListTooLong, match="more than 2 MiB in response to one find"):
        GetScu(node(server)).find(NAMED, level="IMAGE")


def test_named_instances_are_asked_for_until_there_are_enough(
    pacs: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    monkeypatch.setattr(_NamedAlone, "asked", asked)
    with pacs(_NamedAlone) as server:
        found = GetScu(node(server)).find(NAMED, level="IMAGE", limit=15)
    assert (len(found), found.cut) == (15, True)
    assert asked == ["\\".join(NAMED["SOPInstanceUID"]), *NAMED["SOPInstanceUID"][:2]]


@pytest.mark.parametrize("step", ["dataset_of", "_text"])
def test_a_cancel_is_heard_while_rows_are_made_of_values_that_came(
    pacs: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    """The answer comes within a second, and what is made of it would take minutes."""
    made = []
    with pacs(_ManyValues) as server:
        scu = GetScu(node(server))
        make = getattr(find, step)

        def cancelled(*given: Any) -> Any:
            made.append(given)
            scu.cancel("enough")
            return make(*given)

        monkeypatch.setattr(find, step, cancelled)
        with pytest.raises(Cancelled, match="enough"):
            scu.find({"StudyDate": "20240101"}, as_frame=True)
    assert len(made) < 10  # the elements of one row


class _DecomposedNames(Behaviour):
    """Answers with 40 studies, whose names are of a character that is decomposed to eighteen."""

    stages = frozenset({FIND})

    def rows(self, level: str, query: Row) -> Iterator[Row]:
        for number in range(40):
            name = f"A{number}^{chr(0xFDFA) * 20_000}".encode().decode("latin-1")
            yield {0x00080005: "ISO_IR 192", 0x00080052: level, 0x0020000D: f"1.2.{number}", 0x00100010: name}


def test_names_of_other_patients_do_not_fill_the_memory(pacs: Callable[..., Any]) -> None:
    """All are left out; what is made of one to compare it is not kept."""
    with pacs(_DecomposedNames) as server:
        status, said, peak = shell("find", node(server), "-k", "PatientName=MILLER^ANNA", "--json")
    assert status == 5, said[-1000:]
    assert "its PatientName does not match the query" in said
    assert peak < 180, f"{peak} MiB"


class _LongUidsAgain(Behaviour):
    """Answers the first 40 C-FINDs with the same 100 studies, whose UIDs are of 60,000 digits; then with none."""

    stages = frozenset({FIND})

    def rows(self, level: str, query: Row) -> Iterator[Row]:
        with self.site.lock:
            self.site.gets += 1
            again = self.site.gets <= 40
        for number in range(100 if again else 0):
            day = query[0x00080020].rpartition("-")[2]
            yield {0x00080052: level, 0x0020000D: f"{number}{'9' * 60_000}", 0x00080020: day, 0x00080030: "235959"}


def test_parts_of_an_answer_keep_each_uid_once(pacs: Callable[..., Any]) -> None:
    with pacs(_LongUidsAgain) as server:
        status, said, peak = shell("find", node(server), "-k", "StudyDate=19000101-20991231", "--json")
    assert status == 4, said[-1000:]
    assert peak < 180, f"{peak} MiB"


# --- time ------------------------------------------------------------------------------------------------


class _CharacterSets(Spoiler):
    """Sends an instance with a Specific Character Set of 250,000 names, and a Patient's Name of escape sequences."""

    def spoil(self, retrieval: Retrieval, instance: Instance, context: int) -> None:
        self.store_command(retrieval, instance, context)
        values = {
            0x00080005: "\\" * 250_000,
            0x00080016: instance.sop_class,
            0x00080018: instance.sop,
            0x00100010: "\x1b" * 100_000,
            0x0020000D: instance.study,
            0x0020000E: instance.series,
        }
        elements = [(tag, b"UI" if "." in value else b"PN", value) for tag, value in values.items()]
        self.send_dataset(context, iter([archive.encode(elements, wire.IMPLICIT_LE)]))
        self.tally(retrieval, instance, self.await_response(retrieval))


def test_character_sets_without_end_hold_nobody_up(pacs: Callable[..., Any], tmp_path: Path) -> None:
    with pacs(_CharacterSets, instances=1, pairs=[(CT, wire.IMPLICIT_LE)]) as server:
        scu = GetScu(node(server), destination=tmp_path, tags=["PatientName"], deadlines={"operation": 20.0})
        result = scu.get_study({"StudyInstanceUID": server.study_uid})
    assert result.verdict == "complete", result.errors
    assert result.manifest_uri is not None


class _ClassesWithoutEnd(Behaviour):
    """Names 4,000 SOP classes: for the study, or one for each of as many instances; or as many transfer syntaxes."""

    stages = frozenset({FIND})

    def rows(self, level: str, query: Row) -> Iterator[Row]:
        row = {0x00080052: level, 0x0020000D: self.site.instances[0].study, 0x0020000E: "1.2.3"}
        if level == "IMAGE" and self.param == "instances":
            for number in range(4001):
                yield {**row, 0x00080018: f"1.2.3.{number}", 0x00080016: f"1.2.9.{number}"}
        elif level == "IMAGE" and self.param == "syntaxes":
            for number in range(4001):
                yield {**row, 0x00080018: f"1.2.3.{number}", 0x00080016: CT, 0x00083002: f"1.2.9.{number}"}
        elif level == "STUDY" and self.param == "study":
            yield {**row, 0x00080062: "\\".join(f"1.2.{number}" for number in range(4000))}
        else:
            yield {**row, 0x00080018: "1.2.3.4"}


def test_classes_without_end_are_not_asked_for_one_after_the_other(pacs: Callable[..., Any], tmp_path: Path) -> None:
    with pacs(_ClassesWithoutEnd, param="study") as server:
        scu = GetScu(node(server), destination=tmp_path, deadlines={"operation": 30.0})
        result = scu.get_study({"StudyInstanceUID": server.study_uid})
    assert (result.verdict, result.reason) == ("failed", "not_sent")
    assert server.associations < 100
    with pacs(_ClassesWithoutEnd, param="instances") as server:
        plan = GetScu(node(server)).plan({"StudyInstanceUID": server.study_uid})
    assert (plan.instances, len(plan.classes)) == (4001, 201)
    assert plan.associations < 50
    with pacs(_ClassesWithoutEnd, param="syntaxes") as server:
        plan = GetScu(node(server)).plan({"StudyInstanceUID": server.study_uid})
    assert (plan.instances, plan.associations) == (4001, 1)


class _TwiceAsMany(Behaviour):
    """Says of each series that it has two instances, and lists one."""

    stages = frozenset({FIND})

    def describe(self, level: str, group: Any) -> Row:
        row = super().describe(level, group)
        return {**row, 0x00201209: "2"} if 0x00201209 in row else row


def test_series_without_end_are_not_counted_one_after_the_other(pacs: Callable[..., Any], tmp_path: Path) -> None:
    """Where the query narrows the study, whose own count then tells nothing of them."""
    with pacs(_TwiceAsMany, series=150, instances=1, size=600) as server:
        query = {"StudyInstanceUID": server.study_uid, "Modality": "CT"}
        scu = GetScu(node(server), destination=tmp_path)
        for _ in range(2):
            result = scu.get_study(query)
            assert (result.verdict, result.reason, result.completed) == ("unverified", "list_contradicted", 150)
        assert server.associations < 220


class _InEveryStudy(Behaviour):
    """Says that a series lies in 300,000 studies, which is more rows than any answer may have."""

    stages = frozenset({FIND})

    def rows(self, level: str, query: Row) -> Iterator[Row]:
        for number in range(0 if query.get(0x0020000D) else 300_000):
            yield {0x00080052: level, 0x0020000D: f"1.2.{number}", 0x0020000E: query[0x0020000E]}


def test_a_series_that_is_said_to_lie_in_thousands_of_studies(pacs: Callable[..., Any], tmp_path: Path) -> None:
    """It is refused at the first that is too many, and not at the end of the answer."""
    with pacs(_InEveryStudy) as server:
        with pytest.raises(InvalidQuery, match="matches more than 101 studies; max_studies is 100"):
            GetScu(node(server), destination=tmp_path).get_study({"SeriesInstanceUID": "1.2.3"})
        assert server.associations == 1


class _Collisions(Behaviour):
    """Answers a release by a thousand requests of its own."""

    stages = frozenset({RELEASE})

    def release(self) -> None:
        self.link.send(wire.pdu(wire.RELEASE_RQ, bytes(4)) * 1000)
        with suppress(wire.GoneError):
            while self.link.read_pdu()[0] == wire.RELEASE_RP:
                with self.site.lock:
                    self.site.gets += 1
        self.site.finals.append(self.site.gets)


def test_collisions_of_releases_without_end_are_answered_once(pacs: Callable[..., Any]) -> None:
    with pacs(_Collisions) as server:
        assert GetScu(node(server)).echo().accepted["C-ECHO"]
    assert server.finals == [1]


class _DataSetsOfOthers(Behaviour):
    """Sends messages that have nothing to do with an object, with data sets cut so that each read ends within one."""

    stages = frozenset({GET})

    def get(self, message: Message) -> None:
        fields: dict[int, wire.Value] = {wire.FIELD: wire.N_CREATE, wire.MESSAGE_ID: 7}
        if self.param == "pending":
            fields = {wire.FIELD: wire.C_GET | wire.RESPONSE, wire.STATUS: 0xFF00,
                      wire.RESPONDED_ID: message.number(wire.MESSAGE_ID)}  # fmt: skip
        command = wire.command({**fields, wire.DATA_SET_TYPE: wire.WITH_DATA_SET})
        begin = wire.p_data(message.context, 3, command) + wire.p_data(message.context, 0, bytes(1000))
        self.link.send(begin)
        while True:
            self.link.wait(0.2)
            self.link.send(wire.p_data(message.context, 2, bytes(1000)) + begin)


@pytest.mark.parametrize("param", ["pending", "request"])
def test_data_sets_of_other_messages_are_no_progress(pacs: Callable[..., Any], tmp_path: Path, param: str) -> None:
    with pacs(_DataSetsOfOthers, param=param, instances=2, max_seconds=30.0) as server:
        scu = GetScu(node(server), destination=tmp_path, retries=0, deadlines={"next_object": 1.0})
        result = scu.get_study({"StudyInstanceUID": server.study_uid})
    assert (result.verdict, result.reason) == ("failed", "deadline")
    assert "sent no instance within 1 s" in str(result.errors)


class _EmptyFragments(Behaviour):
    """Begins a command, or the identifier of its final response, and goes on with fragments that hold nothing."""

    stages = frozenset({GET})

    def get(self, message: Message) -> None:
        flags = wire.COMMAND_BIT
        if self.param == "identifier":
            flags = 0
            self.send_response(message, {wire.FIELD: wire.C_GET | wire.RESPONSE, wire.STATUS: 0xB000,
                                         wire.RESPONDED_ID: message.number(wire.MESSAGE_ID)}, b"")  # fmt: skip
        self.link.send(wire.p_data(message.context, flags, b"\0\0"))
        while True:
            self.link.send(wire.p_data(message.context, flags, b"") * 500)
            time.sleep(0.02)

    def send_response(self, message: Message, fields: dict[int, wire.Value], data: bytes = b"") -> None:
        self.link.send_command(message.context, {**fields, wire.DATA_SET_TYPE: wire.WITH_DATA_SET})


@pytest.mark.parametrize("param", ["command", "identifier"])
def test_fragments_that_hold_nothing_are_no_progress(pacs: Callable[..., Any], tmp_path: Path, param: str) -> None:
    with pacs(_EmptyFragments, param=param, instances=2, max_seconds=60.0) as server:
        scu = GetScu(node(server), destination=tmp_path, retries=0, deadlines={"next_object": 1.0, "idle": 30.0})
        result = scu.get_study({"StudyInstanceUID": server.study_uid})
    assert (result.verdict, result.reason) == ("failed", "deadline")
    assert "sent no instance within 1 s" in str(result.errors)


class _LastIdentifierWithoutEnd(Behaviour):
    """Sends the identifier of its final response a piece at a time, and fast enough for every deadline."""

    stages = frozenset({GET})

    def before(self, retrieval: Retrieval) -> None:
        message = retrieval.message
        fields: dict[int, wire.Value] = {wire.STATUS: 0xB000, wire.DATA_SET_TYPE: wire.WITH_DATA_SET}
        fields |= {wire.FIELD: wire.C_GET | wire.RESPONSE, wire.RESPONDED_ID: message.number(wire.MESSAGE_ID)}
        self.link.send_command(message.context, fields)
        while True:
            self.link.send(wire.p_data(message.context, 0, bytes(400)))
            self.link.wait(0.1)


class _Unread(Behaviour):
    """Sends requests, and reads no answer to them."""

    stages = frozenset({GET})

    def before(self, retrieval: Retrieval) -> None:
        request = {wire.FIELD: wire.C_ECHO, wire.MESSAGE_ID: 7, wire.DATA_SET_TYPE: wire.NO_DATA_SET}
        self.link.flood(wire.p_data(retrieval.message.context, 3, wire.command(request)) * 1000)


@pytest.mark.parametrize("behaviour", [_LastIdentifierWithoutEnd, _Unread])
def test_a_cancel_is_heard_whatever_comes_and_is_not_read(
    pacs: Callable[..., Any], tmp_path: Path, behaviour: type[Behaviour]
) -> None:
    with pacs(behaviour, instances=2) as server:
        scu = GetScu(node(server), destination=tmp_path, retries=0, deadlines={"next_object": 40.0, "idle": 40.0})
        at: list[float] = []

        def cancel() -> None:
            at.append(time.monotonic())
            scu.cancel("enough")

        timer = threading.Timer(4, cancel)
        timer.start()
        result = scu.get_study({"StudyInstanceUID": server.study_uid})
        waited = time.monotonic() - at[0]
        timer.join()
    assert (result.verdict, result.reason) == ("cancelled", "enough")
    assert waited < 10


# --- a destination that reads a little at a time -------------------------------------------------------------


def _read_slowly(listener: socket.socket, ended: threading.Event) -> None:
    """Accept one association, and take 4 KB of what follows every tenth of a second."""
    connection, _ = listener.accept()
    with connection:
        head = connection.recv(6, socket.MSG_WAITALL)
        request = wire.parse_associate(connection.recv(int.from_bytes(head[2:], "big"), socket.MSG_WAITALL))
        answers = [wire.Answer(one.id, 0, one.abstract, one.syntaxes[:1]) for one in request.proposals]
        connection.sendall(wire.associate_accept(request, answers, [], 131072, b"SLOW"))
        while not ended.wait(0.1) and connection.recv(4000):
            pass


@pytest.mark.parametrize("ends", ["operation", "cancel"])
def test_who_reads_a_little_at_a_time_holds_nobody_up(tmp_path: Path, ends: str) -> None:
    """The kernel takes some of what is sent each time, and so never says that nothing goes."""
    (instance,) = archive.build(series=1, instances=1, size=20_000_000, pairs=((archive.CT, wire.EXPLICIT_LE),))
    path = tmp_path / "one.dcm"
    head = file_header(instance.sop_class, instance.sop, instance.syntax, calling="A", called="B")
    path.write_bytes(head + instance.dataset())
    ended = threading.Event()
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2304)
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        server = threading.Thread(target=_read_slowly, args=(listener, ended))
        server.start()
        deadlines = {"operation": 2.0} if ends == "operation" else {}
        scu = StoreScu(f"SLOW@127.0.0.1:{listener.getsockname()[1]}", deadlines=deadlines, retries=0,
                       manifest_root=tmp_path / "manifests")  # fmt: skip

        def cancel_twice() -> None:
            scu.cancel("enough")
            scu.cancel("at once")

        timer = threading.Timer(2, cancel_twice)
        if ends == "cancel":
            timer.start()
        began = time.monotonic()
        result = scu.store(str(path))
        took = time.monotonic() - began
        ended.set()
        server.join()
    assert result.verdict == ("cancelled" if ends == "cancel" else "failed")
    assert result.manifest_uri is not None
    assert took < 15
    assert not [thread.name for thread in threading.enumerate() if thread.name.startswith("dicom-get-run")]


# --- the log ---------------------------------------------------------------------------------------------


class _ContextsWithoutEnd(Behaviour):
    """Fills its A-ASSOCIATE-AC up to 1 MiB with contexts that were never proposed, or are answered twice."""

    stages = frozenset({ASSOCIATE})

    def answer(self, accept: bytes) -> None:
        body = accept[6:]
        strange = b"".join(bytes((0x21, 0, 0, 4, number, 0, 0, 0)) for number in (1, 2, 3, 4, 253, 255))
        self.link.send(wire.pdu(wire.ASSOCIATE_AC, body + strange * ((MIB - len(body)) // len(strange))))


def test_contexts_without_end_are_remarked_on_once(pacs: Callable[..., Any]) -> None:
    with pacs(_ContextsWithoutEnd) as server:
        status, said, _ = shell("echo", node(server))
    assert status == 0, said[-1000:]
    assert 1 <= said.count("never proposed") <= 10


class _StrangeEachTime(Behaviour):
    """Answers contexts that were never proposed over each association, and hangs up after each instance."""

    stages = frozenset({ASSOCIATE, GET})

    def answers_sent(self, request: Any) -> list[wire.Answer]:
        answers = self.link.answers
        return [*answers, *(wire.Answer(number, 0, answers[0].abstract, answers[0].syntaxes) for number in (250, 252))]

    def operate(self, retrieval: Retrieval, instance: Instance) -> None:
        super().operate(retrieval, instance)
        self.link.send(wire.pdu(7, bytes(4)))
        self.link.hold()


def test_what_each_association_of_a_run_shows_is_remarked_on_once(
    pacs: Callable[..., Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with pacs(_StrangeEachTime, instances=4) as server:
        scu = GetScu(node(server), destination=tmp_path)
        for _ in range(2):
            caplog.clear()
            result = scu.get_study(
                {"StudyInstanceUID": server.study_uid},
            )
            assert result.associations > 1
            assert caplog.text.count("never proposed") == 2
    assert result.verdict == "complete"


class _LongRowEachTime(Behaviour):
    """Lists each of twenty series by one row of more than 64 KiB."""

    stages = frozenset({FIND})

    def rows(self, level: str, query: Row) -> Iterator[Row]:
        above = {tag: query.get(tag, "") for tag in (0x0020000D, 0x0020000E)} | {0x00080052: level}
        if level != "IMAGE":
            for number in range(20 if level == "SERIES" else 1):
                yield {**above, 0x0020000E: f"1.2.{number}"}
        else:
            yield {**above, 0x00080018: "1.2.3", 0x00101030: "1" * 70000}


def test_rows_that_are_too_long_in_each_search_of_a_run_are_remarked_on_once(pacs: Callable[..., Any]) -> None:
    with pacs(_LongRowEachTime) as server:
        status, said, _ = shell("plan", node(server), "--study", server.study_uid)
    assert said.count("more than 64 KiB") == 1, (status, said[-2000:])


class _CountsDown(Behaviour):
    """Sends no instance, and counts those that remain down from 65,534."""

    stages = frozenset({GET})
    told = 0

    def get(self, message: Message) -> None:
        retrieval = Retrieval(message, [])
        for remaining in range(65534, 65500, -1):
            type(self).told += 1
            self.get_response(
                retrieval, 0xFF00, {wire.REMAINING: remaining, wire.COMPLETED: 0, wire.FAILED: 0, wire.WARNING: 0}
            )
            time.sleep(0.4)


def test_a_number_of_remaining_ones_is_progress_as_often_as_instances_are_listed(
    pacs: Callable[..., Any], tmp_path: Path
) -> None:
    _CountsDown.told = 0
    with pacs(_CountsDown, instances=2) as server:
        scu = GetScu(node(server), destination=tmp_path, retries=0, deadlines={"next_object": 1.0})
        result = scu.get_study({"StudyInstanceUID": server.study_uid})
    assert (result.verdict, result.reason) == ("failed", "deadline")
    assert _CountsDown.told < 10


class _ZerosWithoutEnd(Behaviour):
    """Answers with the Patient ID that was asked for, behind more zeros in each row."""

    stages = frozenset({FIND})

    def rows(self, level: str, query: Row) -> Iterator[Row]:
        for number in range(1, 250):
            yield {0x00080052: level, 0x0020000D: f"1.2.{number}", 0x00100020: f"{'0' * number}1"}


def test_rows_that_are_left_out_are_summed_up(pacs: Callable[..., Any]) -> None:
    with pacs(_ZerosWithoutEnd) as server:
        rows = GetScu(node(server)).find({"PatientID": "1"})
    assert rows == []
    assert 1 < len(rows.remarks) <= 65
    assert sum(remark["count"] for remark in rows.remarks) == 249


class _LongIds(Behaviour):
    """Lists three studies: of a Patient ID as long as it may be, with padding behind it, and of longer ones."""

    stages = frozenset({FIND})

    def rows(self, level: str, query: Row) -> Iterator[Row]:
        for number, patient in enumerate(("P" * 64 + " " * 400, "P" * 257, "P" * 60_000)):
            yield {0x00080052: level, 0x0020000D: f"1.2.{number}", 0x00080020: "20240101", 0x00100020: patient}


def test_a_patient_id_longer_than_any_costs_its_row(pacs: Callable[..., Any]) -> None:
    """It is kept for each study of a list, and keys are never cut."""
    with pacs(_LongIds) as server:
        rows = GetScu(node(server)).find({"StudyDate": "20240101"}, return_keys=["PatientID"])
    assert [(row.StudyInstanceUID, len(row.PatientID)) for row in rows] == [("1.2.0", 64)]
    assert rows.doubt == "list_contradicted"


class _Unreadable(Behaviour):
    """Answers with 2,000 rows that cannot be read."""

    stages = frozenset({FIND})

    def find(self, message: Message) -> None:
        for _ in range(2000):
            self.respond(message, 0xFF00, b"\x08\0\x05\0\xff\0\0\0")
        self.respond(message, 0x0000)


def test_rows_that_cannot_be_read_are_said_once(pacs: Callable[..., Any]) -> None:
    with pacs(_Unreadable) as server:
        status, said, _ = shell("find", node(server), "-k", "StudyDate=20240101")
    assert (status, said.count("cannot be read")) == (1, 2), said[-1000:]
    assert "2000 rows" in said


# --- TLS -------------------------------------------------------------------------------------------------


@contextmanager
def flooding(data: bytes, most: float = 60.0) -> Iterator[tuple[int, threading.Event]]:
    """A server that sends the same bytes until a client hangs up, at most so many seconds; its port, and whether one
    has hung up."""
    left = threading.Event()

    def flood(listener: socket.socket) -> None:
        with suppress(OSError):
            while True:
                client, _ = listener.accept()
                limit = time.monotonic() + most
                try:
                    with client:
                        client.settimeout(most)
                        client.recv(16)
                        while time.monotonic() < limit:
                            client.sendall(data)
                except OSError:
                    left.set()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=flood, args=(listener,), daemon=True)
        thread.start()
        yield listener.getsockname()[1], left
        listener.shutdown(socket.SHUT_RDWR)
    thread.join(most)


def test_a_handshake_without_end_ends_at_its_deadline(tmp_path: Path) -> None:
    """HelloRequests, which need no certificate, in the place of a ServerHello; with its manifest, too."""
    hello_requests = (b"\x16\x03\x03\0\4" + bytes(4)) * 20_000
    with flooding(hello_requests) as (port, left):
        authority = Authority(tmp_path, "ours")
        scu = GetScu(
            f"PACS@127.0.0.1:{port}",
            destination=tmp_path / "out",
            retries=0,
            tls={"ca": authority.ca},
            deadlines={"connect": 1.0},
        )
        result = scu.get_study({"StudyInstanceUID": "1.2.3"})
        assert left.wait(60), "it was the server that ended it"
    assert (result.verdict, result.reason) == ("failed", "deadline")
    assert "did not finish the TLS handshake within 1 s" in str(result.errors)
    assert result.manifest_uri is not None


def test_session_tickets_without_end_do_not_hold_up_a_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One call takes in a bounded part of what holds no data, and looks at the time."""
    authority = Authority(tmp_path, "ours")
    pair = authority.issue("server")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(pair.cert, pair.key)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.num_tickets = 700  # 180 KB
    written, over = threading.Event(), threading.Event()

    def serve(listener: socket.socket) -> None:
        client, _ = listener.accept()
        with client, suppress(OSError), context.wrap_socket(client, server_side=True):
            written.set()
            over.wait(60)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 19)
        server = threading.Thread(target=serve, args=(listener,), daemon=True)
        server.start()
        trusted = ssl.create_default_context(cafile=authority.ca)
        line = transport.connect_socket("127.0.0.1", listener.getsockname()[1], 30.0, trusted)
        written.wait(10)  # or until there is no room for more of them on the line
        seconds = itertools.count(time.monotonic())
        monkeypatch.setattr(clock, "monotonic", lambda: next(seconds))
        view = memoryview(bytearray(1 << 18))
        looks = 0
        while line.wait(0) and looks < 2:
            with pytest.raises(TimeoutError):
                line.receive(view)
            looks += 1
        line.close()
        over.set()
    server.join(60)
    assert looks == 2, "all tickets were taken in at once"
