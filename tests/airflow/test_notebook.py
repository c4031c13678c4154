"""What a notebook loads from Airflow, over its REST interface and with a viewer's token."""

from __future__ import annotations

import gzip
import json
import os
import socket
import sys
import threading
import time
from pathlib import Path
from uuid import uuid4

import pytest
from airflow.sdk import DAG, task

from airflow_dicom_get.errors import InvalidOption, ManifestError
from airflow_dicom_get.notebook import latest, load_manifests, overview, read_manifest
from airflow_dicom_get.operators.dicom import DicomGetOperator
from airflow_dicom_get.storage.bucket import Bucket
from airflow_dicom_get.testing.s3_servers import ACCESS_KEY, BUCKET, SECRET_KEY
from notebooks import execute

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(scope="module")
def airflow(tmp_path_factory):
    """Address of Airflow's API server, and the token of a viewer."""
    import httpx
    import uvicorn

    passwords = tmp_path_factory.mktemp("auth") / "passwords.json"
    passwords.write_text(json.dumps({"viewer": "secret", "admin": "of-the-demo"}))
    with pytest.MonkeyPatch.context() as patch, socket.create_server(("127.0.0.1", 0)) as listener:
        patch.setenv("AIRFLOW__CORE__SIMPLE_AUTH_MANAGER_USERS", "viewer:viewer,admin:admin")
        patch.setenv("AIRFLOW__CORE__SIMPLE_AUTH_MANAGER_PASSWORDS_FILE", str(passwords))
        patch.setenv("AIRFLOW__API_AUTH__JWT_SECRET", "for the tests alone, long enough for a key" * 2)
        from airflow.api_fastapi.app import create_app, purge_cached_app

        purge_cached_app()
        server = uvicorn.Server(uvicorn.Config(create_app("core"), log_level="warning"))
        thread = threading.Thread(target=server.run, args=([listener],), daemon=True)
        thread.start()
        until = time.monotonic() + 30
        while not server.started:
            assert time.monotonic() < until
            time.sleep(0.05)
        address = f"http://127.0.0.1:{listener.getsockname()[1]}"
        answer = httpx.post(f"{address}/auth/token", json={"username": "viewer", "password": "secret"}, timeout=10)
        yield {"base_url": address, "token": answer.json()["access_token"]}
        server.should_exit = True
        thread.join(10)
        purge_cached_app()


def test_manifests_of_a_run(airflow, run_dag, pacs, archive, tmp_path, monkeypatch):
    with DAG("notebook") as dag:
        DicomGetOperator.partial(task_id="get", dicom_conn_id="pacs", destination=str(tmp_path)).expand(
            study=[archive.many, archive.private]
        )
        DicomGetOperator(
            task_id="referred",
            dicom_conn_id="pacs",
            study=archive.private,
            destination=str(tmp_path / "other"),
            manifest_xcom="reference",
        )
    run = run_dag(dag)
    assert run.state == "success"
    frame = load_manifests("notebook", **airflow)
    assert len(frame) == 60 + 12 + 12
    assert frame.groupby(["task_id", "map_index"]).size().to_dict() == {
        ("get", 0): 60,
        ("get", 1): 12,
        ("referred", -1): 12,
    }
    assert str(frame.dtypes["bytes"]) == "Int64"
    assert set(frame["verdict"]) == {"complete"}
    assert frame["run"].nunique() == 3
    assert frame["run_at"].is_monotonic_increasing
    assert len(latest(frame)) == 60 + 12
    one = load_manifests("notebook", run_id=run.run_id, task_id="referred", **airflow)
    assert set(one["study_instance_uid"]) == {archive.private}
    uri = run.xcom("referred", "summary")["manifest_uri"]
    assert len(read_manifest(uri)) == 12
    monkeypatch.setenv("AIRFLOW_URL", airflow["base_url"])
    monkeypatch.setenv("AIRFLOW_TOKEN", airflow["token"])
    monkeypatch.setenv("AIRFLOW_DAG", "notebook")
    execute(
        ROOT / "notebooks" / "01_first_look.ipynb",
        then="assert len(manifests) == 84 and len(held) == 72 and set(manifests['task_id']) == {'get', 'referred'}",
    )
    # As `make ui` leaves it: no variable to set but, here, the DAG.
    home = tmp_path / "demo" / "airflow"
    home.mkdir(parents=True)
    (home / "address").write_text(airflow["base_url"])
    (home / "secrets.json").write_text(json.dumps({"password": "of-the-demo"}))
    monkeypatch.delenv("AIRFLOW_URL")
    monkeypatch.delenv("AIRFLOW_TOKEN")
    monkeypatch.setenv("DICOM_DEMO_FOLDER", str(home.parent))
    execute(ROOT / "notebooks" / "01_first_look.ipynb", then="assert len(manifests) == 84 and airflow")
    for options, what in (
        ({"run_id": "none"}, "does not have that|returned no manifest"),
        ({"task_id": "none"}, "does not have that|returned no manifest"),
        ({"token": "abc"}, "does not take the token|lets? you read"),
        ({"base_url": "http://127.0.0.1:1"}, "does not answer"),
    ):
        with pytest.raises(ManifestError, match=what):
            load_manifests("notebook", **{**airflow, **options})
    for options in ({"base_url": "file:///etc"}, {"base_url": "ftp://h"}, {"token": "a\nb"}, {"token": ""}):
        with pytest.raises(InvalidOption):
            load_manifests("notebook", **{**airflow, **options})


def test_references_into_buckets_are_followed_by_the_users_own_settings(
    airflow, run_dag, pacs, archive, bucket, prefix, monkeypatch
):
    """The address names a connection, which no notebook knows."""
    with DAG("notebook_bucket") as dag:
        DicomGetOperator(
            task_id="get",
            dicom_conn_id="pacs",
            study=archive.private,
            destination=f"s3://store@{BUCKET}/{prefix}",
            manifest_xcom="reference",
        )
    assert run_dag(dag).state == "success"
    monkeypatch.delenv("AIRFLOW_CONN_STORE")
    keys = {"access_key": ACCESS_KEY, "secret_key": SECRET_KEY}
    assert len(load_manifests("notebook_bucket", **airflow, endpoint=bucket.endpoint, **keys)) == 12
    monkeypatch.setenv("AWS_ENDPOINT_URL", bucket.endpoint)
    # No credentials anywhere, and none of the machine's own.
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    for name in ("AWS_SHARED_CREDENTIALS_FILE", "AWS_CONFIG_FILE"):
        monkeypatch.setenv(name, os.devnull)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    with pytest.raises(ManifestError, match="no credentials were found") as caught:
        load_manifests("notebook_bucket", **airflow)
    assert "read with your own AWS settings" in str(caught.value)
    assert "AWS_ENDPOINT_URL" in str(caught.value)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", ACCESS_KEY)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET_KEY)
    assert len(load_manifests("notebook_bucket", **airflow)) == 12


@pytest.mark.parametrize("packed", ["", ".json.gz"])
@pytest.mark.parametrize("where", ["folder", "bucket"])
def test_what_the_object_storage_backend_moved_is_followed(
    airflow, run_dag, pacs, archive, bucket, prefix, tmp_path, monkeypatch, where, packed
):
    """As ``XComObjectStorageBackend`` of the provider ``common.io`` leaves it: XCom has but an address."""
    dag_id = f"moved_{where}{packed.replace('.', '_')}"
    with DAG(dag_id) as dag:
        DicomGetOperator(task_id="get", dicom_conn_id="pacs", study=archive.private, destination=str(tmp_path / "to"))

        @task
        def text():
            return "s3://elsewhere/no/get/file"

        text()
    run = run_dag(dag)
    content = json.dumps(run.raw_xcom("get")).encode()
    content = gzip.compress(content) if packed else content
    name = f"{dag_id}/{run.run_id}/get/{uuid4()}{packed}"
    if where == "folder":
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_bytes(content)
        address = f"file://{tmp_path}/{name}"
    else:
        monkeypatch.setenv("AWS_ENDPOINT_URL", bucket.endpoint)
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", ACCESS_KEY)
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET_KEY)
        Bucket(BUCKET, None).put(f"{prefix}/{name}", content)
        address = f"s3://aws_default@{BUCKET}/{prefix}/{name}"
    run.move_xcom("get", address)
    frame = load_manifests(dag_id, **airflow)
    assert (len(frame), set(frame["verdict"]), set(frame["task_id"])) == (12, {"complete"}, {"get"})
    for bad, what in (
        (address.replace("file://", "gs://").replace("s3://", "gs://"), "cannot be read here"),
        (address.removesuffix(packed) + ".lz4", "cannot be read here"),
        (address.replace(f"get/{name.rpartition('/')[2]}", f"get/none{packed}"), "cannot be read"),
    ):
        run.move_xcom("get", bad)
        with pytest.raises(ManifestError, match=what):
            load_manifests(dag_id, **airflow)


def test_an_overview_of_any_manifest(run_dag, pacs, archive, first_uid, tmp_path):
    pacs.fail = {first_uid}
    with DAG("overview") as dag:
        DicomGetOperator(
            task_id="get",
            dicom_conn_id="pacs",
            study=archive.many,
            destination=str(tmp_path / "held"),
            accept=("complete", "partial"),
        )
    run = run_dag(dag)
    frame = run.xcom("get")
    for manifest in (frame, run.xcom("get", "summary")["manifest_uri"], [frame, frame], frame[:0], frame[:1]):
        figure = overview(manifest)
        assert len(figure.axes) == 4
    figure = overview(frame)
    assert figure.get_suptitle().startswith("59 of 60 instances held, 1 study")
    figure.savefig(tmp_path / "overview.png")
    assert (tmp_path / "overview.png").stat().st_size > 10_000


def test_without_matplotlib_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"airflow-dicom-get\[notebook\]"):
        overview([])
