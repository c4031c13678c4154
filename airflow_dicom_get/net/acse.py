"""A-ASSOCIATE PDUs (PS3.8 9.3.2, 9.3.3; PS3.7 D.3.3).

Coded here: pynetdicom, which the tests hold this against, takes longer to import than a small study to retrieve, and
its decoder stumbles over items that say nothing to us.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from airflow_dicom_get.config.groups import UserIdentity
from airflow_dicom_get.dicom.part10 import IMPLEMENTATION_CLASS_UID, IMPLEMENTATION_VERSION
from airflow_dicom_get.errors import PeerProtocolError, peer_text

MAX_CONTEXTS = 128
_APPLICATION_CONTEXT = b"1.2.840.10008.3.1.1.1"
_REQUEST = 0x01
_FIXED = 74  # bytes of the PDU before its items
_HEAD = struct.Struct(">BxH")
"""Type of an item and the length of what follows."""
_PDU = struct.Struct(">BxIHxx16s16s32x")
"""Type, length, protocol version, called and calling AE title."""

# Items, and the items within the user information.
_APPLICATION, _CONTEXT, _CONTEXT_RESULT, _ABSTRACT, _TRANSFER, _USER_INFORMATION = 0x10, 0x20, 0x21, 0x30, 0x40, 0x50
_MAXIMUM_LENGTH, _CLASS_UID, _ROLE, _VERSION_NAME, _IDENTITY = 0x51, 0x52, 0x54, 0x55, 0x58


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


# --- request ---------------------------------------------------------------------------------------


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

    Raises
    ------
    ValueError
        There are none or too many contexts, or an AE title is longer than 16 bytes.
    """
    if not 0 < len(proposals) <= MAX_CONTEXTS:
        raise ValueError(f"{len(proposals)} presentation contexts were given; 1 to {MAX_CONTEXTS} are possible")
    items = [_item(_APPLICATION, _APPLICATION_CONTEXT)]
    for index, proposal in enumerate(proposals):
        syntaxes = _uid_item(_ABSTRACT, proposal.abstract_syntax) + _uid_item(_TRANSFER, proposal.transfer_syntax)
        items.append(_item(_CONTEXT, bytes((2 * index + 1, 0, 0, 0)) + syntaxes))
    user = [
        _item(_MAXIMUM_LENGTH, struct.pack(">I", max_pdu_length)),
        _uid_item(_CLASS_UID, IMPLEMENTATION_CLASS_UID),
        _item(_VERSION_NAME, IMPLEMENTATION_VERSION.encode("ascii")),
        *(_item(_ROLE, _sized(uid.encode("ascii")) + b"\0\1") for uid in dict.fromkeys(storage_classes)),
    ]
    if user_identity is not None:
        fields = _sized(user_identity.primary_field) + _sized(user_identity.secondary_field or b"")
        user.append(_item(_IDENTITY, bytes((user_identity.identity_type, 0)) + fields))
    items.append(_item(_USER_INFORMATION, b"".join(user)))
    body = b"".join(items)
    head = _PDU.pack(_REQUEST, _FIXED - 6 + len(body), 1, _title(called), _title(calling))
    return head + body


def _title(title: str) -> bytes:
    encoded = title.encode("ascii").ljust(16)
    if len(encoded) > 16:
        raise ValueError("an AE title is longer than 16 characters")
    return encoded


def _sized(value: bytes) -> bytes:
    return struct.pack(">H", len(value)) + value


def _item(kind: int, value: bytes) -> bytes:
    return _HEAD.pack(kind, len(value)) + value


def _uid_item(kind: int, uid: str) -> bytes:
    return _item(kind, uid.encode("ascii"))


# --- answer ----------------------------------------------------------------------------------------


def decode_accept(data: bytes, proposals: Sequence[Proposal]) -> Accepted:
    """Decode an A-ASSOCIATE-AC (``data`` is the whole PDU) against what was proposed.

    A context that was never proposed, or accepted in another transfer syntax, is not accepted; a
    remark says so. Items that say nothing to us are passed over, whatever is in them.

    Raises
    ------
    PeerProtocolError
        The PDU cannot be decoded.
    """
    out = Accepted()
    try:
        if len(data) < _FIXED:
            raise ValueError("it ends within its fixed part")
        for kind, value in _items(data[_FIXED:]):
            if kind == _CONTEXT_RESULT:
                _take_context(out, value, proposals)
            elif kind == _USER_INFORMATION:
                _take_user_information(out, value)
    except (ValueError, struct.error) as error:
        raise PeerProtocolError(
            "The peer's A-ASSOCIATE-AC cannot be decoded.", hint="Check with dicom-get echo that it is a DICOM node."
        ) from error
    return out


def _items(data: bytes, *, decoration: bool = False) -> Iterator[tuple[int, bytes]]:
    """Type and value of each item. Raises :class:`ValueError` where one runs past the end, unless it is decoration."""
    at = 0
    while at < len(data):
        if at + _HEAD.size > len(data) and decoration:
            return
        kind, size = _HEAD.unpack_from(data, at)
        at += _HEAD.size
        if at + size > len(data) and not decoration:
            raise ValueError("an item runs past the end")
        yield kind, data[at : at + size]
        at += size


def _uid(value: bytes) -> str:
    return value.decode("ascii").rstrip("\0 ")


def _take_context(out: Accepted, value: bytes, proposals: Sequence[Proposal]) -> None:
    number, result = struct.unpack_from("BxBx", value)
    index, even = divmod(number - 1, 2)
    if even or not 0 <= index < len(proposals) or number in out.results:
        _remark(out, f"context {number} was never proposed, or was answered twice")
        return
    out.results[number] = result
    if result:  # the transfer syntax says nothing then
        return
    syntaxes = [_uid(name) for kind, name in _items(value[4:]) if kind == _TRANSFER]
    if syntaxes != [proposals[index].transfer_syntax]:
        _remark(out, f"context {number} was accepted in a transfer syntax that was not proposed for it")
        return
    out.contexts[number] = proposals[index]


def _remark(out: Accepted, text: str) -> None:
    """Say something once, and not of more contexts than there can be: a PDU has room for 100,000 that are wrong."""
    if len(out.remarks) < MAX_CONTEXTS and text not in out.remarks:
        out.remarks.append(text)


def _take_user_information(out: Accepted, value: bytes) -> None:
    for kind, item in _items(value, decoration=True):
        if kind == _MAXIMUM_LENGTH:
            (out.max_pdu_length,) = struct.unpack(">I", item)
        elif kind == _ROLE:
            (size,) = struct.unpack_from(">H", item)
            _scu, scp = struct.unpack_from("BB", item, 2 + size)
            sop_class = _uid(item[2 : 2 + size])
            out.answered_roles.add(sop_class)
            if not scp:
                out.refused_roles.add(sop_class)
        elif kind == _VERSION_NAME:
            out.implementation = peer_text(item.decode("ascii", "replace").strip("\0 "), 16)
