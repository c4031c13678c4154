"""What a manifest says, as far as the page shows it: picked batch by batch, whatever its size.

pandas is not imported: reading needs none of it.
"""

from __future__ import annotations

import csv
import io
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING, Any

from airflow_dicom_get.errors import ManifestError
from airflow_dicom_get.manifest.files import safe_cell
from airflow_dicom_get.vocabulary import NOT_HELD, OUTSIDE_LIST

if TYPE_CHECKING:
    import pyarrow.parquet as pq

MAX_ROWS = 500
"""Instances shown on a page; the file for download holds all."""
MAX_TEXT = 400
"""Characters shown of a text."""
_MAX_REASONS = 50
_BATCH = 4096

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
_NEEDED = (*_SHOWN, "study_instance_uid", "bytes")
_DIFFERENCE = ("series_instance_uid", "sop_instance_uid", "symbol", "what")


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

    @classmethod
    def of(cls, told: Mapping[str, Any]) -> Contents:
        """From its JSON."""
        return cls(**{**told, "series": [Series(**one) for one in told["series"]]})


def contents_of(file: pq.ParquetFile) -> Contents:
    """Pick what is shown: all that is not held, in full up to a limit, and the series.

    :raises ManifestError: the file is neither a manifest nor a list of differences
    """
    names = file.schema_arrow.names
    rows = file.metadata.num_rows
    if "symbol" in names:
        wanted = [name for name in _DIFFERENCE if name in names]
        first = islice(_rows(file, wanted), MAX_ROWS)
        return Contents(rows=rows, differences=list(map(_plain, first)), differences_count=rows)
    if any(name not in names for name in _NEEDED):
        raise ManifestError("The file is not a manifest.", hint="", uri=None)
    bad, odd = _First(), _First()
    reasons: Counter[str | None] = Counter()
    series: dict[tuple[str, str], Series] = {}
    for row in _rows(file, _NEEDED):
        # Empty where the PACS left it so.
        place = row["study_instance_uid"] or "", row["series_instance_uid"] or ""
        one = series.get(place)
        if one is None:
            one = series[place] = Series(*place, row["modality"], row["series_number"])
        if row["state"] in NOT_HELD:
            one.not_held += 1
            bad.add(row)
            reasons[row["reason"]] += 1
        elif row["state"] in OUTSIDE_LIST:
            odd.add(row)
        else:
            one.held += 1
            one.bytes += row["bytes"] or 0
    return Contents(
        rows=rows,
        not_held=bad.rows,
        not_held_count=bad.count,
        remarked=odd.rows,
        remarked_count=odd.count,
        reasons=[(_shown(reason), count) for reason, count in reasons.most_common(_MAX_REASONS)],
        series=_in_order(series.values()),
        series_count=len(series),
        studies=len({study for study, _ in series}),
    )


def _rows(file: pq.ParquetFile, names: Sequence[str]) -> Iterator[dict[str, Any]]:
    # No more than is needed of pyarrow: its functions on tables import pandas, half of the time that a page takes.
    for batch in file.iter_batches(_BATCH, columns=list(names), use_threads=False):
        columns = [batch.column(name).to_pylist() for name in names]
        for values in zip(*columns, strict=True):
            yield dict(zip(names, values, strict=True))


class _First:
    """How many rows were added, and the first of them by the numbers of series and instance."""

    def __init__(self) -> None:
        self.count = 0
        self._kept: list[dict[str, Any]] = []

    def add(self, row: Mapping[str, Any]) -> None:
        """Add one."""
        self.count += 1
        self._kept.append({name: _shown(row[name]) for name in _SHOWN})
        if len(self._kept) > 10 * MAX_ROWS:
            self._kept = self.rows

    @property
    def rows(self) -> list[dict[str, Any]]:
        """The first ones."""

        def key(row: Mapping[str, Any]) -> tuple[Any, ...]:
            return tuple((row[name] is None, row[name] or 0) for name in ("series_number", "instance_number"))

        return sorted(self._kept, key=key)[:MAX_ROWS]


def _plain(row: Mapping[str, Any]) -> dict[str, Any]:
    return {name: _shown(value) for name, value in row.items()}


def _shown(value: Any) -> Any:
    """A value as a page shows it: whole numbers as they are, all else as a text that is not too long."""
    if value is None or isinstance(value, int):
        return value
    text = str(value)
    return text if len(text) <= MAX_TEXT else f"{text[:MAX_TEXT]}…"


def _in_order(series: Iterable[Series]) -> list[Series]:
    """Those with something missing first, then in the order of their numbers; the first ones."""
    ordered = sorted(series, key=lambda one: (not one.not_held, one.study, one.number or 0, one.uid))[:MAX_ROWS]
    for one in ordered:
        one.study, one.uid, one.modality = _shown(one.study), _shown(one.uid), _shown(one.modality)
    return ordered


def csv_lines(file: pq.ParquetFile) -> Iterator[str]:
    """The whole table as CSV, piece by piece; nothing before the first rows could be read."""
    buffer = io.StringIO()
    writer = csv.writer(buffer)
    writer.writerow(map(_cell, file.schema_arrow.names))
    for batch in file.iter_batches(_BATCH, use_threads=False):
        columns = [map(_cell, column.to_pylist()) for column in batch.columns]
        writer.writerows(zip(*columns, strict=True))
        yield buffer.getvalue()
        buffer.seek(0)
        buffer.truncate()
    yield buffer.getvalue()


def _cell(value: Any) -> Any:
    if value is None or isinstance(value, int | float):
        return value
    return safe_cell(value.isoformat() if hasattr(value, "isoformat") else str(value))
