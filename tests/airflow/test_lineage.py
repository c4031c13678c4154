"""What get and store tell OpenLineage; tests/live reads it as OpenLineage's own file transport writes it."""

from __future__ import annotations

import json
from collections import Counter
from importlib.metadata import PackageNotFoundError, version
from types import SimpleNamespace
from typing import Any

import pytest
from airflow.sdk import DAG

from airflow_dicom_get.manifest.frames import load_table
from airflow_dicom_get.operators import _lineage
from airflow_dicom_get.operators import _transfer as transfers
from airflow_dicom_get.operators._lineage import Moved, StudyCounts, dataset_name, lineage_of
from airflow_dicom_get.operators.dicom import DicomGetOperator, DicomStoreOperator

try:
    version("apache-airflow-providers-openlineage")
    HAS_OPENLINEAGE = True
except PackageNotFoundError:
    HAS_OPENLINEAGE = False

with_provider = pytest.mark.skipif(not HAS_OPENLINEAGE, reason="not installed: the extra openlineage")


@pytest.mark.parametrize(
    ("address", "study", "namespace", "name"),
    [
        ("dicom://PACS@10.0.0.5:104", "1.2", "dicom://10.0.0.5:104", "PACS/1.2"),
        ("dicom://10.0.0.5:104", "1.2", "dicom://10.0.0.5:104", "ANY-SCP/1.2"),
        ("dicom://PACS@[::1]:104", None, "dicom://[::1]:104", "PACS"),
        ("/data/dicom", "1.2", "file", "/data/dicom/1.2"),
        ("file:///data/a%20b", "1.2", "file", "/data/a b/1.2"),
        ("/data/dicom", None, "file", "/data/dicom"),
        ("s3://bucket/studies", "1.2", "s3://bucket", "studies/1.2"),
        ("s3://conn@bucket", "1.2", "s3://bucket", "1.2"),
        ("s3://bucket", None, "s3://bucket", "/"),
    ],
)
def test_datasets_are_named_as_openlineage_names_them(address, study, namespace, name):
    assert dataset_name(address, study) == (namespace, name)


@pytest.fixture
def moved(monkeypatch):
    """What each task has kept of its transfer, in the order of their ends."""
    found: list[Moved] = []

    def keep(*args, **kwargs):
        found.append(Moved(*args, **kwargs))
        return found[-1]

    monkeypatch.setattr(transfers, "Moved", keep)
    return found


@pytest.fixture
def run(run_dag, pacs, target, archive, tmp_path):
    """A get of one study into a folder, and a store of its manifest at another PACS."""

    def go(dag_id: str) -> Any:
        with DAG(dag_id) as dag:
            get = DicomGetOperator(
                task_id="get", dicom_conn_id="pacs", study=archive.private, destination=str(tmp_path / "out")
            )
            DicomStoreOperator(
                task_id="store", target_conn_id="archive", manifest=get.output, manifest_root=str(tmp_path / "m")
            )
        return run_dag(dag)

    return go


def test_each_transfer_knows_its_places_and_its_studies(run, moved, pacs, target, archive, tmp_path):
    done = run("lineage_places")
    assert done.state == "success", done.log[-2000:]
    get, store = moved
    table = load_table(done.xcom("get"))
    size = sum(table["bytes"].to_pylist())
    assert (get.sources, get.destination) == ([f"dicom://PACS@127.0.0.1:{pacs.port}"], (tmp_path / "out").as_uri())
    assert get.studies == [StudyCounts(archive.private, 12, 12, size)]
    assert store.sources == [(tmp_path / "out").as_uri()]
    assert store.destination == f"dicom://ARCHIVE@127.0.0.1:{target.port}"
    assert [(one.study, one.listed, one.held) for one in store.studies] == [(archive.private, 12, 12)]
    assert get.by_study
    assert store.by_study


@with_provider
def test_the_event_names_source_destination_verdict_and_counts(run, moved, pacs, archive, patient, tmp_path):
    from airflow.providers.openlineage.extractors.base import DefaultExtractor
    from openlineage.client.serde import Serde

    run("lineage_event")
    operator = DicomGetOperator(task_id="x", study="1.2", destination="/data")
    operator._moved = moved[0]
    lineage = DefaultExtractor(operator).extract_on_complete(SimpleNamespace())
    assert lineage is not None
    text = Serde.to_json(lineage)
    found = json.loads(text)
    (source,), (held,) = found["inputs"], found["outputs"]
    assert (source["namespace"], source["name"]) == (f"dicom://127.0.0.1:{pacs.port}", f"PACS/{archive.private}")
    assert (held["namespace"], held["name"]) == ("file", f"{tmp_path}/out/{archive.private}")
    assert held["outputFacets"]["outputStatistics"]["fileCount"] == 12
    facet = found["run_facets"]["dicomTransfer"]
    assert (facet["verdict"], facet["counts"]["completed"]) == ("complete", 12)
    for word in patient:
        assert word not in text


@with_provider
def test_many_studies_are_named_as_a_whole():
    result: Any = SimpleNamespace(verdict="complete", reason=None, manifest_uri=None, counts=dict)
    studies = [StudyCounts(f"1.{number}", 2, 1, 10) for number in range(_lineage.MOST_STUDIES + 1)]
    found = lineage_of(Moved(["dicom://A@h:1"], "/data", studies, result))
    assert [(one.namespace, one.name) for one in (*found.inputs, *found.outputs)] == [
        ("dicom://h:1", "A"),
        ("file", "/data"),
    ]
    several = lineage_of(Moved(["/x", "/y"], "dicom://A@h:1", studies[:3], result, by_study=False))
    assert Counter(one.name for one in several.inputs) == {"/x": 1, "/y": 1}
    assert len(several.outputs) == 3


@with_provider
def test_a_task_that_did_not_come_that_far_has_no_datasets():
    operator = DicomGetOperator(task_id="x", study="1.2", destination="/data")
    found = operator.get_openlineage_facets_on_complete(None)
    assert (found.inputs, found.outputs, found.run_facets) == ([], [], {})
