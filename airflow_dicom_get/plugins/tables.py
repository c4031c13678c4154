"""How Airflow's tables tell which row is of which task instance. Airflow 3.3 and 3.4 differ in it.

* 3.3: a task instance is a row, and what belongs to it has its DAG, run, task and ``map_index``.
* 3.4: each try is a row of its own, of which one is the current one (``working_set``); what was ``map_index`` is
  ``region_index`` within a region, a mapped task's own or one pass of a loop; XCom is found by the id of the try, in
  two tables, through a query that Airflow makes. What the last try left is that of the try before until the next
  begins, as in 3.3, where it stays that long.

Which of the two it is, the columns say, not the version. Where neither fits, this module cannot be imported, and so
neither can the page: nothing is shown rather than rows that are other tasks'.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from airflow.models import xcom
from airflow.models.task_state_store import TaskStateStoreModel
from airflow.models.taskinstance import TaskInstance
from airflow.models.xcom import XComModel
from sqlalchemy import and_, case, func, select

TASK = TaskInstance.__table__.c
"""The columns of the task instances."""

_PLACE = ("dag_id", "run_id", "task_id")
_TASK_COLUMNS = {
    "id", *_PLACE, "rendered_map_index", "operator", "state", "try_number", "max_tries", "start_date", "end_date",
    "queued_dttm", "scheduled_dttm", "updated_at",
}  # fmt: skip


_NOT_BEGUN = ("up_for_retry", "scheduled", "queued")
"""States of a try that has not begun."""
EVERY_TRY = {"include_all_attempts": True}
"""Airflow 3.4 leaves earlier tries out of what its models are asked for, unless it is told; 3.3 does not look at it."""


class UnknownTables(ImportError):
    """Airflow's tables have the columns of neither layout."""


@dataclass(frozen=True)
class Layout:
    """What the two layouts have different names for."""

    coordinates: tuple[str, ...]
    """The columns that say of which task instance a row of the task state store is."""
    map_index: Any
    """The map index as Airflow's addresses have it."""
    current: tuple[Any, ...]
    """The rows of task instances that are no earlier tries."""

    def same_task(self, model: Any) -> Any:
        """That a row of `model` is of the task instance in the same statement."""
        return and_(*(model.__table__.c[name] == TASK[name] for name in self.coordinates))

    def xcoms(self, key: str, tasks: Iterable[Any]) -> tuple[Any, Any]:
        """The XComs of a key of the task instances that `tasks` chooses: an entity, and what joins it to them."""
        return XComModel, and_(self.same_task(XComModel), XComModel.key == key)


class _Regions(Layout):
    def xcoms(self, key: str, tasks: Iterable[Any]) -> tuple[Any, Any]:
        before = TaskInstance.__table__.alias()
        same = and_(*(before.c[name] == TASK[name] for name in self.coordinates))
        last = select(before.c.id).where(same, before.c.try_number == TASK.try_number - 1)
        ended = func.coalesce(last.correlate(TaskInstance.__table__).scalar_subquery(), TASK.id)
        left_by = case((TASK.state.in_(_NOT_BEGUN), ended), else_=TASK.id)
        # Narrowed by the ids within: joined as it is, the whole of both tables would be read.
        chosen: Any = xcom
        query = chosen.build_xcom_read_query(producer_ids=select(left_by).where(*tasks), key=key)
        entity = chosen.xcom_entity(query)
        return entity, entity.task_instance_id == left_by


def layout_of(task: set[str], left: set[str], state: set[str]) -> Layout:
    """The layout that has these columns of task instances, XComs and the task state store; else `UnknownTables`."""
    known = task >= _TASK_COLUMNS and {"key", "value"} <= left and {*_PLACE, "key", "value"} <= state
    by_map_index = {*_PLACE, "map_index"}
    by_region = {*_PLACE, "region_id", "region_index"}
    regions = {"region_id", "region_index", "working_set"}
    if known and by_map_index <= task & left & state and not regions & task:
        return Layout((*_PLACE, "map_index"), TASK.map_index, ())
    if known and by_region | regions <= task and "task_instance_id" in left and by_region <= state:
        from airflow.models.task_coordinates import public_map_index_expression  # type: ignore[import-not-found]

        index = public_map_index_expression(TaskInstance.__table__)
        return _Regions((*_PLACE, "region_id", "region_index"), index, (TASK.working_set.is_(True),))
    found = {"task_instance": task, "xcom": left, "task_state_store": state}
    shown = "; ".join(f"{name}: {', '.join(sorted(columns))}" for name, columns in found.items())
    raise UnknownTables(f"the columns of Airflow's tables are neither those of 3.3 nor those of 3.4: {shown}")


def _columns(model: Any) -> set[str]:
    return set(model.__table__.c.keys())


LAYOUT = layout_of(_columns(TaskInstance), _columns(XComModel), _columns(TaskStateStoreModel))
"""The layout of the Airflow that is installed."""
