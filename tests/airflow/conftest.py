"""Airflow with a home of its own, made before anything imports it."""

from __future__ import annotations

import gc
import importlib.util
import os
import sys
import tempfile
import warnings
from pathlib import Path

import pytest

HAS_AIRFLOW = importlib.util.find_spec("airflow") is not None

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
            "AIRFLOW__CORE__DAGS_FOLDER": f"{_home.name}/dags",
            "AIRFLOW__CORE__LOAD_EXAMPLES": "False",
            "AIRFLOW__CORE__UNIT_TEST_MODE": "True",
            "AIRFLOW__DATABASE__SQL_ALCHEMY_CONN": f"sqlite:///{_home.name}/airflow.db",
            "AIRFLOW__LOGGING__BASE_LOG_FOLDER": f"{_home.name}/logs",
        }
    )


# Airflow and what it stands on warn of their own changes and leave files to the garbage collector. That is
# not ours to mend; what this package warns of stays an error.
_FILTERS = ("ignore::ResourceWarning", "default", "error:::airflow_dicom_get")


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
