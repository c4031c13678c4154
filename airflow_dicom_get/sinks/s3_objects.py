"""Objects of our making: what their metadata says, and whether one holds a certain data set."""

from __future__ import annotations

import hashlib
from typing import Any, NamedTuple

from airflow_dicom_get.dicom.part10 import META_LIMIT, read_file_meta
from airflow_dicom_get.errors import S3Error
from airflow_dicom_get.records import Instance, Stored
from airflow_dicom_get.storage.bucket import Bucket

CONTENT_TYPE = "application/dicom"
_MOST_TEXT = 64


def metadata_of(instance: Instance, sha256: bytes | None) -> dict[str, str]:
    """What an object says of itself: all that a ledger would. No patient data."""
    said = {
        "sha256": sha256.hex() if sha256 else None,
        "sop-class": instance.sop_class,
        "transfer-syntax": instance.syntax,
        "dataset-offset": instance.dataset_offset,
        "modality": instance.modality,
        "series-number": instance.series_number,
        "instance-number": instance.instance_number,
    }
    texts = {name: str(value) for name, value in said.items() if value is not None}
    return {
        name: text for name, text in texts.items() if text.isascii() and text.isprintable() and len(text) <= _MOST_TEXT
    }


def record_of(series: str, sop: str, head: dict[str, Any]) -> Stored | None:
    """What an object says of itself in answer to a HEAD; None if it says no digest."""
    said = head.get("Metadata", {})
    try:
        return Stored(
            series=series,
            sop=sop,
            sop_class=said["sop-class"],
            syntax=said["transfer-syntax"],
            bytes=int(head["ContentLength"]),
            dataset_offset=int(said["dataset-offset"]),
            sha256=bytes.fromhex(said["sha256"]),
            durable=True,
            modality=said.get("modality"),
            series_number=_number(said.get("series-number")),
            instance_number=_number(said.get("instance-number")),
            etag=head.get("ETag") or None,
        )
    except (KeyError, ValueError):
        return None


def _number(text: str | None) -> int | None:
    return int(text) if text is not None else None


class Existing(NamedTuple):
    """An object that was there first, and whether its data set is the same."""

    same: bool
    size: int
    sha256: bytes
    dataset_offset: int
    etag: str


def compare(bucket: Bucket, key: str, sha256: bytes, head: bytes) -> Existing | None:
    """Hold an object against a file of this digest that begins with ``head``; None if there is no object.

    Where the object says its digest, that tells. Else it is read, and its data set behind our own
    ``head`` must have our digest: file meta information names who fetched it, and may differ.
    """
    try:
        told = bucket.call("head_object", key)
    except S3Error as error:
        if error.facts["status"] == 404:
            return None
        raise
    size, etag = int(told["ContentLength"]), str(told.get("ETag") or "")
    if told.get("Metadata", {}).get("sha256") == sha256.hex():
        return Existing(True, size, sha256, len(head), etag)
    whole, ours = hashlib.sha256(), hashlib.sha256(head)
    start: bytes | None = b""
    offset = 0
    for chunk in bucket.read(key):
        whole.update(chunk)
        if start is None:
            ours.update(chunk)
            continue
        start += chunk
        if len(start) >= min(META_LIMIT, size):
            meta = read_file_meta(start[:META_LIMIT])
            offset = meta.dataset_offset if meta else 0
            ours.update(start[offset:])
            start = None
    return Existing(ours.digest() == sha256, size, whole.digest(), offset, etag)


def digest_of(bucket: Bucket, key: str) -> bytes:
    """The digest of an object, read whole."""
    digest = hashlib.sha256()
    for chunk in bucket.read(key):
        digest.update(chunk)
    return digest.digest()
