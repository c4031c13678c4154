"""Answers for studies that are cut, and the parts that show it: over archives that are made up."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from airflow_dicom_get.dicom import header as h
from airflow_dicom_get.dicom import identifier as i
from airflow_dicom_get.engine.parts import MAX_QUERIES, Matches, Part, matching_studies
from airflow_dicom_get.errors import OperationFailed
from airflow_dicom_get.lists.matching import Dropped, Matcher, Row
from airflow_dicom_get.lists.whole import Cuts

ANY = 10**9


class Archive:
    """What matching_studies needs of a Finder, over studies of which no answer has more than ``cap``."""

    def __init__(self, *studies: tuple[str, str], cap: int = ANY, refuses: bool = False, ignores: int = 0) -> None:
        self.rows = [self.row(number, day, time) for number, (day, time) in enumerate(studies)]
        self.cap, self.refuses, self.ignores = cap, refuses, ignores
        self.cuts, self.dropped, self.unreadable, self.came = Cuts(), Dropped(), 0, 0
        self.asked: list[dict] = []

    def row(self, number: int, day: str, time: str) -> Row:
        found = {h.STUDY_INSTANCE_UID: b"1.%d" % number, i.STUDY_DATE: day.encode(), i.STUDY_TIME: time.encode()}
        return found | {i.ACCESSION_NUMBER: b"1A2", h.PATIENT_ID: b"P"}

    def answers(self, level, keys, returned, dropped=None, enough=None):
        self.asked.append(keys)
        matcher = Matcher(level, {tag: value for tag, value in keys.items() if tag != self.ignores})
        found = [row for row in self.rows if self.matches(row, keys) and matcher.contradiction(row) is None]
        self.came = len(found)
        if self.refuses and len(found) > self.cap:
            raise OperationFailed("too many", status=0xA700)
        self.came = min(self.came, self.cap)
        self.cuts.came(level, self.came)
        for row in found[: self.cap]:
            yield row, bytearray()
            if enough():
                return

    def matches(self, row: Row, keys) -> bool:
        low, dash, high = (keys.get(i.STUDY_TIME) or "").partition("-")
        time = row[i.STUDY_TIME].decode()
        return self.ignores == i.STUDY_TIME or not dash or low <= time <= high


def search(archive: Archive, day: str = "", **options) -> Matches:
    keys = {i.STUDY_DATE: day} if day else {i.ACCESSION_NUMBER: "*A*"}
    return matching_studies(archive, keys, (), **options)  # type: ignore[arg-type]


def day_of(number: int, day: str = "20240110") -> list[tuple[str, str]]:
    return [(day, f"{n * 300 // 3600:02}{n * 300 // 60 % 60:02}00") for n in range(number)]


@pytest.mark.parametrize("refuses", [False, True], ids=["cuts", "refuses"])
@pytest.mark.parametrize("asked", ["20240101-20240131", "20240101-", "-20240131", ""])
def test_a_cut_answer_is_asked_for_again_by_days_and_hours(refuses: bool, asked: str) -> None:
    archive = Archive(*day_of(250), ("20240120", "120000"), cap=100, refuses=refuses)
    found = search(archive, asked)
    assert len(found.answers) == 251
    # Of a query without a date nothing tells whether there are studies without one: they lie in no part.
    assert found.doubt == (None if asked else "list_may_be_cut")
    assert found.queries == len(archive.asked) < 60


def test_an_answer_that_cannot_be_divided_stays_doubtful() -> None:
    found = search(Archive(*[("20240110", "120000")] * 150, cap=100), "20240110")
    assert (len(found.answers), found.doubt) == (100, "list_may_be_cut")


def test_without_parts_one_query_is_sent() -> None:
    found = search(Archive(*day_of(150), cap=100), "20240110", split=False)
    assert (found.queries, len(found.answers), found.doubt) == (1, 100, "list_may_be_cut")


@pytest.mark.parametrize("number", [100, 150, 256])
@pytest.mark.parametrize("asked", ["20240110", "20240101-20240201", ""])
def test_a_round_number_of_studies_that_is_whole_is_confirmed(number: int, asked: str) -> None:
    found = search(Archive(*day_of(number)), asked)
    assert (len(found.answers), found.doubt) == (number, None if asked else "list_may_be_cut")


def test_a_study_without_a_date_behind_the_cut_is_not_taken_for_absent() -> None:
    found = search(Archive(*day_of(100), ("", ""), cap=100))
    assert (len(found.answers), found.doubt) == (100, "list_may_be_cut")


def test_a_number_that_is_not_round_costs_one_query() -> None:
    found = search(Archive(*day_of(101)))
    assert (found.queries, found.doubt) == (1, None)


@pytest.mark.parametrize(("day", "time"), [("", "120000"), ("2024", "120000"), ("20240110", ""), ("20240110", "noon")])
def test_a_row_without_date_or_time_confirms_nothing(day: str, time: str) -> None:
    archive = Archive(*day_of(99), (day, time))
    assert search(archive).doubt == "list_may_be_cut"


def test_a_pacs_that_ignores_the_time_confirms_nothing() -> None:
    archive = Archive(*day_of(130), cap=100, ignores=i.STUDY_TIME)
    found = search(archive, "20240110")
    assert found.doubt == "list_may_be_cut"
    assert found.queries <= MAX_QUERIES


def test_the_count_of_a_patient_agrees_or_contradicts() -> None:
    for count, doubt in ((100, None), (103, "list_contradicted")):
        archive = Archive(*day_of(100), cap=100)
        for row in archive.rows:
            row[i.PATIENT_RELATED_STUDIES] = b"%d" % count
        found = matching_studies(archive, {h.PATIENT_ID: "P"}, ())  # type: ignore[arg-type]
        assert found.doubt == doubt
        assert (found.queries == 1) == (count == 100)


def test_counts_of_two_patients_of_one_id_agree_with_nothing() -> None:
    archive = Archive(*day_of(160), cap=100)
    for number, row in enumerate(archive.rows):
        row[i.PATIENT_RELATED_STUDIES] = b"100" if number % 2 else b"60"
    keys = {h.PATIENT_ID: "P"}
    found = matching_studies(archive, keys, (i.PATIENT_RELATED_STUDIES,))  # type: ignore[arg-type]
    assert found.doubt is not None


def test_the_count_of_a_patient_says_nothing_of_his_studies_on_one_day() -> None:
    archive = Archive(*day_of(3))
    for row in archive.rows:
        row[i.PATIENT_RELATED_STUDIES] = b"100"
    keys = {h.PATIENT_ID: "P", i.STUDY_DATE: "20240110"}
    assert matching_studies(archive, keys, (i.PATIENT_RELATED_STUDIES,)).doubt is None  # type: ignore[arg-type]


def test_a_row_that_cannot_be_read_contradicts() -> None:
    class Garbled(Archive):
        def answers(self, *args, **kwargs):
            yield from super().answers(*args, **kwargs)
            self.unreadable += 1

    assert search(Garbled(*day_of(3))).doubt == "list_contradicted"


def test_a_query_with_a_time_of_its_own_is_divided_by_days_alone() -> None:
    archive = Archive(*day_of(120), cap=100)
    keys = {i.STUDY_DATE: "20240110", i.STUDY_TIME: "000000-235959"}
    found = matching_studies(archive, keys, ())  # type: ignore[arg-type]
    assert (found.queries, found.doubt) == (1, "list_may_be_cut")


def test_a_refused_query_that_cannot_be_divided_is_an_error() -> None:
    with pytest.raises(OperationFailed):
        search(Archive(*[("20240110", "120000")] * 2, cap=1, refuses=True), "20240110")


def test_enough_ends_the_search() -> None:
    archive = Archive(*day_of(250), cap=100)
    found = search(archive, "20240110", enough=lambda matches: len(matches.answers) > 120)
    assert len(found.answers) == 121
    assert found.doubt == "list_may_be_cut"


DAYS = st.integers(0, 400).map(lambda n: f"2023{n // 28 % 12 + 1:02}{n % 28 + 1:02}")
TIMES = st.integers(0, 86399).map(lambda n: f"{n // 3600:02}{n // 60 % 60:02}{n % 60:02}")


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(DAYS, TIMES), max_size=330), st.sampled_from([100, 150, 256, ANY]))
def test_no_doubt_means_that_all_are_there(studies: list[tuple[str, str]], cap: int) -> None:
    found = search(Archive(*studies, cap=cap))
    if found.doubt is None:
        assert len(found.answers) == len(studies)


@pytest.mark.parametrize(
    "part",
    [Part(None, None), Part.of({i.STUDY_DATE: "20240101-20240131"}), Part.of({i.STUDY_DATE: "20240110"}),
     Part.of({i.STUDY_DATE: "-20240131"}), Part.of({i.STUDY_DATE: "20240131-"})],
)  # fmt: skip
def test_two_halves_cover_the_whole_and_do_not_overlap(part: Part) -> None:
    for _ in range(30):
        halves = part.halves()
        if not halves:
            break
        for day in ("18991231", "19000101", "20000101", "20240101", "20240110", "20240131", "20991231", "21000101"):
            for time in ("000000", "115959.999999", "120000", "235959.5"):
                row = {i.STUDY_DATE: day.encode(), i.STUDY_TIME: time.encode()}
                assert sum(half.covers(row) for half in halves) == part.covers(row)
        part = halves[1]
