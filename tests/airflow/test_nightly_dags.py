"""The DAG of the night and the one that looks at what came, as a user runs them."""

from __future__ import annotations

import asyncio
import os
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest
from airflow.sdk.exceptions import ParamValidationError
from jinja2 import Template

from airflow_dicom_get.config.groups import Window
from airflow_dicom_get.manifest.frames import frame_of
from airflow_dicom_get.manifest.schema import manifest_table
from airflow_dicom_get.records import Instance
from airflow_dicom_get.testing.s3_servers import BUCKET
from tests.support.mailbox_server import Mailbox, texts

pytestmark = pytest.mark.usefixtures("dag_connections")


@pytest.fixture
def letters(monkeypatch):
    """A mail server, the connection to it, and what it was given."""
    with Mailbox() as server:
        monkeypatch.setenv("AIRFLOW_CONN_SMTP_DEFAULT", server.connection)
        yield server.letters


def events(name: str) -> list[dict]:
    from airflow import settings
    from airflow.models.asset import AssetEvent, AssetModel  # noqa: TID251

    with settings.get_session()() as session:
        found = session.query(AssetEvent).join(AssetModel, AssetModel.id == AssetEvent.asset_id)
        return [event.extra for event in found.filter(AssetModel.name == name).order_by(AssetEvent.id)]


@pytest.fixture
def night(load_dag):
    """The DAG without its deadline: in Airflow 3.3 `dag.test()` breaks off after a success that came in time."""
    dag = load_dag("nightly_to_s3")
    dag.deadline = None
    return dag


def conf(prefix: str, **more) -> dict:
    return {"bucket": f"{BUCKET}/{prefix}", "study_date": "2024-01-15", **more}


def test_a_night_is_one_manifest_and_one_event_and_a_report_of_it(
    run_dag, load_dag, night, moto, prefix, tmp_path, patient
):
    before = len(events("dicom_night"))
    night.task_dict["find"].shard_instances = 20
    run = run_dag(night, run_conf=conf(prefix))
    assert run.state == "success"
    shards = len(run.xcom("find"))
    assert shards > 2
    assert run.xcom("report")["verdicts"] == {"complete": shards}
    assert len([key for key in moto.objects(prefix) if key.endswith(".dcm")]) == 72
    (event,) = events("dicom_night")[before:]
    assert (event["verdict"], event["studies"], event["instances"]) == ("complete", 2, 72)
    assert event["manifest_uri"].startswith(f"s3://dicom_s3_default@{BUCKET}/{prefix}/_nights/")

    for report_format, table_format, read in (("html", "parquet", pd.read_parquet), ("markdown", "csv", pd.read_csv)):
        params = {"folder": str(tmp_path), "report_format": report_format, "table_format": table_format}
        looked = run_dag(load_dag("analyse_manifest"), run_conf=params)
        assert looked.state == "success"
        summary = looked.xcom("analyse")
        assert (summary["studies"], summary["series"], summary["instances"], summary["held"]) == (2, 6, 72, 72)
        table = read(summary["table"])
        assert (len(table), table["held"].sum(), table["missing"].sum()) == (6, 72, 0)
        report = (tmp_path / summary["report"]).read_text("utf-8")
        assert "72 of 72 instances are held" in report
        assert "By modality" in report
        assert "Not held" not in report
        assert not any(word in report + looked.log + run.log for word in patient)


def test_a_night_with_something_missing_is_published_and_fails_and_tells(
    run_dag, load_dag, pacs, prefix, tmp_path, first_uid, letters, patient
):
    pacs.fail = {first_uid}
    night = load_dag("nightly_to_s3")
    night.task_dict["get"].partial_kwargs["retries"] = 0
    run = run_dag(night, run_conf=conf(prefix))
    assert run.state == "failed"
    assert [run.task(name).state for name in ("find", "publish", "report")] == ["success", "success", "failed"]
    assert run.task("report").try_number == 1
    assert events("dicom_night")[-1]["verdict"] == "partial"
    (letter,) = letters
    assert letter["subject"] == "nightly_to_s3: report failed"
    assert "71 of 72 instances of 2 studies are held (1 partial)." in texts(letter)
    assert "1 sub_operation_failed" in texts(letter)
    assert not any(word in texts(letter) for word in patient)

    manifest = run.xcom("publish")["manifest_uri"]
    looked = run_dag(load_dag("analyse_manifest"), run_conf={"folder": str(tmp_path), "manifest": manifest})
    assert looked.state == "success"
    assert looked.xcom("analyse")["missing"] == 1
    report = (tmp_path / looked.xcom("analyse")["report"]).read_text("utf-8")
    assert "Not held, by reason" in report
    assert "sub_operation_failed" in report


def test_a_night_is_not_complete_without_a_shard_that_left_no_manifest(run_dag, night, prefix, lost_task):
    before = len(events("dicom_night"))
    night.task_dict["find"].shard_instances = 20
    for task in ("find", "publish", "report"):
        night.task_dict[task].on_failure_callback = []
    lost_task(night, 1)
    run = run_dag(night, run_conf=conf(prefix))
    assert (run.state, run.task("publish").state) == ("failed", "success")
    (event,) = events("dicom_night")[before:]
    assert event["verdict"] == run.xcom("publish")["verdict"] == "unverified"
    assert 0 < event["instances"] < 72


def test_another_file_than_the_manifest_of_a_night_is_not_read(run_dag, load_dag, tmp_path):
    dag = load_dag("analyse_manifest")
    run = run_dag(dag, run_conf={"manifest": f"s3://other@{BUCKET}/_manifests/of-somebody.parquet"})
    assert run.state == "failed"
    assert (run.task("choose").state, run.task("choose").try_number) == ("failed", 1)
    assert "The manifest is none of the last hundred events of the asset dicom_night." in run.log


def test_an_event_names_no_other_file_than_the_manifest_of_a_night(load_dag, prefix, tmp_path):
    """Such as any user makes who may create events, and Airflow marks, or a DAG that names another place."""
    from airflow.api_fastapi.core_api.datamodels.assets import CreateAssetEventsBody
    from airflow.sdk.exceptions import AirflowFailException

    def event(uri: Any, **more: Any) -> SimpleNamespace:
        return SimpleNamespace(extra={"kind": "dicom-manifest", "schema": 1, "manifest_uri": uri, "rows": 1, **more})

    place = f"s3://dicom_s3_default@{BUCKET}/{prefix}"
    ours = event(f"{place}/_nights/20260101T000000Z-00000000.parquet")
    others = [
        event(uri)
        for uri in (
            "file:///etc/hostname",
            "/etc/hostname",
            ours.extra["manifest_uri"].replace("dicom_s3_default", "other"),
            ours.extra["manifest_uri"].replace("_s3_default@", "_s3_default%40"),
            f"s3://dicom_s3_default@{BUCKET}/{prefix}-private/_nights/x.parquet",
            f"{place}/_nights/../x.parquet",
            f"{place}/_nights/..%2Fx.parquet",
            f"{place}/_manifests/x.parquet",
            ["s3://x"],
            None,
        )
    ]
    others += [SimpleNamespace(extra={}), SimpleNamespace(extra=None)]
    others.append(SimpleNamespace(extra=CreateAssetEventsBody(asset_id=1, extra={**ours.extra, "rows": 2}).extra))
    choose = load_dag("analyse_manifest").task_dict["choose"].python_callable
    night = choose.__globals__["NIGHT"]

    def chosen(mine: list, last: list, manifest: str | None = None) -> list:
        return choose(
            params={"manifest": manifest},
            triggering_asset_events={night: mine} if mine else {},
            inlet_events={night: last},
        )

    assert chosen([*others, ours], []) == chosen([], [ours, *others]) == [ours.extra]
    for one in others:
        for mine, manifest in (([one], None), ([], None), ([], (one.extra or {}).get("manifest_uri"))):
            with pytest.raises(AirflowFailException):
                chosen(mine, [one], manifest)


FORMULA = "=HYPERLINK(|x)"


@pytest.mark.parametrize("report_format", ["markdown", "html"])
def test_a_report_takes_what_a_pacs_sent_for_text_and_counts_an_instance_of_each_series(
    load_dag, tmp_path, report_format
):
    rows = [Instance("1.1", "1.2", "1.9"), Instance("1.1", "1.3", "1.9"), Instance("1.1", "1.3", "1.8")]
    for row in rows:
        row.modality = FORMULA if row.series == "1.2" else "<b>[x](javascript:1)"
        row.state, row.bytes = "stored", 10
    frame = frame_of(manifest_table(rows, source="A@h:1", destination="/d"))
    again = frame_of(manifest_table(rows[:1], source="A@h:1", destination="/d"))
    analyse = load_dag("analyse_manifest").task_dict["analyse"].python_callable
    params = {"folder": str(tmp_path), "report_format": report_format, "table_format": "csv"}
    found = analyse([frame, again], params=params, run_id="run")
    assert (found["instances"], found["series"], found["held"]) == (3, 2, 3)
    table = pd.read_csv(found["table"])
    assert list(table["modality"]) == [f"'{FORMULA}", "<b>[x](javascript:1)"]
    assert list(table["instances"]) == [1, 2]
    report = Path(found["report"]).read_text("utf-8")
    assert "<b>" not in report
    if report_format == "markdown":
        assert "| `'=HYPERLINK(\\|x)` |" in report
        assert "| `&lt;b&gt;[x](javascript:1)` |" in report


def test_a_report_in_markdown_has_no_links(load_dag):
    """As a renderer has it that makes one of any address in a text."""
    markdown_it = pytest.importorskip("markdown_it")
    pytest.importorskip("linkify_it")
    texts = [
        "http://evil.example",
        "www.evil.example",
        "evil.example",
        "a@evil.example",
        "*CT*",
        "`<http://x.y>`",
        "\\|",
    ]
    markdown = load_dag("analyse_manifest").task_dict["analyse"].python_callable.__globals__["markdown"]
    written = markdown(pd.DataFrame({"n": [1.5] * 8}, index=pd.Index([*texts, "not_sent"], name="reason")))
    assert "| not_sent | 1.5 |" in written
    html = markdown_it.MarkdownIt("gfm-like").render(written)
    assert html.count("<td>") == 16
    assert not [tag for tag in ("<a ", "<em>", "<http") if tag in html]


@pytest.mark.parametrize("linked", ["the files", "the folder of the run"])
def test_a_report_goes_nowhere_behind_a_link(load_dag, tmp_path, linked):
    """Whoever triggers a run chooses its name, and a neighbour may know it."""
    from airflow.sdk.exceptions import AirflowFailException

    reports, elsewhere = tmp_path / "reports", tmp_path / "elsewhere"
    reports.mkdir()
    elsewhere.mkdir()
    for name in ("series.csv", "report.md"):
        (elsewhere / name).write_text("the worker's own")
    if linked == "the files":
        (reports / "chosen").mkdir()
        for name in ("series.csv", "report.md"):
            (reports / "chosen" / name).symlink_to(elsewhere / name)
    else:
        (reports / "chosen").symlink_to(elsewhere)
    row = Instance("1.1", "1.2", "1.9")
    row.state, row.bytes = "stored", 10
    frame = frame_of(manifest_table([row], source="A@h:1", destination="/d"))
    analyse = load_dag("analyse_manifest").task_dict["analyse"].python_callable
    params = {"folder": str(reports), "report_format": "markdown", "table_format": "csv"}
    if linked == "the files":
        found = analyse([frame], params=params, run_id="chosen")
        assert len(pd.read_csv(found["table"])) == 1
        assert "1 of 1" in Path(found["report"]).read_text("utf-8")
        assert len(list((reports / "chosen").iterdir())) == 2
    else:
        with pytest.raises(AirflowFailException, match="is a link"):
            analyse([frame], params=params, run_id="chosen")
    assert {path.read_text() for path in elsewhere.iterdir()} == {"the worker's own"}
    assert len(list(elsewhere.iterdir())) == 2


def test_outside_of_the_hours_of_the_pacs_the_night_waits(run_dag, night, pacs, prefix, monkeypatch):
    spans: list[tuple[datetime, datetime]] = []

    def soon(self, moment, zone):
        # Hours that begin a second after somebody first asks for them.
        if not spans:
            spans.append((moment + timedelta(seconds=1), moment + timedelta(hours=1)))
        return spans

    monkeypatch.setattr(Window, "_around", soon)
    monkeypatch.setenv("AIRFLOW_CONN_DICOM_DEFAULT", f"dicom://PACS@127.0.0.1:{pacs.port}/?window=22%3A00-06%3A00")
    run = run_dag(night, run_conf=conf(prefix))
    assert run.state == "success"
    assert "The window of the node has closed; the task is deferred until" in run.log
    assert run.xcom("report")["verdicts"] == {"complete": 1}


def test_a_day_without_studies_has_no_event(run_dag, night, prefix):
    before = events("dicom_night")
    run = run_dag(night, run_conf={"bucket": f"{BUCKET}/{prefix}"})
    # The day before the run, written as DICOM has it.
    assert run.rendered("find")["study_date"] == (datetime.now(UTC) - timedelta(days=1)).strftime("%Y%m%d")
    assert run.state == "success"
    assert [run.task(name).state for name in ("get", "publish", "report")] == ["skipped"] * 3
    assert events("dicom_night") == before


def test_modalities_are_asked_for(run_dag, night, prefix):
    run = run_dag(night, run_conf=conf(prefix, modalities=["MR", "PT"]))
    assert run.state == "success"
    assert run.xcom("find") == []
    with pytest.raises(ParamValidationError, match="is too long"):
        night.params.get_param("modalities").resolve([f"X{number}" for number in range(65)])


def test_the_id_of_a_run_is_text_in_a_mail(night, load_dag):
    """Whoever triggers a run chooses it, where the administrator lets them."""
    said = {"run_id": "<b>&'", "dag_run_id": "<b>&'", "state": "running"}
    (deadline,) = load_dag("nightly_to_s3").deadline
    for html in (night.task_dict["find"].on_failure_callback[0].html_content, deadline.callback.kwargs["html_content"]):
        letter = Template(html).render(dag_run=said, ti={"log_url": "https://a/<b>'x='"}, exception="<b>")
        assert "<b>" not in letter
        assert "&lt;b&gt;&amp;&#39;" in letter


def test_a_night_that_is_late_tells(load_dag, letters, monkeypatch):
    """What the scheduler does as a run is queued and as its deadline is missed, and then the triggerer."""
    from airflow import settings
    from airflow.dag_processing.bundles.manager import DagBundlesManager
    from airflow.dag_processing.dagbag import DagBag, sync_bag_to_db
    from airflow.models.deadline import Deadline  # noqa: TID251
    from airflow.models.serialized_dag import SerializedDagModel  # noqa: TID251
    from airflow.triggers.callback import CallbackTrigger
    from airflow.utils.state import DagRunState
    from airflow.utils.types import DagRunTriggeredByType, DagRunType

    # Other tests may have stored it a moment ago, without its deadline.
    monkeypatch.setenv("AIRFLOW__CORE__MIN_SERIALIZED_DAG_UPDATE_INTERVAL", "0")
    DagBundlesManager().sync_bundles_to_db()
    bag = DagBag(dag_folder=os.devnull, bundle_name="dags-folder")
    bag.bag_dag(load_dag("nightly_to_s3"))
    sync_bag_to_db(bag, "dags-folder", None)
    with settings.get_session()() as session:
        dag = SerializedDagModel.get_dag("nightly_to_s3", session=session)
        assert dag is not None
        run = dag.create_dagrun(
            run_id="scheduled__late",
            run_after=datetime.now(UTC),
            run_type=DagRunType.SCHEDULED,
            triggered_by=DagRunTriggeredByType.TEST,
            state=DagRunState.QUEUED,
            session=session,
        )
        session.flush()
        (deadline,) = session.query(Deadline).filter(Deadline.dagrun_id == run.id)
        assert deadline.deadline_time - run.queued_at == timedelta(hours=5)
        deadline.handle_miss(session)
        trigger = CallbackTrigger(**deadline.callback.trigger.kwargs)
        session.rollback()

    async def ended():
        return [event.payload async for event in trigger.run()]

    assert asyncio.run(ended())[-1]["state"] == "success"
    (letter,) = letters
    assert letter["subject"] == "nightly_to_s3: not over by the morning"
    assert "scheduled__late is queued" in texts(letter)
