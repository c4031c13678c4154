"""For notebooks: manifests out of Airflow by its REST interface, out of their files, and an overview as figures.

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

from airflow_dicom_get import manifest as _manifest
from airflow_dicom_get.checks import invalid, shown
from airflow_dicom_get.errors import ManifestError

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from pandas import DataFrame

__all__ = ["load_manifests", "overview", "read_manifest"]

_PAGE = 100
_SECONDS = 60.0
_HELD = ("stored", "forwarded", "held")
_NOT_HELD = ("failed", "missing", "conflict")


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
        The rows of all manifests, with ``task_id`` and ``map_index`` of the task that each is of.

    Raises
    ------
    ManifestError
        Airflow refuses, has no such run, or a manifest cannot be read.
    """
    import pandas as pd

    api = _Api(base_url, token, ca_file)
    run = api.latest_run(dag_id) if run_id is None else run_id
    frames = []
    for entry in api.returned(dag_id, run, task_id):
        frame = _frame(api.value(dag_id, run, entry), s3)
        if frame is None:
            continue
        frames.append(frame.assign(task_id=entry["task_id"], map_index=entry["map_index"]))
    if not frames:
        raise ManifestError(
            f"The run {shown(run)} of {shown(dag_id)} returned no manifest.",
            hint="Give run_id; or task_id, of a task that retrieves.",
            uri=None,
        )
    return pd.concat(frames, ignore_index=True)


class _NoRedirect(HTTPRedirectHandler):
    """A redirection would carry the token to wherever it points."""

    def redirect_request(self, *args: Any, **kwargs: Any) -> None:
        return None


class _Api:
    """The few calls of Airflow's REST interface that are needed, with nothing but the standard library."""

    def __init__(self, base_url: str, token: str, ca_file: str | None) -> None:
        parts = urlsplit(base_url)
        if parts.scheme not in ("http", "https") or not parts.netloc:
            raise invalid("base_url", f"{shown(base_url)} is no address", "Give http://host:8080, for example.")
        if not token.isascii() or not token.isprintable() or not token:
            raise invalid("token", "is no token", "POST /auth/token gives one.")
        self._base = base_url.rstrip("/")
        self._headers = {"Authorization": f"Bearer {token}", "Accept": "application/json"}
        context = ssl.create_default_context(cafile=ca_file) if parts.scheme == "https" else None
        self._opener = build_opener(_NoRedirect, *([HTTPSHandler(context=context)] if context else []))

    def latest_run(self, dag_id: str) -> str:
        """The run that began last."""
        found = self._get(f"dags/{_part(dag_id)}/dagRuns", order_by="-start_date", limit=1)["dag_runs"]
        if not found:
            raise ManifestError(f"The DAG {shown(dag_id)} has no run.", hint="Trigger it.", uri=None)
        return str(found[0]["dag_run_id"])

    def returned(self, dag_id: str, run_id: str, task_id: str | None) -> Iterator[dict[str, Any]]:
        """The entries of XCom that tasks returned, without their values."""
        path = f"dags/{_part(dag_id)}/dagRuns/{_part(run_id)}/taskInstances/{_part(task_id or '~')}/xcomEntries"
        offset = 0
        while True:
            page = self._get(path, xcom_key="return_value", limit=_PAGE, offset=offset)
            entries = page["xcom_entries"]
            yield from entries
            offset += len(entries)
            if not entries or offset >= page["total_entries"]:
                return

    def value(self, dag_id: str, run_id: str, entry: Mapping[str, Any]) -> Any:
        """What a task returned, as XCom holds it."""
        path = f"dags/{_part(dag_id)}/dagRuns/{_part(run_id)}/taskInstances/{_part(entry['task_id'])}"
        query = {"map_index": entry["map_index"], "deserialize": "false", "stringify": "false"}
        return self._get(f"{path}/xcomEntries/return_value", **query)["value"]

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
                hint="Check base_url, and that Airflow is up.",
                uri=None,
            ) from error


def _refused(code: int, path: str) -> ManifestError:
    what, hint = {
        401: ("does not take the token", "It may have expired: POST /auth/token gives a new one."),
        403: ("does not let you read that", "Ask for the right to read this DAG and its XComs."),
        404: ("does not have that", "Check dag_id, run_id and task_id."),
    }.get(code, (f"answers with {code}", "Its log says why."))
    return ManifestError(f"Airflow {what} ({path.partition('?')[0]}).", hint=hint, uri=None)


def _part(text: str) -> str:
    return quote(text, safe="~")


def _frame(value: Any, s3: Mapping[str, Any]) -> DataFrame | None:
    """A manifest out of what a task returned; None if it is something else."""
    if not isinstance(value, Mapping):
        return None
    if value.get("kind") == "dicom-manifest":
        return _manifest.load_manifest(value, **s3) if s3 else _manifest.load_manifest(value)
    if not str(value.get("__classname__", "")).endswith(".DataFrame"):
        return None
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.read_table(BytesIO(bytes.fromhex(value["__data__"])))
    except (KeyError, TypeError, ValueError, pa.ArrowException) as error:
        raise ManifestError("A task returned a DataFrame that cannot be read.", hint="", uri=None) from error
    # A verification returns a frame too, of another shape.
    return _manifest.frame_of(table) if set(_manifest.COLUMNS) <= set(table.column_names) else None


def overview(manifest: Any) -> Figure:
    """Draw a manifest: what is held and what is not, by study; why not; when it came, and how large it is.

    Parameters
    ----------
    manifest : DataFrame, dict, str or Path, or several of them
        Manifests of any shape.

    Raises
    ------
    ImportError
        matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ImportError(
            "overview() draws with matplotlib, which is not installed: pip install 'airflow-dicom-get[notebook]'."
        ) from None
    frame = _manifest.load_manifests(manifest)
    figure = Figure(figsize=(11, 6.5), layout="constrained")
    held = frame["state"].isin(_HELD)
    bad = frame["state"].isin(_NOT_HELD)
    studies = frame["study_instance_uid"].nunique()
    figure.suptitle(
        f"{int(held.sum()):,} of {int((held | bad).sum()):,} instances held, {studies:,} studies, "
        f"{int(frame.loc[held, 'bytes'].fillna(0).sum()) / 1e6:,.1f} MB"
    )
    axes = figure.subplots(2, 2)
    _draw_studies(axes[0, 0], frame, held, bad)
    _draw_reasons(axes[0, 1], frame[bad])
    _draw_arrival(axes[1, 0], frame[held])
    _draw_modalities(axes[1, 1], frame[held])
    return figure


_GOOD, _BAD, _PLAIN = "#1d7f46", "#c02b2b", "#2568c4"
_MOST = 12


def _draw_studies(axes: Any, frame: DataFrame, held: Any, bad: Any) -> None:
    """Those with something missing first, the largest ones of the rest."""
    counted = (
        frame.assign(held=held.astype(int), bad=bad.astype(int))
        .groupby("study_instance_uid")[["held", "bad"]]
        .sum()
        .sort_values(["bad", "held"], ascending=False)
    )
    part = counted.head(_MOST)[::-1]
    names = [f"…{uid[-14:]}" if len(uid) > 15 else uid for uid in part.index]
    places = range(len(part))
    axes.barh(places, part["held"], color=_GOOD, label="held")
    axes.barh(places, part["bad"], left=part["held"], color=_BAD, label="not held")
    axes.set_yticks(list(places), names, fontsize=8)
    more = f" ({_MOST} of {len(counted)})" if len(counted) > _MOST else ""
    axes.set_title(f"Instances by study{more}")
    axes.legend()


def _draw_reasons(axes: Any, bad: DataFrame) -> None:
    axes.set_title("Not held, by reason")
    if not len(bad):
        _say(axes, "All that was listed is held.")
        return
    counts = bad["reason"].fillna("without a reason").value_counts()[::-1]
    bars = axes.barh([str(reason) for reason in counts.index], counts.to_numpy(dtype=int), color=_BAD)
    axes.bar_label(bars, padding=3)


def _draw_arrival(axes: Any, held: DataFrame) -> None:
    axes.set_title("Received over time (UTC)")
    came = held.dropna(subset=["received_at"]).sort_values("received_at")
    if not len(came):
        _say(axes, "Nothing came: it was there before.")
        return
    axes.plot(
        came["received_at"].dt.tz_localize(None).to_numpy(),
        came["bytes"].fillna(0).astype(float).cumsum().to_numpy() / 1e6,
        color=_PLAIN,
    )
    axes.set_ylabel("MB")
    axes.tick_params(axis="x", labelrotation=30, labelsize=8)


def _draw_modalities(axes: Any, held: DataFrame) -> None:
    axes.set_title("Held, by modality")
    if not len(held):
        _say(axes, "Nothing is held.")
        return
    sizes = (
        held.assign(modality=held["modality"].fillna("unknown"), bytes=held["bytes"].fillna(0).astype(float) / 1e6)
        .groupby("modality")["bytes"]
        .sum()
        .sort_values()
    )
    axes.barh([str(name) for name in sizes.index], sizes.to_numpy(), color=_PLAIN)
    axes.set_xlabel("MB")


def _say(axes: Any, text: str) -> None:
    axes.text(0.5, 0.5, text, ha="center", va="center", transform=axes.transAxes)
    axes.set_axis_off()
