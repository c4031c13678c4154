"""Whether studies are at a PACS, and no longer grow."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from airflow_dicom_get.config.checks import Integer, Parsed, invalid, shown
from airflow_dicom_get.dicom.uids import is_uid
from airflow_dicom_get.engine.items import Item, make_item
from airflow_dicom_get.engine.search import Find, Search
from airflow_dicom_get.vocabulary import REASONS, noun

if TYPE_CHECKING:
    from datetime import tzinfo

    from airflow_dicom_get.engine.find import Found

Counts = dict[str, list[float]]
"""By study: its number of instances, and since when (seconds since the epoch) it has been that."""


@dataclass(frozen=True)
class Awaited:
    """The studies that are waited for. All of it can be written as JSON.

    :param queries: C-FIND queries at STUDY level, or at SERIES level where only some series of a study count
    :param named: the studies that must be there, with the series that ``queries`` name of them; empty: any that match
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


@dataclass
class Sighting:
    """What a PACS listed at one moment."""

    items: list[Item]
    at: float
    """Seconds since the epoch."""
    doubt: str | None = None
    """Why there may be more, as a reason of the vocabulary."""


def list_studies(
    queries: Sequence[Mapping[str, Any]], find: Find, at: float, *, model: str, timezone: tzinfo | str = "UTC"
) -> Sighting:
    """Ask for all studies once, by as few queries as can be; each with its number of instances.

    :param queries: as :class:`Awaited` has them
    :param find: sends a C-FIND, as :class:`~airflow_dicom_get.engine.search.Search` takes it
    :param at: seconds since the epoch
    :param model: the information model
    :param timezone: of ``today``
    """
    found: list[Item] = []
    doubt = None
    for query in queries:
        keys = dict(query)
        level = keys.pop("QueryRetrieveLevel", "STUDY")
        search = Search(find, level=level, model=model, timezone=timezone)
        for item in search.items(keys):
            if item["expected_instances"] is None:
                item, of_lists = _counted(item, find)
                doubt = doubt or of_lists
            found.append(item)
        doubt = doubt or search.doubt
    return Sighting(found, at, doubt)


def find_arrivals(awaited: Awaited, seen: Sighting, before: Mapping[str, Sequence[float]]) -> Arrivals:
    """Compare what a PACS lists with what is waited for.

    :param before: the counts of the last time
    """
    arrivals = _compare(awaited, seen.items, before, seen.at)
    if seen.doubt is not None:  # said, and no reason to wait: what is listed has settled all the same
        arrivals.text += f" ({seen.doubt}: {REASONS[seen.doubt].text})"
    return arrivals


def _counted(item: Item, find: Find) -> tuple[Item, str | None]:
    """Count the instances of a study by listing them, where the PACS gives no numbers; and why there may be more."""
    study, series = item["study_instance_uid"], item["series_instance_uids"]
    answers: list[Found] = []
    if series is None:
        answers.append(find({"StudyInstanceUID": study}, "SERIES", ()))
        series = [uid for row in answers[0] if (uid := str(getattr(row, "SeriesInstanceUID", "") or ""))]
    lists = [find({"StudyInstanceUID": study, "SeriesInstanceUID": uid}, "IMAGE", ()) for uid in series if is_uid(uid)]
    counted = make_item(
        study,
        series=item["series_instance_uids"],
        expected=sum(map(len, lists)),
        modalities=item["modalities"],
        keys=item["keys"],
    )
    return counted, next((rows.doubt for rows in (*answers, *lists) if rows.doubt), None)


def counts_of(seen: Sighting, before: Mapping[str, Sequence[float]]) -> Counts:
    """The numbers of instances of what is listed, and since when they have been that.

    :param before: those of the last time
    """
    counts: Counts = {}
    for item in seen.items:
        study, count = item["study_instance_uid"], float(item["expected_instances"])
        last = before.get(study)
        counts[study] = [count, last[1] if last is not None and last[0] == count else seen.at]
    return counts


def _span(option: str, value: Any) -> timedelta:
    if not isinstance(value, timedelta) or value < timedelta(0):
        raise invalid(option, f"{shown(value)} is not allowed", "Give a timedelta of at least 0.")
    return value


SPAN = Parsed(_span, "a timedelta")
"""What ``settled_for`` may be: how long a number of instances has to stay the same."""
LEAST_INSTANCES = Integer(1)
"""What ``min_instances`` may be."""


def _missing_series(awaited: Awaited, found: list[Item]) -> set[tuple[str, str]]:
    """The named series of studies that are there, which are not."""
    there = {item["study_instance_uid"]: item["series_instance_uids"] or () for item in found}
    named = {
        (study, series)
        for query in awaited.queries
        for study in awaited.named
        if study in there and study in query.get("StudyInstanceUID", ())
        for series in query.get("SeriesInstanceUID", ())
    }
    return named - {(study, uid) for study, series in there.items() for uid in series}


def _compare(awaited: Awaited, found: list[Item], before: Mapping[str, Sequence[float]], now: float) -> Arrivals:
    counts = counts_of(Sighting(found, now), before)
    growing = few = 0
    for item in found:
        count, since = counts[item["study_instance_uid"]]
        if count < awaited.min_instances:
            few += 1
        elif now - since < awaited.settled_seconds:
            growing += 1
    missing = len(set(awaited.named) - counts.keys()) + len(_missing_series(awaited, found))
    parts = [f"{len(found)} {noun(len(found), 'study', 'studies')} found"]
    for number, what in (
        (missing, "missing"),
        (few, f"with fewer than {awaited.min_instances} instances"),
        (growing, "not settled yet"),
    ):
        if number:
            parts.append(f"{number} {what}")
    return Arrivals(found, counts, bool(found) and not missing and not few and not growing, ", ".join(parts))
