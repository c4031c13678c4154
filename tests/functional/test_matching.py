"""A row that contradicts a key that was asked for is not of the scope: at PACS that lie, and at honest ones."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pydicom
import pytest
from pynetdicom import AE
from pynetdicom.sop_class import StudyRootQueryRetrieveInformationModelFind  # type: ignore[attr-defined]

from airflow_dicom_get import GetScu
from airflow_dicom_get.dicom import header as h
from airflow_dicom_get.engine.study_list import ListedStudy
from airflow_dicom_get.errors import InvalidQuery
from airflow_dicom_get.testing.misbehave import MisbehavingPacs
from airflow_dicom_get.testing.misbehaving.behaviour import FIND, GET, MODE_CLASSES, Behaviour
from airflow_dicom_get.testing.pacs import EmbeddedPacs
from airflow_dicom_get.testing.servers import Dcmqrscp, Orthanc
from airflow_dicom_get.verify import verify
from tests.support.holdings import Holding

LYING = ("find_prefix", "find_ignores_keys")
SILENT = ("find_leaves_keys_out", "find_empties_keys")
ASKED = {"AccessionNumber": "HOSTILE-ACC"}


# --- PACS that answer more than they were asked ------------------------------------------------------


@pytest.fixture
def scu(tmp_path: Path) -> Iterator[Callable[..., GetScu]]:
    """A client of a PACS in a mode; the PACS is ``scu.pacs``."""
    started: list[MisbehavingPacs] = []

    def make(mode: str | None = None, *, heal_after: int | None = None, **options: Any) -> GetScu:
        pacs = MisbehavingPacs(mode, heal_after=heal_after)
        started.append(pacs)
        pacs.start()
        client = GetScu(f"X@127.0.0.1:{pacs.port}", destination=tmp_path / "out", **options)
        client.pacs = pacs  # type: ignore[attr-defined]
        return client

    yield make
    for pacs in started:
        pacs.close()
        assert pacs.faults == []


def stored(folder: Path) -> set[str]:
    return {path.parent.parent.name for path in (folder / "out").rglob("*.dcm")}


class TestLying:
    @pytest.mark.parametrize(
        ("mode", "query"),
        [
            ("find_prefix", ASKED),
            ("find_prefix", {"PatientID": "HOSTILE1"}),
            *(
                ("find_ignores_keys", query)
                for query in (
                    ASKED, {"PatientID": "HOSTILE1"}, {"StudyDate": "2024-01-15/2024-01-31", **ASKED},
                    {"AccessionNumber": "HOSTILE-AC?"},
                )
            ),
        ],
    )  # fmt: skip
    def test_get_and_plan(self, scu: Any, tmp_path: Path, mode: str, query: dict[str, str]) -> None:
        client = scu(mode)
        plan = client.plan(query)
        assert plan.studies == [client.pacs.study_uid]
        assert plan.errors
        result = client.get_study(query)
        assert (result.verdict, result.completed) == ("complete", 8)
        assert stored(tmp_path) == {client.pacs.study_uid}
        assert result.errors[0]["count"] >= 2
        (key,) = [key for key in query if key != "StudyDate"]
        assert f"its {key} does not match the query" in " ".join(error["error"] for error in result.errors)
        assert "HOSTILE" not in str(result.errors)

    @pytest.mark.parametrize("mode", [*LYING, "find_folds"])
    def test_nothing_left_is_empty_and_said(self, scu: Any, tmp_path: Path, mode: str) -> None:
        result = scu(mode).get_study({"AccessionNumber": "hostile-acc" if mode != "find_prefix" else "HOSTILE-AC"})
        assert (result.verdict, result.reason, result.exit_code) == ("empty", "key_not_matched", 5)
        assert not stored(tmp_path)
        told = result.errors[0]["error"]
        assert ("writes its AccessionNumber in upper case" in told) == (mode != "find_prefix")

    def test_leading_zeros(self, scu: Any) -> None:
        result = scu("find_folds").get_study({"AccessionNumber": "00HOSTILE-ACC"})
        assert (result.verdict, result.reason) == ("empty", "key_not_matched")
        assert "with 0 leading zeros, not 2" in result.errors[0]["error"]

    @pytest.mark.parametrize("mode", SILENT)
    @pytest.mark.parametrize("verb", ["get_study", "plan", "find"])
    def test_a_key_that_is_left_out_is_named(self, scu: Any, tmp_path: Path, mode: str, verb: str) -> None:
        with pytest.raises(InvalidQuery, match=r"does not support the key AccessionNumber at STUDY level.*4 rows"):
            getattr(scu(mode), verb)(ASKED)
        assert not stored(tmp_path)

    @pytest.mark.parametrize("mode", SILENT)
    @pytest.mark.parametrize("verb", ["get_study", "plan"])
    def test_a_key_of_series_that_is_left_out_is_named(self, scu: Any, tmp_path: Path, mode: str, verb: str) -> None:
        client = scu(mode)
        with pytest.raises(InvalidQuery, match="does not support the key Modality at SERIES level"):
            getattr(client, verb)({"StudyInstanceUID": client.pacs.study_uid, "Modality": "CT"})
        assert not stored(tmp_path)

    @pytest.mark.parametrize("level", ["STUDY", "SERIES", "IMAGE"])
    @pytest.mark.parametrize("mode", LYING)
    def test_find(self, scu: Any, caplog: pytest.LogCaptureFixture, mode: str, level: str) -> None:
        client = scu(mode)
        rows = client.find(ASKED, level=level)
        assert len(rows) == {"STUDY": 1, "SERIES": 2, "IMAGE": 8}[level]
        assert {row.StudyInstanceUID for row in rows} == {client.pacs.study_uid}
        assert rows.remarks
        assert "AccessionNumber does not match the query" in caplog.text
        assert "HOSTILE" not in caplog.text

    def test_max_studies_counts_what_is_left(self, scu: Any) -> None:
        assert scu("find_ignores_keys", max_studies=1).get_study(ASKED).verdict == "complete"
        with pytest.raises(InvalidQuery, match="matches 2 studies"):
            scu("find_ignores_keys", max_studies=1).plan({"StudyDate": "20240131"})

    @pytest.mark.parametrize(
        "query", [{"SeriesInstanceUID": "2.25.330000000000000000000000000100000001"}, {"StudyInstanceUID": "UID"}]
    )
    def test_uids(self, scu: Any, tmp_path: Path, query: dict[str, str]) -> None:
        client = scu("find_ignores_keys")
        wanted = {key: client.pacs.study_uid if value == "UID" else value for key, value in query.items()}
        result = client.get_study(wanted)
        assert result.verdict == "complete"
        assert stored(tmp_path) == {client.pacs.study_uid}
        assert result.completed == (4 if "SeriesInstanceUID" in query else 8)

    def test_a_study_of_a_list_that_is_not_there_costs_itself(self, scu: Any, tmp_path: Path) -> None:
        client = scu("find_ignores_keys")
        result = client.get_study({"StudyInstanceUID": [client.pacs.study_uid, "1.2.3"]})
        assert {x.study_instance_uid: (x.verdict, x.reason) for x in result.studies} == {
            client.pacs.study_uid: ("complete", None),
            "1.2.3": ("empty", "key_not_matched"),
        }
        assert (result.verdict, result.completed) == ("empty", 8)
        assert stored(tmp_path) == {client.pacs.study_uid}

    def test_verify(self, scu: Any, tmp_path: Path) -> None:
        client = scu()
        assert client.get_study({"StudyInstanceUID": client.pacs.study_uid}).verdict == "complete"
        with MisbehavingPacs("find_ignores_keys") as lying:
            found = verify(study=client.pacs.study_uid, destination=tmp_path / "out", addr=f"X@127.0.0.1:{lying.port}")
        assert found.exit_code == 0
        assert "StudyInstanceUID does not match the query" in str(found.errors)


class TestLists:
    def listed(self, *values: str, key: str = "AccessionNumber") -> list[ListedStudy]:
        return [ListedStudy(line, key, value) for line, value in enumerate(values, 2)]

    @pytest.mark.parametrize("mode", [None, *LYING])
    def test_one_association_and_one_study_each(self, scu: Any, mode: str | None) -> None:
        client = scu(mode)
        found = client.find_listed(self.listed("HOSTILE-ACC", "HOSTILE-AC", "hostile-acc", "NOWHERE"))
        assert [entry.uids for entry in found.entries] == [(client.pacs.study_uid,), (), (), ()]
        assert client.pacs.associations == 1
        assert bool(found.remarks) == (mode is not None)
        assert found.entries[3].problem.startswith("has this accession number")
        if mode == "find_ignores_keys":
            assert "writes its AccessionNumber in upper case" in found.entries[2].problem

    @pytest.mark.parametrize("mode", SILENT)
    def test_a_key_that_the_pacs_does_not_know(self, scu: Any, mode: str) -> None:
        with pytest.raises(InvalidQuery, match="does not support the key AccessionNumber"):
            scu(mode).find_listed(self.listed("HOSTILE-ACC", "A1"))

    @pytest.mark.parametrize("mode", ["find_prefix", "find_ignores_keys"])
    def test_an_accession_number_may_stand_for_max_studies(self, monkeypatch: Any, scu: Any, mode: str) -> None:
        """As where it is the query: a PACS that has thousands of studies of one line has them fetched by nobody."""
        rows = MODE_CLASSES[mode].rows

        def many(self: Behaviour, level: str, query: Any) -> Any:
            for row in rows(self, level, query):
                for number in range(3):
                    yield {**row, h.STUDY_INSTANCE_UID: f"1.2.{number}"}

        monkeypatch.setattr(MODE_CLASSES[mode], "rows", many)
        client = scu(mode, max_studies=2)
        found = client.find_listed(self.listed("HOSTILE-ACC", "A1"))
        assert [entry.uids for entry in found.entries] == [(), ()]
        assert found.entries[0].problem == "is taken of the 3 that have this accession number: max_studies is 2"
        assert client.pacs.associations == 1
        assert len(scu(mode, max_studies=3).find_listed(self.listed("HOSTILE-ACC")).entries[0].uids) == 3

    @pytest.mark.parametrize("mode", [None, "find_ignores_keys", "lists_refused"])
    def test_uids(self, scu: Any, mode: str | None) -> None:
        client = scu(mode)
        found = client.find_listed(self.listed(client.pacs.study_uid, "1.2.3", key="StudyInstanceUID"))
        assert [entry.uids for entry in found.entries] == [(client.pacs.study_uid,), ()]
        assert client.pacs.associations == 1

    def test_a_lost_association_is_opened_again(self, scu: Any) -> None:
        client = scu("find_drops", heal_after=1)
        found = client.find_listed(self.listed("HOSTILE-ACC", "NOWHERE"))
        assert [bool(entry.uids) for entry in found.entries] == [True, False]
        assert client.pacs.associations == 2


# --- the shell ---------------------------------------------------------------------------------------


@pytest.fixture
def shell(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    def run(*argv: object) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "airflow_dicom_get.cli", *map(str, argv)],
            capture_output=True,
            text=True,
            timeout=60,
            cwd=tmp_path,
            check=False,
        )

    return run


class TestShell:
    @pytest.mark.parametrize("mode", LYING)
    def test_a_file_of_accession_numbers(self, shell: Any, tmp_path: Path, mode: str) -> None:
        (tmp_path / "list.csv").write_text("AccessionNumber\nHOSTILE-ACC\n")
        with MisbehavingPacs(mode) as pacs:
            done = shell("get", f"X@127.0.0.1:{pacs.port}", "--from-file", "list.csv", "--to", "out")
        assert done.returncode == 0, done.stderr
        assert stored(tmp_path) == {pacs.study_uid}
        assert "its AccessionNumber does not match the query" in done.stderr
        assert "HOSTILE" not in done.stderr

    def test_one_entry_that_is_not_there_costs_itself(self, shell: Any, tmp_path: Path) -> None:
        (tmp_path / "list.csv").write_text("AccessionNumber\nHOSTILE-ACC\nhostile-acc\n")
        with MisbehavingPacs("find_ignores_keys") as pacs:
            done = shell("get", f"X@127.0.0.1:{pacs.port}", "--from-file", "list.csv", "--to", "out")
        assert done.returncode == 5, done.stderr
        assert "8 of 8" in done.stdout or "empty" in done.stdout
        assert stored(tmp_path) == {pacs.study_uid}
        assert "list.csv, line 3: no study has this accession number" in done.stderr
        assert "in upper case" in done.stderr

    @pytest.mark.parametrize("verb", [("get", "--to", "out"), ("plan",)])
    @pytest.mark.parametrize("mode", SILENT)
    def test_a_list_whose_key_is_left_out(self, shell: Any, tmp_path: Path, mode: str, verb: tuple[str, ...]) -> None:
        (tmp_path / "list.csv").write_text("AccessionNumber\nHOSTILE-ACC\nA1\n")
        with MisbehavingPacs(mode) as pacs:
            done = shell(verb[0], f"X@127.0.0.1:{pacs.port}", "--from-file", "list.csv", *verb[1:])
        assert (done.returncode, done.stdout) == (2, "")
        assert "does not support the key AccessionNumber at STUDY level" in done.stderr
        assert not stored(tmp_path)

    def test_find_says_what_was_left_out(self, shell: Any) -> None:
        with MisbehavingPacs("find_prefix") as pacs:
            done = shell("find", f"X@127.0.0.1:{pacs.port}", "-k", "AccessionNumber=HOSTILE-ACC")
        assert done.returncode == 0
        assert len(done.stdout.splitlines()) == 2
        lines = done.stderr.splitlines()
        assert lines[0].startswith("dicom-get: 2 × A C-FIND row was ignored: its AccessionNumber does not")
        assert lines[1:] == ["dicom-get: 1 match"]


@pytest.mark.parametrize("name", ["SOMEBODY^ELSE", "somebody", "SOME*", "S?MEBODY"])
def test_a_pacs_that_ignores_a_name_brings_no_other_patient(scu: Callable[..., GetScu], name: str) -> None:
    client = scu("find_ignores_keys")
    result = client.get_study({"PatientName": name})
    assert (result.verdict, result.reason, result.completed) == ("empty", "key_not_matched", 0)
    assert name not in str(result.errors)


# --- an honest PACS loses nothing --------------------------------------------------------------------


def brings(node: str, query: dict[str, str]) -> bool:
    """Whether a PACS answers a C-FIND for studies with any row, asked by pynetdicom."""
    host, _, port = node.partition("@")[2].partition(":")
    keys = pydicom.Dataset()
    keys.QueryRetrieveLevel, keys.StudyInstanceUID = "STUDY", ""
    for keyword, value in query.items():
        setattr(keys, keyword, value)
    ae = AE("FINDS")
    ae.add_requested_context(StudyRootQueryRetrieveInformationModelFind)
    association = ae.associate(host, int(port), ae_title=node.partition("@")[0])
    assert association.is_established
    try:
        answers = association.send_c_find(keys, StudyRootQueryRetrieveInformationModelFind)
        return any(identifier is not None for _, identifier in answers)
    finally:
        association.release()


def honest(node: str, holding: Holding, **options: Any) -> None:
    """Whatever the study has that can be asked for brings it, and no remark."""
    dataset = pydicom.dcmread(next(holding.folder.rglob("*.dcm")), stop_before_pixels=True)
    scu = GetScu(node, max_studies=10_000, **options)
    day = str(dataset.StudyDate)
    asked: list[dict[str, Any]] = [
        {"StudyInstanceUID": holding.study},
        {"PatientID": str(dataset.PatientID)},
        {"PatientID": f"{dataset.PatientID}  "},
        {"StudyDate": f"{day[:4]}-{day[4:6]}-{day[6:]}"},
        {"StudyDate": f"19000101/{day}"},
        {"StudyDate": f"{day}-"},
        {"PatientName": "*", "StudyDate": day},
    ]
    if accession := str(dataset.get("AccessionNumber", "")):
        asked += [{"AccessionNumber": text} for text in (accession, f"{accession[:-1]}?", f"{accession[0]}*")]
    name = str(dataset.PatientName)
    family = name.partition("^")[0]
    for text in (name, f"{family}*", f"*{family[1:]}*", f"?{family[1:]}*", name.lower(), family):
        # Where the PACS brings it at all: some fold no case, and a family name alone is not the whole name.
        if brings(node, {"PatientName": text, "StudyDate": day}):
            asked.append({"PatientName": text, "StudyDate": day})
    assert {"PatientName": name, "StudyDate": day} in asked
    for query in asked:
        rows = scu.find(query)
        assert holding.study in [row.StudyInstanceUID for row in rows], query
        assert rows.remarks == [], query
        plan = scu.plan(query)
        assert holding.study in plan.studies, query
        assert plan.errors == []


@pytest.mark.orthanc
def test_orthanc_loses_nothing(orthanc: Orthanc, ct: Holding) -> None:
    honest(orthanc.node, ct)
    scu = GetScu(orthanc.node)
    day = str(pydicom.dcmread(next(ct.folder.rglob("*.dcm")), stop_before_pixels=True).StudyDate)
    assert len(scu.find({"StudyDate": day, "ModalitiesInStudy": "CT"})) == len(scu.find({"StudyDate": day}))


@pytest.mark.dcmtk
def test_dcmqrscp_loses_nothing(dcmqrscp_all: Dcmqrscp, ct: Holding) -> None:
    honest(dcmqrscp_all.node, ct)


def test_the_embedded_pacs_loses_nothing(ct: Holding) -> None:
    with EmbeddedPacs(ct.folder) as pacs:
        honest(f"PACS@127.0.0.1:{pacs.port}", ct)


@pytest.mark.parametrize("listed", ["series", "instances", "later"])
def test_nothing_is_asked_for_in_patient_root_without_the_patient(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, listed: str
) -> None:
    """Also not where a C-GET would only confirm a list, of a series that has a count and no instances or of a round
    one; and not where the study is listed only when its list is asked for again."""
    asked: list[object] = []
    finds: list[str] = []

    class Nameless(Behaviour):
        stages = frozenset({FIND, GET})

        def rows(self, level: str, query: Any) -> Iterator[Any]:
            finds.append(level)
            there = listed == "instances" if level == "IMAGE" else listed != "later" or finds.count("SERIES") > 1
            for row in super().rows(level, query) if there or (level == "STUDY" and finds == [level]) else ():
                left = {tag: value for tag, value in row.items() if tag not in (0x00100020, 0x00201208, 0x00201209)}
                yield left if listed == "instances" or level != "SERIES" else {**left, 0x00201209: "3"}

        def select(self, request: Any) -> Any:
            asked.append(request)
            return super().select(request)

    monkeypatch.setitem(MODE_CLASSES, "of_a_test", Nameless)
    with MisbehavingPacs("of_a_test", series=1, instances=3) as pacs:
        node = f"PACS@127.0.0.1:{pacs.port}"
        scu = GetScu(node, destination=tmp_path)
        result = scu.get_study({"StudyInstanceUID": pacs.study_uid}, query_model="PatientRoot")
        assert (result.verdict, result.reason, asked) == ("failed", "invalid_query", [])
        compared = verify(
            study=pacs.study_uid, destination=tmp_path, addr=node, query_model="PatientRoot", list_limit=3
        )
        assert (compared.exit_code, asked) == (3 if listed == "instances" else 4, [])
