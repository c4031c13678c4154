"""Every night, retrieve the studies of the day before into a folder: one C-FIND, then one task for each study.

What it reads: the connection `dicom_default` (the PACS), and the pool `pacs` (a slot for each association it allows).
"""

from pathlib import Path

import pendulum
from airflow.sdk import DAG

from airflow_dicom_get.operators.dicom import DicomFindOperator, DicomGetOperator

# A folder that all workers can write to, a bucket (s3://bucket/prefix), or another PACS (dicom://CONN_ID).
DESTINATION = str(Path.home() / "dicom")
# From the run, not from the clock: the same day if the run is retried, cleared or backfilled.
DAY_BEFORE = "{{ (dag_run.run_after.astimezone(dag.timezone) - macros.timedelta(days=1)).strftime('%Y%m%d') }}"

with DAG(
    "minimal",
    schedule="@daily",
    start_date=pendulum.datetime(2026, 1, 1, tz="UTC"),  # the time zone of the PACS
    is_paused_upon_creation=True,  # until you unpause it
    default_args={"retries": 3, "pool": "pacs"},
    tags=["dicom"],
    doc_md=__doc__,
) as dag:
    find = DicomFindOperator(task_id="find", study_date=DAY_BEFORE)
    get = DicomGetOperator.partial(task_id="get", destination=DESTINATION).expand(study=find.output)
