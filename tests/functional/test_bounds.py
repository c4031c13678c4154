"""What a peer sends is bounded: size and time of an object, the free space, what is read after a refusal."""

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
from airflow_dicom_get.net import get
from airflow_dicom_get.testing.misbehave import MisbehavingPacs
from airflow_dicom_get.testing.s3_servers import BUCKET, Moto
from airflow_dicom_get.testing.servers import Storescp

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


@pytest.fixture(params=["folder", "bucket", "node"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> dict[str, Any]:
    """A destination of each kind."""
    if request.param == "folder":
        return {"destination": tmp_path / "to"}
    if request.param == "bucket":
        moto: Moto = request.getfixturevalue("moto")
        config = {key: value for key, value in moto.config.items() if key != "bucket"}
        return {"destination": f"s3://{BUCKET}/{tmp_path.name}", "s3_config": config}
    storescp: Storescp = request.getfixturevalue("storescp")
    return {"destination": f"dicom://{storescp.node}", "manifest_root": tmp_path / "state"}


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


def test_a_large_object_that_is_held_is_drained_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What comes again to confirm a list is not refused, and its association goes on."""
    monkeypatch.setattr(get, "MAX_REST", 1000)
    with MisbehavingPacs("nothing_counted", series=1, instances=100, size=20_000) as pacs:
        result = retrieve(pacs, destination=tmp_path)
    assert result.verdict == "complete"


# --- the last of the free space ------------------------------------------------------------------------


@contextmanager
def disk_of(folder: Path, mib: int) -> Iterator[Path]:
    """A disk of its own below ``folder``; the test is skipped where we may not mount one."""
    place = folder / "disk"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={mib}m", "tmpfs", str(place)]
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
