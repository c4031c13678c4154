"""Count what mapped `get` tasks leave: rows and bytes of Airflow's tables, files, ledgers, C-FINDs and associations.

    python benchmarks/task_rows.py --studies 40 --instances 20
    python benchmarks/task_rows.py --studies 0 --instances 1000 --series 4 --combine 1000

Starts a real Airflow on SQLite with its components as processes, retrieves the studies from the embedded PACS in one
run, one task a study, and prints the numbers for one task. Without studies it retrieves one by the engine alone, and
prints what was asked for, and what it costs to combine so many manifests of that size into one.
"""

from __future__ import annotations

import argparse
import json
import resource
import sqlite3
import sys
import tempfile
import time
from collections import Counter
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from airflow_dicom_get import GetScu, combine_manifests  # noqa: E402
from airflow_dicom_get.testing.pacs import EmbeddedPacs  # noqa: E402
from airflow_dicom_get.testing.sample_data import big_study  # noqa: E402
from tests.support.live_airflow import LiveAirflow  # noqa: E402


def tables_of(database: Path) -> dict[str, tuple[int, int]]:
    """Rows, and bytes of their values as text, of each table."""
    found = {}
    with closing(sqlite3.connect(database)) as connection:
        names = [name for (name,) in connection.execute("select name from sqlite_master where type = 'table'")]
        for name in names:
            columns = [column for _, column, *_ in connection.execute(f'pragma table_info("{name}")')]
            sizes = "+".join(f'coalesce(length("{column}"), 0)' for column in columns)
            rows, size = connection.execute(f'select count(*), coalesce(sum({sizes}), 0) from "{name}"').fetchone()
            found[name] = rows, size
    return found


def xcoms_of(database: Path) -> dict[str, dict[str, float]]:
    """How many XComs of each key the tasks have, and how long they are."""
    with closing(sqlite3.connect(database)) as connection:
        statement = "select key, count(*), avg(length(value)) from xcom where task_id = 'get' group by key"
        return {key: {"rows": rows, "bytes": round(size)} for key, rows, size in connection.execute(statement)}


def asked(folder: Path, instances: int, series: int, combine: int) -> dict[str, Any]:
    """What one retrieval into a folder asks for, the bytes of ledger and manifest, and how large combining gets."""
    uid = big_study(folder / "pacs", instances, 1024, series=series)
    with EmbeddedPacs(folder / "pacs") as pacs:
        options: dict[str, Any] = {
            "destination": str(folder / "out"),
            "transcript": str(folder / "said"),
            "list_limit": 0,
        }
        result = GetScu(f"PACS@127.0.0.1:{pacs.port}", **options).get_study({"StudyInstanceUID": uid})
        if result.verdict != "complete":
            raise SystemExit(f"the retrieval ended as {result}")
        said = map(json.loads, (folder / "said").read_text().splitlines())
        ours = [one for one in said if one.get("from") == "us" and "level" in one]
        requests = Counter(f"{one['message']} {one['level']}" for one in ours)
        opened = pacs.total_associations
    sizes = {
        name: round(sum(path.stat().st_size for path in (folder / "out").rglob(ending)) / instances, 1)
        for name, ending in (("manifest", "*.parquet"), ("ledger", "*.jsonl"))
    }
    found = {"instances": instances, "series": series, "requests": requests, "associations": opened, "bytes": sizes}
    if combine:
        manifest = next((folder / "out").rglob("*.parquet"))
        began = time.process_time()
        rows = combine_manifests([manifest] * combine, folder / "combined.parquet")["rows"]
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
        found["combined"] = {"rows": rows, "cpu": round(time.process_time() - began, 1), "peak_MiB": peak}
    return found


def main() -> int:
    """Retrieve, count, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--studies", type=int, default=40)
    parser.add_argument("--instances", type=int, default=20)
    parser.add_argument("--series", type=int, default=4)
    parser.add_argument("--combine", type=int, default=0)
    options = parser.parse_args()
    count, size = options.studies, options.studies * options.instances
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        if not count:
            print(json.dumps(asked(folder, options.instances, options.series, options.combine), indent=1))
            return 0
        for number in range(count):
            big_study(
                folder / "pacs" / f"{number:04}", options.instances, 4096, series=options.series, name=str(number)
            )
        (folder / "airflow").mkdir()
        airflow = stack.enter_context(LiveAirflow(folder / "airflow", dags=ROOT / "tests" / "live" / "dags"))
        pacs = stack.enter_context(EmbeddedPacs(folder / "pacs", ae_title="PACS"))
        airflow.make_pool("pacs", 2)
        extra = {"list_limit": 0}
        airflow.connect("pacs", conn_type="dicom", host="127.0.0.1", port=pacs.port, login="PACS", extra=extra)
        database = airflow.home.AIRFLOW_HOME / "airflow.db"
        before = tables_of(database)
        run = airflow.trigger("live_night", destination=str(folder / "out"))
        if run.wait(900) != "success":
            raise SystemExit("the run failed")
        after = tables_of(database)
        tables = {
            name: {"rows": round(rows - before[name][0], 2) / count, "bytes": round((held - before[name][1]) / count)}
            for name, (rows, held) in after.items()
            if rows > before[name][0]
        }
        places = {
            "manifest": list((folder / "out").rglob("*.parquet")),
            "ledger": list((folder / "out").rglob("*.jsonl")),
        }
        files = {
            name: {
                "files": len(paths) / count,
                "bytes_each_instance": round(sum(path.stat().st_size for path in paths) / size, 1),
            }
            for name, paths in places.items()
        }
        print(json.dumps({**vars(options), "tables": tables, "xcom": xcoms_of(database), "files": files}, indent=1))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
