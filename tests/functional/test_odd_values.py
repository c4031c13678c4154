"""Values that cannot be read cost themselves, and are printed nowhere: not into logs, and not into warnings."""

from __future__ import annotations

import logging
import os
import struct
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from airflow_dicom_get import GetScu
from airflow_dicom_get.cli.main import main
from airflow_dicom_get.errors import OperationFailed
from airflow_dicom_get.lists.matching import LONGEST_ID
from airflow_dicom_get.notebook import read_instances
from airflow_dicom_get.testing.misbehave import MisbehavingPacs
from airflow_dicom_get.testing.misbehaving import modes_object
from airflow_dicom_get.testing.misbehaving.behaviour import FIND, MODE_CLASSES, Behaviour
from airflow_dicom_get.testing.misbehaving.wire import Message

PATIENT_ID = 0x00100020
KEYS = ["SeriesNumber", "InstanceNumber", "StudyTime", "Modality"]


@pytest.fixture
def pacs() -> Iterator[MisbehavingPacs]:
    with MisbehavingPacs("odd_values") as running:
        yield running
    assert running.faults == []


def test_in_process(pacs: MisbehavingPacs, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    study = {"StudyInstanceUID": pacs.study_uid}
    scu = GetScu(f"PACS@127.0.0.1:{pacs.port}", destination=tmp_path, tags=["PatientID", "SeriesNumber", "StudyDate"])
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        for level in ("STUDY", "SERIES", "IMAGE"):
            for as_frame in (False, True):
                rows: Any = scu.find(study, level=level, return_keys=KEYS, as_frame=as_frame)
                assert len(rows) == {"STUDY": 1, "SERIES": 2, "IMAGE": 8}[level]
        assert {row.SeriesNumber for row in scu.find(study, level="SERIES")} == {None}
        assert scu.plan(study).instances == 8
        result = scu.get_study(study)
    assert [warning for warning in seen if "HOSTILE" in str(warning.message)] == []
    assert "HOSTILE^" not in caplog.text
    assert (result.verdict, result.completed) == ("complete", 8)
    table = result.manifest
    assert table["instance_number"].isna().all()
    assert table["series_number"].isna().all()
    assert set(table["SeriesNumber"]) == {"HOSTILE^PATIENT"}  # a column that was asked for is as it came


class _Sequence(Behaviour):
    """Answers with a row whose sequence has a private creator of two values, of which pydicom warns."""

    stages = frozenset({FIND})

    def find(self, message: Message) -> None:
        item = _element(0x00090010, b"HOSTILE^PATIENT\\X") + _element(0x00091001, b"ab")
        inner = _element(0xFFFEE000, item)
        self.respond(message, 0xFF00, _element(0x00081110, inner) + _element(0x0020000D, b"1.2.3"))
        self.respond(message, 0)


def _element(tag: int, value: bytes) -> bytes:
    value += b" " * (len(value) & 1)
    return struct.pack("<HHI", tag >> 16, tag & 0xFFFF, len(value)) + value


def test_a_sequence_has_no_column(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(MODE_CLASSES, "sequence", _Sequence)
    with MisbehavingPacs("sequence") as server, warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        frame: Any = GetScu(f"PACS@127.0.0.1:{server.port}").find({"StudyInstanceUID": "1.2.3"}, as_frame=True)
    assert list(frame.columns) == ["StudyInstanceUID"]
    assert [warning for warning in seen if "HOSTILE" in str(warning.message)] == []


def test_in_a_notebook(pacs: MisbehavingPacs, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """pydicom reads the character set of each instance, and would print names of it that it does not know."""
    caplog.set_level(logging.DEBUG)
    result = GetScu(f"PACS@127.0.0.1:{pacs.port}", destination=tmp_path).get_study({"StudyInstanceUID": pacs.study_uid})
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        assert len(read_instances(result.manifest)) == 8
    assert seen == []
    assert "HOSTILE^" not in caplog.text
    logging.getLogger("pydicom").warning("of others")
    assert "of others" in caplog.text


@pytest.mark.parametrize("verb", ["find", "get"])
def test_in_the_shell(pacs: MisbehavingPacs, tmp_path: Path, verb: str) -> None:
    call = [sys.executable, "-W", "always", "-m", "airflow_dicom_get.cli", verb, f"PACS@127.0.0.1:{pacs.port}"]
    call += ["--study", pacs.study_uid, "--verbose"]
    call += ["--to", str(tmp_path)] if verb == "get" else ["--level", "IMAGE", "--return-key", "PatientName"]
    done = subprocess.run(call, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert "HOSTILE^" not in done.stderr
    assert ("HOSTILE^" in done.stdout) == (verb == "find")


# --- sequences in sequences ----------------------------------------------------------------------------


def test_a_row_of_sequences_without_end_is_lost_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with MisbehavingPacs("find_nested") as pacs:
        node, study = f"PACS@127.0.0.1:{pacs.port}", {"StudyInstanceUID": pacs.study_uid}
        scu = GetScu(node, destination=tmp_path)
        with pytest.raises(OperationFailed, match="1 row that cannot be read: its sequences nest deeper than 16"):
            scu.find(study)
        assert main(["find", node, "--study", pacs.study_uid]) == 1
        assert "deeper than 16" in capsys.readouterr().err
        assert scu.get_study(study).verdict == "complete"  # which reads no sequences
    with MisbehavingPacs("find_nested", param=16) as pacs:
        scu = GetScu(f"PACS@127.0.0.1:{pacs.port}")
        assert len(scu.find({"StudyInstanceUID": pacs.study_uid}, level="IMAGE")) == 8


# --- anything ------------------------------------------------------------------------------------------

_JUNK = [
    b"9" * 20, b"-9223372036854775809", b"2147483648", b"-1", b"1_0", b"1.0", b"1e400", b"NaN", b"-inf", b"+",
    b"\\\\1", b"SMITH^JOHN", b"20240230", b"99999999", b"-20240101", b"246061", b"\0", b" \0 ", b"\x1b$B",
    b"\x1b(B\x1b", b"\xed\xa0\x80", b"\xff\xfe", b"..", b"1" * 70, b"\\".join([b"1.2"] * 9), b"OFFLINE",
    b"x" * 300, b"\xf0\x9f\x98\x80" * 20, b"\r\n\x1b[31m", b"ISO 2022 IR 87\\ISO 2022 IR 149", b"idna",
    b"unicode_escape", b"undefined", b"GB18030",
]  # fmt: skip
_TAGS = [
    0x00080005, 0x00080020, 0x00080030, 0x00080056, 0x00080060, 0x00080061, 0x00080062, 0x00100010,
    0x00100020, 0x00200010, 0x00200011, 0x00200013, 0x00201206, 0x00201208, 0x00201209,
]  # fmt: skip
_VALUE = st.one_of(st.sampled_from(_JUNK), st.binary(max_size=40))


@settings(
    max_examples=int(os.environ.get("FUZZ_VALUES", "25")),
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(st.dictionaries(st.sampled_from(_TAGS), _VALUE, min_size=1, max_size=6))
@example(dict.fromkeys(_TAGS, b"9" * 20))
@example(dict.fromkeys(_TAGS, b"SMITH^JOHN"))
@example(dict.fromkeys(_TAGS, b"\xed\xa0\x80\0"))
def test_whatever_the_values_are_all_is_held_and_written_down(
    tmp_path_factory: pytest.TempPathFactory, caplog: pytest.LogCaptureFixture, odd: dict[int, bytes]
) -> None:
    """From the bytes of rows and objects to frames and a written manifest: each value costs itself at most."""
    caplog.clear()
    if PATIENT_ID in odd:  # a longer one costs its row: nobody can say whose it is
        odd = {**odd, PATIENT_ID: odd[PATIENT_ID][: 4 * LONGEST_ID]}
    with pytest.MonkeyPatch.context() as patch, MisbehavingPacs("odd_values", series=1, instances=3) as pacs:
        patch.setattr(modes_object, "_ODD", odd)
        scu = GetScu(
            f"PACS@127.0.0.1:{pacs.port}",
            destination=tmp_path_factory.mktemp("to"),
            tags=["PatientName", "PatientID", "StudyDate", "InstanceNumber"],
        )
        for level, number in (("STUDY", 1), ("SERIES", 1), ("IMAGE", 3)):
            asked = {"StudyInstanceUID": pacs.study_uid}
            frame = scu.find(asked, level=level, return_keys=[*KEYS, "PatientBirthDate"], as_frame=True)
            assert len(frame) == number
            frame.to_parquet(tmp_path_factory.mktemp("frame") / "rows.parquet")
        result = scu.get_study({"StudyInstanceUID": pacs.study_uid})
        assert pacs.faults == []
    assert (result.completed, result.expected) == (3, 3)
    assert result.verdict in ("complete", "unverified")
    assert len(result.manifest) == 3
    assert "unexpected" not in caplog.text.lower()
