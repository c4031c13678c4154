"""For notebooks: manifests out of Airflow's REST interface or out of files, a picture of them, and the pixels.

Neither Airflow nor its database is needed where this runs: an address and a token are.
"""

from __future__ import annotations

import json
import ssl
from collections.abc import Iterator, Mapping
from io import BytesIO
from typing import TYPE_CHECKING, Any
from urllib.error import HTTPError, URLError
from urllib.parse import quote, urlencode, urlsplit
from urllib.request import HTTPRedirectHandler, HTTPSHandler, Request, build_opener

from airflow_dicom_get.config.checks import invalid, shown, shown_path
from airflow_dicom_get.errors import ManifestError
from airflow_dicom_get.manifest import files as _manifest
from airflow_dicom_get.manifest.xcom import table_in_xcom
from airflow_dicom_get.vocabulary import FETCHED, HELD, NOT_HELD

if TYPE_CHECKING:
    import pyarrow as pa
    from matplotlib.figure import Figure
    from pandas import DataFrame
    from pydicom import Dataset

    from airflow_dicom_get.sinks.objects import StoredObject

__all__ = [
    "HELD",
    "NOT_HELD",
    "latest",
    "load_manifests",
    "overview",
    "read_instances",
    "read_manifest",
    "read_manifests",
]

_PAGE = 100
_SECONDS = 60.0
_NO_ROWS = (
    "The queries matched nothing, or nothing was retrieved: check the verdicts of the runs, or name other manifests."
)


def read_manifest(uri: Any, **s3: Any) -> DataFrame:
    """Read the file of a manifest.

    Parameters
    ----------
    uri : str or Path
        Its path or address.
    **s3
        Where it is in a bucket: how to reach that, as in ``s3_config`` of ``GetScu``.

    Raises
    ------
    ManifestError
        There is no such file, it is broken, or it is of another schema.
    """
    return _manifest.read_manifest(uri, **s3)


def read_manifests(where: Any, **s3: Any) -> DataFrame:
    """Read all manifests at a place, as one DataFrame.

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
        began, UTC) and its ``verdict``. An instance has a row for every run that it was part of; see :func:`latest`.

    Raises
    ------
    ManifestError
        There are no manifests, one cannot be read, or none has any rows.
    """
    import pyarrow as pa

    tables = []
    for table in _manifest.tables_below(where, **s3):
        facts = _manifest.metadata_of(table)
        tables.append(_labelled(table, run=facts.get("run"), verdict=facts.get("verdict")))
    frame = _manifest.frame_of(pa.concat_tables(tables, promote_options="default"))
    return _ordered(frame.assign(run_at=_began(frame["run"])), f"The manifests at {shown_path(where)}")


def latest(manifests: DataFrame) -> DataFrame:
    """Keep the last row of each instance: what is known of it after all the runs.

    Parameters
    ----------
    manifests : DataFrame
        As :func:`read_manifests` or :func:`load_manifests` gives them.
    """
    key = ["study_instance_uid", "series_instance_uid", "sop_instance_uid"]
    rows = manifests.sort_values("run_at", kind="stable")
    if (rows["source"] == "").any():
        # A verification names no source and no destination: those of the retrieval before it hold.
        for name in ("source", "destination"):
            known = rows[name].mask(rows[name] == "").groupby([rows[part] for part in key]).ffill()
            rows = rows.assign(**{name: known.fillna("")})
    last: DataFrame = rows.drop_duplicates(key, keep="last").reset_index(drop=True)
    return last


def read_instances(rows: DataFrame, **s3: Any) -> list[Dataset]:
    """Read the data sets that rows of a manifest say are held, from disk or bucket, in the order of the rows.

    Parameters
    ----------
    rows : DataFrame
        Of a manifest. Rows without a file, as of what is missing or was forwarded, are passed over.
    **s3
        How to reach the bucket, as in ``s3_config`` of ``GetScu``; the usual AWS places by default.

    Raises
    ------
    ManifestError
        One of them cannot be read.
    InvalidOption
        An argument of ``s3_config`` is not right.
    """
    from airflow_dicom_get.config.options import OPTIONS
    from airflow_dicom_get.sinks.objects import objects_of

    objects, _ = objects_of(rows, OPTIONS["s3_config"].check("s3_config", s3 or None))
    return [_dataset(item) for item in objects]


def _dataset(item: StoredObject) -> Dataset:
    from pydicom import dcmread
    from pydicom.errors import InvalidDicomError

    from airflow_dicom_get.dicom.part10 import file_header
    from airflow_dicom_get.sinks.objects import UnreadableError

    assert item.row is not None
    head = b""
    if item.row.dataset_offset == 0:  # stored without file meta information: the manifest has what it would say
        head = file_header(item.row.sop_class or "", item.row.sop, item.row.syntax or "", calling="", called="")
    try:
        return dcmread(BytesIO(head + b"".join(map(bytes, item.chunks()))))
    except (UnreadableError, InvalidDicomError) as error:
        raise ManifestError(
            f"The instance {item.row.sop} cannot be read from {shown_path(item.name)}: {error}.",
            hint="It may have been moved. verify() tells what is missing; get_study(manifest=…) fetches it.",
            uri=item.name,
        ) from None


def _labelled(table: pa.Table, **facts: str | None) -> pa.Table:
    import pyarrow as pa

    for name, value in facts.items():
        table = table.append_column(name, pa.array([value] * table.num_rows, pa.string()))
    return table.replace_schema_metadata(None)


def _began(runs: Any) -> Any:
    """The time in the names of runs."""
    import pandas as pd

    return pd.to_datetime(runs.str.extract(r"(\d{8}T\d{6}Z)")[0], format="%Y%m%dT%H%M%SZ", utc=True)


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
        One of its tasks, with all its mapped instances; all that returned a manifest by default.
    base_url : str
        Address of Airflow's web interface.
    token : str
        A token of Airflow's API: that of a viewer will do. ``POST /auth/token`` gives one.
    ca_file : str, optional
        File with the certificate authorities to trust; the system's by default.
    **s3
        How to reach the bucket, where a task returned the reference to a manifest there.

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

    api = _Api(base_url, token, ca_file)
    run = api.latest_run(dag_id) if run_id is None else run_id
    frames = []
    for entry in api.entries(dag_id, run, task_id, "return_value"):
        frame = _frame(api.value(dag_id, run, entry), s3)
        if frame is None:
            continue
        task, index = entry["task_id"], entry["map_index"]
        returned = pd.Timestamp(entry["timestamp"]).tz_convert("UTC")
        frames.append(frame.assign(run=f"{run}/{task}/{index}", run_at=returned, task_id=task, map_index=index))
    if not frames:
        raise ManifestError(
            f"The run {shown(run)} of {shown(dag_id)} returned no manifest.",
            hint="Give run_id, or task_id of a retrieving task.",
            uri=None,
        )
    verdicts = {
        f"{run}/{entry['task_id']}/{entry['map_index']}": api.value(dag_id, run, entry).get("verdict")
        for entry in api.entries(dag_id, run, task_id, "summary")
    }
    frame = pd.concat(frames, ignore_index=True)
    frame["verdict"] = frame["run"].map(verdicts).astype("string")
    return _ordered(frame.astype({"run": "string"}), f"The manifests of the run {shown(run)}")


class _NoRedirect(HTTPRedirectHandler):
    """A redirection would carry the token to wherever it points."""

    def redirect_request(self, *args: Any, **kwargs: Any) -> None:
        return None


class _Api:
    """The few calls of Airflow's REST interface that are needed, with nothing but the standard library."""

    def __init__(self, base_url: str, token: str, ca_file: str | None) -> None:
        parts = urlsplit(base_url)
        if parts.scheme not in ("http", "https") or not parts.netloc:
            raise invalid(
                "base_url", f"{shown(base_url)} is not a valid address", "For example, give http://host:8080."
            )
        if not token.isascii() or not token.isprintable() or not token:
            raise invalid("token", "is not a token", "POST /auth/token returns one.")
        self._base = base_url.rstrip("/")
        self._headers = {"Authorization": f"Bearer {token}", "Accept": "application/json"}
        context = ssl.create_default_context(cafile=ca_file) if parts.scheme == "https" else None
        self._opener = build_opener(_NoRedirect, *([HTTPSHandler(context=context)] if context else []))

    def latest_run(self, dag_id: str) -> str:
        """The run that began last."""
        found = self._get(f"dags/{_part(dag_id)}/dagRuns", order_by="-start_date", limit=1)["dag_runs"]
        if not found:
            raise ManifestError(f"The DAG {shown(dag_id)} has no run.", hint="Trigger a run first.", uri=None)
        return str(found[0]["dag_run_id"])

    def entries(self, dag_id: str, run_id: str, task_id: str | None, key: str) -> Iterator[dict[str, Any]]:
        """The entries of XCom under a key, without their values."""
        path = f"dags/{_part(dag_id)}/dagRuns/{_part(run_id)}/taskInstances/{_part(task_id or '~')}/xcomEntries"
        offset = 0
        while True:
            page = self._get(path, xcom_key=key, limit=_PAGE, offset=offset)
            entries = page["xcom_entries"]
            yield from entries
            offset += len(entries)
            if not entries or offset >= page["total_entries"]:
                return

    def value(self, dag_id: str, run_id: str, entry: Mapping[str, Any]) -> Any:
        """The value of an entry, as XCom holds it."""
        path = f"dags/{_part(dag_id)}/dagRuns/{_part(run_id)}/taskInstances/{_part(entry['task_id'])}"
        query = {"map_index": entry["map_index"], "deserialize": "false", "stringify": "false"}
        return self._get(f"{path}/xcomEntries/{_part(entry['key'])}", **query)["value"]

    def _get(self, path: str, **query: Any) -> Any:
        address = f"{self._base}/api/v2/{path}?{urlencode(query)}"
        try:
            with self._opener.open(Request(address, headers=self._headers), timeout=_SECONDS) as answer:
                return json.load(answer)
        except HTTPError as error:
            with error:
                raise _refused(error.code, path) from None
        except (URLError, OSError, ValueError) as error:
            why = getattr(error, "reason", error)
            raise ManifestError(
                f"Airflow at {shown(self._base)} does not answer: {type(why).__name__}.",
                hint="Check base_url, and that Airflow is running.",
                uri=None,
            ) from error


def _refused(code: int, path: str) -> ManifestError:
    what, hint = {
        401: ("does not accept the token", "It may have expired: POST /auth/token returns a new one."),
        403: ("does not let you read that", "Ask for permission to read this DAG and its XComs."),
        404: ("does not have that", "Check dag_id, run_id and task_id."),
    }.get(code, (f"answers with {code}", "Check its log."))
    return ManifestError(f"Airflow {what} ({path.partition('?')[0]}).", hint=hint, uri=None)


def _part(text: str) -> str:
    return quote(text, safe="~")


def _frame(value: Any, s3: Mapping[str, Any]) -> DataFrame | None:
    """A manifest out of what a task returned; None if it is something else."""
    if isinstance(value, Mapping) and value.get("kind") == _manifest.REFERENCE_KIND:
        return _manifest.load_manifest(value, **s3)
    table = table_in_xcom(value)
    # A verification returns a frame too, of another shape.
    return None if table is None or not set(_manifest.COLUMNS) <= set(table.column_names) else _manifest.frame_of(table)


def overview(manifest: Any) -> Figure:
    """Draw a manifest: what came, by modality and by day; what of it is held, study by study; and why not.

    Parameters
    ----------
    manifest : DataFrame, dict, str or Path, or several of them
        Manifests of any shape. Of an instance that several runs have tried the last row counts.

    Raises
    ------
    ImportError
        matplotlib is not installed.
    """
    try:
        from matplotlib import pyplot
        from matplotlib.patches import Patch
    except ImportError:
        raise ImportError(
            "overview() draws with matplotlib, which is not installed: pip install 'airflow-dicom-get[notebook]'."
        ) from None
    runs = "run_at" in getattr(manifest, "columns", ())
    frame = manifest if runs else _manifest.load_manifests(manifest)
    now = latest(frame) if runs else frame
    held, bad = now[now["state"].isin(HELD)], now[now["state"].isin(NOT_HELD)]
    studies = now["study_instance_uid"].nunique()
    # pyplot teaches the notebook to show figures; closed, this one is not shown a second time.
    figure = pyplot.figure(figsize=(11, 6.5), layout="constrained", facecolor="white")
    pyplot.close(figure)
    figure.suptitle(
        f"{len(held):,} of {len(held) + len(bad):,} instances held, "
        f"{studies:,} {'study' if studies == 1 else 'studies'}, {_megabytes(held):,.1f} MB"
    )
    handles = [Patch(color=_GOOD, label="held"), Patch(color=_BAD, label="not held")]
    figure.legend(handles=handles, loc="outside upper right", ncols=2, frameon=False, fontsize=9)
    axes = figure.subplots(2, 2)
    _draw_modalities(axes[0, 0], held, bad)
    _draw_arrival(axes[0, 1], frame)
    _draw_studies(axes[1, 0], held, bad)
    _draw_reasons(axes[1, 1], bad)
    return figure


_GOOD, _BAD = "#2a6fbb", "#d1495b"
_MOST = 10


def _megabytes(rows: DataFrame) -> float:
    return float(rows["bytes"].sum()) / 1e6


def _draw_modalities(axes: Any, held: DataFrame, bad: DataFrame) -> None:
    import pandas as pd

    axes.set_title("Instances by modality, and size held")
    names = {"held": held["modality"].fillna("unknown"), "not held": bad["modality"].fillna("unknown")}
    counts = pd.DataFrame({what: modality.value_counts() for what, modality in names.items()}).fillna(0)
    if not len(counts):
        _say(axes, "Nothing was listed.")
        return
    counts = counts.sort_values("held")
    sizes = held["bytes"].astype(float).groupby(names["held"]).sum().reindex(counts.index, fill_value=0)
    bars = _stack(axes, counts, list(counts.index))
    axes.bar_label(bars, [f"{size / 1e6:,.1f} MB" for size in sizes], padding=3, fontsize=8)


def _draw_arrival(axes: Any, frame: DataFrame) -> None:
    """By day, or within one where there is only one."""
    came = frame.dropna(subset=["received_at"])
    came = came[came["state"].isin(FETCHED) & came["bytes"].notna()].sort_values("received_at")
    axes.set_title("Received by day (UTC)")
    if not len(came):
        _say(axes, "Nothing was received: it was there before, or is missing.")
        return
    when, size = came["received_at"].dt.tz_localize(None), came["bytes"].astype(float) / 1e6
    days = size.groupby(when.dt.normalize()).sum()
    if len(days) > 1:
        axes.bar(days.index.to_numpy(), days.to_numpy(), color=_GOOD)
    else:
        axes.set_title(f"Received on {days.index[0]:%Y-%m-%d} (UTC), in total")
        axes.step(when.to_numpy(), size.cumsum().to_numpy(), where="post", color=_GOOD)
    axes.set_ylim(bottom=0)
    axes.set_ylabel("MB")
    axes.tick_params(axis="x", labelrotation=30, labelsize=8)


def _draw_studies(axes: Any, held: DataFrame, bad: DataFrame) -> None:
    """Those with something missing first, the largest ones of the rest."""
    import pandas as pd

    studies = {"held": held["study_instance_uid"], "not held": bad["study_instance_uid"]}
    counts = pd.DataFrame({what: uids.value_counts() for what, uids in studies.items()})
    counts = counts.fillna(0).sort_values(["not held", "held"], ascending=False)
    part = counts.head(_MOST)[::-1]
    more = f", {len(part)} of {len(counts):,}" if len(counts) > len(part) else ""
    axes.set_title(f"Instances by study{more}")
    if not len(part):
        _say(axes, "Nothing was listed.")
        return
    _stack(axes, part, [f"…{uid[-12:]}" if len(uid) > 13 else uid for uid in part.index])


def _draw_reasons(axes: Any, bad: DataFrame) -> None:
    axes.set_title("Not held, by reason")
    if not len(bad):
        _say(axes, "All that was listed is held.")
        return
    counts = bad["reason"].fillna("without a reason").value_counts()[::-1]
    bars = axes.barh([str(reason) for reason in counts.index], counts.to_numpy(dtype=int), color=_BAD)
    axes.bar_label(bars, padding=3)
    axes.set_xlabel("instances")
    axes.margins(x=0.12)


def _stack(axes: Any, counts: DataFrame, names: list[str]) -> Any:
    """Bars of what is held and what is not, one behind the other; gives the outer ones."""
    places, held, bad = range(len(counts)), counts["held"].to_numpy(), counts["not held"].to_numpy()
    axes.barh(places, held, color=_GOOD)
    bars = axes.barh(places, bad, left=held, color=_BAD)
    axes.set_yticks(list(places), names, fontsize=8)
    axes.set_xlabel("instances")
    axes.set_xlim(0, 1.25 * max(held + bad))
    return bars


def _say(axes: Any, text: str) -> None:
    axes.text(0.5, 0.5, text, ha="center", va="center", transform=axes.transAxes)
    axes.set_axis_off()
