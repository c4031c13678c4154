"""Files that no ledger knows: are they whole instances of the UIDs that their path names?"""

from __future__ import annotations

import hashlib
import mmap
from pathlib import Path
from typing import BinaryIO

from airflow_dicom_get.dicom.header import (
    INSTANCE_NUMBER,
    MANDATORY,
    MODALITY,
    SERIES_INSTANCE_UID,
    SERIES_NUMBER,
    SOP_INSTANCE_UID,
    STUDY_INSTANCE_UID,
    HeaderError,
    HeaderScan,
    ends_whole,
)
from airflow_dicom_get.dicom.identifier import int_value, text_value
from airflow_dicom_get.dicom.part10 import META_LIMIT, FileMeta, read_file_meta
from airflow_dicom_get.dicom.uids import uid_value
from airflow_dicom_get.sinks.base import Held

_WANTED = MANDATORY | {MODALITY, SERIES_NUMBER, INSTANCE_NUMBER}


def read_instance(path: Path, study: str, series: str, sop: str) -> Held | None:
    """The file as held, if it is a Part 10 file whose header names these three UIDs and that is whole."""
    with path.open("rb") as file:
        meta = read_file_meta(file.read(META_LIMIT))
        if meta is None or meta.sop_instance != sop:
            return None
        file.seek(meta.dataset_offset)
        scan = HeaderScan(meta.syntax, frozenset(_WANTED), INSTANCE_NUMBER)
        try:
            while not scan.done:
                chunk = file.read(1 << 16)
                scan.feed(chunk, last=len(chunk) < 1 << 16)
        except HeaderError:
            return None
        found = [uid_value(scan.values[tag]) for tag in (STUDY_INSTANCE_UID, SERIES_INSTANCE_UID, SOP_INSTANCE_UID)]
        if found != [study, series, sop] or not _ends_whole(file, meta):
            return None
        file.seek(0)
        digest = hashlib.file_digest(file, "sha256").digest()
        size = file.tell()
    return Held(
        series=series,
        sop=sop,
        sop_class=meta.sop_class,
        syntax=meta.syntax,
        uri=str(path),
        sha256=digest,
        bytes=size,
        dataset_offset=meta.dataset_offset,
        modality=text_value(scan.values.get(MODALITY)),
        series_number=int_value(scan.values.get(SERIES_NUMBER)),
        instance_number=int_value(scan.values.get(INSTANCE_NUMBER)),
    )


def _ends_whole(file: BinaryIO, meta: FileMeta) -> bool:
    """Whether the data set is whole, as far as its elements tell: a copy that was cut off is not adopted."""
    with (
        mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content,
        memoryview(content) as view,
        view[meta.dataset_offset :] as data,
    ):
        return ends_whole(data, meta.syntax)
