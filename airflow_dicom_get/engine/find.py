"""C-FIND for people: rows as data sets, text decoded, any level."""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from airflow_dicom_get.dicom import header as h
from airflow_dicom_get.dicom.dictionary import UnknownAttributeError, find_attribute
from airflow_dicom_get.engine.matching import remark_text
from airflow_dicom_get.engine.query import Query
from airflow_dicom_get.engine.resolve import Finder, check_answered
from airflow_dicom_get.engine.source import Source
from airflow_dicom_get.errors import InvalidOption, peer_text
from airflow_dicom_get.net.find import FIND_PROPOSALS

if TYPE_CHECKING:
    from pandas import DataFrame
    from pydicom.dataset import Dataset

    _Rows = list[Dataset]
else:
    _Rows = list

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
_UNIQUE = {
    "STUDY": (h.STUDY_INSTANCE_UID,),
    "SERIES": (h.STUDY_INSTANCE_UID, h.SERIES_INSTANCE_UID),
    "IMAGE": (h.STUDY_INSTANCE_UID, h.SERIES_INSTANCE_UID, h.SOP_INSTANCE_UID),
}


class Found(_Rows):
    """The rows of a C-FIND: one per study, series or instance, and none that contradicts what was asked for.

    Attributes
    ----------
    came : int
        Rows as the PACS sent them, repeated and contradicting ones among them.
    cut : bool
        Whether the answer was cancelled at ``limit``: there may be more.
    remarks : list of dict
        What is to be said of the answer, as in ``Result.errors``; nothing of a patient.
    """

    def __init__(self, rows: Iterable[Dataset] = ()) -> None:
        super().__init__(rows)
        self.came = 0
        self.cut = False
        self.remarks: list[dict[str, Any]] = []

    def remark_texts(self) -> list[str]:
        """The remarks, one line each."""
        return [remark_text(remark) for remark in self.remarks]


def find_rows(source: Source, query: Query, level: str, return_keys: Sequence[str], limit: int | None = None) -> Found:
    """Rows of one C-FIND at ``level``; keys of lower levels are asked for as they are (relational).

    Parameters
    ----------
    limit : int, optional
        Studies, series or instances after which the C-FIND is cancelled.

    Raises
    ------
    InvalidQuery
        The PACS leaves a key out of all its answers, and so does not match on it.
    InvalidOption, NotNegotiated, OperationFailed, ListTooLong, and whatever ends an association
    """
    try:
        asked = [int(find_attribute(keyword).tag) for keyword in (*_RETURNED[level], *return_keys)]
    except UnknownAttributeError as error:
        raise InvalidOption(f"return_keys: {error}", option="return_keys") from None
    keys: dict[int, str | Iterable[str]] = {f.tag: f.value for f in query.filters}
    for tag, uids in (
        (h.STUDY_INSTANCE_UID, query.studies),
        (h.SERIES_INSTANCE_UID, query.series),
        (h.SOP_INSTANCE_UID, query.instances),
    ):
        if uids:
            keys[tag] = uids
    found = Found()
    seen: set[tuple[bytes, ...]] = set()
    with source.association(FIND_PROPOSALS) as association:
        finder = Finder(association)
        for row, raw in finder.answers(level, keys, asked, enough=lambda: found.cut):
            found.came += 1
            unique = tuple(row.get(tag, b"").strip(b"\0 ") for tag in _UNIQUE[level])
            if unique in seen and unique[-1]:
                continue
            if limit is not None and len(found) == limit:
                found.cut = True
                continue
            seen.add(unique)
            found.append(_dataset(bytes(raw)))
        if not found:
            check_answered(finder)
    found.came += finder.dropped.total
    found.remarks = finder.dropped.remarks()
    if found.cut:
        found.remarks.append(
            {
                "error": f"The C-FIND was cancelled after {limit} rows: there may be more.",
                "count": 1,
                "hint": "Narrow the query, or raise limit.",
            }
        )
    return found


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
