"""Values that cannot be read cost themselves, and are printed nowhere: not into logs, and not into warnings."""

from __future__ import annotations

import logging
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from airflow_dicom_get import GetScu
from airflow_dicom_get.cli.main import main
from airflow_dicom_get.errors import OperationFailed
from airflow_dicom_get.testing.misbehave import MisbehavingPacs

KEYS = ["SeriesNumber", "InstanceNumber", "StudyTime", "Modality"]


@pytest.fixture
def pacs() -> Iterator[MisbehavingPacs]:
    with MisbehavingPacs("odd_values") as running:
        yield running
    assert running.faults == []


def test_in_process(pacs: MisbehavingPacs, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    study = {"StudyInstanceUID": pacs.study_uid}
    scu = GetScu(f"PACS@127.0.0.1:{pacs.port}", destination=tmp_path, tags=["PatientID", "SeriesNumber", "StudyDate"])
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        for level in ("STUDY", "SERIES", "IMAGE"):
            for as_frame in (False, True):
                rows: Any = scu.find(study, level=level, return_keys=KEYS, as_frame=as_frame)
                assert len(rows) == {"STUDY": 1, "SERIES": 2, "IMAGE": 8}[level]
        assert {row.SeriesNumber for row in scu.find(study, level="SERIES")} == {None}
        assert scu.plan(study).instances == 8
        result = scu.get_study(study)
    assert [warning for warning in seen if "HOSTILE" in str(warning.message)] == []
    assert "HOSTILE^" not in caplog.text
    assert (result.verdict, result.completed) == ("complete", 8)
    table = result.manifest
    assert table["instance_number"].isna().all()
    assert table["series_number"].isna().all()
    assert set(table["SeriesNumber"]) == {"HOSTILE^PATIENT"}  # a column that was asked for is as it came


@pytest.mark.parametrize("verb", ["find", "get"])
def test_in_the_shell(pacs: MisbehavingPacs, tmp_path: Path, verb: str) -> None:
    call = [sys.executable, "-W", "always", "-m", "airflow_dicom_get.cli", verb, f"PACS@127.0.0.1:{pacs.port}"]
    call += ["--study", pacs.study_uid, "--verbose"]
    call += ["--to", str(tmp_path)] if verb == "get" else ["--level", "IMAGE", "--return-key", "Modality"]
    done = subprocess.run(call, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert "HOSTILE^" not in done.stderr
    assert ("HOSTILE^" in done.stdout) == (verb == "find")


# --- sequences in sequences ----------------------------------------------------------------------------


def test_a_row_of_sequences_without_end_is_lost_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with MisbehavingPacs("find_nested") as pacs:
        node, study = f"PACS@127.0.0.1:{pacs.port}", {"StudyInstanceUID": pacs.study_uid}
        scu = GetScu(node, destination=tmp_path)
        with pytest.raises(OperationFailed, match="1 row that cannot be read: its sequences nest deeper than 16"):
            scu.find(study)
        assert main(["find", node, "--study", pacs.study_uid]) == 1
        assert "deeper than 16" in capsys.readouterr().err
        assert scu.get_study(study).verdict == "complete"  # which reads no sequences
    with MisbehavingPacs("find_nested", param=16) as pacs:
        scu = GetScu(f"PACS@127.0.0.1:{pacs.port}")
        assert len(scu.find({"StudyInstanceUID": pacs.study_uid}, level="IMAGE")) == 8
