"""Runs of DAGs in Airflow's database, with what their tasks left in XCom, and nothing that ever ran."""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from typing import Any

Keep = Callable[..., None]

SUMMARY = {
    "schema": 1,
    "verdict": "complete",
    "reason": None,
    "total": 10,
    "completed": 10,
    "skipped": 0,
    "failed": 0,
    "bytes": 40_000_000,
    "duration_seconds": 1.0,
    "bytes_per_second": 40e6,
    "errors": [],
    "source": "PACS@10.0.0.5:104",
    "destination": "/data/dicom",
    "manifest_uri": None,
}


def summary(verdict: str = "complete", failed: int = 0, **more: Any) -> dict[str, Any]:
    """The summary of a retrieval of ten instances."""
    return {**SUMMARY, "verdict": verdict, "failed": failed, "completed": 10 - failed, **more}


@contextmanager
def kept_runs() -> Iterator[Keep]:
    """Put task instances of a DAG with their XComs into Airflow's database, and take them away in the end."""
    from airflow import settings
    from airflow.models import TaskInstance  # noqa: TID251
    from airflow.models.dagrun import DagRun  # noqa: TID251
    from airflow.models.task_state_store import TaskStateStoreModel  # noqa: TID251
    from airflow.models.xcom import XComModel  # noqa: TID251
    from airflow.utils.state import DagRunState
    from sqlalchemy import delete, insert

    dag_ids = set()

    def keep(
        dag_id: str, tasks: list[dict[str, Any]], run_id: str = "manual__1", moment: datetime | None = None
    ) -> None:
        dag_ids.add(dag_id)
        moment = moment or datetime.now(UTC) - timedelta(hours=1)
        with settings.get_session()() as session:
            run = DagRun(dag_id=dag_id, run_id=run_id, run_type="manual", state=DagRunState.RUNNING, run_after=moment)
            session.add(run)
            session.flush()
            instances: list[dict[str, Any]] = []
            xcoms: list[dict[str, Any]] = []
            stored: list[dict[str, Any]] = []
            for number, task in enumerate(tasks):
                place = {"dag_id": dag_id, "run_id": run_id, "task_id": "get", "map_index": task.get("index", number)}
                begun = moment + timedelta(seconds=number)
                instances.append(
                    {
                        **place,
                        "id": uuid.uuid4(),
                        "start_date": begun if task.get("begun", True) else None,
                        "queued_dttm": begun,
                        "state": task["state"],
                        "rendered_map_index": task.get("label"),
                        "operator": task.get("operator", "DicomGetOperator"),
                        "try_number": 1,
                        "max_tries": 3,
                        "pool": "default_pool",
                        "pool_slots": 1,
                        "span_status": "not_started",
                    }
                )
                for key in ("summary", "return_value"):
                    if key in task:
                        xcoms.append(
                            {**place, "dag_run_id": run.id, "key": key, "value": task[key], "timestamp": begun}
                        )
                for key, value in task.get("stored", {}).items():
                    stored.append(
                        {**place, "dag_run_id": run.id, "key": key, "value": json.dumps(value), "updated_at": begun}
                    )
            for model, values in ((TaskInstance, instances), (XComModel, xcoms), (TaskStateStoreModel, stored)):
                if values:
                    session.execute(insert(model.__table__), values)
            session.commit()

    yield keep
    with settings.get_session()() as session:
        for dag_id in dag_ids:
            session.execute(delete(TaskInstance).where(TaskInstance.dag_id == dag_id))
            session.execute(delete(DagRun).where(DagRun.dag_id == dag_id))
        session.commit()
