"""The list of a study: which instances the source says it has, by C-FIND per series."""

from __future__ import annotations

import logging
import sys
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field

from airflow_dicom_get import clock
from airflow_dicom_get.dicom import header as h
from airflow_dicom_get.dicom import identifier as i
from airflow_dicom_get.dicom.uids import is_uid
from airflow_dicom_get.engine.matching import Dropped, Row
from airflow_dicom_get.engine.resolve import MAX_ROWS, Finder, Scope, note_patient
from airflow_dicom_get.errors import ListTooLong, OperationFailed
from airflow_dicom_get.records import Instance, Key

log = logging.getLogger(__name__)

ROUND_CAPS = frozenset({100, 200, 500, 1000, 5000})
"""Row counts at which some servers cut their answers without a word."""

_SLACK = 10_000
"""Rows that a source may send beyond what is known."""
_SERIES_KEYS = (h.SERIES_INSTANCE_UID, h.MODALITY, h.SERIES_NUMBER, i.SERIES_RELATED_INSTANCES)
_IMAGE_KEYS = (h.SOP_CLASS_UID, h.INSTANCE_NUMBER)
_MAY_COST = (i.INSTANCE_AVAILABILITY, i.AVAILABLE_TRANSFER_SYNTAX)
"""Keys that some look up in their files: asked for as long as they are told at all."""


@dataclass(slots=True)
class SeriesInfo:
    """What the source says of a series."""

    uid: str
    modality: str | None = None
    number: int | None = None
    related_instances: int | None = None
    rows: int = 0


@dataclass(slots=True)
class Listing:
    """What the source lists of a scope, at one moment."""

    instances: dict[Key, Instance] = field(default_factory=dict)
    series: dict[str, SeriesInfo] = field(default_factory=dict)
    related_instances: int | None = None
    """Of the whole study; set only where the scope is the whole study."""
    at: float = 0.0
    unreadable: int = 0
    """Rows that could not be read."""
    dropped: Dropped = field(default_factory=Dropped)
    """Rows that contradict what was asked for."""

    def counts_contradict(self) -> bool:
        """Whether a related-instance count is above the list, or rows of it could not be read."""
        if self.unreadable:
            return True
        if self.related_instances is not None and self.related_instances > len(self.instances):
            return True
        sizes = self._sizes()
        return any((s.related_instances or 0) > sizes[s.uid] for s in self.series.values())

    def perhaps_cut(self) -> set[str]:
        """Series whose list is shorter than their count, or, without a count, as long as a server might cut it."""
        sizes = self._sizes()
        return {
            s.uid
            for s in self.series.values()
            if (s.related_instances > sizes[s.uid] if s.related_instances is not None else s.rows in ROUND_CAPS)
        }

    def _sizes(self) -> Counter[str]:
        return Counter(instance.series for instance in self.instances.values())

    def has_counts(self) -> bool:
        """Whether the source gave counts that the list could be held against."""
        return self.related_instances is not None or (
            bool(self.series) and all(s.related_instances is not None for s in self.series.values())
        )

    def on_round_cap(self) -> bool:
        """Whether some answer has exactly as many rows as a server might cut at."""
        return len(self.series) in ROUND_CAPS or any(s.rows in ROUND_CAPS for s in self.series.values())


ListSeries = Callable[[Finder, SeriesInfo], None]
"""Lists the instances of one series; may be called again for the same one."""


def one_by_one(finder: Finder, series: Collection[SeriesInfo], list_series: ListSeries) -> None:
    """Ask for each series on the association of ``finder``."""
    for one in series:
        list_series(finder, one)


def list_study(
    finder: Finder,
    scope: Scope,
    known: dict[Key, Instance],
    each: Callable[[Finder, Collection[SeriesInfo], ListSeries], None] = one_by_one,
) -> Listing:
    """List the instances of ``scope``; objects in ``known`` are used again.

    Parameters
    ----------
    each : callable
        Has every series listed, by threads if it likes.

    Raises
    ------
    NotNegotiated, OperationFailed, ListTooLong, InvalidQuery, and whatever ends an association
    """
    listing = Listing(at=clock.now())
    keys = {h.STUDY_INSTANCE_UID: scope.study}
    for row in finder.rows("STUDY", keys, (i.STUDY_RELATED_INSTANCES, i.PATIENT_ID), dropped=listing.dropped):
        note_patient(scope, row)
        if scope.whole_study:
            listing.related_instances = i.int_value(row.get(i.STUDY_RELATED_INSTANCES))
    series_filters = [f for f in scope.filters if f.level == "SERIES"]
    image_filters = [f for f in scope.filters if f.level == "IMAGE"]
    keys = {h.STUDY_INSTANCE_UID: scope.study, **{f.tag: f.value for f in series_filters}}
    dropped = Dropped()
    for row in finder.rows("SERIES", keys, _SERIES_KEYS, dropped=dropped):
        uid = i.text_value(row.get(h.SERIES_INSTANCE_UID))
        if uid is None or not is_uid(uid):
            continue
        if scope.series is not None and uid not in scope.series:
            continue
        if uid not in listing.series:
            listing.series[uid] = SeriesInfo(
                uid,
                i.text_value(row.get(h.MODALITY)),
                i.int_value(row.get(h.SERIES_NUMBER)),
                None if scope.instances or image_filters else i.int_value(row.get(i.SERIES_RELATED_INSTANCES)),
            )
    if not listing.series and (unsupported := dropped.unsupported()) is not None:
        raise unsupported
    unreadable: Counter[str] = Counter()
    of_series: dict[str, Dropped] = {}

    def list_series(finder: Finder, series: SeriesInfo) -> None:
        keys = {
            h.STUDY_INSTANCE_UID: scope.study,
            h.SERIES_INSTANCE_UID: series.uid,
            **{f.tag: f.value for f in image_filters},
        }
        limit = _most_rows(series)
        before, series.rows = finder.unreadable, 0
        new = 0
        here = of_series[series.uid] = Dropped()
        for row in _image_rows(finder, scope, keys, limit, here):
            series.rows += 1
            new += _take_row(listing, scope, series, row, known)
            if series.rows > 10 * new + _SLACK:
                raise ListTooLong(f"The source repeats the same C-FIND rows without end for series {series.uid}.")
        series.rows += here.total
        unreadable[series.uid] = finder.unreadable - before

    above = finder.unreadable
    each(finder, listing.series.values(), list_series)
    listing.unreadable = above + unreadable.total()
    below = Dropped()
    for here in of_series.values():
        below.update(here)
    if not listing.instances and image_filters and (unsupported := below.unsupported()) is not None:
        raise unsupported
    listing.dropped.update(dropped)
    listing.dropped.update(below)
    return listing


def _image_rows(finder: Finder, scope: Scope, keys: Mapping[int, str], limit: int, dropped: Dropped) -> Iterator[Row]:
    """The rows of a series: with the UIDs alone where the source fails at the other keys.

    One looks those up in its files, and fails as a whole where a single file is lost.
    """
    wanted = (h.SOP_INSTANCE_UID, *_IMAGE_KEYS, *(tag for tag in _MAY_COST if tag not in scope.untold))
    rows = 0
    told: set[int] = set()
    try:
        for row in finder.rows("IMAGE", keys, wanted, limit, dropped):
            rows += 1
            told.update(tag for tag in _MAY_COST if row.get(tag))
            yield row
        if rows:
            scope.untold |= set(_MAY_COST) - told
    except OperationFailed as error:
        log.info("%s Asking for the UIDs only.", error.message)
        yield from finder.rows("IMAGE", keys, (h.SOP_INSTANCE_UID,), limit, dropped)


def _most_rows(series: SeriesInfo) -> int:
    return MAX_ROWS if series.related_instances is None else 2 * series.related_instances + _SLACK


def _take_row(
    listing: Listing,
    scope: Scope,
    series: SeriesInfo,
    row: Row,
    known: dict[Key, Instance],
) -> bool:
    """Put the instance of a row into the list; whether it was not there."""
    sop = i.text_value(row.get(h.SOP_INSTANCE_UID))
    if sop is None or not is_uid(sop):
        log.warning("a C-FIND row of series %s has no valid SOP Instance UID and is ignored", series.uid)
        return False
    if not scope.names(series.uid, sop):
        return False
    instance = known.get((series.uid, sop))
    if instance is None:
        instance = Instance(scope.study, series.uid, sop)
    sop_class = i.text_value(row.get(h.SOP_CLASS_UID))
    if instance.sop_class is None and sop_class and is_uid(sop_class):
        instance.sop_class = sys.intern(sop_class)
    syntax = i.text_value(row.get(i.AVAILABLE_TRANSFER_SYNTAX))
    if syntax and "\\" not in syntax and is_uid(syntax):
        instance.listed_syntax = sys.intern(syntax)
    instance.availability = i.text_value(row.get(i.INSTANCE_AVAILABILITY, b"")[:16]) or instance.availability
    instance.modality = instance.modality or series.modality
    instance.series_number = series.number
    instance.instance_number = i.int_value(row.get(h.INSTANCE_NUMBER))
    key = instance.key
    new = key not in listing.instances
    listing.instances.setdefault(key, instance)
    return new
