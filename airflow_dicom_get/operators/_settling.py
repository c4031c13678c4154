"""Whether studies are at a PACS, and no longer grow: what the sensor and its trigger both ask."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from airflow_dicom_get.engine.items import Item, make_item
from airflow_dicom_get.engine.search import Search

if TYPE_CHECKING:
    from airflow_dicom_get.getscu import GetScu
    from airflow_dicom_get.hooks.dicom import DicomHook

LOOK_SECONDS = 120.0
"""The longest that one look at the PACS takes."""

Seen = dict[str, list[float]]
"""By study: the number of instances, and since when (seconds since the epoch) it has been that."""


@dataclass(frozen=True)
class Watch:
    """What is waited for. All of it can be written as JSON.

    :param queries: C-FIND queries at STUDY level, or at SERIES level where only some series of a study count
    :param named: the studies that must be there; empty: any that match
    """

    dicom_conn_id: str
    queries: Sequence[Mapping[str, Any]]
    named: Sequence[str] = ()
    query_model: str | None = None
    settled_seconds: float = 600.0
    min_instances: int = 1

    def to_json(self) -> dict[str, Any]:
        """The fields as plain values."""
        return asdict(self)


@dataclass
class Look:
    """What one look at the PACS found."""

    items: list[Item] = field(default_factory=list)
    seen: Seen = field(default_factory=dict)
    done: bool = False
    text: str = ""


def look(
    watch: Watch,
    hook: DicomHook,
    seen: Mapping[str, Sequence[float]],
    now: float,
    on_scu: Callable[[GetScu], None] = lambda scu: None,
) -> Look:
    """Look once: all studies by as few queries as can be.

    :param seen: what the last look found
    :param on_scu: takes the client before it is used, to cancel it by
    """
    scu = hook.get_scu(seconds=LOOK_SECONDS)
    on_scu(scu)
    model = watch.query_model or hook.query_model

    def find(query: Mapping[str, Any], level: str, return_keys: Sequence[str]) -> Any:
        return scu.find(query, level=level, query_model=model, return_keys=return_keys)

    found: list[Item] = []
    for query in watch.queries:
        keys = dict(query)
        level = keys.pop("QueryRetrieveLevel", "STUDY")
        search = Search(find, level=level, model=model, timezone=hook.timezone)
        found += [
            item if item["expected_instances"] is not None else _counted(item, find) for item in search.items(keys)
        ]
    return _judge(watch, found, seen, now)


def _counted(item: Item, find: Callable[..., Any]) -> Item:
    """Count the instances of a study by listing them, where the PACS gives no numbers."""
    study, series = item["study_instance_uid"], item["series_instance_uids"]
    if series is None:
        rows = find({"StudyInstanceUID": study}, "SERIES", ())
        series = [uid for row in rows if (uid := str(getattr(row, "SeriesInstanceUID", "") or ""))]
    count = sum(len(list(find({"StudyInstanceUID": study, "SeriesInstanceUID": uid}, "IMAGE", ()))) for uid in series)
    return make_item(
        study, series=item["series_instance_uids"], expected=count, modalities=item["modalities"], keys=item["keys"]
    )


def _judge(watch: Watch, found: list[Item], before: Mapping[str, Sequence[float]], now: float) -> Look:
    seen: Seen = {}
    growing = few = 0
    for item in found:
        study, count = item["study_instance_uid"], float(item["expected_instances"])
        last = before.get(study)
        since = last[1] if last is not None and last[0] == count else now
        seen[study] = [count, since]
        if count < watch.min_instances:
            few += 1
        elif now - since < watch.settled_seconds:
            growing += 1
    missing = len(set(watch.named) - seen.keys())
    parts = [f"{len(found)} studies are there"]
    for number, what in (
        (missing, "are missing"),
        (few, f"have fewer than {watch.min_instances} instances"),
        (growing, "have not settled"),
    ):
        if number:
            parts.append(f"{number} {what}")
    return Look(found, seen, bool(found) and not missing and not few and not growing, ", ".join(parts))
