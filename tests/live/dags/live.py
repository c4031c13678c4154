"""The DAGs of the tests on a real Airflow. All take the folder to write to from the run."""

from __future__ import annotations

from datetime import timedelta

from airflow.sdk import DAG, Param

from airflow_dicom_get.operators.dicom import DicomFindOperator, DicomGetOperator

RETRIES = {"retries": 5, "retry_delay": timedelta(seconds=3)}
PLACE = {"destination": Param(type="string")}

with DAG("live_night", schedule=None, params=PLACE, default_args=RETRIES, max_active_tasks=300):
    find = DicomFindOperator(task_id="find", dicom_conn_id="pacs", study_date="20240115")
    DicomGetOperator.partial(
        task_id="get", dicom_conn_id="pacs", destination="{{ params.destination }}", pool="pacs"
    ).expand(study=find.output)

with DAG("live_study", schedule=None, params={**PLACE, "study": Param(type="string")}, default_args=RETRIES):
    DicomGetOperator(
        task_id="get",
        dicom_conn_id="pacs",
        study="{{ params.study }}",
        destination="{{ params.destination }}",
        pool="pacs",
    )
