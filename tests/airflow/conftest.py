"""Airflow with a home of its own, made before anything imports it."""

from __future__ import annotations

import gc
import json
import os
import sys
import tempfile
import warnings
from contextlib import closing
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import pytest


def _installed() -> bool:
    # Not by find_spec: the folder of these tests is called airflow too, and tests/ is on the path.
    try:
        version("apache-airflow-core")
    except PackageNotFoundError:
        return False
    return True


HAS_AIRFLOW = _installed()

if not HAS_AIRFLOW:
    collect_ignore_glob = ["test_*.py"]
else:
    assert "airflow" not in sys.modules, "Airflow reads its configuration when it is first imported"
    _home = tempfile.TemporaryDirectory(prefix="airflow-dicom-get-")
    (Path(_home.name) / "dags").mkdir()
    for name in [name for name in os.environ if name.startswith(("AIRFLOW__", "AIRFLOW_CONN_", "AIRFLOW_VAR_"))]:
        del os.environ[name]
    os.environ.update(
        {
            "AIRFLOW_HOME": _home.name,
            "AIRFLOW__API_AUTH__JWT_SECRET": "for the tests alone, long enough for a key" * 2,
            "AIRFLOW__CORE__DAGS_FOLDER": f"{_home.name}/dags",
            "AIRFLOW__CORE__LOAD_EXAMPLES": "False",
            "AIRFLOW__CORE__UNIT_TEST_MODE": "True",
            "AIRFLOW__DATABASE__SQL_ALCHEMY_CONN": f"sqlite:///{_home.name}/airflow.db",
            "AIRFLOW__LOGGING__BASE_LOG_FOLDER": f"{_home.name}/logs",
        }
    )


# Airflow and what it stands on warn of their own changes. That is not ours to mend; what this package warns of, and
# what is left open, by whomever, stays an error. The last one that fits counts.
_FILTERS = (
    "default",
    "error::ResourceWarning",
    "error::pytest.PytestUnraisableExceptionWarning",
    "error::pytest.PytestUnhandledThreadExceptionWarning",
    "error:::airflow_dicom_get",
)


def pytest_collection_modifyitems(items):
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.airflow)
            for text in _FILTERS:
                item.add_marker(pytest.mark.filterwarnings(text))


@pytest.fixture(scope="package", autouse=True)
def airflow_database():
    from airflow.utils import db

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        db.initdb()
    yield
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        gc.collect()
    _home.cleanup()


@dataclass
class Run:
    """What is left of a DAG run: states, XCom, rendered fields, the task state store."""

    dag_id: str
    run_id: str
    state: str
    log: str

    def _rows(self, model: Any, task_id: str, map_index: int, **more: Any) -> list[Any]:
        """The rows of a task instance, whichever columns this Airflow finds them by."""
        from airflow import settings

        place = {"dag_id": self.dag_id, "run_id": self.run_id, "task_id": task_id}
        if hasattr(model, "task_instance_id"):
            wanted = {"task_instance_id": self.task(task_id, map_index).id}
        elif hasattr(model, "region_index"):
            wanted = {**place, "region_index": map_index}
        else:
            wanted = {**place, "map_index": map_index}
        with settings.get_session()() as session:
            return list(session.query(model).filter_by(**wanted, **more))

    def task(self, task_id: str, map_index: int = -1) -> Any:
        from airflow.models import TaskInstance  # noqa: TID251

        return self._rows(TaskInstance, task_id, map_index)[0]

    def raw_xcom(self, task_id: str, key: str = "return_value", map_index: int = -1) -> Any:
        """The value as the database holds it, and the page of Airflow shows it."""
        from airflow.models.xcom import XComModel  # noqa: TID251

        rows = self._rows(XComModel, task_id, map_index, key=key)
        return rows[0].value if rows else None

    def xcom(self, task_id: str, key: str = "return_value", map_index: int = -1) -> Any:
        from airflow.sdk.serde import deserialize

        return deserialize(self.raw_xcom(task_id, key, map_index))

    def move_xcom(self, task_id: str, address: str) -> None:
        """Let XCom hold an address in place of what a task returned."""
        from airflow import settings
        from airflow.models import xcom  # noqa: TID251

        # In Airflow 3.4 the model is a query over two tables, of which the second takes what is new.
        (row,) = self._rows(getattr(xcom, "XComModelV2", xcom.XComModel), task_id, -1, key="return_value")
        row.value = address
        with settings.get_session()() as session:
            session.merge(row)
            session.commit()

    def rendered(self, task_id: str, map_index: int = -1) -> dict[str, Any]:
        from airflow.models.renderedtifields import RenderedTaskInstanceFields  # noqa: TID251

        return self._rows(RenderedTaskInstanceFields, task_id, map_index)[0].rendered_fields

    def stored(self, task_id: str, key: str, map_index: int = -1) -> Any:
        from airflow.models.task_state_store import TaskStateStoreModel  # noqa: TID251

        rows = self._rows(TaskStateStoreModel, task_id, map_index, key=key)
        return json.loads(rows[0].value) if rows else None


@pytest.fixture
def run_dag(capsys):
    """Run a DAG to its end in this process, triggers included."""
    from airflow.dag_processing.bundles.manager import DagBundlesManager
    from airflow.dag_processing.dagbag import DagBag, sync_bag_to_db

    def run(dag: Any, **options: Any) -> Run:
        DagBundlesManager().sync_bundles_to_db()
        bag = DagBag(dag_folder=os.devnull, bundle_name="dags-folder")
        bag.bag_dag(dag)
        sync_bag_to_db(bag, "dags-folder", None)
        capsys.readouterr()
        done = dag.test(**options)
        captured = capsys.readouterr()
        return Run(dag.dag_id, done.run_id, str(done.state), captured.out + captured.err)

    return run


DAGS = Path(__file__).parents[2] / "dags"


@pytest.fixture
def load_dag(tmp_path, prefix, monkeypatch):
    """Load a DAG of the repository, with the places and columns that a test may choose from."""
    from airflow.dag_processing.dagbag import DagBag

    from airflow_dicom_get.testing.s3_servers import BUCKET

    for name, places in {
        "DICOM_DESTINATION": (tmp_path, tmp_path / "out", tmp_path / "originals"),
        "DICOM_LISTS": (tmp_path / "lists", tmp_path),
        "DICOM_LABELS": ("Cohort", "Arm", "PatientName", "AccessionNumber"),
        "DICOM_REPORTS": (tmp_path, tmp_path / "file" / "x"),
        "DICOM_BUCKET": (f"{BUCKET}/{prefix}", "nosuchbucket/studies"),
    }.items():
        monkeypatch.setenv(name, ",".join(map(str, places)))

    def load(name: str) -> Any:
        bag = DagBag(dag_folder=DAGS / f"{name}.py", bundle_name="dags-folder")
        assert bag.import_errors == {}
        return bag.dags[name]

    return load


@pytest.fixture
def dag_connections(pacs, target, connect_bucket, moto, monkeypatch):
    """What the DAGs of the repository expect: both PACS, and the bucket's service."""
    connect_bucket(moto)
    monkeypatch.setenv("AIRFLOW_CONN_DICOM_DEFAULT", f"dicom://PACS@127.0.0.1:{pacs.port}")
    monkeypatch.setenv("AIRFLOW_CONN_DICOM_TARGET", f"dicom://ARCHIVE@127.0.0.1:{target.port}")
    monkeypatch.setenv("AIRFLOW_CONN_DICOM_S3_DEFAULT", os.environ["AIRFLOW_CONN_STORE"])


@dataclass(frozen=True)
class Archive:
    """What the PACS of the tests holds."""

    folder: Path
    private: str
    """12 instances: ten CT, a private class, a report."""
    many: str
    """60 instances in three series."""


@pytest.fixture(scope="package")
def archive(tmp_path_factory):
    from airflow_dicom_get.testing.sample_data import big_study, private_study

    folder = tmp_path_factory.mktemp("pacs")
    return Archive(folder, private_study(folder / "private"), big_study(folder / "many", 60, 8192, series=3))


@pytest.fixture
def pacs(archive, monkeypatch):
    """The embedded PACS, and the connection ``pacs`` to it."""
    from airflow_dicom_get.testing.pacs import EmbeddedPacs

    with EmbeddedPacs(archive.folder) as server:
        monkeypatch.setenv("AIRFLOW_CONN_PACS", f"dicom://PACS@127.0.0.1:{server.port}")
        yield server


@pytest.fixture
def database_rows():
    """Every row of Airflow's database that a run left, as text."""
    import sqlite3

    def rows(run: Run) -> str:
        with closing(sqlite3.connect(f"{_home.name}/airflow.db")) as connection:
            found = [line for line in connection.iterdump() if run.run_id in line]
        assert found
        return "\n".join(found)

    return rows


@pytest.fixture
def first_instance(archive):
    """One instance of the study of sixty."""
    from pydicom import dcmread

    return dcmread(archive.folder / "many" / "000001.dcm", stop_before_pixels=True)


@pytest.fixture
def first_uid(first_instance):
    return str(first_instance.SOPInstanceUID)


@pytest.fixture
def patient(first_instance):
    """What the studies say of their patient: name, ID, birth date."""
    values = [str(first_instance[name].value) for name in ("PatientName", "PatientID", "PatientBirthDate")]
    assert all(values)
    return values


@pytest.fixture
def target(tmp_path, monkeypatch):
    """Another PACS, empty, that is called by its name alone; and the connection ``archive`` to it."""
    from airflow_dicom_get.testing.pacs import EmbeddedPacs

    folder = tmp_path / "archive"
    folder.mkdir()
    with EmbeddedPacs(folder, ae_title="ARCHIVE", require_called_ae=True) as server:
        monkeypatch.setenv("AIRFLOW_CONN_ARCHIVE", f"dicom://ARCHIVE@127.0.0.1:{server.port}")
        yield server


@pytest.fixture
def connect_bucket(monkeypatch):
    """Make the connection ``store`` to an S3 service, as type ``dicom_s3`` or ``aws``."""
    from airflow_dicom_get.testing.s3_servers import ACCESS_KEY, SECRET_KEY

    def make(server: Any, kind: str = "dicom_s3") -> None:
        keys: dict[str, Any] = {"conn_type": kind, "login": ACCESS_KEY, "password": SECRET_KEY}
        if kind == "aws":
            keys["extra"] = {"endpoint_url": f"http://127.0.0.1:{server.port}"}
        else:
            keys |= {"host": "127.0.0.1", "port": server.port, "extra": {"scheme": "http"}}
        monkeypatch.setenv("AIRFLOW_CONN_STORE", json.dumps(keys))
        # Whoever takes these has no connection.
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "of-the-machine")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "of-the-machine")

    return make


@pytest.fixture
def bucket(moto, connect_bucket):
    """A real S3 service, and the connection ``store`` to it."""
    connect_bucket(moto)
    return moto


@pytest.fixture
def prefix():
    """A prefix in the bucket that no other test has."""
    return f"t{os.urandom(6).hex()}"


@pytest.fixture
def kept():
    """Put task instances of a DAG with their XComs into Airflow's database, and take them away in the end."""
    from tests.support.kept_runs import kept_runs

    with kept_runs() as keep:
        yield keep


@pytest.fixture
def lost_task(monkeypatch):
    """Let one of the mapped retrievals of a DAG leave nothing behind, as if its worker had been killed."""
    from airflow_dicom_get.operators.dicom import DicomGetOperator

    def lose(dag, map_index: int) -> None:
        execute = DicomGetOperator.execute

        def or_lost(self, context):
            if context["ti"].map_index == map_index:
                raise RuntimeError("The worker is gone.")
            return execute(self, context)

        dag.task_dict["get"].partial_kwargs["retries"] = 0
        monkeypatch.setattr(DicomGetOperator, "execute", or_lost)

    return lose
