"""The example of the README, which is a DAG of the repository."""

from __future__ import annotations

import re
from datetime import UTC, datetime
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_readme_has_it_word_for_word():
    (example,) = re.findall(r"```python\n(.*?with DAG.*?)```", (ROOT / "README.md").read_text("utf-8"), re.DOTALL)
    assert example == (ROOT / "dags" / "minimal.py").read_text("utf-8")


def test_it_retrieves_the_day_before_its_run_into_the_home_of_the_user(run_dag, load_dag, pacs, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("AIRFLOW_CONN_DICOM_DEFAULT", f"dicom://PACS@127.0.0.1:{pacs.port}")
    run = run_dag(load_dag("minimal"), run_after=datetime(2024, 1, 16, tzinfo=UTC))
    assert run.state == "success"
    assert run.rendered("find")["study_date"] == "20240115"
    assert [run.task("get", index).pool for index in range(2)] == ["pacs"] * 2
    assert len(list((tmp_path / "dicom").glob("[0-9]*/*/*.dcm"))) == 72
