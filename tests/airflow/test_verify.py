"""DicomVerifyOperator in DAG runs: what is listed, what is there, and what a PACS says."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from airflow.sdk import DAG, task
from pydicom import dcmread

from airflow_dicom_get import load_manifest
from airflow_dicom_get.operators import dicom as operators
from airflow_dicom_get.operators.dicom import DicomGetOperator, DicomVerifyOperator
from airflow_dicom_get.testing.s3_servers import BUCKET
from airflow_dicom_get.verify import _Verify

AT_ONCE = {"retries": 2, "retry_delay": timedelta(0)}
COLUMNS = ["study_instance_uid", "series_instance_uid", "sop_instance_uid", "symbol", "what"]


def get(**options) -> DicomGetOperator:
    return DicomGetOperator(**{"task_id": "get", "dicom_conn_id": "pacs", **options})


def verify(**options) -> DicomVerifyOperator:
    return DicomVerifyOperator(**{"task_id": "verify", **options})


def test_what_is_the_same_is_a_success_and_an_empty_frame(run_dag, pacs, archive, tmp_path, database_rows, patient):
    with DAG("same") as dag:
        first = get(study=[archive.many, archive.private], destination=str(tmp_path))
        alone = verify(manifest=first.output)
        listed = verify(task_id="listed", manifest=first.output, dicom_conn_id="pacs", quick=True)
        place = verify(task_id="place", study=archive.many, destination=str(tmp_path), dicom_conn_id="pacs")
        first >> alone >> listed >> place
    run = run_dag(dag)
    assert run.state == "success"
    for name, number in (("verify", 72), ("listed", 72), ("place", 60)):
        frame, summary = run.xcom(name), run.xcom(name, "summary")
        assert isinstance(frame, pd.DataFrame)
        assert (list(frame.columns), len(frame)) == (COLUMNS, 0)
        assert (summary["schema"], summary["verdict"], summary["completed"]) == (1, "complete", number)
        assert summary["symbols"] == {"=": number}
    assert run.xcom("verify", "summary")["source"] is None
    assert run.xcom("listed", "summary")["plan_at"] is not None
    assert load_manifest(run.xcom("place", "summary")["manifest_uri"])["state"].tolist() == ["held"] * 60
    assert run.rendered("verify")["manifest"] == "manifest of 72 rows"
    database = database_rows(run)
    assert not any(word in run.log or word.encode().hex() in database.lower() for word in patient)


def test_of_an_item_with_series_these_are_compared(run_dag, pacs, archive, tmp_path):
    """What was retrieved by it is the same, and so is what the next get by it would have to fetch."""
    series = sorted({str(dcmread(path).SeriesInstanceUID) for path in (archive.folder / "many").glob("*.dcm")})
    item = {"study_instance_uid": archive.many, "series_instance_uids": series[:2]}
    with DAG("parts") as dag:
        first = get(study=item, destination=str(tmp_path))
        part = verify(task_id="part", study=[item], destination=str(tmp_path), dicom_conn_id="pacs")
        ours = verify(task_id="ours", study=item, destination=str(tmp_path))
        both = verify(task_id="both", manifest=first.output, study=item, dicom_conn_id="pacs")
        whole = verify(task_id="whole", study=archive.many, destination=str(tmp_path), dicom_conn_id="pacs",
                       fail_on_difference=False)  # fmt: skip
        other = verify(task_id="other", study={**item, "series_instance_uids": series[2:]}, manifest=first.output,
                       dicom_conn_id="pacs", fail_on_difference=False)  # fmt: skip
        rest = get(task_id="rest", study=archive.many, destination=str(tmp_path))
        again = verify(task_id="again", study=item, destination=str(tmp_path), dicom_conn_id="pacs")
        first >> [part, ours, both, whole, other] >> rest >> again
    run = run_dag(dag)
    assert run.state == "success"
    for name in ("part", "ours", "both", "again"):
        assert run.xcom(name, "summary")["symbols"] == {"=": 40}, name
    assert run.xcom("whole", "summary")["symbols"] == {"=": 40, "+": 20}
    assert run.xcom("other", "summary")["symbols"] == {"+": 20}


def test_each_difference_is_named_and_the_next_get_mends_them(run_dag, pacs, archive, tmp_path):
    with DAG("spoilt", default_args=AT_ONCE) as dag:
        first = get(study=archive.many, destination=str(tmp_path))

        @task
        def spoil(frame):
            paths = [Path(uri.removeprefix("file://")) for uri in sorted(frame["uri"])]
            paths[0].unlink()
            paths[1].write_bytes(paths[1].read_bytes()[:-2])
            return [path.stem for path in paths[:2]]

        spoilt = spoil(first.output)
        fails = verify(manifest=first.output)
        tells = verify(task_id="tells", study=archive.many, destination=str(tmp_path), fail_on_difference=False,
                       manifest=first.output)  # fmt: skip
        mend = get(task_id="mend", manifest="{{ ti.xcom_pull('tells', key='summary').manifest_uri }}",
                   destination=str(tmp_path), engine_options={"verify_held": "digest"})  # fmt: skip
        spoilt >> [fails, tells]
        tells >> mend
    run = run_dag(dag)
    assert (run.task("verify").state, run.task("verify").try_number) == ("failed", 1)
    gone, changed = run.xcom("spoil")
    for name in ("verify", "tells"):
        frame = run.xcom(name)
        symbols = dict(zip(frame["sop_instance_uid"], frame["symbol"], strict=True))
        assert symbols == {gone: "+", changed: "*"}
        summary = run.xcom(name, "summary")
        assert (summary["verdict"], summary["completed"], summary["failed"]) == ("partial", 58, 2)
    assert (run.task("tells").state, run.task("mend").state) == ("success", "success")
    assert run.xcom("mend", "summary")["skipped"] == 58
    assert sum(pacs.sent.values()) == 62


def test_a_bucket_and_another_node_are_verified(run_dag, pacs, archive, target, bucket, prefix, tmp_path, monkeypatch):
    monkeypatch.setenv("AIRFLOW__DICOM_GET__MANIFEST_ROOT", f"s3://store@{BUCKET}/{prefix}/root")
    place = f"s3://store@{BUCKET}/{prefix}"
    with DAG("places") as dag:
        first = get(study=archive.private, destination=place, manifest_xcom="reference")
        relay = get(task_id="relay", study=archive.private, destination="dicom://archive")
        there = verify(task_id="there", manifest=first.output, dicom_conn_id="pacs")
        listed = verify(task_id="listed", study=archive.private, destination=place, dicom_conn_id="pacs")
        node = verify(task_id="node", manifest=relay.output, destination="dicom://archive")
        both = verify(task_id="both", study=archive.private, destination="dicom://archive", dicom_conn_id="pacs")
        first >> relay >> there >> listed >> node >> both
    run = run_dag(dag)
    assert run.state == "success"
    for name in ("there", "listed", "node", "both"):
        assert run.xcom(name, "summary")["symbols"] == {"=": 12}, name
    assert len(load_manifest(run.xcom("listed", "summary")["manifest_uri"])) == 12


def test_a_pacs_that_cannot_be_asked_is_tried_again(run_dag, pacs, archive, tmp_path, monkeypatch):
    monkeypatch.setenv("AIRFLOW_CONN_DOWN", "dicom://X@127.0.0.1:1")
    with DAG("mute_pacs", default_args={"retries": 1, "retry_delay": timedelta(0)}) as dag:
        first = get(study=archive.private, destination=str(tmp_path))
        verify(manifest=first.output, dicom_conn_id="down")
    run = run_dag(dag)
    assert (run.task("verify").state, run.task("verify").try_number) == ("failed", 2)
    assert run.xcom("verify", "summary")["verdict"] == "unverified"
    assert len(run.xcom("verify")) == 0


@pytest.mark.parametrize("when", ["while it compares", "while it reads its manifest"])
def test_a_task_that_is_ended_reads_no_more_and_is_tried_again(run_dag, pacs, archive, tmp_path, monkeypatch, when):
    tasks = []
    at, name = (_Verify, "_judge") if when == "while it compares" else (operators, "load_given")
    real = getattr(at, name)

    class Watched(DicomVerifyOperator):
        def execute(self, context):
            tasks.append(self)
            return super().execute(context)

    def ended(*arguments):
        if len(tasks) == 1:
            tasks[0].on_kill()
        return real(*arguments)

    monkeypatch.setattr(at, name, ended)
    with DAG("ended") as dag:
        first = get(study=archive.many, destination=str(tmp_path))
        Watched(task_id="verify", manifest=first.output, retries=1, retry_delay=timedelta(0))
    run = run_dag(dag)
    assert (run.state, len(tasks)) == ("success", 2)
    assert "Cancelled: the task was ended." in run.log


def test_a_pacs_without_a_list_is_a_failure_for_good(run_dag, pacs, archive, tmp_path):
    def no_list(context, result=None):
        pacs.no_find = True

    with DAG("no_list", default_args={"retries": 1, "retry_delay": timedelta(0)}) as dag:
        first = get(study=archive.private, destination=str(tmp_path), on_success_callback=no_list)
        verify(manifest=first.output, dicom_conn_id="pacs")
        verify(task_id="tells", manifest=first.output, dicom_conn_id="pacs", fail_on_difference=False)
    run = run_dag(dag)
    assert (run.task("verify").state, run.task("verify").try_number) == ("failed", 1)
    assert run.task("tells").state == "success"


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "nothing": ({}, "none of them is given"),
    "bad_study": ({"study": "1.2.x", "destination": "/data"}, "not a valid Study Instance UID"),
    "no_place": ({"study": "1.2.3"}, "destination is missing"),
    "relative": ({"study": "1.2.3", "destination": "data"}, "not an absolute path"),
    "bucket": ({"study": "1.2.3", "destination": "s3://bucket/x"}, "names no connection"),
    "no_manifest": ({"manifest": "/nowhere/m.parquet"}, "cannot be read"),
    "none_among": ({"manifest": ["/nowhere/n.parquet", None]}, "has None in 1 of 2 places"),
    "no_node": ({"study": "1.2.3", "destination": "dicom://nowhere"}, "with the type DICOM"),
    "wrong_type": ({"study": "1.2.3", "destination": "/data", "dicom_conn_id": "store"}, "is not dicom"),
}


def test_bad_input_fails_at_once_and_before_any_traffic(run_dag, pacs, bucket):
    with DAG("bad_verify", default_args=AT_ONCE) as dag:
        for name, (options, _) in BAD.items():
            verify(**{"task_id": name, **options})
    run = run_dag(dag)
    # A connection may only seem to be missing: its secrets backend may be away for a moment.
    assert {name: (run.task(name).state, run.task(name).try_number) for name in BAD} == {
        name: ("failed", 3 if name in ("no_node",) else 1) for name in BAD
    }
    for _, word in BAD.values():
        assert word in run.log
    assert pacs.total_associations == 0
