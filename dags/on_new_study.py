"""Wait until a study is at the PACS and no longer grows, then retrieve it.

To be triggered by the system that first knows of a new study (a RIS, an interface engine, a script) through the REST
API of Airflow:

    curl -X POST https://airflow.hospital.example/api/v2/dags/on_new_study/dagRuns -H "Authorization: Bearer $TOKEN" \\
      -H 'Content-Type: application/json' -d '{"logical_date": null, "conf": {"study": "1.2.840.113619.2.1"}}'

Modalities send for minutes, and some PACS list a study before its last series. So the study must not change for ten
minutes before it is retrieved. Waiting occupies no worker: the triggerer does it, for hundreds of studies at a time.

What it reads:

* connection `dicom_default`: the PACS, as type DICOM
* pool `pacs`, with as many slots as the PACS allows associations:
  `airflow pools set pacs 2 'associations of the PACS'` (a task whose pool is missing waits, and no log says so)
* param `study`: its Study Instance UID
* param `destination`: one of the folders in the environment variable `DICOM_DESTINATION`, absolute paths with commas
  between them; by default the folder `dicom` in Airflow's home
* environment variable `DICOM_SETTLED_MINUTES`: how long the study must not change, 10 by default
"""

from __future__ import annotations

import os
from datetime import timedelta

from airflow.sdk import DAG, Param

from airflow_dicom_get.operators.dicom import DicomGetOperator
from airflow_dicom_get.sensors.dicom import DicomStudySensor

SETTLED_FOR = timedelta(minutes=float(os.environ.get("DICOM_SETTLED_MINUTES") or 10))
# Whoever triggers a run chooses one of these, and can name no other.
DESTINATIONS = os.environ.get("DICOM_DESTINATION", "").split(",")
if not DESTINATIONS[0]:
    DESTINATIONS = [os.path.expanduser(os.path.join(os.environ.get("AIRFLOW_HOME") or "~/airflow", "dicom"))]

with DAG(
    dag_id="on_new_study",
    schedule=None,
    catchup=False,
    tags=["dicom"],
    doc_md=__doc__,
    params={
        "study": Param(
            type="string",
            pattern=r"^[0-9]+(\.[0-9]+)*$",
            maxLength=64,
            title="Study Instance UID",
            description="Of the study that is to come.",
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
    # Sends a C-FIND once a minute; a PACS that is down or busy is tried again. While it waits in the triggerer it
    # occupies no slot of the pool.
    arrived = DicomStudySensor(
        task_id="arrived",
        dicom_conn_id="dicom_default",
        study="{{ params.study }}",
        settled_for=SETTLED_FOR,
        poke_interval=min(timedelta(minutes=1), SETTLED_FOR),
        # A study that has not arrived by then will not arrive: the sensor fails, without a retry.
        timeout=timedelta(hours=12),
        deferrable=True,
    )

    # Succeeds only if everything that the PACS lists now is held.
    DicomGetOperator(
        task_id="get",
        dicom_conn_id="dicom_default",
        destination="{{ params.destination }}",
        study=arrived.output,
        max_active_tis_per_dag=2,
    )
