"""The bytes: what lies on disk is what the PACS sent, and what is known of the syntax is told.

A relay on the socket records the fragments of every data set; nothing of the code under test has a
part in that record. Each real file is fetched alone and as one of a mixed study, from the embedded
PACS, from Orthanc and from dcmqrscp.
"""

from __future__ import annotations

import hashlib
import subprocess
import warnings
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from pydicom import dcmread

from airflow_dicom_get import GetScu
from airflow_dicom_get.dicom.part10 import IMPLEMENTATION_CLASS_UID, IMPLEMENTATION_VERSION
from airflow_dicom_get.dicom.syntaxes import UNCOMPRESSED
from airflow_dicom_get.manifest.files import read_table
from airflow_dicom_get.result import Result
from airflow_dicom_get.testing.archive import SERIES_UID, STUDY_UID, Entry, read_header
from airflow_dicom_get.testing.sample_data import EXPLICIT_LITTLE
from airflow_dicom_get.testing.servers import find_binary
from tests.support.holdings import Holding
from tests.support.relay import Relay

Relays = Callable[..., Relay]
Row = dict[str, Any]

SYNTAXES = 9
"""Transfer syntaxes, at least, among the files of pydicom's wheel."""


@dataclass
class Fetched:
    """What came of some retrievals through one relay: manifest rows, and the record of the relay."""

    rows: dict[str, Row]
    through: Relay

    def file(self, sop: str) -> Path:
        return Path(self.rows[sop]["uri"].removeprefix("file://"))


def rows_of(result: Result) -> list[Row]:
    rows: list[Row] = read_table(result.manifest_uri).to_pylist()
    return rows


def alone(server: Any, holding: Holding, relays: Relays, folder: Path) -> Fetched:
    """Each instance by a retrieval of its own, a few at a time."""
    fetched = Fetched({}, relays(server))
    addr = node(server, fetched.through)

    def fetch(entry: Entry) -> Row:
        keys = read_header(entry.path)[3]
        result = GetScu(addr, destination=folder, durable=False).get_study(
            {"StudyInstanceUID": keys[STUDY_UID], "SeriesInstanceUID": keys[SERIES_UID], "SOPInstanceUID": entry.sop}
        )
        assert result.verdict == "complete", (entry.path.name, result.summary(), result.errors)
        (row,) = rows_of(result)
        return row

    with ThreadPoolExecutor(4) as pool:
        for row in pool.map(fetch, holding.entries.values()):
            fetched.rows[row["sop_instance_uid"]] = row
    return fetched


def together(server: Any, holding: Holding, relays: Relays, folder: Path, **options: Any) -> Fetched:
    """The mixed study by one retrieval."""
    through = relays(server)
    result = GetScu(node(server, through), destination=folder, **options).get_study({"StudyInstanceUID": holding.study})
    assert result.verdict == "complete", (result.summary(), result.errors)
    rows = {row["sop_instance_uid"]: row for row in rows_of(result)}
    assert len(rows) == result.total == result.completed
    return Fetched(rows, through)


def node(server: Any, through: Relay) -> str:
    return f"{getattr(server, 'ae_title', 'PACS')}@127.0.0.1:{through.port}"


def assert_as_sent(fetched: Fetched, holding: Holding, *, file_meta: bool = True) -> None:
    """Every file holds the recorded fragments behind its header, and the manifest describes it."""
    assert fetched.rows.keys() == holding.entries.keys()
    recorded = fetched.through.by_sop()
    assert Counter(sent.sop for sent in fetched.through.sent) == Counter(list(holding.entries)), (
        "something was sent twice"
    )
    for sop, row in fetched.rows.items():
        content, sent = fetched.file(sop).read_bytes(), recorded[sop]
        offset = row["dataset_offset"]
        assert content[offset:] == sent.data, holding.entries[sop].path.name
        assert (row["state"], row["transfer_syntax_uid"], row["sop_class_uid"]) == (
            "stored",
            sent.syntax,
            sent.sop_class,
        )
        assert (row["bytes"], row["dataset_bytes"]) == (len(content), sent.length)
        assert row["sha256"] == hashlib.sha256(content).hexdigest()
        assert fetched.file(sop).name == f"{sop}.dcm"
        assert fetched.file(sop).parent.name == row["series_instance_uid"]
        assert fetched.file(sop).parent.parent.name == row["study_instance_uid"]
        if file_meta:
            assert_header(content[:offset], row)
        else:
            assert offset == 0


def assert_header(head: bytes, row: Row) -> None:
    meta = dcmread(BytesIO(head)).file_meta
    assert head[:132] == bytes(128) + b"DICM"
    assert meta.FileMetaInformationGroupLength == len(head) - 144
    assert (meta.MediaStorageSOPInstanceUID, meta.MediaStorageSOPClassUID, meta.TransferSyntaxUID) == (
        row["sop_instance_uid"],
        row["sop_class_uid"],
        row["transfer_syntax_uid"],
    )
    assert meta.ImplementationClassUID == IMPLEMENTATION_CLASS_UID
    assert meta.ImplementationVersionName == IMPLEMENTATION_VERSION
    assert (meta.SourceApplicationEntityTitle, meta.ReceivingApplicationEntityTitle) == ("GET-SCU", "GET-SCU")
    assert meta.SendingApplicationEntityTitle in ("PACS", "ORTHANC", "QRALL")


def assert_opens(files: Iterable[Path]) -> None:
    """pydicom reads every file to its end, and DCMTK takes it for a Part 10 file."""
    paths = list(files)
    for path in paths:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            dataset = dcmread(path)
        assert dataset.file_meta.MediaStorageSOPInstanceUID == path.stem
    if find_binary("dcmftest"):
        done = subprocess.run(["dcmftest", *map(str, paths)], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout
        assert done.stdout.count("yes: ") == len(paths)


def assert_stored_syntax(fetched: Fetched, holding: Holding) -> None:
    for sop, row in fetched.rows.items():
        assert row["transfer_syntax_uid"] == holding.entries[sop].syntax, holding.entries[sop].path.name


def assert_unlisted_exactness(fetched: Fetched) -> None:
    """Where the PACS tells no syntax, compressed data came as it is, and of the rest nobody can know."""
    for row in fetched.rows.values():
        uncompressed = row["transfer_syntax_uid"] in UNCOMPRESSED
        assert row["exactness"] == ("peer_choice" if uncompressed else "as_received"), row


def test_the_files_have_what_the_tests_are_about(real: Holding, mixed: Holding) -> None:
    for holding in (real, mixed):
        assert len(holding.entries) >= 115
        assert len({entry.syntax for entry in holding.entries.values()}) >= SYNTAXES


# --- the embedded PACS -----------------------------------------------------------------------------


def test_alone_from_the_embedded_pacs(real: Holding, embedded: Any, relay: Relays, tmp_path: Path) -> None:
    fetched = alone(embedded(real.folder), real, relay, tmp_path)
    assert_as_sent(fetched, real)
    assert_stored_syntax(fetched, real)
    for sop, row in fetched.rows.items():
        assert fetched.file(sop).read_bytes()[row["dataset_offset"] :] == real.dataset(sop)
        assert row["exactness"] == "as_listed"
    assert_opens(map(fetched.file, fetched.rows))


@pytest.mark.parametrize("tells", ["classes and syntaxes", "classes", "neither"])
def test_mixed_from_the_embedded_pacs(tells: str, mixed: Holding, embedded: Any, relay: Relays, tmp_path: Path) -> None:
    pacs = embedded(mixed.folder, omit_syntaxes=tells != "classes and syntaxes", omit_classes=tells == "neither")
    fetched = together(pacs, mixed, relay, tmp_path)
    assert_as_sent(fetched, mixed)
    assert_stored_syntax(fetched, mixed)
    for sop, row in fetched.rows.items():
        assert fetched.file(sop).read_bytes()[row["dataset_offset"] :] == mixed.dataset(sop)
    if tells == "classes and syntaxes":
        assert {row["exactness"] for row in fetched.rows.values()} == {"as_listed"}
    else:
        assert_unlisted_exactness(fetched)
    assert_opens(map(fetched.file, fetched.rows))


def test_mixed_without_file_meta(mixed: Holding, embedded: Any, relay: Relays, tmp_path: Path) -> None:
    """Bare data sets: their syntax stands in the manifest alone."""
    fetched = together(embedded(mixed.folder), mixed, relay, tmp_path, store_with_file_meta=False)
    assert_as_sent(fetched, mixed, file_meta=False)
    assert_stored_syntax(fetched, mixed)
    for sop in fetched.rows:
        assert fetched.file(sop).read_bytes() == mixed.dataset(sop)


def test_mixed_over_two_associations(mixed: Holding, embedded: Any, relay: Relays, tmp_path: Path) -> None:
    fetched = together(embedded(mixed.folder), mixed, relay, tmp_path, associations=2)
    assert_as_sent(fetched, mixed)
    assert_stored_syntax(fetched, mixed)


# --- Orthanc ---------------------------------------------------------------------------------------


@pytest.mark.orthanc
def test_alone_from_orthanc(real: Holding, orthanc: Any, relay: Relays, tmp_path: Path) -> None:
    fetched = alone(orthanc, real, relay, tmp_path)
    assert_as_sent(fetched, real)
    assert_stored_syntax(fetched, real)
    assert_unlisted_exactness(fetched)
    assert_opens(map(fetched.file, fetched.rows))


@pytest.mark.orthanc
def test_mixed_from_orthanc(mixed: Holding, orthanc_mixed: Any, relay: Relays, tmp_path: Path) -> None:
    fetched = together(orthanc_mixed, mixed, relay, tmp_path)
    assert_as_sent(fetched, mixed)
    assert_stored_syntax(fetched, mixed)
    assert_unlisted_exactness(fetched)
    assert_opens(map(fetched.file, fetched.rows))


@pytest.mark.orthanc
def test_mixed_from_orthanc_without_file_meta(
    mixed: Holding, orthanc_mixed: Any, relay: Relays, tmp_path: Path
) -> None:
    fetched = together(orthanc_mixed, mixed, relay, tmp_path, store_with_file_meta=False)
    assert_as_sent(fetched, mixed, file_meta=False)
    assert_stored_syntax(fetched, mixed)


# --- dcmqrscp --------------------------------------------------------------------------------------


def assert_dcmqrscp_syntaxes(fetched: Fetched, holding: Holding) -> None:
    """Explicit little endian and compressed ones as stored; the others in an uncompressed one of its choice."""
    for sop, row in fetched.rows.items():
        stored, came = holding.entries[sop].syntax, row["transfer_syntax_uid"]
        if stored == EXPLICIT_LITTLE or stored not in UNCOMPRESSED:
            assert came == stored, holding.entries[sop].path.name
        else:
            assert came in UNCOMPRESSED
            assert row["exactness"] == "peer_choice"


@pytest.mark.dcmtk
def test_alone_from_dcmqrscp(real: Holding, dcmqrscp_all: Any, relay: Relays, tmp_path: Path) -> None:
    fetched = alone(dcmqrscp_all, real, relay, tmp_path)
    assert_as_sent(fetched, real)
    assert_dcmqrscp_syntaxes(fetched, real)
    assert_unlisted_exactness(fetched)
    assert_opens(map(fetched.file, fetched.rows))


@pytest.mark.dcmtk
def test_mixed_from_dcmqrscp(mixed: Holding, dcmqrscp_mixed: Any, relay: Relays, tmp_path: Path) -> None:
    fetched = together(dcmqrscp_mixed, mixed, relay, tmp_path)
    assert_as_sent(fetched, mixed)
    assert_dcmqrscp_syntaxes(fetched, mixed)
    assert_unlisted_exactness(fetched)
    assert_opens(map(fetched.file, fetched.rows))


@pytest.mark.dcmtk
def test_mixed_from_dcmqrscp_without_file_meta(
    mixed: Holding, dcmqrscp_mixed: Any, relay: Relays, tmp_path: Path
) -> None:
    fetched = together(dcmqrscp_mixed, mixed, relay, tmp_path, store_with_file_meta=False)
    assert_as_sent(fetched, mixed, file_meta=False)
    assert_dcmqrscp_syntaxes(fetched, mixed)
