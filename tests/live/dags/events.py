"""Assets that watch a PACS for new studies: two with the same watcher, one with another query."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

from airflow.sdk import DAG, Asset, AssetWatcher, task

from airflow_dicom_get.triggers.dicom import DicomStudyEventTrigger

OFTEN: dict[str, Any] = {
    "settled_for": timedelta(seconds=1),
    "poke_interval": 1.0,
    "lookback": timedelta(days=20000),
    "dicom_conn_id": "watched",
}


def watch(name: str, **options: Any) -> Asset:
    trigger = DicomStudyEventTrigger(**OFTEN, **options)
    return Asset(name, watchers=[AssetWatcher(name=f"{name}_watcher", trigger=trigger)])


for name, query in (("live_one", None), ("live_two", None), ("live_ct", {"ModalitiesInStudy": "CT"})):
    with DAG(f"on_{name}", schedule=[watch(name, query=query)], catchup=False) as dag:

        @task
        def studies(triggering_asset_events: Any = None) -> list[Any]:
            return [event.extra["payload"] for events in triggering_asset_events.values() for event in events]

        studies()
    globals()[dag.dag_id] = dag
