"""From the state of a study to its verdict. Statuses and counters of the source never make a success."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from airflow_dicom_get.errors import Cancelled
from airflow_dicom_get.records import Instance
from airflow_dicom_get.result import StudyResult
from airflow_dicom_get.vocabulary import (
    CANCELLED,
    COMPLETE,
    EMPTY,
    FAILED,
    HELD,
    OUTSIDE_LIST,
    PARTIAL,
    RECEIVED,
    UNVERIFIED,
    Evidence,
    Verdict,
)

if TYPE_CHECKING:
    from airflow_dicom_get.engine.listing import Listing
    from airflow_dicom_get.engine.state import StudyState


def judge(state: StudyState) -> StudyResult:
    """The verdict and the numbers of a study whose state is concluded. Changes nothing."""
    listing = state.listing
    rows = state.rows()
    scope = [x for x in rows if x.state not in OUTSIDE_LIST]
    held = [x for x in scope if x.state in HELD]
    states = Counter(x.state for x in rows)
    expected = listing.total + _lost(state, listing) if listing is not None else None
    total = expected if expected is not None else len(scope)
    verdict, reason = _verdict(state, scope, len(held), total)
    return StudyResult(
        study_instance_uid=state.scope.study,
        verdict=verdict,
        reason=reason,
        expected=expected,
        total=total,
        completed=len(held),
        skipped=states["held"],
        warning=sum(x.remarked for x in held),
        failed=total - len(held),
        withdrawn=states["withdrawn"],
        unexpected=states["unexpected"],
        conflicts=states["conflict"],
        bytes=sum(x.bytes or 0 for x in rows if x.state in RECEIVED),
        evidence=_evidence(state),
        plan_at=datetime.fromtimestamp(listing.at, UTC) if listing is not None else None,
    )


def _verdict(state: StudyState, scope: list[Instance], held: int, total: int) -> tuple[Verdict, str | None]:
    if any(isinstance(error, Cancelled) for error in state.errors):
        return CANCELLED, state.cancelled_by
    if total == 0:
        if state.stop_reason == "window":
            return PARTIAL, "window"
        if state.listing is None or state.errors:
            return FAILED, _why(state, scope)
        if state.instances or contradicted(state):  # an earlier list named them, or they were sent
            return UNVERIFIED, "list_contradicted"
        if state.listing.doubts(state.counted):
            return UNVERIFIED, "list_may_be_cut"
        return EMPTY, "key_not_matched" if state.listing.dropped else None
    conflicts = any(x.state == "conflict" for x in scope)
    if held == total and all(x.state in HELD for x in scope):
        if state.listing is None:
            return UNVERIFIED, "no_list"
        if contradicted(state):
            return UNVERIFIED, "list_contradicted"
        if state.still_growing:
            return PARTIAL, "still_growing"
        if state.listing.doubts(state.counted):
            return UNVERIFIED, "list_may_be_cut"
        return (COMPLETE, None) if state.lists_agree else (UNVERIFIED, "list_not_repeated")
    if held == 0 and not conflicts and state.stop_reason != "window":
        return FAILED, _why(state, scope)
    return PARTIAL, _why(state, scope)


def _lost(state: StudyState, listing: Listing) -> int:
    """Instances that a manifest asks for, and that are not listed, held or not."""
    return sum(
        key not in listing.instances and key not in state.unlisted and x.state not in OUTSIDE_LIST
        for key, x in state.instances.items()
    )


def contradicted(state: StudyState) -> bool:
    """Whether something that the source said, or sent without listing it, denies its list."""
    listing = state.listing
    assert listing is not None
    lists = listing.lists()
    if lists.contradicted() or any(key not in listing.instances for key in state.returned):
        return True
    if not lists.is_round(listing.cuts):
        return False
    return any(key not in listing.instances for key in state.unlisted) or bool(
        state.unread and state.unread - {sop for _, sop in listing.instances}
    )


def _evidence(state: StudyState) -> Evidence:
    if state.listing is None:
        return "none"
    return "list+counts" if state.listing.counts_agree() else "list"


def _why(state: StudyState, scope: Iterable[Instance]) -> str | None:
    """The reason of a study of which something is not held."""
    if state.stop_reason is not None:
        return state.stop_reason
    if state.still_growing:
        return "still_growing"
    if state.errors and not state.rounds:
        return state.errors[0].word
    reasons = Counter(x.reason for x in scope if x.state not in HELD and x.reason)
    if reasons:
        return reasons.most_common(1)[0][0]
    return state.errors[0].word if state.errors else "not_sent"
