"""The embedded PACS, seen by DCMTK's and pynetdicom's clients."""

from __future__ import annotations

import os
import shutil
import signal
import ssl
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from pynetdicom import AE, _config, build_context

from airflow_dicom_get.errors import InvalidOption
from airflow_dicom_get.testing import archive as ar
from airflow_dicom_get.testing.archive import SERIES_UID, STUDY_UID, read_header
from airflow_dicom_get.testing.encoding import part10_header
from airflow_dicom_get.testing.pacs import EmbeddedPacs, serve
from airflow_dicom_get.testing.sample_data import CT, PRIVATE_CLASS, STUDY_DATE, set_elements
from airflow_dicom_get.testing.servers import echo, find_binary, require
from tests.support.holdings import Holding
from tests.support.reference_client import EXPLICIT, FIND, GET, IMPLICIT, associate, find, get, identifier
from tests.support.relay import Relay

Embedded = Callable[..., EmbeddedPacs]


def pairs_of(holding: Holding) -> list[tuple[str, str]]:
    return sorted({(entry.sop_class, entry.syntax) for entry in holding.entries.values()})


def assert_own_bytes(retrieved: dict[str, tuple[str, bytes]], holding: Holding) -> None:
    for sop, (syntax, data) in retrieved.items():
        assert syntax == holding.entries[sop].syntax
        assert data == holding.dataset(sop), holding.entries[sop].path.name


# --- C-GET: the bytes ------------------------------------------------------------------------------


def test_real_files_come_back_byte_for_byte(embedded: Embedded, real: Holding) -> None:
    pacs = embedded(real.folder)
    result = get(pacs, "STUDY", {"StudyInstanceUID": pacs.archive.studies()}, pairs_of(real))
    assert result.final.Status == 0x0000
    assert result.datasets.keys() == real.entries.keys()
    assert_own_bytes(result.datasets, real)
    assert pacs.sent == Counter(real.entries.keys())
    assert pacs.archive.skipped == {}


def test_mixed_study_comes_in_one_retrieval(embedded: Embedded, mixed: Holding) -> None:
    pacs = embedded(mixed.folder)
    result = get(pacs, "STUDY", {"StudyInstanceUID": mixed.study}, pairs_of(mixed))
    assert result.datasets.keys() == mixed.entries.keys()
    assert_own_bytes(result.datasets, mixed)
    assert len({syntax for syntax, _ in result.datasets.values()}) >= 9
    assert result.final.NumberOfCompletedSuboperations == len(mixed.entries)


def test_private_class_is_served(embedded: Embedded, private: Holding) -> None:
    result = get(embedded(private.folder), "STUDY", {"StudyInstanceUID": private.study}, pairs_of(private))
    assert PRIVATE_CLASS in {private.entries[sop].sop_class for sop in result.datasets}
    assert result.final.Status == 0x0000
    assert_own_bytes(result.datasets, private)


@pytest.mark.dcmtk
def test_getscu_stores_the_source_bytes(embedded: Embedded, private: Holding, tmp_path: Path) -> None:
    pacs = embedded(private.folder)
    subprocess.run(
        [require("getscu"), "-S", "+B", "-aec", "PACS", "-od", tmp_path, "-k", "QueryRetrieveLevel=STUDY",
         "-k", f"StudyInstanceUID={private.study}", "127.0.0.1", str(pacs.port)],
        check=True,
    )  # fmt: skip
    # getscu proposes no private class, so that one must fail rather than come in another way.
    expected = {sop for sop, entry in private.entries.items() if entry.sop_class != PRIVATE_CLASS}
    stored = {path.name: read_header(path) for path in tmp_path.iterdir()}
    assert stored.keys() == expected
    for sop, (syntax, offset, _, _) in stored.items():
        assert syntax == private.entries[sop].syntax
        assert (tmp_path / sop).read_bytes()[offset:] == private.dataset(sop)


@pytest.mark.parametrize("max_pdu", [4096, 16382, 131072])
def test_pdus_are_as_large_as_the_client_allows(
    embedded: Embedded, relay: Callable[..., Relay], ct: Holding, max_pdu: int
) -> None:
    through = relay(embedded(ct.folder))
    sop = next(iter(ct.entries))
    keys = unique_keys(ct, sop)
    get(through, "IMAGE", keys, pairs_of(ct), max_pdu=max_pdu)
    assert max_pdu - 1 <= through.largest_pdu <= max_pdu
    assert through.by_sop()[sop].data == ct.dataset(sop)


def unique_keys(holding: Holding, sop: str) -> dict[str, str]:
    row = read_header(holding.entries[sop].path)[3]
    return {"StudyInstanceUID": row[STUDY_UID], "SeriesInstanceUID": row[SERIES_UID], "SOPInstanceUID": sop}


def test_never_converts(embedded: Embedded, ct: Holding) -> None:
    pacs = embedded(ct.folder)
    syntaxes = Counter(entry.syntax for entry in ct.entries.values())
    result = get(pacs, "STUDY", {"StudyInstanceUID": ct.study}, [(CT, EXPLICIT), (CT, IMPLICIT)])
    assert {syntax for syntax, _ in result.datasets.values()} == {EXPLICIT}
    assert result.final.Status == 0xB000
    assert result.final.NumberOfCompletedSuboperations == syntaxes[EXPLICIT]
    assert result.final.NumberOfFailedSuboperations == len(ct.entries) - syntaxes[EXPLICIT]
    listed = result.identifiers[-1]
    assert listed is not None
    assert set(listed.FailedSOPInstanceUIDList) == ct.entries.keys() - result.datasets.keys()

    result = get(pacs, "STUDY", {"StudyInstanceUID": ct.study}, [(CT, IMPLICIT)])
    assert (result.datasets, result.final.Status) == ({}, 0xA702)


def test_context_with_several_syntaxes_takes_one_that_is_held(embedded: Embedded, ct: Holding) -> None:
    pacs = embedded(ct.folder)
    contexts = [build_context(CT, [IMPLICIT, "1.2.840.10008.1.2.2", EXPLICIT])]
    association = AE().associate("127.0.0.1", pacs.port, contexts=contexts)
    assert association.accepted_contexts[0].transfer_syntax == [EXPLICIT]
    association.release()


# --- C-GET: which instances ------------------------------------------------------------------------


def test_levels_lists_and_models(embedded: Embedded, ct: Holding) -> None:
    pacs = embedded(ct.folder)
    pairs = pairs_of(ct)
    study = {"StudyInstanceUID": ct.study}
    rows = find(pacs, "IMAGE", {**study, "SOPInstanceUID": "", "SeriesInstanceUID": "", "PatientID": ""})
    by_series: dict[str, list[str]] = {}
    for row in rows:
        by_series.setdefault(row.SeriesInstanceUID, []).append(row.SOPInstanceUID)
    first, second = list(by_series)[:2]
    patient = {"PatientID": rows[0].PatientID}
    few = by_series[first][:1] + by_series[second][:2]

    def sops(level: str, keys: dict[str, Any], model: str = "StudyRoot") -> set[str]:
        result = get(pacs, level, keys, pairs, model=model)
        assert result.final.Status == 0x0000
        return set(result.datasets)

    assert sops("SERIES", {**study, "SeriesInstanceUID": first}) == set(by_series[first])
    assert sops("SERIES", {**study, "SeriesInstanceUID": [first, second]}) == {*by_series[first], *by_series[second]}
    assert sops("IMAGE", {**study, "SeriesInstanceUID": second, "SOPInstanceUID": few}) == set(few[1:])
    assert sops("PATIENT", patient, "PatientRoot") == ct.entries.keys()
    assert sops("SERIES", {**patient, **study, "SeriesInstanceUID": first}, "PatientRoot") == set(by_series[first])
    assert sops("STUDY", {"StudyInstanceUID": ["1.2.3", ct.study]}) == ct.entries.keys()
    assert sops("STUDY", {"StudyInstanceUID": "1.2.3"}) == set()
    assert sops("STUDY", {"PatientID": "someone else", **study}, "PatientRoot") == set()


@pytest.mark.parametrize(
    ("model", "level", "keys"),
    [
        ("StudyRoot", "STUDY", {"StudyInstanceUID": ""}),
        ("StudyRoot", "STUDY", {}),
        ("StudyRoot", "STUDY", {"StudyInstanceUID": "*"}),
        ("StudyRoot", "STUDY", {"StudyInstanceUID": ["STUDY", ""]}),
        ("StudyRoot", "SERIES", {"SeriesInstanceUID": "1.2"}),
        ("StudyRoot", "SERIES", {"StudyInstanceUID": ["STUDY", "1.2"], "SeriesInstanceUID": "1.2"}),
        ("StudyRoot", "IMAGE", {"StudyInstanceUID": "STUDY", "SOPInstanceUID": "1.2"}),
        ("StudyRoot", "PATIENT", {"PatientID": "DEMO-1"}),
        ("StudyRoot", "FRAME", {"StudyInstanceUID": "STUDY"}),
        ("PatientRoot", "STUDY", {"StudyInstanceUID": "STUDY"}),
        ("PatientRoot", "STUDY", {"PatientID": "", "StudyInstanceUID": "STUDY"}),
        ("PatientRoot", "PATIENT", {"PatientID": ["DEMO-1", "DEMO-2"]}),
    ],
)
def test_identifiers_that_do_not_match_are_refused(
    embedded: Embedded, ct: Holding, model: str, level: str, keys: dict[str, Any]
) -> None:
    pacs = embedded(ct.folder)
    keys = {
        name: [ct.study if part == "STUDY" else part for part in value] if isinstance(value, list)
        else ct.study if value == "STUDY" else value
        for name, value in keys.items()
    }  # fmt: skip
    result = get(pacs, level, keys, pairs_of(ct), model=model)
    assert (result.final.Status, result.datasets) == (0xA900, {})
    assert not pacs.sent


# --- C-GET: roles, ends, switches --------------------------------------------------------------------


def test_without_roles_nothing_is_sent_unless_told(embedded: Embedded, private: Holding) -> None:
    keys, pairs = {"StudyInstanceUID": private.study}, [(CT, EXPLICIT)]
    strict = embedded(private.folder)
    assert get(strict, "STUDY", keys, pairs, roles=False).final.Status == 0xA702
    assert not strict.sent
    # pynetdicom as the client refuses what comes without a role; that it came is what counts here.
    lenient = embedded(private.folder, answer_roles=False)
    get(lenient, "STUDY", keys, pairs)
    assert sum(lenient.sent.values()) == 10


def test_cancel_ends_the_retrieval(embedded: Embedded, ct: Holding) -> None:
    pacs = embedded(ct.folder)

    def cancel(event: Any) -> None:
        if len(pacs.sent) == 3:
            event.assoc.send_c_cancel(1, query_model=GET["StudyRoot"])

    result = get(pacs, "STUDY", {"StudyInstanceUID": ct.study}, pairs_of(ct), on_store=cancel)
    assert result.final.Status == 0xFE00
    assert 3 <= len(result.datasets) <= 6
    assert result.final.NumberOfRemainingSuboperations == len(ct.entries) - len(result.datasets)
    assert sum(pacs.sent.values()) == len(result.datasets)


def test_hidden_instances_are_listed_and_not_sent(embedded: Embedded, private: Holding) -> None:
    hidden, failing = sorted(private.entries)[:2]
    pacs = embedded(private.folder, hide=[hidden], fail=[failing])
    keys = {"StudyInstanceUID": private.study}
    rows = find(pacs, "IMAGE", {**keys, "SOPInstanceUID": ""})
    assert {row.SOPInstanceUID for row in rows} == private.entries.keys()
    result = get(pacs, "STUDY", keys, pairs_of(private))
    assert result.datasets.keys() == private.entries.keys() - {hidden, failing}
    assert result.final.Status == 0xB000
    assert result.final.NumberOfFailedSuboperations == 1
    listed = result.identifiers[-1]
    assert listed is not None
    assert listed.FailedSOPInstanceUIDList == failing


def test_switches_of_the_responses(embedded: Embedded, private: Holding) -> None:
    pacs = embedded(private.folder, final_status=0xA702, omit_counters=True, pending=False)
    result = get(pacs, "STUDY", {"StudyInstanceUID": private.study}, pairs_of(private))
    assert len(result.datasets) == len(private.entries)
    assert len(result.responses) == 1
    assert result.final.Status == 0xA702
    assert "NumberOfCompletedSuboperations" not in result.final


@pytest.mark.parametrize(("switch", "service"), [("no_find", FIND), ("no_get", GET)])
def test_a_service_can_be_absent(embedded: Embedded, ct: Holding, switch: str, service: dict[str, str]) -> None:
    pacs = embedded(ct.folder, **{switch: True})
    contexts = [(uid, IMPLICIT) for uid in (*FIND.values(), *GET.values())]
    with associate(pacs, contexts) as association:
        assert {str(context.abstract_syntax) for context in association.rejected_contexts} == set(service.values())


def test_hook_runs_before_each_sub_operation(embedded: Embedded, private: Holding) -> None:
    seen: list[str] = []
    pacs = embedded(private.folder, before_send=seen.append)
    get(pacs, "STUDY", {"StudyInstanceUID": private.study}, pairs_of(private))
    assert sorted(seen) == sorted(private.entries)


def test_hook_that_raises_aborts(embedded: Embedded, private: Holding) -> None:
    def fail(sop: str) -> None:
        if pacs.sent:
            raise RuntimeError("as the test wants it")

    pacs = embedded(private.folder, before_send=fail)
    result = get(pacs, "STUDY", {"StudyInstanceUID": private.study}, pairs_of(private))
    assert len(result.datasets) == 1
    assert "Status" not in result.final


# --- C-FIND ------------------------------------------------------------------------------------------


@pytest.fixture
def archive(embedded: Embedded, tmp_path: Path, real: Holding, ct: Holding, private: Holding) -> EmbeddedPacs:
    """All three in one PACS."""
    for number, holding in enumerate((real, ct, private)):
        shutil.copytree(holding.folder, tmp_path / str(number))
    return embedded(tmp_path)


def studies(pacs: EmbeddedPacs, **keys: Any) -> set[str]:
    return {row.StudyInstanceUID for row in find(pacs, "STUDY", {"StudyInstanceUID": "", **keys})}


def test_find_study_returns_what_is_known(archive: EmbeddedPacs, ct: Holding) -> None:
    asked = (
        "PatientName", "StudyDate", "ModalitiesInStudy", "SOPClassesInStudy", "NumberOfStudyRelatedSeries",
        "NumberOfStudyRelatedInstances", "InstanceAvailability", "ReferencedStudySequence", "StudyDescription",
    )  # fmt: skip
    (row,) = find(archive, "STUDY", {"StudyInstanceUID": ct.study, **dict.fromkeys(asked)})
    assert row.ModalitiesInStudy == "CT"
    assert row.SOPClassesInStudy == CT
    assert (row.NumberOfStudyRelatedSeries, row.NumberOfStudyRelatedInstances) == (4, 40)
    assert (row.StudyDate, row.InstanceAvailability, row.RetrieveAETitle) == (STUDY_DATE, "ONLINE", "PACS")
    assert (row.StudyDescription, str(row.PatientName)) == ("CT thorax", "Doe^Demo")
    assert len(row.ReferencedStudySequence) == 0


@pytest.mark.parametrize("syntax", [IMPLICIT, EXPLICIT])
def test_find_image_tells_class_and_syntax(archive: EmbeddedPacs, real: Holding, syntax: str) -> None:
    for sop in list(real.entries)[::10]:
        keys = {**unique_keys(real, sop), "SOPClassUID": "", "AvailableTransferSyntaxUID": "", "Rows": None}
        (row,) = find(archive, "IMAGE", keys, syntax=syntax)
        entry = real.entries[sop]
        assert (row.SOPClassUID, row.AvailableTransferSyntaxUID) == (entry.sop_class, entry.syntax)


def test_find_matches(archive: EmbeddedPacs, ct: Holding, private: Holding) -> None:
    both = {ct.study, private.study}
    assert studies(archive, StudyDate=STUDY_DATE) == both
    assert studies(archive, StudyDate=f"{STUDY_DATE}-") == both
    assert len(studies(archive, StudyDate="-20240114")) >= 10
    assert not both & studies(archive, StudyDate="-20240114")
    assert studies(archive, StudyDate="20240101-20240131") == both
    assert studies(archive, StudyDate=STUDY_DATE, StudyTime="0830-0831") == both
    assert studies(archive, StudyDate=STUDY_DATE, StudyTime="0831-") == set()
    assert studies(archive, PatientName="doe^DEMO") == both
    assert studies(archive, PatientName="Doe^D?mo") == both
    assert studies(archive, StudyInstanceUID=[ct.study, "1.2.3"]) == {ct.study}
    assert studies(archive, StudyDate=STUDY_DATE, ModalitiesInStudy="SR") == {private.study}
    assert studies(archive, PatientID="DEMO-2") == set()
    rows = find(
        archive, "SERIES", {"StudyInstanceUID": ct.study, "SeriesDescription": "axial*", "SeriesInstanceUID": ""}
    )
    assert rows == []
    rows = find(archive, "SERIES", {"StudyInstanceUID": ct.study, "SeriesDescription": "Axial*", "SeriesNumber": "",
                                    "NumberOfSeriesRelatedInstances": ""})  # fmt: skip
    assert {(row.SeriesNumber, row.NumberOfSeriesRelatedInstances) for row in rows} == {(2, 12), (3, 14)}
    rows = find(archive, "IMAGE", {"StudyInstanceUID": ct.study, "InstanceNumber": "1", "SOPInstanceUID": ""})
    assert len(rows) == 4


def test_an_accession_number_is_looked_up_and_not_searched_for(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, private: Holding
) -> None:
    part10 = next(iter(private.entries.values())).path.read_bytes()
    for number, accession in enumerate(["A1", "A2\\A1", "A10", "", "a1"]):
        values = {ar.STUDY_UID: f"1.{number}", ar.SOP_INSTANCE: f"1.{number}.1", ar.ACCESSION: accession}
        (tmp_path / str(number)).write_bytes(set_elements(part10, values))
    archive = ar.Archive(tmp_path)
    archive.load()
    looked_at: list[str] = []
    real = ar.value_matches

    def noted(vr: str, wanted: str, held: str) -> bool:
        looked_at.append(held)
        return real(vr, wanted, held)

    monkeypatch.setattr(ar, "value_matches", noted)
    found = {
        wanted: [row[ar.STUDY_UID] for row in archive.find("STUDY", {ar.ACCESSION: wanted})]
        for wanted in ("A1", "A3", "A10\\a1", "A1*")
    }
    assert found == {"A1": ["1.0", "1.1"], "A3": [], "A10\\a1": ["1.2", "1.4"], "A1*": ["1.0", "1.1", "1.2"]}
    assert len(looked_at) == 2 + 0 + 5 + 5


def test_find_decodes_and_encodes_text_beyond_ascii(archive: EmbeddedPacs) -> None:
    (row,) = find(
        archive, "STUDY", {"SpecificCharacterSet": "ISO_IR 192", "PatientName": "Buc^Jérôme", "StudyInstanceUID": ""}
    )
    assert row.SpecificCharacterSet == "ISO_IR 192"
    assert str(row.PatientName) == "Buc^Jérôme"


def test_find_patient_root(archive: EmbeddedPacs, ct: Holding, private: Holding) -> None:
    keys = {"PatientID": "DEMO-*", "PatientName": "", "NumberOfPatientRelatedStudies": "",
            "NumberOfPatientRelatedInstances": ""}  # fmt: skip
    (row,) = find(archive, "PATIENT", keys, model="PatientRoot")
    assert (row.PatientID, row.NumberOfPatientRelatedStudies, row.NumberOfPatientRelatedInstances) == ("DEMO-1", 2, 52)
    rows = find(archive, "STUDY", {"PatientID": "DEMO-1", "StudyInstanceUID": ""}, model="PatientRoot")
    assert {row.StudyInstanceUID for row in rows} == {ct.study, private.study}


@pytest.mark.parametrize(("model", "level"), [("StudyRoot", "PATIENT"), ("StudyRoot", ""), ("PatientRoot", "FRAME")])
def test_find_refuses_foreign_levels(archive: EmbeddedPacs, model: str, level: str) -> None:
    with associate(archive, [(FIND[model], IMPLICIT)]) as association:
        answers = list(association.send_c_find(identifier(level, {"PatientID": "x"}), FIND[model]))
    assert [status.Status for status, _ in answers] == [0xA900]


def test_find_can_leave_out_what_many_pacs_leave_out(embedded: Embedded, private: Holding) -> None:
    pacs = embedded(private.folder, omit_classes=True, omit_syntaxes=True, omit_counts=True)
    (row,) = find(
        pacs, "STUDY", dict.fromkeys(("StudyInstanceUID", "SOPClassesInStudy", "NumberOfStudyRelatedInstances"))
    )
    assert {element.keyword for element in row} == {
        "QueryRetrieveLevel", "RetrieveAETitle", "InstanceAvailability", "StudyInstanceUID",
    }  # fmt: skip
    keys = {
        "StudyInstanceUID": private.study,
        "SOPClassUID": CT,
        "AvailableTransferSyntaxUID": "",
        "SOPInstanceUID": "",
    }
    rows = find(pacs, "IMAGE", keys)
    assert len(rows) == 12
    assert all("SOPClassUID" not in row and "AvailableTransferSyntaxUID" not in row for row in rows)


@pytest.mark.dcmtk
def test_findscu_and_echoscu(embedded: Embedded, ct: Holding) -> None:
    pacs = embedded(ct.folder)
    address = ["-aec", "PACS", "127.0.0.1", str(pacs.port)]
    subprocess.run([require("echoscu"), *address], check=True)
    done = subprocess.run(
        [require("findscu"), "-S", "-k", "QueryRetrieveLevel=SERIES", "-k", f"StudyInstanceUID={ct.study}",
         "-k", "SeriesInstanceUID", "-k", "SeriesDescription", *address],
        check=True, capture_output=True, text=True,
    )  # fmt: skip
    assert (done.stdout + done.stderr).count("Find Response:") == 4
    assert "[Axial lung]" in done.stdout + done.stderr


# --- C-STORE -----------------------------------------------------------------------------------------


def store(pacs: EmbeddedPacs, path: Path, pair: tuple[str, str]) -> int:
    with associate(pacs, [pair], roles=False) as association:
        status: int = association.send_c_store(path).Status
        return status


@pytest.fixture
def _raw_store(monkeypatch: pytest.MonkeyPatch) -> None:
    # pynetdicom then sends the bytes of the file as they are.
    monkeypatch.setattr(_config, "STORE_SEND_CHUNKED_DATASET", True)


@pytest.mark.usefixtures("_raw_store")
def test_store_keeps_the_bytes_and_lists_them(embedded: Embedded, tmp_path: Path, real: Holding) -> None:
    pacs = embedded(tmp_path)
    part10 = tmp_path.parent / f"{tmp_path.name}.dcm"
    for entry in real.entries.values():
        # Some of the files have other UIDs in their header, from which the client takes those of the command.
        part10.write_bytes(part10_header(entry.sop_class, entry.sop, entry.syntax) + real.dataset(entry.sop))
        assert store(pacs, part10, (entry.sop_class, entry.syntax)) == 0x0000, entry.path.name
    held = {entry.sop: entry for entry in pacs.archive.entries()}
    assert held.keys() == real.entries.keys()
    for sop, entry in held.items():
        assert entry.syntax == real.entries[sop].syntax
        assert entry.path.read_bytes()[entry.offset :] == real.dataset(sop)
    assert not list(tmp_path.glob(".*"))
    again = embedded(tmp_path)
    assert {entry.sop for entry in again.archive.entries()} == real.entries.keys()
    result = get(pacs, "STUDY", {"StudyInstanceUID": pacs.archive.studies()}, pairs_of(real))
    assert_own_bytes(result.datasets, real)


@pytest.mark.usefixtures("_raw_store")
def test_store_replaces_and_refuses(embedded: Embedded, tmp_path: Path, ct: Holding) -> None:
    pacs = embedded(tmp_path / "archive")
    (tmp_path / "archive").mkdir()
    entry = next(entry for entry in ct.entries.values() if entry.syntax == EXPLICIT)
    changed = tmp_path / "changed.dcm"
    content = entry.path.read_bytes()
    changed.write_bytes(content[:-2] + b"\x12\x34")
    for path in (entry.path, changed):
        assert store(pacs, path, (CT, EXPLICIT)) == 0x0000
    (held,) = pacs.archive.entries()
    assert held.path.read_bytes()[held.offset :] == changed.read_bytes()[entry.offset :]

    # The meta header, from which the command comes, and the data set disagree.
    uid = entry.sop.encode()
    other = tmp_path / "other.dcm"
    other.write_bytes(content[: entry.offset] + content[entry.offset :].replace(uid, uid[:-1] + bytes([uid[-1] ^ 1])))
    assert store(pacs, other, (CT, EXPLICIT)) == 0xA900
    other.write_bytes(content[: entry.offset] + b"\xff" * 100)
    assert store(pacs, other, (CT, EXPLICIT)) == 0xC000
    assert len(pacs.archive.entries()) == 1


@pytest.mark.dcmtk
def test_storescu_to_getscu(embedded: Embedded, tmp_path: Path, private: Holding) -> None:
    pacs = embedded(tmp_path)
    files = [entry.path for entry in private.entries.values() if entry.sop_class == CT]
    subprocess.run([require("storescu"), "-aec", "PACS", "127.0.0.1", str(pacs.port), *files], check=True)
    assert len(pacs.archive.entries(private.study)) == len(files) == 10


# --- associations and life -----------------------------------------------------------------------------


def test_association_limit_and_counters(embedded: Embedded, ct: Holding) -> None:
    pacs = embedded(ct.folder, max_associations=2)
    verification = [("1.2.840.10008.1.1", IMPLICIT)]
    with associate(pacs, verification), associate(pacs, verification):
        assert pacs.associations == 2
        with associate(pacs, verification) as third:
            assert third.is_rejected
            answer = third.acceptor.primitive
            assert answer is not None
            assert answer.result == 0x02
    # A place is free as soon as the release is answered.
    with associate(pacs, verification) as fourth:
        assert fourth.is_established
        assert fourth.send_c_echo().Status == 0x0000
    assert (pacs.peak_associations, pacs.total_associations) == (2, 3)


def test_parallel_retrievals(embedded: Embedded, ct: Holding) -> None:
    pacs = embedded(ct.folder)
    results: list[Any] = []

    def retrieve() -> None:
        results.append(get(pacs, "STUDY", {"StudyInstanceUID": ct.study}, pairs_of(ct)))

    threads = [threading.Thread(target=retrieve) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 4
    for result in results:
        assert result.datasets.keys() == ct.entries.keys()
        assert_own_bytes(result.datasets, ct)
    assert set(pacs.sent.values()) == {4}


def test_called_ae_title(embedded: Embedded, ct: Holding) -> None:
    pacs = embedded(ct.folder, ae_title="ARCHIVE", require_called_ae=True)
    assert echo(pacs.port, "ARCHIVE")
    assert not echo(pacs.port, "PACS")


def test_stop_cuts_what_is_open(ct: Holding) -> None:
    with EmbeddedPacs(ct.folder) as pacs, associate(pacs, [("1.2.840.10008.1.1", IMPLICIT)]) as association:
        started = time.monotonic()
        pacs.stop()
        assert time.monotonic() - started < 3
        association.join(3)
        assert association.is_aborted
    assert pacs.associations == 0
    assert not [thread for thread in threading.enumerate() if str(pacs.port) in thread.name]


def test_client_that_vanishes_leaves_nothing(embedded: Embedded, relay: Callable[..., Relay], ct: Holding) -> None:
    pacs = embedded(ct.folder)
    through = relay(pacs, cut_after=2_000_000)
    get(through, "STUDY", {"StudyInstanceUID": ct.study}, pairs_of(ct))
    deadline = time.monotonic() + 5
    while pacs.associations and time.monotonic() < deadline:
        time.sleep(0.01)
    assert pacs.associations == 0
    assert len(through.sent) == 3


def test_tls(embedded: Embedded, ct: Holding, tmp_path: Path) -> None:
    if find_binary("openssl") is None:
        pytest.skip("openssl is missing: apt-get install openssl")
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", key, "-out", certificate, "-days", "2",
         "-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost"],
        check=True, capture_output=True,
    )  # fmt: skip
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(certificate, key)
    pacs = embedded(ct.folder, ssl_context=server)
    client = ssl.create_default_context(cafile=certificate)
    result = get(pacs, "STUDY", {"StudyInstanceUID": ct.study}, pairs_of(ct), tls_args=(client, "localhost"))
    assert result.datasets.keys() == ct.entries.keys()
    assert_own_bytes(result.datasets, ct)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_serve_says_when_it_is_ready_and_ends_cleanly(ct: Holding, number: signal.Signals) -> None:
    code = f"from airflow_dicom_get.testing.pacs import serve; serve({str(ct.folder)!r}, '127.0.0.1', 0, 'DEMO')"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    line = process.stdout.readline()
    port = int(line.split()[1].rpartition(":")[2])
    assert line == f"PACS DEMO@127.0.0.1:{port} serving 40 instances of 1 study\n"
    with associate(SimpleNamespace(port=port), [("1.2.840.10008.1.1", IMPLICIT)]) as association:
        assert association.is_established
        os.kill(process.pid, number)
        out, err = process.communicate(timeout=5)
    assert (process.returncode, out, err) == (0, "", "")


def test_serve_refuses_what_is_no_folder(tmp_path: Path) -> None:
    with pytest.raises(InvalidOption, match="--dir"):
        serve(tmp_path / "nowhere", "127.0.0.1", 0, "PACS")
