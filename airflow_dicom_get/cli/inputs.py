"""What to retrieve, from what was typed: keys, studies, or a list of studies in a file."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from airflow_dicom_get.config.checks import invalid, shown
from airflow_dicom_get.dicom.dictionary import key_in
from airflow_dicom_get.engine.study_list import ListedStudy, read_study_list


def query_of(studies: Iterable[str], keys: Iterable[str]) -> dict[str, Any]:
    """A query from ``--study UID`` and ``-k KEY=VALUE``. A key that is repeated becomes a list.

    Raises
    ------
    InvalidOption
        A key has no value, or the studies are given twice.
    """
    found: dict[str, list[str]] = {}
    for text in keys:
        key, equals, value = text.partition("=")
        if not equals or not key.strip():
            key = key_in(text) or ""  # behind which the value may stand already, and where it is none, instead of it
            raise invalid(
                "-k", f"{shown(key) if key else 'a key'} has no value", "Write KEY=VALUE, for example StudyDate=today."
            )
        found.setdefault(key.strip(), []).append(value)
    uids = [uid for text in studies for uid in text.split(",")]
    if uids:
        if "StudyInstanceUID" in found:
            raise invalid("--study", "is given together with -k StudyInstanceUID", "Give one of the two.")
        found["StudyInstanceUID"] = uids
    return {key: values[0] if len(values) == 1 else values for key, values in found.items()}


def read_studies(name: str) -> list[ListedStudy]:
    """Read the file of ``--from-file``; see :func:`~airflow_dicom_get.engine.study_list.read_study_list`."""
    return read_study_list(name, option="--from-file")
