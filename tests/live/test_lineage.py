"""OpenLineage in a real Airflow, as its own file transport writes it, and the same run without its provider; links."""

from __future__ import annotations

import json
from importlib.metadata import distributions
from typing import Any
from urllib.parse import quote

from airflow_dicom_get.testing.sample_data import big_study
from tests.support.live_airflow import eventually

HAS_OPENLINEAGE = any(distributions(name="apache-airflow-providers-openlineage"))


def test_a_get_names_its_source_and_its_destination(serve, airflow, lineage, tmp_path):
    study = big_study(tmp_path / "pacs" / "one", 6, 4096, series=2)
    pacs = serve(tmp_path / "pacs")
    run = airflow.trigger("live_study", destination=str(tmp_path / "held"), study=study)
    assert run.wait() == "success"
    assert run.summary()["verdict"] == "complete"
    links = airflow.call("GET", f"{run.path}/taskInstances/get/links")["extra_links"]
    assert links["DICOM manifest"].endswith(f"/runs/{quote(run.run_id, safe='')}/tasks/get/plugin/dicom-manifest")
    if not HAS_OPENLINEAGE:
        assert not lineage.exists()
        return

    def completed() -> list[Any]:
        if not lineage.exists():
            return []
        events = [json.loads(line) for line in lineage.read_text("utf-8").splitlines()]
        return [one for one in events if one["job"]["name"] == "live_study.get" and one["eventType"] == "COMPLETE"]

    (event,) = eventually("the event of the task", completed)
    (source,), (held,) = event["inputs"], event["outputs"]
    assert (source["namespace"], source["name"]) == (f"dicom://127.0.0.1:{pacs.port}", f"PACS/{study}")
    assert (held["namespace"], held["name"]) == ("file", f"{tmp_path}/held/{study}")
    assert held["outputFacets"]["outputStatistics"]["fileCount"] == 6
    facet = event["run"]["facets"]["dicomTransfer"]
    assert (facet["verdict"], facet["counts"]["total"]) == ("complete", 6)
