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

# Airflow 3.4 counts the delay from the end of a try, of which it may be told five seconds later: between two tries of
# less nobody sees that the task waits.
PATIENT = {**RETRIES, "retry_delay": timedelta(seconds=10)}
with DAG("live_study", schedule=None, params={**PLACE, "study": Param(type="string")}, default_args=PATIENT):
    DicomGetOperator(
        task_id="get",
        dicom_conn_id="pacs",
        study="{{ params.study }}",
        destination="{{ params.destination }}",
        pool="pacs",
    )
