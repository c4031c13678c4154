"""``manifest=``: every instance that it lists, whatever it says of another place or time."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from airflow_dicom_get import GetScu
from airflow_dicom_get.errors import InvalidQuery, ManifestError
from airflow_dicom_get.testing.pacs import EmbeddedPacs
from airflow_dicom_get.testing.servers import HOST, Dcmqrscp
from tests.support.holdings import Holding

Embedded = Callable[..., EmbeddedPacs]


def scu_of(pacs: Any, destination: Path, **options: Any) -> GetScu:
    return GetScu(f"PACS@{HOST}:{pacs.port}", destination=destination, **options)


def held_of(ct: Holding, pacs: EmbeddedPacs, folder: Path) -> str:
    """The manifest of a complete retrieval."""
    result = scu_of(pacs, folder).get_study({"StudyInstanceUID": ct.study})
    assert (result.verdict, result.completed) == ("complete", 40)
    assert result.manifest_uri is not None
    return result.manifest_uri


def test_what_it_says_is_held_is_looked_for(embedded: Embedded, ct: Holding, tmp_path: Path) -> None:
    pacs = embedded(ct.folder)
    manifest = held_of(ct, pacs, tmp_path / "a")
    files = sorted((tmp_path / "a" / ct.study).rglob("*.dcm"))
    for path in files[:3]:
        path.unlink()
    again = scu_of(pacs, tmp_path / "a").get_study(manifest=manifest)
    assert (again.verdict, again.total, again.completed, again.skipped) == ("complete", 40, 40, 37)
    assert all(path.is_file() for path in files)
    elsewhere = scu_of(pacs, tmp_path / "b").get_study(manifest=manifest)
    assert (elsewhere.verdict, elsewhere.completed, elsewhere.skipped) == ("complete", 40, 0)


def test_the_hours_hold_for_it_too(embedded: Embedded, ct: Holding, tmp_path: Path) -> None:
    pacs = embedded(ct.folder)
    manifest = held_of(ct, pacs, tmp_path)
    before = pacs.total_associations
    scu = scu_of(pacs, tmp_path, window="22:00-06:00")
    scu._clock = lambda: datetime(2026, 3, 1, 12, tzinfo=UTC)
    result = scu.get_study(manifest=manifest)
    assert (result.verdict, result.reason, result.transient) == ("partial", "window", True)
    assert result.resume_at == datetime(2026, 3, 1, 22, tzinfo=UTC)
    assert pacs.total_associations == before


@pytest.mark.parametrize("level", ["instance", "study"])
def test_what_the_source_lists_no_longer(embedded: Embedded, ct: Holding, tmp_path: Path, level: str) -> None:
    """It is missing where it is not held, and counts as held where it is."""
    manifest = held_of(ct, embedded(ct.folder), tmp_path / "a")
    (tmp_path / "pacs").mkdir()
    lost = ct.files[:1] if level == "instance" else ct.files
    for path in set(ct.files) - set(lost):
        (tmp_path / "pacs" / f"{path.stem}-{path.parent.name}.dcm").write_bytes(path.read_bytes())
    pacs = embedded(tmp_path / "pacs")
    result = scu_of(pacs, tmp_path / "b").get_study(manifest=manifest)
    assert (result.total, result.expected, result.failed) == (40, 40, len(lost))
    assert (result.verdict, result.reason) == ("partial" if level == "instance" else "failed", "gone_from_list")
    assert not result.transient
    rows = result.manifest.set_index("sop_instance_uid")
    gone = [sop for sop, entry in ct.entries.items() if entry.path in lost]
    assert {(row.state, row.reason) for row in rows.loc[gone].itertuples()} == {("missing", "gone_from_list")}
    held = scu_of(pacs, tmp_path / "a").get_study(manifest=manifest)
    assert (held.verdict, held.total, held.skipped, held.withdrawn) == ("complete", 40, 40, 0)


@pytest.mark.parametrize("column", ["study_instance_uid", "series_instance_uid", "sop_instance_uid"])
@pytest.mark.parametrize("value", [None, "", "..", "1.2.A"])
def test_a_bad_row_is_an_error_before_traffic(
    embedded: Embedded, ct: Holding, tmp_path: Path, column: str, value: str | None
) -> None:
    pacs = embedded(ct.folder)
    frame = GetScu(f"PACS@{HOST}:{pacs.port}", destination=tmp_path).get_study({"StudyInstanceUID": ct.study}).manifest
    before = pacs.total_associations
    frame.loc[7, column] = value
    with pytest.raises(InvalidQuery, match="Row 8 of the manifest"):
        scu_of(pacs, tmp_path).get_study(manifest=frame)
    frame.loc[7, "state"] = "withdrawn"
    with pytest.raises(ManifestError, match="cannot be read"):
        scu_of(pacs, tmp_path).get_study(manifest=tmp_path / "none.parquet")
    assert pacs.total_associations == before
    assert scu_of(pacs, tmp_path).get_study(manifest=frame).total == 39


def test_nothing_is_asked_for_by_one_without_rows(embedded: Embedded, ct: Holding, tmp_path: Path) -> None:
    pacs = embedded(ct.folder)
    frame = scu_of(pacs, tmp_path).get_study({"StudyInstanceUID": ct.study}).manifest
    result = scu_of(pacs, tmp_path).get_study(manifest=frame[:0])
    assert (result.verdict, result.reason) == ("empty", "nothing_asked")


def test_without_a_list_they_are_asked_for_by_their_uids(embedded: Embedded, ct: Holding, tmp_path: Path) -> None:
    """Four series: each list of SOP Instance UIDs stands beside its series."""
    manifest = held_of(ct, embedded(ct.folder), tmp_path / "a")
    pacs = embedded(ct.folder, no_find=True)
    result = scu_of(pacs, tmp_path / "b").get_study(manifest=manifest)
    assert (result.verdict, result.reason, result.completed) == ("unverified", "no_list", 40)
    assert set(pacs.sent.values()) == {1}


@pytest.mark.parametrize("left", [40, 0])
def test_without_a_list_what_is_held_is_not_asked_for(
    embedded: Embedded, ct: Holding, tmp_path: Path, left: int
) -> None:
    """As with one, whatever the source has left of it."""
    manifest = held_of(ct, embedded(ct.folder), tmp_path)
    removed = sorted((tmp_path / ct.study).rglob("*.dcm"))[:3]
    for path in removed:
        path.unlink()
    pacs = embedded(ct.folder, no_find=True)
    if not left:
        pacs.hide |= set(ct.entries)
    result = scu_of(pacs, tmp_path).get_study(manifest=manifest)
    assert (result.total, result.skipped, result.completed) == (40, 37, 40 if left else 37)
    assert (result.verdict, result.reason) == (("unverified", "no_list") if left else ("partial", "not_sent"))
    assert set(pacs.sent) == ({path.stem for path in removed} if left else set())
    if left:
        again = scu_of(pacs, tmp_path).get_study(manifest=manifest)
        assert (again.verdict, again.reason, again.skipped) == ("unverified", "no_list", 40)
        assert len(pacs.sent) == 3


def test_without_a_list_rows_that_cannot_be_asked_for_ask_for_nothing(
    embedded: Embedded, ct: Holding, tmp_path: Path
) -> None:
    pacs = embedded(ct.folder)
    frame = scu_of(pacs, tmp_path / "a").get_study({"StudyInstanceUID": ct.study}).manifest[:1]
    frame["sop_instance_uid"], frame["state"], frame["reason"] = "1.2.A", "missing", "bad_uid"
    mute = embedded(ct.folder, no_find=True)
    result = scu_of(mute, tmp_path / "b").get_study(manifest=frame)
    assert (result.verdict, result.reason, result.total) == ("failed", "bad_uid", 1)
    assert not mute.sent


@pytest.mark.parametrize("state", ["failed", "conflict"])
def test_content_in_doubt_is_compared_by_digest(embedded: Embedded, ct: Holding, tmp_path: Path, state: str) -> None:
    """The file has its recorded size and other bytes: as a verify, or a run in which it conflicted, tells."""
    pacs = embedded(ct.folder)
    frame = scu_of(pacs, tmp_path).get_study({"StudyInstanceUID": ct.study}).manifest
    path = sorted((tmp_path / ct.study).rglob("*.dcm"))[0]
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert scu_of(pacs, tmp_path).get_study(manifest=frame).skipped == 40
    row = frame["sop_instance_uid"] == path.stem
    frame.loc[row, "state"] = state
    frame.loc[row, "reason"] = "size_changed" if state == "failed" else "different_content"
    for checksum in (None, "sha256"):
        assert scu_of(pacs, tmp_path, checksum=checksum).get_study(manifest=frame).skipped == 39


@pytest.mark.dcmtk
def test_a_real_archive(embedded: Embedded, dcmqrscp: Dcmqrscp, ct: Holding, tmp_path: Path) -> None:
    manifest = held_of(ct, embedded(ct.folder), tmp_path / "a")
    scu = GetScu(f"{dcmqrscp.ae_title}@{HOST}:{dcmqrscp.port}", destination=tmp_path / "b")
    first = scu.get_study(manifest=manifest)
    again = scu.get_study(manifest=manifest)
    assert (again.total, again.completed) == (40, first.completed)
    assert again.skipped == first.completed > 0
