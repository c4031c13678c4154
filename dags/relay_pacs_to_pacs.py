"""Send the studies of a day from one PACS to another as they arrive, without storing them in between.

Each instance is forwarded in its transfer syntax while it is being received, and is acknowledged to the first PACS only
when the second has acknowledged it. For networks where nothing may be stored, and for migrations of whole archives.

What it reads:

* connection `dicom_default`: the PACS to retrieve from, as type DICOM
* connection `dicom_target`: the PACS to forward to, as type DICOM. The hours and limits of both apply: tasks
  wait for hours in which both may be used, and the lower rate is used.
* pool `pacs`, with as many slots as each PACS allows associations:
  `airflow pools set pacs 2 'associations of the PACS'` (a task whose pool is missing waits, and no log says so)
* param `study_date`: `20240115`, `2024-01-15`, `today-1`, or a range as `2024-01-01/2024-01-31`
* configuration `[dicom_get] manifest_root`: where the records of what was forwarded are kept, UIDs and sizes: an
  absolute path that all workers share, or `s3://CONN_ID@bucket/prefix`. Without it, a retry sends the whole study
  again.
"""

from __future__ import annotations

from datetime import timedelta

from airflow.sdk import DAG, Param

from airflow_dicom_get.operators.dicom import DicomVerifyOperator
from airflow_dicom_get.tasks import retrieve

with DAG(
    dag_id="relay_pacs_to_pacs",
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
    },
    default_args={
        # A retry after a lost connection or at a busy PACS sends only what is not acknowledged yet.
        "retries": 3,
        "retry_delay": timedelta(minutes=5),
        # Each task that talks to a PACS has at most one association with it, and so one slot. One pool serves both: its
        # slots are the lower of the two limits.
        "pool": "pacs",
    },
) as dag:
    # find: one C-FIND. Its output is a list of Items, one for each study, without patient data. A day without studies
    # is a success: the other tasks are skipped.
    # get: one task for each study. Here "complete" means: the other PACS has acknowledged every instance that the first
    # lists. An instance that it refuses is named in the manifest, and the rest is still sent.
    # report: the results. It also runs if some studies failed, and then fails itself.
    relayed = retrieve(
        dicom_conn_id="dicom_default",
        study_date="{{ params.study_date }}",
        destination="dicom://dicom_target",
        at_once=2,
    )

    # An acknowledgement is only a promise. This checks what the other PACS lists, once it has had time to.
    # The run succeeds if both this and `report` do: no task comes after them.
    DicomVerifyOperator.partial(
        task_id="confirm",
        destination="dicom://dicom_target",
        listed_within=timedelta(minutes=10),
        retries=5,
        # Not in the pool of the PACS: it waits for minutes, and has an association for moments of them. What is held
        # meanwhile is a slot of a worker, by at most so many studies at once.
        pool="default_pool",
        max_active_tis_per_dag=8,
    ).expand(manifest=relayed)
