"""The two places in a bucket: of instances, and of manifests and ledgers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from airflow_dicom_get.config.destination import S3Destination
from airflow_dicom_get.config.options import GetOptions
from airflow_dicom_get.manifest.files import MANIFESTS
from airflow_dicom_get.manifest.scopes import NO_SCOPES, Scopes, metadata_for
from airflow_dicom_get.sinks.ledger import OWN
from airflow_dicom_get.sinks.s3_ledger import BucketLedgers
from airflow_dicom_get.storage.bucket import Bucket

if TYPE_CHECKING:
    from collections.abc import Iterable

    from airflow_dicom_get.net.association import CancelToken
    from airflow_dicom_get.records import Written
    from airflow_dicom_get.sinks.base import Sink
    from airflow_dicom_get.sinks.ledger import Ledgers

_PROBE = "conditional-writes"
_SHARE = 0.8
"""Of the time that the source waits for us, what may pass until a bucket has room."""
_OUTAGE = 45.0
"""Seconds for which an upload is tried again while the service fails."""


class BucketPlace:
    """A prefix of a bucket: see :class:`~airflow_dicom_get.sinks.places.Place`."""

    def __init__(self, destination: S3Destination, options: GetOptions) -> None:
        self._destination, self._options = destination, options
        self.bucket = Bucket(destination.bucket, options.s3_config)
        self.uri = destination.uri
        self._conditional = False
        self._cancel: CancelToken | None = None

    def __str__(self) -> str:
        return str(self._destination)

    @property
    def recorded_as(self) -> str:
        """See :class:`~airflow_dicom_get.sinks.places.Place`."""
        return self.bucket.recorded_as(self._destination.prefix)

    def attend(self, cancel: CancelToken) -> None:
        """See :meth:`~airflow_dicom_get.sinks.places.Place.attend`."""
        self._cancel = cancel
        self.bucket.attend(cancel)

    def expect(self, sop_classes: Iterable[str]) -> None:
        """See :meth:`~airflow_dicom_get.sinks.places.Place.expect`: a bucket takes any."""

    def prepare(self) -> None:
        """See :meth:`~airflow_dicom_get.sinks.places.Place.prepare`: list the prefix and write a small object."""
        prefix = self._destination.prefix
        self.bucket.reach(f"{prefix}/" if prefix else "")
        self._conditional = self.bucket.writes_conditionally(f"{root_of(prefix)}/.ledger/{_PROBE}")

    def check_room(self) -> None:
        """See :meth:`~airflow_dicom_get.sinks.places.Place.check_room`: a bucket tells nothing of it."""

    def sink(self, ledgers: Ledgers, run: str, *, read_only: bool = False) -> Sink:
        """See :meth:`~airflow_dicom_get.sinks.places.Place.sink`."""
        from airflow_dicom_get.sinks.s3 import S3Sink
        from airflow_dicom_get.sinks.s3_uploads import Uploads

        deadlines = self._options.deadlines
        uploads = Uploads(
            self.bucket,
            patience=_SHARE * min(deadlines.stall, deadlines.sub_operation),
            outage=_OUTAGE,
            cancel=self._cancel,
        )
        return S3Sink(
            self.bucket,
            self._destination.prefix,
            ledgers,
            run,
            self._options,
            uploads,
            read_only=read_only,
            conditional=self._conditional,
        )


def root_of(prefix: str) -> str:
    """Where manifests and ledgers lie, if nothing else is said."""
    return f"{prefix}/{MANIFESTS}" if prefix else MANIFESTS


class BucketRoot:
    """Manifests and ledgers below a prefix: see :class:`~airflow_dicom_get.sinks.places.Root`."""

    def __init__(self, bucket: Bucket, prefix: str) -> None:
        self.bucket, self.prefix = bucket, prefix

    def attend(self, cancel: CancelToken) -> None:
        """See :meth:`~airflow_dicom_get.sinks.places.Root.attend`: no request outlasts the run."""
        self.bucket.attend(cancel)

    def prepare(self) -> None:
        """See :meth:`~airflow_dicom_get.sinks.places.Root.prepare`."""
        self.bucket.reach(f"{self.prefix}/" if self.prefix else "")

    def ledgers(self, destination: str) -> Ledgers:
        """See :meth:`~airflow_dicom_get.sinks.places.Root.ledgers`."""
        own = self.bucket.recorded_as(self.prefix) == f"{destination}/{MANIFESTS}"
        return BucketLedgers(self.bucket, self.prefix, OWN if own else destination)

    def write_manifest(
        self, rows: Any, name: str, *, verdict: str, evidence: str, run: str, scopes: Scopes = NO_SCOPES
    ) -> tuple[str, Written]:
        """See :meth:`~airflow_dicom_get.sinks.places.Root.write_manifest`: one PUT."""
        from airflow_dicom_get.manifest.files import manifest_content

        key = f"{self.prefix}/{name}.parquet" if self.prefix else f"{name}.parquet"
        content, written = manifest_content(
            rows, verdict=verdict, evidence=evidence, run=run, extra=metadata_for(scopes)
        )
        self.bucket.put(key, content, ContentType="application/vnd.apache.parquet")
        return self.bucket.uri(key), written
