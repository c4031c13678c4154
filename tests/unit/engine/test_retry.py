"""What a manifest asks for."""

from __future__ import annotations

from collections.abc import Iterable

import pytest

from airflow_dicom_get.engine.retry import asked_by
from airflow_dicom_get.errors import InvalidQuery
from airflow_dicom_get.manifest.schema import manifest_table
from airflow_dicom_get.records import Instance
from airflow_dicom_get.vocabulary import OUTSIDE_LIST, STATES

CT, SR = "1.2.840.10008.5.1.4.1.1.2", "1.2.840.10008.5.1.4.1.1.88.11"


def row(study: str, series: str, sop: str, state: str | None = "stored", **facts: object) -> Instance:
    made = Instance(study, series, sop, CT)
    made.state = state  # type: ignore[assignment]
    for name, value in facts.items():
        setattr(made, name, value)
    return made


def table(rows: Iterable[Instance]) -> object:
    return manifest_table(rows, source="s", destination="d")


@pytest.mark.parametrize("state", [*STATES, None])
def test_every_state_but_what_lies_beside_the_list(state: str | None) -> None:
    asked = asked_by(table([row("1.1", "1.2", "1.3", state)]))
    assert len(asked.scopes) == (state not in OUTSIDE_LIST)


def test_a_study_is_one_scope_of_pairs() -> None:
    rows = [row("1.1", "1.2", "1.3"), row("1.1", "1.4", "1.5"), row("1.6", "1.2", "1.3"), row("1.1", "1.2", "1.3")]
    one, other = asked_by(table(rows)).scopes
    assert (one.study, one.named) == ("1.1", frozenset({("1.2", "1.3"), ("1.4", "1.5")}))
    assert (one.series, one.instances) == (frozenset({"1.2", "1.4"}), frozenset({"1.3", "1.5"}))
    assert [one.names(*pair) for pair in (("1.2", "1.3"), ("1.2", "1.5"))] == [True, False]
    assert (other.study, other.named) == ("1.6", frozenset({("1.2", "1.3")}))


@pytest.mark.parametrize(
    ("reason", "by_digest"), [("size_changed", True), ("different_content", True), ("not_sent", False), (None, False)]
)
def test_content_in_doubt(reason: str | None, by_digest: bool) -> None:
    rows = [row("1.1", "1.2", "1.3"), row("1.1", "1.2", "1.4", "failed", reason=reason)]
    assert asked_by(table(rows)).by_digest == by_digest


def test_a_row_of_another_class_asks_for_nothing() -> None:
    rows = [row("1.1", "1.2", "1.3"), row("1.1", "1.2", "1.4", sop_class=SR), row("1.1", "1.2", "1.5", sop_class=None)]
    (scope,) = asked_by(table(rows), (SR,)).scopes
    assert scope.instances == frozenset({"1.4", "1.5"})


@pytest.mark.parametrize("uids", [("1.1", "1.2", ".."), ("1.1", "", "1.3"), ("x", "1.2", "1.3")])
def test_a_row_that_names_no_instance(uids: tuple[str, str, str]) -> None:
    with pytest.raises(InvalidQuery, match="Row 2 of the manifest"):
        asked_by(table([row("1.1", "1.2", "1.3"), row(*uids)]))
