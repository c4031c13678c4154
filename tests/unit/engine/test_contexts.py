"""Which contexts are proposed: every pair once, never more than there is room for."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from airflow_dicom_get.dicom.syntaxes import EXPLICIT_LE, IMPLICIT_LE, all_storage_classes, candidates
from airflow_dicom_get.engine.contexts import ROOM, PeerKnowledge, likely_classes, other_classes, pack, pairs_of
from airflow_dicom_get.net.acse import Accepted, Proposal, encode_request
from airflow_dicom_get.records import Instance

CT, MR = "1.2.840.10008.5.1.4.1.1.2", "1.2.840.10008.5.1.4.1.1.4"
JPEG, RLE = "1.2.840.10008.1.2.4.50", "1.2.840.10008.1.2.5"

PAIRS = st.dictionaries(
    st.integers(1, 40).map(lambda n: f"1.2.{n}"),
    st.lists(st.integers(1, 300).map(lambda n: f"1.9.{n}"), unique=True, max_size=300),
    max_size=12,
)


@given(PAIRS, st.integers(1, ROOM))
def test_every_pair_is_packed_once(pairs: dict[str, list[str]], room: int) -> None:
    bins = pack(pairs, room)
    packed = Counter((p.abstract_syntax, p.transfer_syntax) for proposals in bins for p in proposals)
    assert packed == Counter((sop_class, syntax) for sop_class, found in pairs.items() for syntax in found)
    assert all(0 < len(proposals) <= room for proposals in bins)
    # A class that fits into one association is not torn apart.
    for sop_class, found in pairs.items():
        if len(found) <= room:
            assert sum(any(p.abstract_syntax == sop_class for p in proposals) for proposals in bins) <= 1


def test_all_that_there_is_takes_several_associations() -> None:
    bins = pack({uid: candidates(uid) for uid in all_storage_classes()})
    assert max(map(len, bins)) <= ROOM
    assert sum(map(len, bins)) == sum(len(candidates(uid)) for uid in all_storage_classes())
    # With the C-GET's own context they fit into an A-ASSOCIATE-RQ.
    encode_request("A", "B", [Proposal("1.2", IMPLICIT_LE), *max(bins, key=len)], max_pdu_length=131072)


def accepted(proposals: Sequence[Proposal], taken: set[int]) -> Accepted:
    out = Accepted()
    out.contexts = {2 * index + 1: proposals[index] for index in taken}
    return out


def learnt(*pairs: tuple[str, str, bool], transfer_syntaxes: Sequence[str] | None = None) -> PeerKnowledge:
    peer = PeerKnowledge(transfer_syntaxes)
    proposals = [Proposal(sop_class, syntax) for sop_class, syntax, _ in pairs]
    peer.learn(accepted(proposals, {n for n, (_, _, taken) in enumerate(pairs) if taken}), proposals)
    return peer


def test_at_first_all_of_the_family_is_proposed() -> None:
    assert PeerKnowledge().syntaxes(CT) == candidates(CT)


def test_only_what_is_listed_where_the_source_lists_it() -> None:
    assert PeerKnowledge().syntaxes(CT, [RLE, EXPLICIT_LE, RLE]) == (RLE, EXPLICIT_LE)


def test_what_the_source_refused_for_a_class_is_not_proposed_for_it_again() -> None:
    peer = learnt((CT, RLE, False), (MR, RLE, True), (CT, EXPLICIT_LE, True))
    assert RLE not in peer.syntaxes(CT)
    assert RLE in peer.syntaxes(MR)


def test_what_it_refused_for_every_class_is_proposed_for_none() -> None:
    peer = learnt((CT, RLE, False), (CT, EXPLICIT_LE, True))
    assert RLE not in peer.syntaxes(MR)
    assert EXPLICIT_LE in peer.syntaxes(MR)


def test_no_more_than_the_user_allows() -> None:
    assert PeerKnowledge([IMPLICIT_LE, RLE]).syntaxes(CT) == (IMPLICIT_LE, RLE)
    assert PeerKnowledge([IMPLICIT_LE]).syntaxes(CT, [RLE]) == ()


def test_a_class_is_refused_when_all_of_it_was() -> None:
    peer = learnt((CT, RLE, False), (CT, EXPLICIT_LE, True), (MR, RLE, False))
    assert (peer.refuses_class(MR), peer.refuses_class(CT), peer.refuses_class("1.2.3")) == (True, False, False)
    assert peer.accepts(CT, EXPLICIT_LE)
    assert not peer.accepts(CT, RLE)


def instance(sop_class: str, listed: str | None = None) -> Instance:
    made = Instance("1", "2", "3", sop_class)
    made.listed_syntax = listed
    return made


@pytest.mark.parametrize(
    ("instances", "expected"),
    [
        ([instance(CT, RLE), instance(CT, JPEG), instance(CT, RLE)], {CT: (RLE, JPEG)}),
        ([instance(CT, RLE), instance(CT)], {CT: candidates(CT)}),
        ([instance(CT, RLE), instance(MR)], {CT: (RLE,), MR: candidates(MR)}),
        ([], {}),
    ],
)
def test_pairs_of_instances(instances: list[Instance], expected: dict[str, tuple[str, ...]]) -> None:
    assert pairs_of(instances, PeerKnowledge()) == expected


def test_guesses_for_an_unknown_class() -> None:
    assert likely_classes("CT", [MR]) == (MR,)
    assert likely_classes("CT", [])[0] == CT
    assert likely_classes(None, []) == ()
    assert CT not in other_classes([CT])
    assert len(other_classes([CT])) == len(all_storage_classes()) - 1
