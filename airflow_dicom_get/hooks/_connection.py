"""What the hooks have in common: how a connection is read, and how long its test may take."""

from __future__ import annotations

import re
import threading
from typing import TYPE_CHECKING, Any

from airflow.sdk import BaseHook
from airflow.sdk.exceptions import AirflowNotFoundException

from airflow_dicom_get.config.checks import invalid, shown
from airflow_dicom_get.errors import DicomGetError, InvalidOption, sentences

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from airflow.sdk import Connection

TEST_SECONDS = 10.0
"""The longest a connection test takes: it holds a thread of the API server."""

Answer = tuple[bool, str]


def find_connection(conn_id: str, kind: str) -> Connection:
    """The connection of a name; ``kind`` is the type to make, for who has none."""
    try:
        return BaseHook.get_connection(conn_id)
    except AirflowNotFoundException as error:
        hint = f"Create it under Admin, Connections, with the type {kind}."
        raise AirflowNotFoundException(sentences(str(error), hint)) from error


def extras_of(conn: Connection, example: str) -> Mapping[str, Any]:
    """The extra fields of a connection. Raises :class:`InvalidOption`."""
    if not conn.extra:
        return {}
    try:
        extras = conn.extra_dejson
    except Exception:
        extras = None
    if not isinstance(extras, dict) or (not extras and str(conn.extra).strip() not in ("", "{}")):
        raise invalid("extra", "is not a JSON object", f"Write {example}, for example.")
    return extras


_OF_TLS = re.compile(r"(use_?)?(tls|ssl)", re.IGNORECASE)


def check_unknown(keys: Iterable[str], conn_id: str, log: Any) -> None:
    """Warn of extra fields that nobody knows, and refuse those that ask for TLS: it would not be used.

    :raises InvalidOption: one of them does
    """
    for key in sorted(keys):
        if _OF_TLS.match(key):
            raise invalid(
                shown(key),
                "is unknown, and whoever asks for TLS must get it",
                "Correct the name of the field, or remove it.",
            )
        log.warning("Connection %s: the extra field %s is unknown and has no effect.", conn_id, shown(key))


def of_connection(error: InvalidOption, conn_id: str) -> InvalidOption:
    """An error about a field, with the name of its connection."""
    return InvalidOption(
        f"Connection {conn_id}: {error.message}", hint=error.hint, **{**error.facts, "conn_id": conn_id}
    )


def unreadable(error: Exception, conn_id: str) -> Answer:
    """The answer of a test whose connection cannot be used."""
    if isinstance(error, DicomGetError | AirflowNotFoundException):
        # The Test button tries the connection under a name of its own, which says nothing to anyone.
        return False, str(error).removeprefix(f"Connection {conn_id}: ")
    # The text of a foreign error could hold a secret of the connection.
    return False, f"The connection cannot be read: {type(error).__name__}."


def within_limit(test: Callable[[], Answer], name: str) -> Answer | None:
    """What a test answers, or None where it takes too long; it goes on in its thread then."""
    answer: list[Answer] = []
    thread = threading.Thread(target=lambda: answer.append(test()), daemon=True, name=name)
    thread.start()
    thread.join(TEST_SECONDS)
    return answer[0] if answer else None
