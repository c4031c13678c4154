"""Data sets whose last element runs past their end: kept, since the PACS has no better ones, and said."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from airflow_dicom_get import GetScu
from airflow_dicom_get.cli.main import main
from airflow_dicom_get.store import StoreScu
from airflow_dicom_get.testing.misbehave import MisbehavingPacs
from airflow_dicom_get.testing.misbehaving.archive import CT, PATIENT_ID
from airflow_dicom_get.testing.misbehaving.wire import DEFLATED_LE, EXPLICIT_LE, IMPLICIT_LE, JPEG_2000
from airflow_dicom_get.testing.s3_servers import BUCKET, Moto
from airflow_dicom_get.testing.sample_data import big_study
from airflow_dicom_get.testing.servers import Storescp
from airflow_dicom_get.verify import verify
from tests.support.odd_destination import OddDestination

WORD = "truncated_dataset"


@pytest.mark.parametrize("syntax", [EXPLICIT_LE, IMPLICIT_LE, JPEG_2000, DEFLATED_LE])
@pytest.mark.parametrize("size", [2000, 700_000])
def test_it_is_stored_with_a_remark(syntax: str, size: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with MisbehavingPacs("ds_truncated", series=1, instances=3, size=size, pairs=[(CT, syntax)]) as pacs:
        node, study = f"PACS@127.0.0.1:{pacs.port}", pacs.instances[0].study
        scu = GetScu(node, destination=tmp_path, retries=0)
        result = scu.get_study({"StudyInstanceUID": study})
        assert (result.verdict, result.completed, result.warning) == ("complete", 3, 1)
        assert [(e["count"], e["error"].split(":")[0]) for e in result.errors] == [(1, WORD)]
        rows = result.manifest
        odd = rows[rows["reason"].notna()]
        assert list(odd["state"]) == ["stored"]
        assert list(odd["reason"]) == [WORD]
        # Fetching it again would bring the same: it is held, and its row still says what it is.
        again = scu.get_study({"StudyInstanceUID": study})
        assert (again.verdict, again.skipped, again.warning) == ("complete", 3, 1)
        rows = again.manifest
        assert list(rows[rows["reason"].notna()]["reason"]) == [WORD]
    for found in (verify(result.manifest_uri), verify(study=study, destination=tmp_path)):
        assert found.same
        assert [e["error"].split(":")[0] for e in found.errors] == [WORD]
        assert [row.reason for row in found.rows if row.reason] == [WORD]
    assert not verify(result.manifest_uri, quick=True).errors
    assert main(["verify", "--manifest", str(result.manifest_uri), "--json"]) == 0
    assert WORD in json.loads(capsys.readouterr().out)["errors"][0]["error"]


def test_another_node_and_a_bucket_are_told_the_same_way(storescp: Storescp, moto: Moto, tmp_path: Path) -> None:
    places: tuple[dict[str, Any], ...] = (
        {"destination": f"dicom://{storescp.node}", "manifest_root": tmp_path / "state"},
        {
            "destination": f"s3://{BUCKET}/truncated",
            "s3_config": {k: v for k, v in moto.config.items() if k != "bucket"},
        },
    )
    for place in places:
        with MisbehavingPacs("ds_truncated", series=1, instances=3, size=700_000) as pacs:
            scu = GetScu(f"PACS@127.0.0.1:{pacs.port}", retries=0, **place)
            for number in (0, 3):
                result = scu.get_study({"StudyInstanceUID": pacs.instances[0].study})
                assert (result.verdict, result.skipped, result.warning) == ("complete", number, 1), place
                assert list(result.manifest["reason"].dropna()) == [WORD]


@pytest.mark.parametrize(
    ("mode", "word", "told"), [("ds_truncated", WORD, 1), ("other_patient", "other_patient_id", 3)]
)
def test_an_object_tells_it_itself_where_no_record_does(mode: str, word: str, told: int, moto: Moto) -> None:
    prefix = f"told-by-itself-{mode}"
    config = {k: v for k, v in moto.config.items() if k != "bucket"}
    with MisbehavingPacs(mode, series=1, instances=3, size=2000) as pacs:
        scu = GetScu(f"PACS@127.0.0.1:{pacs.port}", destination=f"s3://{BUCKET}/{prefix}", s3_config=config)
        for number in (0, 3):
            result = scu.get_study({"PatientID": PATIENT_ID})
            assert (result.verdict, result.skipped, result.warning) == ("complete", number, told)
            assert set(result.manifest["reason"].dropna()) == {word}
            for key in moto.objects(f"{prefix}/_manifests/.ledger/"):
                moto.client().delete_object(Bucket=BUCKET, Key=key)


@pytest.mark.parametrize("checksum", ["sha256", None])
@pytest.mark.parametrize("place", ["folder", "bucket"])
def test_another_one_does_not_take_its_place(moto: Moto, tmp_path: Path, place: str, checksum: Any) -> None:
    """Without digests its size tells that it is as it came, and in a bucket its ETag."""
    destination = str(tmp_path / "to") if place == "folder" else f"s3://{BUCKET}/came-truncated-{checksum}"
    study = ""
    for mode in ("ds_truncated", None):
        with MisbehavingPacs(mode, series=1, instances=3, size=2000) as pacs:
            study = pacs.instances[0].study
            scu = GetScu(f"PACS@127.0.0.1:{pacs.port}", destination=destination, retries=0, checksum=checksum,
                         resume=mode is not None, s3_config=moto.config if place == "bucket" else None)  # fmt: skip
            result = scu.get_study({"StudyInstanceUID": study})
        if mode is not None:
            assert (result.verdict, result.warning) == ("complete", 1)
    assert (result.verdict, result.conflicts, result.completed) == ("partial", 1, 2)


def test_store_tells_it_too(tmp_path: Path) -> None:
    big_study(tmp_path / "source", 2, 20_000, name="cut")
    cut = min((tmp_path / "source").iterdir())
    cut.write_bytes(cut.read_bytes()[:-5000])
    with OddDestination() as destination:
        for number in (0, 2):
            result = StoreScu(destination.node, manifest_root=tmp_path / "state").store(tmp_path / "source")
            assert (result.verdict, result.skipped, result.warning) == ("complete", number, 1)
            assert list(result.manifest["reason"].dropna()) == [WORD]
            assert [(e["count"], e["error"].split(":")[0]) for e in result.errors] == [(1, WORD)]


@pytest.mark.parametrize("syntax", [EXPLICIT_LE, JPEG_2000])
def test_one_whose_elements_before_the_pixels_are_cut_is_kept_too(
    syntax: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only the three UIDs are needed to give it its place."""
    from airflow_dicom_get.testing.misbehaving.modes_object import DsTruncated

    whole: Callable[..., object] = DsTruncated.bytes_for

    def without_pixels(mode: DsTruncated, instance: object) -> list[bytes]:
        data = b"".join(whole(mode, instance))  # type: ignore[arg-type]
        return [data[: data.index(b"\xe0\x7f\x10\x00") - 3]]

    monkeypatch.setattr(DsTruncated, "bytes_for", without_pixels)
    with MisbehavingPacs("ds_truncated", series=1, instances=3, pairs=[(CT, syntax)]) as pacs:
        result = GetScu(f"PACS@127.0.0.1:{pacs.port}", destination=tmp_path, retries=0).get_study(
            {"StudyInstanceUID": pacs.instances[0].study}
        )
    assert (result.verdict, result.completed, result.warning) == ("complete", 3, 1)
