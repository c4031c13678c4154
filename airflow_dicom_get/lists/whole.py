"""Is the list whole? What denies a list, what makes one doubtful, and what confirms it all the same.

A PACS may cut its answers to C-FIND without a word, nearly always at a round number of rows. The rule stands here,
over plain numbers, for every level and every verb; who asks whom stands in :mod:`~airflow_dicom_get.engine.parts`
(answers for studies, by date and time) and :mod:`~airflow_dicom_get.engine.below` (what a C-GET at a level above
says and sends).
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from airflow_dicom_get.vocabulary import REASONS

COUNTER = 1 << 16
"""The counters of a C-GET have 16 bits (PS3.7 9.1.3.1): they are compared modulo this."""
_MANY = 3
"""Series whose lists may be cut, above which one C-GET of the study tells of all of them."""
_MOST_ASKED = 50
"""Series that are asked for one by one, as it takes an association or two for each; the lists of more stay doubtful."""


def is_round(rows: int, list_limit: Sequence[int] | None = None) -> bool:
    """Whether a PACS may have cut an answer of so many rows: by default a multiple of 50 from 100 up, or a power of
    two from 256 up.

    Parameters
    ----------
    rows : int
        As they came: before any was left out.
    list_limit : sequence of int, optional
        The numbers that are suspicious instead; empty: this PACS never cuts.
    """
    if list_limit is not None:
        return rows in list_limit
    return (rows >= 100 and rows % 50 == 0) or (rows >= 256 and rows & (rows - 1) == 0)


def larger(one: int | None, other: int | None) -> int | None:
    """Of two counts of the same thing the larger one; None where neither is told."""
    return max((count for count in (one, other) if count is not None), default=None)


class Cuts:
    """Where one node may cut its answers, as one run has seen it. Thread-safe.

    Parameters
    ----------
    list_limit : sequence of int, optional
        See :func:`is_round`.
    """

    def __init__(self, list_limit: Sequence[int] | None = None) -> None:
        self._list_limit = list_limit
        self._longest: dict[str, int] = {}
        self._mutex = threading.Lock()

    def came(self, level: str, rows: int) -> None:
        """An answer at this level had so many rows: no cap lies below that."""
        with self._mutex:
            self._longest[level] = max(rows, self._longest.get(level, 0))

    def is_round(self, rows: int) -> bool:
        """See :func:`is_round`."""
        return is_round(rows, self._list_limit)

    def may_be_cut(self, level: str, rows: int) -> bool:
        """Whether an answer of so many rows may be cut: they are round, and none at this level was longer."""
        return self.is_round(rows) and self._longest.get(level, 0) <= rows


@dataclass(frozen=True, slots=True)
class Below:
    """What is listed below one study or one series, in one answer.

    Attributes
    ----------
    rows : int
        As they came.
    listed : int
        Distinct ones among them, before our own filters.
    count : int or None
        How many the source says there are; None where it does not say so, or the answer is not of all of them.
    filtered : bool
        Whether a key narrowed the answer, so that nothing in it is nothing wrong.
    """

    rows: int = 0
    listed: int = 0
    count: int | None = None
    filtered: bool = False

    def counts_more(self) -> bool:
        """Whether a count is above it."""
        return self.count is not None and self.count > self.listed

    def contradicted(self) -> bool:
        """Whether a count is above it, or nothing is there where something has to be."""
        return self.counts_more() or (self.listed == 0 and self.count != 0 and not self.filtered)

    def doubtful(self, level: str, cuts: Cuts) -> bool:
        """Whether it may be cut, and no count agrees with it."""
        return self.count != self.listed and cuts.may_be_cut(level, self.rows)


@dataclass(frozen=True, slots=True)
class Doubts:
    """What of the lists of a study may be cut, and is not confirmed."""

    of_study: bool = False
    """The list of its series."""
    of_series: frozenset[str] = frozenset()
    """The lists of the instances of these."""

    def __bool__(self) -> bool:
        return self.of_study or bool(self.of_series)

    def to_ask(self, *, whole_study: bool) -> list[str | None]:
        """At which level above it is worth asking: series, or the study (None) where that tells of all of them.

        Parameters
        ----------
        whole_study : bool
            Whether the study is asked for whole: else it holds more than is listed, and its count tells nothing.
        """
        if whole_study and (self.of_study or len(self.of_series) > _MANY):
            return [None]
        return [*sorted(self.of_series)[:_MOST_ASKED]]


@dataclass(frozen=True, slots=True)
class Lists:
    """The lists of one study, in numbers.

    Attributes
    ----------
    study : Below or None
        Its series; None where the series were named, and the answer is held against that list.
    series : mapping
        The instances of each series; empty where the instances were named.
    count : int or None
        How many instances the source says the study has; None where the lists are not of all of them.
    unreadable : int
        Rows that could not be read.
    """

    study: Below | None = None
    series: Mapping[str, Below] = field(default_factory=dict)
    count: int | None = None
    unreadable: int = 0

    @property
    def listed(self) -> int:
        """Instances that are listed, before our own filters."""
        return sum(below.listed for below in self.series.values())

    def _answers(self) -> list[Below]:
        return [*self.series.values(), *([self.study] if self.study is not None else [])]

    def contradicted(self) -> bool:
        """Whether the source denies its own lists."""
        if self.unreadable or self.counts_more():
            return True
        return any(below.contradicted() for below in self._answers())

    def counts_more(self) -> bool:
        """Whether the count of the study is above its lists."""
        return self.count is not None and self.count > self.listed

    def too_short(self) -> Doubts:
        """Which lists a count is above."""
        series = frozenset(uid for uid, below in self.series.items() if below.counts_more())
        of_study = self.study is not None and self.study.counts_more()
        return Doubts(of_study or (self.counts_more() and not series), series)

    def is_round(self, cuts: Cuts) -> bool:
        """Whether an answer is as long as a PACS may cut it."""
        return any(cuts.is_round(below.rows) for below in self._answers())

    def doubts(self, cuts: Cuts, counted: Mapping[str | None, int]) -> Doubts:
        """What may be cut.

        Parameters
        ----------
        counted : mapping
            Instances that a C-GET of a series (of the study: None) has shown there to be, modulo :data:`COUNTER`.
        """
        listed = self.listed
        if self.count == listed or counted.get(None) == listed % COUNTER:
            return Doubts()
        return Doubts(
            self.study is not None and self.study.doubtful("SERIES", cuts),
            frozenset(
                uid
                for uid, below in self.series.items()
                if below.doubtful("IMAGE", cuts) and counted.get(uid) != below.listed % COUNTER
            ),
        )


def doubt_remark(doubt: str) -> dict[str, Any]:
    """What is said of a search that may have missed something, as in ``Result.errors``."""
    return {"error": REASONS[doubt].text, "count": 1, "hint": REASONS[doubt].advice}
