"""Retrieve the studies of a day from a PACS into a folder, one mapped task a study.

What it reads:

* connection `dicom_default`: the PACS, as type DICOM; in one line `AIRFLOW_CONN_DICOM_DEFAULT='dicom://AE@host:port'`
* param `study_date`: `20240115`, `2024-01-15`, `today-1`, or a range as `2024-01-01/2024-01-31`
* param `destination`: an absolute path; by default the environment variable `DICOM_DESTINATION`, else the folder
  `dicom` in Airflow's home

To keep several DAGs together within what the PACS admits, make a pool and give it to `get`:
`airflow pools set pacs 2 ''`, `pool="pacs"`.
"""

from __future__ import annotations

import os
from datetime import timedelta

from airflow.sdk import DAG, Param

from airflow_dicom_get.operators.find import DicomFindOperator
from airflow_dicom_get.operators.get import DicomGetOperator
from airflow_dicom_get.operators.report import report

DESTINATION = os.environ.get("DICOM_DESTINATION") or os.path.expanduser(
    os.path.join(os.environ.get("AIRFLOW_HOME") or "~/airflow", "dicom")
)

with DAG(
    dag_id="retrieve_studies",
    schedule=None,
    catchup=False,
    tags=["dicom"],
    doc_md=__doc__,
    params={
        "study_date": Param(
            "20240115",
            type="string",
            minLength=1,
            title="Study date",
            description="A day, today, today-1, or a range as 2024-01-01/2024-01-31.",
        ),
        "destination": Param(
            DESTINATION,
            type="string",
            pattern="^/",
            title="Folder",
            description="Absolute path, below which each study gets a folder named by its UID.",
        ),
    },
    default_args={
        # A try after a cut line, a restarted worker or a full disk fetches only what is still missing.
        "retries": 3,
        "retry_delay": timedelta(minutes=5),
    },
) as dag:
    # One C-FIND. Its output is a list of Items, one a study, without anything of the patient.
    find = DicomFindOperator(
        task_id="find",
        dicom_conn_id="dicom_default",
        study_date="{{ params.study_date }}",
        # A day without studies is a success: the tasks below are skipped.
        on_empty="return",
    )

    # One task a study, named by its UID. Each succeeds only if the study is held whole.
    get = DicomGetOperator.partial(
        task_id="get",
        dicom_conn_id="dicom_default",
        destination="{{ params.destination }}",
        # No more of these at once than the PACS admits associations. A pool holds that over all DAGs.
        max_active_tis_per_dag=2,
    ).expand(study=find.output)

    # What came of it. Each get leaves its summary and its manifest in XCom whatever the verdict, so this runs too
    # where some studies failed, and fails then itself: the last task decides on the state of the whole run.
    report(find.output, get.output["summary"], get.output)
