"""The task that hands a cohort on: what it writes, where it may, and what it refuses."""

from __future__ import annotations

import subprocess
from typing import Any

import pytest
from airflow.sdk import DAG

from airflow_dicom_get.operators.dicom import (
    DicomFindOperator,
    DicomGetOperator,
    DicomStoreOperator,
    DicomVerifyOperator,
)
from airflow_dicom_get.tasks import export_manifest, report
from airflow_dicom_get.testing.s3_servers import BUCKET


def chain(archive, destination, to, **options) -> DAG:
    with DAG("chain") as dag:
        get = DicomGetOperator.partial(task_id="get", destination=destination, dicom_conn_id="pacs").expand(
            study=[archive.many, archive.private]
        )
        export_manifest(get.output, "sha256sums", to, **options)
    return dag


def test_the_digests_of_two_mapped_retrievals(run_dag, pacs, archive, tmp_path):
    run = run_dag(chain(archive, str(tmp_path), f"{tmp_path}/SHA256SUMS-{{{{ dag.dag_id }}}}", check=True))
    assert run.state == "success"
    written = run.xcom("export_manifest")
    assert written["files"] == [f"{tmp_path}/SHA256SUMS-chain"]
    assert (written["verdict"], written["studies"], written["instances"]) == ("complete", 2, 72)
    checked = subprocess.run(
        ["sha256sum", "--check", "--strict", "SHA256SUMS-chain"], cwd=tmp_path, capture_output=True, text=True
    )
    assert (checked.returncode, len(checked.stdout.splitlines())) == (0, 72)


def test_an_export_of_a_bucket_into_it(run_dag, pacs, archive, bucket, prefix):
    place = f"s3://store@{BUCKET}/{prefix}"
    run = run_dag(chain(archive, place, f"{place}/SHA256SUMS", check=True))
    assert run.state == "success"
    assert run.xcom("export_manifest")["files"] == [f"{place}/SHA256SUMS"]
    assert len(bucket.read(f"{prefix}/SHA256SUMS").splitlines()) == 72


def test_it_writes_where_the_configuration_allows_it_alone(run_dag, pacs, archive, tmp_path, monkeypatch):
    monkeypatch.setenv("AIRFLOW__DICOM_GET__ALLOWED_DESTINATIONS", f"{tmp_path}/dicom/*")
    run = run_dag(chain(archive, f"{tmp_path}/dicom/a", f"{tmp_path}/elsewhere/SHA256SUMS"))
    assert (run.state, run.task("export_manifest").state) == ("failed", "failed")
    assert run.task("export_manifest").try_number == 1
    assert "is none of [dicom_get] allowed_destinations" in run.log
    assert not (tmp_path / "elsewhere").exists()


@pytest.mark.parametrize(
    ("to", "options", "message"),
    [
        ("sums", {}, "to: 'sums' is not an absolute path"),
        (f"s3://{BUCKET}/sums", {}, "names no connection"),
        ("{to}", {"options": {"namex": "x"}}, "namex is not an option. Did you mean name?"),
        ("{to}", {"options": {"mapping": "m.csv"}}, "mapping: 'm.csv' is not an absolute path"),
        ("{to}", {"accept": ["all"]}, "accept: 'all' is not allowed"),
    ],
)
def test_bad_input_fails_once(run_dag, pacs, archive, tmp_path, to, options, message):
    run = run_dag(chain(archive, str(tmp_path / "dicom"), to.format(to=tmp_path / "sums"), **options))
    assert run.task("export_manifest").state == "failed"
    assert message in run.log
    assert not (tmp_path / "sums").exists()


@pytest.mark.parametrize(("accept", "state"), [(["complete"], "failed"), (["partial"], "success")])
def test_what_is_missing_is_not_handed_on_unless_it_is_accepted(
    run_dag, pacs, archive, first_instance, tmp_path, accept, state
):
    pacs.fail = {str(first_instance.SOPInstanceUID)}
    with DAG("accept") as dag:
        get = DicomGetOperator(
            task_id="get",
            study=archive.many,
            destination=str(tmp_path),
            dicom_conn_id="pacs",
            accept=["partial"],
            engine_options={"retries": 0},
        )
        export_manifest(get.output, "series", f"{tmp_path}/series.csv", accept=accept)
    run = run_dag(dag)
    assert run.task("export_manifest").state == state
    assert (tmp_path / "series.csv").exists() == (state == "success")
    if state == "failed":
        assert "The verdict is partial, and nothing was written. 1 of 60 instances are missing" in run.log


def test_rendered_fields_show_no_row_of_a_manifest(run_dag, pacs, archive, tmp_path):
    """Neither those of a frame that is handed on, nor values that a search was asked to return."""
    with DAG("shown") as dag:
        find = DicomFindOperator(task_id="find", query={"StudyInstanceUID": archive.private}, dicom_conn_id="pacs",
                                 return_keys=("PatientName", "PatientID"))  # fmt: skip
        get = DicomGetOperator(task_id="get", study=archive.private, destination=str(tmp_path / "dicom"),
                               dicom_conn_id="pacs", tags=("PatientName", "PatientID"))  # fmt: skip
        export_manifest(get.output, "series", f"{tmp_path}/series.csv")
        export_manifest.partial(form="series").expand(manifests=[get.output], to=[f"{tmp_path}/mapped.csv"])
        both = DicomGetOperator.partial(task_id="both", destination=str(tmp_path / "dicom"), dicom_conn_id="pacs",
                                        tags=("PatientName",)).expand(study=find.output)  # fmt: skip
        found: Any = find.output  # a list, when it runs
        report(found, both.output["summary"], both.output)
    run = run_dag(dag)
    assert run.state == "success"
    named = run.xcom("get").iloc[0]
    assert run.rendered("export_manifest")["op_args"] == ["manifest of 12 rows", "series", f"{tmp_path}/series.csv"]
    assert run.rendered("export_manifest__1", 0)["op_kwargs"]["manifests"] == "manifest of 12 rows"
    assert run.rendered("report")["op_args"][2] == ["manifest of 12 rows"]
    shown = [run.rendered("report"), run.rendered("export_manifest"), run.rendered("export_manifest__1", 0)]
    assert not any(named[tag] in str(shown) for tag in ("PatientName", "PatientID"))


def test_a_manifest_that_a_template_renders_as_text_is_nowhere_shown(run_dag, pacs, archive, tmp_path):
    text = "{{ ti.xcom_pull('first') }}"
    with DAG("text") as dag:
        first = DicomGetOperator(task_id="first", study=archive.private, destination=str(tmp_path / "dicom"),
                                 dicom_conn_id="pacs", tags=("PatientName", "PatientID"))  # fmt: skip
        first >> [
            DicomStoreOperator(task_id="store", manifest=text, target_conn_id="pacs"),
            DicomVerifyOperator(task_id="verify", manifest=text),
            DicomGetOperator(task_id="get", manifest=text, destination=str(tmp_path / "again"), dicom_conn_id="pacs"),
            export_manifest(text, "series", f"{tmp_path}/series.csv"),
        ]
    run = run_dag(dag)
    named = run.xcom("first").iloc[0]
    for task_id in ("store", "verify", "get", "export_manifest"):
        task = run.task(task_id)
        assert (task.state, "***" in str(run.rendered(task_id))) == ("failed", True)
        shown = f"{run.rendered(task_id)} {task.rendered_map_index}"
        assert not any(named[tag] in shown for tag in ("PatientName", "PatientID"))
    assert not any(named[tag] in run.log for tag in ("PatientName", "PatientID"))
