"""From studies to the result of a call: assembled, merged, downgraded.

Only here and in ``verdict`` is a verdict set.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import TYPE_CHECKING, Any

from airflow_dicom_get.engine.verdict import judge
from airflow_dicom_get.errors import Cancelled, DicomGetError, printable
from airflow_dicom_get.lists.whole import doubt_remark
from airflow_dicom_get.records import Completed, Instance
from airflow_dicom_get.result import COUNTS, Kind, Result, StudyResult
from airflow_dicom_get.vocabulary import (
    CANCELLED,
    COMPLETE,
    EMPTY,
    FAILED,
    HELD,
    NOT_HELD,
    PARTIAL,
    REASONS,
    REMARKS,
    STRAYS,
    UNVERIFIED,
    Evidence,
    Verdict,
    advice,
    is_transient,
    weakest,
    worst,
)

if TYPE_CHECKING:
    from airflow_dicom_get.engine.events import Events
    from airflow_dicom_get.engine.state import StudyState
    from airflow_dicom_get.engine.study_list import FoundList
    from airflow_dicom_get.lists.matching import Dropped
    from airflow_dicom_get.net.association import CancelToken

MOST_ERRORS = 10
"""Entries of ``Result.errors``."""
_SHOWN = 3
"""UIDs that one of them names."""


@dataclass(slots=True)
class End:
    """What a retrieval has come to, before it is summed up.

    Attributes
    ----------
    states : list of StudyState
        Of every study of the scope.
    numbers : list of StudyResult
        Their verdicts and numbers, in the same order.
    error : DicomGetError or None
        What ended the call outside of its studies.
    unclosed : DicomGetError or None
        Why the destination could not be closed in order.
    resume_at : datetime or None
        When the hours of the source begin, where they are over.
    dropped : Dropped or None
        Rows of the search that contradict the query.
    nothing_asked : bool
        Whether a manifest was given that asks for nothing.
    doubt : str or None
        Why the query may mean more studies, as a reason of the vocabulary.
    unknown : frozenset of str
        UIDs that the query names, and the source does not list: of studies beside others, and of series and instances
        that are in none of its studies.
    """

    states: list[StudyState] = field(default_factory=list)
    numbers: list[StudyResult] = field(default_factory=list)
    error: DicomGetError | None = None
    unclosed: DicomGetError | None = None
    resume_at: datetime | None = None
    dropped: Dropped | None = None
    nothing_asked: bool = False
    doubt: str | None = None
    unknown: frozenset[str] = frozenset()

    def all_dropped(self) -> Dropped:
        """Rows that contradict what was asked for: those of the search, and those of the last list of each study."""
        from airflow_dicom_get.lists.matching import Dropped

        found = Dropped()
        if self.dropped is not None:
            found.update(self.dropped)
        for state in self.states:
            if state.listing is not None:
                found.update(state.listing.dropped)
        return found

    @property
    def waits(self) -> bool:
        """Whether the hours of the source ended before one of its studies did."""
        return any(state.stop_reason == "window" for state in self.states)

    @property
    def unproven(self) -> bool:
        """Whether it lacks but the second list of a study, whatever kept that."""
        return any(one.reason == "list_not_repeated" for one in self.numbers)

    def rows(self) -> list[Instance]:
        """The rows of the manifest."""
        return [row for state in self.states for row in state.rows()]


def end_of(
    states: Sequence[StudyState],
    dropped: Dropped | None = None,
    doubt: str | None = None,
    error: DicomGetError | None = None,
    unknown: frozenset[str] = frozenset(),
) -> End:
    """Judge the studies of a search, and keep what is to be said of it, and what ended the call after them.

    A study that is there, and in which nothing is that the query names or filters, is not meant by it; but it may be
    where the PACS writes a value otherwise than the query, and stays.
    """
    judged = [(state, judge(state)) for state in states]
    meant = [
        (state, numbers)
        for state, numbers in judged
        if not (state.scope.narrowed and state.scope.found and numbers.verdict == EMPTY and not state.rows())
        or (state.listing is not None and state.listing.dropped.spellings)
    ]
    kept = meant or judged
    states, numbers = [state for state, _ in kept], [numbers for _, numbers in kept]
    unknown |= known_nowhere(state.unknown() for state, _ in judged)
    unknown |= {
        state.scope.study
        for state, numbers in kept
        if numbers.verdict == EMPTY and state.listing is not None and not state.scope.found
    }
    return End(states, numbers, error=error, dropped=dropped, doubt=doubt, unknown=unknown)


def known_nowhere(unknown: Iterable[frozenset[str]]) -> frozenset[str]:
    """Of what a query names, and each of its studies does not have, what none of them has."""
    sets = list(unknown)
    return frozenset.intersection(*sets) if sets else frozenset()


# --- assemble ----------------------------------------------------------------------------------------


def assemble(
    end: End, *, events: Events, node: str, destination: str, associations: int, cancelled_by: str | None
) -> Result:
    """The result of a get.

    Parameters
    ----------
    associations : int
        Associations opened with the source.
    cancelled_by : str or None
        Who cancelled the run, if someone did.
    """
    numbers, error = end.numbers, end.error
    result = Result(
        verdict=worst(n.verdict for n in numbers),
        node=node,
        destination=destination,
        studies=list(numbers),
        associations=associations,
        rounds=max((state.rounds for state in end.states), default=0),
        evidence=weakest(n.evidence for n in numbers),
        plan_at=min((n.plan_at for n in numbers if n.plan_at is not None), default=None),
        expected=_sum_or_none(n.expected for n in numbers) if numbers else None,
        errors=_errors_of_get(end),
        transient=_may_pass(end),
        **{name: sum(getattr(n, name) for n in numbers) for name in COUNTS},
    )
    _measure(result, events)
    result.reason = next((n.reason for n in numbers if n.verdict == result.verdict), None)
    if end.nothing_asked:
        result.reason = "nothing_asked"
    elif result.verdict == EMPTY:
        result.reason = result.reason or end.doubt or ("key_not_matched" if end.all_dropped() else None)
    elif end.doubt is not None:
        _doubt(result, end.doubt)
    if end.unknown:
        _not_found(result, unknown_remark(end.unknown))
    if error is not None:
        cancelled = isinstance(error, Cancelled)
        result.verdict = CANCELLED if cancelled else FAILED
        result.reason = cancelled_by if cancelled else error.word
        result.transient = error.transient
    return result


def _doubt(result: Result, doubt: str) -> None:
    """The search may have missed studies: no proof of those that it found is one of all."""
    if worst((result.verdict, UNVERIFIED)) != result.verdict:
        result.verdict, result.reason = UNVERIFIED, doubt
    if doubt_remark(doubt) not in result.errors:
        result.errors.insert(0, doubt_remark(doubt))


@dataclass(frozen=True, slots=True)
class StoreEnd:
    """How the work of a store ended.

    Attributes
    ----------
    error : DicomGetError or None
        What ended it.
    stopped : bool
        Whether one instance that the node refused ended it (``strict_forward``).
    cancelled_by : str or None
        Who cancelled it, if someone did.
    unusable : sequence of (name, why)
        Objects that are no instances.
    untried : int
        Files of which nothing is known, since the work ended before they were read.
    """

    error: DicomGetError | None
    stopped: bool
    cancelled_by: str | None
    unusable: Sequence[tuple[str, str]]
    untried: int


def assemble_store(rows: Sequence[Instance], end: StoreEnd, *, events: Events, node: str, associations: int) -> Result:
    """The result of a store."""
    error, unusable, untried = end.error, end.unusable, end.untried
    held = [x for x in rows if x.state in HELD]
    result = Result(
        verdict=COMPLETE,
        expected=len(rows) + untried,
        total=len(rows) + untried,
        completed=len(held),
        skipped=sum(x.state == "held" for x in held),
        warning=sum(x.remarked for x in held),
        failed=len(rows) + untried - len(held),
        conflicts=sum(x.state == "conflict" for x in rows),
        associations=associations,
        rounds=1,
        evidence="list",
        node=node,
        destination=f"dicom://{node}",
        kind="store",
        transient=untried > 0 or any_transient(rows) or (error is not None and error.transient),
    )
    _measure(result, events)
    if end.cancelled_by is not None or isinstance(error, Cancelled):
        result.verdict, result.reason = CANCELLED, end.cancelled_by
    elif len(held) < len(rows) or error is not None:
        result.verdict = PARTIAL if held else FAILED
        result.reason = "strict_forward" if end.stopped else _most_frequent_reason(rows)
        if result.reason is None and error is not None:
            result.reason = error.word
    elif unusable:
        result.verdict, result.reason = PARTIAL if held else FAILED, "unusable_files"
    elif not rows:
        result.verdict, result.reason = FAILED, "nothing_asked"
    found = [_entry(error.message, error.hint)] if error is not None else []
    if unusable:
        examples = "; ".join(f"{name} {why}" for name, why in unusable[:3])
        text = "A file is not a DICOM instance that can be stored."
        found.append(_entry(text, f"For example: {examples}.", len(unusable)))
    if untried:
        found.append(_entry("A file was not tried before the end.", "", untried))
    result.errors = [*found, *_row_errors(rows, said=True), *remarks_of(rows)][:MOST_ERRORS]
    return result


def outside_hours(resume_at: datetime | None, kind: Kind = "get") -> Result:
    """The result of a call that was not begun, since the hours of the node are over."""
    result = Result(verdict=PARTIAL, kind=kind)
    wait_for_window(result, resume_at)
    return result


def broken_off(error: DicomGetError, kind: Kind = "get") -> Result:
    """The result of a call that an error ended before anything came of it, where earlier calls have theirs."""
    return Result(
        verdict=FAILED,
        reason=error.word,
        transient=error.transient,
        errors=[_entry(error.message, error.hint)],
        kind=kind,
    )


def never_begun(kind: Kind = "get") -> Result:
    """The result of a call that was cancelled before it began."""
    return Result(verdict=CANCELLED, kind=kind)


def assemble_comparison(
    counts: Mapping[str, int],
    *,
    verdict: Verdict,
    plan_at: datetime | None,
    errors: Sequence[Mapping[str, Any]],
    node: str | None,
    destination: str | None,
) -> Result:
    """A comparison in the numbers of a retrieval: what is the same counts as held.

    Parameters
    ----------
    counts : mapping
        Instances by symbol: ``=`` the same, ``-`` not listed and so no part of the whole, and the differences.
    verdict : str
        See :func:`verdict_of_comparison`.
    """
    total, same = sum(number for symbol, number in counts.items() if symbol != "-"), counts.get("=", 0)
    unlike = "differences" if verdict == PARTIAL else "not_compared"
    return Result(
        verdict=verdict,
        reason=None if verdict == COMPLETE else unlike,
        expected=total,
        total=total,
        completed=same,
        failed=total - same,
        withdrawn=counts.get("-", 0),
        plan_at=plan_at,
        evidence="list" if plan_at is not None else "none",
        errors=[dict(error) for error in errors],
        node=node,
        destination=destination,
    )


def verdict_of_comparison(same: bool, differences: bool) -> Verdict:
    """The verdict of a ``verify``."""
    if same:
        return COMPLETE
    return PARTIAL if differences else UNVERIFIED


def verdict_of_verified(compared: Verdict, read: tuple[Verdict, Evidence] | None, listed: bool) -> Verdict:
    """The verdict that the manifest of a ``verify`` carries, which knows of no more than it was given.

    Without a list of the PACS it is never better than that of the manifest that was read, and where our records alone
    were read, not proven. Nor is it with one where that manifest is of studies that it has no rows of: one was not
    listed, or is not there.

    Parameters
    ----------
    read : (verdict, evidence) or None
        What the manifest says of itself that was read.
    listed : bool
        Whether the PACS was asked.
    """
    if read is None:
        return compared if listed else worst((compared, UNVERIFIED))
    return compared if listed and has_rows_of_all(*read) else worst((compared, read[0]))


def has_rows_of_all(verdict: Verdict, evidence: Evidence) -> bool:
    """Whether a manifest that says so of itself has rows of each study that was asked for: else one was not listed."""
    return verdict != EMPTY and (evidence != "none" or worst((verdict, UNVERIFIED)) == UNVERIFIED)


def no_better(facts: tuple[Verdict, Evidence], read: tuple[Verdict, Evidence] | None) -> tuple[Verdict, Evidence]:
    """Verdict and evidence of a manifest, where it was made of one that was read, which may not name all."""
    if read is None:
        return facts
    return worst((facts[0], read[0])), weakest((facts[1], read[1]))


def verdict_of_manifests(said: Iterable[Verdict], not_held: bool) -> Verdict:
    """The verdict of several manifests together: the worst of theirs, and never better than their rows."""
    verdict = worst(said)
    return worst((verdict, PARTIAL)) if not_held else verdict


def completed_event(result: Result) -> Completed:
    """The event that ends a call."""
    return Completed(
        total=result.total,
        completed=result.completed,
        failed=result.failed,
        warning=result.warning,
        duration_seconds=result.duration_seconds,
        verdict=result.verdict,
        error=str(result.errors[0]["error"]) if result.errors else None,
        bytes=result.bytes,
        skipped=result.skipped,
    )


def _measure(result: Result, events: Events) -> None:
    seconds = events.elapsed()
    result.bytes, result.duration_seconds = events.bytes, seconds
    result.bytes_per_second = events.bytes / seconds if seconds > 0 else 0.0


def _sum_or_none(numbers: Iterable[int | None]) -> int | None:
    total = 0
    for number in numbers:
        if number is None:
            return None
        total += number
    return total


def any_transient(rows: Iterable[Instance]) -> bool:
    """Whether a row is not held for a reason that may pass."""
    return any(row.state in NOT_HELD and is_transient(row.reason) for row in rows)


def _may_pass(end: End) -> bool:
    """Whether trying again can help."""
    for state, numbers in zip(end.states, end.numbers, strict=True):
        if numbers.verdict == FAILED and state.errors and not state.errors[0].transient:
            return False
    raised = [error for state in end.states for error in state.errors]
    reasons = [n.reason for n in end.numbers if n.verdict != CANCELLED and n.reason is not None]
    passing = any(error.transient or isinstance(error, Cancelled) for error in raised)
    return any_transient(end.rows()) or passing or any(map(is_transient, reasons))


def _most_frequent_reason(rows: Iterable[Instance]) -> str | None:
    reasons = Counter(x.reason for x in rows if x.state not in HELD and x.reason)
    return reasons.most_common(1)[0][0] if reasons else None


# --- downgrade -----------------------------------------------------------------------------------------


def fix_rows(result: Result) -> None:
    """Make the manifest of a call that was left to itself now: what returns one day may still touch its records."""
    if result.rows is not None:
        table = result.rows()
        result.rows = lambda: table


def wait_for_window(result: Result, resume_at: datetime | None) -> None:
    """The hours of the source are over: it may go on at ``resume_at``."""
    result.verdict, result.reason = PARTIAL, "window"
    resume_later(result, resume_at)


def resume_later(result: Result, resume_at: datetime | None) -> None:
    """Something of it had to wait for the hours of the source; whatever the verdict, they begin at ``resume_at``."""
    result.resume_at, result.transient = resume_at, True


def manifest_not_written(result: Result, error: DicomGetError) -> None:
    """The instances may be there, and what proves it is not."""
    _undone(result, error, error.hint or "Free space, or give another manifest_root.")


def not_closed(result: Result, error: DicomGetError) -> None:
    """The destination could not be closed in order: not all that stands around the instances may be durable."""
    _undone(result, error, error.hint)


def _undone(result: Result, error: DicomGetError, hint: str) -> None:
    if hint not in [one["hint"] for one in result.errors]:  # what ended the run may be the reason for this too
        result.errors.insert(0, _entry(error.message, hint))
    if result.verdict == COMPLETE:
        result.verdict, result.reason = PARTIAL, error.word
        result.transient = error.transient


def left_to_itself(states: Sequence[StudyState], why: DicomGetError, cancel: CancelToken) -> End:
    """The end of a call that something at the destination does not return to: what was confirmed by then counts."""
    if not states:
        return End(error=why)
    last = states[-1]
    last.errors.insert(0, why)
    last.cancelled_by = cancel.reason
    last.conclude(cancel.word)
    return end_of(states)


def add_search_of_list(result: Result, found: FoundList) -> None:
    """What the search for a list of studies had to say: remarks, how many entries name none that is there, a doubt."""
    unknown = sum(not entry.uids for entry in found.entries)
    result.errors += found.remarks
    if found.doubt is not None:
        _doubt(result, found.doubt)
    if unknown:
        text = "An accession number matches no study at the PACS, or more than max_studies."
        _not_found(result, _entry(text, advice("not_found"), unknown))


def _not_found(result: Result, remark: dict[str, Any]) -> None:
    """Something that was named is not there: that matched nothing, whatever became of the rest."""
    result.verdict = worst((result.verdict, EMPTY))
    result.reason = result.reason or "not_found"
    result.errors.append(remark)


def unknown_remark(unknown: Collection[str]) -> dict[str, Any]:
    """What is said of UIDs of a query that the source does not list."""
    shown = ", ".join(sorted(unknown)[:_SHOWN]) + (", …" if len(unknown) > _SHOWN else "")
    text = f"The PACS lists nothing of these UIDs of the query: {shown}."
    return _entry(text, advice("not_found"), len(unknown))


# --- merge ---------------------------------------------------------------------------------------------


def merge(results: Sequence[Result]) -> Result:
    """Several retrievals as one: sums, the worst verdict, the weakest evidence, the earliest moments."""
    if len(results) == 1:
        return results[0]
    if not results:
        return Result(verdict=EMPTY, reason="nothing_asked")
    verdict = worst(result.verdict for result in results)
    deciding = [result for result in results if result.verdict == verdict]
    seconds = sum(result.duration_seconds for result in results)
    received = sum(result.bytes for result in results)
    return Result(
        verdict=verdict,
        # One that waits for its window is the reason to wait, whatever happened to the others.
        reason=next((result.reason for result in results if result.resume_at), deciding[0].reason),
        expected=_sum_or_none(result.expected for result in results),
        **{name: sum(getattr(result, name) for result in results) for name in (*COUNTS, "associations")},
        bytes=received,
        duration_seconds=seconds,
        bytes_per_second=received / seconds if seconds else 0.0,
        rounds=max(result.rounds for result in results),
        plan_at=min((result.plan_at for result in results if result.plan_at), default=None),
        evidence=weakest(result.evidence for result in results),
        resume_at=min((result.resume_at for result in results if result.resume_at), default=None),
        errors=_merged(error for result in results for error in result.errors),
        node=results[0].node,
        destination=results[0].destination,
        studies=[study for result in results for study in result.studies],
        kind=results[0].kind,
        transient=any(result.transient for result in deciding) or any(result.resume_at for result in results),
    )


def _merged(errors: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    counts: Counter[tuple[str, str]] = Counter()
    for error in errors:
        counts[str(error.get("error")), str(error.get("hint") or "")] += int(error.get("count") or 1)
    return [_entry(text, hint, number) for (text, hint), number in counts.most_common(MOST_ERRORS)]


# --- errors --------------------------------------------------------------------------------------------


def _entry(error: str, hint: str, count: int = 1) -> dict[str, Any]:
    return {"error": printable(error), "count": count, "hint": printable(hint)}


def _errors_of_get(end: End) -> list[dict[str, Any]]:
    """What went wrong, most telling first: errors that ended something, then rows, then strays, then C-FIND rows."""
    raised = ([end.error] if end.error is not None else []) + [e for state in end.states for e in state.errors]
    ended = [_entry(*said, count) for said, count in Counter((e.message, e.hint) for e in raised).items()]
    strays = sum((state.strays for state in end.states), Counter())
    refused = [
        _entry(f"{reason}: {STRAYS.get(reason, 'an object was refused')}", "", count)
        for reason, count in strays.most_common()
    ]
    rows = end.rows()
    found = [*ended, *_row_errors(rows, said=bool(raised)), *refused, *remarks_of(rows), *end.all_dropped().remarks()]
    return found[:MOST_ERRORS]


def remarks_of(rows: Iterable[Instance]) -> list[dict[str, Any]]:
    """What there is to say of rows that are held."""
    counts = Counter(x.reason for x in rows if x.state in HELD and x.reason in REMARKS)
    return [_entry(f"{word}: {REASONS[str(word)].text}", advice(word), count) for word, count in counts.most_common()]


def _row_errors(rows: Iterable[Instance], *, said: bool) -> list[dict[str, Any]]:
    """Why rows are not held; where it is ``said`` already what ended the run, only those with a text of their own."""
    counts = Counter((x.reason, x.error) for x in rows if x.state in NOT_HELD and x.reason and (x.error or not said))
    return [
        _entry(f"{reason}: {text}" if text else str(reason), advice(reason), count)
        for (reason, text), count in counts.most_common(MOST_ERRORS)
    ]
