"""What Airflow keeps of our tasks: task instances, their summaries in XCom, their progress.

Read from the database, as the API server does itself: by its REST interface, a page of retrievals would cost a
request for each. Everything that is internal to Airflow and could change is imported here, in ``tables`` or in ``web``.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any
from uuid import UUID

from airflow.models.dag import DagModel
from airflow.models.task_state_store import TaskStateStoreModel
from airflow.models.taskinstance import TaskInstance
from airflow.utils.session import create_session
from sqlalchemy import Text, and_, cast, func, or_, select

from airflow_dicom_get.plugins.outcomes import GET, KINDS, NEVER_RAN_STATES, Kind, kind_of, outcome_of
from airflow_dicom_get.plugins.tables import EVERY_TRY, LAYOUT, TASK

MAX_RUNS = 50_000
"""The newest so many are looked at: what a list needs grows with them, in time and memory."""

MAX_RETURNED = 32 << 20
"""Characters of what a task returned, as XCom holds it; ours return far less."""
MAX_SUMMARY = 1 << 16
"""Characters of a summary, or of what is shown while a task runs."""
_MAX_STUDIES = 1 << 12
"""Characters of the studies of a summary, as JSON: more than ours has of them."""
_MAX_NESTED = 200
"""Lists and objects of a value in XCom: a summary of ours has at most 70, and each error may show a few brackets."""
_MAX_NAME, _MAX_PLACE = 200, 5000
_MAX_TEXT = 1000
_MAX_ERRORS = 10
_MAX_NUMBER = 1 << 63
_MIN_SECONDS = 1e-3
"""What takes less says nothing of a speed."""

_MOMENT = func.coalesce(TASK.start_date, TASK.queued_dttm, TASK.scheduled_dttm, TASK.updated_at)


@dataclass(frozen=True, slots=True)
class Run:
    """One task of ours, as far as counting, choosing and sorting need it."""

    id: UUID
    dag_id: str
    operator: str
    outcome: str
    moment: datetime
    """When it began; where it has not, when it came to wait."""
    source: str | None
    instances: int
    bytes: int
    seconds: float
    scope: tuple[str, str] | None = None
    """Destination and studies, where they are known: what was retrieved, however often."""

    @property
    def retrieves(self) -> bool:
        """Whether it is a retrieval."""
        return self.operator == GET


@dataclass(frozen=True, slots=True)
class Task:
    """One task instance with all that is shown of it."""

    id: UUID
    dag_id: str
    run_id: str
    task_id: str
    map_index: int
    label: str | None
    operator: str | None
    state: str | None
    try_number: int
    max_tries: int
    started: datetime | None
    ended: datetime | None
    summary: dict[str, Any] | None

    @property
    def name(self) -> str:
        """What it is called: the study it retrieves, where Airflow keeps that; it drops it between two tries."""
        return self.label or (self.task_id if self.map_index < 0 else f"{self.task_id} [{self.map_index}]")

    @property
    def kind(self) -> Kind:
        """What it does."""
        return kind_of(self.operator)

    @property
    def outcome(self) -> str:
        """What it has come to, in one word."""
        return outcome_of(self.state, self.verdict)

    @property
    def verdict(self) -> str | None:
        """The verdict of the last try that ended with one."""
        return (self.summary or {}).get("verdict")


def _summaries(chosen: Iterable[Any]) -> tuple[Any, Any]:
    """The summaries of some task instances, and what joins them to those."""
    left, same_task = LAYOUT.xcoms("summary", chosen)
    return left, and_(same_task, *_readable(left.value, MAX_SUMMARY))


def _readable(value: Any, size: int) -> tuple[Any, ...]:
    """Leave out what some DAG has put there that would take the whole answer, before it is loaded."""
    return _at_most(value, size), _nests_little(value), _without_halves(value)


def _nests_little(value: Any) -> Any:
    """Leave out what may nest deeper than SQLite, or Python, reads JSON: it has more lists and objects than ours."""
    text = cast(value, Text)
    return func.length(text) - func.length(func.replace(func.replace(text, "[", ""), "{", "")) <= _MAX_NESTED


def _without_halves(value: Any) -> Any:
    """Leave out what has half a surrogate pair: SQLite hands out what is no UTF-8, and the whole answer is lost."""
    return cast(value, Text).not_like("%\\ud%", escape="/")


def _at_most(value: Any, size: int) -> Any:
    """Leave out what some DAG has put there that is larger, before it is loaded."""
    return func.length(cast(value, Text)) <= size


def _text(value: Any, name: str, size: int = 200) -> Any:
    """A part of a summary, which may hold anything, as a short text."""
    return func.substr(value[name].as_string(), 1, size)


def _number(text: Any) -> float:
    """A number out of a summary; 0 for what is none."""
    try:
        value = float(text or 0)
    except ValueError:
        return 0.0
    return value if 0 <= value < _MAX_NUMBER else 0.0


def _seconds(text: Any) -> float:
    """A length of time out of a summary by which a number can be divided; 0 for what is none."""
    value = _number(text)
    return value if value >= _MIN_SECONDS else 0.0


def dags_with_runs(since: datetime, until: datetime) -> list[str]:
    """The DAGs that had tasks of ours in a span of time, whoever may see them."""
    with create_session(scoped=False) as session:
        return sorted(session.scalars(select(TASK.dag_id).where(*_runs_of(since, until)).distinct()))


def teams_of(dag_ids: Collection[str]) -> dict[str, str | None]:
    """The team of each DAG, where Airflow runs with teams."""
    with create_session(scoped=False) as session:
        found = DagModel.get_dag_id_to_team_name_mapping(list(dag_ids), session=session)
    return {dag_id: found.get(dag_id) for dag_id in dag_ids}


def dag_ids() -> list[str]:
    """All DAGs, whoever may see them."""
    with create_session(scoped=False) as session:
        return list(session.scalars(select(DagModel.dag_id)))


def _runs_of(since: datetime, until: datetime) -> tuple[Any, ...]:
    return (
        *LAYOUT.current,
        TASK.operator.in_(KINDS),
        TASK.state.is_not(None),
        TASK.state.not_in(NEVER_RAN_STATES),
        since <= _MOMENT,
        until > _MOMENT,
    )


def runs(dag_ids: Collection[str], since: datetime, until: datetime) -> list[Run]:
    """All tasks of ours of some DAGs in a span of time, newest first: killed and running ones too."""
    if not dag_ids:
        return []
    chosen = (*_runs_of(since, until), TASK.dag_id.in_(dag_ids))
    # First which they are: a database that sorts whole rows takes what is needed out of every summary for that.
    newest = select(TASK.id).where(*chosen).order_by(_MOMENT.desc()).limit(MAX_RUNS).subquery()
    left, of_task = _summaries(chosen)
    names = ("verdict", "source", "completed", "bytes", "duration_seconds", "destination")
    statement = (
        select(
            TASK.id,
            TASK.dag_id,
            TASK.operator,
            TASK.state,
            _MOMENT,
            *(_text(left.value, name) for name in names),
            _text(left.value, "study_instance_uids", _MAX_STUDIES),
        )
        .select_from(TaskInstance.__table__)
        .join(newest, newest.c.id == TASK.id)
        .outerjoin(left, of_task)
        .order_by(_MOMENT.desc())
        .execution_options(**EVERY_TRY)
    )
    with create_session(scoped=False) as session:
        return [
            Run(
                key,
                dag_id,
                operator,
                outcome_of(state, verdict),
                moment,
                shown(str(source)) if source else None,
                int(_number(held)),
                int(_number(size)),
                _seconds(seconds),
                (str(place), str(studies)) if place and studies else None,
            )
            for (
                key,
                dag_id,
                operator,
                state,
                moment,
                verdict,
                source,
                held,
                size,
                seconds,
                place,
                studies,
            ) in session.execute(statement)
        ]


def _tasks(*conditions: Any) -> Any:
    chosen = (*LAYOUT.current, *conditions)
    left, of_task = _summaries(chosen)
    return (
        select(
            TASK.id,
            TASK.dag_id,
            TASK.run_id,
            TASK.task_id,
            LAYOUT.map_index,
            TASK.rendered_map_index,
            TASK.operator,
            TASK.state,
            TASK.try_number,
            TASK.max_tries,
            TASK.start_date,
            TASK.end_date,
            left.value,
        )
        .select_from(TaskInstance.__table__)
        .outerjoin(left, of_task)
        .where(*chosen)
        .execution_options(**EVERY_TRY)
    )


def _task(row: Any) -> Task:
    return Task(*row[:-1], _summary(row[-1]))  # type: ignore[call-arg]


def _summary(value: Any) -> dict[str, Any] | None:
    """A summary as pages can rely on it: texts that are not too long, numbers that are some, and errors of these.

    Any DAG may have put anything there. An XCom backend may have put it elsewhere, and left its address.
    """
    if not isinstance(value, Mapping):
        return None
    errors = value.get("errors")
    kept = [_plain(error) for error in errors if isinstance(error, Mapping)] if isinstance(errors, list) else []
    return {**_plain(value), "errors": kept[:_MAX_ERRORS]}


def shown(text: str) -> str:
    """A text as it fits in a page: not too long, and without half a surrogate pair, which JSON can hold."""
    return text[:_MAX_TEXT].encode(errors="replace").decode()


def _plain(value: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: shown(item) if isinstance(item, str) else item
        for key, item in value.items()
        if isinstance(item, str) or is_number(item)
    }


def is_number(value: Any) -> bool:
    """Whether a value that some DAG has left is a number that can be shown."""
    return isinstance(value, int | float) and abs(value) < _MAX_NUMBER


def tasks(keys: Iterable[UUID]) -> list[Task]:
    """The task instances of some runs, in their order."""
    wanted = list(keys)
    with create_session(scoped=False) as session:
        found = {row[0]: _task(row) for row in session.execute(_tasks(TASK.id.in_(wanted)))}
    return [found[key] for key in wanted if key in found]


def task(dag_id: str, run_id: str, task_id: str, map_index: int) -> Task | None:
    """One task instance of any operator; of several at one place, as in a loop, the newest."""
    place = (TASK.dag_id == dag_id, TASK.run_id == run_id, TASK.task_id == task_id, LAYOUT.map_index == map_index)
    with create_session(scoped=False) as session:
        row = session.execute(_tasks(*place).order_by(_MOMENT.desc()).limit(1)).first()
    return None if row is None else _task(row)


def returned(of: Task) -> dict[str, str]:
    """Of what the task returned, as XCom holds it, what a manifest or a reference has; nothing if it returned too much.

    The database picks it: Python would make hundreds of MB of objects of some MB, and nobody else's turn meanwhile.
    """
    names = {"__classname__": _MAX_NAME, "__data__": MAX_RETURNED, "manifest_uri": _MAX_PLACE}
    this = TASK.id == of.id
    left, same_task = LAYOUT.xcoms("return_value", (this,))
    statement = (
        select(*(_text(left.value, name, size) for name, size in names.items()))
        .select_from(TaskInstance.__table__)
        .join(left, same_task)
        .where(this, *_readable(left.value, MAX_RETURNED))
        .execution_options(**EVERY_TRY)
    )
    with create_session(scoped=False) as session:
        found = session.execute(statement).first()
    return {name: str(text) for name, text in zip(names, found or (), strict=False) if text is not None}


def shown_while_running(of: Task) -> dict[str, Any]:
    """What the task has put into its state store: ``progress`` and ``window``."""
    store = TaskStateStoreModel
    statement = (
        select(store.key, store.value)
        .select_from(TaskInstance.__table__)
        .join(store, LAYOUT.same_task(store))
        .where(
            TASK.id == of.id,
            or_(store.key == "progress", store.key == "window"),
            _at_most(store.value, MAX_SUMMARY),
        )
    )
    with create_session(scoped=False) as session:
        rows = session.execute(statement).all()
    found = {}
    for key, text in rows:
        try:
            value = json.loads(text)
        except (RecursionError, ValueError):
            continue
        if isinstance(value, dict):
            found[key] = value
    return found
