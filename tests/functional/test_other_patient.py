"""Objects of another patient in a study that was asked for by Patient ID: kept, for merges are honest, and said."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from airflow_dicom_get import GetScu
from airflow_dicom_get.testing.misbehave import MisbehavingPacs
from airflow_dicom_get.testing.misbehaving.archive import PATIENT_ID
from airflow_dicom_get.testing.misbehaving.wire import FIND

WORD = "other_patient_id"


def test_they_are_stored_with_a_remark(place: dict[str, Any], caplog: pytest.LogCaptureFixture) -> None:
    with MisbehavingPacs("other_patient") as pacs:
        scu = GetScu(f"PACS@127.0.0.1:{pacs.port}", **place)
        for skipped in (0, 8):  # the ledger keeps it
            result = scu.get_study({"PatientID": PATIENT_ID})
            assert (result.verdict, result.completed, result.skipped, result.warning) == ("complete", 8, skipped, 8)
            assert set(result.manifest["reason"]) == {WORD}
            assert [(e["count"], e["error"].split(":")[0]) for e in result.errors] == [(8, WORD)]
            assert "merged" in result.errors[0]["hint"]
    assert PATIENT_ID not in str(result.errors) + caplog.text


@pytest.mark.parametrize(
    ("query", "model", "warned"),
    [
        ({"StudyInstanceUID": "UID"}, "StudyRoot", 0),
        ({"StudyInstanceUID": "UID", "PatientID": PATIENT_ID}, "StudyRoot", 8),
        ({"StudyInstanceUID": "UID"}, "PatientRoot", 8),  # whose requests name the patient
        ({"AccessionNumber": "HOSTILE-ACC"}, "StudyRoot", 0),
    ],
)
def test_of_what_was_asked_for_by_patient_id(tmp_path: Path, query: dict[str, str], model: str, warned: int) -> None:
    with MisbehavingPacs("other_patient") as pacs:
        asked = {key: pacs.study_uid if value == "UID" else value for key, value in query.items()}
        scu = GetScu(f"PACS@127.0.0.1:{pacs.port}", destination=tmp_path)
        result = scu.get_study(asked, query_model=model)
    assert (result.verdict, result.warning) == ("complete", warned)


@pytest.mark.parametrize("param", [f" {PATIENT_ID}  ", ""])
def test_padding_and_no_id_are_no_other_patient(tmp_path: Path, param: str) -> None:
    with MisbehavingPacs("other_patient", param=param) as pacs:
        result = GetScu(f"PACS@127.0.0.1:{pacs.port}", destination=tmp_path).get_study({"PatientID": PATIENT_ID})
    assert (result.verdict, result.warning) == ("complete", 0)


def test_without_a_list_the_id_that_was_asked_for_counts(tmp_path: Path) -> None:
    with MisbehavingPacs("other_patient") as pacs:
        scu = GetScu(f"PACS@127.0.0.1:{pacs.port}", destination=tmp_path)
        pacs._scp.well.refused_classes = frozenset(FIND)
        try:
            query = {"StudyInstanceUID": pacs.study_uid, "PatientID": PATIENT_ID}
            result = scu.get_study(query, query_model="PatientRoot")
        finally:
            pacs._scp.well.refused_classes = frozenset()
    assert (result.verdict, result.reason, result.warning) == ("unverified", "no_list", 8)
