"""Studies that change while they are retrieved, and sources with habits of their own: right verdict, right rows."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from pydicom import dcmread
from pydicom.uid import (
    UID,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGLosslessSV1,
    JPEGLSLossless,
    RLELossless,
)

from airflow_dicom_get import GetScu
from airflow_dicom_get.testing.misbehave import MisbehavingPacs
from airflow_dicom_get.testing.pacs import EmbeddedPacs
from airflow_dicom_get.testing.sample_data import big_study
from airflow_dicom_get.testing.servers import HOST, Dcmqrscp, Orthanc, Server
from tests.support.holdings import Holding, hold

Embedded = Callable[..., EmbeddedPacs]


def rows_of(result: Any) -> dict[str, dict[str, Any]]:
    return {row["sop_instance_uid"]: row for row in result.manifest.to_dict("records")}


def states(result: Any) -> Counter[str]:
    return Counter(row["state"] for row in rows_of(result).values())


class AfterSome:
    """A callback that acts once, after ``count`` instances."""

    def __init__(self, count: int, act: Callable[[], object]) -> None:
        self.count, self.act, self.seen = count, act, 0

    def __call__(self, event: Any) -> None:
        self.seen += 1
        if self.seen == self.count:
            self.act()


# --- the study changes -------------------------------------------------------------------------------


def _two_parts(tmp_path: Path) -> tuple[str, Path, Path]:
    """One study of 30 instances: 20 in a folder that is served, 10 elsewhere."""
    served, later = tmp_path / "pacs", tmp_path / "later"
    study = big_study(tmp_path / "all", 30, 3000, name="changing", series=2)
    for folder in (served, later):
        folder.mkdir()
    for number, path in enumerate(sorted((tmp_path / "all").glob("*.dcm"))):
        path.rename((served if number < 20 else later) / path.name)
    return study, served, later


@pytest.mark.parametrize("associations", [1, 2])
def test_a_study_that_grows_is_fetched_to_its_end(embedded: Embedded, tmp_path: Path, associations: int) -> None:
    study, served, later = _two_parts(tmp_path)
    pacs = embedded(served)

    def grow() -> None:
        for path in later.iterdir():
            pacs.archive.add(path)

    scu = GetScu(f"PACS@{HOST}:{pacs.port}", destination=tmp_path / "to", associations=associations)
    result = scu.get_study({"StudyInstanceUID": study}, on_sub_operation=AfterSome(5, grow))
    assert (result.verdict, result.total, result.completed) == ("complete", 30, 30)
    assert set(pacs.sent.values()) == {1}
    assert states(result) == {"stored": 30}
    attempts = Counter(int(row["attempt"]) for row in rows_of(result).values())
    assert set(attempts) <= {1, 2}


def test_a_study_that_grows_between_two_runs(embedded: Embedded, tmp_path: Path) -> None:
    study, served, later = _two_parts(tmp_path)
    pacs = embedded(served)
    scu = GetScu(f"PACS@{HOST}:{pacs.port}", destination=tmp_path / "to")
    assert scu.get_study({"StudyInstanceUID": study}).total == 20
    for path in later.iterdir():
        pacs.archive.add(path)
    result = scu.get_study({"StudyInstanceUID": study})
    assert (result.verdict, result.total, result.skipped) == ("complete", 30, 20)
    assert set(pacs.sent.values()) == {1}
    assert {int(row["attempt"]) for row in rows_of(result).values() if row["state"] == "held"} == {0}


@pytest.mark.orthanc
def test_an_instance_is_withdrawn_from_orthanc(ct: Holding, tmp_path: Path) -> None:
    """One that has been fetched and one that has not; Orthanc fails a list that names one which is gone."""
    import json
    from http.client import HTTPConnection

    with Orthanc(tmp_path / "pacs") as server:
        server.load(ct.files)

        def call(method: str, path: str, body: str | None = None) -> Any:
            connection = HTTPConnection(HOST, server.http_port, timeout=10)
            connection.request(method, path, body)
            answer = connection.getresponse().read()
            connection.close()
            return json.loads(answer)

        gone: list[str] = []

        def withdraw(event: Any) -> None:
            if gone:
                return
            unseen = next(sop for sop in reversed(list(ct.entries)) if sop != event.sop_instance_uid)
            for sop in (event.sop_instance_uid, unseen):
                (own,) = call("POST", "/tools/lookup", sop)
                call("DELETE", f"/instances/{own['ID']}")
                gone.append(sop)

        scu = GetScu(f"ORTHANC@{HOST}:{server.port}", destination=tmp_path / "to")
        result = scu.get_study({"StudyInstanceUID": ct.study}, on_sub_operation=withdraw)
    assert result.verdict == "complete"
    assert result.total == result.completed == len(ct.files) - 2
    assert result.withdrawn == 2
    found = rows_of(result)
    assert {found[sop]["state"] for sop in gone} == {"withdrawn"}
    assert {found[sop]["reason"] for sop in gone} == {"gone_from_list"}
    assert len(found) == len(ct.files)


def test_rows_that_are_held_and_no_longer_listed(embedded: Embedded, tmp_path: Path) -> None:
    study, served, later = _two_parts(tmp_path)
    for path in later.iterdir():
        path.rename(served / path.name)
    with EmbeddedPacs(served) as pacs:
        scu = GetScu(f"PACS@{HOST}:{pacs.port}", destination=tmp_path / "to")
        assert scu.get_study({"StudyInstanceUID": study}).verdict == "complete"
    for path in sorted(served.iterdir())[:3]:
        path.unlink()
    pacs = embedded(served)
    scu = GetScu(f"PACS@{HOST}:{pacs.port}", destination=tmp_path / "to")
    result = scu.get_study({"StudyInstanceUID": study})
    assert (result.verdict, result.total, result.withdrawn) == ("complete", 27, 3)
    assert states(result) == {"held": 27, "withdrawn": 3}
    assert len(list((tmp_path / "to").rglob("*.dcm"))) == 30


# --- lists that are cut -----------------------------------------------------------------------------------


def test_a_list_of_500_rows_is_not_believed(tmp_path: Path) -> None:
    with MisbehavingPacs("find_cut_at", param=500, series=1, instances=503, size=600) as pacs:
        result = GetScu(f"PACS@{HOST}:{pacs.port}", destination=tmp_path).get_study(
            {"StudyInstanceUID": pacs.study_uid}
        )
    assert (result.verdict, result.reason) == ("unverified", "list_contradicted")
    assert (result.total, result.completed, result.unexpected) == (500, 500, 3)
    assert len(list(tmp_path.rglob("*.dcm"))) == 503
    assert {row["reason"] for row in rows_of(result).values() if row["state"] == "unexpected"} == {"not_listed"}


@pytest.mark.parametrize("associations", [1, 2])
def test_a_series_that_has_as_many_instances_as_servers_cut_at(
    embedded: Embedded, tmp_path: Path, associations: int
) -> None:
    study = big_study(tmp_path / "pacs", 200, 600, name="round", series=2)
    pacs = embedded(tmp_path / "pacs", omit_counts=True)
    scu = GetScu(f"PACS@{HOST}:{pacs.port}", destination=tmp_path / "to", associations=associations)
    result = scu.get_study({"StudyInstanceUID": study})
    assert (result.verdict, result.total, result.evidence) == ("complete", 200, "list")
    assert sum(pacs.sent.values()) < 220, "fetched again as a whole to see whether the list was cut"


# --- pynetdicom's qrscp -----------------------------------------------------------------------------------


class Qrscp(Server):
    """The application that comes with pynetdicom: one row an instance at every level, no UID lists."""

    def command(self) -> list[str]:
        config = self.folder / "qrscp.ini"
        config.write_text(
            f"[DEFAULT]\nae_title: {self.ae_title}\nport: {self.port}\nmax_pdu: 16382\nacse_timeout: 30\n"
            "dimse_timeout: 30\nnetwork_timeout: 30\nbind_address: 127.0.0.1\n"
            f"instance_location: {self.folder / 'instances'}\n"
            f"database_location: {self.folder / 'instances.sqlite'}\n"
            "[GETSCU]\naddress: 127.0.0.1\nport: 11113\n"
        )
        return [sys.executable, "-m", "pynetdicom", "qrscp", "-c", str(config)]


@pytest.fixture(scope="module")
def qrscp(tmp_path_factory: pytest.TempPathFactory, ct: Holding) -> Iterator[Qrscp]:
    pytest.importorskip("sqlalchemy", reason="pynetdicom's qrscp needs sqlalchemy")
    from pynetdicom import AE

    server = Qrscp(tmp_path_factory.mktemp("qrscp"), "QRSCP")
    with server:
        ae = AE("LOAD")
        datasets = [dcmread(path) for path in ct.files]
        kept = [x for x in datasets if x.file_meta.TransferSyntaxUID == ExplicitVRLittleEndian][:8]
        for x in kept:
            if x.SOPClassUID not in {c.abstract_syntax for c in ae.requested_contexts}:
                ae.add_requested_context(x.SOPClassUID, ExplicitVRLittleEndian)
        association = ae.associate(HOST, server.port, ae_title="QRSCP")
        assert association.is_established
        for x in kept:
            assert association.send_c_store(x).Status == 0
        association.release()
        server.kept = {str(x.SOPInstanceUID) for x in kept}  # type: ignore[attr-defined]
        yield server


def test_qrscp_knows_neither_lists_nor_levels(qrscp: Any, ct: Holding, tmp_path: Path) -> None:
    scu = GetScu(f"QRSCP@{HOST}:{qrscp.port}", destination=tmp_path)
    result = scu.get_study({"StudyInstanceUID": ct.study})
    assert (result.verdict, result.total) == ("complete", len(qrscp.kept)), result
    assert rows_of(result).keys() == qrscp.kept
    wanted = sorted(qrscp.kept)[:3]
    series = rows_of(result)[wanted[0]]["series_instance_uid"]
    result = GetScu(f"QRSCP@{HOST}:{qrscp.port}", destination=tmp_path / "some").get_study(
        {"StudyInstanceUID": ct.study, "SeriesInstanceUID": series, "SOPInstanceUID": wanted}
    )
    assert result.verdict == "complete", result
    assert rows_of(result).keys() <= set(wanted)


# --- one unknown UID in a list ------------------------------------------------------------------------------


@pytest.mark.orthanc
def test_one_that_is_gone_does_not_cost_the_others(ct: Holding, tmp_path: Path) -> None:
    """Orthanc answers a list with one unknown UID by C000 and sends nothing: it is halved until that one is alone."""
    from airflow_dicom_get.manifest.frames import read_manifest

    with EmbeddedPacs(ct.folder) as all_of_it:
        first = GetScu(f"PACS@{HOST}:{all_of_it.port}", destination=tmp_path / "first").get_study(
            {"StudyInstanceUID": ct.study}
        )
    listed = read_manifest(first.manifest_uri)
    listed["state"] = "missing"
    with Orthanc(tmp_path / "pacs") as server:
        server.load(ct.files[1:])
        (gone,) = set(ct.entries) - {entry.sop for entry in ct.entries.values() if entry.path != ct.files[0]}
        result = GetScu(f"ORTHANC@{HOST}:{server.port}", destination=tmp_path / "to").get_study(manifest=listed)
    found = rows_of(result)
    assert result.completed == len(ct.files) - 1
    assert len(list((tmp_path / "to").rglob("*.dcm"))) == len(ct.files) - 1
    assert gone not in found or found[gone]["state"] in ("missing", "withdrawn")


# --- many syntaxes ----------------------------------------------------------------------------------------------

SYNTAXES = (
    RLELossless, JPEG2000Lossless, JPEGLosslessSV1, JPEGLSLossless, DeflatedExplicitVRLittleEndian,
    ExplicitVRLittleEndian,
)  # fmt: skip


@pytest.fixture(scope="module")
def motley(tmp_path_factory: pytest.TempPathFactory) -> Holding:
    """A CT study of six series with three instances each, every series in another transfer syntax."""
    folder = tmp_path_factory.mktemp("motley")
    study = big_study(folder / "plain", 18, 2000, name="motley", series=6)
    for path in sorted((folder / "plain").glob("*.dcm")):
        dataset = dcmread(path)
        syntax: UID = SYNTAXES[int(dataset.SeriesNumber) - 1]
        if syntax.is_compressed and syntax != DeflatedExplicitVRLittleEndian:
            # What a source looks at is the name of the syntax: the frame need not be one that decodes.
            from pydicom.encaps import encapsulate

            dataset.PixelData = encapsulate([dataset.PixelData[:512]])
            dataset["PixelData"].VR = "OB"
            dataset["PixelData"].is_undefined_length = True
        dataset.file_meta.TransferSyntaxUID = syntax
        dataset.save_as(folder / path.name, enforce_file_format=True)
        path.unlink()
    return hold(folder, study)


@pytest.mark.dcmtk
def test_each_series_in_another_syntax_on_dcmqrscp(motley: Holding, tmp_path: Path) -> None:
    """It takes the first context of a class and fails the others: the ladder of single syntaxes brings them."""
    server = Dcmqrscp(tmp_path / "pacs", sop_classes={e.sop_class for e in motley.entries.values()})
    server.register(motley.files)
    with server:
        result = GetScu(f"{server.ae_title}@{HOST}:{server.port}", destination=tmp_path / "to").get_study(
            {"StudyInstanceUID": motley.study}
        )
    assert (result.verdict, result.completed) == ("complete", 18), result
    for sop, row in rows_of(result).items():
        stored = motley.entries[sop].syntax
        if UID(stored).is_encapsulated:
            assert row["transfer_syntax_uid"] == stored
            assert row["exactness"] == "as_received"
            assert Path(row["uri"]).read_bytes().endswith(motley.dataset(sop))
        else:
            assert row["exactness"] == "peer_choice"


def test_each_series_in_another_syntax_on_a_good_pacs(motley: Holding, embedded: Embedded, tmp_path: Path) -> None:
    pacs = embedded(motley.folder)
    result = GetScu(f"PACS@{HOST}:{pacs.port}", destination=tmp_path, associations=2).get_study(
        {"StudyInstanceUID": motley.study}
    )
    assert (result.verdict, result.completed) == ("complete", 18)
    for sop, row in rows_of(result).items():
        assert row["transfer_syntax_uid"] == motley.entries[sop].syntax
        assert row["exactness"] == "as_listed"
        assert Path(row["uri"]).read_bytes().endswith(motley.dataset(sop))
    assert set(pacs.sent.values()) == {1}
