"""Manifests of all sizes through XCom: what stands there, how large it is, and how long it takes."""

from __future__ import annotations

import json
import sqlite3
from contextlib import closing
from datetime import datetime

import pytest

from airflow_dicom_get.notebook import load_manifests
from tests.support.live_airflow import LiveAirflow

pytestmark = pytest.mark.timeout(600)

CASES = [
    # rows, manifest_xcom, what is returned
    (1_000, "auto", "frame"),
    (30_000, "auto", "frame"),
    (30_000, "reference", "reference"),
    (500_000, "auto", "reference"),
    (500_000, "full", "error"),
]
THRESHOLD = 262_144


@pytest.fixture(scope="module")
def objects(tmp_path_factory):
    return tmp_path_factory.mktemp("objects")


@pytest.fixture(scope="module", params=["database", "object storage"])
def backend(request, airflow, objects, tmp_path_factory, here):
    """Airflow with one of the two backends; its name is ``backend.kind``."""
    if "sqlite" not in airflow.environment["AIRFLOW__DATABASE__SQL_ALCHEMY_CONN"]:
        pytest.skip("what stands in the database is looked up in SQLite")
    if request.param == "database":
        airflow.kind = request.param
        yield airflow
        return
    environment = {
        "AIRFLOW__CORE__XCOM_BACKEND": "airflow.providers.common.io.xcom.backend.XComObjectStorageBackend",
        "AIRFLOW__COMMON_IO__XCOM_OBJECTSTORAGE_PATH": f"file://{objects}",
        "AIRFLOW__COMMON_IO__XCOM_OBJECTSTORAGE_THRESHOLD": str(THRESHOLD),
    }
    with LiveAirflow(tmp_path_factory.mktemp("backend"), dags=here / "dags", environment=environment) as live:
        live.make_pool("pacs", 2)
        live.kind = request.param  # type: ignore[attr-defined]
        yield live


def stored(airflow, run, key="return_value"):
    """The value as it stands in the database, as text."""
    with closing(sqlite3.connect(airflow.home.AIRFLOW_HOME / "airflow.db")) as database:
        tables = {name for (name,) in database.execute("select name from sqlite_master")}
        # In Airflow 3.4 it belongs to a try, in a table of another name.
        left = "xcom_v2 join task_instance on task_instance.id = task_instance_id" if "xcom_v2" in tables else "xcom"
        rows = database.execute(
            f"select value from {left} where dag_id = ? and run_id = ? and task_id = 'get' and key = ?",
            (run.dag_id, run.run_id, key),
        ).fetchall()
    return rows[0][0] if rows else None


@pytest.mark.parametrize(("rows", "mode", "kind"), CASES)
def test_a_manifest(backend, objects, tmp_path, record, rows, mode, kind):
    before = set(objects.rglob("*"))
    run = backend.trigger("live_manifest", destination=str(tmp_path / "out"), rows=rows, manifest_xcom=mode)
    assert run.wait(240) == ("failed" if kind == "error" else "success")
    summary = run.summary()
    assert (summary["verdict"], summary["manifest_rows"]) == ("complete", rows)
    assert summary["manifest_kind"] == ("inline" if kind == "frame" else "reference")
    value = stored(backend, run)
    written = [path.stat().st_size for path in set(objects.rglob("*")) - before if path.is_file()]
    figures = {"backend": backend.kind, "rows": rows, "mode": mode, "database": len(value), "objects": sum(written)}
    if kind == "error":
        log = run.log("get")
        assert f"The manifest of {rows} rows takes" in log
        assert "manifest_xcom_max_bytes is 10485760. Give manifest_xcom='auto'" in log
        assert run.task("get")["try_number"] == 1
    else:
        loaded = run.xcom("load")
        assert (loaded["rows"], loaded["uids"], loaded["kind"]) == (rows, rows, kind)
        task = run.task("get")
        push = datetime.fromisoformat(task["end_date"]).timestamp() - run.xcom("get", "returned_at")
        notebook = load_manifests("live_manifest", run_id=run.run_id, base_url=backend.address, token=backend.token())
        assert len(notebook) == rows
        figures |= {"push": round(push, 2), "pull": loaded["pull"], "load": loaded["load"]}
    if kind == "frame":
        moved = backend.kind == "object storage"
        assert bool(written) == moved
        assert ("pandas" in value) != moved
    else:
        assert not written
        reference = json.loads(value)
        assert set(reference) >= {"kind", "schema", "manifest_uri", "rows", "bytes", "sha256", "verdict"}
        assert len(value) < 1_000
    page = backend.answer("GET", f"/dicom-get{run.path.replace('dagRuns', 'runs')}/tasks/get/-1")
    assert page.status_code == 200
    assert "cannot be shown here" not in page.text
    record(**figures, page=round(page.elapsed.total_seconds(), 2))
