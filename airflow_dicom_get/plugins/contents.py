"""What a manifest says, as far as the page shows it. pandas is not imported: the API server needs none of it."""

from __future__ import annotations

import csv
import io
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from airflow_dicom_get.config.checks import shown_path
from airflow_dicom_get.errors import ManifestError
from airflow_dicom_get.manifest.frames import table_in_xcom
from airflow_dicom_get.vocabulary import NOT_HELD, OUTSIDE_LIST

if TYPE_CHECKING:
    import pyarrow as pa

MAX_ROWS = 500
"""Instances shown on a page; the file for download holds all."""

_SHOWN = (
    "series_instance_uid",
    "sop_instance_uid",
    "modality",
    "series_number",
    "instance_number",
    "state",
    "reason",
    "dimse_status",
    "error",
)


@dataclass
class Series:
    """The numbers of one series."""

    study: str
    uid: str
    modality: str | None
    number: int | None
    held: int = 0
    not_held: int = 0
    bytes: int = 0


@dataclass
class Contents:
    """What is shown of a manifest."""

    rows: int = 0
    not_held: list[dict[str, Any]] = field(default_factory=list)
    not_held_count: int = 0
    remarked: list[dict[str, Any]] = field(default_factory=list)
    remarked_count: int = 0
    reasons: list[tuple[str | None, int]] = field(default_factory=list)
    series: list[Series] = field(default_factory=list)
    series_count: int = 0
    studies: int = 0
    differences: list[dict[str, Any]] = field(default_factory=list)
    """Rows of a verification, which has a table of its own shape."""
    differences_count: int | None = None


def table_of(returned: Any, uri: str | None) -> pa.Table:
    """The manifest as a table: what the task returned if that holds it, else the file.

    :param returned: the XCom as it is stored
    :param uri: where the file is, as the summary says
    :raises ManifestError: there is none, or it cannot be read from here
    """
    from airflow_dicom_get.manifest.files import read_table

    inline = table_in_xcom(returned)
    if inline is not None:
        return inline
    if isinstance(returned, Mapping):
        uri = returned.get("manifest_uri") or uri
    if not uri:
        raise ManifestError("There is no manifest.", hint="Check the log of the task.", uri=None)
    if not str(uri).startswith(("/", "file:")):
        # The connection to that bucket is the task's, and without one boto would take whatever keys it finds here.
        raise ManifestError(
            f"The manifest is not in a local folder: {shown_path(uri)}.",
            hint="Read it with airflow_dicom_get.notebook.read_manifest().",
            uri=str(uri),
        )
    return read_table(uri)


def contents_of(table: pa.Table) -> Contents:
    """Pick what is shown: all that is not held, in full up to a limit, and the series."""
    contents = Contents(rows=table.num_rows)
    names = table.column_names
    if "symbol" in names:
        contents.differences_count = table.num_rows
        wanted = [name for name in ("series_instance_uid", "sop_instance_uid", "symbol", "what") if name in names]
        contents.differences = table.select(wanted).slice(0, MAX_ROWS).to_pylist()
        return contents
    if any(name not in names for name in (*_SHOWN, "study_instance_uid", "bytes")):
        raise ManifestError("The return value of the task is not a manifest.", hint="", uri=None)
    bad = _where(table, NOT_HELD)
    contents.not_held_count, contents.not_held = bad.num_rows, _rows(bad)
    contents.reasons = _reasons(bad)
    odd = _where(table, OUTSIDE_LIST)
    contents.remarked_count, contents.remarked = odd.num_rows, _rows(odd)
    series = _series(table)
    contents.series_count, contents.series = len(series), series[:MAX_ROWS]
    contents.studies = len({one.study for one in series})
    return contents


def _where(table: pa.Table, states: Collection[str]) -> pa.Table:
    from functools import reduce
    from operator import or_

    from pyarrow import compute

    return table.filter(reduce(or_, (compute.field("state") == state for state in states)))


def _rows(table: pa.Table) -> list[dict[str, Any]]:
    ordered = table.select(list(_SHOWN)).sort_by([("series_number", "ascending"), ("instance_number", "ascending")])
    rows: list[dict[str, Any]] = ordered.slice(0, MAX_ROWS).to_pylist()
    return rows


def _reasons(bad: pa.Table) -> list[tuple[str | None, int]]:
    counted = bad.group_by("reason").aggregate([([], "count_all")]).sort_by([("count_all", "descending")])
    return [(row["reason"], row["count_all"]) for row in counted.to_pylist()]


def _series(table: pa.Table) -> list[Series]:
    """Those with something missing first, then in the order of their numbers."""
    keys = ["study_instance_uid", "series_instance_uid", "modality", "series_number", "state"]
    found: dict[tuple[str, str], Series] = {}
    for row in table.group_by(keys).aggregate([([], "count_all"), ("bytes", "sum")]).to_pylist():
        study, uid = (
            row["study_instance_uid"] or "",
            row["series_instance_uid"] or "",
        )  # empty where the PACS left it so
        one = found.setdefault((study, uid), Series(study, uid, row["modality"], row["series_number"]))
        if row["state"] in NOT_HELD:
            one.not_held += row["count_all"]
        elif row["state"] not in OUTSIDE_LIST:
            one.held += row["count_all"]
            one.bytes += row["bytes_sum"] or 0
    return sorted(found.values(), key=lambda one: (not one.not_held, one.study, one.number or 0, one.uid))


def csv_lines(table: pa.Table) -> Iterator[str]:
    """The whole table as CSV, piece by piece."""
    buffer = io.StringIO()
    writer = csv.writer(buffer)
    writer.writerow(table.column_names)
    for batch in table.to_batches(max_chunksize=2000):
        for row in zip(*(column.to_pylist() for column in batch.columns), strict=True):
            writer.writerow(_cell(value) for value in row)
        yield buffer.getvalue()
        buffer.seek(0)
        buffer.truncate()
    yield buffer.getvalue()


def _cell(value: Any) -> Any:
    """A value as a spreadsheet may open it: a text that it would take for a formula gets a quote in front."""
    if isinstance(value, str) and value[:1] in ("=", "+", "-", "@", "\t", "\r"):
        return f"'{value}"
    return value.isoformat() if hasattr(value, "isoformat") else value
