"""The page of supported versions, its record, and the pre-release that `make test-packages` tries."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import doc_tables
import packages
import pytest
import supported

ROOT = Path(__file__).resolve().parents[2]


def test_the_last_result_counts_and_a_pre_release_comes_before_its_release(tmp_path):
    path = tmp_path / "supported.json"
    for airflow in ("3.4.0", "3.10.0", "3.4.0b2", "3.3.2"):
        supported.record("live", airflow, {"passed": 1}, python="3.11.2", path=path)
    supported.record("live", "3.3.2", {"passed": 2}, python="3.13.5", path=path)
    supported.record("live", "3.3.2", {"passed": 3, "failed": 1, "skipped": 2}, python="3.11.7", path=path)
    rows = [(row["airflow"], row["python"], row["passed"]) for row in supported.load(path)]
    assert rows == [("3.3.2", "3.11", 3), ("3.3.2", "3.13", 2), ("3.4.0b2", "3.11", 1), ("3.4.0", "3.11", 1),
                    ("3.10.0", "3.11", 1)]  # fmt: skip


def test_the_table_tells_what_failed_and_what_was_not_run(monkeypatch):
    row = {"check": "live", "airflow": "3.4.0b2", "python": "3.11", "passed": 5, "failed": 1, "skipped": 2}
    monkeypatch.setattr(supported, "load", lambda: [{**row, "date": "2026-11-26"}])
    (line,) = doc_tables.tested().splitlines()[2:]
    assert line == "| 3.4.0b2 | 3.11 | – | – | 5 passed, **1 failed**, 2 left out (2026-11-26) | – |"


def test_the_page_says_what_the_package_takes():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    page = (ROOT / "docs" / "supported.md").read_text("utf-8")
    pythons = re.findall(r"Python :: (3\.\d+)", "\n".join(project["classifiers"]))
    assert f"| Python | {', '.join(pythons)};" in page
    (bound,) = project["optional-dependencies"]["airflow"]
    lowest, below = re.findall(r"[\d.]+", bound)
    assert f"| Airflow | {lowest} or newer, below {below};" in page
    # All of them are tried by `make test-packages`, and the lowest Airflow.
    tried = {row.python for row in packages.MATRIX if "airflow" in row.checks}
    assert {f"python{python}" for python in pythons} <= tried
    assert any(f"apache-airflow=={lowest}" in row.pins for row in packages.MATRIX)


@pytest.mark.parametrize("newest", ["apache-airflow==3.4.0b2", None])
def test_the_pre_release_is_tried_where_there_is_one(monkeypatch, newest):
    monkeypatch.setattr(packages, "prerelease", lambda: newest)
    pins = [row.pins for row in packages.rows_of([]) if row.name.startswith("prerelease")]
    assert pins == ([(newest,)] * 2 if newest else [])
    assert [row.name for row in packages.rows_of(["newest"])] == ["newest"]
