"""Makes a history that fails as small as it gets: what can be left out while the same thing stays wrong is left out."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from typing import Any

from airflow_dicom_get.testing.misbehaving.archive import STUDY_UID
from tests.simulation.history import History, Run
from tests.simulation.pacs import Habits
from tests.simulation.world import play

_PLAIN = {"durable": True, "verify_held": "size", "retries": 0}


def kind(finding: str) -> str:
    """What is wrong, without where: the same for a smaller history of the same fault."""
    return finding.partition(" (run")[0].partition(":")[0]


def failure(history: History) -> str | None:
    """The kind of the first finding of a history."""
    try:
        found = play(history).findings
    except Exception as error:
        return f"raised {type(error).__name__}"
    return kind(found[0]) if found else None


def smallest(history: History, fails: Callable[[History], str | None] = failure) -> History:
    """The smallest history found that fails like the given one."""
    wrong = fails(history)
    assert wrong is not None, "the history does not fail"
    again = True
    while again:
        again = False
        for smaller in _smaller(history):
            if fails(smaller) == wrong:
                history, again = smaller, True
                break
    return history


def _smaller(history: History) -> Iterator[History]:
    """Histories with one thing less, those with much less first."""
    for at in range(len(history.steps)):
        yield replace(history, steps=_without(history.steps, at))
    for at in range(len(history.changes)):
        yield replace(history, changes=_without(history.changes, at))
    foreign = tuple(i for i in history.instances if i.study in history.studies)
    if len(foreign) < len(history.instances):
        yield replace(history, instances=foreign)
    for at in range(len(history.instances)):
        yield replace(history, instances=_without(history.instances, at))
    for at, step in enumerate(history.steps):
        if not isinstance(step, Run):
            continue
        for smaller in _smaller_runs(step):
            yield replace(history, steps=(*history.steps[:at], smaller, *history.steps[at + 1 :]))
    for name, plain in asdict(Habits()).items():
        if getattr(history.habits, name) != plain:
            yield replace(history, habits=replace(history.habits, **{name: plain}))
    if history.model != "StudyRoot" and history.habits.model != "patient":
        yield replace(history, model="StudyRoot")
    if history.query != {"StudyInstanceUID": STUDY_UID}:
        yield replace(history, query={"StudyInstanceUID": STUDY_UID})
    if history.traits:
        yield replace(history, traits={})
    if history.harms:
        yield replace(history, harms=())
    if history.verify:
        yield replace(history, verify=False, harms=())
    for at in range(len(history.store)):
        yield replace(history, store=_without(history.store, at))
        for smaller in _smaller_runs(history.store[at]):
            yield replace(history, store=(*history.store[:at], smaller, *history.store[at + 1 :]))
    if history.quick:
        yield replace(history, quick=False)


def _smaller_runs(run: Run) -> Iterator[Run]:
    if run.verb != "get":
        yield replace(run, verb="get")
    if run.beside:
        yield replace(run, beside=False)
    if run.hours is not None:
        yield replace(run, hours=None)
    for name in ("faults", "ill", "breaks", "node", "cancels"):
        items = getattr(run, name)
        if len(items) > 4:
            yield replace(run, **{name: items[:4]})
        for at in range(len(items)):
            yield replace(run, **{name: _without(items, at)})
    for name, value in run.options.items():
        if name not in _PLAIN:
            yield replace(run, options={k: v for k, v in run.options.items() if k != name})
        elif value != _PLAIN[name]:
            yield replace(run, options={**run.options, name: _PLAIN[name]})
    for at, fault in enumerate(run.faults):
        for number in {1, fault.number // 2, fault.number - 1} - {0, fault.number}:
            changed = replace(fault, number=number)
            yield replace(run, faults=(*run.faults[:at], changed, *run.faults[at + 1 :]))


def _without(items: Any, at: int) -> Any:
    return items[:at] + items[at + 1 :]
