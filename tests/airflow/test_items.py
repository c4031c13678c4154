"""Items, shards and splitting, without a PACS."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from airflow_dicom_get.engine.items import make_item, modalities_of, pack, split_by_series
from airflow_dicom_get.engine.search import ROUND_CAPS, Search
from airflow_dicom_get.errors import InvalidQuery, OperationFailed


def items(*sizes: int | None) -> list[dict]:
    return [make_item(f"1.{number}", expected=size) for number, size in enumerate(sizes)]


@given(
    st.lists(st.one_of(st.none(), st.integers(0, 3000)), max_size=60),
    st.integers(1, 2000),
    st.integers(1, 20),
)
def test_packing_keeps_every_item_once_and_the_limits(sizes, target, at_most):
    shards = pack(items(*sizes), target=target, at_most=at_most)
    assert [item for shard in shards for item in shard] == items(*sizes)
    assert len(shards) <= at_most
    assert all(shards)
    if len(shards) < at_most and len(sizes) <= at_most:
        for shard in shards:
            assert len(shard) == 1 or sum(item["expected_instances"] or 0 for item in shard) <= target


def test_a_large_study_is_split_over_its_series_and_stays_one_study():
    whole = make_item("1.2", expected=900, modalities=["CT"], keys={"AccessionNumber": "A"})
    parts = split_by_series(whole, {"1.2.1": 400, "1.2.2": 100, "1.2.3": 400}, target=500)
    assert [part["series_instance_uids"] for part in parts] == [["1.2.1", "1.2.2"], ["1.2.3"]]
    assert [part["expected_instances"] for part in parts] == [500, 400]
    assert {part["study_instance_uid"] for part in parts} == {"1.2"}
    assert parts[0]["keys"] == {"AccessionNumber": "A"}


def test_a_study_whose_series_have_no_counts_stays_whole():
    whole = make_item("1.2", expected=900)
    assert split_by_series(whole, {"1.2.1": None, "1.2.2": 100}, target=500) == [whole]


def test_a_text_that_is_no_modality_code_never_becomes_part_of_a_label():
    assert modalities_of("CT\\Doe^Jane\\SR") == ["CT", "SR"]
    assert "Doe" not in make_item("1.2", modalities=modalities_of("CT\\Doe^Jane"))["label"]


class Archive:
    """Studies as C-FIND rows, of which a PACS gives no more than ``cap``."""

    def __init__(self, studies: list[tuple[str, str, str]], cap: int = 10**9, *, refuses: bool = False) -> None:
        self.studies, self.cap, self.refuses = studies, cap, refuses
        self.asked: list[dict] = []

    def __call__(self, query, level, return_keys):
        self.asked.append(dict(query))
        rows = [
            SimpleNamespace(StudyInstanceUID=uid, StudyDate=date, StudyTime=time, NumberOfStudyRelatedInstances="7")
            for uid, date, time in self.studies
            if self._within(query.get("StudyDate", ""), date) and self._within(query.get("StudyTime", ""), time)
        ]
        if self.refuses and len(rows) > self.cap:
            raise OperationFailed("too many", status=0xA700)
        return rows[: self.cap]

    @staticmethod
    def _within(wanted: str, value: str) -> bool:
        low, dash, high = wanted.partition("-")
        return (not wanted) or (low <= value <= (high or "9")) if dash or not wanted else value == wanted


def search(archive: Archive, **options) -> Search:
    return Search(archive, level="STUDY", model="StudyRoot", **options)


def day_of(number: int, day: str) -> list[tuple[str, str, str]]:
    return [(f"1.{n}", day, f"{n * 300 // 3600:02}{n * 300 // 60 % 60:02}00") for n in range(number)]


@pytest.mark.parametrize("refuses", [False, True], ids=["cuts", "refuses"])
def test_a_cut_answer_is_asked_for_again_by_days_and_hours(refuses):
    archive = Archive([*day_of(250, "20240110"), ("2.1", "20240120", "120000")], cap=100, refuses=refuses)
    found = search(archive).items({"StudyDate": "2024-01-01/2024-01-31"})
    assert len(found) == 251
    assert found[0]["expected_instances"] == 7


def test_an_answer_that_stays_cut_is_said_to_be():
    archive = Archive([(f"1.{n}", "20240110", "120000") for n in range(150)], cap=100)
    asked = search(archive)
    assert len(asked.items({"StudyDate": "20240110"})) == 100
    assert asked.truncated


def test_without_splitting_one_query_is_sent_and_the_doubt_is_said():
    archive = Archive(day_of(150, "20240110"), cap=100)
    asked = search(archive, split=False)
    assert len(asked.items({"StudyDate": "20240110"})) == 100
    assert (asked.queries, asked.truncated) == (1, True)


def test_exactly_a_round_number_of_studies_is_not_said_to_be_cut():
    archive = Archive(day_of(min(ROUND_CAPS), "20240110"))
    asked = search(archive)
    assert len(asked.items({"StudyDate": "20240110"})) == min(ROUND_CAPS)
    assert not asked.truncated


def test_a_refused_query_that_cannot_be_halved_is_an_error():
    archive = Archive([("1.1", "20240110", "120000"), ("1.2", "20240110", "120000")], cap=1, refuses=True)
    with pytest.raises(OperationFailed):
        search(archive).items({"StudyDate": "20240110"})


def test_today_is_one_day_for_all_queries_of_a_search():
    archive = Archive([])
    search(archive).items({"StudyDate": "today"})
    assert archive.asked[0]["StudyDate"].isdigit()


def test_each_modality_is_a_query_of_its_own():
    archive = Archive([])
    search(archive, modalities=["CT", "MR"]).items({"StudyDate": "20240110"})
    assert [query["ModalitiesInStudy"] for query in archive.asked] == ["CT", "MR"]


@pytest.mark.parametrize("query", [{}, {"StudyDate": ""}, {"InstanceNumber": "1", "StudyDate": "20240110"}])
def test_a_query_that_selects_nothing_or_too_deep_is_refused_before_traffic(query):
    archive = Archive([])
    with pytest.raises(InvalidQuery):
        search(archive).items(query)
    assert archive.asked == []
