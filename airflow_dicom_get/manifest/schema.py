"""What a row of a manifest is: the columns of schema 1, their types in Arrow, and rows both ways."""

from __future__ import annotations

from array import array
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from itertools import accumulate
from operator import attrgetter
from typing import TYPE_CHECKING, Any

from airflow_dicom_get.records import Instance
from airflow_dicom_get.vocabulary import REASONS, STATES

if TYPE_CHECKING:
    import pyarrow as pa

__all__ = [
    "COLUMNS",
    "KINDS",
    "SCHEMA_VERSION",
    "arrow_schema",
    "as_metadata",
    "instances_of",
    "manifest_rows",
    "manifest_table",
    "metadata_of",
]

SCHEMA_VERSION = 1
_KEY = "dicom_get."
BATCH = 4096
"""Rows that are made and written at a time."""

_COLUMNS: tuple[tuple[str, str, str], ...] = (
    # column, attribute of the record, type
    ("study_instance_uid", "study", "string"),
    ("series_instance_uid", "series", "string"),
    ("sop_instance_uid", "sop", "string"),
    ("sop_class_uid", "sop_class", "string"),
    ("transfer_syntax_uid", "syntax", "string"),
    ("modality", "modality", "string"),
    ("series_number", "series_number", "int64"),
    ("instance_number", "instance_number", "int64"),
    ("state", "state", "string"),
    ("reason", "reason", "string"),
    ("exactness", "exactness", "string"),
    ("dimse_status", "dimse_status", "int64"),
    ("error", "error", "string"),
    ("uri", "uri", "string"),
    ("bytes", "bytes", "int64"),
    ("sha256", "sha256", "string"),
    ("dataset_offset", "dataset_offset", "int64"),
    ("dataset_bytes", "dataset_bytes", "int64"),
    ("forwarded_to", "forwarded_to", "string"),
    ("forward_status", "forward_status", "string"),
    ("forward_error", "forward_error", "string"),
    ("source", "", "string"),
    ("destination", "", "string"),
    ("availability", "availability", "string"),
    ("attempt", "attempt", "int64"),
    ("association", "association", "int64"),
    ("received_at", "received_at", "timestamp"),
    ("duration_ms", "duration_ms", "int64"),
)

COLUMNS: tuple[str, ...] = tuple(name for name, _, _ in _COLUMNS)
"""The columns of schema 1, in their order; a column per tag comes after them."""
KINDS: dict[str, str] = {name: kind for name, _, kind in _COLUMNS}
"""What a column holds: ``string``, ``int64`` or ``timestamp``."""
_UIDS = frozenset({"study", "series", "sop"})
_WORDS: Mapping[str, Collection[str]] = {"state": STATES, "reason": REASONS}
_SIZES = frozenset({"bytes", "dataset_offset"})
_NOT_READ = frozenset({"dataset_bytes", "dimse_status", "attempt", "association", "received_at", "duration_ms"})
"""What is derived, and what tells how an instance came: a run that reads a manifest has its own."""


def arrow_schema(tags: Sequence[str] = ()) -> pa.Schema:
    """The schema of a manifest with columns for ``tags``."""
    import pyarrow as pa

    types = {"string": pa.string(), "int64": pa.int64(), "timestamp": pa.timestamp("us", tz="UTC")}
    columns = [(name, types[kind]) for name, _, kind in _COLUMNS]
    return pa.schema([*columns, *((tag, pa.string()) for tag in tags)])


def manifest_rows(
    instances: Iterable[Instance], *, source: str, destination: str, tags: Sequence[str] = ()
) -> pa.RecordBatchReader:
    """Make the rows of some instances, batch by batch: what :func:`write_manifest` takes without a whole table.

    Parameters
    ----------
    instances : iterable of Instance
        The rows, in their order.
    source, destination : str
        Where they came from and went to.
    tags : sequence of str
        Names of the columns that ``Instance.tags`` fills.
    """
    import pyarrow as pa

    schema = arrow_schema(tags)

    def batches() -> Iterator[pa.RecordBatch]:
        for chunk in _chunks(instances):
            columns = []
            for (name, attribute, _), kind in zip(_COLUMNS, schema.types, strict=False):
                constant = source if name == "source" else destination
                columns.append(_array(_values(chunk, attribute) if attribute else [constant] * len(chunk), kind))
            for position in range(len(tags)):
                columns.append(_array([_tag(row, position) for row in chunk], pa.string()))
            yield pa.record_batch(columns, schema=schema)

    return pa.RecordBatchReader.from_batches(schema, batches())


def manifest_table(
    instances: Iterable[Instance], *, source: str, destination: str, tags: Sequence[str] = ()
) -> pa.Table:
    """As :func:`manifest_rows`, as one table."""
    return manifest_rows(instances, source=source, destination=destination, tags=tags).read_all()


def _array(values: list[Any], kind: pa.DataType) -> pa.Array:
    """An Arrow array of texts, or of whole numbers.

    ``pyarrow.array`` would do, but imports pandas: half a second and 40 MB for a shell that needs none of it.
    """
    import pyarrow as pa

    size, nulls = len(values), values.count(None)
    validity = None
    if nulls:
        bits = 0 if nulls == size else int("".join("0" if x is None else "1" for x in reversed(values)), 2)
        validity = pa.py_buffer(bits.to_bytes((size + 7) // 8, "little"))
    if pa.types.is_string(kind):
        texts: list[Any] = [value or "" for value in values] if nulls else values
        data = "".join(texts).encode("utf-8", "backslashreplace")
        if len(data) != sum(map(len, texts)):  # not ASCII alone: a character is not a byte
            texts = [text.encode("utf-8", "backslashreplace") for text in texts]
        offsets = array("i", accumulate(map(len, texts), initial=0))
        buffers = [validity, pa.py_buffer(offsets), pa.py_buffer(data)]
    else:
        numbers = [value or 0 for value in values] if nulls else values
        buffers = [validity, pa.py_buffer(array("q", numbers))]
    return pa.Array.from_buffers(kind, size, buffers, nulls)


def _chunks(instances: Iterable[Instance]) -> Iterable[list[Instance]]:
    chunk = []
    for row in instances:
        chunk.append(row)
        if len(chunk) == BATCH:
            yield chunk
            chunk = []
    if chunk:
        yield chunk


def _values(chunk: list[Instance], attribute: str) -> list[Any]:
    values = list(map(attrgetter(attribute), chunk))
    if attribute == "sha256":
        return [None if value is None else value.hex() for value in values]
    if attribute in _UIDS:  # one that the source left empty
        return [value or None for value in values]
    if attribute == "received_at":
        return [None if value is None else round(value * 1_000_000) for value in values]
    return values


def _tag(row: Instance, position: int) -> str | None:
    return row.tags[position] if row.tags is not None and position < len(row.tags) else None


def values_of(table: pa.Table, names: Sequence[str]) -> Iterator[tuple[Any, ...]]:
    """The values of some columns, row by row; they become objects a batch at a time, and are never all held."""
    for batch in table.to_batches(BATCH):
        yield from zip(*(batch.column(name).to_pylist() for name in names), strict=True)


def instances_of(table: pa.Table) -> Iterator[Instance]:
    """The rows of a manifest as records: what each instance is, and what became of it.

    A UID that is null is blank: whoever needs valid ones checks all of them.
    """
    read = [(name, attribute) for name, attribute, _ in _COLUMNS[3:] if attribute and attribute not in _NOT_READ]
    for study, series, sop, *values in values_of(table, [*COLUMNS[:3], *(name for name, _ in read)]):
        row = Instance(study or "", series or "", sop or "")
        for (_, attribute), value in zip(read, values, strict=True):
            setattr(row, attribute, _read(attribute, value))
        yield row


def _read(attribute: str, value: Any) -> Any:
    """A value of a file, which anybody may have written. A word that is none of ours, or no size, says nothing."""
    if attribute in _WORDS:
        return value if value in _WORDS[attribute] else None
    if attribute in _SIZES:
        return value if value is not None and value >= 0 else None
    if attribute == "sha256":
        if not value:
            return None
        try:
            return bytes.fromhex(value)
        except ValueError:
            return value.encode("utf-8", "backslashreplace")  # the digest of no object
    return value


def metadata_of(table: pa.Table) -> dict[str, str]:
    """What the metadata of a manifest says: ``schema``, ``verdict``, ``evidence``, ``run`` and what else is there.

    Parameters
    ----------
    table : pyarrow.Table, pyarrow.Schema
        Anything of Arrow that carries metadata.
    """
    return {
        key.decode("utf-8", "replace").removeprefix(_KEY): value.decode("utf-8", "replace")
        for key, value in (getattr(table, "schema", table).metadata or {}).items()
        if key.startswith(_KEY.encode())
    }


def as_metadata(facts: Mapping[str, Any]) -> dict[str, str]:
    """Such facts as the metadata of a table."""
    return {_KEY + key: str(value) for key, value in facts.items()}
