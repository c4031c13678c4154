"""Measure the page of retrievals over a metadata database with very many `get` tasks of the last 30 days.

    python benchmarks/page_rows.py --rows 10000 100000 1000000 --database sqlite postgresql

Fills Airflow's own tables (DAG runs of 1,000 mapped tasks each; task instances; of each its ``summary`` and a
reference in XCom, and its progress), and asks Airflow's API server, which runs in this process, for the page. Prints
one JSON object for each database and number of rows: seconds, the median of the runs; those of this process's CPU
beside them, which other work on the machine does not change much; and the bytes of each table and its indexes.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
import warnings
from contextlib import ExitStack
from datetime import UTC, datetime, timedelta
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

DAYS, MAPPED = 30, 1_000
DAGS, SOURCES = 4, 3
BYTES, INSTANCES, SERIES = 500_000_000, 1_000, 4
TABLES = ("dag_run", "task_instance", "xcom", "task_state_store")


def summary_of(number: int, missing: int) -> dict[str, Any]:
    """A summary as a retrieval of one study leaves it."""
    study = f"1.2.826.0.1.3680043.8.498.{number:020}"
    reference = f"/data/dicom/_manifests/nightly/{number // MAPPED}/get/{number % MAPPED}-1.parquet"
    each = INSTANCES // SERIES
    return {
        "schema": 1,
        "kind": "get",
        "verdict": "partial" if missing else "complete",
        "transient": False,
        "reason": "not_sent" if missing else None,
        "expected": INSTANCES,
        "total": INSTANCES,
        "completed": INSTANCES - missing,
        "skipped": 0,
        "warning": 0,
        "failed": missing,
        "withdrawn": 0,
        "unexpected": 0,
        "conflicts": 0,
        "bytes": BYTES,
        "duration_seconds": 20.0 + number % 7,
        "bytes_per_second": BYTES / (20.0 + number % 7),
        "associations": 3,
        "rounds": 1,
        "plan_at": "2026-01-31T01:00:00+00:00",
        "evidence": "list+counts",
        "resume_at": None,
        "errors": [],
        "source": f"ARCHIVE{number % SOURCES}@10.20.0.5:11112",
        "destination": "file:///data/dicom",
        "studies": 1,
        "series": SERIES,
        "study_instance_uids": [study],
        "reasons": {"not_sent": missing} if missing else {},
        "series_rows": [
            {
                "study_instance_uid": study,
                "series_instance_uid": f"{study}.{series}",
                "modality": "CT",
                "series_number": series,
                "held": each,
                "not_held": 0,
                "bytes": BYTES // SERIES,
            }
            for series in range(SERIES)
        ],
        "manifest_kind": "reference",
        "manifest_uri": f"file://{reference}",
        "manifest_rows": INSTANCES,
        "manifest_sha256": f"{number:064x}",
        "try_number": 1,
    }


def fill(rows: int) -> None:
    """Put so many tasks into the database, spread over the days."""
    from airflow.models.dagrun import DagRun  # noqa: TID251
    from airflow.utils.session import create_session
    from airflow.utils.state import DagRunState

    from tests.support.kept_runs import add_run

    begin = datetime.now(UTC) - timedelta(days=DAYS)
    step = timedelta(days=DAYS) / rows
    for first in range(0, rows, MAPPED):
        night = begin + step * first
        with create_session(scoped=False) as session:
            run = DagRun(
                dag_id=f"nightly_{first // MAPPED % DAGS}",
                run_id=f"scheduled__{night.isoformat()}",
                run_type="scheduled",
                state=DagRunState.SUCCESS,
                run_after=night,
            )
            tasks: list[dict[str, Any]] = []
            for number in range(first, min(first + MAPPED, rows)):
                missing = 3 if number % 50 == 7 else 0
                value = summary_of(number, missing)
                running = number == rows - 1
                task: dict[str, Any] = {
                    "begun": begin + step * number,
                    "ended": None if running else begin + step * number + timedelta(seconds=22),
                    "state": "running" if running else "failed" if missing else "success",
                    "label": f"{value['study_instance_uids'][0]} CT",
                    "pool": "pacs",
                    "stored": {"progress": {"phase": "get", "done": INSTANCES, "total": INSTANCES, "failed": missing,
                                            "bytes": BYTES, "bytes_per_second": 25e6, "associations": 1,
                                            "updated_at": "2026-01-31T01:00:00+00:00"}},
                }  # fmt: skip
                if not running:
                    task["summary"] = value
                    task["return_value"] = {"kind": "dicom-manifest", "schema": 1, "rows": INSTANCES, "bytes": 200_000,
                                            "manifest_uri": value["manifest_uri"], "verdict": value["verdict"],
                                            "sha256": value["manifest_sha256"]}  # fmt: skip
                tasks.append(task)
            add_run(session, run, tasks)
            session.commit()


def sizes(database: str) -> dict[str, int]:
    """Bytes of each table with its indexes; of SQLite those of its file."""
    from airflow.utils.session import create_session
    from sqlalchemy import text

    with create_session(scoped=False) as session:
        if database == "sqlite":
            size = "select page_count * page_size from pragma_page_count(), pragma_page_size()"
            return {"file": session.scalar(text(size))}
        session.connection().exec_driver_sql("analyze")
        return {name: session.scalar(text(f"select pg_total_relation_size('{name}')")) for name in TABLES}


def pages(rows: int, moments: tuple[datetime, datetime]) -> dict[str, str]:
    """What is asked for."""
    old, new = (f"{moment.date():%Y-%m-%d}" for moment in moments)
    dag, run, index = _last(rows)
    task = f"/dags/{dag}/runs/{run}/tasks/get/{index}"
    return {
        "list": "/",
        "verdict=incomplete": "/?verdict=incomplete",
        "source": "/?source=ARCHIVE1%4010.20.0.5:11112",
        "dag_id": "/?dag_id=nightly_1",
        "one day, the newest": f"/?since={new}&until={new}",
        "one day, the oldest": f"/?since={old}&until={old}",
        "page 900": "/?page=900",
        "tab": task,
        "progress": f"{task}/progress",
    }


def _last(rows: int) -> tuple[str, str, int]:
    """The task that runs: DAG, run and map index."""
    from urllib.parse import quote

    from airflow.models import TaskInstance  # noqa: TID251
    from airflow.utils.session import create_session
    from sqlalchemy import select

    columns = TaskInstance.__table__.c
    with create_session(scoped=False) as session:
        found = session.execute(select(columns.dag_id, columns.run_id).where(columns.state == "running")).one()
    return found.dag_id, quote(found.run_id, safe=""), (rows - 1) % MAPPED


def measure(rows: int, database: str, runs: int) -> dict[str, Any]:
    """Fill, ask, and say how long it took."""
    from airflow.utils import db

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        db.initdb()
        began = time.monotonic()
        fill(rows)
        filled = time.monotonic() - began
        from airflow.api_fastapi.app import create_app
        from starlette.testclient import TestClient

        found: dict[str, Any] = {}
        with TestClient(create_app("core"), base_url="http://localhost") as client:
            token = client.post("/auth/token", json={"username": "admin", "password": "secret"}).json()["access_token"]
            now = datetime.now(UTC)
            for name, path in pages(rows, (now - timedelta(days=DAYS - 1), now - timedelta(days=1))).items():
                wall, own = [], []
                # Not the first, which makes connections and compiles statements.
                for _ in range(runs + 1):
                    at, cpu = time.perf_counter(), time.process_time()
                    answer = client.get(f"/dicom-get{path}", headers={"authorization": f"Bearer {token}"})
                    wall.append(time.perf_counter() - at)
                    own.append(time.process_time() - cpu)
                    if answer.status_code != 200:
                        raise SystemExit(f"{path}: {answer.status_code} {answer.text[:500]}")
                found[name] = {"seconds": round(median(wall[1:]), 3), "cpu": round(median(own[1:]), 3)}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
    size = sizes(database)
    return {"database": database, "rows": rows, "filled": round(filled), "pages": found, "peak_MiB": peak, "size": size}


def one(rows: int, database: str, runs: int) -> None:
    """Measure one number of rows in this process."""
    from tests.support.postgres import Postgres

    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        passwords = folder / "passwords.json"
        passwords.write_text(json.dumps({"admin": "secret"}))
        environment = {"AIRFLOW__DATABASE__SQL_ALCHEMY_CONN": f"sqlite:///{folder}/airflow.db"}
        if database == "postgresql":
            environment = stack.enter_context(Postgres()).environment
        os.environ |= {
            **environment,
            "AIRFLOW_HOME": str(folder),
            "AIRFLOW__API_AUTH__JWT_SECRET": "for the benchmark alone, long enough for a key" * 2,
            "AIRFLOW__CORE__LOAD_EXAMPLES": "False",
            "AIRFLOW__CORE__SIMPLE_AUTH_MANAGER_PASSWORDS_FILE": str(passwords),
            "AIRFLOW__CORE__SIMPLE_AUTH_MANAGER_USERS": "admin:admin",
            "AIRFLOW__CORE__UNIT_TEST_MODE": "True",
        }
        print(json.dumps(measure(rows, database, runs)), flush=True)


def main() -> int:
    """Measure each in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--database", nargs="+", choices=("sqlite", "postgresql"), default=["sqlite"])
    parser.add_argument("--runs", type=int, default=5)
    options = parser.parse_args()
    if len(options.rows) == len(options.database) == 1:
        one(options.rows[0], options.database[0], options.runs)
        return 0
    for database in options.database:
        for rows in options.rows:
            chosen = ["--rows", str(rows), "--database", database, "--runs", str(options.runs)]
            subprocess.run([sys.executable, __file__, *chosen], check=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
