"""What is asked for, and how: a function of the state of a study, the peer and the options alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest

from airflow_dicom_get.config.options import GetOptions
from airflow_dicom_get.engine.contexts import PeerKnowledge
from airflow_dicom_get.engine.listing import Listing, SeriesInfo
from airflow_dicom_get.engine.requests import MAX_LIST, Request, lists_of
from airflow_dicom_get.engine.resolve import Scope
from airflow_dicom_get.engine.state import StudyState
from airflow_dicom_get.engine.strategies import STRATEGIES, Passes, Situation
from airflow_dicom_get.net.acse import Accepted, Proposal
from airflow_dicom_get.records import Instance

STUDY = "1.2"
CT, MR, UNKNOWN = "1.2.840.10008.5.1.4.1.1.2", "1.2.840.10008.5.1.4.1.1.4", None
EXPLICIT_LE, JPEG = "1.2.840.10008.1.2.1", "1.2.840.10008.1.2.4.50"
BY_NAME = dict(STRATEGIES)


def situation(
    series: dict[str, int], sop_class: str | None = CT, scope: Scope | None = None, **options: object
) -> Situation:
    """A study with so many instances in each series, none of which is held."""
    state = StudyState(scope or Scope(STUDY), sop_classes=options.get("sop_classes"))  # type: ignore[arg-type]
    found = Listing()
    for name, count in series.items():
        found.series[name] = SeriesInfo(name, "CT", None, count, count, count)
        for number in range(count):
            one = Instance(STUDY, name, f"{name}.{number}", sop_class)
            one.modality = "CT"
            found.instances[one.key] = one
    state.take_list(found)
    return Situation(state, PeerKnowledge(), GetOptions.check({"addr": "PACS@localhost:104", **options}))


def run(name: str, at: Situation) -> list[tuple[list[Proposal], list[Request]]]:
    strategy: Callable[[Situation, Sequence[Instance]], Passes] = next(f for n, f in STRATEGIES if n == name)
    return list(strategy(at, at.state.missing()))


def shape(passes: list[tuple[list[Proposal], list[Request]]]) -> list[tuple[str, str | None, int]]:
    return [(r.level, r.series, len(r.targets)) for _, requests in passes for r in requests]


PLANNED, LADDER, EVERY, SINGLY, SERIES, WHOLE = (name for name, _ in STRATEGIES)


class TestAsPlanned:
    def test_whole_series_are_asked_for_as_series(self) -> None:
        at = situation({"1.2.3": 40, "1.2.4": 2})
        assert shape(run(PLANNED, at)) == [("SERIES", "1.2.3", 40), ("SERIES", "1.2.4", 2)]

    def test_a_part_of_a_series_is_asked_for_by_uids(self) -> None:
        at = situation({"1.2.3": 40})
        at.state.instances["1.2.3", "1.2.3.0"].state = "held"
        assert shape(run(PLANNED, at)) == [("IMAGE", "1.2.3", 39)]

    def test_lists_are_cut(self) -> None:
        at = situation({"1.2.3": 2 * MAX_LIST + 1})
        at.state.instances["1.2.3", "1.2.3.0"].state = "held"
        assert shape(run(PLANNED, at)) == [("IMAGE", "1.2.3", MAX_LIST)] * 2

    def test_a_source_that_takes_no_lists_is_asked_one_by_one(self) -> None:
        at = situation({"1.2.3": 4})
        at.state.instances["1.2.3", "1.2.3.0"].state = "held"
        at.peer.takes_lists = False
        assert shape(run(PLANNED, at)) == [("IMAGE", "1.2.3", 1)] * 3

    @pytest.mark.parametrize(
        "scope",
        [Scope(STUDY, instances=frozenset({"1.2.3.0", "1.2.3.1"}))],
    )
    def test_a_scope_of_instances_never_asks_for_a_series(self, scope: Scope) -> None:
        assert shape(run(PLANNED, situation({"1.2.3": 2}, scope=scope))) == [("IMAGE", "1.2.3", 2)]

    def test_a_choice_of_classes_never_asks_for_a_series(self) -> None:
        assert shape(run(PLANNED, situation({"1.2.3": 2}, sop_classes=[CT]))) == [("IMAGE", "1.2.3", 2)]

    def test_several_associations_share_a_large_series(self) -> None:
        at = situation({"1.2.3": 200}, associations=2, max_associations=2)
        assert shape(run(PLANNED, at)) == [("IMAGE", "1.2.3", 200)]

    def test_a_listed_syntax_is_the_only_one_proposed(self) -> None:
        at = situation({"1.2.3": 2})
        for one in at.state.instances.values():
            one.listed_syntax = JPEG
        ((proposals, _),) = run(PLANNED, at)
        assert proposals == [Proposal(CT, JPEG)]

    def test_each_context_has_one_syntax_and_explicit_little_endian_comes_first(self) -> None:
        ((proposals, _),) = run(PLANNED, situation({"1.2.3": 2}))
        assert proposals[0] == Proposal(CT, EXPLICIT_LE)
        assert len(set(proposals)) == len(proposals) > 5

    def test_unknown_classes_are_those_of_the_modality(self) -> None:
        passes = run(PLANNED, situation({"1.2.3": 2}, sop_class=UNKNOWN))
        assert CT in {p.abstract_syntax for proposals, _ in passes for p in proposals}
        assert MR not in {p.abstract_syntax for proposals, _ in passes for p in proposals}


def refuse(at: Situation, *proposals: Proposal, accepted: Sequence[Proposal] = ()) -> None:
    """Let the peer have accepted some proposals and refused the others."""
    every = [Proposal("1.2.840.10008.5.1.4.1.2.2.3", "1.2.840.10008.1.2"), *accepted, *proposals]
    contexts = {2 * n + 1: p for n, p in enumerate(every[: 1 + len(accepted)])}
    at.peer.learn(Accepted(contexts=contexts, max_pdu_length=0, implementation="", refused_roles=set()), every)


class TestFallBacks:
    def test_the_ladder_asks_in_one_accepted_compressed_syntax_at_a_time(self) -> None:
        at = situation({"1.2.3": 2})
        refuse(at, accepted=[Proposal(CT, EXPLICIT_LE), Proposal(CT, JPEG)])
        assert [proposals for proposals, _ in run(LADDER, at)] == [[Proposal(CT, JPEG)]]

    def test_the_ladder_passes_over_what_has_a_listed_syntax(self) -> None:
        at = situation({"1.2.3": 1})
        refuse(at, accepted=[Proposal(CT, JPEG)])
        at.state.instances["1.2.3", "1.2.3.0"].listed_syntax = JPEG
        assert shape(run(LADDER, at)) == []

    def test_every_class_is_for_unknown_ones_and_tries_none_twice(self) -> None:
        assert run(EVERY, situation({"1.2.3": 1})) == []
        at = situation({"1.2.3": 1}, sop_class=UNKNOWN)
        at.state.tried_classes["1.2.3"].add(CT)
        tried = [p.abstract_syntax for proposals, _ in run(EVERY, at) for p in proposals]
        assert CT not in tried
        assert MR in tried

    def test_every_class_asks_in_one_that_was_tried_for_another_series_alone(self) -> None:
        at = situation({"1.2.3": 1, "1.2.4": 1}, sop_class=UNKNOWN)
        at.state.tried_classes["1.2.3"].add(CT)
        at.state.tried_classes["1.2.4"].add(MR)
        assert {CT, MR} <= {p.abstract_syntax for proposals, _ in run(EVERY, at) for p in proposals}

    def test_single_ones_are_asked_for_alone(self) -> None:
        assert shape(run(SINGLY, situation({"1.2.3": 3}))) == [("IMAGE", "1.2.3", 1)] * 3

    @pytest.mark.parametrize("reason", ["class_refused", "refused_by_source"])
    def test_what_the_source_refused_is_not_asked_for_alone(self, reason: str) -> None:
        at = situation({"1.2.3": 1})
        at.state.not_received(at.state.instances["1.2.3", "1.2.3.0"], reason, "It refuses.")
        assert shape(run(SINGLY, at)) == []

    def test_many_are_not_asked_for_alone(self) -> None:
        assert shape(run(SINGLY, situation({"1.2.3": 201}))) == []

    def test_a_series_of_which_nothing_came_is_asked_for_whole(self) -> None:
        at = situation({"1.2.3": 2, "1.2.4": 2})
        at.state.instances["1.2.3", "1.2.3.0"].state = "stored"
        assert shape(run(SERIES, at)) == [("SERIES", "1.2.4", 2)]

    def test_a_study_of_which_nothing_came_is_asked_for_whole(self) -> None:
        at = situation({"1.2.3": 2, "1.2.4": 2})
        assert shape(run(WHOLE, at)) == [("STUDY", None, 4)]
        at.state.instances["1.2.3", "1.2.3.0"].state = "stored"
        assert shape(run(WHOLE, at)) == []

    def test_a_part_of_a_study_is_never_asked_for_as_the_study(self) -> None:
        at = situation({"1.2.3": 2}, scope=Scope(STUDY, series=frozenset({"1.2.3"})))
        assert shape(run(WHOLE, at)) == []


class TestRequests:
    def test_keys_are_the_level_and_its_unique_keys_and_never_empty(self) -> None:
        targets = [Instance(STUDY, "1.2.3", "1.2.3.1"), Instance(STUDY, "1.2.3", "1.2.3.2")]
        (image,) = lists_of(targets)
        assert image.keys(Scope(STUDY), "StudyRoot") == {
            0x00080052: "IMAGE",
            0x0020000D: STUDY,
            0x0020000E: "1.2.3",
            0x00080018: ["1.2.3.1", "1.2.3.2"],
        }
        assert Request("STUDY", None).keys(Scope(STUDY), "StudyRoot") == {0x00080052: "STUDY", 0x0020000D: STUDY}

    def test_patient_root_carries_the_patient_id_as_it_was_listed(self) -> None:
        scope = Scope(STUDY, patient_id=b"M\xfcller", character_set=b"ISO_IR 100")
        keys = Request("STUDY", None).keys(scope, "PatientRoot")
        assert (keys[0x00100020], keys[0x00080005]) == (b"M\xfcller", b"ISO_IR 100")
        assert 0x00080005 not in Request("STUDY", None).keys(Scope(STUDY, patient_id=b"P1"), "PatientRoot")

    def test_lists_are_by_series(self) -> None:
        targets = [Instance(STUDY, f"1.2.{3 + n % 2}", f"1.2.9.{n}") for n in range(5)]
        assert [(r.series, len(r.targets)) for r in lists_of(targets, 2)] == [("1.2.3", 2), ("1.2.3", 1), ("1.2.4", 2)]
