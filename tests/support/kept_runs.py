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


def by_regions() -> bool:
    """Whether this Airflow has a row for each try, and a region where 3.3 has the map index alone."""
    from airflow.models import TaskInstance  # noqa: TID251

    return "region_index" in TaskInstance.__table__.c


def add_run(session: Any, run: Any, tasks: list[dict[str, Any]]) -> None:
    """Put a DAG run and the task instances of its task ``get`` into Airflow's tables, as the installed one has them.

    Each of `tasks` has ``state`` and ``begun``, and may have ``index``, ``ended``, ``label``, ``operator``, ``pool``;
    ``summary`` and ``return_value``, for XCom; ``stored``, for the task state store; ``earlier``, how many tries went
    before, which Airflow 3.3 keeps in a table of their own and 3.4 beside the last. What waits for a retry
    has, in 3.4, the row of the next try already.
    """
    from airflow.models import TaskInstance, xcom  # noqa: TID251
    from airflow.models.task_state_store import TaskStateStoreModel  # noqa: TID251
    from sqlalchemy import insert

    session.add(run)
    session.flush()
    regions = by_regions()
    region = _region_of(run, session) if regions else None
    instances: list[dict[str, Any]] = []
    xcoms: list[dict[str, Any]] = []
    stored: list[dict[str, Any]] = []
    for number, task in enumerate(tasks):
        index = task.get("index", number)
        place = {"dag_id": run.dag_id, "run_id": run.run_id, "task_id": "get"}
        whose: dict[str, Any] = {"map_index": index}
        if regions:
            whose = {"region_id": region if index >= 0 else uuid.UUID(int=0), "region_index": index}
        tries = _tries({**place, **whose}, task)
        instances += tries
        # What waits for its next try has that of the last.
        pending = task["state"] == "up_for_retry" and len(tries) > 1
        for row in tries[:-1] if pending else tries:
            for key in {"summary", "return_value"} & task.keys():
                of = {**place, **whose, "dag_run_id": run.id}
                if regions:
                    of = {"id": uuid.uuid4(), "task_instance_id": row["id"]}
                xcoms.append({**of, "key": key, "value": task[key], "timestamp": task["begun"]})
        stored += [
            {**place, **whose, "dag_run_id": run.id, "key": key, "value": json.dumps(value),
             "updated_at": task["begun"]}
            for key, value in task.get("stored", {}).items()
        ]  # fmt: skip
    left: Any = xcom.XComModelV2 if regions else xcom.XComModel
    for model, values in ((TaskInstance, instances), (left, xcoms), (TaskStateStoreModel, stored)):
        if values:
            session.execute(insert(model.__table__), values)


def _region_of(run: Any, session: Any) -> uuid.UUID:
    """The region of the mapped task of a run."""
    from airflow.models.dynamic_region import DynamicRegion  # type: ignore[import-not-found]  # noqa: TID251

    region = DynamicRegion.get_or_create(dag_id=run.dag_id, run_id=run.run_id, node_id="get", session=session)
    session.flush()
    found: uuid.UUID = region.id
    return found


def _tries(place: dict[str, Any], task: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of one task instance, the current try last."""
    earlier = task.get("earlier", 0)
    row = {
        **place,
        "id": uuid.uuid4(),
        "start_date": task["begun"] if task.get("started", True) else None,
        "end_date": task.get("ended"),
        "queued_dttm": task["begun"],
        "rendered_map_index": task.get("label"),
        "operator": task.get("operator", "DicomGetOperator"),
        "state": task["state"],
        "try_number": earlier + 1,
        "max_tries": 3,
        "pool": task.get("pool", "default_pool"),
        "pool_slots": 1,
    }
    if not by_regions():
        return [{**row, "span_status": "not_started"}]
    over = {"working_set": None, "archived_reason": "retry", "state": "failed"}
    old = [{**row, **over, "id": uuid.uuid4(), "try_number": number + 1} for number in range(earlier)]
    return [*old, {**row, "working_set": True, "archived_reason": None}]


@contextmanager
def kept_runs() -> Iterator[Keep]:
    """Put task instances of a DAG with their XComs into Airflow's database, and take them away in the end."""
    from airflow import settings
    from airflow.models import TaskInstance  # noqa: TID251
    from airflow.models.dagrun import DagRun  # noqa: TID251
    from airflow.utils.state import DagRunState
    from sqlalchemy import delete

    dag_ids = set()

    def keep(
        dag_id: str, tasks: list[dict[str, Any]], run_id: str = "manual__1", moment: datetime | None = None
    ) -> None:
        dag_ids.add(dag_id)
        moment = moment or datetime.now(UTC) - timedelta(hours=1)
        rows = [
            {**task, "begun": moment + timedelta(seconds=number), "started": task.get("begun", True)}
            for number, task in enumerate(tasks)
        ]
        with settings.get_session()() as session:
            run = DagRun(dag_id=dag_id, run_id=run_id, run_type="manual", state=DagRunState.RUNNING, run_after=moment)
            add_run(session, run, rows)
            session.commit()

    yield keep
    with settings.get_session()() as session:
        for dag_id in dag_ids:
            # The table, not the model: in 3.4 the model leaves earlier tries out.
            session.execute(delete(TaskInstance.__table__).where(TaskInstance.__table__.c.dag_id == dag_id))
            session.execute(delete(DagRun).where(DagRun.dag_id == dag_id))
        session.commit()
