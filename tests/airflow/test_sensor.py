"""DicomStudySensor in DAG runs against the embedded PACS, in the worker and in the triggerer."""

from __future__ import annotations

import asyncio
import json
import os
import threading
import time
from datetime import timedelta
from typing import Any

import pytest
from airflow.sdk import DAG
from airflow.sdk.exceptions import TaskDeferred

from airflow_dicom_get.engine import arrivals
from airflow_dicom_get.engine.arrivals import Awaited
from airflow_dicom_get.errors import DicomGetError
from airflow_dicom_get.operators.dicom import DicomGetOperator
from airflow_dicom_get.sensors import dicom as sensor_module
from airflow_dicom_get.sensors.dicom import DicomStudySensor
from airflow_dicom_get.testing.sample_data import STUDY_DATE
from airflow_dicom_get.triggers import _looks as looks_module
from airflow_dicom_get.triggers.dicom import DicomStudyTrigger

BOTH = pytest.mark.parametrize("deferrable", [False, True], ids=["worker", "triggerer"])


def wait(task_id: str, **options) -> DicomStudySensor:
    at_once = {"settled_for": timedelta(0), "poke_interval": 0.2, "timeout": 20}
    return DicomStudySensor(task_id=task_id, dicom_conn_id="pacs", **{**at_once, **options})


def finds(pacs) -> int:
    return sum(kind == "C-FIND" for kind, _, _ in pacs.requests)


def test_what_is_there_is_returned_at_once_and_mapped_over(run_dag, pacs, archive, tmp_path):
    with DAG("sensor_there") as dag:
        both = wait("both", study=[archive.many, archive.private], deferrable=True)
        wait("query", query={"StudyDate": STUDY_DATE}, min_instances=12)
        wait("series", query={"StudyDate": STUDY_DATE, "Modality": "SR"})
        DicomGetOperator.partial(task_id="get", dicom_conn_id="pacs", destination=str(tmp_path)).expand(
            study=both.output
        )
    run = run_dag(dag)
    assert run.state == "success"
    for name in ("both", "query"):
        items = run.xcom(name)
        assert [item["study_instance_uid"] for item in items] == sorted([archive.many, archive.private])
        assert sorted(item["expected_instances"] for item in items) == [12, 60]
        assert all(item["keys"] == {} for item in items)
    (item,) = run.xcom("series")
    assert (item["study_instance_uid"], item["expected_instances"]) == (archive.private, 1)
    assert [run.xcom("get", "summary", index)["verdict"] for index in (0, 1)] == ["complete", "complete"]
    assert "deferral" not in run.log.lower()


@BOTH
def test_a_study_that_grows_is_waited_for(run_dag, pacs, archive, deferrable, monkeypatch):
    began = time.monotonic()
    asked = {"times": 0}
    real = arrivals._compare

    def growing(awaited, found, before, now):
        asked["times"] += 1
        for item in found:
            item["expected_instances"] -= max(0, 5 - asked["times"])
        return real(awaited, found, before, now)

    monkeypatch.setattr(arrivals, "_compare", growing)
    with DAG(f"sensor_grows_{deferrable}") as dag:
        wait("wait", study=archive.many, settled_for=timedelta(seconds=1), deferrable=deferrable)
    run = run_dag(dag)
    assert run.state == "success"
    assert asked["times"] >= 7
    assert time.monotonic() - began > 1.8
    assert run.state == "success", run.log[-3000:]
    assert run.xcom("wait")[0]["expected_instances"] == 60


def test_what_does_not_come_ends_with_the_timeout(run_dag, pacs, archive):
    with DAG("sensor_never") as dag:
        wait("missing", study=["1.2.3.4", archive.many], deferrable=False, timeout=1.5)
        wait("few", study=archive.many, min_instances=61, deferrable=False, timeout=1.5, soft_fail=True)
    run = run_dag(dag)
    assert [run.task(name).state for name in ("missing", "few")] == ["failed", "skipped"]
    assert finds(pacs) >= 4


def test_a_named_series_that_has_not_come_is_waited_for(pacs, archive):
    first: Any = wait("all", query={"StudyInstanceUID": archive.private, "Modality": "SR"}).poke({})
    (found,) = first.xcom_value
    (here,) = found["series_instance_uids"]
    item = {**found, "series_instance_uids": [here, "1.2.3.4"]}
    assert not wait("one_missing", study=[item, archive.many]).poke({})
    again: Any = wait("there", study=[found, archive.many]).poke({})
    series = {one["study_instance_uid"]: one["series_instance_uids"] for one in again.xcom_value}
    assert series[archive.private] == [here]


def test_the_scheduler_is_told_when_to_give_up(pacs, archive):
    sensor = wait("never", study=archive.many, min_instances=61, deferrable=True, timeout=90)
    with pytest.raises(TaskDeferred) as deferred:
        sensor.execute({})
    assert deferred.value.timeout == timedelta(seconds=90)
    _, kwargs = deferred.value.trigger.serialize()
    assert list(kwargs["counts"]) == [archive.many]
    assert finds(pacs) == 1


def test_a_pacs_without_numbers_is_counted(run_dag, pacs, archive):
    pacs.omit_counts = True
    with DAG("sensor_counts") as dag:
        wait("wait", study=archive.many)
    run = run_dag(dag)
    assert run.state == "success", run.log[-3000:]
    assert run.xcom("wait")[0]["expected_instances"] == 60


@BOTH
def test_a_pacs_that_is_down_is_asked_again(run_dag, pacs, archive, deferrable, monkeypatch):
    looked = []
    usual = looks_module.look

    def look(*given):
        try:
            return usual(*given)
        except DicomGetError as error:
            looked.append(error)
            pacs.start()
            raise

    monkeypatch.setattr(sensor_module, "look", look)
    pacs.stop()
    with DAG(f"sensor_down_{deferrable}") as dag:
        wait("wait", study=archive.many, deferrable=deferrable)
    run = run_dag(dag)
    assert run.state == "success"
    assert len(looked) == 1
    assert "could not be queried" in run.log


BAD: dict[str, dict[str, Any]] = {
    "nothing": {},
    "both": {"study": "1.2", "query": {"StudyDate": "today"}},
    "blank": {"study": "{{ '' }}"},
    "no_list": {"study": []},
    "uid": {"study": ["1.2", "patient"]},
    "query": {"query": {"PatientNam": "x"}},
    "nothing_selected": {"query": {"StudyDate": ""}},
    "connection": {"study": "1.2", "dicom_conn_id": "nowhere"},
}


@BOTH
def test_bad_input_fails_at_once_and_before_any_traffic(run_dag, pacs, deferrable):
    with DAG(f"sensor_bad_{deferrable}", default_args={"retries": 2, "retry_delay": timedelta(0)}) as dag:
        for name, options in BAD.items():
            DicomStudySensor(
                task_id=name, **{"dicom_conn_id": "pacs", "poke_interval": 0.1, "deferrable": deferrable, **options}
            )
    run = run_dag(dag)
    # A connection may only seem to be missing: its secrets backend may be away for a moment.
    assert {name: (run.task(name).state, run.task(name).try_number) for name in BAD} == {
        name: ("failed", 3 if name in ("connection",) else 1) for name in BAD
    }
    assert pacs.total_associations == 0


def test_nothing_of_the_patient_is_shown(run_dag, pacs, archive, patient, database_rows):
    with DAG("sensor_hidden") as dag:
        wait(
            "wait", query={"PatientID": patient[1]}, settled_for=timedelta(seconds=0.5), deferrable=True,
        )  # fmt: skip
    run = run_dag(dag)
    assert run.state == "success"
    assert run.rendered("wait")["query"] == {"PatientID": "***"}
    kept = database_rows(run)
    for word in patient:
        assert word not in kept
        assert word not in run.log


def make(pacs, archive, **options) -> DicomStudyTrigger:
    awaited = Awaited([{"StudyInstanceUID": archive.many}], [archive.many], settled_seconds=0.0)
    return DicomStudyTrigger(awaited.to_json(), {}, options.get("poke_interval", 0.0), "pacs")


async def first_event(trigger):
    async for event in trigger.run():
        return event.payload


def test_the_trigger_is_made_again_from_json(pacs, archive):
    path, kwargs = make(pacs, archive).serialize()
    assert path == "airflow_dicom_get.triggers.dicom.DicomStudyTrigger"
    again = DicomStudyTrigger(**json.loads(json.dumps(kwargs)))
    assert again.serialize() == (path, kwargs)
    event = asyncio.run(first_event(again))
    assert event["items"][0]["study_instance_uid"] == archive.many
    assert repr(again) == "<DicomStudyTrigger on pacs>"


def test_a_connection_that_is_away_for_a_moment_is_asked_for_again_by_the_trigger(pacs, archive, monkeypatch, caplog):
    address = os.environ["AIRFLOW_CONN_PACS"]
    monkeypatch.delenv("AIRFLOW_CONN_PACS")
    trigger = make(pacs, archive, poke_interval=0.05)
    looks: list[None] = []

    def look(*args):
        looks.append(None)
        if len(looks) == 3:
            monkeypatch.setenv("AIRFLOW_CONN_PACS", address)
        return real(*args)

    real = looks_module.look
    monkeypatch.setattr(looks_module, "look", look)
    event = asyncio.run(first_event(trigger))
    assert event["items"][0]["study_instance_uid"] == archive.many
    assert len(looks) == 3


def test_a_connection_that_is_away_for_a_moment_is_asked_for_again_by_the_sensor(run_dag, pacs, archive, monkeypatch):
    from airflow_dicom_get.hooks._node_config import read_node_config as real

    looks: list[str] = []

    def read(conn_id):
        looks.append(conn_id)
        if len(looks) == 2:  # the first is before the first look at the PACS
            monkeypatch.delenv("AIRFLOW_CONN_PACS")
        elif len(looks) == 3:
            monkeypatch.setenv("AIRFLOW_CONN_PACS", address)
        return real(conn_id)

    address = os.environ["AIRFLOW_CONN_PACS"]
    monkeypatch.setattr("airflow_dicom_get.hooks.dicom.read_node_config", read)
    with DAG("sensor_blink") as dag:
        wait("wait", study=archive.many, deferrable=False)
    run = run_dag(dag)
    assert run.state == "success"
    assert "The PACS could not be queried: " in run.log
    assert "`pacs` isn't defined" in run.log


def test_an_error_that_is_none_of_ours_costs_one_query(pacs, archive, monkeypatch, caplog):
    real = looks_module.look
    errors = [RecursionError("HOSTILE^PATIENT"), OverflowError("HOSTILE^PATIENT")]

    def look(*args):
        if errors:
            raise errors.pop()
        return real(*args)

    monkeypatch.setattr(looks_module, "look", look)
    assert asyncio.run(first_event(make(pacs, archive)))["items"]
    assert not errors
    assert "HOSTILE" not in caplog.text


def test_a_trigger_that_is_let_go_leaves_no_association(pacs, archive, monkeypatch):
    entered = threading.Event()
    cancelled = threading.Event()

    class Scu:
        def cancel(self, reason):
            cancelled.set()

    def look(hook, queries, seconds, on_scu):
        on_scu(Scu())
        entered.set()
        cancelled.wait(10)
        raise RuntimeError("cancelled")

    monkeypatch.setattr(looks_module, "look", look)

    async def run():
        task = asyncio.create_task(first_event(make(pacs, archive)))
        await asyncio.to_thread(entered.wait, 5)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    asyncio.run(run())
    assert cancelled.is_set()
