"""The files of manifests, and the objects: written whole or not at all, and checked when they are read.

Writing needs pyarrow alone.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import logging
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from airflow_dicom_get import clock
from airflow_dicom_get.config.checks import Group, shown, shown_path
from airflow_dicom_get.config.destination import (
    FilesystemDestination,
    ForwardDestination,
    S3Destination,
    parse_destination,
)
from airflow_dicom_get.config.groups import S3Config
from airflow_dicom_get.connections import s3_config_of
from airflow_dicom_get.errors import InvalidOption, ManifestError, S3Error
from airflow_dicom_get.manifest.schema import BATCH, COLUMNS, SCHEMA_VERSION, arrow_schema, as_metadata, metadata_of
from airflow_dicom_get.records import Written
from airflow_dicom_get.storage import files
from airflow_dicom_get.storage.files import Below, Folder

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq

    from airflow_dicom_get.storage.bucket import Bucket

__all__ = [
    "MANIFESTS",
    "S3",
    "Room",
    "bucket_of",
    "check_decoded",
    "content_of",
    "manifest_content",
    "manifest_uri",
    "open_manifest",
    "own_table",
    "place_above",
    "place_of",
    "read_table",
    "safe_name",
    "table_in",
    "tables_below",
    "task_run_name",
    "without_links",
    "write_manifest",
]

log = logging.getLogger(__name__)

MANIFESTS = "_manifests"
"""The folder at a destination that manifests and ledger lie in."""
S3 = S3Config | Mapping[str, Any] | None
"""How a bucket is reached, as the option ``s3_config``."""
_S3 = Group(S3Config)
_STALE_SECONDS = 24 * 3600
_PART = re.compile(r"\..*\.parquet\..*\.part")
_SIGNS = r"=+@\-\uff1d\uff0b\uff0d\uff20"
_NO_WIDTH = r"\u200b-\u200f\u2060-\u2064\ufeff"
_FORMULA = re.compile(rf"""^(?=[\t\r\n])|^(?=[ {_NO_WIDTH}]*[{_SIGNS}])|(?<=[;\t\r\n])(?=[ "{_NO_WIDTH}]*[{_SIGNS}])""")
"""Where a cell may begin that is a formula: signs of full width as East Asian ones take them; at a semicolon or a tab
too, at which a spreadsheet in many a country divides a line, whatever the file was written with, and there in quotes
that begin the cell; behind characters of no width, of which the one that begins a file may be its byte order mark."""
_LARGEST = 1 << 30
"""Bytes of the file of a manifest: of several million instances."""
_MOST_PLACES = 1000
"""Destinations that one manifest of ours may name: further ones are not looked at, and count as foreign."""
_MOST_DECODED = 4 << 30
"""Bytes of its table, with its rows as records, and of all that one call reads."""
_RECORD = 640
"""Bytes of a row as a record, besides its texts: also of one that is empty, and takes no byte of the file."""


class Room:
    """What the manifests that one call reads may take of memory together."""

    def __init__(self) -> None:
        self._taken, self._first = 0, ""

    def take(self, size: int, name: str) -> None:
        """Count so many bytes for a manifest. Raises :class:`ManifestError` where they are too many."""
        self._taken += size
        self._first = self._first or name
        if self._taken > _MOST_DECODED:
            alone = name == self._first
            raise ManifestError(
                f"The manifest {shown_path(name)} takes more than {_MOST_DECODED >> 30} GiB of memory"
                + ("." if alone else " with those that are read before it."),
                hint="Give a file that a run wrote, of fewer instances." if alone else "Read fewer of them at once.",
                uri=name,
            )


def safe_name(text: str) -> str:
    """A part of a path: every character outside ``[A-Za-z0-9._-]`` becomes ``_``, and so do leading dots."""
    name = re.sub(r"[^A-Za-z0-9._-]", "_", text)
    return re.sub(r"^\.+", lambda dots: "_" * len(dots[0]), name) or "_"


def task_run_name(*, dag_id: str, run_id: str, task_id: str, map_index: int, try_number: int) -> str:
    """The name of a run in Airflow, ``<dag_id>/<run_id>/<task_id>/<map_index>-<try>``, each a :func:`safe_name`."""
    return "/".join([*map(safe_name, (dag_id, run_id, task_id)), f"{map_index}-{try_number}"])


def safe_cell(value: Any) -> Any:
    """A value as a spreadsheet may open it: what it would take for a formula in a text gets a quote in front."""
    return _FORMULA.sub("'", value) if isinstance(value, str) else value


class _Counted(io.RawIOBase):
    """A file that is written from its beginning to its end, with the digest of what was written."""

    def __init__(self, file: Any) -> None:
        self._file, self.size, self.digest = file, 0, hashlib.sha256()

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        if self.closed:
            raise ValueError("The file is closed.")
        self._file.write(data)
        self.digest.update(data)
        self.size += memoryview(data).nbytes
        return memoryview(data).nbytes

    def tell(self) -> int:
        return self.size


def write_manifest(
    rows: pa.Table | pa.RecordBatchReader,
    path: str | Folder,
    *,
    verdict: str,
    evidence: str,
    run: str,
    extra: Mapping[str, str] | None = None,
    go_on: Callable[[], bool] = lambda: True,
) -> Written:
    """Write a manifest under a temporary name, sync it, and rename it. An older file is replaced whole.

    Parameters
    ----------
    rows : pyarrow.RecordBatchReader or pyarrow.Table
        Made by :func:`~airflow_dicom_get.manifest.schema.manifest_rows`, or a table of that schema.
    path : str or Path
        Where it goes; folders are made. With columns of tags, which may name patients, the file is for its owner and
        group at most.
    verdict, evidence, run : str
        Kept in the metadata of the file.
    extra : mapping, optional
        More metadata.
    go_on : callable
        As for :func:`~airflow_dicom_get.storage.files.replace_whole`.

    Returns
    -------
    Written
        What was written, not what lies there by now.

    Raises
    ------
    OSError
        The file cannot be written. Nothing is left under ``path`` that was not there before.
    """
    target = Path(path) if isinstance(path, str) else path
    facts = {"verdict": verdict, "evidence": evidence, "run": run, **(extra or {})}
    temporary = f".{target.name}.{clock.token()}.part"
    tagged = not set(rows.schema.names) <= set(COLUMNS)
    written: list[Written] = []
    files.replace_whole(
        target,
        lambda file: written.append(_write(rows, file, facts)),
        temporary=temporary,
        private=tagged,
        go_on=go_on,
    )
    with contextlib.suppress(OSError):
        _remove_stale(target.parent)
    return written[-1]


def _remove_stale(folder: Folder) -> None:
    """Remove what runs that were killed here left half-written a day ago or longer."""
    for name in files.names_in(folder):
        if _PART.fullmatch(name) and clock.now() - files.disk.status(folder / name).st_mtime > _STALE_SECONDS:
            files.disk.remove(folder / name)


def _write(rows: pa.Table | pa.RecordBatchReader, file: Any, facts: Mapping[str, str]) -> Written:
    import pyarrow.parquet as pq

    said = {"schema": str(SCHEMA_VERSION), **facts}
    schema = rows.schema.with_metadata(as_metadata(said))
    batches = rows.to_batches(BATCH) if hasattr(rows, "to_batches") else rows
    counted, number = _Counted(file), 0
    with pq.ParquetWriter(counted, schema, compression="zstd") as writer:
        for batch in batches:
            writer.write_batch(batch)  # not cast for the metadata's sake: that alone imports pyarrow.compute
            number += batch.num_rows
    return Written(number, counted.size, counted.digest.hexdigest(), said.get("verdict", ""))


def manifest_content(
    rows: pa.Table | pa.RecordBatchReader,
    *,
    verdict: str,
    evidence: str,
    run: str,
    extra: Mapping[str, str] | None = None,
) -> tuple[bytes, Written]:
    """What :func:`write_manifest` would write: for a place that takes it whole."""
    buffer = io.BytesIO()
    written = _write(rows, buffer, {"verdict": verdict, "evidence": evidence, "run": run, **(extra or {})})
    return buffer.getvalue(), written


def read_table(uri: Any, s3_config: S3 = None, room: Room | None = None) -> pa.Table:
    """Read the file of a manifest, without pandas.

    Parameters
    ----------
    uri : str or Path
        A path, ``file://…`` or ``s3://…``.
    s3_config : S3Config or mapping, optional
        How to reach the bucket; see :func:`bucket_of`.
    room : Room, optional
        Of all manifests that the call reads.

    Raises
    ------
    ManifestError
        There is no such file, it is broken, or it is of another schema. It is left as it is.
    """
    place = place_of(uri)
    name = str(place.path if isinstance(place, FilesystemDestination) else uri)
    return table_in(content_of(place, s3_config), name, room)


def tables_below(where: Any, s3_config: S3 = None, room: Room | None = None) -> Iterator[pa.Table]:
    """Read all manifests at a place: a file, a folder of manifests, or a destination of retrievals.

    Parameters
    ----------
    where : str or Path
        A path, ``file://…`` or ``s3://…``. Of a destination those in ``_manifests`` are read.
    s3_config : S3Config or mapping, optional
        How to reach the bucket; see :func:`bucket_of`.
    room : Room, optional
        Of all manifests that the call reads.

    Raises
    ------
    ManifestError
        There is none, or one of them cannot be read.
    """
    place, room = place_of(where), room or Room()
    found = False
    if isinstance(place, S3Destination):
        bucket = bucket_of(place, s3_config)
        for key in _keys_below(bucket, place):
            found = True
            uri = bucket.uri(key)
            yield own_table(table_in(_fetch(replace(place, prefix=key), bucket), uri, room), place_above(uri))
    else:
        for path in _files_below(place.path):
            found = True
            yield own_table(table_in(_read(path), str(path), room), _place_of_file(path))
    if not found:
        raise ManifestError(
            f"There are no manifests at {shown_path(where)}.",
            hint="Name the destination of a retrieval, its folder _manifests, or one file there.",
            uri=str(where),
        )


def _files_below(path: Path) -> list[Folder]:
    """Those of a folder lie below the place that was named, however many folders ``_manifests`` are in between."""
    named = without_links(path.absolute())
    try:
        alone = not files.is_folder(named)
    except OSError:
        alone = True  # reading it says what is wrong
    if alone:
        return [named]
    root = named if isinstance(named, Below) else Below(named)
    if not root.names and files.exists(root / MANIFESTS):
        root /= MANIFESTS
    found = files.files_below(root, lambda name: not name.startswith("."), _left_out)
    return [file for file in found if file.name.endswith(".parquet")]


def _left_out(path: Below, error: OSError) -> None:
    log.warning("%s is left out: %s", shown_path(path), error.strerror)


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


def place_of(uri: Any) -> FilesystemDestination | S3Destination:
    """Where a path or URI of manifests points. Raises :class:`ManifestError`."""
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


def without_links(path: Path) -> Folder:
    """A path as it is; at or below a folder ``_manifests``, where others may write, one that follows no link there.

    It begins at the place in which that folder lies, of several the outermost: whoever writes into it can make
    further ones. One that ``..`` leads out of it again lies in none: whose it is, it does not say.
    """
    whole = path.absolute()
    for above in reversed((whole, *whole.parents)):
        names = _forth_and_back(whole.relative_to(above).parts) if above.name == MANIFESTS else None
        if names is not None:
            return Below(above.parent, (MANIFESTS, *names))
    return path


def _forth_and_back(parts: Sequence[str]) -> list[str] | None:
    """The parts of a path without ``..``; None where it leads out."""
    names: list[str] = []
    for part in parts:
        if part != "..":
            names.append(part)
        elif names:
            names.pop()
        else:
            return None
    return names


def _place_of_file(path: Folder) -> FilesystemDestination | None:
    """The place in which the ``_manifests`` of a file lies; None if it lies in none."""
    return FilesystemDestination(path.top) if isinstance(path, Below) and MANIFESTS in path.names else None


def place_above(manifest: str | os.PathLike[str]) -> FilesystemDestination | S3Destination | None:
    """The place in which the ``_manifests`` of a file lies; None if it lies in none. Raises :class:`ManifestError`."""
    place = place_of(manifest)
    if isinstance(place, FilesystemDestination):
        return _place_of_file(without_links(place.path))
    prefix, inside, _ = f"/{place.prefix}".partition(f"/{MANIFESTS}/")
    return S3Destination(place.bucket, prefix.removeprefix("/")) if inside else None


def own_table(table: pa.Table, own: FilesystemDestination | S3Destination | None) -> pa.Table:
    """The table of a file as it may be handed on: where the file's ``own`` place is known, its rows name no other one.

    Without an address it is the column ``destination`` that says where objects may be opened, and anybody may have
    written the file. What lies outside of its place is blank there, and what lies inside is the place: a link may take
    its place later.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    if own is None:
        return table
    column = table["destination"]
    real = files.disk.real_path(own.path) if isinstance(own, FilesystemDestination) else None
    texts = column.drop_null().unique().to_pylist()
    others: dict[str, list[str]] = {"": texts[_MOST_PLACES:]}
    for text in texts[:_MOST_PLACES]:
        held = _held_to(own, real, text)
        if held != text:
            others.setdefault(held, []).append(text)
    for held, texts in others.items():
        column = pc.if_else(pc.is_in(column, value_set=pa.array(texts, pa.string())), held, column)
    return table.set_column(table.column_names.index("destination"), "destination", column)


def _held_to(own: FilesystemDestination | S3Destination, real: Path | None, text: str) -> str:
    """A destination in a file whose own place is known; what is no place of objects stays as it is."""
    try:
        place = parse_destination(text)
    except InvalidOption:
        return text
    if isinstance(place, S3Destination):
        if not isinstance(own, S3Destination) or place.bucket != own.bucket:
            return ""
        if place.prefix == own.prefix:
            return text
        return own.uri if not own.prefix or place.prefix.startswith(f"{own.prefix}/") else ""
    if isinstance(place, ForwardDestination) or not place.path.is_absolute():
        return text
    if isinstance(own, S3Destination) or real is None:
        return ""
    if place.path == own.path:
        return text
    try:
        return own.uri if files.disk.real_path(place.path).is_relative_to(real) else ""
    except OSError:  # it leads nowhere
        return ""


def bucket_of(place: S3Destination, s3_config: S3 = None) -> Bucket:
    """The bucket of an address.

    Parameters
    ----------
    s3_config : S3Config or mapping, optional
        How to reach it. By default as the connection says that the address names in Airflow, else the usual AWS places.

    Raises
    ------
    ManifestError, InvalidOption
        There is no such connection, or a setting is malformed.
    """
    from airflow_dicom_get.storage.bucket import Bucket

    return Bucket(place.bucket, s3_config_of(place) if s3_config is None else _S3("s3_config", s3_config))


def content_of(place: FilesystemDestination | S3Destination, s3_config: S3 = None) -> bytes:
    """The file of a manifest, as bytes. Raises :class:`ManifestError`."""
    if isinstance(place, S3Destination):
        return _fetch(place, bucket_of(place, s3_config))
    return _read(without_links(place.path))


def _read(path: Folder) -> bytes:
    try:
        return files.read_whole(path, _LARGEST)
    except OSError as error:
        raise ManifestError(
            f"The manifest {shown_path(path)} cannot be read: {error.strerror}.",
            hint="Check the path, and that this machine sees the same storage.",
            uri=str(path),
        ) from None


def _fetch(place: S3Destination, bucket: Bucket) -> bytes:
    """The content of an object. Raises :class:`ManifestError`."""
    try:
        return bucket.get(place.prefix, _LARGEST)
    except S3Error as error:
        raise ManifestError(
            f"The manifest {shown_path(place)} cannot be read. {error.message}", hint=error.hint, uri=str(place)
        ) from error


def open_manifest(content: bytes, name: str) -> pq.ParquetFile:
    """Open a manifest as far as its metadata, and check these. Raises :class:`ManifestError`."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(io.BytesIO(content))
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise _broken(name) from error
    version = metadata_of(file.schema_arrow).get("schema")
    if version is not None and version != str(SCHEMA_VERSION):
        raise ManifestError(
            f"The manifest {shown_path(name)} has schema {shown(version)}, "
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
    for column, kind in zip(COLUMNS, arrow_schema().types, strict=True):
        found = [field.type for field in file.schema_arrow if field.name == column]
        if found != [kind]:
            what = "is there twice" if found[1:] else f"is of the type {found[0]}, not {kind}"
            raise ManifestError(
                f"The file {shown_path(name)} is not a manifest: the column {column} {what}.",
                hint="Give a file that a run wrote.",
                uri=name,
            )
    for field in file.schema_arrow:
        if field.name not in COLUMNS and not pa.types.is_string(field.type):
            raise ManifestError(
                f"The file {shown_path(name)} is not a manifest: its column {shown(field.name)} does not hold texts.",
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


def table_in(content: bytes, name: str, room: Room | None = None) -> pa.Table:
    """The table in a file, of ``name`` in errors; ``room`` as in :func:`read_table`. Raises :class:`ManifestError`."""
    import pyarrow as pa

    with open_manifest(content, name) as file:
        try:
            check_decoded(content, file.schema_arrow, name, room)
            table = file.read()
            table.validate(full=True)  # texts are UTF-8
            return table
        except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
            raise _broken(name) from error


def check_decoded(content: bytes, schema: pa.Schema, name: str, room: Room | None = None) -> None:
    """Refuse a table that is too large: a text that stands in a file once may be a value of all its rows.

    For that the texts are counted where they stand, column by column: no more than one is held. ``room`` is of all
    manifests that the call reads. Raises :class:`ManifestError`, and whatever a broken file does.
    """
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    kinds = (pa.types.is_string, pa.types.is_large_string)  # the latter of a frame in XCom
    texts = [field.name for field in schema if any(is_kind(field.type) for is_kind in kinds)]
    room = room or Room()
    with pq.ParquetFile(io.BytesIO(content), read_dictionary=texts) as file:
        for field in file.schema_arrow:
            if not (pa.types.is_dictionary(field.type) or pa.types.is_primitive(field.type)):
                raise ManifestError(
                    f"The file {shown_path(name)} is not a manifest: its column {shown(field.name)} is not one of "
                    "texts or numbers.",
                    hint="Give a file that a run wrote.",
                    uri=name,
                )
        columns = dict.fromkeys(file.schema_arrow.names)
        for batch in (x for one in columns for x in file.iter_batches(BATCH, columns=[one], use_threads=False)):
            for column in batch.columns:
                size = column.nbytes + len(column) * _RECORD // len(columns)
                if pa.types.is_dictionary(column.type):
                    lengths = pc.binary_length(column.dictionary)
                    size += pc.sum(pc.take(lengths, column.indices)).as_py() or 0
                room.take(size, name)


def manifest_uri(path: str | Folder) -> str:
    """The URI of a file, fit for a reference: ``file://`` and the absolute path."""
    return "file://" + quote(str(Path(path).absolute()))
