"""DicomGetOperator into buckets and to other nodes, in DAG runs against real services."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import time
from datetime import UTC, datetime, timedelta
from typing import Any
from zoneinfo import ZoneInfo

import pandas  # noqa: F401  # imported before times are taken
import pytest
from airflow.sdk import DAG, task

from airflow_dicom_get import combine_manifests, load_manifest, load_manifests
from airflow_dicom_get.config.groups import Window
from airflow_dicom_get.errors import InvalidOption, ManifestError
from airflow_dicom_get.hooks._node_config import BothWindows, both_windows
from airflow_dicom_get.hooks.dicom import DicomHook
from airflow_dicom_get.hooks.dicom_s3 import DicomS3Hook
from airflow_dicom_get.operators.dicom import DicomGetOperator, DicomStoreOperator, DicomVerifyOperator
from airflow_dicom_get.testing.archive import Archive as Index
from airflow_dicom_get.testing.s3_servers import BUCKET, SECRET_KEY, FaultProxy

AT_ONCE = {"retries": 2, "retry_delay": timedelta(0)}


def get(**options) -> DicomGetOperator:
    return DicomGetOperator(**{"task_id": "get", "dicom_conn_id": "pacs", **options})


def held(folder) -> set[str]:
    """SOP Instance UIDs of what a PACS was given."""
    index = Index(folder)
    index.load()
    return {entry.sop for entry in index.entries()}


# --- a bucket --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("server", "kind"), [("juicefs", "dicom_s3"), ("moto", "aws")])
def test_studies_are_retrieved_into_a_bucket(
    run_dag, pacs, archive, prefix, request, connect_bucket, server, kind, database_rows, patient
):
    service = request.getfixturevalue(server)
    connect_bucket(service, kind)
    with DAG("bucket") as dag:
        first = DicomGetOperator.partial(
            task_id="get", destination=f"s3://store@{BUCKET}/{prefix}", dicom_conn_id="pacs"
        ).expand(study=[archive.many, archive.private])
        again = get(
            task_id="again",
            study=[archive.private],
            destination=f"s3://{BUCKET}/{prefix}",
            s3_conn_id="store",
            manifest_xcom="reference",
        )

        @task
        def read(manifests, reference):
            # The addresses that are handed on name the connection, so nothing else is to be said.
            whole = combine_manifests(manifests, f"s3://store@{BUCKET}/{prefix}/nightly")
            return [len(load_manifests(manifests)), len(load_manifest(reference)), len(load_manifest(whole)), whole]

        first >> again
        read(first.output, again.output)
    run = run_dag(dag)
    assert run.state == "success"
    objects = service.objects(prefix)
    for index, number in enumerate((60, 12)):
        summary, frame = run.xcom("get", "summary", index), run.xcom("get", map_index=index)
        assert (summary["verdict"], summary["completed"], summary["skipped"]) == ("complete", number, 0)
        assert summary["destination"] == f"s3://{BUCKET}/{prefix}"
        assert summary["manifest_uri"].startswith(f"s3://store@{BUCKET}/{prefix}/_manifests/bucket/")
        key = summary["manifest_uri"].partition(f"{BUCKET}/")[2]
        assert hashlib.sha256(service.read(key)).hexdigest() == summary["manifest_sha256"]
        row = frame.iloc[0]
        content = service.read(row["uri"].removeprefix(f"s3://{BUCKET}/"))
        assert (len(content), hashlib.sha256(content).hexdigest()) == (row["bytes"], row["sha256"])
        assert all(objects[uri.removeprefix(f"s3://{BUCKET}/")] for uri in frame["uri"])
    summary = run.xcom("again", "summary")
    assert (summary["verdict"], summary["completed"], summary["skipped"]) == ("complete", 12, 12)
    *rows, whole = run.xcom("read")
    assert rows == [72, 12, 72]
    assert whole["manifest_uri"].startswith(f"s3://store@{BUCKET}/{prefix}/nightly/")
    assert set(pacs.sent.values()) == {1}
    database = database_rows(run)
    for word in (*patient, SECRET_KEY):
        assert word not in run.log
        assert word not in database
        assert word.encode().hex() not in database.lower()


def test_the_parts_of_a_task_become_one_manifest_in_the_bucket(run_dag, pacs, archive, bucket, prefix):
    with DAG("parts") as dag:
        first = get(study=[archive.many, archive.private], destination=f"s3://store@{BUCKET}/{prefix}")
        get(task_id="second", manifest=first.output, destination=f"s3://store@{BUCKET}/{prefix}/copy")
    run = run_dag(dag)
    assert run.state == "success"
    manifests = [key for key in bucket.objects(prefix) if key.endswith(".parquet")]
    assert len(manifests) == 2
    assert len(load_manifest(run.xcom("second", "summary")["manifest_uri"])) == 72


def test_manifests_may_lie_in_a_bucket_and_instances_in_a_folder(run_dag, pacs, archive, bucket, prefix, tmp_path):
    with DAG("apart") as dag:
        get(study=archive.private, destination=str(tmp_path), manifest_root=f"s3://store@{BUCKET}/{prefix}")
        get(task_id="by_id", study=archive.private, destination=str(tmp_path), manifest_root=f"s3://{BUCKET}/{prefix}",
            s3_conn_id="store")  # fmt: skip
    run = run_dag(dag)
    assert run.state == "success"
    assert run.xcom("get", "summary")["manifest_uri"].startswith(f"s3://store@{BUCKET}/{prefix}/apart/")
    assert not (tmp_path / "_manifests").exists()
    assert {run.xcom(name, "summary")["skipped"] for name in ("get", "by_id")} == {0, 12}


def test_a_task_without_a_connection_reads_no_manifest_with_the_credentials_of_the_machine(
    run_dag, pacs, archive, bucket, prefix
):
    with DAG("silent") as dag:
        first = get(study=archive.private, destination=f"s3://store@{BUCKET}/{prefix}", manifest_xcom="reference")

        @task
        def read(reference):
            bare = reference["manifest_uri"].replace("store@", "")
            with pytest.raises(ManifestError, match="names no connection"):
                load_manifest(bare)
            assert len(load_manifest(bare, DicomS3Hook("store").config)) == 12
            return len(load_manifest({**reference, "manifest_uri": bare}, DicomS3Hook("store").config))

        read(first.output)
    run = run_dag(dag)
    assert run.xcom("read") == 12


def test_a_bucket_by_the_hook_in_two_lines(pacs, archive, bucket, prefix):
    result = DicomHook("pacs").get_study({"StudyInstanceUID": archive.private}, f"s3://store@{BUCKET}/{prefix}")
    assert result.verdict == "complete"
    assert len(load_manifest(result.manifest_uri)) == 12


# --- another node ----------------------------------------------------------------------------------


def test_a_study_goes_on_to_the_node_of_a_connection(
    run_dag, pacs, archive, target, tmp_path, monkeypatch, database_rows, patient
):
    monkeypatch.setenv("AIRFLOW__DICOM_GET__MANIFEST_ROOT", str(tmp_path / "manifests"))
    with DAG("relay") as dag:
        first = get(study=archive.many, destination="dicom://archive")
        again = get(task_id="again", study=archive.many, destination=f"dicom://ARCHIVE@127.0.0.1:{target.port}")
        first >> again
    run = run_dag(dag)
    assert run.state == "success"
    frame = run.xcom("get")
    assert (set(frame["state"]), set(frame["forwarded_to"])) == ({"forwarded"}, {f"ARCHIVE@127.0.0.1:{target.port}"})
    assert held(tmp_path / "archive") == set(frame["sop_instance_uid"])
    assert len(load_manifest(run.xcom("get", "summary")["manifest_uri"])) == 60
    # What was forwarded is known by its record, to whatever task it was.
    assert run.xcom("again", "summary")["skipped"] == 60
    assert set(pacs.sent.values()) == {1}
    database = database_rows(run)
    assert not any(word in run.log or word.encode().hex() in database.lower() for word in patient)


def test_without_a_root_nothing_is_kept_and_that_is_said(run_dag, pacs, archive, target, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    with DAG("rootless", default_args=AT_ONCE) as dag:
        get(study=archive.private, destination="dicom://archive")
        get(task_id="other", study=archive.private, destination="dicom://archive", manifest_xcom="reference")
    run = run_dag(dag)
    assert run.task("get").state == "success"
    assert len(run.xcom("get")) == 12
    assert run.xcom("get", "summary")["manifest_uri"] is None
    assert "There is no manifest_root" in run.log
    assert not (tmp_path / "state").exists()
    # A reference cannot be made then.
    assert (run.task("other").state, run.task("other").try_number) == ("failed", 1)


def test_the_first_refusal_can_end_it(run_dag, pacs, archive, target, tmp_path):
    with DAG("strict", default_args={"retries": 0}) as dag:
        for name, strict in (("strict", True), ("lenient", False)):
            get(
                task_id=name,
                study=archive.private,
                destination="dicom://archive",
                strict_forward=strict,
                manifest_root=str(tmp_path / name),
                accept=("complete", "partial"),
            )
    run = run_dag(dag)
    assert run.state == "success"
    for name in ("strict", "lenient"):
        assert run.xcom(name, "summary")["verdict"] == "complete"


def test_the_limits_of_both_nodes_hold(monkeypatch, tmp_path):
    monkeypatch.setenv("AIRFLOW_CONN_PACS", json.dumps(conn(max_associations=4, bytes_per_second="8M")))
    monkeypatch.setenv(
        "AIRFLOW_CONN_ARCHIVE",
        json.dumps(conn(port=105, max_associations=2, bytes_per_second="2M", calling_ae_title="SENDER")),
    )
    hook = DicomHook("pacs")
    options = hook.options(destination="dicom://archive", associations=1)
    assert options.bytes_per_second == 1_000_000
    assert options.forward_target is not None
    assert options.forward_target.calling_ae_title == "SENDER"
    assert hook.options(destination="dicom://archive", associations=2).bytes_per_second == 2_000_000
    with pytest.raises(InvalidOption, match="max_associations of the connection archive, which is 2"):
        hook.options(destination="dicom://archive", associations=3)
    with pytest.raises(InvalidOption, match="is the source"):
        hook.options(destination="dicom://pacs")
    with pytest.raises(InvalidOption, match="strict_forward"):
        hook.options(destination=str(tmp_path), strict_forward=True)


def conn(port=104, **extra):
    return {"conn_type": "dicom", "host": "127.0.0.1", "port": port, "login": "X", "extra": extra}


def test_the_hours_of_both_nodes_hold(monkeypatch, tmp_path):
    monkeypatch.setenv("AIRFLOW_CONN_PACS", json.dumps(conn(window="22:00-06:00")))
    monkeypatch.setenv(
        "AIRFLOW_CONN_ARCHIVE", json.dumps(conn(port=105, window="20:00-02:00", timezone="America/New_York"))
    )
    hook = DicomHook("pacs")
    options = hook.options(destination="dicom://archive")
    assert options.window is not None
    noon = datetime(2026, 1, 10, 12, tzinfo=UTC)
    # 20:00 to 02:00 in New York is 01:00 to 07:00 in UTC.
    assert options.window.opens_at(noon, options.timezone) == datetime(2026, 1, 11, 1, tzinfo=UTC)
    within = datetime(2026, 1, 11, 3, tzinfo=UTC)
    assert options.window.closes_at(within, options.timezone) == datetime(2026, 1, 11, 6, tzinfo=UTC)
    assert options.window.closes_at(noon, options.timezone) is None
    assert hook.options(destination="dicom://archive", window=None).window is None
    assert str(hook.options(destination=str(tmp_path)).window) == "22:00-06:00"
    assert hook.get_scu(destination="dicom://archive").options.window == options.window
    assert isinstance(options.window, BothWindows)

    one, other = Window.parse("window", "08:00-09:00"), Window.parse("window", "10:00-11:00")
    assert both_windows(None, UTC, other, ZoneInfo("Europe/Berlin"), "x") == (other, ZoneInfo("Europe/Berlin"))
    with pytest.raises(InvalidOption, match="never overlap"):
        both_windows(one, UTC, other, UTC, "x")


# --- the end of a task -----------------------------------------------------------------------------


@pytest.fixture
def sigterm():
    """Kill the task once, and take the time until its end."""
    times: dict[str, Any] = {}

    def kill():
        if "killed" not in times:
            times["killed"] = time.monotonic()
            os.kill(os.getpid(), signal.SIGTERM)

    times["kill"] = kill
    before = signal.getsignal(signal.SIGTERM)
    yield times
    signal.signal(signal.SIGTERM, before)


def test_sigterm_ends_a_relay_soon_though_the_destination_does_not_answer(
    run_dag, pacs, archive, tmp_path, monkeypatch, sigterm
):
    import socket
    import threading

    from airflow_dicom_get.testing.pacs import EmbeddedPacs

    mute = threading.Event()
    folder = tmp_path / "archive"
    folder.mkdir()
    with EmbeddedPacs(folder, ae_title="ARCHIVE") as server, socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=pass_on, args=(listener, server.port, mute), daemon=True).start()
        monkeypatch.setenv("AIRFLOW_CONN_ARCHIVE", f"dicom://ARCHIVE@127.0.0.1:{listener.getsockname()[1]}")

        def before_send(uid):
            if sum(pacs.sent.values()) == 10 and not mute.is_set():
                mute.set()
                threading.Timer(1.0, sigterm["kill"]).start()

        def between_tries(context):
            sigterm["ended"] = time.monotonic()
            sigterm["summary"] = context["ti"].xcom_pull(task_ids="get", key="summary")
            sigterm["open"] = pacs.associations
            mute.clear()

        pacs.before_send = before_send
        with DAG("mute") as dag:
            get(study=archive.many, destination="dicom://archive", manifest_root=str(tmp_path / "m"),
                on_retry_callback=between_tries, **AT_ONCE)  # fmt: skip
        run = run_dag(dag)
    assert run.state == "success"
    assert sigterm["ended"] - sigterm["killed"] < 15  # the service does not answer for much longer
    assert sigterm["summary"]["verdict"] == "cancelled"
    assert run.xcom("get", "summary")["skipped"] >= sigterm["summary"]["completed"] > 5
    assert len(held(folder)) == 60


def pass_on(listener, port, mute):
    """Relay connections to a port; while ``mute`` is set, nothing of what comes back."""
    import contextlib
    import socket
    import threading

    def copy(source, sink, silent):
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                while silent and mute.is_set():
                    time.sleep(0.05)
                sink.sendall(data)
        for sock in (source, sink):
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
            sock.close()

    with contextlib.suppress(OSError):
        while True:
            client, _ = listener.accept()
            server = socket.create_connection(("127.0.0.1", port))
            threading.Thread(target=copy, args=(client, server, False), daemon=True).start()
            threading.Thread(target=copy, args=(server, client, True), daemon=True).start()


def test_sigterm_ends_uploads_soon_though_the_service_does_not_answer(
    run_dag, pacs, archive, moto, prefix, connect_bucket, sigterm
):
    stalls = {"on": False}

    def fault(number, method, path):
        return "stall" if stalls["on"] and method == "PUT" and path.endswith(".dcm") else None

    def before_send(uid):
        time.sleep(0.02)
        if sum(pacs.sent.values()) == 20 and not sigterm.get("killed"):
            stalls["on"] = True
        if sum(pacs.sent.values()) == 30:
            sigterm["kill"]()

    def between_tries(context):
        sigterm["ended"] = time.monotonic()
        sigterm["summary"] = context["ti"].xcom_pull(task_ids="get", key="summary")
        stalls["on"] = False

    pacs.before_send = before_send
    with FaultProxy(moto, fault) as proxy:
        connect_bucket(proxy)
        with DAG("stalled") as dag:
            get(study=archive.many, destination=f"s3://store@{BUCKET}/{prefix}", on_retry_callback=between_tries,
                **AT_ONCE)  # fmt: skip
        run = run_dag(dag)
    assert run.state == "success"
    assert sigterm["ended"] - sigterm["killed"] < 15
    assert sigterm["summary"]["verdict"] == "cancelled"
    summary = run.xcom("get", "summary")
    assert (summary["verdict"], summary["completed"]) == ("complete", 60)
    assert len([key for key in moto.objects(prefix) if key.endswith(".dcm")]) == 60


# --- bad input -------------------------------------------------------------------------------------

BAD: dict[str, tuple[dict[str, Any], str]] = {
    "no_connection": ({"destination": "s3://nowhere@bucket/x"}, "nowhere"),
    "no_node": ({"destination": "dicom://nowhere"}, "with the type DICOM"),
    "nothing_named": ({"destination": "s3://bucket/x"}, "names no connection"),
    "of_a_node": ({"destination": "s3://archive@bucket/x"}, "neither dicom_s3 nor aws"),
    "of_a_bucket": ({"destination": "dicom://half"}, "is not dicom"),
    "half_a_pair": ({"destination": "s3://half@bucket/x"}, "password (secret key)"),
    "other_root": ({"destination": "s3://store@bucket/x", "manifest_root": "s3://other@bucket/m"}, "for both"),
    "node_as_root": ({"destination": "/data", "manifest_root": "dicom://archive"}, "cannot hold manifests"),
    "meta": ({"destination": "dicom://archive", "store_with_file_meta": False}, "store_with_file_meta"),
    "strict": ({"destination": "s3://store@bucket/x", "strict_forward": True}, "strict_forward"),
    "itself": ({"destination": "dicom://pacs"}, "is the source"),
    "too_many": ({"destination": "dicom://archive", "associations": 2}, "of the connection archive"),
    "manifest": ({"study": None, "manifest": "s3://bucket/m.parquet", "destination": "/data"}, "names no connection"),
}


def test_bad_places_fail_at_once_and_before_any_traffic(run_dag, pacs, archive, bucket, tmp_path, monkeypatch):
    monkeypatch.setenv("AIRFLOW_CONN_ARCHIVE", json.dumps(conn(max_associations=1)))
    monkeypatch.setenv("AIRFLOW_CONN_HALF", json.dumps({"conn_type": "dicom_s3", "login": "key", "host": "h"}))
    monkeypatch.setenv("AIRFLOW_CONN_OTHER", json.dumps({"conn_type": "dicom_s3", "login": "k", "password": "p"}))
    with DAG("bad_places", default_args=AT_ONCE) as dag:
        for name, (options, _) in BAD.items():
            get(**{"task_id": name, "study": archive.private, "manifest_root": str(tmp_path), **options})
    before = bucket.objects()
    run = run_dag(dag)
    # A connection may only seem to be missing: its secrets backend may be away for a moment.
    assert {name: (run.task(name).state, run.task(name).try_number) for name in BAD} == {
        name: ("failed", 3 if name in ("no_connection", "no_node") else 1) for name in BAD
    }
    for _, word in BAD.values():
        assert word in run.log
    assert pacs.total_associations == 0
    assert bucket.objects() == before


OUTSIDE: dict[str, dict[str, Any]] = {
    "folder": {"destination": "{root}/outside"},
    "above": {"destination": "{root}/in/../outside"},
    "bucket": {"destination": "s3://store@other-bucket/x"},
    "prefix": {"destination": "s3://store@bucket/other"},
    "node": {"destination": "dicom://ARCHIVE@127.0.0.1:104"},
    "connection": {"destination": "dicom://pacs_2"},
    "root": {"destination": "dicom://archive", "manifest_root": "{root}/outside"},
}


def test_no_other_places_than_the_allowed_ones_are_taken(run_dag, pacs, archive, target, bucket, tmp_path, monkeypatch):
    patterns = [f"{tmp_path}/in/*", "s3://bucket/night*", "dicom://archive"]
    monkeypatch.setenv("AIRFLOW__DICOM_GET__ALLOWED_DESTINATIONS", "\n".join(patterns))
    monkeypatch.setenv("AIRFLOW_CONN_PACS_2", f"dicom://ARCHIVE@127.0.0.1:{target.port}")
    outside = tmp_path / "outside"
    outside.mkdir()
    with DAG("outside", default_args=AT_ONCE) as dag:
        for name, options in OUTSIDE.items():
            places = {key: value.format(root=tmp_path) for key, value in options.items()}
            get(task_id=name, study=archive.private, **places)
        DicomStoreOperator(task_id="source", source=str(outside), target_conn_id="archive")
        DicomVerifyOperator(task_id="verify", study=archive.private, destination=str(outside), dicom_conn_id="pacs")
    run = run_dag(dag)
    names = [*OUTSIDE, "source", "verify"]
    assert {name: run.task(name).state for name in names} == dict.fromkeys(names, "failed")
    assert {run.task(name).try_number for name in OUTSIDE} == {1}
    assert run.log.count("is none of [dicom_get] allowed_destinations. Give one of these, or ask") >= len(names)
    assert (pacs.total_associations, target.total_associations) == (0, 0)
    assert list(outside.iterdir()) == []

    with DAG("inside", default_args=AT_ONCE) as dag:
        first = get(study=archive.private, destination=str(tmp_path / "in" / "data"))
        DicomStoreOperator(
            task_id="store", manifest=first.output, target_conn_id="archive", manifest_root=str(tmp_path / "in" / "m")
        )
    assert run_dag(dag).state == "success"


def test_a_bucket_that_is_not_there_fails_for_good_and_one_that_is_down_is_tried_again(
    run_dag, pacs, archive, bucket, monkeypatch
):
    monkeypatch.setenv(
        "AIRFLOW_CONN_DOWN",
        json.dumps({"conn_type": "dicom_s3", "host": "127.0.0.1", "port": 1, "login": "k", "password": "p",
                    "extra": {"scheme": "http"}}),
    )  # fmt: skip
    monkeypatch.setattr("airflow_dicom_get.storage.bucket.ATTEMPTS", 1)
    with DAG("down", default_args={"retries": 1, "retry_delay": timedelta(0)}) as dag:
        get(task_id="not_there", study=archive.private, destination="s3://store@not-there/x")
        get(task_id="down", study=archive.private, destination="s3://down@bucket/x")
    run = run_dag(dag)
    assert (run.task("not_there").state, run.task("not_there").try_number) == ("failed", 1)
    assert (run.task("down").state, run.task("down").try_number) == ("failed", 2)
    assert "NoSuchBucket" in run.log
    assert run.xcom("not_there", "summary")["verdict"] == "failed"
