"""The transcript: whatever a query or an answer says, nothing of a patient is in it, and every line is JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from airflow_dicom_get.config.options import ConnectionOptions, GetOptions
from airflow_dicom_get.dicom import command as c
from airflow_dicom_get.dicom import header as h
from airflow_dicom_get.dicom import identifier as i
from airflow_dicom_get.errors import InvalidOption
from airflow_dicom_get.net.acse import Accepted, Proposal
from airflow_dicom_get.net.transcript import (
    HIDDEN,
    FileTranscript,
    MemoryTranscript,
    Transcript,
    line_of,
    transcript_of,
)

FIND, GET, CT = "1.2.840.10008.5.1.4.1.2.2.1", "1.2.840.10008.5.1.4.1.2.2.3", "1.2.840.10008.5.1.4.1.1.2"
MARK = "Zebra"
"""Part of every value that is of a patient."""

VALUES = st.one_of(
    st.just(MARK),
    st.text(max_size=12).map(lambda text: text.replace("\\", "") + MARK),
    st.text(alphabet="0123456789.", max_size=8).map(lambda digits: MARK + digits),
    st.tuples(st.just("1.2.3"), st.just(MARK)).map("\\".join),
)
KEYS = st.one_of(
    st.sampled_from(
        (
            h.STUDY_INSTANCE_UID, h.SERIES_INSTANCE_UID, h.SOP_INSTANCE_UID, h.SOP_CLASS_UID, h.PATIENT_ID,
            i.ACCESSION_NUMBER, i.QUERY_RETRIEVE_LEVEL, i.INSTANCE_AVAILABILITY, i.STUDY_RELATED_INSTANCES,
            i.FAILED_SOP_INSTANCES, h.MODALITY, 0x00100010, 0x00100030, 0x00104000, 0x00080005,
        )
    ),
    st.integers(0x00080000, 0x7FDFFFFF),
)  # fmt: skip
FIELDS = st.sampled_from((c.C_FIND_RQ, c.C_FIND_RSP, c.C_GET_RQ, c.C_GET_RSP, c.C_STORE_RQ, c.C_STORE_RSP, 0x0140))


def command(field: int, elements: Mapping[int, int | str]) -> bytes:
    return c.encode({c.COMMAND_FIELD: field, c.MESSAGE_ID: 1, c.DATASET_TYPE: 1, **elements})


@given(FIELDS, st.dictionaries(KEYS, VALUES, max_size=6), st.booleans(), st.booleans())
def test_no_value_of_a_patient_is_told(field: int, keys: dict[int, str], ours: bool, torn: bool) -> None:
    transcript = MemoryTranscript()
    told = transcript.begin()
    sent = command(field, {c.AFFECTED_SOP_CLASS: MARK, c.AFFECTED_SOP_INSTANCE: f"1.2.{MARK}", c.ERROR_COMMENT: MARK})
    identifier = i.encode_identifier(keys)
    if ours:
        told.sent(1, sent, identifier)
    else:
        stray = len(MARK).to_bytes(4, "little") + MARK.encode()
        raw = sent + b"\x08\0\x58\0" + stray + b"\x10\0\x10\0" + stray
        told.received(1, c.Command(raw), identifier[: -3 if torn else None])
    told.ended("us", "aborted")
    assert len(transcript.entries) == 2
    for entry in transcript.entries:
        line = line_of(entry).decode("ascii")
        assert json.loads(line) == entry
        assert MARK not in line
        assert line.count("\n") == 1


def test_what_a_query_says_and_what_came(monkeypatch: pytest.MonkeyPatch) -> None:
    transcript = MemoryTranscript()
    told = transcript.begin()
    keys: dict[int, Any] = {
        i.QUERY_RETRIEVE_LEVEL: "IMAGE", h.PATIENT_ID: "4711", 0x00100010: "", 0x00091001: "x",
        h.STUDY_INSTANCE_UID: "1.2.3", h.SOP_INSTANCE_UID: ["1.2.3.4", "1.2.3.5"],
    }  # fmt: skip
    told.sent(1, command(c.C_FIND_RQ, {c.AFFECTED_SOP_CLASS: FIND}), i.encode_identifier(keys))
    (entry,) = transcript.entries
    assert entry["level"] == "IMAGE"
    assert entry["keys"] == {
        "(0009,1001)": HIDDEN, "PatientID": HIDDEN, "PatientName": "", "StudyInstanceUID": "1.2.3",
        "SOPInstanceUID": ["1.2.3.4", "1.2.3.5"],
    }  # fmt: skip
    row: dict[int, Any] = {
        0x00100010: "Doe^Jane", h.STUDY_INSTANCE_UID: "1.2.3", i.STUDY_RELATED_INSTANCES: "12",
        i.INSTANCE_AVAILABILITY: "ONLINE",
    }  # fmt: skip
    pending: dict[int, Any] = {c.STATUS: 0xFF00, c.AFFECTED_SOP_CLASS: FIND}
    told.received(1, c.Command(command(c.C_FIND_RSP, pending)), i.encode_identifier(row))
    expected = {"StudyInstanceUID": "1.2.3", "NumberOfStudyRelatedInstances": 12, "InstanceAvailability": "ONLINE"}
    assert transcript.entries[-1]["row"] == expected
    final: dict[int, Any] = {c.STATUS: 0xB000, c.COMPLETED: 2, c.FAILED: 1, c.AFFECTED_SOP_CLASS: GET}
    failed = i.encode_identifier({i.FAILED_SOP_INSTANCES: ["1.2.3.5", "Doe"]})
    told.received(1, c.Command(command(c.C_GET_RSP, final)), failed)
    last = transcript.entries[-1]
    assert (last["status"], last["completed"], last["failed"]) == ("B000", 2, 1)
    assert last["failed_uids"] == ["1.2.3.5", HIDDEN]
    assert "remaining" not in last


def test_contexts_roles_and_the_end() -> None:
    transcript = MemoryTranscript()
    told = transcript.begin()
    proposals = [Proposal(GET, "1.2.840.10008.1.2"), Proposal(CT, "1.2.840.10008.1.2.1"), Proposal(CT, "1.2.3")]
    told.connecting("h:104", tls=False)
    told.requested("A", "B", proposals, storage_classes=[CT], max_pdu_length=16384)
    told.accepted(Accepted({1: proposals[0]}, {1: 0, 3: 4}, {CT}, {CT}))
    told.received(3, c.Command(command(c.C_STORE_RQ, {c.AFFECTED_SOP_INSTANCE: "1.2.9", c.AFFECTED_SOP_CLASS: CT})))
    told.data(100)
    told.ended("peer", "aborted", {"source": 2, "reason": 1})
    told.ended("us", "closed")
    connect, request, accept, store, end = transcript.entries
    assert {entry["association"] for entry in transcript.entries} == {1}
    assert (connect["node"], connect["tls"], connect["transcript"]) == ("h:104", False, 1)
    assert [context["id"] for context in request["contexts"]] == [1, 3, 5]
    assert request["roles"] == [{"sop_class": CT, "scu": False, "scp": True}]
    assert [context["abstract_syntax"] for context in accept["accepted"]] == [GET]
    assert (accept["refused"], accept["unanswered"]) == ({"3": 4}, [5])
    assert accept["roles"] == [{"sop_class": CT, "scp": False}]
    assert (store["sop_instance"], store["transfer_syntax"]) == ("1.2.9", "1.2.840.10008.1.2.1")
    assert (end["from"], end["how"], end["source"], end["reason"]) == ("peer", "aborted", 2, 1)
    assert end["unfinished"] == {"sop_instance": "1.2.9", "bytes": 100}


def test_the_option_is_a_file_or_a_transcript(tmp_path: Path) -> None:
    made = MemoryTranscript()
    node = {"addr": "A@h:1", "destination": str(tmp_path / "out")}
    assert GetOptions.check({**node, "transcript": made}).transcript is made
    assert transcript_of(made) is made
    assert transcript_of(None) is None
    path = GetOptions.check({**node, "transcript": str(tmp_path / "t.jsonl")}).transcript
    first = transcript_of(path)
    assert isinstance(first, FileTranscript)
    assert transcript_of(path) is first  # a source and a destination number their associations together
    for wrong in (str(tmp_path), 5, ""):
        with pytest.raises(InvalidOption, match="transcript"):
            GetOptions.check({**node, "transcript": wrong})
    assert issubclass(GetOptions, ConnectionOptions)


def test_a_file_that_cannot_be_written_is_said_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    transcript: Transcript = FileTranscript(tmp_path / "new" / "t.jsonl")
    transcript.begin().ended("us", "closed")
    (tmp_path / "new" / "t.jsonl").unlink()
    (tmp_path / "new" / "t.jsonl").mkdir()
    for _ in range(3):
        transcript.begin().ended("us", "closed")
    assert len(caplog.records) == 1
    assert "transcript" in caplog.text
