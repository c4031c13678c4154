"""Is the list whole? The rule as a table, over plain numbers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import pytest

from airflow_dicom_get.lists.whole import Below, Cuts, Doubts, Lists, is_round


@pytest.mark.parametrize(
    "rows", [100, 150, 200, 250, 256, 500, 512, 1000, 1024, 1050, 2048, 4096, 5000, 10_000, 65_536]
)
def test_round_numbers(rows: int) -> None:
    assert is_round(rows)
    assert not is_round(rows, ())


@pytest.mark.parametrize("rows", [0, 1, 2, 50, 64, 99, 101, 103, 125, 128, 149, 151, 255, 257, 503, 1023, 1025, 4095])
def test_numbers_that_are_not_round(rows: int) -> None:
    assert not is_round(rows)


def test_what_the_admin_knows_goes_instead() -> None:
    assert [rows for rows in range(2000) if is_round(rows, (73, 1000))] == [73, 1000]


def test_a_longer_answer_at_the_same_level_shows_that_no_cap_lies_there() -> None:
    cuts = Cuts()
    assert cuts.may_be_cut("IMAGE", 200)
    cuts.came("IMAGE", 200)
    assert cuts.may_be_cut("IMAGE", 200)
    cuts.came("SERIES", 900)
    assert cuts.may_be_cut("IMAGE", 200)
    cuts.came("IMAGE", 201)
    cuts.came("IMAGE", 7)
    assert not cuts.may_be_cut("IMAGE", 200)
    assert cuts.may_be_cut("IMAGE", 250)
    assert cuts.is_round(200)


@dataclass
class Case:
    name: str
    lists: Lists
    contradicted: bool = False
    doubts: Doubts = field(default_factory=Doubts)
    counted: Mapping[str | None, int] | None = None
    longest: int = 0


def study(*of_series: Below, series: Below | None = None, count: int | None = None, unreadable: int = 0) -> Lists:
    """A study of these series, named "1", "2", …."""
    below = series or Below(len(of_series), len(of_series))
    return Lists(below, {str(n): each for n, each in enumerate(of_series, 1)}, count, unreadable)


def images(rows: int, listed: int | None = None, count: int | None = None) -> Below:
    return Below(rows, rows if listed is None else listed, count)


DOUBT = Doubts(of_series=frozenset({"1"}))
CASES = [
    # no doubt
    Case("few instances", study(images(3))),
    Case("a round list with the count that agrees", study(images(100, count=100))),
    Case("round lists, and the count of the study agrees", study(images(100), images(50), count=150)),
    Case("the C-GET of the series counts as many", study(images(150)), counted={"1": 150}),
    Case("the C-GET of the study counts as many", study(images(100), images(100)), counted={None: 200}),
    Case("counters of 16 bits", study(images(70_000)), counted={"1": 70_000 - 65_536}),
    Case("a longer answer", study(images(100), images(103)), longest=103),
    Case("a series that has none, and says so", study(images(5), images(0, count=0))),
    Case("a study that has none, and says so", study(series=Below(count=0))),
    Case("nothing left by a filter", study(series=Below(filtered=True))),
    Case("a count below the list is none against it", study(images(5, count=3), count=4)),
    Case("the series were named", Lists(None, {str(n): images(2) for n in range(100)})),
    Case("the instances were named", Lists(None, {})),
    # doubt
    Case("a round list of instances", study(images(150), images(7)), doubts=DOUBT),
    Case("a cap of 256", study(images(256)), doubts=DOUBT),
    Case("the rows count as they came, not what is left of them", study(images(200, 100)), doubts=DOUBT),
    Case("a count below a round list does not agree", study(images(100, count=99)), doubts=DOUBT),
    Case("a round list of series", study(*[images(1)] * 100), doubts=Doubts(of_study=True)),
    Case("a round list of series, whose own count does not agree",
         study(*[images(1)] * 100, series=Below(100, 100, 99)), doubts=Doubts(of_study=True)),
    Case("the C-GET counts more", study(images(100)), doubts=DOUBT, counted={"1": 103}),
    Case("the C-GET of another series", study(images(100), images(9)), doubts=DOUBT, counted={"2": 9}),
    Case("an answer of the same length", study(images(100), images(100)), longest=100,
         doubts=Doubts(of_series=frozenset({"1", "2"}))),
    # contradicted
    Case("a count of the series above it", study(images(5, count=6)), contradicted=True),
    Case("a count of the series above a round list", study(images(100, count=103)), contradicted=True, doubts=DOUBT),
    Case("a count of the study above it", study(images(5), count=6), contradicted=True),
    Case("a count of related series above it", study(images(5), series=Below(1, 1, 2)), contradicted=True),
    Case("a listed series with nothing below it", study(images(5), images(0)), contradicted=True),
    Case("a listed study with nothing below it", study(), contradicted=True),
    Case("a row that cannot be read", study(images(5), unreadable=1), contradicted=True),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_lists(case: Case) -> None:
    cuts = Cuts()
    cuts.came("IMAGE", case.longest)
    assert case.lists.contradicted() == case.contradicted
    assert case.lists.doubts(cuts, case.counted or {}) == case.doubts


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_nothing_is_doubtful_where_the_pacs_never_cuts(case: Case) -> None:
    assert not case.lists.doubts(Cuts(()), {})


def test_an_unlisted_arrival_is_held_against_the_length_alone() -> None:
    cuts = Cuts()
    cuts.came("IMAGE", 1000)
    assert study(images(100)).is_round(cuts)
    assert study(*[images(1)] * 100).is_round(cuts)
    assert not study(images(7)).is_round(cuts)
