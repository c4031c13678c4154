"""The studies that a task is given, UIDs or Items, as the queries that the engine takes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from airflow_dicom_get.config.checks import invalid, shown
from airflow_dicom_get.dicom.uids import is_uid
from airflow_dicom_get.errors import InvalidOption


def study_queries(study: Any, *, skip: Callable[[InvalidOption], None] | None = None) -> list[dict[str, Any]]:
    """One query for all studies that are wanted whole, and one for each of which some series are.

    :param study: a UID, an Item, or a list of either; none for an empty list, as a search has found it
    :param skip: takes what is wrong with an entry of a list that is left out; None: it is raised
    """
    if not _is_list(study):
        uid, series = _study_and_series(study)
        return [_query(uid, series)]
    whole: dict[str, None] = {}
    parts: dict[str, list[str]] = {}
    for one in study:
        try:
            uid, series = _study_and_series(one)
        except InvalidOption as error:
            if skip is None:
                raise
            skip(error)
            continue
        if series is None:
            whole[uid] = None
        else:
            parts.setdefault(uid, []).extend(series)
    if len(study) and not whole and not parts:
        raise invalid("study", "is a list without a valid study", "Correct the task that produces it.")
    queries = [{"QueryRetrieveLevel": "STUDY", "StudyInstanceUID": list(whole)}] if whole else []
    return queries + [_query(uid, series) for uid, series in parts.items() if uid not in whole]


def study_uids(study: Any) -> list[str]:
    """The studies of a UID, an Item, or a list of either, whole."""
    return list(dict.fromkeys(_study_and_series(one)[0] for one in (study if _is_list(study) else [study])))


def study_series(study: Any) -> dict[str, list[str]]:
    """Of a UID, an Item, or a list of either, the studies of which some series alone are wanted, and these."""
    queries = [query for query in study_queries(study) if "SeriesInstanceUID" in query]
    return {query["StudyInstanceUID"]: query["SeriesInstanceUID"] for query in queries}


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str | bytes)


def _query(study: str, series: Sequence[str] | None) -> dict[str, Any]:
    if series is None:
        return {"QueryRetrieveLevel": "STUDY", "StudyInstanceUID": study}
    return {
        "QueryRetrieveLevel": "SERIES",
        "StudyInstanceUID": study,
        "SeriesInstanceUID": list(dict.fromkeys(series)),
    }


def _study_and_series(one: Any) -> tuple[str, list[str] | None]:
    series = None
    if isinstance(one, Mapping):
        if "study_instance_uid" not in one:
            raise invalid(
                "study", "is a mapping without study_instance_uid", "Give a UID, or an Item of DicomFindOperator."
            )
        series = one.get("series_instance_uids")
        one = one["study_instance_uid"]
    uid = _uid(one)
    if series is None:
        return uid, None
    if not _is_list(series) or not series:
        raise invalid(
            "study", f"the Item of {uid} has an invalid list of series", "Give series_instance_uids, or None for all."
        )
    return uid, [_uid(one) for one in series]


def _uid(value: Any) -> str:
    text = value.strip() if isinstance(value, str) else value
    if text in ("", "None", None):
        raise invalid("study", "is empty, or its template rendered to an empty string", "Give a Study Instance UID.")
    if isinstance(text, str) and text[:1] in "[{(":
        raise invalid(  # without the text, which may name a patient
            "study",
            "is a list or an Item that a template rendered as text",
            "Set render_template_as_native_obj=True, or use .output.",
        )
    if not isinstance(text, str) or not is_uid(text):
        raise invalid("study", f"{shown(value)} is not a valid Study Instance UID", "A UID is 1 to 64 digits and dots.")
    return text
