"""Values that a PACS puts where they do not belong: in no log of a task."""

from __future__ import annotations

from datetime import timedelta

from airflow.sdk import DAG

from airflow_dicom_get.operators.dicom import DicomFindOperator, DicomGetOperator, DicomVerifyOperator
from airflow_dicom_get.sensors.dicom import DicomStudySensor
from airflow_dicom_get.testing.misbehave import MisbehavingPacs


def test_no_name_gets_into_a_log(run_dag, tmp_path, monkeypatch):
    with MisbehavingPacs("odd_values") as pacs, DAG("odd_values") as dag:
        monkeypatch.setenv("AIRFLOW_CONN_DICOM_DEFAULT", f"dicom://PACS@127.0.0.1:{pacs.port}")
        keys = ["SeriesNumber", "Modality", "PatientBirthDate"]
        query = {"StudyInstanceUID": pacs.study_uid}
        for level in ("STUDY", "SERIES"):
            DicomFindOperator(task_id=f"find_{level}", query=query, level=level, return_keys=keys)
        DicomStudySensor(
            task_id="wait",
            study=pacs.study_uid,
            deferrable=True,
            settled_for=timedelta(0),
            poke_interval=0.2,
            timeout=20,
        )
        get = DicomGetOperator(
            task_id="get", study=pacs.study_uid, destination=str(tmp_path), tags=["SeriesNumber", "StudyDate"]
        )
        get >> DicomVerifyOperator(task_id="verify", study=pacs.study_uid, destination=str(tmp_path))
        run = run_dag(dag)
    assert run.state == "success"
    assert run.xcom("get", "summary")["verdict"] == "complete"
    assert "HOSTILE^" not in run.log
    assert "pydicom" not in run.log
