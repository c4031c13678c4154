"""Where a task's manifest lies, and what of it goes to XCom."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from airflow_dicom_get.config.checks import invalid, shown_path
from airflow_dicom_get.config.destination import FilesystemDestination, S3Destination, parse_destination
from airflow_dicom_get.connections import with_connection
from airflow_dicom_get.errors import DicomGetError
from airflow_dicom_get.hooks import configuration
from airflow_dicom_get.hooks._destinations import ResolvedDestination, resolve_destination
from airflow_dicom_get.manifest.files import Room, task_run_name, without_links
from airflow_dicom_get.manifest.frames import (
    bytes_in_xcom,
    each_of,
    frame_of,
    load_table,
    load_tables,
    one_table,
    reference_to,
    write_as_one,
)
from airflow_dicom_get.manifest.schema import manifest_table
from airflow_dicom_get.manifest.scopes import scopes_of
from airflow_dicom_get.operators._lineage import StudyCounts, counts_by_study
from airflow_dicom_get.sinks.objects import Listed, load_listed
from airflow_dicom_get.storage import files
from airflow_dicom_get.vocabulary import HELD, NOT_HELD, weakest, worst

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    import pyarrow as pa

    from airflow_dicom_get.result import Result

MODES = ("auto", "full", "reference")
MOST_STUDIES = 50
"""UIDs of studies in a summary."""
MOST_SERIES = 50
"""Series in a summary."""


def run_name_of(ti: Any) -> str:
    """The name of the manifest of a task instance."""
    return task_run_name(
        dag_id=ti.dag_id,
        run_id=ti.run_id,
        task_id=ti.task_id,
        map_index=-1 if ti.map_index is None else ti.map_index,
        try_number=ti.try_number,
    )


def part_name(name: str, number: int, parts: int) -> str:
    """The name of one of several manifests of a task, which become one in the end."""
    return name if parts == 1 else f"{name}.part{number}"


class Manifest:
    """The manifest of one task: its file, its counts, and what of it is returned.

    :param results: of the calls of the engine; where they are several, their manifests become one
    :param name: of the file below its root
    :param mode: ``auto``, ``full`` or ``reference``
    :param conn_id: the connection by which its bucket is reached; it stands in the address that is handed on
    """

    def __init__(self, results: Sequence[Result], name: str, *, mode: str, conn_id: str | None = None) -> None:
        self._reference = _one_file(results, name, conn_id)
        self._table = load_table(self._reference) if self._reference else _rows(results)
        self._frame: Any = None
        self.problem: str | None = None
        """Why what was asked for cannot be returned; the task is to fail with it."""
        self.remark: str | None = None
        """That a reference is returned where a smaller manifest would have been a DataFrame."""
        if mode != "reference":
            frame = frame_of(self._table)
            size, limit = bytes_in_xcom(frame), configuration.integer("manifest_xcom_max_bytes")
            if size <= limit:
                self._frame = frame
            else:
                self._too_large(mode, size, limit)
        if self._frame is None and self._reference is None and self.problem is None:
            self.problem = (
                "There is no manifest file to refer to. Give manifest_root, or set [dicom_get] manifest_root."
            )

    def _too_large(self, mode: str, size: int, limit: int) -> None:
        what = (
            f"The manifest of {self._table.num_rows} rows takes {size} bytes in XCom, and [dicom_get] "
            f"manifest_xcom_max_bytes is {limit}"
        )
        if mode == "full":
            self.problem = (
                f"{what}. Give manifest_xcom='auto', and load_manifest() in the next task; or map over smaller parts "
                "with shard_instances of find."
            )
        else:
            self.remark = f"{what}: a reference to its file is returned, not a DataFrame. load_manifest() takes either."

    def extra_of_event(self, result: Result) -> dict[str, Any]:
        """What an asset event says of it: the reference, which ``load_manifest`` takes, with verdict and counts."""
        return {
            **(self._reference or {}),
            "verdict": result.verdict,
            "studies": len(self.studies),
            "instances": self._table.num_rows,
            "counts": result.counts(),
        }

    @property
    def studies(self) -> list[StudyCounts]:
        """What it says of each study."""
        return counts_by_study(self._table)

    @property
    def value(self) -> Any:
        """The frame, or the reference."""
        return self._reference if self._frame is None else self._frame

    def counts(self) -> dict[str, Any]:
        """What the manifest is of, and where it is, for the summary."""
        found = self._reference or {}
        return {
            **counts_of(self._table),
            "manifest_kind": "reference" if self._frame is None else "inline",
            "manifest_uri": found.get("manifest_uri"),
            "manifest_rows": self._table.num_rows,
            "manifest_sha256": found.get("sha256"),
        }


def counts_of(table: pa.Table) -> dict[str, Any]:
    """What a manifest is of, as a summary has it: studies, series, and the reasons of what is not held.

    Of the series those with something missing come first.
    """
    import pyarrow as pa
    from pyarrow import compute

    def among(states: Iterable[str]) -> Any:
        return compute.is_in(table["state"], value_set=pa.array(sorted(states)))

    held, missing = among(HELD), among(NOT_HELD)
    counted = table.select(["study_instance_uid", "series_instance_uid", "modality", "series_number"])
    for name, column in (
        ("held", held.cast(pa.int64())),
        ("not_held", missing.cast(pa.int64())),
        ("bytes", compute.if_else(held, compute.fill_null(table["bytes"], 0), 0)),
    ):
        counted = counted.append_column(name, column)
    keys, first, added = counted.column_names[:2], counted.column_names[2:4], counted.column_names[4:]
    grouped = counted.group_by(keys, use_threads=False).aggregate(
        [*((name, "first") for name in first), *((name, "sum") for name in added)]
    )
    names = {**{f"{name}_first": name for name in first}, **{f"{name}_sum": name for name in added}}
    rows = [{names.get(name, name): value for name, value in row.items()} for row in grouped.to_pylist()]
    rows.sort(key=lambda row: (not row["not_held"], row[keys[0]] or "", row["series_number"] or 0, row[keys[1]] or ""))
    studies = sorted({row[keys[0]] for row in rows if row[keys[0]]})
    reasons = Counter(table.filter(missing)["reason"].to_pylist())
    return {
        "studies": len({row[keys[0]] for row in rows}),
        "series": len(rows),
        "study_instance_uids": studies[:MOST_STUDIES],
        "reasons": {reason or "unknown": count for reason, count in reasons.most_common()},
        "series_rows": rows[:MOST_SERIES],
    }


def _one_file(results: Sequence[Result], name: str, conn_id: str | None) -> dict[str, Any] | None:
    """The reference to the one manifest of a task; None if there is no file."""
    from airflow_dicom_get.engine.report import merge

    parts = [
        reference_to(with_connection(result.manifest_uri, conn_id), result.written)
        for result in results
        if result.manifest_uri and result.written
    ]
    if not parts or any(result.rows is not None and not result.manifest_uri for result in results):
        return None  # one that has neither rows nor a file was never begun, or broke off: it counts for the verdict
    if len(results) == 1:
        return parts[0]
    uris = [part["manifest_uri"] for part in parts]
    task, to = merge(results), f"{uris[0].rpartition('/')[0]}/{name.rpartition('/')[2]}.parquet"
    # By their references: our own, or they are refused.
    whole = write_as_one(load_tables(parts), to, verdict=task.verdict, evidence=task.evidence)
    for uri in uris:
        if uri != to:
            _remove(uri)
    return whole


def _remove(uri: str) -> None:
    """Remove a part that now stands in the whole, if that is allowed."""
    place = parse_destination(uri, "manifest")
    if isinstance(place, FilesystemDestination):
        files.disk.remove(without_links(place.path))
    elif isinstance(place, S3Destination):
        from airflow_dicom_get.hooks.dicom_s3 import DicomS3Hook

        assert place.conn_id is not None
        with contextlib.suppress(DicomGetError):
            DicomS3Hook(place.conn_id).get_bucket(place.bucket).call("delete_object", place.prefix)


# --- what is given ---------------------------------------------------------------------------------


def load_given(manifest: Any, s3_conn_id: str | None) -> Listed:
    """Load the manifests that a task was given, as one.

    Objects may be opened in the places in which their ``_manifests`` lie, of what a task handed on in the destinations
    of its rows, as far as ``[dicom_get] allowed_destinations`` has them.

    :param manifest: of any shape, or several
    :param s3_conn_id: the connection of those in a bucket whose address names none
    :raises ManifestError: one cannot be read, or is not what its reference says
    :raises InvalidOption: there is none, or one of several is None: what a task was to retrieve that left none would be
        passed over
    """
    manifests = each_of(manifest)
    missing = sum(one is None for one in manifests)
    if missing and missing < len(manifests):
        raise invalid(
            "manifest",
            f"has None in {missing} of {len(manifests)} places",
            "The upstream task failed or was skipped. Leave out those that you know to be skipped.",
        )
    given = [one for one in load_each(manifests, s3_conn_id) if one is not None]
    parts = tuple(part for one in given for part in one.parts)
    verdict, evidence = worst(one.verdict for one in given), weakest(one.evidence for one in given)
    tables = [one.table for one in given]
    return Listed(one_table(tables), parts, verdict, evidence, scopes_of(tables))


def load_each(manifest: Any, s3_conn_id: str | None) -> list[Listed | None]:
    """As :func:`load_given`, each by itself; None for what a task left that was skipped."""
    given: list[Listed | None] = []
    room = Room()
    for one in each_of(manifest):
        if one is None:
            given.append(None)
            continue
        uri = _uri_of(one)
        how = None
        if uri is not None and s3_conn_id and _conn_id_of(uri) == "":
            from airflow_dicom_get.hooks.dicom_s3 import DicomS3Hook

            how = DicomS3Hook(s3_conn_id).config
        elif uri is not None:
            _check_manifest_place(uri)
        given.append(load_listed(one, how, room=room).within(lambda places: filter(configuration.is_allowed, places)))
    if all(one is None for one in given):
        raise invalid(
            "manifest",
            "names none",
            "Give a manifest, a reference or an address. Check whether all upstream tasks were skipped.",
        )
    return given


def place_of_objects(listed: Listed, conn_id: str | None) -> ResolvedDestination | None:
    """The bucket in which objects of a manifest lie, if some lie in one.

    :param conn_id: the connection by which it is reached; never one that a row names
    """
    place = next((one for one in listed.places if isinstance(one, S3Destination)), None)
    if place is None or not any(uri and uri.startswith("s3://") for uri in listed.table["uri"].to_pylist()):
        return None
    return resolve_destination(place.uri, "manifest (the objects that it lists)", conn_id)


def connection_of(manifest: Any) -> str | None:
    """The connection that the address of a manifest names, the first of several."""
    found = (_uri_of(one) for one in each_of(manifest))
    return next((conn_id for uri in found if uri is not None and (conn_id := _conn_id_of(uri))), None)


def _uri_of(manifest: Any) -> str | None:
    """The address of a manifest that is no frame."""
    uri = manifest.get("manifest_uri") if isinstance(manifest, Mapping) else manifest
    return uri if isinstance(uri, str) else None


def _conn_id_of(uri: str) -> str | None:
    """The connection in an address; blank if it names a bucket and none, None if it names no bucket."""
    if not uri.startswith("s3://"):
        return None
    place = parse_destination(uri, "manifest")
    return (place.conn_id or "") if isinstance(place, S3Destination) else None


def _check_manifest_place(uri: str) -> None:
    place = parse_destination(uri, "manifest")
    if isinstance(place, FilesystemDestination) and not place.path.is_absolute():
        raise invalid("manifest", f"{shown_path(uri)} is not an absolute path", "Write an absolute path.")


# --- rows without a file ---------------------------------------------------------------------------


def _rows(results: Sequence[Result]) -> Any:
    """The rows themselves, where no file of them could be written."""
    import pyarrow as pa

    tables = [result.rows() for result in results if result.rows is not None]
    return pa.concat_tables([manifest_table([], source="", destination=""), *tables], promote_options="default")
