"""For notebooks: manifests from Airflow's REST API or from files, and the data sets of their rows.

This needs neither Airflow nor its database, only an address and a token.
"""

from __future__ import annotations

import logging
import warnings
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from io import BytesIO
from typing import TYPE_CHECKING, Any

from airflow_dicom_get.config.checks import shown, shown_path
from airflow_dicom_get.dicom.header import DeflateWalk
from airflow_dicom_get.dicom.part10 import PREAMBLE, file_header
from airflow_dicom_get.dicom.syntaxes import DEFLATED_LE, EXPLICIT_BE, IMPLICIT_LE
from airflow_dicom_get.errors import ManifestError
from airflow_dicom_get.manifest.files import S3, Room, tables_below
from airflow_dicom_get.manifest.frames import (
    began,
    frame_of,
    load_manifest,
    newest_rows,
    table_in_xcom,
)
from airflow_dicom_get.manifest.schema import metadata_of
from airflow_dicom_get.notebook.rest import RestApi
from airflow_dicom_get.notebook.stored import load_reference, stored_value
from airflow_dicom_get.sinks.objects import UnreadableError, UnusableError, open_object

if TYPE_CHECKING:
    import pyarrow as pa
    from pandas import DataFrame
    from pydicom import Dataset

    from airflow_dicom_get.sinks.objects import Opened, StoredObject

__all__ = ["latest", "load_manifests", "read_instances", "read_manifest", "read_manifests"]

_NO_ROWS = (
    "The queries matched nothing, or nothing was retrieved: check the verdicts of the runs, or name other manifests."
)


def read_manifest(uri: Any, **s3: Any) -> DataFrame:
    """Read the file of a manifest.

    Where it lies in a folder ``_manifests``, its column ``destination`` names the place in which that lies, or is
    blank: :func:`read_instances` then opens nothing elsewhere, but below its ``root``. So it is with
    :func:`read_manifests`.

    Parameters
    ----------
    uri : str or Path
        A path, ``file://…`` or ``s3://…``.
    **s3
        How to reach the bucket, as in ``s3_config`` of ``GetScu``; the usual AWS places by default.

    Raises
    ------
    ManifestError
        The file does not exist, is damaged, or has another schema.
    """
    return load_manifest(uri, s3 or None)


def read_manifests(where: Any, **s3: Any) -> DataFrame:
    """Read all manifests at a location, as one DataFrame.

    Parameters
    ----------
    where : str or Path
        A destination of retrievals, a folder or prefix with manifests, or one file; on disk or ``s3://…``.
    **s3
        How to reach the bucket, as in ``s3_config`` of ``GetScu``; the usual AWS places by default.

    Returns
    -------
    DataFrame
        The rows of all, oldest run first, with the columns of a manifest and three more: ``run``, ``run_at`` (when it
        started, UTC) and its ``verdict``. An instance has a row for every run that it was part of; see :func:`latest`.

    Raises
    ------
    ManifestError
        There are no manifests, one cannot be read, or none has any rows.
    """
    import pyarrow as pa

    tables, room = [], Room()
    for table in tables_below(where, s3 or None, room):
        facts = metadata_of(table)
        labels = {name: facts.get(name) for name in ("run", "verdict")}
        room.take(sum(len(label or "") for label in labels.values()) * table.num_rows, str(where))
        tables.append(_labelled(table, labels))
    frame = frame_of(pa.concat_tables(tables, promote_options="default"))
    return _ordered(frame.assign(run_at=began(frame["run"])), f"The manifests at {shown_path(where)}")


def latest(manifests: DataFrame) -> DataFrame:
    """Keep the last row of each instance: its state after all runs.

    Parameters
    ----------
    manifests : DataFrame
        As returned by :func:`read_manifests` or :func:`load_manifests`.
    """
    return newest_rows(manifests)


def read_instances(rows: DataFrame, root: Any = None, **s3: Any) -> list[Dataset]:
    """Read the data sets of the rows of a manifest, from disk or bucket, in the order of the rows.

    Parameters
    ----------
    rows : DataFrame
        Of a manifest. Rows without a file, because the instance is missing or was forwarded, are skipped.
    root : path, address, or several of them
        Where files may lie besides the ``destination`` of the rows: folders, or ``s3://bucket/prefix``.
    **s3
        How to reach the bucket, as in ``s3_config`` of ``GetScu``; the usual AWS places by default.

    Raises
    ------
    ManifestError
        One of them cannot be read.
    InvalidOption
        An argument of ``s3_config`` is invalid.
    """
    from airflow_dicom_get.config.options import OPTIONS
    from airflow_dicom_get.sinks.objects import load_listed, objects_of

    objects, _ = objects_of(load_listed(rows, root=root), OPTIONS["s3_config"].check("s3_config", s3 or None))
    return [_dataset(item) for item in objects]


def _dataset(item: StoredObject) -> Dataset:
    row = item.row
    assert row is not None
    try:
        opened = open_object(item)
        content = _content(opened, row.bytes)
        try:
            with _silently():
                dataset = _read(opened, content)
                uids = (dataset.StudyInstanceUID, dataset.SeriesInstanceUID, dataset.SOPInstanceUID)
        except (UnreadableError, MemoryError):
            raise
        except Exception as error:  # of any kind, and its text may quote the patient
            raise UnreadableError(f"pydicom cannot read it ({type(error).__name__})") from None
        if uids != (row.study, *row.key):
            raise UnreadableError("it is not the instance that the manifest names")
        return dataset
    except (UnreadableError, UnusableError) as error:
        reason = f"it {error}" if isinstance(error, UnusableError) else error
        raise ManifestError(
            f"The instance {row.sop} cannot be read from {shown_path(item.name)}: {reason}.",
            hint="It may have been moved. verify() tells what is missing; get_study(manifest=…) fetches it.",
            uri=item.name,
        ) from None


def _read(opened: Opened, content: bytes) -> Dataset:
    """The data set as pydicom has it, which begins where its header was found, and has the transfer syntax of there.

    pydicom's own reader of files is not asked for either. It takes elements of groups 0002 and 0000 with which a data
    set begins for some of the file, and follows the transfer syntax that they say.
    """
    from pydicom.dataset import FileDataset, FileMetaDataset
    from pydicom.filereader import read_dataset
    from pydicom.uid import UID

    instance, syntax, offset = opened.instance, opened.instance.syntax or "", opened.dataset_offset
    head = content[:offset]
    if opened.meta is None:  # stored without file meta information: the manifest has what it would say
        head = file_header(instance.sop_class or "", instance.sop, syntax, calling="", called="")
    told = read_dataset(BytesIO(head[PREAMBLE:]), False, True, stop_when=lambda tag, *_: tag >> 16 != 2)
    meta = FileMetaDataset(told)
    meta.set_original_encoding(False, True, told.original_character_set)
    meta.TransferSyntaxUID = UID(syntax)
    if syntax == DEFLATED_LE:
        file, offset = BytesIO(_inflated(memoryview(content)[offset:])), 0
    else:
        file = BytesIO(content)
    file.seek(offset)
    layout = syntax == IMPLICIT_LE, syntax != EXPLICIT_BE
    found = read_dataset(file, *layout)
    dataset = FileDataset(file, found, head[:128], meta, *layout)
    dataset.set_original_encoding(*layout, found.original_character_set)
    return dataset


@contextmanager
def _silently() -> Iterator[None]:
    """Keep out of log and warnings what pydicom says of values that it cannot read: it quotes them."""
    logger = logging.getLogger("pydicom")

    def nothing(_: logging.LogRecord) -> bool:
        return False

    logger.addFilter(nothing)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.removeFilter(nothing)


def _content(opened: Opened, most: int | None) -> bytes:
    """All of an object, but of one that somebody has made larger no more than the manifest says."""
    content = bytearray()
    for chunk in opened.chunks():
        content += chunk
        if most is not None and len(content) > most:
            raise UnreadableError(f"it is larger than the {most} bytes that the manifest says")
    return bytes(content)


def _inflated(deflated: memoryview) -> bytes:
    """Inflate a data set that does so in measure, and is not damaged."""
    walk = DeflateWalk()
    walk.feed(deflated)
    if walk.beyond:
        raise UnreadableError("it inflates without measure: some MiB of it may be many GiB of memory")
    if walk.torn:
        raise UnreadableError("its deflated data set is damaged")
    return zlib.decompress(deflated, -zlib.MAX_WBITS)


def _labelled(table: pa.Table, facts: Mapping[str, str | None]) -> pa.Table:
    import pyarrow as pa

    # A column of such a name is not ours to keep, and two of one name nobody can join.
    table = table.select([at for at, name in enumerate(table.column_names) if name not in facts])
    for name, value in facts.items():
        table = table.append_column(name, pa.array([value] * table.num_rows, pa.string()))
    return table.replace_schema_metadata(None)


def _ordered(frame: DataFrame, what: str) -> DataFrame:
    if not len(frame):
        raise ManifestError(f"{what} have no rows.", hint=_NO_ROWS, uri=None)
    return frame.sort_values("run_at", kind="stable", ignore_index=True)


def load_manifests(
    dag_id: str,
    *,
    run_id: str | None = None,
    task_id: str | None = None,
    base_url: str,
    token: str,
    ca_file: str | None = None,
    **s3: Any,
) -> DataFrame:
    """Load what the retrievals of a DAG returned, as one DataFrame.

    Parameters
    ----------
    dag_id : str
        The DAG.
    run_id : str, optional
        One of its runs; the latest by default.
    task_id : str, optional
        One of its tasks, with all its mapped instances; by default all tasks that returned a manifest.
    base_url : str
        Address of Airflow's web interface.
    token : str
        A token of Airflow's API; a viewer's is enough. ``POST /auth/token`` returns one.
    ca_file : str, optional
        File with the certificate authorities to trust; the system's by default.
    **s3
        How to reach the bucket, if a task returned a reference to a manifest there, or its XCom lies in one; the usual
        AWS places by default, whatever connection of Airflow the address names.

    Returns
    -------
    DataFrame
        The rows of all manifests, with ``task_id`` and ``map_index`` of the task that each is of, and ``run``,
        ``run_at`` (when the task returned) and ``verdict`` as :func:`read_manifests` has them.

    Raises
    ------
    ManifestError
        Airflow refuses, has no such run, or a manifest cannot be read, or none has any rows.
    """
    import pandas as pd

    api = RestApi(base_url, token, ca_file)
    run = api.latest_run(dag_id) if run_id is None else run_id
    frames, room = [], Room()
    for entry in api.entries(dag_id, run, task_id, "return_value"):
        task, index = entry["task_id"], entry["map_index"]
        frame = _frame(stored_value(api.value(dag_id, run, entry), dag_id, task, s3 or None), s3 or None, room)
        if frame is None:
            continue
        returned = pd.Timestamp(entry["timestamp"]).tz_convert("UTC")
        frames.append(frame.assign(run=f"{run}/{task}/{index}", run_at=returned, task_id=task, map_index=index))
    if not frames:
        raise ManifestError(
            f"The run {shown(run)} of {shown(dag_id)} returned no manifest.",
            hint="Give run_id, or task_id of a retrieving task.",
            uri=None,
        )
    verdicts = {
        f"{run}/{entry['task_id']}/{entry['map_index']}": _verdict_in(api.value(dag_id, run, entry))
        for entry in api.entries(dag_id, run, task_id, "summary")
    }
    frame = pd.concat(frames, ignore_index=True)
    frame["verdict"] = frame["run"].map(verdicts).astype("string")
    return _ordered(frame.astype({"run": "string"}), f"The manifests of the run {shown(run)}")


def _verdict_in(summary: Any) -> str | None:
    """The verdict in a summary, which may be anything that a task of the DAG has put there."""
    verdict = summary.get("verdict") if isinstance(summary, Mapping) else None
    return verdict if isinstance(verdict, str) else None


def _frame(value: Any, s3_config: S3, room: Room) -> DataFrame | None:
    """A manifest out of what a task returned; None if it is something else."""
    table = load_reference(value, s3_config, room)
    if table is None:
        table = table_in_xcom(value, room)  # a verification returns a frame too, of another shape
    return None if table is None else frame_of(table)
