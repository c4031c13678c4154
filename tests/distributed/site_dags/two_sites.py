"""The DAG of the test with two sites: what talks to a PACS runs at its site, and the report at the centre."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

from airflow.sdk import DAG, TaskGroup

from airflow_dicom_get.operators.dicom import DicomFindOperator, DicomGetOperator
from airflow_dicom_get.tasks import report

with DAG("two_sites", schedule=None, default_args={"retries": 5, "retry_delay": timedelta(seconds=3)}):
    for site in ("north", "south"):
        # The same at each site: its worker is the only one for its queue.
        at_site: dict[str, Any] = {
            "executor": "EdgeExecutor",
            "queue": site,
            "pool": f"pacs_{site}",
            "dicom_conn_id": f"pacs_{site}",
        }
        with TaskGroup(site):
            find = DicomFindOperator(task_id="find", study_date="20240115", **at_site)
            get = DicomGetOperator.partial(task_id="get", destination=f"s3://bucket@dicom/{site}", **at_site).expand(
                study=find.output
            )
            found: Any = find.output  # a list, when it runs
            report(found, get.output["summary"], get.output)
