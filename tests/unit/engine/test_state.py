"""Transitions of the state of a study: what outcomes of source and destination make of it."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import replace

import pytest

from airflow_dicom_get.engine.listing import Listing, SeriesInfo
from airflow_dicom_get.engine.query import Filter
from airflow_dicom_get.engine.resolve import Scope
from airflow_dicom_get.engine.state import MOST_REFUSED, UNPLANNED, StudyState
from airflow_dicom_get.records import Instance, Key, Stored
from airflow_dicom_get.sinks.base import Confirmation, Taken
from airflow_dicom_get.vocabulary import DID_NOT_COME

STUDY, SERIES = "1.2", "1.2.3"
CT, EXPLICIT_LE, JPEG = "1.2.840.10008.5.1.4.1.1.2", "1.2.840.10008.1.2.1", "1.2.840.10008.1.2.4.50"
STORED = Taken(0x0000)
FULL = Taken(0xA700, "destination_full", "There is no room left.")
BROKEN = Taken(0xA700, "destination_error", "It cannot be written.")
OTHER = Taken(0x0111, "different_content", "Another data set lies there.")
NOT_KEPT = "The disk failed."


def uid(number: int) -> str:
    return f"{SERIES}.{number}"


def key(number: int) -> Key:
    return SERIES, uid(number)


def listing(*numbers: int, syntax: str | None = None) -> Listing:
    found = Listing(series={SERIES: SeriesInfo(SERIES, listed=len(numbers))})
    for number in numbers:
        one = Instance(STUDY, SERIES, uid(number), CT)
        one.listed_syntax = syntax
        found.instances[one.key] = one
    return found


def listed(*numbers: int, **facts: object) -> StudyState:
    state = StudyState(Scope(STUDY), rounds=1, **facts)  # type: ignore[arg-type]
    state.take_list(listing(*numbers))
    return state


def held(number: int, series: str = SERIES, syntax: str = EXPLICIT_LE) -> Stored:
    return Stored(series, uid(number), CT, syntax, b"\1" * 32, 100, 20, "CT", where=f"file:///d/{number}")


class TestLists:
    def test_two_equal_lists_agree_whatever_their_order(self) -> None:
        state = StudyState(Scope(STUDY))
        assert state.take_list(listing(1, 2)) is False
        assert not state.lists_agree
        assert state.take_list(listing(2, 1)) is False
        assert state.lists_agree

    @pytest.mark.parametrize("second", [(1,), (1, 2, 3), (1, 3), ()])
    def test_any_difference_is_a_change(self, second: tuple[int, ...]) -> None:
        state = listed(1, 2)
        assert state.take_list(listing(*second)) is True
        assert not state.lists_agree
        assert set(state.instances) == {key(n) for n in (1, 2, *second)}

    def test_a_later_list_can_agree_again(self) -> None:
        state = listed(1)
        state.take_list(listing(1, 2))
        state.take_list(listing(1, 2))
        assert state.lists_agree

    def test_bounds_follow_the_list(self) -> None:
        assert StudyState(Scope(STUDY)).most_objects() == UNPLANNED
        assert listed(1, 2, 3).most_objects() == 106


class TestInventory:
    def test_what_is_listed_and_held_is_held(self) -> None:
        state = listed(1, 2)
        state.inventory = {key(1): held(1)}
        assert [x.sop for x, _ in state.adopt_inventory()] == [uid(1)]
        one = state.instances[key(1)]
        assert (one.state, one.attempt, one.bytes, one.dataset_offset, one.syntax) == ("held", 0, 100, 20, EXPLICIT_LE)
        assert state.inventory == {}
        assert [x.sop for x in state.missing()] == [uid(2)]

    def test_an_object_of_another_series_is_none_of_it(self) -> None:
        state = listed(1)
        state.inventory = {("1.2.4", uid(1)): held(1, series="1.2.4")}
        assert list(state.adopt_inventory()) == []
        assert [x.sop for x in state.missing()] == [uid(1)]

    def test_an_outcome_of_this_run_outweighs_the_inventory(self) -> None:
        state = listed(1)
        state.not_received(state.instances[key(1)], "not_sent", "It did not come.")
        state.inventory = {key(1): held(1)}
        assert list(state.adopt_inventory()) == []

    @pytest.mark.parametrize(("syntax", "exactness"), [(EXPLICIT_LE, "as_listed"), (JPEG, "converted"), (None, None)])
    def test_exactness_is_held_against_the_list(self, syntax: str | None, exactness: str | None) -> None:
        state = StudyState(Scope(STUDY))
        state.take_list(listing(1, syntax=syntax))
        state.inventory = {key(1): held(1)}
        list(state.adopt_inventory())
        assert state.instances[key(1)].exactness == exactness

    def test_what_is_held_of_another_class_than_is_listed_is_asked_for(self) -> None:
        state = listed(1, sop_classes=[CT])
        state.inventory = {key(1): replace(held(1), sop_class="1.2.840.10008.5.1.4.1.1.4")}
        assert not list(state.adopt_inventory())
        assert [x.sop for x in state.missing()] == [uid(1)]

    def test_what_is_held_of_another_class_is_left_out_where_the_list_tells_none(self) -> None:
        state = StudyState(Scope(STUDY), sop_classes=[CT])
        state.take_list(listing(1))
        state.instances[key(1)].sop_class = None
        state.inventory = {key(1): replace(held(1), sop_class="1.2.840.10008.5.1.4.1.1.4")}
        assert not list(state.adopt_inventory())
        assert not state.missing()

    def test_a_named_series_is_not_known_for_an_instance_that_is_held_of_it(self) -> None:
        state = listed(1)
        assert state.listing is not None
        state.listing.unknown = frozenset({"1.2.9", uid(7)})
        state.inventory = {("1.2.9", uid(7)): held(7, "1.2.9")}
        assert state.unknown() == {"1.2.9"}


class TestAnswers:
    def test_one_that_was_taken_is_progress(self) -> None:
        state = listed(1)
        one = state.instances[key(1)]
        answered = state.answer(uid(1), one, STORED)
        assert (answered.record, answered.error, answered.new, answered.stop) == (one, None, True, None)
        assert (one.state, one.attempt, state.progress) == ("stored", 1, 1)

    def test_a_second_object_of_it_is_none(self) -> None:
        state = listed(1)
        state.answer(uid(1), state.instances[key(1)], STORED)
        again = state.answer(uid(1), Instance(STUDY, SERIES, uid(1)), STORED)
        assert (again.new, again.error, state.progress) == (False, None, 1)

    def test_an_unlisted_one_is_progress_only_where_there_is_no_list(self) -> None:
        state = listed(1)
        state.answer(uid(9), state.add_unlisted(SERIES, uid(9), CT), STORED)
        assert state.progress == 0
        bare = StudyState(Scope(STUDY), rounds=1)
        bare.answer(uid(9), bare.add_unlisted(SERIES, uid(9), CT), STORED)
        assert bare.progress == 1

    def test_a_refusal_is_failed_and_a_later_success_mends_it(self) -> None:
        state = listed(1)
        one = state.instances[key(1)]
        assert (
            state.answer(uid(1), one, Taken(0xC000, "unparsable", "It cannot be read.")).error == "It cannot be read."
        )
        assert (one.state, one.reason, one.dimse_status) == ("failed", "unparsable", 0xC000)
        assert state.refused_here(one)
        state.answer(uid(1), one, STORED)
        assert (one.state, one.reason, one.error) == ("stored", None, None)

    def test_other_bytes_make_a_conflict_of_what_was_stored(self) -> None:
        state = listed(1)
        one = state.instances[key(1)]
        state.answer(uid(1), one, STORED)
        state.answer(uid(1), Instance(STUDY, SERIES, uid(1)), OTHER)
        assert (one.state, one.reason) == ("conflict", "different_content")
        assert state.missing() == []

    def test_what_cannot_be_read_leaves_what_was_stored(self) -> None:
        state = listed(1)
        one = state.instances[key(1)]
        state.answer(uid(1), one, STORED)
        state.answer(uid(1), None, Taken(0xC000, "unparsable", "It cannot be read."))
        assert (one.state, one.reason) == ("stored", None)

    @pytest.mark.parametrize("reason", ["destination_error", "destination_full", "deadline", "cancelled"])
    def test_what_was_sent_again_and_not_compared_is_asked_for_again(self, reason: str) -> None:
        """It may be other bytes than those that are held."""
        state = listed(1)
        one = state.instances[key(1)]
        state.answer(uid(1), one, STORED)
        state.answer(uid(1), Instance(STUDY, SERIES, uid(1)), BROKEN._replace(reason=reason))
        assert (one.state, one.reason) == ("failed", reason)
        assert state.missing() == [one]

    def test_a_node_that_refuses_what_it_has_leaves_it_there(self) -> None:
        state = listed(1)
        one = state.instances[key(1)]
        state.answer(uid(1), one, STORED)
        again = Instance(STUDY, SERIES, uid(1))
        again.forward_status = "error"
        state.answer(uid(1), again, BROKEN)
        assert (one.state, one.reason) == ("stored", None)

    def test_an_object_of_no_record_is_a_stray(self) -> None:
        state = listed(1)
        answered = state.answer("1.9.9", None, Taken(0x0124, "foreign_study", "Another study."))
        assert state.strays == {"foreign_study": 1}
        assert answered.error == "Another study."
        assert len(state.instances) == 1

    def test_one_uid_in_two_series_is_two_instances(self) -> None:
        state = listed(1)
        other = Instance(STUDY, "1.2.4", uid(1), CT)
        both = Listing(dict(state.instances), {name: SeriesInfo(name) for name in (SERIES, "1.2.4")})
        both.instances[other.key] = other
        assert state.take_list(both) is True
        assert {x.series for x in state.of(uid(1))} == {SERIES, "1.2.4"}
        state.answer(uid(1), state.instances[key(1)], STORED)
        assert [x.key for x in state.missing()] == [other.key]
        assert not state.listed_elsewhere("1.2.4", uid(1))

    def test_one_that_moves_between_series_changes_the_list(self) -> None:
        state = listed(1)
        assert state.listed_elsewhere("1.2.4", uid(1))
        moved = Listing(series={"1.2.4": SeriesInfo("1.2.4")})
        other = Instance(STUDY, "1.2.4", uid(1), CT)
        moved.instances[other.key] = other
        assert state.take_list(moved) is True
        (gone,) = state.gone_unheld()
        state.not_received(gone, "not_sent", "")
        state.answer(uid(1), state.instances[other.key], STORED)
        state.confirm(Confirmation(state.instances[other.key]))
        state.conclude()
        assert {x.key: x.state for x in state.rows()} == {key(1): "withdrawn", other.key: "stored"}

    def test_what_was_taken_and_never_confirmed_does_not_count(self) -> None:
        state = listed(1, 2)
        for number in (1, 2):
            state.answer(uid(number), state.instances[key(number)], STORED)
        state.confirm(Confirmation(state.instances[key(1)]))
        state.conclude()
        state.conclude()
        assert [(x.state, x.reason) for x in state.rows()] == [("stored", None), ("failed", "cancelled")]

    def test_an_object_that_names_another_series_leaves_its_instance_missing(self) -> None:
        state = listed(1)
        state.answer(uid(1), None, Taken(0xA900, "uid_mismatch", "Its data set names series 1.2.4."))
        one = state.instances[key(1)]
        assert (one.state, one.reason) == ("missing", "uid_mismatch")
        assert "1.2.4" in str(one.error)

    def test_a_conflict_that_is_found_later_is_that_of_the_row(self) -> None:
        """Also where it was sent again, and the first one's row says that it is held."""
        state = listed(1)
        state.inventory = {key(1): held(1)}
        list(state.adopt_inventory())
        again = Instance(STUDY, SERIES, uid(1))
        state.answer(uid(1), again, STORED)
        state.confirm(Confirmation(again, NOT_KEPT, "different_content"))
        assert state.instances[key(1)].state == "conflict"

    @pytest.mark.parametrize("remark", [None, "replaced"])
    def test_a_second_one_that_could_not_be_confirmed_is_asked_for_again(self, remark: str | None) -> None:
        """It was not compared with what is held, or took its place and was not synced."""
        state = listed(1)
        state.inventory = {key(1): held(1)}
        list(state.adopt_inventory())
        again = Instance(STUDY, SERIES, uid(1))
        state.answer(uid(1), again, STORED._replace(remark=remark))
        answered = state.confirm(Confirmation(again, NOT_KEPT))
        assert answered is not None
        assert NOT_KEPT in str(answered.error)
        one = state.instances[key(1)]
        assert (one.state, one.reason) == ("failed", "destination_error")
        assert state.missing() == [one]

    def test_one_that_took_the_place_of_another_is_stored_with_a_remark(self) -> None:
        state = listed(1)
        state.inventory = {key(1): held(1)}
        list(state.adopt_inventory())
        new = Instance(STUDY, SERIES, uid(1), CT)
        new.bytes = 77
        state.answer(uid(1), new, STORED._replace(remark="replaced"))
        one = state.instances[key(1)]
        assert (one.state, one.reason, one.bytes) == ("stored", "replaced", 77)

    def test_a_full_destination_ends_the_run(self) -> None:
        state = listed(1)
        assert state.answer(uid(1), state.instances[key(1)], FULL).stop == "destination_full"

    def test_a_destination_that_fails_again_and_again_ends_the_run(self) -> None:
        state = listed(*range(MOST_REFUSED + 1))
        stops = [state.answer(x.sop, x, BROKEN).stop for x in list(state.instances.values())[:MOST_REFUSED]]
        assert stops == [None] * (MOST_REFUSED - 1) + ["destination_error"]

    def test_one_that_was_taken_between_begins_the_count_again(self) -> None:
        state = listed(*range(2 * MOST_REFUSED))
        records = list(state.instances.values())
        for x in records[: MOST_REFUSED - 1]:
            state.answer(x.sop, x, BROKEN)
        state.answer(records[-1].sop, records[-1], STORED)
        assert state.answer(records[MOST_REFUSED].sop, records[MOST_REFUSED], BROKEN).stop is None

    @pytest.mark.parametrize(("strict", "stop"), [(False, None), (True, "strict_forward")])
    def test_strict_forward_ends_at_the_first_refusal_of_the_node(self, strict: bool, stop: str | None) -> None:
        state = listed(1, strict=strict)
        one = state.instances[key(1)]
        one.forward_status = "error"
        assert state.answer(uid(1), one, Taken(0x0122, "destination_refused", "Refused.")).stop == stop


class TestGone:
    """What left the list before it was held."""

    def leave(self, state: StudyState, number: int, *left: int) -> Instance:
        one = state.instances[key(number)]
        state.take_list(listing(*left))
        state.gone_unheld()
        state.take_list(listing(*left))
        return one

    @pytest.mark.parametrize("reason", sorted(DID_NOT_COME))
    def test_is_withdrawn_where_a_request_has_ended_without_it(self, reason: str) -> None:
        state = listed(1, 2)
        one = self.leave(state, 2, 1)
        state.not_received(one, reason, "")
        state.conclude()
        assert (one.state, one.reason) == ("withdrawn", "gone_from_list")

    @pytest.mark.parametrize("reason", ["association_lost", "deadline", "class_refused"])
    def test_is_missing_where_none_has_ended(self, reason: str) -> None:
        state = listed(1, 2)
        one = self.leave(state, 2, 1)
        state.not_received(one, reason, "")
        state.conclude()
        assert (one.state, one.reason) == ("missing", reason)

    def test_is_missing_where_it_was_not_asked_for_any_more(self) -> None:
        state = listed(1, 2)
        state.not_received(state.instances[key(2)], "not_sent", "")
        one = self.leave(state, 2, 1)
        state.conclude()
        assert (one.state, one.reason) == ("missing", "not_sent")
        assert state.rounds == 1

    def test_is_asked_for_also_where_it_was_refused_before(self) -> None:
        state = listed(1, 2)
        one = state.instances[key(2)]
        state.answer(one.sop, one, BROKEN)
        assert state.refused_here(one)
        self.leave(state, 2, 1)
        assert not state.refused_here(one)

    def test_stays_failed_where_it_came_and_could_not_be_kept(self) -> None:
        state = listed(1, 2)
        one = self.leave(state, 2, 1)
        state.answer(one.sop, one, BROKEN)
        state.conclude()
        assert (one.state, one.reason) == ("failed", "destination_error")

    def test_stays_a_conflict(self) -> None:
        state = listed(1, 2)
        one = state.instances[key(2)]
        one.bytes, one.sha256 = 100, b"1" * 32
        state.answer(one.sop, one, OTHER)
        assert one.dataset_bytes is None, "what came is not what is there"
        self.leave(state, 2, 1)
        state.conclude()
        assert one.state == "conflict"


class TestOtherSyntax:
    def test_is_a_remark_of_what_is_held(self) -> None:
        state = listed(1)
        one = state.instances[key(1)]
        state.answer(one.sop, one, STORED)
        state.sent_in_other_syntax(one.key)
        assert (one.state, one.reason, one.remarked) == ("stored", "other_transfer_syntax", True)

    def test_is_one_of_what_is_on_its_way(self) -> None:
        state = listed(1)
        one = state.instances[key(1)]
        state.sent_in_other_syntax(one.key)
        state.answer(one.sop, one, STORED)
        assert (one.state, one.reason) == ("stored", "other_transfer_syntax")


class TestConfirmations:
    def test_one_that_comes_before_the_answer_is_noted_counts_all_the_same(self) -> None:
        state = listed(1)
        one = state.instances[key(1)]
        assert state.confirm(Confirmation(one)) is None
        state.answer(one.sop, one, STORED)
        state.conclude()
        assert one.state == "stored"

    def test_a_failure_that_comes_before_the_answer_is_noted_is_one(self) -> None:
        state = listed(1)
        one = state.instances[key(1)]
        assert state.confirm(Confirmation(one, NOT_KEPT)) is None
        answered = state.answer(one.sop, one, STORED)
        assert answered.error is not None
        assert NOT_KEPT in answered.error
        state.conclude()
        assert one.state == "failed"

    def test_a_late_answer_may_come_before_it_is_known_to_be_late(self) -> None:
        state = listed(1)
        one = state.instances[key(1)]
        assert state.confirm(Confirmation(one)) is None
        assert state.left_to_destination(one) is not None
        assert one.state == "forwarded"

    def test_a_confirmation_changes_nothing_of_what_was_taken(self) -> None:
        state = listed(1)
        one = state.instances[key(1)]
        state.answer(uid(1), one, STORED)
        assert state.confirm(Confirmation(one)) is None
        assert one.state == "stored"

    def test_one_that_cannot_be_confirmed_is_missing_again(self) -> None:
        state = listed(1)
        one = state.instances[key(1)]
        state.answer(uid(1), one, STORED)
        answered = state.confirm(Confirmation(one, NOT_KEPT))
        assert answered is not None
        assert (one.state, one.reason) == ("failed", "destination_error")
        assert NOT_KEPT in str(one.error)
        assert state.missing() == [one]

    def test_a_conflict_found_late_is_one(self) -> None:
        state = listed(1)
        one = state.instances[key(1)]
        state.answer(uid(1), one, STORED)
        state.confirm(Confirmation(one, "Another data set.", "different_content"))
        assert (one.state, one.reason, one.error) == ("conflict", "different_content", "Another data set.")

    def test_a_conflict_stays_one_whatever_is_said_of_the_first_after_it(self) -> None:
        """Two associations: the answer to the second object may be told before that to the first."""
        for told in (
            lambda state, one: state.answer(one.sop, one, STORED),
            lambda state, one: state.confirm(Confirmation(one)),
            lambda state, one: state.confirm(Confirmation(one, NOT_KEPT)),
            lambda state, one: state.confirm(Confirmation(one, remark="replaced")),
            lambda state, one: (state.left_to_destination(one), state.confirm(Confirmation(one))),
        ):
            state = listed(1)
            one = state.instances[key(1)]
            state.answer(uid(1), Instance(STUDY, SERIES, uid(1)), OTHER)
            told(state, one)
            state.conclude()
            assert (one.state, one.reason, one.error) == ("conflict", "different_content", OTHER.error)

    @pytest.mark.parametrize(
        ("reason", "stops"), [("destination_error", 1), ("different_content", 0), ("cancelled", 0), ("deadline", 0)]
    )
    def test_only_failures_of_the_destination_end_the_run(self, reason: str, stops: int) -> None:
        state = listed(*range(MOST_REFUSED))
        for x in state.instances.values():
            state.answer(x.sop, x, STORED)
        found = [state.confirm(Confirmation(x, NOT_KEPT, reason)) for x in state.instances.values()]
        assert sum(x is not None and x.stop is not None for x in found) == stops

    def test_what_was_left_to_the_destination_is_taken_when_it_says_so(self) -> None:
        state = listed(1)
        one = state.instances[key(1)]
        state.left_to_destination(one)
        answered = state.confirm(Confirmation(one))
        assert answered is not None
        assert answered.new
        assert (one.state, state.progress) == ("forwarded", 1)
        assert state.confirm(Confirmation(one)) is None


@pytest.mark.parametrize(
    ("scope", "series", "sop", "expected"),
    [
        (Scope(STUDY), "1.2.9", "1.2.9.1", True),
        (Scope(STUDY, series=frozenset({SERIES})), SERIES, uid(9), True),
        (Scope(STUDY, series=frozenset({SERIES})), "1.2.9", uid(9), False),
        (Scope(STUDY, instances=frozenset({uid(1)})), "1.2.9", uid(1), True),
        (Scope(STUDY, instances=frozenset({uid(1)})), SERIES, uid(2), False),
        (Scope(STUDY, filters=(Filter(0x00080060, "Modality", "CS", "CT", "SERIES"),)), SERIES, uid(9), True),
        (Scope(STUDY, filters=(Filter(0x00080060, "Modality", "CS", "CT", "SERIES"),)), "1.2.9", uid(9), False),
    ],
)
def test_what_an_unlisted_instance_may_be(scope: Scope, series: str, sop: str, expected: bool) -> None:
    state = StudyState(scope)
    state.take_list(listing(1))
    assert state.in_scope(series, sop) is expected


class TestNamed:
    """What a manifest lists, and the source does not."""

    def concluded(
        self, *numbers: int, holds: tuple[int, ...] = (), **facts: object
    ) -> dict[Key, tuple[object, object]]:
        scope = Scope(STUDY, series=frozenset({SERIES}), instances=frozenset(map(uid, (1, 2, 3))))
        scope.named = frozenset(map(key, (1, 2, 3)))
        state = StudyState(scope, rounds=1, **facts)  # type: ignore[arg-type]
        state.inventory = {key(number): held(number) for number in holds}
        state.take_list(listing(*numbers))
        list(state.adopt_inventory())
        state.conclude()
        return {x.key: (x.state, x.reason) for x in state.rows()}

    def test_is_missing(self) -> None:
        gone = ("missing", "gone_from_list")
        assert self.concluded(1, 2, holds=(1, 2)) == {key(1): ("held", None), key(2): ("held", None), key(3): gone}
        assert self.concluded() == dict.fromkeys(map(key, (1, 2, 3)), gone)

    def test_unless_it_is_held(self) -> None:
        found = self.concluded(1, holds=(1, 2, 3, 4))
        assert found == dict.fromkeys(map(key, (1, 2, 3)), ("held", None))

    def test_which_left_the_list_before_it_came(self) -> None:
        state = StudyState(Scope(STUDY, instances=frozenset({uid(1)}), named=frozenset({key(1)})), rounds=1)
        state.take_list(listing(1))
        state.take_list(listing())
        state.conclude()
        assert [(x.state, x.reason) for x in state.rows()] == [("missing", "gone_from_list")]

    def test_of_a_class_that_the_list_tells_and_nobody_wants(self) -> None:
        assert self.concluded(1, 2, 3, sop_classes=("1.2.3",)) == {}
        assert set(self.concluded(1, sop_classes=("1.2.3",))) == {key(2), key(3)}


def test_as_many_series_as_instances_cost_no_more_than_one() -> None:
    """What comes is looked for by its UID, and not in each series that was ever seen."""
    state = listed(1)
    for number in range(30_000):
        state.add_unlisted(f"1.9.{number}", f"1.8.{number}", CT)
    began = time.process_time()
    for number in range(1000):
        assert not state.listed_elsewhere(f"1.7.{number}", f"1.6.{number}")
        assert [x.series for x in state.of(f"1.8.{number}")] == [f"1.9.{number}"]
    assert time.process_time() - began < 1
    assert state.listed_elsewhere("1.7", uid(1))


def test_one_uid_in_many_series_costs_no_more_than_in_a_hundred(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where an object comes that names none of them, and where one of them is left out."""
    state = StudyState(Scope(STUDY), rounds=1)
    for number in range(1000):
        state.add_unlisted(f"1.9.{number}", uid(1), CT)
    touched: Counter[str] = Counter()
    index, refuse = StudyState._index, StudyState._refuse
    monkeypatch.setattr(StudyState, "_index", lambda *given: (touched.update(["index"]), index(*given)))
    monkeypatch.setattr(StudyState, "_refuse", lambda *given: (touched.update(["refuse"]), refuse(*given)))
    for number in range(1000):
        assert not state.listed_elsewhere("1.7", uid(1))
        answered = state.answer(uid(1), None, Taken(0xC000, "unparsable", "It cannot be read."))
        assert answered.record in state.instances.values()
        assert state.of(uid(1))[0] is answered.record
        state.leave_out((f"1.9.{number}", uid(1)), CT)
        assert touched["index"] <= 1
        assert touched["refuse"] == min(100, 1000 - number)
        touched.clear()
    assert (state.of(uid(1)), state.instances) == ([], {})
