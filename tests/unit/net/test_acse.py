"""A-ASSOCIATE PDUs, held against pynetdicom's."""

from __future__ import annotations

import struct
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pynetdicom import pdu
from pynetdicom.pdu_primitives import (
    A_ASSOCIATE,
    ImplementationClassUIDNotification,
    ImplementationVersionNameNotification,
    MaximumLengthNotification,
    SCP_SCU_RoleSelectionNegotiation,
    UserIdentityNegotiation,
)
from pynetdicom.presentation import PresentationContext

from airflow_dicom_get.config.groups import UserIdentity
from airflow_dicom_get.dicom.part10 import IMPLEMENTATION_CLASS_UID, IMPLEMENTATION_VERSION
from airflow_dicom_get.errors import PeerProtocolError
from airflow_dicom_get.net.acse import MAX_CONTEXTS, Proposal, decode_accept, encode_request

IMPLICIT, EXPLICIT, JPEG = "1.2.840.10008.1.2", "1.2.840.10008.1.2.1", "1.2.840.10008.1.2.4.50"
CT, MR, FIND = "1.2.840.10008.5.1.4.1.1.2", "1.2.840.10008.5.1.4.1.1.4", "1.2.840.10008.5.1.4.1.2.2.1"
PROPOSALS = [Proposal(FIND, IMPLICIT), Proposal(CT, EXPLICIT), Proposal(CT, JPEG), Proposal(MR, EXPLICIT)]

titles = st.text("ABCXYZ0189_- ", min_size=1, max_size=16).filter(lambda text: text.strip() == text)
uids = st.lists(st.integers(0, 10**9), min_size=2, max_size=6).map(lambda parts: "1.2." + ".".join(map(str, parts)))
proposals = st.lists(st.builds(Proposal, uids, st.sampled_from([IMPLICIT, EXPLICIT, JPEG])), min_size=1, max_size=8)
identities = st.one_of(
    st.none(),
    st.builds(UserIdentity, username=titles),
    st.builds(UserIdentity, username=titles, password=titles),
    st.builds(UserIdentity, token=titles, token_type=st.sampled_from(["kerberos", "saml", "jwt"])),
)


def context_of(number: int, proposal: Proposal, result: int | None = None) -> PresentationContext:
    context = PresentationContext()
    context.context_id, context.abstract_syntax = number, proposal.abstract_syntax
    context.transfer_syntax = [proposal.transfer_syntax]
    if result is not None:
        context.result = result
    return context


def users(maximum: int, roles: dict[str, tuple[bool, bool]], identity: UserIdentity | None = None) -> list[Any]:
    length, class_uid = MaximumLengthNotification(), ImplementationClassUIDNotification()
    version = ImplementationVersionNameNotification()
    length.maximum_length_received = maximum
    class_uid.implementation_class_uid = IMPLEMENTATION_CLASS_UID
    version.implementation_version_name = IMPLEMENTATION_VERSION
    items: list[Any] = [length, class_uid, version]
    for uid, (scu, scp) in roles.items():
        role = SCP_SCU_RoleSelectionNegotiation()
        role.sop_class_uid, role.scu_role, role.scp_role = uid, scu, scp
        items.append(role)
    if identity is not None:
        item = UserIdentityNegotiation()
        item.user_identity_type, item.positive_response_requested = identity.identity_type, False
        item.primary_field = identity.primary_field
        if identity.secondary_field:
            item.secondary_field = identity.secondary_field
        items.append(item)
    return items


@given(titles, titles, proposals, st.lists(uids, max_size=4), st.integers(0, 2**32 - 1), identities)
def test_a_request_is_the_one_that_pynetdicom_makes(calling, called, wanted, classes, maximum, identity):
    primitive = A_ASSOCIATE()
    primitive.application_context_name = "1.2.840.10008.3.1.1.1"
    primitive.calling_ae_title, primitive.called_ae_title = calling, called
    primitive.presentation_context_definition_list = [context_of(2 * i + 1, p) for i, p in enumerate(wanted)]
    primitive.user_information = users(maximum, dict.fromkeys(classes, (False, True)), identity)
    theirs = pdu.A_ASSOCIATE_RQ()
    theirs.from_primitive(primitive)
    ours = encode_request(
        calling, called, wanted, storage_classes=classes, max_pdu_length=maximum, user_identity=identity
    )
    assert ours == theirs.encode()


@pytest.mark.parametrize("number", [0, MAX_CONTEXTS + 1])
def test_so_many_contexts_cannot_be_proposed(number):
    with pytest.raises(ValueError, match="presentation contexts"):
        encode_request("A", "B", [Proposal(CT, IMPLICIT)] * number, max_pdu_length=0)


def accept(
    results: dict[int, tuple[Proposal, int]], roles: dict[str, tuple[bool, bool]] | None = None, maximum: int = 16384
) -> bytes:
    """An A-ASSOCIATE-AC as pynetdicom writes it."""
    primitive = A_ASSOCIATE()
    primitive.application_context_name = "1.2.840.10008.3.1.1.1"
    primitive.calling_ae_title, primitive.called_ae_title = "US", "THEM"
    primitive.result, primitive.result_source = 0, 1
    contexts = [context_of(number, proposal, result) for number, (proposal, result) in results.items()]
    primitive.presentation_context_definition_results_list = contexts
    primitive.user_information = users(maximum, roles or {})
    answer = pdu.A_ASSOCIATE_AC()
    answer.from_primitive(primitive)
    return answer.encode()


def with_user_item(data: bytes, item: bytes) -> bytes:
    """The PDU with something behind its user items, which are its last item."""
    at = data.rindex(b"\x50\x00" + struct.pack(">H", len(users_of(data))))
    body = users_of(data) + item
    data = data[:at] + b"\x50\x00" + struct.pack(">H", len(body)) + body
    return data[:2] + struct.pack(">I", len(data) - 6) + data[6:]


def users_of(data: bytes) -> bytes:
    at = 74
    while data[at] != 0x50:
        at += 4 + int.from_bytes(data[at + 2 : at + 4], "big")
    return data[at + 4 :]


def test_what_is_accepted_is_read():
    results = {1: (PROPOSALS[0], 0), 3: (PROPOSALS[1], 0), 5: (PROPOSALS[2], 4), 7: (PROPOSALS[3], 0)}
    out = decode_accept(accept(results, {CT: (False, True), MR: (True, False)}, 131072), PROPOSALS)
    assert out.contexts == {1: PROPOSALS[0], 3: PROPOSALS[1], 7: PROPOSALS[3]}
    assert out.results == {1: 0, 3: 0, 5: 4, 7: 0}
    assert (out.answered_roles, out.refused_roles) == ({CT, MR}, {MR})
    assert (out.max_pdu_length, out.implementation, out.remarks) == (131072, IMPLEMENTATION_VERSION, [])


def test_what_was_not_proposed_is_not_accepted():
    results = {1: (PROPOSALS[0], 0), 3: (Proposal(CT, JPEG), 0), 9: (Proposal(MR, IMPLICIT), 0)}
    out = decode_accept(accept(results), PROPOSALS)
    assert out.contexts == {1: PROPOSALS[0]}
    assert [remark.split(" was ")[0] for remark in out.remarks] == ["context 3", "context 9"]


@pytest.mark.parametrize(
    "item",
    [
        b"\x56\x00\x00\x04ABCD",
        b"\x59\x00\x00\x02\x00\x00",
        b"\xff\x00\xff\xff and no more",
        b"\x55\x00\x00\x03\xc3\x28\x1b",
        b"\x52\x00\x00\x00",
        b"\x00",
    ],
)
def test_items_that_say_nothing_to_us_break_nothing(item):
    out = decode_accept(with_user_item(accept({1: (PROPOSALS[0], 0)}), item), PROPOSALS)
    assert out.contexts == {1: PROPOSALS[0]}
    assert out.implementation.isprintable()


@pytest.mark.parametrize("item", [b"\x51\x00\x00\x02\x00\x00", b"\x54\x00\x00\x04\x00\x20ab", b"\x51\x00\x00\x04\x00"])
def test_items_that_count_have_to_be_whole(item):
    with pytest.raises(PeerProtocolError, match="cannot be decoded"):
        decode_accept(with_user_item(accept({1: (PROPOSALS[0], 0)}), item), PROPOSALS)


@given(st.data())
def test_whatever_comes_is_read_or_refused(data):
    whole = bytearray(accept({1: (PROPOSALS[0], 0), 3: (PROPOSALS[1], 0)}, {CT: (False, True)}))
    for _ in range(data.draw(st.integers(1, 4))):
        whole[data.draw(st.integers(6, len(whole) - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(6, len(whole)))
    try:
        out = decode_accept(bytes(whole[:cut]), PROPOSALS)
    except PeerProtocolError:
        return
    assert set(out.contexts.values()) <= set(PROPOSALS)
    assert out.contexts.keys() <= out.results.keys()
