"""Retrieve every study that newly comes to the PACS, once it no longer grows.

Nobody has to say that a study is coming: the triggerer looks at the PACS once a minute, and each study that has settled
is an event of the asset `dicom_studies`, which starts this DAG. However many DAGs follow that asset, or watch the same
PACS by assets of their own, there is one loop of C-FINDs. Where another system knows which study is to come, use
`on_new_study`, which waits for that one.

A study is announced at least once, and again when it has grown. A run retrieves what has been announced since the one
before it; what is held already is not fetched again. Events that somebody creates by Airflow's pages or its REST API
announce nothing, and are left out.

What it reads:

* connection `dicom_default`: the PACS, as type DICOM
* pool `pacs`, with as many slots as the PACS allows associations:
  `airflow pools set pacs 2 'associations of the PACS'` (a task whose pool is missing waits, and no log says so)
* environment variable `DICOM_DESTINATION`: the folder to write to, an absolute path; by default the folder `dicom` in
  Airflow's home
* environment variable `DICOM_SETTLED_MINUTES`: how long a study must not change, 10 by default
* environment variable `DICOM_LOOKBACK_DAYS`: how old a study may be by its Study Date, 1 by default; priors that are
  imported later are retrieved if they are not older

It is paused on creation, so that no PACS is queried before you unpause it.
"""

from __future__ import annotations

import os
from datetime import timedelta
from typing import Any

from airflow.sdk import DAG, Asset, AssetWatcher, task

from airflow_dicom_get.operators.dicom import DicomGetOperator
from airflow_dicom_get.triggers.dicom import DicomStudyEventTrigger

SETTLED_FOR = timedelta(minutes=float(os.environ.get("DICOM_SETTLED_MINUTES") or 10))
LOOKBACK = timedelta(days=float(os.environ.get("DICOM_LOOKBACK_DAYS") or 1))
DESTINATION = os.environ.get("DICOM_DESTINATION", "").split(",")[0] or os.path.expanduser(
    os.path.join(os.environ.get("AIRFLOW_HOME") or "~/airflow", "dicom")
)
MOST_TASKS = 100
"""Of one run: after a weekend there may be more studies than Airflow maps over."""

studies = Asset(
    "dicom_studies",
    watchers=[
        AssetWatcher(
            name="settled",
            trigger=DicomStudyEventTrigger(
                dicom_conn_id="dicom_default",
                settled_for=SETTLED_FOR,
                lookback=LOOKBACK,
                poke_interval=min(60.0, SETTLED_FOR.total_seconds()),
            ),
        )
    ],
)


def announced_by(event: Any) -> dict[str, Any] | None:
    """The Item that the watcher gave an event; None if the event is of somebody else, or has none."""
    extra = event.extra or {}
    item = extra.get("payload")
    # Airflow marks what was created by its pages and its REST API. Who may do that may not choose what is fetched.
    if extra.get("from_rest_api") or not isinstance(item, dict):
        return None
    return item if isinstance(item.get("study_instance_uid"), str) else None


with DAG(
    dag_id="on_new_study_event",
    schedule=[studies],
    catchup=False,
    is_paused_upon_creation=True,
    max_active_runs=1,
    tags=["dicom"],
    doc_md=__doc__,
    default_args={
        # A retry after a lost connection, a restarted worker or a full disk fetches only what is missing.
        "retries": 3,
        "retry_delay": timedelta(minutes=5),
    },
) as dag:

    @task
    def announced(triggering_asset_events: Any = None) -> list[list[dict[str, Any]]]:
        """The studies of all events that started this run, in lists of about the same length."""
        newest: dict[str, dict[str, Any]] = {}
        for events in triggering_asset_events.values():
            for event in events:
                item = announced_by(event)
                if item is None:
                    print("An event is left out: it is none of the watcher's, or names no study.")
                else:
                    newest[item["study_instance_uid"]] = item
        items = list(newest.values())
        return [part for first in range(MOST_TASKS) if (part := items[first::MOST_TASKS])]

    DicomGetOperator.partial(
        task_id="get",
        dicom_conn_id="dicom_default",
        destination=DESTINATION,
        pool="pacs",
    ).expand(study=announced())
