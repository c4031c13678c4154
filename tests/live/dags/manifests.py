"""Manifests of any size, without the hours that retrieving so many instances would take."""

from __future__ import annotations

import hashlib
import time
from datetime import UTC, datetime
from pathlib import Path

from airflow.sdk import DAG, Param, task

from airflow_dicom_get.operators._transfer import Transfer, TransferOperator


def made_up(rows):
    """Instances as a retrieval leaves them: every UID and every digest another one."""
    from airflow_dicom_get.records import Instance

    digest = hashlib.sha256(b"made up").digest()
    for number in range(rows):
        series, position = divmod(number, 500)
        digest = hashlib.sha256(digest).digest()
        instance = Instance(
            "1.2.826.0.1.3680043.8.498.77",
            f"1.2.826.0.1.3680043.8.498.77.{series}",
            f"2.25.{int.from_bytes(digest[:16])}",
            "1.2.840.10008.5.1.4.1.1.2",
        )
        instance.syntax, instance.modality = "1.2.840.10008.1.2.1", "CT"
        instance.series_number, instance.instance_number = series, position
        instance.state, instance.exactness, instance.dimse_status = "stored", "as_received", 0
        instance.uri = "/data/dicom/1.2.826.0.1.3680043.8.498.77/"
        instance.sha256, instance.bytes = digest, 525_000 + number % 97
        instance.dataset_offset = 370
        instance.attempt, instance.association = 1, 1
        instance.received_at, instance.duration_ms = 1_790_000_000 + number / 90, 11
        yield instance


class MadeUpOperator(TransferOperator):
    """Ends as :class:`DicomGetOperator` does, with a manifest of so many rows and no retrieval."""

    template_fields = ("rows", "destination", "manifest_xcom")

    def __init__(self, *, rows, destination, **kwargs):
        super().__init__(**kwargs)
        self.rows, self.destination = rows, destination

    def execute(self, context):
        try:
            return super().execute(context)
        finally:
            context["ti"].xcom_push("returned_at", time.time())

    def prepare(self, context, name, ends):
        from airflow_dicom_get.manifest.files import manifest_uri, write_manifest
        from airflow_dicom_get.manifest.schema import manifest_rows
        from airflow_dicom_get.result import Result

        count, path = int(self.rows), Path(self.destination) / f"{name}.parquet"

        def run(progress):
            rows = manifest_rows(made_up(count), source="PACS@10.20.0.5:104", destination="/data/dicom")
            written = write_manifest(rows, path, verdict="complete", evidence="list+counts", run=name)
            uri = manifest_uri(path)
            result = Result(
                "complete",
                expected=count,
                total=count,
                completed=count,
                plan_at=datetime.now(UTC),
                evidence="list+counts",
                manifest_uri=uri,
                node="PACS@10.20.0.5:104",
                destination="/data/dicom",
            )
            result.written = written
            return [result]

        return Transfer(run, name, ["dicom://PACS@10.20.0.5:104"], "/data/dicom")


with DAG(
    "live_manifest",
    schedule=None,
    params={
        "destination": Param(type="string"),
        "rows": Param(type="integer"),
        "manifest_xcom": Param("auto", type="string"),
    },
):
    get = MadeUpOperator(
        task_id="get",
        rows="{{ params.rows }}",
        destination="{{ params.destination }}",
        manifest_xcom="{{ params.manifest_xcom }}",
        pool="pacs",
    )

    @task
    def load(ti=None) -> dict:
        from airflow_dicom_get import load_manifest

        begun = time.monotonic()
        found = ti.xcom_pull(task_ids="get")
        pulled = time.monotonic()
        frame = load_manifest(found)
        return {
            "kind": "reference" if isinstance(found, dict) else "frame",
            "rows": len(frame),
            "uids": int(frame["sop_instance_uid"].nunique()),
            "pull": round(pulled - begun, 2),
            "load": round(time.monotonic() - pulled, 2),
        }

    get >> load()
