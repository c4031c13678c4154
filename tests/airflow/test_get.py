"""DicomGetOperator in DAG runs against the embedded PACS."""

from __future__ import annotations

import hashlib
import itertools
import os
import signal
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from airflow.sdk import DAG, task

from airflow_dicom_get import GetScu, load_manifest
from airflow_dicom_get.config.groups import Window
from airflow_dicom_get.engine.items import make_item
from airflow_dicom_get.operators.dicom import DicomFindOperator, DicomGetOperator
from airflow_dicom_get.testing.sample_data import STUDY_DATE

AT_ONCE = {"retries": 2, "retry_delay": timedelta(0)}


def get(**options) -> DicomGetOperator:
    return DicomGetOperator(**{"task_id": "get", "dicom_conn_id": "pacs", **options})


def held_files(folder: Path) -> list[Path]:
    return sorted(folder.glob("[0-9]*/*/*.dcm"))


# --- the whole of it -------------------------------------------------------------------------------


def test_a_day_is_found_and_each_study_retrieved_by_a_mapped_task(
    run_dag, pacs, archive, tmp_path, database_rows, patient
):
    with DAG("day") as dag:
        find = DicomFindOperator(task_id="find", study_date=STUDY_DATE, dicom_conn_id="pacs")
        retrieve = DicomGetOperator.partial(task_id="get", destination=str(tmp_path), dicom_conn_id="pacs")
        retrieve.expand(study=find.output)
    run = run_dag(dag, logical_date=None)
    assert run.state == "success"

    items = run.xcom("find")
    assert [item["study_instance_uid"] for item in items] == sorted([archive.many, archive.private])
    assert [(item["expected_instances"], item["modalities"], item["keys"]) for item in items] == [
        (60, ["CT"], {}),
        (12, ["CT", "OT", "SR"], {}),
    ]
    assert run.xcom("find", "summary") == {
        "schema": 1, "matched": 2, "returned": 2, "queries": 1, "truncated": False, "instances": 72,
    }  # fmt: skip

    for index, item in enumerate(items):
        uid, number = item["study_instance_uid"], item["expected_instances"]
        summary = run.xcom("get", "summary", index)
        assert (summary["verdict"], summary["expected"], summary["completed"]) == ("complete", number, number)
        assert (summary["studies"], summary["evidence"], summary["try_number"]) == (1, "list+counts", 1)
        assert (summary["manifest_kind"], summary["manifest_rows"]) == ("inline", number)
        expected_name = f"day/{run.run_id.translate(str.maketrans('+:', '__'))}/get/{index}-1.parquet"
        path = tmp_path / "_manifests" / expected_name
        assert summary["manifest_uri"] == path.as_uri()
        assert hashlib.sha256(path.read_bytes()).hexdigest() == summary["manifest_sha256"]

        frame = run.xcom("get", map_index=index)
        assert isinstance(frame, pd.DataFrame)
        pd.testing.assert_frame_equal(frame, load_manifest(summary["manifest_uri"]))
        assert set(frame["state"]) == {"stored"}
        for row in frame.itertuples():
            content = Path(row.uri.removeprefix("file://")).read_bytes()
            assert (len(content), hashlib.sha256(content).hexdigest()) == (row.bytes, row.sha256)
        assert run.task("get", index).rendered_map_index.startswith(uid)
        assert run.stored("get", "progress", index)["done"] == number
    assert len(held_files(tmp_path)) == 72
    assert set(pacs.sent.values()) == {1}
    assert pacs.peak_associations == 1

    database = database_rows(run)
    for word in patient:
        assert word not in run.log
        assert word not in database
        assert word.encode().hex() not in database.lower()


def test_the_end_waits_for_the_progress_that_is_being_written(run_dag, pacs, archive, tmp_path, monkeypatch):
    """`DAG.test` answers one request at a time, and knows of no other until it is answered."""
    from airflow.sdk.execution_time import supervisor
    from airflow.sdk.execution_time.comms import SetTaskStateStore

    handle = supervisor.InProcessTestSupervisor._handle_request

    def slowly(self, message, *more):
        if isinstance(message, SetTaskStateStore):
            time.sleep(1)
        handle(self, message, *more)

    monkeypatch.setattr(supervisor.InProcessTestSupervisor, "_handle_request", slowly)
    monkeypatch.setattr("airflow_dicom_get.operators._progress.PATIENCE_SECONDS", 0.1)
    with DAG("slow_progress") as dag:
        get(study=archive.private, destination=str(tmp_path))
    run = run_dag(dag)
    assert run.state == "success"
    assert run.stored("get", "progress")["phase"] == "done"


def test_what_a_task_says_of_retries_and_pools(run_dag, pacs, archive, tmp_path):
    with DAG("advice") as dag:
        get(study=archive.private, destination=str(tmp_path))
    log = run_dag(dag).log
    assert log.count("retries is 0") == 1
    assert log.count("runs in default_pool") == 1


def test_a_run_speaks_of_its_pools_once(run_dag, pacs, archive, tmp_path):
    with DAG("pools", default_args=AT_ONCE) as dag:
        many = DicomGetOperator.partial(task_id="many", destination=str(tmp_path / "a"), dicom_conn_id="pacs").expand(
            study=[archive.private, archive.many]
        )
        few = get(task_id="few", study=archive.private, destination=str(tmp_path / "b"), pool="pacs", associations=2)
        limited = get(
            task_id="a_limited_one", study=archive.private, destination=str(tmp_path / "c"), max_active_tis_per_dag=9
        )
        many >> few >> limited
    log = run_dag(dag).log
    assert (log.count("runs in default_pool"), log.count("pool_slots=1")) == (0, 1)
    dag.task_dict["few"].pool = "default_pool"
    log = run_dag(dag).log
    assert (log.count("runs in default_pool"), log.count("pool_slots=1")) == (1, 0)


@pytest.mark.parametrize(("at_once", "associations", "said"), [(2, 1, 0), (1, 2, 0), (2, 2, 1), (3, 1, 1)])
def test_a_task_that_its_dag_limits_to_what_the_pacs_allows_needs_no_pool(
    run_dag, pacs, archive, tmp_path, at_once, associations, said
):
    with DAG("limited") as dag:
        get(
            study=archive.private, destination=str(tmp_path), max_active_tis_per_dag=at_once, associations=associations,
        )  # fmt: skip
    assert run_dag(dag).log.count("runs in default_pool") == said


def test_the_options_of_the_engine_reach_it(run_dag, pacs, archive, tmp_path, monkeypatch):
    monkeypatch.setenv("AIRFLOW_CONN_PACS", os.environ["AIRFLOW_CONN_PACS"] + "?acse_timeout=7&idle_timeout=8")
    seen = {}
    from airflow_dicom_get.getscu import GetScu

    begin = GetScu._begin

    def look(self, options):
        seen["options"] = options
        begin(self, options)

    monkeypatch.setattr(GetScu, "_begin", look)
    transcript = tmp_path / "said.jsonl"
    options = {
        "checksum": None, "durable": False, "retries": 1, "sop_classes": ["CTImageStorage"], "deadlines": {"idle": 9},
        "transcript": str(transcript),
    }  # fmt: skip
    with DAG("engine") as dag:
        get(study=archive.private, destination=str(tmp_path / "data"), engine_options=options)
    run = run_dag(dag)
    assert run.state == "success"
    found = seen["options"]
    assert (found.checksum, found.durable, found.retries) == (None, False, 1)
    # Of the deadlines those that the task does not set stay the connection's.
    assert (found.deadlines.idle, found.deadlines.acse) == (9, 7)
    frame = run.xcom("get")
    assert (len(frame), frame["sha256"].isna().all()) == (10, True)
    assert '"C-GET' in transcript.read_text()


def test_a_connection_that_is_back_at_the_next_try_is_used(run_dag, pacs, archive, tmp_path, monkeypatch):
    address = os.environ["AIRFLOW_CONN_PACS"]
    monkeypatch.delenv("AIRFLOW_CONN_PACS")

    def back(context):
        monkeypatch.setenv("AIRFLOW_CONN_PACS", address)

    with DAG("blink") as dag:
        get(study=archive.private, destination=str(tmp_path), on_retry_callback=back, **AT_ONCE)
    run = run_dag(dag)
    assert run.state == "success"
    assert run.task("get").try_number == 2
    assert "`pacs` isn't defined" in run.log


# --- what can be asked for -------------------------------------------------------------------------


def test_a_list_of_items_is_one_task_with_one_manifest(run_dag, pacs, archive, tmp_path):
    with DAG("listed") as dag:
        series = DicomFindOperator(
            task_id="find", query={"StudyInstanceUID": archive.many}, level="SERIES", dicom_conn_id="pacs"
        )

        @task
        def choose(items):
            return [make_item(archive.private), make_item(archive.many, series=items[0]["series_instance_uids"][:2])]

        get(study=choose(series.output), destination=str(tmp_path))
    run = run_dag(dag)
    assert run.state == "success"
    summary = run.xcom("get", "summary")
    assert (summary["studies"], summary["series"], summary["completed"]) == (2, 5, 52)
    assert len(run.xcom("get")) == 52
    manifests = list((tmp_path / "_manifests").rglob("*.parquet"))
    assert [path.name for path in manifests] == ["-1-1.parquet"]
    assert summary["manifest_uri"] == manifests[0].as_uri()
    assert len(held_files(tmp_path)) == 52


def test_a_query_finds_its_studies_and_its_identifying_keys_are_nowhere_shown(
    run_dag, pacs, archive, tmp_path, patient
):
    with DAG("query", params={"patient": "unset"}) as dag:
        get(query={"PatientID": "{{ params.patient }}", "StudyDate": STUDY_DATE}, destination=str(tmp_path))
    run = run_dag(dag, run_conf={"patient": patient[1]})
    assert run.state == "success"
    assert run.xcom("get", "summary")["studies"] == 2
    assert run.rendered("get")["query"] == {"PatientID": "***", "StudyDate": STUDY_DATE}
    assert not any(word in run.log for word in patient)


def test_an_item_that_a_template_renders_as_text_is_nowhere_shown(run_dag, pacs, archive, tmp_path, patient):
    with DAG("text", default_args=AT_ONCE) as dag:
        find = DicomFindOperator(
            task_id="find",
            query={"StudyInstanceUID": archive.many},
            return_keys=("PatientName", "PatientID"),
            dicom_conn_id="pacs",
        )
        for task_id, study in {"get": "", "sorted": " | tojson"}.items():
            study = f"{{{{ ti.xcom_pull('find')[0]{study} }}}}"
            find >> get(task_id=task_id, study=study, destination=str(tmp_path))
    run = run_dag(dag)
    for task_id in ("get", "sorted"):
        assert (run.task(task_id).state, run.rendered(task_id)["study"]) == ("failed", "***")
        assert not any(word in str(run.task(task_id).rendered_map_index) for word in patient)
    assert "render_template_as_native_obj" in run.log
    assert not any(word in run.log for word in patient)


def test_a_manifest_is_completed_and_shown_by_its_size(run_dag, pacs, archive, tmp_path, first_uid):
    pacs.fail = {first_uid}
    with DAG("again") as dag:
        first = get(study=archive.many, destination=str(tmp_path), accept=("complete", "partial"), **AT_ONCE)

        @task
        def mend():
            pacs.fail = set()

        second = get(task_id="second", manifest=first.output, destination=str(tmp_path))
        first >> mend() >> second
    run = run_dag(dag)
    assert run.state == "success"
    summary, frame = run.xcom("get", "summary"), run.xcom("get")
    assert (summary["verdict"], summary["completed"], summary["failed"]) == ("partial", 59, 1)
    assert frame.loc[frame["sop_instance_uid"] == first_uid, ["state", "reason"]].values.tolist() == [
        ["missing", "sub_operation_failed"]
    ]
    assert run.rendered("second")["manifest"] == "manifest of 60 rows"
    summary = run.xcom("second", "summary")
    assert (summary["verdict"], summary["completed"], summary["skipped"]) == ("complete", 60, 59)
    assert pacs.sent[first_uid] == 1
    assert len(held_files(tmp_path)) == 60


def test_manifests_are_mapped_over_into_another_folder(run_dag, pacs, archive, tmp_path):
    with DAG("chain") as dag:
        first = DicomGetOperator.partial(task_id="get", destination=str(tmp_path / "a"), dicom_conn_id="pacs").expand(
            study=[archive.many, archive.private]
        )
        DicomGetOperator.partial(task_id="copy", destination=str(tmp_path / "b"), dicom_conn_id="pacs").expand(
            manifest=first.output
        )
        get(task_id="all", manifest=first.output, destination=str(tmp_path / "b"))
    run = run_dag(dag)
    assert run.state == "success"
    assert [run.rendered("copy", index)["manifest"] for index in range(2)] == [
        "manifest of 60 rows",
        "manifest of 12 rows",
    ]
    assert [run.xcom("copy", "summary", index)["completed"] for index in range(2)] == [60, 12]
    assert run.rendered("all")["manifest"] == ["manifest of 60 rows", "manifest of 12 rows"]
    assert run.xcom("all", "summary")["completed"] == 72
    assert len(held_files(tmp_path / "a")) == len(held_files(tmp_path / "b")) == 72


# --- the outcome -----------------------------------------------------------------------------------


def test_another_try_fetches_only_what_is_missing(run_dag, pacs, archive, tmp_path, first_uid):
    left = {}

    def between_tries(context):
        ti = context["ti"]
        left["summary"] = ti.xcom_pull(task_ids="get", key="summary")
        left["frame"] = ti.xcom_pull(task_ids="get")
        left["file"] = load_manifest(left["summary"]["manifest_uri"])
        pacs.fail = set()

    pacs.fail = {first_uid}
    with DAG("resumed") as dag:
        get(study=archive.many, destination=str(tmp_path), on_retry_callback=between_tries, **AT_ONCE)
    run = run_dag(dag)
    assert run.state == "success"
    assert run.task("get").try_number == 2
    assert "IncompleteRetrieval" in run.log
    # The first try had left all it knew before it raised.
    assert (left["summary"]["verdict"], left["summary"]["failed"]) == ("partial", 1)
    assert left["summary"]["errors"][0]["count"] == 1
    assert len(left["frame"]) == len(left["file"]) == 60
    summary = run.xcom("get", "summary")
    assert (summary["verdict"], summary["skipped"], summary["try_number"]) == ("complete", 59, 2)
    assert set(pacs.sent.values()) == {1}
    assert sorted(path.name for path in (tmp_path / "_manifests").rglob("*.parquet")) == [
        "-1-1.parquet",
        "-1-2.parquet",
    ]


def test_a_pacs_that_is_down_is_tried_again_and_one_without_the_study_is_not(
    run_dag, pacs, archive, tmp_path, monkeypatch
):
    monkeypatch.setenv("AIRFLOW_CONN_PACS", os.environ["AIRFLOW_CONN_PACS"] + "/?operation_timeout=3")
    pacs.stop()
    tries = []

    def up_again(context):
        tries.append(context["ti"].xcom_pull(task_ids="get", key="summary"))
        pacs.start()

    with DAG("down", default_args=AT_ONCE) as dag:
        get(study=archive.private, destination=str(tmp_path), on_retry_callback=up_again) >> get(
            task_id="unknown", study="1.2.3.4", destination=str(tmp_path)
        )
    run = run_dag(dag)
    assert run.state == "failed"
    assert (run.task("get").state, run.task("get").try_number) == ("success", 2)
    assert [summary["verdict"] for summary in tries] == ["failed"]
    assert (run.task("unknown").state, run.task("unknown").try_number) == ("failed", 1)
    assert run.xcom("unknown", "summary")["verdict"] == "empty"
    assert len(run.xcom("unknown")) == 0


BAD: dict[str, dict[str, Any]] = {
    "nothing": {"study": None},
    "both": {"query": {"StudyDate": STUDY_DATE}},
    "blank_study": {"study": "{{ '' }}"},
    "bad_study": {"study": "1.2.x"},
    "bad_in_list": {"study": ["1.2.3", "x"]},
    "wildcard": {"study": None, "query": {"PatientID": "DEMO*"}},
    "no_key": {"study": None, "query": {"PatientName": ""}},
    "no_query": {"study": None, "query": {}},
    "no_manifest": {"study": None, "manifest": "/nowhere/m.parquet"},
    "relative": {"destination": "data"},
    "home": {"destination": "~/data"},
    "blank_destination": {"destination": "{{ '' }}"},
    "bucket": {"destination": "s3://bucket/x"},
    "relative_root": {"manifest_root": "x"},
    "associations": {"associations": 9},
    "contradiction": {"engine_options": {"ack": "durable", "durable": False}},
    "no_connection": {"dicom_conn_id": "nowhere"},
}


def test_bad_input_fails_at_once_and_before_any_traffic(run_dag, pacs, archive, tmp_path):
    with DAG("bad", default_args=AT_ONCE) as dag:
        for name, options in BAD.items():
            get(**{"task_id": name, "study": archive.private, "destination": str(tmp_path), **options})
    run = run_dag(dag)
    # A connection may only seem to be missing: its secrets backend may be away for a moment.
    assert {name: (run.task(name).state, run.task(name).try_number) for name in BAD} == {
        name: ("failed", 3 if name in ("no_connection",) else 1) for name in BAD
    }
    assert pacs.total_associations == 0
    assert list(tmp_path.iterdir()) == []
    for word in (
        "study, query, manifest:",
        "rendered to nothing",
        "associations:",
        "nowhere",
        "names no connection",
    ):
        assert word in run.log


def test_a_get_that_is_mapped_over_fails_before_its_work(run_dag, pacs, archive, tmp_path):
    with DAG("unmapped", default_args=AT_ONCE) as dag:
        first = get(study=archive.private, destination=str(tmp_path))
        DicomGetOperator.partial(task_id="then", destination=str(tmp_path), dicom_conn_id="pacs").expand(
            manifest=first.output
        )
    run = run_dag(dag)
    assert (run.task("get").state, run.task("get").try_number) == ("failed", 1)
    assert "DicomGetOperator.partial" in run.log
    assert pacs.total_associations == 0


def test_a_pool_can_be_required(run_dag, pacs, archive, tmp_path, monkeypatch):
    monkeypatch.setenv("AIRFLOW__DICOM_GET__REQUIRE_POOL", "True")
    with DAG("pooled") as dag:
        get(study=archive.private, destination=str(tmp_path))
    run = run_dag(dag)
    assert run.task("get").state == "failed"
    assert "require_pool" in run.log
    assert pacs.total_associations == 0


# --- the manifest in XCom --------------------------------------------------------------------------


def test_a_large_manifest_is_returned_as_a_reference(run_dag, pacs, archive, tmp_path, monkeypatch):
    monkeypatch.setenv("AIRFLOW__DICOM_GET__MANIFEST_XCOM_MAX_BYTES", "10000")
    with DAG("referenced") as dag:
        first = get(study=archive.private, destination=str(tmp_path))
        asked = get(task_id="asked", study=archive.private, destination=str(tmp_path), manifest_xcom="reference")

        @task
        def rows(*manifests):
            return [len(load_manifest(manifest)) for manifest in manifests]

        first >> asked
        rows(first.output, asked.output)
    run = run_dag(dag)
    assert run.state == "success"
    for name in ("get", "asked"):
        value, summary = run.xcom(name), run.xcom(name, "summary")
        assert set(value) == {"kind", "schema", "manifest_uri", "rows", "bytes", "sha256", "verdict"}
        assert (value["kind"], value["rows"], value["verdict"]) == ("dicom-manifest", 12, "complete")
        assert summary["manifest_kind"] == "reference"
        assert (summary["manifest_uri"], summary["manifest_sha256"]) == (value["manifest_uri"], value["sha256"])
    assert run.xcom("rows") == [12, 12]
    # Once, of the one that would have been a DataFrame, and after all else that its task says.
    said = [line for line in run.log.splitlines() if "DicomGetOperator]" in line]
    last = next(number for number, line in enumerate(said) if "12 of 12 instances" in line) + 1
    assert "12 rows takes" in said[last]
    remark = "a reference to its file is returned, not a DataFrame. load_manifest() takes either."
    assert [number for number, line in enumerate(said) if remark in line] == [last]


def test_a_full_manifest_over_the_limit_is_said_to_be_and_not_tried_again(
    run_dag, pacs, archive, tmp_path, monkeypatch
):
    monkeypatch.setenv("AIRFLOW__DICOM_GET__MANIFEST_XCOM_MAX_BYTES", "10000")
    with DAG("full", default_args=AT_ONCE) as dag:
        get(study=archive.private, destination=str(tmp_path), manifest_xcom="full")
    run = run_dag(dag)
    assert (run.task("get").state, run.task("get").try_number) == ("failed", 1)
    assert "manifest_xcom_max_bytes is 10000" in run.log
    assert run.xcom("get", "summary")["verdict"] == "complete"
    assert run.xcom("get")["kind"] == "dicom-manifest"


# --- a long task -----------------------------------------------------------------------------------


def test_sigterm_ends_the_task_soon_and_the_next_try_resumes(run_dag, pacs, archive, tmp_path):
    times: dict[str, Any] = {}

    def kill(uid):
        time.sleep(0.02)
        if sum(pacs.sent.values()) == 20 and "killed" not in times:
            times["killed"] = time.monotonic()
            os.kill(os.getpid(), signal.SIGTERM)

    def between_tries(context):
        times["ended"] = time.monotonic()
        times["summary"] = context["ti"].xcom_pull(task_ids="get", key="summary")

    pacs.before_send = kill
    before = signal.getsignal(signal.SIGTERM)
    try:
        with DAG("killed") as dag:
            get(study=archive.many, destination=str(tmp_path), on_retry_callback=between_tries, **AT_ONCE)
        run = run_dag(dag)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert run.state == "success"
    assert times["ended"] - times["killed"] < 2
    assert times["summary"]["verdict"] == "cancelled"
    assert 15 <= times["summary"]["completed"] < 60
    assert run.xcom("get", "summary")["skipped"] >= times["summary"]["completed"]
    assert sum(pacs.sent.values()) <= 61
    assert len(held_files(tmp_path)) == 60


def test_the_execution_timeout_leaves_a_verdict_and_a_manifest(run_dag, pacs, archive, tmp_path):
    first = {}

    def between_tries(context):
        first.update(context["ti"].xcom_pull(task_ids="get", key="summary"))
        pacs.before_send = None

    pacs.before_send = lambda uid: time.sleep(0.1)
    with DAG("timeout") as dag:
        get(
            study=archive.many,
            destination=str(tmp_path),
            execution_timeout=timedelta(seconds=5),
            on_retry_callback=between_tries,
            **AT_ONCE,
        )
    run = run_dag(dag)
    assert run.state == "success"
    assert (first["verdict"], first["reason"]) == ("partial", "deadline")
    assert "The execution_timeout of the task (0:00:05) was about to end" in run.log
    assert "raise deadlines" not in run.log
    assert first["manifest_rows"] == 60
    assert 5 < first["completed"] < 40
    assert run.xcom("get", "summary")["skipped"] == first["completed"]
    assert len(held_files(tmp_path)) == 60


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # it may be raised in a weakref, too
def test_the_timeout_of_airflow_itself_leaves_nothing_behind(run_dag, pacs, archive, tmp_path, monkeypatch):
    """Raised between any two instructions, should the engine not have ended before."""
    monkeypatch.setattr(DicomGetOperator, "_seconds", lambda self: float("inf"))
    left = {}

    def between_tries(context):
        left["parts"] = list(tmp_path.rglob("*.part"))
        until = time.monotonic() + 2
        while pacs.associations and time.monotonic() < until:
            time.sleep(0.05)
        left["open"] = pacs.associations
        pacs.before_send = None

    sent = itertools.count()
    pacs.before_send = lambda uid: time.sleep(0.5 if next(sent) >= 10 else 0)  # some come at once, all in 25 s
    with DAG("alarm") as dag:
        get(
            study=archive.many,
            destination=str(tmp_path),
            execution_timeout=timedelta(seconds=3),
            on_retry_callback=between_tries,
            **AT_ONCE,
        )
    run = run_dag(dag)
    assert run.state == "success"
    assert "AirflowTaskTimeout" in run.log
    assert left == {"parts": [], "open": 0}
    assert 0 < run.xcom("get", "summary")["skipped"] < 60
    assert len(held_files(tmp_path)) == 60


@pytest.fixture
def hours(monkeypatch):
    """Let the connection have hours, which the test sets to the second; None: they begin 4 s after the first look."""
    spans: list[tuple[datetime, datetime] | None] = []

    def around(*_):
        if spans == [None]:
            spans[0] = datetime.now(UTC) + timedelta(seconds=4), datetime.now(UTC) + timedelta(hours=1)
        return spans

    monkeypatch.setattr(Window, "_around", around)
    monkeypatch.setenv("AIRFLOW_CONN_PACS", os.environ["AIRFLOW_CONN_PACS"] + "/?window=22%3A00-06%3A00")
    return spans


def test_outside_the_hours_the_task_defers_and_goes_on_within(run_dag, pacs, archive, tmp_path, hours):
    hours += [None]
    with DAG("waits") as dag:
        get(study=archive.private, destination=str(tmp_path))
    pacs_before = pacs.total_associations
    run = run_dag(dag)
    assert run.state == "success"
    assert "Pausing task as DEFERRED" in run.log
    assert "DateTimeTrigger" in run.log
    assert pacs_before == 0
    opens = hours[0][0]
    assert run.stored("get", "window") == {"resume_at": opens.isoformat()}
    summary = run.xcom("get", "summary")
    assert (summary["verdict"], summary["try_number"], summary["completed"]) == ("complete", 1, 12)
    assert datetime.now(UTC) >= opens


def test_hours_that_end_in_the_middle_are_kept(run_dag, pacs, archive, tmp_path, hours):
    now = datetime.now(UTC)
    closes, opens = now + timedelta(seconds=3), now + timedelta(seconds=6)
    hours += [(now - timedelta(hours=1), closes), (opens, now + timedelta(hours=1))]
    sent_at = []

    def slowly(uid):
        sent_at.append(datetime.now(UTC))
        time.sleep(0.1 if sent_at[-1] < opens else 0)

    pacs.before_send = slowly
    with DAG("evening") as dag:
        get(study=archive.many, destination=str(tmp_path))
    run = run_dag(dag)
    assert run.state == "success"
    assert run.log.count("Pausing task as DEFERRED") == 1
    assert not [at for at in sent_at if closes + timedelta(seconds=1) < at < opens]
    assert run.xcom("get", "summary")["verdict"] == "complete"
    assert sum(pacs.sent.values()) <= 61


def test_waiting_for_the_hours_can_be_refused_or_the_hours_ignored(run_dag, pacs, archive, tmp_path, hours):
    later = datetime.now(UTC) + timedelta(hours=1)
    hours += [(later, later + timedelta(hours=1))]
    with DAG("hours", default_args=AT_ONCE) as dag:
        fails = {"study": archive.private, "destination": str(tmp_path / "a"), "outside_window": "fail"}
        get(task_id="fails", **fails)
        get(task_id="accepts", accept=("complete", "partial"), **fails)  # of hours that are over there is no success
        get(task_id="ignores", study=archive.private, destination=str(tmp_path / "b"), outside_window="ignore")
    run = run_dag(dag)
    for name in ("fails", "accepts"):
        assert (run.task(name).state, run.task(name).try_number) == ("failed", 1)
        assert run.xcom(name, "summary")["reason"] == "window"
    assert run.task("ignores").state == "success"


# --- a second list that cannot be had --------------------------------------------------------------


def test_the_hours_end_when_all_is_held_and_the_task_defers(run_dag, pacs, archive, tmp_path, monkeypatch):
    """The verdict is unverified by then: no failure for good, but a look at the list within the next hours."""
    begun = []

    def around(self, moment, zone):
        begun.append(datetime.now(UTC))
        closes = begun[0] + timedelta(seconds=4)
        return [(begun[0] - timedelta(hours=1), closes), (closes + timedelta(seconds=2), closes + timedelta(hours=1))]

    def last_one_waits(uid):
        if sum(pacs.sent.values()) == 11:
            time.sleep(max(0.0, (begun[0] + timedelta(seconds=4.1) - datetime.now(UTC)).total_seconds()))

    monkeypatch.setattr(Window, "_around", around)
    monkeypatch.setenv("AIRFLOW_CONN_PACS", os.environ["AIRFLOW_CONN_PACS"] + "/?window=22%3A00-06%3A00")
    pacs.before_send = last_one_waits
    with DAG("late") as dag:
        get(study=archive.private, destination=str(tmp_path))
    run = run_dag(dag)
    assert run.state == "success"
    assert run.log.count("Pausing task as DEFERRED") == 1
    assert "unverified (list_not_repeated): 12 of 12" in run.log
    summary = run.xcom("get", "summary")
    assert (summary["verdict"], summary["skipped"], summary["try_number"]) == ("complete", 12, 1)
    assert sum(pacs.sent.values()) == 12


def test_the_pacs_is_gone_when_all_is_held_and_the_task_is_tried_again(run_dag, pacs, archive, tmp_path):
    def leave(uid):
        pacs.no_find = sum(pacs.sent.values()) == 11

    def come_back(context):
        pacs.no_find = False

    pacs.before_send = leave
    with DAG("gone") as dag:
        get(study=archive.private, destination=str(tmp_path), on_retry_callback=come_back, **AT_ONCE)
    run = run_dag(dag)
    assert run.state == "success"
    assert "unverified (list_not_repeated): 12 of 12" in run.log
    summary = run.xcom("get", "summary")
    assert (summary["verdict"], summary["skipped"], summary["try_number"]) == ("complete", 12, 2)


def test_an_error_at_a_later_part_keeps_the_rows_of_the_first(run_dag, pacs, archive, tmp_path, monkeypatch):
    """The PACS no longer tells the UIDs of studies when the second part is resolved: that is no input to be had."""
    tells = pacs.unsupported

    def unsupported():
        asked = pacs.requests[-1][2].get(0x0020000D, "")
        return frozenset({0x0020000D}) if archive.private in asked else tells()

    (row,) = pacs.archive.find("SERIES", {0x0020000D: archive.private, 0x0020000E: ""})[:1]
    monkeypatch.setattr(pacs, "unsupported", unsupported)
    with DAG("parts", default_args=AT_ONCE) as dag:
        get(study=[archive.many, make_item(archive.private, series=[row[0x0020000E]])], destination=str(tmp_path))
    run = run_dag(dag)
    assert (run.task("get").state, run.task("get").try_number) == ("failed", 1)
    summary = run.xcom("get", "summary")
    assert (summary["verdict"], summary["reason"], summary["completed"]) == ("failed", "invalid_query", 60)
    assert "StudyInstanceUID" in summary["errors"][0]["error"]
    assert run.xcom("get")["state"].tolist() == ["stored"] * 60
    assert len(load_manifest(summary["manifest_uri"])) == 60


def test_a_study_that_was_not_begun_before_the_hours_ended_is_no_success(run_dag, pacs, archive, tmp_path, monkeypatch):
    """The first one's verdict is accepted; of the second nothing is known."""
    real, began = GetScu.get_study, []

    def until_the_hours_end(self, *args, **named):
        began.append(1)
        result = real(self, *args, **named)
        result.verdict, result.reason, result.transient = "unverified", "window", True
        result.resume_at = datetime.now(UTC) + timedelta(hours=1)
        return result

    monkeypatch.setattr(GetScu, "get_study", until_the_hours_end)
    with DAG("not_begun") as dag:
        DicomGetOperator(
            task_id="get",
            dicom_conn_id="pacs",
            destination=str(tmp_path / "d"),
            outside_window="fail",
            accept=("complete", "unverified"),
            study=[archive.many, make_item(archive.private, series=["1.2.3"])],
        )
    run = run_dag(dag)
    assert (run.state, len(began)) == ("failed", 1)
    assert (run.xcom("get", "summary")["verdict"], run.xcom("get", "summary")["reason"]) == ("partial", "window")


@pytest.mark.parametrize("accept", [("complete",), ("complete", "empty")])
def test_a_search_that_finds_nothing_is_empty_for_good(run_dag, pacs, tmp_path, accept):
    with DAG("quiet", default_args=AT_ONCE) as dag:
        find = DicomFindOperator(task_id="find", study_date="19010101", dicom_conn_id="pacs")
        get(study=find.output, destination=str(tmp_path), accept=accept)
    run = run_dag(dag)
    assert run.state == ("success" if "empty" in accept else "failed")
    assert run.task("get").try_number == 1
    summary = run.xcom("get", "summary")
    assert (summary["verdict"], summary["reason"], summary["total"]) == ("empty", "nothing_asked", 0)
    assert len(load_manifest(run.xcom("get"))) == 0
