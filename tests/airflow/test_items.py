"""Items, shards and splitting, without a PACS."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from airflow_dicom_get.engine.find import Found
from airflow_dicom_get.engine.items import make_item, modalities_of, pack, split_by_series
from airflow_dicom_get.engine.search import Search
from airflow_dicom_get.errors import InvalidQuery


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


def test_a_study_whose_series_are_fewer_than_it_is_stays_whole():
    whole = make_item("1.2", expected=900)
    assert split_by_series(whole, {"1.2.1": 400, "1.2.2": 499}, target=500) == [whole]
    assert len(split_by_series(whole, {"1.2.1": 400, "1.2.2": 501}, target=500)) == 2


def test_a_text_that_is_no_modality_code_never_becomes_part_of_a_label():
    assert modalities_of("CT\\Doe^Jane\\SR") == ["CT", "SR"]
    assert "Doe" not in make_item("1.2", modalities=modalities_of("CT\\Doe^Jane"))["label"]


class Archive:
    """Studies as C-FIND rows."""

    def __init__(self, *studies: str, doubt: str | None = None) -> None:
        self.studies, self.doubt = studies, doubt
        self.asked: list[dict] = []

    def __call__(self, query, level, return_keys):
        self.asked.append(dict(query))
        rows: list[Any] = [SimpleNamespace(StudyInstanceUID=x, NumberOfStudyRelatedInstances="7") for x in self.studies]
        found = Found(rows)
        found.doubt, found.queries = self.doubt, 3
        return found


def search(archive: Archive, **options) -> Search:
    return Search(archive, level="STUDY", model="StudyRoot", **options)


@pytest.mark.parametrize("doubt", [None, "list_may_be_cut"])
def test_what_find_says_of_its_answer_is_said_of_the_search(doubt):
    asked = search(Archive("1.2", "1.1", doubt=doubt))
    found = asked.items({"StudyDate": "20240110"})
    assert [item["study_instance_uid"] for item in found] == ["1.1", "1.2"]
    assert found[0]["expected_instances"] == 7
    assert (asked.doubt, asked.queries) == (doubt, 3)


@pytest.mark.parametrize("uid", ["", "1..2", "1.2.x", "1." + "2" * 70])
def test_a_study_that_cannot_be_asked_for_is_left_out_and_said(uid):
    asked = search(Archive("1.1", uid))
    assert [item["study_instance_uid"] for item in asked.items({"StudyDate": "20240110"})] == ["1.1"]
    assert asked.doubt == "bad_uid"


@pytest.mark.parametrize("level", ["STUDY", "SERIES"])
def test_a_pacs_that_tells_no_modality_is_not_one_without_such_studies(level):
    def told(*modalities):
        def find(query, at, return_keys):
            rows: list[Any] = [SimpleNamespace(StudyInstanceUID="1.2")]
            if at == "SERIES":
                rows = [SimpleNamespace(SeriesInstanceUID=f"1.{n}", Modality=x) for n, x in enumerate(modalities)]
            return Found(rows)

        asked = Search(find, level=level, model="StudyRoot", modalities=["CT"])
        return len(asked.items({"StudyDate": "20240110"}))

    with pytest.raises(InvalidQuery, match="does not support the key Modality at SERIES level: none of the 2 rows"):
        told("", None)
    assert (told("", "CT"), told("", "MR")) == (1, 0)


@pytest.mark.parametrize(("level", "modalities"), [("STUDY", ["CT"]), ("SERIES", []), ("SERIES", ["CT"])])
def test_a_listed_study_whose_series_are_not_listed_is_kept_whole(level, modalities):
    def found(instances, **keys):
        def find(query, at, return_keys):
            study = SimpleNamespace(StudyInstanceUID="1.2", NumberOfStudyRelatedInstances=instances)
            rows: list[Any] = [study] if at == "STUDY" else []
            return Found(rows)

        asked = Search(find, level=level, model="StudyRoot", modalities=modalities)
        items = asked.items({"StudyDate": "20240110", **keys})
        return [(item["study_instance_uid"], item["series_instance_uids"]) for item in items]

    assert found("7") == found(None) == [("1.2", None)]
    assert found("0") == []
    if level == "SERIES":  # no series need match a filter
        assert found("7", BodyPartExamined="CHEST") == []


def test_today_is_one_day_for_all_queries_of_a_search():
    archive = Archive()
    search(archive).items({"StudyDate": "today"})
    assert archive.asked[0]["StudyDate"].isdigit()


def test_each_modality_is_a_query_of_its_own():
    archive = Archive()
    search(archive, modalities=["CT", "MR"]).items({"StudyDate": "20240110"})
    assert [query["ModalitiesInStudy"] for query in archive.asked] == ["CT", "MR"]


@pytest.mark.parametrize("query", [{}, {"StudyDate": ""}, {"InstanceNumber": "1", "StudyDate": "20240110"}])
def test_a_query_that_selects_nothing_or_too_deep_is_refused_before_traffic(query):
    archive = Archive()
    with pytest.raises(InvalidQuery):
        search(archive).items(query)
    assert archive.asked == []
