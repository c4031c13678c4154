"""What a retrieval has come to, in one word, and what the words mean."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from airflow_dicom_get.result import CANCELLED, COMPLETE, EMPTY, FAILED, PARTIAL, UNVERIFIED

RUNNING: Final = "running"
WAITING: Final = "waiting"
NONE: Final = "none"
INCOMPLETE: Final = "incomplete"
"""All that have ended and are neither complete nor empty; a word of the filter alone."""

OUTCOMES: Mapping[str, str] = {
    FAILED: "Nothing is held.",
    PARTIAL: "Something is held, something is not.",
    CANCELLED: "The retrieval was ended from outside.",
    UNVERIFIED: "All that was sent is held, but there is no list to prove it by.",
    NONE: "The task ended without a result: it was killed, or failed before it began. Its log says why.",
    RUNNING: "The task runs.",
    WAITING: "The task waits: for its turn, or for the hours of the PACS.",
    EMPTY: "The query matched nothing.",
    COMPLETE: "All that the PACS lists is held and verified.",
}
"""The outcomes, in the order of the page: what needs somebody comes first."""

LABELS: Mapping[str, str] = {NONE: "no result", INCOMPLETE: "not complete"}

ENDED_BADLY = frozenset({FAILED, PARTIAL, CANCELLED, UNVERIFIED, NONE})
LIVE = frozenset({RUNNING, WAITING})

_RUNNING_STATES = frozenset({"running", "restarting"})
_ENDED_STATES = frozenset({"success", "failed", "up_for_retry", "upstream_failed"})

NEVER_RAN_STATES = ("removed", "skipped")
"""States of tasks that are no retrieval at all."""


def outcome_of(state: str | None, verdict: str | None) -> str:
    """What a task has come to, from its state and the verdict of its last try."""
    if state in _RUNNING_STATES:
        return RUNNING
    if state not in _ENDED_STATES:
        return WAITING
    return verdict if verdict is not None and verdict in OUTCOMES else NONE


REASONS: Mapping[str, str] = {
    "not_sent": "Listed and asked for, but the PACS did not send it.",
    "refused_by_source": "The PACS refuses it even when it is asked for alone.",
    "class_refused": "The PACS accepted no presentation context for its SOP class.",
    "syntax_refused": "None of the transfer syntaxes offered would do.",
    "sub_operation_failed": "The PACS reported that sending it failed.",
    "uid_mismatch": "The PACS sent it under a UID that is not the one in the data set.",
    "not_asked": "Sent, though it was not asked for.",
    "foreign_study": "Sent, though it belongs to another study.",
    "unparsable": "The beginning of its data set cannot be read.",
    "empty_dataset": "Its data set is empty.",
    "bad_uid": "Its UID cannot be part of a path.",
    "size_changed": "What is stored no longer has the size or digest that was recorded.",
    "different_content": "Another data set is stored under this UID already.",
    "destination_refused": "The destination refused it.",
    "destination_full": "The destination is full.",
    "destination_error": "The destination failed.",
    "association_lost": "The connection to the PACS broke.",
    "deadline": "It took longer than allowed.",
    "window": "The hours of the PACS were over.",
    "cancelled": "The retrieval was ended from outside.",
    "strict_forward": "The retrieval ended at an instance that the destination refused.",
    "gone_from_list": "The PACS listed it, and lists it no longer.",
    "not_listed": "Sent, though the PACS does not list it.",
}
"""The reasons of manifest rows, for people."""
