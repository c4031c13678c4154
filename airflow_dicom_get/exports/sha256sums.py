"""``SHA256SUMS``: what ``sha256sum -c`` reads, one line a file, relative to the destination."""

from __future__ import annotations

from airflow_dicom_get.exports.cohort import Cohort, files_of


def sha256sums(cohort: Cohort) -> str:
    """The text. What is missing stands in front of it, in comments that ``sha256sum`` passes over."""
    files = files_of(cohort).rows
    lines = [f"{digest}  {path}" for digest, path in zip(files["sha256"], files["path"], strict=True)]
    return "\n".join([*_comments(cohort), *lines, ""])


def _comments(cohort: Cohort) -> list[str]:
    missing = cohort.missing
    if not len(missing):
        return []
    names = ("study_instance_uid", "series_instance_uid", "sop_instance_uid", "reason")
    cells = (missing[name].fillna("?").map(_plain) for name in names)
    rows = [
        f"# missing: {study}/{series}/{sop}.dcm {reason}" for study, series, sop, reason in zip(*cells, strict=True)
    ]
    return [f"# {cohort.lack()}", *rows]


def _plain(text: str) -> str:
    """A UID may be malformed where an instance is missing for that."""
    return text.encode("unicode_escape").decode("ascii")
