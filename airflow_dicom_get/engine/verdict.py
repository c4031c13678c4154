"""From the rows of a study to its verdict. Statuses and counters of the source never make a success."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from airflow_dicom_get.errors import (
    Cancelled,
    DeadlineExceeded,
    DestinationFull,
    NotAuthorised,
    NotNegotiated,
)
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
    STOPS,
    UNVERIFIED,
    Evidence,
    Verdict,
)

if TYPE_CHECKING:
    from airflow_dicom_get.engine.study import StudyRun


@dataclass(slots=True)
class StudyEnd:
    """A study's numbers, and the rows of its part of the manifest."""

    numbers: StudyResult
    rows: list[Instance] = field(default_factory=list)


def judge(run: StudyRun) -> StudyEnd:
    """Settle the state of every row and count."""
    listing = run.listing
    rows = list(_settled(run))
    scope = [x for x in rows if x.state not in OUTSIDE_LIST]
    held = [x for x in scope if x.state in HELD]
    conflicts = sum(x.state == "conflict" for x in scope)
    withdrawn = sum(x.state == "withdrawn" for x in rows)
    unexpected = sum(x.state == "unexpected" for x in rows)
    expected = len(listing.instances) if listing is not None else None
    total = expected if expected is not None else len(scope)
    verdict, reason = _verdict(run, scope, len(held), total, conflicts)
    numbers = StudyResult(
        study_instance_uid=run.scope.study,
        verdict=verdict,
        reason=reason,
        expected=expected,
        total=total,
        completed=len(held),
        skipped=sum(x.state == "held" for x in held),
        warning=sum(x.exactness == "converted" or x.forward_status == "warning" for x in held),
        failed=total - len(held),
        withdrawn=withdrawn,
        unexpected=unexpected,
        conflicts=conflicts,
        bytes=sum(x.bytes or 0 for x in rows if x.state in RECEIVED),
        evidence=_evidence(run),
        plan_at=datetime.fromtimestamp(listing.at, UTC) if listing is not None else None,
    )
    return StudyEnd(numbers, rows)


def _settled(run: StudyRun) -> Iterator[Instance]:
    listing = run.listing
    for uid, x in run.instances.items():
        if listing is None or uid in listing.instances:
            if x.state is None:
                x.state, x.reason = "missing", _why_untried(run)
        elif uid in run.unlisted_uids:
            x.state = "unexpected"
            x.reason = x.reason or "not_listed"
        else:
            x.state, x.reason = "withdrawn", "gone_from_list"
        yield x
    for x in run.held_and_gone():
        x.state, x.reason = "withdrawn", "gone_from_list"
        yield x


def _why_untried(run: StudyRun) -> str:
    """Why nothing became of a listed instance."""
    if run.stop_reason is not None and run.stop_reason in STOPS:
        return run.stop_reason
    for error in run.errors:
        if isinstance(error, Cancelled):
            return "cancelled"
        if isinstance(error, DestinationFull):
            return "destination_full"
        if isinstance(error, DeadlineExceeded):
            return "deadline"
        if isinstance(error, NotAuthorised | NotNegotiated):
            return "refused_by_source"
        if error.at_fault == "peer":
            return "association_lost"
        if error.at_fault == "destination":
            return "destination_error"
    return "not_sent"


def _evidence(run: StudyRun) -> Evidence:
    if run.listing is None:
        return "none"
    return "list+counts" if run.listing.has_counts() else "list"


def contradicted(run: StudyRun) -> bool:
    """Whether something that the source said or did denies its list."""
    listing = run.listing
    if listing is None:
        return False
    if listing.counts_contradict():
        return True
    sent_unlisted = any(uid not in listing.instances for uid in run.unlisted_uids)
    return sent_unlisted and listing.on_round_cap()


def _verdict(run: StudyRun, scope: list[Instance], held: int, total: int, conflicts: int) -> tuple[Verdict, str | None]:
    if any(isinstance(error, Cancelled) for error in run.errors):
        return CANCELLED, run.source.cancel.reason
    if total == 0:
        if run.stop_reason == "window":
            return PARTIAL, "window"
        if run.listing is not None and not run.errors:
            return (UNVERIFIED, "list_contradicted") if contradicted(run) or run.unlisted_uids else (EMPTY, None)
        return FAILED, _reason(run, scope)
    if held == total and not conflicts:
        if run.listing is None:
            return UNVERIFIED, "no_list"
        if contradicted(run):
            return UNVERIFIED, "list_contradicted"
        if run.still_growing():
            return PARTIAL, "still_growing"
        return (COMPLETE, None) if run.lists_agree else (UNVERIFIED, "list_not_repeated")
    if held == 0 and not conflicts and run.stop_reason != "window":
        return FAILED, _reason(run, scope)
    return PARTIAL, _reason(run, scope)


def _reason(run: StudyRun, scope: list[Instance]) -> str | None:
    if run.stop_reason is not None:
        return run.stop_reason
    if run.still_growing():
        return "still_growing"
    if run.errors and not run.rounds:
        return run.errors[0].word
    reasons = Counter(x.reason for x in scope if x.state not in HELD and x.reason)
    if reasons:
        return reasons.most_common(1)[0][0]
    return run.errors[0].word if run.errors else "not_sent"
