"""The wheel and the sdist: what they hold, and what they say of themselves."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import tarfile
import zipfile
from email.message import Message
from email.parser import Parser
from pathlib import Path

import pytest

import airflow_dicom_get

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "airflow_dicom_get"
DIST_INFO = f"airflow_dicom_get-{airflow_dicom_get.__version__}.dist-info"


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """A folder with both, made without network."""
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-W", "ignore", "-m", "hatchling", "build", "-d", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, env={**os.environ, "SOURCE_DATE_EPOCH": "0"})
    return folder


@pytest.fixture(scope="module")
def wheel(built):
    (path,) = built.glob("*.whl")
    assert path.name == f"airflow_dicom_get-{airflow_dicom_get.__version__}-py3-none-any.whl"
    with zipfile.ZipFile(path) as opened:
        yield opened


@pytest.fixture(scope="module")
def metadata(wheel) -> Message:
    return Parser().parsestr(wheel.read(f"{DIST_INFO}/METADATA").decode())


def test_the_wheel_holds_every_file_of_the_package_and_nothing_else(wheel):
    mine = {
        str(path.relative_to(ROOT))
        for path in PACKAGE.rglob("*")
        if path.is_file() and path.suffix != ".pyc" and not path.name.startswith(".")
    }
    held = {name for name in wheel.namelist() if not name.startswith(DIST_INFO)}
    assert held == mine
    for name in ("py.typed", "plugins/templates/task.html", "plugins/static/page.js", "testing/pacs.py"):
        assert f"airflow_dicom_get/{name}" in held


def test_the_metadata(metadata, wheel):
    assert metadata["Name"] == "airflow-dicom-get"
    assert metadata["Version"] == airflow_dicom_get.__version__
    assert metadata["Requires-Python"] == ">=3.11"
    assert metadata["License-Expression"] == "Apache-2.0"
    needs = metadata.get_all("Requires-Dist")
    plain = {re.findall(r"^[\w-]+", need)[0] for need in needs if "extra ==" not in need}
    assert plain == {"boto3", "pandas", "pyarrow", "pynetdicom", "pydicom", "rich"}
    assert [need for need in needs if need.startswith("apache-airflow<")] == [
        "apache-airflow<4,>=3.3.1; extra == 'airflow'",
        "apache-airflow<4,>=3.3.1; extra == 'demo'",
    ]
    assert f"{DIST_INFO}/licenses/LICENSE" in wheel.namelist()


def test_the_entry_points(wheel):
    assert wheel.read(f"{DIST_INFO}/entry_points.txt").decode().split("\n\n") == [
        "[console_scripts]\ndicom-get = airflow_dicom_get.cli.main:run",
        "[airflow.plugins]\nairflow_dicom_get = airflow_dicom_get.plugins.ui:DicomPlugin",
        "[apache_airflow_provider]\nprovider_info = airflow_dicom_get.get_provider_info:get_provider_info\n",
    ]


def test_the_sdist_holds_what_the_tests_read(built):
    (path,) = built.glob("*.tar.gz")
    with tarfile.open(path) as opened:
        held = {name.partition("/")[2] for name in opened.getnames()}
    for folder in ("airflow_dicom_get", "benchmarks", "dags", "docs", "notebooks", "scripts", "tests"):
        # One beginning with a dot is a test's of this moment.
        mine = {str(path.relative_to(ROOT)) for path in (ROOT / folder).rglob("*.*") if path.suffix in (".py", ".md")}
        assert {name for name in mine if "/." not in name} <= held, folder
    assert {"pyproject.toml", "constraints.txt", "Makefile", "mkdocs.yml", "README.md", "LICENSE"} <= held
    assert not {name for name in held if "__pycache__" in name or name.startswith((".venv", ".demo", ".git/"))}


def test_the_version_stands_in_one_place():
    texts = [*PACKAGE.rglob("*.py"), ROOT / "pyproject.toml", *(ROOT / "scripts").iterdir()]
    version = f'"{airflow_dicom_get.__version__}"'
    assert [path.name for path in texts if path.is_file() and version in path.read_text("utf-8")] == ["__init__.py"]


def test_type_checkers_see_the_names_that_load_on_first_use():
    (types,) = (node for node in ast.parse((PACKAGE / "__init__.py").read_text()).body if isinstance(node, ast.If))
    seen = {
        alias.name: node.module.removeprefix("airflow_dicom_get.")
        for node in types.body
        if isinstance(node, ast.ImportFrom) and node.module
        for alias in node.names
    }
    assert seen == airflow_dicom_get._PUBLIC
