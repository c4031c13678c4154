"""After every night of `nightly_to_s3`: what was retrieved, as a report for people and a table for programs.

Runs when the asset `dicom_night` has an event, and needs neither PACS nor pixels: all is in the manifest. If several
nights came while it was paused, one run handles all of them. Triggered manually, it takes the newest night, or the
manifest that is given.

What it reads:

* the events of the asset `dicom_night`, as `nightly_to_s3` makes them: others are left out, such as those that somebody
  creates by Airflow's pages or its REST API
* environment variable `DICOM_BUCKET`: the places of the nights, as `nightly_to_s3` has them; no other file is read
* connection `dicom_s3_default`: the bucket's service, as type DICOM storage (S3), or a stock Amazon Web Services one
* param `manifest`: the address of a manifest of an earlier event, instead of that of the last one
* param `folder`: where the report goes, one of the folders in the environment variable `DICOM_REPORTS`, absolute paths
  with commas between them; by default the folder `dicom-reports` in Airflow's home. All workers, and everyone who reads
  the report, need access to that folder.
* params `report_format` and `table_format`

Report, table and XCom contain no patient data: columns that `tags` added to a manifest are left out.
"""

from __future__ import annotations

import errno
import os
import re
from datetime import timedelta
from html import escape
from urllib.parse import quote, unquote

from airflow.sdk import DAG, Asset, Param, task
from airflow.sdk.exceptions import AirflowFailException

from airflow_dicom_get.tasks import final_errors

NIGHT = Asset("dicom_night")
# The same as in nightly_to_s3, and the folder in which it puts the manifests of nights.
PLACES = (os.environ.get("DICOM_BUCKET") or "dicom/studies").split(",")
NIGHTS = [f"s3://dicom_s3_default@{quote(unquote(place))}/_nights" for place in PLACES]
# Whoever triggers a run chooses one of these, and can name no other.
FOLDERS = os.environ.get("DICOM_REPORTS", "").split(",")
if not FOLDERS[0]:
    FOLDERS = [os.path.expanduser(os.path.join(os.environ.get("AIRFLOW_HOME") or "~/airflow", "dicom-reports"))]


def announced_by(event) -> dict | None:
    """The reference to the manifest of a night; None if an event is of something else.

    An address is read with the rights and the connections of the worker, so it may not be that of any file. Airflow
    marks what was created by its pages and its REST API.
    """
    extra = event.extra or {}
    folder, _, name = str(extra.get("manifest_uri")).rpartition("/")
    ours = folder in NIGHTS and re.fullmatch(r"[A-Za-z0-9_-]+\.parquet", name)
    return extra if ours and not extra.get("from_rest_api") else None


with DAG(
    dag_id="analyse_manifest",
    schedule=[NIGHT],
    catchup=False,
    tags=["dicom"],
    doc_md=__doc__,
    params={
        "manifest": Param(
            None,
            type=["null", "string"],
            title="Manifest",
            description="Blank for the newest night; else the address of one of the last hundred.",
        ),
        "folder": Param(
            FOLDERS[0],
            type="string",
            enum=FOLDERS,
            title="Folder",
            description="Below it each run writes its files.",
        ),
        "report_format": Param(
            "html",
            type="string",
            enum=["html", "markdown"],
            values_display={"html": "A page (HTML)", "markdown": "Markdown"},
            title="Report",
        ),
        "table_format": Param(
            "parquet",
            type="string",
            enum=["parquet", "csv"],
            values_display={"parquet": "Parquet", "csv": "CSV"},
            title="Table",
            description="One row a series.",
        ),
    },
    default_args={"retries": 3, "retry_delay": timedelta(minutes=5)},
) as dag:
    # What to report on: references to manifests, or an address. Small enough for XCom.
    @task(inlets=[NIGHT])
    def choose(params=None, triggering_asset_events=None, inlet_events=None) -> list:
        wanted, own = params["manifest"], list(triggering_asset_events.get(NIGHT, ()))
        # A manual run has no event of its own.
        events = inlet_events[NIGHT][-100:] if wanted or not own else own
        nights = [night for event in events if (night := announced_by(event))]
        print(f"Events: {len(events)}. Of nights in {', '.join(NIGHTS)}: {len(nights)}.")
        if wanted:
            nights = [night for night in nights if night["manifest_uri"] == wanted]
            if not nights:
                raise AirflowFailException("The manifest is none of the last hundred events of the asset dicom_night.")
        if not nights:
            raise AirflowFailException("No event of the asset dicom_night is of a night. Run nightly_to_s3 first.")
        return nights if events is own else nights[-1:]

    # One row for each series, with only those columns of the manifest that every retrieval writes.
    @task(multiple_outputs=False)
    def analyse(manifests: list, params=None, run_id=None) -> dict:
        from pathlib import Path

        from airflow_dicom_get import clock, load_manifests
        from airflow_dicom_get.manifest.files import safe_cell, safe_name
        from airflow_dicom_get.storage.files import Below, replace_whole

        with final_errors():
            frame = load_manifests(manifests)
        # Of several nights, the latest row of each instance.
        frame = frame.drop_duplicates(["study_instance_uid", "series_instance_uid", "sop_instance_uid"], keep="last")
        frame["held"] = frame["state"].isin(["stored", "held", "forwarded"])
        frame["missing"] = frame["state"].isin(["failed", "missing", "conflict"])
        table = frame.groupby(["study_instance_uid", "series_instance_uid"], as_index=False).agg(
            modality=("modality", "first"),
            instances=("sop_instance_uid", "size"),
            held=("held", "sum"),
            missing=("missing", "sum"),
            bytes=("bytes", "sum"),
            syntaxes=("transfer_syntax_uid", lambda uids: " ".join(sorted(uids.dropna().unique()))),
            received_at=("received_at", "max"),
        )
        by_modality = table.groupby(table["modality"].fillna("unknown")).agg(
            studies=("study_instance_uid", "nunique"),
            series=("series_instance_uid", "nunique"),
            instances=("instances", "sum"),
            missing=("missing", "sum"),
            megabytes=("bytes", lambda sizes: round(float(sizes.sum()) / 1e6, 1)),
        )
        reasons = frame.loc[frame["missing"], "reason"].value_counts().rename("instances").to_frame()
        summary = {
            "manifests": len(manifests),
            "studies": int(table["study_instance_uid"].nunique()),
            "series": len(table),
            "instances": len(frame),
            "held": int(frame["held"].sum()),
            "missing": int(frame["missing"].sum()),
            "bytes": int(frame["bytes"].sum()),
        }

        if params["table_format"] == "parquet":
            content = table.to_parquet(index=False)
        else:
            # A spreadsheet would take some texts of a PACS for formulas.
            content = table.map(safe_cell).to_csv(index=False).encode()
        html = params["report_format"] == "html"
        report = page(summary, by_modality, reasons, html=html)

        # A run that is cleared replaces its own files; another one only where their IDs differ in `:` or `+` alone.
        # Below the folder no link is followed: where others may write, it would lead to any file of the worker's.
        folder = Below(Path(params["folder"])) / safe_name(run_id)
        table_file = folder / f"series.{params['table_format']}"
        report_file = folder / ("report.html" if html else "report.md")
        try:
            for file, data in ((table_file, content), (report_file, report.encode())):
                replace_whole(
                    file, lambda out, data=data: out.write(data), temporary=f".{file.name}.{clock.token()}.part"
                )
        except OSError as error:
            # The disk may be full, and have space at the next try.
            if error.errno not in (errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EEXIST, errno.ELOOP):
                raise
            raise AirflowFailException(
                f"{folder} cannot be written: {error.strerror}. Give another folder in the params, or let the user "
                "that the workers run as write to it."
            ) from None
        print(f"Report: {report_file}")
        return {**summary, "report": str(report_file), "table": str(table_file)}

    analyse(choose())


def page(summary: dict, by_modality, reasons, *, html: bool) -> str:
    """The report, as HTML or as Markdown. pandas escapes the values of a table in HTML."""
    first = f"{summary['held']} of {summary['instances']} instances are held, {summary['bytes'] / 1e6:.1f} MB"
    parts = [("By modality", by_modality), ("Not held, by reason", reasons)]
    if html:
        tables = "".join(f"<h2>{title}</h2>{frame.to_html(border=0)}" for title, frame in parts if len(frame))
        return f"<!doctype html><meta charset='utf-8'><title>{first}</title><h1>{first}</h1>{tables}"
    tables = "".join(f"\n## {title}\n\n{markdown(frame)}" for title, frame in parts if len(frame))
    return f"# {first}\n{tables}"


def markdown(frame) -> str:
    """A table in Markdown; pandas needs an additional package for that."""
    from airflow_dicom_get.manifest.files import safe_cell

    def cell(value) -> str:
        text = " ".join(str(safe_cell(value)).split())
        if not isinstance(value, str) or re.fullmatch(r"[A-Za-z0-9]+([ _-][A-Za-z0-9]+)*|", text):
            return text
        # What a PACS sent stays text: no formula, no HTML, no other cell or row, and, as code, no link. Many renderers
        # make one of whatever looks like an address, also where its marks are escaped.
        text = re.sub(r"[`\\]", "?", escape(text, quote=False)).replace("|", r"\|")
        return f"`{text}`"

    frame = frame.reset_index()
    rows = [list(frame.columns), ["---"] * len(frame.columns), *(map(cell, row) for row in frame.to_numpy().tolist())]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)
