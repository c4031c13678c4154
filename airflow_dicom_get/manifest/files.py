"""The manifest: one row per instance of the plan, in Parquet. Schema 1.

Writing needs pyarrow alone; pandas is imported where a DataFrame is asked for. A manifest has three
shapes, and :func:`load_manifest` takes each: a DataFrame, the URI of a file, or a reference, a small
dict that names a file with its number of rows and digest.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import time
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from io import BytesIO
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast
from urllib.parse import quote

from airflow_dicom_get.config.checks import shown, shown_path
from airflow_dicom_get.config.destination import (
    FilesystemDestination,
    ForwardDestination,
    S3Destination,
    parse_destination,
)
from airflow_dicom_get.connections import s3_config_of, with_connection
from airflow_dicom_get.errors import InvalidOption, ManifestError, S3Error
from airflow_dicom_get.vocabulary import UNVERIFIED, Evidence, Verdict, weakest, worst

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq
    from pandas import DataFrame

    from airflow_dicom_get.config.groups import S3Config
    from airflow_dicom_get.records import Instance
    from airflow_dicom_get.storage.bucket import Bucket

__all__ = [
    "COLUMNS",
    "SCHEMA_VERSION",
    "arrow_schema",
    "combine_manifests",
    "frame_of",
    "load_manifest",
    "load_manifests",
    "load_table",
    "load_tables",
    "manifest_bytes_of",
    "manifest_rows",
    "manifest_table",
    "manifest_uri",
    "metadata_of",
    "read_manifest",
    "read_table",
    "reference",
    "run_name",
    "safe_name",
    "table_of",
    "tables_below",
    "write_manifest",
]

SCHEMA_VERSION = 1
MANIFESTS = "_manifests"
"""The folder at a destination that manifests and ledger lie in."""
_STALE_SECONDS = 24 * 3600
REFERENCE_KIND = "dicom-manifest"
_KEY = "dicom_get."
_BATCH = 4096

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
    ("attempt", "attempt", "int64"),
    ("association", "association", "int64"),
    ("received_at", "received_at", "timestamp"),
    ("duration_ms", "duration_ms", "int64"),
)

COLUMNS: tuple[str, ...] = tuple(name for name, _, _ in _COLUMNS)
"""The columns of schema 1, in their order; a column per tag comes after them."""

_DTYPES = {"string": "string", "int64": "Int64", "timestamp": "datetime64[us, UTC]"}


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
        bits = "".join("0" if value is None else "1" for value in reversed(values))
        validity = pa.py_buffer(int(bits, 2).to_bytes((size + 7) // 8, "little"))
    if pa.types.is_string(kind):
        texts = [b"" if value is None else value.encode("utf-8", "backslashreplace") for value in values]
        offsets = array("i", accumulate(map(len, texts), initial=0))
        buffers = [validity, pa.py_buffer(offsets), pa.py_buffer(b"".join(texts))]
    else:
        buffers = [validity, pa.py_buffer(array("q", [0 if value is None else value for value in values]))]
    return pa.Array.from_buffers(kind, size, buffers, nulls)


def _chunks(instances: Iterable[Instance]) -> Iterable[list[Instance]]:
    chunk = []
    for row in instances:
        chunk.append(row)
        if len(chunk) == _BATCH:
            yield chunk
            chunk = []
    if chunk:
        yield chunk


def _values(chunk: list[Instance], attribute: str) -> list[Any]:
    values = [getattr(row, attribute) for row in chunk]
    if attribute == "sha256":
        return [None if value is None else value.hex() for value in values]
    if attribute == "received_at":
        return [None if value is None else round(value * 1_000_000) for value in values]
    return values


def _tag(row: Instance, position: int) -> str | None:
    return row.tags[position] if row.tags is not None and position < len(row.tags) else None


# --- files -----------------------------------------------------------------------------------------


def run_name(now: datetime | None = None) -> str:
    """Name of a run: the time in UTC and eight random hexadecimal digits."""
    return f"{(now or datetime.now(UTC)).astimezone(UTC):%Y%m%dT%H%M%SZ}-{os.urandom(4).hex()}"


def safe_name(text: str) -> str:
    """A part of a path: every character outside ``[A-Za-z0-9._-]`` becomes ``_``, and so do leading dots."""
    name = re.sub(r"[^A-Za-z0-9._-]", "_", text)
    return re.sub(r"^\.+", lambda dots: "_" * len(dots[0]), name) or "_"


def write_manifest(
    rows: pa.Table | pa.RecordBatchReader,
    path: str | Path,
    *,
    verdict: str,
    evidence: str,
    run: str,
    extra: Mapping[str, str] | None = None,
) -> None:
    """Write a manifest under a temporary name, sync it, and rename it. An older file is replaced whole.

    Parameters
    ----------
    rows : pyarrow.RecordBatchReader or pyarrow.Table
        Made by :func:`manifest_rows` or :func:`manifest_table`.
    path : str or Path
        Where it goes; folders are made.
    verdict, evidence, run : str
        Kept in the metadata of the file.
    extra : mapping, optional
        More metadata.

    Raises
    ------
    OSError
        The file cannot be written. Nothing is left under ``path`` that was not there before.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f".{target.name}.{os.getpid()}-{os.urandom(4).hex()}.part")
    try:
        with part.open("xb") as file:
            _write(rows, file, {"verdict": verdict, "evidence": evidence, "run": run, **(extra or {})})
            file.flush()
            os.fsync(file.fileno())
        part.replace(target)
    except BaseException:
        with contextlib.suppress(OSError):
            part.unlink()
        raise
    folder = os.open(target.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
    with contextlib.suppress(OSError):
        _remove_stale(target.parent)


def _remove_stale(folder: Path) -> None:
    """Remove what runs that were killed here left half-written a day ago or longer."""
    for part in folder.glob(".*.parquet.*.part"):
        if time.time() - part.stat().st_mtime > _STALE_SECONDS:
            part.unlink(missing_ok=True)


def _write(rows: pa.Table | pa.RecordBatchReader, file: Any, facts: Mapping[str, str]) -> None:
    import pyarrow.parquet as pq

    said = {"schema": str(SCHEMA_VERSION), **facts}
    schema = rows.schema.with_metadata({_KEY + key: str(value) for key, value in said.items()})
    batches = rows.to_batches(_BATCH) if hasattr(rows, "to_batches") else rows
    with pq.ParquetWriter(file, schema, compression="zstd") as writer:
        for batch in batches:
            writer.write_batch(batch.cast(schema))


def manifest_content(rows: pa.Table | pa.RecordBatchReader, *, verdict: str, evidence: str, run: str) -> bytes:
    """What :func:`write_manifest` would write: for a place that takes it whole."""
    buffer = BytesIO()
    _write(rows, buffer, {"verdict": verdict, "evidence": evidence, "run": run})
    return buffer.getvalue()


def read_table(uri: Any, **s3: Any) -> pa.Table:
    """Read the file of a manifest, without pandas.

    Parameters
    ----------
    uri : str or Path
        A path, ``file://…`` or ``s3://…``.
    **s3
        How to reach the bucket, as in ``s3_config``.

    Raises
    ------
    ManifestError
        There is no such file, it is broken, or it is of another schema. It is left as it is.
    """
    place = _place_of(uri)
    if isinstance(place, FilesystemDestination):
        return _table(place.path, str(place.path))
    return _table(_fetch(place, s3), str(uri))


def tables_below(where: Any, **s3: Any) -> Iterator[pa.Table]:
    """Read all manifests at a place: a file, a folder of manifests, or a destination of retrievals.

    Parameters
    ----------
    where : str or Path
        A path, ``file://…`` or ``s3://…``. Of a destination those in ``_manifests`` are read.
    **s3
        How to reach the bucket, as in ``s3_config``.

    Raises
    ------
    ManifestError
        There is none, or one of them cannot be read.
    """
    place = _place_of(where)
    found = False
    if isinstance(place, S3Destination):
        bucket = _bucket_of(place, s3)
        for key in _keys_below(bucket, place):
            found = True
            yield _table(_fetch(replace(place, prefix=key), s3, bucket), bucket.uri(key))
    else:
        for path in _files_below(place.path):
            found = True
            yield _table(path, str(path))
    if not found:
        raise ManifestError(
            f"There are no manifests at {shown_path(where)}.",
            hint="Name the destination of a retrieval, its folder _manifests, or one file there.",
            uri=str(where),
        )


def _files_below(path: Path) -> list[Path]:
    if not path.is_dir():
        return [path]
    root = path / MANIFESTS if (path / MANIFESTS).is_dir() else path
    return sorted(file for file in root.rglob("*.parquet") if _visible(str(file.relative_to(root))))


def _keys_below(bucket: Bucket, place: S3Destination) -> list[str]:
    if place.prefix.endswith(".parquet"):
        return [place.prefix]
    prefix = f"{place.prefix}/" if place.prefix else ""
    try:
        for root in (f"{prefix}{MANIFESTS}/", prefix):
            keys = [x.key for x in bucket.list(root) if x.key.endswith(".parquet") and _visible(x.key[len(root) :])]
            if keys:
                return sorted(keys)
    except S3Error as error:
        raise ManifestError(
            f"The manifests at {shown_path(place)} cannot be listed. {error.message}", hint=error.hint, uri=str(place)
        ) from error
    return []


def _visible(name: str) -> bool:
    """Ledgers and what is half-written have names that begin with a dot."""
    return not any(part.startswith(".") for part in name.split("/"))


def _place_of(uri: Any) -> FilesystemDestination | S3Destination:
    if not isinstance(uri, str | os.PathLike) or not str(uri):
        raise ManifestError("There is no manifest to read.", hint="Give the path or URI of a manifest.", uri=None)
    try:
        place = parse_destination(os.fspath(uri), "manifest")
    except InvalidOption as error:
        raise ManifestError(error.message, hint=error.hint, uri=str(uri)) from None
    if isinstance(place, ForwardDestination):
        raise ManifestError(
            f"{shown_path(uri)} is a DICOM node, which cannot hold manifests.",
            hint="Give the path or URI of a manifest.",
            uri=str(uri),
        )
    return place


def _bucket_of(place: S3Destination, s3: Mapping[str, Any]) -> Bucket:
    from airflow_dicom_get.config.groups import S3Config
    from airflow_dicom_get.storage.bucket import Bucket

    how: S3Config | None = s3.get("s3_config")
    if not s3:
        how = s3_config_of(place)
    elif how is None:
        try:
            how = S3Config(**s3)
        except TypeError:
            raise ManifestError(
                f"Some of the arguments {', '.join(map(shown, s3))} are unknown.",
                hint="Give those of s3_config.",
                uri=str(place),
            ) from None
    return Bucket(place.bucket, how)


def _content(place: FilesystemDestination | S3Destination, s3: Mapping[str, Any]) -> bytes:
    if isinstance(place, S3Destination):
        return _fetch(place, s3)
    try:
        return place.path.read_bytes()
    except OSError as error:
        raise _unreadable(place.path, error) from None


def _fetch(place: S3Destination, s3: Mapping[str, Any], bucket: Bucket | None = None) -> bytes:
    """The content of an object. Raises :class:`ManifestError`."""
    try:
        return (bucket or _bucket_of(place, s3)).get(place.prefix)
    except S3Error as error:
        raise ManifestError(
            f"The manifest {shown_path(place)} cannot be read. {error.message}", hint=error.hint, uri=str(place)
        ) from error


def _unreadable(path: Path, error: OSError) -> ManifestError:
    return ManifestError(
        f"The manifest {shown_path(path)} cannot be read: {os.strerror(error.errno or 0)}.",
        hint="Check the path, and that this machine sees the same storage.",
        uri=str(path),
    )


def _open(content: bytes | Path, name: str) -> pq.ParquetFile:
    """Open a manifest as far as its metadata, and check these."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    if isinstance(content, Path) and content.is_dir():
        raise _unreadable(content, IsADirectoryError(errno.EISDIR, "a folder"))
    try:
        file = pq.ParquetFile(content if isinstance(content, Path) else BytesIO(content))
    except (FileNotFoundError, PermissionError) as error:
        raise _unreadable(Path(name), error) from None
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise _broken(name) from error
    version = (file.metadata.metadata or {}).get(f"{_KEY}schema".encode())
    if version is not None and version != str(SCHEMA_VERSION).encode():
        raise ManifestError(
            f"The manifest {shown_path(name)} has schema {shown(version.decode('ascii', 'replace'))}, "
            f"and this version reads schema {SCHEMA_VERSION}.",
            hint="Read it with the version that wrote it, or a newer one.",
            uri=name,
        )
    missing = [column for column in COLUMNS if column not in file.schema_arrow.names]
    if version is None or missing:
        what = f"the column {missing[0]}" if missing else "the schema version"
        raise ManifestError(
            f"The file {shown_path(name)} is not a manifest: {what} is missing.",
            hint="Give a file that a run wrote.",
            uri=name,
        )
    return file


def _broken(name: str) -> ManifestError:
    return ManifestError(
        f"The file {shown_path(name)} is damaged, or is not a Parquet file.",
        hint="It was not changed; a new run writes a new manifest.",
        uri=name,
    )


def _table(content: bytes | Path, name: str) -> pa.Table:
    import pyarrow as pa

    with _open(content, name) as file:
        try:
            return file.read()
        except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
            raise _broken(name) from error


def metadata_of(table: pa.Table) -> dict[str, str]:
    """What the metadata of a manifest says: ``schema``, ``verdict``, ``evidence``, ``run`` and what else is there."""
    return {
        key.decode("utf-8", "replace").removeprefix(_KEY): value.decode("utf-8", "replace")
        for key, value in (table.schema.metadata or {}).items()
        if key.startswith(_KEY.encode())
    }


# --- DataFrames ------------------------------------------------------------------------------------


def frame_of(table: pa.Table) -> DataFrame:
    """A table as a DataFrame: text as ``string``, numbers as ``Int64``, times in UTC.

    The metadata stands in ``DataFrame.attrs``.
    """
    import pandas as pd
    import pyarrow as pa

    # "string" would hold one Python object a cell; Arrow memory is shared instead.
    def dtype(kind: pa.DataType) -> Any:
        if pa.types.is_string(kind):
            return pd.StringDtype("pyarrow")
        return pd.Int64Dtype() if pa.types.is_int64(kind) else None

    frame: DataFrame = table.replace_schema_metadata(None).to_pandas(types_mapper=dtype)
    frame.attrs.update(metadata_of(table))
    return frame


def table_of(frame: DataFrame, name: str = "manifest") -> pa.Table:
    """A DataFrame as a table of schema 1, whatever became of its types on the way.

    Raises
    ------
    ManifestError
        A column is missing, or holds what its type does not allow.
    """
    import pandas as pd
    import pyarrow as pa

    tags = [str(column) for column in frame.columns if column not in COLUMNS]
    missing = [column for column in COLUMNS if column not in frame.columns]
    if missing:
        raise ManifestError(
            f"The {name} has no column {missing[0]}.", hint="Give the DataFrame of a retrieval, with all its columns."
        )
    schema = arrow_schema(tags)
    kinds = {column: kind for column, _, kind in _COLUMNS}
    columns = []
    for item in schema:
        series = frame[item.name]
        try:
            if kinds.get(item.name) == "timestamp":
                series = pd.to_datetime(series, utc=True, format="ISO8601").astype("datetime64[us, UTC]")
            else:
                series = series.astype(_DTYPES[kinds.get(item.name, "string")])
            columns.append(pa.array(series, item.type, from_pandas=True))
        except (TypeError, ValueError, pa.ArrowException):
            raise ManifestError(
                f"The column {item.name} of the {name} does not hold values of the type {item.type}.",
                hint="Give the DataFrame of a retrieval unchanged.",
            ) from None
    flat = [column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column for column in columns]
    facts = {_KEY + key: str(value) for key, value in frame.attrs.items() if isinstance(value, str)}
    return pa.table(flat, schema=schema).replace_schema_metadata(facts)


def read_manifest(uri: Any, **s3: Any) -> DataFrame:
    """Read the file of a manifest.

    Parameters
    ----------
    uri : str or Path
        A path, ``file://…`` or ``s3://…``.
    **s3
        How to reach the bucket, as in ``s3_config``, or ``s3_config`` itself. By default the connection that
        ``s3://CONN_ID@bucket/…`` names in Airflow, else the usual AWS places.

    Raises
    ------
    ManifestError
        There is no such file, it is broken, or it is of another schema. It is left as it is.
    """
    return frame_of(read_table(uri, **s3))


def load_manifest(manifest: Any, **s3: Any) -> DataFrame:
    """Load a manifest of any shape: DataFrame, reference, or URI; ``s3`` as in :func:`read_manifest`.

    Raises
    ------
    ManifestError
        It cannot be read, or is not what its reference says.
    """
    return frame_of(load_table(manifest, **s3))


def load_table(manifest: Any, **s3: Any) -> pa.Table:
    """As :func:`load_manifest`, as a table; pandas is imported only for a DataFrame."""
    if isinstance(manifest, Mapping):
        return _referenced(manifest, s3)
    if isinstance(manifest, str | os.PathLike):
        return read_table(manifest, **s3)
    if hasattr(manifest, "columns") and hasattr(manifest, "attrs"):
        return table_of(manifest)
    raise ManifestError(
        f"{type(manifest).__name__} is not a manifest.", hint="Give a DataFrame, a reference, or the URI of a manifest."
    )


def _referenced(ref: Mapping[str, Any], s3: Mapping[str, Any]) -> pa.Table:
    from hashlib import sha256

    if ref.get("kind") != REFERENCE_KIND:
        raise ManifestError("The mapping is not a reference to a manifest.", hint="Give what a retrieval returned.")
    if ref.get("schema") != SCHEMA_VERSION:
        raise ManifestError(
            f"The reference has schema {shown(ref.get('schema'))}, and this version reads schema {SCHEMA_VERSION}.",
            hint="Read it with the version that wrote it, or a newer one.",
        )
    uri = ref.get("manifest_uri")
    content = _content(_place_of(uri), s3)
    digest = sha256(content).hexdigest()
    if digest != ref.get("sha256"):
        raise ManifestError(
            f"The manifest {shown_path(uri)} does not match the reference: its digest is {digest[:16]}…, "
            f"not {shown(ref.get('sha256'))[:18]}….",
            hint="It was replaced since. Give the URI alone to read its current content.",
            uri=uri,
        )
    table = _table(content, str(uri))
    if table.num_rows != ref.get("rows"):
        raise ManifestError(
            f"The manifest {shown_path(uri)} has {table.num_rows} rows, not {shown(ref.get('rows'))}.",
            hint="Give the URI alone to read its current content.",
            uri=uri,
        )
    return table


def _listed(manifests: Any) -> list[Any]:
    if (
        isinstance(manifests, str | os.PathLike | Mapping)
        or hasattr(manifests, "columns")
        or not isinstance(manifests, Iterable)
    ):
        return [manifests]
    if isinstance(manifests, Sequence):
        # What mapped tasks left in XCom: Airflow's own iterator asks for one more, and logs an error for it.
        return [manifests[index] for index in range(len(manifests))]
    return list(manifests)


def load_tables(manifests: Any, **s3: Any) -> list[pa.Table]:
    """Load one manifest, or several, each of any shape. None stands for a task that was skipped."""
    return [load_table(item, **s3) for item in _listed(manifests) if item is not None]


def load_manifests(manifests: Any, **s3: Any) -> DataFrame:
    """Load one manifest, or several of any shapes, as one DataFrame; ``s3`` as in :func:`read_manifest`.

    Raises
    ------
    ManifestError
        One of them cannot be read, or is not what its reference says.
    """
    return frame_of(_concat(load_tables(manifests, **s3)))


def _concat(tables: list[pa.Table]) -> pa.Table:
    import pyarrow as pa

    plain = [table.replace_schema_metadata(None) for table in tables]
    if not plain:
        return pa.table({name: pa.array([], kind) for name, kind in zip(COLUMNS, arrow_schema().types, strict=True)})
    # A column of tags that one manifest lacks is null there.
    whole = pa.concat_tables(plain, promote_options="default")
    return whole.replace_schema_metadata(tables[0].schema.metadata) if len(tables) == 1 else whole


def combine_manifests(manifests: Any, to: str | Path, *, run: str | None = None, **s3: Any) -> dict[str, Any]:
    """Write several manifests as one, and give its reference.

    The verdict is the worst of theirs, the evidence the weakest.

    Parameters
    ----------
    manifests : iterable
        Of any shapes; None is passed over.
    to : str or Path
        The file to write, or a folder or prefix that gets a file with the name of a new run.
    **s3
        How to reach the bucket of any of them, as in ``s3_config``.

    Raises
    ------
    ManifestError
        One of them cannot be read, or is not what its reference says. Nothing is written then.
    """
    tables = load_tables(manifests, **s3)
    facts = [metadata_of(table) for table in tables]
    # A DataFrame may have lost its metadata on the way: nothing is proven then.
    verdict = worst(cast(Verdict, fact.get("verdict", UNVERIFIED)) for fact in facts)
    evidence = weakest(cast(Evidence, fact.get("evidence", "none")) for fact in facts)
    name = run or run_name()
    place = _place_of(to)
    if isinstance(place, S3Destination):
        key = place.prefix
        if not key.endswith(".parquet"):
            key = f"{key}/{name}.parquet" if key else f"{name}.parquet"
        bucket = _bucket_of(place, s3)
        bucket.put(key, manifest_content(_concat(tables), verdict=verdict, evidence=evidence, run=name))
        return reference(with_connection(bucket.uri(key), place.conn_id), **s3)
    path = place.path
    if path.suffix != ".parquet":
        path = path / f"{name}.parquet"
    write_manifest(_concat(tables), path, verdict=verdict, evidence=evidence, run=name)
    return reference(path)


def manifest_uri(path: str | Path) -> str:
    """The URI of a file, fit for a reference: ``file://`` and the absolute path."""
    return "file://" + quote(str(Path(path).absolute()))


def reference(uri: str | Path, **s3: Any) -> dict[str, Any]:
    """The reference to a manifest file: what stands for it where it is too large to be handed on.

    Raises
    ------
    ManifestError
        The file cannot be read.
    """
    from hashlib import sha256

    place = _place_of(uri)
    content = _content(place, s3)
    table = _open(content, str(uri)).metadata
    metadata = table.metadata or {}
    verdict = metadata.get(f"{_KEY}verdict".encode())
    return {
        "kind": REFERENCE_KIND,
        "schema": SCHEMA_VERSION,
        "manifest_uri": str(uri) if isinstance(place, S3Destination) else manifest_uri(place.path),
        "rows": table.num_rows,
        "bytes": len(content),
        "sha256": sha256(content).hexdigest(),
        "verdict": verdict.decode("utf-8", "replace") if verdict else None,
    }


def manifest_bytes_of(frame: DataFrame) -> int:
    """Bytes of a DataFrame as Parquet, which is how it is handed on."""
    import pyarrow.parquet as pq

    buffer = BytesIO()
    pq.write_table(table_of(frame), buffer, compression="zstd")
    return buffer.tell()
