"""What a retrieval has come to, in one word, and what the words mean."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Final

from airflow_dicom_get.vocabulary import (
    NOTHING_TO_MEND,
    STORE_VERDICTS,
    VERDICTS,
    VERIFY_VERDICTS,
    WORST_FIRST,
    Verdict,
)

RUNNING: Final = "running"
WAITING: Final = "waiting"
NONE: Final = "none"
INCOMPLETE: Final = "incomplete"
"""All that have ended and are neither complete nor empty; a word of the filter alone."""

_BAD = tuple(verdict for verdict in WORST_FIRST if verdict not in NOTHING_TO_MEND)
_GOOD = tuple(verdict for verdict in WORST_FIRST if verdict in NOTHING_TO_MEND)


def _meanings(verdicts: Iterable[Verdict], texts: Mapping[Verdict, str] = VERDICTS) -> dict[str, str]:
    plain = {verdict: texts[verdict].replace("`", "") for verdict in verdicts}
    return {verdict: f"{text[:1].upper()}{text[1:]}." for verdict, text in plain.items()}


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

GET: Final = "DicomGetOperator"


@dataclass(frozen=True)
class Kind:
    """What the tasks of an operator do, in the words of the page."""

    name: str
    done: str
    lacking: str
    moved: str
    """What becomes of the bytes; empty where none are transferred."""
    mend: str
    """What to do about what is lacking."""
    meanings: Mapping[str, str] = field(default_factory=dict)
    """Outcomes that mean something else than for a retrieval."""

    def meaning(self, outcome: str) -> str:
        """What an outcome means."""
        return self.meanings.get(outcome) or OUTCOMES[outcome]


KINDS: Mapping[str, Kind] = {
    GET: Kind(
        "retrieval",
        "instances held",
        "not held",
        "received",
        "To fetch what is not held, clear the task. What is held is not fetched again.",
    ),
    "DicomStoreOperator": Kind(
        "store",
        "instances at the target",
        "not at the target",
        "sent",
        "To send what is not at the target, clear the task. What is there is not sent again.",
        meanings={
            **_meanings(WORST_FIRST, STORE_VERDICTS),
            WAITING: "The task is waiting to be scheduled, or for the window of the target.",
        },
    ),
    "DicomVerifyOperator": Kind(
        "verification",
        "instances the same",
        "not the same, or not compared",
        "",
        "A DicomGetOperator that is given the manifest of this task fetches what is missing or different.",
        meanings={**_meanings(WORST_FIRST, VERIFY_VERDICTS), WAITING: "The task is waiting to be scheduled."},
    ),
}
"""By the name of the operator. Those that are no retrievals count in none of its numbers."""


def kind_of(operator: str | None) -> Kind:
    """The kind of a task; what is no operator of ours and leaves a verdict is one that retrieves."""
    return KINDS.get(operator or "", KINDS[GET])


NEVER_RAN_STATES = ("removed", "skipped")
"""States of tasks that are no retrieval at all."""


def outcome_of(state: str | None, verdict: str | None) -> str:
    """What a task has come to, from its state and the verdict of its last try."""
    if state in _RUNNING_STATES:
        return RUNNING
    if state not in _ENDED_STATES:
        return WAITING
    return verdict if verdict is not None and verdict in OUTCOMES else NONE
