"""What is counted while a run goes on."""

from __future__ import annotations

from airflow_dicom_get.engine.events import Events
from airflow_dicom_get.records import Instance, SubOperation


def test_what_is_not_planned_does_not_count_as_what_remains() -> None:
    seen: list[SubOperation] = []
    events = Events(seen.append)
    events.planned(2)
    for number, planned in ((1, False), (2, True), (3, True)):
        events.arrived(Instance("1.2", "1.3", f"1.4.{number}"), f"1.4.{number}", None, 10, new=True, planned=planned)
    assert [(event.remaining, event.completed) for event in seen] == [(2, 1), (1, 2), (0, 3)]


def test_a_list_that_changes_changes_what_remains() -> None:
    seen: list[SubOperation] = []
    events = Events(seen.append)
    for change in (1, 2, -1):
        events.planned(change)
    events.arrived(Instance("1.2", "1.3", "1.4"), "1.4", None, 10, new=True)
    assert seen[0].remaining == 1
