"""Objects of our making: what their metadata says, and whether one holds a certain data set."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from airflow_dicom_get.dicom.part10 import META_LIMIT, FileMeta, read_file_meta
from airflow_dicom_get.errors import S3Error
from airflow_dicom_get.records import Instance, Stored
from airflow_dicom_get.sinks.base import ended_early
from airflow_dicom_get.sinks.filesystem import Room
from airflow_dicom_get.sinks.ledger import UNREADABLE, stored_of
from airflow_dicom_get.sinks.objects import describes, looks_whole
from airflow_dicom_get.storage import files
from airflow_dicom_get.storage.bucket import Bucket

CONTENT_TYPE = "application/dicom"
_MOST_TEXT = 64
_TRUE = "true"

_RESERVE = 64 << 20
"""Bytes of the temporary folder that a copy leaves to others: it is there for a moment."""


def metadata_of(instance: Instance, sha256: bytes | None) -> dict[str, str]:
    """What an object says of itself: all that a ledger would. No patient data."""
    said = {
        "sha256": sha256.hex() if sha256 else None,
        "study": instance.study,
        "series": instance.series,
        "sop-instance": instance.sop,
        "sop-class": instance.sop_class,
        "transfer-syntax": instance.syntax,
        "dataset-offset": instance.dataset_offset,
        "modality": instance.modality,
        "series-number": instance.series_number,
        "instance-number": instance.instance_number,
        "truncated": _TRUE if instance.truncated else None,
        "other-patient": _TRUE if instance.other_patient else None,
    }
    texts = {name: str(value) for name, value in said.items() if value is not None}
    return {
        name: text for name, text in texts.items() if text.isascii() and text.isprintable() and len(text) <= _MOST_TEXT
    }


def record_of(series: str, sop: str, head: dict[str, Any]) -> Stored | None:
    """What an object says of itself in answer to a HEAD; None if it says no digest, or what no ledger could."""
    said = {name: text for name, text in head.get("Metadata", {}).items() if len(text) <= _MOST_TEXT}
    try:
        found = stored_of(
            (series, sop),
            {
                "class": said["sop-class"],
                "syntax": said["transfer-syntax"],
                "size": head["ContentLength"],
                "dataset_offset": said["dataset-offset"],
                "sha256": said["sha256"],
                "modality": said.get("modality"),
                "series_number": _number(said.get("series-number")),
                "instance_number": _number(said.get("instance-number")),
                "truncated": said.get("truncated") == _TRUE,
                "other_patient": said.get("other-patient") == _TRUE,
            },
        )
    except UNREADABLE:
        return None
    if found.sha256 is None:
        return None
    found.durable, found.etag = True, head.get("ETag") or None
    return found


def _number(text: str | None) -> int | None:
    return int(text) if text is not None else None


def names(head: Mapping[str, Any], study: str, series: str, sop: str) -> bool | None:
    """Whether an object says that it is this instance; None where it says no UIDs, as those of earlier versions.

    A key does not tell: whoever copies an object to another one leaves its content and its metadata as they were.
    """
    metadata = head.get("Metadata", {})
    said = tuple(metadata.get(name) for name in ("study", "series", "sop-instance"))
    return None if None in said else said == (study, series, sop)


def proves_itself(head: Mapping[str, Any]) -> bool:
    """Whether the digest that an object names in its metadata is the checksum that the service has of its content.

    Metadata alone prove nothing: whoever overwrites an object may leave them as they were. ``head`` is the answer to
    :func:`head_of`.
    """
    said, checked = head.get("Metadata", {}).get("sha256", ""), head.get("ChecksumSHA256", "")
    try:
        return bool(said and checked) and base64.b64decode(checked, validate=True) == bytes.fromhex(said)
    except ValueError:  # a multipart upload has a checksum of its parts' checksums
        return False


def head_of(bucket: Bucket, key: str) -> dict[str, Any]:
    """What the service says of an object, its checksum included. Raises :class:`S3Error`."""
    return bucket.call("head_object", key, ChecksumMode="ENABLED")


class Existing(NamedTuple):
    """An object that was there first.

    Attributes
    ----------
    same : bool
        Its data set is ours.
    whole : bool
        It is a whole instance, whichever, or what a run has stored; always where it is the same.
    meta : FileMeta or None
        What it says of itself, where it had to be read.
    """

    same: bool
    whole: bool
    size: int
    sha256: bytes
    dataset_offset: int
    etag: str
    meta: FileMeta | None = None


def compare(bucket: Bucket, key: str, ours: OurFile) -> Existing | None:
    """Hold an object against a file of ours; None if there is no object.

    Where the object proves to be the very same file, that tells. Else it is read, and its data set behind our own
    head must have our digest: file meta information names who fetched it, and may differ.

    Raises
    ------
    S3Error, OSError, DestinationFull
        The service does not tell, or it cannot be copied; as :func:`copied`.
    """
    try:
        told = head_of(bucket, key)
    except S3Error as error:
        if error.facts["status"] == 404:
            return None
        raise
    size, etag = int(told["ContentLength"]), str(told.get("ETag") or "")
    if size == ours.size and told.get("Metadata", {}).get("sha256") == ours.sha256.hex() and proves_itself(told):
        return Existing(True, True, size, ours.sha256, len(ours.head), etag)
    with copied(bucket, key) as copy:
        whole, behind_our_head = hashlib.sha256(), hashlib.sha256(ours.head)
        with files.opened(copy) as fd:
            head = files.disk.read_at(fd, META_LIMIT, 0)
        meta = read_file_meta(head)
        offset, position = (meta.dataset_offset if meta is not None else 0), 0
        for chunk in files.read_chunks(copy):
            whole.update(chunk)
            behind_our_head.update(chunk[max(offset - position, 0) :])
            position += len(chunk)
        described = not ours.head or describes(meta, ours.instance)
        same = described and behind_our_head.digest() == ours.sha256
        as_stored = told.get("Metadata", {}).get("sha256") == whole.hexdigest()  # truncated or not: so it came
        complete = same or as_stored or looks_whole(copy, head, size)
    return Existing(same, complete, size, whole.digest(), offset, etag, meta)


class OurFile(NamedTuple):
    """A file that is to be stored: of what, what it begins with, before the data set, and its size and digest."""

    instance: Instance
    head: bytes
    size: int
    sha256: bytes


@contextmanager
def copied(bucket: Bucket, key: str) -> Iterator[Path]:
    """A copy of an object on this machine, for a moment.

    Raises
    ------
    S3Error, OSError
        As :meth:`~airflow_dicom_get.storage.bucket.Bucket.read`.
    DestinationFull
        There is no room for it.
    SinkError
        The run is to end.
    """
    with files.disk.scratch() as folder:
        copy, room = folder / "object", Room(folder, "The temporary folder", _RESERVE)
        with files.opened(copy, files.NEW) as fd:
            for chunk in _until_the_end(bucket, key):
                files.write_all(fd, chunk)
                room.wrote(len(chunk))
        yield copy


def digest_of(bucket: Bucket, key: str) -> bytes:
    """The digest of an object, read whole. Raises :class:`SinkError` where the run is to end before it is known."""
    digest = hashlib.sha256()
    for chunk in _until_the_end(bucket, key):
        digest.update(chunk)
    return digest.digest()


def _until_the_end(bucket: Bucket, key: str) -> Iterator[bytes]:
    """The content of an object. Raises :class:`SinkError` where the run is to end before it is read."""
    for chunk in bucket.read(key):
        if bucket.is_ending():
            raise ended_early()
        yield chunk
