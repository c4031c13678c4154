"""Whether studies have arrived, over answers that are made up: no PACS, no clock."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from airflow_dicom_get.engine.arrivals import Arrivals, Awaited, find_arrivals, list_studies
from airflow_dicom_get.engine.find import Found

ONE, TWO = "1.2.3.1", "1.2.3.2"
BOTH = [{"QueryRetrieveLevel": "STUDY", "StudyInstanceUID": [ONE, TWO]}]


class Pacs:
    """Answers C-FINDs out of the number of instances of each study."""

    def __init__(self, sizes: dict[str, int], *, counts: bool = True, doubt: str | None = None) -> None:
        self.sizes, self.counts, self.doubt = sizes, counts, doubt
        self.levels: list[str] = []

    def find(self, query: Any, level: str, return_keys: Any) -> Found:
        self.levels.append(level)
        found = Found(self.rows(query, level))
        found.doubt = self.doubt if level == "IMAGE" else None
        return found

    def rows(self, query: Any, level: str) -> list[Any]:
        wanted = query["StudyInstanceUID"]
        studies = [uid for uid in ([wanted] if isinstance(wanted, str) else wanted) if uid in self.sizes]
        if level == "STUDY":
            return [SimpleNamespace(StudyInstanceUID=uid, NumberOfStudyRelatedInstances=self._count(uid))
                    for uid in studies]  # fmt: skip
        if level == "SERIES":
            return [SimpleNamespace(SeriesInstanceUID=f"{uid}.1") for uid in studies]
        return [SimpleNamespace() for uid in studies for _ in range(self.sizes[uid])]

    def _count(self, uid: str) -> int | None:
        return self.sizes[uid] if self.counts else None


def ask(pacs: Pacs, awaited: Awaited, before: Arrivals | None, now: float) -> Arrivals:
    seen = list_studies(awaited.queries, pacs.find, now, model="StudyRoot")
    return find_arrivals(awaited, seen, before.counts if before else {})


def test_studies_settle_once_their_numbers_have_stayed_the_same() -> None:
    awaited = Awaited(BOTH, [ONE, TWO], settled_seconds=60)
    pacs = Pacs({ONE: 3, TWO: 5})
    found = ask(pacs, awaited, None, 1000)
    assert (found.all_settled, found.text) == (False, "2 studies found, 2 not settled yet")
    pacs.sizes[TWO] = 6
    found = ask(pacs, awaited, found, 1059)
    assert found.counts == {ONE: [3, 1000], TWO: [6, 1059]}
    found = ask(pacs, awaited, found, 1060)
    assert (found.all_settled, found.text) == (False, "2 studies found, 1 not settled yet")
    found = ask(pacs, awaited, found, 1119)
    assert found.all_settled
    assert [item["expected_instances"] for item in found.items] == [3, 6]


@pytest.mark.parametrize(
    ("sizes", "least", "text"),
    [
        ({ONE: 3}, 1, "1 study found, 1 missing"),
        ({ONE: 3, TWO: 1}, 2, "2 studies found, 1 with fewer than 2 instances"),
        ({}, 1, "0 studies found, 2 missing"),
    ],
)
def test_what_is_not_there_is_waited_for(sizes: dict[str, int], least: int, text: str) -> None:
    found = ask(Pacs(sizes), Awaited(BOTH, [ONE, TWO], settled_seconds=0, min_instances=least), None, 0)
    assert (found.all_settled, found.text) == (False, text)


def test_a_series_that_was_named_is_waited_for() -> None:
    first = f"{ONE}.1"
    query: dict[str, Any] = {"QueryRetrieveLevel": "SERIES", "StudyInstanceUID": [ONE], "SeriesInstanceUID": [first]}
    two = {**query, "SeriesInstanceUID": [first, f"{ONE}.2"]}
    found = ask(Pacs({ONE: 3}), Awaited([two], [ONE], settled_seconds=0), None, 1000)
    assert (found.all_settled, found.text) == (False, "1 study found, 1 missing")
    found = ask(Pacs({ONE: 3}), Awaited([query], [ONE], settled_seconds=0), None, 1000)
    assert found.all_settled
    assert [item["series_instance_uids"] for item in found.items] == [[first]]


def test_a_query_that_matches_nothing_is_waited_for() -> None:
    assert not ask(Pacs({}), Awaited(BOTH, settled_seconds=0), None, 0).all_settled
    assert ask(Pacs({ONE: 1}), Awaited(BOTH, settled_seconds=0), None, 0).all_settled


def test_a_study_that_went_is_forgotten() -> None:
    awaited = Awaited(BOTH, settled_seconds=60)
    pacs = Pacs({ONE: 3})
    first = ask(pacs, awaited, None, 0)
    gone = ask(Pacs({}), awaited, first, 50)
    assert gone.counts == {}
    assert not ask(pacs, awaited, gone, 100).all_settled


def test_a_pacs_without_numbers_is_counted_by_its_lists() -> None:
    pacs = Pacs({ONE: 3}, counts=False)
    found = ask(pacs, Awaited(BOTH, [ONE], settled_seconds=0), None, 0)
    assert found.items[0]["expected_instances"] == 3
    assert pacs.levels == ["STUDY", "SERIES", "IMAGE"]


def test_a_list_that_may_be_cut_is_said_and_is_no_reason_to_wait() -> None:
    pacs = Pacs({ONE: 150}, counts=False, doubt="list_may_be_cut")
    found = ask(pacs, Awaited(BOTH, [ONE], settled_seconds=0), None, 0)
    assert found.all_settled
    assert "list_may_be_cut" in found.text
