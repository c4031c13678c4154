"""Where a task's manifest lies, and what of it goes to XCom."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from airflow_dicom_get.checks import invalid, shown
from airflow_dicom_get.destination import FilesystemDestination, ForwardDestination, parse_destination
from airflow_dicom_get.manifest import (
    combine_manifests,
    frame_of,
    load_table,
    manifest_table,
    reference,
    safe_name,
)
from airflow_dicom_get.operators import _config

if TYPE_CHECKING:
    from collections.abc import Sequence

    from airflow_dicom_get.result import Result

MODES = ("auto", "full", "reference")


def run_name(*, dag_id: str, run_id: str, task_id: str, map_index: int, try_number: int) -> str:
    """``<dag_id>/<run_id>/<task_id>/<map_index>-<try>``, with ``_`` for what a file name should not hold."""
    return "/".join([*(safe_name(part) for part in (dag_id, run_id, task_id)), f"{map_index}-{try_number}"])


def part_name(name: str, number: int, parts: int) -> str:
    """The name of one of several manifests of a task, which become one in the end."""
    return name if parts == 1 else f"{name}.part{number}"


def check_place(value: Any, option: str) -> str:
    """Refuse a relative path: tasks run in a folder that nobody chose, on any worker."""
    text = str(value).strip() if value is not None else ""
    if not text or text == "None":
        raise invalid(option, "is empty, or its template rendered to nothing", "Give an absolute path.")
    place = parse_destination(text, option)
    relative = isinstance(place, FilesystemDestination) and not place.path.is_absolute()
    if relative or text.startswith("~"):
        raise invalid(option, f"{shown(text)} is no absolute path", "Write it from the root, as in /data/dicom.")
    return text


def root_of(destination: str, given: str | None, configured: str) -> str | None:
    """The folder of the manifests where the task or the configuration names one; None: below the destination."""
    if given is not None:
        return check_place(given, "manifest_root")
    if configured and isinstance(parse_destination(destination), ForwardDestination):
        return check_place(configured, "[dicom_get] manifest_root")
    return None


def xcom_bytes(frame: Any) -> int:
    """How large a frame is in XCom: Airflow stores it as Parquet in hexadecimal."""
    import pyarrow as pa
    from pyarrow import parquet

    sink = pa.BufferOutputStream()
    parquet.write_table(pa.Table.from_pandas(frame), sink, compression="snappy")
    return 2 * int(sink.tell())


class Manifest:
    """The manifest of one task: its file, its counts, and what of it is returned.

    :param results: of the calls of the engine; where they are several, their manifests become one
    :param name: of the file below its root
    :param mode: ``auto``, ``full`` or ``reference``
    """

    def __init__(self, results: Sequence[Result], name: str, *, mode: str, log: Any) -> None:
        self._reference = _one_file(results, name)
        self._table = load_table(self._reference) if self._reference else _rows(results)
        self._frame: Any = None
        self.problem: str | None = None
        """Why what was asked for cannot be returned; the task is to fail with it."""
        if mode != "reference":
            frame = frame_of(self._table)
            size = xcom_bytes(frame)
            limit = _config.integer("manifest_xcom_max_bytes" if mode == "auto" else "manifest_xcom_hard_max_bytes")
            if size <= limit:
                self._frame = frame
            else:
                self._too_large(mode, size, limit, log)
        if self._frame is None and self._reference is None and self.problem is None:
            self.problem = (
                "There is no manifest file to refer to. Give manifest_root, or set [dicom_get] manifest_root."
            )

    def _too_large(self, mode: str, size: int, limit: int, log: Any) -> None:
        what = f"The manifest of {self._table.num_rows} rows takes {size} bytes in XCom"
        if mode == "full":
            self.problem = (
                f"{what}, and [dicom_get] manifest_xcom_hard_max_bytes is {limit}. Give manifest_xcom='auto', and "
                "load_manifest() in the next task; or map over smaller parts with shard_instances of find."
            )
        else:
            log.warning("%s, over %d: a reference to its file is returned. load_manifest() takes either.", what, limit)

    @property
    def value(self) -> Any:
        """The frame, or the reference."""
        return self._reference if self._frame is None else self._frame

    def counts(self) -> dict[str, Any]:
        """How many studies and series, and where the manifest is, for the summary."""
        from pyarrow import compute

        found = self._reference or {}
        return {
            "studies": compute.count_distinct(self._table["study_instance_uid"]).as_py(),
            "series": compute.count_distinct(self._table["series_instance_uid"]).as_py(),
            "manifest": {
                "manifest_kind": "reference" if self._frame is None else "inline",
                "manifest_uri": found.get("manifest_uri"),
                "manifest_rows": self._table.num_rows,
                "manifest_sha256": found.get("sha256"),
            },
        }


def _one_file(results: Sequence[Result], name: str) -> dict[str, Any] | None:
    """The reference to the one manifest of a task; None if there is no file."""
    uris = [result.manifest_uri for result in results if result.manifest_uri]
    if not uris or len(uris) < len(results):
        return None
    if len(uris) == 1:
        return reference(uris[0])
    parts = [_path(uri) for uri in uris]
    whole = combine_manifests(uris, parts[0].with_name(f"{name.rpartition('/')[2]}.parquet"))
    for part in parts:
        part.unlink(missing_ok=True)
    return whole


def _path(uri: str) -> Path:
    place = parse_destination(uri, "manifest")
    assert isinstance(place, FilesystemDestination)
    return place.path


def _rows(results: Sequence[Result]) -> Any:
    """The rows themselves, where no file of them could be written."""
    import pyarrow as pa

    tables = [result.rows() for result in results if result.rows is not None]
    return pa.concat_tables([manifest_table([], source="", destination=""), *tables], promote_options="default")
