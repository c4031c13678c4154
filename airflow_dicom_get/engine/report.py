"""The errors of a run as a user reads them: grouped, counted, at most ten."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from airflow_dicom_get.errors import DicomGetError
from airflow_dicom_get.vocabulary import NOT_HELD, STRAYS, advice

if TYPE_CHECKING:
    from airflow_dicom_get.engine.study import StudyRun
    from airflow_dicom_get.engine.verdict import StudyEnd

_MOST = 10


def errors_of(runs: Sequence[StudyRun], ends: Sequence[StudyEnd], error: DicomGetError | None) -> list[dict[str, Any]]:
    """What went wrong, most telling first: errors that ended something, then rows, then strays."""
    out: list[dict[str, Any]] = []
    raised = ([error] if error is not None else []) + [e for run in runs for e in run.errors]
    for (message, hint), count in Counter((e.message, e.hint) for e in raised).items():
        out.append({"error": message, "count": count, "hint": hint})
    rows = Counter(
        (x.reason, x.error)
        for end in ends
        for x in end.rows
        if x.state in NOT_HELD and x.reason and (x.error or not raised)
    )
    for (reason, text), count in rows.most_common(_MOST):
        out.append({"error": f"{reason}: {text}" if text else str(reason), "count": count, "hint": advice(reason)})
    strays = sum((run.strays for run in runs), Counter())
    for reason, count in strays.most_common():
        out.append({"error": f"{reason}: {STRAYS.get(reason, 'an object was refused')}", "count": count, "hint": ""})
    return out[:_MOST]
