"""What to retrieve, from what was typed: keys, studies, or a list of studies in a file."""

from __future__ import annotations

import csv
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from airflow_dicom_get.checks import invalid, shown, shown_path
from airflow_dicom_get.dicom.uids import is_uid
from airflow_dicom_get.errors import InvalidOption


def query_of(studies: Iterable[str], keys: Iterable[str]) -> dict[str, Any]:
    """A query from ``--study UID`` and ``-k KEY=VALUE``. A key that is repeated becomes a list.

    Raises
    ------
    InvalidOption
        A key has no value, or the studies are given twice.
    """
    found: dict[str, list[str]] = {}
    for text in keys:
        key, equals, value = text.partition("=")
        if not equals or not key.strip():
            raise invalid("-k", f"{shown(key)} has no value", "Write KEY=VALUE, for example StudyDate=today.")
        found.setdefault(key.strip(), []).append(value)
    uids = [uid for text in studies for uid in text.split(",")]
    if uids:
        if "StudyInstanceUID" in found:
            raise invalid("--study", "is given beside -k StudyInstanceUID", "Give one of the two.")
        found["StudyInstanceUID"] = uids
    return {key: values[0] if len(values) == 1 else values for key, values in found.items()}


@dataclass(frozen=True, slots=True)
class StudyList:
    """The studies of a file: by their UIDs, or by accession numbers with the lines where these stand."""

    uids: tuple[str, ...] = ()
    accessions: tuple[tuple[int, str], ...] = ()


def read_studies(name: str) -> StudyList:
    """Read a CSV file with a column ``StudyInstanceUID`` or ``AccessionNumber``; commas, semicolons or tabs.

    Raises
    ------
    InvalidOption
        The file cannot be read, has neither column, or a value is malformed. Accession numbers are
        not shown: the message names the line.
    """
    try:
        text = Path(name).read_text("utf-8-sig")
    except OSError as error:
        raise _bad(f"{shown_path(name)} cannot be read: {error.strerror}", "Check the path.") from None
    except UnicodeDecodeError:
        raise _bad(f"{shown_path(name)} is not in UTF-8", "Save it as CSV in UTF-8.") from None
    head = text.partition("\n")[0]
    delimiter = max(",;\t", key=head.count)
    reader = csv.DictReader(text.splitlines(), delimiter=delimiter, restval="")
    columns = {column.strip(): column for column in reader.fieldnames or ()}
    wanted = next((column for column in ("StudyInstanceUID", "AccessionNumber") if column in columns), None)
    if wanted is None:
        raise _bad(
            f"{shown_path(name)} has no column StudyInstanceUID or AccessionNumber",
            "Name it in the first line of the file.",
        )
    values: dict[str, int] = {}
    try:
        for row in reader:
            value = row[columns[wanted]].strip()
            if value:
                values.setdefault(value, reader.line_num)
    except csv.Error:
        raise _bad(f"{shown_path(name)}, line {reader.line_num}: no CSV", "Check the quotes of this line.") from None
    if not values:
        raise _bad(f"{shown_path(name)} lists no studies", f"Fill the column {wanted}.")
    if wanted == "StudyInstanceUID":
        for uid, line in values.items():
            if not is_uid(uid):
                raise _bad(
                    f"{shown_path(name)}, line {line}: {shown(uid)} is no UID", "Correct the line, or take it out."
                )
        return StudyList(uids=tuple(values))
    for accession, line in values.items():
        if not accession.isprintable() or any(character in accession for character in "*?\\"):
            raise _bad(
                f"{shown_path(name)}, line {line}: no accession number", "Wildcards and backslashes are refused."
            )
    return StudyList(accessions=tuple((line, accession) for accession, line in values.items()))


def _bad(what: str, hint: str) -> InvalidOption:
    return invalid("--from-file", what, hint)
