"""Retrieve the studies of a day into a bucket, let a person approve, and forward them to another PACS.

Retrieve first, forward later: in between there is a copy that is proven complete, so neither PACS waits for the other,
and nothing is sent out before a person has approved it.

What it reads:

* connection `dicom_default`: the PACS to retrieve from, as type DICOM
* connection `dicom_target`: the PACS to forward to, as type DICOM; its AE titles, TLS, hours and limits hold
* connection `dicom_s3_default`: the bucket's service, as type DICOM storage (S3), or a stock Amazon Web Services one
* pool `pacs`, with as many slots as each PACS allows associations:
  `airflow pools set pacs 2 'associations of the PACS'` (a task whose pool is missing waits, and no log says so)
* param `study_date`: `20240115`, `2024-01-15`, `today-1`, or a range as `2024-01-01/2024-01-31`
* param `bucket`: one of the places in the environment variable `DICOM_BUCKET`, bucket and prefix, with commas between
  them; by default `dicom/studies`

The DAG can be cleared and run again safely: what is in the bucket is not fetched again, and what the other PACS has
acknowledged is not sent again. A run asks for approval every time.
"""

from __future__ import annotations

import os
from datetime import timedelta

from airflow.providers.standard.operators.hitl import ApprovalOperator
from airflow.sdk import DAG, Param, task

from airflow_dicom_get.operators.dicom import (
    DicomFindOperator,
    DicomGetOperator,
    DicomStoreOperator,
    DicomVerifyOperator,
)

# Whoever triggers a run chooses one of these, and can name no other.
PLACES = (os.environ.get("DICOM_BUCKET") or "dicom/studies").split(",")
# The connection is part of the address, so that readers of a manifest know how to reach the bucket.
PLACE = "s3://dicom_s3_default@{{ params.bucket }}"

with DAG(
    dag_id="retrieve_then_forward",
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
        "bucket": Param(
            PLACES[0],
            type="string",
            enum=PLACES,
            title="Bucket and prefix",
            description="Where the studies are kept. The bucket must exist.",
        ),
    },
    default_args={
        # A retry after a lost connection, a restarted worker or a busy PACS does only what is missing.
        "retries": 3,
        "retry_delay": timedelta(minutes=5),
        # Each task that talks to a PACS has at most one association with it, and so one slot. One pool serves both: its
        # slots are the lower of the two limits.
        "pool": "pacs",
    },
) as dag:
    # One C-FIND. Its output is a list of Items, one for each study, without patient data.
    find = DicomFindOperator(
        task_id="find",
        dicom_conn_id="dicom_default",
        study_date="{{ params.study_date }}",
        # A day without studies is a success: the tasks below are skipped.
        on_empty="return",
    )

    # One task for each study, which succeeds only if the study is held completely. No task keeps a study in memory
    # or on its disk.
    get = DicomGetOperator.partial(
        task_id="get",
        dicom_conn_id="dicom_default",
        destination=PLACE,
        max_active_tis_per_dag=2,
        # The tasks below need the locations of the instances, not a large table in XCom.
        manifest_xcom="reference",
    ).expand(study=find.output)

    # Does the bucket hold, byte for byte, what was retrieved; and does the PACS still list the same? A study that has
    # grown since then fails here, and is fixed by clearing its `get`.
    check = DicomVerifyOperator.partial(task_id="check", dicom_conn_id="dicom_default").expand(manifest=get.output)

    # What the approver sees: the UID of each study, by which a viewer finds it, and numbers; no patient data.
    @task(pool="default_pool")
    def describe(summaries) -> str:
        summaries = list(summaries)
        instances = sum(summary["completed"] for summary in summaries)
        lines = [f"Studies: {len(summaries)}. Instances: {instances}.", ""]
        lines += [
            f"* {', '.join(summary['study_instance_uids'])}: instances: {summary['completed']}, "
            f"series: {summary['series']}, as of {summary['plan_at']}"
            for summary in summaries
        ]
        return "\n".join(lines)

    what = describe(get.output["summary"])

    # The run waits here, without a worker, for an answer under "Required Actions". Reject skips the tasks below.
    approve = ApprovalOperator(
        task_id="approve",
        subject="Forward the studies of {{ params.study_date }} to dicom_target?",
        body="{{ ti.xcom_pull('describe') }}",
        # No answer in three days counts as a rejection.
        response_timeout=timedelta(days=3),
        defaults="Reject",
        retries=0,
        pool="default_pool",
    )

    # Each instance from the bucket; the other PACS acknowledges each. Ledger and manifest go into the bucket as well,
    # so that any worker knows what was sent.
    store = DicomStoreOperator.partial(
        task_id="store",
        target_conn_id="dicom_target",
        manifest_root=PLACE + "/_forwarded",
        max_active_tis_per_dag=2,
    ).expand(manifest=get.output)

    # An acknowledgement is only a promise. This checks what the other PACS lists.
    confirm = DicomVerifyOperator.partial(
        task_id="confirm",
        destination="dicom://dicom_target",
        # A PACS may need minutes until it lists what it has stored.
        listed_within=timedelta(minutes=10),
        retries=5,
        # Not in the pool of the PACS: it waits for minutes, and has an association for moments of them. What is held
        # meanwhile is a slot of a worker, by at most so many studies at once.
        pool="default_pool",
        max_active_tis_per_dag=8,
    ).expand(manifest=store.output)

    check >> what >> approve >> store
    get >> store
