"""What a retrieval has come to, in one word, and what the words mean."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Final

from airflow_dicom_get.vocabulary import NOTHING_TO_MEND, VERDICTS, WORST_FIRST, Verdict

RUNNING: Final = "running"
WAITING: Final = "waiting"
NONE: Final = "none"
INCOMPLETE: Final = "incomplete"
"""All that have ended and are neither complete nor empty; a word of the filter alone."""

_BAD = tuple(verdict for verdict in WORST_FIRST if verdict not in NOTHING_TO_MEND)
_GOOD = tuple(verdict for verdict in WORST_FIRST if verdict in NOTHING_TO_MEND)


def _meanings(verdicts: Iterable[Verdict]) -> dict[str, str]:
    texts = {verdict: VERDICTS[verdict].replace("`", "") for verdict in verdicts}
    return {verdict: f"{text[:1].upper()}{text[1:]}." for verdict, text in texts.items()}


OUTCOMES: Mapping[str, str] = {
    **_meanings(_BAD),
    NONE: "The task ended without a result: it was killed, or failed before it started. Check its log.",
    RUNNING: "The task is running.",
    WAITING: "The task is waiting to be scheduled, or for the window of the PACS.",
    **_meanings(_GOOD),
}
"""The outcomes, in the order of the page: what needs somebody comes first."""

LABELS: Mapping[str, str] = {NONE: "no result", INCOMPLETE: "not complete"}

ENDED_WELL = frozenset[str](_GOOD)
ENDED_BADLY = frozenset[str]({*_BAD, NONE})
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
