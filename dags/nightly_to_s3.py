"""Every night, retrieve the studies of the day before into a bucket, within the hours and limits of the PACS.

One C-FIND, shards of about 2000 instances, one mapped task for each shard; then one manifest of the whole night, with
one event of the asset `dicom_night` (which starts the DAG `analyse_manifest`), and a last task that fails unless all is
held. A mail is sent if instances are missing at the end, and another if the night is not over by the morning.

What it reads:

* connection `dicom_default`: the PACS, as type DICOM. Its `window`, as in `22:00-06:00`, holds: outside of it no
  instance is requested, and a task that is not done by then resumes in the next night.
* connection `dicom_s3_default`: the bucket's service, as type DICOM storage (S3), or a stock Amazon Web Services one
* connection `smtp_default`: the mail server, as type SMTP, with `from_email`
* pool `pacs`, with as many slots as the PACS allows associations: `airflow pools set pacs 2 'associations of the PACS'`
* param `study_date`: blank for the day before the run, also if the run is cleared later or is one of a backfill
* param `modalities`: blank for all
* param `bucket`: one of the places in the environment variable `DICOM_BUCKET`, bucket and prefix, with commas between
  them; by default `dicom/studies`
* environment variable `DICOM_MAIL_TO`: the recipient of the mails; `root@localhost` by default

It is paused on creation, so that no PACS is queried before you unpause it.
"""

from __future__ import annotations

import os
from datetime import timedelta

import pendulum
from airflow.providers.smtp.notifications.smtp import SmtpNotifier
from airflow.sdk import DAG, Asset, AsyncCallback, DeadlineAlert, DeadlineReference, Param, task
from airflow.sdk.exceptions import AirflowSkipException

from airflow_dicom_get.operators.dicom import DicomFindOperator, DicomGetOperator
from airflow_dicom_get.tasks import final_errors, report

# That of the PACS, so that the night is the same for both.
TIMEZONE = "UTC"
SCHEDULE = "0 1 * * *"
NIGHT_ENDS_AFTER = timedelta(hours=5)

POOL = "pacs"
NIGHT = Asset("dicom_night")
MAIL_TO = os.environ.get("DICOM_MAIL_TO", "root@localhost")

# Whoever triggers a run chooses one of these, and can name no other.
PLACES = (os.environ.get("DICOM_BUCKET") or "dicom/studies").split(",")
# The connection is part of the address, so that readers of a manifest know how to reach the bucket.
PLACE = "s3://dicom_s3_default@{{ params.bucket }}"
# Not "today-1": a run that is cleared on Friday still means its own day.
DAY_BEFORE = "(dag_run.run_after.astimezone(dag.timezone) - macros.timedelta(days=1)).strftime('%Y%m%d')"


def mail() -> SmtpNotifier:
    """The result of the night; the error has numbers and reasons, and no patient data."""
    return SmtpNotifier(
        smtp_conn_id="smtp_default",
        to=MAIL_TO,
        subject="{{ dag.dag_id }}: {{ task.task_id }} failed",
        # Whoever triggers a run may choose its ID.
        html_content="<p>{{ exception | e }}</p><p>Run {{ dag_run.run_id | e }}, "
        "<a href='{{ ti.log_url | e }}'>log</a></p>",
    )


with DAG(
    dag_id="nightly_to_s3",
    schedule=SCHEDULE,
    start_date=pendulum.datetime(2026, 1, 1, tz=TIMEZONE),
    catchup=False,
    # A night does not start while the previous one is still running.
    max_active_runs=1,
    is_paused_upon_creation=True,
    # Counted from when the run is queued, so a backfill does not raise alarms about nights long gone. The mail is sent
    # by the triggerer, however busy the workers are.
    deadline=DeadlineAlert(
        name="The night is over",
        reference=DeadlineReference.DAGRUN_QUEUED_AT,
        interval=NIGHT_ENDS_AFTER,
        callback=AsyncCallback(
            SmtpNotifier,
            kwargs={
                "smtp_conn_id": "smtp_default",
                "to": MAIL_TO,
                "subject": "{{ dag_run.dag_id }}: not over by the morning",
                "html_content": "<p>{{ dag_run.dag_run_id | e }} is {{ dag_run.state }}. What is held stays held.</p>"
                f"<p>If its tasks are still scheduled, the pool {POOL} is full or missing.</p>",
            },
        ),
    ),
    tags=["dicom"],
    doc_md=__doc__,
    params={
        "study_date": Param(
            None,
            type=["null", "string"],
            format="date",
            title="Study date",
            description="Blank for the day before the run.",
        ),
        "modalities": Param(
            [],
            type=["null", "array"],
            items={"type": "string", "pattern": "^[A-Z0-9_]{1,16}$"},
            # The PACS is asked once for each.
            maxItems=64,
            examples=["CR", "CT", "DX", "MG", "MR", "NM", "PT", "US", "XA"],
            title="Modalities",
            description="A study is taken that has at least one of them. None chosen: all studies.",
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
        # A retry after a lost connection, a restarted worker or a full bucket fetches only what is missing.
        "retries": 3,
        "retry_delay": timedelta(minutes=5),
        "retry_exponential_backoff": True,
        # Each task that talks to the PACS has one association, and so one slot.
        "pool": POOL,
    },
) as dag:
    # Shards, not studies: a large study is split by series, small ones go together, and however many there are, it is
    # never more than Airflow maps over.
    find = DicomFindOperator(
        task_id="find",
        dicom_conn_id="dicom_default",
        study_date="{{ params.study_date or " + DAY_BEFORE + " }}",
        modalities="{{ (params.modalities or []) | join(',') }}",
        shard_instances=2000,
        # A day without studies is a success: the tasks below are skipped, and there is no event.
        on_empty="return",
        on_failure_callback=mail(),
    )

    # Directly into the bucket, without a local copy.
    get = DicomGetOperator.partial(
        task_id="get",
        dicom_conn_id="dicom_default",
        destination=PLACE,
        # Outside the hours of the PACS the task is deferred: it occupies neither a worker nor a pool slot.
        outside_window="defer",
        # The tasks below need the locations of the instances, not a large table in XCom.
        manifest_xcom="reference",
    ).expand(study=find.output)

    # One manifest of the night, and one event. An outlet on `get` would make an event for each shard. It is published
    # also if instances are missing: the event has the verdict, and its consumers decide.
    @task(
        outlets=[NIGHT],
        trigger_rule="all_done_min_one_success",
        pool="default_pool",
        multiple_outputs=False,
        on_failure_callback=mail(),
    )
    def publish(shards, manifests, to, outlet_events=None) -> dict:
        from airflow_dicom_get import combine_manifests, load_manifest

        # None stands for a shard whose manifest could not be written. A slice is one request to Airflow.
        manifests = manifests[:]
        if all(manifest is None for manifest in manifests):
            raise AirflowSkipException(f"No manifest was left (shards: {len(shards)}). The log of `report` says why.")
        with final_errors():
            # A shard whose task was killed left nothing at all: with `expected` the night is not complete without it.
            reference = combine_manifests(manifests, to, expected=len(shards))
            frame = load_manifest(reference)
        outlet_events[NIGHT].extra = {
            # Enough for load_manifest(), which then checks that the file is still this one.
            **reference,
            "studies": int(frame["study_instance_uid"].nunique()),
            "instances": len(frame),
        }
        return reference

    publish(find.output, get.output, PLACE + "/_nights")

    # The result of the night: fails unless everything is held. With `publish` it decides the state of the run.
    report.override(pool="default_pool", on_failure_callback=mail())(find.output, get.output["summary"], get.output)
