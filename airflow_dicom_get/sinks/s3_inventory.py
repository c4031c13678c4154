"""What a bucket holds of a study: the listing and the ledgers held against each other."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence

from airflow_dicom_get import clock
from airflow_dicom_get.config.options import HeldOptions
from airflow_dicom_get.dicom.uids import is_uid
from airflow_dicom_get.errors import DestinationFull, S3Error, printable
from airflow_dicom_get.records import Instance, Key, Stored
from airflow_dicom_get.sinks.ledger import contradict
from airflow_dicom_get.sinks.objects import StoredObject, is_instance, whole_instance
from airflow_dicom_get.sinks.s3_objects import copied, digest_of, head_of, names, proves_itself, record_of
from airflow_dicom_get.storage import files
from airflow_dicom_get.storage.bucket import Bucket, Listed

log = logging.getLogger(__name__)

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
        self.to_record: list[Stored] = []
        """What is held and stands in no ledger as durable, or beside records of something else."""

    def take(
        self, listing: Iterable[Listed], records: Mapping[Key, Sequence[Stored]], prefix: str
    ) -> dict[Key, Stored]:
        """What is held. Raises :class:`S3Error`."""
        held: dict[Key, Stored] = {}
        open_questions: list[tuple[str, str, Listed, Sequence[Stored]]] = []
        for item in listing:
            series, slash, name = item.key.removeprefix(prefix).partition("/")
            if not slash or "/" in name or not name.endswith(".dcm") or item.size > files.LARGEST:
                continue
            sop = name.removesuffix(".dcm")
            if not (is_uid(series) and is_uid(sop)):
                continue  # none of ours, and it may be a name
            candidates = records.get((series, sop), ())
            found = None if contradict(candidates) else next((x for x in candidates if self._tells(x, item)), None)
            if found is not None:
                held[found.key] = self._held(found, item)
            else:
                open_questions.append((series, sop, item, candidates))
        with clock.pool(_READERS, "dicom-get-s3-inventory") as pool:
            for answer in pool.map(lambda question: self._ask(*question), open_questions):
                if answer is not None:
                    held[answer.key] = answer
        return held

    def _tells(self, record: Stored, item: Listed) -> bool:
        """Whether the listing alone shows that the object is what the record says."""
        if not record.durable:
            return False
        return self._verify == "size" and _fits(record, item)

    def _ask(self, series: str, sop: str, item: Listed, candidates: Sequence[Stored]) -> Stored | None:
        """Look at the object itself; None too where it is gone since it was listed, or cannot be copied to be read."""
        try:
            return self._looked_at(series, sop, item, candidates)
        except S3Error as error:
            if error.facts["code"] in ("NotFound", "NoSuchKey"):
                return None
            raise
        except (DestinationFull, OSError) as error:
            log.info("the object of instance %s does not count as held: %s", printable(sop), error)
            return None

    def _looked_at(self, series: str, sop: str, item: Listed, candidates: Sequence[Stored]) -> Stored | None:
        fits = [record for record in candidates if _fits(record, item) and record.sha256]
        if fits:
            digest = digest_of(self._bucket, item.key)
            for record in fits:
                if digest == record.sha256:
                    if not record.durable or contradict(candidates):  # and the next run need not read it again
                        self._note(record, item.etag)
                    return self._held(record, item)
        if any(record.durable and (record.sha256 or not _fits(record, item)) for record in candidates):
            return None  # what it was is recorded, and it is that no longer
        head = head_of(self._bucket, item.key)
        said = record_of(series, sop, head)
        if (
            said is not None
            and (named := names(head, self._study, series, sop)) is not False
            and ((self._verify != "digest" and proves_itself(head)) or digest_of(self._bucket, item.key) == said.sha256)
            and (named or self._header_names(said, item.key))
        ):
            self._note(said, said.etag)
            return self._held(said, item)
        return self._adopted(series, sop, item) if self._adopt and not candidates else None

    def _header_names(self, said: Stored, key: str) -> bool:
        """Whether an object, whose metadata are of its content and say no UIDs, has those of its key in its header."""
        row = Instance(self._study, said.series, said.sop, said.sop_class)
        row.syntax, row.dataset_offset = said.syntax, said.dataset_offset  # a bare data set does not tell them
        item = StoredObject(self._bucket.uri(key), bucket=self._bucket, key=key, row=row)
        return is_instance(item, row.study, row.series, row.sop)

    def _adopted(self, series: str, sop: str, item: Listed) -> Stored | None:
        with copied(self._bucket, item.key) as copy:
            found = whole_instance(copy, self._study, series, sop)
        if found is None:
            return None
        self._note(found, item.etag)
        return self._held(found, item)

    def _note(self, stored: Stored, etag: str | None) -> None:
        stored.etag = etag or None
        self.to_record.append(stored)

    def _held(self, stored: Stored, item: Listed) -> Stored:
        stored.where = self._bucket.uri(item.key)
        return stored


def _fits(record: Stored, item: Listed) -> bool:
    """Whether size and ETag are those of the record; not every service tells ETags."""
    return record.bytes == item.size and (not record.etag or not item.etag or record.etag == item.etag)
