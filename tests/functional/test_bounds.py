"""What a peer sends is bounded: an object, what is read after a refusal, the disk, and the memory that rows take."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from airflow_dicom_get import GetScu
from airflow_dicom_get.errors import DestinationFull
from airflow_dicom_get.net import get
from airflow_dicom_get.sinks.filesystem import Room
from airflow_dicom_get.testing.misbehave import MisbehavingPacs
from airflow_dicom_get.testing.misbehaving.archive import CT
from airflow_dicom_get.testing.misbehaving.wire import EXPLICIT_LE, IMPLICIT_LE
from tests.support.measured import shell

MIB = 1 << 20


def retrieve(pacs: MisbehavingPacs, **options: Any) -> Any:
    scu = GetScu(f"PACS@127.0.0.1:{pacs.port}", **{"retries": 1, **options})
    return scu.get_study({"StudyInstanceUID": pacs.study_uid})


def reasons(result: Any) -> dict[str, str]:
    rows = result.manifest
    return dict(rows[rows["reason"].notna()][["sop_instance_uid", "reason"]].itertuples(index=False))


def assert_it_alone_is_lost(result: Any, pacs: MisbehavingPacs, reason: str) -> None:
    assert (result.verdict, result.reason, result.completed) == ("partial", reason, len(pacs.uids) - 1)
    assert reasons(result) == {pacs.uids[2]: reason}


# --- an object without end -----------------------------------------------------------------------------


def test_an_object_without_end_costs_itself_and_its_association(
    place: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(get, "MAX_OBJECT", 24 * MIB)
    with MisbehavingPacs("endless_object", series=1, instances=5, victim=2) as pacs:
        result = retrieve(pacs, **place)
        assert_it_alone_is_lost(result, pacs, "too_large")
        assert pacs.associations <= 5  # three for lists, the one that was given up, the one that went on
    assert result.errors[0]["hint"]


def test_an_object_that_comes_too_slowly_ends_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(get, "MAX_OBJECT_HOURS", 0.6 / 3600)
    with MisbehavingPacs("trickle_pdus", series=1, instances=5, victim=2, param=0.1) as pacs:
        result = retrieve(pacs, destination=tmp_path, deadlines={"min_rate": 0})
        assert_it_alone_is_lost(result, pacs, "too_large")


@pytest.mark.parametrize("mode", ["endless_garbage", "endless_on_context"])
def test_what_was_refused_is_not_read_for_ever(tmp_path: Path, mode: str) -> None:
    with MisbehavingPacs(mode, series=1, instances=5, victim=2) as pacs:
        result = retrieve(pacs, destination=tmp_path)
        reason = {"endless_garbage": "unparsable", "endless_on_context": "association_lost"}[mode]
        assert_it_alone_is_lost(result, pacs, reason)
    if mode == "endless_on_context":
        assert "more than 64 MiB, or for more than 30 s, of what was refused" in str(result.errors)


def test_what_the_destination_refuses_is_not_read_for_ever_either(tmp_path: Path) -> None:
    with (
        MisbehavingPacs("endless_object", series=1, instances=5, victim=2) as pacs,
        MisbehavingPacs("no_storage") as destination,
    ):
        to = f"dicom://DEST@127.0.0.1:{destination.port}"
        result = retrieve(pacs, destination=to, manifest_root=tmp_path, retries=0)
    assert (result.verdict, result.reason) == ("failed", "destination_refused")
    assert reasons(result) == dict.fromkeys(pacs.uids, "destination_refused")


def test_many_large_objects_of_classes_that_are_not_wanted_end_no_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each costs its association, and is then known to be of another class."""
    monkeypatch.setattr(get, "MAX_REST", 1000)
    with MisbehavingPacs("no_classes", series=1, instances=30, size=400_000, pairs=[(CT, EXPLICIT_LE)]) as pacs:
        result = retrieve(pacs, destination=tmp_path, sop_classes=["MRImageStorage"], retries=1)
    assert (result.verdict, result.total) == ("empty", 0), result.errors


def test_a_large_object_that_is_held_is_drained_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What comes again to confirm a list is not refused, and its association goes on."""
    monkeypatch.setattr(get, "MAX_REST", 1000)
    with MisbehavingPacs("nothing_counted", series=1, instances=100, size=20_000) as pacs:
        result = retrieve(pacs, destination=tmp_path)
    assert result.verdict == "complete"


# --- the last of the free space ------------------------------------------------------------------------


@contextmanager
def disk_of(folder: Path, mib: int, files: int = 0) -> Iterator[Path]:
    """A disk of its own below ``folder``; the test is skipped where we may not mount one."""
    place = folder / "disk"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={mib}m,nr_inodes={files}", "tmpfs", str(place)]
    if not shutil.which("mount") or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("mounting a tmpfs needs root")
    try:
        yield place
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


@pytest.mark.parametrize("instances", [5, 400])
def test_the_last_of_the_free_space_is_left(tmp_path: Path, instances: int) -> None:
    """By one object without end, and by many."""
    mode = "endless_object" if instances == 5 else None
    with MisbehavingPacs(mode, series=1, instances=instances, size=MIB) as pacs, disk_of(tmp_path, 200) as disk:
        result = retrieve(pacs, destination=disk)
        free = os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize
        assert (result.verdict, result.reason, result.transient) == ("partial", "destination_full", True)
        assert 0 < result.completed < instances
        assert not list(disk.rglob("*.part"))
        if instances > 5:
            assert 6 * MIB < free < 12 * MIB, f"{free >> 20} MiB are free"
        assert "MiB are not used" in str(result.errors)


def test_the_smallest_files_leave_it_too(tmp_path: Path) -> None:
    """Each of them takes a whole block of the disk."""
    with disk_of(tmp_path, 80) as disk:
        room = Room(disk)

        def fill() -> None:
            for number in range(30_000):
                (disk / str(number)).write_bytes(bytes(700))
                room.wrote(700)

        with pytest.raises(DestinationFull):
            fill()
        assert os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize > 2 * MIB


def test_the_last_of_the_files_is_left(tmp_path: Path) -> None:
    """By objects that are small, and many."""
    with MisbehavingPacs(series=1, instances=400, size=1000) as pacs, disk_of(tmp_path, 200, files=300) as disk:
        result = retrieve(pacs, destination=disk)
        assert (result.verdict, result.reason, result.transient) == ("partial", "destination_full", True)
        assert 200 < result.completed < 300
        assert os.statvfs(disk).f_favail > 0
        assert not list(disk.rglob("*.part"))
        assert "files; that for the last 3 is not used" in str(result.errors)
        assert result.manifest_uri is not None


# --- memory --------------------------------------------------------------------------------------------


def run(pacs: MisbehavingPacs, verb: str, *options: str) -> tuple[int, str, int]:
    """The shell in a process of its own: its exit status, what it said, and its peak memory in MiB."""
    return shell(verb, f"PACS@127.0.0.1:{pacs.port}", "--study", pacs.study_uid, "--json", *options)


@pytest.fixture(scope="module")
def usual(tmp_path_factory: pytest.TempPathFactory) -> int:
    """Peak memory in MiB of a get of a few instances."""
    with MisbehavingPacs(series=1, instances=150) as pacs:
        status, said, peak = run(pacs, "get", "--to", str(tmp_path_factory.mktemp("usual")))
    assert status == 0, said
    return peak


def test_a_claim_of_a_count_lifts_no_bound(usual: int) -> None:
    """At most 1 KB for each of 200,000 rows."""
    with MisbehavingPacs("find_claims", series=1, instances=3) as pacs:
        status, said, peak = run(pacs, "plan")
    assert status == 1, said
    assert "more than 200000 rows" in said
    assert peak < usual + 200


@pytest.mark.parametrize(("level", "status"), [("STUDY", 1), ("IMAGE", 1)])
def test_rows_of_any_size_do_not_fill_the_memory(usual: int, level: str, status: int) -> None:
    with MisbehavingPacs("find_huge_rows") as pacs:
        found, said, peak = run(pacs, "find", "--level", level)
    assert found == status, said
    assert "more than 64 MiB in response to one C-FIND" in said
    assert said.count("more than 64 KiB") == 1
    assert peak < usual + 30


def test_a_row_that_is_too_long_is_lost_alone() -> None:
    with MisbehavingPacs("find_huge_rows", param=2) as pacs:
        scu = GetScu(f"PACS@127.0.0.1:{pacs.port}")
        rows = scu.find({"StudyInstanceUID": pacs.study_uid}, level="IMAGE")
    assert (len(rows), rows.doubt) == (8, "list_contradicted")


def test_an_everyday_value_that_is_too_long_costs_no_row(tmp_path: Path) -> None:
    with MisbehavingPacs("find_long_texts") as pacs:
        scu = GetScu(f"PACS@127.0.0.1:{pacs.port}", destination=tmp_path)
        (row,) = scu.find({"StudyInstanceUID": pacs.study_uid}, return_keys=["StudyID"])
        assert (row.StudyID, row.StudyDescription) == ("X" * 3000, "X" * 3000)
        result = scu.get_study({"StudyInstanceUID": pacs.study_uid})
    assert result.verdict == "complete"
    assert set(result.manifest["modality"]) == {"X" * 1024}


def test_texts_that_are_kept_are_cut(tmp_path: Path, usual: int) -> None:
    with MisbehavingPacs("huge_modality", series=1, instances=250, pairs=[(CT, IMPLICIT_LE)]) as pacs:
        status, said, peak = run(pacs, "get", "--to", str(tmp_path))
    assert status == 0, said
    assert peak < usual + 90  # a few of these texts at a time
    assert sum(path.stat().st_size for path in (tmp_path / "_manifests").rglob("*.jsonl")) < 250 * 2048
