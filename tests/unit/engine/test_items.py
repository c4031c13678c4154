"""What an Item takes of a C-FIND row."""

from __future__ import annotations

from typing import Any

import pytest
from pydicom.multival import MultiValue
from pydicom.valuerep import PersonName

from airflow_dicom_get.engine.items import values


@pytest.mark.parametrize(
    ("value", "texts"),
    [
        (None, []),
        ("", []),
        ("CT\\MR", ["CT", "MR"]),
        (MultiValue(str, ["CT", " ", "MR"]), ["CT", "MR"]),
        (PersonName("Doe^Jane"), ["Doe^Jane"]),  # which pydicom lets one iterate over
        (MultiValue(PersonName, ["Doe^Jane", "Roe^Richard"]), ["Doe^Jane", "Roe^Richard"]),
        (12, ["12"]),
    ],
)
def test_values(value: Any, texts: list[str]) -> None:
    assert values(value) == texts
