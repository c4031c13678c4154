"""Lists of studies in CSV files: named by UID or accession number, and labelled where that is asked for."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from airflow_dicom_get.config.checks import about, invalid, shown, shown_path
from airflow_dicom_get.dicom.uids import is_uid
from airflow_dicom_get.errors import InvalidOption

UID, ACCESSION = "StudyInstanceUID", "AccessionNumber"


@dataclass(frozen=True, slots=True)
class ListedStudy:
    """A study that a file names."""

    line: int
    """Where it stands for the first time."""
    key: str
    """``StudyInstanceUID`` or ``AccessionNumber``, the same for all of a file."""
    value: str
    label: str = ""


def read_study_list(path: str, *, label: str | None = None, option: str = "csv") -> list[ListedStudy]:
    """Read a CSV file with a column ``StudyInstanceUID`` or ``AccessionNumber``; commas, semicolons or tabs.

    Parameters
    ----------
    path : str
        The file, in UTF-8. Of both columns the first is taken; others are not looked at.
    label : str, optional
        Name of a column that says what each study is to be called. Then every row has to name a study and a label,
        and a study that stands there twice has to have the same.
    option : str
        What messages call the file.

    Raises
    ------
    InvalidOption
        The file cannot be read, has no such column, lists nothing, or a row is malformed. The message names line and
        column; accession numbers and labels are not shown.
    """
    rows = _Rows(path, option, label)
    found: dict[str, ListedStudy] = {}
    for line, value, name in rows.read():
        before = found.setdefault(value, ListedStudy(line, rows.key, value, name))
        if before.label != name:
            raise rows.bad(line, str(label), f"differs from the label of the same study in line {before.line}")
    if not found:
        raise invalid(option, f"{shown_path(path)} lists no studies", f"Give a value in the column {rows.key}.")
    return list(found.values())


class _Rows:
    """The rows of a file, and what is wrong with them."""

    def __init__(self, path: str, option: str, label: str | None) -> None:
        self._path, self._option = path, option
        text = self._text()
        head = text.partition("\n")[0]
        self._reader = csv.DictReader(text.splitlines(), delimiter=max(",;\t", key=head.count), restval="")
        self._columns = {column.strip(): column for column in self._reader.fieldnames or ()}
        self.key = next((column for column in (UID, ACCESSION) if column in self._columns), "")
        if not self.key:
            raise self._without(f"{UID} or {ACCESSION}")
        if label is not None and label not in self._columns:
            raise self._without(shown(label).strip("'"))
        self._label = label

    def _text(self) -> str:
        try:
            return Path(self._path).read_text("utf-8-sig")
        except OSError as error:
            what, hint = f"cannot be read: {error.strerror}", "Check the path."
        except UnicodeDecodeError:
            what, hint = "is not in UTF-8", "Save it as CSV in UTF-8."
        raise invalid(self._option, f"{shown_path(self._path)} {what}", hint)

    def _without(self, column: str) -> InvalidOption:
        what = f"{shown_path(self._path)} has no column {column}"
        return invalid(self._option, what, "Name it in the header line of the file.")

    def bad(self, line: int, column: str, what: str, hint: str = "") -> InvalidOption:
        """What is wrong with one row."""
        where = f"{shown_path(self._path)}, line {line}, column {column}"
        return invalid(self._option, about(where, what).removesuffix("."), hint or "Correct the line, or remove it.")

    def read(self) -> Iterator[tuple[int, str, str]]:
        """Line, value and label of every row that is not blank."""
        try:
            for row in self._reader:
                yield from self._checked(self._reader.line_num, row)
        except csv.Error:
            where = f"{shown_path(self._path)}, line {self._reader.line_num}"
            raise invalid(self._option, f"{where} is not valid CSV", "Check the quotes of this line.") from None

    def _checked(self, line: int, row: Mapping[str | None, str]) -> Iterator[tuple[int, str, str]]:
        if any(text.strip() for text in row.get(None, ())):
            where = f"{shown_path(self._path)}, line {line}"
            raise invalid(
                self._option, f"{where} has more fields than the first line", "Quote values that contain a comma."
            )
        value = row[self._columns[self.key]].strip()
        label = row[self._columns[self._label]].strip() if self._label is not None else ""
        if self._label is not None and any(text.strip() for name, text in row.items() if name is not None):
            for column, text in ((self.key, value), (self._label, label)):
                if not text:
                    raise self.bad(line, column, "is empty")
            if not label.isprintable():
                raise self.bad(line, self._label, "contains characters that cannot be printed")
        if not value:
            return
        if self.key == UID and not is_uid(value):
            raise self.bad(line, UID, f"{shown(value)} is not a valid UID")
        if self.key == ACCESSION and (not value.isprintable() or any(one in value for one in "*?\\")):
            raise self.bad(line, ACCESSION, "is not an accession number", "Wildcards and backslashes are refused.")
        yield line, value, label
