"""Instance Availability (0008,0056): asked for in the list, told in the manifest, and what it changes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from airflow_dicom_get import GetScu
from airflow_dicom_get.result import Result
from airflow_dicom_get.testing.misbehave import MisbehavingPacs
from airflow_dicom_get.testing.servers import Dcmqrscp, Orthanc
from tests.support.holdings import Holding


def get(pacs: MisbehavingPacs, folder: Path, **options: Any) -> Result:
    scu = GetScu(f"PACS@127.0.0.1:{pacs.port}", destination=folder, retries=0, **options)
    return scu.get_study({"StudyInstanceUID": pacs.instances[0].study})


def column(result: Result, name: str) -> dict[str, Any]:
    frame = result.manifest
    return dict(zip(frame["sop_instance_uid"], frame[name], strict=True))


@pytest.mark.parametrize(("said", "reason"), [("OFFLINE", "offline"), ("UNAVAILABLE", "unavailable")])
def test_what_the_source_has_not_at_hand_is_asked_for_once(said: str, reason: str, tmp_path: Path) -> None:
    with MisbehavingPacs(f"not_online:{said}", series=2, instances=3) as pacs:
        result = get(pacs, tmp_path)
        last = pacs.instances[-1].sop
        assert len(pacs.finals) == 2  # a request a series, and none again for the one that did not come
    assert (result.verdict, result.reason, result.completed) == ("partial", reason, 5)
    assert not result.transient
    assert column(result, "reason")[last] == reason
    told = column(result, "availability")
    assert told.pop(last) == said
    assert set(told.values()) == {"ONLINE"}


def test_a_text_that_is_no_availability_is_none(tmp_path: Path) -> None:
    """It would be a patient's, in a column that nobody asked for."""
    with MisbehavingPacs("not_online:DOE^JOHN 1961", series=1, instances=2) as pacs:
        result = get(pacs, tmp_path)
        last = pacs.instances[-1].sop
    told = column(result, "availability")
    assert pd.isna(told.pop(last))
    assert set(told.values()) == {"ONLINE"}


def test_one_that_comes_all_the_same_is_held(tmp_path: Path) -> None:
    with MisbehavingPacs("nearline:0", series=1, instances=2) as pacs:
        result = get(pacs, tmp_path)
    assert result.verdict == "complete"
    assert set(column(result, "availability").values()) == {"NEARLINE"}


def test_the_first_from_a_slow_store_may_take_four_times_as_long(tmp_path: Path) -> None:
    with MisbehavingPacs("nearline:0.8", series=1, instances=2) as pacs:
        assert get(pacs, tmp_path / "a", deadlines={"next_object": 0.4}).verdict == "complete"
    with MisbehavingPacs("nearline:9", series=1, instances=2) as pacs:
        late = get(pacs, tmp_path / "b", deadlines={"next_object": 0.2})
    assert late.verdict == "failed"
    assert "0.8 s, 4 times deadlines.next_object" in late.errors[0]["error"]


@pytest.mark.orthanc
def test_orthanc_tells_it(orthanc: Orthanc, ct: Holding, tmp_path: Path) -> None:
    result = GetScu(orthanc.node, destination=tmp_path).get_study({"StudyInstanceUID": ct.study})
    assert result.verdict == "complete"
    assert set(column(result, "availability").values()) == {"ONLINE"}


@pytest.mark.dcmtk
def test_dcmqrscp_does_not(dcmqrscp: Dcmqrscp, ct: Holding, tmp_path: Path) -> None:
    result = GetScu(dcmqrscp.node, destination=tmp_path).get_study({"StudyInstanceUID": ct.study})
    assert result.completed
    assert result.manifest["availability"].isna().all()


def test_a_source_that_does_not_tell_it_leaves_it_empty(tmp_path: Path) -> None:
    with MisbehavingPacs(series=3, instances=2) as pacs:
        result = get(pacs, tmp_path)
    assert result.verdict == "complete"
    assert result.manifest["availability"].isna().all()
