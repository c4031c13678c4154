"""The S3 sink: ``<prefix>/<study>/<series>/<sop>.dcm`` in a bucket, whole or not there.

An instance up to the part size goes in one PUT, with its sha256 as the checksum that the service
verifies and in its metadata; a larger one goes in parts as it arrives. An object is never replaced by
another content: where the service takes conditional writes it watches over that itself, elsewhere the
listing made at the study's beginning does.
"""

from __future__ import annotations

import base64
import hashlib
import logging
from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from airflow_dicom_get import clock
from airflow_dicom_get.config.options import WritingOptions
from airflow_dicom_get.dicom import status as s
from airflow_dicom_get.dicom.part10 import file_header
from airflow_dicom_get.errors import LedgerError, S3Error, SinkError
from airflow_dicom_get.records import Instance, Key, Stored
from airflow_dicom_get.sinks.base import Confirmation, Taken
from airflow_dicom_get.sinks.filesystem import sink_error
from airflow_dicom_get.sinks.ledger import Ledger, Ledgers, RecordedDigests, first_failure
from airflow_dicom_get.sinks.objects import other_syntax
from airflow_dicom_get.sinks.s3_inventory import Inventory
from airflow_dicom_get.sinks.s3_objects import CONTENT_TYPE, Existing, OurFile, compare, metadata_of
from airflow_dicom_get.sinks.s3_uploads import LOOK, PART_SIZE, Uploads
from airflow_dicom_get.storage.bucket import Bucket, Listed

log = logging.getLogger(__name__)

_MOST_PARTS = 10_000
_STALE_SECONDS = 24 * 3600
_LEDGER_HINT = "Run again: what the ledger lacks is compared with what is stored."
_ENDED = "The run has ended before it was stored."
_OTHER = "A different data set is already stored under this UID; it was kept."


class S3Sink:
    """Write instances into a bucket.

    Memory and requests are bounded as :class:`~airflow_dicom_get.sinks.s3_uploads.Uploads` says.

    Parameters
    ----------
    bucket : Bucket
        Where the objects go.
    prefix : str
        Start of every key, without slashes at its ends; may be empty.
    ledgers : Ledgers
        Where runs record what they took and kept.
    run : str
        Name of this run, unique.
    options : WritingOptions
        Titles for the file meta information, how objects are written, and what counts as held. Without
        ``checksum`` the manifest has no sha256; the service is given it in any case.
    uploads : Uploads
        By which requests are made.
    read_only : bool
        Only :meth:`inventory` will be called, and it shall leave no trace.
    conditional : bool
        The service takes ``If-None-Match`` on writes. Where it does not, two runs at the same time that bring
        different data sets under one UID are not told apart: the later one stays.
    """

    def __init__(
        self,
        bucket: Bucket,
        prefix: str,
        ledgers: Ledgers,
        run: str,
        options: WritingOptions,
        uploads: Uploads,
        *,
        read_only: bool = False,
        conditional: bool = False,
    ) -> None:
        self.bucket, self.ledgers, self.run = bucket, ledgers, run
        self._digests = RecordedDigests(ledgers)
        self.prefix = f"{prefix}/" if prefix else ""
        self.options, self.uploads = options, uploads
        self.conditional = conditional
        self._read_only = read_only
        self._room = clock.condition()
        self._studies: dict[str, _Study] = {}
        self._unclosed: OSError | None = None
        self._due = 0
        self._done: list[Confirmation] = []
        self._parted: set[_Parts] = set()

    # --- what is held ------------------------------------------------------------------------

    def inventory(self, study: str, patient: Mapping[int, bytes] = {}) -> dict[Key, Stored]:
        """See :meth:`sinks.base.Sink.inventory`: one listing and the ledgers; objects without record are asked."""
        listing = self._list(study)
        found = Inventory(self.bucket, study, self.options, adopt=self.options.adopt and not self._read_only)
        records = self.ledgers.read(study)
        held = found.take(listing.values(), records, f"{self.prefix}{study}/")
        if self._read_only:
            return held
        opened = self._study(study, listing, records)
        for stored in found.to_record:
            opened.record_taken(stored)
            opened.ledger.durable([stored.key], stored.etag)
        return held

    def _list(self, study: str) -> dict[str, Listed]:
        return {item.key: item for item in self.bucket.list(f"{self.prefix}{study}/")}

    # --- writing -----------------------------------------------------------------------------

    def head(self, held: Stored, size: int) -> bytes:
        """See :meth:`sinks.base.Sink.head`."""
        key = self.bucket.key_of(held.uri or "")
        content = bytearray()
        try:
            for chunk in self.bucket.read(key, lambda _: None, size):
                content += chunk
                if len(content) >= size:  # the service may give more than it was asked for
                    break
        except SinkError:
            return b""
        return bytes(content[:size])

    def begin(self, instance: Instance) -> _ObjectWriter:
        """See :meth:`sinks.base.Sink.begin`."""
        self.uploads.wait_for_room()
        return _ObjectWriter(self, self._study(instance.study), instance)

    def _study(
        self, uid: str, listing: dict[str, Listed] | None = None, records: dict[Key, list[Stored]] | None = None
    ) -> _Study:
        with self._room:
            study = self._studies.get(uid)
            if study is None:
                try:
                    ledger = self.ledgers.open(uid, self.run)
                except OSError as error:
                    raise SinkError(f"The ledger of study {uid} cannot be created: {error.strerror}.") from error
                study = _Study(
                    ledger,
                    self._list(uid) if listing is None else listing,
                    self._records(uid) if records is None else records,
                )
                self._studies[uid] = study
                self.uploads.submit(lambda: self._abort_stale(f"{self.prefix}{uid}/"))
            elif listing is not None:
                study.existing = listing
            return study

    def _records(self, study: str) -> dict[Key, list[Stored]]:
        """What runs before this one have recorded; nothing where no run can read it."""
        try:
            return self.ledgers.read(study)
        except LedgerError:
            return {}

    def _abort_stale(self, prefix: str) -> None:
        """Abort multipart uploads that runs left behind, a day after they began.

        MinIO lists them by their whole key alone, and aborts them by itself after a day.
        """
        aborted = 0
        try:
            for upload in self.bucket.call("list_multipart_uploads", Prefix=prefix).get("Uploads", ()):
                stale = upload["Initiated"].timestamp() < clock.now() - _STALE_SECONDS
                if stale and upload["Key"].startswith(prefix):
                    self.bucket.call("abort_multipart_upload", upload["Key"], UploadId=upload["UploadId"])
                    aborted += 1
        except S3Error as error:  # some may not list them, and nothing hangs on it
            log.info("%s", error)
        if aborted:
            log.info("aborted %d multipart uploads that were left behind below %s", aborted, self.bucket.uri(prefix))

    def take(self, study: _Study, upload: _Upload) -> Taken:
        """Take a whole instance; what was taken in this run under its UID stays."""
        instance = upload.instance
        with self._room:
            first = study.taken.get(instance.key)
            if first is None:
                study.taken[instance.key] = _Entry(upload.sha256, waiting=[instance])
                self._due += 1
            elif first.sha256 == upload.sha256:
                if first.kept:
                    self._done.append(Confirmation(instance))
                else:
                    first.waiting.append(instance)
                    self._due += 1
        if first is not None:
            upload.abort()
            if first.sha256 != upload.sha256:
                return Taken(s.DUPLICATE_OTHER_CONTENT, "different_content", _OTHER)
        elif upload.parts is None:
            self.uploads.hand_over(upload.size, lambda: self._keep(study, upload))
        else:
            self.uploads.submit(lambda: self._keep(study, upload))
        return Taken(s.SUCCESS)

    def _keep(self, study: _Study, upload: _Upload) -> None:
        """Store a whole instance, record it, confirm it. Runs in the pool and raises nothing."""
        error, reason = None, "destination_error"
        try:
            etag = self._store(study, upload)
            if etag is None:
                error, reason = _OTHER, "different_content"
            elif self.uploads.abandoned:  # nobody counts it any more, and the ledger may be closed
                error, reason = _ENDED, self.uploads.cancel.word
            else:
                study.record_taken(upload.instance)
                study.ledger.durable([upload.instance.key], etag)
        except SinkError as failure:
            error = str(failure)
            if failure.transient and self.uploads.cancel.ending():  # it was not tried again, or not at all
                reason = self.uploads.cancel.word
        except OSError as failure:
            error = str(sink_error(failure, f"The destination cannot store instance {upload.instance.sop}"))
        except BaseException as failure:  # whatever it is, the instance must be confirmed one way or the other
            log.exception("an upload failed")
            error = f"Unexpected {type(failure).__name__}."
        if upload.parts is not None:
            upload.parts.abort()
        upload.forget()
        with self._room:
            entry = study.taken[upload.instance.key]
            waiting, entry.waiting = entry.waiting, []
            entry.kept = error is None
            if error is not None:
                del study.taken[upload.instance.key]
            self._done += [Confirmation(x, error, reason, upload.remark) for x in waiting]
            self._due -= len(waiting)
            self._room.notify_all()

    def _store(self, study: _Study, upload: _Upload) -> str | None:
        """Store an instance unless its key holds a whole other one; the ETag, or None where it does."""
        there = upload.key in study.existing
        condition = {"IfNoneMatch": "*"} if self.conditional else {}
        if upload.parts is not None:
            upload.parts.wait()
        for _ in range(2):
            if there:
                existing = self.uploads.persist(lambda: compare(self.bucket, upload.key, upload.file()))
                if existing is not None and existing.same:
                    self._is(upload.instance, existing)
                    return existing.etag
                if existing is not None and self._came_in_other_syntax(upload.instance, existing):
                    self._is(upload.instance, existing)
                    return existing.etag
                if existing is not None:
                    if not existing.whole and self._is_recorded(upload.instance, existing):
                        existing = existing._replace(whole=True)
                    if existing.whole and self.options.on_conflict != "replace":
                        return None
                    condition = self._in_place_of(study, upload, existing)
            try:
                self.uploads.check()
                # What is recorded of another object would count for this one once it is there, and the metadata of
                # one in parts cannot be set at the end: its digest must stand in the ledger before.
                if upload.parts is not None or study.recorded_otherwise(upload.instance):
                    study.record_taken(upload.instance)
                    study.ledger.sync()
                return self.uploads.persist(partial(upload.store, condition))
            except S3Error as error:
                # 412: it exists. 404: the parts are gone, as where an answer got lost and the request was made again.
                if error.facts["status"] not in (404, 412):
                    raise
                there, lost = True, error
        raise lost

    def _came_in_other_syntax(self, instance: Instance, existing: Existing) -> bool:
        """Whether the object is this instance as a source has sent it before, in another transfer syntax: it stays."""
        first = other_syntax(existing.meta, instance)
        if first is None or self.options.on_conflict == "replace" or not self._is_recorded(instance, existing):
            return False
        instance.sent_again(first)
        return True

    def _is_recorded(self, instance: Instance, existing: Existing) -> bool:
        """Whether a run took an object as it is: so it came, and nobody has cut it short."""
        return self._digests.are_of(instance.study, instance.key, lambda: existing.sha256, existing.size, existing.etag)

    def _in_place_of(self, study: _Study, upload: _Upload, existing: Existing) -> dict[str, str]:
        """Let nothing that was recorded of an object count any more; on which condition it may be replaced."""
        self.uploads.check()
        study.ledger.dropped(upload.instance.key)
        study.ledger.sync()
        if existing.whole:
            upload.remark = "replaced"
        if existing.etag and self.bucket.replaces_conditionally():
            return {"IfMatch": existing.etag}
        log.warning(
            "%s is replaced without a condition: this service does not know If-Match, and another writer at this "
            "moment would not be noticed.",
            self.bucket.uri(upload.key),
        )
        return {}

    def _is(self, instance: Instance, existing: Existing) -> None:
        """The object that was there first is the instance's; its file meta information may be another run's."""
        instance.bytes, instance.dataset_offset = existing.size, existing.dataset_offset
        if self.options.checksum:
            instance.sha256 = existing.sha256

    # --- the end -----------------------------------------------------------------------------

    def confirmations(self, *, wait: bool = False) -> list[Confirmation]:
        """See :meth:`sinks.base.Sink.confirmations`."""
        with self._room:
            while wait and self._due and not self.uploads.abandoned:
                self._room.wait(LOOK)
            if wait and self._due:
                self._abandon()
            done, self._done = self._done, []
            return done

    def _abandon(self) -> None:
        """What is still under way may arrive or not: the next run will see, and this one does not count it."""
        for study in self._studies.values():
            for entry in study.taken.values():
                waiting, entry.waiting = entry.waiting, []
                self._done += [Confirmation(x, _ENDED, self.uploads.cancel.word) for x in waiting]
                self._due -= len(waiting)

    def end_study(self, study: str) -> None:
        """See :meth:`sinks.base.Sink.end_study`."""
        ended = self._studies.pop(study, None)
        self._digests.forget(study)
        if ended is not None and not self.uploads.abandoned:
            failed = first_failure([ended.ledger.close])
            self._unclosed = self._unclosed or failed

    def close(self) -> None:
        """See :meth:`sinks.base.Sink.close`."""
        self.uploads.close()
        for parts in () if self.uploads.abandoned else list(self._parted):
            parts.abort()
        for study in list(self._studies):
            self.end_study(study)
        failed = self._unclosed
        if failed is not None:
            raise SinkError(f"The ledger cannot be written: {failed.strerror or failed}.", hint=_LEDGER_HINT)

    def opened(self, parts: _Parts) -> None:
        """A multipart upload was begun: it is to be completed or aborted."""
        self._parted.add(parts)

    def settled(self, parts: _Parts) -> None:
        """A multipart upload is over."""
        self._parted.discard(parts)


@dataclass(slots=True)
class _Entry:
    """An instance that this run took."""

    sha256: bytes
    kept: bool = False
    waiting: list[Instance] = field(default_factory=list)
    """Those that are to be confirmed when it is."""


class _Study:
    """What lies under a study's prefix, and what this run did there."""

    def __init__(self, ledger: Ledger, existing: dict[str, Listed], records: dict[Key, list[Stored]]) -> None:
        self.ledger, self.existing = ledger, existing
        self._records = records
        self.taken: dict[Key, _Entry] = {}

    def recorded_otherwise(self, one: Instance | Stored) -> bool:
        """Whether a run before this one has recorded the instance with another content, or without its digest."""
        return any(record.sha256 != one.sha256 for record in self._records.get(one.key, ()))

    def record_taken(self, one: Instance | Stored) -> None:
        """Record what is there; what was recorded of anything else under its key does not count any more."""
        self.ledger.taken(one, anew=self.recorded_otherwise(one))
        self._records.pop(one.key, None)


class _Upload:
    """A whole instance on its way into the bucket."""

    __slots__ = ("_sink", "body", "head", "instance", "key", "parts", "remark", "sha256", "size")

    def __init__(
        self,
        sink: S3Sink,
        instance: Instance,
        key: str,
        head: bytes,
        body: bytearray,
        sha256: bytes,
        parts: _Parts | None,
    ) -> None:
        self._sink, self.instance, self.key, self.head = sink, instance, key, head
        self.body, self.sha256, self.parts = body, sha256, parts
        self.size = len(body)
        self.remark: str | None = None
        """A reason that its row shows, though it is stored."""

    def file(self) -> OurFile:
        """What is to be stored."""
        return OurFile(self.instance, self.head, self.instance.bytes or 0, self.sha256)

    def store(self, condition: dict[str, str]) -> str:
        """Store it, or make one object of its parts; the ETag."""
        if self.parts is not None:
            return self.parts.complete(condition)
        return self._sink.bucket.put(
            self.key,
            self.body,
            ContentType=CONTENT_TYPE,
            Metadata=metadata_of(self.instance, self.sha256),
            ChecksumSHA256=base64.b64encode(self.sha256).decode(),
            **condition,
        )

    def abort(self) -> None:
        """It is not to be stored, or failed to be."""
        if self.parts is not None:
            self.parts.abort_later()

    def forget(self) -> None:
        """Give the memory back."""
        self.body = bytearray()


class _Parts:
    """A multipart upload."""

    def __init__(self, sink: S3Sink, instance: Instance, key: str) -> None:
        self._sink, self._key = sink, key
        self._begun = sink.uploads.hand_over(0, lambda: sink.uploads.persist(lambda: self._begin(instance)))
        self._parts: list[Future[dict[str, Any]]] = []
        self._over = clock.event()
        sink.opened(self)

    def _begin(self, instance: Instance) -> str:
        answer = self._sink.bucket.call(
            "create_multipart_upload",
            self._key,
            ContentType=CONTENT_TYPE,
            ChecksumAlgorithm="SHA256",
            Metadata=metadata_of(instance, None),
            **self._sink.bucket.stored_as(),
        )
        return str(answer["UploadId"])

    def add(self, body: bytearray) -> None:
        """Send the next part. Raises :class:`SinkError` where an earlier one failed."""
        if len(self._parts) >= _MOST_PARTS:
            raise SinkError(
                f"The instance is larger than {_MOST_PARTS} parts of {PART_SIZE >> 20} MiB, the limit of S3."
            )
        for part in self._parts[-2:]:
            if part.done():
                part.result()
        number = len(self._parts) + 1
        self._parts.append(self._sink.uploads.hand_over(len(body), lambda: self._send(number, body)))

    def _send(self, number: int, body: bytearray) -> dict[str, Any]:
        checksum = base64.b64encode(hashlib.sha256(body).digest()).decode()
        upload = self._begun.result()
        answer = self._sink.uploads.persist(
            lambda: self._sink.bucket.call(
                "upload_part", self._key, UploadId=upload, PartNumber=number, Body=body, ChecksumSHA256=checksum
            )
        )
        return {"PartNumber": number, "ETag": answer.get("ETag", ""), "ChecksumSHA256": checksum}

    def wait(self) -> None:
        """Wait until all parts are stored. Raises what one of them failed by."""
        for part in self._parts:
            part.result()

    def complete(self, condition: dict[str, str]) -> str:
        """Make one object of the parts; its ETag."""
        answer = self._sink.bucket.call(
            "complete_multipart_upload",
            self._key,
            UploadId=self._begun.result(),
            MultipartUpload={"Parts": [part.result() for part in self._parts]},
            **condition,
        )
        self._over.set()
        self._sink.settled(self)
        return str(answer.get("ETag", ""))

    def abort_later(self) -> None:
        """Abort once the parts that are under way have arrived: later ones would stay behind."""
        self._sink.uploads.submit(self.abort)

    def abort(self) -> None:
        """Abort, unless it is over."""
        if self._over.is_set():
            return
        self._over.set()
        self._sink.settled(self)
        try:
            pending: list[Future[Any]] = [self._begun, *self._parts]
            for request in pending:
                request.exception()
            self._sink.bucket.call("abort_multipart_upload", self._key, UploadId=self._begun.result())
        except S3Error as error:
            if error.facts.get("status") != 404:
                log.warning("a multipart upload was left behind; a run after a day will abort it: %s", error)


class _ObjectWriter:
    """One instance on its way into memory, and in parts from there."""

    __slots__ = (
        "_body",
        "_hash",
        "_head",
        "_instance",
        "_key",
        "_next",
        "_offset",
        "_parts",
        "_sink",
        "_size",
        "_study",
    )

    def __init__(self, sink: S3Sink, study: _Study, instance: Instance) -> None:
        self._sink, self._study, self._instance = sink, study, instance
        self._key = f"{sink.prefix}{instance.study}/{instance.series}/{instance.sop}.dcm"
        self._head = b""
        if sink.options.store_with_file_meta:
            assert instance.sop_class is not None
            assert instance.syntax is not None
            self._head = file_header(
                instance.sop_class,
                instance.sop,
                instance.syntax,
                calling=sink.options.calling_ae_title,
                called=sink.options.called,
            )
        self._body = bytearray(self._head)
        self._hash = hashlib.sha256(self._head)
        self._size = self._offset = len(self._head)
        instance.dataset_offset = self._offset
        self._parts: _Parts | None = None
        self._next = 0
        """Bytes of the part that is being filled, once there are parts."""

    def write(self, view: memoryview) -> None:
        """See :meth:`sinks.base.Writer.write`."""
        self._hash.update(view)
        self._size += len(view)
        if self._parts is None and len(self._body) + len(view) < PART_SIZE:
            self._body += view
            return
        # All parts but the last are of one size: some services take no others.
        while True:
            piece = view[: PART_SIZE - self._filled()]
            self._fill(piece)
            view = view[len(piece) :]
            if self._filled() < PART_SIZE:
                return
            self._hand_over()

    def _filled(self) -> int:
        return len(self._body) if self._parts is None else self._next

    def _fill(self, piece: memoryview) -> None:
        if self._parts is None:
            self._body += piece
        else:
            self._body[self._next : self._next + len(piece)] = piece
            self._next += len(piece)

    def _hand_over(self) -> None:
        self._sink.uploads.wait_for_room()
        if self._parts is None:
            self._parts = _Parts(self._sink, self._instance, self._key)
        self._parts.add(self._body)
        # Made in its full size at once: one that grows leaves holes in memory.
        self._body, self._next = bytearray(PART_SIZE), 0

    def take(self) -> Taken:
        """See :meth:`sinks.base.Writer.take`."""
        instance = self._instance
        try:
            if self._parts is not None:
                del self._body[self._next :]
                if self._body:
                    self._parts.add(self._body)
                self._body = bytearray()
            self._sink.uploads.check()
        except SinkError as error:
            self.abort()
            return Taken(s.OUT_OF_RESOURCES, "destination_error", str(error))
        digest = self._hash.digest()
        instance.bytes = self._size
        instance.sha256 = digest if self._sink.options.checksum else None
        instance.dataset_offset = self._offset
        instance.uri = self._sink.bucket.uri(self._key)
        upload = _Upload(self._sink, instance, self._key, self._head, self._body, digest, self._parts)
        self._body = bytearray()
        return self._sink.take(self._study, upload)

    def abort(self) -> None:
        """See :meth:`sinks.base.Writer.abort`."""
        self._body = bytearray()
        if self._parts is not None:
            self._parts.abort_later()
