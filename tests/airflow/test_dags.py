"""All DAGs of the repository: that they load, and what the user reads of them before running one."""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
import time
from pathlib import Path

import pytest
from airflow.sdk.exceptions import ParamValidationError

FOLDER = Path(__file__).parents[2] / "dags"
NAMES = sorted(path.stem for path in FOLDER.glob("*.py"))
WITHOUT_RETRIES = {"approve"}  # a person's answer is not asked for again


@pytest.fixture(scope="module")
def bag():
    from airflow.dag_processing.dagbag import DagBag

    began = time.perf_counter()
    bag = DagBag(dag_folder=FOLDER, bundle_name="dags-folder")
    print(f"{len(bag.dags)} DAGs loaded in {time.perf_counter() - began:.2f} s")
    return bag


def test_all_load(bag):
    assert bag.import_errors == {}
    assert sorted(bag.dags) == NAMES


def test_parsing_imports_nothing_heavy():
    heavy = "{'pandas', 'pyarrow', 'numpy', 'pydicom', 'pynetdicom', 'boto3', 'botocore'}"
    code = f"""
import runpy, sys
for name in {NAMES}:
    runpy.run_path({str(FOLDER)!r} + '/' + name + '.py')
sys.exit(' '.join({heavy} & set(sys.modules)) or 0)"""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("name", NAMES)
def test_each_explains_itself(bag, name):
    dag = bag.dags[name]
    assert "What it reads:" in dag.doc_md
    assert dag.tags == {"dicom"}
    for key in dag.params:
        assert f"`{key}`" in dag.doc_md, key
        assert dag.params.get_param(key).schema["title"], key
    for task in dag.tasks:
        assert task.retries >= 3 or task.task_id in WITHOUT_RETRIES, task.task_id
    # Who reads the text of a DAG can set up what it names.
    for line in dag.doc_md.splitlines():
        if line.startswith("* connection `"):
            assert line.split("`")[1] in Path(FOLDER / f"{name}.py").read_text().partition('"""')[2].partition('"""')[2]


def _waits(task):
    return bool(getattr(task, "partial_kwargs", {}).get("listed_within"))


@pytest.mark.parametrize("name", NAMES)
def test_what_talks_to_a_pacs_runs_in_its_pool(bag, name):
    from airflow_dicom_get.hooks._task import DicomTask

    dag = bag.dags[name]
    classes = {task.task_id: getattr(task, "operator_class", type(task)) for task in dag.tasks}
    talks = {task_id for task_id, cls in classes.items() if issubclass(cls, DicomTask)}
    outside = {task_id for task_id in talks if dag.task_dict[task_id].pool != "pacs"}
    # What waits until a PACS lists something must not keep others from it for so long.
    assert outside == {task_id for task_id in talks if _waits(dag.task_dict[task_id])}
    assert {dag.task_dict[task_id].max_active_tis_per_dag for task_id in outside} <= {8}
    assert not talks or "* pool `pacs`" in dag.doc_md or "the pool `pacs`" in dag.doc_md


@pytest.mark.parametrize("name", NAMES)
def test_the_page_describes_each(bag, name):
    page = (FOLDER.parent / "docs" / "example-dags.md").read_text("utf-8")
    section = page.partition(f"## {name}\n")[2].partition("\n## ")[0]
    assert section, name
    for key in bag.dags[name].params:
        assert f"`{key}`" in section, key


WRITTEN_TO = {"destination": "DICOM_DESTINATION", "folder": "DICOM_REPORTS", "bucket": "DICOM_BUCKET"}
"""Params that say where a DAG writes to, and the variable that lists what they may be."""


@pytest.mark.parametrize("name", NAMES)
def test_places_follow_the_environment_or_lie_in_the_home_of_airflow(name, tmp_path, monkeypatch):
    def places():
        params = runpy.run_path(str(FOLDER / f"{name}.py"))["dag"].params
        for key in WRITTEN_TO.keys() & params.keys():
            # Whoever may trigger may choose, and name no other.
            assert params.get_param(key).schema["enum"][0] == params[key]
            with pytest.raises(ParamValidationError):
                params.get_param(key).resolve("/etc")
        assert not {key for key in params if "folder" in key or "copies" in key} - WRITTEN_TO.keys()
        return {key: params.get_param(key).schema["enum"] for key in WRITTEN_TO if key in params}

    home = os.environ["AIRFLOW_HOME"]
    usual = {"destination": [f"{home}/dicom"], "folder": [f"{home}/dicom-reports"], "bucket": ["dicom/studies"]}
    found = places()
    assert found.items() <= usual.items()
    given = {"destination": [str(tmp_path / "d"), "/d2"], "folder": [str(tmp_path / "r")], "bucket": ["b/p", "b/q"]}
    for key, variable in WRITTEN_TO.items():
        monkeypatch.setenv(variable, ",".join(given[key]))
    assert places() == {key: given[key] for key in found}
