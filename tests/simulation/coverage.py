"""What histories met together: how the PACS behaved, which faults came, at which destination, in how many runs.

``python -m tests.simulation.simulate --coverage`` prints how many histories met each combination. One that none met
was not tested, unless :func:`reason` says why there is none.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from airflow_dicom_get.testing.misbehaving.behaviour import MODE_CLASSES
from tests.simulation.destinations import DESTINATIONS
from tests.simulation.history import DISK_FAULTS, NETWORK_FAULTS, S3_FAULTS, Between, History, Run
from tests.simulation.marks import in_history
from tests.simulation.pacs import CHANGES

RUNS = (1, 2, 3)
_HONEST, _NONE = "all is as it should be", "none"
_MARKED: Mapping[str, str] = {
    "list: cut": "lists are cut",
    "list: a malformed UID": "UIDs are malformed",
    "list: a key is matched loosely": "keys are matched loosely",
    "list: in Patient Root": "Patient Root alone",
    "archive: ": "the archive changes",
    "pacs: other bytes": "other bytes are sent",
    "get: a whole series": "more is sent than was asked for",
    "break: ": "the line ends",
}
"""Marks, by how they begin, and the behaviour of the PACS that they show."""
_STAGES = {"associate": "associations", "find": "lists", "get": "gets", "release": "releases"}
BEHAVIOURS = (
    _HONEST,
    "counts are missing or wrong",
    "lists tell no classes",
    *_MARKED.values(),
    *(f"it misbehaves in {name}" for name in _STAGES.values()),
)
_OTHERS = "others"
FAULTS = (_NONE, "call", "network", "kill", "power", _OTHERS, "node")
"""None; an error of the disk or of S3; one of the network; a kill; a power cut; what others do to files; the node."""


class Cell(NamedTuple):
    """A combination."""

    behaviour: str
    fault: str
    destination: str
    runs: int


met: Counter[Cell] = Counter()
"""In how many histories each combination was met."""


def note(history: History) -> None:
    """Count the combinations of the history that was just played."""
    runs = sum(isinstance(step, Run) for step in history.steps)
    met.update(
        Cell(behaviour, fault, history.destination, runs)
        for behaviour, fault in itertools.product(_behaviours(history), _faults(history))
    )


def _behaviours(history: History) -> set[str]:
    found = {name for begin, name in _MARKED.items() if any(mark.startswith(begin) for mark in in_history)}
    if history.habits.counts != "true":
        found.add("counts are missing or wrong")
    if not history.habits.classes:
        found.add("lists tell no classes")
    for mark in in_history:
        if mark.startswith("mode: "):
            stages = MODE_CLASSES[mark.removeprefix("mode: ")].stages
            found |= {f"it misbehaves in {_STAGES[stage]}" for stage in stages}
    return found or {_HONEST}


def _faults(history: History) -> set[str]:
    found = set()
    for mark in in_history:
        kind, _, what = mark.partition(": ")
        operation, _, how = what.partition(" ")
        if kind == "fault":
            own = operation in DISK_FAULTS or operation in S3_FAULTS
            found.add(how if how in ("kill", "power") else "call" if own else "network")
            assert own or operation in NETWORK_FAULTS, mark
        elif kind == "node" and what not in ("stored again", "two instances of one UID", "C-FIND fails"):
            found.add("node")
    for step in history.steps:
        if isinstance(step, Between) and step.what not in CHANGES:
            found.add("power" if step.what == "power" else _OTHERS)
    return found or {_NONE}


def reason(cell: Cell) -> str | None:
    """Why there may be no history of a combination."""
    if cell.fault == "node" and cell.destination != "node":
        return "no node is the destination"
    if cell.fault == _OTHERS and cell.runs == 1:
        return "others come between two runs"
    if cell.behaviour == "it misbehaves in releases":
        return "two modes alone do so, and nothing comes after them"
    return None


def cells() -> Iterator[Cell]:
    """All combinations."""
    for behaviour, fault, destination, runs in itertools.product(BEHAVIOURS, FAULTS, DESTINATIONS, RUNS):
        yield Cell(behaviour, fault, destination, runs)


def empty(counts: Mapping[Cell, int]) -> list[Cell]:
    """Combinations that no history met, and for which there is no reason."""
    return [cell for cell in cells() if not counts.get(cell) and reason(cell) is None]


def table(counts: Mapping[Cell, int]) -> str:
    """How many histories met each combination: by destination, in 1, 2 and 3 runs; ``-`` where there is a reason."""
    width = max(map(len, BEHAVIOURS))
    lines = []
    for destination in DESTINATIONS:
        lines.append(f"{destination:<{width}} " + " ".join(f"{fault:^17}" for fault in FAULTS))
        for behaviour in BEHAVIOURS:
            row = []
            for fault in FAULTS:
                found = [Cell(behaviour, fault, destination, runs) for runs in RUNS]
                numbers = (str(counts.get(x) or ("-" if reason(x) else 0)) for x in found)
                row.append(" ".join(f"{number:>5}" for number in numbers))
            lines.append(f"{behaviour:<{width}} " + " ".join(row))
    return "\n".join(lines)
