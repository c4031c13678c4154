"""The ``tags`` option: columns of the manifest, of what arrives and of what was there before."""

from __future__ import annotations

import pandas as pd
import pytest
from pydicom import dcmread

from airflow_dicom_get import GetScu
from airflow_dicom_get.testing.pacs import EmbeddedPacs
from airflow_dicom_get.testing.sample_data import usable_pydicom_files

TAGS = ["PatientName", "Rows", "SliceThickness", "KVP"]


@pytest.fixture(scope="module")
def pacs(tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("tags")
    for path in usable_pydicom_files():
        if path.name in (
            "chrH31.dcm",
            "chrX1.dcm",
            "chrGreek.dcm",
            "CT_small.dcm",
            "MR_small_bigendian.dcm",
            "image_dfl.dcm",
        ):
            (folder / path.name).write_bytes(path.read_bytes())
    with EmbeddedPacs(folder) as running:
        yield running, folder


@pytest.mark.parametrize("run", ["arriving", "held"])
def test_tags_are_decoded_by_character_set_and_byte_order(pacs, tmp_path_factory, run: str) -> None:
    running, folder = pacs
    destination = tmp_path_factory.mktemp(run)
    files = [dcmread(path) for path in folder.iterdir()]
    assert len(files) >= 5
    scu = GetScu(f"127.0.0.1:{running.port}", destination=destination, tags=TAGS)
    studies = sorted({str(ds.StudyInstanceUID) for ds in files})
    result = scu.get_study({"StudyInstanceUID": studies})
    if run == "held":
        result = scu.get_study({"StudyInstanceUID": studies})
        assert result.skipped == len(files)
    assert result.verdict == "complete"
    rows = result.manifest.set_index("sop_instance_uid")
    for ds in files:
        row = rows.loc[str(ds.SOPInstanceUID)]
        for tag in TAGS:
            value = ds.get(tag)
            wanted = None if value is None or str(value) == "" else str(value)
            if wanted is None:
                assert pd.isna(row[tag]), tag
            else:
                assert row[tag] == wanted
