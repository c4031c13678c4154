"""New studies as events in a real triggerer: one loop a PACS, each study announced, through restarts too."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from airflow_dicom_get.store import StoreScu
from airflow_dicom_get.testing.pacs import EmbeddedPacs
from airflow_dicom_get.testing.sample_data import big_study
from tests.support.live_airflow import LiveAirflow, Run, eventually

ASSETS = ("live_one", "live_two", "live_ct")


@pytest.fixture
def watched(airflow, tmp_path) -> Iterator[EmbeddedPacs]:
    folder = tmp_path / "pacs"
    big_study(folder / "first", 3, 512, name="first")
    with EmbeddedPacs(folder, ae_title="PACS") as pacs:
        airflow.connect("watched", conn_type="dicom", host="127.0.0.1", port=pacs.port, login="PACS")
        yield pacs


def payloads(airflow: LiveAirflow, asset: str) -> list[dict[str, Any]]:
    """What the events of an asset say."""
    found = airflow.call("GET", "/assets", params={"name_pattern": asset})["assets"]
    ids = [one["id"] for one in found if one["name"] == asset]
    if not ids:
        return []
    answer = airflow.answer("GET", "/api/v2/assets/events", params={"asset_id": ids[0], "limit": 100})
    if answer.status_code == 500:  # what Airflow 3.3 answers while a run that an event has caused is still queued
        return []
    events = answer.json()["asset_events"]
    return [event["extra"]["payload"] for event in events]


def announced(airflow: LiveAirflow, asset: str) -> Counter[tuple[str, int]]:
    """How often each study was announced with how many instances."""
    return Counter((one["study_instance_uid"], one["expected_instances"]) for one in payloads(airflow, asset))


def is_known(airflow: LiveAirflow, dag_id: str) -> bool:
    return bool(airflow.answer("GET", f"/api/v2/dags/{dag_id}").status_code == 200)


def is_told(airflow: LiveAirflow, asset: str, study: str, count: int) -> bool:
    return announced(airflow, asset)[study, count] > 0


def send(pacs: EmbeddedPacs, folder: Path) -> None:
    """Store a study at the PACS, whose peak then is that of the triggerer alone."""
    peak = pacs.peak_associations
    result = StoreScu(f"PACS@127.0.0.1:{pacs.port}", manifest_root=str(folder.parent / "sent")).store(
        source=str(folder)
    )
    assert result.verdict == "complete"
    # A look of the triggerer may fall into this association.
    eventually("no association is left", lambda: pacs.associations == 0, 10, every=0.01)
    pacs.peak_associations = peak


def kept(airflow: LiveAirflow, asset: str) -> list[dict[str, Any]]:
    """The state of an asset."""
    ids = {one["name"]: one["id"] for one in airflow.call("GET", "/assets", params={"name_pattern": asset})["assets"]}
    return list(airflow.call("GET", f"/assets/{ids[asset]}/state-store")["asset_state_store"])


def test_each_study_is_announced_to_each_asset_through_a_restart(airflow, watched, tmp_path, record):
    """Two of the assets have the same watcher, which is one trigger; all three share one loop."""
    try:
        for asset in ASSETS:
            eventually(asset, partial(is_known, airflow, f"on_{asset}"))
            airflow.call("PATCH", f"/dags/on_{asset}", json={"is_paused": False})
        first = big_study(tmp_path / "first", 3, 512, name="first")
        for asset in ASSETS:
            eventually(f"the first study for {asset}", partial(is_told, airflow, asset, first, 3))
            assert announced(airflow, asset) == {(first, 3): 1}
            eventually(f"the state of {asset}", partial(kept, airflow, asset))

        airflow.kill("triggerer")
        second = big_study(tmp_path / "second", 2, 512, name="second")
        send(watched, tmp_path / "second")
        airflow.start("triggerer")
        for asset in ASSETS:
            eventually(f"the second study for {asset}", partial(is_told, airflow, asset, second, 2), 120)
        big_study(tmp_path / "second", 5, 512, name="second")
        send(watched, tmp_path / "second")
        for asset in ASSETS:
            eventually(f"its growth for {asset}", partial(is_told, airflow, asset, second, 5))
            assert announced(airflow, asset) == {(first, 3): 1, (second, 2): 1, (second, 5): 1}
        queries = [keys for kind, _, keys in watched.requests if kind == "C-FIND"]
        record(finds=len(queries), associations=watched.total_associations, peak=watched.peak_associations)
        assert watched.peak_associations == 1
        for asset in ASSETS:
            runs = airflow.call("GET", f"/dags/on_{asset}/dagRuns")["dag_runs"]
            items = [Run(airflow, f"on_{asset}", run["dag_run_id"]) for run in runs]
            assert {run.wait() for run in items} == {"success"}
    finally:
        for asset in ASSETS:
            airflow.call("PATCH", f"/dags/on_{asset}", json={"is_paused": True})
