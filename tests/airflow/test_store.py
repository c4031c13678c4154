"""DicomStoreOperator in DAG runs: from folders, buckets and manifests to a PACS."""

from __future__ import annotations

import json
import os
import signal
import time
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from airflow.sdk import DAG

from airflow_dicom_get import load_manifest
from airflow_dicom_get.config.groups import Window
from airflow_dicom_get.errors import ManifestError
from airflow_dicom_get.manifest import files
from airflow_dicom_get.manifest.files import write_manifest
from airflow_dicom_get.manifest.schema import manifest_table
from airflow_dicom_get.operators._manifests import load_given
from airflow_dicom_get.operators.dicom import DicomGetOperator, DicomStoreOperator
from airflow_dicom_get.records import Instance
from airflow_dicom_get.testing.archive import Archive as Index
from airflow_dicom_get.testing.s3_servers import BUCKET, SECRET_KEY
from tests.support.references import reference

AT_ONCE = {"retries": 2, "retry_delay": timedelta(0)}


def get(**options) -> DicomGetOperator:
    return DicomGetOperator(**{"task_id": "get", "dicom_conn_id": "pacs", **options})


def store(**options) -> DicomStoreOperator:
    return DicomStoreOperator(**{"task_id": "store", "target_conn_id": "archive", **options})


def held(folder) -> set[str]:
    """SOP Instance UIDs of what a PACS was given."""
    index = Index(folder)
    index.load()
    return {entry.sop for entry in index.entries()}


@pytest.fixture
def root(tmp_path, monkeypatch):
    """Where the configuration has manifests and ledgers."""
    monkeypatch.setenv("AIRFLOW__DICOM_GET__MANIFEST_ROOT", str(tmp_path / "root"))
    return tmp_path / "root"


def test_what_was_retrieved_is_stored_by_mapped_tasks_and_again_by_none(
    run_dag, pacs, archive, target, tmp_path, root, database_rows, patient
):
    with DAG("night") as dag:
        first = DicomGetOperator.partial(
            task_id="get", destination=str(tmp_path / "data"), dicom_conn_id="pacs"
        ).expand(study=[archive.many, archive.private])
        then = DicomStoreOperator.partial(task_id="store", target_conn_id="archive").expand(manifest=first.output)
        again = store(task_id="again", manifest=first.output)
        then >> again
    run = run_dag(dag)
    assert run.state == "success"
    for index, number in enumerate((60, 12)):
        summary, frame = run.xcom("store", "summary", index), run.xcom("store", map_index=index)
        assert (summary["verdict"], summary["completed"], summary["skipped"]) == ("complete", number, 0)
        assert summary["destination"] == f"dicom://ARCHIVE@127.0.0.1:{target.port}"
        assert set(frame["state"]) == {"forwarded"}
        assert summary["manifest_uri"] == next(root.rglob(f"store/{index}-1.parquet")).as_uri()
        assert run.rendered("store", index)["manifest"] == f"manifest of {number} rows"
        assert run.stored("store", "progress", index)["phase"] == "done"
    assert held(tmp_path / "archive") == set(run.xcom("again")["sop_instance_uid"])
    summary = run.xcom("again", "summary")
    assert (summary["verdict"], summary["completed"], summary["skipped"]) == ("complete", 72, 72)
    database = database_rows(run)
    assert not any(word in run.log or word.encode().hex() in database.lower() for word in patient)


def test_a_bucket_is_stored_from_its_manifest_and_from_its_prefix(
    run_dag, pacs, archive, target, root, bucket, prefix, tmp_path
):
    place = f"s3://store@{BUCKET}/{prefix}"
    with DAG("from_bucket") as dag:
        first = get(study=archive.private, destination=place, manifest_xcom="reference")
        frame = get(task_id="frame", study=archive.private, destination=place)
        by_reference = store(task_id="by_reference", manifest=first.output)
        by_frame = store(task_id="by_frame", manifest=frame.output, s3_conn_id="store", resume=False)
        by_prefix = store(task_id="by_prefix", source=place, manifest_root=f"s3://store@{BUCKET}/{prefix}/sent")
        first >> frame >> by_reference >> by_frame >> by_prefix
    run = run_dag(dag)
    assert run.state == "success"
    for name in ("by_reference", "by_frame", "by_prefix"):
        summary = run.xcom(name, "summary")
        assert (summary["verdict"], summary["completed"]) == ("complete", 12), name
    uri = run.xcom("by_prefix", "summary")["manifest_uri"]
    assert uri.startswith(f"s3://store@{BUCKET}/{prefix}/sent/from_bucket/")
    assert len(load_manifest(uri)) == 12
    assert len(held(tmp_path / "archive")) == 12
    assert SECRET_KEY not in run.log


def test_a_manifest_that_is_handed_on_names_allowed_destinations_alone(
    run_dag, pacs, archive, target, root, tmp_path, monkeypatch
):
    with DAG("allowed", default_args={"retries": 0}) as dag:
        first = get(study=archive.private, destination=str(tmp_path / "here"))
        store(manifest=first.output)
    monkeypatch.setenv("AIRFLOW__DICOM_GET__ALLOWED_DESTINATIONS", f"/data/*\n{tmp_path}/he*\ndicom://archive")
    run = run_dag(dag)
    assert run.state == "success"
    uri = run.xcom("get", "summary")["manifest_uri"]
    for number, manifest in enumerate((reference(uri), uri)):
        with DAG(f"not_allowed_{number}", default_args={"retries": 0}) as dag:
            store(manifest=manifest)
        monkeypatch.setenv("AIRFLOW__DICOM_GET__ALLOWED_DESTINATIONS", "/data/*\ns3://imaging/*\ndicom://archive")
        asked = target.total_associations
        run = run_dag(dag)
        assert run.task("store").state == "failed"
        summary = run.xcom("store", "summary")
        assert (summary["verdict"], summary["reason"], summary["completed"]) == ("failed", "outside_root", 0)
        assert target.total_associations == asked


def test_a_node_that_a_run_names_has_to_be_allowed(run_dag, pacs, archive, target, root, tmp_path, monkeypatch):
    with DAG("named", params={"node": "archive"}, default_args={"retries": 0}) as dag:
        first = get(study=archive.private, destination=str(tmp_path / "here"))
        store(manifest=first.output, target_conn_id="{{ params.node }}")
    monkeypatch.setenv("AIRFLOW__DICOM_GET__ALLOWED_DESTINATIONS", f"{tmp_path}/*\ndicom://archive")
    monkeypatch.setenv("AIRFLOW_CONN_ELSEWHERE", f"dicom://ARCHIVE@127.0.0.1:{target.port}")
    asked = target.total_associations
    run = run_dag(dag, run_conf={"node": "elsewhere"})
    assert run.task("store").state == "failed"
    assert "is none of [dicom_get] allowed_destinations" in run.log
    assert target.total_associations == asked


def test_manifests_of_a_task_are_bounded_together(tmp_path, monkeypatch):
    table = manifest_table([Instance("1.2", "1.2.3", "1.2.3.4")] * 10_000, source="", destination="")
    several = [str(tmp_path / f"{number}.parquet") for number in range(8)]
    for path in several:
        write_manifest(table, path, verdict="partial", evidence="list", run="r")
    monkeypatch.setattr(files, "_MOST_DECODED", 32 << 20)
    assert len(load_given(several[:2], None).table) == 20_000
    with pytest.raises(ManifestError, match="of memory with those that are read before it"):
        load_given(several, None)


def test_nothing_is_stored_where_it_was_retrieved_from(run_dag, pacs, archive, target, root, tmp_path):
    """Neither by the connections of the DAG's source, nor by a connection that is another name of it."""
    os.environ["AIRFLOW_CONN_SAME"] = f"dicom://PACS@localhost:{pacs.port}"
    try:
        with DAG("back", default_args={"dicom_conn_id": "pacs"}) as dag:
            first = DicomGetOperator(task_id="get", study=archive.private, destination=str(tmp_path / "data"))
            DicomStoreOperator(task_id="store", manifest=first.output, target_conn_id="archive")
            for name in ("pacs", "same"):
                store(task_id=name, manifest=first.output, target_conn_id=name, **AT_ONCE)
        run = run_dag(dag)
    finally:
        del os.environ["AIRFLOW_CONN_SAME"]
    assert run.task("store").state == "success"
    assert len(held(tmp_path / "archive")) == 12
    for name in ("pacs", "same"):
        assert (run.task(name).state, run.task(name).try_number) == ("failed", 1)
    assert run.log.count("is the node that the manifest was retrieved from. Name the node to store at.") >= 2
    assert not any(kind == "C-STORE" for kind, _, _ in pacs.requests)


def test_a_folder_without_a_root_is_stored_and_files_that_are_none_are_left_out(
    run_dag, archive, target, tmp_path, monkeypatch
):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    source = tmp_path / "source"
    source.mkdir()
    for path in (archive.folder / "private").iterdir():
        (source / path.name).write_bytes(path.read_bytes())
    (source / "note.txt").write_text("no instance")
    with DAG("folder", default_args=AT_ONCE) as dag:
        store(source=str(source), accept=("complete", "partial"))
        store(task_id="whole", source=str(source))
    run = run_dag(dag)
    assert run.task("store").state == "success"
    summary = run.xcom("store", "summary")
    assert (summary["verdict"], summary["reason"], summary["completed"]) == ("partial", "unusable_files", 12)
    assert summary["manifest_uri"] is None
    assert "note.txt" in run.log
    # Another try makes an instance of no file.
    assert (run.task("whole").state, run.task("whole").try_number) == ("failed", 1)
    assert not (tmp_path / "state").exists()


def test_another_try_sends_what_is_missing(run_dag, pacs, archive, target, tmp_path, root):
    seen = {}

    def between_tries(context):
        seen["summary"] = context["ti"].xcom_pull(task_ids="store", key="summary")
        os.environ["AIRFLOW_CONN_ARCHIVE"] = f"dicom://ARCHIVE@127.0.0.1:{target.port}"

    os.environ["AIRFLOW_CONN_ARCHIVE"] = "dicom://ARCHIVE@127.0.0.1:1"
    with DAG("down") as dag:
        store(source=str(archive.folder / "private"), on_retry_callback=between_tries,
              execution_timeout=timedelta(seconds=5), **AT_ONCE)  # fmt: skip
    run = run_dag(dag)
    assert run.state == "success"
    assert seen["summary"]["verdict"] == "failed"
    assert run.task("store").try_number == 2
    assert run.xcom("store", "summary")["completed"] == 12


def test_sigterm_ends_it_soon_and_the_next_try_goes_on(run_dag, archive, target, tmp_path, root, monkeypatch):
    from airflow_dicom_get.net.store import StoreChannel

    times: dict[str, Any] = {"sent": 0}
    begin = StoreChannel.begin

    def slowly(self, *args):
        times["sent"] += 1
        time.sleep(0.02)
        if times["sent"] == 20:
            times["killed"] = time.monotonic()
            os.kill(os.getpid(), signal.SIGTERM)
        return begin(self, *args)

    def between_tries(context):
        times["ended"] = time.monotonic()
        times["summary"] = context["ti"].xcom_pull(task_ids="store", key="summary")

    monkeypatch.setattr(StoreChannel, "begin", slowly)
    before = signal.getsignal(signal.SIGTERM)
    try:
        with DAG("killed_store") as dag:
            store(source=str(archive.folder / "many"), on_retry_callback=between_tries, **AT_ONCE)
        run = run_dag(dag)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert run.state == "success"
    assert times["ended"] - times["killed"] < 5
    assert times["summary"]["verdict"] == "cancelled"
    assert run.xcom("store", "summary")["skipped"] >= times["summary"]["completed"] >= 15
    assert len(held(tmp_path / "archive")) == 60


@pytest.fixture
def hours(monkeypatch, target):
    """Let the connection have hours, which the test sets to the second."""
    spans: list[tuple[datetime, datetime]] = []
    monkeypatch.setattr(Window, "_around", lambda self, moment, zone: spans)
    monkeypatch.setenv("AIRFLOW_CONN_ARCHIVE", os.environ["AIRFLOW_CONN_ARCHIVE"] + "/?window=22%3A00-06%3A00")
    return spans


def test_the_hours_of_the_node_are_kept(run_dag, archive, target, tmp_path, root, hours, monkeypatch):
    from airflow_dicom_get.net.store import StoreChannel

    now = datetime.now(UTC)
    closes, opens = now + timedelta(seconds=3), now + timedelta(seconds=6)
    hours += [(now - timedelta(hours=1), closes), (opens, now + timedelta(hours=1))]
    begin, begun = StoreChannel.begin, []

    def slowly(self, *args):
        begun.append(datetime.now(UTC))
        time.sleep(0.3 if begun[-1] < opens else 0)
        return begin(self, *args)

    monkeypatch.setattr(StoreChannel, "begin", slowly)
    with DAG("store_hours") as dag:
        store(source=str(archive.folder / "many"))
    run = run_dag(dag)
    assert run.state == "success"
    assert run.log.count("Pausing task as DEFERRED") == 1
    assert not [at for at in begun if closes + timedelta(seconds=1) < at < opens]
    assert run.xcom("store", "summary")["completed"] == 60


def test_outside_the_hours_it_can_fail_or_not_mind(run_dag, archive, target, root, hours):
    later = datetime.now(UTC) + timedelta(hours=1)
    hours += [(later, later + timedelta(hours=1))]
    source = str(archive.folder / "private")
    with DAG("store_outside", default_args=AT_ONCE) as dag:
        store(task_id="fails", source=source, outside_window="fail")
        store(task_id="ignores", source=source, outside_window="ignore")
    run = run_dag(dag)
    assert (run.task("fails").state, run.task("fails").try_number) == ("failed", 1)
    assert run.task("ignores").state == "success"


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "nothing": ({}, "manifest, source: none"),
    "both": ({"manifest": "/m.parquet", "source": "/data"}, "manifest and source are given"),
    "blank": ({"source": "{{ '' }}"}, "rendered to an empty string"),
    "relative": ({"source": "data"}, "not an absolute path"),
    "not_there": ({"source": "/nowhere/at/all"}, "/nowhere/at/all"),
    "no_manifest": ({"manifest": "/nowhere/m.parquet"}, "cannot be read"),
    "none_among": ({"manifest": ["/nowhere/n.parquet", None]}, "has None in 1 of 2 places"),
    "relative_manifest": ({"manifest": "m.parquet"}, "not an absolute path"),
    "node": ({"source": "dicom://archive"}, "is a DICOM node"),
    "bucket": ({"source": "s3://bucket/x"}, "names no connection"),
    "no_connection": ({"source": "/tmp", "target_conn_id": "nowhere"}, "nowhere"),
    "wrong_type": ({"source": "/tmp", "target_conn_id": "store"}, "is not dicom"),
    "other_root": ({"source": "s3://store@b-1/x", "manifest_root": "s3://other@b-1/x"}, "for both"),
    "associations": ({"source": "/tmp", "associations": 9}, "associations:"),
}


def test_bad_input_fails_at_once_and_before_any_traffic(run_dag, target, bucket, tmp_path, monkeypatch):
    monkeypatch.setenv("AIRFLOW_CONN_OTHER", json.dumps({"conn_type": "dicom_s3", "login": "k", "password": "p"}))
    with DAG("bad_store", default_args=AT_ONCE) as dag:
        for name, (options, _) in BAD.items():
            store(**{"task_id": name, "manifest_root": str(tmp_path / "m"), **options})
    run = run_dag(dag)
    # A connection may only seem to be missing: its secrets backend may be away for a moment.
    assert {name: (run.task(name).state, run.task(name).try_number) for name in BAD} == {
        name: ("failed", 3 if name in ("no_connection",) else 1) for name in BAD
    }
    for _, word in BAD.values():
        assert word in run.log
    assert target.total_associations == 0
