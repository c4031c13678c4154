"""What the DAGs of the repository do where something is wrong: what the user reads, and how the run ends."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

import pytest

from airflow_dicom_get.testing.s3_servers import BUCKET

pytestmark = pytest.mark.usefixtures("dag_connections")

INTO_BUCKET = ("nightly_to_s3", "retrieve_then_forward")
BY_DAY = (*INTO_BUCKET, "relay_pacs_to_pacs", "retrieve_studies")


@pytest.fixture
def params(tmp_path, prefix):
    """Params of a run that would go well."""

    def make(name: str, **more) -> dict:
        given = {"study_date": "2024-01-15"}
        given |= {"bucket": f"{BUCKET}/{prefix}"} if name in INTO_BUCKET else {}
        given |= {"destination": str(tmp_path)} if name == "retrieve_studies" else {}
        return given | more

    return make


@pytest.fixture
def load(load_dag):
    """Load a DAG whose tries follow at once; two of them are enough to tell."""

    def make(name: str):
        dag = load_dag(name)
        dag.deadline = None
        for task in dag.tasks:
            settings = task.partial_kwargs if hasattr(task, "partial_kwargs") else vars(task)
            settings["retries"], settings["retry_delay"] = 1, timedelta(0)
        return dag

    return make


@pytest.mark.parametrize("name", BY_DAY)
def test_a_pacs_that_is_down_is_tried_again_and_named(run_dag, load, pacs, params, name):
    pacs.__exit__(None, None, None)
    run = run_dag(load(name), run_conf=params(name))
    assert run.state == "failed"
    assert (run.task("find").state, run.task("find").try_number) == ("failed", 2)
    assert f"No connection to PACS@127.0.0.1:{pacs.port}: Connection refused. Check the host and the port" in run.log


def test_a_pacs_that_is_down_when_a_list_is_looked_up(run_dag, load, pacs, tmp_path):
    pacs.__exit__(None, None, None)
    path = tmp_path / "cohort.csv"
    path.write_text("Cohort,StudyInstanceUID\na,1.2.3\n")
    run = run_dag(load("cohort_from_csv"), run_conf={"csv": str(path), "destination": str(tmp_path)})
    assert run.state == "failed"
    assert (run.task("find").state, run.task("find").try_number) == ("failed", 2)
    assert "Connection refused" in run.log


@pytest.mark.parametrize("name", INTO_BUCKET)
def test_a_bucket_that_is_missing_is_named_and_not_tried_again(run_dag, load, params, name):
    run = run_dag(load(name), run_conf=params(name, bucket="nosuchbucket/studies"))
    assert run.state == "failed"
    assert (run.task("get", 0).state, run.task("get", 0).try_number) == ("failed", 1)
    errors = [line for line in run.log.splitlines() if line.startswith("airflow.sdk.exceptions.AirflowFailException")]
    assert "Check the bucket's name, the endpoint and the region; the bucket is not created automatically." in errors[0]
    assert "on s3://nosuchbucket/studies/_manifests/ failed: NoSuchBucket (HTTP 404)" in run.log


@pytest.mark.parametrize("name", INTO_BUCKET)
def test_without_the_connection_of_the_bucket_the_log_says_how_to_make_it(run_dag, load, params, monkeypatch, name):
    monkeypatch.delenv("AIRFLOW_CONN_DICOM_S3_DEFAULT")
    run = run_dag(load(name), run_conf=params(name))
    assert run.state == "failed"
    assert (run.task("get", 0).state, run.task("get", 0).try_number) == ("failed", 2)
    assert "`dicom_s3_default` isn't defined" in run.log
    assert "Create it under Admin, Connections, with the type DICOM storage (S3)." in run.log


def test_without_the_connection_of_the_pacs_the_log_says_how_to_make_it(run_dag, load, params, monkeypatch):
    monkeypatch.delenv("AIRFLOW_CONN_DICOM_DEFAULT")
    run = run_dag(load("retrieve_studies"), run_conf=params("retrieve_studies"))
    assert run.state == "failed"
    assert (run.task("find").state, run.task("find").try_number) == ("failed", 2)
    assert "Create it under Admin, Connections, with the type DICOM (PACS)." in run.log


@pytest.mark.parametrize("name", ["retrieve_then_forward", "relay_pacs_to_pacs"])
def test_an_empty_day_is_a_success(run_dag, load, params, name):
    run = run_dag(load(name), run_conf=params(name, study_date="1999-12-31"))
    assert run.state == "success"
    assert {task.task_id for task in load(name).tasks if run.task(task.task_id).state != "skipped"} == {"find"}


def test_a_task_that_ended_without_a_word_is_missed(run_dag, load, params, monkeypatch):
    """As after a kill: neither summary nor manifest of one of the tasks."""
    from airflow_dicom_get.operators.dicom import DicomGetOperator

    execute = DicomGetOperator.execute

    def killed(self, context):
        if context["ti"].map_index == 0:
            raise MemoryError
        return execute(self, context)

    monkeypatch.setattr(DicomGetOperator, "execute", killed)
    run = run_dag(load("retrieve_studies"), run_conf=params("retrieve_studies"))
    assert run.state == "failed"
    assert (run.task("report").state, run.task("report").try_number) == ("failed", 1)
    assert "1 task left no summary; its log says why. Clear the failed tasks to resume" in run.log


def test_what_the_other_pacs_does_not_list_fails_the_relay(run_dag, load, params, target, monkeypatch):
    """All was acknowledged, so the report is content; but the run is not."""
    from airflow.sdk.exceptions import AirflowFailException

    from airflow_dicom_get.operators.dicom import DicomVerifyOperator

    def differs(self, context):
        raise AirflowFailException("60 differences")

    monkeypatch.setattr(DicomVerifyOperator, "execute", differs)
    run = run_dag(load("relay_pacs_to_pacs"), run_conf=params("relay_pacs_to_pacs"))
    assert run.task("report").state == "success"
    assert run.state == "failed"


def test_there_is_no_night_to_analyse(run_dag, load, tmp_path):
    from airflow import settings
    from airflow.models.asset import AssetEvent  # noqa: TID251

    with settings.get_session()() as session:
        session.query(AssetEvent).delete()
        session.commit()
    run = run_dag(load("analyse_manifest"), run_conf={"folder": str(tmp_path)})
    assert run.state == "failed"
    assert (run.task("choose").state, run.task("choose").try_number) == ("failed", 1)
    assert "Run nightly_to_s3 first." in run.log


@pytest.fixture
def announce(run_dag):
    """An event of the asset of the nights, about a manifest."""
    from airflow.sdk import DAG, Asset, task

    night = Asset("dicom_night")

    def tell(uri: str, rows: int = 1, sha256: str = "") -> None:
        extra = {"kind": "dicom-manifest", "schema": 1, "manifest_uri": uri, "rows": rows, "sha256": sha256}
        with DAG("announce") as dag:

            @task(outlets=[night])
            def event(outlet_events=None):
                outlet_events[night].extra = extra

            event()
        assert run_dag(dag).state == "success"

    return tell


def test_the_manifest_to_analyse_is_missing(run_dag, load, announce, prefix, tmp_path):
    conf = {"folder": str(tmp_path), "manifest": f"s3://dicom_s3_default@{BUCKET}/{prefix}/_nights/no-such.parquet"}
    announce(conf["manifest"])
    run = run_dag(load("analyse_manifest"), run_conf=conf)
    assert run.state == "failed"
    assert (run.task("analyse").state, run.task("analyse").try_number) == ("failed", 1)
    assert "/_nights/no-such.parquet' cannot be read." in run.log


def test_the_folder_of_the_report_is_none(run_dag, load, announce, moto, prefix, tmp_path):
    from tests.support.references import reference

    (tmp_path / "file").write_text("")
    pacs = load("retrieve_studies")
    run = run_dag(pacs, run_conf={"study_date": "2024-01-15", "destination": str(tmp_path / "out")})
    found = reference(run.xcom("report")["manifests"][0])
    content = Path(found["manifest_uri"].removeprefix("file://")).read_bytes()
    moto.client().put_object(Bucket=BUCKET, Key=f"{prefix}/_nights/of-a-night.parquet", Body=content)
    manifest = f"s3://dicom_s3_default@{BUCKET}/{prefix}/_nights/of-a-night.parquet"
    announce(manifest, found["rows"], found["sha256"])
    run = run_dag(load("analyse_manifest"), run_conf={"folder": str(tmp_path / "file" / "x"), "manifest": manifest})
    assert run.state == "failed"
    assert (run.task("analyse").state, run.task("analyse").try_number) == ("failed", 1)
    assert "cannot be written: Not a directory. Give another folder in the params" in run.log
