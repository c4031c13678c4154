"""From what the engine says of a retrieval to what Airflow is told."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from airflow.sdk.exceptions import AirflowFailException

from airflow_dicom_get.config.checks import invalid, shown
from airflow_dicom_get.errors import Cancelled, IncompleteRetrieval
from airflow_dicom_get.result import Result
from airflow_dicom_get.vocabulary import ACCEPTABLE, CANCELLED, EMPTY, weakest, worst

MAX_ERRORS = 10

_SUMS = (
    "total",
    "completed",
    "skipped",
    "warning",
    "failed",
    "withdrawn",
    "unexpected",
    "conflicts",
    "bytes",
    "associations",
)


def check_accept(accept: Any) -> tuple[str, ...]:
    """The verdicts that are a success."""
    words = (accept,) if isinstance(accept, str) else tuple(accept)
    for word in words:
        if word not in ACCEPTABLE:
            raise invalid("accept", f"{shown(word)} is not allowed", f"Give some of {', '.join(ACCEPTABLE)}.")
    return words


def merge(results: Sequence[Result]) -> Result:
    """Several retrievals of one task as one: sums, the worst verdict, the weakest evidence."""
    if len(results) == 1:
        return results[0]
    if not results:
        return Result(verdict=EMPTY, reason="nothing_asked")
    verdict = worst(result.verdict for result in results)
    decisive = [result for result in results if result.verdict == verdict]
    expected = [result.expected for result in results]
    seconds = sum(result.duration_seconds for result in results)
    received = sum(result.bytes for result in results)
    return Result(
        verdict=verdict,
        # One that waits for its window is the reason to wait, whatever ails the others.
        reason=next((result.reason for result in results if result.resume_at), decisive[0].reason),
        expected=None if None in expected else sum(one for one in expected if one is not None),
        **{name: sum(getattr(result, name) for result in results) for name in _SUMS},
        duration_seconds=seconds,
        bytes_per_second=received / seconds if seconds else 0.0,
        rounds=max(result.rounds for result in results),
        # What is complete is so as of the oldest of the lists.
        plan_at=min((result.plan_at for result in results if result.plan_at), default=None),
        evidence=weakest(result.evidence for result in results),
        resume_at=min((result.resume_at for result in results if result.resume_at), default=None),
        errors=_merge_errors(error for result in results for error in result.errors),
        node=results[0].node,
        destination=results[0].destination,
        studies=[study for result in results for study in result.studies],
        transient=any(result.transient for result in decisive),
    )


def _merge_errors(errors: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    counts: Counter[tuple[str, str]] = Counter()
    for error in errors:
        counts[str(error.get("error")), str(error.get("hint") or "")] += int(error.get("count") or 1)
    return [{"error": text, "count": number, "hint": hint} for (text, hint), number in counts.most_common(MAX_ERRORS)]


def summary(result: Result, *, studies: int, series: int, manifest: dict[str, Any], try_number: int) -> dict[str, Any]:
    """The readable value beside the manifest, which XCom shows in hexadecimal.

    :param studies: how many of the manifest, as ``series``
    :param manifest: the ``manifest_…`` keys
    """
    values = result.to_json()
    source = values.pop("node")
    del values["manifest"]
    return {
        "schema": 1,
        **values,
        "errors": values["errors"][:MAX_ERRORS],
        "studies": studies,
        "series": series,
        "source": source,
        **manifest,
        "try_number": try_number,
    }


def raise_for(result: Result, accept: Sequence[str]) -> None:
    """Raise what fits a verdict that is no success: with or without another try."""
    if result.verdict == CANCELLED:
        raise Cancelled(f"{result.summary()}.", hint="The next run resumes.", node=result.node)
    try:
        result.raise_for_verdict(accept)
    except IncompleteRetrieval as error:
        if error.transient:
            raise
        raise AirflowFailException(str(error)) from error
