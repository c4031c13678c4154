"""What XCom holds in place of a value that lies elsewhere: followed with what the user of a notebook has."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import re
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from io import BufferedIOBase, BytesIO
from typing import Any

from airflow_dicom_get.config.checks import shown_path
from airflow_dicom_get.config.destination import FilesystemDestination, S3Destination
from airflow_dicom_get.errors import ManifestError, S3Error
from airflow_dicom_get.manifest.files import S3, Room, content_of, place_of
from airflow_dicom_get.manifest.frames import REFERENCE_KIND, load_table

__all__ = ["load_reference", "stored_value"]

_ADDRESS = re.compile(
    r"(?P<scheme>file|s3|gs|abfss?|adl|wasbs?)://.+/[^/.]+(?:\.json)?(?P<packed>\.(?:gz|bz2|xz|lzma|lz4|zip|zst|snappy))?"
)
"""Where the XCom backend of the provider ``common.io`` puts a value, if it is large."""
_OPEN: Mapping[str | None, Callable[[BytesIO], BufferedIOBase]] = {
    None: lambda content: content,
    ".gz": lambda content: gzip.GzipFile(fileobj=content),
    ".bz2": bz2.BZ2File,
    ".xz": lzma.LZMAFile,
    ".lzma": lzma.LZMAFile,
}
_MOST = 1 << 30
"""Bytes of such a value, unpacked."""
_OWN = (
    "It is read with your own AWS settings, since connections of Airflow are not known here: set AWS_ENDPOINT_URL, "
    "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or give endpoint=, access_key= and secret_key=."
)


def stored_value(value: Any, dag_id: str, task_id: str, s3_config: S3) -> Any:
    """The value of an XCom: itself, or what lies in the object store to which the backend of XCom moved it.

    An address that does not name DAG and task is a text that some task returned.

    Raises
    ------
    ManifestError
        What lies there cannot be read from here.
    """
    match = _ADDRESS.fullmatch(value) if isinstance(value, str) else None
    if match is None or not {dag_id, task_id} <= set(value.split("/")):
        return value
    opened = _OPEN.get(match["packed"])
    if match["scheme"] not in ("file", "s3") or opened is None:
        raise ManifestError(
            f"The task {task_id} returned what lies at {shown_path(value)}, which cannot be read here.",
            hint="Read the file of its manifest: the XCom summary has its manifest_uri, read_manifests() takes it.",
            uri=value,
        )
    try:
        with opened(BytesIO(_content(place_of(value), s3_config))) as file:
            return json.loads(_whole(file, task_id, value))
    except (OSError, EOFError, ValueError, RecursionError, lzma.LZMAError, zlib.error) as error:
        if isinstance(error, ManifestError):
            raise
        raise ManifestError(
            f"What the task {task_id} returned lies at {shown_path(value)}, and is no JSON.",
            hint="Read the file of its manifest: the XCom summary has its manifest_uri.",
            uri=value,
        ) from None


def _whole(file: BufferedIOBase, task_id: str, value: str) -> bytearray:
    """All of a value, a piece at a time: some MB of it may become many GB."""
    content = bytearray()
    while piece := file.read(1 << 20):
        content += piece
        if len(content) > _MOST:
            raise ManifestError(
                f"What the task {task_id} returned lies at {shown_path(value)}, and takes more than "
                f"{_MOST >> 20} MiB when it is unpacked.",
                hint="Read the file of its manifest: the XCom summary has its manifest_uri.",
                uri=value,
            )
    return content


def load_reference(value: Any, s3_config: S3, room: Room) -> Any:
    """The table that a reference to a manifest names; None if it is no reference. Raises :class:`ManifestError`."""
    if not isinstance(value, Mapping) or value.get("kind") != REFERENCE_KIND:
        return None
    place = place_of(value.get("manifest_uri"))
    if isinstance(place, S3Destination):
        value = {**value, "manifest_uri": place.uri}
    with _own_settings(place, s3_config):
        return load_table(value, s3_config, room)


def _content(place: FilesystemDestination | S3Destination, s3_config: S3) -> bytes:
    with _own_settings(place, s3_config):
        return content_of(replace(place, conn_id=None) if isinstance(place, S3Destination) else place, s3_config)


@contextmanager
def _own_settings(place: FilesystemDestination | S3Destination, s3_config: S3) -> Iterator[None]:
    """Say whose settings a bucket was read with, where that fails."""
    try:
        yield
    except ManifestError as error:
        if isinstance(place, S3Destination) and s3_config is None and isinstance(error.__cause__, S3Error):
            raise ManifestError(error.message, hint=f"{error.hint} {_OWN}", **error.facts) from error.__cause__
        raise
