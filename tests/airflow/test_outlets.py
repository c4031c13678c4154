"""What the events of a task's assets say, and its link to the page of the manifest."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from airflow.sdk import DAG, Asset, AssetAlias

from airflow_dicom_get.manifest.frames import load_manifest
from airflow_dicom_get.operators.dicom import (
    DicomFindOperator,
    DicomGetOperator,
    DicomStoreOperator,
    DicomVerifyOperator,
)
from airflow_dicom_get.operators.links import DicomManifestLink
from airflow_dicom_get.plugins.ui import DicomPlugin


def extras(run: Any, asset: str) -> list[dict[str, Any]]:
    """What the events of an asset say that a run has caused."""
    from airflow import settings
    from airflow.models.asset import AssetEvent, AssetModel  # noqa: TID251

    with settings.get_session()() as session:
        found = session.query(AssetEvent).join(AssetModel, AssetModel.id == AssetEvent.asset_id)
        return [one.extra for one in found.filter(AssetModel.name == asset, AssetEvent.source_run_id == run.run_id)]


def test_outlets_get_the_reference_the_verdict_and_the_counts(run_dag, pacs, target, archive, patient, tmp_path):
    with DAG("outlets") as dag:
        get = DicomGetOperator(
            task_id="get",
            dicom_conn_id="pacs",
            study=archive.private,
            destination=str(tmp_path / "out"),
            outlets=[Asset("dicom_held"), AssetAlias("dicom_alias")],
        )
        DicomStoreOperator(
            task_id="store",
            target_conn_id="archive",
            manifest=get.output,
            manifest_root=str(tmp_path / "m"),
            outlets=[Asset("dicom_stored")],
        )
        get >> DicomGetOperator(
            task_id="fails",
            dicom_conn_id="pacs",
            study="1.2.3",
            destination=str(tmp_path / "none"),
            outlets=[Asset("dicom_never")],
        )
    run = run_dag(dag)
    assert [run.task(name).state for name in ("get", "store", "fails")] == ["success", "success", "failed"], run.log[
        -3000:
    ]
    (held,) = extras(run, "dicom_held")
    assert (held["verdict"], held["studies"], held["instances"]) == ("complete", 1, 12)
    assert (held["counts"]["completed"], held["counts"]["total"]) == (12, 12)
    frame = load_manifest(held)
    assert list(frame["study_instance_uid"].unique()) == [archive.private]
    (stored,) = extras(run, "dicom_stored")
    assert (stored["verdict"], stored["counts"]["completed"]) == ("complete", 12)
    assert set(load_manifest(stored)["state"]) == {"forwarded"}
    assert extras(run, "dicom_never") == []
    for word in patient:
        assert word not in str([held, stored])
    # Airflow writes the link down when the task has ended, however it ended.
    for name in ("get", "store", "fails"):
        link = run.raw_xcom(name, "_link_DicomManifestLink")
        assert link.endswith(f"/tasks/{name}/plugin/dicom-manifest"), name


@pytest.mark.parametrize("operator", [DicomGetOperator, DicomStoreOperator, DicomVerifyOperator])
def test_get_store_and_verify_have_the_link(operator):
    assert [type(one) for one in operator.operator_extra_links] == [DicomManifestLink]
    assert not DicomFindOperator.operator_extra_links


RUN = "/dags/d/runs/manual__2026-01-01T00%3A00%3A00%2B00%3A00/tasks/g.get"


@pytest.mark.parametrize(
    ("base", "index", "path"),
    [
        ("", -1, f"{RUN}/plugin/dicom-manifest"),
        ("https://x.example/air/", None, f"/air{RUN}/plugin/dicom-manifest"),
        ("https://x.example", 3, f"{RUN}/mapped/3/plugin/dicom-manifest"),
    ],
)
def test_the_link_leads_to_the_tab(monkeypatch, base, index, path):
    monkeypatch.setenv("AIRFLOW__API__BASE_URL", base)
    run_id = "manual__2026-01-01T00:00:00+00:00"
    key: Any = SimpleNamespace(dag_id="d", run_id=run_id, task_id="g.get", map_index=index)
    operator: Any = None
    assert DicomManifestLink().get_link(operator, ti_key=key) == path


def test_the_tab_is_the_one_of_the_plugin():
    views = {view["url_route"]: view["destination"] for view in DicomPlugin().external_views}
    assert views["dicom-manifest"] == "task_instance"


def test_airflow_knows_the_class_of_the_link():
    from airflow.providers_manager import ProvidersManager

    name = f"{DicomManifestLink.__module__}.{DicomManifestLink.__qualname__}"
    assert name in ProvidersManager().extra_links_class_names
