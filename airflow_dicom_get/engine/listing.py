"""The list of a study: which instances the source says it has, by C-FIND per series."""

from __future__ import annotations

import logging
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Set
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import islice

from airflow_dicom_get import clock
from airflow_dicom_get.dicom import header as h
from airflow_dicom_get.dicom import identifier as i
from airflow_dicom_get.dicom.uids import is_uid, shown_uid
from airflow_dicom_get.dicom.values import kept
from airflow_dicom_get.engine.resolve import MAX_CLASSES, Scope, note_row
from airflow_dicom_get.errors import ListTooLong, OperationFailed, PeerError
from airflow_dicom_get.lists.finder import Finder, Keys
from airflow_dicom_get.lists.matching import Dropped, Row
from airflow_dicom_get.lists.whole import Below, Cuts, Doubts, Lists, larger
from airflow_dicom_get.net.find import MAX_ROWS, too_long
from airflow_dicom_get.records import Instance, Key
from airflow_dicom_get.vocabulary import AVAILABILITIES

log = logging.getLogger(__name__)

_LONGEST_UID = 66
"""Bytes, with padding."""
_SLACK = 10_000
"""Rows that a source may send beyond what is known."""
_STUDY_KEYS = (i.STUDY_RELATED_SERIES, i.STUDY_RELATED_INSTANCES, h.PATIENT_ID)
_SERIES_KEYS = (h.SERIES_INSTANCE_UID, h.MODALITY, h.SERIES_NUMBER, i.SERIES_RELATED_INSTANCES)
_IMAGE_KEYS = (h.SOP_CLASS_UID, h.INSTANCE_NUMBER)
_LONGEST = 66
"""Bytes of a UID (PS3.5 6.2) with any padding."""
_MAX_SYNTAXES = 100
"""Transfer syntaxes that a study may be listed in, more than there are: each is proposed for each of its classes."""
_TAKEN = frozenset({h.SOP_INSTANCE_UID, *_IMAGE_KEYS, i.AVAILABLE_TRANSFER_SYNTAX, i.INSTANCE_AVAILABILITY})
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
    """Of its list, as they came."""
    listed: int = 0
    """Distinct instances among them, before our own filters."""


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
    unknown: frozenset[str] = frozenset()
    """UIDs of series and instances that a query names, and the source does not list in this study."""
    bad: dict[Key, Instance] = field(default_factory=dict)
    """Rows that cannot be asked for, since the UID of their series or their own is malformed, by both as shown."""
    below_study: Below | None = None
    """The list of the series; None where it is held against a list of UIDs, or the study itself is not listed."""
    instances_named: bool = False
    """Whether the lists of instances are held against a list of UIDs."""
    images_filtered: bool = False
    cuts: Cuts = field(default_factory=Cuts)

    @property
    def total(self) -> int:
        """Instances that the source lists of the scope, those among them that cannot be asked for."""
        return len(self.instances) + len(self.bad)

    def keys(self) -> set[Key]:
        """What it names, whether or not that can be asked for."""
        return {*self.instances, *self.bad}

    def keep_bad(self, study: str, series: str, sop: str) -> None:
        """Keep a row that cannot be asked for."""
        row = Instance(study, series, sop)
        row.state, row.reason = "missing", "bad_uid"
        self.bad.setdefault(row.key, row)

    def narrow(self, sop_classes: Collection[str] | None, but: Collection[Key] = ()) -> None:
        """Leave out what is known to be of another class; the numbers of the lists stay as they came.

        Parameters
        ----------
        sop_classes : collection of str, optional
            The classes that are wanted; all by default. An instance whose class is not told stays.
        but : collection of (series, sop)
            What is known to be of another class though the list does not say so.
        """
        if sop_classes is not None:
            self.instances = {
                key: x
                for key, x in self.instances.items()
                if key not in but and (x.sop_class is None or x.sop_class in sop_classes)
            }

    def in_question(self, series: str | None) -> bool:
        """Whether it is worth knowing how many instances a series (None: the study) has: its list is round or short."""
        info = self.series.get(series) if series is not None else None
        return info is None or self.cuts.is_round(info.rows) or (info.related_instances or 0) > info.listed

    def lists(self) -> Lists:
        """Its lists in numbers, for the rule of whether they are whole."""
        below = {
            one.uid: Below(one.rows, one.listed, one.related_instances, self.images_filtered)
            for one in self.series.values()
        }
        if self.instances_named:
            return Lists(count=self.related_instances, unreadable=self.unreadable)
        return Lists(self.below_study, below, self.related_instances, self.unreadable)

    def doubts(self, counted: Mapping[str | None, int]) -> Doubts:
        """What of it may be cut; see :meth:`~airflow_dicom_get.lists.whole.Lists.doubts`."""
        return self.lists().doubts(self.cuts, counted)

    def has_counts(self) -> bool:
        """Whether the source gave counts that the list could be held against."""
        return self.related_instances is not None or (
            bool(self.series) and all(s.related_instances is not None for s in self.series.values())
        )

    def counts_agree(self) -> bool:
        """Whether the source gave counts of what it lists, and they say as many as it lists."""
        if self.instances_named or not self.has_counts():
            return False
        if self.related_instances is not None:
            return self.related_instances == sum(one.listed for one in self.series.values())
        return all(one.related_instances == one.listed for one in self.series.values())


ListSeries = Callable[[Finder, SeriesInfo], None]
"""Lists the instances of one series; may be called again for the same one."""
Each = Callable[[Finder, Collection[SeriesInfo], ListSeries], None]
"""Has every series listed, by threads if it likes."""


def one_by_one(finder: Finder, series: Collection[SeriesInfo], list_series: ListSeries) -> None:
    """Ask for each series on the association of ``finder``."""
    for one in series:
        list_series(finder, one)


def list_study(finder: Finder, scope: Scope, known: dict[Key, Instance], each: Each = one_by_one) -> Listing:
    """List the instances of ``scope``; objects in ``known`` are used again.

    Raises
    ------
    NotNegotiated, OperationFailed, ListTooLong, InvalidQuery, and whatever ends an association
    """
    if not scope.named_well:
        return unasked(scope)
    return _Lister(finder, scope, known).run(each)


def unasked(scope: Scope) -> Listing:
    """What is to be said of a study whose own UID is malformed: nothing of it is asked for."""
    listing = Listing(at=clock.now())
    listing.keep_bad(scope.study, "", "")
    return listing


class _Lister:
    def __init__(self, finder: Finder, scope: Scope, known: dict[Key, Instance]) -> None:
        self._finder, self._scope, self._known = finder, scope, known
        self._listing = Listing(at=clock.now(), cuts=finder.cuts, instances_named=scope.instances is not None)
        self._series_filters = {f.tag: f.value for f in scope.filters if f.level == "SERIES"}
        self._image_filters = {f.tag: f.value for f in scope.filters if f.level == "IMAGE"}
        self._listing.images_filtered = bool(self._image_filters)
        self._few: dict[int, set[str]] = defaultdict(set)
        """By tag what :meth:`_one_of_few` has told."""
        self._unreadable: Counter[str] = Counter()
        self._dropped: dict[str, Dropped] = {}

    def run(self, each: Each) -> Listing:
        listing, finder = self._listing, self._finder
        for key in self._scope.bad:
            listing.keep_bad(self._scope.study, *key)
        before = finder.unreadable
        related_series = self._ask_study()
        dropped = Dropped()
        self._ask_series(dropped, related_series)
        if not listing.series and not listing.bad and (unsupported := dropped.unsupported()) is not None:
            raise unsupported
        above = finder.unreadable - before
        each(finder, listing.series.values(), self._list_series)
        before = finder.unreadable
        self._ask_for_named()
        listing.unreadable = above + self._unreadable.total() + finder.unreadable - before
        if not self._scope.named:
            listing.unknown = self._unknown()
        below = Dropped()
        for here in self._dropped.values():
            below.update(here)
        if not listing.total and self._image_filters and (unsupported := below.unsupported()) is not None:
            raise unsupported
        listing.dropped.update(dropped)
        listing.dropped.update(below)
        return listing

    def _unknown(self) -> frozenset[str]:
        """See :attr:`Listing.unknown`. What a filter leaves out is there; where the source does not tell, it may be."""
        listing, scope = self._listing, self._scope
        listed = {uid for key in listing.instances for uid in key} | listing.series.keys()
        unknown = ((scope.series or frozenset()) | (scope.instances or frozenset())) - listed
        if scope.filters and unknown - scope.left_out:
            scope.left_out |= self._left_out(unknown - scope.left_out)
        return unknown - scope.left_out

    def _left_out(self, unknown: frozenset[str]) -> Set[str]:
        """Those of some named UIDs that the filters may have left out: by its UID alone each is asked for.

        The list is had, and is never lost by that.
        """
        series = unknown & (self._scope.series or frozenset())
        try:
            rows = self._finder.named("SERIES", sorted(series), self._keys(), (), Dropped())
            there = {shown_uid(row.get(h.SERIES_INSTANCE_UID)) for row, _ in rows}
            return there | self._instances_there(unknown - series)
        except PeerError as error:
            log.info("%s Nothing is said of UIDs that are named and not listed.", error.message)
            if not isinstance(error, OperationFailed):
                self._finder.abort()
            return unknown

    def _instances_there(self, unknown: frozenset[str]) -> Set[str]:
        """Those of some instances that the source has in this study; all where it does not even own to a listed one.

        Some answer nothing where the UID of the series is not given.
        """
        scope, there = self._scope, set()
        (series,) = scope.series if scope.series is not None and len(scope.series) == 1 else ("",)
        keys = {**self._keys(), **({h.SERIES_INSTANCE_UID: series} if series else {})}
        listed = {sop for _, sop in islice(self._listing.instances, 1)} if unknown else set()
        for row, _ in self._finder.named("IMAGE", sorted(unknown | listed), keys, (h.SERIES_INSTANCE_UID,), Dropped()):
            if scope.series is None or (i.text_value(row.get(h.SERIES_INSTANCE_UID)) or series) in scope.series:
                there.add(shown_uid(row.get(h.SOP_INSTANCE_UID)))
        return there if listed <= there else unknown

    def _keys(self) -> dict[int, str | bytes]:
        """The unique keys above the level, in Patient Root with the Patient ID (PS3.4 C.4.1.2.2.1)."""
        patient = self._scope.patient_keys() if self._finder.by_patient else {}
        return {**patient, h.STUDY_INSTANCE_UID: self._scope.study}

    def _ask_study(self) -> int | None:
        """What the source says of the study itself; how many series it says there are."""
        listing, scope = self._listing, self._scope
        related_series = None
        for row in self._finder.rows("STUDY", self._keys(), _STUDY_KEYS, dropped=listing.dropped):
            if not note_row(scope, row):
                continue
            listing.below_study = Below()
            if scope.whole_study:
                instances = self._finder.count(row, i.STUDY_RELATED_INSTANCES)
                listing.related_instances = larger(listing.related_instances, instances)
                related_series = larger(related_series, self._finder.count(row, i.STUDY_RELATED_SERIES))
        return related_series

    def _ask_series(self, dropped: Dropped, related_series: int | None) -> None:
        listing, scope, finder = self._listing, self._scope, self._finder
        keys = {**self._keys(), **self._series_filters}
        if scope.series is not None:
            answers = finder.named("SERIES", sorted(scope.series), keys, _SERIES_KEYS, dropped)
        else:
            answers = finder.answers("SERIES", keys, _SERIES_KEYS, dropped=dropped)
        for row, _ in answers:
            self._take_series(row)
        if scope.series is not None:
            listing.below_study = None
        elif listing.below_study is not None or listing.series:
            distinct = len(listing.series) + len(listing.bad)
            listing.below_study = Below(finder.came, distinct, related_series, bool(self._series_filters))

    def _take_series(self, row: Row) -> None:
        """Put a series into the list, with what its row says of it."""
        listing = self._listing
        uid = shown_uid(row.get(h.SERIES_INSTANCE_UID))
        if not is_uid(uid):
            listing.keep_bad(self._scope.study, uid, "")
            return
        if uid not in listing.series:
            number = i.int_value(row.get(h.SERIES_NUMBER))
            listing.series[uid] = SeriesInfo(uid, kept(i.text_value(row.get(h.MODALITY))), number)
        if not self._image_filters:
            series, count = listing.series[uid], self._finder.count(row, i.SERIES_RELATED_INSTANCES)
            series.related_instances = larger(series.related_instances, count)

    def _list_series(self, finder: Finder, series: SeriesInfo) -> None:
        keys = {**self._keys(), h.SERIES_INSTANCE_UID: series.uid, **self._image_filters}
        limit = _most_rows(series)
        before, series.rows = finder.unreadable, 0
        here = self._dropped[series.uid] = Dropped()
        distinct: set[str] = set()
        for row in self._image_rows(finder, keys, limit, here):
            distinct.add(self._take_row(series, row))
            if finder.came > 10 * len(distinct) + _SLACK and finder.came > 10 * len(distinct) + here.total + _SLACK:
                raise ListTooLong(f"The source repeats the same C-FIND rows without end for series {series.uid}.")
        series.rows, series.listed = finder.came, len(distinct)
        self._unreadable[series.uid] = finder.unreadable - before

    def _image_rows(self, finder: Finder, keys: Keys, limit: int, dropped: Dropped) -> Iterator[Row]:
        """The rows of a series: with the UIDs alone where the source fails at the other keys.

        One looks those up in its files, and fails as a whole where a single file is lost.
        """
        scope = self._scope
        costly = [tag for tag in _MAY_COST if tag not in scope.untold]
        wanted = (h.SOP_INSTANCE_UID, *_IMAGE_KEYS, *costly)
        rows = 0
        told: set[int] = set()
        try:
            for row in finder.rows("IMAGE", keys, wanted, limit, dropped):
                rows += 1
                for tag in costly:
                    if row.get(tag):
                        told.add(tag)
                yield row
            if rows:
                scope.untold |= set(costly) - told
        except OperationFailed as error:
            log.info("%s Asking for the UIDs only.", error.message)
            yield from finder.rows("IMAGE", keys, (h.SOP_INSTANCE_UID,), limit, dropped)

    def _take_row(self, series: SeriesInfo, row: Row) -> str:
        """Put the instance of a row into the list, if it is of the scope; its UID."""
        scope, listing = self._scope, self._listing
        sop = shown_uid(row.get(h.SOP_INSTANCE_UID))
        if not scope.names(series.uid, sop):
            return sop
        instance = self._known.get((series.uid, sop))
        if instance is None:
            if not is_uid(sop):
                listing.keep_bad(scope.study, series.uid, sop)
                return sop
            instance = Instance(scope.study, series.uid, sop)
        instance.sop_class = instance.sop_class or self._one_of_few(row, h.SOP_CLASS_UID, MAX_CLASSES)
        syntax = self._one_of_few(row, i.AVAILABLE_TRANSFER_SYNTAX, _MAX_SYNTAXES)
        instance.listed_syntax = syntax or instance.listed_syntax
        if (told := i.text_value(row.get(i.INSTANCE_AVAILABILITY, b"")[:16])) in AVAILABILITIES:
            instance.availability = told
        instance.modality = instance.modality or series.modality
        instance.series_number = series.number
        instance.instance_number = i.int_value(row.get(h.INSTANCE_NUMBER))
        listing.instances.setdefault(instance.key, instance)
        return sop

    def _one_of_few(self, row: Row, tag: int, most: int) -> str | None:
        """A UID that many rows have in common; None where it is not told, or is one of more than there are."""
        told, few = _uid(row.get(tag)), self._few[tag]
        if told is not None and told not in few:
            if len(few) >= most:
                return None
            few.add(told)
        return told

    def _ask_for_named(self) -> None:
        """Ask one by one for the instances that were named and that the lists of their series do not have."""
        scope, listing = self._scope, self._listing
        (series,) = scope.series if scope.series is not None and len(scope.series) == 1 else ("",)
        named = scope.named or {(series, sop) for sop in scope.instances or ()}
        listed = {sop for _, sop in listing.instances}
        found: dict[Key, Row] = {}
        try:
            for series, sop in sorted(named - listing.instances.keys()):
                if not scope.named and sop in listed:
                    continue
                keys = {**self._keys(), **self._image_filters, h.SOP_INSTANCE_UID: sop}
                if series:
                    keys[h.SERIES_INSTANCE_UID] = series
                for row in self._finder.rows("IMAGE", keys, (h.SERIES_INSTANCE_UID, *_IMAGE_KEYS), dropped=Dropped()):
                    its_series = i.text_value(row.get(h.SERIES_INSTANCE_UID)) or series
                    if is_uid(its_series) and (scope.series is None or its_series in scope.series):
                        found.setdefault((sys.intern(its_series), sop), _shortened(row))
                        if len(found) > MAX_ROWS:
                            raise too_long(
                                self._finder.node, f"{MAX_ROWS} rows", "the list of instances that are named"
                            )
            self._ask_series_of({series for series, _ in found} - listing.series.keys())
        except OperationFailed as error:
            # Then the lists of their series are all there is to go by, and the rule holds for these.
            log.info("%s The source takes no C-FIND for single instances.", error.message)
            listing.instances_named = False
        for (series, sop), row in found.items():
            if series in listing.series:
                self._take_row(listing.series[series], row)
            else:
                scope.left_out.add(sop)

    def _ask_series_of(self, unlisted: Set[str]) -> None:
        """Put the series of named instances into the list that it lacks, unless a key of the series leaves them out."""
        listing = self._listing
        if self._series_filters:
            keys = {**self._keys(), **self._series_filters}
            for row, _ in self._finder.named("SERIES", sorted(unlisted), keys, _SERIES_KEYS, Dropped()):
                self._take_series(row)
        else:
            for uid in unlisted:
                listing.series.setdefault(uid, SeriesInfo(uid))


def _shortened(row: Row) -> Row:
    """What a list takes of the row of an instance, of which no value is longer than a UID."""
    return {tag: bytes(row[tag]) for tag in _TAKEN & row.keys() if len(row[tag]) <= _LONGEST}


def _most_rows(series: SeriesInfo) -> int:
    """A count bounds the answer, and lifts no bound: it is the peer's claim, too."""
    claimed = series.related_instances
    return MAX_ROWS if claimed is None or claimed < 0 else min(2 * claimed + _SLACK, MAX_ROWS)


def _uid(raw: bytes | None) -> str | None:
    """One of the few UIDs that many rows have, interned; None where it is none, or several."""
    return _interned(raw) if raw and len(raw) <= _LONGEST_UID else None


@lru_cache(maxsize=256)
def _interned(raw: bytes) -> str | None:
    text = i.text_value(raw)
    return sys.intern(text) if text and is_uid(text) else None
