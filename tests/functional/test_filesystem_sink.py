"""A folder as destination: what is held is not fetched again, what is not what it was is, the first stays.

The contract that every destination keeps has a suite of its own; here are the retrievals that stand
on it, and the options by which the user says what counts as held.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pydicom
import pytest

from airflow_dicom_get import GetScu
from airflow_dicom_get.dicom.identifier import QUERY_RETRIEVE_LEVEL
from airflow_dicom_get.dicom.part10 import read_file_meta
from airflow_dicom_get.manifest.files import read_table
from airflow_dicom_get.result import Result
from airflow_dicom_get.sinks.filesystem import FilesystemSink
from airflow_dicom_get.storage import files as storage_files
from airflow_dicom_get.testing.misbehave import MisbehavingPacs
from airflow_dicom_get.testing.misbehaving import archive
from airflow_dicom_get.testing.misbehaving.archive import CT, Instance, Row
from airflow_dicom_get.testing.misbehaving.behaviour import GET, MODE_CLASSES, Behaviour
from airflow_dicom_get.testing.pacs import EmbeddedPacs
from airflow_dicom_get.testing.sample_data import big_study
from tests.support.holdings import Holding

COUNT = 12


@pytest.fixture(scope="module")
def pacs(private: Holding) -> Iterator[EmbeddedPacs]:
    with EmbeddedPacs(private.folder) as server:
        yield server


@pytest.fixture
def fetched(pacs: EmbeddedPacs) -> Callable[[], Counter[str]]:
    """What the PACS has sent since it was last asked."""
    seen = pacs.sent.copy()

    def since() -> Counter[str]:
        nonlocal seen
        new = pacs.sent - seen
        seen = pacs.sent.copy()
        return new

    return since


Fetched = Callable[[], Counter[str]]


def retrieve(pacs: EmbeddedPacs, study: str, destination: Path, **options: Any) -> Result:
    return GetScu(f"PACS@127.0.0.1:{pacs.port}", destination=destination, **options).get_study(
        {"StudyInstanceUID": study}
    )


def rows(result: Result) -> dict[str, dict[str, Any]]:
    return {row["sop_instance_uid"]: row for row in read_table(result.manifest_uri).to_pylist()}


def files(destination: Path) -> dict[str, Path]:
    return {path.stem: path for path in destination.glob("*/*/*.dcm")}


def dataset(path: Path) -> bytes:
    content = path.read_bytes()
    meta = read_file_meta(content[: 1 << 16])
    assert meta is not None
    return content[meta.dataset_offset :]


def assert_whole(destination: Path, private: Holding) -> None:
    found = files(destination)
    assert found.keys() == private.entries.keys()
    for sop, path in found.items():
        assert dataset(path) == private.dataset(sop)


# --- the second run ------------------------------------------------------------------------------------


@pytest.mark.parametrize("verify", ["size", "digest"])
@pytest.mark.parametrize("durable", [True, False])
def test_a_second_run_fetches_nothing(
    verify: str, durable: bool, pacs: EmbeddedPacs, private: Holding, fetched: Fetched, tmp_path: Path
) -> None:
    first = retrieve(pacs, private.study, tmp_path, durable=durable)
    assert (first.verdict, first.skipped, len(fetched())) == ("complete", 0, COUNT)
    second = retrieve(pacs, private.study, tmp_path, durable=durable, verify_held=verify)
    assert (second.verdict, second.completed, second.skipped) == ("complete", COUNT, COUNT)
    assert not fetched()
    assert second.bytes == 0
    before, after = rows(first), rows(second)
    for sop, row in after.items():
        assert (row["state"], row["attempt"]) == ("held", 0)
        told = ("uri", "bytes", "sha256", "dataset_offset", "dataset_bytes", "transfer_syntax_uid", "sop_class_uid",
                "modality", "series_number", "instance_number", "exactness")  # fmt: skip
        assert {key: row[key] for key in told} == {key: before[sop][key] for key in told}


def test_without_resume_all_comes_again_and_the_first_stays(
    pacs: EmbeddedPacs, private: Holding, fetched: Fetched, tmp_path: Path
) -> None:
    retrieve(pacs, private.study, tmp_path)
    fetched()
    stamps = {sop: path.stat().st_mtime_ns for sop, path in files(tmp_path).items()}
    result = retrieve(pacs, private.study, tmp_path, resume=False)
    assert (result.verdict, result.skipped, len(fetched())) == ("complete", 0, COUNT)
    assert {sop: path.stat().st_mtime_ns for sop, path in files(tmp_path).items()} == stamps


def test_a_plan_counts_what_is_held_and_leaves_no_trace(pacs: EmbeddedPacs, private: Holding, tmp_path: Path) -> None:
    scu = GetScu(f"PACS@127.0.0.1:{pacs.port}", destination=tmp_path / "out")
    query = {"StudyInstanceUID": private.study}
    assert (scu.plan(query).held, scu.plan(query).missing) == (0, COUNT)
    assert not (tmp_path / "out").exists()
    retrieve(pacs, private.study, tmp_path / "out")
    next(iter(files(tmp_path / "out").values())).unlink()
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    plan = scu.plan(query)
    assert (plan.held, plan.missing) == (COUNT - 1, 1)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_bare_data_sets_are_held_too(pacs: EmbeddedPacs, private: Holding, fetched: Fetched, tmp_path: Path) -> None:
    """Their syntax is in the ledger, so the second manifest knows it as well."""
    first = retrieve(pacs, private.study, tmp_path, store_with_file_meta=False)
    fetched()
    second = retrieve(pacs, private.study, tmp_path, store_with_file_meta=False, verify_held="digest")
    assert (second.verdict, second.skipped) == ("complete", COUNT)
    assert not fetched()
    syntaxes = [{row["transfer_syntax_uid"] for row in rows(result).values()} for result in (first, second)]
    assert syntaxes[0] == syntaxes[1] == {entry.syntax for entry in private.entries.values()}


def test_manifests_and_ledgers_may_lie_elsewhere(
    pacs: EmbeddedPacs, private: Holding, fetched: Fetched, tmp_path: Path
) -> None:
    root, out = tmp_path / "state", tmp_path / "out"
    for _ in range(2):
        result = retrieve(pacs, private.study, out, manifest_root=root)
        assert result.verdict == "complete"
    assert len(fetched()) == COUNT
    assert {path.name for path in out.iterdir()} == {private.study}
    assert len(list(root.glob("*.parquet"))) == 2
    # Who knows the root alone knows what is held; who does not has only the files.
    assert retrieve(pacs, private.study, out).verdict == "complete"
    assert len(fetched()) == COUNT


# --- what is no longer what it was -----------------------------------------------------------------------


def delete(path: Path) -> None:
    path.unlink()


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 100)


def empty(path: Path) -> None:
    os.truncate(path, 0)


def alter(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 0xFF
    path.write_bytes(content)


def replace_by_a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize(
    ("damage", "verify", "noticed"),
    [
        (delete, "size", True),
        (delete, "digest", True),
        (truncate, "size", True),
        (truncate, "digest", True),
        (empty, "size", True),
        (alter, "size", False),
    ],
)
def test_damage(
    damage: Callable[[Path], None],
    verify: str,
    noticed: bool,
    pacs: EmbeddedPacs,
    private: Holding,
    fetched: Fetched,
    tmp_path: Path,
) -> None:
    """It is fetched again where the check that was asked for can notice it, and only what is damaged is."""
    retrieve(pacs, private.study, tmp_path)
    fetched()
    sop, path = sorted(files(tmp_path).items())[3]
    damage(path)
    result = retrieve(pacs, private.study, tmp_path, verify_held=verify)
    assert result.verdict == "complete"
    assert fetched() == (Counter([sop]) if noticed else Counter())
    assert result.skipped == COUNT - noticed
    if noticed:
        assert_whole(tmp_path, private)
        assert rows(result)[sop]["state"] == "stored"
        # And it is held from now on.
        assert retrieve(pacs, private.study, tmp_path, verify_held="digest").skipped == COUNT
        assert not fetched()


def test_a_whole_series_that_is_gone_is_fetched_again(
    pacs: EmbeddedPacs, private: Holding, fetched: Fetched, tmp_path: Path
) -> None:
    retrieve(pacs, private.study, tmp_path)
    fetched()
    series = max(tmp_path.glob(f"{private.study}/*"), key=lambda folder: len(list(folder.iterdir())))
    lost = {path.stem for path in series.iterdir()}
    for path in series.iterdir():
        path.unlink()
    series.rmdir()
    assert retrieve(pacs, private.study, tmp_path).verdict == "complete"
    assert fetched() == Counter(lost)
    assert_whole(tmp_path, private)


def test_one_that_somebody_changed_in_place_is_kept_and_said(
    pacs: EmbeddedPacs, private: Holding, fetched: Fetched, tmp_path: Path
) -> None:
    """A whole file is never replaced without being asked for: it may be one that was de-identified."""
    retrieve(pacs, private.study, tmp_path)
    sop, path = sorted(files(tmp_path).items())[3]
    alter(path)
    changed = path.read_bytes()
    fetched()
    result = retrieve(pacs, private.study, tmp_path, verify_held="digest")
    assert (result.verdict, result.reason, result.conflicts) == ("partial", "different_content", 1)
    assert fetched() == Counter([sop])
    assert path.read_bytes() == changed
    again = retrieve(pacs, private.study, tmp_path, verify_held="digest", on_conflict="replace")
    assert (again.verdict, again.warning) == ("complete", 1)
    assert (rows(again)[sop]["state"], rows(again)[sop]["reason"]) == ("stored", "replaced")
    assert_whole(tmp_path, private)
    assert retrieve(pacs, private.study, tmp_path, verify_held="digest").skipped == COUNT


def test_a_correction_whose_sync_fails_is_not_complete(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a held series one instance is new and one corrected; the PACS sends all of it for the new one alone."""

    class WholeSeries(Behaviour):
        stages = frozenset({GET})

        def select(self, request: Row) -> list[Instance]:
            return archive.select({**request, QUERY_RETRIEVE_LEVEL: "SERIES"}, self.holdings())

    class Failing(storage_files.Disk):
        def sync_data(self, fd: int) -> None:
            if os.readlink(f"/proc/self/fd/{fd}").endswith(f"{first.sop}.dcm"):  # under its final name
                raise OSError(5, "Input/output error")
            super().sync_data(fd)

    monkeypatch.setitem(MODE_CLASSES, "sends_the_whole_series", WholeSeries)
    with MisbehavingPacs("sends_the_whole_series", series=1, instances=4) as pacs:
        first, *others = held = pacs.instances
        pacs._site.instances[:] = held[:-1]

        def get(**options: Any) -> Result:
            scu = GetScu(f"X@127.0.0.1:{pacs.port}", destination=tmp_path / "to", **options)
            return scu.get_study({"StudyInstanceUID": pacs.study_uid})

        assert get().verdict == "complete"
        corrected = replace(first, salt=1)
        pacs._site.instances[:] = [corrected, *others]
        monkeypatch.setattr(storage_files, "disk", Failing())
        result = get(on_conflict="replace", retries=0)
        assert (result.verdict, result.reason) == ("partial", "destination_error")
        row = rows(result)[first.sop]
        assert (row["state"], row["reason"]) == ("failed", "destination_error")
        assert "Sent again" in row["error"]
        monkeypatch.undo()
        monkeypatch.setitem(MODE_CLASSES, "sends_the_whole_series", WholeSeries)
        assert get(on_conflict="replace").verdict == "complete"
        assert files(tmp_path / "to")[first.sop].read_bytes().endswith(corrected.dataset())


def test_a_correction_at_the_pacs_takes_the_place_of_what_is_held(
    pacs: EmbeddedPacs, private: Holding, changed: tuple[EmbeddedPacs, str], tmp_path: Path
) -> None:
    server, sop = changed
    first = retrieve(pacs, private.study, tmp_path)
    result = retrieve(server, private.study, tmp_path, resume=False, on_conflict="replace")
    assert (result.verdict, result.completed, result.warning) == ("complete", COUNT, 1)
    assert rows(result)[sop]["sha256"] != rows(first)[sop]["sha256"]
    last = retrieve(server, private.study, tmp_path, verify_held="digest")
    assert (last.verdict, last.skipped) == ("complete", COUNT)
    assert rows(last)[sop]["sha256"] == rows(result)[sop]["sha256"]


def test_an_equal_file_that_may_not_be_written_is_held(pacs: EmbeddedPacs, private: Holding, tmp_path: Path) -> None:
    retrieve(pacs, private.study, tmp_path)
    forget(tmp_path)
    for path in files(tmp_path).values():
        path.chmod(0o444)
    result = retrieve(pacs, private.study, tmp_path)
    assert (result.verdict, result.completed) == ("complete", COUNT)


def test_without_sync_nothing_is_recorded_as_durable(pacs: EmbeddedPacs, private: Holding, tmp_path: Path) -> None:
    retrieve(pacs, private.study, tmp_path, durable=False)
    (ledger,) = tmp_path.glob("_manifests/.ledger/*/*.jsonl")
    assert {json.loads(line).get("state") for line in ledger.read_text().splitlines()} == {None, "taken"}
    assert retrieve(pacs, private.study, tmp_path).skipped == COUNT
    assert sum("durable" in x.read_text() for x in tmp_path.glob("_manifests/.ledger/*/*.jsonl")) == 1


def test_something_else_under_a_final_name_is_left_alone(
    pacs: EmbeddedPacs, private: Holding, fetched: Fetched, tmp_path: Path
) -> None:
    """A folder where a file should be: that instance fails, with its path, and the others are held."""
    retrieve(pacs, private.study, tmp_path)
    fetched()
    sop, path = sorted(files(tmp_path).items())[3]
    replace_by_a_folder(path)
    result = retrieve(pacs, private.study, tmp_path)
    assert result.verdict == "partial"
    assert result.completed == COUNT - 1
    row = rows(result)[sop]
    assert (row["state"], row["reason"]) == ("failed", "destination_error")
    assert path.is_dir()


def test_without_checksums_size_is_all_there_is(
    pacs: EmbeddedPacs, private: Holding, fetched: Fetched, tmp_path: Path
) -> None:
    retrieve(pacs, private.study, tmp_path, checksum=None)
    fetched()
    assert retrieve(pacs, private.study, tmp_path).skipped == COUNT
    # A digest that nobody made cannot be verified: fetched again, and found to be the same.
    result = retrieve(pacs, private.study, tmp_path, verify_held="digest")
    assert (result.verdict, len(fetched())) == ("complete", COUNT)


# --- files that no ledger knows ----------------------------------------------------------------------------


def forget(destination: Path) -> None:
    for ledger in destination.glob("_manifests/.ledger/*/*.jsonl"):
        ledger.unlink()


def test_files_without_a_record_count_only_if_adopted(
    pacs: EmbeddedPacs, private: Holding, fetched: Fetched, tmp_path: Path
) -> None:
    retrieve(pacs, private.study, tmp_path)
    forget(tmp_path)
    fetched()
    adopted = retrieve(pacs, private.study, tmp_path, adopt=True)
    assert (adopted.verdict, adopted.skipped) == ("complete", COUNT)
    assert not fetched()
    # They are on record now.
    assert retrieve(pacs, private.study, tmp_path, verify_held="digest").skipped == COUNT
    assert not fetched()
    forget(tmp_path)
    result = retrieve(pacs, private.study, tmp_path)
    assert (result.verdict, result.skipped, len(fetched())) == ("complete", 0, COUNT)


def swap_uid(path: Path) -> None:
    """The file of another instance under this name."""
    other = next(found for found in path.parent.iterdir() if found != path)
    path.write_bytes(other.read_bytes())


@pytest.mark.parametrize(("damage", "torn"), [(truncate, True), (empty, True), (swap_uid, False)])
def test_what_is_no_whole_instance_of_its_name_is_not_adopted(
    damage: Callable[[Path], None],
    torn: bool,
    pacs: EmbeddedPacs,
    private: Holding,
    fetched: Fetched,
    tmp_path: Path,
) -> None:
    retrieve(pacs, private.study, tmp_path)
    forget(tmp_path)
    fetched()
    path = next(found for found in files(tmp_path).values() if len(list(found.parent.iterdir())) > 1)
    damage(path)
    content = path.read_bytes()
    result = retrieve(pacs, private.study, tmp_path, adopt=True)
    assert fetched() == Counter([path.stem])
    if torn:
        assert (result.verdict, result.completed) == ("complete", COUNT)
        assert_whole(tmp_path, private)
        return
    # It is whole: not ours to replace.
    assert (result.verdict, result.conflicts) == ("partial", 1)
    assert rows(result)[path.stem]["state"] == "conflict"
    assert path.read_bytes() == content


# --- another data set under the same UID ---------------------------------------------------------------------


@pytest.fixture
def changed(private: Holding, tmp_path: Path) -> Iterator[tuple[EmbeddedPacs, str]]:
    """A PACS that holds the same study with one data set changed; the UID of that one."""
    folder = tmp_path / "changed"
    folder.mkdir()
    for path in private.files:
        (folder / path.name).write_bytes(path.read_bytes())
    entry = sorted(private.entries.values(), key=lambda found: found.sop)[5]
    alter(folder / entry.path.name)
    with EmbeddedPacs(folder) as server:
        yield server, entry.sop


def test_the_first_of_two_data_sets_stays(
    pacs: EmbeddedPacs, private: Holding, changed: tuple[EmbeddedPacs, str], tmp_path: Path
) -> None:
    other, sop = changed
    out = tmp_path / "out"
    retrieve(pacs, private.study, out)
    result = retrieve(other, private.study, out, resume=False)
    assert (result.verdict, result.reason) == ("partial", "different_content")
    assert (result.completed, result.failed, result.conflicts) == (COUNT - 1, 1, 1)
    row = rows(result)[sop]
    assert (row["state"], row["reason"]) == ("conflict", "different_content")
    assert "different_content" in result.errors[0]["error"]
    assert_whole(out, private)
    # With what is held left out, nothing is compared, and nothing is in conflict.
    assert retrieve(other, private.study, out).verdict == "complete"


def test_another_header_is_no_conflict(pacs: EmbeddedPacs, private: Holding, tmp_path: Path) -> None:
    """The same data sets, fetched under another AE title: the header differs, the content does not."""
    retrieve(pacs, private.study, tmp_path)
    result = retrieve(pacs, private.study, tmp_path, resume=False, calling_ae_title="SOMEONE")
    assert (result.verdict, result.conflicts) == ("complete", 0)
    for row in rows(result).values():
        path = Path(row["uri"].removeprefix("file://"))
        assert row["bytes"] == path.stat().st_size
        assert row["dataset_bytes"] == len(dataset(path))


def relabelled(path: Path, syntax: bytes) -> None:
    """Let the meta information name another transfer syntax, of as many characters."""
    content = path.read_bytes()
    at = content.index(b"UI", content.index(b"\x02\0\x10\0UI") + 4) + 4
    path.write_bytes(content[:at] + syntax.ljust(len(b"1.2.840.10008.1.2.1\0"), b"\0") + content[at + 20 :])


def test_a_file_of_ours_whose_meta_information_was_damaged_is_put_right(
    pacs: EmbeddedPacs, private: Holding, tmp_path: Path
) -> None:
    retrieve(pacs, private.study, tmp_path)
    sop, path = sorted(files(tmp_path).items())[3]
    was = path.read_bytes()
    relabelled(path, b"1.2.840.10008.1.2.2")
    result = retrieve(pacs, private.study, tmp_path, verify_held="digest")
    assert result.verdict == "complete"
    assert path.read_bytes() == was
    assert rows(result)[sop]["sha256"] == hashlib.sha256(was).hexdigest()


def test_an_equal_data_set_that_is_said_to_be_in_another_syntax_is_a_conflict(
    pacs: EmbeddedPacs, private: Holding, tmp_path: Path
) -> None:
    retrieve(pacs, private.study, tmp_path)
    forget(tmp_path)
    path = sorted(files(tmp_path).values())[3]
    relabelled(path, b"1.2.840.10008.1.2.2")
    was = path.read_bytes()
    result = retrieve(pacs, private.study, tmp_path)
    assert (result.verdict, result.conflicts) == ("partial", 1)
    assert path.read_bytes() == was


def test_a_whole_other_file_with_padding_behind_it_is_kept(
    pacs: EmbeddedPacs, private: Holding, tmp_path: Path
) -> None:
    """Zeros behind the pixel data are nothing that a crash has left."""
    retrieve(pacs, private.study, tmp_path)
    path = next(p for p in files(tmp_path).values() if pydicom.dcmread(p, stop_before_pixels=True).get("Rows"))
    other = pydicom.dcmread(path)
    other.PatientID = "DEIDENTIFIED"
    other.save_as(path)
    with path.open("ab") as file:
        file.write(bytes(4096))
    was = path.read_bytes()
    result = retrieve(pacs, private.study, tmp_path, verify_held="digest")
    assert (result.verdict, result.conflicts) == ("partial", 1)
    assert path.read_bytes() == was


@pytest.mark.parametrize(("on_conflict", "reason"), [("keep", "other_transfer_syntax"), ("replace", "replaced")])
def test_what_comes_again_in_another_transfer_syntax_is_drained(on_conflict: Any, reason: str, tmp_path: Path) -> None:
    """Also where nothing was looked up before, as long as a run has recorded what is there."""
    pairs = [(CT, "1.2.840.10008.1.2.1")], [(CT, "1.2.840.10008.1.2")]
    first, again = (MisbehavingPacs(None, pairs=pair) for pair in pairs)
    with first, again:
        study = {"StudyInstanceUID": first.study_uid}
        GetScu(f"X@127.0.0.1:{first.port}", destination=tmp_path).get_study(study)
        before = {sop: path.read_bytes() for sop, path in files(tmp_path).items()}
        scu = GetScu(f"X@127.0.0.1:{again.port}", destination=tmp_path, resume=False, on_conflict=on_conflict)
        result = scu.get_study(study)
    assert (result.verdict, result.warning) == ("complete", result.total)
    there = {sop: path.read_bytes() for sop, path in files(tmp_path).items()}
    assert (there == before) is (on_conflict == "keep")
    for sop, row in rows(result).items():
        assert row["reason"] == reason
        assert row["sha256"] == hashlib.sha256(there[sop]).hexdigest()


def test_a_folder_is_not_held_though_its_size_is_the_recorded_one(
    pacs: EmbeddedPacs, private: Holding, tmp_path: Path
) -> None:
    retrieve(pacs, private.study, tmp_path)
    path = sorted(files(tmp_path).values())[3]
    size = path.stat().st_size
    replace_by_a_folder(path)
    for ledger in tmp_path.glob("_manifests/.ledger/*/*.jsonl"):
        text = ledger.read_text()
        ledger.write_text(text.replace(f'"size": {size}', f'"size": {path.stat().st_size}'))
    assert retrieve(pacs, private.study, tmp_path).verdict == "partial"


# --- two at once -------------------------------------------------------------------------------------------


def test_two_processes_at_once(ct: Holding, tmp_path: Path) -> None:
    """Both end complete; each file is whole; nothing of either is left over."""
    with EmbeddedPacs(ct.folder, before_send=lambda sop: time.sleep(0.003)) as pacs:
        command = [sys.executable, "-m", "airflow_dicom_get.cli", "get", f"PACS@127.0.0.1:{pacs.port}"]
        command += ["--study", ct.study, "--to", str(tmp_path), "--json"]
        processes = [
            subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)
        ]
        ended = [process.communicate(timeout=60) for process in processes]
        assert [process.returncode for process in processes] == [0, 0], ended
        for out, _ in ended:
            value = json.loads(out)
            assert (value["verdict"], value["completed"], value["conflicts"]) == ("complete", 40, 0)
        assert {sop: dataset(path) for sop, path in files(tmp_path).items()} == {
            sop: ct.dataset(sop) for sop in ct.entries
        }
        assert [path for path in tmp_path.rglob(".*") if path.is_file()] == []
        before = sum(pacs.sent.values())
        assert retrieve(pacs, ct.study, tmp_path, verify_held="digest").skipped == 40
        assert sum(pacs.sent.values()) == before


def test_two_studies_are_apart(real: Holding, embedded: Any, tmp_path: Path) -> None:
    """The same folder for several studies: each has its ledger, and a query of one does not touch the other."""
    server = embedded(real.folder)
    studies = [uid for uid in server.archive.studies() if 1 < len(server.archive.entries(uid)) < 10][:3]
    result = GetScu(f"PACS@127.0.0.1:{server.port}", destination=tmp_path).get_study({"StudyInstanceUID": studies})
    assert result.verdict == "complete"
    assert {path.name for path in (tmp_path / "_manifests" / ".ledger").iterdir()} == set(studies)
    for study in studies:
        one = retrieve(server, study, tmp_path)
        assert (one.skipped, one.total) == (len(server.archive.entries(study)),) * 2


def test_a_sync_that_fails_in_any_way_is_told_and_waited_for_no_longer(
    pacs: EmbeddedPacs, private: Holding, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(sink: FilesystemSink, batch: object) -> None:
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(FilesystemSink, "_synced", broken)
        result = retrieve(pacs, private.study, tmp_path)
    assert (result.verdict, result.completed) == ("failed", 0)
    assert "Received, but not confirmed: sync: unexpected MemoryError" in {
        row["error"] for row in rows(result).values()
    }
    again = retrieve(pacs, private.study, tmp_path)
    assert (again.verdict, again.completed) == ("complete", COUNT)


def test_what_is_open_does_not_grow_with_the_studies_of_a_run(tmp_path: Path) -> None:
    studies = []
    (tmp_path / "pacs").mkdir()
    for number in range(8):
        studies.append(big_study(tmp_path / str(number), 1, 600, name=f"one{number}", series=1))
        for path in (tmp_path / str(number)).iterdir():
            path.rename(tmp_path / "pacs" / f"{number}-{path.name}")
    opened: list[int] = []
    destination = f"{tmp_path / 'out'}/"

    def look(event: object) -> None:
        links = []
        for path in Path("/proc/self/fd").iterdir():
            with suppress(FileNotFoundError):  # another thread closed it meanwhile
                links.append(os.readlink(path))
        opened.append(sum(link.startswith(destination) for link in links))

    with EmbeddedPacs(tmp_path / "pacs") as server:
        scu = GetScu(f"PACS@127.0.0.1:{server.port}", destination=tmp_path / "out")
        result = scu.get_study(
            {"StudyInstanceUID": studies},
            on_sub_operation=look,
        )
    assert (result.verdict, result.completed) == ("complete", 8)
    assert max(opened) <= 5, opened
