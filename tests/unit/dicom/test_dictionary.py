"""Names of attributes, held against pydicom's data dictionary."""

from __future__ import annotations

import subprocess
import sys

import pytest
from pydicom.datadict import dictionary_keyword, dictionary_VR, tag_for_keyword

from airflow_dicom_get.dicom.dictionary import Attribute, find_attribute


@pytest.mark.parametrize(
    "keyword",
    [
        "StudyInstanceUID",
        "SeriesInstanceUID",
        "SOPInstanceUID",
        "PatientID",
        "QueryRetrieveLevel",
        "SpecificCharacterSet",
        "AccessionNumber",
        "StudyDate",
    ],
)
def test_every_way_to_name_an_attribute(keyword):
    tag = tag_for_keyword(keyword)
    assert tag is not None
    attribute = Attribute(tag, dictionary_keyword(tag), dictionary_VR(tag))
    for name in (keyword, f" {keyword} ", f"{tag:08x}", f"{tag:08X}", f"({tag >> 16:04x},{tag & 0xFFFF:04x})"):
        assert find_attribute(name) == attribute


def test_a_query_by_uids_loads_no_dictionary():
    """``dicom-get get --study`` needs neither pydicom nor pynetdicom, which take longer to import than the rest."""
    code = """
import sys
import airflow_dicom_get.cli.main, airflow_dicom_get.getscu, airflow_dicom_get.engine.study, airflow_dicom_get.net.peer
from airflow_dicom_get.lists.matching import Matcher
Matcher("IMAGE", {0x0020000D: "1.2", 0x0020000E: ["1.2.3"], 0x00100020: "A"})
print(*sorted({name.split(".")[0] for name in sys.modules} & {"pydicom", "pynetdicom", "numpy", "pandas", "pyarrow"}))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "\n"
