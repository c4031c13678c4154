"""A-ASSOCIATE PDUs (PS3.8 9.3.2, 9.3.3), coded by pynetdicom, checked by us."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from pynetdicom import pdu
from pynetdicom.pdu_items import (
    MaximumLengthSubItem,
    PresentationContextItemAC,
    SCP_SCU_RoleSelectionSubItem,
    UserInformationItem,
)
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
from airflow_dicom_get.errors import PeerProtocolError, peer_text

MAX_CONTEXTS = 128
_APPLICATION_CONTEXT = "1.2.840.10008.3.1.1.1"
_FIXED = 74  # bytes of the PDU before its items
_USER_INFORMATION, _VERSION_NAME = 0x50, 0x55
_USER_ITEMS = frozenset({0x51, 0x54})  # maximum length, role selection


class Proposal(NamedTuple):
    """A presentation context to propose: one abstract syntax, one transfer syntax."""

    abstract_syntax: str
    transfer_syntax: str


@dataclass(slots=True)
class Accepted:
    """What an A-ASSOCIATE-AC says."""

    contexts: dict[int, Proposal] = field(default_factory=dict)
    """Accepted contexts by id, as proposed."""
    results: dict[int, int] = field(default_factory=dict)
    """Result of every context by id (PS3.8 table 9-18)."""
    refused_roles: set[str] = field(default_factory=set)
    """SOP classes whose SCP role the peer refused outright (PS3.7 D.3.3.4)."""
    answered_roles: set[str] = field(default_factory=set)
    max_pdu_length: int = 16384
    implementation: str = ""
    remarks: list[str] = field(default_factory=list)


def encode_request(
    calling: str,
    called: str,
    proposals: Sequence[Proposal],
    *,
    storage_classes: Sequence[str] = (),
    max_pdu_length: int,
    user_identity: UserIdentity | None = None,
) -> bytes:
    """Encode an A-ASSOCIATE-RQ; context ``i`` of ``proposals`` gets id ``2 i + 1``.

    ``storage_classes`` are proposed with role SCP only (scu 0, scp 1): one peer negotiates the
    transfer syntaxes of its receiving side when both roles are proposed.
    """
    if not 0 < len(proposals) <= MAX_CONTEXTS:
        raise ValueError(f"{len(proposals)} presentation contexts were given; 1 to {MAX_CONTEXTS} are possible")
    primitive = A_ASSOCIATE()
    primitive.application_context_name = _APPLICATION_CONTEXT
    primitive.calling_ae_title = calling
    primitive.called_ae_title = called
    contexts = []
    for index, proposal in enumerate(proposals):
        context = PresentationContext()
        context.context_id = 2 * index + 1
        context.abstract_syntax = proposal.abstract_syntax
        context.transfer_syntax = [proposal.transfer_syntax]
        contexts.append(context)
    primitive.presentation_context_definition_list = contexts
    length = MaximumLengthNotification()
    length.maximum_length_received = max_pdu_length
    class_uid = ImplementationClassUIDNotification()
    class_uid.implementation_class_uid = IMPLEMENTATION_CLASS_UID
    version = ImplementationVersionNameNotification()
    version.implementation_version_name = IMPLEMENTATION_VERSION
    items: list[object] = [length, class_uid, version]
    for sop_class in dict.fromkeys(storage_classes):
        role = SCP_SCU_RoleSelectionNegotiation()
        role.sop_class_uid = sop_class
        role.scu_role, role.scp_role = False, True
        items.append(role)
    if user_identity is not None:
        items.append(_identity(user_identity))
    primitive.user_information = items  # type: ignore[assignment]
    request = pdu.A_ASSOCIATE_RQ()
    request.from_primitive(primitive)
    return request.encode()


def _identity(identity: UserIdentity) -> UserIdentityNegotiation:
    item = UserIdentityNegotiation()
    item.user_identity_type = identity.identity_type
    item.positive_response_requested = False
    item.primary_field = identity.primary_field
    if identity.secondary_field:
        item.secondary_field = identity.secondary_field
    return item


def decode_accept(data: bytes, proposals: Sequence[Proposal]) -> Accepted:
    """Decode an A-ASSOCIATE-AC (``data`` is the whole PDU) against what was proposed.

    A context that was never proposed, or accepted in another transfer syntax, is not accepted; a
    remark says so.

    Raises
    ------
    PeerProtocolError
        The PDU cannot be decoded.
    """
    out = Accepted()
    accept = pdu.A_ASSOCIATE_AC()
    try:
        accept.decode(_plain(data, out))
        for item in accept.variable_items:
            if isinstance(item, PresentationContextItemAC):
                _take_context(out, item, proposals)
            elif isinstance(item, UserInformationItem):
                _take_user_information(out, item)
    except Exception as error:  # the decoder raises whatever the bytes make it raise
        raise PeerProtocolError(
            "The peer's A-ASSOCIATE-AC cannot be decoded.", hint="Check with dicom-get echo that it is a DICOM node."
        ) from error
    return out


def _plain(data: bytes, out: Accepted) -> bytes:
    """The PDU with only those user items that count: decoration from a peer may not break the decoder."""
    kept = bytearray(data[:_FIXED])
    pos = _FIXED
    while pos + 4 <= len(data):
        end = pos + 4 + int.from_bytes(data[pos + 2 : pos + 4], "big")
        item = data[pos:end]
        if data[pos] == _USER_INFORMATION and end <= len(data):
            body = bytearray()
            sub = 4
            while sub + 4 <= len(item):
                stop = sub + 4 + int.from_bytes(item[sub + 2 : sub + 4], "big")
                if item[sub] in _USER_ITEMS:
                    body += item[sub:stop]
                elif item[sub] == _VERSION_NAME:
                    out.implementation = peer_text(item[sub + 4 : stop].decode("ascii", "replace").strip("\0 "), 16)
                sub = stop
            item = item[:2] + len(body).to_bytes(2, "big") + bytes(body)
        kept += item
        pos = end
    kept += data[pos:]
    kept[2:6] = (len(kept) - 6).to_bytes(4, "big")
    return bytes(kept)


def _take_context(out: Accepted, item: PresentationContextItemAC, proposals: Sequence[Proposal]) -> None:
    number, result = item.presentation_context_id, item.result
    index, even = divmod((number or 0) - 1, 2)
    if number is None or result is None or even or not 0 <= index < len(proposals) or number in out.results:
        out.remarks.append(f"context {number} was never proposed, or was answered twice")
        return
    out.results[number] = result
    if result:
        return
    syntaxes = [str(sub.transfer_syntax_name or "") for sub in item.transfer_syntax_sub_item]
    if syntaxes != [proposals[index].transfer_syntax]:
        out.remarks.append(f"context {number} was accepted in a transfer syntax that was not proposed for it")
        return
    out.contexts[number] = proposals[index]


def _take_user_information(out: Accepted, item: UserInformationItem) -> None:
    for sub in item.user_data:
        if isinstance(sub, MaximumLengthSubItem):
            out.max_pdu_length = sub.maximum_length_received or 0
        elif isinstance(sub, SCP_SCU_RoleSelectionSubItem):
            sop_class = str(sub.sop_class_uid or "")
            out.answered_roles.add(sop_class)
            if not sub.scp_role:
                out.refused_roles.add(sop_class)
