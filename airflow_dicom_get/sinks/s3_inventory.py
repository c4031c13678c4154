"""What a bucket holds of a study: the listing and the ledgers held against each other."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

from airflow_dicom_get.config.options import HeldOptions
from airflow_dicom_get.errors import S3Error
from airflow_dicom_get.records import Instance
from airflow_dicom_get.sinks.adopt import read_instance
from airflow_dicom_get.sinks.base import Held
from airflow_dicom_get.sinks.ledger import Record
from airflow_dicom_get.sinks.s3_objects import digest_of, record_of
from airflow_dicom_get.storage.bucket import Bucket, Listed

_READERS = 8


class Inventory:
    """The inventory of one study.

    Parameters
    ----------
    bucket : Bucket
        Where the objects lie.
    study : str
        The study.
    options : HeldOptions
        How a recorded object is checked: by size and ETag as listed, by reading it, or not at all.
    adopt : bool
        Read objects that neither ledger nor metadata knows, and take those that are whole.
    """

    def __init__(self, bucket: Bucket, study: str, options: HeldOptions, *, adopt: bool) -> None:
        self._bucket, self._study = bucket, study
        self._verify, self._adopt = options.verify_held, adopt
        self.replaceable: set[str] = set()
        """UIDs whose object is no longer what the ledgers say."""
        self.to_record: list[tuple[Instance, str | None]] = []
        """What is held and stands in no ledger as kept, with its ETag."""

    def take(self, listing: Iterable[Listed], records: Mapping[str, Sequence[Record]], prefix: str) -> dict[str, Held]:
        """What is held, by SOP Instance UID. Raises :class:`S3Error`."""
        held: dict[str, Held] = {}
        open_questions: list[tuple[str, str, Listed, list[Record]]] = []
        for item in listing:
            series, slash, name = item.key.removeprefix(prefix).partition("/")
            if not slash or "/" in name or not name.endswith(".dcm"):
                continue
            sop = name.removesuffix(".dcm")
            candidates = [record for record in records.get(sop, ()) if record.series == series]
            found = next((record for record in candidates if self._tells(record, item)), None)
            if found is not None:
                held[sop] = self._held(found, item)
            else:
                open_questions.append((series, sop, item, candidates))
        with ThreadPoolExecutor(_READERS) as pool:
            for answer in pool.map(lambda question: self._ask(*question), open_questions):
                if answer is not None:
                    held[answer.sop] = answer
        return held

    def _tells(self, record: Record, item: Listed) -> bool:
        """Whether the listing alone shows that the object is what the record says."""
        if not record.durable:
            return False
        return self._verify == "none" or (self._verify == "size" and _fits(record, item))

    def _ask(self, series: str, sop: str, item: Listed, candidates: list[Record]) -> Held | None:
        """Look at the object itself; None too where it is gone since it was listed."""
        try:
            return self._looked_at(series, sop, item, candidates)
        except S3Error as error:
            if error.facts["code"] in ("NotFound", "NoSuchKey"):
                return None
            raise

    def _looked_at(self, series: str, sop: str, item: Listed, candidates: list[Record]) -> Held | None:
        for record in candidates:
            if _fits(record, item) and record.sha256 and digest_of(self._bucket, item.key) == record.sha256:
                if not record.durable:
                    self._note(record, item.etag)
                return self._held(record, item)
        said = record_of(series, sop, self._bucket.call("head_object", item.key))
        if said is not None and (self._verify != "digest" or digest_of(self._bucket, item.key) == said.sha256):
            self._note(said, said.etag)
            return self._held(said, item)
        if any(record.durable for record in candidates):
            self.replaceable.add(sop)
        elif self._adopt:
            return self._adopted(series, sop, item)
        return None

    def _adopted(self, series: str, sop: str, item: Listed) -> Held | None:
        with tempfile.TemporaryDirectory() as folder:
            copy = Path(folder, "object")
            with copy.open("wb") as file:
                for chunk in self._bucket.read(item.key):
                    file.write(chunk)
            found = read_instance(copy, self._study, series, sop)
        if found is None:
            return None
        instance = Instance(self._study, series, sop, found.sop_class)
        instance.syntax, instance.bytes, instance.sha256 = found.syntax, found.bytes, found.sha256
        instance.dataset_offset = found.dataset_offset
        self.to_record.append((instance, item.etag or None))
        return replace(found, uri=self._bucket.uri(item.key))

    def _note(self, record: Record, etag: str | None) -> None:
        instance = Instance(self._study, record.series, record.sop, record.sop_class)
        instance.syntax, instance.bytes, instance.sha256 = record.syntax, record.size, record.sha256
        instance.dataset_offset, instance.modality = record.dataset_offset, record.modality
        instance.series_number, instance.instance_number = record.series_number, record.instance_number
        self.to_record.append((instance, etag or None))

    def _held(self, record: Record, item: Listed) -> Held:
        return Held(
            series=record.series,
            sop=record.sop,
            sop_class=record.sop_class,
            syntax=record.syntax,
            uri=self._bucket.uri(item.key),
            sha256=record.sha256,
            bytes=record.size,
            dataset_offset=record.dataset_offset,
            modality=record.modality,
            series_number=record.series_number,
            instance_number=record.instance_number,
        )


def _fits(record: Record, item: Listed) -> bool:
    """Whether size and ETag are those of the record; not every service tells ETags."""
    return record.size == item.size and (not record.etag or not item.etag or record.etag == item.etag)
