"""The errors of a run as a user reads them: grouped, counted, at most ten."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from airflow_dicom_get.errors import DicomGetError

if TYPE_CHECKING:
    from airflow_dicom_get.engine.study import StudyRun
    from airflow_dicom_get.engine.verdict import StudyEnd

_MOST = 10
_HINTS = {
    "class_refused": "The source does not offer this SOP class to us: ask the PACS admin.",
    "not_sent": "Run again; if it stays so, ask the PACS admin whether the instance can be read there.",
    "refused_by_source": "Ask the PACS admin whether the instance can be read there.",
    "sub_operation_failed": "Look into the PACS's log for the failed sub-operation.",
    "different_content": "Compare the two; move the stored file away to take the source's.",
    "destination_full": "Make room and run again: what is held is not fetched again.",
    "destination_error": "Check the destination: room, permissions, and the log of a node.",
    "destination_refused": "The node does not take it, and nothing is converted for it: ask its admin to accept it.",
}
_STRAYS = {
    "foreign_study": "an object of another study was sent and refused",
    "not_asked": "an object outside what was asked for was sent and refused",
    "bad_uid": "an object with an invalid UID was sent and refused",
    "uid_mismatch": "an object was sent whose data set contradicts its command, and refused",
    "unparsable": "an object was sent whose data set cannot be read, and refused",
    "empty_dataset": "an object without data set was sent and refused",
}


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
        if x.state in ("failed", "missing", "conflict") and x.reason and (x.error or not raised)
    )
    for (reason, text), count in rows.most_common(_MOST):
        out.append(
            {"error": f"{reason}: {text}" if text else str(reason), "count": count, "hint": _HINTS.get(str(reason), "")}
        )
    strays = sum((run.strays for run in runs), Counter())
    for reason, count in strays.most_common():
        out.append({"error": f"{reason}: {_STRAYS.get(reason, 'an object was refused')}", "count": count, "hint": ""})
    return out[:_MOST]
