"""The DAG of the repository, as a user runs it."""

from __future__ import annotations

import logging
import re
from pathlib import Path

import pytest
from airflow.sdk.exceptions import AirflowFailException

from airflow_dicom_get.manifest.frames import frame_of
from airflow_dicom_get.manifest.schema import manifest_table
from airflow_dicom_get.tasks import report
from airflow_dicom_get.testing.servers import free_port


@pytest.fixture
def dag(load_dag):
    return load_dag("retrieve_studies")


@pytest.fixture
def default_connection(pacs, monkeypatch):
    monkeypatch.setenv("AIRFLOW_CONN_DICOM_DEFAULT", f"dicom://PACS@127.0.0.1:{pacs.port}")


@pytest.mark.usefixtures("default_connection")
def test_a_day_is_retrieved_and_reported(run_dag, dag, archive, tmp_path, caplog):
    run = run_dag(dag, run_conf={"destination": str(tmp_path)})
    assert run.state == "success"
    report = run.xcom("report")
    assert (report["verdicts"], report["studies"], report["series"], report["instances"]) == ({"complete": 2}, 2, 6, 72)
    assert len(report["manifests"]) == 2
    assert sum(1 for _ in tmp_path.glob("[0-9]*/*/*.dcm")) == 72
    # Nothing for a reader of the log to wonder at: no XCom asked for in vain, no pool that is missing.
    assert not re.search(r"\[(warning|error) *\]|Traceback", run.log)
    assert [record.message for record in caplog.records if record.levelno > logging.INFO] == []


@pytest.mark.usefixtures("default_connection")
def test_an_empty_day_is_a_success_without_a_report(run_dag, dag, tmp_path):
    run = run_dag(dag, run_conf={"destination": str(tmp_path), "study_date": "19991231"})
    assert run.state == "success"
    assert run.xcom("find") == []
    assert run.task("report").state == "skipped"


@pytest.mark.usefixtures("default_connection")
def test_a_run_with_a_study_that_is_not_whole_fails_and_says_so(run_dag, dag, pacs, archive, tmp_path):
    for name in ("get", "find"):
        dag.task_dict[name].retries = 0
    pacs.fail = set(_uids(archive.folder / "many")[:5])
    run = run_dag(dag, run_conf={"destination": str(tmp_path)})
    assert run.state == "failed"
    assert sorted(run.task("get", index).state for index in range(2)) == ["failed", "success"]
    assert run.task("report").state == "failed"
    assert "67 of 72 instances of 2 studies are held (1 partial, 1 complete)." in run.log
    assert "Reasons of the others: 5 sub_operation_failed." in run.log


def test_a_failing_task_says_why_in_a_line_of_its_own(run_dag, dag, tmp_path, monkeypatch, caplog):
    dag.task_dict["find"].retries = 0
    monkeypatch.setenv("AIRFLOW_CONN_DICOM_DEFAULT", f"dicom://PACS@127.0.0.1:{free_port()}")
    run = run_dag(dag, run_conf={"destination": str(tmp_path)})
    assert run.state == "failed"
    # Logged before it is raised, and so before the tracebacks that Airflow writes of what was raised.
    (said,) = [record.message for record in caplog.records if record.levelno == logging.ERROR]
    assert said.startswith("No connection to PACS@127.0.0.1:")
    assert said.endswith("Check the host and the port, and that the node is running.")
    assert run.log.count("Traceback") == 2


def _uids(folder: Path) -> list[str]:
    from pydicom import dcmread

    return [str(dcmread(path, stop_before_pixels=True).SOPInstanceUID) for path in sorted(folder.iterdir())]


def test_two_groups_stand_in_one_dag():
    from airflow.sdk import DAG

    from airflow_dicom_get.operators.dicom import DicomVerifyOperator
    from airflow_dicom_get.tasks import retrieve

    with DAG("two_groups") as dag:
        manifests = retrieve("/data/dicom", study_date="today-1", modalities="CT")
        retrieve.override(group_id="mr", prefix_group_id=True, default_args={"pool": "pacs"})(
            "/data/dicom", study_date="today-1", modalities="MR", at_once=1
        )
        DicomVerifyOperator.partial(task_id="verify").expand(manifest=manifests)
    assert sorted(dag.task_ids) == ["find", "get", "mr.find", "mr.get", "mr.report", "report", "verify"]
    assert dag.task_dict["get"].downstream_task_ids == {"report", "verify"}
    assert [dag.task_dict[name].pool for name in ("find", "mr.find", "mr.get")] == ["default_pool", "pacs", "pacs"]
    assert [dag.task_dict[name].max_active_tis_per_dag for name in ("get", "mr.get")] == [2, 1]


def test_a_report_is_of_each_verdict_and_not_of_the_worst_alone():
    empty = frame_of(manifest_table([], source="", destination=""))
    verdicts = ["partial", "unverified", "empty", "complete"]
    summaries = [{"verdict": verdict, "manifest_uri": None} for verdict in verdicts]
    with pytest.raises(AirflowFailException, match="1 unverified, 1 empty"):
        report.function(verdicts, summaries, [empty] * 4, ("complete", "partial"))
    assert report.function(verdicts, summaries, [empty] * 4, verdicts)["verdict"] == "partial"
