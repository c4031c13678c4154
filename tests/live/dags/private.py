"""All operators on a patient whom no DAG names: the query takes the ID from a variable."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

from airflow.sdk import DAG, Param

from airflow_dicom_get.operators.dicom import (
    DicomFindOperator,
    DicomGetOperator,
    DicomStoreOperator,
    DicomVerifyOperator,
)
from airflow_dicom_get.sensors.dicom import DicomStudySensor

WHO = {"PatientID": "{{ var.value.who }}"}
ROOM: dict[str, Any] = {"pool": "pacs"}

with DAG(
    "live_private",
    schedule=None,
    params={"destination": Param(type="string"), "hostile": Param(type="string")},
    default_args={"retries": 0, "trigger_rule": "all_done"},
):
    wait = DicomStudySensor(
        task_id="wait",
        dicom_conn_id="pacs",
        query=WHO,
        settled_for=timedelta(seconds=20),
        poke_interval=3,
        deferrable=True,
    )
    find = DicomFindOperator(task_id="find", dicom_conn_id="pacs", query={**WHO, "PatientName": "{{ var.value.name }}"})
    get = DicomGetOperator.partial(
        task_id="get",
        dicom_conn_id="pacs",
        destination="{{ params.destination }}/get",
        accept=("complete", "partial"),
        verbose=True,
        **ROOM,
    ).expand(study=find.output)
    by_query = DicomGetOperator(
        task_id="by_query",
        dicom_conn_id="pacs",
        query=WHO,
        destination="{{ params.destination }}/by_query",
        query_model="PatientRoot",
        **ROOM,
    )
    forward = DicomGetOperator(
        task_id="forward",
        dicom_conn_id="pacs",
        query=WHO,
        destination="dicom://archive",
        manifest_root="{{ params.destination }}/forward",
        **ROOM,
    )
    store = DicomStoreOperator.partial(
        task_id="store",
        target_conn_id="archive",
        manifest_root="{{ params.destination }}/store",
        accept=("complete", "partial", "failed"),
        **ROOM,
    ).expand(manifest=get.output)
    verify = DicomVerifyOperator(
        task_id="verify", manifest=get.output, dicom_conn_id="pacs", fail_on_difference=False, **ROOM
    )
    # This PACS puts a name into its error.
    hostile = DicomGetOperator(
        task_id="hostile",
        dicom_conn_id="hostile",
        study="{{ params.hostile }}",
        destination="{{ params.destination }}/hostile",
        verbose=True,
        **ROOM,
    )
    wait >> find
    get >> [by_query, forward, store, verify] >> hostile
