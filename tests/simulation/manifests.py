"""Manifests without Parquet: what a history needs of them, at a hundredth of their cost.

The engine makes rows, and hands them to pyarrow; a quarter of a history would be spent there. In nearly all histories
they go to the disk as plain text, by a few writes where Parquet needs sixty. In the others all is as users have it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple

from airflow_dicom_get.manifest import files, schema
from airflow_dicom_get.manifest.schema import COLUMNS
from airflow_dicom_get.records import Instance

_COLUMNS = {
    "study_instance_uid": "study",
    "series_instance_uid": "series",
    "sop_instance_uid": "sop",
    "sop_class_uid": "sop_class",
    "state": "state",
    "reason": "reason",
}
_TOLD = ("study_instance_uid", "series_instance_uid", "sop_instance_uid", "state", "reason")


class Rows:
    """In the place of :func:`schema.manifest_rows` and :func:`schema.manifest_table`: the rows as they are."""

    def __init__(
        self, instances: Iterable[Instance], *, source: str, destination: str, tags: Sequence[str] = ()
    ) -> None:
        self.instances = list(instances)
        self.about = (source, destination, *tags)
        self.schema = SimpleNamespace(names=[*schema.COLUMNS, *tags], metadata=None)

    column_names = tuple(COLUMNS)
    """As of a table: what takes manifests takes these too."""

    def to_batches(self, size: int) -> list[Rows]:
        """See :class:`pyarrow.Table`."""
        return [self]

    def column(self, name: str) -> _Column:
        """See :class:`pyarrow.Table`."""
        if name == "source":
            return _Column([self.about[0]] * len(self.instances))
        return _Column([getattr(x, _COLUMNS[name]) or None for x in self.instances])


class _Column(NamedTuple):
    values: list[Any]

    def unique(self) -> _Column:
        return _Column(list(dict.fromkeys(self.values)))

    def to_pylist(self) -> list[Any]:
        return self.values


def _write(rows: Rows, file: Any, facts: Mapping[str, str]) -> None:
    """In the place of what writes Parquet."""
    file.write(repr((sorted(facts.items()), rows.about)).encode())
    file.write(repr([(x.key, x.state, x.reason, x.bytes, x.sha256) for x in rows.instances]).encode())
    file.write(b"the end")


PLAIN: list[tuple[Any, str, object]] = [
    (schema, "manifest_rows", Rows),
    (schema, "manifest_table", Rows),
    (files, "_write", _write),
]
"""Module, name and model of what makes and writes manifests."""


def plain_rows(table: Any) -> list[dict[str, Any]]:
    """Of each row of a table, or of :class:`Rows`, which instance it is, and what became of it."""
    if not isinstance(table, Rows):
        found: list[dict[str, Any]] = table.select(list(_TOLD)).to_pylist()
        return found
    return [{name: getattr(x, _COLUMNS[name]) or None for name in _TOLD} for x in table.instances]
