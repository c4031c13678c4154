"""Whether studies are at a PACS, and no longer grow."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from airflow_dicom_get.engine.items import Item, make_item
from airflow_dicom_get.engine.search import Find, Search
from airflow_dicom_get.vocabulary import noun

if TYPE_CHECKING:
    from datetime import tzinfo

Counts = dict[str, list[float]]
"""By study: its number of instances, and since when (seconds since the epoch) it has been that."""


@dataclass(frozen=True)
class Awaited:
    """The studies that are waited for. All of it can be written as JSON.

    :param queries: C-FIND queries at STUDY level, or at SERIES level where only some series of a study count
    :param named: the studies that must be there; empty: any that match
    :param settled_seconds: how long the number of instances of a study has to stay the same
    :param min_instances: how many each study has to have
    """

    queries: Sequence[Mapping[str, Any]]
    named: Sequence[str] = ()
    settled_seconds: float = 600.0
    min_instances: int = 1

    def to_json(self) -> dict[str, Any]:
        """The fields as plain values."""
        return asdict(self)


@dataclass
class Arrivals:
    """What of it is at the PACS."""

    items: list[Item] = field(default_factory=list)
    counts: Counts = field(default_factory=dict)
    """For the next time."""
    all_settled: bool = False
    """All that is waited for is there, and has settled."""
    text: str = ""


def find_arrivals(
    awaited: Awaited,
    find: Find,
    before: Mapping[str, Sequence[float]],
    now: float,
    *,
    model: str,
    timezone: tzinfo | str = "UTC",
) -> Arrivals:
    """Ask for all studies once, by as few queries as can be.

    :param find: sends a C-FIND, as :class:`~airflow_dicom_get.engine.search.Search` takes it
    :param before: the counts of the last time
    :param now: seconds since the epoch
    :param model: the information model
    :param timezone: of ``today``
    """
    found: list[Item] = []
    for query in awaited.queries:
        keys = dict(query)
        level = keys.pop("QueryRetrieveLevel", "STUDY")
        search = Search(find, level=level, model=model, timezone=timezone)
        found += [
            item if item["expected_instances"] is not None else _counted(item, find) for item in search.items(keys)
        ]
    return _compare(awaited, found, before, now)


def _counted(item: Item, find: Find) -> Item:
    """Count the instances of a study by listing them, where the PACS gives no numbers."""
    study, series = item["study_instance_uid"], item["series_instance_uids"]
    if series is None:
        rows = find({"StudyInstanceUID": study}, "SERIES", ())
        series = [uid for row in rows if (uid := str(getattr(row, "SeriesInstanceUID", "") or ""))]
    count = sum(len(list(find({"StudyInstanceUID": study, "SeriesInstanceUID": uid}, "IMAGE", ()))) for uid in series)
    return make_item(
        study, series=item["series_instance_uids"], expected=count, modalities=item["modalities"], keys=item["keys"]
    )


def _compare(awaited: Awaited, found: list[Item], before: Mapping[str, Sequence[float]], now: float) -> Arrivals:
    counts: Counts = {}
    growing = few = 0
    for item in found:
        study, count = item["study_instance_uid"], float(item["expected_instances"])
        last = before.get(study)
        since = last[1] if last is not None and last[0] == count else now
        counts[study] = [count, since]
        if count < awaited.min_instances:
            few += 1
        elif now - since < awaited.settled_seconds:
            growing += 1
    missing = len(set(awaited.named) - counts.keys())
    parts = [f"{len(found)} {noun(len(found), 'study', 'studies')} found"]
    for number, what in (
        (missing, "missing"),
        (few, f"with fewer than {awaited.min_instances} instances"),
        (growing, "not settled yet"),
    ):
        if number:
            parts.append(f"{number} {what}")
    return Arrivals(found, counts, bool(found) and not missing and not few and not growing, ", ".join(parts))
