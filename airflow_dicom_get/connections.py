"""Connections of Airflow that stand in the address of a bucket: ``s3://CONN_ID@bucket/key``.

The one way up to Airflow from below it: where Airflow is, the hook of the connection says how the bucket is reached.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING
from urllib.parse import quote

from airflow_dicom_get.config.checks import shown_path
from airflow_dicom_get.errors import ManifestError

if TYPE_CHECKING:
    from airflow_dicom_get.config.destination import S3Destination
    from airflow_dicom_get.config.groups import S3Config


def s3_config_of(place: S3Destination) -> S3Config | None:
    """What the connection in an address says; None for the usual AWS places, which no task falls back to.

    Raises
    ------
    ManifestError
        The address names a connection and Airflow is not installed here, or it names none within a task.
    InvalidOption
        The connection cannot be used.
    """
    if place.conn_id is None:
        if not _in_task():
            return None
        raise ManifestError(
            f"{shown_path(place)} names no connection, and a task uses no other credentials.",
            hint=f"Write s3://CONN_ID@{place.bucket}/…, or give s3_config.",
            uri=str(place),
        )
    try:
        from airflow_dicom_get.hooks.dicom_s3 import DicomS3Hook
    except ImportError:
        raise ManifestError(
            f"{shown_path(place)} names a connection of Airflow, and here is none.",
            hint="Say how to reach the bucket, with the arguments of s3_config.",
            uri=str(place),
        ) from None
    return DicomS3Hook(place.conn_id).config


def _in_task() -> bool:
    sdk = sys.modules.get("airflow.sdk")  # not imported for this: whoever runs in a task has it
    if sdk is None:
        return False
    try:
        sdk.get_current_context()
    except RuntimeError:
        return False
    return True


def with_connection(uri: str, conn_id: str | None) -> str:
    """The address of an object, with the Airflow connection by which it is reached."""
    return uri.replace("s3://", f"s3://{quote(conn_id, safe='')}@", 1) if conn_id else uri
