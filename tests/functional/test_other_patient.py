"""Objects of another patient in a study that was asked for by Patient ID: kept, for merges are honest, and said."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from airflow_dicom_get import GetScu
from airflow_dicom_get.dicom.syntaxes import DEFLATED_LE
from airflow_dicom_get.testing.misbehave import MisbehavingPacs
from airflow_dicom_get.testing.misbehaving import wire
from airflow_dicom_get.testing.misbehaving.archive import CT, PATIENT_ID, Element, deflate, encode
from airflow_dicom_get.testing.misbehaving.behaviour import GET, MODE_CLASSES, Behaviour
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


@pytest.mark.parametrize(("model", "warned"), [("StudyRoot", 0), ("PatientRoot", 8)])
def test_what_a_manifest_asks_for_in_patient_root_is_asked_for_by_patient_id(
    tmp_path: Path, model: str, warned: int
) -> None:
    with MisbehavingPacs("other_patient") as pacs:
        node = f"PACS@127.0.0.1:{pacs.port}"
        first = GetScu(node, destination=tmp_path / "a").get_study({"StudyInstanceUID": pacs.study_uid})
        again = GetScu(node, destination=tmp_path / "b").get_study(manifest=first.manifest_uri, query_model=model)
    assert (again.verdict, first.warning, again.warning) == ("complete", 0, warned)


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


@pytest.fixture
def late_pacs(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Gives a PACS of one instance, behind whose elements others stand; without any, its Patient ID, OTHER."""

    def make(syntax: str, between: Sequence[Element], late: dict[int, str]) -> MisbehavingPacs:
        class Late(Behaviour):
            stages = frozenset({GET})

            def send_dataset(self, context: int, pieces: Any) -> None:
                elements = self.site.instances[0].elements()
                if not late:
                    elements = [one for one in elements if one[0] != 0x00100020]
                behind = late or {0x00100020: "OTHER"}
                ends = [(tag, b"LO" if tag == 0x00100020 else b"UI", value) for tag, value in behind.items()]
                data = encode([*elements, (0x00400001, b"AE", "X "), *between, *ends], syntax)
                super().send_dataset(context, iter([deflate(data) if syntax == DEFLATED_LE else data]))

        monkeypatch.setitem(MODE_CLASSES, "says_it_late", Late)
        return MisbehavingPacs("says_it_late", series=1, instances=1, pairs=[(CT, syntax)])

    return make


@pytest.mark.parametrize(
    ("syntax", "number", "size"),
    [
        (wire.EXPLICIT_LE, 0, 0),
        (wire.IMPLICIT_LE, 0, 0),
        (DEFLATED_LE, 0, 0),
        (wire.EXPLICIT_LE, 100_001, 0),
        (wire.IMPLICIT_LE, 100_001, 0),
        (DEFLATED_LE, 0, 65 << 20),
    ],
)
@pytest.mark.parametrize(
    ("late", "verdict", "reason"),
    [
        ({0x00100020: "OTHER"}, "failed", "unparsable"),
        ({0x0020000D: "1.2.3.4.5", 0x0020000E: "1.2.3.4.6", 0x00080018: "1.2.3.4.7"}, "failed", "unparsable"),
        ({}, "complete", WORD),  # the Patient ID stands there alone
    ],
)
def test_what_stands_behind_the_header_denies_it(
    tmp_path: Path,
    late_pacs: Callable[..., Any],
    syntax: str,
    number: int,
    size: int,
    late: dict[int, str],
    verdict: str,
    reason: str,
) -> None:
    """Readers take an element that stands out of order, or the second of two, for that of the data set."""
    between = [(0x00410010, b"LO", "X")] * number + [(0x00411001, b"OB", bytes(size))]
    with late_pacs(syntax, between, late) as pacs:
        result = GetScu(f"PACS@127.0.0.1:{pacs.port}", destination=tmp_path).get_study({"PatientID": PATIENT_ID})
    assert (result.verdict, *result.manifest["reason"]) == (verdict, reason)
    assert ("stands in it twice" in str(result.errors)) == bool(late)
    assert len(list(tmp_path.rglob("*.dcm"))) == (verdict == "complete")


@pytest.mark.parametrize("late", [{}, {0x00100020: "OTHER"}])
def test_what_is_not_followed_to_its_end_has_a_remark(
    tmp_path: Path, late_pacs: Callable[..., Any], late: dict[int, str]
) -> None:
    """A few KB that inflate to elements without measure: what stands behind them nobody has looked at."""
    with late_pacs(DEFLATED_LE, [(0x00410010, b"LO", "X")] * 200_000, late) as pacs:
        result = GetScu(f"PACS@127.0.0.1:{pacs.port}", destination=tmp_path).get_study({"PatientID": PATIENT_ID})
    assert (result.verdict, result.warning, *result.manifest["reason"]) == ("complete", 1, "truncated_dataset")
