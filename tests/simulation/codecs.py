"""Codecs remembered: PDUs, command sets and identifiers depend on nothing but what they are made of.

Studies of histories are so alike that nearly all of them have been coded before; to code each anew would be a third of
what a history costs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from airflow_dicom_get.dicom import command, identifier
from airflow_dicom_get.net import acse, association, get, messages, peer
from airflow_dicom_get.testing.misbehaving import archive, wire

_MOST = 20_000
"""Answers that each of them remembers."""

_found: list[dict[Any, Any]] = []


def _remembered(
    real: Callable[..., Any], key: Callable[..., Any], given: Callable[[Any], Any] | None = None
) -> Callable[..., Any]:
    """A function that remembers; ``key`` makes of its arguments what the answer depends on, ``given`` copies that."""
    found: dict[Any, Any] = {}
    _found.append(found)

    def called(*args: Any, **named: Any) -> Any:
        asked = key(*args, **named)
        try:
            answer = found[asked]
        except KeyError:
            if len(found) >= _MOST:
                found.clear()
            answer = found[asked] = real(*args, **named)
        return answer if given is None else given(answer)

    return called


def forget() -> None:
    """Code all anew: what they are made of has changed."""
    for found in _found:
        found.clear()


def _items(elements: Mapping[int, Any], *more: Any) -> Any:
    return tuple(elements.items()), more


def _identifier(elements: Mapping[int, Any], uid_tags: Any = ()) -> Any:
    return tuple((tag, x if isinstance(x, str | bytes) else (*x,)) for tag, x in elements.items()), uid_tags


def _request(calling: str, called: str, proposals: Any, **named: Any) -> Any:
    return calling, called, (*proposals,), (*named.pop("storage_classes", ()),), (*named.items(),)


def _copied(accepted: acse.Accepted) -> acse.Accepted:
    return replace(
        accepted,
        contexts=dict(accepted.contexts),
        results=dict(accepted.results),
        refused_roles=set(accepted.refused_roles),
        answered_roles=set(accepted.answered_roles),
        remarks=list(accepted.remarks),
    )


_command = _remembered(command.Command, bytes)

CODECS: list[tuple[Any, str, object]] = [
    (peer, "encode_request", _remembered(acse.encode_request, _request)),
    (association, "decode_accept", _remembered(acse.decode_accept, lambda data, x: (bytes(data), (*x,)), _copied)),
    (messages, "Command", _command),
    (get, "Command", _command),
    (association, "_BUFFER", 1 << 15),  # nothing is larger here, and each association makes one
    (command, "encode", _remembered(command.encode, _items)),
    (identifier, "encode_identifier", _remembered(identifier.encode_identifier, _identifier)),
    (
        identifier,
        "decode_identifier",
        _remembered(identifier.decode_identifier, lambda data, wanted: (bytes(data), frozenset(wanted)), dict),
    ),
    (wire, "command", _remembered(wire.command, _items)),
    (wire, "parse_command", _remembered(wire.parse_command, bytes, dict)),
    (wire, "parse_associate", _remembered(wire.parse_associate, bytes)),
    (
        wire,
        "associate_accept",
        _remembered(wire.associate_accept, lambda request, answers, roles, *x: (request, (*answers,), (*roles,), x)),
    ),
    (archive, "encode_identifier", _remembered(archive.encode_identifier, _items)),
    (archive, "parse_identifier", _remembered(archive.parse_identifier, lambda data, syntax: (data, syntax), dict)),
]
"""Module, name and what remembers it, of what both sides code."""
