"""Rows that contradict what was asked for, in find, sensor, cohort and get, at PACS that answer more than that."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest
from airflow.sdk import DAG, task

from airflow_dicom_get.operators.dicom import DicomFindOperator, DicomGetOperator
from airflow_dicom_get.sensors.dicom import DicomStudySensor
from airflow_dicom_get.testing.misbehave import MisbehavingPacs

ASKED = {"AccessionNumber": "HOSTILE-ACC"}


def the_dag(folder) -> DAG:
    (folder / "list.csv").write_text("Cohort,AccessionNumber\na,HOSTILE-ACC\nb,hostile-acc\n")
    at_once: dict[str, Any] = {"settled_for": timedelta(0), "poke_interval": 0.2, "timeout": 20}
    with DAG("matching") as dag:
        DicomFindOperator(task_id="find", query=ASKED, dicom_conn_id="lying")
        DicomFindOperator(task_id="date", study_date="20240131", modalities="CT", dicom_conn_id="lying")
        DicomStudySensor(task_id="wait", query=ASKED, dicom_conn_id="lying", **at_once)
        DicomGetOperator(task_id="get", query=ASKED, destination=str(folder / "out"), dicom_conn_id="lying")

        @task
        def cohort():
            from airflow_dicom_get.tasks import find_cohort

            path = str(folder / "list.csv")
            return find_cohort(path, label="Cohort", unknown="skip", dicom_conn_id="lying")

        cohort()
    return dag


@pytest.fixture
def lying(monkeypatch):
    def start(mode: str) -> MisbehavingPacs:
        pacs = MisbehavingPacs(mode)
        monkeypatch.setenv("AIRFLOW_CONN_LYING", f"dicom://PACS@127.0.0.1:{pacs.port}")
        return pacs

    return start


@pytest.mark.parametrize("mode", ["find_prefix", "find_ignores_keys"])
def test_no_study_of_another_patient(run_dag, tmp_path, lying, mode):
    with lying(mode) as pacs:
        run = run_dag(the_dag(tmp_path))
    assert run.state == "success"
    study = pacs.study_uid
    for name in ("find", "wait"):
        assert [item["study_instance_uid"] for item in run.xcom(name)] == [study]
    # The study of the same day of another patient is what was asked for here.
    assert (study in [item["study_instance_uid"] for item in run.xcom("date")], len(run.xcom("date"))) == (True, 2)
    assert [[item["study_instance_uid"] for item in shard] for shard in run.xcom("cohort")] == [[study]]
    assert {path.parent.parent.name for path in (tmp_path / "out").rglob("*.dcm")} == {study}
    assert "AccessionNumber does not match the query" in run.log
    assert "HOSTILE" not in run.log.upper().replace("HOSTILE-ACC,", "")


@pytest.mark.parametrize("mode", ["find_leaves_keys_out", "find_empties_keys"])
def test_a_key_that_the_pacs_does_not_know_fails_for_good(run_dag, tmp_path, lying, mode):
    with lying(mode):
        run = run_dag(the_dag(tmp_path))
    assert {name: run.task(name).state for name in ("find", "wait", "get", "cohort")} == dict.fromkeys(
        ("find", "wait", "get", "cohort"), "failed"
    )
    assert run.log.count("does not support the key AccessionNumber at STUDY level") >= 4
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").rglob("*.dcm"))


def test_an_answer_that_may_be_cut_ends_in_no_success_but_the_sensors(run_dag, tmp_path, monkeypatch):
    """A connection that says that the PACS cuts its answers after one row, which is all that there is."""
    with MisbehavingPacs("no_counts") as pacs:
        monkeypatch.setenv("AIRFLOW_CONN_LYING", f"dicom://PACS@127.0.0.1:{pacs.port}/?list_limit=1")
        run = run_dag(the_dag(tmp_path))
    states = {name: run.task(name).state for name in ("find", "date", "wait", "get", "cohort")}
    assert states == dict.fromkeys(states, "failed") | {"wait": "success"}
    assert run.xcom("get", "summary")["verdict"] == "unverified"
    assert run.xcom("get", "summary")["reason"] == "list_may_be_cut"
    assert run.log.count("Set `list_limit` to 0") >= 4
    assert [item["study_instance_uid"] for item in run.xcom("wait")] == [pacs.study_uid]
