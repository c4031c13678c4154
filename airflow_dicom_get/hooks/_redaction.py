"""What stands in the rendered fields, which every viewer of the DAG can read, and in the map index."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from airflow_dicom_get.dicom.uids import is_uid
from airflow_dicom_get.manifest.frames import REFERENCE_KIND
from airflow_dicom_get.vocabulary import noun

SHOWN_KEYS = frozenset(
    {
        "queryretrievelevel",
        "studyinstanceuid",
        "seriesinstanceuid",
        "sopinstanceuid",
        "sopclassuid",
        "sopclassesinstudy",
        "modality",
        "modalitiesinstudy",
        "studydate",
        "studytime",
        "seriesdate",
        "seriestime",
        "seriesnumber",
        "instancenumber",
        "bodypartexamined",
        "manufacturer",
        "specificcharacterset",
    }
)
"""Query keys that say nothing of a patient. All others are taken to: a list of the harmless is short and known."""

HIDDEN = "***"
_LISTED = 20
_BETWEEN = re.compile(r"""[][()'",\s]+""")
"""What stands between the UIDs of a list that a template rendered as text."""


def shown_query(query: Any) -> Any:
    """The query with ``***`` for the values of identifying keys; tags in numbers are not told apart from these.

    What is no mapping, as one that a template rendered as text, is refused later, and shown nowhere.
    """
    if not isinstance(query, Mapping):
        return HIDDEN if query else query
    return {str(key): value if str(key).lower() in SHOWN_KEYS else HIDDEN for key, value in query.items()}


def shown_study(study: Any) -> Any:
    """An Item without the values of the keys that its DAG asked for.

    A text of anything but UIDs, as an Item that a template rendered, is refused later, and shown nowhere.
    """
    if isinstance(study, str):
        return study if all(map(is_uid, filter(None, _BETWEEN.split(study)))) else HIDDEN
    if isinstance(study, Mapping):
        shown = dict(study)
        if isinstance(shown.get("keys"), Mapping):
            shown["keys"] = dict.fromkeys(shown["keys"], HIDDEN)
        return shown
    if isinstance(study, Sequence) and not isinstance(study, bytes):
        shown_items = [shown_study(item) for item in study[:_LISTED]]
        return shown_items if len(study) <= _LISTED else [*shown_items, f"and {len(study) - _LISTED} more"]
    return study


def _of_rows(rows: Any) -> str:
    return f"manifest of {rows} {noun(rows, 'row')}"


def shown_manifest(manifest: Any) -> Any:
    """``manifest of N rows`` for a frame; a reference or an address says nothing of a patient and stays.

    A text of several lines, as a frame that a template rendered, is refused later, and shown nowhere.
    """
    if manifest is None or isinstance(manifest, str):
        return manifest if manifest is None or manifest.isprintable() else HIDDEN
    if isinstance(manifest, Mapping):
        if manifest.get("kind") == REFERENCE_KIND:
            return f"{_of_rows(manifest.get('rows'))}: {manifest.get('manifest_uri')}"
        return f"{len(manifest)} {noun(len(manifest), 'key')}"
    if hasattr(manifest, "columns"):
        return _of_rows(len(manifest))
    if isinstance(manifest, Sequence):
        return [shown_manifest(one) for one in manifest[:_LISTED]]
    return type(manifest).__name__


def label_of(study: Any, query: Any, manifest: Any) -> str:
    """A short name for what one task retrieves, without patient data: the study's UID."""
    if study is not None:
        return _study_label(study)
    if query is not None:
        shown = shown_query(query)
        if not isinstance(shown, Mapping):
            return "query"
        return " ".join(f"{key}={value}" for key, value in shown.items() if key != "QueryRetrieveLevel")[:200]
    named = "study_instance_uid" in getattr(manifest, "columns", ())
    study = study_in(manifest["study_instance_uid"].unique()) if named else None
    return study or str(shown_manifest(manifest))[:200]


def study_in(studies: Iterable[Any]) -> str | None:
    """The UID of the study that rows of a manifest are of; None if they are of several, or of none."""
    found = list(studies)
    return str(found[0]) if len(found) == 1 and isinstance(found[0], str) and is_uid(found[0]) else None


def _study_label(study: Any) -> str:
    if isinstance(study, Mapping):
        text = str(study.get("label") or study.get("study_instance_uid") or "")
        return text[:100]
    if isinstance(study, Sequence) and not isinstance(study, str):
        if not study:
            return "no study"
        first = _study_label(study[0])
        return first if len(study) == 1 else f"{first} and {len(study) - 1} more"
    return str(shown_study(study))[:64]
