"""The DAGs that are told which studies: by a list, or by their UID as they come."""

from __future__ import annotations

import os
from datetime import timedelta

import pandas as pd
import pytest
from airflow.sdk.exceptions import ParamValidationError

pytestmark = pytest.mark.usefixtures("dag_connections")


@pytest.fixture
def cohort(tmp_path, archive):
    """Write a list, and give the params of a run over it."""

    def make(text: str, **params) -> dict:
        path = tmp_path / "cohort.csv"
        path.write_text(text.format(many=archive.many, private=archive.private), "utf-8")
        return {"csv": str(path), "destination": str(tmp_path / "out"), **params}

    return make


def test_the_manifest_of_a_list_has_its_labels(run_dag, load_dag, cohort, archive, first_instance, patient):
    from airflow_dicom_get import load_manifest

    accession = str(first_instance.AccessionNumber)
    assert accession
    run = run_dag(load_dag("cohort_from_csv"), run_conf=cohort(f"Arm;AccessionNumber\nP-01;{accession}\n", label="Arm"))
    assert run.state == "success"
    frame = load_manifest(run.xcom("label"))
    labels = dict(zip(frame["study_instance_uid"], frame["cohort"], strict=True))
    assert set(labels.values()) == {"P-01"}
    assert archive.many in labels
    assert (run.xcom("label")["verdict"], run.xcom("report")["verdict"]) == ("complete", "complete")
    exported = run.xcom("export")
    assert (exported["verdict"], exported["instances"], exported["missing"]) == ("complete", len(frame), 0)
    series = pd.read_csv(exported["to"])
    assert set(series["cohort"]) == {"P-01"}
    assert series["instanceCount"].sum() == len(frame)
    assert "P-01" in run.task("get", 0).rendered_map_index
    assert not any(word in run.log for word in (accession, *patient))


def test_a_cohort_is_not_exported_without_a_study_that_left_no_manifest(run_dag, load_dag, cohort, lost_task):
    dag = load_dag("cohort_from_csv")
    lost_task(dag, 1)
    run = run_dag(dag, run_conf=cohort("Cohort,StudyInstanceUID\ncase,{many}\ncontrol,{private}\n"))
    assert run.xcom("label")["verdict"] == "unverified"
    assert (run.state, run.task("label").state, run.task("export").state) == ("failed", "success", "failed")


def test_two_labels_of_a_list_of_uids(run_dag, load_dag, cohort, archive):
    from airflow_dicom_get import load_manifest

    text = "Cohort,StudyInstanceUID\ncase,{many}\ncontrol,{private}\n"
    run = run_dag(load_dag("cohort_from_csv"), run_conf=cohort(text))
    assert run.state == "success"
    frame = load_manifest(run.xcom("label"))
    assert frame.groupby("cohort").size().to_dict() == {"case": 60, "control": 12}


BAD = {
    "no UID": (
        "Cohort,StudyInstanceUID\na,{many}\nb,1.2.x\n",
        "line 3, column StudyInstanceUID: '1.2.x' is not a valid UID.",
    ),
    "no label": ("Cohort,StudyInstanceUID\na,{many}\n,{private}\n", "line 3, column Cohort is empty."),
    "no column": ("Arm,StudyInstanceUID\na,{many}\n", "has no column Cohort. Name it in the header line of the file."),
    "nothing": ("Cohort,StudyInstanceUID\n", "lists no studies. Give a value in the column StudyInstanceUID."),
}


@pytest.mark.parametrize("what", BAD)
def test_a_bad_row_ends_it_before_any_traffic(run_dag, load_dag, cohort, pacs, what):
    text, message = BAD[what]
    run = run_dag(load_dag("cohort_from_csv"), run_conf=cohort(text))
    assert run.state == "failed"
    assert (run.task("find").state, run.task("find").try_number) == ("failed", 1)
    assert message in run.log
    assert pacs.total_associations == 0


@pytest.mark.parametrize("label", ["AccessionNumber", "PatientName"])
def test_no_column_of_patients_gives_the_labels(run_dag, load_dag, cohort, pacs, database_rows, label):
    """Also where the environment says that it may."""
    text = "Cohort,AccessionNumber,PatientName\na,SECRET-1,SECRET^JANE\n"
    run = run_dag(load_dag("cohort_from_csv"), run_conf=cohort(text, label=label))
    assert (run.state, run.task("find").state, run.task("find").try_number) == ("failed", "failed", 1)
    assert f"column {label!r}, cannot give the labels: it tells who a patient is." in run.log
    assert "SECRET" not in run.log + database_rows(run)
    assert pacs.total_associations == 0


def test_whoever_triggers_names_no_other_column(load_dag, monkeypatch):
    assert load_dag("cohort_from_csv").params["label"] == "Cohort"
    with pytest.raises(ParamValidationError, match="is not one of"):
        load_dag("cohort_from_csv").params.get_param("label").resolve("Remark")
    monkeypatch.delenv("DICOM_LABELS")
    assert load_dag("cohort_from_csv").params.get_param("label").schema["enum"] == ["Cohort"]


@pytest.mark.parametrize("how", ["another folder", "dots", "a link", "a FIFO", "a device"])
def test_no_other_file_of_the_worker_is_read(run_dag, load_dag, cohort, tmp_path, monkeypatch, pacs, how):
    params = cohort("Cohort,StudyInstanceUID\nsecret-label,{private}\n")
    dag = load_dag("cohort_from_csv")
    lists = tmp_path / "lists"
    lists.mkdir()
    monkeypatch.setitem(dag.task_dict["find"].python_callable.__globals__, "LISTS", [str(lists)])
    match how:
        case "dots":
            params["csv"] = f"{lists}/../cohort.csv"
        case "a link":
            (lists / "link").symlink_to(tmp_path)
            params["csv"] = f"{lists}/link/cohort.csv"
        case "a FIFO":
            os.mkfifo(lists / "fifo")
            params["csv"] = f"{lists}/fifo"
        case "a device":
            params["csv"] = "/dev/zero"
    run = run_dag(dag, run_conf=params)
    assert (run.state, run.task("find").state, run.task("find").try_number) == ("failed", "failed", 1)
    assert "lies in none of the folders of lists" in run.log or "cannot be read" in run.log
    assert pacs.total_associations == 0


@pytest.mark.parametrize(("unknown", "state"), [("fail", "failed"), ("skip", "success")])
def test_a_row_that_the_pacs_does_not_know(run_dag, load_dag, cohort, caplog, unknown, state):
    text = "Cohort,StudyInstanceUID\na,{private}\nb,1.2.3\n"
    run = run_dag(load_dag("cohort_from_csv"), run_conf=cohort(text, unknown=unknown))
    assert run.state == state
    assert "the PACS has no study for column StudyInstanceUID of line 3." in run.log + caplog.text
    assert run.task("find").try_number == 1
    if state == "success":
        assert run.xcom("report")["instances"] == 12


def test_a_study_is_retrieved_once_it_has_come_and_settled(run_dag, load_dag, archive, tmp_path):
    dag = load_dag("on_new_study")
    arrived = dag.task_dict["arrived"]
    assert (arrived.deferrable, arrived.settled_for, arrived.poke_interval) == (True, timedelta(minutes=10), 60)
    arrived.settled_for, arrived.poke_interval = timedelta(seconds=1), 0.5
    run = run_dag(dag, run_conf={"study": archive.private, "destination": str(tmp_path)})
    assert run.state == "success"
    assert "Pausing task as DEFERRED" in run.log
    assert run.xcom("get", "summary")["completed"] == 12
    assert sum(1 for _ in tmp_path.glob("[0-9]*/*/*.dcm")) == 12


def test_a_study_that_does_not_come_fails_once(run_dag, load_dag, tmp_path):
    dag = load_dag("on_new_study")
    arrived = dag.task_dict["arrived"]
    arrived.deferrable, arrived.timeout, arrived.poke_interval = False, 0.5, 0.3
    run = run_dag(dag, run_conf={"study": "1.2.3", "destination": str(tmp_path)})
    assert run.state == "failed"
    assert (run.task("arrived").state, run.task("arrived").try_number) == ("failed", 1)
    assert run.task("get").state == "upstream_failed"
    assert "Sensor has timed out" in run.log
