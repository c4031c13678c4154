"""The verdict of a study, row by row: a pure function of its state."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime

import pytest

from airflow_dicom_get.engine.listing import Listing, SeriesInfo
from airflow_dicom_get.engine.query import Filter
from airflow_dicom_get.engine.report import end_of
from airflow_dicom_get.engine.resolve import Scope
from airflow_dicom_get.engine.state import StudyState
from airflow_dicom_get.engine.verdict import contradicted, judge
from airflow_dicom_get.errors import (
    AssociationAborted,
    Cancelled,
    ConnectFailed,
    DeadlineExceeded,
    DestinationFull,
    DicomGetError,
    GetNotOffered,
    SinkError,
)
from airflow_dicom_get.lists.matching import Contradiction
from airflow_dicom_get.lists.whole import Below
from airflow_dicom_get.records import Instance, Stored

STUDY, SERIES = "1.2", "1.2.3"
AT = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)


def instance(number: int, state: str | None = "stored", reason: str | None = None, **more: object) -> Instance:
    made = Instance(STUDY, SERIES, f"{SERIES}.{number}", "1.2.840.10008.5.1.4.1.1.2")
    made.state, made.reason, made.bytes = state, reason, 100  # type: ignore[assignment]
    for name, value in more.items():
        setattr(made, name, value)
    return made


def listing(instances: Iterable[Instance], count: int | None, of_study: int | None, unreadable: int) -> Listing:
    listed = {x.key: x for x in instances}
    if not listed and count is None:
        return Listing({}, {}, of_study, AT.timestamp(), unreadable)
    info = SeriesInfo(SERIES, "CT", 1, count, len(listed), len(listed))
    return Listing(listed, {SERIES: info}, of_study, AT.timestamp(), unreadable, below_study=Below(1, 1))


def state(
    *listed: Instance,
    others: Iterable[Instance] = (),
    count: int | None = None,
    of_study: int | None = None,
    agree: bool = True,
    unreadable: int = 0,
) -> StudyState:
    """A study whose last list names ``listed``; ``others`` were sent as well."""
    made = StudyState(Scope(STUDY))
    made.listing = listing(listed, count, of_study, unreadable)
    made.instances = {x.key: x for x in (*listed, *others)}
    made.unlisted = {x.key for x in others}
    made.lists_agree, made.rounds = agree, 1
    return made


def unlisted(*sent: Instance) -> StudyState:
    """A study that cannot be listed."""
    made = StudyState(Scope(STUDY), rounds=1)
    made.instances = {x.key: x for x in sent}
    made.unlisted = set(made.instances)
    return made


def with_(made: StudyState, **facts: object) -> StudyState:
    for name, value in facts.items():
        setattr(made, name, value)
    return made


def emptied(made: StudyState) -> StudyState:
    """One more series, of which nothing is listed."""
    assert made.listing is not None
    made.listing.series["1.2.4"] = SeriesInfo("1.2.4")
    return made


def gone(made: StudyState, *listed: Instance) -> StudyState:
    """An earlier list has named these."""
    made.instances |= {x.key: x for x in listed}
    return made


def with_bad(made: StudyState, *keys: tuple[str, str]) -> StudyState:
    """Rows that cannot be asked for."""
    assert made.listing is not None
    for key in keys:
        made.listing.bad[key] = row = Instance(STUDY, *key)
        row.state, row.reason = "missing", "bad_uid"
    return made


def strange() -> Listing:
    """Nothing but rows of another study."""
    made = Listing(at=AT.timestamp())
    made.dropped.add(Contradiction("StudyInstanceUID", "STUDY", True), {})
    return made


def refused(error: type[DicomGetError] = ConnectFailed) -> StudyState:
    """A study that was never begun, for an error."""
    return StudyState(Scope(STUDY), errors=[error("It failed.")])


@dataclass
class Case:
    name: str
    make: Callable[[], StudyState]
    verdict: str
    reason: str | None = None
    numbers: dict[str, object] = field(default_factory=dict)


def numbers(total: int, completed: int, **more: object) -> dict[str, object]:
    return {"total": total, "completed": completed, "failed": total - completed, **more}


CASES = [
    # complete
    Case("all stored, two equal lists", lambda: state(instance(1), instance(2)), "complete", None,
         numbers(2, 2, expected=2, bytes=200, evidence="list", plan_at=AT)),
    Case("all held before", lambda: state(instance(1, "held"), instance(2, "held")), "complete", None,
         numbers(2, 2, skipped=2, bytes=0)),
    Case("some held, some forwarded", lambda: state(instance(1, "held"), instance(2, "forwarded")), "complete", None,
         numbers(2, 2, skipped=1, bytes=100)),
    Case("counts that agree", lambda: state(instance(1), count=1), "complete", None, {"evidence": "list+counts"}),
    Case("a count below the list is none against it", lambda: state(instance(1), instance(2), count=1), "complete"),
    Case("something unexpected beside it", lambda: state(instance(1), others=[instance(9, "unexpected", "not_listed")]),
         "complete", None, numbers(1, 1, unexpected=1, bytes=200)),
    Case("something withdrawn beside it",
         lambda: with_(state(instance(1)), gone=[instance(9, "withdrawn", "gone_from_list")]),
         "complete", None, numbers(1, 1, withdrawn=1, bytes=100)),
    Case("a conversion is a remark", lambda: state(instance(1, exactness="converted"), instance(2)), "complete", None,
         numbers(2, 2, warning=1)),
    Case("a warning of the destination is a remark",
         lambda: state(instance(1, "forwarded", forward_status="warning"),
                       instance(2, "forwarded", forward_status="ok")),
         "complete", None, numbers(2, 2, warning=1)),
    Case("a choice of the peer is not a remark", lambda: state(instance(1, exactness="peer_choice")), "complete", None,
         numbers(1, 1, warning=0)),
    Case("recovered errors do not count", lambda: with_(state(instance(1)), strays={"not_asked": 3}), "complete"),
    Case("sizes that are not known are not counted", lambda: state(instance(1, bytes=None)), "complete",
         None, {"bytes": 0}),
    # unverified
    Case("nothing of what is meant in a list that may be cut",
         lambda: with_(state(), listing=Listing(at=AT.timestamp(), below_study=Below(100, 100))),
         "unverified", "list_may_be_cut", numbers(0, 0)),
    Case("no list at all", lambda: unlisted(instance(1, "unexpected"), instance(2)), "unverified", "no_list",
         {"expected": None, "total": 1, "completed": 1, "evidence": "none", "plan_at": None, "unexpected": 1}),
    Case("a count above the list", lambda: state(instance(1), count=2), "unverified", "list_contradicted",
         numbers(1, 1)),
    Case("a count of the study above the list", lambda: state(instance(1), of_study=2), "unverified",
         "list_contradicted"),
    Case("a row that cannot be read", lambda: state(instance(1), unreadable=1), "unverified", "list_contradicted"),
    Case("an unlisted one where the list is round",
         lambda: state(*(instance(n) for n in range(100)), others=[instance(900, "unexpected")]),
         "unverified", "list_contradicted", numbers(100, 100, unexpected=1)),
    Case("a round list", lambda: state(*(instance(n) for n in range(150))), "unverified", "list_may_be_cut"),
    Case("a round list, and the C-GET counts as many",
         lambda: with_(state(*(instance(n) for n in range(150))), counted={SERIES: 150}), "complete"),
    Case("a round list, and the C-GET counts more",
         lambda: with_(state(*(instance(n) for n in range(150))), counted={SERIES: 153}), "unverified",
         "list_may_be_cut"),
    Case("a round list, and the count agrees", lambda: state(*(instance(n) for n in range(150)), count=150),
         "complete"),
    Case("one that left the list came when it was asked for",
         lambda: with_(state(instance(1), others=[instance(9, "unexpected")]), returned={(SERIES, f"{SERIES}.9")}),
         "unverified", "list_contradicted", numbers(1, 1, unexpected=1)),
    Case("a listed series with nothing below it", lambda: emptied(state(instance(1))), "unverified",
         "list_contradicted"),
    Case("a listed study with nothing below it",
         lambda: with_(state(), listing=Listing(at=AT.timestamp(), below_study=Below())), "unverified",
         "list_contradicted", numbers(0, 0)),
    Case("the second list was not had", lambda: state(instance(1), agree=False), "unverified", "list_not_repeated"),
    Case("listed once and fetched, and then listed no more", lambda: gone(state(), instance(1, "withdrawn")),
         "unverified", "list_contradicted", numbers(0, 0, withdrawn=1)),
    Case("something unlisted came with other bytes than are held",
         lambda: state(instance(1), others=[instance(9, "conflict", "different_content")]), "partial",
         "different_content", numbers(1, 1, conflicts=1, unexpected=0)),
    Case("something unlisted could not be stored",
         lambda: state(instance(1), others=[instance(9, "failed", "destination_error")]), "partial",
         "destination_error", numbers(1, 1, unexpected=0)),
    Case("nothing listed, something sent", lambda: state(others=[instance(1, "unexpected")]), "unverified",
         "list_contradicted", {"total": 0, "unexpected": 1}),
    Case("nothing listed, and a count says more", lambda: state(count=3), "unverified", "list_contradicted"),
    # partial
    Case("a row with a malformed UID", lambda: with_bad(state(instance(1)), (SERIES, "1..2")), "partial", "bad_uid",
         numbers(2, 1, expected=2)),
    Case("one was not sent", lambda: state(instance(1), instance(2, "missing", "not_sent")), "partial", "not_sent",
         numbers(2, 1, bytes=100)),
    Case("one is in conflict", lambda: state(instance(1), instance(2, "conflict", "different_content")), "partial",
         "different_content", numbers(2, 1, conflicts=1)),
    Case("all in conflict: what is there is not what the source has",
         lambda: state(instance(1, "conflict", "different_content")), "partial", "different_content",
         numbers(1, 0, conflicts=1)),
    Case("the list still grows", lambda: with_(state(instance(1), agree=False), still_growing=True), "partial",
         "still_growing"),
    Case("still growing outweighs what is missing",
         lambda: with_(state(instance(1), instance(2, "missing", "not_sent"), agree=False), still_growing=True),
         "partial", "still_growing"),
    Case("the hours are over",
         lambda: with_(state(instance(1), instance(2, "missing", "window")), stop_reason="window"),
         "partial", "window"),
    Case("the hours are over, and nothing is held",
         lambda: with_(state(instance(1, "missing", "window")), stop_reason="window"), "partial", "window",
         numbers(1, 0)),
    Case("the hours were over before the list",
         lambda: StudyState(Scope(STUDY), stop_reason="window"), "partial", "window", numbers(0, 0)),
    Case("the destination is full, and something is held",
         lambda: with_(state(instance(1), instance(2, "failed", "destination_full")), stop_reason="destination_full"),
         "partial", "destination_full"),
    Case("the most frequent reason",
         lambda: state(instance(1), instance(2, "missing", "not_sent"), instance(3, "failed", "class_refused"),
                       instance(4, "failed", "class_refused")), "partial", "class_refused", numbers(4, 1)),
    Case("a word beside what is held is not a reason",
         lambda: state(instance(1, "held", "size_changed"), instance(2, "held", "size_changed"),
                       instance(3, "missing", "not_sent")), "partial", "not_sent"),
    Case("an error before the first round is the reason",
         lambda: with_(state(instance(1, "held"), instance(2, "missing", "association_lost")), rounds=0,
                       errors=[GetNotOffered("No C-GET.")]), "partial", "get_not_offered"),
    Case("an error after a round gives way to the rows",
         lambda: with_(state(instance(1), instance(2, "missing", "deadline")), errors=[AssociationAborted("Gone.")]),
         "partial", "deadline"),
    # empty
    Case("nothing is listed", state, "empty", None, numbers(0, 0, expected=0, evidence="list")),
    Case("all rows contradict the query", lambda: with_(state(), listing=strange()), "empty", "key_not_matched"),
    # failed
    Case("all rows have malformed UIDs", lambda: with_bad(state(), ("../x", "")), "failed", "bad_uid", numbers(1, 0)),
    Case("nothing is held", lambda: state(instance(1, "missing", "not_sent")), "failed", "not_sent", numbers(1, 0)),
    Case("nothing is held, and a reason stands nowhere", lambda: state(instance(1, "missing")), "failed", "not_sent"),
    Case("nothing is held, and an error says why",
         lambda: with_(state(instance(1, "missing")), errors=[DeadlineExceeded("Late.", phase="idle")]), "failed",
         "deadline"),
    Case("no connection", refused, "failed", "connect_failed", numbers(0, 0, expected=None)),
    Case("the destination failed before the list", lambda: refused(SinkError), "failed", "destination_error"),
    Case("strict_forward before anything was held",
         lambda: with_(state(instance(1, "failed", "destination_refused")), stop_reason="strict_forward"),
         "failed", "strict_forward"),
    Case("an empty list and an error", lambda: with_(state(), errors=[AssociationAborted("Gone.")], rounds=0), "failed",
         "association_lost"),
    # cancelled
    Case("cancelled by a signal",
         lambda: with_(state(instance(1), instance(2, "missing", "cancelled")), errors=[Cancelled("Cancelled.")],
                       cancelled_by="SIGTERM"), "cancelled", "SIGTERM", numbers(2, 1)),
    Case("cancelled though all is held",
         lambda: with_(state(instance(1), agree=False), errors=[Cancelled("Cancelled.")], cancelled_by="cancelled"),
         "cancelled", "cancelled"),
    Case("cancelled before it began",
         lambda: with_(refused(Cancelled), cancelled_by="SIGINT"), "cancelled", "SIGINT", numbers(0, 0)),
    Case("a conflict beside what failed, and nothing held",
         lambda: state(instance(1, "conflict", "different_content"), instance(2, "failed", "destination_error")),
         "partial", "different_content", numbers(2, 0, conflicts=1)),
    Case("ended before its first request, and no error says why",
         lambda: with_(state(instance(1), instance(2, "missing", "window")), rounds=0), "partial", "window"),
    Case("nothing was listed, nothing came, and no error says why", lambda: StudyState(Scope(STUDY)), "failed",
         "not_sent"),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_verdict(case: Case) -> None:
    found = judge(case.make())
    assert (found.verdict, found.reason) == (case.verdict, case.reason)
    assert {name: getattr(found, name) for name in case.numbers} == case.numbers
    assert found.study_instance_uid == STUDY
    assert found.failed == found.total - found.completed


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_judging_changes_nothing(case: Case) -> None:
    made = case.make()
    before = [(x.sop, x.state, x.reason, x.error) for x in made.rows()]
    assert judge(made) == judge(made)
    assert [(x.sop, x.state, x.reason, x.error) for x in made.rows()] == before


def test_complete_needs_every_row_and_a_list_that_stands() -> None:
    """Whatever the case: no ``complete`` with a row not held, without two equal lists, or against the source's word."""
    for case in CASES:
        made = case.make()
        if judge(made).verdict == "complete":
            assert made.listing is not None
            assert made.lists_agree
            assert not contradicted(made)
            assert all(x.state in ("stored", "forwarded", "held") for x in made.listing.instances.values())


class TestConclude:
    """What the end of a run makes of records that no outcome has reached."""

    @pytest.mark.parametrize(
        ("facts", "reason"),
        [
            ({}, "not_sent"),
            ({"stop_reason": "window"}, "window"),
            ({"stop_reason": "destination_full"}, "destination_full"),
            ({"stop_reason": "strict_forward"}, "strict_forward"),
            ({"stop_reason": "destination_error"}, "destination_error"),
            ({"errors": [Cancelled("x")]}, "cancelled"),
            ({"errors": [DestinationFull("x")]}, "destination_full"),
            ({"errors": [DeadlineExceeded("x")]}, "deadline"),
            ({"errors": [GetNotOffered("x")]}, "refused_by_source"),
            ({"errors": [AssociationAborted("x")]}, "association_lost"),
            ({"errors": [SinkError("x")]}, "destination_error"),
            ({"stop_reason": "window", "errors": [AssociationAborted("x")]}, "window"),
        ],
    )
    def test_a_listed_one_is_missing_for_what_ended_the_run(self, facts: dict[str, object], reason: str) -> None:
        made = with_(state(instance(1, None)), **facts)
        made.conclude()
        (row,) = made.rows()
        assert (row.state, row.reason) == ("missing", reason)

    def test_outcomes_stay(self) -> None:
        made = state(instance(1), instance(2, "failed", "unparsable"))
        made.conclude()
        assert [(x.state, x.reason) for x in made.rows()] == [("stored", None), ("failed", "unparsable")]

    def test_one_that_left_the_list_is_withdrawn_also_when_it_is_held(self) -> None:
        made = state(instance(1))
        made.instances[SERIES, "1.2.3.7"] = instance(7)
        made.conclude()
        assert [(x.state, x.reason) for x in made.rows()] == [("stored", None), ("withdrawn", "gone_from_list")]

    def test_one_that_was_sent_and_never_listed_is_unexpected(self) -> None:
        made = state(instance(1), others=[instance(9)])
        made.conclude()
        assert [(x.state, x.reason) for x in made.rows()] == [("stored", None), ("unexpected", "not_listed")]

    @pytest.mark.parametrize(("became", "reason"), [("conflict", "different_content"), ("failed", "destination_error")])
    def test_one_that_was_never_listed_and_not_taken_stays_what_it_is(self, became: str, reason: str) -> None:
        made = state(instance(1), others=[instance(9, became, reason)])
        made.conclude()
        assert [(x.state, x.reason) for x in made.rows()] == [("stored", None), (became, reason)]

    def test_what_cannot_be_asked_for_is_a_row_also_without_a_list(self) -> None:
        made = unlisted(instance(1))
        made.scope.bad = frozenset({(SERIES, "a.b")})
        made.conclude()
        assert [(x.sop, x.state, x.reason) for x in made.rows()][1:] == [("a.b", "missing", "bad_uid")]

    def held(self, number: int) -> Stored:
        return Stored(SERIES, f"{SERIES}.{number}", bytes=10)

    def test_what_is_held_of_the_study_and_not_listed_is_withdrawn(self) -> None:
        made = state(instance(1))
        made.inventory = {x.key: x for x in (self.held(8), self.held(1))}
        made.conclude()
        assert [(x.sop, x.state) for x in made.gone] == [("1.2.3.8", "withdrawn")]

    def test_of_a_part_of_a_study_nothing_else_is_withdrawn(self) -> None:
        made = state(instance(1))
        made.scope = Scope(STUDY, series=frozenset({SERIES}))
        made.inventory = {(SERIES, "1.2.3.8"): self.held(8)}
        made.conclude()
        assert made.gone == []

    def test_without_a_list_nothing_is_withdrawn(self) -> None:
        made = unlisted(instance(1))
        made.inventory = {(SERIES, "1.2.3.8"): self.held(8)}
        made.conclude()
        assert made.gone == []


def test_a_study_that_filters_leave_nothing_of_is_not_meant_while_another_is() -> None:
    narrow = Scope(STUDY, filters=(Filter(0x00080060, "Modality", "CS", "MR", "SERIES"),), found=True)
    nothing, something = with_(state(), scope=narrow), state(instance(1))
    assert [n.verdict for n in end_of([nothing, something]).numbers] == ["complete"]
    assert [n.verdict for n in end_of([nothing]).numbers] == ["empty"]


@pytest.mark.parametrize("held", [True, False])
def test_what_a_manifest_asks_for_counts_where_it_is_neither_listed_nor_held(held: bool) -> None:
    made = state(instance(1, "stored" if held else "missing", None if held else "not_sent"))
    lost = instance(2, "missing", "gone_from_list")
    made.scope.named = frozenset({(SERIES, f"{SERIES}.1"), lost.key})
    made.instances[lost.key] = lost
    found = judge(made)
    assert (found.expected, found.total, found.completed, found.failed) == (2, 2, int(held), 2 - held)
    assert found.verdict == ("partial" if held else "failed")


@pytest.mark.parametrize(
    ("count", "of_study", "evidence"),
    [(None, None, "list"), (2, None, "list+counts"), (None, 2, "list+counts"), (1, None, "list"), (2, 1, "list")],
)
def test_counts_are_evidence_where_they_agree(count: int | None, of_study: int | None, evidence: str) -> None:
    assert judge(state(instance(1), instance(2), count=count, of_study=of_study)).evidence == evidence


def test_counts_of_a_series_say_nothing_of_instances_that_were_named() -> None:
    made = state(instance(1), count=1)
    assert made.listing is not None
    made.listing.instances_named = True
    assert judge(made).evidence == "list"
