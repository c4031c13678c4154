"""C-FIND for people: rows as data sets, text decoded, any level."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from airflow_dicom_get.dicom import header as h
from airflow_dicom_get.dicom import identifier as i
from airflow_dicom_get.dicom.dictionary import find_attribute
from airflow_dicom_get.dicom.levels import LEVELS
from airflow_dicom_get.dicom.uids import is_uid, shown_uid
from airflow_dicom_get.dicom.values import dataset_of
from airflow_dicom_get.engine.parts import matching_studies
from airflow_dicom_get.engine.query import Query
from airflow_dicom_get.engine.resolve import resolve
from airflow_dicom_get.engine.source import Source
from airflow_dicom_get.errors import OperationFailed, peer_text
from airflow_dicom_get.lists.finder import UNIQUE, Answer, Finder, check_answered
from airflow_dicom_get.lists.matching import Dropped, Row, remark_text
from airflow_dicom_get.lists.whole import Below, Lists, doubt_remark, larger
from airflow_dicom_get.net.find import FIND_PROPOSALS, MAX_ANSWER, MAX_ROWS, too_long

if TYPE_CHECKING:
    from pandas import DataFrame
    from pydicom.dataset import Dataset

    _Rows = list[Dataset]
else:
    _Rows = list

log = logging.getLogger(__name__)

_RETURNED = {
    "STUDY": (
        "StudyInstanceUID",
        "PatientID",
        "PatientName",
        "StudyDate",
        "StudyTime",
        "AccessionNumber",
        "StudyDescription",
        "ModalitiesInStudy",
        "NumberOfStudyRelatedSeries",
        "NumberOfStudyRelatedInstances",
    ),
    "SERIES": (
        "StudyInstanceUID",
        "SeriesInstanceUID",
        "Modality",
        "SeriesNumber",
        "SeriesDescription",
        "NumberOfSeriesRelatedInstances",
    ),
    "IMAGE": (
        "StudyInstanceUID",
        "SeriesInstanceUID",
        "SOPInstanceUID",
        "SOPClassUID",
        "InstanceNumber",
        "AvailableTransferSyntaxUID",
    ),
}
_UNIQUE = {
    "STUDY": (h.STUDY_INSTANCE_UID,),
    "SERIES": (h.STUDY_INSTANCE_UID, h.SERIES_INSTANCE_UID),
    "IMAGE": (h.STUDY_INSTANCE_UID, h.SERIES_INSTANCE_UID, h.SOP_INSTANCE_UID),
}


class Found(_Rows):
    """The rows of a C-FIND: one per study, series or instance, and none that contradicts what was asked for.

    Attributes
    ----------
    doubt : str or None
        Why there may be more, as a reason of the vocabulary: ``list_may_be_cut`` or ``list_contradicted``.
    cut : bool
        Whether there may be more: the C-FIND was cancelled at ``limit``, or there is a ``doubt``.
    queries : int
        C-FINDs that were sent.
    remarks : list of dict
        What is to be said of the answer, as in ``Result.errors``; nothing of a patient.
    """

    def __init__(self, rows: Iterable[Dataset] = ()) -> None:
        super().__init__(rows)
        self.doubt: str | None = None
        self.cut = False
        self.queries = 1
        self.remarks: list[dict[str, Any]] = []

    def remark_texts(self) -> list[str]:
        """The remarks, one line each."""
        return [remark_text(remark) for remark in self.remarks]


def find_rows(
    source: Source,
    query: Query,
    level: str,
    return_keys: Sequence[str],
    *,
    limit: int | None = None,
    split: bool = True,
) -> Found:
    """Rows of a search at ``level``; keys of levels above are matched there, those of lower ones with it (relational).

    Parameters
    ----------
    limit : int, optional
        Studies, series or instances after which the C-FIND is cancelled.
    split : bool
        Whether an answer for studies that may be cut is asked for again by parts.

    Raises
    ------
    InvalidQuery
        The PACS leaves a key out of all its answers, and so does not match on it.
    InvalidOption, NotNegotiated, OperationFailed, ListTooLong, and whatever ends an association
    """
    asked = [int(find_attribute(keyword).tag) for keyword in (*_RETURNED[level], *return_keys)]
    named = {"STUDY": query.studies, "SERIES": query.series, "IMAGE": query.instances}
    below = LEVELS[LEVELS.index(level) + 1 :]
    own: dict[int, Any] = {f.tag: f.value for f in query.filters if f.level in (level, *below) or not f.value}
    own |= {UNIQUE[lower]: named[lower] for lower in below if named[lower]}
    most = MAX_ROWS if limit is None else limit
    with source.association(FIND_PROPOSALS) as association:
        finder = Finder(association, source.cuts)
        found, rows = Found(), _Distinct(level, most, finder, source.check_stopped)
        for above in _above(finder, query, level, found):
            keys = {**above, **own}
            if named[level]:
                rows.take(finder.named(level, named[level], keys, asked, enough=rows.are_enough))
            elif level == "STUDY":
                matches = matching_studies(finder, keys, asked, split=split, enough=lambda x: len(x.answers) > most)
                rows.take(matches.answers.values())
                found.queries, found.doubt = matches.queries, matches.doubt
            elif level == "SERIES" and above and not any(own.values()):
                series = _Series(finder, above)
                found.queries += 1
                rows.take(series.noted(finder.answers(level, keys, asked, enough=rows.more_than_wanted)))
                found.doubt = series.doubt() or found.doubt
            else:
                rows.take(finder.answers(level, keys, asked, enough=rows.more_than_wanted))
                if finder.cuts.may_be_cut(level, finder.came):
                    found.doubt = "list_may_be_cut"
            if rows.more_than_wanted():
                break
        if finder.unreadable:
            found.doubt = "list_contradicted"
        if not rows.found:
            check_answered(finder)
    found += rows.found[:most]
    found.remarks = finder.dropped.remarks()
    if rows.more_than_wanted():
        found.cut, found.doubt = True, None
        found.remarks.append(
            {
                "error": f"The C-FIND was cancelled after {most} rows: there may be more.",
                "count": 1,
                "hint": "Narrow the query, or raise limit.",
            }
        )
    if found.doubt is not None:
        found.cut = True
        found.remarks.append(doubt_remark(found.doubt))
    return found


def _above(finder: Finder, query: Query, level: str, found: Found) -> Iterator[dict[int, Any]]:
    """The unique keys above a level under which its rows are asked for, once for each study or series that is meant.

    A key of a level above is matched there: below it a PACS need not know it (PS3.4 C.4.1.2.2.1), and then refuses it,
    finds nothing, or finds what was not asked for.
    """
    keys = {name: {f.tag: f.value for f in query.filters if f.value and f.level == name} for name in UNIQUE}
    studies: list[dict[int, Any]] = [{h.STUDY_INSTANCE_UID: query.studies} if query.studies else {}]
    if level == "STUDY":
        studies = [{}]
    elif keys["STUDY"]:
        meant = resolve(finder, query, MAX_ROWS)
        found.doubt = meant.doubt
        studies = [
            {**(scope.patient_keys() if finder.by_patient else {}), h.STUDY_INSTANCE_UID: scope.study}
            for scope in meant.scopes
            if scope.named_well
        ]
    for study in studies:
        if level != "IMAGE" or not (keys["SERIES"] or query.series):
            yield study
        elif not keys["SERIES"]:
            yield {**study, h.SERIES_INSTANCE_UID: query.series}
        else:
            asked = {**study, **keys["SERIES"]}
            returned = (h.STUDY_INSTANCE_UID, h.SERIES_INSTANCE_UID)
            series = (
                finder.named("SERIES", query.series, asked, returned)
                if query.series
                else finder.answers("SERIES", asked, returned)
            )
            uids = [tuple(shown_uid(row.get(tag)) for tag in returned) for row, _ in series]
            if not query.series and finder.cuts.may_be_cut("SERIES", finder.came):
                found.doubt = "list_may_be_cut"
            for pair in dict.fromkeys(uids):
                unique = {tag: uid for tag, uid in zip(returned, pair, strict=True) if is_uid(uid)}
                if h.SERIES_INSTANCE_UID in unique:
                    yield {**study, **unique}
                else:
                    found.doubt = found.doubt or "bad_uid"


@dataclass(slots=True)
class _Study:
    """What the peer says of a study and of its series."""

    told: bool = False
    related_series: int | None = None
    related_instances: int | None = None
    sizes: dict[str, int | None] = field(default_factory=dict)
    """By series, how many instances it is said to have."""

    def lists(self, rows: int) -> Lists:
        """Its lists, as far as a list of its series has them: for the instances of a series stands their number."""
        return Lists(
            Below(rows, len(self.sizes), self.related_series, filtered=not self.told),
            {uid: Below(listed=size, count=size) for uid, size in self.sizes.items() if size is not None},
            None if None in self.sizes.values() else self.related_instances,
        )


class _Series:
    """All series of some studies, held against what is said of the studies: before, as they may grow."""

    def __init__(self, finder: Finder, above: dict[int, Any]) -> None:
        self._finder = finder
        named = above[h.STUDY_INSTANCE_UID]
        self._studies = {uid: _Study() for uid in ([named] if isinstance(named, str) else named)}
        self._untold = _Study()
        """Of the rows that do not tell which of several it is: these are held against no counts."""
        keys = {tag: value for tag, value in above.items() if tag != h.STUDY_INSTANCE_UID}
        counts = (i.STUDY_RELATED_SERIES, i.STUDY_RELATED_INSTANCES)
        try:
            for row, _ in finder.named("STUDY", list(self._studies), keys, counts, Dropped()):
                study = self._of(row)
                study.told = True
                series, instances = (finder.count(row, tag) for tag in counts)
                study.related_series = larger(study.related_series, series)
                study.related_instances = larger(study.related_instances, instances)
        except OperationFailed as error:
            log.info("%s The series are held against no counts of their study.", error.message)

    def _of(self, row: Row) -> _Study:
        if len(self._studies) == 1:
            return next(iter(self._studies.values()))
        return self._studies.get(shown_uid(row.get(h.STUDY_INSTANCE_UID)), self._untold)

    def noted(self, answers: Iterable[Answer]) -> Iterator[Answer]:
        """The same rows, each noted."""
        for row, raw in answers:
            study = self._of(row)
            uid, size = shown_uid(row.get(h.SERIES_INSTANCE_UID)), self._finder.count(row, i.SERIES_RELATED_INSTANCES)
            study.sizes[uid] = larger(study.sizes.get(uid), size)
            yield row, raw

    def doubt(self) -> str | None:
        """Why there may be more of them, as a reason of the vocabulary."""
        cuts, rows = self._finder.cuts, self._finder.came
        untold = self._untold.sizes
        lists = [study.lists(rows) for study in ([self._untold] if untold else self._studies.values())]
        if any(one.contradicted() for one in lists):
            return "list_contradicted"
        return "list_may_be_cut" if any(one.doubts(cuts, {}) for one in lists) else None


MAX_VALUES = 5_000_000
"""Elements, items and values of all rows of one find: 25 for each of as many rows as there may be."""


MAX_CELLS = 4 * MAX_VALUES
"""Cells of a table of rows: each has a column for whatever another one has."""


class _Distinct:
    """Rows as they came, each study, series or instance once."""

    def __init__(self, level: str, most: int, finder: Finder, check: Callable[[], None]) -> None:
        self._keys, self._most, self._finder, self._check = _UNIQUE[level], most, finder, check
        self._seen: set[tuple[bytes, ...]] = set()
        self.found: list[Dataset] = []
        self._made = self._bytes = 0

    def more_than_wanted(self) -> bool:
        """Whether there are more rows than were wanted."""
        return len(self.found) > self._most

    def are_enough(self) -> bool:
        """Whether no further answer is to be asked for. Raises :class:`ListTooLong` where 64 MiB are held."""
        if self._bytes >= MAX_ANSWER:
            raise too_long(self._finder.node, f"{MAX_ANSWER >> 20} MiB", "one find")
        return self.more_than_wanted()

    def take(self, answers: Iterable[Answer]) -> None:
        """Add the rows of an answer, or of several, each asked for only where :meth:`are_enough` does not end it.

        A row without a UID of its own is like no other.

        Raises
        ------
        ListTooLong, Cancelled, DeadlineExceeded
        """
        if self.are_enough():
            return
        for row, raw in answers:
            self._check()  # a row of many values takes far longer to make than to come
            unique = tuple(row.get(tag, b"").strip(b"\0 ") for tag in self._keys)
            if unique not in self._seen or not unique[-1]:
                self._seen.add(unique)
                self._bytes += len(raw)  # also of a row that cannot be read, whose UIDs are kept
                try:
                    found, made = dataset_of(raw)
                except h.HeaderError as error:
                    self._finder.cannot_read(error)
                    continue
                self._made += made
                if self._made > MAX_VALUES:
                    raise too_long(self._finder.node, f"{MAX_VALUES} elements and values", "one find")
                self.found.append(found)


def frame_of_rows(source: Source, rows: Sequence[Dataset], level: str, return_keys: Sequence[str]) -> DataFrame:
    """One text column per keyword; of no rows those that were asked for.

    Raises where the run is to end, and for a table of more than :data:`MAX_CELLS`.

    A sequence has no column: it is no text, and pydicom warns of what stands in one that is printed.
    """
    import pandas as pd

    columns = None if rows else list(dict.fromkeys((*_RETURNED[level], *return_keys)))
    data: list[dict[str, str]] = []
    keywords: set[str] = set()
    for row in rows:
        source.check_stopped()
        keywords.update(element.keyword for element in row)
        if len(keywords) * len(rows) > MAX_CELLS:
            raise too_long(source.node, f"what makes a table of {MAX_CELLS} cells", "one find")
        data.append(
            {
                element.keyword: peer_text(element.value, 1024) if element.VR == "UN" else _text(element.value)
                for element in row
                if element.keyword and element.VR != "SQ"
            }
        )
    return pd.DataFrame(data, columns=columns)


def dates_of(frame: DataFrame) -> DataFrame:
    """A frame of rows as one of texts and dates: its columns of dates as such, one that is malformed as null."""
    import pandas as pd

    made = frame.astype("string")
    for name in frame.columns:
        if find_attribute(str(name)).vr == "DA":
            made[name] = pd.to_datetime(made[name], format="%Y%m%d", errors="coerce").astype("datetime64[s]")
    made.attrs.update(frame.attrs)
    return made


def _text(value: object) -> str:
    from pydicom.multival import MultiValue

    if value is None:
        return ""
    return "\\".join(map(str, value)) if isinstance(value, MultiValue) else str(value)
