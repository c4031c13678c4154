"""The DAG of the test with many workers: a night, one mapped task a study, into a bucket."""

from __future__ import annotations

from datetime import timedelta

from airflow.sdk import DAG

from airflow_dicom_get.operators.dicom import DicomFindOperator, DicomGetOperator

with DAG(
    "many_workers",
    schedule=None,
    default_args={"retries": 5, "retry_delay": timedelta(seconds=3), "pool": "pacs"},
    max_active_tasks=300,
):
    find = DicomFindOperator(task_id="find", dicom_conn_id="pacs", study_date="20240115")
    DicomGetOperator.partial(task_id="get", dicom_conn_id="pacs", destination="s3://bucket@dicom/night").expand(
        study=find.output
    )
