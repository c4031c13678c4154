"""Answers for studies that may be cut, asked for again in parts: by Study Date, then by Study Time."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from datetime import date, datetime, timedelta
from functools import partial

from airflow_dicom_get.dicom import header as h
from airflow_dicom_get.dicom import identifier as i
from airflow_dicom_get.errors import OperationFailed
from airflow_dicom_get.lists.finder import Answer, Finder, Keys
from airflow_dicom_get.lists.matching import Dropped, Row
from airflow_dicom_get.net.find import MAX_ANSWER

MAX_QUERIES = 1000
"""C-FINDs of one search."""
_EARLIEST, _LATEST = date(1900, 1, 1), date(2099, 12, 31)
"""Between these an open range is halved."""
_DAY_SECONDS = 24 * 3600
_LEAST_SECONDS = 60


@dataclass(frozen=True, slots=True)
class Part:
    """A part of the studies that a query means: over some days, or over a part of one.

    Attributes
    ----------
    first, last : date or None
        Days; None is an open end.
    seconds : (int, int) or None
        From the first to before the second, of a single day.
    by_time : bool
        Whether a day may be divided.
    """

    first: date | None
    last: date | None
    seconds: tuple[int, int] | None = None
    by_time: bool = True

    @classmethod
    def of(cls, keys: Keys) -> Part:
        """All of what the keys ask for."""
        first, dash, last = str(keys.get(i.STUDY_DATE) or "").partition("-")
        return cls(_day(first), _day(last if dash else first), by_time=not keys.get(i.STUDY_TIME))

    def keys(self) -> dict[int, str]:
        """The keys that ask for it."""
        found = {}
        if self.first is not None or self.last is not None:
            first, last = _text(self.first), _text(self.last)
            found[i.STUDY_DATE] = first if self.first == self.last else f"{first}-{last}"
        if self.seconds is not None:
            # Up to the last fraction before the end, so that no moment lies between two parts.
            found[i.STUDY_TIME] = f"{_clock(self.seconds[0])}-{_clock(self.seconds[1] - 1)}.999999"
        return found

    def halves(self) -> tuple[Part, ...]:
        """Its two halves, which cover all of it; none where it cannot be divided."""
        first, last = self.first or min(_EARLIEST, self.last or _EARLIEST), self.last or _LATEST
        if first < last:
            middle = first + (last - first) // 2
            after = middle + timedelta(days=1)
            return (
                Part(self.first, middle, by_time=self.by_time),
                Part(after, self.last, by_time=self.by_time),
            )
        start, stop = self.seconds or (0, _DAY_SECONDS)
        if not self.by_time or self.first != self.last or stop - start <= _LEAST_SECONDS:
            return ()
        middle_second = (start + stop) // 2
        return tuple(
            Part(self.first, self.last, seconds) for seconds in ((start, middle_second), (middle_second, stop))
        )

    def covers(self, row: Row) -> bool:
        """Whether a row says that its study lies in here."""
        day = _day((i.text_value(row.get(i.STUDY_DATE)) or "").replace(".", ""))
        if day is None or (self.first and day < self.first) or (self.last and day > self.last):
            return False
        if self.seconds is None:
            return True
        second = _second(i.text_value(row.get(i.STUDY_TIME)) or "")
        return second is not None and self.seconds[0] <= second < self.seconds[1]


def _day(text: str) -> date | None:
    try:
        return datetime.strptime(text, "%Y%m%d").date() if text else None
    except ValueError:
        return None


def _text(day: date | None) -> str:
    return f"{day.year:04}{day:%m%d}" if day is not None else ""


def _clock(second: int) -> str:
    return f"{second // 3600:02}{second // 60 % 60:02}{second % 60:02}"


def _second(text: str) -> int | None:
    """The second of the day of a TM value, in the old form with colons too."""
    digits = text.replace(":", "").partition(".")[0]
    if not digits.isascii() or not digits.isdigit() or len(digits) > 6:
        return None
    hours, minutes, seconds = (int(digits[at : at + 2] or 0) for at in (0, 2, 4))
    return hours * 3600 + minutes * 60 + seconds


@dataclass(slots=True)
class Matches:
    """The studies that a query matches.

    Attributes
    ----------
    answers : dict
        One row for each, by Study Instance UID as it came.
    doubt : str or None
        ``list_may_be_cut`` or ``list_contradicted``: why there may be more.
    queries : int
        C-FINDs.
    """

    answers: dict[bytes, Answer] = field(default_factory=dict)
    doubt: str | None = None
    queries: int = 0


def matching_studies(
    finder: Finder,
    keys: Keys,
    returned: Iterable[int],
    *,
    split: bool = True,
    enough: Callable[[Matches], bool] = lambda matches: False,
) -> Matches:
    """Search for studies; where the answer may be cut, by parts, until none of them may be.

    Parameters
    ----------
    split : bool
        Whether to ask by parts.
    enough : callable
        Asked after each row; once it is true, the C-FIND is cancelled and no other is sent.

    Raises
    ------
    NotNegotiated, OperationFailed, ListTooLong, and whatever ends an association
    """
    return _Search(finder, keys, returned, split, enough).run()


class _Search:
    def __init__(
        self,
        finder: Finder,
        keys: Keys,
        returned: Iterable[int],
        split: bool,
        enough: Callable[[Matches], bool],
    ) -> None:
        self._finder, self._keys, self._split, self._enough = finder, keys, split, enough
        keyed = [tag for tag, value in keys.items() if value and value != "*"]
        # How many studies a patient has is of all that is asked for where that is the patient alone.
        self._counted = keyed == [h.PATIENT_ID]
        counts = [i.PATIENT_RELATED_STUDIES] if self._counted else []
        self._returned = (h.STUDY_INSTANCE_UID, i.STUDY_DATE, i.STUDY_TIME, *counts, *returned)
        self._found = Matches()
        self._uids: dict[bytes, bytes] = {}
        """Of the rows that are kept, each as it is kept: no set holds another copy of it."""
        self._bytes = 0
        """Of the rows that are kept."""

    def run(self) -> Matches:
        finder, found, whole = self._finder, self._found, Part.of(self._keys)
        unreadable = finder.unreadable
        try:
            self._ask(whole, finder.dropped)
            came = set(found.answers)
            rows = [row for row, _ in found.answers.values()] if self._counted else []
            counts = {i.int_value(row.get(i.PATIENT_RELATED_STUDIES)) or 0 for row in rows} or {0}
            count = max(counts)
            if self._enough(found):
                return found
            # Two patients may have one ID: then no count is of all.
            confirmed = counts == {len(came)} or not finder.cuts.may_be_cut("STUDY", finder.came)
            if not confirmed:
                confirmed = self._confirm(whole, came)
        except OperationFailed as error:  # some PACS refuse a query that matches too much
            if not (error.transient and self._split and whole.halves()):
                raise
            count = 0
            confirmed = self._confirm(whole, set())
        if not confirmed:
            found.doubt = "list_may_be_cut"
        if finder.unreadable > unreadable or count > len(found.answers):
            found.doubt = "list_contradicted"
        return found

    def _ask(self, part: Part, dropped: Dropped) -> tuple[set[bytes], bool]:
        """Ask for a part; the studies that say to lie in it, and whether others came: then it was ignored."""
        found, finder = self._found, self._finder
        here, others = set(), False
        found.queries += 1
        keys = {**self._keys, **part.keys()}
        enough = partial(self._enough, found)
        for row, raw in finder.answers("STUDY", keys, self._returned, dropped=dropped, enough=enough):
            uid = row.get(h.STUDY_INSTANCE_UID, b"").strip(b"\0 ")
            uid = self._uids.setdefault(uid, uid)
            if uid not in found.answers:
                found.answers[uid] = row, raw
                self._bytes += len(raw)
            if part.covers(row):
                here.add(uid)
            else:
                others = True
        return here, others or bool(dropped)

    def _confirm(self, part: Part, came: set[bytes]) -> bool:
        """Ask for the halves of a part whose answer may be cut, or was refused; whether they show that it is whole.

        Without a date in the query they do not: studies that have none lie in no part.
        """
        halves = part.halves() if self._split else ()
        again: set[bytes] = set()
        whole = bool(halves) and bool(self._keys.get(i.STUDY_DATE))
        for half in halves:
            if self._found.queries >= MAX_QUERIES or self._bytes >= MAX_ANSWER or self._enough(self._found):
                return False
            try:
                here, others = self._ask(half, Dropped())
                cut = self._finder.cuts.may_be_cut("STUDY", self._finder.came)
            except OperationFailed as error:
                if not (error.transient and half.halves()):
                    raise
                here, others, cut = set(), False, True
            again |= here
            if cut:
                whole = not others and self._confirm(half, here) and whole
        return whole and came <= again
