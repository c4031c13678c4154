"""What a retrieval has come to, in one word, and what the words mean."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from airflow_dicom_get.vocabulary import CANCELLED, COMPLETE, EMPTY, FAILED, PARTIAL, UNVERIFIED

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
