"""Retrieve the studies of a day from a PACS into a folder, one mapped task for each study.

What it reads:

* connection `dicom_default`: the PACS, as type DICOM; in one line: `AIRFLOW_CONN_DICOM_DEFAULT='dicom://AE@host:port'`
* pool `pacs`, with as many slots as the PACS allows associations:
  `airflow pools set pacs 2 'associations of the PACS'` (a task whose pool is missing waits, and no log says so)
* param `study_date`: `20240115`, `2024-01-15`, `today-1`, or a range as `2024-01-01/2024-01-31`
* param `destination`: one of the folders in the environment variable `DICOM_DESTINATION`, absolute paths with commas
  between them; by default the folder `dicom` in Airflow's home
"""

from __future__ import annotations

import os
from datetime import timedelta

from airflow.sdk import DAG, Param

from airflow_dicom_get.tasks import retrieve

# Whoever triggers a run chooses one of these, and can name no other.
DESTINATIONS = os.environ.get("DICOM_DESTINATION", "").split(",")
if not DESTINATIONS[0]:
    DESTINATIONS = [os.path.expanduser(os.path.join(os.environ.get("AIRFLOW_HOME") or "~/airflow", "dicom"))]

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
            DESTINATIONS[0],
            type="string",
            enum=DESTINATIONS,
            title="Folder",
            description="Below it each study gets a folder named by its UID.",
        ),
    },
    default_args={
        # A retry after a lost connection, a restarted worker or a full disk fetches only what is missing.
        "retries": 3,
        "retry_delay": timedelta(minutes=5),
        # Each task that talks to the PACS has one association, and so one slot.
        "pool": "pacs",
    },
) as dag:
    # find: one C-FIND. Its output is a list of Items, one for each study, without patient data. A day without studies
    # is a success: the other tasks are skipped.
    # get: one task for each study, named by its UID, which succeeds only if the whole study is held.
    # report: the results. It also runs if some studies failed, and then fails itself: the last task decides the state
    # of the run.
    retrieve(
        dicom_conn_id="dicom_default",
        study_date="{{ params.study_date }}",
        destination="{{ params.destination }}",
    )
