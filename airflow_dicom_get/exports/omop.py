"""OMOP imaging: rows of ``image_occurrence``, the table of OHDSI's Medical Imaging extension (MI-CDM).

Its columns and what may be null there are those of OHDSI/ImageWG (``OMOP_CDM_Medical_Imaging_Ex_Field_Level.csv``).
Persons, procedures and dates are not ours: they come from a file of the user.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any

from airflow_dicom_get.config.checks import about, invalid, shown, shown_path
from airflow_dicom_get.config.destination import ForwardDestination, parse_destination
from airflow_dicom_get.dicom.uids import is_uid
from airflow_dicom_get.engine.study_list import csv_rows
from airflow_dicom_get.errors import InvalidOption, ManifestError
from airflow_dicom_get.exports.cohort import Cohort
from airflow_dicom_get.exports.series import series_table
from airflow_dicom_get.exports.tables import encoded

if TYPE_CHECKING:
    from pandas import DataFrame

    from airflow_dicom_get.config.options import ExportOptions
    from airflow_dicom_get.exports.writing import Target

COLUMNS = (
    "image_occurrence_id",
    "person_id",
    "procedure_occurrence_id",
    "visit_occurrence_id",
    "anatomic_site_concept_id",
    "wadors_uri",
    "local_path",
    "image_occurrence_date",
    "image_study_uid",
    "image_series_uid",
    "modality_concept_id",
)
"""Of ``image_occurrence``, in the order of its DDL."""
MODALITY_CONCEPTS: Mapping[str, int] = {
    "CFM": 42628535,
    "CT": 4300757,
    "DG": 4082994,
    "DMS": 40486413,
    "DX": 4178367,
    "ECG": 4163951,
    "EEG": 4031049,
    "EMG": 4179815,
    "EOG": 2313662,
    "EPS": 4098039,
    "ES": 4313889,
    "GM": 4036697,
    "HD": 4196232,
    "IVOCT": 44784222,
    "IVUS": 4045961,
    "KER": 4099540,
    "LEN": 762602,
    "MG": 4324693,
    "MR": 4013636,
    "NM": 4155794,
    "OAM": 4090078,
    "OCT": 4213040,
    "OP": 4290746,
    "PT": 4305790,
    "PX": 45768262,
    "RG": 4178367,
    "RTIMAGE": 1242725,
    "SRF": 4288071,
    "TG": 4231544,
    "US": 4230801,
    "VA": 4056269,
    "XA": 4299523,
    "XC": 4014022,
}
"""Standard concepts of DICOM modalities.

Source: github.com/paulnagy/DICOM2OMOP, *files/OMOP CDM Staging/cs_values_maps_to.csv* ("Maps to") at commit 122b4947,
its concepts of modalities being numbered in the order of *part3_modality_athena.csv*. Those of CT, MR and PT were
found in other sources, too.
"""
NO_CONCEPT = 0
"""OMOP's own for what has no standard concept."""
_UID, _ACCESSION = "StudyInstanceUID", "AccessionNumber"
_IDS = (
    "person_id",
    "procedure_occurrence_id",
    "visit_occurrence_id",
    "anatomic_site_concept_id",
    "modality_concept_id",
)
_DATE = "image_occurrence_date"
_NEEDED = ("person_id", "procedure_occurrence_id", _DATE)
_TEXTS = ("wadors_uri",)
_LARGEST_ID = 2**31 - 1
_SHOWN = 10


@dataclass(frozen=True, slots=True)
class _Mapped:
    """What the file says of a study."""

    line: int
    values: tuple[Any, ...]
    """In the order of :data:`_VALUES`."""


_VALUES = (*_IDS, _DATE, *_TEXTS)


def image_occurrence(cohort: Cohort, options: ExportOptions) -> DataFrame:
    """One row a series of which something is held, numbered from 1 in the order of the UIDs.

    Raises
    ------
    InvalidOption
        The mapping cannot be read, a row of it is malformed, or a study has none. It names lines, columns and studies,
        and shows no values.
    ManifestError
        A UID is malformed, or the mapping is by accession number and the manifest has none.
    """
    import pandas as pd

    assert options.mapping is not None
    mapping = _Mapping(options.mapping)
    series = series_table(cohort)
    series = series[series["instanceCount"] > 0].reset_index(drop=True)
    for uid in (*series[_UID].unique(), *series["SeriesInstanceUID"]):
        if not (isinstance(uid, str) and is_uid(uid)):
            raise ManifestError(f"{shown(uid)} in the manifest is not a valid UID.", hint="Find out who wrote it.")
    by_study = _by_study(cohort, mapping, list(series[_UID].unique()))
    found = pd.DataFrame([by_study[uid].values for uid in series[_UID]], columns=list(_VALUES))
    for name in _IDS:
        found[name] = found[name].astype("Int64")
    concepts = series["Modality"].map(MODALITY_CONCEPTS.get).astype("Int64").fillna(NO_CONCEPT)
    found = found.assign(
        image_occurrence_id=pd.Series(range(1, len(series) + 1), dtype="Int64"),
        local_path=series["series_uri"].map(_local_path, na_action="ignore").astype("string"),
        image_study_uid=series[_UID],
        image_series_uid=series["SeriesInstanceUID"],
        modality_concept_id=found["modality_concept_id"].fillna(concepts),
        wadors_uri=found["wadors_uri"].astype("string"),
    )
    ordered: DataFrame = found[list(COLUMNS)]
    return ordered


def _local_path(uri: str) -> str | None:
    """Where the files of a series lie: a path, or the address of a prefix; a node that it was forwarded to is none."""
    try:
        place = parse_destination(uri, "uri")
    except InvalidOption:
        return None
    return None if isinstance(place, ForwardDestination) else str(place)


def contents(cohort: Cohort, options: ExportOptions, target: Target) -> list[tuple[str, bytes]]:
    """The rows; beside them, in a file of its own, what is missing, which the table has no place for."""
    made = [(target.name, encoded(image_occurrence(cohort, options), target.name))]
    missing = cohort.missing[["study_instance_uid", "series_instance_uid", "sop_instance_uid", "state", "reason"]]
    if len(missing):
        name = f"{target.stem}.missing.csv"
        made.insert(0, (name, encoded(missing, name)))
    return made


def _by_study(cohort: Cohort, mapping: _Mapping, studies: list[str]) -> dict[str, _Mapped]:
    """What the mapping says of each study."""
    if mapping.key == _UID:
        found = {uid: mapping.rows[uid] for uid in studies if uid in mapping.rows}
    elif mapping.key not in cohort.columns:
        raise ManifestError(
            f"{shown_path(mapping.path)} names accession numbers, and the manifest has no column {_ACCESSION}.",
            hint=f"Retrieve with tags={_ACCESSION}, or name the studies by {_UID}.",
        )
    else:
        found = {}
        pairs = cohort.held[["study_instance_uid", _ACCESSION]].dropna().drop_duplicates()
        for uid, accession in zip(pairs["study_instance_uid"], pairs[_ACCESSION], strict=True):
            row = mapping.rows.get(accession.strip())
            if row is not None and found.setdefault(uid, row) is not row:
                what = f"{shown_path(mapping.path)}: study {uid} has several accession numbers, with a line each"
                raise invalid("mapping", what, f"Name this study by its {_UID}.")
    without = [uid for uid in studies if uid not in found]
    if without:
        more = f" and {len(without) - _SHOWN} more" if len(without) > _SHOWN else ""
        what = f"{shown_path(mapping.path)} has no line for {', '.join(without[:_SHOWN])}{more}"
        raise invalid("mapping", what, "Add a line for each of these studies, or export without them.")
    return found


class _Mapping:
    """The file of the user: what is known of each study, by its UID or its accession number."""

    def __init__(self, path: Path) -> None:
        self.path = path
        text = self._text()
        reader = csv_rows(text)
        columns = [name.strip() for name in reader.fieldnames or ()]
        reader.fieldnames = columns
        self.key = next((name for name in (_UID, _ACCESSION) if name in columns), "")
        for name in (self.key or f"{_UID} or {_ACCESSION}", *_NEEDED):
            if name not in columns:
                raise invalid("mapping", f"{shown_path(path)} has no column {name}", "Name it in the header line.")
        self.rows: dict[str, _Mapped] = {}
        for line, row in self._read(reader):
            key = row[self.key].strip()
            if not key and not any((value or "").strip() for value in row.values()):
                continue
            if not key or (self.key == _UID and not is_uid(key)):
                raise self._bad(line, self.key, "is not a valid UID" if key else "is empty")
            made = _Mapped(line, tuple(self._value(line, name, (row.get(name) or "").strip()) for name in _VALUES))
            before = self.rows.setdefault(key, made)
            if before.values != made.values:
                raise self._bad(line, self.key, f"names the study of line {before.line} with other values")

    def _text(self) -> str:
        try:
            return self.path.read_text("utf-8-sig")
        except OSError as error:
            what = f"cannot be read: {error.strerror}"
        except UnicodeDecodeError:
            what = "is not in UTF-8"
        raise invalid("mapping", f"{shown_path(self.path)} {what}", "Give a CSV file in UTF-8.")

    def _read(self, reader: csv.DictReader[str]) -> Iterator[tuple[int, dict[str, str]]]:
        try:
            for row in reader:
                if any(text.strip() for text in row.pop(None, ())):
                    raise self._bad(reader.line_num, "beyond the last", "is filled")
                yield reader.line_num, row
        except csv.Error:
            what = f"{shown_path(self.path)}, line {reader.line_num} is not valid CSV"
            raise invalid("mapping", what, "Check its quotes.") from None

    def _bad(self, line: int, column: str, what: str) -> InvalidOption:
        where = f"{shown_path(self.path)}, line {line}, column {column}"
        return invalid("mapping", about(where, what).removesuffix("."), "Correct the line, or remove it.")

    def _value(self, line: int, name: str, text: str) -> Any:
        if not text:
            if name in _NEEDED:
                raise self._bad(line, name, "is empty")
            return None
        if name in _IDS:
            if not re.fullmatch(r"[0-9]{1,10}", text) or int(text) > _LARGEST_ID:
                raise self._bad(line, name, f"is not a whole number up to {_LARGEST_ID}")
            return int(text)
        if name == _DATE:
            try:
                return date.fromisoformat(text).isoformat()
            except ValueError:
                raise self._bad(line, name, "is not a date, such as 2026-01-31") from None
        return text
