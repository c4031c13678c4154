"""C-FIND for people: rows as data sets, text decoded, any level."""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from airflow_dicom_get.dicom import header as h
from airflow_dicom_get.dicom import identifier as i
from airflow_dicom_get.dicom.dictionary import UnknownAttributeError, find_attribute
from airflow_dicom_get.engine.query import Query
from airflow_dicom_get.engine.resolve import FIND_PROPOSALS, MAX_ROWS, Finder
from airflow_dicom_get.engine.source import Source
from airflow_dicom_get.errors import InvalidOption, peer_text
from airflow_dicom_get.net.find import c_find

if TYPE_CHECKING:
    from pandas import DataFrame
    from pydicom.dataset import Dataset

_RETURNED = {
    "STUDY": (
        "StudyInstanceUID",
        "PatientID",
        "PatientName",
        "StudyDate",
        "StudyTime",
        "AccessionNumber",
        "StudyDescription",
        "ModalitiesInStudy",
        "NumberOfStudyRelatedSeries",
        "NumberOfStudyRelatedInstances",
    ),
    "SERIES": (
        "StudyInstanceUID",
        "SeriesInstanceUID",
        "Modality",
        "SeriesNumber",
        "SeriesDescription",
        "NumberOfSeriesRelatedInstances",
    ),
    "IMAGE": (
        "StudyInstanceUID",
        "SeriesInstanceUID",
        "SOPInstanceUID",
        "SOPClassUID",
        "InstanceNumber",
        "AvailableTransferSyntaxUID",
    ),
}
_UIDS = frozenset({h.SOP_CLASS_UID, h.SOP_INSTANCE_UID, h.STUDY_INSTANCE_UID, h.SERIES_INSTANCE_UID})


def find_rows(source: Source, query: Query, level: str, return_keys: Sequence[str]) -> list[Dataset]:
    """Rows of one C-FIND at ``level``; keys of lower levels are asked for as they are (relational)."""
    try:
        asked = [int(find_attribute(keyword).tag) for keyword in (*_RETURNED[level], *return_keys)]
    except UnknownAttributeError as error:
        raise InvalidOption(f"return_keys: {error}", option="return_keys") from None
    keys: dict[int, str | Iterable[str]] = dict.fromkeys(asked, "")
    keys.update({f.tag: f.value for f in query.filters})
    for tag, uids in (
        (h.STUDY_INSTANCE_UID, query.studies),
        (h.SERIES_INSTANCE_UID, query.series),
        (h.SOP_INSTANCE_UID, query.instances),
    ):
        if uids:
            keys[tag] = uids
    keys[i.QUERY_RETRIEVE_LEVEL] = level
    identifier = i.encode_identifier(keys, _UIDS)
    with source.association(FIND_PROPOSALS) as association:
        finder = Finder(association)
        return [
            _dataset(bytes(raw))
            for raw in c_find(
                association,
                finder.require_model(),
                identifier,
                row_seconds=source.deadlines.find_response,
                max_rows=MAX_ROWS,
            )
        ]


def _dataset(raw: bytes) -> Dataset:
    from pydicom.filereader import read_dataset

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dataset = read_dataset(io.BytesIO(raw), is_implicit_VR=True, is_little_endian=True)
        dataset.decode()
    return dataset


def frame_of_rows(rows: Sequence[Dataset]) -> DataFrame:
    """One text column per keyword."""
    import pandas as pd

    return pd.DataFrame(
        [
            {
                element.keyword: peer_text(element.value, 1024) if element.VR == "UN" else _text(element.value)
                for element in row
                if element.keyword
            }
            for row in rows
        ]
    )


def _text(value: object) -> str:
    from pydicom.multival import MultiValue

    if value is None:
        return ""
    return "\\".join(map(str, value)) if isinstance(value, MultiValue) else str(value)
