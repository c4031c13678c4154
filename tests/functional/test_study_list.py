"""CSV files of studies with a label each."""

from __future__ import annotations

from pathlib import Path

import pytest

from airflow_dicom_get.engine.study_list import ListedStudy, read_study_list
from airflow_dicom_get.errors import InvalidOption


def written(folder: Path, text: str) -> str:
    path = folder / "cohort.csv"
    path.write_text(text, "utf-8")
    return str(path)


def test_labels(tmp_path: Path) -> None:
    path = written(tmp_path, "Cohort;StudyInstanceUID\ncase 1;1.2\n;\ncontrol;1.3\ncase 1;1.2\n")
    assert read_study_list(path, label="Cohort") == [
        ListedStudy(2, "StudyInstanceUID", "1.2", "case 1"),
        ListedStudy(4, "StudyInstanceUID", "1.3", "control"),
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("StudyInstanceUID\n1.2\n", "has no column Cohort. Name it in the header line of the file."),
        ("Cohort,StudyInstanceUID\nSECRET,1.2\nSECRET,\n", "line 3, column StudyInstanceUID is empty. Correct"),
        ("Cohort,StudyInstanceUID\nSECRET,1.2\n,1.3\n", "line 3, column Cohort is empty."),
        ("Cohort,AccessionNumber\nx,SECRET\ny,SECRET\n", "line 3, column Cohort differs from the label"),
        ("Cohort,AccessionNumber\nSE\x07CRET,A1\n", "line 2, column Cohort contains characters that cannot be printed"),
        ("Cohort,StudyInstanceUID\na,1.2\nb,1.3,SECRET\n", "line 3 has more fields than the first line"),
        ('Cohort,StudyInstanceUID\na,1.2\n"SECRET,1.3\n', "line 3, column StudyInstanceUID is empty"),
    ],
)  # fmt: skip
def test_a_bad_row_is_named_by_line_and_column_and_not_quoted(tmp_path: Path, text: str, message: str) -> None:
    path = written(tmp_path, text)
    with pytest.raises(InvalidOption) as caught:
        read_study_list(path, label="Cohort")
    assert str(caught.value).startswith(f"csv: '{path}'")
    assert message in str(caught.value)
    assert "SECRET" not in str(caught.value)
