"""What is asked for by one C-GET: a level, its unique keys, and the instances that should come of it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from airflow_dicom_get.dicom import header as h
from airflow_dicom_get.dicom import identifier as i
from airflow_dicom_get.engine.resolve import Scope
from airflow_dicom_get.records import Instance

MAX_LIST = 500
"""UIDs in one C-GET: one bad UID costs the whole list on some sources."""


@dataclass(slots=True)
class Request:
    """One C-GET: a level, the series it concerns, and the instances that should come of it.

    Without targets (no list was to be had) the request is done when the source says so.
    """

    level: str
    series: str | None
    targets: list[Instance] = field(default_factory=list)
    cuts: int = 0
    """How often the association was lost over it without any of it arriving."""
    confirms: bool = False
    """Whether it asks for all of a series or study that is held, to see what else comes."""

    def nearline(self) -> bool:
        """Whether the source lists some of it as not at hand."""
        return any(target.availability == "NEARLINE" for target in self.targets)

    def keys(self, scope: Scope, query_model: str) -> dict[int, str | bytes | list[str]]:
        """The level and its unique keys, never an empty one, nothing else (PS3.4 C.4.3.1.3).

        Raises
        ------
        InvalidQuery
            As :meth:`.Scope.keys_above`.
        """
        keys: dict[int, str | bytes | list[str]] = {
            i.QUERY_RETRIEVE_LEVEL: self.level,
            h.STUDY_INSTANCE_UID: scope.study,
            **scope.keys_above(query_model),
        }
        if self.level != "STUDY":
            assert self.series is not None
            keys[h.SERIES_INSTANCE_UID] = self.series
        if self.level == "IMAGE":
            keys[h.SOP_INSTANCE_UID] = [target.sop for target in self.targets]
        return keys


def by_series(instances: Iterable[Instance]) -> dict[str, list[Instance]]:
    """Instances by Series Instance UID."""
    found: dict[str, list[Instance]] = {}
    for instance in instances:
        found.setdefault(instance.series, []).append(instance)
    return found


def lists_of(targets: Sequence[Instance], size: int = MAX_LIST) -> list[Request]:
    """IMAGE requests for these instances, by series, at most ``size`` UIDs each."""
    return [
        Request("IMAGE", series, part[start : start + size])
        for series, part in by_series(targets).items()
        for start in range(0, len(part), size)
    ]
