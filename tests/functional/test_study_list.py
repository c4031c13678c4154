"""CSV files of studies with a label each."""

from __future__ import annotations

from pathlib import Path

import pytest

from airflow_dicom_get.engine.study_list import ListedStudy, read_study_list
from airflow_dicom_get.errors import InvalidOption
from airflow_dicom_get.storage.files import Below


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
        ("Cohort,StudyInstanceUID, StudyInstanceUID\na,1.2,1.3\n", "has two columns 'StudyInstanceUID'"),
        ("Cohort,StudyInstanceUID,Cohort\na,1.2,b\n", "has two columns 'Cohort'. Leave one of them."),
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


def test_a_row_without_a_value_is_an_error_unless_it_is_blank(tmp_path: Path) -> None:
    heading = "StudyInstanceUID,AccessionNumber,Remark\n1.2,A1,\n"
    blank = written(tmp_path, f"{heading},,\n , ,\n\n1.3,,\n")
    assert [one.value for one in read_study_list(blank)] == ["1.2", "1.3"]
    for row in (",SECRET,", " ,,SECRET"):
        with pytest.raises(InvalidOption, match="line 3, column StudyInstanceUID is empty") as caught:
            read_study_list(written(tmp_path, f"{heading}{row}\n"))
        assert "SECRET" not in str(caught.value)


@pytest.mark.parametrize(
    "heading",
    ["AccessionNumber", "PatientName", " PATIENTNAME", "patient_id", "Patient's Birth Date", "(0010,0030)", "00100010",
     "Referring Physician's Name", "Study ID", "AdmissionID"],
)  # fmt: skip
def test_a_column_that_tells_who_a_patient_is_gives_no_labels(tmp_path: Path, heading: str) -> None:
    for column, other in {"StudyInstanceUID": heading, "AccessionNumber": f"{heading} "}.items():
        if column == heading:
            continue  # a column that is there twice
        path = written(tmp_path, f'Cohort,{column},"{other}"\na,1.2,SECRET\n')
        assert read_study_list(path, label="Cohort")[0].label == "a"
        with pytest.raises(InvalidOption, match="cannot give the labels: it tells who a patient is") as caught:
            read_study_list(path, label=heading.strip())
        assert "SECRET" not in str(caught.value)


def test_nor_does_the_column_of_the_studies(tmp_path: Path) -> None:
    path = written(tmp_path, "Cohort,StudyInstanceUID\na,1.2\n")
    with pytest.raises(InvalidOption, match="column 'StudyInstanceUID', cannot give the labels"):
        read_study_list(path, label="StudyInstanceUID")


@pytest.mark.parametrize("mark", ["\v", "\f", "\x1c", "\x1d", "\x1e", "\x85", "\u2028", "\u2029"])
def test_a_row_ends_where_its_line_does(tmp_path: Path, mark: str) -> None:
    """Not within a remark: what stands behind is no study that anybody named."""
    path = written(tmp_path, f"AccessionNumber\tRemark\nA1\tsee{mark}20240001\nA2\t{mark}\nA3\tx")
    assert [(one.line, one.value) for one in read_study_list(path)] == [(2, "A1"), (3, "A2"), (4, "A3")]


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_lines_of_all_systems(tmp_path: Path, end: str) -> None:
    path = tmp_path / "cohort.csv"
    path.write_bytes(end.join(["AccessionNumber,Remark", 'A1,"two', 'lines"', "", "A2,x"]).encode())
    for file in (str(path), Below(tmp_path).at(str(path))):
        assert [(one.line, one.value) for one in read_study_list(file)] == [(3, "A1"), (5, "A2")]


def test_an_accession_number_has_no_end_of_line(tmp_path: Path) -> None:
    with pytest.raises(InvalidOption, match="line 3, column AccessionNumber is not an accession number"):
        read_study_list(written(tmp_path, 'AccessionNumber\n"A\n1"\n'))


def test_a_file_that_is_too_large_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "studies.csv"
    with path.open("wb") as file:
        file.truncate((64 << 20) + 1)  # sparse
    with pytest.raises(InvalidOption, match="cannot be read: it is larger than 64 MiB"):
        read_study_list(str(path))
