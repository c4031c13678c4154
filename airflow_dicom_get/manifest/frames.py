"""Manifests in any shape: a DataFrame, the URI of a file, or a reference, a small dict that names a file.

:func:`load_manifest` takes each of them, and so does all that takes a manifest. pandas is imported where a
DataFrame is asked for.
"""

from __future__ import annotations

import errno
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from airflow_dicom_get import clock
from airflow_dicom_get.config.checks import shown, shown_path
from airflow_dicom_get.config.destination import S3Destination
from airflow_dicom_get.connections import with_connection
from airflow_dicom_get.errors import ManifestError
from airflow_dicom_get.manifest.files import (
    S3,
    Room,
    bucket_of,
    check_decoded,
    content_of,
    manifest_content,
    manifest_uri,
    own_table,
    place_above,
    place_of,
    read_table,
    table_in,
    without_links,
    write_manifest,
)
from airflow_dicom_get.manifest.schema import (
    COLUMNS,
    KINDS,
    SCHEMA_VERSION,
    arrow_schema,
    as_metadata,
    metadata_of,
)
from airflow_dicom_get.manifest.scopes import metadata_for, scopes_of
from airflow_dicom_get.records import Written
from airflow_dicom_get.vocabulary import EVIDENCE, UNVERIFIED, WORST_FIRST, Evidence, Verdict, weakest, worst

if TYPE_CHECKING:
    import pyarrow as pa
    from pandas import DataFrame


__all__ = [
    "began",
    "bytes_in_xcom",
    "combine_manifests",
    "each_of",
    "facts_of",
    "frame_of",
    "load_manifest",
    "load_manifests",
    "load_table",
    "load_tables",
    "newest_rows",
    "one_table",
    "parquet_in_xcom",
    "read_manifest",
    "reference_to",
    "runs_of",
    "table_in_xcom",
    "table_of",
    "write_as_one",
]

REFERENCE_KIND = "dicom-manifest"
Word = TypeVar("Word", bound=str)
_RUNS = "runs"
"""In the metadata of a combined manifest: see :func:`runs_of`."""
_STAMP = r"[0-9]{8}T[0-9]{6}Z"
_DTYPES = {"string": "string", "int64": "Int64", "timestamp": "datetime64[us, UTC]"}


def frame_of(table: pa.Table) -> DataFrame:
    """A table as a DataFrame: text as ``string``, numbers as ``Int64``, times in UTC.

    The metadata stands in ``DataFrame.attrs``. Raises :class:`ManifestError` for a column that pandas cannot hold.
    """
    import pandas as pd
    import pyarrow as pa

    # "string" would hold one Python object a cell; Arrow memory is shared instead.
    def dtype(kind: pa.DataType) -> Any:
        if pa.types.is_string(kind):
            return pd.StringDtype("pyarrow")
        return pd.Int64Dtype() if pa.types.is_int64(kind) else None

    try:
        frame: DataFrame = table.replace_schema_metadata(None).to_pandas(types_mapper=dtype)
    except (pa.ArrowException, ValueError, OverflowError) as error:  # a column of a type that pandas does not have
        raise ManifestError(
            f"The manifest cannot be read as a DataFrame: {type(error).__name__}.",
            hint="Give a file that a run wrote.",
            uri=None,
        ) from error
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
    columns = []
    for item in schema:
        series = frame[item.name]
        try:
            if KINDS.get(item.name) == "timestamp":
                series = pd.to_datetime(series, utc=True, format="ISO8601").astype("datetime64[us, UTC]")
            else:
                series = series.astype(_DTYPES[KINDS.get(item.name, "string")])
            columns.append(pa.array(series, item.type, from_pandas=True))
        except (TypeError, ValueError, pa.ArrowException):
            raise ManifestError(
                f"The column {item.name} of the {name} does not hold values of the type {item.type}.",
                hint="Give the DataFrame of a retrieval unchanged.",
            ) from None
    flat = [column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column for column in columns]
    facts = as_metadata({key: value for key, value in frame.attrs.items() if isinstance(value, str)})
    return pa.table(flat, schema=schema).replace_schema_metadata(facts)


def read_manifest(uri: Any, s3_config: S3 = None) -> DataFrame:
    """Read the file of a manifest.

    Where it lies in a folder ``_manifests``, its column ``destination`` names the place in which that lies, or is
    blank: objects elsewhere are opened for nobody to whom the rows are handed on.

    Parameters
    ----------
    uri : str or Path
        A path, ``file://…`` or ``s3://…``.
    s3_config : S3Config or mapping, optional
        How to reach the bucket. By default as the connection says that ``s3://CONN_ID@bucket/…`` names in Airflow,
        else the usual AWS places.

    Raises
    ------
    ManifestError
        The file does not exist, is damaged, or has another schema. It is not changed.
    """
    return frame_of(own_table(read_table(uri, s3_config), place_above(uri)))


def load_manifest(manifest: Any, s3_config: S3 = None) -> DataFrame:
    """Load a manifest of any shape: DataFrame, reference, or URI, as :func:`read_manifest`.

    Raises
    ------
    ManifestError
        It cannot be read, or does not match its reference.
    """
    return frame_of(load_table(manifest, s3_config))


def load_table(manifest: Any, s3_config: S3 = None, room: Room | None = None) -> pa.Table:
    """As :func:`load_manifest`, as a table, which it takes too; pandas is imported only for a DataFrame.

    ``room`` is of all manifests that the call reads.
    """
    if hasattr(manifest, "column_names"):
        return manifest
    if isinstance(manifest, Mapping):
        return _referenced(manifest, s3_config, room)
    if isinstance(manifest, str | os.PathLike):
        return own_table(read_table(manifest, s3_config, room), place_above(manifest))
    if hasattr(manifest, "columns") and hasattr(manifest, "attrs"):
        return table_of(manifest)
    raise ManifestError(
        f"{type(manifest).__name__} is not a manifest.", hint="Give a DataFrame, a reference, or the URI of a manifest."
    )


def _referenced(ref: Mapping[str, Any], s3_config: S3, room: Room | None) -> pa.Table:
    from hashlib import sha256

    if ref.get("kind") != REFERENCE_KIND:
        raise ManifestError("The mapping is not a reference to a manifest.", hint="Give what a retrieval returned.")
    if ref.get("schema") != SCHEMA_VERSION:
        raise ManifestError(
            f"The reference has schema {shown(ref.get('schema'))}, and this version reads schema {SCHEMA_VERSION}.",
            hint="Read it with the version that wrote it, or a newer one.",
        )
    uri = ref.get("manifest_uri")
    content = content_of(place_of(uri), s3_config)
    if sha256(content).hexdigest() != ref.get("sha256"):
        # Not which one it has: the reference may be another's, of a file that only we can read.
        raise ManifestError(
            f"The manifest {shown_path(uri)} does not match the reference: its digest is another one.",
            hint="It was replaced since. Give the URI alone to read its current content.",
            uri=uri,
        )
    table = table_in(content, str(uri), room)
    if table.num_rows != ref.get("rows"):
        raise ManifestError(
            f"The manifest {shown_path(uri)} has {table.num_rows} rows, not {shown(ref.get('rows'))}.",
            hint="Give the URI alone to read its current content.",
            uri=uri,
        )
    return table


def each_of(manifests: Any) -> list[Any]:
    """One manifest of any shape as a list, or several."""
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


def load_tables(manifests: Any, s3_config: S3 = None) -> list[pa.Table]:
    """Load one manifest, or several, each of any shape. None, of a task that failed or was skipped, gives none."""
    room = Room()
    return [load_table(item, s3_config, room) for item in each_of(manifests) if item is not None]


def load_manifests(manifests: Any, s3_config: S3 = None) -> DataFrame:
    """Load one manifest, or several of any shapes, as one DataFrame; ``s3_config`` as in :func:`read_manifest`.

    Raises
    ------
    ManifestError
        One of them cannot be read, or does not match its reference.
    """
    return frame_of(one_table(load_tables(manifests, s3_config)))


def one_table(tables: Sequence[pa.Table]) -> pa.Table:
    """Several manifests as one; of one alone the metadata stays, of several what of its studies it is of."""
    import pyarrow as pa

    plain = [table.replace_schema_metadata(None) for table in tables]
    if not plain:
        return pa.table({name: pa.array([], kind) for name, kind in zip(COLUMNS, arrow_schema().types, strict=True)})
    # A column of tags that one manifest lacks is null there.
    whole = pa.concat_tables(plain, promote_options="default")
    facts = tables[0].schema.metadata if len(tables) == 1 else as_metadata(metadata_for(scopes_of(tables)))
    return whole.replace_schema_metadata(facts or None)


def newest_rows(manifests: DataFrame) -> DataFrame:
    """Keep the last row of each instance of several runs, by the column ``run_at``: its state after all of them."""
    key = ["study_instance_uid", "series_instance_uid", "sop_instance_uid"]
    rows = manifests
    if not rows["run_at"].is_monotonic_increasing:
        rows = rows.sort_values("run_at", kind="stable")
    for name in ("source", "destination"):
        if (rows[name] == "").any():
            # A verification may name none: that of the retrieval before it holds.
            known = rows[name].mask(rows[name] == "").groupby([rows[part] for part in key]).ffill()
            rows = rows.assign(**{name: known.fillna("")})
    again = rows.duplicated(key, keep="last")
    last: DataFrame = (rows[~again] if again.any() else rows).reset_index(drop=True)
    return last


def began(runs: Any) -> Any:
    """When some runs began, a column of times; null where a name does not say it."""
    import pandas as pd

    known = {run: _began(run) for run in runs.dropna().unique()}
    return pd.Series([known.get(run) for run in runs], runs.index, "datetime64[us, UTC]")


def _began(run: str | None) -> datetime | None:
    """When a run began, as its name says it, which anybody may have written; None where that is no time."""
    stamp = re.search(_STAMP, run or "")
    try:
        return datetime.strptime(stamp[0], "%Y%m%dT%H%M%SZ").replace(tzinfo=UTC) if stamp is not None else None
    except ValueError:
        return None


def runs_of(table: pa.Table) -> list[tuple[str | None, int]]:
    """The runs whose rows a manifest has, in their order, and how many of each; several where it was combined.

    None is a run of which nothing is known, as where rows were taken from a combined one.
    """
    facts = metadata_of(table)
    if _RUNS not in facts:
        return [(facts.get("run"), table.num_rows)]
    try:
        runs = [(run if isinstance(run, str) else None, int(rows)) for run, rows in json.loads(facts[_RUNS])]
    except (TypeError, ValueError, OverflowError, RecursionError):
        runs = []
    fits = all(rows >= 0 for _, rows in runs) and sum(rows for _, rows in runs) == table.num_rows
    return runs if fits else [(None, table.num_rows)]


def _name_as_one(runs: Sequence[tuple[str | None, int]]) -> str:
    """The name of a combined manifest: as old as the newest of its runs, so that none of its rows is newer than it was.

    Where one does not say when it began, the time is that of now.
    """
    times = [_began(run) for run, _ in runs]
    known = [time for time in times if time is not None]
    return clock.run_name(max(known) if known and len(known) == len(times) else None)


def facts_of(tables: Sequence[pa.Table], given: Sequence[Any] = ()) -> list[tuple[Verdict, Evidence]]:
    """Verdict and evidence of each manifest. A DataFrame may have lost them on the way: nothing is proven then.

    Parameters
    ----------
    given : sequence
        What the tables were loaded from: who gave None may have failed, and is one more at the end.
    """
    facts = [*map(metadata_of, tables), *({} for manifest in given if manifest is None)]
    return [
        (_word(fact.get("verdict"), WORST_FIRST, UNVERIFIED), _word(fact.get("evidence"), EVIDENCE, "none"))
        for fact in facts
    ]


def combine_manifests(
    manifests: Any, to: str | Path, s3_config: S3 = None, *, run: str | None = None, expected: int | None = None
) -> dict[str, Any]:
    """Write several manifests as one, and return its reference.

    The verdict is the worst of theirs, the evidence the weakest. Each row stays as old as its run is.

    Parameters
    ----------
    manifests : iterable
        Of any shape. None, of a task that failed or was skipped, proves nothing: the verdict is ``unverified`` at best.
        Leave out those that you know to be skipped.
    to : str or Path
        The file to write, or a folder or prefix in which a file with the name of a new run is created.
    s3_config : S3Config or mapping, optional
        How to reach the bucket of any of them, as in :func:`read_manifest`.
    expected : int, optional
        How many there should be, as of mapped tasks: one that was killed leaves no XCom, and nothing that stands for
        it. Each that lacks counts as None does.

    Raises
    ------
    ManifestError
        One of them cannot be read, or does not match its reference. Nothing is written then.
    """
    given = each_of(manifests)
    given += [None] * ((expected or 0) - len(given))
    tables = load_tables(given, s3_config)
    facts = facts_of(tables, given)
    verdict, evidence = worst(said for said, _ in facts), weakest(rests_on for _, rests_on in facts)
    return write_as_one(tables, to, s3_config, verdict=verdict, evidence=evidence, run=run)


def write_as_one(
    tables: Sequence[pa.Table],
    to: str | Path,
    s3_config: S3 = None,
    *,
    verdict: Verdict,
    evidence: Evidence,
    run: str | None = None,
) -> dict[str, Any]:
    """Write the tables of several manifests as one, with a verdict that is known of them. Raises as for that."""
    name = run or clock.run_name()
    runs = [one for table in tables for one in runs_of(table)]
    run = run or _name_as_one(runs)
    whole, extra = one_table(tables), {_RUNS: json.dumps(runs), **metadata_for(scopes_of(tables))}
    place = place_of(to)
    if isinstance(place, S3Destination):
        key = place.prefix
        if not key.endswith(".parquet"):
            key = f"{key}/{name}.parquet" if key else f"{name}.parquet"
        bucket = bucket_of(place, s3_config)
        content, written = manifest_content(whole, verdict=verdict, evidence=evidence, run=run, extra=extra)
        bucket.put(key, content)
        return reference_to(with_connection(bucket.uri(key), place.conn_id), written)
    path = place.path
    if path.suffix != ".parquet":
        path = path / f"{name}.parquet"
    try:
        written = write_manifest(whole, without_links(path), verdict=verdict, evidence=evidence, run=run, extra=extra)
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
        raise ManifestError(
            f"The manifest {shown_path(path)} cannot be written: {error.strerror}.",
            hint="Remove the link, or give another place.",
            uri=str(path),
        ) from None
    return reference_to(manifest_uri(path), written)


def _word(found: str | None, words: Iterable[Word], otherwise: Word) -> Word:
    return next((word for word in words if word == found), otherwise)


def reference_to(uri: str, written: Written) -> dict[str, Any]:
    """The reference to a manifest that was written: what stands for it where it is too large to be handed on.

    It is of what was written: whoever has put another file in its place since is found out by the digest.
    """
    return {
        "kind": REFERENCE_KIND,
        "schema": SCHEMA_VERSION,
        "manifest_uri": uri,
        "rows": written.rows,
        "bytes": written.bytes,
        "sha256": written.sha256,
        "verdict": written.verdict or None,
    }


# --- in XCom ---------------------------------------------------------------------------------------


def parquet_in_xcom(value: Any) -> bytes | None:
    """The Parquet file of a DataFrame in an XCom, which holds it in hexadecimal; None if it holds something else.

    Parameters
    ----------
    value
        As it is stored, not deserialized by Airflow.

    Raises
    ------
    ManifestError
        It says that it is a DataFrame, and holds no file.
    """
    if not isinstance(value, Mapping) or not str(value.get("__classname__", "")).endswith(".DataFrame"):
        return None
    try:
        return bytes.fromhex(value["__data__"])
    except (KeyError, TypeError, ValueError) as error:
        raise _unreadable() from error


def table_in_xcom(value: Any, room: Room | None = None) -> pa.Table | None:
    """As :func:`parquet_in_xcom`, read; None also for a frame that is no manifest; ``room`` as in :func:`load_table`.

    Raises :class:`ManifestError`.
    """
    content = parquet_in_xcom(value)
    if content is None:
        return None
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(BytesIO(content)) as file:
            if not set(COLUMNS) <= set(file.schema_arrow.names):
                return None
            check_decoded(content, file.schema_arrow, "in XCom", room)
            table = file.read()
            table.validate(full=True)  # texts are UTF-8
            return table
    except (ValueError, OSError, pa.ArrowException) as error:
        if isinstance(error, ManifestError):
            raise
        raise _unreadable() from error


def _unreadable() -> ManifestError:
    return ManifestError("A task returned a DataFrame that cannot be read.", hint="", uri=None)


def bytes_in_xcom(frame: DataFrame) -> int:
    """How many bytes a DataFrame takes in XCom."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    buffer = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pandas(frame), buffer, compression="snappy")
    return 2 * int(buffer.tell())
