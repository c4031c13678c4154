"""The DAGs of the repository that lead to another PACS, as a user runs them."""

from __future__ import annotations

import threading

import pytest

from airflow_dicom_get.testing.archive import Archive as Index
from airflow_dicom_get.testing.s3_servers import BUCKET


def held(folder) -> int:
    index = Index(folder)
    index.load()
    return len({entry.sop for entry in index.entries()})


@pytest.fixture
def answer(target, monkeypatch):
    """Let a person answer the question of a run, by Airflow's REST interface, once it is asked.

    Gives what the other PACS had seen until then. Where the answer is not taken, the task fails, and ``refused`` says
    why: `DAG.test` waits for an answer without end, and a task's time limit takes pytest's alarm away.
    """
    from airflow import settings
    from airflow.api_fastapi.app import create_app, purge_cached_app
    from airflow.models import TaskInstance  # noqa: TID251
    from airflow.models.hitl import HITLDetail  # noqa: TID251
    from starlette.testclient import TestClient

    over = threading.Event()
    seen: dict[str, object] = {"refused": "not asked"}
    monkeypatch.setenv("AIRFLOW__CORE__SIMPLE_AUTH_MANAGER_ALL_ADMINS", "True")
    purge_cached_app()
    app = create_app("core")

    def asked(session):
        waiting = session.query(TaskInstance, HITLDetail).join(HITLDetail, HITLDetail.ti_id == TaskInstance.id)
        return waiting.filter(TaskInstance.state == "awaiting_input").first()

    def wait_and_say(word):
        while not over.wait(0.3):
            with settings.get_session()() as session:
                found = asked(session)
                if found is None:
                    continue
                ti, question = found
                seen["associations"], seen["body"] = target.total_associations, question.body
                path = f"/api/v2/dags/{ti.dag_id}/dagRuns/{ti.run_id}/taskInstances/approve/-1/hitlDetails"
            try:
                said = TestClient(app).patch(path, json={"chosen_options": [word], "params_input": {}})
                seen["refused"] = "" if said.status_code == 200 else f"{said.status_code} {said.text}"
            except Exception as error:
                seen["refused"] = repr(error)
            if seen["refused"]:
                with settings.get_session()() as session:
                    asked(session)[0].state = "failed"
                    session.commit()
            return

    def say(word):
        threading.Thread(target=wait_and_say, args=(word,), daemon=True).start()
        return seen

    yield say
    over.set()
    purge_cached_app()


@pytest.mark.usefixtures("dag_connections")
def test_an_approved_day_is_at_the_other_pacs(run_dag, load_dag, archive, moto, prefix, tmp_path, patient, answer):
    seen = answer("Approve")
    run = run_dag(load_dag("retrieve_then_forward"), run_conf={"bucket": f"{BUCKET}/{prefix}"})
    assert seen["refused"] == ""
    assert run.state == "success"
    assert seen["associations"] == 0
    body = str(seen["body"])
    assert body.startswith("Studies: 2. Instances: 72.")
    for uid, instances in ((archive.private, 12), (archive.many, 60)):
        assert f"* {uid}: instances: {instances}, series: 3, as of " in body
    assert len([key for key in moto.objects(prefix) if key.endswith(".dcm")]) == 72
    assert sorted(run.xcom("store", "summary", index)["completed"] for index in range(2)) == [12, 60]
    assert sorted(run.xcom("confirm", "summary", index)["symbols"]["="] for index in range(2)) == [12, 60]
    assert held(tmp_path / "archive") == 72
    for name in ("check", "store", "confirm"):  # their manifests are references, read as they begin
        labels = {run.task(name, index).rendered_map_index for index in range(2)}
        assert labels == {archive.private, archive.many}, name
        (of_series,) = {len(run.xcom(name, "summary", index)["series_rows"]) for index in range(2)}
        assert of_series == 3
    assert not any(word in run.log for word in patient)


@pytest.mark.usefixtures("dag_connections")
def test_a_rejected_day_stays_in_the_bucket(run_dag, load_dag, archive, prefix, target, answer):
    seen = answer("Reject")
    run = run_dag(load_dag("retrieve_then_forward"), run_conf={"bucket": f"{BUCKET}/{prefix}"})
    assert seen["refused"] == ""
    assert run.state == "success"
    assert {run.task(name, index).state for name in ("get", "check") for index in range(2)} == {"success"}
    assert run.task("store").state == "skipped"
    assert target.total_associations == 0


@pytest.mark.usefixtures("dag_connections")
def test_a_day_is_relayed_in_memory(run_dag, load_dag, archive, target, tmp_path, monkeypatch):
    monkeypatch.setenv("AIRFLOW__DICOM_GET__MANIFEST_ROOT", str(tmp_path / "records"))
    run = run_dag(load_dag("relay_pacs_to_pacs"))
    assert run.state == "success"
    report = run.xcom("report")
    assert (report["verdicts"], report["instances"]) == ({"complete": 2}, 72)
    assert held(tmp_path / "archive") == 72
    assert not list((tmp_path / "records").rglob("*.dcm"))
